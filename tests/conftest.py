"""Fixtures that all tests share; the environment is set before anything heavy is imported."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from ray_jobs.runtime import guard_local_ray

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # as in a local Ray of RecGPT's
os.environ.setdefault("LOCAL_RANK", "0")  # for training inside the test process; a launcher sets it elsewhere
guard_local_ray()
# A test never depends on how busy the machine is.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# Nobody's own object store or credentials are used. Ray's workers inherit the environment in which the
# session's Ray starts. The port is taken at once, and free for the server that listens on it later.
# The word "planted" must appear in nothing that is written or printed.
STORE_PORT = socket.socket()
STORE_PORT.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
STORE_PORT.bind(("127.0.0.1", 0))
for name in [name for name in os.environ if name.startswith("AWS_")]:
    del os.environ[name]
os.environ.update(
    AWS_ACCESS_KEY_ID="PLANTEDACCESSKEY",
    AWS_SECRET_ACCESS_KEY="planted-secret-access-key",
    AWS_ENDPOINT_URL=f"http://127.0.0.1:{STORE_PORT.getsockname()[1]}",
    AWS_DEFAULT_REGION="us-east-1",
    AWS_CONFIG_FILE=os.devnull,
    AWS_SHARED_CREDENTIALS_FILE=os.devnull,
    AWS_EC2_METADATA_DISABLED="true",
)

REPOSITORY = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also the tests that take minutes each")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is long, and begin with files that take long: no process waits at the end."""
    if not config.getoption("--long"):
        left_out = pytest.mark.skip(reason="takes minutes; --long runs it")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(left_out)
    weights: dict[Path, int] = {}
    for item in items:
        weight = 2 * any(map(item.get_closest_marker, ("slow", "chaos")))
        weight = weight or any(map(item.get_closest_marker, ("ray", "distributed")))
        weights[item.path] = max(weights.get(item.path, 0), int(weight))
    items.sort(key=lambda item: -weights[item.path])


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray with four logical CPUs for all tests that ask for it."""
    import ray

    from ray_jobs.runtime import start_ray

    start_ray(4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The URL of an S3 server over HTTP on this machine; ``s3://`` leads there."""
    address = STORE_PORT.getsockname()
    call = [sys.executable, "-m", "moto.server", "-H", address[0], "-p", str(address[1])]
    server = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert server.poll() is None, "the S3 server ended"
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(address):
                break
            time.sleep(0.05)
        yield f"http://{address[0]}:{address[1]}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="session")
def make_bucket(object_store: str) -> Callable[[], str]:
    """Makes an empty bucket in the object store and returns its URL."""
    from recgpt import storage

    def make() -> str:
        url = f"s3://bucket-{uuid.uuid4().hex}"
        filesystem, path = storage.filesystem_and_path(url)
        filesystem.mkdir(path)
        return url

    return make


@pytest.fixture
def s3_bucket(make_bucket: Callable[[], str]) -> str:
    """The URL of an empty bucket of the test's own."""
    return make_bucket()


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
    """Writes histories (user id -> item ids in time order) as a dataset of one file, and opens it.

    ``grown_from``: the dataset that it was appended to, whose items keep their indices.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from recgpt import storage
    from recgpt.data.dataset import Ancestor, DatasetManifest, HistoryDataset, HistoryFile
    from recgpt.data.hashing import stable_hash
    from recgpt.data.vocabulary import Vocabulary, vocabulary_order

    def write(
        folder: Path,
        histories: dict[Any, list[Any]],
        row_group_users: int = 8192,
        grown_from: HistoryDataset | None = None,
    ) -> HistoryDataset:
        items = pa.array([item for history in histories.values() for item in history])
        item_ids = vocabulary_order(items.unique())
        lineage = []
        if grown_from:
            older = grown_from.vocabulary().item_ids
            new = item_ids.filter(pc.invert(pc.is_in(item_ids, value_set=older)))
            item_ids = pa.concat_arrays([older, new])
            fingerprints = grown_from.fingerprint, grown_from.manifest.vocabulary_fingerprint
            size = grown_from.num_items, grown_from.manifest.num_interactions
            lineage = [*grown_from.manifest.lineage, Ancestor(grown_from.url, *fingerprints, *size)]
        vocabulary = Vocabulary(item_ids, np.ones(len(item_ids), np.int64))
        vocabulary.save(str(folder))
        columns = {
            "user_id": pa.array(list(histories)),
            "user_hash": stable_hash(pa.array(list(histories))),
            "item_indices": [
                vocabulary.encode(pa.array(history, items.type)) for history in histories.values()
            ],
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
            lineage=lineage,
        )
        storage.write_json(str(folder / "manifest.json"), dataclasses.asdict(manifest))
        return HistoryDataset.open(str(folder))

    return write
