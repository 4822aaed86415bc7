"""A look at the quickstart's model: `python docs/example.py quickstart > docs/example.md` writes the page.

Each section is a function: its docstring is the text, then come its code and what it returns.
"""

import inspect
import sys
from typing import NamedTuple

import numpy as np
import pyarrow.dataset
import torch
from torch import Tensor

from recgpt import storage
from recgpt.data.dataset import HistoryDataset
from recgpt.data.vocabulary import Vocabulary
from recgpt.model.attention import Layout
from recgpt.model.export import ModelInfo, find_model, load_model
from recgpt.model.gpt import GPT
from recgpt.model.unit_rows import unit
from recgpt.retrieval.autoregressive import last_items, recall_window
from recgpt.retrieval.continuations import OnePath
from recgpt.retrieval.index import ExactIndex, Exclusions
from recgpt.schema import ITEM_IDS, ITEM_INDICES, STEPS, USER_HASH, USER_ID

HEAD = """# A look at a model

What is in a trained model and in the candidates that it gives, looked at with the library alone: no Ray,
no DeepSpeed. The model is that of `recgpt quickstart`, on a made-up log in which items belong together and
follow each other. [example.py](example.py) writes the page from the folder of a quickstart; on another kind
of machine the last digits differ.

```sh
python docs/example.py quickstart > docs/example.md
```
"""


class Look(NamedTuple):
    """What is looked at; ``table_RD`` is the item table, float32 [num_items + 1, D]."""

    folder: str
    dataset: HistoryDataset
    vocabulary: Vocabulary
    info: ModelInfo
    gpt: GPT
    table_RD: Tensor


def load(folder: str) -> Look:
    dataset = HistoryDataset.open(storage.join(folder, "dataset"))
    info, gpt, table_RD = load_model(find_model(storage.join(folder, "run")))
    return Look(folder, dataset, dataset.vocabulary(), info, gpt, table_RD)


def nearest_items(look: Look) -> str:
    """Nearest items

    Of an item nothing is known but where it stands in histories. Items that stand in the same places get
    vectors that point the same way: here are the nearest ones of the three most popular items, with the
    cosine of the angle, and how many times as often as by chance a user of the one has taken the other, too.
    """
    histories = look.dataset.read_row_group(look.dataset.row_groups[0])[ITEM_INDICES].to_pylist()
    taken_UR = torch.zeros(len(histories), look.info.num_items + 1)
    for user, items in enumerate(histories):
        taken_UR[user, items] = 1
    share_R = taken_UR.mean(0)
    vector_RD = unit(look.table_RD)
    lines = []
    for item in (1 + by_popularity(look)[:3]).tolist():
        lines.append(f"{names(look, [item])}, taken by {share_R[item]:.1%} of the users")
        cosine_R = vector_RD @ vector_RD[item]
        cosine_R[[0, item]] = -torch.inf
        for near in cosine_R.topk(5).indices.tolist():
            lift = taken_UR[taken_UR[:, item] > 0, near].mean() / share_R[near]
            lines.append(f"    {names(look, [near])}  cosine {cosine_R[near]:.2f}, {lift:.1f} times as often")
    return "\n".join(lines)


@torch.inference_mode()
def path_through_recall(look: Look) -> str:
    """A user's path through recall

    Step by step what `recgpt generate` does for the first user of the dataset. The history becomes an
    interest vector, whose best items are the candidates of step 1. From them comes a generated item, which is
    appended to the history and gives the next interest vector. That one points elsewhere, and may find items
    that were further behind for the first one.
    """
    settings = look.info.recall
    index = ExactIndex(look.table_RD, settings.block_items)
    user = look.dataset.read_row_group(look.dataset.row_groups[0]).slice(0, 1)
    item_T = torch.tensor(user[ITEM_INDICES][0].as_py())
    user_hash_B = torch.tensor(user[USER_HASH].to_pylist())
    offsets = torch.tensor([0, len(item_T)])
    shown_T, shown_offsets = last_items(item_T, offsets, recall_window(look.info.model, settings))
    interest_BD, state = look.gpt.prefill(
        index.vectors(shown_T),
        Layout.from_offsets(shown_offsets),
        look.gpt.user_rows(user_hash_B),
        len(settings.quotas) - 1,
    )
    path = OnePath(look.gpt, index, settings, user_hash_B, interest_BD, state)
    excluded = Exclusions.from_offsets(item_T, offsets)
    _, ranked_BV = path.find(look.info.num_items, excluded)
    place = {item: place for place, item in enumerate(ranked_BV[0].tolist(), start=1)}
    lines = [f"{user[USER_ID][0]}, {len(item_T)} items, the last: {names(look, item_T[-5:].tolist())}"]
    for step, quota in enumerate(settings.quotas, start=1):
        score_BQ, item_BQ = path.find(quota, excluded)
        cosine = torch.cosine_similarity(path.interest_BD, interest_BD).item()
        lines.append(f"step {step}: interest vector at cosine {cosine:.2f} to the first one")
        for item, score in list(zip(item_BQ[0].tolist(), score_BQ[0].tolist(), strict=True))[:5]:
            lines.append(f"    {names(look, [item])}  score {score:.2f}, at place {place[item]} of step 1")
        lines += [f"    and {quota - 5} more"] if quota > 5 else []
        if step < len(settings.quotas):
            path.go_on(step, score_BQ, item_BQ)
            excluded = excluded.plus(Exclusions.from_lists(item_BQ))
            lines.append(f"    appended, as a generated item: the {settings.continuation} of these items")
    return "\n".join(lines)


def popularity_of_candidates(look: Look) -> str:
    """How popular the candidates are

    Items in ten groups of the same size, the most popular first: their share of the interactions in the log,
    and of the candidates that each step found for all users.
    """
    candidates = pyarrow.dataset.dataset(storage.join(look.folder, "candidates")).to_table([ITEM_IDS, STEPS])
    items = look.vocabulary.encode(candidates[ITEM_IDS].combine_chunks().flatten())
    steps = candidates[STEPS].combine_chunks().flatten().to_numpy()
    group_V = np.empty(look.info.num_items, np.int64)
    group_V[by_popularity(look)] = np.arange(len(group_V)) * 10 // len(group_V)
    columns = {"log": np.bincount(group_V, look.vocabulary.counts, 10)}
    for step in np.unique(steps):
        columns[f"step {step}"] = np.bincount(group_V[items[steps == step] - 1], minlength=10)
    lines = ["items      " + "".join(f"{name:>8}" for name in columns)]
    for group in range(10):
        shares = "".join(f"{count[group] / count.sum():8.1%}" for count in columns.values())
        lines.append(f"{group * 10:3}-{group * 10 + 10:3} % {shares}")
    return "\n".join([*lines, f"{len(np.unique(items))} of {len(group_V)} items are a candidate of somebody"])


def by_popularity(look: Look) -> np.ndarray:
    return (-look.vocabulary.counts).argsort(kind="stable")


def names(look: Look, items: list[int]) -> str:
    return ", ".join(map(str, look.vocabulary.decode(np.array(items)).to_pylist()))


def page(folder: str) -> str:
    """The page, in Markdown."""
    look = load(folder)
    parts = [HEAD, code(load)]
    for section in (nearest_items, path_through_recall, popularity_of_candidates):
        title, _, text = inspect.getdoc(section).partition("\n")
        parts += [f"\n## {title}\n{text}\n", code(section), f"\n```text\n{section(look)}\n```\n"]
    return "".join(parts)


def code(function) -> str:
    """A function as it stands in this file, without its docstring."""
    source = inspect.getsource(function).replace(f'    """{function.__doc__}"""\n', "")
    return f"\n```python\n{source}```\n"


if __name__ == "__main__":
    print(page(sys.argv[1]), end="")
