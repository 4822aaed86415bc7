"""The benchmark of `recgpt prepare` with some thousand rows: its log, its comparison, its figures."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from benchmarks import prepare, string_log
from benchmarks.prepare import Prepared, differences, figures, read_dataset

REPOSITORY = Path(__file__).parent.parent.parent
KEY = ["user_id", "item_id", "timestamp"]

# The log


def write(folder, seed=0):
    string_log.write_log(
        folder, num_interactions=50_000, num_users=1_000, num_items=500, num_files=4, seed=seed
    )
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("logs") / "log")


@pytest.fixture(scope="module")
def log(files):
    return pq.read_table(files)


def test_columns_are_those_of_a_web_shop(log):
    strings = dict.fromkeys(("user_id", "event", "item_id"), pa.string())
    expected = {**strings, "price": pa.float64(), "timestamp": pa.int64()}
    assert dict(zip(log.schema.names, log.schema.types, strict=True)) == expected
    assert set(log["event"].to_pylist()) == {"click", "buy"}
    assert pc.all(pc.match_substring_regex(log["user_id"], r"^u\d{12}$")).as_py()
    assert pc.all(pc.match_substring_regex(log["item_id"], r"^B00[0-9A-Z]{7}$")).as_py()
    assert log["price"].null_count == 0


def test_files_are_cut_by_time_and_users_lie_scattered(files, log):
    assert [len(pq.read_table(file)) for file in files] == [12_500] * 4
    assert np.all(np.diff(log["timestamp"].to_numpy()) >= 0)
    users = log["user_id"].to_numpy()
    assert np.mean(users[1:] == users[:-1]) < 0.01


def test_some_rows_stand_twice_and_some_lack_the_item(log):
    complete = log.drop_null()
    assert 1 <= len(log) - len(complete) <= 20
    duplicates = len(complete) - len(complete.group_by(KEY).aggregate([]))
    assert 20 <= duplicates <= 90
    assert len(log.group_by(log.column_names).aggregate([])) == len(log) - duplicates, (
        "the rest of the row too"
    )


def test_lengths_are_log_normal_and_popularity_is_zipfs(log):
    lengths = np.log(pc.value_counts(log["user_id"]).field("counts").to_numpy())
    assert len(lengths) > 980
    assert lengths.mean() == pytest.approx(np.log(50) - 0.5, abs=0.1)
    assert lengths.std() == pytest.approx(1, abs=0.1)
    counts = np.sort(pc.value_counts(log["item_id"].drop_null()).field("counts").to_numpy())[::-1]
    assert len(counts) == 500
    # The first k of V items get log(1 + k) / log(1 + V) of all interactions.
    for k in (1, 10, 100):
        assert counts[:k].sum() / counts.sum() == pytest.approx(np.log(1 + k) / np.log(501), rel=0.05)


def test_the_log_is_a_function_of_its_seed(tmp_path, log):
    assert pq.read_table(write(tmp_path / "same")).equals(log)
    assert not pq.read_table(write(tmp_path / "other", seed=1)).equals(log)


def test_a_million_ids_differ():
    people = string_log.population(1_000_000, 1_000_000, np.random.SeedSequence(0))
    assert len(people.user_ids.unique()) == len(people.item_ids.unique()) == 1_000_000


# The comparison

HISTORIES = {"user_id": ["u1", "u2"], "item_ids": [["a", "b"], ["b"]], "timestamps": [[1, 2], [3]]}
COUNTS = {"item_id": ["a", "b"], "count": [1, 2]}


def prepared(**changes):
    return Prepared(pa.table({**HISTORIES, **changes}), pa.table(COUNTS))


def test_numbers_of_items_and_the_order_of_users_make_no_difference(tmp_path):
    files = {
        "one": ([("a", 1, 1), ("b", 2, 2)], [("u1", [1, 2], [1, 2]), ("u2", [2], [3])]),
        "other": ([("b", 1, 2), ("a", 2, 1)], [("u2", [1], [3]), ("u1", [2, 1], [1, 2])]),
    }
    for name, (items, users) in files.items():
        (tmp_path / name / "histories").mkdir(parents=True)
        vocabulary = pa.table(list(zip(*items, strict=True)), ["item_id", "item_index", "count"])
        pq.write_table(vocabulary, tmp_path / name / "vocabulary.parquet")
        for number, user in enumerate(users):
            histories = pa.table([[value] for value in user], ["user_id", "item_indices", "timestamps"])
            pq.write_table(histories, tmp_path / name / "histories" / f"{number}.parquet")
    one, other = (read_dataset(tmp_path / name) for name in files)
    assert differences(one, other) == []
    assert differences(one, prepared()) == []


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"user_id": ["u1", "u3"]}, "users"),
        ({"item_ids": [["b", "a"], ["b"]]}, "item_ids of 1 users, u1 among them"),
        ({"item_ids": [["a", "b"], ["b", "b"]]}, "item_ids of 1 users, u2 among them"),
        ({"timestamps": [[1, 2], [4]]}, "timestamps of 1 users, u2 among them"),
    ],
)
def test_differences_are_named(changes, difference):
    assert differences(prepared(), prepared(**changes)) == [difference]


def test_other_counts_are_a_difference():
    other = replace(prepared(), counts=pa.table({**COUNTS, "count": [2, 2]}))
    assert differences(prepared(), other) == ["items or their interactions"]


# The figures


def turns_of(*seconds, peak_bytes=2**30):
    return [{"seconds": value, "peak_bytes": peak_bytes + n} for n, value in enumerate(seconds)]


def test_figures_by_hand():
    logs = [
        {"interactions": 10, "duckdb": turns_of(1, 9, 2), "recgpt": turns_of(7, 6, 8)},
        {"interactions": 100, "duckdb": turns_of(40), "recgpt": turns_of(80)},
    ]
    small, large = figures(logs, ray_seconds=2)
    assert (small["duckdb_seconds"], small["recgpt_seconds"], small["ratio"]) == (2, 7, 3.5)
    assert small["recgpt_peak_bytes"] == 2**30 + 2
    assert (small["duckdb_growth"], small["recgpt_growth"]) == (1, 1)
    assert large["ratio"] == 2
    assert large["duckdb_growth"] == pytest.approx((40 / 100) / (2 / 10))
    assert large["recgpt_growth"] == pytest.approx((78 / 100) / (5 / 10))


# The whole


def test_the_smallest_log_is_compared_and_the_largest_has_fewer_turns(monkeypatch):
    calls = []

    def measure_log(folder, num_interactions, turns, python, compare):
        calls.append((num_interactions, turns, compare))
        return {"interactions": num_interactions, "ray": [1], "duckdb": turns_of(2), "recgpt": turns_of(4)}

    monkeypatch.setattr(prepare, "measure_log", measure_log)
    result = prepare.measure([300, 100, 200], 2, "python")
    assert calls == [(100, 3, True), (200, 3, False), (300, 2, False)]
    assert [row["interactions"] for row in result["figures"]] == [100, 200, 300]


@pytest.mark.slow
@pytest.mark.ray
def test_both_sides_prepare_a_small_log(tmp_path, capsys):
    pytest.importorskip("duckdb")
    # In a process of its own: it kills what it finds below it.
    code = f"""
import json, sys
from pathlib import Path
from benchmarks.prepare import measure
from benchmarks.process_tree import adopt_orphans
adopt_orphans()
result = measure([3_000], 1, sys.executable)
Path({str(tmp_path)!r}, "result.json").write_text(json.dumps(result))
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    (log,) = result["logs"]
    (duckdb,), (recgpt,) = log["duckdb"], log["recgpt"]
    assert log["histories_compared"]
    assert 2_900 < recgpt["interactions"] == duckdb["interactions"] < 3_000
    assert recgpt["peak_bytes"] > duckdb["peak_bytes"] > 2**24
    prepare.show(result)
    assert "0.003" in capsys.readouterr().out
