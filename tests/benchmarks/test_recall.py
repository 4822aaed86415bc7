"""The benchmark of recall with a few hundred items: what its sides compute and count, not how fast."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import recall
from benchmarks.made_up_model import made_up_gpt, made_up_table, write_model
from benchmarks.recall import Catalogue, Size
from benchmarks.recall_ranks import LAST_POSITION, PUBLISHED, RECGPT, job_rate, steady_rate
from benchmarks.yardsticks.exact_search import BlockSearch, random_rows
from benchmarks.yardsticks.published_recall import PublishedRecall, best_items, padded_forward
from recgpt.config import ModelSettings, RecallSettings
from recgpt.model.attention import Layout
from recgpt.retrieval.autoregressive import AutoregressiveRecall
from recgpt.retrieval.index import ExactIndex
from recgpt.scaling.made_up_histories import write_dataset

REPOSITORY = Path(__file__).parent.parent.parent
TINY = Size(
    published_users=30,
    published_turns=2,
    catalogues=(Catalogue(300, batches=2, turns=1), Catalogue(1000, batches=1, turns=1)),
    batch_users=4,
    blocks=(64, 5000),
    faiss_blocks=(64, 1024),
    floor_rounds=1,
    actor_users=40_000,
    actors=(1, 2),
    actor_rounds=1,
    memory_users=(300, 9000),
    memory_items=200,
)


# The published algorithm


@pytest.fixture(scope="module")
def gpt():
    return made_up_gpt(ModelSettings(width=64, members=1, max_history=20))


@pytest.fixture(scope="module")
def table():
    return made_up_table(300, 64)


def histories_of(lengths, num_items=300):
    generator = np.random.default_rng(0)
    return [generator.choice(num_items, length, replace=False) + 1 for length in lengths]


@torch.inference_mode()
def test_the_padded_forward_pass_is_the_gpts(gpt, table):
    histories = [torch.from_numpy(history) for history in histories_of([1, 7, 20])]
    item_BL = torch.stack([torch.nn.functional.pad(history, (20 - len(history), 0)) for history in histories])
    segment_BL = torch.zeros_like(item_BL)
    segment_BL[:, -1] = 1
    padded_BLD = padded_forward(gpt, table, item_BL, segment_BL)
    for history, interest_LD in zip(histories, padded_BLD, strict=True):
        layout = Layout.from_offsets(torch.tensor([0, len(history)]))
        segment_T = torch.tensor([0] * (len(history) - 1) + [1])
        expected_TD = gpt(table[history], layout, torch.zeros(1, dtype=torch.int64), segment_T)
        torch.testing.assert_close(interest_LD[-len(history) :], expected_TD, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("all_positions", [True, False])
def test_with_seen_items_at_minus_infinity_both_find_the_same(gpt, table, all_positions):
    # Up to 19 items: of longer histories the authors' first step sees one item more than ours.
    histories = histories_of([1, 2, 5, 12, 19, 19])
    theirs = PublishedRecall(gpt, table, (18, 2), all_positions, seen_score=-np.inf).recommend(histories)
    settings = RecallSettings(k=20, quotas=(18, 2), block_items=64, continuation="best")
    ours = AutoregressiveRecall(gpt, ExactIndex(table, settings.block_items), settings).recommend(
        torch.from_numpy(np.concatenate(histories)),
        torch.tensor([0, *np.cumsum([len(history) for history in histories])]),
        torch.zeros(len(histories), dtype=torch.int64),
    )
    np.testing.assert_array_equal(theirs, ours.item_index_BK.numpy())


def test_best_items_by_hand():
    scores = np.array([[0.1, 3.0, 2.0, -1.0], [5.0, -1.0, 4.0, 6.0]], np.float32)
    assert best_items(scores, 2).tolist() == [[1, 2], [3, 0]]


# The floor


@pytest.mark.parametrize("block_items", [7, 64, 100, 5000])
def test_search_in_blocks_finds_the_best(block_items):
    rows, interest = (torch.from_numpy(random_rows(count, 8, seed)) for count, seed in ((100, 0), (5, 1)))
    expected = (interest @ rows.T).topk(10, dim=1)
    scores, places = BlockSearch(rows, batch=5, block_items=block_items).search(interest, 10)
    torch.testing.assert_close(scores, expected.values)
    assert torch.equal(places, expected.indices)


def test_users_per_second_are_those_of_the_median_turn():
    assert recall.users_per_second({"one": [1.0, 9.0, 2.0], "other": [4.0]}, 8) == {"one": 4, "other": 2}


@pytest.mark.slow
@pytest.mark.distributed
def test_recall_and_its_floor(monkeypatch, capsys):
    pytest.importorskip("faiss")
    monkeypatch.setattr(recall, "environment", lambda *installations: sys.executable)
    result = recall.measure_floor(Path(), TINY)
    searches = ("torch, 64", "torch, 300", "faiss, 64", "faiss, 1,024")
    sides = [RECGPT, *(f"{search} items at a time" for search in searches)]
    assert [row["side"] for row in result if row["items"] == 300] == sides
    for row in result:
        assert row["share_of_floor"] * row["users_per_second"] == pytest.approx(
            next(other["users_per_second"] for other in result if other["items"] == row["items"])
        )
    recall.print_floor(result)
    assert "faiss" in capsys.readouterr().out


# Actors


@pytest.mark.parametrize(("workers", "rate"), [(1, 30 / 8), (2, 20 / 6)])
def test_a_rate_begins_when_every_worker_has_given_something(workers, rate):
    events = [(0.0, 0, 5), (2.0, 1, 10), (4.0, 0, 5), (5.0, 0, 0), (6.0, 1, 10), (8.0, 2, 5), (8.0, 2, 0)]
    assert steady_rate(events, workers) == pytest.approx(rate)


def test_the_plain_loop_writes_every_part(tmp_path):
    (tmp_path / "dataset").mkdir()
    dataset = write_dataset(tmp_path / "dataset", 9000, np.array([3, 5]), num_items=100)
    write_model(f"{tmp_path}/model", dataset)
    assert job_rate(f"{tmp_path}/model", dataset.url, f"{tmp_path}/candidates", actors=0) > 0
    parts = [path.name for path in sorted(tmp_path.glob(".candidates*/*.parquet"))]
    assert parts == ["part-00000.parquet", "part-00001.parquet"]


# The whole


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    lines = [f"{user} {' '.join(map(str, range(user % 7, user % 7 + 5)))}" for user in range(200)]
    path = tmp_path_factory.mktemp("log") / "log.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.ray
def test_the_published_algorithm_finds_the_same(tmp_path, capsys):
    generator = np.random.default_rng(0)
    lines = [f"{user} {' '.join(map(str, generator.integers(0, 400, 6)))}\n" for user in range(200)]
    (tmp_path / "log.txt").write_text("".join(lines))
    result = recall.measure_published(tmp_path / "log.txt", TINY)
    assert [row["side"] for row in result] == [RECGPT, LAST_POSITION, PUBLISHED]
    assert result[0]["ratio"] == 1
    assert result[0]["same_items"] > 0.98
    recall.print_published(result)
    assert "30 times" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.ray
def test_actors_and_memory_are_measured(log, tmp_path, capsys):
    # In a process of its own: it kills what it finds below it.
    code = f"""
import json
from pathlib import Path
from benchmarks.process_tree import adopt_orphans, kill_descendants
from benchmarks.recall import Catalogue, Size, measure_actors, measure_memory
adopt_orphans()
size, log = {TINY!r}, Path({str(log)!r})
try:
    result = {{"actors": measure_actors(log, size), "memory": measure_memory(log, size)}}
finally:
    kill_descendants()
Path({str(tmp_path)!r}, "result.json").write_text(json.dumps(result))
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["side"] for row in result["actors"]] == [recall.ALONE, "1 actor", "2 actors"]
    assert all(row["users_per_second"] > 0 for row in result["actors"])
    assert [row["users"] for row in result["memory"]] == [300, 9000]
    assert all(row["peak_bytes"] > 2**27 for row in result["memory"])
    recall.print_actors(result["actors"])
    recall.print_memory(result["memory"])
    assert "2 actors" in capsys.readouterr().out
