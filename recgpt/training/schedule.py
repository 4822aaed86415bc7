"""The learning rate over a stage."""

from recgpt.config import StageSettings


def share_of_peak(stage: StageSettings, steps: int, epochs: float) -> float:
    """Of the peak learning rate, what a step takes after ``steps`` steps and ``epochs`` epochs of its stage.

    Rises in a line over the warm-up; ``decay=linear`` falls, from the stage's start, to 0 at ``max_epochs``.
    """
    warmed_up = min(1.0, (steps + 1) / max(stage.optimizer.warmup_steps, 1))
    if stage.optimizer.decay == "constant":
        return warmed_up
    return warmed_up * (1 - epochs / stage.max_epochs)
