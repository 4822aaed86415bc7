"""The file system of S3 and of stores that speak as it does, patient while the store is away.

Of the two layers below, s3fs repeats only some failures and botocore counts attempts, with waits so random
that of many requests at once the unluckiest gives up within seconds. Here one rule stands in their place:
a request that fails in a way that passes is repeated, with growing waits, for as long as the patience lasts.
"""

import asyncio
import os
import random
import re
import time
from typing import Any

from botocore import exceptions
from s3fs import S3FileSystem

from recgpt.errors import UserError, without_credentials

PATIENCE_VARIABLE = "RECGPT_STORE_PATIENCE_SECONDS"
DEFAULT_PATIENCE_SECONDS = 120.0
CONNECT_SECONDS = 10
READ_SECONDS = 30  # without a byte; a store that is well may think so long about a thousand removals
FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 10.0

# What a store answers, besides 429 and 5xx, if the same request may well succeed a moment later.
_PASSING_CODES = {"RequestTimeout", "SlowDown", "OperationAborted", "ConditionalRequestConflict"}
_NOT_IMPLEMENTED = 501
_TOO_MANY_REQUESTS = 429
_QUOTED_URL = re.compile(r': "[^"]*"\.?$')


def patience_seconds() -> float:
    """For how long a failing request is repeated, from its first failure on; 0 is not at all.

    It is ``RECGPT_STORE_PATIENCE_SECONDS`` of the environment, if that is set.
    Raises ``UserError`` if it is no such number.
    """
    text = os.environ.get(PATIENCE_VARIABLE, str(DEFAULT_PATIENCE_SECONDS))
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise UserError(f"{PATIENCE_VARIABLE}={text}: is no number of seconds")
    return float(text)


class PatientS3FileSystem(S3FileSystem):
    """S3 through s3fs, whose requests outlast failures that pass.

    A request that fails for longer than the patience raises ``UserError``, which nobody below tries again.
    """

    retries = 8  # of s3fs, for answers that break off half way; all else has its end in `_next_wait`

    async def set_session(self, *arguments: Any, **options: Any) -> Any:
        """The client of the store, to which the waiting is added; called before every request."""
        client = await super().set_session(*arguments, **options)
        client.meta.events.register("needs-retry.s3", _next_wait, unique_id="recgpt-patience")
        return client

    async def _isfile(self, path: str) -> bool:
        """False only if the store says so; what is inherited takes any failure for a no."""
        try:
            return (await self._info(path))["type"] == "file"
        except FileNotFoundError:
            return False

    async def _cat_file_concurrent(
        self, bucket: str, key: str, content_length: int, chunksize: int, **_options: Any
    ) -> bytes:
        """A large object in parts, each of which is read again if it breaks off; what is inherited fails."""
        ends = [*range(chunksize, content_length, chunksize), content_length]
        parts = [self._cat_file(f"{bucket}/{key}", start=end - chunksize, end=end) for end in ends[:-1]]
        rest = self._cat_file(f"{bucket}/{key}", start=chunksize * len(parts), end=content_length)
        return b"".join(await asyncio.gather(*parts, rest))


def open_object_store() -> PatientS3FileSystem:
    """The file system of ``s3://``; one for each process, as fsspec keeps it."""
    return PatientS3FileSystem(
        use_listings_cache=False,  # a remembered listing would hide what other processes have written since
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"mode": "standard", "total_max_attempts": 1},  # by botocore: none
        },
    )


def _next_wait(
    attempts: int,
    operation: Any,
    response: tuple[Any, dict[str, Any]] | None,
    caught_exception: Exception | None,
    request_dict: dict[str, Any],
    **_event: Any,
) -> float | None:
    """Seconds until a request is sent again, or None if it has succeeded or failed for good.

    Botocore asks this after every answer. Raises ``UserError`` when the patience is at its end.
    """
    problem = _passing_problem(response, caught_exception)
    if problem is None:
        return None
    now = time.monotonic()
    failing = now - request_dict["context"].setdefault("recgpt_failing_since", now)
    left = patience_seconds() - failing
    if left > 0:
        wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(attempts - 1, 10))
        return min(left, wait * random.uniform(0.5, 1))  # so that many do not come back at once
    where = without_credentials(request_dict["url"]).partition("?")[0]
    advice = "run this again when the store is well" if response else "check the network and AWS_ENDPOINT_URL"
    times = f"{attempts} times in {failing:.0f} s" if attempts > 1 else "once"
    raise UserError(f"{where}: {operation.name} failed {times} ({problem}); {advice}")


def _passing_problem(
    response: tuple[Any, dict[str, Any]] | None, caught_exception: Exception | None
) -> str | None:
    """What went wrong, if trying again may help; else None."""
    if response is None:
        lost = isinstance(caught_exception, exceptions.HTTPClientError | exceptions.ConnectionError)
        if not lost or isinstance(caught_exception, exceptions.SSLError):  # a certificate stays as it is
            return None
        return _QUOTED_URL.sub("", str(caught_exception))
    answer, parsed = response
    status, code = answer.status_code, str(parsed.get("Error", {}).get("Code", ""))
    unwell = status == _TOO_MANY_REQUESTS or (status >= 500 and status != _NOT_IMPLEMENTED)
    return f"{status} {code}".removesuffix(f" {status}") if unwell or code in _PASSING_CODES else None
