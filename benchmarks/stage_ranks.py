"""What the process of the benchmark of both training stages does; ``benchmarks.training_speed`` starts it.

Shapes: T tokens of B histories laid end to end, D width, P excluded pairs.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recgpt.config import PromptSettings, TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.packing import PackedBatch
from recgpt.data.plan import ReadUnit, read_unit
from recgpt.model.attention import Layout
from recgpt.model.scoring import ExcludedPairs
from recgpt.scaling.workload import steps_of_one_worker
from recgpt.settings_reading import from_dict
from recgpt.training.engine import DenseEngine, init_process_group, read_deepspeed_config
from recgpt.training.model import NextItemModel, TrainingBatch, build_model
from recgpt.training.prompts import plain_batch, prefix_pairs, prompted_batch
from recgpt.training.recorder import Recorder
from recgpt.training.step_figures import StepFigures
from recgpt.training.trainer import train

CPU = torch.device("cpu")
WARM_UP_STEPS = 3
# Ways to take a step.
PLAIN = "pre-training"
PROMPTED = "prompt-tuning"
INTERLEAVED = "prompt-tuning, all histories interleaved"
EVERY_POSITION = "a forward pass for every position"


def epochs(dataset: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each epoch of a whole training: stage, sequences, targets, seconds and CPU seconds of its steps."""
    history_dataset = HistoryDataset.open(dataset)
    train_settings = from_dict(TrainSettings, settings, "benchmark")
    measured: list[dict[str, Any]] = []

    class EpochTimes(Recorder):
        def waiting_for(self, steps: Iterator[Any]) -> Iterator[Any]:
            measured.append({"targets": 0})
            self.begun = time.perf_counter(), time.process_time()
            return super().waiting_for(steps)

        def step(self, state: Any, figures: StepFigures) -> None:
            super().step(state, figures)
            epoch = measured[-1]
            epoch["stage"] = state.stage
            epoch["sequences"] = sum(state.consumed)
            epoch["targets"] += figures.num_targets
            epoch["seconds"] = time.perf_counter() - self.begun[0]
            epoch["cpu_seconds"] = time.process_time() - self.begun[1]

    def read_units(units: list[ReadUnit]) -> Any:
        return (read_unit(history_dataset, unit, train_settings.data.split, None) for unit in units)

    with tempfile.TemporaryDirectory() as folder:
        recorder = EpochTimes(folder, lambda line: None, lambda metrics: None)
        train(train_settings, history_dataset, folder, read_units, recorder)
    return measured


def steps_in_turns(dataset: str, settings: dict[str, Any], batches: int) -> list[dict[str, Any]]:
    """CPU seconds of a step in each way, on the same batches; the longest history of each."""
    init_process_group()
    history_dataset = HistoryDataset.open(dataset)
    train_settings = from_dict(TrainSettings, settings, "benchmark")
    turns = Turns(train_settings, history_dataset)
    steps = list(
        itertools.islice(steps_of_one_worker(history_dataset, train_settings), WARM_UP_STEPS + batches)
    )
    return [turns.take(step.batch) for step in steps][WARM_UP_STEPS:]


class Turns:
    """A model under DeepSpeed that takes each batch in every way, one after the other."""

    def __init__(self, settings: TrainSettings, dataset: HistoryDataset):
        self.settings = settings
        model = build_model(settings, dataset, CPU)
        assert not model.sharded_tables(), "the engine trains all there is"
        optimizer = settings.prompt_tune.optimizer
        self.learning_rate = optimizer.learning_rate
        self.engine = DenseEngine(model, optimizer, read_deepspeed_config(settings.deepspeed))
        interleaved = replace(settings.prompts, interleaved_share=1.0, last_share=0.0)
        self.ways: dict[str, Callable[[TrainingBatch, Tensor], None]] = {
            PLAIN: lambda plain, user_hash_B: self._step(plain),
            PROMPTED: lambda plain, user_hash_B: self._prompted(plain, user_hash_B, settings.prompts),
            INTERLEAVED: lambda plain, user_hash_B: self._prompted(plain, user_hash_B, interleaved),
            EVERY_POSITION: lambda plain, user_hash_B: self._every_position(plain),
        }

    def take(self, packed: PackedBatch) -> dict[str, Any]:
        with self.engine.readable() as model:
            plain = plain_batch(model, packed, self.settings, 0, CPU)
        seconds = {}
        for name, way in self.ways.items():
            begun = time.process_time()
            way(plain, packed.user_hash_B)
            seconds[name] = time.process_time() - begun
        return {"longest": int(plain.offsets.diff().max()), "cpu_seconds": seconds}

    def _step(self, batch: TrainingBatch) -> None:
        num_targets = int((batch.target_T != 0).sum())
        self.engine.backward(self.engine(batch) / num_targets)
        self.engine.step(self.learning_rate)

    def _prompted(self, plain: TrainingBatch, user_hash_B: Tensor, prompts: PromptSettings) -> None:
        with self.engine.readable() as model:
            batch = prompted_batch(model, plain, user_hash_B, prompts, (self.settings.seed, 0))
        self._step(batch)

    def _every_position(self, plain: TrainingBatch) -> None:
        with self.engine.readable() as model:
            pass_for_every_position(model, plain)
        self._step(plain)


@torch.no_grad()
def pass_for_every_position(model: NextItemModel, batch: TrainingBatch) -> Tensor:
    """What the model generates after each position, int64 [T], by one pass over the batch for each of them.

    The authors' cost, at its least: no padding, one token for a guess.
    """
    layout = Layout.from_offsets(batch.offsets)
    pairs = prefix_pairs(batch.item_index_T, layout)
    generated_T = torch.empty_like(batch.item_index_T)
    for position in range(int(batch.offsets.diff().max())):
        interest_TD = model.interest(batch, layout)
        here_T = layout.position == position
        here_P = here_T[pairs.token_P]
        place_T = here_T.cumsum(0) - 1
        excluded = ExcludedPairs(place_T[pairs.token_P[here_P]], pairs.item_P[here_P])
        generated_T[here_T] = model.item_table.best_item(interest_TD[here_T], excluded)
    return generated_T
