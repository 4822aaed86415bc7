"""Made-up histories whose lengths are those of a log: as tables in memory, and as a prepared dataset.

Shapes: U users, N interactions of these users together.
"""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt import storage
from recgpt.data.arrow import make_lists, offsets_of
from recgpt.data.dataset import DatasetManifest, HistoryDataset, HistoryFile, history_columns
from recgpt.data.hashing import stable_hash
from recgpt.data.histories import USERS_PER_ROW_GROUP, histories_file
from recgpt.data.plan import LANE
from recgpt.data.vocabulary import Vocabulary
from recgpt.schema import DATASET_SCHEMA_VERSION, ITEM_INDICES, MANIFEST_FILE, USER_HASH, USER_ID

NUM_ITEMS = 12_101  # as many as Beauty has
USERS_PER_FILE = 32 * USERS_PER_ROW_GROUP
HELD_OUT = 2  # of a user's items, by the protocol leave_one_out

IntArray = npt.NDArray[np.int64]


def training_lengths(log: Path) -> IntArray:
    """Items of each user's training history, int64 [U], from a log of one line per user."""
    lengths = np.array([len(line.split()) - 1 for line in log.read_text().splitlines()])
    return np.where(lengths > HELD_OUT, lengths - HELD_OUT, lengths)


def lane_table(lane: int, num_users: int, lengths: IntArray, generator: np.random.Generator) -> pa.Table:
    """Histories as ``recgpt.data.plan.read_unit`` gives them, lengths drawn from those given."""
    histories = _histories(num_users, generator.choice(lengths, num_users), generator)
    return histories.append_column(LANE, pa.array(np.full(num_users, lane, np.int32)))


def write_dataset(
    folder: Path, num_users: int, lengths: IntArray, seed: int = 0, num_items: int = NUM_ITEMS
) -> HistoryDataset:
    """A dataset of histories of the given lengths (drawn from, with what leave_one_out holds out added).

    It is made file by file: memory does not grow with the number of users.
    """
    vocabulary = Vocabulary(pa.array(np.arange(num_items)), np.ones(num_items, np.int64))
    vocabulary.save(str(folder))
    (folder / "histories").mkdir()
    files = []
    for number, first in enumerate(range(0, num_users, USERS_PER_FILE)):
        users = np.arange(first, min(first + USERS_PER_FILE, num_users))
        generator = np.random.default_rng((seed, number))
        drawn = generator.choice(lengths, len(users)) + HELD_OUT
        histories = _histories(len(users), drawn, generator, num_items)
        histories = histories.append_column(USER_ID, pa.array(users))
        path = f"histories/part-{number:05d}.parquet"
        (folder / path).write_bytes(histories_file(histories, history_columns(has_timestamps=False)))
        groups = [
            min(USERS_PER_ROW_GROUP, len(users) - start)
            for start in range(0, len(users), USERS_PER_ROW_GROUP)
        ]
        checksum = storage.checksum(str(folder / path))
        files.append(HistoryFile(path, len(users), int(drawn.sum()), checksum, groups))
    manifest = DatasetManifest(
        schema_version=DATASET_SCHEMA_VERSION,
        num_users=num_users,
        num_items=num_items,
        num_interactions=sum(file.interactions for file in files),
        has_timestamps=False,
        time_unit=None,
        user_id_type="int64",
        item_id_type="int64",
        vocabulary_fingerprint=vocabulary.fingerprint,
        time_quantiles=None,
        sources=[],
        settings={},
        dropped={},
        files=files,
    )
    storage.write_json(str(folder / MANIFEST_FILE), dataclasses.asdict(manifest))
    return HistoryDataset.open(str(folder))


def _histories(
    num_users: int, lengths: IntArray, generator: np.random.Generator, num_items: int = NUM_ITEMS
) -> pa.Table:
    offsets = offsets_of(lengths)
    items = generator.integers(1, num_items + 1, offsets[-1], dtype=np.int32)
    hashes = stable_hash(pa.array(generator.integers(0, 2**62, num_users)))
    return pa.table({USER_HASH: hashes, ITEM_INDICES: make_lists(items, offsets)})
