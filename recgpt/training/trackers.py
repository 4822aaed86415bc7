"""Where a run's figures are shown besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow."""

import importlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from recgpt import storage
from recgpt.errors import UserError

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

    def close(self) -> None:
        """The run has ended, or goes on in another process."""


class TensorBoard:
    """Event files in the run's folder, a local one."""

    def __init__(self, folder: str):
        self._folder = storage.join(folder, "tensorboard")
        self._events: SummaryWriter | None = None

    def restart(self, step: int) -> None:
        self.close()
        self._events = SummaryWriter(self._folder, purge_step=step + 1)

    def record(self, figures: dict[str, float], step: int) -> None:
        assert self._events, "restarted first"
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        if self._events:
            self._events.flush()

    def close(self) -> None:
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
            # Figures alone: no output of the process, which has a log of its own, and nobody's code.
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True),
        )
        self._run.define_metric("*", step_metric="step")

    def restart(self, step: int) -> None:
        pass  # what comes again at a step replaces it: the step is a figure of its own, not wandb's count

    def record(self, figures: dict[str, float], step: int) -> None:
        self._run.log({**figures, "step": step})

    def flush(self) -> None:
        pass  # wandb's own process writes as it is told

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow's, the same one whenever the training goes on. MLFLOW_TRACKING_URI and
    MLFLOW_EXPERIMENT_NAME say where.
    """

    def __init__(self, run: TrackedRun):
        self._client = _import("mlflow").MlflowClient()
        experiment = self._experiment()
        known = self._client.search_runs([experiment], f"tags.recgpt_run = '{run.identity}'")
        if known:
            self._run_id = known[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        tags = {"recgpt_run": run.identity}
        self._run_id = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        for key, value in run.settings.items():
            self._client.log_param(self._run_id, key, value)

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "recgpt")
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)

    def restart(self, step: int) -> None:
        pass  # MLflow keeps every value with its step and time; a later one at the same step is the newest

    def record(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._run_id, name.replace("@", "_at_"), value, step=step)

    def flush(self) -> None:
        pass  # each value is sent at once

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


def open_trackers(folder: str, names: tuple[str, ...], settings: dict[str, Any]) -> list[Tracker]:
    """TensorBoard for a run in a local folder, and those of ``TRACKERS`` that are named.

    ``settings``: of the run, by dotted key.
    Raises ``UserError`` if one is not installed.
    """
    trackers: list[Tracker] = [TensorBoard(folder)] if storage.is_local(folder) else []
    if names:
        run = TrackedRun(folder.rstrip("/").rpartition("/")[2], _identity(folder), settings)
        trackers += [TRACKERS[name](run) for name in names]
    return trackers


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
