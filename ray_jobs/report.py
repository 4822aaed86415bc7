"""`recgpt report`: one HTML page about a run. Needs no Ray."""

from typing import Annotated

import typer

from ray_jobs.command_line import ItemColumnOption, ItemsOption, TitleColumnOption, verb_app
from ray_jobs.runtime import run_command


def command(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Run folder made by `recgpt train`, finished or not (path or s3:// URL). "
            "Example: recgpt report runs/beauty",
        ),
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="The dataset that it was trained on, if it has moved. Example: --dataset data/beauty",
            show_default="where it lay",
        ),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="What `recgpt evaluate --json` wrote about the run's model (path or s3:// URL). "
            "Example: --evaluation metrics.json",
            show_default="no quality on held-out items",
        ),
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="CANDIDATES",
            help="Folder made by `recgpt generate` with the run's model (path or s3:// URL). "
            "Example: --candidates candidates/beauty",
            show_default="no candidates",
        ),
    ] = None,
    items: ItemsOption = None,
    item_column: ItemColumnOption = "item_id",
    title_column: TitleColumnOption = "title",
    users: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Users of --candidates whose history and candidates are shown. Example: --users 10",
        ),
    ] = 5,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            metavar="PRICE",
            min=0,
            help="What an hour of one worker costs, in any currency. Example: --price-per-hour 2.5",
            show_default="no costs",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="HTML file to write (path or s3:// URL). Example: --output report.html",
            show_default="report.html in the run's folder",
        ),
    ] = None,
) -> None:
    """Write one HTML page about a run, to be opened in a browser or sent around: it needs nothing beside it.

    Curves, settings, machine and dataset come from the run; quality and candidates from what is named.

    Example: `recgpt report runs/beauty --evaluation metrics.json --candidates candidates/beauty`
    """
    from recgpt import storage
    from recgpt.schema import REPORT_FILE
    from recgpt.training.run_candidates import TitleFile
    from recgpt.training.run_report import Sources, html_report

    place = storage.absolute(output or storage.join(run, REPORT_FILE))
    storage.filesystem_and_path(place)  # what can be no file is refused before anything is read
    titles = None if items is None else TitleFile(items, item_column, title_column)
    sources = Sources(dataset, evaluation, candidates, titles, users, price_per_hour)
    storage.write_bytes(place, html_report(run, sources).encode())
    typer.echo(f"report: {place}")


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    main()
