"""What the verbs share on the command line: parsing, and the options that mean the same everywhere."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from recgpt import progress
from recgpt.errors import UserError

# Options that take one or more values: `--input a b` means `--input a --input b`.
OPTIONS_WITH_VALUES = ("--input", "--set", "--compare", "--held-out")

DatasetOption = Annotated[
    str,
    typer.Option(
        "--dataset",
        metavar="DATASET",
        help="Dataset folder made by `recgpt prepare` (path or s3:// URL). Example: --dataset data/beauty",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="RUN",
        help="Run folder made by `recgpt train`, or a bare exported model (path or s3:// URL). "
        "Example: --model runs/beauty",
    ),
]
OutputOption = Annotated[
    str,
    typer.Option(
        "--output",
        metavar="FOLDER",
        help="Folder to write (path or s3:// URL); it appears only once it is whole. "
        "Example: --output candidates/beauty",
    ),
]
ActorsOption = Annotated[
    str,
    typer.Option(
        "--actors",
        metavar="N|MIN:MAX",
        help="Processes that recall at the same time, each on one CPU with a copy of the model. Between MIN "
        "and MAX there are more the more work waits, for which a cluster that scales adds machines. "
        "Example: --actors 1:8",
    ),
]
IndexShardsOption = Annotated[
    int,
    typer.Option(
        "--index-shards",
        metavar="N",
        min=0,
        help="For catalogues that do not fit one actor: N more actors, each on one CPU, hold the item table "
        "between them. 0: each actor has all of it. Example: --index-shards 4",
    ),
]
UsersOption = Annotated[
    str | None,
    typer.Option(
        "--users",
        metavar="FILE",
        help="Only the users in this file (path or s3:// URL): text with one id per line, or Parquet "
        "with a column user_id. Example: --users users.txt",
        show_default="all users of the dataset",
    ),
]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write what was measured to this file, too (path or s3:// URL). Example: --json metrics.json",
        show_default="only a table is printed",
    ),
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        show_default="built-in settings",
        help="Settings as YAML: a path, or the name of a shipped file. Example: --config mine.yaml",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        show_default="none",
        help="Override single settings (see docs/training.md). Example: --set model.width=128 seed=1",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        show_default="the config's, else 1",
        help="Training processes over all machines. Example: --workers 2",
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace what --output already holds; without it, a folder that is not empty is refused.",
    ),
]
ItemsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="CSV or Parquet with the titles of items (path or s3:// URL). Example: --items items.csv",
        show_default="only ids are shown",
    ),
]
ItemColumnOption = Annotated[
    str, typer.Option(metavar="NAME", help="Column of --items with the ids. Example: --item-column sku")
]
TitleColumnOption = Annotated[
    str, typer.Option(metavar="NAME", help="Column of --items with the titles. Example: --title-column name")
]
COMMON_OPTIONS = {
    "quiet": Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no notes: only results and errors.")
    ],
    "verbose": Annotated[
        bool, typer.Option("--verbose", "-v", help="Also what Ray and its workers say, as it comes.")
    ],
    "debug": Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, not only its one line.")
    ],
}


def with_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """The verb with `--quiet`, `--verbose` and `--debug` besides its own options."""

    def run(**options: Any) -> None:
        common = {name: options.pop(name) for name in COMMON_OPTIONS}
        if common["quiet"] and common["verbose"]:
            raise UserError("--quiet and --verbose contradict each other; give one of them")
        progress.set_talk(quiet=common["quiet"], verbose=common["verbose"])
        command(**options)

    own = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
        for name, option in COMMON_OPTIONS.items()
    ]
    parameters = [*own.parameters.values(), *added]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def verb_app(command: Callable[..., None]) -> typer.Typer:
    """A command line with one verb; its help is the docstring of ``command``, in Markdown."""
    app = new_app()
    app.command()(with_common_options(command))
    return app


def new_app() -> typer.Typer:
    """A Typer without shell completion and without tracebacks of its own."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["--help", "-h"]},
    )


def invoke(app: typer.Typer) -> None:
    """Parse ``sys.argv`` and run the verb. Raises ``UserError`` for a mistake in the command line itself."""
    try:
        status = app(args=one_value_per_option(sys.argv[1:]), standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        # Newer releases of typer carry a click of their own, so that there is no one class to catch.
        if not hasattr(error, "format_message"):
            raise
        raise UserError(f"{' '.join(error.format_message().split())} (see --help)") from None
    if status:
        sys.exit(status)


def one_value_per_option(arguments: Sequence[str]) -> list[str]:
    """Repeat the name of an option with several values before each of them, so that shell patterns work.

    ``--input a b --output c`` becomes ``--input a --input b --output c``, as does ``--input=a b``.
    No verb with such an option takes positional arguments, so what follows it is a value of it until
    the next option.
    """
    expanded: list[str] = []
    option: str | None = None
    values = 0
    for argument in arguments:
        if argument.startswith("-"):
            name, has_value, _ = argument.partition("=")
            option = name if name in OPTIONS_WITH_VALUES else None
            values = 1 if has_value else 0
        elif option is not None:
            expanded += [option] if values else []
            values += 1
        expanded.append(argument)
    return expanded
