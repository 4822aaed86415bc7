"""The figures of a training in Ray's metrics, which Prometheus reads; docs/grafana.json shows them."""

import re
from typing import Any

PREFIX = "recgpt_"
KINDS = ("train", "validation", "checkpoint")


def gauge_name(kind: str, figure: str) -> str:
    """Such as ``recgpt_validation_ndcg_at_10``; Ray exports it with ``ray_`` before it."""
    return PREFIX + re.sub(r"\W", "_", f"{kind}_{figure}".replace("@", "_at_"))


class TrainGauges:
    """Sets gauges to the newest figures of a run; in a process of Ray's."""

    def __init__(self, run: str):
        self._run = run
        self._gauges: dict[str, Any] = {}

    def show(self, line: dict[str, Any]) -> None:
        """A line as it goes to metrics.jsonl; lines of other kinds are left out."""
        if line["kind"] not in KINDS:
            return
        tags = {"run": self._run, "stage": line["stage"]}
        for name, value in line.items():
            if isinstance(value, int | float):
                self._gauge(gauge_name(line["kind"], name)).set(value, tags)

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(name, "A figure of recgpt train", tag_keys=("run", "stage"))
        return self._gauges[name]
