"""Files by path or URL, and outputs that appear whole or not at all."""

import json
import uuid
from pathlib import Path

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


@pytest.mark.parametrize("name", ["file", "folder/file", "a b/.c..d", "é", "date=2026-01-01/part-0.parquet"])
def test_a_name_inside_a_folder_is_joined(name):
    assert storage.join_inside("s3://bucket/data/", name, "manifest.json") == f"s3://bucket/data/{name}"


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "..",
        "../file",
        "folder/../../file",
        "folder/..",
        ".",
        "./file",
        "",
        "folder/",
        "folder//file",
        "..\\file",
        "C:\\file",
        "s3://bucket/file",
        "file:///etc/passwd",
        "zip://file::/archive",
        "file\x00",
        "file\n",
        None,
        7,
        ["file"],
    ],
)
def test_a_name_that_leads_out_of_its_folder_is_refused(name):
    with pytest.raises(
        UserError, match=r"^data/manifest.json: names .* which is no file inside data; "
    ) as caught:
        storage.join_inside("data", name, "data/manifest.json")
    assert "\n" not in str(caught.value)


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


@pytest.fixture
def bucket():
    """The URL of an object store that is kept in memory."""
    return f"memory://{uuid.uuid4().hex}"


def objects(url):
    filesystem, path = storage.filesystem_and_path(url)
    return {name[len(path) + 1 :]: filesystem.cat_file(name).decode() for name in filesystem.find(path)}


def test_an_object_store_keeps_the_older_output_whole_until_the_block_has_succeeded(bucket):
    url = storage.join(bucket, "out")
    finish(url, "older")
    older = objects(url)
    assert set(older) == {"part/data", "manifest.json"}
    with pytest.raises(RuntimeError, match="half way"), storage.staged_output(url, overwrite=True) as staging:  # noqa: PT012
        storage.write_bytes(storage.join(staging, "left-over"), b"half")
        raise RuntimeError("half way")
    assert objects(url) == older

    finish(url, "newest", overwrite=True)
    assert objects(bucket) == {
        "out/part/data": "newest",
        "out/manifest.json": '{\n  "text": "newest"\n}\n',
    }


@pytest.mark.parametrize("failing_copy", [1, 2, 3, 4])
def test_an_object_store_never_shows_a_manifest_beside_anything_but_its_whole_output(
    bucket, monkeypatch, failing_copy
):
    """The copy into place is cut off after each object: a marker is there only if all before it is."""
    from fsspec.implementations.memory import MemoryFileSystem

    url = storage.join(bucket, "out")
    finish(url, "older")
    copied = []
    copy = MemoryFileSystem.cp_file

    def copy_some(filesystem, source, target, **options):
        copied.append(target.rpartition("/")[2])
        if len(copied) == failing_copy:
            raise OSError("the connection is gone")
        copy(filesystem, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "cp_file", copy_some)
    with pytest.raises(OSError, match="gone"), storage.staged_output(url, overwrite=True) as staging:  # noqa: PT012
        for name in ("_SUCCESS", "manifest.json", "a", "z"):  # in another order than they have to appear
            storage.write_bytes(storage.join(staging, name), b"newer")
    assert copied == ["a", "z", "manifest.json", "_SUCCESS"][:failing_copy]
    assert set(objects(url)) == set(copied[:-1])


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?"])
def test_an_output_in_an_object_store_is_no_pattern(bucket, name):
    """To remove or copy it would be to remove or copy the objects of other outputs that it matches."""
    storage.write_bytes(storage.join(bucket, "run1", "file"), b"")
    for operation in (storage.remove, lambda url: finish(url, "text", overwrite=True)):
        with pytest.raises(UserError, match="cannot have"):
            operation(storage.join(bucket, name))
    assert objects(bucket) == {"run1/file": ""}


def test_a_whole_bucket_is_no_output():
    with pytest.raises(UserError, match="give a folder inside it"), storage.staged_output("memory://b", True):
        pass


@pytest.mark.parametrize("renames", [0, 1])
def test_a_folder_survives_a_kill_between_the_two_renames(tmp_path, monkeypatch, renames):
    url = str(tmp_path / "out")
    finish(url, "older")
    done = []
    rename = Path.rename

    def rename_some(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_some)
    with pytest.raises(KeyboardInterrupt):
        finish(url, "newer", overwrite=True)
    assert (tmp_path / "out").exists() == (renames == 0)
    monkeypatch.undo()

    storage.recover_folder(url)
    assert contents(tmp_path / "out")["part/data"] == "older"
    finish(url, "newest", overwrite=True)
    assert contents(tmp_path) == {
        "out/part/data": "newest",
        "out/manifest.json": '{\n  "text": "newest"\n}\n',
    }


def test_a_staged_output_recovers_what_a_kill_left_behind(tmp_path):
    finish(str(tmp_path / "out"), "older")
    (tmp_path / "out").rename(tmp_path / ".out.previous")
    with pytest.raises(UserError, match="already holds something"):
        finish(str(tmp_path / "out"), "newer")
    assert contents(tmp_path)["out/part/data"] == "older"


@pytest.mark.parametrize(
    ("output", "source"),
    [
        ("data", "data"),
        ("data", "data/log.csv"),
        ("data/sub/out", "data"),
        ("data/../data/", "data"),
        ("s3://b/data", "s3://b/data/"),
        ("s3://b/data/out/", "s3://b/data"),
        ("s3://b/data", "s3://b/data/run/model"),
    ],
)
def test_an_output_that_overlaps_an_input_is_refused(tmp_path, monkeypatch, output, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--output {output}: overlaps {source}, which is read from"):
        storage.check_output_apart(output, "elsewhere", source)


@pytest.mark.parametrize(
    ("output", "source"),
    [
        ("data", "data-2"),
        ("data-2", "data"),
        ("a/out", "a/in"),
        ("s3://b/data", "s3://b/data2"),
        ("s3://b/data", "/b/data"),
    ],
)
def test_an_output_beside_its_inputs_is_fine(output, source):
    storage.check_output_apart(output, source)


def test_a_symbolic_link_does_not_hide_an_overlap(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    with pytest.raises(UserError, match="overlaps"):
        storage.check_output_apart(str(tmp_path / "link" / "out"), str(tmp_path / "data"))


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert storage.is_file(str(tmp_path / "file"))
    assert not storage.is_file(str(tmp_path))
    assert not storage.is_file(str(tmp_path / "missing"))


@pytest.mark.parametrize("url", ["s3://bucket/folder", "s3a://bucket/folder"])
def test_listings_of_object_stores_are_not_remembered(url):
    filesystem, path = storage.filesystem_and_path(url)
    filesystem.dircache["bucket/folder"] = []
    assert "bucket/folder" not in filesystem.dircache
    assert path == "bucket/folder"


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
