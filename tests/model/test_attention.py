"""Attention over histories that lie end to end: exact, without padding, and apart from each other."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from recgpt.config import ModelSettings
from recgpt.data.packing import Histories, pack
from recgpt.model.attention import CausalSelfAttention, Layout, attend_by_length, attend_packed
from recgpt.model.gpt import GPT

MAX_HISTORY = 50
TOKENS_PER_BATCH = 512
HEADS, HEAD_WIDTH = 2, 8
LENGTHS = [[3, 1, 5, 3, 1, 1], [4], [1, 1, 1], [2, 9, 2, 7], [5, 4, 3, 2, 1]]


def layout_of(lengths, device="cpu"):
    return Layout.from_offsets(torch.tensor([0, *lengths], device=device).cumsum(0))


def plain_attention(qkv_T3HK, layout):
    """Slow twin: every token beside every other, and a mask over all that it may not see."""
    query_HTK, key_HTK, value_HTK = (part.transpose(0, 1) for part in qkv_T3HK.unbind(1))
    scores_HTT = query_HTK @ key_HTK.transpose(1, 2) / HEAD_WIDTH**0.5
    same_TT = layout.row[:, None] == layout.row[None, :]
    visible_TT = same_TT & (layout.position[:, None] >= layout.position[None, :])
    return (scores_HTT.masked_fill(~visible_TT, -torch.inf).softmax(-1) @ value_HTK).transpose(0, 1)


def random_tokens(layout, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(len(layout.row), 3, HEADS, HEAD_WIDTH, dtype=torch.float64, generator=generator)
    return qkv.to(device, dtype).requires_grad_()


def outcome(attend, qkv_T3HK, layout):
    """What a form gives, and the gradient of a sum in which every value counts differently."""
    attended = attend(qkv_T3HK, layout)
    weight = torch.linspace(1, 2, attended.numel(), device=attended.device).view(attended.shape)
    (gradient,) = torch.autograd.grad((attended * weight.to(attended.dtype)).sum(), qkv_T3HK)
    return attended.detach(), gradient


@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_by_length_equals_the_slow_twin(lengths):
    layout = layout_of(lengths)
    qkv = random_tokens(layout)
    expected = outcome(plain_attention, qkv, layout)
    torch.testing.assert_close(outcome(attend_by_length, qkv, layout), expected)


def test_histories_without_tokens_take_no_part():
    layout = layout_of([0, 2, 0, 3, 0])
    qkv = random_tokens(layout)
    torch.testing.assert_close(attend_by_length(qkv, layout), plain_attention(qkv, layout))


def test_the_order_by_length_by_hand():
    order = layout_of([2, 1, 2, 3]).by_length
    assert order.groups == [(1, 1), (2, 2), (1, 3)]
    assert order.token_T.tolist() == [2, 0, 1, 3, 4, 5, 6, 7]
    assert order.place_T.tolist() == [1, 2, 0, 3, 4, 5, 6, 7]


def test_the_kernel_for_packed_histories_is_called_by_its_documentation(monkeypatch):
    """What PyTorch says the kernel does, done plainly; its signature is the installed one."""
    signature = inspect.signature(varlen.varlen_attn)

    def as_documented(*arguments, **options):
        call = signature.bind(*arguments, **options)
        call.apply_defaults()
        given = call.arguments
        assert given["window_size"] == (-1, 0), "causal"
        assert given["cu_seq_q"].dtype == given["cu_seq_k"].dtype == torch.int32
        assert given["max_q"] == given["max_k"] == int(given["cu_seq_q"].diff().max())
        assert given["cu_seq_q"].equal(given["cu_seq_k"])
        qkv_T3HK = torch.stack([given["query"], given["key"], given["value"]], 1)
        return plain_attention(qkv_T3HK, Layout.from_offsets(given["cu_seq_q"].long()))

    monkeypatch.setattr(varlen, "varlen_attn", as_documented)
    layout = layout_of(LENGTHS[0])
    qkv = random_tokens(layout)
    torch.testing.assert_close(attend_packed(qkv, layout), plain_attention(qkv, layout))


def test_the_kernel_for_packed_histories_has_shapes_and_a_backward():
    """On no device at all: PyTorch checks the calls and works out shapes, and computes nothing."""
    layout = layout_of(LENGTHS[0])
    qkv = torch.empty(len(layout.row), 3, HEADS, HEAD_WIDTH, dtype=torch.bfloat16, device="meta")
    qkv.requires_grad_()
    layout.offsets = layout.offsets.to("meta")
    attended, gradient = outcome(attend_packed, qkv, layout)
    assert attended.shape == (len(layout.row), HEADS, HEAD_WIDTH)
    assert gradient.shape == qkv.shape
    assert attended.dtype == gradient.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cuda_the_kernel_for_packed_histories_equals_attention_by_length(lengths, dtype):
    layout = layout_of(lengths, "cuda")
    qkv = random_tokens(layout, dtype, "cuda")
    expected = outcome(attend_by_length, qkv.detach().double().requires_grad_(), layout)
    for mine, exact in zip(outcome(attend_packed, qkv, layout), expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=0.05, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_half_precision_takes_the_kernel_for_packed_histories(monkeypatch):
    calls = []
    kernel = varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **o: calls.append(1) or kernel(*a, **o))
    layer = CausalSelfAttention(HEADS * HEAD_WIDTH, HEADS).cuda()
    layout = layout_of(LENGTHS[0], "cuda")
    x_TD = torch.randn(len(layout.row), HEADS * HEAD_WIDTH, device="cuda")
    exact = layer(x_TD, layout)
    assert not calls, "float32 takes the other form"
    with torch.autocast("cuda", torch.bfloat16):
        attended = layer(x_TD, layout)
    assert len(calls) == 1
    torch.testing.assert_close(attended.float(), exact, atol=0.05, rtol=0.05)
    attended.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_no_attention_crosses_two_users():
    """Other items of one user leave the vectors of all others as they are, bit for bit."""
    torch.manual_seed(0)
    gpt = GPT(ModelSettings(max_history=MAX_HISTORY)).eval()
    lists = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 1], [2, 3], [4, 5, 6, 7, 8, 9]]
    before = vectors_of_users(gpt, lists)
    for changed in range(len(lists)):
        others = [
            [item + 10 if user == changed else item for item in items] for user, items in enumerate(lists)
        ]
        after = vectors_of_users(gpt, others)
        for user in range(len(lists)):
            assert torch.equal(before[user], after[user]) == (user != changed)


def vectors_of_users(gpt, lists):
    """The interest vectors of each user, through a packed batch."""
    lengths = [len(items) for items in lists]
    values = np.array([item for items in lists for item in items], np.int32)
    batch = pack(Histories(values, np.cumsum([0, *lengths]), np.arange(len(lists))), MAX_HISTORY)
    item_RD = torch.randn(20, gpt.settings.vector_width, generator=torch.Generator().manual_seed(1))
    layout = Layout.from_offsets(batch.offsets)
    interest = gpt(item_RD[batch.item_index_T], layout, gpt.user_rows(batch.user_hash_B))
    return interest.split(batch.offsets.diff().tolist())


def share_of_padding(history_lengths, monkeypatch):
    """Of all positions that linear layers and attention compute, those that hold no token."""
    gpt = GPT(ModelSettings(members=1, max_history=MAX_HISTORY, dropout=0.0))
    computed = {"linear": 0, "attention": 0}
    kernel = F.scaled_dot_product_attention

    def counting(query, *arguments, **options):
        computed["attention"] += query.shape[0] * query.shape[2]
        return kernel(query, *arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    layers = [module for module in gpt.modules() if isinstance(module, torch.nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(
            lambda _, inputs, __: computed.update(linear=computed["linear"] + len(inputs[0]))
        )
    tokens = 0
    for batch in batches(history_lengths):
        tokens += len(batch.item_index_T)
        layout = Layout.from_offsets(batch.offsets)
        gpt(torch.randn(len(layout.row), gpt.settings.vector_width), layout, gpt.user_rows(batch.user_hash_B))
    assert tokens > 0
    return {
        "linear": 1 - len(layers) * tokens / computed["linear"],
        "attention": 1 - gpt.settings.layers * tokens / computed["attention"],
    }


def batches(history_lengths):
    """Packed batches of about TOKENS_PER_BATCH tokens; the items do not matter."""
    ends = np.cumsum(np.minimum(history_lengths, MAX_HISTORY))
    for part in np.split(history_lengths, np.flatnonzero(np.diff(ends // TOKENS_PER_BATCH)) + 1):
        offsets = np.concatenate([[0], np.cumsum(part)])
        yield pack(Histories(np.ones(offsets[-1], np.int32), offsets, np.arange(len(part))), MAX_HISTORY)


def test_little_is_padding_where_lengths_vary(monkeypatch):
    lengths = np.random.default_rng(0).geometric(0.1, 2000) + 1
    shares = share_of_padding(lengths, monkeypatch)
    assert max(shares.values()) <= 0.03, shares


@pytest.mark.realdata
def test_little_is_padding_on_beauty(shared_data: Path, monkeypatch):
    log = (shared_data / "Beauty.txt").read_text().splitlines()
    lengths = np.array([len(line.split()) - 3 for line in log])  # without the user and two held-out items
    assert 1 - np.minimum(lengths - 1, MAX_HISTORY).mean() / MAX_HISTORY > 0.88, "padded to 50"
    shares = share_of_padding(np.random.default_rng(0).permutation(lengths), monkeypatch)
    assert max(shares.values()) <= 0.03, shares
