"""Log-prob and entropy from logits in PyTorch, over chunks of rows that fit the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from ctypes import c_float
from functools import cache
from typing import NamedTuple

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
_GRAIN, _WIDTH = 1 << 15, 64  # the least that PyTorch gives a thread, and more than its vectors have, in elements
_LOWEST_LOG2 = -1e4  # stands for -inf in bits: 2 to it is 0, and its products with large gradients are finite


def pieces(live: Tensor, x: Tensor) -> list[slice | Tensor]:
    """The live rows of ``x [outer, inner, V]``, as many at once as fit the cache: runs of them as slices, of which :func:`locate` makes views; and by
    index what is scattered in runs of less than a sixteenth of that: to copy those together takes less time than to call everything for each."""
    size, inner = max(2, CHUNK // x.shape[-1]), x.shape[1]
    if live.all():
        runs = [(start, start + inner) for start in range(0, live.numel(), inner)]
    elif not live.any():
        return []
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
        self.lengths = [rows.stop - rows.start if isinstance(rows, slice) else rows.numel() for rows in self.pieces]
        self.flat: list[Tensor] = []
        self.rooms: dict[tuple[int, int], Tensor] = {}

    def room(self, n: int, i: int = 0) -> Tensor:
        """``[n, V]``, uninitialised: the i-th of as many as are asked for, the same ones for every chunk."""
        if (n, i) not in self.rooms:
            self.rooms[n, i] = self._flat(i)[: n * self.x.shape[-1]].view(n, -1)
        return self.rooms[n, i]

    def exp2(self, n: int, i: int, out: int) -> Tensor:
        """2 to what is in the room ``i`` of ``n`` rows, in the room ``out``."""
        # PyTorch computes what its vectors leave over at the end of each thread's part one by one, and rounds it otherwise: no part leaves any.
        size = n * self.x.shape[-1]
        parts = min(torch.get_num_threads(), -(-size // _GRAIN))
        size += -size % (parts * _WIDTH)
        torch.exp2(self._flat(i)[:size], out=self._flat(out)[:size])
        return self.room(n, out)

    def _flat(self, i: int) -> Tensor:
        while i >= len(self.flat):
            size = max([2, *self.lengths]) * self.x.shape[-1]
            self.flat.append(torch.empty(size + _WIDTH * torch.get_num_threads(), dtype=self.dtype, device=self.x.device))
        return self.flat[i]

    def __iter__(self) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """(rows, their logits [n, V], n >= 2, the last one repeated if need be)."""
        # A sum over a single row would be split between threads, and so be rounded otherwise than among others: two rows at least.
        for rows in self.pieces:
            chunk = self.x[locate(self.x, rows)]
            yield rows, chunk.expand(max(2, chunk.shape[0]), -1)

    def put(self, found: list[Tensor], out: Tensor) -> None:
        """What was found of the rows of each chunk, ``[n]``, at its place in ``out``."""
        if found:
            values = torch.cat([x[:1] if n == 1 else x for x, n in zip(found, self.lengths, strict=True)])
            if values.numel() == out.numel():
                out.copy_(values)
            else:
                order = [torch.arange(rows.start, rows.stop, device=out.device) if isinstance(rows, slice) else rows for rows in self.pieces]
                out[torch.cat(order)] = values


def row_scale(scale: float, temperature: Tensor | None, rows: slice | Tensor, dtype: torch.dtype) -> float | Tensor:
    """logit_scale / T: a number, or ``[n, 1]`` for a temperature a token."""
    return scale if temperature is None else (scale / temperature.flatten()[rows].to(dtype)).unsqueeze(1)


def place_in(out: Tensor, rows: slice | Tensor, dtype: torch.dtype) -> Tensor | None:
    """These rows of the result ``[outer, inner, V]`` where they lie together, in the ``dtype`` of the arithmetic: then the work is done there."""
    where = locate(out, rows)
    return out[where] if isinstance(where[1], slice) and out.dtype == dtype else None


def distances(x: Tensor, m: Tensor, c: float | Tensor, out: Tensor) -> Tensor:
    """From ``m [n, 1]``, in bits, in ``out``, of soft-capped rows with the scale ``c``."""
    return torch.sub(x, m, out=out).mul_(c * LOG2E)


class TwoPasses(NamedTuple):
    """d = (x - m) k, where k = logit_scale / T * log2 e: the distances of logits from their row's maximum, in bits."""

    scale: float
    temperature: Tensor | None

    def origin(self, m: Tensor) -> Tensor:
        """What ``into`` takes of each row: the maximum, a finite one in a row that has nothing but -inf."""
        return m.clamp(min=torch.finfo(m.dtype).min)

    def into(self, out: Tensor, x: Tensor, origin: Tensor, rows: slice | Tensor) -> Tensor:
        """d of these ``rows [n, V]``, of which ``origin`` is ``[n, 1]``."""
        return distances(x, origin, row_scale(self.scale, self.temperature, rows, out.dtype), out)


class OnePass(NamedTuple):
    """d = x k - (m k), the first product and the difference rounded together. The other product is rounded by itself, which moves the whole row."""

    k: float

    def origin(self, m: Tensor) -> Tensor:
        return m * -self.k

    def into(self, out: Tensor, x: Tensor, origin: Tensor, _rows: slice | Tensor | None = None) -> Tensor:
        return torch.add(origin, x, alpha=self.k, out=out)

    def zeros(self, m: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of each row: what d is at the maximum, which is by how much all of it is too great; and whether it has to take two passes, as with huge or
        infinite logits (then 0); None: none has."""
        zero = self.into(torch.empty_like(m), m, self.origin(m))
        least, most = zero.aminmax()
        if least.item() >= -1 and most.item() <= 1:
            return zero, None
        far = ~(zero.abs() <= 1)  # or NaN
        return zero.masked_fill_(far, 0.0), far


@cache
def _fuses() -> bool:
    """Whether PyTorch rounds x + alpha y but once: not on x86 without FMA."""
    y = torch.full((3, 37), 1 + 2.0**-12)
    return bool((torch.add(-(y * y)[:, :1], y, alpha=1 + 2.0**-12) == 2.0**-24).all())


def one_pass(logits: Tensor, per_row: Rows) -> OnePass | None:
    """If it can be had."""
    if per_row.temperature is None and state_dtype(logits.dtype) == torch.float32 and logits.device.type == "cpu" and _fuses():
        return OnePass(c_float(per_row.scale * LOG2E).value)
    return None


def states(logits: Tensor, per_row: Rows, with_entropy: bool) -> Tensor:
    """``[n, 4]``, see :meth:`Rows.states`."""
    _, columns, _ = per_row.columns(logits)
    dtype = state_dtype(logits.dtype)
    state = torch.zeros(per_row.ids.numel(), 3, dtype=dtype, device=logits.device)
    m, s, t = state.unbind(1)
    if columns == 0:
        m.fill_(-torch.inf)
        return per_row.with_target(state, logits)

    def add_up(live: Tensor, way: OnePass | TwoPasses) -> None:
        chunks, tops, sums, products = Chunks(as_rows(logits)[..., :columns], live, dtype), [], [], []
        for rows, raw in chunks:
            n = raw.shape[0]
            buffer = chunks.room(n)
            x = soft_capped(raw, per_row.cap, buffer)
            top = x.amax(-1, keepdim=True)
            d = way.into(buffer, x, way.origin(top), rows)
            e = chunks.exp2(n, 0, 1 if with_entropy else 0)
            tops.append(top.squeeze(1))
            sums.append(e.sum(-1))
            if with_entropy:
                products.append(e.mul_(d.clamp_(min=_LOWEST_LOG2)).sum(-1))
        for found, place in ((tops, m), (sums, s), (products, t)):
            chunks.put(found, place)

    live, usual, far = per_row.live().flatten(), one_pass(logits, per_row), None
    if usual is not None:
        add_up(live, usual)
        zero, far = usual.zeros(m)
        by = zero.div(-LOG2E).exp_()
        if with_entropy:
            t.sub_(zero * s).mul_(by)
        s.mul_(by)
    if usual is None or far is not None:
        add_up(live if far is None else live & far, TwoPasses(per_row.scale, per_row.temperature))
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
    cap = per_row.cap
    a, b = (None if t is None else t.flatten() for t in slopes)
    assert a is not None
    live = per_row.live().flatten() & Slopes(a, b).moving()
    here, target = per_row.targets(logits)
    inside = here if per_row.shard is None else per_row.inside(total)
    a = a.masked_fill(~inside, torch.nan)
    c = per_row.scales(state_dtype(logits.dtype))
    upstream = a * c
    # With z = -inf the gradient is 0, unless the row's statistics are not finite.
    chosen = x.gather(-1, target.view(*x.shape[:2], 1)).flatten()
    hit = upstream.masked_fill((chosen == -torch.inf) | ~here & inside, 0.0)
    h, m, log2_s = (t.flatten() for t in saved)
    usual, far = one_pass(logits, per_row), None
    if usual is not None:
        zero, far = usual.zeros(m)
        log2_s = log2_s + zero
    # With d = log2 of p / p_max, d loss / dz = p (a_0 + b_0 log p) = 2^d (constant + factor d).
    p_max = torch.exp2(-log2_s)
    constant, factor = -upstream * p_max, None
    if b is not None:
        constant = (b * c * (log2_s / LOG2E - h) - upstream) * p_max
        factor = (b * c * p_max / -LOG2E).unsqueeze(1)
    m, constant, target, hit = (t.unsqueeze(1) for t in (m, constant, target, hit))

    def fill(live: Tensor, way: OnePass | TwoPasses) -> None:
        chunks, origin = Chunks(x, live, m.dtype), way.origin(m)
        for rows, raw in chunks:
            place = place_in(dx, rows, chunks.dtype)
            start = origin[rows]
            n = start.shape[0]
            buffer = chunks.room(n) if place is None else place
            # Nothing is summed here: no need of a second row. In place, PyTorch wants to see the very tensor that it writes.
            z = soft_capped(raw[:n] if place is None or place.data_ptr() != raw.data_ptr() else place, cap, buffer)
            slope = None if cap is None else z.div(cap).masked_fill_(z == -torch.inf, 1.0).square_().neg_().add_(1.0)
            d = way.into(buffer, z, start, rows)
            if factor is None:
                dz = d.exp2_().mul_(constant[rows])
            else:
                e = torch.exp2(d, out=chunks.room(n, 1))
                dz = d.clamp_(min=_LOWEST_LOG2).mul_(factor[rows]).add_(constant[rows]).mul_(e)
            dz.scatter_add_(1, target[rows], hit[rows])
            if slope is not None:
                dz.mul_(slope)
            if place is None:
                dx[locate(dx, rows)] = dz.to(dx.dtype)

    if usual is not None:
        fill(live if far is None else live & ~far, usual)
    if usual is None or far is not None:
        fill(live if far is None else live & far, TwoPasses(per_row.scale, per_row.temperature))
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
