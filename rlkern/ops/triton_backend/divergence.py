"""Launchers of ``kernels/divergence.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._backend import device_of
from ...kernels import divergence as kernels
from ..divergence import STATISTICS, Comparison, Divergences
from ..logits import as_rows
from .logits import Tile, alike, cut, fixed


@dataclass(frozen=True)
class PairTiling(Tile):
    """For two rows of logits, side by side; a program of the backward has ``blocks`` blocks."""

    blocks: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor, threads: int, loads: int, aligned: bool) -> PairTiling:
        """By the narrower elements."""
        return cls(*cut(x.shape[-1], min(x.element_size(), y.element_size()), threads, loads, aligned), blocks=2)


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
    config = PairTiling.of(x, y, threads=256, loads=2, aligned=fixed(x.shape[-1]))
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
            **config.arguments,
        )


def divergence_gradient(out: Tensor, logits: Tensor, ref_logits: Tensor, o: Comparison, statistics: Tensor, grad: Tensor) -> None:
    """Fill ``out`` with d loss / d logits."""
    x, y = as_rows(logits), as_rows(ref_logits)
    dx = as_rows(out).view(x.shape)  # as in logits.py
    config = PairTiling.of(x, y, threads=128, loads=2, aligned=alike(x, y, dx))
    parts = -(-x.shape[-1] // (config.blocks * config.columns))
    with device_of(x):
        kernels.divergence_backward_kernel[(grad.numel() * parts,)](
            x,
            y,
            dx,
            *_contiguous(o.mask, o.temperature, statistics, grad),
            x.shape[-1],
            *_layout(x),
            *_layout(y),
            dx.stride(0),
            dx.stride(1),
            parts,
            o.scale,
            o.cap,
            o.beta,
            KIND=o.kind,
            BLOCKS=config.blocks,
            **config.arguments,
        )
