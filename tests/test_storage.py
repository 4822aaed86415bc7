"""Files by path or URL, and outputs that appear whole or not at all."""

import json
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt import storage
from recgpt.errors import UserError
from recgpt.schema import MANIFEST_FILE


def contents(folder):
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def finish(url, text, overwrite=False):
    with storage.staged_output(url, overwrite) as staging:
        storage.write_bytes(storage.join(staging, "part", "data"), text.encode())
        storage.write_json(storage.join(staging, MANIFEST_FILE), {"text": text})


@pytest.mark.parametrize(
    ("url", "parts", "joined"),
    [
        ("s3://bucket/a/", ["b", "c"], "s3://bucket/a/b/c"),
        ("folder", ["file"], "folder/file"),
        ("/folder/", [], "/folder"),
    ],
)
def test_join(url, parts, joined):
    assert storage.join(url, *parts) == joined


def test_absolute_makes_local_paths_whole_and_leaves_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("data/set") == str(tmp_path / "data" / "set")
    assert storage.absolute("s3://bucket/set") == "s3://bucket/set"


def test_a_finished_output_holds_exactly_what_was_written(tmp_path):
    finish(str(tmp_path / "out"), "first")
    assert contents(tmp_path) == {"out/part/data": "first", "out/manifest.json": '{\n  "text": "first"\n}\n'}


def test_an_output_that_holds_something_is_refused_and_kept(tmp_path):
    finish(str(tmp_path / "out"), "first")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="--overwrite"):
        finish(str(tmp_path / "out"), "second")
    assert contents(tmp_path) == before


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "out").mkdir()
    finish(str(tmp_path / "out"), "first")
    assert (tmp_path / "out" / "part" / "data").read_text() == "first"


def test_overwrite_replaces_the_whole_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "left-over").write_text("old")
    finish(str(tmp_path / "out"), "second", overwrite=True)
    assert set(contents(tmp_path)) == {"out/part/data", "out/manifest.json"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_block_that_fails_leaves_no_output_and_the_next_one_starts_clean(tmp_path, overwrite):
    url = str(tmp_path / "out")
    with pytest.raises(RuntimeError, match="half way"), storage.staged_output(url, overwrite) as staging:  # noqa: PT012
        storage.write_bytes(storage.join(staging, "half"), b"half")
        raise RuntimeError("half way")
    assert storage.is_empty(url)

    finish(url, "whole")
    assert set(contents(tmp_path)) == {"out/part/data", "out/manifest.json"}


def test_a_block_that_fails_keeps_the_older_output_whole(tmp_path):
    url = str(tmp_path / "out")
    finish(url, "older")
    older = contents(tmp_path / "out")
    with pytest.raises(RuntimeError, match="half way"), storage.staged_output(url, overwrite=True) as staging:  # noqa: PT012
        storage.write_bytes(storage.join(staging, "part", "data"), b"newer")
        assert contents(tmp_path / "out") == older
        raise RuntimeError("half way")
    assert contents(tmp_path / "out") == older


def test_an_object_store_never_shows_a_manifest_of_half_an_output():
    url = f"memory://{uuid.uuid4().hex}/out"
    finish(url, "older")
    with pytest.raises(RuntimeError, match="half way"), storage.staged_output(url, overwrite=True) as staging:  # noqa: PT012
        assert not storage.exists(storage.join(url, MANIFEST_FILE))
        storage.write_bytes(storage.join(staging, "part", "data"), b"newer")
        raise RuntimeError("half way")
    assert not storage.exists(storage.join(url, MANIFEST_FILE))

    finish(url, "newest", overwrite=True)
    assert storage.read_json(storage.join(url, MANIFEST_FILE)) == {"text": "newest"}
    assert storage.read_bytes(storage.join(url, "part", "data")) == b"newest"


def test_reading_json_that_is_missing_or_damaged_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        storage.read_json(str(tmp_path / "missing.json"))
    (tmp_path / "damaged.json").write_text('{"a": ')
    with pytest.raises(UserError, match="not valid JSON"):
        storage.read_json(str(tmp_path / "damaged.json"))


def test_list_names_and_remove(tmp_path):
    url = str(tmp_path / "folder")
    assert storage.list_names(url) == []
    storage.write_bytes(storage.join(url, "b"), b"")
    storage.write_bytes(storage.join(url, "a", "inner"), b"")
    assert storage.list_names(url) == ["a", "b"]
    storage.remove(url)
    storage.remove(url)
    assert storage.is_empty(url)


def test_checksum_is_the_sha256_of_the_file(tmp_path):
    (tmp_path / "abc").write_text("abc")
    assert (
        storage.checksum(str(tmp_path / "abc"))
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


@given(data=st.binary(max_size=1000))
def test_bytes_survive_and_leave_no_partial_file(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    url = storage.join(str(folder), "deep", "file")
    storage.write_bytes(url, b"an older and longer text")
    storage.write_bytes(url, data)
    assert storage.read_bytes(url) == data
    assert storage.list_names(storage.join(str(folder), "deep")) == ["file"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(value=JSON_VALUES)
def test_json_survives(tmp_path_factory, value):
    url = storage.join(str(tmp_path_factory.mktemp("json")), "value.json")
    storage.write_json(url, value)
    assert storage.read_json(url) == json.loads(json.dumps(value)) == value
