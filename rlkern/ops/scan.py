"""Advantages and returns by one reverse linear recurrence over time (GAE, TD(lambda), V-trace). The work is the backends'."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_cu_seqlens
from .backends import backend_of
from .operators import fake_of, operator


class Steps(NamedTuple):
    """Per step, ``[rows, time]``; packed tokens are one row. All but the rewards may be absent."""

    rewards: Tensor
    values: Tensor | None
    logprobs: Tensor | None
    old_logprobs: Tensor | None
    mask: Tensor | None
    next_values: Tensor | None
    terminated: Tensor | None
    truncated: Tensor | None


class Sequences(NamedTuple):
    """Per sequence, ``[sequences]``, and where the packed ones begin."""

    last_values: Tensor | None
    cu_seqlens: Tensor | None
    gammas: Tensor | None
    lams: Tensor | None


class Numbers(NamedTuple):
    gamma: float
    lam: float
    rho_clip: float
    c_clip: float


class ScanOptions(NamedTuple):
    decay: bool  # through masked steps, which are otherwise skipped
    with_advantages: bool
    with_moments: bool


class Advantages(NamedTuple):
    """Of the shape of the rewards, advantages empty where not wanted; and of the advantages at valid steps, in float64, the number, sum and sum of
    squares, empty where not wanted."""

    advantages: Tensor
    returns: Tensor
    moments: Tensor

    @classmethod
    def empty(cls, steps: Steps, options: ScanOptions) -> Advantages:
        """Unfilled."""
        rewards, dtype = steps.rewards, result_dtype(steps)
        return cls(
            rewards.new_empty(rewards.shape if options.with_advantages else 0, dtype=dtype),
            rewards.new_empty(rewards.shape, dtype=dtype),
            cls.empty_moments(rewards, options),
        )

    @staticmethod
    def empty_moments(rewards: Tensor, options: ScanOptions) -> Tensor:
        return rewards.new_zeros(3 if options.with_moments else 0, dtype=torch.float64)


def result_dtype(steps: Steps) -> torch.dtype:
    """float64 if the rewards or the values are, float32 otherwise."""
    wide = any(x is not None and x.dtype == torch.float64 for x in (steps.rewards, steps.values))
    return torch.float64 if wide else torch.float32


def as_steps(x: Tensor) -> Tensor:
    """``[..., time]`` as ``[rows, time]``, in place where the last dimension has unit stride and the others one stride between them."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@operator("lambda_returns")
def lambda_returns(steps: Steps, sequences: Sequences, numbers: Numbers, options: ScanOptions, validate: bool, backend: str) -> Advantages:
    """Without values V = 0; with log-probs the V-trace corrections; ``sequences.gammas`` and ``lams`` take the place of the numbers."""
    rewards = steps.rewards
    if validate and sequences.cu_seqlens is not None:
        check_cu_seqlens(sequences.cu_seqlens, rewards.numel(), like=rewards, validate=True)
    if rewards.numel() == 0:
        return Advantages.empty(steps, options)
    moments = Advantages.empty_moments(rewards, options)
    advantages, returns = backend_of(backend).lambda_returns(
        Steps._make(None if x is None else as_steps(x) for x in steps),
        Sequences._make(None if x is None else x.reshape(-1).contiguous() for x in sequences),
        numbers,
        options,
        moments,
    )
    return Advantages(returns.new_empty(0) if advantages is None else advantages.view(rewards.shape), returns.view(rewards.shape), moments)


@fake_of(lambda_returns)
def _(steps: Steps, sequences: Sequences, numbers: Numbers, options: ScanOptions, validate: bool, backend: str) -> Advantages:
    return Advantages.empty(steps, options)


@operator("normalise")
def normalise(advantages: Tensor, mask: Tensor | None, moments: Tensor, eps: float, backend: str) -> Tensor:
    """(A - mean) / sqrt(var + eps) of contiguous advantages, 0 where masked; Bessel's variance, from the moments of :func:`lambda_returns`."""
    out = torch.empty_like(advantages)
    if advantages.numel():
        backend_of(backend).normalise(advantages, mask, moments, eps, out)
    return out


@fake_of(normalise)
def _(advantages: Tensor, mask: Tensor | None, moments: Tensor, eps: float, backend: str) -> Tensor:
    return torch.empty_like(advantages)
