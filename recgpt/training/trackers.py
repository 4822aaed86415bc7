"""Where a run's figures are shown besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow."""

import importlib
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from recgpt import storage
from recgpt.errors import UserError
from recgpt.training.run_folder import run_name

IDENTITY_FILE = "trackers.json"


@dataclass(frozen=True)
class TrackedRun:
    """A run, as those who follow it elsewhere know it."""

    name: str
    identity: str
    settings: dict[str, Any]
    """By dotted key."""


class Tracker(Protocol):
    """Is told of a run's figures, on rank 0."""

    def restart(self, step: int) -> None:
        """The run goes on after ``step``: forget what came later, where that can be."""

    def record(self, figures: dict[str, float], step: int) -> None:
        """Figures by name (``train/loss``) at a step of the run."""

    def flush(self) -> None:
        """Make what was recorded durable."""

    def close(self, finished: bool) -> None:
        """The training has ended in this process; ``finished``: as it should."""


class TensorBoard:
    """Event files in the run's folder, a local one."""

    def __init__(self, folder: str):
        self._folder = storage.join(folder, "tensorboard")
        self._events: SummaryWriter | None = None

    def restart(self, step: int) -> None:
        self.close(finished=False)
        self._events = SummaryWriter(self._folder, purge_step=step + 1)

    def record(self, figures: dict[str, float], step: int) -> None:
        assert self._events, "restarted first"
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        if self._events:
            self._events.flush()

    def close(self, finished: bool) -> None:
        if self._events:
            self._events.close()


class WeightsAndBiases:
    """A run of wandb's, the same one whenever the training goes on. Its own variables (WANDB_PROJECT,
    WANDB_MODE, WANDB_API_KEY, ...) say where.
    """

    def __init__(self, run: TrackedRun):
        wandb = _import("wandb")
        self._run = wandb.init(
            id=run.identity,
            name=run.name,
            resume="allow",
            config=run.settings,
            # Settings and figures alone: no output, nobody's code, nothing of the machine.
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def restart(self, step: int) -> None:
        pass  # what comes again at a step replaces it: the step is a figure of its own, not wandb's count

    def record(self, figures: dict[str, float], step: int) -> None:
        self._run.log({**figures, "step": step})

    def flush(self) -> None:
        pass  # wandb's own process writes as it is told

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow's, the same one whenever the training goes on. MLFLOW_TRACKING_URI and
    MLFLOW_EXPERIMENT_NAME say where.
    """

    def __init__(self, run: TrackedRun):
        # The training stands still meanwhile: a server that does not answer is given up soon.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        mlflow = _import("mlflow")
        self._client, self._entities = mlflow.MlflowClient(), mlflow.entities
        experiment = self._experiment()
        known = self._client.search_runs([experiment], f"tags.recgpt_run = '{run.identity}'")
        if known:
            self._run_id = known[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        tags = {"recgpt_run": run.identity}
        self._run_id = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        params = [self._entities.Param(key, str(value)) for key, value in run.settings.items()]
        self._client.log_batch(self._run_id, params=params)

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "recgpt")
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)

    def restart(self, step: int) -> None:
        pass  # MLflow keeps every value with its step and time; a later one at the same step is the newest

    def record(self, figures: dict[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [
            self._entities.Metric(name.replace("@", "_at_"), value, now, step)
            for name, value in figures.items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def flush(self) -> None:
        pass  # each value is sent at once

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


def open_trackers(folder: str, names: tuple[str, ...], settings: dict[str, Any]) -> list[Tracker]:
    """TensorBoard for a run in a local folder, and those of ``TRACKERS`` that are named.

    ``settings``: of the run, by dotted key.
    Raises ``UserError`` if one is not installed, or does not take the run.
    """
    trackers: list[Tracker] = [TensorBoard(folder)] if storage.is_local(folder) else []
    if names:
        run = TrackedRun(run_name(folder), _identity(folder), settings)
        trackers += [_open(name, run) for name in names]
    return trackers


def _open(name: str, run: TrackedRun) -> Tracker:
    try:
        return TRACKERS[name](run)
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"trackers=[{name}]: cannot be told of the run ({type(error).__name__}: {text}); "
            "check its variables and the network, or leave it out"
        ) from None


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"trackers=[{name}]: is not installed; pip install 'recgpt[{name}]'") from None


def _identity(folder: str) -> str:
    """The same whenever the run in a folder goes on, and another for one that begins again there."""
    file = storage.join(folder, IDENTITY_FILE)
    if not storage.exists(file):
        storage.write_json(file, {"id": secrets.token_hex(8)})
    identity = storage.read_json_object(file).get("id")
    if not isinstance(identity, str):
        raise UserError(f"{file}: names no id; remove the file, and the run is shown as a new one")
    return identity
