"""From a trained model's folder to recall: found, checked against the dataset, with its settings."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from recgpt.config import RecallSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.errors import UserError
from recgpt.model.export import ModelInfo, check_finite, find_model, load_without_items, read_info
from recgpt.retrieval.autoregressive import AutoregressiveRecall, check_steps_fit
from recgpt.retrieval.index import Index
from recgpt.retrieval.index_loading import load_exact_index


def model_for_dataset(model: str, dataset: HistoryDataset) -> tuple[str, ModelInfo]:
    """The exported model's own folder and description; no weights are read.

    Raises ``UserError`` if there is no model, or if its items are not the dataset's.
    """
    url = find_model(model)
    info = read_info(url)
    if info.vocabulary_fingerprint != dataset.manifest.vocabulary_fingerprint:
        raise UserError(
            f"{url}: the model was trained on another vocabulary ({info.num_items} items) than that of "
            f"{dataset.url} ({dataset.num_items} items); give the dataset it was trained on, or train again"
        )
    return url, info


def resolve_recall(
    info: ModelInfo, k: int | None, quotas: Sequence[int] | None, keep_seen: bool
) -> RecallSettings:
    """The model's own recall settings with what the user wants otherwise.

    ``k`` alone scales the model's own quotas; ``quotas`` alone set ``k`` to their sum. No step takes more
    than all items: places that nothing can fill would only take memory.
    Raises ``UserError`` if the two contradict each other, are not positive, or do not fit the model.
    """
    if quotas is not None and (not quotas or min(quotas) < 1):
        raise UserError(f"--quotas {_text(quotas)}: every step takes at least 1 candidate, for example 18,2")
    if k is not None and k < 1:
        raise UserError(f"--k {k}: ask for at least 1 candidate")
    if quotas is not None and k is not None and sum(quotas) != k:
        raise UserError(
            f"--quotas {_text(quotas)} sum to {sum(quotas)}, not to --k {k}; "
            "give one of the two, or make them agree"
        )
    if quotas is None:
        quotas = info.recall.quotas if k is None else scale_quotas(info.recall.quotas, k)
    quotas = tuple(min(quota, info.num_items) for quota in quotas)
    check_steps_fit(info.model, len(quotas))
    return replace(info.recall, k=sum(quotas), quotas=quotas, keep_seen=keep_seen or info.recall.keep_seen)


def scale_quotas(quotas: Sequence[int], k: int) -> tuple[int, ...]:
    """Quotas in the same proportion that sum to ``k``, at least 1 each; fewer steps if ``k`` is too small."""
    steps = min(len(quotas), k)
    scaled: list[int] = []
    for step in range(steps - 1):
        wanted = round(sum(quotas[: step + 1]) * k / sum(quotas)) - sum(scaled)
        left_for_later_steps = steps - 1 - step
        scaled.append(min(max(wanted, 1), k - sum(scaled) - left_for_later_steps))
    return (*scaled, k - sum(scaled))


def load_recall(
    url: str,
    settings: RecallSettings,
    *,
    popularity_R: Tensor | None = None,
    allowed: Tensor | None = None,
    index: Index | None = None,
    device: torch.device | str = "cpu",
) -> AutoregressiveRecall:
    """Load an exported model and make it ready for recall on a device of this process.

    Args:
        popularity_R: a count of each item index, int64; for users without a history.
        allowed: the item indices that may be found, int64, ascending; None: all.
        index: on the device, with the same items allowed; None: the exact index of the whole table.

    Raises ``UserError`` if the model cannot be read, or holds values that are not finite numbers.
    """
    _, gpt = load_without_items(url)
    check_finite(url, (*gpt.parameters(), *gpt.buffers()))
    if index is None:
        index = load_exact_index(url, settings.block_items, allowed, device)
    return AutoregressiveRecall(gpt.to(device), index, settings, popularity_R, allowed)


def _text(quotas: Sequence[int]) -> str:
    return ",".join(map(str, quotas))
