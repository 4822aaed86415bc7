"""Types of ids over all files, cleaning, and dividing by user."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt.data.formats import interaction_schema
from recgpt.data.interactions import are_integers, clean, divide_by_user, final_type, type_as_read

INTEGERS = interaction_schema(pa.int64(), pa.int64())


@pytest.mark.parametrize(
    ("kinds", "as_read", "if_integers", "otherwise"),
    [
        ({"int64"}, "int64", "int64", "int64"),
        ({"string"}, "string", "string", "string"),
        ({"text"}, "string", "int64", "string"),
        ({"int64", "text"}, "string", "int64", "string"),
        ({"int64", "string"}, "string", "string", "string"),
        ({"string", "text"}, "string", "string", "string"),
    ],
)
def test_types_over_all_files(kinds, as_read, if_integers, otherwise):
    assert type_as_read(kinds) == as_read
    assert final_type(kinds, texts_are_integers=True) == if_integers
    assert final_type(kinds, texts_are_integers=False) == otherwise


@pytest.mark.parametrize("token", ["007", "+1", "-0", "1.0", "a1", " 1", "", "9223372036854775808", "١"])
def test_tokens_that_would_not_come_back_as_they_are(token):
    assert not are_integers(pa.chunked_array([["1", token]]))


@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1)))
def test_printed_integers_are_integers(ids):
    texts = pa.array([None if i is None else str(i) for i in ids], pa.string())
    assert are_integers(pa.chunked_array([texts]))
    assert texts.cast(pa.int64()).to_pylist() == ids


def test_clean_casts_and_counts_rows_that_lack_a_value():
    table = pa.table(
        {"user_id": ["1", None, "3", "4"], "item_id": ["5", "6", None, "8"], "timestamp": [1, 2, 3, None]}
    )
    complete, missing = clean(table, INTEGERS)
    assert complete.to_pylist() == [{"user_id": 1, "item_id": 5, "timestamp": 1}]
    assert complete.schema == INTEGERS
    assert missing == 3


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 5))
def test_users_are_whole_in_one_part_and_nothing_is_lost(users, num_parts):
    rows = pa.table(
        {"user_id": pa.array(users, pa.int64()), "item_id": pa.array(range(len(users)), pa.int64())}
    )
    parts = divide_by_user(rows, num_parts)
    assert len(parts) == num_parts
    of_parts = [set(part["user_id"].to_pylist()) for part in parts]
    assert sum(map(len, of_parts)) == len(set(users))
    assert sorted(item for part in parts for item in part["item_id"].to_pylist()) == list(range(len(users)))
