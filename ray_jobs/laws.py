"""`recgpt laws`: how quality follows from the size of the model and the amount of data."""

from typing import TYPE_CHECKING, Annotated

import typer

from ray_jobs.command_line import verb_app
from ray_jobs.runtime import run_command, start_ray
from recgpt import storage
from recgpt.errors import UserError
from recgpt.schema import MANIFEST_FILE

if TYPE_CHECKING:
    from recgpt.data.dataset import HistoryDataset
    from recgpt.scaling.law_runs import LawExperiment, LawTraining
    from recgpt.scaling.laws import Fit, Run

EXPERIMENT_FILE = "experiment.json"  # written first: shows that the folder is a law's
RUNS_FILE = "runs.json"
LAW_FILE = "law.json"
TABLES_FILE = "law.md"
PLOT_NAME = "law"


def run_laws(experiment: "LawExperiment", output: str, dataset: str | None = None) -> "Fit":
    """Train and measure what is not finished yet, and fit the law.

    ``dataset``: a prepared one; the experiment's log is made up and prepared if there is none.
    ``output`` then holds the runs, what they reached, the law as JSON and tables, and its plot.
    Raises ``UserError`` if the folder holds something that is not a law's, or one of another experiment.
    """
    from recgpt.scaling import law_runs, laws

    output = storage.absolute(output)
    runs = _claim(output, experiment, dataset)
    settings = experiment.settings
    start_ray(min_cpus=settings.workers * settings.threads_per_worker + 2)
    histories = _dataset(experiment, output, dataset)
    grid = law_runs.trainings(experiment)
    for number, training in enumerate(grid, 1):
        typer.echo(f"[{number}/{len(grid)}] {training.name}")
        if training.name not in runs:
            runs[training.name] = _train_and_measure(experiment, training, histories, output)
            _write_runs(output, runs)
    fitted = laws.fit([runs[training.name] for training in grid])
    where = "a generated log" if dataset is None else storage.absolute(dataset).rstrip("/").rpartition("/")[2]
    tables = laws.markdown(fitted, experiment.budgets, where)
    storage.write_bytes(storage.join(output, TABLES_FILE), tables.encode())
    for kind, data in law_runs.plot(fitted, f"Loss of users held out, {where}").items():
        storage.write_bytes(storage.join(output, f"{PLOT_NAME}.{kind}"), data)
    storage.write_json(storage.join(output, LAW_FILE), laws.to_json(fitted, experiment.budgets))
    return fitted


def _train_and_measure(
    experiment: "LawExperiment", training: "LawTraining", dataset: "HistoryDataset", output: str
) -> "Run":
    from ray_jobs.train import run_train
    from recgpt.scaling import law_runs

    folder = storage.join(output, "data", f"share-{training.share:g}")
    share = law_runs.write_share(dataset, folder, training.share, experiment.held_out)
    run = storage.join(output, "runs", training.name)
    summary = run_train(share.url, run, training.settings)
    loss = law_runs.held_out_loss(run, dataset, experiment.held_out)
    return law_runs.measured(training, share, summary["stages"]["pretrain"]["epochs"], loss)


def _claim(output: str, experiment: "LawExperiment", dataset: str | None) -> "dict[str, Run]":
    """Make the folder a law's, and return the finished runs that an earlier command left in it."""
    from recgpt.data.dataset import HistoryDataset
    from recgpt.scaling.laws import Run
    from recgpt.settings_reading import from_dict, to_dict

    fingerprint = None if dataset is None else HistoryDataset.open(dataset).fingerprint
    told = {"experiment": to_dict(experiment), "dataset_fingerprint": fingerprint}
    file, runs = storage.join(output, EXPERIMENT_FILE), storage.join(output, RUNS_FILE)
    if storage.exists(file):
        if storage.read_json_object(file) != told:
            raise UserError(f"{output}: holds a law of another experiment or dataset; give another --output")
        return from_dict(dict[str, Run], storage.read_json(runs), runs) if storage.exists(runs) else {}
    if not storage.is_empty(output):
        raise UserError(f"{output}: holds something that is not a law's; give another --output")
    storage.write_json(file, told)
    return {}


def _write_runs(output: str, runs: "dict[str, Run]") -> None:
    from dataclasses import asdict

    storage.write_json(storage.join(output, RUNS_FILE), {name: asdict(run) for name, run in runs.items()})


def _dataset(experiment: "LawExperiment", output: str, dataset: str | None) -> "HistoryDataset":
    """The dataset that was given, or that of the log that the experiment makes up."""
    from ray_jobs.prepare import run_prepare
    from recgpt.data.dataset import HistoryDataset
    from recgpt.data.synthetic import write_log

    if dataset is not None:
        return HistoryDataset.open(dataset)
    url = storage.join(output, "data", "generated")
    if not storage.exists(storage.join(url, MANIFEST_FILE)):
        files = write_log(experiment.log, storage.join(output, "log"))
        run_prepare(files, url)
    return HistoryDataset.open(url)


def command(
    experiment: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="Sizes, shares of the users and settings as YAML: a shipped name (laws) or a path "
            "(docs/scaling-laws.md). Example: --experiment laws",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Folder for the runs, their losses, the law and its plot (path or s3:// URL). "
            "Example: --output laws/mine",
        ),
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            metavar="DATASET",
            show_default="the experiment's log is made up",
            help="Folder made by `recgpt prepare` (path or s3:// URL). Example: --dataset data/beauty",
        ),
    ] = None,
) -> None:
    """Fit a law of quality, L(N, D) = E + A N^-a + B D^-b, to trainings.

    Each model is pre-trained and measured by its mean cross-entropy over all items, on users that no model
    has seen. The law comes with confidence intervals, the best choice of size and data for budgets of
    operations, and where it must not be trusted. The same command goes on after an interruption.

    Example: `recgpt laws --experiment laws --output laws/mine --dataset data/mine`
    """
    from recgpt.scaling.law_runs import load_experiment

    chosen = load_experiment(experiment)
    run_laws(chosen, output, dataset)
    typer.echo(storage.read_bytes(storage.join(storage.absolute(output), TABLES_FILE)).decode())
    typer.echo(
        f"{output}: {RUNS_FILE}, {LAW_FILE}, {TABLES_FILE}, {PLOT_NAME}.png, {PLOT_NAME}.svg and runs/"
    )


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name: Ray's workers then import what they run, and need not unpickle it.
    from ray_jobs import laws

    laws.main()
