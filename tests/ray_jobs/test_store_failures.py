"""Verbs whose object store fails for a while, or for good, as commands with a Ray of their own."""

import os
import random
import subprocess
import sys
import time

import pytest

from benchmarks.faulty_store import FaultyStore
from ray_jobs.generate import run_generate
from ray_jobs.prepare import run_prepare
from recgpt import storage
from recgpt.data.dataset import HistoryDataset
from tests.conftest import REPOSITORY
from tests.ray_jobs.logs import csv_of
from tests.ray_jobs.random_model import save_random_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def files(url):
    """The bytes of all files of a folder, by name."""
    filesystem, path = storage.filesystem_and_path(str(url))
    return {name[len(path) + 1 :]: filesystem.cat_file(name) for name in filesystem.find(path)}


@pytest.fixture(scope="module")
def bucket(make_bucket, local_ray, tmp_path_factory):
    """A log, the dataset and the candidates that come of it while all is well, and the model."""
    bucket = make_bucket()
    generator = random.Random(0)
    for day in range(6):
        rows = [(generator.randrange(30), generator.randrange(12), 100 * day + row) for row in range(40)]
        storage.write_bytes(storage.join(bucket, "log", f"{day}.csv"), csv_of(rows).encode())
    run_prepare([storage.join(bucket, "log")], storage.join(bucket, "dataset"))
    dataset = HistoryDataset.open(storage.join(bucket, "dataset"))
    model = save_random_model(tmp_path_factory.mktemp("run"), dataset)
    for name, data in files(model).items():
        storage.write_bytes(storage.join(bucket, "run", name), data)
    run_generate(
        storage.join(bucket, "run"), storage.join(bucket, "dataset"), storage.join(bucket, "candidates")
    )
    return bucket


@pytest.fixture
def faulty(object_store):
    with FaultyStore(object_store) as store:
        yield store


def start(faulty, patience, verb, **options):
    """Run a verb as a command whose object store is the faulty one."""
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": faulty.url,
        "RECGPT_STORE_PATIENCE_SECONDS": str(patience),
        "PYTHONPATH": str(REPOSITORY),
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    return subprocess.run(
        [sys.executable, "-m", f"ray_jobs.{verb}", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def options_of(verb, bucket, output):
    given = {"prepare": {"input": "log"}, "generate": {"model": "run", "dataset": "dataset"}}[verb]
    return {**{name: storage.join(bucket, value) for name, value in given.items()}, "output": output}


@pytest.mark.parametrize(("verb", "made"), [("prepare", "dataset"), ("generate", "candidates")])
def test_what_a_verb_writes_is_the_same_although_a_fifth_of_all_requests_fail(bucket, faulty, verb, made):
    output = storage.join(bucket, f"{made}-2")
    faulty.fail_share(0.2)
    done = start(faulty, 60, verb, **options_of(verb, bucket, output))
    assert done.returncode == 0, done.stderr
    assert faulty.failed > 5
    expected, written = files(storage.join(bucket, made)), files(output)
    assert set(written) == set(expected)
    manifests = {"manifest.json", "_manifest.json", "report.html"}  # they hold paths
    assert {name for name in written if written[name] != expected[name]} <= manifests


@pytest.mark.parametrize(("verb", "after"), [("prepare", 60), ("generate", 75)])
def test_an_outage_that_lasts_is_one_line_and_leaves_nothing_that_looks_whole(bucket, faulty, verb, after):
    output = storage.join(bucket, f"{verb}-broken")
    faulty.fail("503", "reset", after=after)
    began = time.monotonic()
    done = start(faulty, 3, verb, **options_of(verb, bucket, output))
    assert time.monotonic() - began < 100
    assert faulty.failed > 0
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("recgpt: error:")]
    assert line.startswith(f"recgpt: error: {faulty.url}/{bucket.removeprefix('s3://')}")
    assert " failed " in line
    assert "Traceback" not in done.stderr
    assert "planted" not in (done.stderr + done.stdout).lower()
    assert storage.is_empty(output)
