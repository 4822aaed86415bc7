"""The faulty store as a process of its own, which takes its orders over HTTP."""

import json
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from benchmarks.faulty_store import CONTROL_PATH, FaultyStore
from tests.conftest import REPOSITORY


def request(url, method="GET", body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, method=method)) as answer:
        return answer.read()


@pytest.fixture
def process(object_store):
    """The URL of a faulty store in a process of its own."""
    call = [sys.executable, "-m", "benchmarks.faulty_store", "--store", object_store]
    store = subprocess.Popen(call, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    yield store.stdout.readline().strip()
    store.terminate()
    store.wait()


def test_a_process_fails_as_it_is_told_to(process):
    assert b"ListAllMyBucketsResult" in request(process)
    request(process + CONTROL_PATH, "PUT", {"way": ["503"], "after": 1, "requests": 2})
    request(process)
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError, match="503"):
            request(process)
    request(process)
    request(process + CONTROL_PATH, "PUT", {"way": "reset"})
    with pytest.raises(OSError, match="reset"):
        request(process)
    counts = json.loads(request(process + CONTROL_PATH, "PUT", {}))
    assert counts == {"requests": 6, "failed": 3}
    request(process)


def test_a_seeded_share_of_the_requests_fails(object_store):
    def outcome(seed):
        with FaultyStore(object_store) as store:
            store.fail("500", share=0.3, seed=seed)
            failed = []
            for _ in range(30):
                try:
                    request(store.url)
                except urllib.error.HTTPError:
                    failed.append(store.requests)
            assert len(failed) == store.failed
            return failed

    assert outcome(1) == outcome(1) != outcome(2)
    assert 0 < len(outcome(1)) < 30


def test_an_unknown_way_is_refused(object_store):
    with FaultyStore(object_store) as store, pytest.raises(ValueError, match="ways to fail are 500"):
        store.fail("418")
