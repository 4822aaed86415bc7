"""Runs side by side: what each was told otherwise than by default, how far it is, and how good.

Only small files are read: settings, metrics and the manifest.
"""

from dataclasses import dataclass
from typing import Any

from recgpt import storage
from recgpt.config import TrainSettings
from recgpt.errors import UserError
from recgpt.schema import MANIFEST_FILE
from recgpt.settings_reading import known_keys, to_dict
from recgpt.training.run_folder import SETTINGS_FILE, read_metrics

_ALL_STEPS = 2**62


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself."""

    url: str
    settings: dict[str, Any]
    """All of them, by dotted key; empty if the file is of another release."""
    finished: bool
    last: dict[str, dict[str, Any]]
    """The newest line of each kind in metrics.jsonl: `train`, `validation`, `checkpoint`."""
    best: dict[str, tuple[float, int]]
    """By stage: the best value of the metric that chooses, and the epoch that reached it."""

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def metric(self) -> str:
        """The metric that chooses the best checkpoint."""
        return str(self.settings.get("validation.metric", "ndcg@10"))

    def told(self) -> dict[str, Any]:
        """The settings that are not the defaults."""
        defaults = flat(to_dict(TrainSettings()))
        return {key: value for key, value in self.settings.items() if value != defaults.get(key)}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def read_run(url: str) -> Run:
    """Raises ``UserError`` if there is no run, or if one of its files cannot be read."""
    url = storage.absolute(url)
    file = storage.join(url, SETTINGS_FILE)
    if not storage.exists(file):
        raise UserError(f"{url}: no run here ({SETTINGS_FILE} is missing); give a folder of `recgpt train`")
    told = storage.read_json_object(file).get("settings")
    if not isinstance(told, dict):
        raise UserError(f"{file}: names no settings; it is damaged")
    known = set(known_keys(TrainSettings))
    settings = {key: value for key, value in flat(told).items() if key in known}
    metric = str(settings.get("validation.metric", "ndcg@10"))
    last: dict[str, dict[str, Any]] = {}
    best: dict[str, tuple[float, int]] = {}
    for line in _metrics(url):
        last[line["kind"]] = line
        if line["kind"] == "validation" and line[metric] > best.get(line["stage"], (-1.0, 0))[0]:
            best[line["stage"]] = (line[metric], line["epoch"])
    return Run(url, settings, storage.exists(storage.join(url, MANIFEST_FILE)), last, best)


def _metrics(url: str) -> list[dict[str, Any]]:
    try:
        return read_metrics(url, _ALL_STEPS)
    except FileNotFoundError:
        return []  # it has only begun


def find_runs(folder: str) -> list[Run]:
    """The runs in a folder, by name; ``folder`` may be a run itself.

    Raises ``UserError`` if there is none.
    """
    folder = storage.absolute(folder)
    if storage.exists(storage.join(folder, SETTINGS_FILE)):
        return [read_run(folder)]
    places = [storage.join(folder, name) for name in sorted(storage.list_names(folder))]
    runs = [read_run(url) for url in places if storage.exists(storage.join(url, SETTINGS_FILE))]
    if not runs:
        raise UserError(f"{folder}: no run here; give a folder that holds run folders of `recgpt train`")
    return runs


def differing(runs: list[Run]) -> list[str]:
    """The settings in which the runs are not all the same, by dotted key."""
    keys = sorted({key for run in runs for key in run.settings})
    return [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]
