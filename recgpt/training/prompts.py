"""Training batches for both stages; for prompt-tuning, histories that mix generated and real items.

Shapes: T tokens of B histories laid end to end, D width, P excluded pairs.

Zhang et al. 2024 (arXiv 2404.08675), section 3.3. With g_t the item that the current model generates
after x_1..x_t:

    plain        x_1 x_2 x_3 ...              each x_t has target x_{t+1}
    interleaved  x_1 g_1 x_2 g_2 x_3 ...      each x_t has target x_{t+1}, a g_t has none
    last         x_1 ... x_{n-1} g_{n-1}      the last real input is replaced, its target stays

A generated item stands at the place of the real item that it guesses, with segment 1. With
``train_from_rank`` a g_t has target x_{t+1} too where the model ranks that no better, and a last one
follows x_n: what the second step of recall is asked for, when the first has not found the item.
"""

import torch
from torch import Tensor

from recgpt.config import PromptSettings, TrainSettings
from recgpt.data.hashing import uniform
from recgpt.data.packing import PackedBatch
from recgpt.model.attention import Layout, offsets_of_lengths
from recgpt.model.scoring import ExcludedPairs, no_pairs
from recgpt.schema import PADDING_INDEX, SEGMENT_GENERATED, SEGMENT_REAL, UNKNOWN_USER
from recgpt.training.model import NextItemModel, TrainingBatch

# What a draw by user hash is for, so that the two kinds of draws are independent.
_DRAW_UNKNOWN_USER = 1
_DRAW_PLACEMENT = 2


def plain_batch(
    model: NextItemModel, packed: PackedBatch, settings: TrainSettings, epoch: int, device: torch.device
) -> TrainingBatch:
    """The batch of pre-training; a share of the users is shown as unknown."""
    draws = uniform(packed.user_hash_B.numpy(), settings.seed, epoch, _DRAW_UNKNOWN_USER)
    user_row_B = model.gpt.user_rows(packed.user_hash_B)
    user_row_B[torch.from_numpy(draws < settings.model.user.dropout)] = UNKNOWN_USER
    layout = Layout.from_offsets(packed.offsets)
    return TrainingBatch(
        item_index_T=packed.item_index_T.to(device),
        target_T=packed.target_T.to(device),
        segment_T=torch.full_like(layout.position, SEGMENT_REAL).to(device),
        position_T=layout.position.to(device),
        offsets=packed.offsets.to(device),
        user_row_B=user_row_B.to(device),
    )


def prompted_batch(
    model: NextItemModel,
    plain: TrainingBatch,
    user_hash_B: Tensor,
    prompts: PromptSettings,
    draw_key: tuple[int, int],
) -> TrainingBatch:
    """Put generated items into a share of the histories of a plain batch.

    Collective if the item table is sharded. The model must be in evaluation mode; no gradient is kept.

    Args:
        user_hash_B: int64, decides the placement together with ``draw_key`` (seed, epoch).
    """
    draws = torch.from_numpy(uniform(user_hash_B.numpy(), *draw_key, _DRAW_PLACEMENT)).to(
        plain.offsets.device
    )
    interleaved_B = draws < prompts.interleaved_share
    last_B = ~interleaved_B & (draws < prompts.interleaved_share + prompts.last_share)
    with torch.no_grad():
        replaced = _replace_last(model, plain, last_B, prompts)
        generated_T, target_T = _generate_after_each(model, plain, interleaved_B, prompts)
        may_be_last_T = plain.position_T < model.gpt.settings.max_history - 1
        if prompts.train_from_rank is None:
            may_be_last_T = torch.zeros_like(may_be_last_T)  # without a target it would teach nothing
        return _interleave(replaced, generated_T, target_T, interleaved_B, may_be_last_T)


def prefix_pairs(item_index_T: Tensor, layout: Layout) -> ExcludedPairs:
    """Forbid each token the items at its own and earlier positions of its history."""
    counts_T = layout.position + 1
    token_P = torch.repeat_interleave(counts_T)
    first_P = (counts_T.cumsum(0) - counts_T)[token_P]
    place_P = torch.arange(len(token_P), device=token_P.device) - first_P
    return ExcludedPairs(token_P, item_index_T[layout.offsets[layout.row[token_P]] + place_P])


def _generate_after_each(
    model: NextItemModel, plain: TrainingBatch, chosen_B: Tensor, prompts: PromptSettings
) -> tuple[Tensor, Tensor]:
    """What the model generates after x_1..x_t, int64 [T], for every input of the chosen histories; else 0.

    And, int64 [T], what each generated item is trained for; 0: nothing.
    """
    token_T = chosen_B[Layout.from_offsets(plain.offsets).row].nonzero().squeeze(1)
    lengths = plain.offsets.diff()[chosen_B]
    chosen = TrainingBatch(
        plain.item_index_T[token_T],
        plain.target_T[token_T],
        plain.segment_T[token_T],
        plain.position_T[token_T],
        offsets_of_lengths(lengths),
        plain.user_row_B[chosen_B],
    )
    layout = Layout.from_offsets(chosen.offsets)
    excluded = no_pairs(token_T.device) if prompts.allow_seen else prefix_pairs(chosen.item_index_T, layout)
    generated_T = torch.full_like(plain.item_index_T, PADDING_INDEX)
    target_T = torch.full_like(plain.item_index_T, PADDING_INDEX)
    interest = model.interest(chosen, layout)
    generated = model.item_table.best_item(interest, excluded, prompts.pool_items, prompts.temperature)
    generated_T[token_T] = generated
    if prompts.train_from_rank is not None:
        missed = generated != chosen.target_T
        if prompts.train_from_rank > 1:  # or the ranking, a scan of all items, would say nothing
            rank = model.item_table.rank_of(interest, chosen.target_T, excluded)
            missed &= rank >= prompts.train_from_rank
        target_T[token_T] = chosen.target_T.where(missed, PADDING_INDEX)
    return generated_T, target_T


def _replace_last(
    model: NextItemModel, plain: TrainingBatch, chosen_B: Tensor, prompts: PromptSettings
) -> TrainingBatch:
    """Replace the last ``last_items`` inputs of the chosen histories (those long enough) by generated ones.

    They are generated one after the other, each from the real items before and the generated ones so far.
    """
    count = prompts.last_items
    lengths_B = plain.offsets.diff()
    chosen_B = chosen_B & (lengths_B > count)
    rows = chosen_B.nonzero().squeeze(1)
    kept_lengths = lengths_B[rows] - count
    kept_layout = Layout.from_offsets(offsets_of_lengths(kept_lengths))
    history = plain.item_index_T[plain.offsets[rows][kept_layout.row] + kept_layout.position]

    item_index_T, segment_T = plain.item_index_T.clone(), plain.segment_T.clone()
    excluded = ExcludedPairs(kept_layout.row, history)
    interest_BD, state = model.gpt.prefill(
        model.item_table(history), kept_layout, plain.user_row_B[rows], count - 1
    )
    for step in range(count):
        allowed = no_pairs(rows.device) if prompts.allow_seen else excluded
        generated = model.item_table.best_item(interest_BD, allowed, prompts.pool_items, prompts.temperature)
        place = plain.offsets[rows] + kept_lengths + step
        item_index_T[place] = generated
        segment_T[place] = SEGMENT_GENERATED
        numbers = torch.arange(len(rows), device=rows.device)
        excluded = ExcludedPairs(
            torch.cat([excluded.token_P, numbers]), torch.cat([excluded.item_P, generated])
        )
        if step + 1 < count:
            interest_BD = model.gpt.extend(model.item_table(generated), SEGMENT_GENERATED, state)
    return TrainingBatch(
        item_index_T, plain.target_T, segment_T, plain.position_T, plain.offsets, plain.user_row_B
    )


def _interleave(
    batch: TrainingBatch, generated_T: Tensor, target_T: Tensor, chosen_B: Tensor, may_be_last_T: Tensor
) -> TrainingBatch:
    """Put ``generated_T`` with ``target_T`` after the inputs of the chosen histories; after the last one of
    a history only where ``may_be_last_T``.
    """
    layout = Layout.from_offsets(batch.offsets)
    is_last_T = chosen_B.new_zeros(len(layout.row))
    is_last_T[batch.offsets[1:] - 1] = True
    copies_T = 1 + (chosen_B[layout.row] & (~is_last_T | may_be_last_T)).long()
    source = torch.repeat_interleave(copies_T)
    is_generated = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    is_generated[1:] = source[1:] == source[:-1]
    ends = offsets_of_lengths(copies_T)
    return TrainingBatch(
        item_index_T=torch.where(is_generated, generated_T[source], batch.item_index_T[source]),
        target_T=torch.where(is_generated, target_T[source], batch.target_T[source]),
        segment_T=batch.segment_T[source].where(~is_generated, SEGMENT_GENERATED),
        position_T=batch.position_T[source] + is_generated,
        offsets=ends[batch.offsets],
        user_row_B=batch.user_row_B,
    )
