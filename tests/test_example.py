"""docs/example.py on a tiny model: what it shows is what recall serves, and the page is the script's."""

import importlib.util
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from recgpt.retrieval.autoregressive import AutoregressiveRecall
from recgpt.retrieval.candidates import candidates_table
from recgpt.retrieval.index import ExactIndex
from tests.ray_jobs.random_model import RECALL, save_random_model

DOCS = Path(__file__).parent.parent / "docs"
HISTORIES = {f"u{n}": [f"i{(7 * n + i * i) % 40:02}" for i in range(n % 5 + 3)] for n in range(30)}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example", DOCS / "example.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def look(example, write_dataset, tmp_path_factory):
    """The folder of a quickstart, as far as the page looks into it, with a random model."""
    folder = tmp_path_factory.mktemp("quickstart")
    for name in ("dataset", "run", "candidates"):
        (folder / name).mkdir()
    dataset = write_dataset(folder / "dataset", HISTORIES)
    save_random_model(folder / "run", dataset)
    look = example.load(str(folder))
    users = dataset.read_row_group(dataset.row_groups[0])
    table = candidates_table(users["user_id"], recalled(look, users), look.vocabulary)
    pq.write_table(table, folder / "candidates" / "part-00000.parquet")
    return look


def recalled(look, users):
    recall = AutoregressiveRecall(look.gpt, ExactIndex(look.table_RD, RECALL.block_items), RECALL)
    lists = users["item_indices"].to_pylist()
    items = torch.tensor([item for items in lists for item in items])
    offsets = torch.tensor([0, *map(len, lists)]).cumsum(0)
    return recall.recommend(items, offsets, torch.tensor(users["user_hash"].to_pylist()))


def test_the_path_is_that_of_the_production_recall(example, look):
    users = look.dataset.read_row_group(look.dataset.row_groups[0])
    served = pq.read_table(Path(look.folder) / "candidates").slice(0, 1).to_pylist()[0]
    text = example.path_through_recall(look)
    shown = re.findall(r"^    (i\d\d)  score (\S+), at place (\d+) of step 1$", text, re.MULTILINE)
    assert [item for item, _, _ in shown] == served["item_ids"]
    assert [f"{score:.2f}" for score in served["scores"]] == [score for _, score, _ in shown]
    assert [place for _, _, place in shown[:4]] == ["1", "2", "3", "4"]
    assert int(shown[4][2]) > 4
    assert text.startswith(f"{users['user_id'][0]}, ")


def test_the_nearest_items_are_those_of_the_highest_cosine(example, look):
    first, *near = example.nearest_items(look).splitlines()[:6]
    item = int(look.vocabulary.counts.argmax()) + 1
    assert first.startswith(look.vocabulary.item_ids[item - 1].as_py())
    cosine_R = torch.cosine_similarity(look.table_RD, look.table_RD[item], dim=1)
    best = cosine_R[1:].sort(descending=True).indices[1:6] + 1
    assert [line.split()[0] for line in near] == [look.vocabulary.item_ids[i - 1].as_py() for i in best]


def test_shares_of_popularity(example, look):
    header, *groups, last = example.popularity_of_candidates(look).splitlines()
    assert header.split() == ["items", "log", "step", "1", "step", "2"]
    assert len(groups) == 10
    shares = [[float(cell.rstrip("%")) for cell in line.split("%", 1)[1].split()] for line in groups]
    assert [round(sum(column)) for column in zip(*shares, strict=True)] == [100, 100, 100]
    assert last.endswith(f"of {look.info.num_items} items are a candidate of somebody")


def test_the_page_is_the_scripts_but_for_what_the_model_says(example, look):
    page, ours = (
        re.sub(r"```text\n.*?```", "", text, flags=re.DOTALL)
        for text in ((DOCS / "example.md").read_text(), example.page(look.folder))
    )
    assert page == ours, "docs/example.md is stale: python docs/example.py quickstart > docs/example.md"
