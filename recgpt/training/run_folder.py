"""The folder of a run: started, gone on with, finished, replaced.

settings.json     resolved settings and the fingerprints of what goes in, written first
attempt.json      the mark of the process that trains in the folder; a later one puts its own there
metrics.jsonl     one JSON object per line: training every few steps, validation after epochs
tensorboard/      the same as TensorBoard events
checkpoints/      the newest and the best
model/            the export of the final model
manifest.json     written last: with it the run is finished
"""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recgpt import storage
from recgpt.config import STAGES, TrainSettings
from recgpt.errors import UserError
from recgpt.schema import MANIFEST_FILE
from recgpt.settings_reading import to_dict
from recgpt.training import checkpoint

SETTINGS_FILE = "settings.json"
ATTEMPT_FILE = "attempt.json"
METRICS_FILE = "metrics.jsonl"
_PARTIAL = ".partial"

# What may differ when a run goes on: how fast the run is and how far it goes, not what it computes.
_MAY_DIFFER = (
    "workers",
    "min_workers",
    "threads_per_worker",
    "deepspeed",
    "stages",
    "keep_checkpoints",
    "checkpoint_every_steps",
    "checkpoint_in_background",
    "max_failures",
    "collective_timeout_seconds",
    "not_finite",
    "trackers",
)


def open_run(
    run: str,
    settings: TrainSettings,
    dataset_fingerprint: str,
    overwrite: bool,
    start_from_fingerprint: str | None = None,
) -> str | None:
    """The folder to train in: ``run`` itself, or a hidden one beside it while something is replaced.

    None if ``run`` is this very run, and finished.

    A run with the same settings, dataset and older model to start from (None: none) that has not
    finished all of ``settings.stages`` is gone on with; with ``overwrite`` an unfinished one begins
    again, and a finished one (or whatever else the folder holds) stays until the new run takes its
    place. On an object store it is removed at once.
    A run that failed before its first checkpoint is forgotten if the settings differ.
    Raises ``UserError`` if the folder holds a run with other settings or something else and ``overwrite``
    is not given, or if prompt-tuning has nothing to begin with.
    """
    storage.recover_folder(run)
    identity = {
        "settings": to_dict(settings),
        "dataset_fingerprint": dataset_fingerprint,
        "start_from_fingerprint": start_from_fingerprint,
    }
    if overwrite and not storage.is_empty(run):
        run = _place_of_the_new(run, identity)
    if storage.exists(storage.join(run, SETTINGS_FILE)):
        _check_same(run, identity)
        if set(settings.stages) <= set(finished_stages(run)):
            return None
    else:
        storage.check_output_is_free(run, overwrite=False)
    has_weights = start_from_fingerprint is not None or checkpoint.newest(run) is not None
    if settings.stages[0] != STAGES[0] and not has_weights:
        raise UserError(
            f"{run}: {settings.stages[0]} needs a pre-trained run there; add the stage {STAGES[0]}, "
            "or start from a model with --start-from"
        )
    storage.write_json(storage.join(run, SETTINGS_FILE), identity)
    return run


def run_name(folder: str) -> str:
    """The name of the run that is trained in ``folder``, also while that is the hidden one beside it."""
    name = folder.rstrip("/").rpartition("/")[2]
    return name[1:].removesuffix(_PARTIAL) if name.startswith(".") else name


def begin_attempt(folder: str) -> str:
    """Take the folder over; returns the mark by which ``check_attempt`` knows who has it."""
    attempt = secrets.token_hex(8)
    storage.write_json(storage.join(folder, ATTEMPT_FILE), {"attempt": attempt})
    return attempt


def check_attempt(folder: str, attempt: str) -> None:
    """Raises ``UserError`` if another process has taken the folder over.

    What is left of a run whose driver was killed must not write checkpoints any more.
    """
    try:
        latest = storage.read_json_object(storage.join(folder, ATTEMPT_FILE)).get("attempt")
    except UserError:
        latest = None
    if latest != attempt:
        raise UserError(f"{folder}: another run has taken over this folder; let one at a time train in it")


def finished_stages(run: str) -> list[str]:
    """The stages that a finished run has been through; none if it is not finished."""
    manifest = storage.join(run, MANIFEST_FILE)
    if not storage.exists(manifest):
        return []
    stages = storage.read_json_object(manifest).get("stages")
    if not isinstance(stages, dict):
        raise UserError(f"{manifest}: names no stages; the file is damaged, begin again with --restart")
    return list(stages)


def _place_of_the_new(run: str, identity: Mapping[str, Any]) -> str:
    """Where a run that replaces what is in ``run`` is trained; there it may have been begun already."""
    is_run = storage.exists(storage.join(run, SETTINGS_FILE))
    if not storage.is_local(run) or (is_run and not finished_stages(run)):
        storage.remove(run)  # nothing finished is lost, or the store cannot rename
        return run
    replacement = str(Path(run).with_name(f".{Path(run).name}{_PARTIAL}"))
    begun = storage.join(replacement, SETTINGS_FILE)
    if not storage.exists(begun) or _difference(storage.read_json_object(begun), identity):
        storage.remove(replacement)
    return replacement


def _check_same(run: str, identity: Mapping[str, Any]) -> None:
    difference = _difference(storage.read_json_object(storage.join(run, SETTINGS_FILE)), identity)
    if difference and not finished_stages(run) and checkpoint.newest(run) is None:
        storage.remove(run)  # it failed before it had anything to lose
    elif difference:
        raise UserError(
            f"{run}: holds a run with another {difference}; "
            "use the same settings and release to go on with it, another folder, or --restart"
        )


def finish_run(folder: str, run: str, summary: dict[str, Any]) -> None:
    """Write the manifest, and put the folder in the place of the run that it replaces."""
    storage.write_json(storage.join(folder, MANIFEST_FILE), summary)
    if folder == run:
        return
    storage.replace_folder(folder, run)


def read_metrics(folder: str, until_step: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to a step; what a lost process wrote after its checkpoint is dropped.

    Raises ``UserError`` if a line is damaged.
    """
    url = storage.join(folder, METRICS_FILE)
    if not storage.exists(url):
        return []
    lines = []
    for number, text in enumerate(storage.read_bytes(url).split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise UserError(f"{url}: line {number} is damaged; remove it, or begin again with --restart")
        lines.append(line)
    return [line for line in lines if line["step"] <= until_step]


def write_metrics(folder: str, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    storage.write_bytes(storage.join(folder, METRICS_FILE), text.encode())


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first key in which the two differ, of those that matter."""
    for key in sorted(set(old) | set(new)):
        if key in _MAY_DIFFER or old.get(key) == new.get(key):
            continue
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            if difference := _difference(old[key], new[key], f"{prefix}{key}."):
                return difference
            continue
        return f"{prefix}{key}"
    return None
