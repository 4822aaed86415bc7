"""How one file is written: whole or not at all, once, durably, and without a trace of what failed."""

import errno
import os
import uuid
from pathlib import Path

import pytest

from recgpt import storage
from recgpt.errors import UserError
from tests.race import create_at_once


@pytest.fixture
def events(monkeypatch):
    """What is done to the disk, in its order: ("sync" or "rename", name of the file or folder)."""
    events = []
    sync, replace, link = os.fsync, Path.replace, os.link

    def record_sync(handle):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        sync(handle)

    def record_replace(path, target):
        events.append(("name", Path(target).name))
        return replace(path, target)

    def record_link(path, target):
        events.append(("name", Path(target).name))
        link(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_replace)
    monkeypatch.setattr(os, "link", record_link)
    return events


@pytest.mark.parametrize("operation", ["write_bytes", "write_json", "create_bytes"])
def test_a_durable_file_is_on_the_disk_before_its_name_and_its_folder_after_it(tmp_path, events, operation):
    url = str(tmp_path / "old" / "new" / "newer" / "file")
    (tmp_path / "old").mkdir()
    if operation == "create_bytes":
        storage.create_bytes(url, b"1")
    else:
        getattr(storage, operation)(url, b"1" if operation == "write_bytes" else 1, durable=True)
    (first, temporary), *others = events
    assert first == "sync"
    assert temporary.startswith(".file.")
    assert others[0] == ("name", "file")
    assert sorted(others[1:]) == [("sync", "new"), ("sync", "newer"), ("sync", "old")]
    assert storage.read_json(url) == 1


def test_a_file_is_not_synced_unless_asked_for(tmp_path, events):
    storage.write_bytes(str(tmp_path / "file"), b"text")
    assert events == [("name", "file")]


def test_a_file_is_created_once(tmp_path):
    for url in (str(tmp_path / "folder" / "file"), f"memory://{uuid.uuid4().hex}/folder/file"):
        storage.create_bytes(url, b"first")
        storage.create_bytes(url, b"first")  # as if the answer had been lost
        with pytest.raises(FileExistsError):
            storage.create_bytes(url, b"second")
        assert storage.read_bytes(url) == b"first"
        assert storage.list_names(url.removesuffix("/file")) == ["file"]


def test_of_many_threads_one_creates_a_file(tmp_path):
    for attempt in range(30):
        url = str(tmp_path / str(attempt))
        (winner,) = create_at_once(url, 8)
        assert storage.read_bytes(url) == winner


def test_a_file_system_without_hard_links_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match="no hard links; choose another folder"):
        storage.create_bytes(str(tmp_path / "file"), b"")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    path = tmp_path / "file"
    with pytest.raises(OSError, match="Input/output error") as caught:
        storage.write_bytes(str(path), b"text", durable=True)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_lost_writer_left_is_hidden_and_goes_into_no_output(tmp_path, monkeypatch):
    url = str(tmp_path / "out")
    kept = [".b.partial", ".b.0123456.partial", "b.01234567.partial"]
    with storage.staged_output(url, overwrite=False) as staging, monkeypatch.context() as patch:
        storage.write_bytes(storage.join(staging, "part", "a"), b"whole")
        for name in kept:
            storage.write_bytes(storage.join(staging, name), b"")
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr(Path, "replace", lambda *_: None)  # as far as a killed process comes
        storage.write_bytes(storage.join(staging, "part", "b"), b"half")
        (hidden,) = set(storage.list_names(storage.join(staging, "part"))) - {"a"}
        assert hidden.startswith(".b.")
    left = {str(file.relative_to(tmp_path / "out")) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {"part/a", *kept}
