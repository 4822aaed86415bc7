"""What trainings on more GPUs, and of more items, than were measured would take: projections.

Everything is worked out with the model of costs (``recgpt.scaling.costs``) on a made-up workload, of which
each GPU keeps its share as GPUs are added. Constants that nobody measured at this size are varied: a figure
comes as a range.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from recgpt.config import TrainSettings
from recgpt.machines import Machine
from recgpt.scaling.costs import StepTime, memory_per_rank, step_time
from recgpt.scaling.plan import MOST_OF_MEMORY, memory_of_rank
from recgpt.scaling.workload import StepLoad, Workload
from recgpt.settings_reading import to_dict

NOTE = "Projection: worked out with a model of costs; nothing of it was measured."
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
ITEMS = (10_000_000, 30_000_000, 100_000_000, 300_000_000, 1_000_000_000)
EPOCH_USERS = 100_000_000
MOST_ITEMS = 2**31 - 1  # item indices are int32 in histories


class Table(NamedTuple):
    """How a sharded table is trained and kept."""

    optimizer: Literal["adam", "adagrad", "sgd"]
    row_dtype: Literal["float32", "bfloat16"]

    def __str__(self) -> str:
        return ", ".join(self)


# What a table costs in memory falls from one to the next.
TABLES = (
    Table("adam", "float32"),
    Table("adam", "bfloat16"),
    Table("adagrad", "float32"),
    Table("sgd", "float32"),
    Table("adagrad", "bfloat16"),
    Table("sgd", "bfloat16"),
)
_ZERO_STAGES = (1, 2, 3)  # in the order of what they exchange, the least first


class Factors(NamedTuple):
    """By how much a constant of a machine may be off: the constant times each."""

    worse: float
    better: float


# Rates of data sheets are the most that there can be, and nothing is better than they.
UNCERTAIN = {
    "matrix_efficiency": Factors(0.5, 1.5),
    "memory_efficiency": Factors(0.6, 1.15),
    "node_bandwidth": Factors(0.5, 1.0),
    "network_bandwidth": Factors(0.4, 1.0),
    "latency": Factors(3.0, 0.5),
    "step_overhead": Factors(2.0, 0.5),
}


class Range(NamedTuple):
    """A figure with all uncertain constants at their worst or best, and with the constants as they are."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Point:
    """A training on some GPUs; all of it is projected."""

    gpus: int
    items: int
    table: Table
    """The first of ``TABLES`` that fits."""
    zero_stage: int
    memory_bytes: float
    """Of a GPU; it has no range, as nothing that is uncertain changes it."""
    step_parts: dict[str, float]
    """Seconds, with the constants as they are."""
    step_seconds: Range
    tokens_per_second: Range
    """Of all GPUs."""
    epoch_seconds: Range
    cost: Range | None
    """Of an epoch, in USD; None if no price is known."""

    @property
    def dominating(self) -> str:
        """The longest part of a step."""
        return max(self.step_parts, key=self.step_parts.__getitem__)


@dataclass(frozen=True)
class Choice:
    """What fits a number of GPUs and of items; None: nothing does."""

    gpus: int
    items: int
    table: Table | None
    """Of a sharded table: the first of ``TABLES`` that fits."""
    zero_stage: int | None
    """That goes with it: the lowest that fits."""
    replicated_zero_stage: int | None
    """With the whole table on every GPU under Adam: the lowest stage that fits."""
    replicated_slowdown: float | None
    """Its step, in steps with the sharded table."""


@dataclass(frozen=True)
class Projection:
    """``largest``: items of the largest table by table and number of GPUs, ``MOST_ITEMS`` at most."""

    device: str
    memory_available: float
    """Bytes of a GPU that a training may use."""
    tokens_per_gpu: int
    history_items: int
    settings: TrainSettings
    points: list[Point]
    choices: list[Choice]
    largest: dict[str, dict[int, int]]


def project(
    settings: TrainSettings, machine: Machine, gpus: Sequence[int] = GPUS, items: Sequence[int] = ITEMS
) -> Projection:
    """Project a training to each number of GPUs and of items.

    Of ``settings`` the model, the loss and the share of a batch of each of its workers are kept; how the
    table is laid out, and ZeRO, are chosen.
    """
    # The second copy that a checkpoint is written from lies in the host's memory, not in the GPU's.
    settings = dataclasses.replace(settings, checkpoint_in_background=False, min_workers=None)
    choices = [_choose(settings, machine, count, size) for size in items for count in gpus]
    points = [_point(settings, machine, choice) for choice in choices if choice.table is not None]
    largest = {
        str(table): {count: _largest(settings, machine, table, count) for count in gpus} for table in TABLES
    }
    return Projection(
        device=machine.device,
        memory_available=MOST_OF_MEMORY * memory_of_rank(settings, machine),
        tokens_per_gpu=_tokens_per_gpu(settings),
        history_items=settings.model.max_history,
        settings=settings,
        points=points,
        choices=choices,
        largest=largest,
    )


def made_up_workload(settings: TrainSettings, items: int) -> Workload:
    """A step and an epoch of ``EPOCH_USERS`` users whose histories are as long as the model can take.

    No item occurs twice on a rank in a step: what lookups cost at most.
    """
    history = settings.model.max_history
    tokens = _tokens_per_gpu(settings) * settings.workers
    users = tokens / history
    load = StepLoad(
        users=users,
        tokens=tokens,
        attended_pairs=users * history * (history + 1) / 2,
        distinct_items=min(_tokens_per_gpu(settings), items) * settings.workers,
    )
    return Workload(items, EPOCH_USERS, load, steps_per_epoch=EPOCH_USERS / users)


def _tokens_per_gpu(settings: TrainSettings) -> int:
    return -(-settings.data.tokens_per_batch // settings.workers)


def on_gpus(settings: TrainSettings, gpus: int) -> TrainSettings:
    """The settings for so many workers, each with the share of a batch that it had."""
    data = dataclasses.replace(
        settings.data,
        tokens_per_batch=_tokens_per_gpu(settings) * gpus,
        lanes=max(settings.data.lanes, gpus),
    )
    return dataclasses.replace(settings, workers=gpus, data=data)


def _with_table(
    settings: TrainSettings, placement: Literal["replicated", "sharded"], table: Table
) -> TrainSettings:
    changed = dataclasses.replace(
        settings.item_table, placement=placement, optimizer=table.optimizer, row_dtype=table.row_dtype
    )
    return dataclasses.replace(settings, item_table=changed)


def _memory(settings: TrainSettings, machine: Machine, items: int, zero_stage: int) -> float:
    return memory_per_rank(settings, made_up_workload(settings, items), zero_stage, machine).total


def _lowest_stage(settings: TrainSettings, machine: Machine, items: int) -> int | None:
    """The ZeRO stage that exchanges the least of those whose memory a GPU has; None: no stage fits."""
    available = MOST_OF_MEMORY * memory_of_rank(settings, machine)
    fitting = (stage for stage in _ZERO_STAGES if _memory(settings, machine, items, stage) <= available)
    return next(fitting, None)


def _choose(settings: TrainSettings, machine: Machine, gpus: int, items: int) -> Choice:
    wide = on_gpus(settings, gpus)
    replicated = _with_table(wide, "replicated", TABLES[0])
    whole_stage = _lowest_stage(replicated, machine, items)
    for table in TABLES:
        sharded = _with_table(wide, "sharded", table)
        stage = _lowest_stage(sharded, machine, items)
        if stage is None:
            continue
        slowdown = None
        if whole_stage is not None:
            whole = _step(replicated, machine, items, whole_stage).total
            slowdown = whole / _step(sharded, machine, items, stage).total
        return Choice(gpus, items, table, stage, whole_stage, slowdown)
    return Choice(gpus, items, None, None, whole_stage, None)


def _step(settings: TrainSettings, machine: Machine, items: int, zero_stage: int) -> StepTime:
    return step_time(settings, made_up_workload(settings, items), zero_stage, machine)


def _point(settings: TrainSettings, machine: Machine, choice: Choice) -> Point:
    assert choice.table is not None
    assert choice.zero_stage is not None
    wide = _with_table(on_gpus(settings, choice.gpus), "sharded", choice.table)
    work = made_up_workload(wide, choice.items)
    slow, middle, fast = (
        step_time(wide, work, choice.zero_stage, varied)
        for varied in (_varied(machine, "worse"), machine, _varied(machine, "better"))
    )
    seconds = Range(fast.total, middle.total, slow.total)
    epoch = Range(*(work.steps_per_epoch * each for each in seconds))
    price = machine.price_per_hour
    return Point(
        gpus=choice.gpus,
        items=choice.items,
        table=choice.table,
        zero_stage=choice.zero_stage,
        memory_bytes=_memory(wide, machine, choice.items, choice.zero_stage),
        step_parts=dataclasses.asdict(middle),
        step_seconds=seconds,
        tokens_per_second=Range(*(work.load.tokens / each for each in reversed(seconds))),
        epoch_seconds=epoch,
        cost=None if price is None else Range(*(price * choice.gpus * each / 3600 for each in epoch)),
    )


def _varied(machine: Machine, side: str) -> Machine:
    """The machine with every uncertain constant at its ``worse`` or ``better`` end."""
    changed = {name: getattr(machine, name) * getattr(factors, side) for name, factors in UNCERTAIN.items()}
    for name in ("matrix_efficiency", "memory_efficiency"):
        changed[name] = min(changed[name], 1.0)
    return dataclasses.replace(machine, **changed)


def _largest(settings: TrainSettings, machine: Machine, table: Table, gpus: int) -> int:
    """The most items whose sharded table fits so many GPUs, whatever the ZeRO stage; 0 if none does."""
    wide = _with_table(on_gpus(settings, gpus), "sharded", table)
    available = MOST_OF_MEMORY * memory_of_rank(wide, machine)
    few, many = ITEMS[0], ITEMS[-1]
    largest = 0.0
    for stage in _ZERO_STAGES:  # memory grows with items in a line
        least = _memory(wide, machine, few, stage)
        per_item = (_memory(wide, machine, many, stage) - least) / (many - few)
        largest = max(largest, few + (available - least) / per_item)
    return int(min(largest, MOST_ITEMS))


def to_json(projection: Projection) -> dict[str, Any]:
    """All of it, with what it rests on; a range is a list of low, middle and high."""
    return {
        "note": NOTE,
        **dataclasses.asdict(projection),
        "settings": to_dict(projection.settings),
        "epoch_users": EPOCH_USERS,
        "uncertain": {name: factors._asdict() for name, factors in UNCERTAIN.items()},
        "points": [
            {**dataclasses.asdict(point), "dominating": point.dominating} for point in projection.points
        ],
    }


def markdown(projection: Projection) -> str:
    """The tables, each under a heading that says that it is projected."""
    model = projection.settings.model
    varied = ", ".join(f"{name} x {low:g} to {high:g}" for name, (low, high) in UNCERTAIN.items())
    return "\n".join(
        [
            f"# Projection for {projection.device}",
            "",
            f"**{NOTE}** An epoch: {EPOCH_USERS:,} users of {projection.history_items} inputs each; "
            f"in a step {projection.tokens_per_gpu:,} of them on each GPU. Model: width {model.width}, "
            f"{model.layers} layers. Ranges in brackets: all of these at once at their better and at their "
            f"worse end: {varied}.",
            "",
            "## Projected time, memory and cost",
            "",
            *_rows(
                "items|GPUs|table|ZeRO|GiB per GPU|ms per step|longest part|million tokens/s|hours per epoch"
                "|USD per epoch",
                map(_point_cells, projection.points),
            ),
            "",
            f"## Projected largest table, in items (at most {MOST_ITEMS:,}: indices are int32)",
            "",
            *_rows(
                "|".join(["table", *(f"{gpus} GPUs" for gpus in next(iter(projection.largest.values())))]),
                ([name, *map(count, sizes.values())] for name, sizes in projection.largest.items()),
            ),
            "",
            "## Projected choice, with a sharded table",
            "",
            *_grid(projection.choices, sharded_text),
            "",
            "## Projected choice, with the whole table on every GPU under Adam",
            "",
            *_grid(projection.choices, replicated_text),
            "",
        ]
    )


def _rows(header: str, rows: Iterable[Sequence[str]]) -> list[str]:
    names = header.split("|")
    return [f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows)]


def _point_cells(point: Point) -> list[str]:
    share = point.step_parts[point.dominating] / point.step_seconds.middle
    return [
        count(point.items),
        str(point.gpus),
        str(point.table),
        str(point.zero_stage),
        f"{point.memory_bytes / 2**30:.1f}",
        _text(point.step_seconds, 1e3),
        f"{point.dominating} {100 * share:.0f} %",
        _text(point.tokens_per_second, 1e-6),
        _text(point.epoch_seconds, 1 / 3600),
        "unknown" if point.cost is None else _text(point.cost, 1.0),
    ]


def _text(values: Range, factor: float) -> str:
    low, middle, high = map(_number, (value * factor for value in values))
    return f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def count(number: float) -> str:
    """Short: 30M for 30,000,000."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def _grid(choices: Sequence[Choice], text: Callable[[Choice], str]) -> list[str]:
    gpus = list(dict.fromkeys(choice.gpus for choice in choices))
    items = list(dict.fromkeys(choice.items for choice in choices))
    cells = {(choice.items, choice.gpus): text(choice) for choice in choices}
    header = "|".join(["items", *(f"{number} GPUs" for number in gpus)])
    return _rows(header, ([count(size), *(cells[size, number] for number in gpus)] for size in items))


def sharded_text(choice: Choice) -> str:
    """What to take, in a few words."""
    return "does not fit" if choice.table is None else f"{choice.table}; ZeRO-{choice.zero_stage}"


def replicated_text(choice: Choice) -> str:
    """What to take, and what a step then takes beside one with a sharded table."""
    if choice.replicated_zero_stage is None:
        return "does not fit"
    slower = "" if choice.replicated_slowdown is None else f"; {choice.replicated_slowdown:.3g} x time"
    return f"ZeRO-{choice.replicated_zero_stage}{slower}"
