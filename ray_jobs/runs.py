"""`recgpt runs list|show|compare`: runs side by side. Needs no Ray."""

from typing import TYPE_CHECKING, Annotated

import typer

from ray_jobs.command_line import new_app, with_common_options
from ray_jobs.runtime import run_command
from recgpt.errors import UserError

if TYPE_CHECKING:
    from recgpt.training.runs import Run

app = new_app()


@app.callback()
def runs() -> None:
    """Look at runs of `recgpt train`: how far they are, how good, and in what they differ.

    Example: `recgpt runs list runs`
    """


@app.command("list")
@with_common_options
def list_runs(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="Folder that holds runs (path or s3:// URL). Example: recgpt runs list runs",
        ),
    ],
) -> None:
    """All runs in a folder, and what each was told otherwise than by default.

    Example: `recgpt runs list s3://bucket/runs`
    """
    from rich.table import Table

    from recgpt.tables import print_tables
    from recgpt.training.runs import find_runs

    table = Table("run", "state", "step", "best on validation", "told")
    for run in find_runs(folder):
        told = " ".join(f"{key}={value}" for key, value in run.told().items())
        table.add_row(run.name, _state(run), _step(run), _best(run), told)
    print_tables(table)


@app.command("compare")
@with_common_options
def compare_runs(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Two runs or more (paths or s3:// URLs). Example: recgpt runs compare runs/a runs/b",
        ),
    ],
) -> None:
    """In what settings runs differ, and how good they are.

    Example: `recgpt runs compare runs/a runs/b`
    """
    from rich.table import Table

    from recgpt.tables import print_tables
    from recgpt.training.runs import differing, read_run

    if len(folders) < 2:
        raise UserError(f"{folders[0]}: one run has nothing to be compared with; give two or more")
    compared = [read_run(folder) for folder in folders]
    table = Table("", *(run.name for run in compared))
    for key in differing(compared):
        table.add_row(key, *(str(run.settings.get(key, "")) for run in compared))
    table.add_section()
    table.add_row("state", *map(_state, compared))
    table.add_row("step", *map(_step, compared))
    table.add_row("best on validation", *map(_best, compared))
    print_tables(table)


@app.command("show")
@with_common_options
def show_run(
    folder: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run (path or s3:// URL). Example: recgpt runs show runs/a"),
    ],
) -> None:
    """One run: what it was told, how far it is, its newest figures.

    Example: `recgpt runs show runs/a`
    """
    from rich.table import Table

    from recgpt.tables import print_tables
    from recgpt.training.runs import read_run

    run = read_run(folder)
    table = Table("", run.url)
    table.add_row("state", _state(run))
    table.add_row("best on validation", _best(run))
    for key, value in run.told().items():
        table.add_row(key, str(value))
    for kind, line in run.last.items():
        table.add_section()
        for key, value in line.items():
            table.add_row(f"{kind}: {key}", f"{value:.4g}" if isinstance(value, float) else str(value))
    print_tables(table)


def _state(run: "Run") -> str:
    return "finished" if run.finished else "unfinished"


def _step(run: "Run") -> str:
    return str(max((line["step"] for line in run.last.values()), default=0))


def _best(run: "Run") -> str:
    return "\n".join(
        f"{stage}: {run.metric} {value:.4f}, epoch {epoch}" for stage, (value, epoch) in run.best.items()
    )


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    main()
