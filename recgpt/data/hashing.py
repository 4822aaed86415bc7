"""A stable 64-bit hash of ids: the same on every machine and in every version."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt.data.arrow import string_bytes

_WORD = 8  # bytes


def stable_hash(ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Hash of each id, int64 [n], from int64 or string ids without nulls.

    Integers go through the finalizer of SplitMix64. A string is the sum of its mixed 8-byte words,
    each mixed together with its place, and its length in bytes is mixed in last.
    """
    chunks = ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]
    hashes = [_hash_integers(c) if pa.types.is_integer(c.type) else _hash_strings(c) for c in chunks]
    return np.concatenate([np.empty(0, np.uint64), *hashes]).view(np.int64)


def part_of_hash(hashes: npt.NDArray[np.int64], num_parts: int) -> npt.NDArray[np.int64]:
    """The part in [0, num_parts) of each hash: equal ranges in ascending order of the (signed) hash."""
    top = (hashes >> 32) + 2**31  # 0 .. 2**32 - 1, order kept
    return top * num_parts >> 32


def uniform(hashes: npt.NDArray[np.int64], *key: int) -> npt.NDArray[np.float64]:
    """A draw in [0, 1) for each hash, float64 [n]: a function of the hash and the key alone.

    Choices made so are the same whatever rank makes them, and again after a resume.
    """
    mixed = _mix(hashes.view(np.uint64))
    for number in key:
        mixed = _mix(mixed ^ _mix(np.array([number], np.uint64)))
    return (mixed >> np.uint64(11)) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash_integers(ids: pa.Array) -> npt.NDArray[np.uint64]:
    return _mix(ids.cast(pa.int64()).to_numpy(zero_copy_only=False).view(np.uint64))


def _hash_strings(ids: pa.Array) -> npt.NDArray[np.uint64]:
    offsets, data = string_bytes(ids)
    lengths = np.diff(offsets)
    num_words = -(-lengths // _WORD)
    first_word = np.concatenate([[0], np.cumsum(num_words)])
    string_of_word = np.repeat(np.arange(len(lengths)), num_words)
    place = np.arange(first_word[-1]) - first_word[string_of_word]
    # A word may start at any byte; the padding lets the last one reach beyond the end.
    padded = np.concatenate([data, np.zeros(_WORD, np.uint8)])
    words_at = np.ndarray((len(data) + 1,), "<u8", padded, strides=(1,))
    words = words_at[offsets[:-1][string_of_word] + place * _WORD].astype(np.uint64)
    excess = np.clip((place + 1) * _WORD - lengths[string_of_word], 0, _WORD - 1) * 8
    words &= np.uint64(2**64 - 1) >> excess.astype(np.uint64)
    mixed = _mix(words + _mix(place.astype(np.uint64)))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return _mix(sums[first_word[1:]] - sums[first_word[:-1]] + _mix(lengths.astype(np.uint64)))
