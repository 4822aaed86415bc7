"""Where the rounds of the chaos benchmark write: a local disk, or an S3 server behind a faulty proxy."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faulty_store import FaultyStore
from recgpt import storage

DISK, STORE = "disk", "s3"
BUCKET = "s3://chaos"
ENDPOINT = "AWS_ENDPOINT_URL"


@dataclass(frozen=True)
class Place:
    """A folder or prefix of a round's own, and what the commands need to write there."""

    url: str
    environment: dict[str, str]
    server: int
    """Process id of the S3 server, which belongs to the benchmark."""
    proxy: FaultyStore | None = None

    def faulty_store(self) -> FaultyStore:
        assert self.proxy, "the round writes to an object store"
        return self.proxy


class Places:
    """Makes places; this process reaches the object store past the proxy, the commands through it."""

    def __init__(self, folder: Path, proxy: FaultyStore, server: int):
        self.folder = folder
        self.proxy = proxy
        self.server = server
        # Ray's sessions then go with the folder. Its sockets need a short path.
        self._environment = {**os.environ, "RAY_TMPDIR": str(folder / "ray")}
        self._environment.pop("RAY_ADDRESS", None)

    def make(self, kind: str, name: str) -> Place:
        if kind == DISK:
            return Place(str(self.folder / name), self._environment, self.server)
        environment = {**self._environment, ENDPOINT: self.proxy.url}
        return Place(storage.join(BUCKET, name), environment, self.server, self.proxy)


@contextlib.contextmanager
def open_places(folder: Path) -> Iterator[Places]:
    """Starts the S3 server, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    os.environ.update(
        {ENDPOINT: url, "AWS_ACCESS_KEY_ID": "chaos", "AWS_SECRET_ACCESS_KEY": "chaos"},
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )
    call = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(server, port)
        filesystem, path = storage.filesystem_and_path(f"{BUCKET}/any")
        filesystem.mkdir(path.partition("/")[0])
        with FaultyStore(url) as proxy:
            yield Places(folder, proxy, server.pid)
    finally:
        server.terminate()
        server.wait()


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    while True:
        assert server.poll() is None, "the S3 server ended"
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
