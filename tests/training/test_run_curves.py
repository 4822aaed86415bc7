"""The curves of a run, and how long its steps took, from lines of metrics.jsonl written by hand."""

import pytest

from recgpt.training import run_curves
from recgpt.training.run_curves import further_curves, main_curves, training_seconds


def train(step, stage="pretrain", **figures):
    return {"kind": "train", "stage": stage, "epoch": 0, "step": step, "users": 7, **figures}


def validation(epoch, stage="pretrain", **metrics):
    return {
        "kind": "validation",
        "stage": stage,
        "epoch": epoch,
        "step": 10 * epoch,
        "num_users": 5.0,
        **metrics,
    }


def words(plot):
    """What a screen reader reads of a plot."""
    return plot.svg.split("<desc>")[1].split("</desc>")[0]


def test_each_stage_has_its_curve():
    lines = [train(20, loss=7.5), train(40, loss=6.0), train(60, "prompt_tune", loss=5.5)]
    loss = main_curves(lines)[0]
    assert loss.title == "Training loss"
    assert words(loss) == (
        "pre-training: 7.5 at step 20, 6 at step 40; prompt-tuning: 5.5 at step 60, 5.5 at step 60"
    )


def test_epochs_of_the_second_stage_follow_those_of_the_first():
    lines = [
        validation(1, **{"ndcg@5": 0.1, "ndcg@10": 0.2, "hit_rate@10": 0.3, "best": 0.2}),
        validation(3, **{"ndcg@5": 0.2, "ndcg@10": 0.4, "hit_rate@10": 0.5, "best": 0.4}),
        validation(1, "prompt_tune", **{"ndcg@5": 0.3, "ndcg@10": 0.5, "hit_rate@10": 0.6, "best": 0.5}),
    ]
    plots = {plot.title: plot for plot in main_curves(lines)}
    ndcg = plots["NDCG on validation"]
    assert words(ndcg) == "@5: 0.1 at epoch 1, 0.3 at epoch 4; @10: 0.2 at epoch 1, 0.5 at epoch 4"
    assert ndcg.note == "One step, over all items. Right of the line: prompt-tuning."
    assert words(plots["Hit rate on validation"]) == "@10: 0.3 at epoch 1, 0.6 at epoch 4"


def test_any_other_number_has_a_curve_under_its_name():
    lines = [train(20, loss=1.0, memory_bytes=3_000_000, text="x", flag=True, gradient_norm=float("nan"))]
    (memory,) = further_curves(lines)
    assert memory.title == "Memory bytes"
    assert words(memory) == "pre-training: 3e+06 at step 20, 3e+06 at step 20"


def test_what_is_not_there_is_said():
    plots = main_curves([train(20, loss=float("inf"))])
    assert [plot.svg for plot in plots] == [None] * 6
    assert plots[0].note == "Not shown: the run has not written it."
    assert plots[1].note == "Not shown: the run has not been validated yet."
    assert further_curves([]) == []


def test_many_points_are_drawn_by_their_means(monkeypatch):
    monkeypatch.setattr(run_curves, "_MOST_POINTS", 2)
    lines = [train(step, loss=float(step)) for step in (10, 20, 30, 40, 50)]
    loss = main_curves(lines)[0]
    assert words(loss) == "pre-training: 20 at step 20, 45 at step 45"
    assert loss.note.endswith("Means of 3 points each.")


def test_time_of_the_steps():
    lines = [train(20, seconds=40.0), validation(3), train(40, seconds=80.5), validation(5)]
    assert training_seconds(lines) == 120.5


@pytest.mark.parametrize("lines", [[], [validation(1)], [train(20)], [train(20, seconds="soon")]])
def test_time_is_unknown_before_the_first_line(lines):
    assert training_seconds(lines) is None
