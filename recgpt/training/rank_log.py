"""A log per rank in the run's folder: logs/rank-0.log and so on."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recgpt import storage

LOGS_FOLDER = "logs"
LOGGERS = ("recgpt", "py.warnings", "DeepSpeed")  # DeepSpeed's does not hand on to the root
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def rank_log(folder: str, rank: int) -> Iterator[None]:
    """While it is open, what this process logs is appended to the rank's file, warnings included.

    In an object store, which appends to nothing, the file is written at the end, over an older one.
    An error that leaves the block is logged with its traceback.
    """
    file = storage.join(folder, LOGS_FOLDER, f"rank-{rank}.log")
    handler = _local_handler(Path(file)) if storage.is_local(file) else _StoredLog(file)
    handler.setFormatter(logging.Formatter(_FORMAT))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    logging.captureWarnings(True)
    logging.getLogger("recgpt").setLevel(logging.INFO)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    except Exception:
        logging.getLogger("recgpt").exception("the training ends here on this rank")
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        logging.captureWarnings(False)
        handler.close()


def _local_handler(file: Path) -> logging.Handler:
    file.parent.mkdir(parents=True, exist_ok=True)
    return logging.FileHandler(file, encoding="utf-8")


class _StoredLog(logging.Handler):
    """Keeps lines, and writes them to an object store when it is closed."""

    def __init__(self, url: str):
        super().__init__()
        self._url = url
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record) + "\n")

    def close(self) -> None:
        super().close()
        lines, self._lines = self._lines, []
        try:
            storage.write_bytes(self._url, "".join(lines).encode())
        except Exception as error:  # a training does not fail for want of its log
            print(f"recgpt: {self._url} could not be written: {error}", file=sys.stderr)
