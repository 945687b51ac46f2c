"""How a result is judged: against the float64 reference, by the error that plain PyTorch makes in the same dtype."""

import os
from typing import Any

import torch
from torch import Tensor

from rlkern.ops.operators import Operator

# What every bound must have to spare: processors round differently, and a bound that just holds on one fails on another (make arithmetic).
HEADROOM = float(os.environ.get("RLKERN_TEST_HEADROOM", "1"))


def error(x: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; equal infinities and NaNs at the same places differ by nothing."""
    x, exact = x.detach().double().cpu(), exact.detach().double().cpu()
    assert x.shape == exact.shape, f"shape {tuple(x.shape)}, expected {tuple(exact.shape)}"
    if x.numel() == 0:
        return 0.0
    same = (x == exact) | (x.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, (x - exact).abs())
    return float(difference.nan_to_num(nan=float("inf")).max())


def assert_accurate(x: Tensor, exact: Tensor, peer: Tensor | None = None, *, k: float = 2.0, eps: float = 1e-6) -> None:
    """``err(x) <= k * err(peer) + eps``, where ``peer`` is PyTorch's answer in the same dtype (None: the bound is ``eps`` alone).

    All of it with ``HEADROOM`` to spare.
    """
    mine = error(x, exact)
    theirs = 0.0 if peer is None else error(peer, exact)
    assert mine * HEADROOM <= k * theirs + eps, f"error {mine:.3e}; plain PyTorch's is {theirs:.3e}, allowed {k} x that + {eps:.1e}"


def opcheck(op: Operator, *values: Any) -> None:
    """PyTorch's checks of a registered operator, on the arguments of its body."""
    torch.library.opcheck(op.overload, tuple(op.arguments(*values)))


def rounding(dtype: torch.dtype, exact: Tensor) -> float:
    """One unit in the last place of the largest entry: what storing in ``dtype`` may cost (the interpreter truncates where a GPU rounds)."""
    largest = float(exact.detach().abs().nan_to_num(posinf=0.0, neginf=0.0).max()) if exact.numel() else 0.0
    return torch.finfo(dtype).eps * largest
