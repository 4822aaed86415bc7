"""What `recgpt doctor` finds."""

from importlib import metadata

import pytest
import torch

from recgpt import machine
from recgpt.machine import GIGABYTE, Finding, look


def by_name(*arguments):
    return {finding.what: finding for finding in look(*arguments)}


def test_this_machine_has_what_the_tests_run_on():
    findings = by_name()
    for package in ("torch", "ray", "deepspeed", "pyarrow"):
        assert findings[package] == Finding(package, "ok", metadata.version(package))
    assert findings["ports on 127.0.0.1"].state == "ok"
    assert all(finding.advice for finding in findings.values() if finding.state != "ok")


@pytest.mark.parametrize(
    ("version", "text", "state"),
    [
        ("2.11.0+cu130", "torch<2.14,>=2.11", "ok"),
        ("2.10.1", "torch<2.14,>=2.11", "problem"),
        ("2.14.0", "torch<2.14,>=2.11", "problem"),
        ("3", "ray[data,train]<3,>=2.56", "problem"),
        ("2.60", "ray[data,train]<3,>=2.56", "ok"),
    ],
)
def test_a_version_is_held_against_its_range(monkeypatch, version, text, state):
    monkeypatch.setattr(metadata, "requires", lambda _: [text, "pytest>=8; extra == 'dev'"])
    monkeypatch.setattr(metadata, "version", lambda _: version)
    _, finding = list(machine._versions())
    assert (finding.state, finding.seen) == (state, version)
    assert finding.advice == ("" if state == "ok" else f"pip install '{text}'")


def test_a_package_that_is_missing_is_a_problem(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda _: ["no-such-package>=1"])
    assert list(machine._versions())[1] == Finding(
        "no-such-package", "problem", "not installed", "pip install 'no-such-package>=1'"
    )


def test_too_little_room_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: machine.shutil._ntuple_diskusage(0, 0, 10**9))
    assert machine._room("shared memory", str(tmp_path), 2 * GIGABYTE, "more") == Finding(
        "shared memory", "note", f"{tmp_path}: 1.0 GB free", "more"
    )
    assert machine._room("shared memory", str(tmp_path / "absent"), 1, "more").state == "problem"


def test_a_folder_that_can_be_written_is_a_store(tmp_path):
    assert by_name(str(tmp_path))[f"store {tmp_path}"].state == "ok"
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_a_store_that_cannot_be_reached_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    finding = machine._store(str(tmp_path / "file"))
    assert finding.state == "problem"
    assert "credentials" in finding.advice


def test_an_old_gpu_is_a_note(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9 - 2 * number, 0))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    finding = machine._gpu()
    assert (finding.state, "Ampere" in finding.advice) == ("note", True)
    assert finding.seen.startswith("card 0, card 1")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert machine._gpu().state == "problem"
