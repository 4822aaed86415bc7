"""Steps whose loss or gradient is NaN or infinite: left out, or the end of the run."""

from typing import Literal

from recgpt.errors import UserError
from recgpt.training.recorder import Recorder
from recgpt.training.state import TrainingState

MOST_IN_A_ROW = 10  # a model that gives no finite loss for so long will not come round


class BadSteps:
    """Notes the steps that were left out. Collective in that every rank leaves out the same ones."""

    def __init__(self, policy: Literal["stop", "skip"], recorder: Recorder):
        self._policy = policy
        self._recorder = recorder
        self._in_a_row = 0

    def good(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def left_out(self, state: TrainingState, consumed_before: list[int]) -> None:
        """A step was not. Raises ``UserError`` if the policy is to stop, or if it was one of too many.

        Args:
            consumed_before: users read in this epoch before the step, by lane.
        """
        self._in_a_row += 1
        after = zip(consumed_before, state.consumed, strict=True)
        lanes = {lane: (old, new - old) for lane, (old, new) in enumerate(after) if new > old}
        self._recorder.left_out(state, lanes)
        users = ", ".join(
            f"{count} from user {first} of lane {lane}" for lane, (first, count) in lanes.items()
        )
        text = (
            f"the loss or a gradient is not finite at step {state.step} of the run ({state.stage}, "
            f"epoch {state.epoch + 1}; histories: {users})"
        )
        if self._policy == "stop" or self._in_a_row >= MOST_IN_A_ROW:
            raise UserError(
                f"training diverged: {text}; lower {state.stage}.optimizer.learning_rate and begin again "
                "with --restart, or go on from the last checkpoint with --set not_finite=skip"
            )
        self._recorder.warn(f"a step was left out: {text}")
