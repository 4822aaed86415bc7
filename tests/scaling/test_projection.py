"""Projections: against the model of costs they are made with, and arithmetic by hand."""

import dataclasses
import json
from dataclasses import replace

import pytest

from recgpt.config import DataSettings, ModelSettings, TrainSettings
from recgpt.machines import load_machine
from recgpt.scaling import projection_plots
from recgpt.scaling.costs import memory_per_rank, step_time
from recgpt.scaling.plan import MOST_OF_MEMORY
from recgpt.scaling.projection import (
    MOST_ITEMS,
    NOTE,
    Table,
    made_up_workload,
    markdown,
    on_gpus,
    project,
    to_json,
)

H100 = load_machine("h100")
SETTINGS = TrainSettings(
    workers=2,
    model=ModelSettings(width=128, members=1, layers=1, max_history=40),
    data=DataSettings(tokens_per_batch=8000, lanes=4),
)
GPUS, ITEMS = (8, 64, 1024), (10_000_000, 1_000_000_000)


@pytest.fixture(scope="module")
def projection():
    return project(SETTINGS, H100, GPUS, ITEMS)


def point(projection, gpus, items):
    (found,) = (each for each in projection.points if (each.gpus, each.items) == (gpus, items))
    return found


def choice(projection, gpus, items):
    (found,) = (each for each in projection.choices if (each.gpus, each.items) == (gpus, items))
    return found


def test_a_worker_keeps_its_share_of_the_batch():
    wide = on_gpus(SETTINGS, 1024)
    assert (wide.workers, wide.data.tokens_per_batch, wide.data.lanes) == (1024, 4_096_000, 1024)


def test_the_workload_is_what_it_says():
    work = made_up_workload(SETTINGS, 10_000_000)
    # 8,000 inputs in histories of 40: 200 users, each with 40 x 41 / 2 pairs.
    assert (work.load.users, work.load.attended_pairs) == (200, 200 * 820)
    assert work.load.distinct_items == 8000
    assert work.steps_per_epoch == 100_000_000 / 200
    assert made_up_workload(SETTINGS, 1000).load.distinct_items == 2 * 1000


def test_a_point_is_what_the_model_of_costs_says(projection):
    found = point(projection, 64, 10_000_000)
    settings = on_gpus(projection.settings, 64)
    settings = replace(settings, item_table=replace(settings.item_table, placement="sharded"))
    work = made_up_workload(settings, 10_000_000)
    assert found.table == Table("adam", "float32")
    assert found.step_parts == dataclasses.asdict(step_time(settings, work, 1, H100))
    assert found.memory_bytes == memory_per_rank(settings, work, 1, H100).total
    assert found.tokens_per_second.middle == pytest.approx(64 * 4000 / found.step_seconds.middle)
    assert found.epoch_seconds.middle == pytest.approx(4e9 / found.tokens_per_second.middle)
    assert found.cost.middle == pytest.approx(H100.price_per_hour * 64 * found.epoch_seconds.middle / 3600)


def test_ranges_enclose_the_middle(projection):
    for found in projection.points:
        for values in (found.step_seconds, found.tokens_per_second, found.epoch_seconds, found.cost):
            assert values.low < values.middle < values.high


def test_what_dominates_is_the_longest_part(projection):
    found = point(projection, 1024, 10_000_000)
    assert found.step_parts[found.dominating] == max(found.step_parts.values())


def test_a_billion_items_need_a_smaller_state_on_few_gpus(projection):
    # A row of 128 values takes 1,544 bytes under Adam, 516 under row-wise Adagrad: 193 and 65 GB a GPU.
    assert choice(projection, 8, 1_000_000_000).table == Table("adagrad", "float32")
    assert choice(projection, 64, 1_000_000_000).table == Table("adam", "float32")


def test_a_replicated_table_needs_zero_2_for_some_sizes_and_fits_nowhere_for_others():
    # P = 1.28e9 and 2.56e9 weights: some 16 P bytes under ZeRO-1, 12 P under ZeRO-2, and 3.5 GB, of 40.5 GB.
    small = replace(H100, memory_bytes=45e9)
    stages = [
        each.replicated_zero_stage
        for each in project(SETTINGS, small, (64,), (10**7, 2 * 10**7, 10**8)).choices
    ]
    assert stages == [1, 2, None]


def test_the_largest_table_just_fits(projection):
    for table in (Table("adam", "float32"), Table("adagrad", "float32")):
        items = projection.largest[str(table)][8]
        settings = on_gpus(projection.settings, 8)
        sharded = replace(settings.item_table, placement="sharded", optimizer=table.optimizer)
        settings = replace(settings, item_table=sharded)
        least, more = (
            min(
                memory_per_rank(settings, made_up_workload(settings, count), stage, H100).total
                for stage in (1, 2, 3)
            )
            for count in (items, round(1.001 * items))
        )
        assert least <= MOST_OF_MEMORY * H100.memory_bytes < more
    assert projection.largest["sgd, bfloat16"][1024] == MOST_ITEMS


def test_the_second_copy_of_a_checkpoint_is_not_on_the_gpu(projection):
    assert not projection.settings.checkpoint_in_background


def test_every_output_says_that_it_is_projected(projection):
    text = markdown(projection)
    assert NOTE in text
    assert all("rojected" in line for line in text.splitlines() if line.startswith("## "))
    told = json.loads(json.dumps(to_json(projection)))
    assert told["note"] == NOTE
    assert told["points"][0]["dominating"] in told["points"][0]["step_parts"]
    for drawn in (projection_plots.curves(projection), projection_plots.choices(projection)):
        assert drawn["png"].startswith(b"\x89PNG")
        svg = drawn["svg"].decode()
        assert NOTE in svg
        assert "projected" in svg


def test_a_range_reads_as_one(projection):
    line = next(line for line in markdown(projection).splitlines() if line.startswith("| 10M | 8 |"))
    assert "adam, float32 | 1 |" in line
    found = point(projection, 8, 10_000_000)
    low, middle, high = (1e3 * value for value in found.step_seconds)
    assert f"{middle:.3g} ({low:.3g} to {high:.3g})" in line


def test_where_nothing_fits_there_is_no_point():
    tiny = replace(H100, memory_bytes=4e9)
    projected = project(SETTINGS, tiny, (8,), (1_000_000_000,))
    assert projected.points == []
    assert projected.choices[0].table is None
    assert "does not fit" in markdown(projected)
