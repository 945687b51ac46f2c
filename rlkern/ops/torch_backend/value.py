"""The value loss on tokens in PyTorch, with the gradient written out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..select import as_number, bits, select, times
from ..sequences import divisor, sequence_sum, to_tokens
from ..value import ValueOptions, ValueResults, Values


def value_loss(x: Values, options: ValueOptions, out: ValueResults) -> None:
    """Fill ``out``."""
    dtype = out.numbers.dtype
    live = None if x.mask is None else bits(x.mask != 0, dtype)

    def read(t: Tensor) -> Tensor:  # a masked position is never read
        return t.to(dtype) if live is None else select(live, t.to(dtype))

    v, target = read(x.values), read(x.returns)
    m = torch.ones_like(v) if live is None else select(live, torch.ones_like(v))
    error = v - target
    squared, slope, clip_fraction = error.square(), error, v.new_zeros(())
    count = m.sum().clamp(min=1)
    plain = squared.sum(dtype=torch.float64) / count
    if x.old_values is not None:
        old = read(x.old_values)
        low, high = old - options.clip, old + options.clip
        clipped = (torch.maximum(torch.minimum(v, high), low) - target).square()
        # Numbers instead of bools: 1 where the plain error is the larger, 1/2 where it is as large, unless that is because nothing was clipped.
        plain_slope = as_number(torch.gt, squared, clipped).add_(as_number(torch.ge, squared, clipped)).mul_(0.5)
        moves = as_number(torch.ge, v, low).mul_(as_number(torch.le, v, high))
        slope = times(torch.maximum(plain_slope, moves), error)
        clip_fraction = (clipped > squared).count_nonzero() / count
        squared = torch.maximum(squared, clipped)
    by = divisor(options.aggregation, x.normalizer, m, x.cu_seqlens, options.max_length)
    if options.aggregation == "seq-mean-token-mean":
        scale = 1 / to_tokens(sequence_sum(m, x.cu_seqlens), m, x.cu_seqlens).clamp(min=1)
        squared, slope = squared * scale, slope * scale
    out.loss.copy_(0.5 * squared.sum() / by)
    value_mean, return_mean = v.sum(dtype=torch.float64) / count, target.sum(dtype=torch.float64) / count

    def variance(y: Tensor) -> Tensor:
        return ((y - y.sum() / count) * m).square().sum() / count

    spread = variance(target.double())
    explained = torch.where(spread > 0, 1 - variance(target.double() - v) / spread, 0.0)
    out.numbers.copy_(torch.stack([1 / by.double(), clip_fraction.double(), plain, value_mean, return_mean, explained]))
    if out.grad.numel():
        out.grad.copy_(slope)
