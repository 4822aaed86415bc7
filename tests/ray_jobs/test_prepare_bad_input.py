"""`recgpt prepare` on logs that are partly bad, filtered or in unusual forms."""

import gzip
import html
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.prepare import run_prepare
from recgpt.data.dataset import HistoryDataset
from recgpt.errors import UserError
from tests.ray_jobs.logs import HEADER, csv_of, histories_by_user, log_table

pytestmark = pytest.mark.ray

GOOD = [(f"u{number % 7}", f"i{number % 5}", 1_700_000_000 + number) for number in range(200)]


def write_good(folder):
    folder.mkdir(exist_ok=True)
    (folder / "good.csv").write_text(csv_of(GOOD))


def truncated_parquet(path):
    pq.write_table(log_table(GOOD), path)
    path.write_bytes(path.read_bytes()[:-50])


def damaged_parquet(path):
    """Its footer is whole, a page is not: only reading shows it."""
    pq.write_table(log_table(GOOD), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[20:200] = bytes(180)
    path.write_bytes(content)


def other_schema(path):
    pq.write_table(pa.table({"user_id": ["u"], "price": [1.5]}), path)


def extension_column(path):
    uuids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0123456789abcdef"], pa.binary(16)))
    pq.write_table(pa.table({"user_id": uuids, "item_id": ["a"], "timestamp": [1_700_000_000]}), path)


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("bad.parquet", truncated_parquet, "cannot be read"),
        ("bad.parquet", damaged_parquet, "cannot be read as parquet"),
        ("bad.parquet", other_schema, "no column item_id; the columns are user_id, price"),
        ("bad.parquet", extension_column, "column user_id is extension"),
        ("bad.csv", lambda path: path.write_bytes(b""), "the file is empty"),
        (
            "bad.csv.gz",
            lambda path: path.write_bytes(gzip.compress(csv_of(GOOD).encode())[:-20]),
            "cannot be",
        ),
    ],
)
def test_an_unreadable_file_goes_to_the_quarantine(local_ray, tmp_path, name, spoil, reason):
    write_good(tmp_path / "log")
    run_prepare([str(tmp_path / "log")], str(tmp_path / "expected"))
    spoil(tmp_path / "log" / name)
    manifest = run_prepare([str(tmp_path / "log")], str(tmp_path / "dataset"), max_bad_fraction=0.9)
    assert histories_by_user(tmp_path / "dataset") == histories_by_user(tmp_path / "expected")
    (bad_file,) = manifest.bad_files
    assert bad_file.path == str(tmp_path / "log" / name)
    assert reason in bad_file.reason
    assert name in (tmp_path / "dataset" / "quarantine" / "files.json").read_text()
    assert html.escape(bad_file.path) in (tmp_path / "dataset" / "report.html").read_text()
    if bad_file.bytes:
        with pytest.raises(UserError, match=f"{name}: .* above --max-bad-fraction 0.01"):
            run_prepare([str(tmp_path / "log")], str(tmp_path / "refused"))
        assert not (tmp_path / "refused").exists()


def test_bad_rows_go_to_the_quarantine_with_file_row_and_reason(local_ray, tmp_path):
    write_good(tmp_path / "log")
    rows = ["u,i,1700000000", "u,i", ",i,1700000001", "u,i,noon", "u,,1700000002"]
    (tmp_path / "log" / "some.csv").write_text(HEADER + "\n".join(rows))
    with pytest.raises(UserError, match=r"some.csv: row 2: 3 fields .*4 of 205 rows are bad, above .* 0.01"):
        run_prepare([str(tmp_path / "log")], str(tmp_path / "dataset"))
    manifest = run_prepare([str(tmp_path / "log")], str(tmp_path / "dataset"), max_bad_fraction=0.02)
    assert (manifest.dropped["missing_values"], manifest.dropped["bad_values"]) == (2, 2)
    assert manifest.num_interactions == 201
    (file,) = (tmp_path / "dataset" / "quarantine").iterdir()
    quarantined = pq.read_table(file).to_pylist()
    assert {row["file"] for row in quarantined} == {str(tmp_path / "log" / "some.csv")}
    assert sorted((row["row"], row["reason"], row["content"]) for row in quarantined) == [
        (2, "3 fields expected, found 2", "u,i"),
        (3, "user_id is missing", "item_id=i, timestamp=1700000001"),
        (4, "timestamp cannot be read as int64", "user_id=u, item_id=i, timestamp=noon"),
        (5, "item_id is missing", "user_id=u, timestamp=1700000002"),
    ]
    assert "timestamp cannot be read as int64" in (tmp_path / "dataset" / "report.html").read_text()


def test_ids_that_stop_being_integers_after_the_first_lines(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr("recgpt.data.finding._SAMPLE_BYTES", 60)
    rows = [(1, 10, 1_700_000_000 + number) for number in range(50)] + [(2, "x", 1_700_000_100)]
    (tmp_path / "log.csv").write_text(csv_of(rows))
    manifest = run_prepare([str(tmp_path / "log.csv")], str(tmp_path / "dataset"))
    assert (manifest.user_id_type, manifest.item_id_type) == ("int64", "string")
    assert histories_by_user(tmp_path / "dataset")[2] == [("x", 1_700_000_100)]


def test_files_in_different_units_and_forms_meet_in_the_finest_unit(local_ray, tmp_path):
    folder = tmp_path / "log"
    (folder / "day=1").mkdir(parents=True)
    (folder / "a.csv").write_text(csv_of([("u", "a", 1_700_000_000)]))
    (folder / "b.csv.gz").write_bytes(gzip.compress(csv_of([("u", "b", 1_700_000_001_500)]).encode()))
    (folder / "day=1" / "c.tsv").write_text("timestamp\titem_id\tuser_id\n2023-11-14 22:13:22\tc\tu\n")
    manifest = run_prepare([str(folder)], str(tmp_path / "dataset"))
    assert manifest.time_unit == "microseconds"
    assert histories_by_user(tmp_path / "dataset") == {
        "u": [("a", 1_700_000_000_000_000), ("b", 1_700_000_001_500_000), ("c", 1_700_000_002_000_000)]
    }


def test_folders_in_the_manner_of_hive(local_ray, tmp_path):
    for day in (1, 2):
        folder = tmp_path / "log" / f"date=2026-01-0{day}" / "event=buy"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"user_id": ["u"], "item_id": [f"i{day}"]}), folder / "x.parquet")
    manifest = run_prepare(
        [str(tmp_path / "log")], str(tmp_path / "dataset"), time_column="date", events=("buy",)
    )
    first = 1_767_225_600_000_000
    assert histories_by_user(tmp_path / "dataset") == {"u": [("i1", first), ("i2", first + 86_400_000_000)]}
    assert manifest.time_unit == "microseconds"


def test_events_window_repeats_and_longest_history(local_ray, tmp_path):
    rows = [
        ("a", 10, "click"), ("a", 11, "buy"), ("b", 12, "view"), ("a", 13, "click"), ("b", 14, "click"),
        ("c", 15, "click"), ("d", 16, "click"), ("e", 17, "click"), ("f", 18, "click"),
    ]  # fmt: skip
    base = 1_700_000_000
    table = pa.table(
        {
            "user_id": ["u"] * len(rows),
            "item_id": [item for item, _, _ in rows],
            "timestamp": [base + time for _, time, _ in rows],
            "action": [event for _, _, event in rows],
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    manifest = run_prepare(
        [str(tmp_path / "log.parquet")],
        str(tmp_path / "dataset"),
        event_column="action",
        events=("click", "buy"),
        since=str(base + 11),
        until="2023-11-14T22:13:38Z",  # base + 18
        repeats="collapse",
        max_history=3,
    )
    expected = [("c", base + 15), ("d", base + 16), ("e", base + 17)]
    assert histories_by_user(tmp_path / "dataset") == {"u": expected}
    assert manifest.dropped == {
        "missing_values": 0,
        "bad_values": 0,
        "duplicates": 0,
        "rare_users_or_items": 0,
        "other_events": 1,
        "outside_time_window": 2,
        "repeats": 1,
        "over_max_history": 2,
    }


def test_many_small_files_and_large_ones_give_what_one_file_gives(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr("recgpt.data.preparation.ROWS_PER_PIECE", 50)
    monkeypatch.setattr("ray_jobs.prepare_pipeline.INTERACTIONS_PER_PART", 60)
    log = [*GOOD, *((f"v{number % 11}", f"i{number % 9}", 1_700_000_000 + number) for number in range(300))]
    pq.write_table(log_table(log), tmp_path / "one.parquet")
    whole = run_prepare([str(tmp_path / "one.parquet")], str(tmp_path / "a"))
    random.Random(0).shuffle(log)
    (tmp_path / "log").mkdir()
    for number in range(10):
        pq.write_table(log_table(log[number * 10 : number * 10 + 10]), tmp_path / "log" / f"{number}.parquet")
    pq.write_table(log_table(log[100:]), tmp_path / "log" / "large.parquet", row_group_size=30)
    pieces = run_prepare([str(tmp_path / "log")], str(tmp_path / "b"))
    assert len(whole.files) > 4
    assert pieces.files == whole.files
    assert pieces.vocabulary_fingerprint == whole.vocabulary_fingerprint
    assert HistoryDataset.open(str(tmp_path / "b")).vocabulary().counts.sum() == 500


def test_a_file_that_ends_the_process_that_reads_it_is_named(local_ray, tmp_path, monkeypatch):
    write_good(tmp_path / "log")

    def crash(*arguments):
        import os

        os.abort()
        yield

    monkeypatch.setattr("recgpt.data.preparation.divide", crash)
    with pytest.raises(UserError, match="good.csv: whoever reads it runs out of memory or crashes"):
        run_prepare([str(tmp_path / "log")], str(tmp_path / "dataset"))
    assert not (tmp_path / "dataset").exists()
