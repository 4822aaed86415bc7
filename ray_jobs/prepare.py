"""`recgpt prepare`: Ray Data reads interaction logs; histories are built in parts, by hash of the user."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ray_jobs.command_line import DebugOption, OverwriteOption, verb_app
from ray_jobs.runtime import run_command, start_ray
from recgpt import storage
from recgpt.errors import UserError
from recgpt.schema import ITEM_ID, MANIFEST_FILE, TIMESTAMP, USER_ID

if TYPE_CHECKING:
    from recgpt.data.dataset import DatasetManifest


def run_prepare(
    inputs: Sequence[str],
    output: str,
    *,
    format: str = "auto",
    user_column: str = USER_ID,
    item_column: str = ITEM_ID,
    time_column: str = TIMESTAMP,
    min_user_interactions: int = 1,
    min_item_interactions: int = 1,
    overwrite: bool = False,
) -> "DatasetManifest":
    """Turn interaction logs into a dataset folder; returns its manifest.

    ``inputs`` are files, folders and globs, as paths or URLs. Rows that lack a value and exact
    duplicates are left out and counted. Ties in time are broken by item id. Users and items with
    fewer than the minimum of interactions are removed until none is left (k-core).
    The same log gives the same vocabulary and part files, whatever the order of its files and rows.
    Raises ``UserError`` for anything the user can put right; what was in ``output`` before is whole then.
    """
    from recgpt.data.sources import ColumnNames, find_sources

    settings = {
        "format": format,
        "user_column": user_column,
        "item_column": item_column,
        "time_column": time_column,
        "min_user_interactions": min_user_interactions,
        "min_item_interactions": min_item_interactions,
    }
    for option in ("min_user_interactions", "min_item_interactions"):
        if settings[option] < 1:
            raise UserError(f"--{option.replace('_', '-')} {settings[option]}: at least 1 is needed")
    output = storage.absolute(output)
    storage.check_output_is_free(output, overwrite)
    sources = find_sources(inputs, format, ColumnNames(user_column, item_column, time_column))
    storage.check_output_apart(output, *(source.url for source in sources), *inputs)
    start_ray(min_cpus=2)
    from ray_jobs.prepare_pipeline import Preparation

    with storage.staged_output(output, overwrite) as folder:
        manifest = Preparation(sources, settings, folder).run()
        storage.write_json(storage.join(folder, MANIFEST_FILE), dataclasses.asdict(manifest))
    return manifest


def command(
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="PATH...",
            help="Logs: files, folders or globs, one or more (paths or s3:// URLs). "
            "Example: --input 'logs/*.parquet'",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="DATASET",
            help="Dataset folder to write (path or s3:// URL); appears only once it is whole. "
            "Example: --output datasets/beauty",
        ),
    ],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="auto|parquet|csv|recbole|sequences",
            help="`auto` recognises each file by its content. `csv`: a header, fields between commas, tabs, "
            "semicolons or bars. `recbole`: an .inter file. `sequences`: per user one line, "
            "the user id and then item ids in time order. Example: --format csv",
        ),
    ] = "auto",
    user_column: Annotated[
        str,
        typer.Option("--user-column", metavar="NAME", help="Column of user ids. Example: --user-column uid"),
    ] = USER_ID,
    item_column: Annotated[
        str,
        typer.Option("--item-column", metavar="NAME", help="Column of item ids. Example: --item-column sku"),
    ] = ITEM_ID,
    time_column: Annotated[
        str,
        typer.Option(
            "--time-column",
            metavar="NAME",
            help="Column of times: numbers in any one unit, dates or timestamps. Example: --time-column ts",
        ),
    ] = TIMESTAMP,
    min_user_interactions: Annotated[
        int,
        typer.Option(
            "--min-user-interactions",
            metavar="N",
            help="Interactions a user must have to stay; 1 keeps all. Example: --min-user-interactions 5",
        ),
    ] = 1,
    min_item_interactions: Annotated[
        int,
        typer.Option(
            "--min-item-interactions",
            metavar="N",
            help="Interactions an item must have to stay; 1 keeps all. Example: --min-item-interactions 5",
        ),
    ] = 1,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Turn interaction logs into a dataset: a vocabulary of items and one history per user.

    A log has user ids and item ids (integers or strings, kept as they are) and times.

    Rows that lack a value and exact duplicates are left out and counted; at equal times, interactions
    stand by item id. With both minima, users and items are removed in turn until all that stay have enough.

    Example: `recgpt prepare --input data/Beauty.txt --output datasets/beauty`
    """
    manifest = run_prepare(
        inputs,
        output,
        format=format,
        user_column=user_column,
        item_column=item_column,
        time_column=time_column,
        min_user_interactions=min_user_interactions,
        min_item_interactions=min_item_interactions,
        overwrite=overwrite,
    )
    typer.echo(
        f"{output}: {manifest.num_users:,} users, {manifest.num_items:,} items, "
        f"{manifest.num_interactions:,} interactions"
    )
    dropped = ", ".join(
        f"{count:,} {reason.replace('_', ' ')}" for reason, count in manifest.dropped.items() if count
    )
    if dropped:
        typer.echo(f"left out: {dropped}")


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name: Ray's workers then import what they run, and need not unpickle it.
    from ray_jobs import prepare

    prepare.main()
