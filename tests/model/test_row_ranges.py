"""A table in pieces is read like the one tensor that it stands for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt.model.row_ranges import RowRanges

TABLE = torch.arange(40.0).view(20, 2)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 25), st.integers(0, 25))
def test_slices(lengths, first, end):
    whole = TABLE[: sum(lengths)]
    pieces = RowRanges(whole.split(lengths))
    assert len(pieces) == len(whole)
    assert torch.equal(pieces[first:end], whole[first:end])
    assert torch.equal(pieces[:], whole)


@given(st.lists(st.integers(0, 19), max_size=30), st.integers(1, 20))
def test_rows_by_index(rows, size):
    pieces = RowRanges(TABLE.split(size))
    row_N = torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(pieces[row_N], TABLE[row_N])


def test_indices_of_any_shape():
    index = torch.tensor([[3, 19], [0, 8]])
    assert torch.equal(RowRanges(TABLE.split(7))[index], TABLE[index])
    assert RowRanges(TABLE.split(7))[index[:0]].shape == (0, 2, 2)


def test_a_slice_of_one_piece_is_not_copied():
    pieces = RowRanges(TABLE.split(7))
    assert pieces[8:12].data_ptr() == TABLE[8:].data_ptr()
