"""The synthetic log: reproducible, in time order, and as skewed and sequential as it says."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from recgpt.data.synthetic import SyntheticSettings, interactions, write_log

SMALL = SyntheticSettings(num_users=300, num_items=200, mean_length=12, num_clusters=5, items_per_kind=8)


@pytest.fixture(scope="module")
def log() -> pa.Table:
    return interactions(SMALL)


def test_the_same_seed_gives_the_same_log_and_another_seed_another(log):
    assert interactions(SMALL).equals(log)
    other = SyntheticSettings(
        num_users=300, num_items=200, mean_length=12, num_clusters=5, items_per_kind=8, seed=1
    )
    assert not interactions(other).equals(log)


def test_columns_types_and_names(log):
    assert log.schema == pa.schema({"user_id": pa.string(), "item_id": pa.string(), "timestamp": pa.int64()})
    assert set(log["user_id"].to_pylist()) == {f"user-{number:05d}" for number in range(1, 301)}
    assert set(log["item_id"].to_pylist()) <= {f"item-{number:05d}" for number in range(1, 201)}


def test_time_order_is_total_for_each_user(log):
    assert np.all(np.diff(log["timestamp"].to_numpy()) >= 0)
    pairs = log.group_by(["user_id", "timestamp"]).aggregate([([], "count_all")])
    assert len(pairs) == len(log)


def test_the_log_spans_the_days_asked_for(log):
    seconds = log["timestamp"].to_numpy()
    assert 0.5 * 180 < (seconds[-1] - seconds[0]) / 86_400 < 1.05 * 180


def test_every_user_has_enough_to_hold_out_and_the_mean_is_as_asked(log):
    lengths = pc.value_counts(log["user_id"]).field("counts").to_numpy()
    assert lengths.min() >= 3
    assert 0.8 * 12 < lengths.mean() < 1.2 * 12


def test_popular_items_take_a_large_part(log):
    counts = np.sort(pc.value_counts(log["item_id"]).field("counts").to_numpy())[::-1]
    assert counts[:20].sum() > 0.2 * len(log)  # the first tenth takes more than twice its share


def test_the_last_item_tells_something_about_the_next(log):
    """Seen pairs repeat far more often than they would if the items of a user were shuffled."""
    ordered = log.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    users = ordered["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    items = ordered["item_id"].combine_chunks().dictionary_encode().indices.to_numpy()

    def distinct_pairs(sequence: np.ndarray) -> int:
        same_user = users[1:] == users[:-1]
        return len(np.unique(sequence[:-1][same_user] * 1000 + sequence[1:][same_user]))

    shuffled = items[np.lexsort((np.random.default_rng(0).random(len(items)), users))]
    assert distinct_pairs(items) < 0.95 * distinct_pairs(shuffled)


def test_tiny_settings_work():
    log = interactions(SyntheticSettings(num_users=1, num_items=1, mean_length=1))
    assert set(log["item_id"].to_pylist()) == {"item-00001"}


def test_write_log_cuts_the_log_into_files_in_time_order(tmp_path, log):
    paths = write_log(SMALL, str(tmp_path), files=3)
    assert [path.rsplit("/", 1)[1] for path in paths] == [
        f"interactions-{part:05d}.parquet" for part in range(3)
    ]
    assert (
        pa.concat_tables(pq.read_table(path) for path in paths).combine_chunks().equals(log.combine_chunks())
    )


def test_shares_above_one_are_refused():
    with pytest.raises(ValueError, match="sum to more than 1"):
        SyntheticSettings(successor_share=0.5, earlier_share=0.5, theme_share=0.1)
