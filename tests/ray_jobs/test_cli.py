"""The console script: every verb is there, helps, and fails with one line."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_jobs import submit
from ray_jobs.cli import app
from recgpt import __version__

VERBS = (
    "prepare",
    "train",
    "index",
    "generate",
    "verify-candidates",
    "show",
    "evaluate",
    "tune-quotas",
    "ablate",
    "validate",
    "plan",
    "scale",
    "laws",
    "project",
    "report",
    "export",
    "doctor",
    "quickstart",
)


def recgpt(*arguments):
    """Run the console script in a process of its own, where no Ray of another test writes into the output."""
    call = [sys.executable, "-m", "ray_jobs.cli", *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=120)


def module_of(verb):
    _, _, module = submit._entrypoint(verb, [])
    return module


def has_default(option):
    """Required, or the help says in words what happens without the option."""
    return option.required or isinstance(option.show_default, str)


def test_version():
    result = recgpt("--version")
    assert result.returncode == 0
    assert result.stdout == f"recgpt {__version__}\n"
    assert result.stderr == ""


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_help_lists_every_verb(arguments):
    result = recgpt(*arguments)
    assert result.returncode == 0
    assert all(f"{verb} " in result.stdout for verb in VERBS)
    assert result.stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_with_an_example(verb):
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"recgpt {verb}" in result.output
    assert "Example" in result.output
    assert "--debug" in result.output


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_explained(verb):
    from typer.main import get_command

    command = get_command(importlib.import_module(module_of(verb)).app)
    assert [option.name for option in command.params if not option.help] == []
    options = [option for option in command.params if option.param_type_name == "option"]
    with_value = [option for option in options if not option.is_flag]
    assert [option.name for option in with_value if f"Example: {option.opts[0]} " not in option.help] == []
    assert [option.name for option in with_value if option.default is None and not has_default(option)] == []


def test_an_unknown_verb_is_one_line_and_status_2():
    result = recgpt("prepair")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "prepair" in result.stderr


@pytest.mark.parametrize(
    "start", [["-m", "ray_jobs.cli", "evaluate"], ["-m", "ray_jobs.evaluate"]], ids=" ".join
)
def test_a_missing_dataset_is_one_line_on_stderr_and_status_2(start, tmp_path):
    missing = str(tmp_path / "nothing-here")
    finished = subprocess.run(
        [sys.executable, *start, "--model", missing, "--dataset", missing],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("recgpt: error: ")
    assert finished.stderr.count("\n") == 1
    assert "nothing-here" in finished.stderr
