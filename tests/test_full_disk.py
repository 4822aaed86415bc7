"""What is left when a disk is full, which a tiny file system of the test's own really is."""

import os
import random
import sys

import pytest

from recgpt import storage
from tests.conftest import REPOSITORY
from tests.full_disk import run_on_small_disk
from tests.ray_jobs.logs import csv_of

# The command line with a write in the place of a verb.
WRITE = """
import sys
from ray_jobs import runtime
from recgpt import storage
url, name = sys.argv[1:]
def write(_):
    storage.write_bytes(url, b"older")
    getattr(storage, name)(f"{url}-2" if name == "create_bytes" else url, bytes(100_000))
runtime.invoke = write
runtime.run_command(None)
"""


def start(folder, size, *call):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    folder.mkdir()
    return run_on_small_disk(folder, size, [sys.executable, *call], env=environment)


@pytest.mark.parametrize("operation", ["write_bytes", "create_bytes"])
def test_a_file_that_does_not_fit_leaves_what_was_there(tmp_path, operation):
    url = str(tmp_path / "disk" / "file")
    done, files = start(tmp_path / "disk", "64k", "-c", WRITE, url, operation)
    written = f"{url}-2" if operation == "create_bytes" else url
    message = f"{written}: no space left on the disk; free some or write elsewhere"
    assert done.stderr.splitlines() == [f"recgpt: error: {message}"]
    assert done.returncode == 2
    assert files == {"file"}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("size", ["48k", "160k"])
def test_prepare_to_a_full_disk_is_one_line_and_leaves_no_dataset(tmp_path, size):
    """With less space the first file does not fit, with more a later one."""
    generator = random.Random(0)
    rows = [(generator.randrange(3000), generator.randrange(4000), row) for row in range(60_000)]
    storage.write_bytes(str(tmp_path / "log.csv"), csv_of(rows).encode())
    output = tmp_path / "disk" / "dataset"
    call = ["-m", "ray_jobs.prepare", "--input", str(tmp_path / "log.csv"), "--output", str(output)]
    done, files = start(tmp_path / "disk", size, *call)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("recgpt: error:")]
    assert line.startswith(f"recgpt: error: {tmp_path / 'disk' / '.dataset.partial'}/")
    assert line.endswith(": no space left on the disk; free some or write elsewhere")
    assert "Traceback" not in done.stderr
    whole = ("dataset/", ".dataset.partial/manifest.json")
    assert not [name for name in files if name.startswith(whole) or name.endswith(".partial")]
