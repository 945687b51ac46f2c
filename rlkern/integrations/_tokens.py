"""What the integrations share: sums over per-token tensors with a mask, as plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlkern._token_inputs import token_weights


def aggregate(loss: Tensor, mask: Tensor, aggregation: str, *, normalizer: float | Tensor | None = None, max_length: float | None = None) -> Tensor:
    """A per-token loss as ``rk.policy_loss`` aggregates it; masked entries are not read, and an empty batch gives 0."""
    valid = mask != 0
    weights = token_weights(valid, aggregation, loss.dtype, normalizer=normalizer, max_length=max_length, cu_seqlens=None, validate=None)
    return (weights * torch.where(valid, loss, 0.0)).sum()


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """The mean over the valid entries, float32; 0 where there is none."""
    valid = mask != 0
    return torch.where(valid, x.to(torch.float32), 0.0).sum(dim) / valid.sum(dim).clamp(min=1)
