"""The value loss on tokens, half the larger of the squared errors before and after the clip: loss, gradient and metrics in one launch.

Programs, segments, partial sums and the order in which they are added are those of ``tokens.py``.
"""

import triton
import triton.language as tl

from .kl import clamp, outside, times
from .tokens import add_up, arrives_last, at, divisor, read, read_flag, segment, store_partial

# The rows of ``partials``, one column a program.
PARTIALS = tl.constexpr(8)


@triton.jit
def squared_error(v, old, target, clip):
    """(loss, d loss / d v, whether the clipped error is the larger); equal errors share the gradient, as torch.maximum has it."""
    error = v - target
    clipped_error = clamp(v, old - clip, old + clip) - target
    plain, clipped = error * error, clipped_error * clipped_error
    moves = ~outside(v, old - clip, old + clip)
    share = tl.where(plain > clipped, 1.0, tl.where(plain < clipped, 0.0, tl.where(moves, 1.0, 0.5)))
    return 0.5 * tl.where(plain < clipped, clipped, plain), times(share, error), clipped > plain


@triton.jit
def finish(partials, loss_out, results, normalizer, max_length, AGGREGATION: tl.constexpr, BLOCK: tl.constexpr):
    """From the partial sums to the loss, and to ``results``: 1 / divisor, metrics."""
    programs = tl.num_programs(0)
    tokens, sequences = add_up(partials, 1, programs, BLOCK), add_up(partials, 2, programs, BLOCK)
    by = divisor(AGGREGATION, normalizer, tokens, sequences, max_length)
    tl.store(loss_out, add_up(partials, 0, programs, BLOCK) / by)
    tl.store(results, 1.0 / by)
    count = tl.maximum(tokens, 1.0)
    error = add_up(partials, 4, programs, BLOCK) / count
    value, target = add_up(partials, 5, programs, BLOCK) / count, add_up(partials, 6, programs, BLOCK) / count
    spread = add_up(partials, 7, programs, BLOCK) / count - target * target
    unexplained = error - (target - value) * (target - value)
    tl.store(results + 1, add_up(partials, 3, programs, BLOCK) / count)
    tl.store(results + 2, error)
    tl.store(results + 3, value)
    tl.store(results + 4, target)
    tl.store(results + 5, tl.where(spread > 0.0, 1.0 - unexplained / spread, 0.0))


@triton.jit
def value_kernel(
    values,
    old,
    returns,
    mask,
    grad,
    normalizer,
    cu_seqlens,
    partials,
    arrivals,
    loss_out,
    results,
    time,
    tiles,
    tile,
    clip: tl.float64,
    max_length: tl.float64,
    AGGREGATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tensors up to ``grad`` are Rows, or None where absent; without ``old`` there is no clip. ``partials`` are float64, since a variance is
    made of them."""
    DTYPE: tl.constexpr = loss_out.dtype.element_ty
    row, begin, end = segment(cu_seqlens, time, tiles, tile)
    offsets = tl.arange(0, BLOCK)
    limit = tl.full([BLOCK], clip, DTYPE)

    scale = tl.full([], 1.0, DTYPE)
    if AGGREGATION == "seq-mean-token-mean":
        n = tl.zeros([BLOCK], DTYPE)
        for start in range(begin, end, BLOCK):
            columns = start + offsets
            n += read_flag(mask, row, columns, columns < end).to(DTYPE)
        scale = 1.0 / tl.maximum(tl.sum(n, 0), 1.0)

    losses, counts = tl.zeros([BLOCK], DTYPE), tl.zeros([BLOCK], DTYPE)
    wide = tl.zeros([BLOCK], tl.float64)
    clips, errors, totals, targets, squares = counts, wide, wide, wide, wide
    for start in range(begin, end, BLOCK):
        columns = start + offsets
        inside = columns < end
        live = read_flag(mask, row, columns, inside)
        v = read(values, row, columns, live, DTYPE)
        target = read(returns, row, columns, live, DTYPE)
        if old is None:
            error = v - target
            loss, slope, clipped = 0.5 * error * error, error, tl.zeros([BLOCK], tl.int1)
        else:
            loss, slope, clipped = squared_error(v, read(old, row, columns, live, DTYPE), target, limit)
        if grad is not None:
            tl.store(at(grad, row, columns), tl.where(live, scale * slope, 0.0), mask=inside)
        losses += tl.where(live, loss, 0.0)
        counts += live.to(DTYPE)
        clips += (live & clipped).to(DTYPE)
        wide, wide_target = v.to(tl.float64), target.to(tl.float64)
        errors += (wide - wide_target) * (wide - wide_target)
        totals += wide
        targets += wide_target
        squares += wide_target * wide_target

    count = tl.sum(counts, 0)
    store_partial(partials, 0, scale * tl.sum(losses, 0))
    store_partial(partials, 1, count)
    store_partial(partials, 2, tl.where(count > 0.0, 1.0, 0.0))
    store_partial(partials, 3, tl.sum(clips, 0))
    store_partial(partials, 4, tl.sum(errors, 0))
    store_partial(partials, 5, tl.sum(totals, 0))
    store_partial(partials, 6, tl.sum(targets, 0))
    store_partial(partials, 7, tl.sum(squares, 0))
    if arrives_last(arrivals):
        finish(partials, loss_out, results, normalizer, max_length, AGGREGATION, BLOCK)
