"""Small random models for the retrieval tests."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from recgpt.config import ModelSettings, UserSettings
from recgpt.model.gpt import GPT
from recgpt.model.unit_rows import unit

MakeModel = Callable[..., tuple[GPT, Tensor]]


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """A GPT in eval mode and an item table with vectors large enough that histories tell users apart."""

    def make(
        num_items: int,
        *,
        max_history: int = 8,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        similarity: Literal["cosine", "dot"] = "dot",
        members: int = 1,
    ):
        generator = torch.Generator().manual_seed(seed)
        settings = ModelSettings(
            width=8,
            layers=2,
            heads=2,
            members=members,
            max_history=max_history,
            similarity=similarity,
            user=UserSettings(kind="hashed", buckets=5),
        )
        gpt = GPT(settings).to(dtype).eval()
        for parameter in gpt.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        table_RD = torch.randn(num_items + 1, settings.vector_width, generator=generator).to(dtype)
        return gpt, unit(table_RD, members) if similarity == "cosine" else table_RD

    return make
