"""Logits restricted to the tokens that the sampler kept (its top-k and top-p support): -inf elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import backend_of
from .operators import fake_of, operator


def restrict_into(out: Tensor, logits: Tensor, offsets: Tensor, token_ids: Tensor, rows: Tensor | None, backend: str) -> None:
    """``out [n, V]`` = the n rows of ``logits`` where kept, else -inf.

    Row i of them keeps ``token_ids[offsets[j] : offsets[j + 1]]``, with j = rows[i], or i where ``rows`` is None.
    """
    if out.numel():
        backend_of(backend).restrict(out, logits, offsets, token_ids, rows)


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
