"""`recgpt prepare` from logs to a dataset folder, and its errors."""

import dataclasses
import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from ray_jobs.prepare import run_prepare
from recgpt.data.dataset import HistoryDataset
from recgpt.errors import UserError
from tests.ray_jobs import two_nodes
from tests.ray_jobs.logs import histories_by_user, log_table, random_log, reference

pytestmark = pytest.mark.ray


def test_small_csv_by_hand(local_ray, tmp_path):
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,rating,timestamp\n"
        "7,b,5,30\n7,a,4,20\n7,c,3,20\n8,a,1,10\n7,b,2,30\n8,,1,11\n,a,1,12\n9,b,1,\n"
    )
    log = [str(tmp_path / "log.csv")]
    manifest = run_prepare(log, str(tmp_path / "dataset"), max_bad_fraction=0.5)
    assert histories_by_user(tmp_path / "dataset") == {7: [("a", 20), ("c", 20), ("b", 30)], 8: [("a", 10)]}
    assert manifest == HistoryDataset.open(str(tmp_path / "dataset")).manifest
    assert (manifest.num_users, manifest.num_items, manifest.num_interactions) == (2, 3, 4)
    assert (manifest.user_id_type, manifest.item_id_type) == ("int64", "string")
    assert manifest.time_quantiles == {"0.8": 30, "0.9": 30}
    assert manifest.dropped == {
        "missing_values": 3,
        "bad_values": 0,
        "duplicates": 1,
        "rare_users_or_items": 0,
    }
    assert manifest.sources == [{"path": str(tmp_path / "log.csv"), "format": "csv", "bytes": 101}]


def test_small_sequences_by_hand(local_ray, tmp_path):
    (tmp_path / "log.txt").write_text("1 10 30 20 10\n2 20\n\n3\n")
    manifest = run_prepare([str(tmp_path / "log.txt")], str(tmp_path / "dataset"), max_bad_fraction=0.2)
    assert histories_by_user(tmp_path / "dataset") == {1: [10, 30, 20, 10], 2: [20]}
    assert not manifest.has_timestamps
    assert manifest.time_quantiles is None
    assert (manifest.user_id_type, manifest.item_id_type) == ("int64", "int64")
    assert "timestamps" not in pq.read_schema(tmp_path / "dataset" / "histories" / "part-00000.parquet").names


@pytest.mark.parametrize(("min_user", "min_item"), [(1, 1), (5, 1), (1, 6), (9, 9)])
def test_agrees_with_the_definition(local_ray, tmp_path, min_user, min_item):
    log = random_log(seed=min_user)
    (tmp_path / "log").mkdir()
    pq.write_table(log_table(log), tmp_path / "log" / "log.parquet")
    manifest = run_prepare(
        [str(tmp_path / "log")],
        str(tmp_path / "out" / "dataset"),
        min_user_interactions=min_user,
        min_item_interactions=min_item,
        max_bad_fraction=0.1,
    )
    expected = reference(log, min_user, min_item)
    assert expected
    assert histories_by_user(tmp_path / "out" / "dataset") == expected
    assert sum(manifest.dropped.values()) == len(log) - sum(map(len, expected.values()))


def test_order_of_files_and_rows_and_their_formats_do_not_matter(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr("ray_jobs.prepare_pipeline.INTERACTIONS_PER_PART", 250)
    log = random_log(seed=3)
    pq.write_table(log_table(log), tmp_path / "whole.parquet")
    random.Random(0).shuffle(log)
    pq.write_table(log_table(log[:100]), tmp_path / "z.parquet", row_group_size=17)
    pyarrow.csv.write_csv(log_table(log[100:400]), tmp_path / "y.csv")
    (tmp_path / "x.inter").write_text(
        "timestamp:float\titem_id:token\tuser_id:token\n"
        + "".join("\t".join("" if v is None else str(v) for v in (t, i, u)) + "\n" for u, i, t in log[400:])
    )
    settings = {"min_item_interactions": 3, "max_bad_fraction": 0.1}
    whole = run_prepare([str(tmp_path / "whole.parquet")], str(tmp_path / "a"), **settings)
    pieces = run_prepare([str(tmp_path / "[x-z].*")], str(tmp_path / "b"), **settings)
    assert len(whole.files) == 4
    assert dataclasses.replace(pieces, sources=whole.sources) == whole
    for file in ("vocabulary.parquet", *(file.path for file in whole.files)):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert histories_by_user(tmp_path / "b") == reference(log, min_item=3)


def test_two_nodes_write_what_one_writes(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr("recgpt.data.preparation.ROWS_PER_PIECE", two_nodes.ROWS_PER_PIECE)
    monkeypatch.setattr("ray_jobs.prepare_pipeline.INTERACTIONS_PER_PART", two_nodes.PART)
    (tmp_path / "log").mkdir()
    for number in range(6):
        log = [row for row in random_log(number, rows=1500) if None not in row]
        pq.write_table(log_table(log), tmp_path / "log" / f"{number}.parquet")
    one = run_prepare([str(tmp_path / "log")], str(tmp_path / "one"))
    call = [sys.executable, "-m", "tests.ray_jobs.two_nodes", str(tmp_path / "log"), str(tmp_path / "two")]
    subprocess.run(call, check=True, capture_output=True, timeout=120)
    assert len(one.files) == 8
    assert HistoryDataset.open(str(tmp_path / "two")).manifest == one


def test_ids_are_strings_if_one_file_has_other_tokens(local_ray, tmp_path):
    (tmp_path / "1.csv").write_text("user_id,item_id,timestamp\n1,10,5\n")
    (tmp_path / "2.csv").write_text("user_id,item_id,timestamp\n1,007,6\n2,10,6\n")
    run_prepare([str(tmp_path / "*.csv")], str(tmp_path / "dataset"))
    assert histories_by_user(tmp_path / "dataset") == {1: [("10", 5), ("007", 6)], 2: [("10", 6)]}


def test_columns_by_name_and_overwriting(local_ray, tmp_path):
    pq.write_table(pa.table({"who": [1, 1], "what": ["a", "b"], "when": [2, 1]}), tmp_path / "log.parquet")
    output = tmp_path / "dataset"
    output.mkdir()
    (output / "old").write_text("")
    names = {"user_column": "who", "item_column": "what", "time_column": "when"}
    with pytest.raises(UserError, match="already holds something"):
        run_prepare([str(tmp_path / "log.parquet")], str(output), **names)
    manifest = run_prepare([str(tmp_path / "log.parquet")], str(output), **names, overwrite=True)
    assert histories_by_user(output) == {1: [("b", 1), ("a", 2)]}
    assert not (output / "old").exists()
    assert manifest.settings == json.loads((output / "manifest.json").read_text())["settings"]
    assert manifest.settings["user_column"] == "who"


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({}, {}, "no such file"),
        ({"log.csv": "user,item_id,timestamp\n1,2,3\n"}, {}, "no column user_id"),
        ({"log.csv": "user_id,item_id,timestamp\n"}, {}, "log.csv: the log holds no interaction"),
        (
            {"log.csv": "user_id,item_id,timestamp\n1,,3\n"},
            {"max_bad_fraction": 1},
            r"log.csv: no interaction is left of 1 rows \(1 missing values\)",
        ),
        (
            {"log.csv": "user_id,item_id,timestamp\n1,2,3\n1,2\n"},
            {},
            "log.csv: row 2: 3 fields expected, found 2; 1 of 2 rows are bad, above --max-bad-fraction 0.01",
        ),
        (
            {"a.csv": "user_id,item_id,timestamp\n1,2,3\n", "b.csv": "user_id,item_id,timestamp\n1,2,3\n"},
            {"min_user_interactions": 2},
            "no user is left after filtering; lower --min-user-interactions",
        ),
        ({"log.txt": "1 2 3\n1 4\n"}, {}, "user 1 stands on two lines"),
        ({"log.txt": "1 2 3\n"}, {"min_item_interactions": 0}, "min_item_interactions: .* greater than 0"),
        ({"log.txt": "1 2 3\n"}, {"min_items": 3}, "unknown setting min_items; the nearest known one"),
        ({"log.txt": "1 2 3\n"}, {"format": "xml"}, "unknown format"),
    ],
)
def test_what_the_user_can_put_right(local_ray, tmp_path, files, settings, message):
    (tmp_path / "log").mkdir()
    for name, text in files.items():
        (tmp_path / "log" / name).write_text(text)
    inputs = [str(tmp_path / "log" / name) for name in files] or [str(tmp_path / "log" / "gone.csv")]
    with pytest.raises(UserError, match=message):
        run_prepare(inputs, str(tmp_path / "dataset"), **settings)
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(("inputs", "output"), [("log/log.txt", "log"), ("l*/*", "log"), ("log", "log/out")])
def test_an_output_that_overlaps_an_input_is_refused(tmp_path, inputs, output):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.txt").write_text("1 2 3\n")
    with pytest.raises(UserError, match="which is read from; choose another folder"):
        run_prepare([str(tmp_path / inputs)], str(tmp_path / output), overwrite=True)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "counts", "quantiles"),
    [
        ("Beauty.txt", (22363, 12101, 198502), None),
        ("ml-100k.inter", (943, 1682, 100000), {"0.8": 889237269, "0.9": 891382309}),
    ],
)
def test_real_logs_come_through_whole(local_ray, shared_data, tmp_path, name, counts, quantiles):
    manifest = run_prepare([str(shared_data / name)], str(tmp_path / "dataset"))
    assert (manifest.num_users, manifest.num_items, manifest.num_interactions) == counts
    assert manifest.time_quantiles == quantiles
    assert sum(manifest.dropped.values()) == 0
    histories = histories_by_user(tmp_path / "dataset")
    if name == "Beauty.txt":
        lines = (line.split() for line in (shared_data / name).read_text().splitlines())
        assert histories == {int(user): [int(item) for item in items] for user, *items in lines}
