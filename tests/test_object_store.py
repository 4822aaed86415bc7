"""Files and outputs in a real object store: an S3 server over HTTP."""

import subprocess
import sys

import pytest

from recgpt import storage
from recgpt.errors import UserError
from recgpt.schema import MANIFEST_FILE

MULTIPART_BYTES = 101 * 2**20  # s3fs puts less than twice 50 MiB in one request


def finish(url, text, overwrite=False):
    with storage.staged_output(url, overwrite) as staging:
        storage.write_bytes(storage.join(staging, "part", "data"), text.encode())
        storage.write_json(storage.join(staging, MANIFEST_FILE), text)


def objects(url):
    """What lies below a URL: bytes by name."""
    filesystem, path = storage.filesystem_and_path(url)
    return {name[len(path) + 1 :]: filesystem.cat_file(name) for name in filesystem.find(path)}


def finished(text):
    return {"part/data": text.encode(), MANIFEST_FILE: f'"{text}"\n'.encode()}


@pytest.mark.parametrize("data", [b"", b"text", bytes(range(256)) * 25_000], ids=["empty", "small", "6 MB"])
def test_what_is_written_is_read_again(s3_bucket, data):
    url = storage.join(s3_bucket, "deep", "file")
    storage.write_bytes(url, b"older")
    storage.write_bytes(url, data)
    assert storage.read_bytes(url) == data
    assert storage.checksum(url) == storage.checksum_of(data)
    assert storage.is_file(url)
    assert storage.list_names(storage.join(s3_bucket, "deep")) == ["file"]


def test_a_large_file_goes_in_several_parts(s3_bucket):
    url = storage.join(s3_bucket, "large")
    storage.write_bytes(url, bytes(MULTIPART_BYTES))
    filesystem, path = storage.filesystem_and_path(url)
    info = filesystem.info(path)
    assert info["size"] == MULTIPART_BYTES
    assert info["ETag"].strip('"').endswith("-3")  # so many parts
    assert storage.checksum(url) == storage.checksum_of(bytes(MULTIPART_BYTES))


def test_folders_are_the_beginnings_of_names(s3_bucket):
    folder = storage.join(s3_bucket, "a")
    assert storage.is_empty(folder)
    storage.remove(folder)
    for name in ("a/file", "a/b/file", "ab/file"):
        storage.write_bytes(storage.join(s3_bucket, name), b"")
    assert storage.exists(folder)
    assert not storage.is_file(folder)
    assert storage.list_names(folder) == ["b", "file"]
    storage.remove(folder)
    assert not storage.exists(folder)
    assert storage.list_names(folder) == []
    assert set(objects(s3_bucket)) == {"ab/file"}


def test_an_object_that_stands_for_a_folder_is_no_file_in_it(s3_bucket):
    """Consoles and other programs make such objects when someone makes a folder with them."""
    filesystem, path = storage.filesystem_and_path(storage.join(s3_bucket, "out"))
    filesystem.call_s3("put_object", Bucket=path.split("/")[0], Key="out/", Body=b"")
    url = storage.join(s3_bucket, "out")
    assert storage.is_empty(url)
    assert storage.list_names(url) == []
    finish(url, "whole")
    assert objects(url) == finished("whole")


def test_what_another_process_writes_is_seen_at_once(s3_bucket):
    folder = storage.join(s3_bucket, "folder")
    url = storage.join(folder, "file")
    storage.write_bytes(url, b"older")
    assert storage.list_names(folder) == ["file"]
    script = f"""
from recgpt import storage
storage.write_bytes({url!r}, b"newer and longer")
storage.write_bytes({url!r} + "-2", b"")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert storage.read_bytes(url) == b"newer and longer"
    assert storage.checksum(url) == storage.checksum_of(b"newer and longer")
    assert storage.list_names(folder) == ["file", "file-2"]
    storage.remove(folder)
    assert storage.is_empty(folder)


def test_an_output_replaces_the_older_one_when_it_is_whole(s3_bucket):
    url = storage.join(s3_bucket, "out")
    finish(url, "older")
    with pytest.raises(UserError, match="already holds something"):
        finish(url, "newer")
    with storage.staged_output(url, overwrite=True) as staging:
        storage.write_bytes(storage.join(staging, "other"), b"newer")
        assert objects(url) == finished("older")
        storage.write_json(storage.join(staging, MANIFEST_FILE), "newer")
    assert objects(s3_bucket) == {"out/other": b"newer", "out/manifest.json": b'"newer"\n'}


def test_a_block_that_fails_keeps_the_older_output_and_the_next_clears_up(s3_bucket):
    url = storage.join(s3_bucket, "out")
    finish(url, "older")
    with pytest.raises(RuntimeError, match="half way"), storage.staged_output(url, overwrite=True) as staging:  # noqa: PT012
        storage.write_bytes(storage.join(staging, "left-over"), b"half")
        raise RuntimeError("half way")
    assert objects(url) == finished("older")
    finish(url, "newer", overwrite=True)
    assert set(objects(s3_bucket)) == {"out/part/data", "out/manifest.json"}


@pytest.mark.parametrize("failing_copy", [1, 2])
def test_a_half_copied_output_has_no_manifest(s3_bucket, monkeypatch, failing_copy):
    from s3fs import S3FileSystem

    url = storage.join(s3_bucket, "out")
    finish(url, "older")
    copied = []
    copy = S3FileSystem._cp_file

    async def copy_some(filesystem, source, target, **options):
        copied.append(target.rpartition("/")[2])
        if len(copied) == failing_copy:
            raise OSError("the connection is gone")
        await copy(filesystem, source, target, **options)

    monkeypatch.setattr(S3FileSystem, "_cp_file", copy_some)
    with pytest.raises(OSError, match="gone"):
        finish(url, "newer", overwrite=True)
    assert copied == ["data", MANIFEST_FILE][:failing_copy]
    assert list(objects(url)) == ["part/data"][: failing_copy - 1]


def test_a_half_removed_output_has_no_manifest(s3_bucket, monkeypatch):
    from s3fs import S3FileSystem

    url = storage.join(s3_bucket, "out")
    finish(url, "older")
    delete = S3FileSystem._bulk_delete

    async def delete_one_file(filesystem, paths, **options):
        monkeypatch.setattr(S3FileSystem, "_bulk_delete", fail)
        return await delete(filesystem, paths[-1:], **options)

    async def fail(*_arguments, **_options):
        raise OSError("the connection is gone")

    monkeypatch.setattr(S3FileSystem, "_bulk_delete", delete_one_file)
    with pytest.raises(OSError, match="gone"):
        storage.remove(url)
    assert list(objects(url)) == ["part/data"]


def test_a_bucket_is_neither_made_nor_removed(s3_bucket):
    missing = f"{s3_bucket}-2"
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        storage.write_bytes(storage.join(missing, "file"), b"")
    with (
        pytest.raises(FileNotFoundError, match="bucket does not exist"),
        storage.staged_output(storage.join(missing, "out"), overwrite=False),
    ):
        pytest.fail("the work begins although its output has no place")
    assert not storage.exists(missing)
    storage.write_bytes(storage.join(s3_bucket, "file"), b"")
    with pytest.raises(UserError, match="is a whole bucket"):
        storage.remove(s3_bucket)
    assert set(objects(s3_bucket)) == {"file"}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://name:word@bucket/folder", "s3://bucket/folder"),
        ("s3:///folder", "s3:///folder"),
        ("s3://my bucket/folder", "s3://my bucket/folder"),
    ],
)
def test_a_url_without_a_plain_bucket_is_refused(url, shown):
    with pytest.raises(UserError, match="credentials come from the environment") as caught:
        storage.exists(url)
    assert str(caught.value).startswith(f"{shown}: write s3://BUCKET/FOLDER")


@pytest.mark.parametrize("url", ["s3://bucket", "s3a://b-1.x_y/f", "s3://arn:aws:s3:eu:1:accesspoint/name/f"])
def test_urls_with_a_bucket(url):
    assert storage.filesystem_and_path(url)[0].protocol == ("s3", "s3a")


def test_both_schemes_name_the_same_store(s3_bucket):
    storage.write_bytes(storage.join(s3_bucket, "file"), b"text")
    other = s3_bucket.replace("s3://", "s3a://")
    assert storage.read_bytes(storage.join(other, "file")) == b"text"
    with pytest.raises(UserError, match="overlaps"):
        storage.check_output_apart(storage.join(other, "data", "out"), storage.join(s3_bucket, "data"))
