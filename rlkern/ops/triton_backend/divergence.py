"""Launchers of ``kernels/divergence.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._backend import device_of
from ...kernels import divergence as kernels
from ..divergence import STATISTICS, Comparison, Divergences
from ..logits import as_rows


@dataclass(frozen=True)
class PairTiling:
    """How two rows of logits are cut, side by side: ``block`` columns at a time by ``warps`` warps."""

    block: int
    warps: int
    stages: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor, threads: int) -> PairTiling:
        """One load of 16 bytes a thread of the narrower: more would not fit the registers."""
        vocabulary, itemsize = x.shape[-1], min(x.element_size(), y.element_size())
        block = min(threads * 16 // itemsize, max(128, 1 << (vocabulary - 1).bit_length()))
        warp = 64 if torch.version.hip else 32
        return cls(block=block, warps=max(1, block * itemsize // 16 // warp), stages=3)


def _layout(x: Tensor) -> tuple[int, int, int]:
    return x.shape[1], x.stride(0), x.stride(1)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def divergence(logits: Tensor, ref_logits: Tensor, comparison: Comparison, out: Divergences) -> None:
    """Fill ``out``."""
    _launch(logits, ref_logits, comparison, *out, "whole")


def divergence_states(logits: Tensor, ref_logits: Tensor, comparison: Comparison) -> Tensor:
    """``[n, 5]``, see ops/divergence.py."""
    states = torch.empty(logits.shape[:-1].numel(), STATISTICS, dtype=torch.float32, device=logits.device)
    _launch(logits, ref_logits, comparison, None, states, "states")
    return states


def divergence_terms(logits: Tensor, ref_logits: Tensor, comparison: Comparison, statistics: Tensor) -> Tensor:
    """``[n, 2]``, see ops/divergence.py."""
    terms = torch.empty(logits.shape[:-1].numel(), 2, dtype=torch.float32, device=logits.device)
    _launch(logits, ref_logits, comparison, terms, statistics, "terms")
    return terms


def _launch(logits: Tensor, ref_logits: Tensor, o: Comparison, result: Tensor | None, statistics: Tensor, part: str) -> None:
    x, y = as_rows(logits), as_rows(ref_logits)
    # Two passes want few rows in flight, for the cache; one wants many small programs, since each block ends in two reductions.
    tiling = PairTiling.of(x, y, threads=256 if o.kind == "jsd" else 128)
    with device_of(x):
        kernels.divergence_kernel[(logits.shape[:-1].numel(),)](
            x,
            y,
            *_contiguous(o.mask, o.temperature),
            result,
            statistics,
            x.shape[-1],
            *_layout(x),
            *_layout(y),
            o.scale,
            o.cap,
            o.beta,
            KIND=o.kind,
            PART=part,
            BLOCK=tiling.block,
            STAGES=tiling.stages,
            num_warps=tiling.warps,
        )


def divergence_gradient(out: Tensor, logits: Tensor, ref_logits: Tensor, o: Comparison, statistics: Tensor, grad: Tensor) -> None:
    """Fill ``out`` with d loss / d logits."""
    x, y = as_rows(logits), as_rows(ref_logits)
    dx = as_rows(out).view(x.shape)  # as in logits.py
    tiling = PairTiling.of(x, y, threads=256)
    blocks = -(-x.shape[-1] // tiling.block)
    with device_of(x):
        kernels.divergence_backward_kernel[(grad.numel() * blocks,)](
            x,
            y,
            dx,
            *_contiguous(o.mask, o.temperature, statistics, grad),
            x.shape[-1],
            *_layout(x),
            *_layout(y),
            dx.stride(0),
            dx.stride(1),
            blocks,
            o.scale,
            o.cap,
            o.beta,
            KIND=o.kind,
            BLOCK=tiling.block,
            num_warps=tiling.warps,
        )
