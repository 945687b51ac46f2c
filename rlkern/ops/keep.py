"""Logits restricted to the tokens that the sampler kept (its top-k and top-p support): -inf elsewhere. Triton launcher and PyTorch path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._backend import device_of
from .logits import as_rows, locate
from .operators import fake_of, operator


def restrict_into(out: Tensor, logits: Tensor, offsets: Tensor, token_ids: Tensor, rows: Tensor | None, backend: str) -> None:
    """``out [n, V]`` = the n rows of ``logits`` where kept, else -inf.

    Row i of them keeps ``token_ids[offsets[j] : offsets[j + 1]]``, with j = rows[i], or i where ``rows`` is None.
    """
    if not out.numel():
        return
    if backend == "triton":
        _triton_restrict(out, logits, offsets, token_ids, rows)
    else:
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


def _triton_restrict(out: Tensor, logits: Tensor, offsets: Tensor, token_ids: Tensor, rows: Tensor | None) -> None:
    from ..kernels import logits as kernels

    x = as_rows(logits)
    with device_of(x):
        kernels.restrict_kernel[(out.shape[0],)](
            x, out, offsets, token_ids, rows, out.shape[1], x.shape[1], x.stride(0), x.stride(1), BLOCK=1024, num_warps=4
        )


def supported(ids: Tensor, offsets: Tensor, token_ids: Tensor) -> Tensor:
    """Of each id ``[N]`` whether it is among the tokens kept in its row."""
    counts = (offsets[1:] - offsets[:-1]).long()
    row = torch.repeat_interleave(torch.arange(ids.numel(), device=ids.device), counts, output_size=token_ids.numel())
    found = torch.zeros(ids.numel(), dtype=torch.int32, device=ids.device)
    return found.index_add_(0, row, (token_ids == ids[row]).int()) > 0


@operator("restrict")
def restrict_op(logits: Tensor, offsets: Tensor, token_ids: Tensor, backend: str) -> Tensor:
    """The logits where kept, -inf elsewhere: a new, contiguous tensor."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    restrict_into(out.flatten(0, -2), logits, offsets, token_ids, None, backend)
    return out


@fake_of(restrict_op)
def _(logits: Tensor, offsets: Tensor, token_ids: Tensor, backend: str) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


class Restrict(torch.autograd.Function):
    """Differentiable in the logits. What follows gives -inf logits no gradient, so the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, offsets: Tensor, token_ids: Tensor, backend: str) -> Tensor:
        return restrict_op(logits, offsets, token_ids, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, None, None
