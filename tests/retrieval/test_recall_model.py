"""The recall settings that a user's wishes and a model's own settings come to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt.config import ModelSettings, RecallSettings, SplitSettings, UserSettings
from recgpt.errors import UserError
from recgpt.model.export import ModelInfo, find_model, model_fingerprint, save_model
from recgpt.model.gpt import GPT
from recgpt.model.users import KnownUsers, UserVectors
from recgpt.retrieval.autoregressive import recommend_reference
from recgpt.retrieval.recall_model import load_recall, resolve_recall, scale_quotas


def info(recall: RecallSettings | None = None) -> ModelInfo:
    return ModelInfo(
        1000, "f" * 64, ModelSettings(max_history=4), SplitSettings(), recall or RecallSettings()
    )


def test_nothing_asked_for_is_the_models_own():
    own = RecallSettings(10, (7, 3), keep_seen=True)
    assert resolve_recall(info(own), None, None, False) == own


def test_keep_seen_is_added():
    assert resolve_recall(info(), None, None, True).keep_seen


@pytest.mark.parametrize(
    ("k", "quotas", "expected"),
    [
        (10, None, (9, 1)),
        (100, None, (90, 10)),
        (20, None, (18, 2)),
        (2, None, (1, 1)),
        (1, None, (1,)),
        (None, (5, 3, 1), (5, 3, 1)),
        (9, (5, 3, 1), (5, 3, 1)),
    ],
)
def test_k_scales_the_models_quotas_and_quotas_set_k(k, quotas, expected):
    recall = resolve_recall(info(), k, quotas, False)
    assert (recall.k, recall.quotas) == (sum(expected), expected)


@pytest.mark.parametrize(
    ("k", "quotas", "expected"),
    [(10**9, None, (1000, 1000)), (None, (2000, 7, 10**12), (1000, 7, 1000)), (1000, None, (900, 100))],
)
def test_no_step_takes_more_than_all_items(k, quotas, expected):
    recall = resolve_recall(info(), k, quotas, False)
    assert (recall.k, recall.quotas) == (sum(expected), expected)


@pytest.mark.parametrize(
    ("k", "quotas", "message"),
    [
        (20, (18, 3), "--quotas 18,3 sum to 21, not to --k 20"),
        (None, (18, 0), "--quotas 18,0: every step takes at least 1"),
        (None, (), "--quotas : every step"),
        (0, None, "--k 0: ask for at least 1"),
        (None, (1, 1, 1, 1, 1), "5 recall steps do not fit a model with max_history=4"),
    ],
)
def test_wishes_that_cannot_be_met(k, quotas, message):
    with pytest.raises(UserError, match=message):
        resolve_recall(info(), k, quotas, False)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(1, 300))
def test_scaled_quotas_sum_to_k_and_are_positive(quotas: list[int], k: int):
    scaled = scale_quotas(quotas, k)
    assert sum(scaled) == k
    assert min(scaled) >= 1
    assert len(scaled) == min(len(quotas), k)


def test_quotas_scaled_to_their_own_sum_stay():
    assert scale_quotas((6, 1, 13), 20) == (6, 1, 13)


def test_a_model_is_found_in_its_run_and_by_itself(make_model, tmp_path):
    gpt, table = make_model(9, dtype=torch.float32)
    own = ModelInfo(9, "f" * 64, gpt.settings, SplitSettings(), RecallSettings())
    save_model(str(tmp_path / "run" / "model"), own, gpt.state_dict(), [table])
    expected = str(tmp_path / "run" / "model")
    assert find_model(str(tmp_path / "run")) == find_model(expected) == expected
    with pytest.raises(UserError, match="no trained model here"):
        find_model(str(tmp_path))


def test_the_fingerprint_changes_with_the_weights(make_model, tmp_path):
    prints = []
    for seed in (0, 0, 1):
        gpt, table = make_model(9, dtype=torch.float32, seed=seed)
        own = ModelInfo(9, "f" * 64, gpt.settings, SplitSettings(), RecallSettings())
        save_model(str(tmp_path), own, gpt.state_dict(), [table])
        prints.append(model_fingerprint(str(tmp_path)))
    assert prints[0] == prints[1] != prints[2]


def test_a_model_that_diverged_is_refused(make_model, tmp_path):
    gpt, table = make_model(9, dtype=torch.float32)
    table = table.clone()
    table[3, 1] = float("nan")
    own = ModelInfo(9, "f" * 64, gpt.settings, SplitSettings(), RecallSettings())
    save_model(str(tmp_path), own, gpt.state_dict(), [table])
    with pytest.raises(UserError, match="values that are not finite"):
        load_recall(str(tmp_path), RecallSettings())


@pytest.fixture
def model_of_users(tmp_path):
    """Exports a model with a row for each of 3 users; a function, so that the rows can be given."""
    torch.manual_seed(0)
    settings = ModelSettings(
        width=8, members=1, layers=1, heads=2, max_history=6, user=UserSettings(kind="table")
    )
    gpt = GPT(settings).eval()
    gpt.known_users = KnownUsers(torch.tensor([-4, 10, 77]))
    table_RD = torch.randn(31, 8)

    def export(user_rows_RD):
        own = ModelInfo(30, "f" * 64, settings, SplitSettings(), RecallSettings())
        pieces = user_rows_RD.split(3)
        save_model(str(tmp_path), own, gpt.state_dict(), [table_RD], gpt.known_users, pieces)
        gpt.user = UserVectors(user_rows_RD)
        return str(tmp_path), gpt, table_RD

    return export


def test_recall_with_a_table_of_users_equals_its_slow_twin(model_of_users):
    """Two known users and two unknown ones, all with the same history."""
    url, gpt, table_RD = model_of_users(torch.randn(4, 8) * 3)
    settings = RecallSettings(6, (4, 2))
    histories = torch.tensor([5, 9]).repeat(4), torch.tensor([0, 2, 4, 6, 8])
    user_hash = torch.tensor([10, 11, 77, -5])
    found = load_recall(url, settings).recommend(*histories, user_hash)
    expected = recommend_reference(gpt, table_RD, settings, *histories, user_hash)
    assert found.item_index_BK.tolist() == expected.item_index_BK.tolist()
    lists = found.item_index_BK.tolist()
    assert lists[1] == lists[3], "unknown users differ"
    assert len({tuple(items) for items in lists}) == 3, "known users do not"


def test_loaded_recall_knows_what_may_be_found_and_what_is_popular(model_of_users):
    url, gpt, table_RD = model_of_users(torch.randn(4, 8))
    settings = RecallSettings(6, (4, 2), continuation="beam", beam_width=2)
    histories = torch.tensor([5, 9]), torch.tensor([0, 2, 2]), torch.tensor([10, -5])
    others = {"popularity_R": torch.arange(31) % 7, "allowed": torch.arange(3, 31, 2)}
    found = load_recall(url, settings, **others).recommend(*histories)
    expected = recommend_reference(gpt, table_RD, settings, *histories, **others)
    assert found.item_index_BK.tolist() == expected.item_index_BK.tolist()
    assert found.step_BK.tolist() == expected.step_BK.tolist() == [[1, 1, 1, 1, 2, 2], [0] * 6]


def test_a_table_of_users_that_diverged_is_refused(model_of_users):
    rows_RD = torch.zeros(4, 8)
    rows_RD[2, 5] = float("inf")
    url, _, _ = model_of_users(rows_RD)
    with pytest.raises(UserError, match="values that are not finite"):
        load_recall(url, RecallSettings())
