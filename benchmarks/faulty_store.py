"""An object store that fails as it is told to: a real HTTP proxy in front of an S3 server.

In a process of its own, which prints its URL and ends with SIGTERM:

    python -m benchmarks.faulty_store --store http://127.0.0.1:5000 --share 0.2 --seed 0

It then takes orders over HTTP, with the arguments of ``FaultyStore.fail`` as JSON; none at all heals it:

    curl -X PUT http://127.0.0.1:PORT/-/faults -d '{"way": "503", "seconds": 30}'
"""

import argparse
import http.client
import json
import os
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

# How a request fails: "reset" drops it, "lost" carries it out and drops the answer, "cut" breaks off in the
# middle of the answer, "stall" keeps the connection open and silent. A number is the status of the answer.
CODES = {"500": "InternalError", "502": "BadGateway", "503": "SlowDown", "504": "GatewayTimeout"}
WAYS = (*CODES, "reset", "lost", "cut", "stall")
MIXED_WAYS = ("500", "503", "reset", "lost", "cut")
CONTROL_PATH = "/-/faults"


@dataclass
class Fault:
    """Which requests fail, and how; a way is drawn for each."""

    ways: tuple[str, ...]
    share: float
    random: random.Random
    after: int
    requests: float
    until: float
    method: str | None

    def draw(self, method: str) -> str | None:
        """How the next request fails, or None if it does not."""
        if self.method not in (None, method) or time.monotonic() >= self.until:
            return None
        self.after -= 1
        if self.after >= 0 or self.requests <= 0 or self.random.random() >= self.share:
            return None
        self.requests -= 1
        return self.random.choice(self.ways)


class FaultyStore:
    """A proxy at ``url`` in front of the store at ``target``, healthy at first; close it, or use ``with``."""

    def __init__(self, target: str, port: int = 0):
        address = urlsplit(target)
        self.target = (address.hostname, address.port or 80)
        self.requests = 0
        self.failed = 0
        self.delay_seconds = 0.0
        """How long each request waits before it is looked at."""
        self._fault: Fault | None = None
        self._lock = threading.Lock()
        self.healed = threading.Event()
        # moto looks whether there is an object and writes it thereafter; a store does both at once.
        self.one_condition_at_a_time = threading.Lock()
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.handle_error = lambda *_: None  # clients that went away
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "FaultyStore":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.heal()
        self._server.shutdown()
        self._server.server_close()

    def fail(
        self,
        *way: str,
        after: int = 0,
        requests: float = float("inf"),
        seconds: float = float("inf"),
        share: float = 1.0,
        seed: int = 0,
        method: str | None = None,
    ) -> None:
        """Fail the next ``requests``, or those within ``seconds``, or a share of them; without any, all.

        ``way``: how; of several, one is drawn for each request. ``after``: how many requests go well before.
        ``method``: such as "GET", if the others go well. A new order takes the place of the one before.
        """
        if not way or set(way) - set(WAYS):
            raise ValueError(f"ways to fail are {', '.join(WAYS)}")
        self.heal()
        with self._lock:
            self.healed.clear()
            until = time.monotonic() + seconds
            self._fault = Fault(way, share, random.Random(seed), after, requests, until, method)

    def fail_share(self, share: float, seed: int = 0) -> None:
        """Fail a share of the requests, in all ways that end at once."""
        self.fail(*MIXED_WAYS, share=share, seed=seed)

    def heal(self) -> None:
        """Fail no more; what stalls is dropped."""
        with self._lock:
            self._fault = None
            self.healed.set()

    def next_failure(self, method: str) -> str | None:
        """How the request that has just come fails, or None; counts both."""
        time.sleep(self.delay_seconds)
        with self._lock:
            way = self._fault.draw(method) if self._fault else None
            self.requests += 1
            self.failed += way is not None
            return way


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    store: FaultyStore
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        """What is inherited looks for a method per verb; all are treated alike here."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self._body()
        if self.path == CONTROL_PATH:
            self._control(body)
            return
        way = self.store.next_failure(self.command)
        if way in CODES:
            code = CODES[way]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as told</Message></Error>"
            self._answer(int(way), [("Content-Type", "application/xml")], text.encode())
        elif way in ("reset", "stall"):
            if way == "stall":
                self.store.healed.wait()
            self._drop()
        else:
            self._pass_on(body, way)

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _control(self, body: bytes) -> None:
        if self.command == "PUT":
            order = json.loads(body or "{}")
            ways = order.pop("way", ())
            if ways:
                self.store.fail(*([ways] if isinstance(ways, str) else ways), **order)
            else:
                self.store.heal()
        counts = {"requests": self.store.requests, "failed": self.store.failed}
        self._answer(200, [("Content-Type", "application/json")], json.dumps(counts).encode())

    def _pass_on(self, body: bytes, way: str | None) -> None:
        upstream = http.client.HTTPConnection(*self.store.target)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        hop_by_hop = {"connection", "transfer-encoding", "content-length", "expect"}
        for name, value in self.headers.items():
            if name.lower() not in hop_by_hop:
                upstream.putheader(name, value)
        upstream.putheader("Content-Length", str(len(body)))
        upstream.putheader("Connection", "close")
        if self.headers.get("If-None-Match"):
            with self.store.one_condition_at_a_time:
                upstream.endheaders(body)
                answer = upstream.getresponse()
        else:
            upstream.endheaders(body)
            answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if way == "lost" or (way == "cut" and not content):
            self._drop()
            return
        headers = [header for header in answer.getheaders() if header[0].lower() not in hop_by_hop]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self._answer(answer.status, headers, content, length, cut=way == "cut")

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        length: str | None = None,
        cut: bool = False,
    ) -> None:
        """``length``: what an answer to HEAD says of a body that is not sent."""
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            time.sleep(0.05)  # a reset overtakes what lies unread at the other end
            self._drop()

    def _drop(self) -> None:
        """Reset the connection."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--store", required=True, help="URL of the S3 server behind")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--share", type=float, default=0.0, help="share of the requests that fail at first")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with FaultyStore(options.store, options.port) as store:
        if options.share:
            store.fail_share(options.share, options.seed)
        print(store.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
