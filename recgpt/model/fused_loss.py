"""Full cross-entropy by Liger's fused CUDA kernel, where it fits: a whole table on one GPU.

Shapes: T targets, D width, R table rows (row 0 is padding).

Liger (Hsu et al. 2024, arXiv 2410.10989) computes scores, loss and gradients chunk by chunk in one
go. It has no form in which ranks combine their sums, so that a sharded table keeps to the block form.
"""

import importlib.util

import torch
from torch import Tensor


def fused_kernel_fits(interest_TD: Tensor) -> bool:
    """Whether the tensors lie on a CUDA device, in a type that Liger knows, and Liger is installed."""
    known = interest_TD.dtype in (torch.float32, torch.bfloat16)
    return interest_TD.is_cuda and known and importlib.util.find_spec("liger_kernel") is not None


def fused_cross_entropy(interest_TD: Tensor, table_RD: Tensor, target_T: Tensor) -> Tensor:
    """Sum over targets (int64 [T], item indices >= 1) of the full cross-entropy; a scalar."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if not len(target_T):
        return 0 * (interest_TD.sum() + table_RD.sum())  # the kernel refuses an empty batch
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return loss(table_RD[1:], interest_TD, target_T - 1)
