"""`recgpt tune-quotas` on a tiny dataset: against lists of the slow twin, what it saves, what it refuses."""

import json

import numpy as np
import pytest
import torch

from ray_jobs.actor_pool import ActorRange
from ray_jobs.evaluate import run_evaluate
from ray_jobs.tune_quotas import command, conclusion, run_tune_quotas
from recgpt.config import RecallSettings
from recgpt.data.hashing import uniform
from recgpt.errors import UserError
from recgpt.evaluation.quotas import print_quotas
from recgpt.model.export import load_model, model_fingerprint, read_info, save_quotas
from recgpt.retrieval.autoregressive import recommend_reference
from tests.ray_jobs.random_model import save_random_model

NUM_USERS, NUM_ITEMS = 40, 30
RECALL = RecallSettings(5, (4, 1), batch_users=7, block_items=7)
TRIED = [(5,), (1, 4), (2, 3), (3, 2), (4, 1)]


@pytest.fixture(scope="module")
def dataset(write_dataset, tmp_path_factory):
    """Forty users in row groups of eight; user n has n % 9 + 1 items, the first all: 31 have one held out."""
    generator = np.random.default_rng(0)
    histories = {n: generator.choice(NUM_ITEMS, n % 9 + 1, False).tolist() for n in range(NUM_USERS)}
    histories[0] = list(range(NUM_ITEMS))
    return write_dataset(tmp_path_factory.mktemp("dataset"), histories, row_group_users=8)


@pytest.fixture
def run(dataset, tmp_path):
    return save_random_model(tmp_path / "run", dataset, recall=RECALL)


def validated_users(dataset):
    """(hash, items before the validation item, validation item) of all users who have one."""
    for row_group in dataset.row_groups:
        table = dataset.read_row_group(row_group)
        for user_hash, items in zip(
            table["user_hash"].to_pylist(), table["item_indices"].to_pylist(), strict=True
        ):
            if len(items) >= 3:
                yield user_hash, items[:-2], items[-2]


def expected_ranks(run, users, quotas):
    _, gpt, table_RD = load_model(f"{run}/model")
    recall = RecallSettings(sum(quotas), quotas)
    for user_hash, items, target in users:
        offsets, hashes = torch.tensor([0, len(items)]), torch.tensor([user_hash])
        served = recommend_reference(gpt, table_RD, recall, torch.tensor(items), offsets, hashes)
        found = served.item_index_BK[0].tolist()
        yield found.index(target) + 1 if target in found else np.inf


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
class TestInRay:
    def test_all_quotas_are_measured_as_they_would_be_served(self, run, dataset, tmp_path):
        before = model_fingerprint(f"{run}/model")
        json_file = tmp_path / "quotas.json"
        result = run_tune_quotas(str(run), dataset.url, actors=ActorRange(2, 2), json_file=str(json_file))
        assert [tuple(row["quotas"]) for row in result["tried"]] == TRIED
        users = list(validated_users(dataset))
        ranks = [np.array(list(expected_ranks(run, users, quotas))) for quotas in TRIED]
        assert [row["hit_rate@5"] for row in result["tried"]] == [np.mean(rank <= 5) for rank in ranks]
        assert [row["ndcg@10"] for row in result["tried"]] == pytest.approx(
            [np.mean(1 / np.log2(1 + rank)) for rank in ranks]
        )
        assert [row["difference"]["mean"] for row in result["tried"]] == pytest.approx(
            [np.mean(rank <= 5) - np.mean(ranks[0] <= 5) for rank in ranks]
        )
        assert len({row["hit_rate@5"] for row in result["tried"]}) > 1
        best = max(row["hit_rate@5"] for row in result["tried"])
        assert best in [row["hit_rate@5"] for row in result["tried"] if row["quotas"] == result["chosen"]]

        assert json.loads(json_file.read_text()) == result
        assert (result["num_users"], result["k"], result["split"]) == (len(users), 5, "valid")
        assert model_fingerprint(f"{run}/model") == before

    def test_what_is_saved_is_served(self, run, dataset, capsys):
        command(str(run), dataset.url, k=3, save=True)
        out = capsys.readouterr().out
        info = read_info(f"{run}/model")
        chosen = ",".join(map(str, info.recall.quotas))
        assert out.endswith(f"saved in {run}/model\n")
        assert f"chosen: {chosen}" in out
        (marked,) = [line for line in out.splitlines() if "chosen" in line and "│" in line]
        assert f"│ {chosen} " in marked
        assert info.recall.k == sum(info.recall.quotas) == 3
        assert run_evaluate(str(run), dataset.url, baselines=False)["quotas"] == list(info.recall.quotas)

    def test_about_so_many_users_and_the_same_each_time(self, run, dataset):
        drawn = [
            user for user in validated_users(dataset) if uniform(np.array([user[0]]), 0)[0] < 20 / NUM_USERS
        ]
        result = run_tune_quotas(str(run), dataset.url, max_users=20)
        assert result["num_users"] == len(drawn) < len(list(validated_users(dataset)))
        one_step = np.array(list(expected_ranks(run, drawn, (5,))))
        assert result["tried"][0]["hit_rate@5"] == np.mean(one_step <= 5)

    def test_three_steps_and_lists_no_longer_than_there_are_items(self, run, dataset):
        result = run_tune_quotas(str(run), dataset.url, k=1000, steps=3)
        assert result["k"] == NUM_ITEMS
        assert [len(row["quotas"]) for row in result["tried"]] == [1] + 10 * [2] + 16 * [3]

    def test_a_split_without_users_is_refused(self, write_dataset, tmp_path):
        (tmp_path / "short").mkdir()
        short = write_dataset(tmp_path / "short", {1: [1, 2], 2: [3]})
        with pytest.raises(UserError, match="has an item held out in the valid split"):
            run_tune_quotas(str(save_random_model(tmp_path / "run", short)), short.url)


def test_more_steps_than_the_model_has_room_for_are_refused_before_ray_starts(run, dataset):
    file = run / "model" / "model.json"
    description = json.loads(file.read_text())
    description["model"]["max_history"] = 2
    file.write_text(json.dumps(description))
    with pytest.raises(UserError, match="3 recall steps do not fit a model with max_history=2"):
        run_tune_quotas(str(run), dataset.url, steps=3)


def test_saving_quotas_leaves_the_rest_of_the_model_as_it_is(run):
    folder = run / "model"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    save_quotas(str(folder), [2, 3, 1])
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    was, now = json.loads(before.pop("model.json")), json.loads(after.pop("model.json"))
    assert before == after
    assert now == {**was, "recall": {**was["recall"], "k": 6, "quotas": [2, 3, 1]}}
    assert list(now) == list(was)
    assert read_info(str(folder)).recall == RecallSettings(6, (2, 3, 1), batch_users=7, block_items=7)
    model_fingerprint(str(folder))  # which checks all files


def test_saving_what_is_served_already_is_no_other_model(run):
    before = model_fingerprint(f"{run}/model")
    save_quotas(f"{run}/model", RECALL.quotas)
    assert model_fingerprint(f"{run}/model") == before
    save_quotas(f"{run}/model", (3, 2))
    assert model_fingerprint(f"{run}/model") != before


@pytest.mark.parametrize(
    ("chosen", "saved", "line"),
    [
        ([12, 8], False, "chosen: 12,8; save with --save"),
        ([12, 8], True, "chosen: 12,8; saved in runs/one/model"),
        ([20], False, "chosen: 20, as no quotas of more steps are better than one step; save with --save"),
    ],
)
def test_the_line_after_the_table(chosen, saved, line):
    assert conclusion({"chosen": chosen, "model": "runs/one/model"}, saved) == line


def test_the_table_shows_what_was_tried_and_marks_the_chosen(capsys):
    def row(quotas, hit_rate, mean):
        difference = {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}
        return {"quotas": quotas, "hit_rate@50": hit_rate, "ndcg@10": 0.125, "difference": difference}

    tried = [row([50], 0.25, 0.0), row([45, 5], 0.275, 0.025)]
    about = {"k": 50, "split": "valid", "protocol": "time", "num_users": 1234}
    print_quotas({"tried": tried, "chosen": [45, 5], **about})
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert "valid split, time, 1,234 users" in lines
    assert "50 0.2500 0.1250" in lines
    assert "45,5 0.2750 +0.0250 (+0.0150 to +0.0350) 0.1250 chosen" in lines
