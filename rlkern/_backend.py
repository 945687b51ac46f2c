"""Which implementation runs: ``"triton"`` on a GPU, ``"torch"`` elsewhere, unless the caller or RLKERN_BACKEND says otherwise."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._versions import too_old

BACKENDS = ("triton", "torch")
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_TOO_OLD = too_old("triton")  # asked here, since torch.compile cannot trace the question
# Read once: Triton itself decides when a kernel is decorated, that is at import.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_FROM_ENVIRONMENT = os.environ.get("RLKERN_BACKEND") or None
_VALIDATE_FROM_ENVIRONMENT = os.environ.get("RLKERN_VALIDATE") or None


def choose_backend(requested: str | None, x: Tensor, *, triton_dtypes: tuple[torch.dtype, ...] | None = None) -> str:
    """The backend for tensors like ``x``; a ValueError that says why where the one asked for cannot run.

    ``triton_dtypes``: what the Triton kernel accepts for ``x``; None for any floating dtype.
    """
    backend = requested or _FROM_ENVIRONMENT or ("triton" if x.device.type == "cuda" else "torch")
    source = "backend=" if requested else "RLKERN_BACKEND=" if _FROM_ENVIRONMENT else "the default for this device, backend="
    if backend not in BACKENDS:
        raise ValueError(f"{source}{backend!r} is not a backend; expected one of {BACKENDS}")
    if backend == "triton":
        why = None
        if not HAS_TRITON:
            why = "triton is not installed; install it, or pass backend='torch'"
        elif TRITON_TOO_OLD:
            why = TRITON_TOO_OLD
        elif x.device.type != "cuda" and not (x.device.type == "cpu" and INTERPRETED):
            why = f"the tensors are on {x.device}; Triton needs a GPU (or TRITON_INTERPRET=1 set before import, for tests)"
        elif triton_dtypes is not None and x.dtype not in triton_dtypes:
            why = f"its kernel takes {[str(d) for d in triton_dtypes]}, not {x.dtype}; pass backend='torch'"
        if why:
            raise ValueError(f"{source}'triton' cannot run here: {why}")
    return backend


def choose_validate(requested: bool | None, x: Tensor) -> bool:
    """Whether values (not only shapes) are checked: by default on the CPU, where it needs no synchronisation, or by RLKERN_VALIDATE=1."""
    if requested is not None:
        return requested
    if _VALIDATE_FROM_ENVIRONMENT is not None:
        return _VALIDATE_FROM_ENVIRONMENT != "0"
    return x.device.type == "cpu"


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Launch under this: Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def multiprocessors(x: Tensor) -> int:
    """How many multiprocessors the tensor's GPU has; 1 on the interpreter's CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 1
