"""`recgpt scale`: what is measured, what is not measured again, what fails; and two sweeps side by side."""

import pyarrow.parquet as pq
import pytest
import yaml

from ray_jobs import scaling
from ray_jobs.rank_actors import RanksFailed, run_rank_actors
from ray_jobs.runtime import run_command
from recgpt import storage
from recgpt.scaling.parts import PARTS

TINY = {
    "dataset": {"users": 100, "items": 30, "lengths": [4, 8]},
    "settings": {
        "model": {"width": 8, "members": 1, "layers": 1},
        "item_table.placement": "sharded",
        "loss.kind": "full",
        "data.tokens_per_batch": 64,
    },
    "grid": {"workers": [1, 2]},
    "warm_up": 1,
    "steps": 2,
    "repeats": 1,
}


@pytest.fixture
def experiment(tmp_path):
    """Writes the file of an experiment; returns its path."""

    def write(**changed):
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(TINY | changed))
        return str(file)

    return write


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "sweep")


@pytest.fixture
def calls(monkeypatch):
    """What the ranks would have been asked for; ``calls.failing`` says for which widths that fails."""

    class Calls(list):
        failing = ()

    calls = Calls()

    def run(function, world_size, threads, timeout_seconds, **arguments):
        if function.endswith(":rates"):
            return [{"matrix_flops": 1e9}]
        width = arguments["settings"]["model"]["width"]
        calls.append((world_size, width))
        if width in calls.failing:
            raise RanksFailed(f"rank 0 of {world_size}: no memory")
        step = width / 1000
        return [
            {
                "seconds": [step, step],
                "parts": {part: [step / len(PARTS)] * 2 for part in PARTS},
                "bytes": {},
                "tokens": 64,
                "flops": 1e6,
                "memory_bytes": 2**20,
                "base_memory_bytes": 2**20,
                "device": "cpu",
            }
        ] * world_size

    monkeypatch.setattr(scaling, "run_rank_actors", run)
    monkeypatch.setattr(scaling, "start_ray", lambda min_cpus: None)
    monkeypatch.setattr(scaling, "_machine", dict)
    return calls


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["scale", *arguments])
    try:
        run_command(scaling.app)
    except SystemExit as stop:
        return stop.code
    return 0


def test_each_point_is_measured_once_before_any_is_measured_again(experiment, output, calls):
    scaling.run_scale(experiment(repeats=2), output)
    assert calls == [(1, 8), (2, 8), (1, 8), (2, 8)]
    assert pq.read_table(f"{output}/results.parquet")["workers"].to_pylist() == [1, 1, 2, 2]
    assert {"datasets", "plots", "points", "results.parquet", "table.md", "report.html"} <= set(
        storage.list_names(output)
    )
    assert len(storage.list_names(f"{output}/plots")) == 8


def test_what_is_measured_is_kept_and_the_rest_of_a_larger_experiment_follows(experiment, output, calls):
    scaling.run_scale(experiment(), output)
    del calls[:]
    scaling.run_scale(experiment(repeats=2, points=[{"model.width": 16}]), output)
    assert calls == [(1, 16), (1, 8), (2, 8), (1, 16)]
    del calls[:]
    scaling.run_scale(experiment(repeats=2, points=[{"model.width": 16}]), output)
    assert calls == []


def test_a_point_that_fails_does_not_end_the_sweep_and_is_tried_again(experiment, output, calls):
    calls.failing = (4,)
    grid = {"model.width": [4, 8]}
    tables = scaling.run_scale(experiment(grid=grid), output)
    assert calls == [(1, 4), (1, 8)]
    assert tables[-1].rows == [["model.width=4", "rank 0 of 1: no memory"]]
    rows = pq.read_table(f"{output}/results.parquet").to_pylist()
    assert [(row["reason"], row["step_seconds"]) for row in rows] == [
        ("rank 0 of 1: no memory", None),
        (None, 0.008),
    ]
    calls.failing = ()
    tables = scaling.run_scale(experiment(grid=grid), output)
    assert calls[2:] == [(1, 4)]
    assert "Failed" not in [table.title for table in tables]


def test_a_sweep_of_which_nothing_can_be_measured_ends_with_the_reason(
    monkeypatch, capsys, experiment, output, calls
):
    calls.failing = (8,)
    assert run(monkeypatch, "--experiment", experiment(), "--output", output) == 2
    assert "no point could be measured; of the first: rank 0 of 1: no memory" in capsys.readouterr().err


def test_points_of_one_shape_share_a_made_up_dataset(experiment, output, calls):
    scaling.run_scale(experiment(grid={"items": [30, 40], "model.width": [8, 16]}), output)
    assert len(storage.list_names(f"{output}/datasets")) == 2


def test_two_sweeps_side_by_side(monkeypatch, capsys, tmp_path, experiment, calls):
    sweeps = [str(tmp_path / name) for name in ("old", "new")]
    for sweep, width in zip(sweeps, (8, 16), strict=True):
        scaling.run_scale(experiment(settings={"model.width": width}), sweep)
    assert run(monkeypatch, "--compare", *sweeps) == 0
    words = capsys.readouterr().out.split()
    assert {"8.00", "16.00", "2.00", "0.50"} <= set(words), "twice the time, half the tokens"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "give --experiment and --output, --compare with two folders, or --held-out"),
        (("--experiment", "weak"), "give --experiment and --output"),
        (("--compare", "one"), "--compare takes two folders"),
        (("--compare", "one", "two", "--output", "three"), "--compare takes two folders and no other option"),
        (("--compare", "one", "two"), "one: no results.parquet here"),
        (("--experiment", "week", "--output", "out"), "shipped are"),
    ],
)
def test_a_wrong_command_line_is_told(monkeypatch, capsys, arguments, problem):
    assert run(monkeypatch, *arguments) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_sweep_over_one_and_two_workers_and_a_point_that_fails(
    monkeypatch, capsys, experiment, output, local_ray
):
    wrong = {"item_table.placement": "replicated", "item_table.optimizer": "sgd"}  # what a rank finds out
    call = "--output", output, "--experiment"
    assert run(monkeypatch, *call, experiment(recall_users=20, points=[wrong])) == 0
    assert "optimizer=sgd" in capsys.readouterr().out
    one, two, failed = pq.read_table(f"{output}/results.parquet").to_pylist()
    for row in (one, two):
        assert row["reason"] is None
        assert sum(row[f"{part}_seconds"] for part in PARTS) == pytest.approx(row["step_seconds"])
        assert 0 < row["matrix_rate_share"] < 1
        assert 0 < row["tokens_per_step"] <= 64
        assert row["memory_bytes"] > row["base_memory_bytes"]
        # 31 rows of 8 values and two moments of each, at least.
        assert row["checkpoint_bytes"] > 3 * 31 * 8 * 4
        assert row["checkpoint_seconds"] >= row["checkpoint_pause_seconds"] > 0
        assert row["recall_users_per_second"] > 0
    assert all(two[f"{part}_seconds"] > 0 for part in PARTS), "a sharded table over two ranks has them all"
    assert (one["sent_bytes_per_step"], one["all_to_all_seconds"]) == (0, 0)
    assert two["sent_bytes_per_step"] > 0
    assert failed["reason"].startswith("rank 0 of 1: item_table.optimizer=sgd")
    assert storage.read_json(f"{output}/machine.json")["cpus"] >= 2
    assert not storage.exists(f"{output}/scratch")

    monkeypatch.setattr(scaling, "run_rank_actors", None)  # would be called if anything were measured
    assert run(monkeypatch, *call, experiment(recall_users=20)) == 0
    assert pq.read_table(f"{output}/results.parquet")["step_seconds"].to_pylist() == [
        row["step_seconds"] for row in (one, two)
    ]


@pytest.mark.ray
@pytest.mark.slow
def test_a_process_that_dies_and_ranks_that_take_too_long_are_told(local_ray):
    with pytest.raises(RanksFailed, match="rank 0 of 1: its process died, perhaps for want of memory"):
        run_rank_actors("os:_exit", 1, 1, 60, status=1)
    # Whether the process or what it does is what takes too long depends on the machine.
    with pytest.raises(
        RanksFailed, match=r"1 ranks were not ready in time|0 of 1 processes of 1 CPUs started"
    ):
        run_rank_actors("multiprocessing.connection:wait", 1, 1, 4, object_list=[], timeout=60)
