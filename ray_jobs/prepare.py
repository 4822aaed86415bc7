"""`recgpt prepare`: Ray tasks read logs and divide them by user; others build the histories in parts."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.command_line import OverwriteOption, verb_app
from ray_jobs.runtime import run_command, start_ray
from recgpt import storage
from recgpt.errors import UserError
from recgpt.schema import ITEM_ID, MANIFEST_FILE, REPORT_FILE, TIMESTAMP, USER_ID

if TYPE_CHECKING:
    from ray_jobs.prepare_pipeline import Prepared
    from ray_jobs.prepare_reading import DividedLog
    from recgpt.data.dataset import BadFile, DatasetManifest, HistoryDataset
    from recgpt.data.interactions import Wanted
    from recgpt.data.prepare_settings import PrepareSettings
    from recgpt.data.sources import Source
    from recgpt.data.summary import BadRow, DataSummary

# What may be left out, in the order of the manifest.
ALWAYS_COUNTED = ("missing_values", "bad_values", "duplicates", "rare_users_or_items")
COUNTED_IF_ANY = ("other_events", "outside_time_window", "repeats", "over_max_history")
REASONS = (*ALWAYS_COUNTED, *COUNTED_IF_ANY)


def run_prepare(
    inputs: Sequence[str],
    output: str,
    *,
    append: str | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> "DatasetManifest":
    """Turn interaction logs into a dataset folder; returns its manifest.

    ``inputs`` are files, folders and globs, as paths or URLs; ``settings`` are those of ``PrepareSettings``.
    With ``append``, the interactions of that dataset are there too, and its items keep their indices.
    The same log gives the same vocabulary and part files, whatever the order of its files and rows.
    Raises ``UserError`` for anything the user can put right; what was in ``output`` before is whole then.
    """
    from recgpt.data.prepare_settings import PrepareSettings
    from recgpt.settings_reading import from_dict

    checked = from_dict(PrepareSettings, settings, "recgpt prepare")
    return prepare_dataset(inputs, output, checked, append, overwrite)[0]


def prepare_dataset(
    inputs: Sequence[str],
    output: str,
    settings: "PrepareSettings",
    append: str | None = None,
    overwrite: bool = False,
) -> tuple["DatasetManifest", "DataSummary"]:
    """As ``run_prepare``; returns the dataset's figures as well."""
    from recgpt.data.dataset import HistoryDataset
    from recgpt.data.finding import find_sources
    from recgpt.data.prepare_settings import what_is_wanted
    from recgpt.data.sources import ColumnNames, check_kinds_of_time, sources_of

    output = storage.absolute(output)
    storage.recover_folder(output)  # which may be what is appended to
    base = HistoryDataset.open(append) if append else None
    storage.check_output_is_free(output, overwrite)
    event_column = settings.event_column if settings.events else None
    names = ColumnNames(settings.user_column, settings.item_column, settings.time_column, event_column)
    sources, bad_files = find_sources(inputs, settings.format, names, settings.time_unit)
    if base and not base.manifest.has_timestamps:
        raise UserError(f"--append {append}: the dataset has no times, so that nothing says what came later")
    older = sources_of(base) if base else []
    check_kinds_of_time([*older, *sources])
    read_from = [*(source.url for source in sources), *inputs]
    if base and base.url != output:
        read_from.append(base.url)
    storage.check_output_apart(output, *read_from)
    start_ray(min_cpus=2, large_objects=True)
    from ray_jobs.prepare_pipeline import HistoryBuilder, num_buckets
    from ray_jobs.prepare_reading import LogReader

    everything = [*older, *sources]
    wanted = what_is_wanted(everything, settings)
    has_timestamps = all(source.time_type != "position" for source in everything)
    known_items = base.vocabulary().item_ids if base else None
    with storage.staged_output(output, overwrite) as folder:
        buckets = num_buckets(sum(source.approximate_rows for source in everything))
        reader = LogReader(everything, bad_files, folder, buckets, known_items)
        log, wanted = reader.read(wanted, settings.max_bad_fraction)
        if base:
            _check_types(base, wanted)
        if log.num_rows == log.dropped.total():
            raise UserError(_nothing_left([*inputs], log))
        prepared = HistoryBuilder(log, wanted, settings, folder, has_timestamps).run(known_items)
        manifest = _describe(sources, wanted, settings, prepared, log.bad_files, has_timestamps, base)
        _write_report(folder, manifest, prepared.summary, log.bad_rows)
        storage.write_json(storage.join(folder, MANIFEST_FILE), asdict(manifest))
    return manifest, prepared.summary


def _check_types(base: "HistoryDataset", wanted: "Wanted") -> None:
    pairs = {
        "user": (base.manifest.user_id_type, wanted.user_type),
        "item": (base.manifest.item_id_type, wanted.item_type),
    }
    for kind, (older, newer) in pairs.items():
        if older != str(newer):
            raise UserError(
                f"--append {base.url}: its {kind} ids are {older}, together with those of the new log they "
                f"would be {newer}; prepare both logs together, without --append"
            )


def _nothing_left(inputs: Sequence[str], log: "DividedLog") -> str:
    where = f"{inputs[0]}{' ...' if len(inputs) > 1 else ''}"
    if not log.num_rows:
        return f"{where}: the log holds no interaction"
    reasons = ", ".join(
        f"{count:,} {reason.replace('_', ' ')}" for reason, count in log.dropped.items() if count
    )
    return f"{where}: no interaction is left of {log.num_rows:,} rows ({reasons})"


def _describe(
    sources: "Sequence[Source]",
    wanted: "Wanted",
    settings: "PrepareSettings",
    prepared: "Prepared",
    bad_files: "list[BadFile]",
    has_timestamps: bool,
    base: "HistoryDataset | None",
) -> "DatasetManifest":
    from recgpt.data.dataset import DatasetManifest
    from recgpt.schema import DATASET_SCHEMA_VERSION
    from recgpt.settings_reading import to_dict

    return DatasetManifest(
        schema_version=DATASET_SCHEMA_VERSION,
        num_users=sum(file.rows for file in prepared.files),
        num_items=prepared.vocabulary.num_items,
        num_interactions=int(prepared.vocabulary.counts.sum()),
        has_timestamps=has_timestamps,
        time_unit=(wanted.time_unit or "unstated") if has_timestamps else None,
        user_id_type=str(wanted.user_type),
        item_id_type=str(wanted.item_type),
        vocabulary_fingerprint=prepared.vocabulary.fingerprint,
        time_quantiles=prepared.time_quantiles if has_timestamps else None,
        sources=[{"path": source.url, "format": source.format, "bytes": source.size} for source in sources],
        settings=to_dict(settings),
        dropped={
            reason: prepared.dropped[reason]
            for reason in REASONS
            if reason in ALWAYS_COUNTED or prepared.dropped[reason]
        },
        files=prepared.files,
        bad_files=bad_files,
        lineage=base.lineage() if base else [],
        vocabulary_sha256=prepared.vocabulary_sha256,
    )


def _write_report(
    folder: str, manifest: "DatasetManifest", summary: "DataSummary", bad_rows: "list[BadRow]"
) -> None:
    from recgpt.data.report import html_report

    page = html_report(manifest, summary, bad_rows)
    storage.write_bytes(storage.join(folder, REPORT_FILE), page.encode())


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
    event_column: Annotated[
        str,
        typer.Option(
            "--event-column",
            metavar="NAME",
            help="Column of event types; read only with --events. Example: --event-column action",
        ),
    ] = "event",
    events: Annotated[
        str | None,
        typer.Option(
            "--events",
            metavar="NAMES",
            show_default="all",
            help="Types of events that count, comma-separated. Example: --events click,buy",
        ),
    ] = None,
    time_unit: Annotated[
        str,
        typer.Option(
            "--time-unit",
            metavar="UNIT",
            help="Unit of times that are plain numbers: seconds, milliseconds, microseconds or nanoseconds "
            "since 1970; `auto` recognises it by their size, `none` takes them for a mere order. "
            "Example: --time-unit milliseconds",
        ),
    ] = "auto",
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            show_default="all",
            help="First instant that counts: a date, a time, or a number in the log's unit. "
            "Example: --since 2026-01-01",
        ),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            show_default="all",
            help="First instant that counts no longer. Example: --until 2026-02-01T12:00",
        ),
    ] = None,
    repeats: Annotated[
        str,
        typer.Option(
            metavar="keep|collapse",
            help="What becomes of an item that a user takes several times in a row: all of them stay, or the "
            "first. Example: --repeats collapse",
        ),
    ] = "keep",
    max_history: Annotated[
        int | None,
        typer.Option(
            "--max-history",
            metavar="N",
            min=1,
            show_default="all",
            help="Interactions kept of each user, the newest. Example: --max-history 500",
        ),
    ] = None,
    min_user_interactions: Annotated[
        int,
        typer.Option(
            "--min-user-interactions",
            metavar="N",
            min=1,
            help="Interactions a user must have to stay; 1 keeps all. Example: --min-user-interactions 5",
        ),
    ] = 1,
    min_item_interactions: Annotated[
        int,
        typer.Option(
            "--min-item-interactions",
            metavar="N",
            min=1,
            help="Interactions an item must have to stay; 1 keeps all. Example: --min-item-interactions 5",
        ),
    ] = 1,
    max_bad_fraction: Annotated[
        float,
        typer.Option(
            "--max-bad-fraction",
            metavar="SHARE",
            min=0.0,
            max=1.0,
            help="Largest share of rows that are broken, and of bytes in unreadable files, to go on with; "
            "they are listed in the dataset's quarantine/. Example: --max-bad-fraction 0.05",
        ),
    ] = 0.01,
    append: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            show_default="none",
            help="A prepared dataset that the log is added to: known items keep their indices, new ones come "
            "after them. Example: --append datasets/january",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn interaction logs into a dataset: a vocabulary of items and one history per user.

    A log has user ids and item ids (integers or strings, kept as they are) and times.

    Exact duplicates are left out; at equal times, interactions stand by item id. Bad rows and unreadable
    files are counted and listed in the dataset's quarantine/. With both minima, users and items are removed
    in turn until all that stay have enough. The dataset's report.html shows what came out.

    Example: `recgpt prepare --input data/Beauty.txt --output datasets/beauty`
    """
    from rich.console import Console

    from recgpt.data.prepare_settings import PrepareSettings
    from recgpt.data.report import terminal_report
    from recgpt.settings_reading import from_dict

    settings = from_dict(
        PrepareSettings,
        {
            "format": format,
            "user_column": user_column,
            "item_column": item_column,
            "time_column": time_column,
            "event_column": event_column,
            "events": None if events is None else tuple(name.strip() for name in events.split(",")),
            "time_unit": time_unit,
            "since": since,
            "until": until,
            "repeats": repeats,
            "max_history": max_history,
            "min_user_interactions": min_user_interactions,
            "min_item_interactions": min_item_interactions,
            "max_bad_fraction": max_bad_fraction,
        },
        "recgpt prepare",
    )
    manifest, summary = prepare_dataset(inputs, output, settings, append, overwrite)
    Console().print(terminal_report(manifest, summary))
    typer.echo(f"dataset: {output}  report: {storage.join(output, REPORT_FILE)}")


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name: Ray's workers then import what they run, and need not unpickle it.
    from ray_jobs import prepare

    prepare.main()
