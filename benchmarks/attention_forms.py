"""Ways to compute attention over histories of different lengths, all with the same result.

Shapes: T tokens of B histories laid end to end, L the longest history of a group, R rows of L tokens, H
heads, K width per head; 3 stands for query, key and value.

A form takes the layout of a batch, once, and returns the function that attends in each layer, [T, 3, H, K]
to [T, H, K], with the number of positions that it computes: T of them are tokens, the rest is padding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from recgpt.model.attention import Layout, attend_by_length, offsets_of_lengths

Attend = Callable[[Tensor, Layout], Tensor]
Form = Callable[[Layout], tuple[Attend, int]]


def by_length(layout: Layout) -> tuple[Attend, int]:
    """RecGPT's: the histories of each length are a batch of their own."""
    return attend_by_length, sum(number * length for number, length in layout.by_length.groups)


def padded(layout: Layout) -> tuple[Attend, int]:
    """All histories padded to the longest."""
    return _attend_padded, layout.num_histories * layout.longest


def padded_by_powers_of_two(layout: Layout) -> tuple[Attend, int]:
    """Histories of up to 1, 2, 4, 8 ... tokens padded to the longest of them."""
    length_B = layout.offsets.diff()
    exponent_B = torch.log2(length_B.double()).ceil()
    groups = []
    for exponent in exponent_B.unique():
        chosen_B = exponent_B == exponent
        part = Layout.from_offsets(offsets_of_lengths(length_B[chosen_B]))
        groups.append((chosen_B[layout.row].nonzero().squeeze(1), part))
    place_T = torch.cat([token_T for token_T, _ in groups]).argsort()

    def attend(qkv_T3HK: Tensor, _: Layout) -> Tensor:
        return torch.cat([_attend_padded(qkv_T3HK[token_T], part) for token_T, part in groups])[place_T]

    return attend, sum(part.num_histories * part.longest for _, part in groups)


def rows_of(width: int) -> Form:
    """Whole histories packed into rows, kept apart by a mask; the longest first, each where there is room."""

    def form(layout: Layout) -> tuple[Attend, int]:
        row_B, start_B, num_rows = _first_fit(layout.offsets.diff().tolist(), width)
        place_T = (row_B * width + start_B)[layout.row] + layout.position
        history_RL = torch.full((num_rows * width,), -1)
        history_RL[place_T] = layout.row
        history_RL = history_RL.view(num_rows, width)
        same_RLL = history_RL[:, :, None] == history_RL[:, None, :]
        visible_R1LL = (same_RLL & torch.ones(width, width, dtype=torch.bool).tril())[:, None]

        def attend(qkv_T3HK: Tensor, _: Layout) -> Tensor:
            qkv_RL3HK = qkv_T3HK.new_zeros(num_rows * width, *qkv_T3HK.shape[1:])
            qkv_RL3HK[place_T] = qkv_T3HK
            query, key, value = qkv_RL3HK.unflatten(0, (num_rows, width)).permute(2, 0, 3, 1, 4)
            attended_RHLK = F.scaled_dot_product_attention(query, key, value, attn_mask=visible_R1LL)
            return attended_RHLK.transpose(1, 2).flatten(0, 1)[place_T]

        return attend, num_rows * width

    return form


def _attend_padded(qkv_T3HK: Tensor, layout: Layout) -> Tensor:
    query, key, value = layout.pad(qkv_T3HK).permute(2, 0, 3, 1, 4)
    return layout.unpad(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2))


def _first_fit(lengths: list[int], width: int) -> tuple[Tensor, Tensor, int]:
    """Row and first place in it for each history, int64 [B] each, and the number of rows."""
    room: list[int] = []
    row, start = [0] * len(lengths), [0] * len(lengths)
    for history in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        fitting = (number for number, free in enumerate(room) if free >= lengths[history])
        row[history] = next(fitting, len(room))
        if row[history] == len(room):
            room.append(width)
        start[history] = width - room[row[history]]
        room[row[history]] -= lengths[history]
    return torch.tensor(row), torch.tensor(start), len(room)


FORMS: dict[str, Form] = {
    "padded to the longest": padded,
    "padded by powers of two": padded_by_powers_of_two,
    "rows of 64": rows_of(64),
    "rows of 256": rows_of(256),
    "by length": by_length,
}
