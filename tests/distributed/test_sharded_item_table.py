"""The sharded item table equals the plain one on 1 to 4 real gloo ranks, in float64."""

import pytest
import torch

from recgpt.config import OptimizerSettings
from recgpt.distributed import collectives
from recgpt.distributed.sharded_item_table import ShardedItemTable
from recgpt.distributed.table_optimizer import RowAdamW
from recgpt.model.item_table import ItemTable
from recgpt.model.scoring import ExcludedPairs

NUM_ITEMS = 22
WIDTH = 3
BLOCK = 5
SETTINGS = OptimizerSettings(learning_rate=0.05, weight_decay=0.1)
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


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


def several_steps(case: str) -> None:
    """Lookup, loss, gradients and three optimizer steps against one process that has the whole batch."""
    rank, world_size = collectives.rank(), collectives.world_size()
    torch.manual_seed(0)
    mixing = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    everything = batches(case, world_size)

    reference = ItemTable(NUM_ITEMS, WIDTH, seed=3, loss_block_items=BLOCK).double()
    optimizer = torch.optim.AdamW(
        reference.parameters(), lr=0.05, betas=(SETTINGS.beta1, SETTINGS.beta2), weight_decay=0.1
    )
    sharded = ShardedItemTable(NUM_ITEMS, WIDTH, 3, BLOCK, torch.device("cpu"))
    sharded.rows = sharded.rows.double()
    row_optimizer = RowAdamW(sharded, SETTINGS)

    num_targets = sum(len(targets) for _, targets in everything)
    inputs, targets = everything[rank]
    for _ in range(3):
        losses = [reference.loss_sum(reference(i) @ mixing, t) for i, t in everything]
        optimizer.zero_grad()
        (sum(losses) / num_targets).backward()

        vectors = sharded(inputs)
        torch.testing.assert_close(vectors, reference(inputs), **TOLERANCE)
        loss = sharded.loss_sum(vectors @ mixing, targets)
        torch.testing.assert_close(loss, losses[rank], **TOLERANCE)
        (loss * (world_size / num_targets)).backward()
        optimizer.step()
        row_optimizer.step(0.05)
        torch.testing.assert_close(
            sharded.rows, reference.weight.detach()[sharded.first : sharded.end], **TOLERANCE
        )


def scoring() -> None:
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
    reference = ItemTable(NUM_ITEMS, WIDTH, seed=3, loss_block_items=BLOCK).double()
    sharded = ShardedItemTable(NUM_ITEMS, WIDTH, 3, BLOCK, torch.device("cpu"))
    sharded.rows = sharded.rows.double()
    assert torch.equal(sharded.best_item(interest, pairs), reference.best_item(interest, pairs))
    assert torch.equal(sharded.rank_of(interest, targets, pairs), reference.rank_of(interest, targets, pairs))


def lookup_alone() -> None:
    """Without a loss over all rows the gradient stays sparse: used rows only, each once."""
    sharded = ShardedItemTable(NUM_ITEMS, WIDTH, 3, BLOCK, torch.device("cpu"))
    world_size = collectives.world_size()
    sharded(torch.tensor([2, 2, NUM_ITEMS])).sum().backward()
    rows, gradient = sharded.take_gradient()
    used = [row for row in (2, NUM_ITEMS) if sharded.first <= row < sharded.end]
    assert (rows + sharded.first).tolist() == used
    expected = {2: 2.0, NUM_ITEMS: 1.0}  # per rank; summed over ranks and divided by their number
    torch.testing.assert_close(
        gradient, torch.tensor([[expected[row]] * WIDTH for row in used]).view(-1, WIDTH)
    )
    rows, _ = sharded.take_gradient()
    assert len(rows) == 0, f"taken once, gone ({world_size} ranks)"


def all_checks() -> None:
    for case in ("mixed", "one rank has none", "all on one owner", "repeated"):
        several_steps(case)
    scoring()
    lookup_alone()


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sharded_equals_whole(run_ranks, world_size):
    run_ranks(all_checks, world_size)
