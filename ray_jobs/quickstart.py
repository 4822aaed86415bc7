"""`recgpt quickstart`: the whole path on one machine, from a generated log to candidates and metrics."""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ray_jobs.command_line import verb_app
from ray_jobs.runtime import run_command, start_ray
from recgpt import storage
from recgpt.errors import UserError
from recgpt.schema import ITEM_IDS, ITEM_INDICES, MANIFEST_FILE, STEPS, SUCCESS_FILE, USER_ID

if TYPE_CHECKING:
    from recgpt.config import TrainSettings
    from recgpt.data.synthetic import SyntheticSettings

SETTINGS_FILE = (
    "quickstart.json"  # written first: shows that the folder is a quickstart's, and of which settings
)
METRICS_FILE = "metrics.json"
LOG_FILES = 4
CPUS = 4  # logical ones: two processes of a job, and room beside them to read their input
SHOWN_METRICS = ("hit_rate@10", "ndcg@10", "mrr")
MUST_WIN = ("hit_rate@10", "ndcg@10")
EXAMPLE_USERS = 3
EXAMPLE_ITEMS = 4


@dataclass(frozen=True)
class Stage:
    """One stage: what it does, where its result lies, and the file that shows it to be finished."""

    title: str
    result: str
    finished_by: str
    run: Callable[[], Any]


def run_quickstart(
    output: str, log_settings: "SyntheticSettings", train_settings: "TrainSettings"
) -> dict[str, Any]:
    """Run the stages that are not finished yet; returns the metrics (see ``run_evaluate``).

    Raises ``UserError`` if the folder holds something that is not a quickstart's.
    """
    from recgpt.settings_reading import to_dict

    output = storage.absolute(output)
    stages = _stages(output, log_settings, train_settings)
    _claim(output, {"log": asdict(log_settings), "train": to_dict(train_settings)}, stages)
    finished = [storage.exists(stage.finished_by) for stage in stages]
    first = finished.index(False) if False in finished else len(stages)
    for stage in stages[first + 1 :]:  # made from what is about to be made anew
        storage.remove(stage.result)
    if first < len(stages):
        start_ray(CPUS)
    for number, stage in enumerate(stages, 1):
        heading = f"[{number}/{len(stages)}] {stage.title}"
        if number <= first:
            typer.echo(f"{heading}: kept from an earlier run")
            continue
        typer.echo(f"{heading} ...")
        started = time.monotonic()
        stage.run()
        typer.echo(f"{heading}: done in {time.monotonic() - started:.0f} s")
    return storage.read_json(storage.join(output, METRICS_FILE))


def _stages(
    output: str, log_settings: "SyntheticSettings", train_settings: "TrainSettings"
) -> tuple[Stage, ...]:
    from ray_jobs.actor_pool import ActorRange
    from ray_jobs.evaluate import run_evaluate
    from ray_jobs.generate import run_generate
    from ray_jobs.prepare import run_prepare
    from ray_jobs.train import run_train

    log, dataset, run, candidates, metrics = (
        storage.join(output, name) for name in ("log", "dataset", "run", "candidates", METRICS_FILE)
    )

    def write_metrics() -> None:
        run_evaluate(run, dataset, json_file=metrics)

    return (
        Stage(
            f"log: make up {log_settings.num_users:,} users and {log_settings.num_items:,} items",
            log,
            storage.join(log, MANIFEST_FILE),
            lambda: _write_log(log, log_settings),
        ),
        Stage(
            "prepare: vocabulary and histories",
            dataset,
            storage.join(dataset, MANIFEST_FILE),
            lambda: run_prepare([storage.join(log, "*.parquet")], dataset),
        ),
        Stage(
            f"train: {' and '.join(train_settings.stages)}",
            run,
            storage.join(run, MANIFEST_FILE),
            lambda: run_train(dataset, run, train_settings),
        ),
        Stage(
            "generate: candidates for every user",
            candidates,
            storage.join(candidates, SUCCESS_FILE),
            lambda: run_generate(run, dataset, candidates, actors=ActorRange(2, 2)),
        ),
        Stage("evaluate: model and baselines on the test split", metrics, metrics, write_metrics),
    )


def _claim(output: str, settings: dict[str, Any], stages: tuple[Stage, ...]) -> None:
    """Make the folder a quickstart's of these settings; results of other settings are removed."""
    marker = storage.join(output, SETTINGS_FILE)
    if storage.exists(marker):
        if storage.read_json(marker) == settings:
            return
        for stage in stages:
            storage.remove(stage.result)
    elif not storage.is_empty(output):
        raise UserError(f"{output}: holds something that is not a quickstart's; give another --output")
    storage.write_json(marker, settings)


def _write_log(folder: str, settings: "SyntheticSettings") -> None:
    from recgpt.data.synthetic import write_log

    with storage.staged_output(folder, overwrite=False) as staging:
        files = write_log(settings, staging, files=LOG_FILES)
        storage.write_json(storage.join(staging, MANIFEST_FILE), {"files": len(files)})


def rivals_ahead(metrics: dict[str, Any]) -> list[str]:
    """Where a baseline is not behind the model, as ``"markov at ndcg@10"``; empty if the model beats both."""
    return [
        f"{baseline} at {name}"
        for baseline, values in metrics["baselines"].items()
        for name in MUST_WIN
        if metrics[name] <= values[name]
    ]


def _show_metrics(console: Console, metrics: dict[str, Any]) -> None:
    table = Table(
        "", *SHOWN_METRICS, title=f"Test split: the held-out last item of {metrics['num_users']:,} users"
    )
    rows = {
        "popularity": metrics["baselines"]["popularity"],
        "item-to-item Markov": metrics["baselines"]["markov"],
        "[bold]RecGPT[/]": metrics,
    }
    for name, row in rows.items():
        table.add_row(name, *(f"{row[metric]:.4f}" for metric in SHOWN_METRICS))
    console.print(table)


def _show_examples(console: Console, output: str) -> None:
    """The ends of a few histories, and what recall found for them in each step."""
    import numpy as np

    from recgpt.data.dataset import HistoryDataset
    from recgpt.retrieval.candidates import read_candidates

    dataset = HistoryDataset.open(storage.join(output, "dataset"))
    histories = dataset.read_row_group(dataset.row_groups[0], [USER_ID, ITEM_INDICES])
    candidates = next(iter(read_candidates(storage.join(output, "candidates"))))
    vocabulary = dataset.vocabulary()
    console.print("\nCandidates of some users:")
    for row in range(min(EXAMPLE_USERS, len(histories))):
        history, found = (table.slice(row, 1).to_pylist()[0] for table in (histories, candidates))
        assert history[USER_ID] == found[USER_ID], "candidates come in the order of the dataset"
        last_indices = np.array(history[ITEM_INDICES][-EXAMPLE_ITEMS:])
        lines = {"last items": vocabulary.decode(last_indices).to_pylist()}
        for item, step in zip(found[ITEM_IDS], found[STEPS], strict=True):
            lines.setdefault(f"step {step}", []).append(item)
        _print_plain(console, f"  {found[USER_ID]}")
        for title, items in lines.items():
            _print_plain(console, f"    {title:12}{_shortened(items)}")


def _shortened(items: list[Any]) -> str:
    rest = len(items) - EXAMPLE_ITEMS
    return ", ".join(map(str, items[:EXAMPLE_ITEMS])) + (f" and {rest} more" if rest > 0 else "")


def _print_plain(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _program() -> str:
    """How the user starts recgpt: by its name if the shell finds it, else by its path."""
    started_as = Path(sys.argv[0])
    if started_as.name != "recgpt" or shutil.which("recgpt"):
        return "recgpt"
    return str(started_as)


def _show_next(console: Console, output: str) -> None:
    program = _program()
    lines = (
        "",
        f"Candidates: {storage.join(output, 'candidates')} (Parquet: user_id, item_ids, scores, steps)",
        f"Model:      {storage.join(output, 'run')}",
        "",
        "Next, with a log of your own (Parquet or CSV; every command has --help):",
        f"  {program} prepare --input LOG.parquet --output data/mine \\",
        "      --user-column USER --item-column ITEM --time-column TIME",
        f"  {program} train --dataset data/mine --output runs/mine --workers 2",
        f"  {program} generate --model runs/mine --dataset data/mine --output candidates/mine",
    )
    for line in lines:
        _print_plain(console, line)


def command(
    output: Annotated[
        str,
        typer.Option(
            metavar="FOLDER",
            help="Folder for the log, dataset, model, candidates and metrics (path or s3:// URL). "
            "Example: --output /tmp/quickstart",
        ),
    ] = "quickstart",
) -> None:
    """Run the whole path on this machine: make up a log, prepare, train, generate, evaluate.

    Takes some minutes on two CPU cores, with a local Ray and local files. Stages that an earlier
    run has finished are kept. Ends with status 1 if the model does not beat both baselines.

    Example: `recgpt quickstart --output /tmp/quickstart`
    """
    from recgpt.data.synthetic import SyntheticSettings
    from recgpt.settings_reading import load_train_settings

    metrics = run_quickstart(output, SyntheticSettings(), load_train_settings("quickstart"))
    console = Console()
    _show_metrics(console, metrics)
    _show_examples(console, output)
    _show_next(console, output)
    ahead = rivals_ahead(metrics)
    if ahead:
        typer.echo(f"The model did not beat {', '.join(ahead)}.", err=True)
        raise typer.Exit(1)


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name: Ray's workers then import what they run, and need not unpickle it.
    from ray_jobs import quickstart

    quickstart.main()
