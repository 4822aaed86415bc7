"""`recgpt train`: Ray Train starts the workers, Ray Data streams histories into each of them."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.actor_pool import ActorRange
from ray_jobs.command_line import ConfigOption, DatasetOption, SetOption, verb_app
from ray_jobs.runtime import configure_ray_data, run_command, start_ray
from ray_jobs.train_board import LiveProgress, SignsOfLife, TrainBoard
from recgpt import progress, storage
from recgpt.errors import Stopped, UserError
from recgpt.schema import MANIFEST_FILE

if TYPE_CHECKING:
    import pyarrow as pa

    from recgpt.config import SplitSettings, TrainSettings
    from recgpt.data.dataset import HistoryDataset
    from recgpt.data.plan import ReadUnit

# Reading is light: workers hold whole CPUs, and a reader must find room beside them.
READER_CPUS = 0.25


def run_train(
    dataset: str,
    output: str,
    settings: "TrainSettings",
    *,
    start_from: str | None = None,
    restart: bool = False,
) -> dict[str, Any]:
    """Train a model on a prepared dataset into the folder ``output``; returns the run's manifest.

    An unfinished run in ``output`` is gone on with, a finished one is left as it is, unless ``restart``.
    ``start_from``: an older run or model whose weights a new one begins with.
    Raises ``UserError`` for what the user can put right, and ``Stopped`` if SIGTERM ended it in good order.
    """
    from recgpt.data.dataset import HistoryDataset
    from recgpt.data.sequences import resolve_time_bounds
    from recgpt.model.export import model_fingerprint
    from recgpt.training import run_folder
    from recgpt.training.engine import read_deepspeed_config
    from recgpt.training.model import check_item_table
    from recgpt.training.start import find_start

    histories = HistoryDataset.open(dataset)
    resolve_time_bounds(settings.data.split, histories.manifest)
    read_deepspeed_config(settings.deepspeed)
    check_item_table(settings.item_table, histories.num_items, settings.fewest_workers)
    output = storage.absolute(output)
    start_url = start_fingerprint = None
    if start_from is not None:
        start_url = find_start(start_from, settings.model, histories)
        storage.check_output_apart(output, start_url)
        start_fingerprint = model_fingerprint(start_url)
    folder = run_folder.open_run(output, settings, histories.fingerprint, restart, start_fingerprint)
    if folder is None:
        progress.note(f"{output} is finished already, by the same settings; nothing is done")
        return storage.read_json(storage.join(output, MANIFEST_FILE))
    start_ray(min_cpus=settings.workers * settings.threads_per_worker + 2)
    stages = _fit(histories, folder, settings, start_url, run_folder.run_name(folder))
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
    dataset: "HistoryDataset", folder: str, settings: "TrainSettings", start_url: str | None, run: str
) -> dict[str, Any]:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from recgpt.training import run_folder
    from recgpt.training.environment import commit

    least, threads = settings.fewest_workers, settings.threads_per_worker
    use_gpu = ray.cluster_resources().get("GPU", 0) >= least
    # Where the driver is: the board shall not be lost with a worker's machine.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(TrainBoard).options(num_cpus=0, scheduling_strategy=here).remote(run)
    # Ray Train's own notes; our checkpoints do not go through it. Every node must reach them.
    notes = storage.join(folder, "ray_train")
    storage.remove(notes)
    num_workers: Any = settings.workers if least == settings.workers else (least, settings.workers)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "dataset": dataset,
            "folder": folder,
            "settings": settings,
            "start_url": start_url,
            "attempt": run_folder.begin_attempt(folder),
            "board": board,
            "commit": commit(),
        },
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": threads, "GPU": 1} if use_gpu else {"CPU": threads},
        ),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=settings.collective_timeout_seconds
        ),
        run_config=RunConfig(
            storage_path=notes,
            name="train",
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )
    max_epochs = {stage: getattr(settings, stage).max_epochs for stage in settings.stages}
    with LiveProgress(board, dataset.num_users, max_epochs):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _lost_workers(error, settings.max_failures) or error from None
    results, stopped, verdict = ray.get(board.outcome.remote())
    if verdict is not None:
        raise UserError(verdict)
    storage.remove(notes)
    if stopped is not None:
        raise Stopped(f"{stopped}; the same command goes on from there")
    return results


def _lost_workers(error: Exception, max_failures: int) -> UserError | None:
    """The error in one line, if it is that workers were lost, too often to start them again."""
    import ray

    failures = list(getattr(error, "worker_failures", {}).values())
    died = [failure for failure in failures if isinstance(failure, ray.exceptions.RayActorError)]
    if not failures or not all(failure in died or _is_lost_peer(failure) for failure in failures):
        return None
    return UserError(
        f"workers were lost {max_failures + 1} times, perhaps for want of memory or with their machine; "
        "run the same command again to go on from the newest checkpoint"
    )


def _is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another worker is dead or hangs."""
    return (
        re.search(
            r"Timed out waiting|Application timeout|[Cc]onnection (reset|closed|refused)|Broken pipe",
            str(error),
        )
        is not None
    )


def _worker(config: dict[str, Any]) -> None:
    """What each training process does."""
    import warnings

    import ray.train

    from recgpt.data.sequences import resolve_time_bounds
    from recgpt.training.environment import write_environment
    from recgpt.training.rank_log import rank_log
    from recgpt.training.recorder import Recorder
    from recgpt.training.trainer import train

    dataset, settings, board = config["dataset"], config["settings"], config["board"]
    context = ray.train.get_context()
    if ray.get(board.begin.remote(context.get_world_size())) is not None:
        return
    # DeepSpeed calls collectives by names that newer releases of torch call deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    time_bounds = resolve_time_bounds(settings.data.split, dataset.manifest)
    configure_ray_data()
    rank, folder = context.get_world_rank(), config["folder"]
    recorder = Recorder(
        folder,
        report=lambda line: board.show.remote(line),
        epoch_done=lambda metrics: ray.train.report(metrics),
    )
    results = stopped = None
    with SignsOfLife(board, rank, lambda: recorder.where) as signs, rank_log(folder, rank):
        try:
            if rank == 0:
                write_environment(folder, settings, config["commit"])
            results = train(
                settings,
                dataset,
                folder,
                lambda units: _stream(dataset, units, settings.data.split, time_bounds),
                recorder,
                config["start_url"],
                attempt=config["attempt"],
                stop_wanted=signs.stop_wanted,
            )
        except Stopped as stop:
            stopped = str(stop)
        except UserError as error:
            ray.get(board.condemn.remote(str(error)))
            raise
        except RuntimeError as error:
            if _is_lost_peer(error):
                ray.get(board.waited_in_vain.remote(rank, recorder.where))
            raise
        finally:
            recorder.close(finished=results is not None)
    if rank == 0:
        ray.get(board.finish.remote(results, stopped))


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
    config: ConfigOption = None,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|MIN:MAX",
            show_default="the config's, else 1",
            help="Training processes over all machines. With MIN:MAX it goes on with fewer, down to MIN, "
            "while machines are missing. Example: --workers 2",
        ),
    ] = None,
    max_failures: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            show_default="the config's, else 3",
            help="How often lost workers are started again, from the newest checkpoint. "
            "Example: --max-failures 10",
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
    set_: SetOption = None,
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
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            "--overwrite",
            help="Begin again, and replace what --output already holds once the new run is finished.",
        ),
    ] = False,
) -> None:
    """Train a model: auto-regressive pre-training, then prompt-tuning.

    After each epoch the model is measured on the validation split; a stage ends when it no longer
    improves, and the best checkpoint is exported. The same command goes on with an interrupted run.

    SIGTERM ends it after the step under way, with a checkpoint and status 143.

    Example: `recgpt train --dataset data/beauty --output runs/beauty --workers 2 --set model.width=128`
    """
    from recgpt.settings_reading import load_train_settings

    overrides = list(set_ or [])
    if workers is not None:
        least, most = ActorRange.parse(workers, "--workers")
        overrides += [f"workers={most}", *([f"min_workers={least}"] if least < most else [])]
    if max_failures is not None:
        overrides.append(f"max_failures={max_failures}")
    if stages is not None:
        overrides.append(f"stages=[{stages}]")
    settings = load_train_settings(config, overrides)
    summary = run_train(dataset, output, settings, start_from=start_from, restart=restart)
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
