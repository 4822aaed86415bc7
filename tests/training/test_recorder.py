"""What a run writes down of itself."""

from types import SimpleNamespace

import pytest
import torch

from recgpt.config import LossSettings, ModelSettings, TrainSettings
from recgpt.training import recorder as recorder_module
from recgpt.training import step_figures
from recgpt.training.model import TrainingBatch
from recgpt.training.recorder import Recorder
from recgpt.training.state import TrainingState
from recgpt.training.step_figures import StepFigures


def figures_of(*lengths: int, loss: float = 0.0, items: list[int] | None = None) -> StepFigures:
    """A step over histories of these lengths, in which every token has a target."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    item_T = torch.tensor(items or [1] * int(offsets[-1]))
    nothing = torch.zeros_like(item_T)
    batch = TrainingBatch(item_T, item_T, nothing, nothing, offsets, torch.zeros(len(lengths)))
    return StepFigures(
        torch.tensor(loss),
        [batch],
        num_targets=len(item_T),
        num_users=len(lengths),
        learning_rate=1e-3,
        table_learning_rate=None,
        gradient_norm=0.5,
        table_gradient_norm=None,
    )


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that is moved by hand, and a line after every second step."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(recorder_module, "time", clock)
    monkeypatch.setattr(step_figures, "time", clock)
    monkeypatch.setattr(recorder_module, "LOG_EVERY_STEPS", 2)
    return clock


@pytest.fixture
def recorder(clock, tmp_path) -> Recorder:
    recorder = Recorder(str(tmp_path), lambda line: None, lambda metrics: None)
    settings = TrainSettings(
        model=ModelSettings(width=2, members=1, heads=1, layers=1), loss=LossSettings(kind="full")
    )
    recorder.begin(settings, num_items=10)
    recorder.restart(0)
    recorder.lines = []
    recorder._report = recorder.lines.append
    return recorder


def test_the_share_of_waiting_is_of_the_time_since_the_last_line(clock, recorder):
    def steps():
        for seconds in (3.0, 1.0, 0.5, 0.0):
            clock.now += seconds
            yield seconds

    state = TrainingState("pretrain")
    for _ in recorder.waiting_for(steps()):
        clock.now += 2.0
        state.step += 1
        recorder.step(state, figures_of(1))
    shares = [line["waiting_share"] for line in recorder.lines]
    assert shares == [pytest.approx(4 / 8), pytest.approx(0.5 / 4.5)]


def test_a_line_tells_of_all_steps_since_the_last_one(clock, recorder):
    state = TrainingState("pretrain")
    for figures in (figures_of(3, 1, loss=8.0), figures_of(2, loss=4.0, items=[7, 8])):
        clock.now += 5.0
        state.step += 1
        recorder.step(state, figures)
    (line,) = recorder.lines
    assert line["loss"] == pytest.approx(12 / 6)
    assert line["targets_per_second"] == line["tokens_per_second"] == pytest.approx(6 / 10)
    assert line["sequences_per_second"] == pytest.approx(3 / 10)
    assert line["distinct_item_share"] == 1.0  # of the last step: two items in two tokens
    assert (line["learning_rate"], line["gradient_norm"]) == (1e-3, 0.5)
    assert line["communication_share"] == line["bytes_per_step"] == 0.0, "one rank sends nothing"
    assert line["memory_bytes"] > 10_000_000
    # Width 2: each token meets 12 x 2^2 weights; 6 + 1 + 3 pairs attend, two products of 2 values each;
    # 6 targets score 10 items. Two operations each, and three times for forward and backward.
    assert line["flops_per_second"] == pytest.approx(3 * 2 * (48 * 6 + 2 * 2 * 10 + 2 * 6 * 10) / 10)
    assert "table_gradient_norm" not in line, "there is no sharded table"
    assert "model_flops_utilization" not in line, "a CPU's most is not known"


def test_every_figure_goes_to_tensorboard_and_a_line_to_the_log(clock, recorder, tmp_path):
    from recgpt.training.rank_log import rank_log

    state = TrainingState("pretrain", step=2)
    with rank_log(str(tmp_path), 0):
        clock.now += 1
        recorder.step(state, figures_of(2, loss=3.0))
        recorder.warn("beware")
    recorder.flush()
    recorder.close(finished=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(name in content for name in (b"train/loss", b"train/gradient_norm", b"train/memory_bytes"))
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "pretrain, epoch 0, step 2" in log
    assert "beware" in log


def test_the_end_of_an_epoch_leaves_no_step_uncounted(clock, recorder):
    state = TrainingState("pretrain")
    for _ in range(3):
        clock.now += 5.0
        state.step += 1
        recorder.step(state, figures_of(2, loss=1.0))
    recorder.end_interval(state)
    recorder.end_interval(state)
    assert [(line["step"], line["seconds"]) for line in recorder.lines] == [(2, 10.0), (3, 5.0)]


def test_a_tracker_that_fails_is_told_no_more_and_the_training_goes_on(clock, recorder):
    told = []

    class Fails:
        def record(self, figures, step):
            told.append(step)
            raise ConnectionError("away")

        def close(self, finished):
            told.append(finished)

    recorder._trackers = [Fails()]
    state = TrainingState("pretrain")
    for _ in range(4):
        state.step += 1
        clock.now += 1.0
        recorder.step(state, figures_of(2))
    recorder.close(finished=True)
    assert told == [2]
    warnings = [line["text"] for line in recorder.lines if line["kind"] == "warning"]
    assert warnings == ["Fails is told no more: ConnectionError: away"]
