"""The learning rate of a step."""

from types import SimpleNamespace

import pytest

from recgpt.config import OptimizerSettings, StageSettings
from recgpt.training.state import TrainingState
from recgpt.training.trainer import Trainer


def rate(decay, stage_step, epochs_before_step):
    """Of a stage of 4 epochs with 2 steps of warm-up and a peak of 8."""
    stage = StageSettings(max_epochs=4, optimizer=OptimizerSettings(warmup_steps=2, decay=decay))
    state = TrainingState("pretrain", stage_step=stage_step)
    trainer = SimpleNamespace(_stage_settings=stage, state=state, epochs_before_step=epochs_before_step)
    return Trainer._scheduled(trainer, 8.0)


@pytest.mark.parametrize(
    ("stage_step", "epochs_before_step", "linear", "constant"),
    [
        (0, 0.0, 4.0, 4.0),  # half of the warm-up
        (1, 0.5, 7.0, 8.0),
        (9, 2.0, 4.0, 8.0),
        (99, 3.75, 0.5, 8.0),  # the last step of the stage still moves
    ],
)
def test_the_rate_warms_up_and_falls_in_a_line(stage_step, epochs_before_step, linear, constant):
    assert rate("linear", stage_step, epochs_before_step) == linear
    assert rate("constant", stage_step, epochs_before_step) == constant
