"""The GPT body: from item vectors to interest vectors. It knows no item table, device or rank.

Shapes: T tokens of B histories laid end to end, D width. A token's input is
item vector + user vector + position vector + segment vector (Zhang et al. 2024, section 3).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from recgpt.config import ModelSettings
from recgpt.model.attention import CausalSelfAttention, KeyValueCache, Layout
from recgpt.model.item_table import INIT_STANDARD_DEVIATION
from recgpt.model.members import MemberLinear, joined, member_norm
from recgpt.model.unit_rows import unit
from recgpt.model.users import KnownUsers
from recgpt.schema import UNKNOWN_USER

FEED_FORWARD_FACTOR = 4


@dataclass
class HistoryState:
    """What recall keeps of each encoded history so that one more item costs one position."""

    caches: list[KeyValueCache]  # one per layer
    next_position: Tensor  # int64 [B]
    user_BD: Tensor | None  # user vectors; None if the model is not personal

    def select(self, row_N: Tensor) -> "HistoryState":
        """A state of N histories, each a copy of that of a row (int64 [N], with repeats)."""
        caches = [KeyValueCache(cache.key_BHSK[row_N], cache.value_BHSK[row_N]) for cache in self.caches]
        user_ND = None if self.user_BD is None else self.user_BD[row_N]
        return HistoryState(caches, self.next_position[row_N], user_ND)


class FeedForward(nn.Sequential):
    """Position-wise two-layer network, wider inside."""

    def __init__(self, width: int, members: int):
        inside = FEED_FORWARD_FACTOR * width
        super().__init__(
            MemberLinear(width, inside, members), nn.GELU(), MemberLinear(inside, width, members)
        )


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, settings: ModelSettings):
        super().__init__()
        width, members = settings.vector_width, settings.members
        self.attention_norm = member_norm(width, members)
        self.attention = CausalSelfAttention(width, settings.heads * members, members)
        self.feed_forward_norm = member_norm(width, members)
        self.feed_forward = FeedForward(width, members)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        return self._finish(x_TD, self.attention(self.attention_norm(x_TD), layout))

    def prefill(self, x_TD: Tensor, layout: Layout, extra: int) -> tuple[Tensor, KeyValueCache]:
        attended_TD, cache = self.attention.prefill(self.attention_norm(x_TD), layout, extra)
        return self._finish(x_TD, attended_TD), cache

    def prefill_last(
        self, x_TD: Tensor, layout: Layout, last_B: Tensor, extra: int
    ) -> tuple[Tensor, KeyValueCache]:
        """As ``prefill`` for the tokens ``last_B`` alone, [B, D]: all that is wanted of the last block."""
        attended_BD, cache = self.attention.prefill_last(self.attention_norm(x_TD), layout, last_B, extra)
        return self._finish(x_TD[last_B], attended_BD), cache

    def extend(self, x_BD: Tensor, position_B: Tensor, cache: KeyValueCache) -> Tensor:
        return self._finish(x_BD, self.attention.extend(self.attention_norm(x_BD), position_B, cache))

    def _finish(self, x_TD: Tensor, attended_TD: Tensor) -> Tensor:
        x_TD = x_TD + self.dropout(attended_TD)
        return x_TD + self.dropout(self.feed_forward(self.feed_forward_norm(x_TD)))


class GPT(nn.Module):
    """Causal decoder over one user's item vectors; its output at each position is an interest vector.

    With user kind `table` two attributes are set from outside before the first call: ``user``, which
    gives the vectors of user rows, and ``known_users``. During training ``user`` is no module but a sharded
    table, whose lookups are collective: ``forward`` and ``prefill`` make one each, whatever the batch.
    """

    user: Callable[[Tensor], Tensor] | None

    def __init__(self, settings: ModelSettings):
        super().__init__()
        self.settings = settings
        self.position = nn.Embedding(settings.max_history, settings.vector_width)
        self.segment = nn.Embedding(2, settings.vector_width)
        self.user = user_module(settings)
        gated = settings.user.kind != "none" and settings.user.combine == "gate"
        width, members = settings.vector_width, settings.members
        self.user_gate = MemberLinear(2 * width, width, members, parts_in=2) if gated else None
        self.known_users: KnownUsers | None = None
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.final_norm = member_norm(width, members)
        self.apply(_initialise)

    def forward(
        self,
        item_TD: Tensor,
        layout: Layout,
        user_row_B: Tensor,
        segment_T: Tensor | None = None,
        position_T: Tensor | None = None,
    ) -> Tensor:
        """Interest vectors [T, D] at every token.

        Args:
            item_TD: item vectors from the item table.
            layout: where each token stands.
            user_row_B: int64, from ``user_rows``.
            segment_T: int64, 0 real or 1 generated; all real if not given.
            position_T: int64 below ``max_history``; the place in ``layout`` if not given.
        """
        x_TD = self._embed(item_TD, layout, self._user_vectors(user_row_B), segment_T, position_T)
        for block in self.blocks:
            x_TD = block(x_TD, layout)
        return self._interest(x_TD)

    def prefill(
        self, item_TD: Tensor, layout: Layout, user_row_B: Tensor, extra: int
    ) -> tuple[Tensor, HistoryState]:
        """Interest vectors [B, D] after each history, and the state to append up to ``extra`` items.

        No history may be empty, and ``layout.longest + extra`` may not exceed ``max_history``.
        """
        assert layout.longest + extra <= self.settings.max_history, "no room to append generated items"
        user_BD = self._user_vectors(user_row_B)
        x_TD = self._embed(item_TD, layout, user_BD, None, None)
        caches = []
        *blocks, last_block = cast(Iterable[Block], self.blocks)
        for block in blocks:
            x_TD, cache = block.prefill(x_TD, layout, extra)
            caches.append(cache)
        x_BD, cache = last_block.prefill_last(x_TD, layout, layout.offsets[1:] - 1, extra)
        caches.append(cache)
        return self._interest(x_BD), HistoryState(caches, layout.offsets.diff(), user_BD)

    def extend(self, item_BD: Tensor, segment: int, state: HistoryState) -> Tensor:
        """Append one item to each history and return the next interest vectors [B, D]; updates ``state``."""
        segment_B = torch.full_like(state.next_position, segment)
        x_BD = self._sum_inputs(item_BD, state.user_BD, segment_B, state.next_position)
        for block, cache in zip(cast(Iterable[Block], self.blocks), state.caches, strict=True):
            x_BD = block.extend(x_BD, state.next_position, cache)
        state.next_position = state.next_position + 1
        return self._interest(x_BD)

    def user_rows(self, user_hash_B: Tensor) -> Tensor:
        """Rows for the user vectors, int64 [B], from user hashes (int64 [B]).

        From 1 on; ``UNKNOWN_USER`` for users that a table of users does not know, and for all if the
        model is not personal.
        """
        kind = self.settings.user.kind
        if kind == "none":
            return torch.full_like(user_hash_B, UNKNOWN_USER)
        if kind == "hashed":
            return user_hash_B.remainder(self.settings.user.buckets) + 1
        assert self.known_users is not None, "a table of users needs gpt.known_users"
        return self.known_users.rows(user_hash_B)

    def _interest(self, x_TD: Tensor) -> Tensor:
        """Interest vectors [T, D]: their dot products with item vectors are the scores."""
        interest_TD = self.final_norm(x_TD)
        if self.settings.similarity == "cosine":
            interest_TD = unit(interest_TD, self.settings.members) / self.settings.temperature
        return interest_TD / self.settings.members

    def _user_vectors(self, user_row_B: Tensor) -> Tensor | None:
        if self.settings.user.kind == "none":
            return None
        assert self.user is not None, "a table of users needs gpt.user"
        return self.user(user_row_B)

    def _embed(
        self,
        item_TD: Tensor,
        layout: Layout,
        user_BD: Tensor | None,
        segment_T: Tensor | None,
        position_T: Tensor | None,
    ) -> Tensor:
        user_TD = None if user_BD is None else user_BD[layout.row]
        position_T = layout.position if position_T is None else position_T
        segment_T = torch.zeros_like(layout.position) if segment_T is None else segment_T
        return self._sum_inputs(item_TD, user_TD, segment_T, position_T)

    def _sum_inputs(
        self, item_TD: Tensor, user_TD: Tensor | None, segment_T: Tensor, position_T: Tensor
    ) -> Tensor:
        x_TD = item_TD + self.position(position_T) + self.segment(segment_T)
        if user_TD is not None:
            x_TD = x_TD + self._let_through(user_TD, item_TD)
        return self.dropout(x_TD)

    def _let_through(self, user_TD: Tensor, item_TD: Tensor) -> Tensor:
        """What of the user vectors is added to the item vectors."""
        if self.user_gate is None:
            return user_TD
        both_TE = joined(item_TD, user_TD, self.settings.members)
        return user_TD * torch.sigmoid(self.user_gate(both_TE))


def user_module(settings: ModelSettings) -> nn.Module | None:
    """The user vectors that are part of the GPT; None if there are none, or if they are set from outside."""
    if settings.user.kind != "hashed":
        return None
    return nn.Embedding(settings.user.buckets + 1, settings.vector_width)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STANDARD_DEVIATION)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
