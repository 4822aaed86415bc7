"""A made-up interaction log as a web shop's might look: ids are strings, and there is more than is needed.

    python -m benchmarks.string_log --interactions 50000000 --users 1000000 --items 500000 --output FOLDER

Shapes: M interactions in one file, U users, V items.

Files are cut by time, and inside a file rows stand by time, so that the history of a user lies scattered over
all of them. Each file has a seed of its own and is made on its own: memory does not grow with the log.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from recgpt.schema import ITEM_ID, TIMESTAMP, USER_ID

EVENT, PRICE = "event", "price"  # what a preparation has no use for
BUY_SHARE = 0.05  # of the events
LENGTH_SIGMA = 1.0  # of the logarithm of a history's length: one user in a thousand has 13 times the mean
DUPLICATE_SHARE = 1e-3
MISSING_ITEM_SHARE = 1e-4
FIRST_SECOND = 1_704_067_200  # 2024-01-01 00:00:00 UTC
SECONDS = 30 * 86_400  # of the whole log
ALPHABET = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
# Has no factor in common with the bases of ids, so that all differ; its product with 10**8 is an int64.
ID_STRIDE = 61_803_398_879


@dataclass(frozen=True)
class Population:
    """Whom and what a log is about."""

    user_ids: pa.StringArray
    """[U]."""
    item_ids: pa.StringArray
    """[V], the most popular first."""
    activity: npt.NDArray[np.float64]
    """Cumulative share of interactions that are of the users up to this one, [U]."""
    prices: npt.NDArray[np.float64]
    """[V]."""


def population(num_users: int, num_items: int, seed: np.random.SeedSequence) -> Population:
    """Users with log-normal activity, and items."""
    generator = np.random.default_rng(seed)
    activity = np.cumsum(generator.lognormal(0, LENGTH_SIGMA, num_users))
    return Population(
        user_ids=_ids("u", num_users, base=10, digits=12),
        item_ids=_ids("B00", num_items, base=36, digits=7),
        activity=activity / activity[-1],
        prices=np.round(generator.lognormal(3, 1, num_items), 2),
    )


def _ids(prefix: str, count: int, base: int, digits: int) -> pa.StringArray:
    """Distinct ids in no order: the prefix and a number of so many digits."""
    numbers = np.arange(1, count + 1) * ID_STRIDE % base**digits
    values = numbers[:, None] // base ** np.arange(digits)[::-1] % base
    start = np.broadcast_to(np.frombuffer(prefix.encode(), np.uint8), (count, len(prefix)))
    letters = np.hstack([start, ALPHABET[values]])
    offsets = np.arange(count + 1, dtype=np.int32) * letters.shape[1]
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(letters))


def interactions(
    people: Population, num_interactions: int, seconds: tuple[int, int], seed: np.random.SeedSequence
) -> pa.Table:
    """The log between two instants, in seconds since 1970, the second one excluded; in time order.

    The k-th most popular item is drawn in proportion to log(1 + 1 / k). Some rows lack the item, and some
    stand there twice.
    """
    generator = np.random.default_rng(seed)
    time_M = np.sort(generator.integers(*seconds, num_interactions))
    user_M = np.searchsorted(people.activity, generator.random(num_interactions), side="right")
    num_items = len(people.item_ids)
    item_M = ((num_items + 1) ** generator.random(num_interactions)).astype(np.int64) - 1
    missing_M = generator.random(num_interactions) < MISSING_ITEM_SHARE
    buy_M = generator.random(num_interactions) < BUY_SHARE
    row_M = np.arange(num_interactions)
    row_M[1:] -= generator.random(num_interactions - 1) < DUPLICATE_SHARE  # the row before, once more
    log = pa.table(
        {
            USER_ID: people.user_ids.take(pa.array(user_M)),
            EVENT: pa.array(["click", "buy"]).take(pa.array(buy_M.astype(np.int8))),
            ITEM_ID: people.item_ids.take(pa.array(item_M, mask=missing_M)),
            PRICE: people.prices[item_M],
            TIMESTAMP: time_M,
        }
    )
    return log.take(pa.array(row_M))


def write_log(
    folder: Path, num_interactions: int, num_users: int, num_items: int, num_files: int, seed: int = 0
) -> None:
    """Write the log into a folder that does not exist yet."""
    folder.mkdir(parents=True)
    seed_of_population, *seeds = np.random.SeedSequence(seed).spawn(1 + num_files)
    people = population(num_users, num_items, seed_of_population)
    rows = np.linspace(0, num_interactions, num_files + 1).astype(int).tolist()
    instants = np.linspace(FIRST_SECOND, FIRST_SECOND + SECONDS, num_files + 1).astype(int).tolist()
    for n, seed_of_file in enumerate(seeds):
        log = interactions(people, rows[n + 1] - rows[n], (instants[n], instants[n + 1]), seed_of_file)
        pq.write_table(log, folder / f"interactions-{n:05d}.parquet")


def main(
    interactions: Annotated[int, typer.Option(help="Rows, duplicates among them.")],
    users: Annotated[int, typer.Option(help="Users; of very inactive ones no interaction may come.")],
    items: Annotated[int, typer.Option(help="Items; of very unpopular ones no interaction may come.")],
    output: Annotated[Path, typer.Option(help="Folder to write Parquet files into.")],
    files: Annotated[int, typer.Option(help="Files to cut the log into.")] = 64,
    seed: Annotated[int, typer.Option(help="Another seed gives another log.")] = 0,
) -> None:
    """Write a made-up log with string ids, in files cut by time."""
    write_log(output, interactions, users, items, files, seed)


if __name__ == "__main__":
    typer.run(main)
