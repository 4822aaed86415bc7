"""The training input: padding, packing, the stream through Ray Data, and what a training waits for it.

    python -m benchmarks.input_stream --json input_stream.json
    python -m benchmarks.input_stream --part packing --part waiting

Lengths of histories are Beauty's, or those of a made-up log where that file is not. Linux only.
"""

import enum
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.common import MIB, machine, print_table, run_verb, write_json
from benchmarks.full_cross_entropy import BEAUTY
from benchmarks.process_tree import PeakMemory, adopt_orphans, kill_descendants
from ray_jobs.runtime import OBJECT_STORE_BYTES
from recgpt.data import synthetic
from recgpt.scaling.made_up_histories import training_lengths, write_dataset
from recgpt.scaling.ranks import run_ranks
from recgpt.schema import ITEM_ID, USER_ID
from recgpt.training.recorder import LOG_EVERY_STEPS
from recgpt.training.run_folder import METRICS_FILE


class Part(str, enum.Enum):
    """What can be measured on its own."""

    attention = "attention"
    packing = "packing"
    stream = "stream"
    waiting = "waiting"
    larger_than_memory = "larger_than_memory"


@dataclass(frozen=True)
class Size:
    """How much is measured; the tests measure less."""

    attention_tokens: tuple[int, ...] = (256, 512, 2048, 8192)
    """Of a batch."""
    attention_repetitions: int = 30
    packing: tuple[tuple[int, int], ...] = ((128, 4), (128, 2), (2048, 4))
    """Tokens per lane, lanes: 512 tokens for one worker, its half for one of two, 8,192 for one."""
    rounds: int = 5
    """Of packing."""
    stream_users: int = 1_000_000
    stream_tokens: int = 8192
    epochs: int = 4
    """Of the training that waits."""
    large_users: int = 3_000_000
    large_length: int = 40
    """Items of a training history in the large dataset."""
    large_pause: float = 0.002
    """Seconds of a step while it is read: a reader that is ahead must wait and not fill the memory."""
    object_store_bytes: int = 200 * 10**6
    """While the large dataset is read."""


Result = list[dict[str, Any]]


def measure_attention(log: Path, size: Size) -> Result:
    """Tokens per second of the GPT's body, and shares of padding, for each form of attention."""
    result = []
    for tokens in size.attention_tokens:
        (forms,) = run_ranks(
            "benchmarks.input_ranks:attention_forms",
            world_size=1,
            log=str(log),
            tokens=tokens,
            repetitions=size.attention_repetitions,
        )
        for row in forms:
            rate = row["tokens"] / len(row["seconds"]) / statistics.median(row["seconds"])
            padding = 1 - row["tokens"] / row["positions"]
            result.append(
                {"batch": tokens, "form": row["form"], "tokens_per_second": rate, "padding": padding}
            )
    return result


def measure_packing(log: Path, size: Size) -> Result:
    """Tokens per second of packing alone."""
    result = []
    for tokens, lanes in size.packing:
        call = {"log": str(log), "tokens": tokens, "lanes": lanes, "rounds": size.rounds}
        (rates,) = run_ranks("benchmarks.input_ranks:packing", world_size=1, **call)
        result.append({"tokens": tokens, "lanes": lanes, **rates})
    return result


def measure_stream(log: Path, size: Size) -> Result:
    """Tokens per second through Ray Data and packing, when nothing else is to be done."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), size.stream_users, training_lengths(log))
        call = {"object_store_bytes": OBJECT_STORE_BYTES, "tokens": size.stream_tokens}
        (epoch,) = run_ranks("benchmarks.input_ranks:stream", world_size=1, dataset=dataset.url, **call)
    return [{"batch": size.stream_tokens, **_rates(epoch)}]


def measure_large(log: Path, size: Size) -> Result:
    """An epoch over a dataset that the object store cannot hold: is memory flat?"""
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), size.large_users, np.array([size.large_length]))
        call = {
            "dataset": dataset.url,
            "object_store_bytes": size.object_store_bytes,
            "tokens": size.stream_tokens,
            "pause": size.large_pause,
        }
        with PeakMemory() as memory:
            (epoch,) = run_ranks("benchmarks.input_ranks:stream", world_size=1, **call)
    quarters = [
        statistics.median(taken for time, taken in memory.samples if begun <= time <= ended)
        for begun, ended in itertools.pairwise(epoch["quarters"])
    ]
    return [
        {
            "histories_bytes": 4 * dataset.manifest.num_interactions + 8 * dataset.num_users,
            "object_store_bytes": size.object_store_bytes,
            "users": epoch["users"],
            "memory_bytes_by_quarter": quarters,
            "peak_bytes": memory.bytes,
            **_rates(epoch),
        }
    ]


def _rates(epoch: dict[str, Any]) -> dict[str, float]:
    seconds = epoch["quarters"][-1] - epoch["quarters"][0]
    return {
        "seconds_to_first": epoch["seconds_to_first"],
        "tokens": epoch["tokens"],
        "tokens_per_second": epoch["tokens"] / seconds,
    }


def measure_waiting(log: Path, size: Size) -> Result:
    """A training with the default settings on two workers: the share of the time it waits for data."""
    with tempfile.TemporaryDirectory() as folder:
        dataset, run = f"{folder}/dataset", f"{folder}/run"
        run_verb("prepare", "--input", str(log), "--output", dataset)
        settings = [f"pretrain.max_epochs={size.epochs}", f"validation.every_epochs={size.epochs}"]
        options = ["--workers", "2", "--stages", "pretrain", "--set", *settings]
        run_verb("train", "--dataset", dataset, "--output", run, *options)
        lines = [json.loads(line) for line in (Path(run) / METRICS_FILE).read_text().splitlines()]
    first, *others = [line for line in lines if line["kind"] == "train"]
    # Each line is about as many steps, so that its time is as 1 / its rate.
    seconds = [1 / line["targets_per_second"] for line in others]
    waited = [line["waiting_share"] * time for line, time in zip(others, seconds, strict=True)]
    return [
        {
            "steps": LOG_EVERY_STEPS * (1 + len(others)),
            "epochs": size.epochs,
            "first_steps": first["waiting_share"],
            "within_epochs": statistics.median(line["waiting_share"] for line in others),
            "with_starts_of_epochs": sum(waited) / sum(seconds),
            "targets_per_second": len(others) / sum(seconds),
        }
    ]


def print_attention(result: Result) -> None:
    print_table(
        "Forward and backward of the GPT (width 64, 2 layers) in one thread, by form of attention",
        ["form", "batch", "tokens/s", "/ by length", "padding in attention, %"],
        [
            [
                row["form"],
                f"{row['batch']:,}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['tokens_per_second'] / ours['tokens_per_second']:.2f}",
                f"{100 * row['padding']:.1f}",
            ]
            for row in result
            for ours in result
            if ours["form"] == "by length" and ours["batch"] == row["batch"]
        ],
        "CPU seconds, what a form prepares for a batch among them. All other layers compute tokens alone: "
        "their share of padding is 0.",
    )


def print_packing(result: Result) -> None:
    print_table(
        "Packing alone, from tables in memory to batches",
        ["tokens per lane", "lanes", "tokens of a step", "tokens/s per core"],
        [
            [
                f"{row['tokens']:,}",
                f"{row['lanes']}",
                f"{row['tokens_per_step']:,.0f}",
                f"{row['tokens_per_cpu_second']:,.0f}",
            ]
            for row in result
        ],
        "CPU seconds.",
    )


def print_stream(result: Result) -> None:
    print_table(
        "The stream through Ray Data into one worker that does nothing else",
        ["", "tokens", "seconds to the first step", "tokens/s"],
        [
            [
                f"batches of {row['batch']:,}",
                f"{row['tokens']:,}",
                f"{row['seconds_to_first']:.1f}",
                f"{row['tokens_per_second']:,.0f}",
            ]
            for row in result
        ],
    )


def print_waiting(result: Result) -> None:
    print_table(
        "Share of the time that a training waits for data: default settings, 2 workers",
        ["", "steps", "first steps, %", "within epochs, %", "starts of epochs included, %", "targets/s"],
        [
            [
                f"{row['epochs']} epochs",
                f"{row['steps']:,}",
                f"{100 * row['first_steps']:.1f}",
                f"{100 * row['within_epochs']:.2f}",
                f"{100 * row['with_starts_of_epochs']:.2f}",
                f"{row['targets_per_second']:,.0f}",
            ]
            for row in result
        ],
        f"first steps: the first {LOG_EVERY_STEPS} of the run, in which Ray Data starts; the others are "
        "of all further steps.",
    )


def print_large(result: Result) -> None:
    print_table(
        "One epoch over a dataset that is larger than the object store",
        ["", "object store, MiB", "memory by quarter, MiB", "last / first", "peak, MiB", "seconds"],
        [
            [
                f"{row['histories_bytes'] / MIB:,.0f} MiB of histories",
                f"{row['object_store_bytes'] / MIB:,.0f}",
                " ".join(f"{quarter / MIB:,.0f}" for quarter in row["memory_bytes_by_quarter"]),
                f"{row['memory_bytes_by_quarter'][-1] / row['memory_bytes_by_quarter'][0]:.2f}",
                f"{row['peak_bytes'] / MIB:,.0f}",
                f"{row['tokens'] / row['tokens_per_second']:.0f}",
            ]
            for row in result
        ],
        "Memory is that of the worker and all of Ray's processes together, the object store among it; median "
        "over a quarter of the epoch. The worker pauses after each step.",
    )


PARTS: dict[Part, tuple[Callable[[Path, Size], Result], Callable[[Result], None]]] = {
    Part.attention: (measure_attention, print_attention),
    Part.packing: (measure_packing, print_packing),
    Part.stream: (measure_stream, print_stream),
    Part.waiting: (measure_waiting, print_waiting),
    Part.larger_than_memory: (measure_large, print_large),
}


def write_log_like_beauty(folder: Path) -> Path:
    """A made-up log of about as many users, items and interactions, one line per user."""
    settings = synthetic.SyntheticSettings(num_users=22_363, num_items=12_101, mean_length=9)
    table = synthetic.interactions(settings).sort_by("timestamp")
    users = table.group_by(USER_ID, use_threads=False).aggregate([(ITEM_ID, "list")])
    lines = zip(users[USER_ID].to_pylist(), users[f"{ITEM_ID}_list"].to_pylist(), strict=True)
    log = folder / "alike.txt"
    log.write_text("".join(f"{user} {' '.join(map(str, items))}\n" for user, items in lines))
    return log


def main(
    parts: Annotated[list[Part] | None, typer.Option("--part", help="Only this; may be repeated.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Measure the training input."""
    adopt_orphans()
    result: dict[str, Any] = {"machine": machine()}
    try:
        with tempfile.TemporaryDirectory() as folder:
            log = BEAUTY if BEAUTY.is_file() else write_log_like_beauty(Path(folder))
            result["log"] = log.name
            for part in parts or list(Part):
                measure, show = PARTS[part]
                result[part.value] = measure(log, Size())
                show(result[part.value])
    finally:
        kill_descendants()
    if json_file:
        write_json(json_file, result)


if __name__ == "__main__":
    typer.run(main)
