"""Log-prob and entropy from logits in PyTorch, over chunks of rows that fit the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ..._checks import state_dtype
from ...config import PolicyLossConfig
from ..fused import PolicyRows, Weights
from ..logits import Rows, Saved, Slopes, Statistics, as_rows, locate, soft_capped
from ..shards import LOG2E
from .policy import token_slopes

# Elements of a chunk of rows: 2 MiB of float32, which stay in the cache between the passes over them. With less, calls take longer than the work.
CHUNK = 1 << 19
_LOWEST_LOG2 = -1e4  # stands for -inf in bits: 2 to it is 0, and its products with large gradients are finite


def pieces(live: Tensor, x: Tensor) -> list[slice | Tensor]:
    """The live rows of ``x [outer, inner, V]``, as many at once as fit the cache: runs of them as slices, of which :func:`locate` makes views; and by
    index what is scattered in runs of less than a sixteenth of that: to copy those together takes less time than to call everything for each."""
    size, inner = max(2, CHUNK // x.shape[-1]), x.shape[1]
    if live.all():
        runs = [(start, start + inner) for start in range(0, live.numel(), inner)]
    else:
        ends = live[1:] != live[:-1]
        ends[inner - 1 :: inner] = True
        last = ends.nonzero().squeeze(1)
        stops, alive = [*(last + 1).tolist(), live.numel()], [*live[last].tolist(), bool(live[-1])]
        runs = [(start, stop) for start, stop, here in zip([0, *stops], stops, alive, strict=False) if here]
    least = max(2, size // 16) if len(runs) > 1 else 1
    found: list[slice | Tensor] = []
    for start, stop in runs:
        if stop - start >= least:
            n = math.ceil((stop - start) / size)
            found += [slice(start + i * (stop - start) // n, start + (i + 1) * (stop - start) // n) for i in range(n)]
    if any(stop - start < least for start, stop in runs):
        scattered = live.clone()
        for rows in found:
            scattered[rows] = False
        found += scattered.nonzero().squeeze(1).split(size)
    return found


class Chunks:
    """Walks the live rows of ``x [outer, inner, V]`` in chunks that fit the cache, in ``dtype``. A row's arithmetic is the same in any chunk."""

    def __init__(self, x: Tensor, live: Tensor, dtype: torch.dtype) -> None:
        self.x, self.dtype, self.pieces = x, dtype, pieces(live, x)

    @cached_property
    def buffer(self) -> Tensor:
        """For one chunk."""
        longest = max([2, *(rows.stop - rows.start if isinstance(rows, slice) else rows.numel() for rows in self.pieces)])
        return torch.empty(longest, self.x.shape[-1], dtype=self.dtype, device=self.x.device)

    def __iter__(self) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """(rows, their logits [n, V], n >= 2, the last one repeated if need be)."""
        # A sum over a single row would be split between threads, and so be rounded otherwise than among others: two rows at least.
        for rows in self.pieces:
            chunk = self.x[locate(self.x, rows)]
            yield rows, chunk.expand(max(2, chunk.shape[0]), -1)


def row_scale(scale: float, temperature: Tensor | None, rows: slice | Tensor, dtype: torch.dtype) -> float | Tensor:
    """logit_scale / T: a number, or ``[n, 1]`` for a temperature a token."""
    return scale if temperature is None else (scale / temperature.flatten()[rows].to(dtype)).unsqueeze(1)


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
        c = row_scale(scale, per_row.temperature, rows, dtype)
        d = torch.sub(x, top.clamp(min=torch.finfo(top.dtype).min), out=buffer).mul_(c * LOG2E)  # -inf in a row that has nothing else
        m[rows] = top[:live, 0]
        if with_entropy:
            e = torch.exp2(d)
            s[rows] = e.sum(-1)[:live]
            t[rows] = e.mul_(d.clamp_(min=_LOWEST_LOG2)).sum(-1)[:live]
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
    c = per_row.scales(state_dtype(logits.dtype))
    upstream = a * c
    # With z = -inf the gradient is 0, unless the row's statistics are not finite.
    chosen = x.gather(-1, target.view(*x.shape[:2], 1)).flatten()
    hit = upstream.masked_fill((chosen == -torch.inf) | ~here & inside, 0.0)
    h, m, log2_s = (t.flatten() for t in saved)
    # With d = log2 of p / p_max, d loss / dz = p (a_0 + b_0 log p) = 2^d (constant + factor d).
    p_max = torch.exp2(-log2_s)
    constant, factor = -upstream * p_max, None
    if b is not None:
        constant = (b * c * (log2_s / LOG2E - h) - upstream) * p_max
        factor = (b * c * p_max / -LOG2E).unsqueeze(1)
    m, constant, target, hit = (t.unsqueeze(1) for t in (m, constant, target, hit))
    chunks = Chunks(x, live, state_dtype(logits.dtype))
    for rows, raw in chunks:
        where = locate(dx, rows)
        # Where the rows of the result lie together, in the dtype of the arithmetic, the work is done there.
        place = dx[where] if isinstance(where[1], slice) and dx.dtype == chunks.dtype else None
        n = m[rows].shape[0]
        buffer = chunks.buffer[:n] if place is None else place
        # Nothing is summed here: no need of a second row. In place, PyTorch wants to see the very tensor that it writes.
        z = soft_capped(raw[:n] if place is None or place.data_ptr() != raw.data_ptr() else place, cap, buffer)
        slope = None if cap is None else z.div(cap).masked_fill_(z == -torch.inf, 1.0).square_().neg_().add_(1.0)
        k = row_scale(scale, per_row.temperature, rows, chunks.dtype) * LOG2E
        d = torch.sub(z, m[rows], out=buffer).mul_(k)
        if factor is None:
            dz = d.exp2_().mul_(constant[rows])
        else:
            e = torch.exp2(d)
            dz = d.clamp_(min=_LOWEST_LOG2).mul_(factor[rows]).add_(constant[rows]).mul_(e)
        dz.scatter_add_(1, target[rows], hit[rows])
        if slope is not None:
            dz.mul_(slope)
        if place is None:
            dx[where] = dz.to(dx.dtype)
    if not live.all():
        for rows in pieces(~live, dx):
            dx[locate(dx, rows)] = 0


def policy_gradients(
    out: Tensor, logits: Tensor, rows: Rows, terms: PolicyRows, weights: Weights, config: PolicyLossConfig, found: Statistics
) -> None:
    """Fill ``out`` with d loss / d logits, and ``found``."""
    assert rows.mask is not None
    rows.statistics(logits, found)
    slope = token_slopes(found.logprob, rows.mask, terms, config).mul_(weights.loss)
    rows.gradient(out, logits, Slopes(slope, weights.entropy), found.for_gradient)


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
