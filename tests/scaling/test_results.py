"""Figures of a point from its ranks, rows and their file, summaries over repeats; all worked out by hand."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from recgpt.errors import UserError
from recgpt.scaling.experiment import Experiment, MadeUpDataset, points_of
from recgpt.scaling.parts import PARTS
from recgpt.scaling.results import (
    FIGURES,
    Outcome,
    all_rows,
    claim,
    efficiencies,
    figures_of,
    outcome_file,
    read_outcome,
    read_results,
    summarize,
    write_outcome,
    write_results,
)

EXPERIMENT = Experiment(
    dataset=MadeUpDataset(10, 20, (3,)), grid={"workers": [1, 2], "lengths": [[3], [4, 5]]}
)
POINTS = points_of(EXPERIMENT, "mine")
DATASETS = ["data"] * len(POINTS)


def rank(seconds, forward, **more):
    """What a rank returned, whose steps are a forward pass and the rest."""
    parts = {part: [0.0] * len(seconds) for part in PARTS}
    parts["forward"] = forward
    parts["rest"] = [step - part for step, part in zip(seconds, forward, strict=True)]
    common = {"bytes": {}, "tokens": 0, "flops": 0.0, "memory_bytes": 0, "base_memory_bytes": 0}
    return {"seconds": seconds, "parts": parts, **common, **more}


RANKS = [
    rank(
        [1.0, 3.0, 2.0],
        [0.5, 1.0, 1.0],
        bytes={"dense": 30, "sizes": 6},
        tokens=300,
        flops=600.0,
        memory_bytes=70,
        base_memory_bytes=50,
        checkpoint={"bytes": 9, "pause_seconds": 1.0, "seconds": 4.0},
        recall_users_per_second=11.0,
    ),
    rank(
        [2.0, 2.0, 4.0],
        [1.0, 1.0, 2.5],
        bytes={"dense": 24},
        tokens=600,
        flops=1200.0,
        memory_bytes=60,
        base_memory_bytes=55,
        checkpoint={"bytes": 9, "pause_seconds": 2.0, "seconds": 3.0},
    ),
]


def measured(step=1.0, **figures):
    return Outcome(None, {"step_seconds": step, **figures})


def summaries_of(outcomes):
    keys, rows = all_rows(POINTS, DATASETS, outcomes)
    return summarize(rows, keys)


def test_figures_of_a_point():
    figures = figures_of(RANKS, matrix_flops=500.0)
    assert set(figures) == set(FIGURES)
    assert figures["step_seconds"] == 3, "the median of 2, 3 and 4"
    assert (figures["step_seconds_quarter"], figures["step_seconds_three_quarters"]) == (2.5, 3.5)
    # 7 of the 14 seconds of both ranks are forward passes, the other 7 the rest.
    assert (figures["forward_seconds"], figures["rest_seconds"]) == (1.5, 1.5)
    assert (figures["tokens_per_step"], figures["tokens_per_second"]) == (300, 100)
    assert figures["flops_per_second"] == 1800 / 3 / 3
    assert figures["matrix_rate_share"] == pytest.approx(200 / (2 * 500))
    assert figures["sent_bytes_per_step"] == (36 + 24) / 2 / 3 / 2, "one half stays on the rank"
    assert (figures["memory_bytes"], figures["base_memory_bytes"]) == (70, 55)
    assert (figures["checkpoint_seconds"], figures["checkpoint_pause_seconds"]) == (4, 2)
    assert (figures["checkpoint_bytes"], figures["recall_users_per_second"]) == (9, 11)


def test_the_parts_sum_to_the_step():
    figures = figures_of(RANKS, None)
    assert sum(figures[f"{part}_seconds"] for part in PARTS) == pytest.approx(figures["step_seconds"])


def test_what_was_not_asked_for_or_is_not_known_is_left_open():
    figures = figures_of([rank([1.0], [1.0])], None)
    assert figures["matrix_rate_share"] is None
    assert figures["checkpoint_seconds"] is None
    assert figures["recall_users_per_second"] is None


def test_an_outcome_is_read_as_it_was_written(tmp_path):
    file = outcome_file(str(tmp_path), "abc", 2)
    assert read_outcome(file) is None
    outcome = Outcome(None, figures_of(RANKS, None))
    write_outcome(file, POINTS[0], 2, outcome)
    assert read_outcome(file) == outcome
    (tmp_path / "points" / "abc-2.json").write_text('{"reason": 3}')
    with pytest.raises(UserError, match=r"abc-2.json: "):
        read_outcome(file)


def test_a_folder_that_is_not_a_sweeps_is_refused_and_kept(tmp_path):
    (tmp_path / "table.md").write_text("dear to me")
    with pytest.raises(UserError, match="not a sweep's"):
        claim(str(tmp_path), EXPERIMENT)
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_a_sweep_may_be_gone_on_with_and_with_more_repeats(tmp_path):
    claim(str(tmp_path), EXPERIMENT)
    claim(str(tmp_path), replace(EXPERIMENT, repeats=7))


def test_rows_go_to_parquet_and_come_back_the_failed_ones_too(tmp_path):
    outcomes = {(0, 0): Outcome(None, figures_of(RANKS, None)), (3, 0): Outcome("no room", {})}
    keys, rows = all_rows(POINTS, DATASETS, outcomes)
    write_results(str(tmp_path), rows)
    table = pq.read_table(tmp_path / "results.parquet")
    assert str(table.schema.field("recall_users_per_second").type) == "double"
    assert str(table.schema.field("workers").type) == "int64"
    good, failed = read_results(str(tmp_path))
    assert (good["point"], good["workers"], good["lengths"]) == ("workers=1 lengths=3", 1, "[3]")
    assert (good["step_seconds"], good["matrix_rate_share"], good["reason"]) == (3, None, None)
    assert (failed["reason"], failed["step_seconds"]) == ("no room", None)
    assert '"workers": 2' in failed["settings"]
    assert keys == ["workers", "lengths"]


def test_what_is_no_sweep_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no results\.parquet here"):
        read_results(str(tmp_path))
    (tmp_path / "results.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_results(str(tmp_path))


def test_a_point_over_its_repeats():
    outcomes = {
        (1, 0): measured(4.0, memory_bytes=10.0),
        (1, 1): measured(2.0, memory_bytes=20.0),
        (1, 2): Outcome("lost", {}),
        (1, 3): measured(9.0),
        (2, 0): Outcome("lost", {}),
        (2, 1): Outcome("lost", {}),
    }
    good, failed = summaries_of(outcomes)
    assert (good.label, good.values) == ("workers=1 lengths=4,5", {"workers": 1, "lengths": (4, 5)})
    assert (good.figures["step_seconds"], good.least_step_seconds, good.most_step_seconds) == (4, 2, 9)
    assert (good.figures["memory_bytes"], good.figures["checkpoint_bytes"]) == (15, None)
    assert (good.measured, good.reasons) == (3, ["lost"])
    assert (failed.measured, failed.figures, failed.reasons) == (0, {}, ["lost"])


def test_efficiency_is_by_the_fewest_workers_of_points_that_are_alike_otherwise():
    speeds = [100.0, 50.0, 160.0, 75.0]  # 1 worker, 2 lengths; 2 workers, 2 lengths
    outcomes = {(number, 0): measured(tokens_per_second=speed) for number, speed in enumerate(speeds)}
    assert list(efficiencies(summaries_of(outcomes)).values()) == [1, 1, 0.8, 0.75]
    only_one = {(number, 0): measured(tokens_per_second=1.0) for number in (0, 1)}
    assert efficiencies(summaries_of(only_one)) == {}
