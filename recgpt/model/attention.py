"""Causal self-attention over histories that lie end to end, with a key/value cache for recall.

Shapes: T tokens of all histories, B histories, L the longest of them, H heads, K width per head,
D = H * K. Suffixes of names give the shape: ``query_TD``.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def offsets_of_lengths(length_B: Tensor) -> Tensor:
    """Where lists of these lengths (int64 [B]) begin, laid end to end, and last their sum: int64 [B + 1]."""
    return F.pad(length_B.cumsum(0), (1, 0))


@dataclass
class Layout:
    """Where each token of a packed batch stands: B histories of T tokens in all, end to end."""

    offsets: Tensor  # int64 [B + 1], first token of each history and, last, T
    row: Tensor  # int64 [T], the history of each token
    position: Tensor  # int64 [T], 0-based place of each token in its history
    longest: int  # L

    @classmethod
    def from_offsets(cls, offsets: Tensor) -> "Layout":
        """Build from ``offsets``, int64 [B + 1] with offsets[0] = 0."""
        lengths = offsets.diff()
        row = torch.repeat_interleave(lengths)
        position = torch.arange(len(row), device=offsets.device) - offsets[row]
        return cls(offsets, row, position, int(lengths.max()) if len(lengths) else 0)

    @cached_property
    def buckets(self) -> list[tuple[Tensor, "Layout"]]:
        """Histories of similar length (up to 1, 2, 4, 8 ...) together: their tokens (int64) and layout."""
        length_B = self.offsets.diff()
        exponent_B = torch.log2(length_B.clamp(min=1).double()).ceil()
        exponents = exponent_B.unique().tolist()
        if len(exponents) < 2:
            return [(torch.arange(len(self.row), device=self.row.device), self)]
        chosen = [exponent_B == exponent for exponent in exponents]
        return [
            (
                chosen_B[self.row].nonzero().squeeze(1),
                Layout.from_offsets(offsets_of_lengths(length_B[chosen_B])),
            )
            for chosen_B in chosen
        ]

    @property
    def num_histories(self) -> int:
        return len(self.offsets) - 1

    def pad(self, packed_TX: Tensor) -> Tensor:
        """[T, ...] to [B, L, ...], zeros after the end of each history."""
        padded = packed_TX.new_zeros(self.num_histories, self.longest, *packed_TX.shape[1:])
        padded[self.row, self.position] = packed_TX
        return padded

    def unpad(self, padded_BLX: Tensor) -> Tensor:
        """[B, L, ...] back to [T, ...]."""
        return padded_BLX[self.row, self.position]


@dataclass
class KeyValueCache:
    """Keys and values of one layer, with room for the items that recall will append."""

    key_BHSK: Tensor
    value_BHSK: Tensor


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and earlier tokens of its own history.

    Tokens are padded to [B, L] only inside: padding stands at the end, where a causal mask
    already hides it from every real token, so no further mask is needed.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        # Cost follows the padded length squared, and most histories are much shorter than the longest.
        query_key_value_TX = self.query_key_value(x_TD)
        parts = [self._attend(query_key_value_TX[tokens], part)[0] for tokens, part in layout.buckets]
        place_T = torch.cat([tokens for tokens, _ in layout.buckets]).argsort()
        return self.output(torch.cat(parts)[place_T])

    def prefill(self, x_TD: Tensor, layout: Layout, extra: int) -> tuple[Tensor, KeyValueCache]:
        """As ``forward``, and keep keys and values with room for ``extra`` more tokens a history."""
        attended_TD, key_BHLK, value_BHLK = self._attend(self.query_key_value(x_TD), layout)
        room = (0, 0, 0, extra)
        return self.output(attended_TD), KeyValueCache(F.pad(key_BHLK, room), F.pad(value_BHLK, room))

    def extend(self, x_BD: Tensor, position_B: Tensor, cache: KeyValueCache) -> Tensor:
        """One more token per history, at ``position_B`` (int64); writes into the cache."""
        query_BHK, key_BHK, value_BHK = (
            self.query_key_value(x_BD).view(-1, 3, self.heads, self.head_width).unbind(1)
        )
        rows = torch.arange(len(x_BD), device=x_BD.device)
        cache.key_BHSK[rows, :, position_B] = key_BHK
        cache.value_BHSK[rows, :, position_B] = value_BHK
        slots = torch.arange(cache.key_BHSK.shape[2], device=x_BD.device)
        visible_B11S = (slots <= position_B[:, None])[:, None, None, :]
        attended_BH1K = _attention(query_BHK[:, :, None], cache.key_BHSK, cache.value_BHSK, visible_B11S)
        return self.output(attended_BH1K.reshape(x_BD.shape))

    def _attend(self, query_key_value_TX: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Attended values [T, D], and keys and values [B, H, L, K]; X = 3 * D."""
        qkv_BL3HK = layout.pad(query_key_value_TX.view(-1, 3, self.heads, self.head_width))
        query_BHLK, key_BHLK, value_BHLK = (part.transpose(1, 2) for part in qkv_BL3HK.unbind(2))
        attended_BHLK = _attention(query_BHLK, key_BHLK, value_BHLK, visible=None)
        attended_TD = layout.unpad(attended_BHLK.transpose(1, 2)).flatten(1)
        return attended_TD, key_BHLK, value_BHLK


def _attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Attention to the visible slots; causal if ``visible`` is None. All [B, H, ..., K]."""
    if not len(query):
        return query + 0 * (key + value).sum()  # PyTorch's kernels refuse a batch without histories
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, is_causal=visible is None)
