"""`recgpt train`: Ray Train starts the workers, Ray Data streams histories into each of them."""

import sys
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.command_line import DatasetOption, DebugOption, OverwriteOption, verb_app
from ray_jobs.runtime import configure_ray_data, run_command, start_ray
from recgpt import storage
from recgpt.progress import progress_bar

if TYPE_CHECKING:
    import pyarrow as pa

    from recgpt.config import SplitSettings, TrainSettings
    from recgpt.data.dataset import HistoryDataset
    from recgpt.data.plan import ReadUnit

# Reading is light: workers hold whole CPUs, and a reader must find room beside them.
READER_CPUS = 0.25
SECONDS_BETWEEN_LOOKS = 1.0


def run_train(
    dataset: str,
    output: str,
    settings: "TrainSettings",
    *,
    start_from: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a model on a prepared dataset into the folder ``output``; returns the run's manifest.

    An unfinished run in ``output`` is gone on with. ``start_from``: an older run or model whose weights
    a new one begins with. Raises ``UserError`` for what the user can put right.
    """
    from recgpt.data.dataset import HistoryDataset
    from recgpt.data.sequences import resolve_time_bounds
    from recgpt.model.export import model_fingerprint
    from recgpt.training import run_folder
    from recgpt.training.engine import read_deepspeed_config
    from recgpt.training.start import find_start

    histories = HistoryDataset.open(dataset)
    resolve_time_bounds(settings.data.split, histories.manifest)
    read_deepspeed_config(settings.deepspeed)
    output = storage.absolute(output)
    start_url = start_fingerprint = None
    if start_from is not None:
        start_url = find_start(start_from, settings.model, histories)
        storage.check_output_apart(output, start_url)
        start_fingerprint = model_fingerprint(start_url)
    folder = run_folder.open_run(output, settings, histories.fingerprint, overwrite, start_fingerprint)
    start_ray(min_cpus=settings.workers * settings.threads_per_worker + 2)
    stages = _fit(histories, folder, settings, start_url)
    summary = {
        "dataset": histories.url,
        "vocabulary_fingerprint": histories.manifest.vocabulary_fingerprint,
        "num_items": histories.num_items,
        "started_from": start_url and {"url": start_url, "fingerprint": start_fingerprint},
        "stages": stages,
    }
    run_folder.finish_run(folder, output, summary)
    return summary


def _fit(
    dataset: "HistoryDataset", folder: str, settings: "TrainSettings", start_url: str | None
) -> dict[str, Any]:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    threads = settings.threads_per_worker
    use_gpu = ray.cluster_resources().get("GPU", 0) >= settings.workers
    board = ray.remote(num_cpus=0)(ProgressBoard).remote()
    # Ray Train's own notes; our checkpoints do not go through it. Every node must reach them.
    notes = storage.join(folder, "ray_train")
    storage.remove(notes)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "dataset": dataset,
            "folder": folder,
            "settings": settings,
            "start_url": start_url,
            "board": board,
        },
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": threads, "GPU": 1} if use_gpu else {"CPU": threads},
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(storage_path=notes, name="train"),
    )
    with LiveProgress(board, dataset.num_users):
        trainer.fit()
    storage.remove(notes)
    return ray.get(board.stages.remote())


def _worker(config: dict[str, Any]) -> None:
    """What each training process does."""
    import warnings

    import ray.train

    from recgpt.data.sequences import resolve_time_bounds
    from recgpt.training.recorder import Recorder
    from recgpt.training.trainer import train

    dataset, settings, board = config["dataset"], config["settings"], config["board"]
    # DeepSpeed calls collectives by names that newer releases of torch call deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    time_bounds = resolve_time_bounds(settings.data.split, dataset.manifest)
    configure_ray_data()
    recorder = Recorder(
        config["folder"],
        report=lambda line: board.show.remote(line),
        epoch_done=lambda metrics: ray.train.report(metrics),
    )
    stages = train(
        settings,
        dataset,
        config["folder"],
        lambda units: _stream(dataset, units, settings.data.split, time_bounds),
        recorder,
        config["start_url"],
    )
    if ray.train.get_context().get_world_rank() == 0:
        ray.get(board.finish.remote(stages))


def _stream(
    dataset: "HistoryDataset",
    units: "list[ReadUnit]",
    split: "SplitSettings",
    time_bounds: tuple[int, int] | None,
) -> "Iterable[pa.Table]":
    """The histories of the units, in their order, read by Ray Data ahead of the training step."""
    import ray

    from recgpt.data.plan import read_unit

    def read(batch: dict[str, Any]) -> "pa.Table":
        (number,) = batch["item"]
        return read_unit(dataset, units[number], split, time_bounds)

    if not units:
        return ()
    plan = ray.data.from_items(list(range(len(units))), override_num_blocks=len(units))
    histories = plan.map_batches(read, batch_size=1, num_cpus=READER_CPUS)
    return histories.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


class ProgressBoard:
    """An actor that holds what the first worker reported, until the driver shows it."""

    def __init__(self) -> None:
        self._lines: list[dict[str, Any]] = []
        self._stages: dict[str, Any] = {}

    def show(self, line: dict[str, Any]) -> None:
        self._lines.append(line)

    def take_lines(self) -> list[dict[str, Any]]:
        lines, self._lines = self._lines, []
        return lines

    def finish(self, stages: dict[str, Any]) -> None:
        self._stages = stages

    def stages(self) -> dict[str, Any]:
        return self._stages


class LiveProgress:
    """While it is open, a thread draws a bar for the current epoch and a line for each validation."""

    def __init__(self, board: Any, num_users: int):
        self._board = board
        self._num_users = num_users
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        import ray

        epoch: tuple[str, int] | None = None
        bar = progress_bar("train: starting workers", None, "user")
        done = False
        while not done:
            done = self._done.wait(SECONDS_BETWEEN_LOOKS)
            for line in ray.get(self._board.take_lines.remote()):
                if line["kind"] == "validation":
                    bar.write(_validation_text(line), file=sys.stderr)
                    continue
                if epoch != (line["stage"], line["epoch"]):
                    epoch = (line["stage"], line["epoch"])
                    bar.close()
                    title = f"{line['stage']} epoch {line['epoch'] + 1}"
                    bar = progress_bar(title, self._num_users, "user", passing=True)
                bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
                bar.update(line["users"] - bar.n)
        bar.close()


def _validation_text(line: dict[str, Any]) -> str:
    figures = " ".join(f"{key} {value:.4f}" for key, value in line.items() if "@" in key)
    return f"{line['stage']} after epoch {line['epoch']}, step {line['step']}: {figures}"


def command(
    dataset: DatasetOption,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="RUN",
            help="Run folder (path or s3:// URL); finished when it holds manifest.json. "
            "Example: --output runs/mine",
        ),
    ],
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default="built-in settings",
            help="Settings as YAML: a path, or the name of a shipped file. Example: --config mine.yaml",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default="the config's, else 1",
            help="Training processes over all machines. Example: --workers 2",
        ),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            show_default="the config's, else pretrain,prompt_tune",
            help="Stages to run, comma-separated; the next may follow later. Example: --stages pretrain",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            show_default="none",
            help="Override single settings (see docs/training.md). Example: --set model.width=128 seed=1",
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            "--start-from",
            metavar="MODEL",
            show_default="initial weights",
            help="Train on from an older run or exported model, on the dataset that it was trained on or one "
            "appended to that; items that are new to it get initial rows. Example: --start-from runs/monday",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a model: auto-regressive pre-training, then prompt-tuning.

    After each epoch the model is measured on the validation split; a stage ends when it no longer
    improves, and the best checkpoint is exported. The same command goes on with an interrupted run.

    Example: `recgpt train --dataset data/beauty --output runs/beauty --workers 2 --set model.width=128`
    """
    from recgpt.config import load_train_settings

    overrides = list(set_ or [])
    if workers is not None:
        overrides.append(f"workers={workers}")
    if stages is not None:
        overrides.append(f"stages=[{stages}]")
    settings = load_train_settings(config, overrides)
    summary = run_train(dataset, output, settings, start_from=start_from, overwrite=overwrite)
    for stage, result in summary["stages"].items():
        best = " ".join(f"{key} {value:.4f}" for key, value in result.items() if "@" in key)
        print(f"{stage}: best on validation {best} ({result['checkpoint']}, {result['epochs']} epochs)")
    print(f"run: {output}  next: recgpt evaluate --model {output} --dataset {dataset}")


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name: Ray's workers then import what they run, and need not unpickle it.
    from ray_jobs import train

    train.main()
