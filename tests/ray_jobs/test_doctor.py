"""`recgpt doctor` on the command line."""

import pytest

from ray_jobs import doctor
from recgpt import machine
from recgpt.errors import UserError
from recgpt.machine import Finding


def test_the_table_says_what_was_seen(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    doctor.command(store=str(tmp_path), ray=False)
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert "a file was written, read and removed" in shown


def test_what_will_fail_is_an_error_in_one_line(capsys, monkeypatch):
    findings = [Finding("python", "ok", "3.11"), Finding("ports", "problem", "closed", "open them")]
    monkeypatch.setattr(machine, "look", lambda store: iter(findings))
    with pytest.raises(UserError, match="^ports: will not work; see what to do above$"):
        doctor.command(ray=False)
    assert "open them" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_ray_runs_a_task():
    finding = doctor._ray()
    assert (finding.what, finding.state) == ("Ray", "ok")
    assert finding.seen.startswith("a task ran; ")


def test_a_ray_that_cannot_be_joined_is_a_problem(monkeypatch):
    def fail(**_):
        raise ConnectionError("no cluster\nat this address")

    monkeypatch.setattr(doctor, "start_ray", fail)
    finding = doctor._ray()
    assert (finding.state, finding.seen) == ("problem", "ConnectionError: no cluster at this address")
