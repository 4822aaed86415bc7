"""A scaling experiment: the file that describes it, and the points that are measured."""

import difflib
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from recgpt.config import TrainSettings
from recgpt.errors import UserError
from recgpt.settings_reading import from_dict, known_keys, read_yaml, shipped_file, to_dict
from recgpt.training.runs import flat

SHIPPED = "configs/scaling"
WORKERS = "workers"
TOKENS_PER_WORKER = "tokens_per_worker"
_TOKENS, _LANES = "data.tokens_per_batch", "data.lanes"
_LEAST_LANES = 4

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]


@checked_dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class MadeUpDataset:
    """Histories made up for an experiment."""

    users: Positive
    items: Positive
    """Different ones, drawn evenly."""
    lengths: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)]
    """Items of a training history are drawn from these."""


@checked_dataclass(config=ConfigDict(extra="forbid"))
class Experiment:
    """What the file of an experiment holds."""

    dataset: MadeUpDataset | str
    """Made up, or the folder of a prepared one (path or URL)."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of every point, nested or dotted, over the defaults of `recgpt train` and pre-training alone."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Values by key; every combination is a point. Keys are settings, dotted; `users`, `items` and `lengths`
    of a made-up dataset; and `tokens_per_worker`: `data.tokens_per_batch` is then that times the workers."""
    points: list[dict[str, Any]] = Field(default_factory=list)
    """Further points, with the same keys."""
    warm_up: NotNegative = 5
    """Steps before those that are measured (of a point)."""
    steps: Positive = 20
    """Steps that are measured (of a point)."""
    repeats: Positive = 3
    """How often each point is measured, each time in new processes."""
    recall_users: NotNegative = 0
    """Users that the model then makes candidates for, in one process; 0: none. Takes a checkpoint, too."""
    checkpoint: bool = False
    """Measure a checkpoint after the steps."""
    timeout_seconds: Positive = 600
    """After so long, from the start of its processes, a point counts as failed."""


@dataclass(frozen=True)
class Point:
    """One training to measure."""

    told: dict[str, Any]
    """What the file says of it alone, by key."""
    settings: TrainSettings
    dataset: MadeUpDataset | str

    @property
    def label(self) -> str:
        return " ".join(f"{key}={_text(value)}" for key, value in self.told.items()) or "the settings"

    def value(self, key: str) -> Any:
        """What a key of some point is at this one; None if it is a made-up dataset's and this one is not."""
        if key == TOKENS_PER_WORKER:
            return self.settings.data.tokens_per_batch // self.settings.workers
        if key in _DATASET_KEYS:
            return getattr(self.dataset, key, None)
        return flat(to_dict(self.settings))[key]


_DATASET_KEYS = tuple(field.name for field in fields(MadeUpDataset))
_KEYS = (*known_keys(TrainSettings), *_DATASET_KEYS, TOKENS_PER_WORKER)


def load_experiment(name: str) -> Experiment:
    """An experiment by the name of a shipped file, by path or by URL.

    Raises ``UserError`` if there is no such file, or for an unknown key or a wrong value in it.
    """
    values = read_yaml(shipped_file(SHIPPED, name, ".yaml"))
    if isinstance(values.get("dataset"), dict):
        values["dataset"] = from_dict(MadeUpDataset, values["dataset"], f"{name}, dataset")
    return from_dict(Experiment, values, name)


def points_of(experiment: Experiment, name: str) -> list[Point]:
    """The points, those of the grid first, its last key changing fastest; each once.

    Raises ``UserError``, which ``name`` begins, for an unknown key or for values that do not go together.
    """
    grid = itertools.product(*experiment.grid.values())
    told = [dict(zip(experiment.grid, values, strict=True)) for values in grid] if experiment.grid else []
    told += experiment.points
    points = [_point(experiment, some, name) for some in told or [{}]]
    return list({point.label: point for point in points}.values())


def swept_keys(points: list[Point]) -> list[str]:
    """The keys that some point names, in their order."""
    return list(dict.fromkeys(key for point in points for key in point.told))


def identity(experiment: Experiment, point: Point, dataset: str) -> str:
    """A name for all that a measurement depends on, but the code, the machine and chance.

    ``dataset``: the fingerprint of the dataset's contents.
    """
    content = {
        "dataset": dataset,
        "settings": to_dict(point.settings),
        "warm_up": experiment.warm_up,
        "steps": experiment.steps,
        "recall_users": experiment.recall_users,
        "checkpoint": experiment.checkpoint,
    }
    return digest(content)


def digest(content: Any) -> str:
    """A short name of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _point(experiment: Experiment, told: Mapping[str, Any], name: str) -> Point:
    shared = flat(experiment.settings)
    for key in (*shared, *told):
        if key not in _KEYS:
            nearest = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            raise UserError(f"{name}: unknown key {key}; the nearest known one is {nearest}")
    where = f"{name}, {Point(dict(told), TrainSettings(), '').label}"
    values = {**shared, **told}
    dataset = _dataset(experiment.dataset, values, where)
    per_worker = values.pop(TOKENS_PER_WORKER, None)
    if per_worker is not None and _TOKENS in values:
        raise UserError(f"{where}: {TOKENS_PER_WORKER} and {_TOKENS} contradict each other; give one of them")
    workers = values.get(WORKERS, 1)
    if isinstance(workers, int):  # anything else is refused with the settings, below
        values.setdefault(_LANES, max(_LEAST_LANES, workers))
        if isinstance(per_worker, int):
            values[_TOKENS] = per_worker * workers
        elif per_worker is not None:
            raise UserError(f"{where}: {TOKENS_PER_WORKER} is no whole number")
    defaults = flat(to_dict(TrainSettings(stages=("pretrain",))))
    return Point(dict(told), from_dict(TrainSettings, _nested(defaults | values), where), dataset)


def _dataset(dataset: MadeUpDataset | str, values: dict[str, Any], where: str) -> MadeUpDataset | str:
    """The dataset of a point, whose keys are taken out of ``values``."""
    changed = {key: values.pop(key) for key in _DATASET_KEYS if key in values}
    if not changed:
        return dataset
    if isinstance(dataset, str):
        raise UserError(
            f"{where}: {next(iter(changed))} is of made-up datasets, and {dataset} is a prepared one"
        )
    return from_dict(MadeUpDataset, asdict(dataset) | changed, where)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``flat``."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        inner = result
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = value
    return result


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
