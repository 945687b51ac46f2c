"""From hidden states and the head to log-probs, losses and gradients, with logits for a chunk of rows at a time in one reused buffer.

What is multiplied, in units of 2 x rows x hidden x vocabulary operations:

    no gradient wanted     1   statistics only
    frozen head            2   the forward also keeps J = d logprob / d hidden [rows, hidden], the backward is a scaling of its rows
    token-level loss       3   (2 with a frozen head) the gradients are made in the forward, while the logits are there
    anything downstream    4   (3 with a frozen head) the backward makes the logits again

Rows that are masked, or have no gradient, can be left out of the products: what ``index`` holds are the rows that take part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import PolicyLossConfig
from .backends import backend_of
from .fused import PolicyRows, Weights
from .head import ChunkedLogits, Gradients, Head, HeadGradients, Kept, Needs, Work, spread
from .logits import Rows, Saved, Slopes, Statistics, slopes_of
from .operators import at, fake_of, operator, save, saved, split
from .shards import my_rows


class Linear(NamedTuple):
    """What a function from hidden states is asked for, checked and flattened to ``[N]``."""

    head: Head
    work: Work
    kept: Kept
    rows: Rows
    validate: bool


# ---- log-probs ------------------------------------------------------------------------------------------------------------------------------


class LinearStatistics(NamedTuple):
    """:class:`Statistics`, and J = d logprob / d hidden; empty where not wanted."""

    logprob: Tensor
    entropy: Tensor
    row_max: Tensor
    log2_sum: Tensor
    jacobian: Tensor


@operator("linear_logprobs")
def linear_logprobs_op(head: Head, work: Work, kept: Kept, rows: Rows, with_entropy: bool, with_jacobian: bool, validate: bool) -> LinearStatistics:
    """Of ``hidden [N, H]`` and ``ids [N]``."""
    part = rows.shard
    if validate:
        rows.check_ids(head.weight.shape[0] if part is None else part.total)
    logits = ChunkedLogits(head, work.chunk, work.taking_part(rows.live()), rows.backend, part, kept)
    some, out = at(rows, logits.index), _statistics_of(logits, with_entropy)
    jacobian = Gradients(logits, Needs(with_jacobian, False, False))
    ones = torch.ones_like(out.logprob)
    states = []  # of a part of the vocabulary: where nothing else is made of a chunk, all go into one collective
    for chunk in logits.chunks():
        h, x = logits.forward(chunk)
        here, found = at(some, chunk), at(out, chunk)
        if part is not None and not with_jacobian:
            states.append(here.states(x, with_entropy))
            continue
        here.statistics(x, found)
        if with_jacobian:
            gradient = logits.gradient_of(x)
            here.gradient(gradient, x, Slopes(ones[chunk], None), found.for_gradient)
            jacobian.add(logits.where(chunk), h, gradient)
    if states:
        some.finish(torch.cat(states), out)
    return LinearStatistics(*_spread_all(out, logits.index, rows.ids.numel(), with_entropy), jacobian.results().hidden)


@fake_of(linear_logprobs_op)
def _(head: Head, work: Work, kept: Kept, rows: Rows, with_entropy: bool, with_jacobian: bool, validate: bool) -> LinearStatistics:
    found = Statistics.empty(head.logits_dtype, rows.ids.shape, head.hidden.device, with_entropy)
    return LinearStatistics(*found, head.hidden.new_empty(head.hidden.shape if with_jacobian else (0,)))


def _statistics_of(logits: ChunkedLogits, with_entropy: bool) -> Statistics:
    """Unfilled, of the rows that take part."""
    return Statistics.empty(logits.buffer.dtype, (logits.rows,), logits.buffer.device, with_entropy)


def _spread_all(x: Statistics, index: Tensor | None, rows: int, with_entropy: bool) -> Statistics:
    """Back to all rows."""
    logprob, row_max, log2_sum = (spread(t, index, rows) for t in (x.logprob, x.row_max, x.log2_sum))
    return Statistics(logprob, spread(x.entropy, index, rows) if with_entropy else x.entropy, row_max, log2_sum)


@operator("linear_logprobs_backward")
def linear_logprobs_backward_op(head: Head, work: Work, kept: Kept, rows: Rows, slopes: Slopes, saved: Saved, needs: Needs) -> HeadGradients:
    """By making the logits again."""
    live = rows.live() & slopes.moving()
    index = work.taking_part(live)
    logits = ChunkedLogits(head, work.chunk, index, rows.backend, rows.shard, kept, live if needs.weight and not work.compact else None)
    some, slopes, saved = at(rows, index), at(slopes, index), at(saved, index)
    gradients = Gradients(logits, needs)
    for chunk in logits.chunks():
        h, x = logits.forward(chunk)
        gradient = logits.gradient_of(x)
        at(some, chunk).gradient(gradient, x, at(slopes, chunk), at(saved, chunk))
        gradients.add(logits.where(chunk), h, gradient)
    return gradients.results()


@fake_of(linear_logprobs_backward_op)
def _(head: Head, work: Work, kept: Kept, rows: Rows, slopes: Slopes, saved: Saved, needs: Needs) -> HeadGradients:
    return HeadGradients.empty(head, needs)


class LinearLogprobs(torch.autograd.Function):
    """(log-prob, entropy), differentiable in hidden, weight and bias through both. ``apply(*flat(linear), with_entropy, frozen)``.

    ``frozen``: J is kept, and the log-prob alone recomputes nothing.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        head, work, kept, rows, validate, with_entropy, frozen = split(arguments, Head, Work, Kept, Rows)
        *found, jacobian = linear_logprobs_op(head, work, kept, rows, with_entropy, frozen, validate)
        out = Statistics._make(found)
        ctx.dtypes = head.weight.dtype, None if head.bias is None else head.bias.dtype
        recomputes = with_entropy or not frozen
        held = head if recomputes else (None, None, None, head.logits_dtype)
        save(ctx, *held, work, kept, rows, out.for_gradient, jacobian, frozen)
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(out.entropy)
        return out.logprob, out.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        head, work, kept, rows, statistics, jacobian, frozen = saved(ctx, Head, Work, Kept, Rows, Saved)
        needs = Needs(*ctx.needs_input_grad[:3])
        rest = (None,) * (len(ctx.needs_input_grad) - 3)
        slopes = slopes_of(grad_logprob, grad_entropy, statistics)
        if slopes is None:
            return None, None, None, *rest
        if frozen and slopes.entropy is None:  # what is made again for the entropy gives both, unrounded in between
            upstream = torch.where(rows.live(), slopes.logprob, 0.0).unsqueeze(1)
            return (my_rows(upstream, rows.shard) * jacobian).to(jacobian.dtype), None, None, *rest
        made = linear_logprobs_backward_op(head, work, kept, rows, slopes, statistics, needs)
        weight, bias = (g.to(dtype) if needed else None for g, dtype, needed in zip(made[1:], ctx.dtypes, needs[1:], strict=True))
        return made.hidden if needs.hidden else None, weight, bias, *rest


# ---- losses whose gradients are made in the forward -----------------------------------------------------------------------------------------


class LossFromHidden(NamedTuple):
    """Log-prob and entropy of each row, and d loss / d (hidden, weight, bias); empty where not wanted."""

    logprob: Tensor
    entropy: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor


def gradients_in_forward(x: Linear, with_entropy: bool, needs: Needs, slopes: Callable[[slice | Tensor, Tensor, Tensor], Slopes]) -> LossFromHidden:
    """``slopes(rows, logprob, entropy)`` gives d loss / d (logprob, entropy) of some rows. ``x.rows.mask`` is the whole mask."""
    rows, work, live = x.rows, x.work, x.rows.mask
    assert live is not None
    if x.validate:
        rows.check_ids(x.head.weight.shape[0] if rows.shard is None else rows.shard.total)
    logits = ChunkedLogits(
        x.head, work.chunk, work.taking_part(live), rows.backend, rows.shard, x.kept, live if needs.weight and not work.compact else None
    )
    some, out = at(rows, logits.index), _statistics_of(logits, with_entropy)
    gradients = Gradients(logits, needs)
    if work.compact:  # chunks leave rows out, also where all are live
        gradients.hidden.zero_()
    for chunk in logits.chunks():
        h, z = logits.forward(chunk)
        here, found, where = at(some, chunk), at(out, chunk), logits.where(chunk)
        here.statistics(z, found)
        slope = slopes(where, found.logprob, found.entropy)
        if work.compact:  # rows without a gradient, clipped ones say, are left out of the products
            moving = slope.moving()
            if not bool(moving.all()):
                chosen = moving.nonzero().squeeze(1)
                where = chosen + chunk.start if isinstance(where, slice) else where[chosen]
                h, z, here, slope, found = h[chosen], z[chosen], at(here, chosen), at(slope, chosen), at(found, chosen)
        if slope.logprob.numel():
            gradient = logits.gradient_of(z)
            here.gradient(gradient, z, slope, found.for_gradient)
            gradients.add(where, h, gradient)
    logprob, entropy, *_ = _spread_all(out, logits.index, rows.ids.numel(), with_entropy)
    return LossFromHidden(logprob, entropy, *gradients.results())


@operator("linear_policy_gradients")
def linear_policy_gradients_op(
    head: Head,
    work: Work,
    kept: Kept,
    rows: Rows,
    terms: PolicyRows,
    weights: Weights,
    config: PolicyLossConfig,
    with_entropy: bool,
    needs: Needs,
    validate: bool,
) -> LossFromHidden:
    """For  loss = sum weights.loss * per-token loss + sum weights.entropy * entropy.  ``rows.mask`` is the whole mask."""
    live, of_a_token = rows.mask, config.of_a_token
    assert live is not None

    def slopes(some: slice | Tensor, logprob: Tensor, entropy: Tensor) -> Slopes:
        weight = at(weights, some)
        return Slopes(backend_of(rows.backend).token_slopes(logprob, live[some], at(terms, some), of_a_token).mul_(weight.loss), weight.entropy)

    return gradients_in_forward(Linear(head, work, kept, rows, validate), with_entropy, needs, slopes)


@fake_of(linear_policy_gradients_op)
def _(
    head: Head,
    work: Work,
    kept: Kept,
    rows: Rows,
    terms: PolicyRows,
    weights: Weights,
    config: PolicyLossConfig,
    with_entropy: bool,
    needs: Needs,
    validate: bool,
) -> LossFromHidden:
    found = Statistics.empty(head.logits_dtype, rows.ids.shape, head.hidden.device, with_entropy)
    return LossFromHidden(found.logprob, found.entropy, *HeadGradients.empty(head, needs))
