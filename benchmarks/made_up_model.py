"""A model that was never trained: as fast as any, and made at once.

Shapes: R = V + 1 table rows, D width.
"""

import torch
from torch import Tensor

from recgpt.config import ModelSettings, RecallSettings, SplitSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.model.export import ModelInfo, save_model
from recgpt.model.gpt import GPT
from recgpt.model.item_table import initial_rows

# As in the published model, and the size that all figures of recall are for.
MODEL = ModelSettings(width=64, members=1, similarity="dot")
RECALL = RecallSettings(continuation="best")


def made_up_gpt(settings: ModelSettings) -> GPT:
    """A GPT with initial weights, in eval mode; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT(settings).eval()


def made_up_table(num_items: int, width: int) -> Tensor:
    """The initial rows of an item table, [R, D]."""
    return initial_rows(0, 0, num_items + 1, width)


def write_model(url: str, dataset: HistoryDataset) -> None:
    """Export such a model for a dataset."""
    info = ModelInfo(
        num_items=dataset.num_items,
        vocabulary_fingerprint=dataset.manifest.vocabulary_fingerprint,
        model=MODEL,
        split=SplitSettings(),
        recall=RECALL,
        dataset_fingerprint=dataset.fingerprint,
    )
    gpt = made_up_gpt(info.model)
    save_model(url, info, gpt.state_dict(), [made_up_table(info.num_items, info.model.vector_width)])
