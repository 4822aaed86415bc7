"""The hash of ids and the draws made of it: stable values, independence of chunks and slices, even parts."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from recgpt.data.hashing import part_of_hash, stable_hash, uniform


def splitmix64(x: int) -> int:
    """The published finalizer, in plain Python integers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def plain_string_hash(text: str) -> int:
    data = text.encode()
    total = splitmix64(len(data))
    for place in range(-(-len(data) // 8)):
        word = int.from_bytes(data[8 * place : 8 * place + 8], "little")
        total += splitmix64((word + splitmix64(place)) % 2**64)
    return splitmix64(total % 2**64)


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_integers_follow_splitmix64(ids):
    expected = [splitmix64(i % 2**64) for i in ids]
    assert stable_hash(pa.array(ids, pa.int64())).view(np.uint64).tolist() == expected


@given(st.lists(st.text()), st.integers(0, 3))
def test_strings_hash_alike_alone_in_slices_and_in_chunks(ids, cut):
    expected = [plain_string_hash(i) for i in ids]
    array = pa.array(ids, pa.string())
    assert stable_hash(array).view(np.uint64).tolist() == expected
    assert stable_hash(array[cut:]).view(np.uint64).tolist() == expected[cut:]
    chunked = pa.chunked_array([array[:cut], array[cut:]], pa.string())
    assert stable_hash(chunked).view(np.uint64).tolist() == expected


def test_published_value_does_not_change():
    assert stable_hash(pa.array([0])).view(np.uint64).tolist() == [0xE220A8397B1DCDAF]


def test_distinct_ids_have_distinct_hashes_and_fill_the_parts_evenly():
    ids = pa.array([f"user-{i}" for i in range(20_000)])
    hashes = stable_hash(ids)
    assert len(np.unique(hashes)) == 20_000
    parts = part_of_hash(hashes, 10)
    assert np.bincount(parts).min() > 1_800
    assert len(np.bincount(parts)) == 10


def test_parts_are_in_the_order_of_the_hash():
    hashes = np.array([-(2**63), -1, 0, 2**63 - 1])
    assert part_of_hash(hashes, 4).tolist() == [0, 1, 2, 3]
    assert part_of_hash(hashes, 1).tolist() == [0, 0, 0, 0]


def plain_uniform(value, *key):
    mixed = splitmix64(value % 2**64)
    for number in key:
        mixed = splitmix64(mixed ^ splitmix64(number))
    return (mixed >> 11) / 2**53


def test_a_draw_is_the_first_53_bits_of_the_mixed_hash():
    assert uniform(np.array([0])).tolist() == [(0xE220A8397B1DCDAF >> 11) / 2**53]
    assert uniform(np.array([], np.int64), 1).tolist() == []


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.lists(st.integers(0, 2**64 - 1), max_size=3))
def test_draws_follow_the_plain_formula_and_lie_in_0_to_1(values, key):
    draws = uniform(np.array(values, np.int64), *key)
    assert draws.tolist() == [plain_uniform(value, *key) for value in values]
    assert ((draws >= 0) & (draws < 1)).all()


def test_a_draw_depends_on_its_own_hash_alone():
    hashes = np.arange(-50, 50)
    draws = uniform(hashes, 3, 4)
    assert uniform(hashes[::-1].copy(), 3, 4).tolist() == draws[::-1].tolist()
    assert uniform(hashes[7:8], 3, 4).tolist() == draws[7:8].tolist()


def test_draws_are_even_and_those_of_different_keys_independent():
    hashes = np.arange(20_000)
    keys = [(), (0,), (1,), (0, 1), (1, 0), (0, 0)]
    draws = np.array([uniform(hashes, *key) for key in keys])
    assert abs(draws.mean(1) - 0.5).max() < 0.01
    assert (np.histogram(draws[1], bins=10, range=(0, 1))[0] > 1_800).all()
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert abs(correlation).max() < 0.03
