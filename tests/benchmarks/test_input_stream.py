"""The benchmark of the training input at a small size; its figures say nothing, its checks do."""

import numpy as np
import pytest

from benchmarks import input_stream
from benchmarks.attention_forms import FORMS
from benchmarks.input_stream import Size
from recgpt.scaling.made_up_histories import training_lengths, write_dataset

SIZE = Size(attention_tokens=(100,), attention_repetitions=2, packing=((64, 2),), rounds=1)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return input_stream.write_log_like_beauty(tmp_path_factory.mktemp("log"))


def test_the_made_up_log_is_like_beauty(log):
    lengths = training_lengths(log)
    assert len(lengths) == 22_363
    assert 0.85 < 1 - np.clip(lengths - 1, 0, 50).mean() / 50 < 0.92, "padding to 50"


def test_every_form_of_attention_is_measured(log):
    result = input_stream.measure_attention(log, SIZE)  # compares what the forms compute
    assert [row["form"] for row in result] == list(FORMS)
    padding = {row["form"]: row["padding"] for row in result}
    assert padding.pop("by length") == 0
    assert all(0 < share < 1 for share in padding.values())
    input_stream.print_attention(result)


def test_packing_is_measured(log):
    (row,) = input_stream.measure_packing(log, SIZE)
    assert 64 < row["tokens_per_step"] <= 128
    assert row["tokens_per_cpu_second"] > 0
    input_stream.print_packing([row])


def test_a_made_up_dataset_has_the_given_lengths(tmp_path):
    dataset = write_dataset(tmp_path, 10_000, np.array([4]))
    assert dataset.num_users == sum(group.rows for group in dataset.row_groups) == 10_000
    tables = [dataset.read_row_group(group, ["item_indices"]) for group in dataset.row_groups]
    assert {len(items) for table in tables for items in table["item_indices"].to_pylist()} == {6}


@pytest.mark.long
@pytest.mark.ray
def test_an_epoch_over_more_than_the_object_store_holds_is_whole_and_its_memory_flat(log):
    size = Size(large_users=1_000_000, large_pause=0.004, object_store_bytes=80 * 10**6)
    (row,) = input_stream.measure_large(log, size)
    assert row["histories_bytes"] > 2 * row["object_store_bytes"]
    assert row["users"] == size.large_users
    assert row["tokens"] == size.large_users * (size.large_length - 1)
    first, *_, last = row["memory_bytes_by_quarter"]
    assert last - first < row["histories_bytes"] / 4
    input_stream.print_large([row])
