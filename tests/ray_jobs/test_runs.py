"""`recgpt runs` on the command line."""

import pytest
from typer.testing import CliRunner

from ray_jobs.runs import app
from recgpt.errors import UserError
from tests.training.test_runs import validation, write_run

runner = CliRunner()


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "a", [validation(1, 0.1)], finished=True, seed=1)
    write_run(tmp_path / "b", [validation(2, 0.25)], seed=2)
    return tmp_path


def test_list(runs):
    shown = runner.invoke(app, ["list", str(runs)]).output
    assert "seed=1" in shown
    assert "pretrain: ndcg@10 0.2500, epoch 2" in shown
    assert shown.index("finished") < shown.index("unfinished")


def test_compare(runs):
    shown = runner.invoke(app, ["compare", str(runs / "a"), str(runs / "b")]).output
    (line,) = (line for line in shown.splitlines() if "seed" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["seed", "1", "2"]
    assert "model.width" not in shown


def test_one_run_cannot_be_compared(runs):
    result = runner.invoke(app, ["compare", str(runs / "a")])
    assert isinstance(result.exception, UserError)


def test_show(runs):
    shown = runner.invoke(app, ["show", str(runs / "b")]).output
    assert "unfinished" in shown
    assert "validation: ndcg@10" in shown
