"""The value loss on tokens in PyTorch, with the gradient written out."""

from __future__ import annotations

import torch

from ..select import as_bool, as_number, times
from ..value import ValueOptions, ValueResults, Values
from .counted import Counted


def value_loss(x: Values, options: ValueOptions, out: ValueResults) -> None:
    """Fill ``out``."""
    c = Counted(x.values, None if x.mask is None else as_bool(x.mask), x.cu_seqlens, out.numbers.dtype)
    v, target = c.read(x.values), c.read(x.returns)
    error = v - target
    plain = squared = error.square()
    slope = error
    if x.old_values is not None:
        old = c.read(x.old_values)
        low, high = old - options.clip, old + options.clip
        clipped = (torch.maximum(torch.minimum(v, high), low) - target).square()
        # Numbers instead of bools: 1 where the plain error is the larger, 1/2 where it is as large, unless that is because nothing was clipped.
        plain_slope = as_number(torch.lt, squared, clipped).add_(as_number(torch.le, squared, clipped)).mul_(-0.5).add_(1.0)  # 1 for NaN
        moves = as_number(torch.ge, v, low).mul_(as_number(torch.le, v, high))
        slope = times(torch.maximum(plain_slope, moves), error)
        squared = torch.maximum(plain, clipped)
    by = c.divisor(options.aggregation, x.normalizer, options.max_length)
    weighted = squared
    if options.aggregation == "seq-mean-token-mean":
        scale = 1 / c.lengths()
        weighted, slope = squared * scale, slope * scale
    out.loss.copy_(0.5 * weighted.sum() / by)
    out.numbers[0] = 1 / by
    if options.with_metrics:
        wide = {"dtype": torch.float64}
        count = c.number().clamp(min=1)
        means = torch.stack([x.sum(**wide) for x in (squared > plain, plain, v, target, error)]) / count
        centres = means.to(v.dtype)  # variances are of distances from about the mean, which lose nothing by rounding
        distances = [c.zeroed(x - centre) for x, centre in ((target, centres[3]), (error, centres[4]))]
        squares = torch.stack([d.square().sum(**wide) for d in distances])
        spread, unexplained = (squares - torch.stack([d.sum(**wide) for d in distances]).square() / count).unbind()
        out.numbers[1:5] = means[:4]
        out.numbers[5] = torch.where(spread > 0, 1 - unexplained / spread, 0.0)
    if out.grad.numel():
        out.grad.copy_(slope)
