"""Checks of arguments, made on the host before any launch. Each error names the argument, what was given and what is expected."""

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)


def check_tensor(
    name: str,
    x: Any,
    *,
    shape: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    min_dim: int = 0,
) -> None:
    """Check that ``x`` is a tensor of this shape, one of these dtypes, on this device, of at least this rank."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() < min_dim:
        raise ValueError(f"{name} must have at least {min_dim} dimension{'s'[: min_dim > 1]}, got shape {tuple(x.shape)}")
    if shape is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if dtypes is not None and x.dtype not in dtypes:
        raise TypeError(f"{name} must have a dtype of {', '.join(str(d) for d in dtypes)}; got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {x.device}")


def check_number(name: str, x: Any, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None) -> float:
    """Check that ``x`` is a finite Python number within the bounds; returns it as a float."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    too_low = (above is not None and x <= above) or (at_least is not None and x < at_least)
    if not math.isfinite(x) or too_low or (at_most is not None and x > at_most):
        bounds = ((above, "> "), (at_least, ">= "), (at_most, "<= "))
        wanted = " and ".join(f"{sign}{b}" for b, sign in bounds if b is not None) or "finite"
        raise ValueError(f"{name} must be a number {wanted}, got {x}")
    return float(x)


def check_choice(name: str, x: Any, choices: Collection[Any]) -> None:
    """Check that ``x`` is one of ``choices``."""
    if x not in choices:
        raise ValueError(f"{name} must be one of {', '.join(repr(c) for c in choices)}; got {x!r}")


def check_cu_seqlens(cu_seqlens: Any, tokens: int, *, like: Tensor, validate: bool) -> None:
    """Check the boundaries of packed sequences: ``[sequences + 1]``, int32 or int64; with ``validate``, also that they rise from 0 to ``tokens``."""
    check_tensor("cu_seqlens", cu_seqlens, dtypes=INTS, device=like.device)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [sequences + 1], got {tuple(cu_seqlens.shape)}")
    if validate and not torch.compiler.is_compiling():  # values are not there yet while torch.compile traces
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != tokens or any(b < a for a, b in itertools.pairwise(ends)):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}; got {ends if len(ends) <= 12 else [*ends[:12], '...']}")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of ``dtype`` are computed with, and results given: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32
