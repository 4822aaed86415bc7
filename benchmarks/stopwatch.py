"""Times of training steps, taken alike on both sides of a comparison; needs nothing installed."""

import time


class Stopwatch:
    """Notes targets, seconds and CPU seconds of each step.

    CPU seconds show whether the machine was busy with other things: on an idle one they are the same for
    a process with one thread.
    """

    def __init__(self, seconds: float, least_steps: int = 4):
        self.steps: list[tuple[int, float, float]] = []
        self._seconds = seconds
        self._least_steps = least_steps
        self._since: tuple[float, float] | None = None

    def step(self, targets: int) -> bool:
        """Count a step, from the end of the one before; whether it is enough. The first is a warm-up."""
        now = time.perf_counter(), time.process_time()
        if self._since is not None:
            self.steps.append((targets, now[0] - self._since[0], now[1] - self._since[1]))
        self._since = now
        enough = sum(seconds for _, seconds, _ in self.steps) >= self._seconds
        return enough and len(self.steps) >= self._least_steps
