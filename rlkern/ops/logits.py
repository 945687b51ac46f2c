"""Log-prob and entropy of the chosen token from logits, forward and backward: records, operators, autograd. The work is the backends'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import state_dtype
from .backends import backend_of
from .operators import fake_of, operator, save, saved, split
from .select import as_bool
from .shards import LOG2E, Shard, merged

IGNORE_INDEX = -100
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# ---- layout ---------------------------------------------------------------------------------------------------------------------------------


def row_levels(x: Tensor) -> list[list[int]] | None:
    """[size, stride] of the two dimensions that all but the last of ``x`` amount to, outermost first; None if it takes more, or columns lie apart.

    Where there are fewer, 1 and the stride of rows: the compiler reads how rows are aligned from all strides, and one row's result must not differ
    from the same row's among others.
    """
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
    return [[1, x.stride(-2) if x.dim() > 1 else x.shape[-1]]] * (2 - len(levels)) + levels


def as_rows(x: Tensor) -> Tensor:
    """``[..., V]`` as ``[outer, inner, V]``: a view where unit stride and two row strides can say it (any slice of [batch, time, V]), else a copy."""
    levels = row_levels(x)
    if levels is None:
        return x.contiguous().flatten(0, -2).unsqueeze(0)
    (outer, outer_stride), (inner, inner_stride) = levels
    return x.as_strided((outer, inner, x.shape[-1]), (outer_stride, inner_stride, 1))


def locate(x: Tensor, rows: slice | Tensor) -> tuple[int | Tensor, slice | Tensor]:
    """The index of ``rows`` in ``x [outer, inner, V]``; a slice within one outer level stays a slice, and so a view."""
    inner = x.shape[1]
    if isinstance(rows, slice):
        outer, first = divmod(rows.start, inner)
        if rows.stop <= (outer + 1) * inner:
            return outer, slice(first, first + rows.stop - rows.start)
        rows = torch.arange(rows.start, rows.stop, device=x.device)
    return rows // inner, rows % inner


def live_rows(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Which positions count, as bool: not masked, and not the ignored id."""
    live = ids != IGNORE_INDEX
    return live if mask is None else live & as_bool(mask)


def soft_capped(x: Tensor, cap: float | None, out: Tensor) -> Tensor:
    """cap * tanh(x / cap) in ``out`` (which may be ``x``), -inf staying -inf; without a cap, ``x`` in the dtype of ``out``."""
    if cap is None:
        return x if x.dtype == out.dtype else out.copy_(x)
    excluded = x == -torch.inf
    return out.copy_(x).div_(cap).tanh_().mul_(cap).masked_fill_(excluded, -torch.inf)


def scales(scale: float, temperature: Tensor | None, dtype: torch.dtype) -> float | Tensor:
    """logit_scale / T: a number, or flat, one for each row."""
    return scale if temperature is None else scale / temperature.flatten().to(dtype)


# ---- records --------------------------------------------------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """What the gradient needs of each row; entropy is empty where it was not wanted."""

    entropy: Tensor
    row_max: Tensor
    log2_sum: Tensor  # log2 of the sum of 2^(z - max)


class Statistics(NamedTuple):
    """Of each row: log-prob and entropy of its distribution, and what else the gradient needs. Entropy is empty where it is not wanted."""

    logprob: Tensor
    entropy: Tensor
    row_max: Tensor
    log2_sum: Tensor

    @classmethod
    def empty(cls, logits_dtype: torch.dtype, shape: Sequence[int], device: torch.device, with_entropy: bool) -> Statistics:
        """Unfilled, of logits of this dtype."""
        dtype = state_dtype(logits_dtype)
        logprob, row_max, log2_sum = (torch.empty(shape, dtype=dtype, device=device) for _ in range(3))
        return cls(logprob, torch.empty(shape if with_entropy else (0,), dtype=dtype, device=device), row_max, log2_sum)

    @property
    def for_gradient(self) -> Saved:
        return Saved(*self[1:])


class Slopes(NamedTuple):
    """d loss / d logprob and d loss / d entropy of each row; None for an entropy that has no part in the loss."""

    logprob: Tensor
    entropy: Tensor | None

    def moving(self) -> Tensor:
        """Which rows have any gradient, as bool."""
        return self.logprob != 0 if self.entropy is None else (self.logprob != 0) | (self.entropy != 0)


class Rows(NamedTuple):
    """What is asked of each row of logits; the tensors are all of one shape, that of the rows."""

    ids: Tensor
    mask: Tensor | None
    temperature: Tensor | None
    scale: float  # logit_scale / T, or logit_scale where there is a temperature for each row
    cap: float | None
    backend: str
    shard: Shard | None = None  # which part of the vocabulary the logits are; None: all of it

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

    def check_ids(self, vocabulary: int) -> None:
        """ValueError naming the first counted position whose id is outside ``[0, vocabulary)``. Synchronises."""
        if self.ids.numel():
            least, most = self.ids.aminmax()
            if least.item() >= 0 and most.item() < vocabulary:
                return
        wrong = self.live() & ((self.ids < 0) | (self.ids >= vocabulary))
        if bool(wrong.any()):
            position = tuple(int(i) for i in wrong.nonzero()[0])
            found = f"ids{list(position)} is {int(self.ids[position])}"
            raise ValueError(f"{found}, outside the vocabulary [0, {vocabulary}); mask it or use {IGNORE_INDEX} to ignore it")

    def inside(self, total: int) -> Tensor:
        """Flat: whether the id is in a vocabulary of ``total``."""
        token = self.ids.flatten()
        return (token >= 0) & (token < total)

    def targets(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Flat: whether the id is one of these columns, of which there are some, and which one; the nearest where it is not."""
        first, columns, _ = self.columns(logits)
        column = self.ids.flatten() - first
        nearest = column.clamp(0, columns - 1)
        return column == nearest, nearest.long()

    def statistics(self, logits: Tensor, out: Statistics) -> None:
        """Fill ``out``, contiguous and of the shape of the ids."""
        if not self.ids.numel():
            return
        if self.shard is not None:
            self.finish(self.states(logits, out.entropy.numel() > 0), out)
        else:
            backend_of(self.backend).statistics(logits, self, out)

    def states(self, logits: Tensor, with_entropy: bool) -> Tensor:
        """``[n, 4]`` for these columns alone: maximum, sums of 2^d and of 2^d d (see kernels/softmax.py), and the target if it is here, else 0."""
        return backend_of(self.backend).states(logits, self, with_entropy)

    def with_target(self, state: Tensor, logits: Tensor) -> Tensor:
        """``[n, 3]`` with the soft-capped target beside it: 0 where another shard has it."""
        if self.columns(logits)[1] == 0:
            return torch.cat([state, torch.zeros_like(state[:, :1])], 1)
        x, (here, column) = as_rows(logits), self.targets(logits)
        chosen = x.gather(-1, column.view(*x.shape[:2], 1)).flatten()
        chosen = torch.where(here, chosen.to(state.dtype), 0.0)
        return torch.cat([state, soft_capped(chosen, self.cap, torch.empty_like(chosen)).unsqueeze(1)], 1)

    def finish(self, states: Tensor, out: Statistics) -> None:
        """Fill ``out`` from the states of all shards, by one collective."""
        assert self.shard is not None
        m, s, t, x = self.shard.gather(states).double().unbind(-1)
        c = self.scales(torch.float64)
        self.store(torch.stack([*merged(m, s, t, c * LOG2E), x.sum(0)], -1), c, self.shard.total, out)

    def store(self, states: Tensor, c: float | Tensor, total: int, out: Statistics) -> None:
        """Fill ``out`` from the states of whole rows and their scales ``c``: NaN where the id is outside, 0 where the row is dead."""
        m, s, t, x = states.unbind(-1)
        inside, dead, log_s = self.inside(total), ~self.live().flatten(), s.log()
        out.logprob.view(-1).copy_(torch.where(inside, (x - m) * c - log_s, torch.nan).masked_fill_(dead, 0.0))
        out.row_max.view(-1).copy_(m.masked_fill(dead, 0.0))
        out.log2_sum.view(-1).copy_(s.log2().masked_fill_(dead, 0.0))
        if out.entropy.numel():
            out.entropy.view(-1).copy_(torch.where(inside, log_s - t / s / LOG2E, torch.nan).masked_fill_(dead, 0.0))

    def gradient(self, out: Tensor, logits: Tensor, slopes: Slopes, saved: Saved) -> None:
        """Fill ``out``, which may be ``logits``, with d loss / d logits: zeros where a row is dead or has no slopes."""
        if out.numel():
            backend_of(self.backend).gradient(out, logits, self, slopes, saved)


# ---- operators and autograd -----------------------------------------------------------------------------------------------------------------


@operator("token_logprobs")
def token_logprobs_op(logits: Tensor, rows: Rows, with_entropy: bool, validate: bool) -> Statistics:
    """Each of the shape of the ids."""
    if validate:
        rows.check_ids(rows.columns(logits)[2])
    out = Statistics.empty(logits.dtype, rows.ids.shape, logits.device, with_entropy)
    rows.statistics(logits, out)
    return out


@fake_of(token_logprobs_op)
def _(logits: Tensor, rows: Rows, with_entropy: bool, validate: bool) -> Statistics:
    return Statistics.empty(logits.dtype, rows.ids.shape, logits.device, with_entropy)


@operator("token_logprobs_backward")
def token_logprobs_backward_op(logits: Tensor, rows: Rows, slopes: Slopes, saved: Saved) -> Tensor:
    """d loss / d logits in a new tensor."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows.gradient(out, logits, slopes, saved)
    return out


@fake_of(token_logprobs_backward_op)
def _(logits: Tensor, rows: Rows, slopes: Slopes, saved: Saved) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@operator("token_logprobs_backward_", mutates=("logits",))
def token_logprobs_backward_inplace_op(logits: Tensor, rows: Rows, slopes: Slopes, saved: Saved) -> None:
    """d loss / d logits, written over ``logits``."""
    rows.gradient(logits, logits, slopes, saved)


def slopes_of(grad_logprob: Tensor | None, grad_entropy: Tensor | None, saved: Saved) -> Slopes | None:
    """What comes back to log-prob and entropy, the latter only where it was asked for; None for nothing."""
    if not saved.entropy.numel():
        grad_entropy = None
    if grad_logprob is None:
        if grad_entropy is None:
            return None
        grad_logprob = torch.zeros_like(saved.row_max)
    return Slopes(grad_logprob, grad_entropy)


class TokenLogprobs(torch.autograd.Function):
    """(log-prob, entropy), differentiable in logits through both. ``apply(logits, *rows, with_entropy, inplace_backward, validate)``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        rows, with_entropy, inplace_backward, validate = split(arguments, Rows)
        out = token_logprobs_op(logits, rows, with_entropy, validate)
        save(ctx, logits, rows, out.for_gradient, inplace_backward)
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(out.entropy)
        return out.logprob, out.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, rows, statistics, inplace = saved(ctx, None, Rows, Saved)
        slopes = slopes_of(grad_logprob, grad_entropy, statistics)
        gradient = None
        if slopes is not None and inplace:
            token_logprobs_backward_inplace_op(logits, rows, slopes, statistics)
            gradient = logits.detach()
        elif slopes is not None:
            gradient = token_logprobs_backward_op(logits, rows, slopes, statistics)
        return gradient, *(None,) * (len(ctx.needs_input_grad) - 1)
