"""The model of costs, against numbers worked out by hand, and against a real training's memory."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest

from recgpt.config import ItemTableSettings, LossSettings, ModelSettings, TrainSettings
from recgpt.machines import load_machine, matrix_flops_of
from recgpt.scaling.costs import (
    dense_weights,
    exchange_seconds,
    exchanged_bytes,
    memory_per_rank,
    moved_bytes,
    step_time,
    table_bytes,
)
from recgpt.scaling.made_up_histories import write_dataset
from recgpt.scaling.plan import checkpoint_bytes, plan
from recgpt.scaling.workload import StepLoad, Workload, measure_workload

H100 = load_machine("h100")
LOAD = StepLoad(users=10, tokens=100, attended_pairs=700, distinct_items=60)
WORK = Workload(num_items=999, num_users=1000, load=LOAD, steps_per_epoch=100)
SHARDED = TrainSettings(
    workers=4,
    model=ModelSettings(width=8, members=1, layers=1, heads=1),
    item_table=ItemTableSettings(placement="sharded"),
    loss=LossSettings(kind="full"),
)
REPLICATED = replace(SHARDED, item_table=ItemTableSettings(placement="replicated"))


def test_dense_weights():
    # Position and segment vectors; a block: two norms, attention's four products, 8 -> 32 -> 8; a last norm.
    gpt = 50 * 8 + 2 * 8 + (2 * 16 + 4 * 72 + 8 * 32 + 32 + 32 * 8 + 8) + 16
    assert dense_weights(SHARDED, 999) == gpt
    assert dense_weights(REPLICATED, 999) == gpt + 1000 * 8


def test_a_table_of_a_rank():
    # 250 rows of 8 values: float32, two moments and a count of steps; the gradient of all rows, twice.
    assert table_bytes(SHARDED, WORK) == (250 * 8 * 4, 250 * (2 * 8 * 4 + 8), 2 * 250 * 8 * 4)
    small = replace(SHARDED, item_table=ItemTableSettings("sharded", row_dtype="bfloat16", optimizer="sgd"))
    assert table_bytes(small, WORK)[:2] == (250 * 8 * 2, 0)
    drawn = replace(SHARDED, loss=LossSettings(kind="sampled", negatives=40))
    assert table_bytes(drawn, WORK)[2] == pytest.approx(2 * (60 + 40) / 4 * 8 * 4)
    assert table_bytes(REPLICATED, WORK) == (0, 0, 0)


def test_what_is_handed_over():
    lookups, loss, dense = exchanged_bytes(SHARDED, WORK, zero_stage=1)
    assert lookups == 60 / 4 * (8 + 2 * 8 * 4), "as docs/item-table.md says"
    assert loss == 4 * 100 * (3 * 8 + 6)
    assert dense == 8 * dense_weights(SHARDED, 999)
    assert exchanged_bytes(REPLICATED, WORK, 3)[:2] == (0, 0)


def test_an_exchange_within_and_between_machines():
    assert exchange_seconds(1e9, 3, 1, H100) == 0
    near = exchange_seconds(8e9, 0, 8, H100)
    assert near == pytest.approx(7e9 / H100.node_bandwidth)
    far = exchange_seconds(16e9, 1, 16, H100)
    assert far == pytest.approx(7e9 / H100.node_bandwidth + 8e9 / H100.network_bandwidth + 5 * H100.latency)


def test_parts_of_a_step_grow_as_they_should():
    one = step_time(replace(SHARDED, workers=1), WORK, 1, H100)
    four = step_time(SHARDED, WORK, 1, H100)
    assert one.compute == pytest.approx(4 * four.compute)
    assert one.table_exchange == one.dense_exchange == 0
    assert four.table_exchange > 0
    assert four.total == pytest.approx(sum(dataclasses.asdict(four).values()))
    assert moved_bytes(replace(SHARDED, workers=1), WORK) > 3 * moved_bytes(SHARDED, WORK)


def test_reading_that_is_too_slow_is_waited_for():
    fast = step_time(SHARDED, WORK, 1, H100)
    assert fast.input == 0
    slow = step_time(SHARDED, WORK, 1, replace(H100, input_rate=50))
    assert slow.total == pytest.approx(100 / 4 / 50), "25 tokens of a rank"
    assert slow.input == pytest.approx(0.5 - fast.total)
    both = plan(SHARDED, WORK, 1, replace(H100, input_rate=50)).epoch_seconds
    assert both["prompt_tune"] == both["pretrain"] == pytest.approx(100 * 0.5)


def test_zero_divides_what_it_should():
    sizes = [memory_per_rank(REPLICATED, WORK, stage, H100).dense for stage in (1, 2, 3)]
    weights = dense_weights(REPLICATED, 999)
    assert sizes[0] - sizes[1] == pytest.approx(4 * weights * 3 / 4), "gradients"
    assert sizes[2] - sizes[1] == pytest.approx(4 * weights / 4), "a whole twin, and weights"


def test_a_checkpoint_has_everything_once():
    rows, state, _ = table_bytes(SHARDED, WORK)
    assert checkpoint_bytes(SHARDED, WORK) == 12 * dense_weights(SHARDED, 999) + 4 * (rows + state)


def test_a_plan_adds_up():
    settings = replace(SHARDED, stages=("pretrain",))
    planned = plan(settings, WORK, 1, H100)
    assert planned.epoch_seconds == {"pretrain": pytest.approx(100 * planned.step.total)}
    epochs = settings.pretrain.max_epochs
    assert planned.run_seconds == pytest.approx(epochs * planned.epoch_seconds["pretrain"])
    assert planned.cost == pytest.approx(H100.price_per_hour * 4 * planned.run_seconds / 3600)
    assert planned.fits
    at_once = plan(replace(settings, checkpoint_in_background=False), WORK, 1, H100)
    assert at_once.goodput < planned.goodput, "the training stands still while a checkpoint is written"


def test_gpus_are_known_by_name():
    assert matrix_flops_of("NVIDIA H100 80GB HBM3") == 989.4e12
    assert matrix_flops_of("a toaster") is None


def test_a_step_of_a_dataset(tmp_path):
    # 3 items of training history each, so that 2 inputs and 3 pairs; 8 tokens per step, 2 in each lane.
    dataset = write_dataset(tmp_path, 400, np.array([3]), num_items=1_000_000)
    settings = replace(SHARDED, workers=2, data=replace(SHARDED.data, tokens_per_batch=8))
    work = measure_workload(dataset, settings)
    assert (work.load.users, work.load.tokens, work.load.attended_pairs) == (4, 8, 12)
    assert work.load.distinct_items == pytest.approx(8, abs=0.1)
    assert work.steps_per_epoch == 100
    assert work.imbalance == 1, "all histories are alike"


def test_the_largest_rank_is_waited_for(tmp_path):
    # One history in each lane and step: 2 or 20 inputs. Of two ranks with two lanes each.
    dataset = write_dataset(tmp_path, 4_000, np.array([3, 21]), num_items=1_000)
    settings = replace(SHARDED, workers=2, data=replace(SHARDED.data, tokens_per_batch=4))
    work = measure_workload(dataset, settings)
    # A rank has 4, 22, 22 or 40: the larger of two, on average, by the mean.
    pairs = [(max(a, b) / ((a + b) / 2)) for a in (4, 22, 22, 40) for b in (4, 22, 22, 40)]
    assert work.imbalance == pytest.approx(np.mean(pairs), rel=0.15)
    slow, even = (step_time(settings, replace(work, imbalance=x), 1, H100) for x in (1.5, 1.0))
    assert slow.compute == pytest.approx(1.5 * even.compute)
    assert slow.dense_exchange == even.dense_exchange
