"""A model of what training costs: memory per rank, and the parts of a step's time.

All formulas stand here and, with their reasons, in docs/scaling.md. Bytes and seconds are of one rank;
counts of a step are over all ranks. P dense weights, R table rows, N = R / W of a rank, D width, W ranks,
A tokens of all ranks, T = A / W.
"""

from dataclasses import dataclass, fields, replace

import torch

from recgpt.config import TrainSettings
from recgpt.distributed.sharded_table import is_sharded
from recgpt.machines import Machine
from recgpt.model.flops import scored_items, training_flops
from recgpt.model.gpt import GPT
from recgpt.model.item_table import loss_kind
from recgpt.model.losses import KEPT_BYTES
from recgpt.scaling.workload import Workload
from recgpt.training.engine import LARGEST_BUCKET

FLOAT = 4  # bytes
_STATE_BYTES = {"adam": lambda width: 2 * FLOAT * width + 8, "adagrad": lambda _: FLOAT, "sgd": lambda _: 0}
# Values that a block keeps of each token for its backward pass, in widths: inputs and outputs of both norms,
# query, key and value twice (grouped by length), attention's output, the feed-forward part inside twice.
_KEPT_WIDTHS_PER_BLOCK = 22
# Passes over memory: values read and written in forward and backward, in widths per token and block.
_MOVED_WIDTHS_PER_BLOCK = 130
_MOVED_PER_SCORE = 6  # score written, read for its maximum and softmax, written, read twice by products
_MOVED_PER_DENSE_WEIGHT = 12  # gradient flattened; weight, two moments and master copy read and written
_MOVED_PER_TABLE_VALUE = {"adam": 8, "adagrad": 4, "sgd": 3}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, at most."""

    process: float
    dense: float
    """Weights outside sharded tables, their gradients, master copies and moments, as ZeRO divides them."""
    tables: float
    """Rows of the rank and their gradient."""
    table_state: float
    activations: float
    loss: float
    communication: float
    checkpoint: float
    """The second copy of tables and their state while a checkpoint is written in the background."""

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, one part after the other."""

    compute: float
    """Matrix products of the GPT and the loss."""
    memory: float
    """Activations, scores, optimizer and table rows, read and written."""
    table_exchange: float
    """Lookups and their gradients, all to all."""
    loss_exchange: float
    """Interest vectors gathered, and their gradients summed, if the table is sharded."""
    dense_exchange: float
    """Gradients reduced, and weights gathered, by ZeRO."""
    overhead: float
    input: float = 0.0
    """Waiting for histories: what reading takes longer than all else, beside which it goes on."""

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def dense_weights(settings: TrainSettings, num_items: int) -> int:
    """Weights that the engine trains: the GPT, and the item table if it is replicated."""
    with torch.device("meta"):
        gpt = sum(weight.numel() for weight in GPT(settings.model).parameters())
    table = 0 if is_sharded(settings.item_table, num_items) else (num_items + 1) * settings.model.vector_width
    return gpt + table


def memory_per_rank(settings: TrainSettings, work: Workload, zero_stage: int, machine: Machine) -> Memory:
    """Peak memory of a rank in training."""
    ranks, width = settings.workers, settings.model.vector_width
    weights = dense_weights(settings, work.num_items)
    shared = weights / ranks
    whole = FLOAT * (weights if zero_stage < 3 else shared + weights)  # stage 3 keeps a readable twin
    gradients = FLOAT * (weights if zero_stage == 1 else shared)
    dense = whole + gradients + FLOAT * (4 if ranks > 1 or zero_stage == 3 else 3) * shared
    rows, state, table_gradient = table_bytes(settings, work)
    micro = settings.data.micro_batches
    tokens = work.load.tokens / ranks / micro
    kept = FLOAT if machine.device == "cpu" else FLOAT / 2
    activations = tokens * width * kept * (_KEPT_WIDTHS_PER_BLOCK * settings.model.layers + 6)
    return Memory(
        process=machine.process_bytes,
        dense=dense,
        tables=rows + table_gradient,
        table_state=state,
        activations=activations,
        loss=_loss_bytes(settings, work),
        communication=FLOAT * min(weights, LARGEST_BUCKET) if machine.device != "cpu" or ranks > 1 else 0.0,
        # On a GPU it is the host's memory that takes the copy.
        checkpoint=rows + state if settings.checkpoint_in_background and machine.device == "cpu" else 0.0,
    )


def table_bytes(settings: TrainSettings, work: Workload) -> tuple[float, float, float]:
    """Rows, optimizer state and gradient of a rank's part of a sharded item table."""
    table, width = settings.item_table, settings.model.vector_width
    if not is_sharded(table, work.num_items):
        return 0.0, 0.0, 0.0
    rows = (work.num_items + 1) / settings.workers
    value = 2 if table.row_dtype == "bfloat16" else FLOAT
    state = rows * _STATE_BYTES[table.optimizer](width)
    if settings.pretrain.optimizer.weight_decay:
        state += 8 * rows
    used = rows if loss_kind(settings.loss, work.num_items) == "full" else used_rows(settings, work)
    return rows * width * value, state, 2 * used * width * FLOAT


def used_rows(settings: TrainSettings, work: Workload) -> float:
    """Rows of a rank that a step with drawn items reads or changes."""
    drawn = min(settings.loss.negatives, work.num_items)
    return (work.load.distinct_items + drawn) / settings.workers


def _loss_bytes(settings: TrainSettings, work: Workload) -> float:
    """Blocks of scores, which each member keeps, and the softmax of one; of a replicated table also the
    gradient before it is scaled.
    """
    blocks = (1.0 + settings.model.members) * KEPT_BYTES
    if is_sharded(settings.item_table, work.num_items):
        return blocks + 3 * FLOAT * work.load.tokens * settings.model.vector_width
    return blocks + 2 * FLOAT * (work.num_items + 1) * settings.model.vector_width


def step_time(settings: TrainSettings, work: Workload, zero_stage: int, machine: Machine) -> StepTime:
    """Time of a pre-training step."""
    ranks, load = settings.workers, work.load
    scored = scored_items(settings.loss, work.num_items, load.tokens)
    flops = training_flops(settings.model, load.tokens, load.attended_pairs, load.tokens, scored) / ranks
    moved = moved_bytes(settings, work)
    lookups, loss, dense = exchanged_bytes(settings, work, zero_stage)
    lookup_calls, loss_calls, dense_calls = exchanges(settings, work, zero_stage)

    def exchange(size: float, calls: int) -> float:
        return exchange_seconds(size, calls, ranks, machine)

    step = StepTime(
        # The largest rank is waited for.
        compute=work.imbalance * flops / (machine.matrix_flops * machine.matrix_efficiency),
        memory=work.imbalance * moved / (machine.memory_bandwidth * machine.memory_efficiency),
        table_exchange=exchange(lookups, lookup_calls),
        loss_exchange=exchange(loss, loss_calls),
        dense_exchange=exchange(dense, dense_calls),
        overhead=machine.step_overhead,
    )
    reading = work.imbalance * load.tokens / ranks / machine.input_rate
    return replace(step, input=max(reading - step.total, 0.0))


def exchange_seconds(size: float, calls: int, ranks: int, machine: Machine) -> float:
    """Of handing over ``size`` bytes in ``calls`` collectives; what stays on the rank costs nothing."""
    if ranks == 1:
        return 0.0
    near = min(machine.ranks_per_node, ranks)
    leaves_rank, leaves_node = size * (ranks - 1) / ranks, size * (ranks - near) / ranks
    seconds = (leaves_rank - leaves_node) / machine.node_bandwidth + leaves_node / machine.network_bandwidth
    return seconds + calls * machine.latency * ranks.bit_length()


def moved_bytes(settings: TrainSettings, work: Workload) -> float:
    """Bytes that a rank reads and writes in a step, outside of matrix products."""
    ranks, width, load = settings.workers, settings.model.vector_width, work.load
    blocks = _MOVED_WIDTHS_PER_BLOCK * settings.model.layers * width * load.tokens / ranks
    scored = settings.model.members * scored_items(settings.loss, work.num_items, load.tokens)
    scores = load.tokens * scored / ranks
    values = blocks + _MOVED_PER_SCORE * scores
    values += _MOVED_PER_DENSE_WEIGHT * dense_weights(settings, work.num_items) / ranks
    if is_sharded(settings.item_table, work.num_items):
        full = loss_kind(settings.loss, work.num_items) == "full"
        rows = (work.num_items + 1) / ranks if full else used_rows(settings, work)
        values += _MOVED_PER_TABLE_VALUE[settings.item_table.optimizer] * rows * width
    return FLOAT * values


def exchanged_bytes(settings: TrainSettings, work: Workload, zero_stage: int) -> tuple[float, float, float]:
    """Bytes that a rank hands over in a step for lookups, for the loss, and for the dense weights.

    Lookups: an id, a row and its gradient for each distinct item. Loss of a sharded table: interest vectors
    gathered, three sums over targets of each member, gradients of interest vectors reduced. Dense: gradients
    reduced and weights gathered once (stage 3: gathered twice more).
    """
    ranks, width = settings.workers, settings.model.vector_width
    dense = FLOAT * dense_weights(settings, work.num_items) * (2 if zero_stage < 3 else 4)
    if not is_sharded(settings.item_table, work.num_items):
        return 0.0, 0.0, dense
    value = 2 if settings.item_table.row_dtype == "bfloat16" else FLOAT
    lookups = work.load.distinct_items / ranks * (8 + 2 * width * value)
    # A ring sends what it reduces twice, what it gathers from the others once.
    loss = FLOAT * work.load.tokens * (width + 2 * width + 2 * 3 * settings.model.members)
    return lookups, loss, dense


def exchanges(settings: TrainSettings, work: Workload, zero_stage: int) -> tuple[int, int, int]:
    """Collectives of a step: of lookups, of the loss, and of the engine, the agreement of ranks included."""
    engine = 4 if zero_stage < 3 else 6 * settings.model.layers
    if not is_sharded(settings.item_table, work.num_items):
        return 0, 0, engine + 2
    return 4, 6, engine + 3
