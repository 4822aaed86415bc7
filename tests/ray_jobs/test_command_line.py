"""The command line: options with several values, mistakes, and errors as one line with status 2."""

from typing import Annotated

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.command_line import OverwriteOption, one_value_per_option, verb_app
from ray_jobs.runtime import run_command
from recgpt import progress
from recgpt.errors import UserError

received = {}


def command(
    paths: Annotated[list[str], typer.Option("--input", metavar="PATH...")],
    size: Annotated[int, typer.Option(min=1)] = 5,
    overwrite: OverwriteOption = False,
) -> None:
    """Do something with files."""
    received.update(paths=paths, size=size, overwrite=overwrite)
    if size == 13:
        raise UserError("size 13 is unlucky; give another --size")
    if size == 14:
        raise ValueError("a mistake of ours")


def run(monkeypatch, *arguments):
    """The exit status of the command line."""
    received.clear()
    monkeypatch.setattr("sys.argv", ["verb", *arguments])
    try:
        run_command(verb_app(command))
    except SystemExit as stop:
        return stop.code
    return 0


def test_an_option_may_have_several_values(monkeypatch):
    assert run(monkeypatch, "--input", "a", "b", "--overwrite", "--input", "c") == 0
    assert received == {"paths": ["a", "b", "c"], "size": 5, "overwrite": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--input"),
        (["--input", "a", "--size", "0"], "--size"),
        (["--input", "a", "--size", "many"], "--size"),
        (["--input", "a", "--sise", "3"], "--sise"),
        (["--input", "a", "--size", "3", "stray"], "stray"),
        (["--input", "a", "--size", "13"], "size 13 is unlucky; give another --size"),
    ],
)
def test_a_mistake_of_the_user_is_one_line_and_status_2(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("recgpt: error: ")
    assert output.err.count("\n") == 1
    assert message in output.err


@pytest.mark.parametrize(
    ("options", "talk"),
    [((), (False, False)), (("-q",), (True, False)), (("--verbose",), (False, True))],
)
def test_every_verb_can_be_quiet_or_verbose(monkeypatch, options, talk):
    assert run(monkeypatch, "--input", "a", *options) == 0
    assert (progress.is_quiet(), progress.is_verbose()) == talk
    assert run(monkeypatch, "--input", "a") == 0
    assert (progress.is_quiet(), progress.is_verbose()) == (False, False)


def test_quiet_and_verbose_at_once_are_refused(monkeypatch, capsys):
    assert run(monkeypatch, "--input", "a", "-q", "-v") == 2
    assert "contradict each other" in capsys.readouterr().err


def test_debug_shows_the_traceback_before_the_line(monkeypatch, capsys):
    assert run(monkeypatch, "--input", "a", "--size", "13", "--debug") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "recgpt: error: size 13 is unlucky; give another --size"


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    with pytest.raises(ValueError, match="a mistake of ours"):
        run(monkeypatch, "--input", "a", "--size", "14")


def test_the_first_of_several_values_may_stand_behind_an_equals_sign(monkeypatch):
    assert run(monkeypatch, "--input=a", "b", "c", "--size=7", "--input", "d") == 0
    assert received == {"paths": ["a", "b", "c", "d"], "size": 7, "overwrite": False}


def test_help_is_no_error(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    assert "--overwrite" in capsys.readouterr().out
    assert received == {}


WORDS = st.text("ab/=.", min_size=1, max_size=4)


@given(
    before=st.lists(WORDS, max_size=2),
    values=st.lists(WORDS, min_size=1, max_size=4),
    other=st.sampled_from(["--output", "--debug", "--output=z"]),
)
def test_values_are_repeated_in_order_and_nothing_else_changes(before, values, other):
    expanded = one_value_per_option([*before, "--input", *values, other, "x", "y"])
    repeated = [part for value in values for part in ("--input", value)]
    assert expanded == [*before, *repeated, other, "x", "y"]
    assert one_value_per_option(expanded) == expanded
    first, *more = values
    joined = one_value_per_option([*before, f"--input={first}", *more, other, "x", "y"])
    assert joined == [*before, f"--input={first}", *repeated[2:], other, "x", "y"]
