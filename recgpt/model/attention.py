"""Causal self-attention over histories that lie end to end, with a key/value cache for recall.

Shapes: T tokens of all histories, B histories, L the longest of them, N histories that have one length L,
H heads, K width per head, D = H * K; 3 stands for query, key and value. Suffixes of names give the shape.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recgpt.model.members import MemberLinear, member_linear


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
    def by_length(self) -> "ByLength":
        """The same tokens, histories of one length together."""
        length_B = self.offsets.diff()
        token_T = length_B[self.row].sort(stable=True).indices
        lengths, numbers = length_B[length_B > 0].unique(return_counts=True)
        return ByLength(
            token_T, token_T.argsort(), list(zip(numbers.tolist(), lengths.tolist(), strict=True))
        )

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
class ByLength:
    """An order of the tokens of a packed batch in which histories of one length stand side by side."""

    token_T: Tensor  # int64, the token at each place
    place_T: Tensor  # int64, the place of each token
    groups: list[tuple[int, int]]  # (histories, their length), in order


@dataclass
class KeyValueCache:
    """Keys and values of one layer, with room for the items that recall will append."""

    key_BHSK: Tensor
    value_BHSK: Tensor


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and earlier tokens of its own history."""

    def __init__(self, width: int, heads: int, members: int = 1):
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.members = members
        self.query_key_value = MemberLinear(width, 3 * width, members, parts_out=3)
        self.output = MemberLinear(width, width, members)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        qkv_T3HK = self._heads(self.query_key_value(x_TD), 3)
        if not len(x_TD):
            attended_THK = qkv_T3HK[:, 2]  # every parameter gets a gradient all the same
        elif _kernel_for_packed_takes(qkv_T3HK):
            attended_THK = attend_packed(qkv_T3HK, layout)
        else:
            attended_THK = attend_by_length(qkv_T3HK, layout)
        return self.output(attended_THK.flatten(1))

    def prefill(self, x_TD: Tensor, layout: Layout, extra: int) -> tuple[Tensor, KeyValueCache]:
        """As ``forward``, and keep keys and values with room for ``extra`` more tokens a history."""
        # The cache is padded to [B, L] in any case. Padding stands at the end, where a causal mask hides
        # it from every real token.
        qkv_T3HK = self._heads(self.query_key_value(x_TD), 3)
        query_BHLK, key_BHLK, value_BHLK = layout.pad(qkv_T3HK).permute(2, 0, 3, 1, 4)
        attended_BHLK = _attention(query_BHLK, key_BHLK, value_BHLK, visible=None)
        attended_TD = layout.unpad(attended_BHLK.transpose(1, 2)).flatten(1)
        room = (0, 0, 0, extra)
        return self.output(attended_TD), KeyValueCache(F.pad(key_BHLK, room), F.pad(value_BHLK, room))

    def prefill_last(
        self, x_TD: Tensor, layout: Layout, last_B: Tensor, extra: int
    ) -> tuple[Tensor, KeyValueCache]:
        """As ``prefill``, but attended only for the last token of each history, ``last_B``: [B, D]."""
        share = self.heads * self.head_width // self.members
        (query_weight, rest_weight), (query_bias, rest_bias) = (
            (
                part.flatten(0, 1)
                for part in parts.unflatten(0, (self.members, -1)).split([share, 2 * share], 1)
            )
            for parts in (self.query_key_value.weight, self.query_key_value.bias)
        )
        query_BD = member_linear(x_TD[last_B], query_weight, query_bias, self.members)
        query_BHK = self._heads(query_BD, 1).squeeze(1)
        kv_T2HK = self._heads(member_linear(x_TD, rest_weight, rest_bias, self.members), 2)
        key_BHLK, value_BHLK = layout.pad(kv_T2HK).permute(2, 0, 3, 1, 4)
        slots = torch.arange(layout.longest, device=x_TD.device)
        visible_B11L = (slots < layout.offsets.diff()[:, None])[:, None, None, :]
        attended_BH1K = _attention(query_BHK[:, :, None], key_BHLK, value_BHLK, visible_B11L)
        room = (0, 0, 0, extra)
        cache = KeyValueCache(F.pad(key_BHLK, room), F.pad(value_BHLK, room))
        return self.output(attended_BH1K.flatten(1)), cache

    def extend(self, x_BD: Tensor, position_B: Tensor, cache: KeyValueCache) -> Tensor:
        """One more token per history, at ``position_B`` (int64); writes into the cache."""
        query_BHK, key_BHK, value_BHK = self._heads(self.query_key_value(x_BD), 3).unbind(1)
        rows = torch.arange(len(x_BD), device=x_BD.device)
        cache.key_BHSK[rows, :, position_B] = key_BHK
        cache.value_BHSK[rows, :, position_B] = value_BHK
        slots = torch.arange(cache.key_BHSK.shape[2], device=x_BD.device)
        visible_B11S = (slots <= position_B[:, None])[:, None, None, :]
        attended_BH1K = _attention(query_BHK[:, :, None], cache.key_BHSK, cache.value_BHSK, visible_B11S)
        return self.output(attended_BH1K.reshape(x_BD.shape))

    def _heads(self, x_TX: Tensor, parts: int) -> Tensor:
        """[T, parts, H, K] of what a layer gives, in which each member's parts stand one after the other."""
        share = self.heads // self.members
        return x_TX.view(-1, self.members, parts, share, self.head_width).transpose(1, 2).flatten(2, 3)


def attend_by_length(qkv_T3HK: Tensor, layout: Layout) -> Tensor:
    """Causal attention inside each history, [T, H, K]; those of one length are a batch without padding."""
    order = layout.by_length
    parts = qkv_T3HK[order.token_T].split([number * length for number, length in order.groups])
    attended = []
    for part, group in zip(parts, order.groups, strict=True):
        query_NHLK, key_NHLK, value_NHLK = part.unflatten(0, group).permute(2, 0, 3, 1, 4)
        attended_NHLK = _attention(query_NHLK, key_NHLK, value_NHLK, visible=None)
        attended.append(attended_NHLK.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)[order.place_T]


def attend_packed(qkv_T3HK: Tensor, layout: Layout) -> Tensor:
    """The same by one kernel that takes histories as they lie; see ``_kernel_for_packed_takes``."""
    # Loads torch's compiler: 70 MiB and most of a second, which a process without a GPU can do without.
    from torch.nn.attention import varlen

    query_THK, key_THK, value_THK = qkv_T3HK.unbind(1)
    offsets, longest = layout.offsets.int(), layout.longest
    window = (-1, 0)  # a token sees all before it and none after
    attended_THK = varlen.varlen_attn(
        query_THK, key_THK, value_THK, offsets, offsets, longest, longest, window_size=window
    )
    return cast(Tensor, attended_THK)


def _kernel_for_packed_takes(qkv_T3HK: Tensor) -> bool:
    """FlashAttention computes on CUDA from Ampere on, in half precision, with heads of certain widths."""
    return (
        qkv_T3HK.is_cuda
        and qkv_T3HK.dtype in (torch.bfloat16, torch.float16)
        and qkv_T3HK.shape[-1] % 8 == 0
        and qkv_T3HK.shape[-1] <= 256
        and torch.cuda.get_device_capability(qkv_T3HK.device) >= (8, 0)
    )


def _attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Attention to the visible slots; causal if ``visible`` is None. All [B, H, ..., K]."""
    if not len(query):
        return query + 0 * (key + value).sum()  # PyTorch's kernels refuse a batch without histories
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, is_causal=visible is None)
