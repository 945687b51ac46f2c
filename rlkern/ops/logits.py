"""Log-prob and entropy of the chosen token from logits, forward and backward: Triton launchers and the chunked PyTorch path."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._backend import device_of
from .._checks import state_dtype
from .operators import fake_of, operator
from .shards import Shard, merged

IGNORE_INDEX = -100
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# ---- rows -----------------------------------------------------------------------------------------------------------------------------------


def row_levels(x: Tensor) -> list[list[int]] | None:
    """[size, stride] of the two dimensions that all but the last of ``x`` amount to, outermost first; None if it takes more, or columns lie apart."""
    levels: list[list[int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = [levels[-1][0] * size, stride]
        else:
            levels.append([size, stride])
    if len(levels) > 2 or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return None
    return [[1, 0]] * (2 - len(levels)) + levels


def as_rows(x: Tensor) -> Tensor:
    """``[..., V]`` as ``[outer, inner, V]``: a view where unit stride and two row strides can say it (any slice of [batch, time, V]), else a copy."""
    levels = row_levels(x)
    if levels is None:
        return x.contiguous().flatten(0, -2).unsqueeze(0)
    (outer, outer_stride), (inner, inner_stride) = levels
    return x.as_strided((outer, inner, x.shape[-1]), (outer_stride, inner_stride, 1))


def live_rows(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Which positions count, as bool: not masked, and not the ignored id."""
    live = ids != IGNORE_INDEX
    return live if mask is None else live & (mask != 0)


def check_ids(ids: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    """ValueError naming the first counted position whose id is outside ``[0, vocabulary)``. Synchronises."""
    wrong = live_rows(ids, mask) & ((ids < 0) | (ids >= vocabulary))
    if bool(wrong.any()):
        position = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"ids{list(position)} is {int(ids[position])}, outside the vocabulary [0, {vocabulary}); mask it or use {IGNORE_INDEX} to ignore it"
        )


def scales(scale: float, temperature: Tensor | None, dtype: torch.dtype) -> float | Tensor:
    """logit_scale / T: a number, or flat, one for each row."""
    return scale if temperature is None else scale / temperature.flatten().to(dtype)


class Statistics(NamedTuple):
    """Of each row: log-prob and entropy of its distribution, and what the gradient needs. Entropy is an empty tensor where it is not wanted."""

    logprob: Tensor
    entropy: Tensor
    row_max: Tensor
    log2_sum: Tensor  # log2 of the sum of 2^(z - max)

    @classmethod
    def empty(cls, like: Tensor, shape: Sequence[int], with_entropy: bool) -> Statistics:
        """Unfilled, for logits like these."""
        dtype = state_dtype(like)
        logprob, row_max, log2_sum = (torch.empty(shape, dtype=dtype, device=like.device) for _ in range(3))
        return cls(logprob, torch.empty(shape if with_entropy else (0,), dtype=dtype, device=like.device), row_max, log2_sum)

    def at(self, index: slice | Tensor) -> Statistics:
        """Those of some rows."""
        return Statistics._make(x[index] if x.numel() else x for x in self)


@dataclass(frozen=True)
class Rows:
    """What is asked of each row of logits; the tensors are all of one shape, that of the rows."""

    ids: Tensor
    mask: Tensor | None
    temperature: Tensor | None
    scale: float  # logit_scale / T, or logit_scale where there is a temperature for each row
    cap: float | None
    backend: str
    shard: Shard | None = None  # which part of the vocabulary the logits are; None: all of it

    def at(self, index: slice | Tensor) -> Rows:
        """Those of some rows."""
        mask, temperature = (None if x is None else x[index] for x in (self.mask, self.temperature))
        return replace(self, ids=self.ids[index], mask=mask, temperature=temperature)

    def live(self) -> Tensor:
        """Which rows count."""
        return live_rows(self.ids, self.mask)

    def contiguous(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(ids, mask, temperature) as the kernels index them."""
        mask, temperature = (None if x is None else x.contiguous() for x in (self.mask, self.temperature))
        return self.ids.contiguous(), mask, temperature

    def scales(self, dtype: torch.dtype) -> float | Tensor:
        """logit_scale / T: a number, or one for each row."""
        return scales(self.scale, self.temperature, dtype)

    def columns(self, logits: Tensor) -> tuple[int, int, int]:
        """(first token, number of columns that are tokens, size of the vocabulary) of these logits."""
        if self.shard is None:
            return 0, logits.shape[-1], logits.shape[-1]
        return self.shard.first, self.shard.columns, self.shard.total

    def inside(self, total: int) -> Tensor:
        """Flat: whether the id is in a vocabulary of ``total``."""
        token = self.ids.flatten()
        return (token >= 0) & (token < total)

    def targets(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Flat: whether the id is one of these columns, and which one; 0 where it is not."""
        first, columns, _ = self.columns(logits)
        token = self.ids.flatten()
        here = (token >= first) & (token < first + columns)
        return here, torch.where(here, token - first, 0).long()

    def statistics(self, logits: Tensor, out: Statistics) -> None:
        """Fill ``out``, contiguous and of the shape of the ids."""
        if not self.ids.numel():
            return
        if self.shard is not None:
            self.finish(self.states(logits, out.entropy.numel() > 0), out)
        else:
            (_triton_forward if self.backend == "triton" else _torch_forward)(logits, self, out)

    def states(self, logits: Tensor, with_entropy: bool) -> Tensor:
        """``[n, 4]`` for these columns alone: maximum, sums of 2^d and of 2^d d (see kernels/softmax.py), and the target if it is here, else 0."""
        return (_triton_states if self.backend == "triton" else _torch_states)(logits, self, with_entropy)

    def finish(self, states: Tensor, out: Statistics) -> None:
        """Fill ``out`` from the states of all shards, by one collective."""
        assert self.shard is not None
        m, s, t, x = self.shard.gather(states).double().unbind(-1)
        c = self.scales(torch.float64)
        self.store(*merged(m, s, t, c * _LOG2E), x.sum(0), c, self.shard.total, out)

    def store(self, m: Tensor, s: Tensor, t: Tensor, x: Tensor, c: float | Tensor, total: int, out: Statistics) -> None:
        """Fill ``out`` from the state of whole rows, their targets ``x`` and scales ``c``: NaN where the id is outside, 0 where the row is dead."""
        inside, dead, log_s = self.inside(total), ~self.live().flatten(), s.log()
        out.logprob.view(-1).copy_(torch.where(inside, (x - m) * c - log_s, torch.nan).masked_fill_(dead, 0.0))
        out.row_max.view(-1).copy_(m.masked_fill(dead, 0.0))
        out.log2_sum.view(-1).copy_(s.log2().masked_fill_(dead, 0.0))
        if out.entropy.numel():
            out.entropy.view(-1).copy_(torch.where(inside, log_s - t / s / _LOG2E, torch.nan).masked_fill_(dead, 0.0))

    def gradient(self, out: Tensor, logits: Tensor, a: Tensor, b: Tensor | None, statistics: Statistics) -> None:
        """Fill ``out``, which may be ``logits``, with d loss / d logits, given a = d loss / d logprob and b = d loss / d entropy.

        Zeros where a row is dead or has no upstream gradient.
        """
        if out.numel():
            (_triton_backward if self.backend == "triton" else _torch_backward)(out, logits, self, a, b, statistics)


# ---- Triton ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowConfig:
    """How a row of logits is cut: ``block`` columns at a time by ``warps`` warps; ``segment`` columns a program in the forward."""

    block: int
    segment: int
    warps: int
    stages: int

    @classmethod
    def of(cls, vocabulary: int, itemsize: int) -> RowConfig:
        """By the vocabulary and the size of an element alone, never by the number of rows: results must not depend on the batch."""
        # 16 bytes a thread and load; 8 warps keep the two float32 accumulators of a block in registers.
        block = min(8192 // itemsize, max(128, 1 << (vocabulary - 1).bit_length()))
        return cls(block=block, segment=32768, warps=max(1, min(8, block * itemsize // 1024)), stages=3)


@dataclass(frozen=True)
class LossTiling:
    """How a row of logits is cut where one program passes over it twice."""

    block: int
    warps: int
    stages: int

    @classmethod
    def of(cls, vocabulary: int, itemsize: int) -> LossTiling:
        """The rows in flight have to stay in the L2 cache (50 MB on an H100) from the first pass to the second: long ones go one to a multiprocessor,
        which 1024 threads fill; short ones several."""
        warp = 64 if torch.version.hip else 32
        threads = 1024 if vocabulary * itemsize > 96 << 10 else 256
        block = min(threads * 16 // itemsize, max(128, 1 << (vocabulary - 1).bit_length()))  # one load of 16 bytes a thread
        return cls(block=block, warps=max(1, min(threads, block * itemsize // 16) // warp), stages=3)


def _triton_forward(logits: Tensor, rows: Rows, out: Statistics) -> None:
    from ..kernels import logits as kernels

    results = (out.logprob, out.entropy if out.entropy.numel() else None, out.row_max, out.log2_sum)
    x, arguments, layout = _launch_statistics(logits, rows, results, out.entropy.numel() > 0)
    if arguments[-1] is not None:
        n, segments, block = rows.ids.numel(), layout[4], 32
        with device_of(x):
            kernels.combine_kernel[(-(-n // block),)](*arguments, n, *layout, ROWS=block, SEGMENTS=1 << (segments - 1).bit_length(), num_warps=1)


def _triton_states(logits: Tensor, rows: Rows, with_entropy: bool) -> Tensor:
    _, arguments, _ = _launch_statistics(logits, rows, None, with_entropy)
    m, s, t = arguments[-1].double().movedim(1, 0).unbind(-1)
    return _with_target(torch.stack(merged(m, s, t, rows.scales(torch.float64) * _LOG2E), -1).float(), logits, rows)


def _launch_statistics(
    logits: Tensor, rows: Rows, results: tuple[Tensor | None, ...] | None, with_entropy: bool
) -> tuple[Tensor, tuple[Any, ...], tuple[Any, ...]]:
    """Fill ``results``, or where there are none, or a row has several segments, their states: the last of the arguments, ``[n, segments, 3]`` or
    None. Gives the rows of logits, and the arguments and the layout that the kernel was launched with."""
    from ..kernels import logits as kernels

    x, n = as_rows(logits), rows.ids.numel()
    _, columns, _ = rows.columns(logits)
    config = RowConfig.of(x.shape[-1], x.element_size())
    segments = max(1, -(-columns // config.segment))
    partial = None
    if results is None:
        partial = torch.zeros(n, segments, 3, dtype=torch.float32, device=x.device)  # of dead rows too
    elif segments > 1:
        partial = torch.empty(n, segments, 3, dtype=torch.float32, device=x.device)
    arguments = (x, *rows.contiguous(), *(results or (None,) * 4), partial)
    layout = (columns, x.shape[1], x.stride(0), x.stride(1), segments, rows.scale, rows.cap)
    with device_of(x):
        kernels.statistics_kernel[(n * segments,)](
            *arguments,
            *layout,
            ENTROPY=with_entropy,
            SEGMENT=config.segment,
            BLOCK=config.block,
            STAGES=config.stages,
            num_warps=config.warps,
        )
    return x, arguments, layout


def _with_target(state: Tensor, logits: Tensor, rows: Rows) -> Tensor:
    """``[n, 3]`` with the soft-capped target beside it: 0 where another shard has it, or the row is dead."""
    here, column = rows.targets(logits)
    x = as_rows(logits)
    at = torch.arange(here.numel(), device=x.device)
    wanted = here & rows.live().flatten()
    chosen = x[at // x.shape[1], at % x.shape[1], column] if x.shape[-1] else state.new_zeros(here.numel())
    chosen = torch.where(wanted, chosen.to(state.dtype), 0.0)
    return torch.cat([state, torch.where(wanted, soft_capped(chosen, rows.cap, torch.empty_like(chosen)), 0.0).unsqueeze(1)], 1)


def _triton_backward(out: Tensor, logits: Tensor, rows: Rows, a: Tensor, b: Tensor | None, statistics: Statistics) -> None:
    from ..kernels import logits as kernels

    x = as_rows(logits)
    dx = as_rows(out).view(x.shape)  # a new tensor is of one level, but the kernel splits row numbers once
    first, columns, total = rows.columns(logits)
    config = RowConfig.of(x.shape[-1], x.element_size())
    blocks = -(-columns // config.block)
    if columns < x.shape[-1]:  # padding of the vocabulary
        dx[..., columns:] = 0
    with device_of(x):
        kernels.backward_kernel[(rows.ids.numel() * blocks,)](
            x,
            dx,
            *rows.contiguous(),
            statistics.entropy,
            statistics.row_max,
            statistics.log2_sum,
            a.contiguous(),
            None if b is None else b.contiguous(),
            columns,
            first,
            total,
            x.shape[1],
            x.stride(0),
            x.stride(1),
            dx.stride(0),
            dx.stride(1),
            blocks,
            rows.scale,
            rows.cap,
            BLOCK=config.block,
            num_warps=config.warps,
        )


# ---- PyTorch --------------------------------------------------------------------------------------------------------------------------------

# Elements of a chunk of rows: 2 MiB of float32, which stay in the cache between the passes over them. With less, calls take longer than the work.
CHUNK = 1 << 19
_LOG2E = 1 / math.log(2.0)
_LOWEST = -1e30  # stands for -inf where it meets a probability of 0


def locate(x: Tensor, rows: slice | Tensor) -> tuple[int | Tensor, slice | Tensor]:
    """The index of ``rows`` in ``x [outer, inner, V]``; a slice stays a slice, and so a view, where there is one outer level."""
    if x.shape[0] == 1:
        return 0, rows
    flat = torch.arange(x.shape[0] * x.shape[1], device=x.device)[rows]
    return flat // x.shape[1], flat % x.shape[1]


@dataclass
class Chunks:
    """Walks the live rows of ``x`` in chunks that fit the cache, in ``dtype``. A row's arithmetic does not depend on the chunk it is in."""

    x: Tensor  # [outer, inner, V]
    live: Tensor  # [rows] bool
    dtype: torch.dtype

    def __post_init__(self) -> None:
        rows, vocabulary = self.live.numel(), self.x.shape[-1]
        self.size = max(2, CHUNK // vocabulary)
        self.index = None if bool(self.live.all()) else self.live.nonzero().squeeze(1)
        self.rows = rows if self.index is None else self.index.numel()
        # A sum over a single row would be split between threads, and so be rounded otherwise than among others: two rows at least.
        self.buffer = torch.empty(max(2, min(self.size, self.rows)), vocabulary, dtype=self.dtype, device=self.x.device)

    def __iter__(self) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """(rows, their logits [n, V], n >= 2, the last one repeated if need be)."""
        for start in range(0, self.rows, self.size):
            stop = min(start + self.size, self.rows)
            rows: slice | Tensor = slice(start, stop) if self.index is None else self.index[start:stop]
            chunk = self.x[locate(self.x, rows)]
            if stop - start == 1:
                chunk = chunk.expand(2, -1)
            yield rows, chunk


def soft_capped(x: Tensor, cap: float | None, out: Tensor) -> Tensor:
    """cap * tanh(x / cap) in ``out`` (which may be ``x``), -inf staying -inf; without a cap, ``x`` in the dtype of ``out``."""
    if cap is None:
        return x if x.dtype == out.dtype else out.copy_(x)
    excluded = x == -torch.inf
    return out.copy_(x).div_(cap).tanh_().mul_(cap).masked_fill_(excluded, -torch.inf)


def row_scale(scale: float, temperature: Tensor | None, rows: slice | Tensor, n: int, dtype: torch.dtype) -> float | Tensor:
    """logit_scale / T: a number, or ``[n, 1]`` for a temperature a token."""
    if temperature is None:
        return scale
    return (scale / temperature.flatten()[rows].to(dtype)).unsqueeze(1).expand(n, 1)


def _torch_states(logits: Tensor, per_row: Rows, with_entropy: bool) -> Tensor:
    _, columns, _ = per_row.columns(logits)
    scale, cap, dtype = per_row.scale, per_row.cap, state_dtype(logits)
    state = torch.zeros(per_row.ids.numel(), 3, dtype=dtype, device=logits.device)
    m, s, t = state.unbind(1)
    if columns == 0:
        m.fill_(-torch.inf)
        return _with_target(state, logits, per_row)
    chunks = Chunks(as_rows(logits)[..., :columns], per_row.live().flatten(), dtype)
    for rows, raw in chunks:
        n = raw.shape[0]
        live = m[rows].numel()
        buffer = chunks.buffer[:n]
        x = soft_capped(raw, cap, buffer)
        top = x.amax(-1, keepdim=True)
        c = row_scale(scale, per_row.temperature, rows, n, dtype)
        d = torch.sub(x, top.masked_fill(top == -torch.inf, 0.0), out=buffer).mul_(c * _LOG2E)
        m[rows] = top[:live, 0]
        if with_entropy:
            e = torch.exp2(d)
            s[rows] = e.sum(-1)[:live]
            t[rows] = e.mul_(d.clamp_(min=_LOWEST)).sum(-1)[:live]
        else:
            s[rows] = d.exp2_().sum(-1)[:live]
    return _with_target(state, logits, per_row)


def _torch_forward(logits: Tensor, per_row: Rows, out: Statistics) -> None:
    m, s, t, x = _torch_states(logits, per_row, out.entropy.numel() > 0).unbind(1)
    per_row.store(m, s, t, x, per_row.scales(m.dtype), logits.shape[-1], out)


def _torch_backward(out: Tensor, logits: Tensor, per_row: Rows, a: Tensor, b: Tensor | None, statistics: Statistics) -> None:
    _, columns, total = per_row.columns(logits)
    if columns < logits.shape[-1]:  # padding of the vocabulary
        out[..., columns:] = 0
    x, dx = as_rows(logits)[..., :columns], as_rows(out)[..., :columns]
    if columns == 0:
        return
    scale, cap = per_row.scale, per_row.cap
    a, b = a.flatten(), None if b is None else b.flatten()
    live = per_row.live().flatten() & ((a != 0) if b is None else (a != 0) | (b != 0))
    inside, (here, target) = per_row.inside(total), per_row.targets(logits)
    a = a.masked_fill(~inside, torch.nan)
    h, m, log2_s = (t.reshape(-1, 1) for t in statistics[1:])
    chunks = Chunks(x, live, state_dtype(logits))
    for rows, raw in chunks:
        at = target[rows].unsqueeze(1)
        n = at.shape[0]
        # Where the rows of the result lie together, in the dtype of the arithmetic, the work is done there.
        place = dx[0, rows] if isinstance(rows, slice) and dx.shape[0] == 1 and dx.dtype == chunks.dtype else None
        buffer = chunks.buffer[:n] if place is None else place
        c = row_scale(scale, per_row.temperature, rows, n, chunks.dtype)
        upstream = a[rows].unsqueeze(1) * c
        # Nothing is summed here: no need of a second row. In place, PyTorch wants to see the very tensor that it writes.
        z = soft_capped(raw[:n] if place is None or place.data_ptr() != raw.data_ptr() else place, cap, buffer)
        # With z = -inf the gradient is 0, unless the row's statistics are not finite.
        hit = upstream.masked_fill((z.gather(-1, at) == -torch.inf) | ~here[rows].unsqueeze(1) & inside[rows].unsqueeze(1), 0.0)
        slope = None if cap is None else z.div(cap).masked_fill_(z == -torch.inf, 1.0).square_().neg_().add_(1.0)
        t = torch.sub(z, m[rows], out=buffer).mul_(c * _LOG2E).sub_(log2_s[rows])
        if b is None:
            dz = t.exp2_().mul_(-upstream)
        else:
            p = torch.exp2(t)
            dz = t.clamp_(min=_LOWEST).mul_(b[rows].unsqueeze(1) * c * -math.log(2.0)).sub_(h[rows] * b[rows].unsqueeze(1) * c + upstream).mul_(p)
        dz.scatter_add_(1, at, hit)
        if slope is not None:
            dz.mul_(slope)
        if place is None:
            dx[locate(dx, rows)] = dz.to(dx.dtype)
    if chunks.index is not None:
        dx[locate(dx, (~live).nonzero().squeeze(1))] = 0


# ---- custom ops and autograd ----------------------------------------------------------------------------------------------------------------


@operator("token_logprobs")
def token_logprobs_op(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    scale: float,
    cap: float | None,
    with_entropy: bool,
    validate: bool,
    backend: str,
    shard: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:class:`Statistics`, each of the shape of ``ids``."""
    rows = Rows(ids, mask, temperature, scale, cap, backend, Shard.from_text(shard))
    if validate:
        check_ids(ids, mask, rows.columns(logits)[2])
    out = Statistics.empty(logits, ids.shape, with_entropy)
    rows.statistics(logits, out)
    return out.logprob, out.entropy, out.row_max, out.log2_sum


@fake_of(token_logprobs_op)
def _(logits: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(Statistics.empty(logits, ids.shape, args[-4]))


@operator("token_logprobs_backward")
def token_logprobs_backward_op(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    entropy: Tensor,
    row_max: Tensor,
    log2_sum: Tensor,
    scale: float,
    cap: float | None,
    backend: str,
    shard: str,
) -> Tensor:
    """d loss / d logits in a new tensor."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows = Rows(ids, mask, temperature, scale, cap, backend, Shard.from_text(shard))
    rows.gradient(out, logits, grad_logprob, grad_entropy, Statistics(grad_logprob, entropy, row_max, log2_sum))
    return out


@fake_of(token_logprobs_backward_op)
def _(grad_logprob: Tensor, grad_entropy: Tensor | None, logits: Tensor, *args: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@operator("token_logprobs_backward_", mutates=("logits",))
def token_logprobs_backward_inplace_op(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    entropy: Tensor,
    row_max: Tensor,
    log2_sum: Tensor,
    scale: float,
    cap: float | None,
    backend: str,
    shard: str,
) -> None:
    """d loss / d logits, written over ``logits``."""
    rows = Rows(ids, mask, temperature, scale, cap, backend, Shard.from_text(shard))
    rows.gradient(logits, logits, grad_logprob, grad_entropy, Statistics(grad_logprob, entropy, row_max, log2_sum))


class TokenLogprobs(torch.autograd.Function):
    """Differentiable in logits, through the log-prob and through the entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        temperature: Tensor | None,
        scale: float,
        cap: float | None,
        with_entropy: bool,
        inplace_backward: bool,
        validate: bool,
        backend: str,
        shard: str,
    ) -> tuple[Tensor, Tensor]:
        logprob, entropy, row_max, log2_sum = token_logprobs_op(logits, ids, mask, temperature, scale, cap, with_entropy, validate, backend, shard)
        ctx.save_for_backward(logits, ids, mask, temperature, entropy, row_max, log2_sum)
        ctx.scale, ctx.cap, ctx.inplace, ctx.backend, ctx.shard = scale, cap, inplace_backward, backend, shard
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, ids, mask, temperature, entropy, row_max, log2_sum = ctx.saved_tensors
        if entropy.numel() == 0:
            grad_entropy = None
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 11
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(row_max)
        options = (ctx.scale, ctx.cap, ctx.backend, ctx.shard)
        args = (grad_logprob, grad_entropy, logits, ids, mask, temperature, entropy, row_max, log2_sum, *options)
        if ctx.inplace:
            token_logprobs_backward_inplace_op(*args)
            return (logits.detach(),) + (None,) * 10
        return (token_logprobs_backward_op(*args),) + (None,) * 10
