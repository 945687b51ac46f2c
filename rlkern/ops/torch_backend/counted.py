"""The tokens that count, of tensors of losses on tokens: the others are read as 0."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..select import bits, select
from ..sequences import divisor, per_token, sequence_sum, to_tokens


class Counted:
    """Reads tensors of shape S, or with one value a sequence, and adds up over tokens and sequences. ``mask``: None where all tokens count."""

    def __init__(self, like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype) -> None:
        self.like, self.mask, self.cu_seqlens, self.dtype = like, mask, cu_seqlens, dtype
        self.live = None if mask is None else bits(mask, dtype)

    def read(self, t: Tensor) -> Tensor:
        """A number a token, 0 where it does not count: there no number of ``t`` is read."""
        return self.zeroed(self.per_token(t))

    def per_token(self, t: Tensor) -> Tensor:
        """A number a token, also where it does not count."""
        t = per_token(t, self.like, self.cu_seqlens)
        return t if t.dtype == self.dtype else t.to(self.dtype)

    def zeroed(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """0 where a token does not count."""
        if self.live is None:
            return x if out is None else out.copy_(x)
        return select(self.live, x, out)

    def over_sequences(self, x: Tensor) -> Tensor:
        """The sum over the sequence of each token, of numbers that are 0 where it does not count."""
        return to_tokens(sequence_sum(x, self.cu_seqlens), x, self.cu_seqlens)

    @cached_property
    def ones(self) -> Tensor:
        """1 for each token that counts, else 0."""
        return self.zeroed(torch.ones(self.like.shape, dtype=self.dtype, device=self.like.device))

    def lengths(self, also: Tensor | None = None) -> Tensor:
        """How many of the sequence of each token count (times ``also``, 1 or 0); at least 1."""
        return self.over_sequences(self.ones if also is None else self.ones * also).clamp(min=1)

    def number(self, also: Tensor | None = None) -> Tensor:
        """How many count (times ``also``, 1 or 0)."""
        return self.count if also is None else (self.ones * also).sum()

    @cached_property
    def count(self) -> Tensor:
        """How many count."""
        if self.mask is None:
            return torch.full((), self.like.numel(), dtype=self.dtype, device=self.like.device)
        return torch.count_nonzero(self.mask).to(self.dtype)

    def divisor(self, aggregation: str, normalizer: Tensor | None, max_length: float, also: Tensor | None = None) -> Tensor:
        """See :func:`rlkern.ops.sequences.divisor`."""

        def sequences() -> Tensor:
            return (sequence_sum(self.ones if also is None else self.ones * also, self.cu_seqlens) > 0).sum()

        return divisor(aggregation, normalizer, lambda: self.number(also), sequences, max_length, self.dtype, self.like.device)
