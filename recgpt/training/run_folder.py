"""The folder of a run: started, gone on with, finished, replaced.

settings.json     resolved settings and the dataset's fingerprint, written first
metrics.jsonl     one JSON object per line: training every few steps, validation every epoch
tensorboard/      the same as TensorBoard events
checkpoints/      the newest and the best
model/            the export of the final model
manifest.json     written last: with it the run is finished
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recgpt import storage
from recgpt.config import TrainSettings, to_dict
from recgpt.errors import UserError
from recgpt.schema import MANIFEST_FILE

SETTINGS_FILE = "settings.json"
METRICS_FILE = "metrics.jsonl"
MODEL_FOLDER = "model"

# What may differ when a run goes on: it changes how fast the run is, not what it computes.
_MAY_DIFFER = ("workers", "threads_per_worker", "deepspeed", "keep_checkpoints", "checkpoint_every_steps")


def is_finished(run: str) -> bool:
    return storage.exists(storage.join(run, MANIFEST_FILE))


def open_run(run: str, settings: TrainSettings, vocabulary_fingerprint: str, overwrite: bool) -> str:
    """The folder to train in: ``run`` itself, or a hidden one beside it while a finished run is replaced.

    On an object store a finished run that is to be replaced is removed at once.
    An unfinished run with the same settings is gone on with. Raises ``UserError`` if the folder holds a
    finished run and ``overwrite`` is not given, an unfinished one with other settings, or something else.
    """
    if is_finished(run):
        storage.check_output_is_free(run, overwrite)
        run = _replacement(run)
    identity = {"settings": to_dict(settings), "vocabulary_fingerprint": vocabulary_fingerprint}
    identity_url = storage.join(run, SETTINGS_FILE)
    if storage.exists(identity_url):
        difference = _difference(storage.read_json(identity_url), identity)
        if difference and not overwrite:
            raise UserError(
                f"{run}: holds an unfinished run with another {difference}; "
                "use the same settings to go on with it, another folder, or --overwrite"
            )
        if difference:
            storage.remove(run)
    else:
        if overwrite:
            storage.remove(run)
        storage.check_output_is_free(run, overwrite=False)
    storage.write_json(identity_url, identity)
    return run


def finish_run(folder: str, run: str, summary: dict[str, Any]) -> None:
    """Write the manifest, and put the folder in the place of the run that it replaces."""
    storage.write_json(storage.join(folder, MANIFEST_FILE), summary)
    if folder == run:
        return
    storage.replace_folder(folder, run)


def read_metrics(folder: str, until_step: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to a step; what a lost process wrote after its checkpoint is dropped."""
    url = storage.join(folder, METRICS_FILE)
    if not storage.exists(url):
        return []
    lines = [json.loads(line) for line in storage.read_bytes(url).decode().splitlines()]
    return [line for line in lines if line["step"] <= until_step]


def write_metrics(folder: str, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    storage.write_bytes(storage.join(folder, METRICS_FILE), text.encode())


def _replacement(run: str) -> str:
    if not storage.is_local(run):  # an object store cannot rename: the old run goes before the new one
        storage.remove(storage.join(run, MANIFEST_FILE))
        storage.remove(run)
        return run
    return str(Path(run).with_name(f".{Path(run).name}.partial"))


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
