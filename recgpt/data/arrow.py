"""Arrow columns as numpy arrays, and back; and what Arrow says about files that are damaged."""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt.errors import UserError


@contextlib.contextmanager
def content_errors(make_error: Callable[[str], Exception]) -> Iterator[None]:
    """Turns errors about the content of a file, which Arrow has of many kinds, into ``make_error(reason)``.

    Errors of the system or the object store, which have a number or a class of their own, pass: the file may
    be a good one.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, TimeoutError, ConnectionError):
        raise
    except (pa.ArrowException, UnicodeDecodeError, OSError, EOFError, zlib.error, MemoryError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise make_error(" ".join(str(error).split()) or "there is not enough memory for it") from None


def damaged(url: str, advice: str) -> Callable[[str], UserError]:
    """For ``content_errors``: the error that a file is damaged, and what to do."""
    return lambda reason: UserError(f"{url}: damaged ({reason}); {advice}")


def column_problem(table: pa.Table, expected: Mapping[str, Sequence[pa.DataType]]) -> str | None:
    """What is wrong with a table, if not just these columns are there, of one of their types, without nulls.

    Columns of lists hold no null inside of a list either, and text is UTF-8.
    """
    if sorted(table.column_names) != sorted(expected):
        return f"its columns are {', '.join(table.column_names)}, not {', '.join(expected)}"
    for name, kinds in expected.items():
        if table[name].type not in kinds:
            return f"column {name} is {table[name].type}, not {' or '.join(map(str, kinds))}"
        nulls = table[name].null_count
        if pa.types.is_list(table[name].type):
            nulls += sum(chunk.flatten().null_count for chunk in table[name].chunks)
        if nulls:
            return f"{nulls} values of column {name} are missing"
        try:
            table[name].validate(full=True)
        except pa.ArrowInvalid as error:
            return f"column {name}: {error}"
    return None


def combine(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One contiguous array out of a column."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def string_bytes(strings: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Offsets int64 [n+1] and UTF-8 bytes uint8 of a string array without nulls, the offsets from 0."""
    strings = strings.cast(pa.large_string())
    _, offset_buffer, data_buffer = strings.buffers()
    if offset_buffer is None or len(strings) == 0:
        return np.zeros(1, np.int64), np.empty(0, np.uint8)
    offsets = np.frombuffer(offset_buffer, np.int64)[strings.offset : strings.offset + len(strings) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer else np.empty(0, np.uint8)
    return offsets - offsets[0], data[offsets[0] : offsets[-1]]


def list_arrays(column: pa.ChunkedArray | pa.Array) -> tuple[npt.NDArray, npt.NDArray[np.int64]]:
    """Values [N] and offsets int64 [B+1] of a list column without nulls, the offsets from 0.

    The values share memory with a column of one chunk; they are read-only then.
    """
    lists = combine(column)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
    return values.to_numpy(zero_copy_only=False), offsets - offsets[0]


def make_lists(values: npt.NDArray, offsets: npt.NDArray[np.int64]) -> pa.ListArray:
    """A list column from values [N] and offsets [B+1]; N is below 2**31."""
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def offsets_of(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Offsets int64 [B+1] of lists with these lengths [B]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
