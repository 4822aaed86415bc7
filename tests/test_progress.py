"""Progress off a terminal: plain lines with rate and ETA, no control characters."""

import re

import pytest

from recgpt import progress


@pytest.fixture(autouse=True)
def as_usual():
    yield
    progress.set_talk()


def test_quiet_leaves_warnings_alone(capsys):
    progress.set_talk(quiet=True)
    with progress.progress_bar("reading", total=2, unit="rows") as bar:
        bar.update(2)
    progress.note("for those who want to know")
    progress.warn("beware")
    assert capsys.readouterr().err == "recgpt: warning: beware\n"


def test_off_a_terminal_each_report_is_a_plain_line(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.progress_bar("reading", total=40, unit="rows") as bar:
        for _ in range(4):
            bar.update(10)
            bar.set_postfix(loss=0.5)

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("reading: ") and "\r" not in line and "\x1b" not in line for line in lines)
    assert re.search(r"40.*/40.* rows \[\d\d:\d\d<\d\d:\d\d, .*rows/s, loss=0\.5\]", lines[-1])


def test_between_two_reports_nothing_is_written(capsys):
    with progress.progress_bar("reading", total=1000, unit="rows") as bar:
        for _ in range(1000):
            bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3  # the first, the last, and none of the thousand between them


def test_an_unknown_total_shows_a_count_and_a_rate(capsys):
    with progress.progress_bar("reading", total=None, unit="rows") as bar:
        bar.update(5)
    assert re.search(r"reading: 5.*rows/s", capsys.readouterr().err)


def test_a_new_description_reads_like_the_first_one(capsys):
    with progress.progress_bar("first", total=2, unit="rows") as bar:
        bar.set_description("second", refresh=False)
        bar.update(2)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("first: 0")
    assert last.startswith("second: 2")
