"""What a run writes down of itself."""

from types import SimpleNamespace

import pytest
import torch

from recgpt.training import recorder as recorder_module
from recgpt.training.recorder import Recorder
from recgpt.training.state import TrainingState


def test_the_share_of_waiting_is_of_the_time_since_the_last_line(monkeypatch, tmp_path):
    now = 0.0
    monkeypatch.setattr(recorder_module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(recorder_module, "LOG_EVERY_STEPS", 2)
    lines = []
    recorder = Recorder(str(tmp_path), lines.append, lambda metrics: None)

    def steps():
        nonlocal now
        for seconds in (3.0, 1.0, 0.5, 0.0):
            now += seconds
            yield seconds

    state = TrainingState("pretrain")
    for _ in recorder.waiting_for(steps()):
        now += 2.0
        state.step += 1
        recorder.step(state, torch.zeros(()), num_targets=1, rate=1e-3)
    assert [line["waiting_share"] for line in lines] == [pytest.approx(4 / 8), pytest.approx(0.5 / 4.5)]
