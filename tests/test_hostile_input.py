"""Broken and hostile input: one line that says what is wrong, and no code that comes with it runs."""

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fuzzing import log_readers
from benchmarks.fuzzing.hostile import code
from benchmarks.fuzzing.readers import Place
from recgpt import storage
from recgpt.config import TrainSettings
from recgpt.errors import UserError, presentable
from recgpt.retrieval.id_files import read_ids
from recgpt.retrieval.one_user import read_titles
from recgpt.settings_reading import load_train_settings
from recgpt.training.engine import read_deepspeed_config
from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_thousands_of_bad_inputs(tmp_path):
    call = [sys.executable, "-m", "benchmarks.fuzz", "--inputs", "1700", "--seed", "0", "--processes", "2"]
    call += ["--json", str(tmp_path / "fuzz.json")]
    result = subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    figures = json.loads((tmp_path / "fuzz.json").read_text())
    assert (figures["all"]["inputs"], figures["found"]) == (1700, [])
    # A receipt that is none is passed over without a word: its part is made again.
    assert all(row["right"] < row["inputs"] / 2 for row in figures["readers"])


# Messages


@given(st.text() | st.text("\n\r\x00\u202e\ud800 a"), st.integers(1, 3000))
def test_messages_are_one_printable_line_of_bounded_length(text, times):
    message = str(UserError(text * times))
    assert message.isprintable()
    assert len(message) < 2100


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/x: no", "s3://bucket/x: no"),
        ("s3://key:sec/r+t=@bucket/x", "s3://bucket/x"),
        ("s3://secret@bucket", "s3://bucket"),
        ("a http://127.0.0.1:9000/a and s3://bucket/a@b", "a http://127.0.0.1:9000/a and s3://bucket/a@b"),
        ("s3://arn:aws:s3:eu:1:accesspoint/a/b@c", "s3://arn:aws:s3:eu:1:accesspoint/a/b@c"),
    ],
)
def test_credentials_in_urls_are_left_out(text, shown):
    assert presentable(text) == shown


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 300, "s3://k:s@bucket/x", "https://user:pw@host/x"])
def test_paths_that_can_be_none_are_refused(path):
    for read in (storage.exists, storage.read_bytes, storage.read_json):
        with pytest.raises(UserError):
            read(path)


@given(st.text() | st.lists(st.sampled_from(["..", ".", "", "a", "~", "b.parquet", "%2e%2e"])).map("/".join))
def test_a_name_from_a_file_is_refused_or_stays_in_the_folder(name):
    try:
        place = storage.join_inside("/data/folder", name, "manifest")
    except UserError:
        return
    assert os.path.normpath(place).startswith("/data/folder/")


# Settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 2026-13-45", "not valid YAML: it holds a value that is none"),
        ("seed: !!int x", "not valid YAML: it holds a value that is none"),
        ("seed: " + "9" * 5000, "not valid YAML: it holds a value that is none"),
        ("a: &a [x, x]\nb: *a", "write the value itself in place of an alias"),
        ("[" * 5000, "lie too deep in each other"),
        ("seed: !!python/object/apply:os.mkdir [marker]", "could not determine a constructor"),
        ("pretrain: {optimizer: {learning_rate: .inf}}", "learning_rate: Input should be a finite number"),
        ("seed: " + "[" * 300 + "]" * 300, "seed: Input should be a valid integer"),
        ("#" * (1 << 20) + "#", "too large for a file of settings"),
    ],
)
def test_settings_that_are_none(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_train_settings("run.yaml")
    assert not Path("marker").exists()
    if text.startswith("seed: "):
        with pytest.raises(UserError):
            load_train_settings(None, [text.replace(": ", "=", 1)])


@given(st.text(), st.sampled_from(["seed", "model", "model.width", "recall.quotas", "deepspeed", ""]))
def test_any_override_is_a_setting_or_a_user_error(value, key):
    try:
        settings = load_train_settings(None, [f"{key}={value}"])
    except UserError:
        return
    assert isinstance(settings, TrainSettings)


@pytest.mark.parametrize(
    "text", ["[]", "1", '{"zero_optimization": 1}', '{"zero_optimization": [2]}', "[" * 10**5]
)
def test_deepspeed_files_that_are_none(tmp_path, text):
    (tmp_path / "zero.json").write_text(text)
    with pytest.raises(UserError, match="zero.json"):
        read_deepspeed_config(str(tmp_path / "zero.json"))


# Logs


def refusals(tmp_path, name, data, format="auto"):
    """Why the file is unreadable, or the reasons of its bad rows, as `prepare` finds them."""
    place = Place(tmp_path)
    place.folder.mkdir()
    (place.folder / name).write_bytes(data)
    value = log_readers.read_log(place, format)
    return value["bad files"] + value["bad rows"], value["rows"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"u" + b" i" * (40 << 20), "more than 100 times as long as its gzip file"),
        (b"user_id,item_id,timestamp\n" + b"a\n" * (1 << 19), "cannot be read as csv: CSV parse error"),
        (b'user_id,item_id,timestamp\n"' + b"x" * (70 << 20), "more than 100 times as long"),
    ],
)
def test_small_gzip_files_that_unfold_to_very_much(tmp_path, text, reason):
    (found,), rows = refusals(tmp_path, "log.csv.gz", gzip.compress(text))
    assert reason in found
    assert rows == []


def test_a_first_row_longer_than_the_sample_is_read(tmp_path):
    row = f"{'u' * 100_000},i,1700000000"
    found, rows = refusals(tmp_path, "log.csv", f"user_id,item_id,timestamp\n{row}\n".encode())
    assert (found, len(rows)) == ([], 1)


def test_numbers_that_only_arrow_takes_for_times_are_bad_values(tmp_path):
    good = [("u", item, 1_700_000_000) for item in "abcd"]
    lines = [f"{user},{item},{time}" for user, item, time in good]
    text = "\n".join(["user_id,item_id,timestamp", *lines, "u,b,0x10", "u,c,0X10"])
    found, rows = refusals(tmp_path, "log.csv", text.encode())
    assert found == ["timestamp cannot be read as int64"] * 2
    assert rows == good


def test_text_in_parquet_that_is_not_utf8_is_a_bad_value(tmp_path):
    bad = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"u\xff\xfe")
    )
    sink = io.BytesIO()
    pq.write_table(pa.table({"user_id": bad, "item_id": ["a", "b"], "timestamp": [1, 2]}), sink)
    found, rows = refusals(tmp_path, "log.parquet", sink.getvalue())
    assert found == ["user_id cannot be read as string"]
    assert rows == [("u", "a", 1)]


def test_a_long_header_takes_no_long_time_and_gives_no_long_reason(tmp_path):
    (found,), _ = refusals(tmp_path, "log.inter", b'{"a":' * 100_000, format="recbole")
    assert len(found) < 2100


# Lists of ids, titles


@pytest.mark.parametrize("line", ["0x10", "007", "+7", "1_0", "7.0", "9" * 20])
def test_integers_in_another_form_are_no_ids(tmp_path, line):
    (tmp_path / "users.txt").write_text(f"7\n{line}\n")
    with pytest.raises(UserError, match="the dataset's user ids are int64"):
        read_ids(str(tmp_path / "users.txt"), "user_id", pa.int64(), "--users")


def test_a_title_that_is_missing_is_empty(tmp_path):
    pq.write_table(pa.table({"item_id": ["a", "b"], "title": ["A", None]}), tmp_path / "items.parquet")
    ids = pa.array(["a", "b"])
    assert read_titles(str(tmp_path / "items.parquet"), "item_id", "title", ids) == {"a": "A", "b": ""}


def test_no_file_that_would_run_code_does(tmp_path):
    """In place of each file that a reader opens; see also the bad inputs above, which hold many of these."""
    marker = tmp_path / "marker"
    for number, data in enumerate(code(str(marker)).values()):
        path = tmp_path / f"{number}.file"
        path.write_bytes(data)
        for read in (
            lambda url: load_train_settings(url),
            lambda url: read_deepspeed_config(url),
            lambda url: read_ids(url, "user_id", pa.string(), "--users"),
            lambda url: read_titles(url, "item_id", "title", pa.array(["a"])),
            lambda url: storage.read_json(url),
        ):
            with contextlib.suppress(UserError):  # some of them are lists of ids as good as others
                read(str(path))
    assert not marker.exists()
