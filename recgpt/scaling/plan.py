"""What a training and its recall will take, before anything is paid for; and what helps if it cannot fit."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from recgpt.config import TrainSettings
from recgpt.distributed.sharded_table import is_sharded
from recgpt.machines import Machine
from recgpt.model.flops import weights_per_token
from recgpt.scaling.costs import (
    FLOAT,
    Memory,
    StepTime,
    dense_weights,
    exchanged_bytes,
    memory_per_rank,
    step_time,
    table_bytes,
)
from recgpt.scaling.failures import Failures, best_interval_seconds, goodput
from recgpt.scaling.workload import Workload

MOST_OF_MEMORY = 0.9
"""Share of a rank's memory that a plan may use: the rest is for fragments and what else runs."""
RESTART_SECONDS = 120.0
"""From a failure until the training goes on, once a machine is there."""
_GENERATING_FORWARD = 1 / 3
"""A forward pass alone, of a step's forward and backward passes."""


@dataclass(frozen=True)
class Plan:
    """Of one rank unless stated; seconds, bytes, USD."""

    memory: Memory
    memory_available: float
    step: StepTime
    steps_per_epoch: float
    epoch_seconds: dict[str, float]
    """By stage, validation and checkpoints left out."""
    run_seconds: float
    """All epochs of all stages: the most, for stages end early when they no longer improve."""
    exchanged_bytes: float
    """In a step, handed over to other ranks."""
    checkpoint_bytes: float
    """Of the whole checkpoint."""
    checkpoint_seconds: float
    """To write it, beside the training."""
    checkpoint_every_seconds: float
    """With which the most of the time lasts, if machines fail as often as the device's constants say."""
    goodput: float
    """Share of the time that is training which lasts, with checkpoints that often."""
    candidates_per_hour: float
    """Lists, by one recall actor with the threads of a rank."""
    cost: float | None
    """Of the run, all ranks; None if no price is known."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.memory_available


def plan(settings: TrainSettings, work: Workload, zero_stage: int, machine: Machine) -> Plan:
    """Work out a plan; ``zero_stage`` is that of the settings' DeepSpeed file."""
    memory = memory_per_rank(settings, work, zero_stage, machine)
    step = step_time(settings, work, zero_stage, machine)
    epochs: dict[str, float] = {
        stage: work.steps_per_epoch * (step.total if stage == "pretrain" else _prompted(settings, step))
        for stage in settings.stages
    }
    run = sum(seconds * getattr(settings, stage).max_epochs for stage, seconds in epochs.items())
    checkpoint = checkpoint_bytes(settings, work)
    nodes = -(-settings.workers // machine.ranks_per_node)
    price = machine.price_per_hour
    beside, written = settings.checkpoint_in_background, checkpoint / (nodes * machine.storage_bandwidth)
    copied = checkpoint / settings.workers / machine.host_bandwidth
    failures = Failures(
        machine_mtbf_seconds=3600 * machine.failure_hours,
        machines=nodes,
        pause_seconds=copied + (0.0 if beside else written),
        write_seconds=written if beside else 0.0,
        restart_seconds=RESTART_SECONDS,
    )
    interval = best_interval_seconds(failures)
    return Plan(
        memory=memory,
        memory_available=MOST_OF_MEMORY * memory_of_rank(settings, machine),
        step=step,
        steps_per_epoch=work.steps_per_epoch,
        epoch_seconds=epochs,
        run_seconds=run,
        exchanged_bytes=sum(exchanged_bytes(settings, work, zero_stage)) if settings.workers > 1 else 0.0,
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=written,
        checkpoint_every_seconds=interval,
        goodput=goodput(failures, interval),
        candidates_per_hour=3600 / recall_seconds(settings, work, machine),
        cost=None if price is None else price * settings.workers * run / 3600,
    )


def memory_of_rank(settings: TrainSettings, machine: Machine) -> float:
    """A GPU's own memory; on CPUs the machine's, divided by the ranks on it."""
    if machine.device != "cpu":
        return machine.memory_bytes
    return machine.memory_bytes / min(settings.workers, machine.ranks_per_node)


def _prompted(settings: TrainSettings, step: StepTime) -> float:
    """A step of prompt-tuning: generated items add tokens, and are found by a forward pass before it."""
    prompts = settings.prompts
    longer = 1 + prompts.interleaved_share
    generating = _GENERATING_FORWARD if prompts.interleaved_share + prompts.last_share else 0.0
    changing = step.compute + step.memory + step.table_exchange + step.loss_exchange
    # Where reading is what a step waits for, it is what a longer step waits for too, if at all.
    return max(changing * (longer + generating) + step.dense_exchange + step.overhead, step.total)


def checkpoint_bytes(settings: TrainSettings, work: Workload) -> float:
    """Weights and moments in float32, table rows and their state, of all ranks together."""
    rows, state, _ = table_bytes(settings, work)
    return 3 * FLOAT * dense_weights(settings, work.num_items) + settings.workers * (rows + state)


def recall_seconds(settings: TrainSettings, work: Workload, machine: Machine) -> float:
    """Of one user: the history encoded, then in each step one position and scores of all items."""
    model, steps = settings.model, len(settings.recall.quotas)
    tokens = min(work.load.tokens / work.load.users + 1, model.max_history)
    flops = (
        2 * weights_per_token(model) * (tokens + steps - 1) + 2 * steps * model.vector_width * work.num_items
    )
    scores = FLOAT * 2 * steps * work.num_items
    moved = scores + FLOAT * steps * model.vector_width * work.num_items / settings.recall.batch_users
    return (
        flops / (machine.matrix_flops * machine.matrix_efficiency)
        + moved / (machine.memory_bandwidth * machine.memory_efficiency)
        + steps * machine.step_overhead / settings.recall.batch_users
    )


def smallest_change(settings: TrainSettings, work: Workload, zero_stage: int, machine: Machine) -> str | None:
    """The least change of settings with which a plan that does not fit would; None if none was found.

    Tried in the order of what they cost: nothing but time first, more machines last.
    """
    for text, changed, stage in _changes(settings, work, zero_stage):
        if plan(changed, work, stage, machine).fits:
            return text
    return None


def _changes(
    settings: TrainSettings, work: Workload, zero_stage: int
) -> Iterator[tuple[str, TrainSettings, int]]:
    data, table = settings.data, settings.item_table
    if settings.checkpoint_in_background:
        changed = dataclasses.replace(settings, checkpoint_in_background=False)
        yield "--set checkpoint_in_background=false", changed, zero_stage
    for parts in (2, 4, 8, 16, 32):
        if parts > data.micro_batches:
            smaller = dataclasses.replace(data, micro_batches=parts)
            text = f"--set data.micro_batches={parts}"
            yield text, dataclasses.replace(settings, data=smaller), zero_stage
    if zero_stage < 2:
        yield "--set deepspeed=zero2", settings, 2
    if not is_sharded(table, work.num_items):
        sharded = dataclasses.replace(table, placement="sharded")
        text = "--set item_table.placement=sharded"
        yield text, dataclasses.replace(settings, item_table=sharded), zero_stage
    sharded = dataclasses.replace(table, placement="sharded", row_dtype="bfloat16")
    yield (
        "--set item_table.placement=sharded item_table.row_dtype=bfloat16",
        dataclasses.replace(settings, item_table=sharded),
        zero_stage,
    )
    sharded = dataclasses.replace(table, placement="sharded", optimizer="adagrad")
    adagrad = dataclasses.replace(settings, item_table=sharded)
    yield "--set item_table.placement=sharded item_table.optimizer=adagrad", adagrad, zero_stage
    workers = settings.workers
    while workers < 4096:
        workers *= 2
        more = dataclasses.replace(
            settings,
            workers=workers,
            data=dataclasses.replace(data, lanes=max(data.lanes, workers)),
            item_table=dataclasses.replace(table, placement="sharded"),
        )
        text = f"--workers {workers} --set item_table.placement=sharded data.lanes={more.data.lanes}"
        yield text, more, zero_stage
