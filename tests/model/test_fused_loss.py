"""Liger's fused cross-entropy equals the block form; it needs CUDA and `pip install recgpt[cuda]`."""

import pytest
import torch

from recgpt.model.fused_loss import fused_cross_entropy, fused_kernel_fits
from recgpt.model.losses import softmax_loss_sum


def test_it_does_not_fit_a_cpu():
    assert not fused_kernel_fits(torch.zeros(1, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("targets", [0, 1, 700])
def test_equals_the_block_form(targets):
    pytest.importorskip("liger_kernel")
    generator = torch.Generator().manual_seed(0)
    interest = torch.randn(targets, 64, generator=generator).cuda().requires_grad_()
    table = (torch.randn(5001, 64, generator=generator) * 0.1).cuda().requires_grad_()
    target = torch.randint(1, 5001, (targets,), generator=generator).cuda()
    loss = fused_cross_entropy(interest, table, target)
    expected = softmax_loss_sum(interest, table, target, 1024, first=1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(2 * loss, (interest, table))
    expected_gradients = torch.autograd.grad(2 * expected, (interest, table))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-4)
