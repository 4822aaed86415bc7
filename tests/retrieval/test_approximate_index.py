"""The approximate index: it may miss items but keeps all other rules, and is refused if it misses many."""

import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt import storage
from recgpt.errors import UserError
from recgpt.retrieval.approximate_index import (
    ApproximateIndex,
    IndexManifest,
    StoredIndex,
    import_faiss,
    save_index,
)
from recgpt.retrieval.index import ExactIndex, Exclusions
from recgpt.retrieval.index_building import build, choose_effort, default_parameters, recall_of

pytest.importorskip("faiss")

WIDTH = 16
KINDS = ("ivf", "hnsw")
PARAMETERS = {"ivf": {"lists": 40}, "hnsw": {"neighbors": 16, "build_breadth": 80}}


def clusters(rows, seed=0):
    """Vectors around 60 centres."""
    generator = torch.Generator().manual_seed(seed)
    centre_CD = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(99))
    chosen_N = torch.randint(0, 60, (rows,), generator=generator)
    return centre_CD[chosen_N] + 0.3 * torch.randn(rows, WIDTH, generator=generator)


TABLE = clusters(3001)
BUILT = {kind: build(kind, PARAMETERS[kind], TABLE, 500) for kind in KINDS}


def approximate(kind, effort, allowed=None):
    return ApproximateIndex(BUILT[kind], kind, effort, ExactIndex(TABLE, 700, allowed), allowed)


@st.composite
def searches(draw):
    """Interest vectors whose own best items are excluded, so that fetching has to go on; and chance ones."""
    seed, users = draw(st.integers(0, 2**20)), draw(st.integers(1, 5))
    interest_BD = clusters(users, seed)
    best_BK = ExactIndex(TABLE, 700).search(interest_BD, draw(st.integers(1, 300)))[1]
    excluded = Exclusions.from_lists(best_BK)
    if draw(st.booleans()):
        excluded = Exclusions(torch.zeros(2500, dtype=torch.int64), torch.randperm(3001)[:2500])
    allowed = None
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        allowed = torch.randperm(3000, generator=generator)[: draw(st.integers(1, 3000))].sort().values + 1
    return interest_BD, excluded, draw(st.integers(1, 60)), allowed


@pytest.mark.parametrize("kind", KINDS)
@given(search=searches())
def test_no_repeats_no_excluded_items_full_lists_true_scores(kind, search):
    interest_BD, excluded, k, allowed = search
    score_BK, item_BK = approximate(kind, 1, allowed).search(interest_BD, k, excluded)
    may = set(range(1, 3001)) if allowed is None else set(allowed.tolist())
    for row, items in enumerate(item_BK.tolist()):
        left = may - set(excluded.item_P[excluded.token_P == row].tolist())
        found = [item for item in items if item]
        assert len(set(found)) == len(found) == min(k, len(left))
        assert set(found) <= left
        assert items[len(found) :] == [0] * (k - len(found))
    true_BK = (TABLE[item_BK] * interest_BD[:, None]).sum(2).masked_fill(item_BK == 0, -torch.inf)
    torch.testing.assert_close(score_BK, true_BK)
    assert bool((score_BK[:, 1:] <= score_BK[:, :-1]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_enough_is_found_of_what_lies_in_clusters(kind):
    interest_UD = clusters(300, 7)
    exact = ExactIndex(TABLE, 700)
    measured = choose_effort(BUILT[kind], kind, PARAMETERS[kind], exact, interest_UD, 50, 0.9, batch_users=64)
    found_UK = approximate(kind, measured.effort).search(interest_UD, 50)[1]
    assert recall_of(found_UK, exact.search(interest_UD, 50)[1]) >= 0.9
    assert measured.recall >= 0.9
    assert measured.effort <= 50


def test_of_equal_scores_the_lower_index_comes_first():
    table_RD = torch.ones(101, WIDTH)
    found = build("ivf", {"lists": 1}, table_RD, 30)
    index = ApproximateIndex(found, "ivf", 1, ExactIndex(table_RD, 30))
    _, item_BK = index.search(torch.ones(1, WIDTH), 99)
    assert item_BK.tolist() == [sorted(item_BK[0].tolist())]


@pytest.mark.parametrize("kind", KINDS)
def test_no_interest_vectors(kind):
    score_BK, item_BK = approximate(kind, 1).search(torch.empty(0, WIDTH), 4)
    assert score_BK.shape == item_BK.shape == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_misses_too_much_is_refused(kind):
    """Nothing in the table is like anything else, and the wanted share is all."""
    generator = torch.Generator().manual_seed(5)
    table_RD = torch.randn(5001, 64, generator=generator)
    parameters = {"ivf": {"lists": 100}, "hnsw": {"neighbors": 2, "build_breadth": 4}}[kind]
    found = build(kind, parameters, table_RD, 1000)
    interest_UD = torch.randn(100, 64, generator=generator)
    with pytest.raises(UserError, match=r"--min-index-recall 0.999: kind .* finds 0\.\d+ of the 100 best"):
        choose_effort(
            found, kind, parameters, ExactIndex(table_RD, 1000), interest_UD, 100, 0.999, batch_users=50
        )


def test_the_share_that_is_found():
    exact = torch.tensor([[1, 2, 3], [4, 5, 0]])
    assert recall_of(exact, exact) == 1
    assert recall_of(torch.tensor([[3, 9, 1], [5, 0, 0]]), exact) == pytest.approx(3 / 5)
    assert recall_of(torch.tensor([[4, 5, 0], [1, 2, 3]]), exact) == 0


@pytest.mark.parametrize(
    ("kind", "num_items", "lists", "neighbors", "expected"),
    [
        ("ivf", 30, None, None, {"lists": 1}),
        ("ivf", 10_000, None, None, {"lists": 250}),
        ("ivf", 1_000_000, None, None, {"lists": 4000}),
        ("ivf", 1_000_000, 7, None, {"lists": 7}),
        ("hnsw", 12_000, None, None, {"neighbors": 16, "build_breadth": 200}),
        ("hnsw", 100_000, None, None, {"neighbors": 32, "build_breadth": 200}),
        ("hnsw", 100_000, None, 9, {"neighbors": 9, "build_breadth": 200}),
    ],
)
def test_parameters_suit_the_size_of_the_catalogue(kind, num_items, lists, neighbors, expected):
    assert default_parameters(kind, num_items, lists, neighbors) == expected


@pytest.mark.parametrize(
    ("kind", "lists", "neighbors", "message"),
    [
        ("ivf", None, 8, "--neighbors 8: give it with --kind hnsw"),
        ("hnsw", 8, None, "--lists 8: give it with --kind ivf"),
        ("ivf", 31, None, "--lists 31: the catalogue has 30 items"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(kind, lists, neighbors, message):
    with pytest.raises(UserError, match=message):
        default_parameters(kind, 30, lists, neighbors)


def manifest(kind="ivf"):
    return IndexManifest(1, kind, PARAMETERS[kind], 4, 100, 0.97, 1000, 5.0, 3000, "m" * 64, "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["local", "object store"])
def test_what_is_saved_is_loaded(kind, place, tmp_path, request):
    local = place == "local"
    url = storage.join(str(tmp_path) if local else request.getfixturevalue("s3_bucket"), "index")
    storage.make_folder(url)
    written = save_index(url, BUILT[kind], manifest(kind))
    stored = StoredIndex.open(url, "m" * 64)
    assert stored == StoredIndex(url, written)
    interest_BD = clusters(4, 3)
    expected = approximate(kind, 4).search(interest_BD, 20)
    found = stored.load(ExactIndex(TABLE, 700)).search(interest_BD, 20)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_what_is_not_the_index_of_this_model_is_refused(tmp_path):
    url = str(tmp_path)
    exact = ExactIndex(TABLE, 700)
    with pytest.raises(UserError, match="no index here .manifest.json is missing.; run `recgpt index`"):
        StoredIndex.open(url, "m" * 64)
    save_index(url, BUILT["ivf"], manifest())
    stored = StoredIndex.open(url, "m" * 64)
    with pytest.raises(UserError, match="the index of another model"):
        StoredIndex.open(url, "n" * 64)
    file = tmp_path / "index.faiss"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="index.faiss: not the file that its manifest describes"):
        stored.load(exact)
    file.unlink()
    with pytest.raises(UserError, match="index.faiss: no such file"):
        stored.load(exact)
    values = json.loads((tmp_path / "manifest.json").read_text())
    for change, message in (
        ({"schema_version": 2}, "schema version 2"),
        ({"effort": "x"}, "damaged, effort"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(UserError, match=message):
            StoredIndex.open(url, "m" * 64)


def test_without_faiss_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'recgpt\[faiss\]'"):
        import_faiss()
