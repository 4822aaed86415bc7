"""What a disturbed round must have in common with the undisturbed one, and what it must not leave behind."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recgpt import storage
from recgpt.model.export import EXPORT_FOLDER
from recgpt.schema import CANDIDATES_MANIFEST_FILE, MANIFEST_FILE, SUCCESS_FILE
from recgpt.training import checkpoint
from recgpt.training.environment import ENVIRONMENT_FILE
from recgpt.training.rank_log import LOGS_FOLDER

RUN, CANDIDATES, EVALUATION = "run", "candidates", "evaluation.json"
_TEMPORARY = re.compile(r"\.[^/]+\.[0-9a-f]{8}\.partial$")  # what `storage.remove_temporary_files` takes
_COMPARED = ("model", "training", "candidates", "evaluation")
COMPARED = len(_COMPARED)
_PLACES = ("model", "dataset")  # in the JSON of an evaluation


@dataclass(frozen=True)
class Outcome:
    """What a round has made."""

    model: dict[str, str]
    """SHA-256 of the exported model's files, by name."""
    training: dict[str, Any]
    """Best validation, epochs and steps, by stage."""
    candidates: dict[str, str]
    """SHA-256 of the part files, by name."""
    evaluation: dict[str, Any]
    """Empty if there was none."""
    steps: int

    @classmethod
    def of(cls, url: str) -> "Outcome":
        """What lies in a folder that a round has written."""
        run, candidates = storage.join(url, RUN), storage.join(url, CANDIDATES)
        stages = storage.read_json(storage.join(run, MANIFEST_FILE))["stages"]
        result = storage.join(url, EVALUATION)
        evaluation = storage.read_json(result) if storage.exists(result) else {}
        return cls(
            _checksums(storage.join(run, EXPORT_FOLDER)),
            stages,
            {name: sha for name, sha in _checksums(candidates).items() if name.startswith("part-")},
            {name: value for name, value in evaluation.items() if name not in _PLACES},
            max(stage["step"] for stage in stages.values()),
        )

    def compare(self, undisturbed: "Outcome") -> dict[str, bool]:
        """Which of its parts are the same, to the last bit."""
        return {name: getattr(self, name) == getattr(undisturbed, name) for name in _COMPARED}


@dataclass(frozen=True)
class Leftovers:
    """Files that an undisturbed round does not leave."""

    temporary: int
    """Taken by the cleaner."""
    unfinished_checkpoints: int
    unexpected: list[str]


def find_leftovers(url: str) -> Leftovers:
    """Looks at all files of a round, and removes the temporary ones as the product's cleaner does."""
    before = _files(url)
    temporary = [name for name in before if _TEMPORARY.search(name)]
    storage.remove_temporary_files(url)
    run = storage.join(url, RUN)
    finished = set(checkpoint.finished(run))
    seen = {name.split("/")[2] for name in before if name.startswith(f"{RUN}/{checkpoint.FOLDER}/")}
    unexpected = [name for name in _files(url) if not _is_documented(name)]
    return Leftovers(len(temporary), len(seen - finished), unexpected)


def _is_documented(name: str) -> bool:
    top, _, rest = name.partition("/")
    if top == RUN:
        files = ("settings.json", "attempt.json", ENVIRONMENT_FILE, "metrics.jsonl", MANIFEST_FILE)
        folders = (checkpoint.FOLDER, "tensorboard", LOGS_FOLDER, EXPORT_FOLDER)
        return rest in files or rest.partition("/")[0] in folders
    if top == CANDIDATES:
        return rest in (CANDIDATES_MANIFEST_FILE, SUCCESS_FILE) or rest.startswith("part-")
    return name == EVALUATION


def _files(url: str) -> list[str]:
    """All files below a folder, hidden ones too, by their path in it."""
    if storage.is_local(url):
        found = [Path(folder, name) for folder, _, names in os.walk(url) for name in names]
        return sorted(str(path.relative_to(url)) for path in found)
    filesystem, path = storage.filesystem_and_path(url)
    # What ends in a slash only stands for a folder; Ray Train makes such objects.
    return sorted(name[len(path) + 1 :] for name in filesystem.find(path) if not name.endswith("/"))


def _checksums(url: str) -> dict[str, str]:
    return {name: storage.checksum(storage.join(url, name)) for name in storage.list_names(url)}
