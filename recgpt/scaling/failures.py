"""How much of a training's time is work that lasts, where machines fail, and how often to write checkpoints.

Machines fail independently and without memory. A failure anywhere stops all: the training is started again
from the newest whole checkpoint. Formulas and sources: docs/projection.md. All times are in seconds.
"""

import math
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Failures:
    """What fails, and what that costs."""

    machine_mtbf_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Mean time between failures of one machine."""
    machines: Annotated[int, Field(gt=0)]
    pause_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Training stands still for each checkpoint."""
    write_seconds: _Seconds
    """From the pause's end until the checkpoint is whole, beside the training; until then the one before it
    is the newest."""
    restart_seconds: _Seconds
    """From a failure until the training goes on: noticed, machines replaced, checkpoint loaded."""

    @property
    def mtbf_seconds(self) -> float:
        """Mean time between two failures of any machine."""
        return self.machine_mtbf_seconds / self.machines


def best_interval_seconds(failures: Failures) -> float:
    """Time of training between two checkpoints with which the most of it lasts.

    The estimate of Daly 2006, which for pauses much shorter than the time between failures is Young's of
    1974, sqrt(2 x pause x MTBF). It is no shorter than a checkpoint takes to be written.
    """
    mtbf, pause = failures.mtbf_seconds, failures.pause_seconds
    ratio = pause / (2 * mtbf)
    if ratio >= 1:
        interval = mtbf
    else:
        interval = math.sqrt(2 * pause * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - pause
    return max(interval, failures.write_seconds)


def goodput(failures: Failures, interval_seconds: float) -> float:
    """Share of the time, 0 to 1, that is training which lasts, with checkpoints at this interval.

    The interval, in seconds of training, must be positive and no shorter than ``write_seconds``.
    """
    assert interval_seconds >= failures.write_seconds
    assert interval_seconds > 0
    mtbf = failures.mtbf_seconds
    segment = (interval_seconds + failures.pause_seconds) / mtbf
    after_failure = (failures.restart_seconds + failures.write_seconds) / mtbf
    # interval / (MTBF e^after (e^segment - 1)), in a form that does not overflow.
    return interval_seconds / mtbf * math.exp(-after_failure - segment) / -math.expm1(-segment)


def lost_seconds(failures: Failures, interval_seconds: float) -> float:
    """Time since the newest whole checkpoint at a failure, on average: what has to be done again."""
    mtbf = failures.mtbf_seconds
    segment = interval_seconds + failures.pause_seconds
    # A failure's time into its segment, given that it falls into one. Where a checkpoint was just written,
    # and not after a restart, the segment before is lost, too, until that checkpoint is whole.
    odds_of_none = math.exp(-segment / mtbf) / -math.expm1(-segment / mtbf)  # no failure in a segment
    into_segment = mtbf - segment * odds_of_none
    return into_segment - segment * odds_of_none * math.expm1(-failures.write_seconds / mtbf)
