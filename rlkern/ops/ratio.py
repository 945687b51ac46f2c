"""Ratios, importance weights and KL estimates of single tokens, by PyTorch on every device: elementwise, a few numbers a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import state_dtype
from .select import times
from .sequences import sequence_sum, to_tokens
from .torch_backend.terms import clamp, kl_terms


def _counted(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In this dtype, 0 where masked."""
    return x.to(dtype) if mask is None else torch.where(mask != 0, x.to(dtype), 0.0)


def importance_ratio(
    logprobs: Tensor, old_logprobs: Tensor | None, mask: Tensor | None, level: str, limits: tuple[float, float], cu_seqlens: Tensor | None
) -> Tensor:
    """exp(log r), 0 where masked; differentiable in the log-probs."""
    dtype = state_dtype(logprobs.dtype)
    lp = _counted(logprobs, mask, dtype)
    log_r = lp - (lp.detach() if old_logprobs is None else _counted(old_logprobs.detach(), mask, dtype))
    if level != "token":
        total = sequence_sum(log_r, cu_seqlens)
        if level != "sequence_sum":
            total = total / sequence_sum(_counted(torch.ones_like(lp), mask, dtype), cu_seqlens).clamp(min=1)
        total = to_tokens(total, lp, cu_seqlens)
        log_r = lp - lp.detach() + total.detach() if level == "sequence_token" else total
    return _counted(clamp(log_r, *limits).exp(), mask, dtype)


def importance_weights(
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    mask: Tensor | None,
    by_sequence: bool,
    limits: tuple[float, float],
    outside_is_zero: bool,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """exp(old - sampling), or exp of its sum over the sequence, limited; 0 where masked. No gradient."""
    dtype = state_dtype(old_logprobs.dtype)
    d = _counted(old_logprobs.detach().to(dtype) - sampling_logprobs.detach().to(dtype), mask, dtype)
    if by_sequence:
        d = to_tokens(sequence_sum(d, cu_seqlens), d, cu_seqlens)
    w = d.exp()
    limited = clamp(w, *limits)
    return _counted(torch.where(limited == w, w, 0.0) if outside_is_zero else limited, mask, dtype)


class _KL(torch.autograd.Function):
    """The estimate, with the derivative that is defined with it."""

    @staticmethod
    def forward(ctx: Any, lp: Tensor, ref: Tensor, estimator: str, *limits: tuple[float, float]) -> Tensor:
        value, slope, _ = kl_terms(lp, ref, None, estimator, *limits)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return times(slope, -g), None, None, None, None


def kl_penalty(
    logprobs: Tensor, ref_logprobs: Tensor, estimator: str, mask: Tensor | None, input_limits: tuple[float, float], output_limits: tuple[float, float]
) -> Tensor:
    """0 where masked; differentiable in the log-probs."""
    dtype = state_dtype(logprobs.dtype)
    lp, ref = _counted(logprobs, mask, dtype), _counted(ref_logprobs.detach(), mask, dtype)
    return _counted(_KL.apply(lp, ref, estimator, input_limits, output_limits), mask, dtype)
