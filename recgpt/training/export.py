"""From a checkpoint to the exported model: whole weights, the tables in row ranges."""

from dataclasses import replace

from recgpt import storage
from recgpt.config import SplitSettings, TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.sequences import resolve_time_bounds
from recgpt.model.export import EXPORT_FOLDER, ITEM_TABLE, USER_TABLE, ModelInfo, save_model
from recgpt.model.unit_rows import unit
from recgpt.model.users import KnownUsers
from recgpt.training import checkpoint

_TABLE_WEIGHT = f"{ITEM_TABLE}.weight"
_GPT_PREFIX = "gpt."


def _frozen(split: SplitSettings, dataset: HistoryDataset) -> SplitSettings:
    """The split with its instants in figures: another preparation of the log must not move them."""
    bounds = resolve_time_bounds(split, dataset.manifest)
    return split if bounds is None else replace(split, valid_from=bounds[0], test_from=bounds[1])


def export_checkpoint(
    folder: str,
    name: str,
    settings: TrainSettings,
    dataset: HistoryDataset,
    known_users: KnownUsers | None,
) -> None:
    """Write checkpoint ``name`` as a model into the run's folder; one process does it.

    Args:
        known_users: whose rows the table of users holds; None if the model has none.
    """
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
    if _TABLE_WEIGHT in dense:  # replicated
        item_table = iter(dense[_TABLE_WEIGHT].split(checkpoint.ROWS_PER_FILE))
    else:
        item_table = checkpoint.table_row_ranges(folder, name, ITEM_TABLE)
    if settings.model.similarity == "cosine":
        # Whoever serves the model then needs dot products alone.
        item_table = (unit(rows_ND, settings.model.members) for rows_ND in item_table)
    user_table = checkpoint.table_row_ranges(folder, name, USER_TABLE) if known_users else ()
    save_model(storage.join(folder, EXPORT_FOLDER), info, gpt, item_table, known_users, user_table)
