"""An item table over real actors: the lists of the undivided index, also after an actor has been killed."""

import os
import signal

import pytest
import torch

from ray_jobs.index_shards import ShardHolder, started_shards
from recgpt import storage
from recgpt.config import ModelSettings, RecallSettings, SplitSettings, UserSettings
from recgpt.errors import UserError
from recgpt.model.export import ModelInfo, save_model
from recgpt.model.gpt import GPT
from recgpt.retrieval.index import ExactIndex, Exclusions

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

NUM_ITEMS, WIDTH, BLOCK = 2000, 32, 96
TABLE = torch.randn(NUM_ITEMS + 1, WIDTH, generator=torch.Generator().manual_seed(0))
INTERESTS = torch.randn(17, WIDTH, generator=torch.Generator().manual_seed(1))
SEEN = Exclusions.from_lists(torch.randint(0, NUM_ITEMS + 1, (17, 40)))


def export(url, table_RD=TABLE):
    """A random model whose item table lies in files of 300 rows."""
    settings = ModelSettings(
        width=WIDTH, members=1, layers=1, heads=2, max_history=6, user=UserSettings(kind="hashed", buckets=5)
    )
    info = ModelInfo(NUM_ITEMS, "f" * 64, settings, SplitSettings(), RecallSettings())
    save_model(url, info, GPT(settings).state_dict(), table_RD.split(300))
    return url


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export(str(tmp_path_factory.mktemp("model")))


def assert_finds_the_same(index, whole):
    for users in (17, 1):
        pairs = Exclusions(SEEN.token_P[SEEN.token_P < users], SEEN.item_P[SEEN.token_P < users])
        found, expected = (each.search(INTERESTS[:users], 50, pairs) for each in (index, whole))
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])
    item_X = torch.tensor([[5, 0], [NUM_ITEMS, 5]])
    assert torch.equal(index.vectors(item_X), TABLE[item_X])


@pytest.mark.parametrize("shards", [1, 3])
def test_actors_find_what_one_process_finds(model, shards):
    from recgpt.model.export import open_item_table, read_info

    whole = ExactIndex(open_item_table(model, read_info(model), 0, NUM_ITEMS + 1), BLOCK)
    with started_shards(model, BLOCK, shards) as started:
        assert len(started.bounds) == shards
        assert_finds_the_same(started.index(), whole)


def test_allowed_items(model):
    allowed = torch.arange(3, NUM_ITEMS, 7)
    with started_shards(model, BLOCK, 2, allowed.numpy()) as started:
        found = started.index().search(INTERESTS, 30, SEEN)
    expected = ExactIndex(TABLE, BLOCK, allowed).search(INTERESTS, 30, SEEN)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


@pytest.mark.chaos
def test_a_shard_that_is_killed_comes_back(model, tmp_path, monkeypatch):
    killed = tmp_path / "killed"

    class KilledOnce(ShardHolder):
        def answer(self, method, *arguments):
            if self.bounds[0] > 1 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().answer(method, *arguments)

    monkeypatch.setattr("ray_jobs.index_shards.ShardHolder", KilledOnce)
    with started_shards(model, BLOCK, 2) as started:
        found = started.index().search(INTERESTS, 50, SEEN)
    assert killed.exists()
    assert torch.equal(found[1], ExactIndex(TABLE, BLOCK).search(INTERESTS, 50, SEEN)[1])


def test_shards_of_a_model_in_an_object_store(s3_bucket):
    """Scores are those of a table that is read whole, though a shard reads its own rows alone."""
    url = export(storage.join(s3_bucket, "model"))
    with started_shards(url, BLOCK, 3) as started:
        assert_finds_the_same(started.index(), ExactIndex(TABLE, BLOCK))


def test_a_table_that_diverged_is_refused_as_itself(tmp_path):
    table_RD = TABLE.clone()
    table_RD[NUM_ITEMS] = torch.inf
    with (
        pytest.raises(UserError, match="values that are not finite"),
        started_shards(export(str(tmp_path), table_RD), BLOCK, 2),
    ):
        pass
