"""Floating-point operations of training: those that the model needs, not those that a kernel repeats.

A multiplication and an addition count as two, and the backward pass as twice the forward pass, as in
Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B). Lookups, norms and optimizers are left out:
they are bound by memory.
"""

from recgpt.config import LossSettings, ModelSettings
from recgpt.model.gpt import FEED_FORWARD_FACTOR
from recgpt.model.item_table import loss_kind

_FORWARD_AND_BACKWARD = 3


def weights_per_token(model: ModelSettings) -> int:
    """Weights of the GPT that every token is multiplied by: attention's four and the feed-forward part's two
    matrices in each layer, and the gate of the user module.
    """
    square = model.members * model.width**2
    gate = 2 * square if model.user.kind != "none" and model.user.combine == "gate" else 0
    return model.layers * (4 + 2 * FEED_FORWARD_FACTOR) * square + gate


def scored_items(loss: LossSettings, num_items: int, targets: float) -> float:
    """Items that the loss scores for each of ``targets`` targets of a step."""
    kind = loss_kind(loss, num_items)
    if kind == "full":
        return num_items
    if kind == "binary":
        return 1 + loss.negatives_per_target
    return 1 + loss.negatives + (targets if loss.in_batch else 0)


def training_flops(
    model: ModelSettings, tokens: float, attended_pairs: float, targets: float, scored_per_target: float
) -> float:
    """Operations of the forward and backward passes.

    Args:
        tokens: inputs of the GPT, generated ones included.
        attended_pairs: (token, token it attends to) in all histories: n (n + 1) / 2 in one of n tokens.
        scored_per_target: see ``scored_items``.
    """
    matrices = 2 * weights_per_token(model) * tokens
    attention = 2 * 2 * model.layers * model.vector_width * attended_pairs  # scores, and the sum of values
    scores = 2 * model.vector_width * targets * scored_per_target
    return _FORWARD_AND_BACKWARD * (matrices + attention + scores)
