"""The end-to-end benchmark at ten million items: its log, its look at processes, its check of rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import large_log
from benchmarks.exported_rows import (
    compare_rows,
    exported_ranges,
    probability_of_no_draw,
    problems,
    rows_in_training,
)
from benchmarks.large_catalogue import step_of
from benchmarks.process_tree import memory_of
from recgpt.config import LossSettings, ModelSettings, TrainSettings
from recgpt.model.item_table import initial_rows

REPOSITORY = Path(__file__).parent.parent.parent
MIB = 2**20


# The log


@pytest.fixture(scope="module")
def log():
    return large_log.interactions(20_000)


def test_every_item_occurs_and_every_user_is_long_enough(log):
    items, users = log["item_id"].to_numpy(), log["user_id"].to_numpy()
    assert np.array_equal(np.unique(items), np.arange(20_000))
    assert len(log) == 25_000
    assert np.unique(users, return_counts=True)[1].min() >= large_log.MIN_LENGTH


def test_popularity_is_skewed(log):
    counts = np.bincount(log["item_id"].to_numpy())
    assert counts.max() > 100
    assert np.quantile(counts, 0.95) <= 2


def test_what_follows_a_popular_item_can_be_learned(log):
    popular = np.arange(100) * large_log.RANK_STRIDE % 20_000
    walks = log.filter(pc.is_in(log["item_id"], pa.array(popular)))
    walks = walks.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    users, items = walks["user_id"].to_numpy(), walks["item_id"].to_numpy()
    same_user = users[:-1] == users[1:]
    next_in_rank = items[1:] == (items[:-1] + large_log.RANK_STRIDE) % 20_000
    assert next_in_rank[same_user].mean() > 0.5


def test_a_users_interactions_have_different_times_and_the_log_is_in_time_order(log):
    assert np.all(np.diff(log["timestamp"].to_numpy()) >= 0)
    assert log.group_by(["user_id", "timestamp"]).aggregate([]).num_rows == len(log)


def test_the_log_is_a_function_of_size_and_seed(log):
    assert large_log.interactions(20_000).equals(log)
    assert not large_log.interactions(20_000, seed=1).equals(log)


def test_the_files_hold_the_log_cut_by_time(tmp_path, log):
    large_log.main(20_000, tmp_path / "log")
    files = sorted((tmp_path / "log").iterdir())
    assert len(files) == large_log.FILES
    assert pq.read_table(files).equals(log)


# Processes

PARENT_THAT_ENDS = """
import subprocess
print(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL).pid)
"""

ADOPTER = f"""
import subprocess, sys
from benchmarks.process_tree import adopt_orphans, descendants, kill_descendants

adopt_orphans()
parent = [sys.executable, "-c", {PARENT_THAT_ENDS!r}]
orphan = int(subprocess.run(parent, stdout=subprocess.PIPE).stdout)
assert descendants() == [orphan], (descendants(), orphan)
kill_descendants()
assert descendants() == []
"""


def test_orphans_are_found_and_killed():
    # In a process of its own: this one must not adopt or kill what other tests have started.
    subprocess.run([sys.executable, "-c", ADOPTER], cwd=REPOSITORY, check=True, timeout=60)


def test_memory_grows_by_what_is_allocated():
    before = memory_of(os.getpid())
    block = np.ones(64 * MIB, np.uint8)
    assert 60 * MIB < memory_of(os.getpid()) - before < 100 * MIB
    assert block.all()


def test_a_process_that_has_ended_takes_no_memory():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert memory_of(ended.pid) == 0


# Exported rows

LOSS = LossSettings(kind="sampled", negatives=2, popularity_share=0.5, popularity_power=1.0)
SETTINGS = TrainSettings(model=ModelSettings(width=4, members=1), loss=LOSS)


def test_rows_in_training_are_inputs_and_targets(tmp_path, write_dataset):
    # Leave-one-out: the last two are held out; of user 8 one item is left, which is no input of anything.
    dataset = write_dataset(tmp_path, {7: [10, 11, 12, 13], 8: [14, 12, 13]})
    trained = np.flatnonzero(rows_in_training(dataset, SETTINGS))
    assert sorted(dataset.vocabulary().decode(trained).to_pylist()) == [10, 11]


def test_probability_of_no_draw_by_hand():
    # Per step one uniform draw of 4 items and one by popularity: 1 in 8 for items 1 to 3, 5 in 8 for item 4.
    chance = probability_of_no_draw(LOSS, np.array([0, 1, 1, 1, 5]), steps=2)
    assert chance[1:] == pytest.approx([(3 / 4 * 7 / 8) ** 2] * 3 + [(3 / 4 * 3 / 8) ** 2])


def compare(rows, trained, steps=1, count=1):
    trained = np.array(trained)
    counts = np.full(len(trained), count)
    counts[0] = 0
    return compare_rows(rows.split(3), SETTINGS, trained, counts, steps)


def exported(moved, num_rows=7):
    rows = initial_rows(SETTINGS.seed, 0, num_rows, 4)
    rows[moved] += 0.5
    return rows


def test_rows_are_counted_by_what_became_of_them():
    trained = [False, True, True, False, False, False, False]
    found = compare(exported([1, 2, 3]), trained)
    assert found == {
        "rows": 7,
        "all_finite": True,
        "padding_moved": False,
        "trained": 2,
        "trained_and_moved": 2,
        "not_trained": 4,
        "not_trained_and_as_they_began": 3,
        "expected_as_they_began": pytest.approx(4 * (5 / 6) ** 2),
    }
    assert problems(found) == []


@pytest.mark.parametrize(
    ("moved", "problem"),
    [([1], "1 rows in training have not moved"), ([0, 1, 2], "the row of padding has moved")],
)
def test_wrong_rows_are_named(moved, problem):
    trained = [False, True, True, False, False, False, False]
    assert problems(compare(exported(moved), trained)) == [problem]


def test_an_export_with_too_few_rows_is_refused():
    with pytest.raises(AssertionError, match="6 rows in the export, 7 expected"):
        compare(exported([1])[:6], [False] * 7)


def test_a_value_that_is_not_finite_is_a_problem():
    rows = exported([1])
    rows[1, 2] = float("nan")
    found = compare(rows, [False, True] + [False] * 5)
    assert problems(found) == ["some rows are not finite"]


@pytest.mark.parametrize("moved", [[], list(range(1, 1000))])
def test_too_few_or_too_many_untouched_rows_are_a_problem(moved):
    # After 500 steps of one draw each way over 1,000 rows, e^-1 of them are as they began.
    rows = exported(moved, num_rows=1001)
    found = compare(rows, [False] * 1001, steps=500)
    assert found["expected_as_they_began"] == pytest.approx(1000 / np.e, rel=1e-2)
    (problem,) = problems(found)
    assert "are as they began, not about 368" in problem


# The whole


def test_step_of_checkpoints():
    assert step_of([]) == 0
    assert step_of(["step-0000000050-epoch-00000", "step-0000000110-epoch-00001"]) == 110


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_run_of_twenty_thousand_items_is_killed_twice_and_finished(tmp_path):
    code = f"""
import json
from dataclasses import asdict
from pathlib import Path
from benchmarks.large_catalogue import Benchmark, Size
from benchmarks.process_tree import adopt_orphans, kill_descendants
adopt_orphans()
try:
    phases = Benchmark(Path({str(tmp_path)!r}), Size(20_000, 64, 8, 50)).run()
finally:
    kill_descendants()
Path({str(tmp_path)!r}, "phases.json").write_text(json.dumps([asdict(phase) for phase in phases]))
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    *_, first, second, last, rows = json.loads((tmp_path / "phases.json").read_text())
    assert first["facts"]["from_step"] == 0
    assert second["facts"]["from_step"] == first["facts"]["to_step"] >= 100
    assert last["facts"]["from_step"] == second["facts"]["to_step"] >= 200
    assert last["facts"]["to_step"] > last["facts"]["from_step"]
    assert rows["facts"]["trained_and_moved"] == rows["facts"]["trained"] > 10_000
    assert rows["facts"]["not_trained_and_as_they_began"] > 1_000
    ranges = list(exported_ranges(str(tmp_path / "run" / "model")))
    assert torch.cat(ranges).shape == (20_001, 64)
