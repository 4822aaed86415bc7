"""`recgpt scale`: a scaling experiment, each point in processes of its own; and two of them side by side."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.command_line import verb_app
from ray_jobs.rank_actors import RanksFailed, run_rank_actors
from ray_jobs.runtime import run_command, start_ray
from recgpt import progress, storage
from recgpt.errors import UserError
from recgpt.schema import MANIFEST_FILE

if TYPE_CHECKING:
    from recgpt.scaling.accuracy import Comparison
    from recgpt.scaling.experiment import Experiment, MadeUpDataset, Point
    from recgpt.scaling.results import Outcome
    from recgpt.scaling.sweep_tables import TextTable

DATASETS_FOLDER = "datasets"
PLOTS_FOLDER = "plots"
SCRATCH_FOLDER = "scratch"  # for checkpoints that are measured, and gone afterwards
MACHINE_FILE = "machine.json"


def run_scale(name: str, output: str) -> "list[TextTable]":
    """Measure what is not finished yet of an experiment; returns the tables that are also left in ``output``.

    Raises ``UserError`` for a wrong experiment, for a folder that holds something else, and if no point at
    all could be measured.
    """
    from recgpt.scaling import results
    from recgpt.scaling.experiment import identity, load_experiment, points_of

    experiment = load_experiment(name)
    points = points_of(experiment, name)
    output = storage.absolute(output)
    results.claim(output, experiment)
    datasets = [_dataset(point.dataset, output) for point in points]
    outcomes: dict[tuple[int, int], Outcome] = {}
    missing = []
    # All points once and then again: what changes slowly on a machine comes to all of them alike.
    for repeat in range(experiment.repeats):
        for number, point in enumerate(points):
            file = results.outcome_file(output, identity(experiment, point, datasets[number][1]), repeat)
            outcome = results.read_outcome(file)
            if outcome is None or outcome.reason is not None:
                missing.append((number, repeat, file))
            else:
                outcomes[number, repeat] = outcome
    if missing:
        start_ray(max(point.settings.workers * point.settings.threads_per_worker for point in points))
        if not storage.exists(storage.join(output, MACHINE_FILE)):
            storage.write_json(storage.join(output, MACHINE_FILE), _machine())
    bar = progress.progress_bar("scale", experiment.repeats * len(points), "point", initial=len(outcomes))
    with bar:
        for number, repeat, file in missing:
            outcome = _measure(experiment, points[number], datasets[number][0], output)
            results.write_outcome(file, points[number], repeat, outcome)
            outcomes[number, repeat] = outcome
            bar.update()
    return _write(name, experiment, points, [url for url, _ in datasets], outcomes, output)


def _measure(experiment: "Experiment", point: "Point", dataset: str, output: str) -> "Outcome":
    from recgpt.machines import matrix_flops_of
    from recgpt.scaling.results import Outcome, figures_of
    from recgpt.settings_reading import to_dict

    settings = point.settings
    scratch = storage.join(output, SCRATCH_FOLDER)
    wants_checkpoint = experiment.checkpoint or experiment.recall_users > 0
    storage.remove(scratch)
    try:
        ranks = run_rank_actors(
            "recgpt.scaling.trial:trial",
            settings.workers,
            settings.threads_per_worker,
            experiment.timeout_seconds,
            dataset=dataset,
            settings=to_dict(settings),
            warm_up=experiment.warm_up,
            steps=experiment.steps,
            folder=scratch if wants_checkpoint else None,
            recall_users=experiment.recall_users,
        )
    except RanksFailed as error:
        progress.note(f"recgpt: {point.label}: {error}")
        return Outcome(str(error), {})
    finally:
        storage.remove(scratch)
    device = ranks[0]["device"]
    rate = _matrix_flops(output, settings.threads_per_worker) if device == "cpu" else matrix_flops_of(device)
    return Outcome(None, figures_of(ranks, rate))


def _matrix_flops(output: str, threads: int) -> float | None:
    """Of a process alone on its CPUs; measured once for a sweep. None if that fails."""
    file = storage.join(output, MACHINE_FILE)
    known: dict[str, Any] = storage.read_json_object(file)
    name = f"matrix_flops, {threads} threads"
    if name not in known:
        try:
            (rates,) = run_rank_actors(
                "recgpt.scaling.calibration:rates", 1, threads, timeout_seconds=600, also_loaded=[]
            )
        except RanksFailed as error:
            progress.note(f"recgpt: the rate of matrix products could not be measured: {error}")
            return None
        known[name] = rates["matrix_flops"]
        storage.write_json(file, known)
    return known[name]


def _machine() -> dict[str, Any]:
    """What the sweep was begun on."""
    from importlib import metadata

    import ray

    from recgpt import __version__
    from recgpt.training.environment import commit

    resources = ray.cluster_resources()
    return {
        "machines": len(ray.nodes()),
        "cpus": resources.get("CPU", 0),
        "gpus": resources.get("GPU", 0),
        "recgpt": __version__,
        "commit": commit(),
        **{package: metadata.version(package) for package in ("torch", "deepspeed", "ray")},
    }


def _dataset(dataset: "MadeUpDataset | str", output: str) -> tuple[str, str]:
    """Where a dataset lies, and what tells it from others; made up if it has to be, once for a sweep."""
    from recgpt.data.dataset import HistoryDataset
    from recgpt.scaling.experiment import digest

    if isinstance(dataset, str):
        opened = HistoryDataset.open(storage.absolute(dataset))
        return opened.url, opened.fingerprint
    name = digest(asdict(dataset))
    url = storage.join(output, DATASETS_FOLDER, name)
    if not storage.exists(storage.join(url, MANIFEST_FILE)):
        _make_up(dataset, url)
    return url, name


def _make_up(dataset: "MadeUpDataset", url: str) -> None:
    """The manifest comes last: without it there is no dataset."""
    import numpy as np

    from recgpt.scaling.made_up_histories import write_dataset

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder, dataset.users, np.array(dataset.lengths), num_items=dataset.items)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.name == MANIFEST_FILE):
            storage.write_bytes(storage.join(url, *path.relative_to(folder).parts), path.read_bytes())


def _write(
    name: str,
    experiment: "Experiment",
    points: "list[Point]",
    datasets: list[str],
    outcomes: "dict[tuple[int, int], Outcome]",
    output: str,
) -> "list[TextTable]":
    """Rows, tables, plots and the page of what was measured."""
    from recgpt.scaling import results
    from recgpt.scaling.sweep_plots import drawings
    from recgpt.scaling.sweep_report import sweep_report
    from recgpt.scaling.sweep_tables import markdown, sweep_tables

    keys, rows = results.all_rows(points, datasets, outcomes)
    results.write_results(output, rows)
    summaries = results.summarize(rows, keys)
    tables, plots = sweep_tables(summaries), drawings(summaries)
    title = name.rstrip("/").rpartition("/")[2].removesuffix(".yaml")
    machine_file = storage.join(output, MACHINE_FILE)
    machine = storage.read_json_object(machine_file) if storage.exists(machine_file) else {}
    page = sweep_report(title, experiment, machine, summaries, tables, plots)
    storage.write_bytes(storage.join(output, results.TABLE_FILE), markdown(tables).encode())
    storage.write_bytes(storage.join(output, results.REPORT_FILE), page.encode())
    for plot in plots:
        for file, data in plot.files().items():
            storage.write_bytes(storage.join(output, PLOTS_FOLDER, file), data)
    if not any(summary.measured for summary in summaries):
        raise UserError(f"{output}: no point could be measured; of the first: {summaries[0].reasons[0]}")
    return tables


def compare(before: str, after: str) -> "list[TextTable]":
    """Two sweeps side by side. Raises ``UserError`` if one is none, or if there is nothing to show."""
    from recgpt.scaling.results import read_results
    from recgpt.scaling.sweep_tables import comparison

    tables = comparison((before, after), read_results(before), read_results(after))
    if not tables:
        raise UserError(f"{before}, {after}: nothing was measured in either; run `recgpt scale` for both")
    return tables


def held_out_error(sweeps: list[str]) -> "list[Comparison]":
    """The model of costs beside what sweeps of this machine have measured."""
    import os

    from recgpt.scaling.accuracy import compare_model

    return compare_model([storage.absolute(sweep) for sweep in sweeps], os.cpu_count() or 1)


def print_error(compared: "list[Comparison]") -> None:
    """Print a table, and the median errors."""
    from rich.table import Table

    from recgpt.scaling.accuracy import median_error
    from recgpt.tables import print_tables

    table = Table("point", "", "ms measured", "ms by the model", "error")
    for one in compared:
        name = f"{one.sweep.rstrip('/').rpartition('/')[2]}: {one.point}"
        cells = f"{1e3 * one.seconds:.1f}", f"{1e3 * one.predicted:.1f}", f"{100 * one.error:+.0f} %"
        table.add_row(name, "held out" if one.held_out else "fitted", *cells)
    print_tables(table)
    fitted, held_out = (100 * median_error(compared, out) for out in (False, True))
    typer.echo(f"median error: {held_out:.0f} % on points that were held out, {fitted:.0f} % on the others")


def command(
    experiment: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="What is measured: a shipped experiment (weak, strong, table_rows, zero_stages) or a YAML "
            "file. Example: --experiment weak",
            show_default="needed, but with --compare or --held-out",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for results, tables, plots and the datasets that are made up (path or s3:// URL); "
            "all machines must reach it. Example: --output sweeps/weak",
            show_default="needed, but with --compare or --held-out",
        ),
    ] = None,
    compare_: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            metavar="FOLDER FOLDER",
            help="Measure nothing: show two sweeps side by side, such as before and after a change. "
            "Example: --compare sweeps/old sweeps/new",
            show_default="nothing is compared",
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out",
            metavar="FOLDER...",
            help="Measure nothing: fit the model of costs (docs/scaling.md) to two thirds of the points of "
            "sweeps of this machine, and print its error on the others. "
            "Example: --held-out sweeps/weak sweeps/strong",
            show_default="the model is not checked",
        ),
    ] = None,
) -> None:
    """Measure what a training step takes, over workers, settings, sizes: time and its parts, memory, bytes.

    Each point of the experiment runs some steps in processes of its own, on the machines of the Ray cluster
    or on this one. A point that fails is noted, and the others go on; the same command measures what is
    missing.

    Example: `recgpt scale --experiment weak --output sweeps/weak`
    """
    from recgpt.tables import print_tables

    if held_out:
        if experiment or output or compare_:
            raise UserError("--held-out takes folders of sweeps and no other option")
        print_error(held_out_error(held_out))
        return
    if compare_:
        if len(compare_) != 2 or experiment or output:
            raise UserError(
                "--compare takes two folders and no other option: --compare sweeps/old sweeps/new"
            )
        tables = compare(*compare_)
    elif experiment is None or output is None:
        raise UserError("give --experiment and --output, --compare with two folders, or --held-out")
    else:
        tables = run_scale(experiment, output)
    from recgpt.scaling.sweep_tables import rich_table

    print_tables(*map(rich_table, tables))
    if output is not None:
        typer.echo(f"{output}: results.parquet, table.md, report.html and plots/")


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name: Ray's workers then import what they run, and need not unpickle it.
    from ray_jobs import scaling

    scaling.main()
