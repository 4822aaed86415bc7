"""How recommendations spread over the catalogue, counted by hand."""

import numpy as np
import pyarrow as pa
import pytest

from recgpt.config import RecallSettings
from recgpt.retrieval.candidates import MadeFrom, finish, manifest_of, write_part
from recgpt.retrieval.spread import count_candidates, popularity_places, share_of_top, spread

LOG = np.array([10, 1, 1, 8])
CANDIDATES = np.array([4, 0, 1, 5])


def test_places_by_popularity():
    assert popularity_places(LOG).tolist() == [1, 3.5, 3.5, 2]


def test_spread():
    found = spread(CANDIDATES, popularity_places(LOG))
    assert found.coverage == 3 / 4
    assert found.mean_rank == pytest.approx((4 * 1 + 1 * 3.5 + 5 * 2) / 10)
    # 0, 1, 4, 5 ascending: 2 * (1 * 0 + 2 * 1 + 3 * 4 + 4 * 5) / (4 * 10) - 5 / 4
    assert found.gini == pytest.approx(0.45)


@pytest.mark.parametrize(("counts", "gini"), [([3, 3, 3, 3], 0), ([0, 0, 7, 0], 1 - 1 / 4), ([5], 0)])
def test_gini_at_its_ends(counts, gini):
    assert spread(np.array(counts), np.ones(len(counts))).gini == pytest.approx(gini)


@pytest.mark.parametrize(("share", "of_all"), [(0.25, 0.5), (0.5, 0.9), (0.001, 0.5), (1.0, 1.0)])
def test_share_of_the_items_that_occur_most(share, of_all):
    assert share_of_top(CANDIDATES, share) == of_all


def test_candidates_are_counted_by_item(write_dataset, tmp_path):
    (tmp_path / "dataset").mkdir()
    vocabulary = write_dataset(tmp_path / "dataset", {"u": ["a", "b", "c"], "v": ["a"]}).vocabulary()
    folder = str(tmp_path / "candidates")
    files = []
    for part, lists in enumerate([[["a", "b"], ["a"]], [[], ["a"]]]):
        lengths = [len(items) for items in lists]
        table = {
            "user_id": [f"{part}-{row}" for row in range(len(lists))],
            "item_ids": pa.array(lists, pa.list_(pa.string())),
            "scores": pa.array([[0.5] * length for length in lengths], pa.list_(pa.float32())),
            "steps": pa.array([[1] * length for length in lengths], pa.list_(pa.int8())),
        }
        files.append(write_part(folder, part, pa.table(table)))
    finish(folder, manifest_of(files, RecallSettings(2, (2,)), MadeFrom("m", "", "d", "", "v")))
    counts = dict(zip(vocabulary.item_ids.to_pylist(), count_candidates(folder, vocabulary), strict=True))
    assert counts == {"a": 3, "b": 1, "c": 0}
