"""Drawn negatives: the right frequencies, and weights that make sums over them right on average."""

import math

import pytest
import torch

from recgpt.config import LossSettings
from recgpt.model.item_table import ItemTable
from recgpt.model.negatives import NegativeSampler

COUNTS = torch.tensor([0, 1, 9, 9, 0, 4, 16, 1])
TOTAL = int(COUNTS.sum())


def sampler_of(counts=COUNTS, first=1, total=TOTAL, **settings):
    return NegativeSampler(LossSettings(**settings), counts, first, total)


def test_expected_times_by_hand():
    sampler = sampler_of(popularity_share=0.5, popularity_power=0.5)
    # 10 uniform draws over 7 rows, 10 by square root of the count (1 + 3 + 3 + 0 + 2 + 4 + 1 = 14), 4 others.
    expected = [10 / 7 + 10 * root / 14 + 4 * max(count, 1) / 40 for root, count in [(1, 1), (3, 9), (0, 0)]]
    found = sampler.expected_times(torch.tensor([1, 2, 4]), draws=20, num_targets=5)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_frequencies_pass_a_chi_square_test(share, power):
    torch.manual_seed(11)
    sampler = sampler_of(popularity_share=share, popularity_power=power, in_batch=False)
    draws = 40_000
    rows = torch.arange(1, len(COUNTS))
    times = torch.bincount(sampler.draw(draws), minlength=len(COUNTS)).double()
    assert times[0] == 0, "padding is never drawn"
    expected = sampler.expected_times(rows, draws, num_targets=0)
    possible = expected > 0
    assert not times[1:][~possible].any()
    statistic = ((times[1:] - expected) ** 2 / expected)[possible].sum()
    # 7 rows at most: 6 degrees of freedom, of which 22.5 is exceeded once in a thousand times.
    assert statistic < 22.5


def test_the_test_of_frequencies_would_notice_a_wrong_power():
    torch.manual_seed(11)
    drawn = sampler_of(popularity_share=1.0, popularity_power=0.75).draw(40_000)
    wrong = sampler_of(popularity_share=1.0, popularity_power=0.8, in_batch=False)
    rows = torch.tensor([1, 2, 3, 5, 6, 7])
    expected = wrong.expected_times(rows, 40_000, 0)
    times = torch.bincount(drawn, minlength=8)[rows]
    assert ((times - expected) ** 2 / expected).sum() > 22.5


def test_rows_that_nobody_has_seen_are_drawn_uniformly():
    sampler = sampler_of(counts=torch.zeros(5, dtype=torch.int64), first=0, popularity_share=1.0)
    assert set(sampler.draw(200).tolist()) == set(range(5))
    torch.testing.assert_close(
        sampler.expected_times(torch.tensor([0]), 200, num_targets=1), torch.tensor([40.0]).double()
    )


def test_targets_are_among_the_rows_and_weighted_by_how_they_came():
    torch.manual_seed(0)
    alone = sampler_of(in_batch=False).sample(0, torch.tensor([6, 6, 2]), num_targets=3)
    assert alone.row_S.tolist() == [2, 6]
    assert alone.log_weight_S.tolist() == [-math.inf, -math.inf]
    together = sampler_of().sample(0, torch.tensor([6, 6, 2]), num_targets=3)
    expected = [math.log(1 / (2 * 9 / 40)), math.log(2 / (2 * 16 / 40))]
    torch.testing.assert_close(together.log_weight_S, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("in_batch", [True, False])
def test_weighted_sums_are_right_on_average_also_over_shards(shards, in_batch):
    """Sums of any function over all rows, estimated many times; targets are drawn by popularity too."""
    torch.manual_seed(5)
    value = torch.tensor([0.0, 3.0, 1.0, 2.0, 5.0, 0.5, 1.0, 4.0], dtype=torch.float64)
    bounds = [round(shard * len(COUNTS) / shards) for shard in range(shards + 1)]
    settings = LossSettings(in_batch=in_batch, popularity_share=0.5)
    samplers = [
        NegativeSampler(settings, COUNTS[low:high], int(low == 0), TOTAL)
        for low, high in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    estimates = []
    num_targets = 4
    for _ in range(4000):
        # The first is the token itself, whose own target takes no part; the others are its negatives.
        targets = torch.multinomial(COUNTS.double(), num_targets - 1, replacement=True)
        total = 0.0
        for low, high, sampler in zip(bounds[:-1], bounds[1:], samplers, strict=True):
            here = targets[(targets >= low) & (targets < high)] - low
            drawn = sampler.sample(4, here, num_targets)
            total += float((drawn.log_weight_S.exp() * value[drawn.row_S + low]).sum())
        estimates.append(total)
    estimates = torch.tensor(estimates)
    exact, error = float(value.sum()), float(estimates.std()) / math.sqrt(len(estimates))
    # An item that was never seen cannot be a target, yet is reckoned as seen once.
    assert abs(float(estimates.mean()) - exact) < 4 * error + (0.6 if in_batch else 0)


def test_the_sampled_loss_approaches_the_full_one():
    """With more and more draws its mean comes as close as one likes, and sooner with the batch's targets."""
    torch.manual_seed(1)
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(1, 50, (60,))])
    interest, targets = torch.randn(5, 4), torch.randint(1, 61, (5,))

    def mean_loss(draws):
        loss = LossSettings(kind="sampled", negatives=draws, in_batch=False)
        table = ItemTable(60, 4, 0, loss, counts)
        table.weight.data *= 40
        return torch.stack([table.loss_sum(interest, targets) for _ in range(200)]).mean().item()

    full = ItemTable(60, 4, 0, LossSettings(kind="full"), counts)
    full.weight.data *= 40
    exact = full.loss_sum(interest, targets).item()
    distances = [abs(mean_loss(draws) - exact) for draws in (4, 64, 4096)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.005 * exact
