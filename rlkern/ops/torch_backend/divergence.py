"""Divergences over the vocabulary in PyTorch, over chunks of rows that fit the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergence import STATISTICS, Comparison, Divergences, common_dtype
from ..logits import as_rows, locate, soft_capped
from ..select import as_number
from ..shards import LOG2E
from .logits import Chunks, distances, pieces, place_in, row_scale

_HIGHEST = 1e30  # stands for inf where it meets a probability of 0


class _Pair(NamedTuple):
    """A chunk of live rows; one that is alone comes twice."""

    rows: slice | Tensor
    n: int  # how many there are
    c: float | Tensor  # their scale
    x: Tensor  # soft-capped
    y: Tensor
    room: Callable[[int], Tensor]  # for as many as are asked for; the first two may be x and y
    place: Tensor | None  # the first room, if that is where the result goes


def _pairs(logits: Tensor, ref_logits: Tensor, o: Comparison, live: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Iterator[_Pair]:
    """With an ``out [outer, inner, V]`` the first room is the rows' place there, where they have one."""
    chunks, ref = Chunks(as_rows(logits), live, dtype), as_rows(ref_logits)
    for rows, raw in chunks:
        raw_y = ref[locate(ref, rows)]
        place = None if out is None or len(raw_y) != len(raw) else place_in(out, rows, dtype)
        room = partial(_room, chunks, raw.shape[0], place)
        x, y = (soft_capped(t, o.cap, room(i)) for i, t in enumerate((raw, raw_y.expand(raw.shape[0], -1))))
        yield _Pair(rows, raw_y.shape[0], row_scale(o.scale, o.temperature, rows, dtype), x, y, room, place)


def _room(chunks: Chunks, n: int, first: Tensor | None, i: int) -> Tensor:
    return chunks.room(n, i) if i or first is None else first


def _exponentials(x: Tensor, c: float | Tensor, less: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(maximum, x less that, in ``less``, its exponentials, in ``out``, their sum) of soft-capped rows."""
    m = x.amax(-1, keepdim=True)
    d = torch.sub(x, m.masked_fill(m == -torch.inf, 0.0), out=less)
    e = torch.mul(d, c * LOG2E, out=out).exp2_()
    return m, d, e, e.sum(-1, keepdim=True)


def _may_be_infinite(x: Tensor) -> bool:
    """Whether some number of ``x`` is infinite or NaN; True where to ask would be a synchronisation."""
    return x.device.type != "cpu" or not math.isfinite(x.sum())


def _mixture(p: Tensor, q: Tensor, beta: float, out: Tensor) -> Tensor:
    """M = (1 - beta) p + beta q in ``out``: exactly p where they are equal, and never 0."""
    return torch.lerp(p, q, beta, out=out).add_(torch.finfo(p.dtype).tiny)


def _log_ratio(p: Tensor, m: Tensor, out: Tensor) -> Tensor:
    """log p - log M in ``out``, finite where p is 0."""
    return torch.div(p, m, out=out).clamp_(min=torch.finfo(p.dtype).tiny).log_()


def _mixture_terms(p: Tensor, q: Tensor, beta: float, mixture: Tensor, ratio: Tensor) -> Tensor:
    """``[n, 2]``; the last two are room for what it needs."""
    m = _mixture(p, q, beta, mixture)
    return torch.stack([_log_ratio(x, m, ratio).mul_(x).sum(-1) for x in (p, q)], -1)


def divergence_states(logits: Tensor, ref_logits: Tensor, o: Comparison, terms: Tensor | None = None) -> Tensor:
    """``[n, 5]``, see ops/divergence.py; and the terms, where the vocabulary is whole."""
    first, second = (ref_logits, logits) if o.kind == "reverse" else (logits, ref_logits)
    states = torch.zeros(logits.shape[:-1].numel(), STATISTICS, dtype=common_dtype(logits.dtype, ref_logits.dtype), device=logits.device)
    if logits.shape[-1] == 0:
        states[:, ::2] = torch.tensor([-torch.inf, -torch.inf, 0.0])
        return states
    for rows, n, c, x, y, room, _ in _pairs(first, second, o, o.live(logits), states.dtype):
        (m_p, d, e, s_p), (m_q, d_q, e_q, s_q) = (_exponentials(t, c, room(i), room(2 + i)) for i, t in enumerate((x, y)))
        t = torch.zeros_like(s_p)
        if o.kind != "jsd":
            ratio = torch.sub(d, d_q, out=d)
            t = torch.mul(e, ratio, out=d_q).sum(-1, keepdim=True)
            if _may_be_infinite(t):
                ratio.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=0.0)
                infinite = ratio.amax(-1, keepdim=True) == torch.inf  # even where the probability rounds to 0
                t = e.mul_(ratio).sum(-1, keepdim=True).masked_fill_(infinite, torch.inf)
            t *= c * LOG2E
        elif terms is not None:
            terms[rows] = _mixture_terms(e.div_(s_p), e_q.div_(s_q), o.beta, room(0), room(1))[:n]
        states[rows] = torch.cat([m_p, s_p, m_q, s_q, t], -1)[:n]
    return states


def divergence_terms(logits: Tensor, ref_logits: Tensor, o: Comparison, statistics: Tensor) -> Tensor:
    """``[n, 2]``, see ops/divergence.py."""
    terms = torch.zeros(logits.shape[:-1].numel(), 2, dtype=statistics.dtype, device=logits.device)
    if logits.shape[-1] == 0:
        return terms
    columns = statistics.view(-1, STATISTICS).unsqueeze(-1).unbind(1)
    for rows, n, c, x, y, room, _ in _pairs(logits, ref_logits, o, o.live(logits), statistics.dtype):
        m_p, log2_p, m_q, log2_q, _ = (column[rows] for column in columns)
        p = distances(x, m_p, c, room(0)).exp2_().mul_(torch.exp2(-log2_p))
        q = distances(y, m_q, c, room(1)).exp2_().mul_(torch.exp2(-log2_q))
        terms[rows] = _mixture_terms(p, q, o.beta, room(2), room(3))[:n]
    return terms


def divergence(logits: Tensor, ref_logits: Tensor, o: Comparison, out: Divergences) -> None:
    """Fill ``out``."""
    terms = torch.zeros(out.divergence.numel(), 2, dtype=out.divergence.dtype, device=logits.device)
    o.store(divergence_states(logits, ref_logits, o, terms), out)
    if o.kind == "jsd":
        o.store_terms(terms, out)


def divergence_gradient(out: Tensor, logits: Tensor, ref_logits: Tensor, o: Comparison, statistics: Tensor, grad: Tensor) -> None:
    """Fill ``out`` with d loss / d logits."""
    dx, upstream = as_rows(out), grad.flatten()
    live = o.live(logits) & (upstream != 0)
    columns = statistics.view(-1, STATISTICS).unsqueeze(-1).unbind(1)
    for rows, n, c, x, y, room, place in _pairs(logits, ref_logits, o, live, statistics.dtype, dx):
        m_p, log2_p, m_q, log2_q, mean = (column[rows] for column in columns)
        slope = None if o.cap is None else x.div(o.cap).masked_fill_(x == -torch.inf, 1.0).square_().neg_().add_(1.0)
        d, d_ref = distances(x, m_p, c, room(0)), distances(y, m_q, c, room(1))
        p_max, q_max, factor = torch.exp2(-log2_p), torch.exp2(-log2_q), upstream[rows].unsqueeze(1) * c
        # Where x = -inf the gradient is 0; NaN there too in a row whose statistics are not finite.
        if o.beta == 0:
            included = as_number(torch.gt, d, -torch.inf, room(2)) if _may_be_infinite(d) else None
            dz, q = d.exp2_().mul_(factor * p_max), d_ref.exp2_().mul_(factor * q_max)
            dz.sub_(q if included is None else q.mul_(included))
        elif o.beta == 1:
            ratio = torch.sub(d, d_ref, out=d_ref)
            if _may_be_infinite(ratio):
                ratio.nan_to_num_(nan=0.0, posinf=_HIGHEST, neginf=-_HIGHEST)
            dz = d.exp2_().mul_(ratio.sub_(log2_p - log2_q + mean * LOG2E)).mul_(factor * p_max / LOG2E)
        else:
            p = d.exp2_().mul_(p_max)
            m = _mixture(p, d_ref.exp2_().mul_(q_max), o.beta, room(2))
            dz = p.mul_(_log_ratio(p, m, m).sub_(mean)).mul_(factor * (1 - o.beta))
        if slope is not None:
            dz.mul_(slope)
        if place is None:
            dx[locate(dx, rows)] = dz[:n].to(dx.dtype)
    if not live.all():
        for rows in pieces(~live, dx):
            dx[locate(dx, rows)] = 0
