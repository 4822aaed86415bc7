"""`recgpt report`: where the page goes, and what is refused before anything is read."""

import sys

import pytest
from typer.testing import CliRunner

from ray_jobs.report import app
from recgpt.errors import UserError
from recgpt.storage import read_bytes
from tests.training.test_run_curves import train
from tests.training.test_runs import write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", [train(20, seconds=9.0)])


def report(*options):
    result = CliRunner().invoke(app, list(map(str, options)))
    if result.exception:
        raise result.exception
    return result.output


def test_the_page_goes_into_the_run_or_where_it_is_told(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # whoever imports it fails
    assert report(run, "--price-per-hour", 2) == f"report: {run}/report.html\n"
    assert b"cost of the training steps" in read_bytes(f"{run}/report.html")
    report(run, "--output", tmp_path / "pages" / "a.html")
    assert b"cost of the training steps" not in read_bytes(str(tmp_path / "pages" / "a.html"))


def test_a_page_in_an_object_store(run, s3_bucket):
    assert report(run, "--output", f"{s3_bucket}/a.html") == f"report: {s3_bucket}/a.html\n"
    assert b"<h1>Run run</h1>" in read_bytes(f"{s3_bucket}/a.html")


def test_what_cannot_be_shown_leaves_no_page(run, tmp_path):
    with pytest.raises(UserError, match="no run here"):
        report(tmp_path / "other")
    with pytest.raises(UserError, match="nothing.json: no such file"):
        report(run, "--evaluation", tmp_path / "nothing.json")
    with pytest.raises(UserError, match="no finished candidates"):
        report(run, "--candidates", tmp_path / "nothing")
    with pytest.raises(UserError, match="write s3://BUCKET/FOLDER"):
        report(run, "--output", "s3://")
    assert sorted(path.name for path in tmp_path.rglob("*.html")) == []
