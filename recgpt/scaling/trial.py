"""Some steps of a real training, without Ray: what they take on each rank, and where that goes.

Runs in a rank of ``recgpt.scaling.ranks.run_ranks``, or of `recgpt scale`.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import pyarrow as pa
import torch

from recgpt.config import TrainSettings
from recgpt.data.arrow import list_arrays
from recgpt.data.dataset import HistoryDataset
from recgpt.data.plan import ReadUnit, read_unit
from recgpt.data.sequences import resolve_time_bounds
from recgpt.distributed import collectives
from recgpt.errors import Stopped
from recgpt.model.flops import scored_items, training_flops
from recgpt.peak_memory import peak_memory
from recgpt.retrieval.recall_model import load_recall, model_for_dataset, resolve_recall
from recgpt.scaling.parts import PARTS, PartTimer, device_timer, parts_charged_to
from recgpt.schema import ITEM_INDICES, PADDING_INDEX, USER_HASH
from recgpt.settings_reading import from_dict
from recgpt.training import export
from recgpt.training.checkpoint_writer import Written
from recgpt.training.model import known_users
from recgpt.training.recorder import Recorder
from recgpt.training.state import TrainingState
from recgpt.training.step_figures import StepFigures, most_memory_held
from recgpt.training.trainer import train

Step = TypeVar("Step")


class _Enough(Exception):
    pass


class _Steps(Recorder):
    """Times each step from the moment its batch is asked for, and breaks off after enough of them.

    What happens between two steps, such as a validation, counts for neither.
    """

    def __init__(self, folder: str, warm_up: int, steps: int, go_on_to_checkpoint: bool):
        super().__init__(folder, lambda line: None, lambda metrics: None)
        self._warm_up, self._steps = warm_up, steps
        self._go_on_to_checkpoint = go_on_to_checkpoint
        self._taken = 0
        self.timer: PartTimer = device_timer()
        self.seconds: list[float] = []
        self.parts: dict[str, list[float]] = {part: [] for part in PARTS}
        self.tokens = 0
        self.flops = 0.0
        self.seconds_before: dict[str, float] = {}
        self.bytes_before: dict[str, int] = {}
        self.written: Written | None = None
        self.figures: dict[str, Any] = {}

    def begin(self, settings: TrainSettings, num_items: int) -> None:
        super().begin(settings, num_items)
        self._settings, self._num_items = settings, num_items

    def is_due(self, step: int) -> bool:
        return False  # no lines: what they take does not belong to a step

    def waiting_for(self, steps: Iterator[Step]) -> Iterator[Step]:
        waited = super().waiting_for(steps)
        while True:
            self.timer.restart()
            with self.timer.part("data_wait"):
                step = next(waited, None)
            if step is None:
                return
            yield step

    def step(self, state: TrainingState, figures: StepFigures) -> None:
        parts = self.timer.read()
        super().step(state, figures)
        self._taken += 1
        if self._taken <= self._warm_up:
            self.seconds_before, self.bytes_before = dict(collectives.seconds), dict(collectives.traffic)
            return
        self._count(figures, parts)
        if self.has_enough():
            self.figures = self._all_figures()
            if not self._go_on_to_checkpoint:
                raise _Enough

    def has_enough(self) -> bool:
        return len(self.seconds) >= self._steps

    def checkpoint(self, state: TrainingState, written: Written) -> None:
        self.written = written

    def _count(self, figures: StepFigures, parts: dict[str, float]) -> None:
        self.seconds.append(sum(parts.values()))
        for part, seconds in parts.items():
            self.parts[part].append(seconds)
        scored = scored_items(self._settings.loss, self._num_items, figures.num_targets)
        for batch in figures.batches:
            tokens, lengths = len(batch.item_index_T), batch.offsets.diff()
            pairs = float((lengths * (lengths + 1) / 2).sum())
            targets = int((batch.target_T != PADDING_INDEX).sum())
            self.tokens += tokens
            self.flops += training_flops(self._settings.model, tokens, pairs, targets, scored)

    def _all_figures(self) -> dict[str, Any]:
        """Of this rank, before a checkpoint or recall adds to them."""
        return {
            "seconds": self.seconds,
            "parts": self.parts,
            "communicated": {
                kind: value - self.seconds_before.get(kind, 0.0)
                for kind, value in collectives.seconds.items()
            },
            "bytes": {
                kind: value - self.bytes_before.get(kind, 0) for kind, value in collectives.traffic.items()
            },
            "tokens": self.tokens,
            "flops": self.flops,
            "memory_bytes": most_memory_held(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        }


def trial(
    dataset: str,
    settings: dict[str, Any],
    warm_up: int,
    steps: int,
    folder: str | None = None,
    recall_users: int = 0,
) -> dict[str, Any]:
    """Seconds of each step after the warm-up, and what this rank did in them.

    Args:
        folder: an empty place that all ranks reach: the training ends with a checkpoint in it. None: it just
            ends.
        recall_users: with ``folder``: rank 0 then makes candidates for so many users, or all if there are
            fewer, with the model as it stands.

    Returns ``seconds`` and ``parts`` (by name, see ``recgpt.scaling.parts``) of each step, from asking for
    its batch to its end; over all steps ``communicated`` seconds and ``bytes`` by kind of collective,
    ``tokens`` and ``flops`` (``recgpt.model.flops``); ``memory_bytes``, the most that the steps held (on the
    GPU, if there is one); ``base_memory_bytes``, before there was a model; ``device``. With ``folder`` also
    ``checkpoint``: its ``bytes``, ``pause_seconds`` and ``seconds``, the pause included; with
    ``recall_users``, on rank 0, ``recall_users_per_second``.
    Raises ``AssertionError`` if the dataset has not enough steps.
    """
    histories = HistoryDataset.open(dataset)
    train_settings = from_dict(TrainSettings, settings, "trial")
    bounds = resolve_time_bounds(train_settings.data.split, histories.manifest)
    base = peak_memory()

    def read_units(units: list[ReadUnit]) -> Any:
        return (read_unit(histories, unit, train_settings.data.split, bounds) for unit in units)

    with contextlib.ExitStack() as stack:
        run = folder or stack.enter_context(tempfile.TemporaryDirectory())
        recorder = _Steps(run, warm_up, steps, go_on_to_checkpoint=folder is not None)
        # The training stops as it does when someone asks it to: after a checkpoint.
        with contextlib.suppress(_Enough, Stopped), parts_charged_to(recorder.timer):
            train(train_settings, histories, run, read_units, recorder, stop_wanted=recorder.has_enough)
        if not recorder.figures:
            raise AssertionError(f"{dataset}: too few steps in all epochs to measure {warm_up} + {steps}")
        result = recorder.figures | {"base_memory_bytes": base, "device": _device()}
        if recorder.written is not None:
            result["checkpoint"] = _checkpoint_figures(recorder.written, train_settings)
            if recall_users and collectives.rank() == 0:
                model = _export(run, recorder.written.name, train_settings, histories)
                result["recall_users_per_second"] = _recall_speed(model, histories, recall_users)
        return result


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _checkpoint_figures(written: Written, settings: TrainSettings) -> dict[str, float]:
    beside = written.write_seconds if settings.checkpoint_in_background else 0.0
    return {
        "bytes": written.bytes,
        "pause_seconds": written.pause_seconds,
        "seconds": written.pause_seconds + beside,
    }


def _export(run: str, checkpoint: str, settings: TrainSettings, histories: HistoryDataset) -> str:
    users = known_users(histories) if settings.model.user.kind == "table" else None
    export.export_checkpoint(run, checkpoint, settings, histories, users)
    return run


def _recall_speed(model: str, histories: HistoryDataset, most_users: int) -> float:
    """Users per second of this process, reading and loading left out."""
    url, info = model_for_dataset(model, histories)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recall = load_recall(url, resolve_recall(info, None, None, keep_seen=False), device=device)
    users = _first_users(histories, most_users)
    items, offsets = list_arrays(users[ITEM_INDICES])
    arguments = (
        torch.from_numpy(items.astype("int64")),
        torch.from_numpy(offsets),
        torch.from_numpy(users[USER_HASH].to_numpy().copy()),
    )
    begun = time.perf_counter()
    recall.recommend(*arguments)
    return len(users) / (time.perf_counter() - begun)


def _first_users(histories: HistoryDataset, most: int) -> pa.Table:
    tables, left = [], most
    for group in histories.row_groups:
        tables.append(histories.read_row_group(group, [ITEM_INDICES, USER_HASH]).slice(0, left))
        left -= len(tables[-1])
        if not left:
            break
    return pa.concat_tables(tables).combine_chunks()
