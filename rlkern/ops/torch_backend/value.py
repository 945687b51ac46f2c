"""The value loss on tokens in PyTorch, with the gradient written out."""

from __future__ import annotations

import torch

from ..select import as_bool, as_number
from ..value import ValueOptions, ValueResults, Values
from .counted import Counted


def value_loss(x: Values, options: ValueOptions, out: ValueResults) -> None:
    """Fill ``out``."""
    c = Counted(x.values, None if x.mask is None else as_bool(x.mask), x.cu_seqlens, out.numbers.dtype)
    v, target = c.read(x.values), c.read(x.returns)
    error = v - target
    plain = squared = error.square()
    slope, larger = error, out.loss.new_zeros(())  # 1 where the clipped error is the larger one
    if x.old_values is not None:
        old = c.read(x.old_values)
        near = torch.clamp(v, old - options.clip, old + options.clip)
        # Numbers instead of bools: 1 where the plain error is the larger, 1/2 where it is as large, unless that is because nothing was clipped.
        was_clipped = as_number(torch.ne, near, v)
        clipped = near.sub_(target).square_()
        larger = as_number(torch.lt, plain, clipped)
        plain_slope = as_number(torch.le, plain, clipped).mul_(was_clipped).add_(larger).mul_(-0.5).add_(1.0)  # 1 for NaN
        slope = plain_slope.mul_(error)  # finite where its factor is 0
        squared = torch.maximum(plain, clipped, out=clipped)
    by = c.divisor(options.aggregation, x.normalizer, options.max_length)
    weighted = squared
    if options.aggregation == "seq-mean-token-mean":
        scale = 1 / c.lengths()
        weighted, slope = squared * scale, slope * scale
    torch.div(weighted.sum(), 2 * by, out=out.loss)
    torch.reciprocal(by, out=out.numbers[0])
    if options.with_metrics:
        count = c.count.clamp(min=1)
        # In float64, so that the mean of returns that are all the same is just that, and their variance 0.
        centre = (target.sum(dtype=torch.float64) / count).to(v.dtype)
        means = torch.stack([larger.sum(), plain.sum(), v.sum(), error.sum()]).div_(count)
        # Variances are of distances from about the mean, which lose nothing by rounding.
        distances = [c.zeroed(x - about) for x, about in ((target, centre), (error, means[3]))]
        sums = torch.stack([d.sum() for d in distances])
        squares = torch.stack([d.square_().sum(dtype=torch.float64) for d in distances])
        spread, unexplained = (squares - sums.double().square() / count).unbind()
        out.numbers[1:4], out.numbers[4] = means[:3], centre
        out.numbers[5] = torch.where(spread > 0, 1 - unexplained / spread, 0.0)
    if out.grad.numel():
        out.grad.copy_(slope)
