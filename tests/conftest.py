"""Fixtures that all tests share; the environment is set before anything heavy is imported."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from ray_jobs.runtime import guard_local_ray

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LOCAL_RANK", "0")  # for training inside the test process; a launcher sets it elsewhere
guard_local_ray()
# A test never depends on how busy the machine is.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray with four logical CPUs for all tests that ask for it."""
    import ray

    from ray_jobs.runtime import start_ray

    start_ray(4)
    yield
    ray.shutdown()


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., None]:
    """Runs a module-level function of a test file in real processes, one per rank, joined by gloo.

    ``run_ranks(function, world_size, *arguments)``: arguments are JSON values; an assertion that fails
    in any rank fails the test with that rank's output.
    """

    def run(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
        store = tmp_path / f"store-{function.__name__}-{world_size}-{len(list(tmp_path.iterdir()))}"
        call = [sys.executable, str(REPOSITORY / "tests" / "rank_main.py")]
        call += [function.__code__.co_filename, function.__name__]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        ranks = [
            subprocess.Popen(
                [*call, str(rank), str(world_size), str(store), json.dumps(arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
            for rank in range(world_size)
        ]
        # A rank that fails leaves the others waiting for it: whoever fails first ends all.
        try:
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                time.sleep(0.05)
            failed = [number for number, rank in enumerate(ranks) if rank.poll()]
        finally:
            for rank in ranks:
                rank.kill()
        if failed:
            pytest.fail(f"rank {failed[0]} of {world_size}:\n{ranks[failed[0]].communicate()[0]}")

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real interaction logs beside the repository; the test is skipped where there is none."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., Any]:
    """Writes histories (user id -> item ids in time order) as a dataset of one file, and opens it."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from recgpt import storage
    from recgpt.data.dataset import DatasetManifest, HistoryDataset, HistoryFile
    from recgpt.data.hashing import stable_hash
    from recgpt.data.vocabulary import Vocabulary, vocabulary_order

    def write(folder: Path, histories: dict[Any, list[Any]], row_group_users: int = 8192) -> HistoryDataset:
        items = pa.array([item for history in histories.values() for item in history])
        vocabulary = Vocabulary(vocabulary_order(items.unique()), np.ones(len(items.unique()), np.int64))
        vocabulary.save(str(folder))
        columns = {
            "user_id": pa.array(list(histories)),
            "user_hash": stable_hash(pa.array(list(histories))),
            "item_indices": [vocabulary.encode(pa.array(history)) for history in histories.values()],
        }
        table = pa.table(columns).sort_by([("user_hash", "ascending"), ("user_id", "ascending")])
        (folder / "histories").mkdir()
        path = "histories/part-00000.parquet"
        pq.write_table(table, folder / path, row_group_size=row_group_users)
        metadata = pq.read_metadata(folder / path)
        row_groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        file = HistoryFile(path, len(table), len(items), storage.checksum(str(folder / path)), row_groups)
        manifest = DatasetManifest(
            schema_version=1,
            num_users=len(table),
            num_items=vocabulary.num_items,
            num_interactions=len(items),
            has_timestamps=False,
            time_unit=None,
            user_id_type=str(table["user_id"].type),
            item_id_type=str(items.type),
            vocabulary_fingerprint=vocabulary.fingerprint,
            time_quantiles=None,
            sources=[],
            settings={},
            dropped={},
            files=[file],
        )
        storage.write_json(str(folder / "manifest.json"), dataclasses.asdict(manifest))
        return HistoryDataset.open(str(folder))

    return write
