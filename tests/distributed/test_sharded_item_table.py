"""The sharded item table equals the plain one on 1 to 4 real gloo ranks, in float64."""

import pytest
import torch

from recgpt.config import LossSettings, OptimizerSettings
from recgpt.distributed import collectives
from recgpt.distributed.sharded_item_table import ShardedItemTable
from recgpt.distributed.sharded_table import ShardedTable, gradient_norm
from recgpt.distributed.table_optimizer import row_optimizer
from recgpt.model.item_table import ItemTable
from recgpt.model.losses import sampled_softmax_reference
from recgpt.model.scoring import ExcludedPairs

NUM_ITEMS = 22
WIDTH = 4
CPU = torch.device("cpu")
COUNTS = torch.tensor([0, *range(NUM_ITEMS)])  # one item was never seen
FULL = LossSettings(kind="full", block_items=5)
SAMPLED = LossSettings(kind="sampled", block_items=5, negatives=8)
OTHERS = {
    "sampled": SAMPLED,
    "sampled, not in the batch": LossSettings(kind="sampled", block_items=5, negatives=8, in_batch=False),
    "binary": LossSettings(kind="binary", negatives_per_target=3, calibration=0.5),
}
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
RATE = 0.05
WAYS = ((False, 1), (True, 1), (True, 2))
"""Whether rows are shown with length 1, and members of the model."""


def tables(
    loss: LossSettings, unit_rows: bool = False, members: int = 1
) -> tuple[ItemTable, ShardedItemTable]:
    """The twins, in float64, with rows large enough to matter."""
    reference = ItemTable(NUM_ITEMS, WIDTH, 3, loss, COUNTS, unit_rows, members).double()
    sharded = ShardedItemTable(NUM_ITEMS, WIDTH, 3, loss, COUNTS, CPU, unit_rows=unit_rows, members=members)
    sharded.rows = sharded.rows.double() * 30
    reference.weight.data *= 30
    return reference, sharded


def batches(case: str, world_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets) of each rank."""
    generator = torch.Generator().manual_seed(5)
    result = []
    for rank in range(world_size):
        size = 6 + rank
        inputs = torch.randint(1, NUM_ITEMS + 1, (size,), generator=generator)
        targets = torch.randint(1, NUM_ITEMS + 1, (size,), generator=generator)
        if case == "one rank has none" and rank == world_size - 1 > 0:
            inputs, targets = inputs[:0], targets[:0]
        if case == "all on one owner":
            inputs, targets = inputs % 3 + 1, targets % 3 + 1
        if case == "repeated":
            inputs, targets = torch.full_like(inputs, 7), torch.full_like(targets, 9)
        result.append((inputs, targets))
    return result


def mixing() -> torch.Tensor:
    """What stands for the GPT between lookup and loss."""
    return torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def assert_same_rows(sharded: ShardedItemTable, reference: ItemTable) -> None:
    expected = reference.weight.detach()[sharded.first : sharded.end]
    torch.testing.assert_close(sharded.rows, expected, **TOLERANCE)


def full_steps(case: str, unit_rows: bool, members: int) -> None:
    """Lookup, loss, gradients and three AdamW steps against one process that has the whole batch."""
    rank, world_size = collectives.rank(), collectives.world_size()
    everything = batches(case, world_size)
    reference, sharded = tables(FULL, unit_rows, members)
    settings = OptimizerSettings(weight_decay=0.1)
    optimizer = torch.optim.AdamW(
        reference.parameters(), lr=RATE, betas=(settings.beta1, settings.beta2), weight_decay=0.1
    )
    rows_optimizer = row_optimizer("adam", sharded, settings)
    num_targets = sum(len(targets) for _, targets in everything)
    inputs, targets = everything[rank]
    for _ in range(3):
        losses = [reference.loss_sum(reference(i) @ mixing(), t) for i, t in everything]
        optimizer.zero_grad()
        (sum(losses) / num_targets).backward()

        vectors = sharded(inputs)
        torch.testing.assert_close(vectors, reference(inputs), **TOLERANCE)
        loss = sharded.loss_sum(vectors @ mixing(), targets)
        torch.testing.assert_close(loss, losses[rank], **TOLERANCE)
        (loss * (world_size / num_targets)).backward()
        rows, gradient = sharded.take_gradient()
        norm = gradient_norm([gradient])
        torch.testing.assert_close(norm, float(reference.weight.grad.norm()), **TOLERANCE)
        optimizer.step()
        rows_optimizer.step(rows, gradient, RATE)
        assert_same_rows(sharded, reference)


def negatives_of_all_ranks(
    sharded: ShardedItemTable, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the next ``loss_sum`` will draw on all ranks: item indices in order, and their log weights."""
    state = torch.get_rng_state()
    sizes = collectives.gather_sizes(len(targets), CPU)
    local = sharded.local_rows(collectives.gather_rows(targets, sizes))
    share = max(len(range(*_share(sharded.loss.negatives))), 1)
    drawn = sharded.sampler.sample(share, local[local >= 0], len(local))
    torch.set_rng_state(state)
    sizes = collectives.gather_sizes(len(drawn.row_S), CPU)
    index = collectives.gather_rows(drawn.row_S + sharded.first, sizes)
    return index, collectives.gather_rows(drawn.log_weight_S, sizes)


def _share(draws: int) -> tuple[int, int]:
    rank, world_size = collectives.rank(), collectives.world_size()
    return rank * draws // world_size, (rank + 1) * draws // world_size


def expected_loss(reference: ItemTable, interest, targets, drawn, seed: int) -> torch.Tensor:
    """One rank's loss in one process, with the same draws."""
    if reference.loss.kind == "binary":
        torch.manual_seed(seed)  # every rank draws items of the whole table
        return reference.loss_sum(interest, targets)
    index, log_weight = drawn
    place = torch.searchsorted(index, targets)
    members = reference.members
    parts = zip((members * interest).chunk(members, 1), reference(index).chunk(members, 1), strict=True)
    return sum(sampled_softmax_reference(*part, place, 0, log_weight) for part in parts) / members


def drawn_steps(case: str, loss_settings: LossSettings, unit_rows: bool, members: int) -> None:
    """Losses over drawn items: loss, sparse gradients and three steps of plain gradient descent."""
    rank, world_size = collectives.rank(), collectives.world_size()
    everything = batches(case, world_size)
    reference, sharded = tables(loss_settings, unit_rows, members)
    rows_optimizer = row_optimizer("sgd", sharded, OptimizerSettings())
    num_targets = sum(len(targets) for _, targets in everything)
    inputs, targets = everything[rank]
    for step in range(3):
        torch.manual_seed(100 * step + rank)
        drawn = negatives_of_all_ranks(sharded, targets)
        losses = [
            expected_loss(reference, reference(i) @ mixing(), t, drawn, 100 * step + r)
            for r, (i, t) in enumerate(everything)
        ]
        reference.weight.grad = None
        (sum(losses) / num_targets).backward()

        torch.manual_seed(100 * step + rank)
        loss = sharded.loss_sum(sharded(inputs) @ mixing(), targets)
        torch.testing.assert_close(loss, losses[rank], **TOLERANCE)
        (loss * (world_size / num_targets)).backward()
        rows, gradient = sharded.take_gradient()
        assert rows is not None, "only drawn and used rows have a gradient"
        rows_optimizer.step(rows, gradient, RATE)
        reference.weight.data -= RATE * reference.weight.grad
        assert_same_rows(sharded, reference)


def scoring(unit_rows: bool, members: int) -> None:
    """Best items and ranks, with excluded pairs, equal those of the whole table."""
    rank = collectives.rank()
    generator = torch.Generator().manual_seed(rank)
    tokens = 3 * rank  # rank 0 has none
    interest = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=generator)
    targets = torch.randint(1, NUM_ITEMS + 1, (tokens,), generator=generator)
    pairs = ExcludedPairs(
        torch.arange(tokens).repeat(8),
        torch.randint(1, NUM_ITEMS + 1, (8 * tokens,), generator=generator),
    )
    reference, sharded = tables(FULL, unit_rows, members)
    best = reference.best_item(interest, pairs)
    assert torch.equal(sharded.best_item(interest, pairs), best)
    assert torch.equal(sharded.rank_of(interest, targets, pairs), reference.rank_of(interest, targets, pairs))
    # A pool of so many draws holds every item: the best of it is the best of all.
    assert torch.equal(sharded.best_item(interest, pairs, pool_items=10_000), best)
    few = sharded.best_item(interest, pairs, pool_items=4)
    assert bool(((few >= 1) & (few <= NUM_ITEMS)).all())


def lookup_alone() -> None:
    """Without a loss over all rows the gradient stays sparse: used rows only, each once."""
    _, sharded = tables(FULL)
    sharded(torch.tensor([2, 2, NUM_ITEMS])).sum().backward()
    rows, gradient = sharded.take_gradient()
    used = [row for row in (2, NUM_ITEMS) if sharded.first <= row < sharded.end]
    assert (rows + sharded.first).tolist() == used
    expected = {2: 2.0, NUM_ITEMS: 1.0}  # per rank; summed over ranks and divided by their number
    torch.testing.assert_close(
        gradient,
        torch.tensor([[expected[row]] * WIDTH for row in used], dtype=torch.float64).view(-1, WIDTH),
    )
    rows, _ = sharded.take_gradient()
    assert len(rows) == 0, f"taken once, gone ({collectives.world_size()} ranks)"


def bytes_handed_over() -> None:
    """As the formula says, in both types of rows; and bfloat16 rows come back as they are."""
    rank, world_size = collectives.rank(), collectives.world_size()
    ids = torch.tensor([1, 1, 5, NUM_ITEMS, 2 + rank])
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        table = ShardedTable(NUM_ITEMS + 1, WIDTH, 3, CPU, dtype)
        collectives.traffic.clear()
        vectors = table(ids)
        vectors.sum().backward()
        assert vectors.dtype == torch.float32
        assert bool((vectors.bfloat16() == vectors).all()) == (dtype == torch.bfloat16)
        handed = collectives.sum_over_ranks(torch.tensor(collectives.traffic["all_to_all"]))
        unique = collectives.sum_over_ranks(torch.tensor(len(ids.unique())))
        if world_size > 1:
            assert int(handed) == int(unique) * (8 + 2 * WIDTH * size)
        rows, gradient = table.take_gradient()
        assert gradient.dtype == torch.float32
        if table.first <= 1 < table.end:
            assert gradient[rows == 1 - table.first].tolist() == [[2.0] * WIDTH]


def all_checks() -> None:
    for case in ("mixed", "one rank has none", "all on one owner", "repeated"):
        for unit_rows, members in WAYS:
            full_steps(case, unit_rows, members)
            for loss_settings in OTHERS.values():
                drawn_steps(case, loss_settings, unit_rows, members)
    for unit_rows, members in WAYS:
        scoring(unit_rows, members)
    lookup_alone()
    bytes_handed_over()


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sharded_equals_whole(run_ranks, world_size):
    run_ranks(all_checks, world_size)
