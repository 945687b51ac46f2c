"""Numbers and sequences, as the formulas need them: products that overflow, clamps, sums over sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
Limits = float | tuple[float | None, float | None] | None  # [-x, x], or (low, high) with None for no bound


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- where a number overflows ---------------------------------------------------------------------------------------------------------------
# exp(log r) is not a number to multiply by where the objective does not need it: 0 times infinity is 0, in values and in gradients.


def times(x: Tensor, y: Tensor) -> Tensor:
    """x y, 0 where x is 0, whatever y is."""
    return torch.where(x == 0, torch.zeros_like(x), x * y)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return times(x, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return torch.where(y == 0, torch.zeros_like(g), times(g, y)), torch.where(g == 0, torch.zeros_like(g), times(x, g))


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return torch.where(slope == 0, torch.zeros_like(g), times(g, slope)), None, None


def product(x: Tensor, y: Tensor) -> Tensor:
    """x y, 0 where x is 0, of equal shapes;  a derivative is 0 where one of its two factors is."""
    return _Product.apply(x, y)


def chain(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """``value``, a function of x with the derivative ``slope``, whose products by the chain rule are 0 where one of the factors is."""
    return _Chain.apply(x, value.detach(), slope.detach())


def exp(x: Tensor) -> Tensor:
    y = x.detach().exp()
    return chain(x, y, y)


# ---- sequences -----------------------------------------------------------------------------------------------------------------------------


def clamp(x: Tensor, limits: Limits) -> Tensor:
    """x clamped to [-limit, limit], or to a pair (low, high) in which None is no bound.  The gradient passes on the edges, not outside."""
    low, high = limits if isinstance(limits, tuple) else (None if limits is None else -limits, limits)
    return x if low is None and high is None else torch.clamp(x, low, high)


def sequence_of_token(tokens: int, cu_seqlens: Tensor) -> Tensor:
    """The sequence that each packed token belongs to; the number of sequences for tokens beyond the last one."""
    return torch.bucketize(torch.arange(tokens, device=cu_seqlens.device), cu_seqlens[1:].long(), right=True)


def sequence_sum(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sum over each sequence: [..., time] -> [...], or [tokens] -> [sequences]."""
    if cu_seqlens is None:
        return x.sum(-1)
    return torch.segment_reduce(x, "sum", offsets=cu_seqlens.long(), unsafe=True)


def to_tokens(y: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """One value a sequence, given to each of its tokens: the shape of ``like``."""
    if cu_seqlens is None:
        return y.unsqueeze(-1).expand_as(like)
    return torch.cat([y, y.new_zeros(1)])[sequence_of_token(len(like), cu_seqlens)]


def one_a_sequence(x: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether x has one value for each sequence: a number, [..., 1], [batch] for [batch, time], [sequences] for [tokens]."""
    if x.dim() == 0 or cu_seqlens is not None:
        return x.shape != like.shape
    return x.shape == like.shape[:-1] or x.shape[-1] == 1


def per_token(x: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x in the shape of ``like``. A 1-D x for [batch, time] is one value a sequence; for [tokens], it is where it does not have that shape."""
    if cu_seqlens is not None and x.shape != like.shape and x.shape == (len(cu_seqlens) - 1,):
        return to_tokens(x, like, cu_seqlens)
    return (x.unsqueeze(-1) if x.shape == like.shape[:-1] else x).expand_as(like)
