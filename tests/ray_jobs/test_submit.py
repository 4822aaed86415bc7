"""`recgpt submit`: the whole path as jobs of a cluster of two nodes, with everything on an object store."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from ray_jobs import submit
from recgpt import storage
from recgpt.errors import UserError
from recgpt.retrieval.candidates import read_candidates

SETTINGS = """
model: {width: 8, layers: 1, heads: 1, max_history: 8}
pretrain: {max_epochs: 1}
prompt_tune: {max_epochs: 1}
"""


@pytest.fixture(scope="module")
def cluster(object_store):
    """The address of its job API."""
    call = [sys.executable, "-m", "tests.ray_jobs.local_cluster"]
    # A job is run by the Python that is first on the cluster's PATH.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    try:
        while not (line := process.stdout.readline()).startswith("http"):
            assert line, "the cluster ended"
        wait_for_jobs(line.strip())
        yield line.strip()
    finally:
        process.stdin.close()
        process.wait(60)


def wait_for_jobs(address):
    """Until the dashboard answers about jobs."""
    request = urllib.request.Request(f"{address}/api/jobs/")
    request.add_header("Authorization", f"Bearer {os.environ['RAY_AUTH_TOKEN']}")
    for _ in range(300):
        try:
            urllib.request.urlopen(request, timeout=5)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
        else:
            return
    pytest.fail("the dashboard does not answer")


def run(folder, *arguments):
    """`recgpt submit` in a folder of the test's own."""
    call = [sys.executable, "-m", "ray_jobs.cli", "submit", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_log_to_candidates_on_two_nodes(cluster, s3_bucket, tmp_path):
    storage.write_bytes(f"{s3_bucket}/log.txt", sequences())
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    data, trained, candidates = (f"{s3_bucket}/{name}" for name in ("data", "run", "candidates"))
    for arguments in (
        ["prepare", "--input", f"{s3_bucket}/log.txt", "--output", data],
        ["train", "--dataset", data, "--output", trained, "--config", "settings.yaml", "--workers", "2"],
        ["generate", "--model", trained, "--dataset", data, "--output", candidates, "--actors", "2"],
        ["evaluate", "--model", trained, "--dataset", data],
    ):
        result = run(tmp_path, "--address", cluster, *arguments)
        assert result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"
        assert "INFO" not in result.stderr, "Ray's own notes are not for the user"
    assert sum(len(part) for part in read_candidates(candidates)) == 60

    # The status of a verb is that of the command, and its one line is in the log.
    result = run(
        tmp_path, "--address", cluster, "train", "--dataset", f"{s3_bucket}/nowhere", "--output", trained
    )
    assert result.returncode == 2
    assert "nowhere" in result.stdout
    assert "planted" not in (result.stdout + result.stderr).lower()


def sequences():
    lines = [f"{user} " + " ".join(str(1 + (user + place) % 30) for place in range(6)) for user in range(60)]
    return "\n".join(lines).encode()


def test_an_address_without_a_cluster_is_one_line_and_status_2(tmp_path):
    result = run(tmp_path, "--address", "http://127.0.0.1:9", "train", "--dataset", "d", "--output", "o")
    assert result.returncode == 2
    assert "http://127.0.0.1:9: no job API of a Ray cluster there" in result.stderr
    assert result.stderr.count("\n") == 1


def test_verbs_of_this_machine_alone_are_not_submitted():
    with pytest.raises(UserError, match="recgpt submit quickstart: no verb that can be submitted"):
        submit.submit("http://127.0.0.1:9", "quickstart", [])


def test_code_and_named_settings_are_uploaded_and_nothing_else(tmp_path, monkeypatch):
    work, packed = tmp_path / "work", tmp_path / "packed"
    (work / "settings").mkdir(parents=True)
    packed.mkdir()
    (work / "settings" / "mine.yaml").write_text("seed: 1")
    (work / "secret.txt").write_text("not named")
    monkeypatch.chdir(work)
    submit._pack(
        packed, ["--config", "settings/mine.yaml", "--dataset", "s3://bucket/data", "--workers", "2"]
    )
    expected = ["configs", "deepspeed_configs", "ray_jobs", "recgpt", "settings"]
    assert sorted(path.name for path in packed.iterdir()) == expected
    assert (packed / "settings" / "mine.yaml").read_text() == "seed: 1"
    assert not list(packed.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("log.parquet", "data is not uploaded"), ("../users.txt", "outside the working folder")],
)
def test_what_cannot_be_uploaded_is_refused(tmp_path, monkeypatch, name, message):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / name).write_text("1\n")
    with pytest.raises(UserError, match=message):
        submit._pack(tmp_path, ["--input", name])


def test_large_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "MOST_BYTES", 10)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users.txt").write_text("1\n" * 10)
    (tmp_path / "packed").mkdir()
    with pytest.raises(UserError, match="users.txt: more than 0 MiB would be uploaded"):
        submit._pack(tmp_path / "packed", ["--users", "users.txt"])
