"""KL, reverse KL and generalised Jensen-Shannon divergence over the vocabulary, from two logits tensors: Triton launchers and the PyTorch path.

One number says which: ``beta`` is the weight of q (reference, teacher) in the mixture, 0 for KL(q || p), 1 for KL(p || q). ``statistics [..., 5]``
are the maximum of a row of x and log2 of its sum relative to that, the same of y, and what the gradient subtracts: KL(p || q), 0 or KL(p || mixture).
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
from .logits import Chunks, as_rows, locate, row_scale, soft_capped

STATISTICS = 5
_LN2 = math.log(2.0)
_HIGHEST = 1e30  # stands for inf where it meets a probability of 0


def live_tokens(like: Tensor, mask: Tensor | None) -> Tensor:
    """Flat: which positions count, as bool; ``like [..., V]``."""
    if mask is None:
        return torch.ones(like.shape[:-1].numel(), dtype=torch.bool, device=like.device)
    return mask.flatten() != 0


def empty_results(x: Tensor, y: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """Unfilled (divergence, statistics) of this shape, for logits like x and y."""
    dtype = torch.promote_types(state_dtype(x), state_dtype(y))
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
        if out[0].numel():
            (_triton_forward if self.backend == "triton" else _torch_forward)(logits, ref_logits, self, out)

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
    from ..kernels import divergence as kernels

    x, y = as_rows(logits), as_rows(ref_logits)
    # Two passes want few rows in flight, for the cache; one wants many small programs, since each block ends in two reductions.
    tiling = PairTiling.of(x, y, threads=256 if o.kind == "jsd" else 128)
    with device_of(x):
        kernels.divergence_kernel[(out[0].numel(),)](
            x,
            y,
            *_contiguous(o.mask, o.temperature),
            *out,
            x.shape[-1],
            *_layout(x),
            *_layout(y),
            o.scale,
            o.cap,
            o.beta,
            KIND=o.kind,
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


def _exponentials(x: Tensor, scale: float | Tensor, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(maximum, x less that, in ``buffer``, its exponentials, their sum or NaN) of soft-capped rows."""
    m = x.amax(-1, keepdim=True)
    d = torch.sub(x, m.masked_fill(m == -torch.inf, 0.0), out=buffer)
    e = (d * scale).exp_()
    s = e.sum(-1, keepdim=True)
    return m, d, e, s.masked_fill_(s == 0, torch.nan)


def _mixture(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """M = (1 - beta) p + beta q: exactly p where they are equal, and never 0."""
    return torch.lerp(p, q, beta).add_(torch.finfo(p.dtype).tiny)


def _log_ratio(p: Tensor, m: Tensor) -> Tensor:
    """log p - log M, finite where p is 0."""
    return p.div(m).clamp_(min=torch.finfo(p.dtype).tiny).log_()


def _torch_forward(logits: Tensor, ref_logits: Tensor, o: Comparison, out: tuple[Tensor, Tensor]) -> None:
    y = as_rows(ref_logits)
    result, statistics = out[0].view(-1), out[1].view(-1, STATISTICS)
    for x in out:
        x.zero_()
    chunks = Chunks(as_rows(logits), live_tokens(logits, o.mask), result.dtype)
    other = torch.empty_like(chunks.buffer)
    for rows, raw in chunks:
        n, live = raw.shape[0], result[rows].numel()
        c = row_scale(o.scale, o.temperature, rows, n, result.dtype)
        raw_y = y[locate(y, rows)].expand(n, -1)
        of_p, of_q = (_exponentials(soft_capped(x, o.cap, buffer[:n]), c, buffer[:n]) for x, buffer in ((raw, chunks.buffer), (raw_y, other)))
        mean = None
        if o.beta in (0, 1):
            (_, d, e, s), (_, d_other, _, s_other) = (of_p, of_q) if o.beta == 1 else (of_q, of_p)
            ratio = torch.sub(d, d_other, out=d).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=0.0)
            infinite = ratio.amax(-1, keepdim=True) == torch.inf  # even where the probability rounds to 0
            of_sums = s.log() - s_other.log()
            value = e.mul_(ratio).sum(-1, keepdim=True) / s * c - of_sums
            value = torch.where(infinite, torch.inf + 0.0 * of_sums, value)
            mean = value if o.beta == 1 else None
        else:
            p, q = (e.div_(s) for _, _, e, s in (of_p, of_q))
            m = _mixture(p, q, o.beta)
            mean, from_q = (_log_ratio(x, m).mul_(x).sum(-1, keepdim=True) for x in (p, q))
            value = (1 - o.beta) * mean + o.beta * from_q
        result[rows] = value[:live, 0]
        for i, column in enumerate((of_p[0], of_p[3].log2(), of_q[0], of_q[3].log2(), mean)):
            if column is not None:
                statistics[rows, i] = column[:live, 0]


def _torch_backward(out: Tensor, grad: Tensor, logits: Tensor, ref_logits: Tensor, o: Comparison, statistics: Tensor) -> None:
    x, y, dx = as_rows(logits), as_rows(ref_logits), as_rows(out)
    upstream = grad.flatten()
    live = live_tokens(logits, o.mask) & (upstream != 0)
    chunks = Chunks(x, live, statistics.dtype)
    other = torch.empty_like(chunks.buffer)
    columns = statistics.view(-1, STATISTICS).unsqueeze(-1).unbind(1)
    for rows, raw in chunks:
        m_p, log2_p, m_q, log2_q, mean = (column[rows] for column in columns)
        n = mean.shape[0]
        c = row_scale(o.scale, o.temperature, rows, n, chunks.dtype)
        z = soft_capped(raw[:n], o.cap, chunks.buffer[:n])
        w = soft_capped(y[locate(y, rows)], o.cap, other[:n])
        slope = None if o.cap is None else z.div(o.cap).masked_fill_(z == -torch.inf, 1.0).square_().neg_().add_(1.0)
        d = torch.sub(z, m_p, out=chunks.buffer[:n]).mul_(c).sub_(log2_p * _LN2)
        d_ref = torch.sub(w, m_q, out=other[:n]).mul_(c).sub_(log2_q * _LN2)
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
        dx[locate(dx, rows)] = dz.to(dx.dtype)
    if chunks.index is not None:
        dx[locate(dx, (~live).nonzero().squeeze(1))] = 0


# ---- custom ops and autograd ----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("rlkern::divergence", mutates_args=())
def divergence_op(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    scale: float,
    cap: float | None,
    beta: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(divergence, statistics) of ``[..., V]``."""
    out = empty_results(logits, ref_logits, *logits.shape[:-1])
    Comparison(mask, temperature, scale, cap, beta, backend).divergence(logits, ref_logits, out)
    return out


@divergence_op.register_fake
def _(logits: Tensor, ref_logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return empty_results(logits, ref_logits, *logits.shape[:-1])


@torch.library.custom_op("rlkern::divergence_backward", mutates_args=())
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
) -> Tensor:
    """d loss / d logits in a new tensor."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    Comparison(mask, temperature, scale, cap, beta, backend).gradient(out, grad, logits, ref_logits, statistics)
    return out


@divergence_backward_op.register_fake
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
    ) -> Tensor:
        result, statistics = divergence_op(logits, ref_logits, mask, temperature, scale, cap, beta, backend)
        ctx.save_for_backward(logits, ref_logits, mask, temperature, statistics)
        ctx.options = (scale, cap, beta, backend)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, ref_logits, mask, temperature, statistics = ctx.saved_tensors
        *scaling, backend = ctx.options
        return divergence_backward_op(grad, logits, ref_logits, mask, temperature, *scaling, statistics, backend), *(None,) * 7


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
        policy_head, ref_head = (Head(*head, chunk, index, None, None, comparison.backend) for head in (policy, ref))
        return cls(policy_head, ref_head, comparison.at(index))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Comparison]]:
        """(rows, their hidden states, logits and reference logits, how these are compared)."""
        for at in self.policy.chunks():
            yield at, *self.policy.forward(at), self.ref.forward(at)[1], self.comparison.at(at)


@torch.library.custom_op("rlkern::linear_divergence", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [N], statistics, J = d divergence / d hidden, empty where not wanted) of ``hidden [N, H]`` and ``ref_hidden [N, H']``."""
    index = taking_part(live_tokens(hidden, mask), rows, compact)
    policy, ref = (hidden, weight, bias, logits_dtype), (ref_hidden, ref_weight, ref_bias, ref_logits_dtype)
    heads = Heads.of(index, policy, ref, chunk, Comparison(mask, temperature, scale, cap, beta, backend))
    divergence, statistics = empty_results(heads.policy.buffer, heads.ref.buffer, heads.policy.rows)
    jacobian = Gradients(heads.policy, with_jacobian, False, False)
    ones = torch.ones_like(divergence)
    for at, h, logits, ref_logits, comparison in heads:
        comparison.divergence(logits, ref_logits, (divergence[at], statistics[at]))
        if with_jacobian:
            comparison.gradient(logits, ones[at], logits, ref_logits, statistics[at])
            jacobian.add(heads.policy.where(at), h, logits)
    n = hidden.shape[0]
    return spread(divergence, index, n), spread(statistics, index, n), jacobian.results()[0]


@linear_divergence_op.register_fake
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
) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (torch.empty(0, dtype=dtype, device=hidden.device) for dtype in (logits_dtype, ref_logits_dtype))
    return *empty_results(x, y, hidden.shape[0]), hidden.new_empty(hidden.shape if with_jacobian else (0,))


@torch.library.custom_op("rlkern::linear_divergence_backward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """d loss / d (hidden, weight, bias) by making both models' logits again; empty where not needed."""
    live = live_tokens(hidden, mask) & (grad != 0)
    index = taking_part(live, rows, compact)
    policy, ref = (hidden, weight, bias, logits_dtype), (ref_hidden, ref_weight, ref_bias, ref_logits_dtype)
    heads = Heads.of(index, policy, ref, chunk, Comparison(mask, temperature, scale, cap, beta, backend))
    if needs_weight and not compact:
        heads.policy.live = live
    gradients = Gradients(heads.policy, needs_hidden, needs_weight, needs_bias)
    grad, statistics = pick(grad, index), pick(statistics, index)
    for at, h, logits, ref_logits, comparison in heads:
        comparison.gradient(logits, grad[at], logits, ref_logits, statistics[at])
        gradients.add(heads.policy.where(at), h, logits)
    return gradients.results()


@linear_divergence_backward_op.register_fake
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
    ) -> Tensor:
        tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, temperature, rows)
        ctx.options = (scale, cap, beta, logits_dtype, ref_logits_dtype, chunk, compact)
        divergence, statistics, jacobian = linear_divergence_op(*tensors, *ctx.options, frozen, backend)
        ctx.save_for_backward(*((mask, jacobian) if frozen else (statistics, *tensors)))
        ctx.frozen, ctx.backend = frozen, backend
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rest = (None,) * 15
        if ctx.frozen:
            mask, jacobian = ctx.saved_tensors
            upstream = torch.where(live_tokens(jacobian, mask), grad, 0.0).unsqueeze(1)
            return (upstream * jacobian).to(jacobian.dtype), None, None, *rest
        statistics, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = linear_divergence_backward_op(grad, statistics, *tensors, *ctx.options, *needs, ctx.backend)
        return *(g.to(x.dtype) if needed else None for g, x, needed in zip(gradients, tensors[:3], needs, strict=True)), *rest
