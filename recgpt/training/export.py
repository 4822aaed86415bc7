"""From a checkpoint to the exported model: whole weights, the item table in row ranges."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from recgpt import storage
from recgpt.config import SplitSettings, TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.sequences import resolve_time_bounds
from recgpt.model.export import EXPORT_FOLDER, ModelInfo, save_model
from recgpt.training import checkpoint
from recgpt.training.model import is_sharded

_ROWS_PER_FILE = 1_000_000
_TABLE_WEIGHT = "item_table.weight"
_GPT_PREFIX = "gpt."


def _frozen(split: SplitSettings, dataset: HistoryDataset) -> SplitSettings:
    """The split with its instants in figures: another preparation of the log must not move them."""
    bounds = resolve_time_bounds(split, dataset.manifest)
    return split if bounds is None else replace(split, valid_from=bounds[0], test_from=bounds[1])


def export_checkpoint(folder: str, name: str, settings: TrainSettings, dataset: HistoryDataset) -> None:
    """Write checkpoint ``name`` as a model into the run's folder; one process does it."""
    dense = checkpoint.load_dense(folder, name)
    gpt = {
        key.removeprefix(_GPT_PREFIX): value for key, value in dense.items() if key.startswith(_GPT_PREFIX)
    }
    info = ModelInfo(
        num_items=dataset.num_items,
        vocabulary_fingerprint=dataset.manifest.vocabulary_fingerprint,
        model=settings.model,
        split=_frozen(settings.data.split, dataset),
        dataset_fingerprint=dataset.fingerprint,
        recall=settings.recall,
    )

    def row_ranges() -> Iterator[Tensor]:
        for first in range(0, dataset.num_items + 1, _ROWS_PER_FILE):
            end = min(first + _ROWS_PER_FILE, dataset.num_items + 1)
            if is_sharded(settings, dataset.num_items):
                yield checkpoint.load_table_rows(folder, name, first, end)["rows"]
            else:
                yield dense[_TABLE_WEIGHT][first:end]

    save_model(storage.join(folder, EXPORT_FOLDER), info, gpt, row_ranges())
