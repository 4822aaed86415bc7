"""An object store that fails for a while, or for good: a real HTTP proxy in front of an S3 server."""

import re
import subprocess
import sys
import time

import pytest

from benchmarks.faulty_store import MIXED_WAYS, FaultyStore
from recgpt import storage
from recgpt.errors import UserError
from recgpt.object_store import PatientS3FileSystem
from recgpt.schema import MANIFEST_FILE
from tests.race import create_at_once

# Starts as many writers at once as there are processes; prints who has created the file.
CREATE = """
import sys, time
from pathlib import Path
from recgpt import storage
url, go, writer = sys.argv[1:]
storage.exists(url)
print("ready", flush=True)
while not Path(go).exists():
    time.sleep(0.001)
try:
    storage.create_bytes(url, writer.encode())
    print(writer)
except FileExistsError:
    pass
"""


@pytest.fixture
def faulty(object_store, monkeypatch):
    """The store behind ``s3://`` within a test, healthy at first; failures are repeated at once."""
    monkeypatch.setattr("recgpt.object_store.FIRST_WAIT_SECONDS", 0.01)
    with FaultyStore(object_store) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        PatientS3FileSystem.clear_instance_cache()
        yield store
    PatientS3FileSystem.clear_instance_cache()


def finish(url, text, files=1):
    with storage.staged_output(url, overwrite=True) as staging:
        for number in range(files):
            storage.write_bytes(storage.join(staging, f"part-{number}"), text.encode())
        storage.write_json(storage.join(staging, MANIFEST_FILE), text)


def race(url, go, count):
    """Who of so many processes has created a file."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE, url, go, f"writer {number}"], stdout=subprocess.PIPE, text=True
        )
        for number in range(count)
    ]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * count
    go.touch()
    return [name for writer in writers if (name := writer.communicate()[0].strip())]


@pytest.mark.parametrize("way", MIXED_WAYS)
def test_every_operation_outlasts_a_failure(faulty, s3_bucket, way):
    url, data = storage.join(s3_bucket, "folder", "file"), bytes(range(256)) * 100

    def after_failures(operation, *arguments):
        failed = faulty.failed
        faulty.fail(way, requests=2)
        result = operation(*arguments)
        assert faulty.failed == failed + 2
        return result

    after_failures(storage.write_bytes, url, data)
    assert after_failures(storage.read_bytes, url) == data
    assert after_failures(storage.checksum, url) == storage.checksum_of(data)
    assert after_failures(storage.is_file, url)
    assert after_failures(storage.exists, url)
    assert after_failures(storage.list_names, storage.join(s3_bucket, "folder")) == ["file"]
    after_failures(storage.create_bytes, f"{url}-2", data)
    assert after_failures(storage.read_bytes, f"{url}-2") == data
    after_failures(finish, storage.join(s3_bucket, "folder"), "whole")
    assert storage.list_names(storage.join(s3_bucket, "folder")) == [MANIFEST_FILE, "part-0"]
    after_failures(storage.remove, storage.join(s3_bucket, "folder"))
    assert storage.is_empty(storage.join(s3_bucket, "folder"))


def test_a_fifth_of_all_requests_may_fail(faulty, s3_bucket):
    faulty.fail_share(0.2)
    urls = [storage.join(s3_bucket, "in", str(number)) for number in range(10)]
    for url in urls:
        storage.write_bytes(url, url.encode())
        storage.create_bytes(f"{url}-2", url.encode())
        with pytest.raises(FileExistsError):
            storage.create_bytes(f"{url}-2", b"other")
    assert storage.list_names(storage.join(s3_bucket, "in")) == sorted(
        [name for number in range(10) for name in (f"{number}", f"{number}-2")]
    )
    assert [storage.read_bytes(url) for url in urls] == [url.encode() for url in urls]
    out = storage.join(s3_bucket, "out")
    finish(out, "older", files=3)
    finish(out, "newer", files=2)
    assert storage.list_names(out) == [MANIFEST_FILE, "part-0", "part-1"]
    assert storage.read_bytes(storage.join(out, "part-1")) == b"newer"
    storage.remove(storage.join(s3_bucket, "in"))
    assert storage.list_names(s3_bucket) == ["out"]
    assert faulty.failed > 10


def test_many_requests_at_once_outlast_an_outage(faulty, s3_bucket):
    """Botocore shares its attempts among all requests, and would soon have none left."""
    files = {f"part-{number}": b"%d" % number for number in range(50)}
    filesystem, path = storage.filesystem_and_path(s3_bucket)
    filesystem.pipe({storage.join(path, name): data for name, data in files.items()})
    faulty.fail("503", "reset", seconds=2)
    read = filesystem.cat([storage.join(path, name) for name in files])
    assert {name.rpartition("/")[2]: data for name, data in read.items()} == files
    assert faulty.failed > 150


def test_a_store_that_keeps_silent_is_asked_again(faulty, s3_bucket, monkeypatch):
    storage.write_bytes(storage.join(s3_bucket, "file"), b"text")
    monkeypatch.setattr("recgpt.object_store.READ_SECONDS", 0.3)
    faulty.fail("stall", requests=2)
    assert storage.read_bytes(storage.join(s3_bucket, "file")) == b"text"


def test_a_large_object_is_read_although_its_parts_break_off(faulty, s3_bucket):
    data = bytes(range(250)) * 100
    storage.write_bytes(storage.join(s3_bucket, "file"), data)
    filesystem, path = storage.filesystem_and_path(storage.join(s3_bucket, "file"))
    for chunk in (7_000, 12_500, 25_000):
        faulty.fail("cut", share=0.4, method="GET")
        assert filesystem.cat_file(path, chunksize=chunk) == data
    assert faulty.failed > 0


def test_an_answer_that_breaks_off_every_time_is_an_error(faulty, s3_bucket, monkeypatch):
    storage.write_bytes(storage.join(s3_bucket, "file"), b"text")
    monkeypatch.setattr(PatientS3FileSystem, "retries", 2)
    faulty.fail("cut", method="GET")
    with pytest.raises(Exception, match="Response payload is not completed"):
        storage.read_bytes(storage.join(s3_bucket, "file"))


@pytest.mark.parametrize(
    ("way", "problem"),
    [
        ("503", "(503 SlowDown); run this again when the store is well"),
        ("500", "(500 InternalError); run this again when the store is well"),
        ("reset", "(Could not connect to the endpoint URL); check the network and AWS_ENDPOINT_URL"),
        ("stall", "(Read timeout on endpoint URL); check the network and AWS_ENDPOINT_URL"),
    ],
)
def test_a_lasting_outage_is_one_line_within_bounds(faulty, s3_bucket, monkeypatch, way, problem):
    monkeypatch.setenv("RECGPT_STORE_PATIENCE_SECONDS", "0.6")
    if way == "stall":  # the others are not to be mistaken for it on a busy machine
        monkeypatch.setattr("recgpt.object_store.READ_SECONDS", 0.2)
    url = storage.join(s3_bucket, "file")
    filesystem, path = storage.filesystem_and_path(url)
    faulty.fail(way)
    for operation, name in [
        (lambda: storage.write_bytes(url, b"text"), "PutObject"),
        (lambda: storage.create_bytes(url, b"text"), "PutObject"),
        (lambda: storage.remove(url), "HeadObject"),
        (lambda: storage.is_file(url), "HeadObject"),  # not merely False
        (lambda: storage.list_names(url), "HeadObject"),
        (lambda: filesystem.glob(f"{path}/*/x*"), "ListObjectsV2"),  # not merely nothing
    ]:
        began = time.monotonic()
        with pytest.raises(UserError) as caught:
            operation()
        assert time.monotonic() - began < 3
        line = str(caught.value)
        assert re.match(rf"{faulty.url}/{s3_bucket.removeprefix('s3://')}(/file)?: {name} failed ", line)
        if name != "HeadObject":  # to which no answer has a text
            assert line.endswith(problem)
        assert "planted" not in line.lower()
        assert "\n" not in line
    faulty.heal()
    assert storage.is_empty(s3_bucket)


def test_without_patience_the_first_failure_is_the_last(faulty, s3_bucket, monkeypatch):
    monkeypatch.setenv("RECGPT_STORE_PATIENCE_SECONDS", "0")
    faulty.fail("503", requests=1)
    with pytest.raises(UserError, match="PutObject failed once "):
        storage.write_bytes(storage.join(s3_bucket, "file"), b"text")
    assert (faulty.failed, storage.is_empty(s3_bucket)) == (1, True)
    monkeypatch.setenv("RECGPT_STORE_PATIENCE_SECONDS", "long")
    faulty.fail("503", requests=1)
    with pytest.raises(UserError, match="RECGPT_STORE_PATIENCE_SECONDS=long: is no number of seconds"):
        storage.write_bytes(storage.join(s3_bucket, "file"), b"text")


def test_credentials_in_the_address_of_a_store_are_not_shown(faulty, s3_bucket, monkeypatch):
    monkeypatch.setenv("RECGPT_STORE_PATIENCE_SECONDS", "0")
    monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.url.replace("//", "//name:word@"))
    PatientS3FileSystem.clear_instance_cache()
    faulty.fail("503")
    with pytest.raises(UserError) as caught:
        storage.write_bytes(storage.join(s3_bucket, "file"), b"text")
    assert str(caught.value).startswith(f"{faulty.url}/")
    assert "word" not in str(caught.value)


def test_what_does_not_pass_is_not_repeated(faulty, s3_bucket):
    asked = faulty.requests
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        storage.write_bytes(storage.join(f"{s3_bucket}-2", "file"), b"")
    assert faulty.requests == asked + 1


@pytest.mark.parametrize("way", MIXED_WAYS)
def test_a_creation_whose_answer_was_lost_is_known_again(faulty, s3_bucket, way):
    url = storage.join(s3_bucket, "file")
    faulty.fail(way, requests=1, method="PUT")
    storage.create_bytes(url, b"mine")
    assert storage.read_bytes(url) == b"mine"
    faulty.fail(way, requests=1, method="PUT")
    with pytest.raises(FileExistsError):
        storage.create_bytes(url, b"other")
    assert storage.read_bytes(url) == b"mine"


@pytest.mark.parametrize("failing", [False, True])
def test_of_many_threads_one_creates_an_object(faulty, s3_bucket, failing):
    if failing:
        faulty.fail_share(0.3)
    for attempt in range(5):
        url = storage.join(s3_bucket, str(attempt))
        (winner,) = create_at_once(url, 6)
        assert storage.read_bytes(url) == winner


@pytest.mark.parametrize("place", ["local", "s3"])
def test_of_several_processes_one_creates_a_file(faulty, s3_bucket, tmp_path, place):
    folder = storage.join(str(tmp_path) if place == "local" else s3_bucket, "folder")
    (winner,) = race(storage.join(folder, "file"), tmp_path / "go", count=3)
    assert storage.read_bytes(storage.join(folder, "file")) == winner.encode()
    assert storage.list_names(folder) == ["file"]
