"""`recgpt submit`: the guide's cluster of two nodes, with all data in S3; and what is not submitted."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ray_jobs import submit
from recgpt.errors import UserError
from tests.conftest import REPOSITORY, free_port

GUIDE = REPOSITORY / "docs" / "cluster.md"
PORTS = ("5000", "6379", "8265", "52365", "52366")
# What the guide says is done once for the machine, or ends what others have started on it.
NOT_HERE = ("pip install", "ray stop")


def script_of_the_guide():
    """The commands of "Trying it out", at ports that are free here."""
    (section,) = re.findall(r"^## Trying it out.*?(?=^## )", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)).splitlines()
    script = "\n".join(line for line in lines if not line.startswith(NOT_HERE))
    for port in PORTS:
        script, found = re.subn(rf"\b{port}\b", str(free_port()), script)
        assert found
    secret = "AWS_SECRET_ACCESS_KEY=any"
    assert secret in script
    return script.replace(secret, "AWS_SECRET_ACCESS_KEY=planted")


@pytest.fixture
def machine():
    """The environment of a newcomer's shell; what is left running in it ends with the test."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need a short path
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_A"))}
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    yield {**mine, "PATH": path, "HOME": folder, "RAY_TMPDIR": folder}
    mark = f"RAY_TMPDIR={folder}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def run(folder, *arguments):
    """`recgpt submit` in a folder of the test's own."""
    call = [sys.executable, "-m", "ray_jobs.cli", "submit", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_by_the_guide_alone_from_log_to_candidates_on_two_nodes(machine, tmp_path):
    script = [
        "set -e",
        script_of_the_guide(),
        "python - <<'END'",
        "from recgpt.retrieval.candidates import read_candidates",
        "print('lists:', sum(len(part) for part in read_candidates('s3://trial/candidates')))",
        "END",
        # The status of a verb is that of the command, and its one line is in the log.
        "recgpt submit train --dataset s3://trial/nowhere --output s3://trial/another || echo status $?",
        "RAY_AUTH_TOKEN=another recgpt submit doctor || echo status $?",
    ]
    with (tmp_path / "output").open("w+") as output:  # no pipe: the nodes would keep it open
        call = ["bash", "-c", "\n".join(script)]
        ended = subprocess.run(call, cwd=tmp_path, env=machine, stdout=output, stderr=subprocess.STDOUT)
    text = (tmp_path / "output").read_text()
    assert ended.returncode == 0, text
    assert "RecGPT, two steps" in text
    assert "lists: 60" in text
    assert "nowhere: no prepared dataset" in text
    assert text.count("status 2\n") == 2
    assert "the cluster refuses the token of this machine" in text.splitlines()[-2]
    assert len(re.findall(r"^ 1 node_\w+$", text, re.MULTILINE)) == 2, "ray status tells of two nodes"
    assert "planted" not in text
    jobs = text.partition("submitted as")[2].partition("======== Autoscaler status")[0]
    assert "INFO" not in jobs, "Ray's own notes are not for the user"


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
