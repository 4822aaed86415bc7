"""The vocabulary: encoding, decoding, order, fingerprint and file."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt.data.hashing import stable_hash
from recgpt.data.vocabulary import Vocabulary, vocabulary_order
from recgpt.errors import UserError


def make(ids, counts=None):
    array = pa.array(ids)
    return Vocabulary(array, np.array([1] * len(ids) if counts is None else counts, np.int64))


def test_encode_gives_one_based_indices_and_zero_for_unknown_and_null():
    vocabulary = make(["b", "a"])
    indices = vocabulary.encode(pa.array(["a", "b", "c", None, "a"]))
    assert indices.tolist() == [2, 1, 0, 0, 2]
    assert indices.dtype == np.int32


def test_decode_gives_ids_and_null_for_padding():
    assert make([70, 30]).decode(np.array([2, 0, 1])).to_pylist() == [30, None, 70]


@given(st.lists(st.text(max_size=5), unique=True, min_size=1))
def test_decode_undoes_encode(ids):
    vocabulary = make(vocabulary_order(pa.array(ids)).to_pylist())
    chunked = pa.chunked_array([pa.array(ids[:1]), pa.array(ids[1:], pa.string())])
    assert vocabulary.decode(vocabulary.encode(chunked)).to_pylist() == ids


def test_encode_refuses_another_type():
    with pytest.raises(UserError, match="item ids are string but the vocabulary holds int64"):
        make([1]).encode(pa.array(["1"]))


def test_order_is_by_hash_whatever_order_the_ids_come_in():
    ids = pa.array(["x", "y", "z", "w"])
    ordered = vocabulary_order(ids)
    assert np.all(np.diff(stable_hash(ordered)) > 0)
    assert vocabulary_order(ids.take(pa.array([3, 1, 0, 2]))) == ordered


def test_fingerprint_depends_on_ids_order_and_type_but_not_on_counts():
    base = make(["1", "2"])
    assert base.fingerprint == make(["1", "2"], [9, 9]).fingerprint
    others = [make(["2", "1"]), make([1, 2]), make(["12", ""]), make(["1"])]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize("ids", [["ü", "a"], [5, -3]])
def test_saved_vocabulary_loads_equal(tmp_path, ids):
    vocabulary = make(ids, [4, 2])
    vocabulary.save(str(tmp_path))
    loaded = Vocabulary.load(str(tmp_path))
    assert loaded.item_ids == vocabulary.item_ids
    assert loaded.counts.tolist() == [4, 2]
    assert loaded.fingerprint == vocabulary.fingerprint


def test_load_names_what_is_missing_or_damaged(tmp_path):
    with pytest.raises(UserError, match="vocabulary.parquet: no such file"):
        Vocabulary.load(str(tmp_path))
    (tmp_path / "vocabulary.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(UserError, match="vocabulary.parquet: damaged"):
        Vocabulary.load(str(tmp_path))
