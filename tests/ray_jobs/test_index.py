"""Candidates by way of each index: divided, the very same files; approximate, lists that keep the rules."""

import json

import pytest
import torch
from typer.testing import CliRunner

from ray_jobs.actor_pool import ActorRange
from ray_jobs.cli import app
from ray_jobs.evaluate import run_evaluate
from ray_jobs.generate import run_generate
from ray_jobs.index import run_index
from recgpt.config import ModelSettings, RecallSettings, SplitSettings
from recgpt.errors import UserError
from recgpt.model.export import ModelInfo, save_model
from recgpt.model.gpt import GPT
from recgpt.retrieval.candidates import AskedFor, read_candidates

NUM_ITEMS, WIDTH = 400, 16
RECALL = RecallSettings(12, (9, 3), batch_users=7, block_items=64)


@pytest.fixture(scope="module")
def dataset(write_dataset, tmp_path_factory):
    """Sixty users in row groups of sixteen; user n has n % 11 + 1 of 400 items, the last one nearly all."""
    histories = {n: [(31 * n + 7 * i * i) % NUM_ITEMS for i in range(n % 11 + 1)] for n in range(60)}
    histories[59] = list(range(NUM_ITEMS - 5))
    histories[60] = list(range(NUM_ITEMS))[::-1]
    return write_dataset(tmp_path_factory.mktemp("dataset"), histories, row_group_users=16)


def export(url, dataset, seed=0):
    """A random model whose item table lies in files of 150 rows, around twenty centres."""
    torch.manual_seed(seed)
    settings = ModelSettings(width=WIDTH, members=1, layers=1, heads=2, max_history=6)
    gpt = GPT(settings)
    for parameter in gpt.parameters():
        parameter.data.normal_(std=0.3)
    info = ModelInfo(
        dataset.num_items, dataset.manifest.vocabulary_fingerprint, settings, SplitSettings(), RECALL
    )
    table_RD = torch.randn(20, WIDTH)[torch.randint(0, 20, (dataset.num_items + 1,))]
    table_RD = table_RD + 0.3 * torch.randn(dataset.num_items + 1, WIDTH)
    save_model(url, info, gpt.state_dict(), table_RD.split(150))
    return url


@pytest.fixture(scope="module")
def model(dataset, tmp_path_factory):
    return export(str(tmp_path_factory.mktemp("model")), dataset)


@pytest.fixture(scope="module")
def index(model, dataset, tmp_path_factory):
    """An index that looks into few lists."""
    url = str(tmp_path_factory.mktemp("index") / "ivf")
    manifest = run_index(model, dataset.url, url, "ivf", lists=20, recall_at=10, min_index_recall=0.5)
    assert manifest["effort"] < 10
    return url


def rows_of(output):
    return {row["user_id"]: row for table in read_candidates(str(output)) for row in table.to_pylist()}


@pytest.mark.ray
def test_the_divided_index_writes_the_same_files(local_ray, model, dataset, tmp_path):
    only = tmp_path / "items.txt"
    only.write_text("\n".join(str(item) for item in range(0, NUM_ITEMS, 3)))
    for name, asked_for in (("all", None), ("few", AskedFor(only_items=str(only)))):
        plain = run_generate(model, dataset.url, str(tmp_path / f"{name}-1"), asked_for=asked_for)
        divided = run_generate(
            model, dataset.url, str(tmp_path / f"{name}-3"), asked_for=asked_for, index_shards=2
        )
        assert divided["files"] == plain["files"]
        assert divided["job"] == plain["job"]


@pytest.mark.ray
def test_evaluation_by_way_of_the_divided_index(local_ray, model, dataset):
    plain = run_evaluate(model, dataset.url, baselines=False)
    assert run_evaluate(model, dataset.url, baselines=False, index_shards=2) == plain


@pytest.mark.ray
@pytest.mark.parametrize("shards", [0, 2])
def test_lists_of_an_approximate_index_keep_the_rules(local_ray, model, dataset, index, tmp_path, shards):
    exact = run_generate(model, dataset.url, str(tmp_path / "exact"))
    manifest = run_generate(
        model, dataset.url, str(tmp_path / "out"), actors=ActorRange(1, 1), index=index, index_shards=shards
    )
    assert manifest["job"] != exact["job"]
    assert manifest["made_from"]["index"].startswith(json.loads(_read(index))["sha256"])
    found, expected = rows_of(tmp_path / "out"), rows_of(tmp_path / "exact")
    shared = 0
    for row_group in dataset.row_groups:
        histories = dataset.read_row_group(row_group).to_pydict()
        for user, history in zip(histories["user_id"], histories["item_indices"], strict=True):
            items = found[user]["item_ids"]
            seen = set(dataset.vocabulary().decode(torch.tensor(history).numpy()).to_pylist())
            assert len(set(items)) == len(items) == len(expected[user]["item_ids"])
            assert not seen & set(items)
            shared += len(set(items) & set(expected[user]["item_ids"]))
    assert shared > 0.5 * exact["num_candidates"]
    assert len(found[59]["item_ids"]) == 5
    assert found[60]["item_ids"] == []


def _read(index):
    with open(f"{index}/manifest.json") as file:
        return file.read()


def test_the_index_of_another_model_is_refused(dataset, index, tmp_path):
    other = export(str(tmp_path / "model"), dataset, seed=1)
    with pytest.raises(UserError, match="the index of another model; run `recgpt index`"):
        run_generate(other, dataset.url, str(tmp_path / "out"), index=index)


def test_an_index_that_finds_too_little_leaves_nothing(model, dataset, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(UserError, match="--min-index-recall 1: kind ivf .* finds"):
        run_index(model, dataset.url, str(output), "ivf", lists=200, min_index_recall=1)
    assert list(tmp_path.iterdir()) == []


def test_the_verb_and_an_output_that_is_there(model, dataset, index, tmp_path):
    options = ["--model", model, "--dataset", dataset.url, "--kind", "hnsw", "--recall-at", "10"]
    result = CliRunner().invoke(app, ["index", *options, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "of the 10 best items (of 61 users)" in result.output
    manifest = json.loads(_read(tmp_path / "out"))
    assert (manifest["kind"], manifest["num_items"]) == ("hnsw", NUM_ITEMS)
    assert manifest["recall"] >= 0.95
    assert manifest["parameters"] == {"neighbors": 16, "build_breadth": 200}
    with pytest.raises(UserError, match="already holds something"):
        run_index(model, dataset.url, index, "ivf")
    with pytest.raises(UserError, match="which is read from"):
        run_index(model, dataset.url, model, "ivf", overwrite=True)
