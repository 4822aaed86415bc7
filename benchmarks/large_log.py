"""A made-up interaction log with very many items, each of which occurs.

    python -m benchmarks.large_log --items 10000000 --output FOLDER

Shapes: V items, U users, M interactions.

Each user takes two walks at once. One goes along the catalogue, neighbour after neighbour, and all users
together cover it exactly once. The other goes along the ranking of popularity from a place drawn by
Zipf's law, so that what follows a popular item can be learned.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from recgpt.schema import ITEM_ID, TIMESTAMP, USER_ID

ITEMS_PER_USER = 8.3  # of the walk along the catalogue
INTERACTIONS_PER_ITEM = 1.25  # of both walks together
MIN_LENGTH = 5  # interactions of the briefest user
FILES = 8
RANK_STRIDE = 7_919  # a prime: popular items stand far apart in the catalogue
FIRST_SECOND = 1_704_067_200  # 2024-01-01 00:00:00 UTC
SECONDS_PER_DAY = 86_400
DAYS = 90  # in which users begin

IntArray = npt.NDArray[np.int64]


def interactions(num_items: int, seed: int = 0) -> pa.Table:
    """The log in time order, int64: user_id [0, U), item_id [0, V), timestamp in seconds since 1970.

    Takes memory for about 100 bytes x M; a multiple of 7,919 is no number of items for it.
    """
    generator = np.random.default_rng(seed)
    num_users = int(num_items / ITEMS_PER_USER)
    length_U = _lengths(num_users, int(num_items * INTERACTIONS_PER_ITEM), generator)
    first_U = np.cumsum(length_U) - length_U
    user_M = np.repeat(np.arange(num_users), length_U)
    place_M = np.arange(len(user_M)) - first_U[user_M]
    item_M = _items(num_items, user_M, first_U, generator)
    begin_U = FIRST_SECOND + generator.integers(0, DAYS * SECONDS_PER_DAY, num_users)
    gap_U = generator.integers(60, SECONDS_PER_DAY, num_users)
    time_M = begin_U[user_M] + place_M * gap_U[user_M]
    order = np.argsort(time_M, kind="stable")
    return pa.table({USER_ID: user_M[order], ITEM_ID: item_M[order], TIMESTAMP: time_M[order]})


def _lengths(num_users: int, num_interactions: int, generator: np.random.Generator) -> IntArray:
    more = num_interactions - MIN_LENGTH * num_users
    return MIN_LENGTH + generator.multinomial(more, np.full(num_users, 1 / num_users))


def _items(num_items: int, user_M: IntArray, first_U: IntArray, generator: np.random.Generator) -> IntArray:
    popular_M = np.zeros(len(user_M), np.bool_)
    popular_M[generator.choice(len(user_M), len(user_M) - num_items, replace=False)] = True
    # V ** uniform is log-uniform on [1, V): density 1 / x, Zipf's law.
    start_U = (num_items ** generator.random(len(first_U))).astype(np.int64) - 1
    before_M = np.cumsum(popular_M) - popular_M
    rank_M = (start_U - before_M[first_U])[user_M] + before_M
    item_M = np.empty(len(user_M), np.int64)
    item_M[popular_M] = rank_M[popular_M] * RANK_STRIDE % num_items
    item_M[~popular_M] = np.arange(num_items)
    return item_M


def main(
    items: Annotated[int, typer.Option(help="Items, each of which occurs.")],
    output: Annotated[Path, typer.Option(help="Folder to write Parquet files into.")],
) -> None:
    """Write a made-up log with very many items, in files cut by time."""
    log = interactions(items)
    output.mkdir(parents=True)
    bounds = np.linspace(0, len(log), FILES + 1).astype(int).tolist()
    for number, (first, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        pq.write_table(log.slice(first, end - first), output / f"interactions-{number:05d}.parquet")


if __name__ == "__main__":
    typer.run(main)
