"""Recall: beside the authors' algorithm, its own floor, one actor, and a thousandth of the users.

    python -m benchmarks.recall --json recall.json
    python -m benchmarks.recall --part published --part floor

Models are made up and not trained: how fast they are does not depend on that. Histories are Beauty's, or made
up with lengths like Beauty's. Linux only.
"""

import enum
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import MIB, environment, machine, print_table, run_verb, write_json
from benchmarks.full_cross_entropy import BEAUTY
from benchmarks.input_stream import write_log_like_beauty
from benchmarks.made_up_model import MODEL, write_model
from benchmarks.prepare import run
from benchmarks.process_tree import adopt_orphans, kill_descendants
from benchmarks.recall_ranks import LAST_POSITION, PUBLISHED, RECGPT
from recgpt.scaling.made_up_histories import training_lengths, write_dataset
from recgpt.scaling.ranks import run_ranks

FAISS = (["torch==2.13.0"], ["faiss-cpu==1.15.1"])
ALONE = "a plain loop"
THREADS = 2  # of each side of `published`, in one process
FLOOR_THREADS = 1  # as an actor has


class Part(str, enum.Enum):
    """What can be measured on its own."""

    published = "published"
    floor = "floor"
    actors = "actors"
    memory = "memory"


@dataclass(frozen=True)
class Catalogue:
    """How often the floor is measured for one number of items."""

    items: int
    batches: int
    """Of users, in a turn."""
    turns: int
    """Of each side, in a round."""


@dataclass(frozen=True)
class Size:
    """How much is measured; the tests measure less."""

    published_users: int = 1024
    """In a turn: as many as an actor hands over at once."""
    published_turns: int = 10
    catalogues: tuple[Catalogue, ...] = (
        Catalogue(12_000, batches=16, turns=10),
        Catalogue(1_000_000, batches=1, turns=5),
        Catalogue(10_000_000, batches=1, turns=1),
    )
    quotas: tuple[int, ...] = (90, 10)
    batch_users: int = 256
    history: int = 10
    blocks: tuple[int, ...] = (4096, 16_384, 65_536)
    """Items that the products alone take at a time."""
    faiss_blocks: tuple[int, ...] = (16_384, 65_536)
    """The same for faiss."""
    floor_rounds: int = 2
    actor_users: int = 200_000
    actors: tuple[int, ...] = (1, 2)
    actor_rounds: int = 2
    memory_users: tuple[int, ...] = (10_000, 100_000, 1_000_000, 5_000_000)
    memory_items: int = 2000
    memory_actors: int = 2


Result = list[dict[str, Any]]
Seconds = Mapping[str, Sequence[float]]


def measure_published(log: Path, size: Size) -> Result:
    """Users per second by the authors' algorithm, plain and with needless scores left out, and by ours."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = f"{folder}/dataset"
        run_verb("prepare", "--input", str(log), "--output", dataset)
        (found,) = run_ranks(
            "benchmarks.recall_ranks:published",
            world_size=1,
            threads=THREADS,
            dataset=dataset,
            users=size.published_users,
            turns=size.published_turns,
        )
    rates = users_per_second(found["seconds"], size.published_users)
    return [
        {
            "side": side,
            "users_per_second": rates[side],
            "ratio": rates[RECGPT] / rates[side],
            "same_items": found["same_items"],
        }
        for side in (RECGPT, LAST_POSITION, PUBLISHED)
    ]


def measure_floor(log: Path, size: Size) -> Result:
    """Users per second of recall, and of the products and top-k in it by themselves."""
    python = environment("faiss", *FAISS)
    result = []
    for catalogue in size.catalogues:
        work = {"num_items": catalogue.items, "quotas": size.quotas, "batch_users": size.batch_users}
        work |= {"batches": catalogue.batches, "turns": catalogue.turns}
        ours = {"history": size.history, "blocks": size.blocks}
        theirs = {"width": MODEL.width, "blocks": size.faiss_blocks}
        seconds: dict[str, list[float]] = {}
        for _ in range(size.floor_rounds):
            (taken,) = run_ranks(
                "benchmarks.recall_ranks:recall_and_products",
                world_size=1,
                threads=FLOOR_THREADS,
                **work,
                **ours,
            )
            (by_faiss,) = run_ranks(
                "benchmarks.yardsticks.exact_search:faiss_seconds", python, 1, FLOOR_THREADS, **work, **theirs
            )
            for side, some in (taken | by_faiss).items():
                seconds.setdefault(side, []).extend(some)
        rates = users_per_second(seconds, catalogue.batches * size.batch_users)
        result += [
            {
                "items": catalogue.items,
                "side": side,
                "users_per_second": rate,
                "share_of_floor": rates[RECGPT] / rate,
            }
            for side, rate in rates.items()
        ]
    return result


def users_per_second(seconds: Seconds, users: int) -> dict[str, float]:
    """Of each side, by its median turn of so many users."""
    return {side: users / statistics.median(taken) for side, taken in seconds.items()}


def measure_actors(log: Path, size: Size) -> Result:
    """Users per second of the same job by a worker in a plain loop, and by numbers of actors."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = write_dataset(_made(folder / "dataset"), size.actor_users, training_lengths(log))
        write_model(f"{folder}/model", dataset)
        sides = {0: ALONE} | {actors: f"{actors} actor{'s' * (actors > 1)}" for actors in size.actors}
        rates: dict[str, list[float]] = {side: [] for side in sides.values()}
        for number in range(size.actor_rounds):
            for actors, side in sides.items():
                work = {"dataset": dataset.url, "model": f"{folder}/model"}
                work |= {"output": f"{folder}/{actors}-{number}", "actors": actors}
                rates[side] += run_ranks("benchmarks.recall_ranks:job_rate", world_size=1, **work)
    medians = {side: statistics.median(taken) for side, taken in rates.items()}
    return [
        {"side": side, "users_per_second": rate, "ratio_to_loop": rate / medians[ALONE]}
        for side, rate in medians.items()
    ]


def measure_memory(log: Path, size: Size) -> Result:
    """The most memory that all processes of `recgpt generate` take together, for numbers of users."""
    result = []
    for users in size.memory_users:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            lengths, items = training_lengths(log), size.memory_items
            dataset = write_dataset(_made(folder / "dataset"), users, lengths, num_items=items)
            write_model(f"{folder}/model", dataset)
            command = [sys.executable, "-m", "ray_jobs.cli", "generate", "--model", f"{folder}/model"]
            command += ["--dataset", dataset.url, "--output", f"{folder}/candidates"]
            seconds, peak_bytes = run([*command, "--actors", str(size.memory_actors)])
        result.append({"users": users, "seconds": seconds, "peak_bytes": peak_bytes})
    return result


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def print_published(result: Result) -> None:
    print_table(
        f"Two steps (18 + 2) of recall, {THREADS} threads",
        ["", "users/s", "RecGPT / it"],
        [[row["side"], f"{row['users_per_second']:,.0f}", f"{row['ratio']:.1f}"] for row in result],
        f"Of the candidates that RecGPT finds, the published algorithm finds {result[0]['same_items']:.1%}.\n"
        "Goal: 30 times the users of the published algorithm.",
    )


def print_floor(result: Result) -> None:
    print_table(
        f"Recall, and the products and top-k in it by themselves; {FLOOR_THREADS} thread",
        ["side", "items", "users/s", "RecGPT / it"],
        [
            [
                row["side"],
                f"{row['items']:,}",
                f"{row['users_per_second']:,.1f}",
                f"{row['share_of_floor']:.2f}",
            ]
            for row in result
        ],
        "Goal: 0.70 of the fastest at each number of items.",
    )


def print_actors(result: Result) -> None:
    rates = {row["side"]: row["users_per_second"] for row in result}
    one = rates["1 actor"]
    print_table(
        "The same job without Ray, and by actors with one core each",
        ["", "users/s", "/ the loop", "/ 1 actor"],
        [
            [side, f"{rate:,.0f}", f"{rate / rates[ALONE]:.2f}", f"{rate / one:.2f}"]
            for side, rate in rates.items()
        ],
        "From when all actors have given something to the end of the last part.\n"
        "Goals: 1 actor at least 0.87 of the loop (15 % overhead), 2 actors at least 1.8 of 1 actor.",
    )


def print_memory(result: Result) -> None:
    smallest = result[0]["peak_bytes"]
    print_table(
        "recgpt generate: all processes together, Ray's among them",
        ["users", "seconds", "users/s, start included", "peak memory, MiB", "/ the smallest"],
        [
            [
                f"{row['users']:,}",
                f"{row['seconds']:.0f}",
                f"{row['users'] / row['seconds']:,.0f}",
                f"{row['peak_bytes'] / MIB:,.0f}",
                f"{row['peak_bytes'] / smallest:.2f}",
            ]
            for row in result
        ],
        "Goal: flat.",
    )


PARTS: dict[Part, tuple[Callable[[Path, Size], Result], Callable[[Result], None]]] = {
    Part.published: (measure_published, print_published),
    Part.floor: (measure_floor, print_floor),
    Part.actors: (measure_actors, print_actors),
    Part.memory: (measure_memory, print_memory),
}


def main(
    parts: Annotated[list[Part] | None, typer.Option("--part", help="Only this; may be repeated.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Measure recall."""
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
