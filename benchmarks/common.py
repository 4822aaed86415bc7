"""What the benchmarks share: tables, JSON, and environments of their own for the yardsticks."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ENVIRONMENTS = Path(__file__).parent / ".environments"
MIB = 2**20


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print to stdout; the first column is text, the others are numbers."""
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(f"\n[bold]{title}[/bold]", table, *filter(None, [note]), sep="\n")


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """What the numbers were taken with."""
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
    }


def run_verb(*arguments: str) -> None:
    """A verb of the console in a process of its own; ``RuntimeError`` with its output if it fails."""
    call = [sys.executable, "-m", "ray_jobs.cli", *arguments]
    repository = Path(__file__).parent.parent
    result = subprocess.run(call, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(call)} failed:\n{result.stdout}")


def environment(name: str, *installations: Sequence[str]) -> str:
    """The Python of a virtual environment made for a yardstick, and kept for the next time.

    Args:
        installations: arguments of one ``pip install`` each, in their order.
    """
    folder = ENVIRONMENTS / name
    python, done = folder / "bin" / "python", folder / ".installed"
    wanted = json.dumps(installations)
    if done.is_file() and done.read_text() == wanted:
        return str(python)
    print(f"Installing {name} into {folder} ...", flush=True)
    ENVIRONMENTS.mkdir(exist_ok=True)
    (ENVIRONMENTS / ".gitignore").write_text("*\n")
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    for installation in installations:
        pip = [python, "-m", "pip", "install", "--quiet", *installation]
        result = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            raise RuntimeError(f"pip install {' '.join(installation)} failed:\n{result.stdout}")
    done.write_text(wanted)
    return str(python)
