"""Choosing by bits, a NaN too: what ``torch.where`` and ``masked_fill`` do, four to ten times as fast on a CPU, where these are not vectorised."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def as_bool(mask: Tensor) -> Tensor:
    """True where a mask of any dtype is not 0."""
    return mask if mask.dtype == torch.bool else mask != 0


def bits(where: Tensor, dtype: torch.dtype) -> Tensor:
    """All ones where a bool tensor is true, else zeros: integers as wide as numbers of ``dtype``, float32 or float64."""
    return where.to(torch.int64 if dtype == torch.float64 else torch.int32).neg_()


def select(chosen: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """``x``, of the dtype of the :func:`bits`, and 0 where these are not set."""
    return torch.bitwise_and(x.view(chosen.dtype), chosen, out=None if out is None else out.view(chosen.dtype)).view(x.dtype)


def times(x: Tensor, y: Tensor) -> Tensor:
    """x y, 0 where x is 0 whatever y is: what the objective does not need may have overflowed."""
    product = x * y
    if product.device.type == "cpu" and not math.isnan(product.sum()):  # elsewhere, asking would be a synchronisation
        return product
    return select(bits(x != 0, x.dtype), product)


def as_number(compare: Callable[..., Tensor], x: Tensor, y: Tensor | float, out: Tensor | None = None) -> Tensor:
    """``torch.lt(x, y)`` or its like as 1 and 0 of the dtype of ``x``."""
    return compare(x, y, out=torch.empty_like(x) if out is None else out)
