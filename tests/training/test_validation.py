"""Validation during training against a plain ranking of all items, on one rank and on two."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from recgpt.config import ModelSettings, TrainSettings, UserSettings, ValidationSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.hashing import stable_hash, uniform
from recgpt.distributed import collectives
from recgpt.evaluation.metrics import CUTOFFS
from recgpt.model.attention import Layout
from recgpt.training import validation
from recgpt.training.model import TrainingBatch, build_model
from recgpt.training.validation import Validator

CPU = torch.device("cpu")
NUM_ITEMS = 60
MAX_HISTORY = 4


def settings_of(max_users=50_000, seed=0, placement="replicated"):
    model = ModelSettings(
        width=8,
        members=1,
        layers=1,
        heads=2,
        max_history=MAX_HISTORY,
        dropout=0.2,
        user=UserSettings(kind="hashed", buckets=7),
    )
    return TrainSettings(
        seed=seed,
        model=model,
        item_table={"placement": placement},
        loss={"block_items": 16},
        validation=ValidationSettings(max_users=max_users),
    )


def model_of(settings, dataset):
    """In evaluation mode; its weights large enough that every part of the input matters."""
    model = build_model(settings, dataset, CPU).eval()
    torch.manual_seed(3)
    for parameter in model.gpt.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.5)
    table = model.item_table
    (table.rows if settings.item_table.placement == "sharded" else table.weight.data).mul_(50)
    return model


def random_histories(count=40, seed=0):
    """1 to 12 items each, some again; every item occurs."""
    generator = np.random.default_rng(seed)
    histories = {
        f"user-{user:02d}": generator.integers(0, NUM_ITEMS, generator.integers(1, 13)).tolist()
        for user in range(count)
    }
    return {**histories, "has all": generator.permutation(NUM_ITEMS).tolist()}


def ranks_slowly(model, dataset, histories, settings, seen_of=lambda items: items):
    """The rank of the target of every user of three items or more, by hash of the user."""
    ranks = {}
    for user, ids in histories.items():
        if len(ids) < 3:
            continue
        items = dataset.vocabulary().encode(pa.array(ids)).astype(np.int64).tolist()
        *known, target, _ = items
        newest = torch.tensor(known[-MAX_HISTORY:])
        user_hash = torch.tensor(stable_hash(pa.array([user])))
        layout = Layout.from_offsets(torch.tensor([0, len(newest)]))
        batch = TrainingBatch(
            newest,
            newest,
            torch.zeros_like(newest),
            layout.position,
            layout.offsets,
            model.gpt.user_rows(user_hash),
        )
        with torch.no_grad():
            scores = (model.item_table.vectors() @ model.interest(batch, layout)[-1]).tolist()
        seen = set(seen_of(known))
        rivals = [item for item in range(1, NUM_ITEMS + 1) if item not in seen and item != target]
        rank = 1 + sum(scores[item] >= scores[target] for item in rivals)
        ranks[int(user_hash)] = math.inf if target in seen else rank
    return ranks


def metrics_slowly(ranks):
    metrics = {"num_users": len(ranks)}
    for cutoff in CUTOFFS:
        found = [rank for rank in ranks if rank <= cutoff]
        metrics[f"hit_rate@{cutoff}"] = len(found) / len(ranks)
        metrics[f"ndcg@{cutoff}"] = sum(1 / math.log2(1 + rank) for rank in found) / len(ranks)
    return metrics


def measure(dataset, settings, model=None):
    validator = Validator(dataset, settings, None, CPU)
    return validator.measure(model or model_of(settings, dataset))


@pytest.fixture(scope="module")
def histories():
    return random_histories()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, write_dataset, histories):
    return write_dataset(tmp_path_factory.mktemp("validation"), histories, row_group_users=15)


@pytest.mark.parametrize("batch_users", [1, 7, 512])
def test_equals_a_plain_ranking_of_all_items(dataset, histories, monkeypatch, batch_users):
    monkeypatch.setattr(validation, "_BATCH_USERS", batch_users)
    settings = settings_of()
    model = model_of(settings, dataset)
    ranks = ranks_slowly(model, dataset, histories, settings)
    assert len(ranks) < len(histories), "users of one or two items have no target"
    assert math.inf in ranks.values(), "a target that was seen before is out of reach"
    metrics = measure(dataset, settings, model)
    assert metrics == pytest.approx(metrics_slowly(list(ranks.values())))
    assert 0 < metrics["hit_rate@5"] < metrics["hit_rate@20"] < 1


def test_items_too_old_for_the_input_are_masked_all_the_same(dataset, histories):
    settings = settings_of()
    model = model_of(settings, dataset)

    def newest(items):
        return items[-MAX_HISTORY:]

    forgetful = ranks_slowly(model, dataset, histories, settings, seen_of=newest)
    ranks = ranks_slowly(model, dataset, histories, settings)
    assert ranks != forgetful, "the old items stood before some target"
    assert measure(dataset, settings, model) == pytest.approx(metrics_slowly(list(ranks.values())))


def test_max_users_draws_a_sample_by_the_user_alone(dataset, histories):
    settings = settings_of(max_users=20)
    model = model_of(settings, dataset)
    ranks = ranks_slowly(model, dataset, histories, settings)
    hashes = np.array(list(ranks))
    drawn = uniform(hashes, settings.seed, 3) < 20 / len(histories)
    assert 5 < drawn.sum() < len(ranks)
    expected = metrics_slowly([ranks[int(user)] for user in hashes[drawn]])
    assert measure(dataset, settings, model) == pytest.approx(expected)


def test_another_seed_draws_another_sample(dataset):
    counts = {measure(dataset, settings_of(max_users=20, seed=seed))["num_users"] for seed in range(6)}
    assert len(counts) > 1


def test_number_of_users(tmp_path, write_dataset, dataset):
    assert (
        Validator(dataset, settings_of(), None, CPU).num_users()
        == measure(dataset, settings_of())["num_users"]
    )
    too_short = write_dataset(tmp_path, {"a": [1, 2], "b": [3]})
    assert Validator(too_short, settings_of(), None, CPU).num_users() == 0


def test_a_model_whose_scores_are_no_numbers_finds_nothing(dataset):
    model = model_of(settings_of(), dataset)
    model.gpt.final_norm.weight.data.fill_(float("nan"))
    metrics = measure(dataset, settings_of(), model)
    assert metrics.pop("num_users") > 0
    assert set(metrics.values()) == {0.0}


def test_seen_items_compete_if_they_are_served(tmp_path, write_dataset):
    """The last item is the first again: only a protocol that keeps seen items can find it."""
    dataset = write_dataset(tmp_path, {user: [user, user + 1, user, user + 2] for user in range(0, 30, 3)})
    for keep_seen in (False, True):
        settings = settings_of()
        settings.recall.keep_seen = keep_seen
        found = measure(dataset, settings)["hit_rate@20"]
        assert (found > 0) == keep_seen


def measure_on_each_rank(url, max_users, placement, expected):
    dataset = HistoryDataset.open(url)
    validation._BATCH_USERS = 4  # several batches, and not the same number on all ranks
    metrics = measure(dataset, settings_of(max_users, placement=placement))
    assert metrics == pytest.approx(expected), f"rank {collectives.rank()}"


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "placement"), [(2, "sharded"), (4, "replicated")])
def test_the_number_of_ranks_does_not_matter(dataset, run_ranks, world_size, placement):
    """Three row groups: of four ranks one has no users."""
    expected = measure(dataset, settings_of(max_users=20))
    run_ranks(measure_on_each_rank, world_size, dataset.url, 20, placement, expected)
