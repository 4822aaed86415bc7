"""`recgpt ablate`: the model and the same without each of its parts, trained with several seeds."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ray_jobs.command_line import ConfigOption, DatasetOption, SetOption, WorkersOption, verb_app
from ray_jobs.runtime import run_command, start_ray
from recgpt import storage
from recgpt.errors import UserError

if TYPE_CHECKING:
    from recgpt.config import TrainSettings
    from recgpt.evaluation.ablation import Results, Summary

SETTINGS_FILE = "settings.json"  # written first: shows that the folder is an ablation's
RESULTS_FILE = "results.json"
TABLE_FILE = "table.md"
PLOT_FILE = "ablation.png"


def run_ablate(dataset: str, output: str, settings: "TrainSettings", seeds: Sequence[int]) -> "Summary":
    """Train and measure what is not finished yet; returns the test metrics over the seeds.

    ``output`` then holds them by variant and seed, as a table and as a plot, beside the runs themselves.
    Every choice is made on the validation split; a model reads the test split once, after its training.
    Raises ``UserError`` if the folder holds something that is not an ablation's, or one with other settings.
    """
    from ray_jobs.actor_pool import ActorRange
    from ray_jobs.evaluate import run_evaluate
    from ray_jobs.train import run_train
    from recgpt.evaluation import ablation

    trainings = ablation.trainings(settings)
    output = storage.absolute(output)
    results = _claim(output, settings)
    # Started here for the largest of the jobs: which of them comes first depends on what is finished.
    start_ray(min_cpus=settings.workers * settings.threads_per_worker + 2)
    jobs = list(itertools.product(seeds, trainings))
    for number, (seed, training) in enumerate(jobs, 1):
        typer.echo(f"[{number}/{len(jobs)}] {training.name}, seed {seed}")
        run = _run_folder(output, training.name, seed)
        start_from = training.starts_from and _run_folder(output, training.starts_from, seed)
        # Does nothing for a run that is finished, and refuses one with other settings or of another dataset.
        run_train(dataset, run, replace(training.settings, seed=seed), start_from=start_from)
        variants = ablation.measured_variants(training)
        if all(seed in results.get(variant, {}) for variant in variants):
            continue
        actors = ActorRange(settings.workers, settings.workers)
        evaluation = run_evaluate(run, dataset, actors=actors, baselines=False)
        for variant in variants:
            results.setdefault(variant, {})[seed] = ablation.metrics_of(variant, evaluation)
        storage.write_json(storage.join(output, RESULTS_FILE), results)
    summary = ablation.summarize(results, seeds)
    storage.write_bytes(storage.join(output, TABLE_FILE), ablation.markdown_table(summary, seeds).encode())
    storage.write_bytes(storage.join(output, PLOT_FILE), ablation.bar_plot(summary))
    return summary


def _claim(output: str, settings: "TrainSettings") -> "Results":
    """Make the folder an ablation's, and return the results that an earlier command left in it."""
    from recgpt.evaluation.ablation import read_results
    from recgpt.settings_reading import to_dict

    told = {**to_dict(settings), "seed": None, "workers": None}  # more seeds may follow, on more workers
    file, results = storage.join(output, SETTINGS_FILE), storage.join(output, RESULTS_FILE)
    if storage.exists(file):
        if storage.read_json_object(file) != told:
            raise UserError(f"{output}: holds an ablation with other settings; give another --output")
        return read_results(results) if storage.exists(results) else {}
    if not storage.is_empty(output):
        raise UserError(f"{output}: holds something that is not an ablation's; give another --output")
    storage.write_json(file, told)
    return {}


def _run_folder(output: str, name: str, seed: int) -> str:
    plain = name.replace("'", "").replace(" ", "-")
    return storage.join(output, "runs", f"{plain}-seed-{seed}")


def command(
    dataset: DatasetOption,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Folder for the runs, their results, the table and the plot (path or s3:// URL). "
            "Example: --output ablation",
        ),
    ],
    config: ConfigOption = None,
    set_: SetOption = None,
    seeds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Each variant is trained with so many seeds, from the setting `seed` on. Example: --seeds 5",
        ),
    ] = 3,
    workers: WorkersOption = None,
) -> None:
    """Measure what each part of the model is worth: train it whole and without each part, with several seeds.

    Variants: without the user module (or with one, if the settings have none), without
    prompt-tuning, with one step of recall, and with the loss of the paper. The same command goes on after
    an interruption, and with more seeds adds those that are missing.

    Example: `recgpt ablate --dataset data/beauty --output ablation --workers 2`
    """
    from recgpt.evaluation.ablation import rich_table
    from recgpt.settings_reading import load_train_settings
    from recgpt.tables import print_tables

    overrides = [*(set_ or []), *([f"workers={workers}"] if workers is not None else [])]
    settings = load_train_settings(config, overrides)
    all_seeds = range(settings.seed, settings.seed + seeds)
    summary = run_ablate(dataset, output, settings, all_seeds)
    print_tables(rich_table(summary, all_seeds))
    typer.echo(f"{output}: {RESULTS_FILE}, {TABLE_FILE}, {PLOT_FILE} and runs/")


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name: Ray's workers then import what they run, and need not unpickle it.
    from ray_jobs import ablate

    ablate.main()
