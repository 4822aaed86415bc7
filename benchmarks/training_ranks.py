"""What the process of a training benchmark does: the trainer's own steps; the loss and its products."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.stopwatch import Stopwatch
from recgpt.config import TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.plan import read_unit
from recgpt.model.losses import blocks, softmax_loss_sum
from recgpt.settings_reading import from_dict
from recgpt.training.recorder import Recorder
from recgpt.training.step_figures import StepFigures
from recgpt.training.trainer import train

WARM_UP_STEPS = 20


class _Enough(Exception):
    pass


def training_steps(dataset: str, settings: dict[str, Any], seconds: float) -> list[tuple[int, float, float]]:
    """Targets, seconds and CPU seconds of each step of ``recgpt.training.trainer.train``."""
    history_dataset = HistoryDataset.open(dataset)
    train_settings = from_dict(TrainSettings, settings, "benchmark")
    stopwatch = Stopwatch(seconds)

    class StepTimes(Recorder):
        def step(self, state: Any, figures: StepFigures) -> None:
            super().step(state, figures)
            if state.step >= WARM_UP_STEPS and stopwatch.step(figures.num_targets):
                raise _Enough

    def read_units(units: list[Any]) -> Any:
        return (read_unit(history_dataset, unit, train_settings.data.split, None) for unit in units)

    with tempfile.TemporaryDirectory() as folder:
        recorder = StepTimes(folder, lambda line: None, lambda metrics: None)
        try:
            train(train_settings, history_dataset, folder, read_units, recorder)
        except _Enough:
            return stopwatch.steps
    raise AssertionError("the training ended before there was enough to measure")


def loss_and_products(
    targets: int, num_items: int, width: int, repetitions: int, precision: str
) -> dict[str, float]:
    """Median CPU seconds of the loss with gradients, and of its products alone in the best of blocks."""
    torch.set_float32_matmul_precision(precision)
    generator = torch.Generator().manual_seed(0)
    interest = torch.randn(targets, width, generator=generator).requires_grad_()
    table = torch.randn(num_items + 1, width, generator=generator).requires_grad_()
    target = torch.randint(1, num_items + 1, (targets,), generator=generator)

    def loss() -> None:
        interest.grad = table.grad = None
        softmax_loss_sum(interest, table, target, 1024, first=1).backward()

    sizes = itertools.product({min(targets, 512), targets}, (240, 1008, num_items))
    products = [_products(interest.detach(), table.detach(), *size) for size in sizes]
    seconds: list[list[float]] = [[] for _ in range(1 + len(products))]
    for _ in range(1 + repetitions):
        for taken, call in zip(seconds, [loss, *products], strict=True):
            start = time.process_time()
            call()
            taken.append(time.process_time() - start)
    loss_seconds, *product_seconds = (statistics.median(taken[1:]) for taken in seconds)
    return {"loss_seconds": loss_seconds, "products_seconds": min(product_seconds)}


def _products(
    interest_TD: Tensor, table_RD: Tensor, targets_at_a_time: int, items_at_a_time: int
) -> Callable[[], None]:
    """Scores, and from something of their shape both gradients, into memory that is there already."""
    buffer = torch.rand(targets_at_a_time * items_at_a_time)
    interest_gradient_TD, table_gradient_RD = torch.zeros_like(interest_TD), torch.zeros_like(table_RD)

    def run() -> None:
        for low, high in blocks(0, len(interest_TD), targets_at_a_time):
            some_AD = interest_TD[low:high]
            for start, end in blocks(1, len(table_RD), items_at_a_time):
                scores_AM = buffer[: (high - low) * (end - start)].view(high - low, end - start)
                torch.mm(some_AD, table_RD[start:end].T, out=scores_AM)
                interest_gradient_TD[low:high].addmm_(scores_AM, table_RD[start:end])
                table_gradient_RD[start:end].addmm_(scores_AM.T, some_AD)

    return run
