"""`recgpt show`: one user's history and candidates. Needs no Ray."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.command_line import ItemColumnOption, ItemsOption, TitleColumnOption, verb_app
from ray_jobs.runtime import run_command

if TYPE_CHECKING:
    from recgpt.retrieval.one_user import OneUser

INTERACTIONS_SHOWN = 20


def command(
    candidates: Annotated[
        str,
        typer.Option(
            metavar="CANDIDATES",
            help="Folder made by `recgpt generate` (path or s3:// URL). "
            "Example: --candidates candidates/beauty",
        ),
    ],
    user: Annotated[
        str, typer.Option(metavar="ID", help="The user's id, as in the log. Example: --user u17")
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="The dataset that they were made from, if it has moved. Example: --dataset data/beauty",
            show_default="where it lay",
        ),
    ] = None,
    items: ItemsOption = None,
    item_column: ItemColumnOption = "item_id",
    title_column: TitleColumnOption = "title",
) -> None:
    """Show the last items of a user's history, and the candidates with their steps and scores.

    Of the candidates only the file that holds the user is read.

    Example: `recgpt show --candidates candidates/beauty --user u17 --items items.csv`
    """
    import pyarrow as pa

    from recgpt import storage
    from recgpt.retrieval.candidate_checks import dataset_of
    from recgpt.retrieval.candidates import read_manifest
    from recgpt.retrieval.one_user import read_titles, read_user

    candidates = storage.absolute(candidates)
    manifest = read_manifest(candidates)
    histories = dataset_of(manifest, dataset)
    one = read_user(candidates, manifest, histories, user)
    titles: dict[Any, str] = {}
    if items is not None:
        shown = [*one.history[-INTERACTIONS_SHOWN:], *one.candidates]
        id_type = pa.int64() if histories.manifest.item_id_type == "int64" else pa.string()
        ids = pa.array([some.item_id for some in shown], id_type)
        titles = read_titles(items, item_column, title_column, ids)
    for line in lines_of(one, titles):
        typer.echo(line)


def lines_of(one: "OneUser", titles: dict[Any, str]) -> list[str]:
    """The history, the newest last, and the candidates, the best first."""
    last = one.history[-INTERACTIONS_SHOWN:]
    count = f"{len(one.history)} items" + (f", the last {len(last)}" if len(last) < len(one.history) else "")
    history = [[some.time, str(some.item_id), titles.get(some.item_id, "")] for some in last]
    candidates = [
        [f"step {some.step}", f"{some.score:.4f}", str(some.item_id), titles.get(some.item_id, "")]
        for some in one.candidates
    ]
    return [
        f"history: {count}",
        *_aligned(history),
        f"candidates: {len(candidates)}",
        *_aligned(candidates),
    ]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width).rstrip()
        for row in rows
    ]


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    main()
