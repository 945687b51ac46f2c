"""KL, reverse KL and generalised Jensen-Shannon divergence over the vocabulary, from two logits tensors.

One number says which: ``beta`` is the weight of q (reference, teacher) in the mixture, 0 for KL(q || p), 1 for KL(p || q). ``statistics [..., 5]``
are the maximum of a row of x and log2 of its sum relative to that, the same of y, and what the gradient subtracts: KL(p || q), 0 or KL(p || mixture).

Of a vocabulary divided among ranks, each has ``states [n, 5]`` (maximum and sum of p and of q, and the sum t of kernels/divergence.py; of q and p in
reverse), which merge into those of whole rows. A JSD takes a second round, since its terms are of both sums: ``terms [n, 2]``, sum p (log p - log M)
and sum q (log q - log M), which add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import state_dtype
from .backends import backend_of
from .head import ChunkedLogits, Gradients, Head, HeadGradients, Needs, Work, spread
from .logits import scales
from .operators import at, fake_of, operator, save, saved, split
from .shards import LOG2E, Shard, all_rows, my_rows, raised

STATISTICS = 5
_LN2 = math.log(2.0)


def common_dtype(x: torch.dtype, y: torch.dtype) -> torch.dtype:
    """In which logits of these dtypes are compared."""
    return torch.promote_types(state_dtype(x), state_dtype(y))


class Divergences(NamedTuple):
    """Of each row: the divergence, and what the gradient needs."""

    divergence: Tensor
    statistics: Tensor

    @classmethod
    def empty(cls, x: torch.dtype, y: torch.dtype, shape: Sequence[int], device: torch.device) -> Divergences:
        """Unfilled, for logits of these dtypes."""
        dtype = common_dtype(x, y)
        return cls(torch.empty(shape, dtype=dtype, device=device), torch.empty(*shape, STATISTICS, dtype=dtype, device=device))


class Comparison(NamedTuple):
    """How two logits tensors are compared; the tensors have an element for each row."""

    mask: Tensor | None
    temperature: Tensor | None
    scale: float  # logit_scale / T, or logit_scale where there is a temperature for each row
    cap: float | None
    beta: float
    backend: str
    shard: Shard | None = None  # which part of the vocabulary the logits are; None: all of it

    @property
    def kind(self) -> str:
        return {0.0: "reverse", 1.0: "kl"}.get(self.beta, "jsd")

    def live(self, like: Tensor) -> Tensor:
        """Flat: which positions count, as bool; ``like`` has a row for each."""
        return self._live(like.shape[:-1].numel(), like.device)

    def live_of_hidden(self, hidden: Tensor) -> Tensor:
        """The same, where ``hidden`` may be a rank's share of the rows."""
        return self._live(all_rows(hidden, self.shard), hidden.device)

    def _live(self, rows: int, device: torch.device) -> Tensor:
        return torch.ones(rows, dtype=torch.bool, device=device) if self.mask is None else self.mask.flatten() != 0

    def divergence(self, logits: Tensor, ref_logits: Tensor, out: Divergences) -> None:
        """Fill ``out``, contiguous; zeros where masked."""
        if not out.divergence.numel():
            return
        if self.shard is not None:
            self.finish(self.begin(logits, ref_logits, out), out)
        else:
            backend_of(self.backend).divergence(logits, ref_logits, self, out)

    def begin(self, logits: Tensor, ref_logits: Tensor, out: Divergences) -> Tensor:
        """What :meth:`finish` takes of these columns: states, or of a JSD, after a collective for its statistics, terms."""
        states = self.states(logits, ref_logits)
        if self.kind != "jsd":
            return states
        self.store(self.merged(states), out)
        return self.terms(logits, ref_logits, out.statistics)

    def finish(self, parts: Tensor, out: Divergences) -> None:
        """Fill ``out`` by one collective."""
        assert self.shard is not None
        if self.kind == "jsd":
            self.store_terms(self.shard.gather(parts).double().sum(0), out)
        else:
            self.store(self.merged(parts), out)

    def states(self, logits: Tensor, ref_logits: Tensor) -> Tensor:
        """Of these columns alone."""
        return backend_of(self.backend).divergence_states(logits, ref_logits, self)

    def terms(self, logits: Tensor, ref_logits: Tensor, statistics: Tensor) -> Tensor:
        """Of these columns alone, given the statistics of whole rows."""
        return backend_of(self.backend).divergence_terms(logits, ref_logits, self, statistics)

    def merged(self, states: Tensor) -> Tensor:
        """The states of whole rows, by one collective, in float64: the same bits on all ranks."""
        assert self.shard is not None
        m_p, s_p, m_q, s_q, t = self.shard.gather(states).double().unbind(-1)
        c = scales(self.scale, self.temperature, torch.float64) * LOG2E
        (m_p, moved_p), (m_q, moved_q) = raised(m_p, c), raised(m_q, c)
        by = moved_p.exp2()
        # A part that is infinite stays so, however small its share.
        t = by.clamp(min=torch.finfo(by.dtype).tiny) * (t + (moved_p - moved_q) * s_p)
        return torch.stack([m_p, (by * s_p).sum(0), m_q, (moved_q.exp2() * s_q).sum(0), t.sum(0)], -1)

    def store(self, states: Tensor, out: Divergences) -> None:
        """Fill ``out`` from the states of whole rows: of a JSD but for what takes the terms."""
        m_p, s_p, m_q, s_q, t = states.unbind(-1)
        log2_p, log2_q = (s.masked_fill(s == 0, torch.nan).log2() for s in (s_p, s_q))  # no distribution
        result = (t / s_p - (log2_p - log2_q)) * _LN2
        mean = result if self.kind == "kl" else torch.zeros_like(result)
        of_p, of_q = (m_p, log2_p), (m_q, log2_q)
        columns = [*of_q, *of_p, mean] if self.kind == "reverse" else [*of_p, *of_q, mean]
        live = self.live(out.statistics)
        for x, place in zip([result, *columns], [out.divergence.view(-1), *out.statistics.view(-1, STATISTICS).unbind(-1)], strict=True):
            place.copy_(torch.where(live, x, 0.0))

    def store_terms(self, terms: Tensor, out: Divergences) -> None:
        """Fill in what takes the terms of whole rows."""
        of_p, of_q = terms.unbind(-1)
        _, log2_p, _, log2_q, mean = out.statistics.view(-1, STATISTICS).unbind(-1)
        mean.copy_(of_p + 0.0 * (log2_p + log2_q))  # NaN if either is
        out.divergence.view(-1).copy_((1.0 - self.beta) * mean + self.beta * of_q)

    def gradient(self, out: Tensor, logits: Tensor, ref_logits: Tensor, statistics: Tensor, grad: Tensor) -> None:
        """Fill ``out``, which may be ``logits``, with d loss / d logits; zeros where a row is masked or has no upstream gradient."""
        if out.numel():
            backend_of(self.backend).divergence_gradient(out, logits, ref_logits, self, statistics, grad)


# ---- operators and autograd -----------------------------------------------------------------------------------------------------------------


def tokens(logits: Tensor, part: Shard | None) -> Tensor:
    """The columns that are tokens."""
    return logits if part is None else logits[..., : part.columns]


@operator("divergence")
def divergence_op(logits: Tensor, ref_logits: Tensor, comparison: Comparison) -> Divergences:
    """Of ``[..., V]``."""
    out = Divergences.empty(logits.dtype, ref_logits.dtype, logits.shape[:-1], logits.device)
    comparison.divergence(tokens(logits, comparison.shard), tokens(ref_logits, comparison.shard), out)
    return out


@fake_of(divergence_op)
def _(logits: Tensor, ref_logits: Tensor, comparison: Comparison) -> Divergences:
    return Divergences.empty(logits.dtype, ref_logits.dtype, logits.shape[:-1], logits.device)


@operator("divergence_backward")
def divergence_backward_op(logits: Tensor, ref_logits: Tensor, comparison: Comparison, statistics: Tensor, grad: Tensor) -> Tensor:
    """d loss / d logits in a new tensor."""
    out, part = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device), comparison.shard
    here = tokens(out, part)
    out[..., here.shape[-1] :] = 0
    comparison.gradient(here, tokens(logits, part), tokens(ref_logits, part), statistics, grad)
    return out


@fake_of(divergence_backward_op)
def _(logits: Tensor, ref_logits: Tensor, comparison: Comparison, statistics: Tensor, grad: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


class Divergence(torch.autograd.Function):
    """Differentiable in logits; ``ref_logits`` is constant. ``apply(logits, ref_logits, *comparison)``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, *arguments: Any) -> Tensor:
        comparison = Comparison(*arguments)
        out = divergence_op(logits, ref_logits, comparison)
        save(ctx, comparison, logits, ref_logits, out.statistics)
        return out.divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        comparison, logits, ref_logits, statistics = saved(ctx, Comparison)
        gradient = divergence_backward_op(logits, ref_logits, comparison, statistics, grad)
        return gradient, *(None,) * (len(ctx.needs_input_grad) - 1)


# ---- from hidden states ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """The logits of both models for the rows that take part, a chunk at a time in two reused buffers."""

    policy: ChunkedLogits
    ref: ChunkedLogits
    comparison: Comparison  # of these rows

    @classmethod
    def of(cls, policy: Head, ref: Head, chunk: int, index: Tensor | None, comparison: Comparison) -> Pair:
        policy_logits, ref_logits = (ChunkedLogits(head, chunk, index, comparison.backend, comparison.shard) for head in (policy, ref))
        return cls(policy_logits, ref_logits, at(comparison, index))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Comparison]]:
        """(rows, their hidden states, logits and reference logits, how these are compared)."""
        for chunk in self.policy.chunks():
            yield chunk, *self.policy.forward(chunk), self.ref.forward(chunk)[1], at(self.comparison, chunk)


class LinearDivergences(NamedTuple):
    """:class:`Divergences`, and J = d divergence / d hidden, empty where not wanted."""

    divergence: Tensor
    statistics: Tensor
    jacobian: Tensor


@operator("linear_divergence")
def linear_divergence_op(policy: Head, ref: Head, work: Work, comparison: Comparison, with_jacobian: bool) -> LinearDivergences:
    """Of ``hidden [N, H]`` and ``hidden [N, H']`` of the reference."""
    part = comparison.shard
    index = work.taking_part(comparison.live_of_hidden(policy.hidden))
    pair = Pair.of(policy, ref, work.chunk, index, comparison)
    found = Divergences.empty(policy.logits_dtype, ref.logits_dtype, (pair.policy.rows,), policy.hidden.device)
    jacobian = Gradients(pair.policy, Needs(with_jacobian, False, False))
    ones = torch.ones_like(found.divergence)
    parts = []  # of a part of the vocabulary: where nothing else is made of a chunk, all go into one collective
    for chunk, h, logits, ref_logits, here in pair:
        out = at(found, chunk)
        if part is not None and not with_jacobian:
            parts.append(here.begin(logits, ref_logits, out))
            continue
        here.divergence(logits, ref_logits, out)
        if with_jacobian:
            gradient = pair.policy.gradient_of(logits)
            here.gradient(gradient, logits, ref_logits, out.statistics, ones[chunk])
            jacobian.add(pair.policy.where(chunk), h, gradient)
    if parts:
        pair.comparison.finish(torch.cat(parts), found)
    n = all_rows(policy.hidden, part)
    return LinearDivergences(spread(found.divergence, index, n), spread(found.statistics, index, n), jacobian.results().hidden)


@fake_of(linear_divergence_op)
def _(policy: Head, ref: Head, work: Work, comparison: Comparison, with_jacobian: bool) -> LinearDivergences:
    rows = (all_rows(policy.hidden, comparison.shard),)
    found = Divergences.empty(policy.logits_dtype, ref.logits_dtype, rows, policy.hidden.device)
    return LinearDivergences(*found, policy.hidden.new_empty(policy.hidden.shape if with_jacobian else (0,)))


@operator("linear_divergence_backward")
def linear_divergence_backward_op(
    policy: Head, ref: Head, work: Work, comparison: Comparison, statistics: Tensor, grad: Tensor, needs: Needs
) -> HeadGradients:
    """By making both models' logits again."""
    live = comparison.live_of_hidden(policy.hidden) & (grad != 0)
    index = work.taking_part(live)
    pair = Pair.of(policy, ref, work.chunk, index, comparison)
    if needs.weight and not work.compact:
        pair.policy.live = live
    gradients = Gradients(pair.policy, needs)
    if index is not None:
        grad, statistics = grad[index], statistics[index]
    for chunk, h, logits, ref_logits, here in pair:
        gradient = pair.policy.gradient_of(logits)
        here.gradient(gradient, logits, ref_logits, statistics[chunk], grad[chunk])
        gradients.add(pair.policy.where(chunk), h, gradient)
    return gradients.results()


@fake_of(linear_divergence_backward_op)
def _(policy: Head, ref: Head, work: Work, comparison: Comparison, statistics: Tensor, grad: Tensor, needs: Needs) -> HeadGradients:
    return HeadGradients.empty(policy, needs)


class LinearDivergence(torch.autograd.Function):
    """Differentiable in hidden, weight and bias of the policy. ``apply(*policy, *ref, *work, *comparison, frozen)``.

    ``frozen``: J is kept, and nothing recomputed.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        policy, ref, work, comparison, frozen = split(arguments, Head, Head, Work, Comparison)
        out = linear_divergence_op(policy, ref, work, comparison, frozen)
        ctx.frozen = frozen
        if frozen:
            save(ctx, comparison, out.jacobian)
        else:
            save(ctx, policy, ref, work, comparison, out.statistics)
        return out.divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rest = (None,) * (len(ctx.needs_input_grad) - 3)
        if ctx.frozen:
            comparison, jacobian = saved(ctx, Comparison)
            upstream = torch.where(comparison.live_of_hidden(jacobian), grad, 0.0).unsqueeze(1)
            return (my_rows(upstream, comparison.shard) * jacobian).to(jacobian.dtype), None, None, *rest
        policy, ref, work, comparison, statistics = saved(ctx, Head, Head, Work, Comparison)
        needs = Needs(*ctx.needs_input_grad[:3])
        made = linear_divergence_backward_op(policy, ref, work, comparison, statistics, grad, needs)
        return *(g.to(x.dtype) if needed else None for g, x, needed in zip(made, policy[:3], needs, strict=True)), *rest
