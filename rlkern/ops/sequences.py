"""Sequences of tokens, padded ``[..., time]`` or packed ``[tokens]`` with ``cu_seqlens``: sums over them, values of them, weights of their tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def sequence_of_token(tokens: int, cu_seqlens: Tensor) -> Tensor:
    """The sequence that each packed token belongs to; the number of sequences for tokens beyond the last one."""
    return torch.bucketize(torch.arange(tokens, device=cu_seqlens.device), cu_seqlens[1:].long(), right=True)


def sequence_sum(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sum over each sequence: ``[..., time]`` to ``[...]``, or ``[tokens]`` to ``[sequences]``."""
    return x.sum(-1) if cu_seqlens is None else torch.segment_reduce(x, "sum", offsets=cu_seqlens.long(), unsafe=True)


def to_tokens(y: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """One value a sequence, given to each of its tokens: the shape of ``like``; 0 for tokens beyond the last sequence."""
    if cu_seqlens is None:
        return y.unsqueeze(-1).expand_as(like)
    return torch.nn.functional.pad(y, (0, 1))[sequence_of_token(len(like), cu_seqlens)]


def one_a_sequence(x: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether ``x`` has one value for each sequence: a number, [..., 1], [batch] for [batch, time], [sequences] for [tokens]."""
    if x.dim() == 0 or cu_seqlens is not None:
        return x.shape != like.shape
    return x.shape == like.shape[:-1] or x.shape[-1] == 1


def per_token(x: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``x``, one for each token or each sequence or broadcast, in the shape of ``like``. Where there are as many tokens as sequences, one a token."""
    if x.shape == like.shape:
        return x
    if cu_seqlens is not None and x.shape == (cu_seqlens.shape[0] - 1,):
        return to_tokens(x, like, cu_seqlens)
    return (x.unsqueeze(-1) if x.shape == like.shape[:-1] else x).expand_as(like)


def divisor(
    aggregation: str,
    normalizer: Tensor | None,
    tokens: Callable[[], Tensor],
    sequences: Callable[[], Tensor],
    max_length: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The number that the sum of (weighted) losses is divided by, from the counts of tokens and of non-empty sequences; 1 where that is 0."""
    if normalizer is not None:
        count = normalizer.to(dtype)
        count = count + (count == 0)
    elif aggregation == "sum":
        return torch.ones((), dtype=dtype, device=device)
    else:
        count = (tokens if aggregation == "token-mean" else sequences)().to(dtype).clamp(min=1)
    return count * max_length if aggregation == "seq-mean-token-sum-norm" else count


def aggregation_weights(
    mask: Tensor, aggregation: str, dtype: torch.dtype, normalizer: Tensor | None, max_length: float | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The weight of each token's loss, of the shape of ``mask``. ``max_length`` None: the length of the time dimension."""
    m = mask.to(dtype)
    longest = float(mask.shape[-1] if max_length is None else max_length)
    by = divisor(aggregation, normalizer, m.sum, lambda: (sequence_sum(m, cu_seqlens) > 0).sum(), longest, dtype, m.device)
    if aggregation == "seq-mean-token-mean":
        return m / to_tokens(sequence_sum(m, cu_seqlens), m, cu_seqlens).clamp(min=1) / by
    return m / by
