"""KL, reverse KL and generalised Jensen-Shannon divergence over the vocabulary, from two logits tensors: Triton launchers and the PyTorch path.

One number says which: ``beta`` is the weight of q (reference, teacher) in the mixture, 0 for KL(q || p), 1 for KL(p || q). ``statistics [..., 5]``
are the maximum of a row of x and log2 of its sum relative to that, the same of y, and what the gradient subtracts: KL(p || q), 0 or KL(p || mixture).

Of a vocabulary divided among ranks, each has ``states [n, 5]`` (maximum and sum of p and of q, and the sum t of kernels/divergence.py; of q and p in
reverse), which merge into those of whole rows. A JSD takes a second round, since its terms are of both sums: ``terms [n, 2]``, sum p (log p - log M)
and sum q (log q - log M), which add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._backend import device_of
from .._checks import state_dtype
from .linear import Gradients, Head, empty_gradients, pick, spread, taking_part
from .logits import Chunks, as_rows, locate, row_scale, scales, soft_capped
from .operators import fake_of, operator
from .shards import Shard, all_rows, my_rows, raised

STATISTICS = 5
_LN2 = math.log(2.0)
_LOG2E = 1 / _LN2
_HIGHEST = 1e30  # stands for inf where it meets a probability of 0


def live_tokens(like: Tensor, mask: Tensor | None, part: Shard | None = None) -> Tensor:
    """Flat: which positions count, as bool; ``like [..., V]``, or a rank's share of its rows."""
    if mask is None:
        return torch.ones(all_rows(like, part), dtype=torch.bool, device=like.device)
    return mask.flatten() != 0


def common_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """In which logits like x and y are compared."""
    return torch.promote_types(state_dtype(x), state_dtype(y))


def empty_results(x: Tensor, y: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """Unfilled (divergence, statistics) of this shape, for logits like x and y."""
    dtype = common_dtype(x, y)
    return torch.empty(shape, dtype=dtype, device=x.device), torch.empty(*shape, STATISTICS, dtype=dtype, device=x.device)


@dataclass(frozen=True)
class Comparison:
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

    def at(self, rows: slice | Tensor | None) -> Comparison:
        """Of some rows; None for all."""
        if rows is None:
            return self
        mask, temperature = (None if t is None else t[rows] for t in (self.mask, self.temperature))
        return replace(self, mask=mask, temperature=temperature)

    def divergence(self, logits: Tensor, ref_logits: Tensor, out: tuple[Tensor, Tensor]) -> None:
        """Fill ``out``: (divergence, statistics), contiguous; zeros where masked."""
        if not out[0].numel():
            return
        if self.shard is not None:
            self.finish(self.begin(logits, ref_logits, out), out)
        else:
            (_triton_forward if self.backend == "triton" else _torch_forward)(logits, ref_logits, self, out)

    def begin(self, logits: Tensor, ref_logits: Tensor, out: tuple[Tensor, Tensor]) -> Tensor:
        """What :meth:`finish` takes of these columns: states, or of a JSD, after a collective for its statistics, terms."""
        states = self.states(logits, ref_logits)
        if self.kind != "jsd":
            return states
        self.store(self.merged(states), out)
        return self.terms(logits, ref_logits, out[1])

    def finish(self, parts: Tensor, out: tuple[Tensor, Tensor]) -> None:
        """Fill ``out`` by one collective."""
        assert self.shard is not None
        if self.kind == "jsd":
            self.store_terms(self.shard.gather(parts).double().sum(0), out)
        else:
            self.store(self.merged(parts), out)

    def states(self, logits: Tensor, ref_logits: Tensor) -> Tensor:
        """Of these columns alone."""
        return (_triton_states if self.backend == "triton" else _torch_states)(logits, ref_logits, self)

    def terms(self, logits: Tensor, ref_logits: Tensor, statistics: Tensor) -> Tensor:
        """Of these columns alone, given the statistics of whole rows."""
        return (_triton_terms if self.backend == "triton" else _torch_terms)(logits, ref_logits, self, statistics)

    def merged(self, states: Tensor) -> Tensor:
        """The states of whole rows, by one collective, in float64: the same bits on all ranks."""
        assert self.shard is not None
        m_p, s_p, m_q, s_q, t = self.shard.gather(states).double().unbind(-1)
        c = scales(self.scale, self.temperature, torch.float64) * _LOG2E
        (m_p, moved_p), (m_q, moved_q) = raised(m_p, c), raised(m_q, c)
        by = moved_p.exp2()
        # A part that is infinite stays so, however small its share.
        t = by.clamp(min=torch.finfo(by.dtype).tiny) * (t + (moved_p - moved_q) * s_p)
        return torch.stack([m_p, (by * s_p).sum(0), m_q, (moved_q.exp2() * s_q).sum(0), t.sum(0)], -1)

    def store(self, states: Tensor, out: tuple[Tensor, Tensor]) -> None:
        """Fill ``out`` from the states of whole rows: of a JSD but for what takes the terms."""
        m_p, s_p, m_q, s_q, t = states.unbind(-1)
        log2_p, log2_q = (s.masked_fill(s == 0, torch.nan).log2() for s in (s_p, s_q))  # no distribution
        result = (t / s_p - (log2_p - log2_q)) * _LN2
        mean = result if self.kind == "kl" else torch.zeros_like(result)
        of_p, of_q = (m_p, log2_p), (m_q, log2_q)
        columns = [*of_q, *of_p, mean] if self.kind == "reverse" else [*of_p, *of_q, mean]
        live = live_tokens(out[1], self.mask)
        for x, place in zip([result, *columns], [out[0].view(-1), *out[1].view(-1, STATISTICS).unbind(-1)], strict=True):
            place.copy_(torch.where(live, x, 0.0))

    def store_terms(self, terms: Tensor, out: tuple[Tensor, Tensor]) -> None:
        """Fill in what takes the terms of whole rows."""
        of_p, of_q = terms.unbind(-1)
        _, log2_p, _, log2_q, mean = out[1].view(-1, STATISTICS).unbind(-1)
        mean.copy_(of_p + 0.0 * (log2_p + log2_q))  # NaN if either is
        out[0].view(-1).copy_((1.0 - self.beta) * mean + self.beta * of_q)

    def gradient(self, out: Tensor, grad: Tensor, logits: Tensor, ref_logits: Tensor, statistics: Tensor) -> None:
        """Fill ``out``, which may be ``logits``, with d loss / d logits; zeros where a row is masked or has no upstream gradient."""
        if out.numel():
            (_triton_backward if self.backend == "triton" else _torch_backward)(out, grad, logits, ref_logits, self, statistics)


# ---- Triton ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairTiling:
    """How two rows of logits are cut, side by side: ``block`` columns at a time by ``warps`` warps."""

    block: int
    warps: int
    stages: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor, threads: int) -> PairTiling:
        """One load of 16 bytes a thread of the narrower: more would not fit the registers."""
        vocabulary, itemsize = x.shape[-1], min(x.element_size(), y.element_size())
        block = min(threads * 16 // itemsize, max(128, 1 << (vocabulary - 1).bit_length()))
        warp = 64 if torch.version.hip else 32
        return cls(block=block, warps=max(1, block * itemsize // 16 // warp), stages=3)


def _layout(x: Tensor) -> tuple[int, int, int]:
    return x.shape[1], x.stride(0), x.stride(1)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _triton_forward(logits: Tensor, ref_logits: Tensor, o: Comparison, out: tuple[Tensor, Tensor]) -> None:
    _launch_forward(logits, ref_logits, o, *out, "whole")


def _triton_states(logits: Tensor, ref_logits: Tensor, o: Comparison) -> Tensor:
    states = torch.empty(logits.shape[:-1].numel(), STATISTICS, dtype=torch.float32, device=logits.device)
    _launch_forward(logits, ref_logits, o, None, states, "states")
    return states


def _triton_terms(logits: Tensor, ref_logits: Tensor, o: Comparison, statistics: Tensor) -> Tensor:
    terms = torch.empty(logits.shape[:-1].numel(), 2, dtype=torch.float32, device=logits.device)
    _launch_forward(logits, ref_logits, o, terms, statistics, "terms")
    return terms


def _launch_forward(logits: Tensor, ref_logits: Tensor, o: Comparison, result: Tensor | None, statistics: Tensor, part: str) -> None:
    from ..kernels import divergence as kernels

    x, y = as_rows(logits), as_rows(ref_logits)
    # Two passes want few rows in flight, for the cache; one wants many small programs, since each block ends in two reductions.
    tiling = PairTiling.of(x, y, threads=256 if o.kind == "jsd" else 128)
    with device_of(x):
        kernels.divergence_kernel[(logits.shape[:-1].numel(),)](
            x,
            y,
            *_contiguous(o.mask, o.temperature),
            result,
            statistics,
            x.shape[-1],
            *_layout(x),
            *_layout(y),
            o.scale,
            o.cap,
            o.beta,
            KIND=o.kind,
            PART=part,
            BLOCK=tiling.block,
            STAGES=tiling.stages,
            num_warps=tiling.warps,
        )


def _triton_backward(out: Tensor, grad: Tensor, logits: Tensor, ref_logits: Tensor, o: Comparison, statistics: Tensor) -> None:
    from ..kernels import divergence as kernels

    x, y = as_rows(logits), as_rows(ref_logits)
    dx = as_rows(out).view(x.shape)  # as in ops/logits.py
    tiling = PairTiling.of(x, y, threads=256)
    blocks = -(-x.shape[-1] // tiling.block)
    with device_of(x):
        kernels.divergence_backward_kernel[(grad.numel() * blocks,)](
            x,
            y,
            dx,
            *_contiguous(o.mask, o.temperature, statistics, grad),
            x.shape[-1],
            *_layout(x),
            *_layout(y),
            dx.stride(0),
            dx.stride(1),
            blocks,
            o.scale,
            o.cap,
            o.beta,
            KIND=o.kind,
            BLOCK=tiling.block,
            num_warps=tiling.warps,
        )


# ---- PyTorch --------------------------------------------------------------------------------------------------------------------------------


def _pairs(
    logits: Tensor, ref_logits: Tensor, o: Comparison, live: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice | Tensor, int, float | Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Chunks of live rows: (rows, how many, their scale, soft-capped x and y, two buffers, which these may be); a row that is alone comes twice."""
    chunks, ref = Chunks(as_rows(logits), live, dtype), as_rows(ref_logits)
    other = torch.empty_like(chunks.buffer)
    for rows, raw in chunks:
        n = raw.shape[0]
        raw_y = ref[locate(ref, rows)]
        buffers = chunks.buffer[:n], other[:n]
        x, y = (soft_capped(t, o.cap, buffer) for t, buffer in zip((raw, raw_y.expand(n, -1)), buffers, strict=True))
        yield rows, raw_y.shape[0], row_scale(o.scale, o.temperature, rows, n, dtype), x, y, *buffers


def _exponentials(x: Tensor, c: float | Tensor, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(maximum, x less that, in ``buffer``, its exponentials, their sum) of soft-capped rows."""
    m = x.amax(-1, keepdim=True)
    d = torch.sub(x, m.masked_fill(m == -torch.inf, 0.0), out=buffer)
    e = (d * c).exp_()
    return m, d, e, e.sum(-1, keepdim=True)


def _log_p(x: Tensor, m: Tensor, log2_sum: Tensor, c: float | Tensor, buffer: Tensor) -> Tensor:
    """In ``buffer``, from the statistics of soft-capped rows."""
    return torch.sub(x, m, out=buffer).mul_(c).sub_(log2_sum * _LN2)


def _mixture(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """M = (1 - beta) p + beta q: exactly p where they are equal, and never 0."""
    return torch.lerp(p, q, beta).add_(torch.finfo(p.dtype).tiny)


def _log_ratio(p: Tensor, m: Tensor) -> Tensor:
    """log p - log M, finite where p is 0."""
    return p.div(m).clamp_(min=torch.finfo(p.dtype).tiny).log_()


def _mixture_terms(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = _mixture(p, q, beta)
    return torch.stack([_log_ratio(x, m).mul_(x).sum(-1) for x in (p, q)], -1)


def _torch_states(logits: Tensor, ref_logits: Tensor, o: Comparison, terms: Tensor | None = None) -> Tensor:
    """And the terms, where the vocabulary is whole."""
    first, second = (ref_logits, logits) if o.kind == "reverse" else (logits, ref_logits)
    states = torch.zeros(logits.shape[:-1].numel(), STATISTICS, dtype=common_dtype(logits, ref_logits), device=logits.device)
    if logits.shape[-1] == 0:
        states[:, ::2] = torch.tensor([-torch.inf, -torch.inf, 0.0])
        return states
    for rows, live, c, x, y, buffer, other in _pairs(first, second, o, live_tokens(logits, o.mask), states.dtype):
        (m_p, d, e, s_p), (m_q, d_q, e_q, s_q) = _exponentials(x, c, buffer), _exponentials(y, c, other)
        t = torch.zeros_like(s_p)
        if o.kind != "jsd":
            ratio = torch.sub(d, d_q, out=d).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=0.0)
            infinite = ratio.amax(-1, keepdim=True) == torch.inf  # even where the probability rounds to 0
            t = torch.where(infinite, torch.inf, e.mul_(ratio).sum(-1, keepdim=True) * c * _LOG2E)
        elif terms is not None:
            terms[rows] = _mixture_terms(e.div_(s_p), e_q.div_(s_q), o.beta)[:live]
        states[rows] = torch.cat([m_p, s_p, m_q, s_q, t], -1)[:live]
    return states


def _torch_terms(logits: Tensor, ref_logits: Tensor, o: Comparison, statistics: Tensor) -> Tensor:
    terms = torch.zeros(logits.shape[:-1].numel(), 2, dtype=statistics.dtype, device=logits.device)
    if logits.shape[-1] == 0:
        return terms
    columns = statistics.view(-1, STATISTICS).unsqueeze(-1).unbind(1)
    for rows, live, c, x, y, buffer, other in _pairs(logits, ref_logits, o, live_tokens(logits, o.mask), statistics.dtype):
        m_p, log2_p, m_q, log2_q, _ = (column[rows] for column in columns)
        p, q = _log_p(x, m_p, log2_p, c, buffer).exp_(), _log_p(y, m_q, log2_q, c, other).exp_()
        terms[rows] = _mixture_terms(p, q, o.beta)[:live]
    return terms


def _torch_forward(logits: Tensor, ref_logits: Tensor, o: Comparison, out: tuple[Tensor, Tensor]) -> None:
    terms = torch.zeros(out[0].numel(), 2, dtype=out[0].dtype, device=logits.device)
    o.store(_torch_states(logits, ref_logits, o, terms), out)
    if o.kind == "jsd":
        o.store_terms(terms, out)


def _torch_backward(out: Tensor, grad: Tensor, logits: Tensor, ref_logits: Tensor, o: Comparison, statistics: Tensor) -> None:
    dx, upstream = as_rows(out), grad.flatten()
    live = live_tokens(logits, o.mask) & (upstream != 0)
    columns = statistics.view(-1, STATISTICS).unsqueeze(-1).unbind(1)
    for rows, n, c, x, y, buffer, other in _pairs(logits, ref_logits, o, live, statistics.dtype):
        m_p, log2_p, m_q, log2_q, mean = (column[rows] for column in columns)
        slope = None if o.cap is None else x.div(o.cap).masked_fill_(x == -torch.inf, 1.0).square_().neg_().add_(1.0)
        d, d_ref = _log_p(x, m_p, log2_p, c, buffer), _log_p(y, m_q, log2_q, c, other)
        # Where x = -inf the gradient is 0; NaN there too in a row whose statistics are not finite.
        if o.beta == 0:
            excluded = d == -torch.inf
            dz = d.exp_().sub_(d_ref.exp_().masked_fill_(excluded, 0.0)).add_(0.0 * log2_q)
        elif o.beta == 1:
            ratio = torch.sub(d, d_ref, out=d_ref).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-_HIGHEST)
            dz = d.exp_().mul_(ratio.sub_(mean))
        else:
            p = d.exp_()
            dz = p * _log_ratio(p, _mixture(p, d_ref.exp_(), o.beta)).sub_(mean)
        factor = upstream[rows].unsqueeze(1) * c
        dz.mul_(factor if o.beta in (0, 1) else factor * (1 - o.beta))
        if slope is not None:
            dz.mul_(slope)
        dx[locate(dx, rows)] = dz[:n].to(dx.dtype)
    if not bool(live.all()):
        dx[locate(dx, (~live).nonzero().squeeze(1))] = 0


# ---- custom ops and autograd ----------------------------------------------------------------------------------------------------------------


def tokens(logits: Tensor, part: Shard | None) -> Tensor:
    """The columns that are tokens."""
    return logits if part is None else logits[..., : part.columns]


@operator("divergence")
def divergence_op(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    scale: float,
    cap: float | None,
    beta: float,
    backend: str,
    shard: str,
) -> tuple[Tensor, Tensor]:
    """(divergence, statistics) of ``[..., V]``."""
    out, part = empty_results(logits, ref_logits, *logits.shape[:-1]), Shard.from_text(shard)
    Comparison(mask, temperature, scale, cap, beta, backend, part).divergence(tokens(logits, part), tokens(ref_logits, part), out)
    return out


@fake_of(divergence_op)
def _(logits: Tensor, ref_logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return empty_results(logits, ref_logits, *logits.shape[:-1])


@operator("divergence_backward")
def divergence_backward_op(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    scale: float,
    cap: float | None,
    beta: float,
    statistics: Tensor,
    backend: str,
    shard: str,
) -> Tensor:
    """d loss / d logits in a new tensor."""
    out, part = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device), Shard.from_text(shard)
    here = tokens(out, part)
    out[..., here.shape[-1] :] = 0
    Comparison(mask, temperature, scale, cap, beta, backend, part).gradient(here, grad, tokens(logits, part), tokens(ref_logits, part), statistics)
    return out


@fake_of(divergence_backward_op)
def _(grad: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


class Divergence(torch.autograd.Function):
    """Differentiable in logits; ``ref_logits`` is constant."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logits: Tensor,
        mask: Tensor | None,
        temperature: Tensor | None,
        scale: float,
        cap: float | None,
        beta: float,
        backend: str,
        shard: str,
    ) -> Tensor:
        result, statistics = divergence_op(logits, ref_logits, mask, temperature, scale, cap, beta, backend, shard)
        ctx.save_for_backward(logits, ref_logits, mask, temperature, statistics)
        ctx.scaling, ctx.where = (scale, cap, beta), (backend, shard)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, ref_logits, mask, temperature, statistics = ctx.saved_tensors
        return divergence_backward_op(grad, logits, ref_logits, mask, temperature, *ctx.scaling, statistics, *ctx.where), *(None,) * 8


# ---- from hidden states ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Heads:
    """The logits of both models for the rows that take part, a chunk at a time in two reused buffers."""

    policy: Head
    ref: Head
    comparison: Comparison  # of these rows

    @classmethod
    def of(
        cls,
        index: Tensor | None,
        policy: tuple[Tensor, Tensor, Tensor | None, torch.dtype],
        ref: tuple[Tensor, Tensor, Tensor | None, torch.dtype],
        chunk: int,
        comparison: Comparison,
    ) -> Heads:
        policy_head, ref_head = (Head(*head, chunk, index, None, None, comparison.backend, part=comparison.shard) for head in (policy, ref))
        return cls(policy_head, ref_head, comparison.at(index))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Comparison]]:
        """(rows, their hidden states, logits and reference logits, how these are compared)."""
        for at in self.policy.chunks():
            yield at, *self.policy.forward(at), self.ref.forward(at)[1], self.comparison.at(at)


@operator("linear_divergence")
def linear_divergence_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor | None,
    rows: Tensor | None,
    scale: float,
    cap: float | None,
    beta: float,
    logits_dtype: torch.dtype,
    ref_logits_dtype: torch.dtype,
    chunk: int,
    compact: bool,
    with_jacobian: bool,
    backend: str,
    shard: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [N], statistics, J = d divergence / d hidden, empty where not wanted) of ``hidden [N, H]`` and ``ref_hidden [N, H']``."""
    part = Shard.from_text(shard)
    index = taking_part(live_tokens(hidden, mask, part), rows, compact)
    policy, ref = (hidden, weight, bias, logits_dtype), (ref_hidden, ref_weight, ref_bias, ref_logits_dtype)
    heads = Heads.of(index, policy, ref, chunk, Comparison(mask, temperature, scale, cap, beta, backend, part))
    divergence, statistics = empty_results(heads.policy.buffer, heads.ref.buffer, heads.policy.rows)
    jacobian = Gradients(heads.policy, with_jacobian, False, False)
    ones = torch.ones_like(divergence)
    parts = []  # of a part of the vocabulary: where nothing else is made of a chunk, all go into one collective
    for at, h, logits, ref_logits, comparison in heads:
        out = divergence[at], statistics[at]
        if part is not None and not with_jacobian:
            parts.append(comparison.begin(logits, ref_logits, out))
            continue
        comparison.divergence(logits, ref_logits, out)
        if with_jacobian:
            grad_logits = heads.policy.gradient_of(logits)
            comparison.gradient(grad_logits, ones[at], logits, ref_logits, statistics[at])
            jacobian.add(heads.policy.where(at), h, grad_logits)
    if parts:
        heads.comparison.finish(torch.cat(parts), (divergence, statistics))
    n = all_rows(hidden, part)
    return spread(divergence, index, n), spread(statistics, index, n), jacobian.results()[0]


@fake_of(linear_divergence_op)
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor | None,
    rows: Tensor | None,
    scale: float,
    cap: float | None,
    beta: float,
    logits_dtype: torch.dtype,
    ref_logits_dtype: torch.dtype,
    chunk: int,
    compact: bool,
    with_jacobian: bool,
    backend: str,
    shard: str,
) -> tuple[Tensor, Tensor, Tensor]:
    n = all_rows(hidden, Shard.from_text(shard))
    x, y = (torch.empty(0, dtype=dtype, device=hidden.device) for dtype in (logits_dtype, ref_logits_dtype))
    return *empty_results(x, y, n), hidden.new_empty(hidden.shape if with_jacobian else (0,))


@operator("linear_divergence_backward")
def linear_divergence_backward_op(
    grad: Tensor,
    statistics: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor | None,
    rows: Tensor | None,
    scale: float,
    cap: float | None,
    beta: float,
    logits_dtype: torch.dtype,
    ref_logits_dtype: torch.dtype,
    chunk: int,
    compact: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
    shard: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """d loss / d (hidden, weight, bias) by making both models' logits again; empty where not needed."""
    part = Shard.from_text(shard)
    live = live_tokens(hidden, mask, part) & (grad != 0)
    index = taking_part(live, rows, compact)
    policy, ref = (hidden, weight, bias, logits_dtype), (ref_hidden, ref_weight, ref_bias, ref_logits_dtype)
    heads = Heads.of(index, policy, ref, chunk, Comparison(mask, temperature, scale, cap, beta, backend, part))
    if needs_weight and not compact:
        heads.policy.live = live
    gradients = Gradients(heads.policy, needs_hidden, needs_weight, needs_bias)
    grad, statistics = pick(grad, index), pick(statistics, index)
    for at, h, logits, ref_logits, comparison in heads:
        grad_logits = heads.policy.gradient_of(logits)
        comparison.gradient(grad_logits, grad[at], logits, ref_logits, statistics[at])
        gradients.add(heads.policy.where(at), h, grad_logits)
    return gradients.results()


@fake_of(linear_divergence_backward_op)
def _(
    grad: Tensor,
    statistics: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor | None,
    rows: Tensor | None,
    scale: float,
    cap: float | None,
    beta: float,
    logits_dtype: torch.dtype,
    ref_logits_dtype: torch.dtype,
    chunk: int,
    compact: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
    shard: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, logits_dtype, needs_hidden, needs_weight, needs_bias)


class LinearDivergence(torch.autograd.Function):
    """Differentiable in hidden, weight and bias of the policy. ``frozen``: J is kept, and nothing recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        mask: Tensor | None,
        temperature: Tensor | None,
        rows: Tensor | None,
        scale: float,
        cap: float | None,
        beta: float,
        logits_dtype: torch.dtype,
        ref_logits_dtype: torch.dtype,
        chunk: int,
        compact: bool,
        frozen: bool,
        backend: str,
        shard: str,
    ) -> Tensor:
        tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, temperature, rows)
        ctx.options = (scale, cap, beta, logits_dtype, ref_logits_dtype, chunk, compact)
        divergence, statistics, jacobian = linear_divergence_op(*tensors, *ctx.options, frozen, backend, shard)
        ctx.save_for_backward(*((mask, jacobian) if frozen else (statistics, *tensors)))
        ctx.frozen, ctx.where = frozen, (backend, shard)
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rest = (None,) * 16
        if ctx.frozen:
            mask, jacobian = ctx.saved_tensors
            part = Shard.from_text(ctx.where[1])
            upstream = torch.where(live_tokens(jacobian, mask, part), grad, 0.0).unsqueeze(1)
            return (my_rows(upstream, part) * jacobian).to(jacobian.dtype), None, None, *rest
        statistics, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = linear_divergence_backward_op(grad, statistics, *tensors, *ctx.options, *needs, *ctx.where)
        return *(g.to(x.dtype) if needed else None for g, x, needed in zip(gradients, tensors[:3], needs, strict=True)), *rest
