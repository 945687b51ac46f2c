"""Log-prob and entropy from logits in PyTorch, over chunks of rows that fit the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._checks import state_dtype
from ...config import PolicyLossConfig
from ..fused import PolicyRows, Weights
from ..logits import Rows, Saved, Slopes, Statistics, as_rows, locate, soft_capped
from ..operators import at
from ..shards import LOG2E
from .policy import token_slopes

# Elements of a chunk of rows: 2 MiB of float32, which stay in the cache between the passes over them. With less, calls take longer than the work.
CHUNK = 1 << 19
_LOWEST = -1e30  # stands for -inf where it meets a probability of 0


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


def row_scale(scale: float, temperature: Tensor | None, rows: slice | Tensor, n: int, dtype: torch.dtype) -> float | Tensor:
    """logit_scale / T: a number, or ``[n, 1]`` for a temperature a token."""
    if temperature is None:
        return scale
    return (scale / temperature.flatten()[rows].to(dtype)).unsqueeze(1).expand(n, 1)


def states(logits: Tensor, per_row: Rows, with_entropy: bool) -> Tensor:
    """``[n, 4]``, see :meth:`Rows.states`."""
    _, columns, _ = per_row.columns(logits)
    scale, cap, dtype = per_row.scale, per_row.cap, state_dtype(logits.dtype)
    state = torch.zeros(per_row.ids.numel(), 3, dtype=dtype, device=logits.device)
    m, s, t = state.unbind(1)
    if columns == 0:
        m.fill_(-torch.inf)
        return per_row.with_target(state, logits)
    chunks = Chunks(as_rows(logits)[..., :columns], per_row.live().flatten(), dtype)
    for rows, raw in chunks:
        n = raw.shape[0]
        live = m[rows].numel()
        buffer = chunks.buffer[:n]
        x = soft_capped(raw, cap, buffer)
        top = x.amax(-1, keepdim=True)
        c = row_scale(scale, per_row.temperature, rows, n, dtype)
        d = torch.sub(x, top.masked_fill(top == -torch.inf, 0.0), out=buffer).mul_(c * LOG2E)
        m[rows] = top[:live, 0]
        if with_entropy:
            e = torch.exp2(d)
            s[rows] = e.sum(-1)[:live]
            t[rows] = e.mul_(d.clamp_(min=_LOWEST)).sum(-1)[:live]
        else:
            s[rows] = d.exp2_().sum(-1)[:live]
    return per_row.with_target(state, logits)


def statistics(logits: Tensor, per_row: Rows, out: Statistics) -> None:
    """Fill ``out``."""
    found = states(logits, per_row, out.entropy.numel() > 0)
    per_row.store(found, per_row.scales(found.dtype), logits.shape[-1], out)


def gradient(out: Tensor, logits: Tensor, per_row: Rows, slopes: Slopes, saved: Saved) -> None:
    """Fill ``out`` with d loss / d logits."""
    _, columns, total = per_row.columns(logits)
    if columns < logits.shape[-1]:  # padding of the vocabulary
        out[..., columns:] = 0
    x, dx = as_rows(logits)[..., :columns], as_rows(out)[..., :columns]
    if columns == 0:
        return
    scale, cap = per_row.scale, per_row.cap
    a, b = (None if t is None else t.flatten() for t in slopes)
    assert a is not None
    live = per_row.live().flatten() & Slopes(a, b).moving()
    inside, (here, target) = per_row.inside(total), per_row.targets(logits)
    a = a.masked_fill(~inside, torch.nan)
    h, m, log2_s = (t.reshape(-1, 1) for t in saved)
    chunks = Chunks(x, live, state_dtype(logits.dtype))
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
        t = torch.sub(z, m[rows], out=buffer).mul_(c * LOG2E).sub_(log2_s[rows])
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


# Rows of logits between whose two passes the cache is kept.
CHUNK_ROWS = 256


def policy_gradients(
    out: Tensor, logits: Tensor, rows: Rows, terms: PolicyRows, weights: Weights, config: PolicyLossConfig, found: Statistics
) -> None:
    """Fill ``out`` with d loss / d logits, and ``found``."""
    x, dx = as_rows(logits), as_rows(out)
    for start in range(0, rows.ids.numel(), CHUNK_ROWS):
        some = slice(start, start + CHUNK_ROWS)
        here, stored, weight = at(rows, some), at(found, some), at(weights, some)
        chunk, place = x[locate(x, some)], dx[locate(dx, some)]  # views where the rows are evenly spaced, else copies
        here.statistics(chunk, stored)
        assert here.mask is not None
        slope = token_slopes(stored.logprob, here.mask, at(terms, some), config).mul_(weight.loss)
        here.gradient(place, chunk, Slopes(slope, weight.entropy), stored.for_gradient)
        if dx.shape[0] > 1:
            dx[locate(dx, some)] = place


def restrict(out: Tensor, logits: Tensor, offsets: Tensor, token_ids: Tensor, rows: Tensor | None) -> None:
    """Fill ``out``, see :func:`rlkern.ops.keep.restrict_into`."""
    starts, ends = (t if rows is None else t[rows] for t in (offsets[:-1].long(), offsets[1:].long()))
    counts = ends - starts
    row = torch.arange(out.shape[0], device=out.device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    column = token_ids[(starts - first)[row] + torch.arange(row.numel(), device=out.device)].long()
    inside = (column >= 0) & (column < out.shape[1])
    row, column = row[inside], column[inside]
    x = as_rows(logits)
    outer, inner = locate(x, row)
    out.fill_(-torch.inf)
    out[row, column] = x[outer, inner, column]


def scale(x: Tensor, factor: Tensor) -> None:
    """x *= factor, see :func:`rlkern.ops.fused.scale_inplace_op`."""
    if x.device.type == "cpu":
        number = factor.item()
        if number != 1:
            x.mul_(number)  # in float32 for 16-bit numbers too
    else:
        torch.mul(x, factor.view(1), out=x)  # a tensor with no dimension would be rounded to the dtype of x first
