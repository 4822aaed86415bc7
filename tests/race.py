"""Several writers who would create the same file at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

from recgpt import storage


def create_at_once(url: str, writers: int) -> list[bytes]:
    """What those wrote who succeeded; each of the threads would write its number."""
    start = threading.Barrier(writers)

    def create(writer: int) -> bytes | None:
        start.wait()
        try:
            storage.create_bytes(url, b"%d" % writer)
        except FileExistsError:
            return None
        return b"%d" % writer

    with ThreadPoolExecutor(writers) as threads:
        return [content for content in threads.map(create, range(writers)) if content]
