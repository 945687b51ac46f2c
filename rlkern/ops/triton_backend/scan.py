"""Launchers of ``kernels/scan.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._backend import device_of, multiprocessors
from ...kernels import scan as kernels
from ..scan import Numbers, ScanOptions, Sequences, Steps, as_steps, result_dtype
from .launch import compiled

NORMALISED = 1024  # elements a program


@dataclass(frozen=True)
class TileConfig:
    """A program scans ``rows`` rows at once, ``lanes`` times 4 steps at a time."""

    rows: int
    lanes: int
    warps: int

    @classmethod
    def of(cls, length: int, heavy: bool) -> TileConfig:
        """By the length of a row (packed: the mean), rounded up to a power of 2. ``heavy``: with 8 steps a thread, registers would spill."""
        lanes = min(128 if heavy else 256, max(4, 1 << (-(-length // 4) - 1).bit_length()))
        rows = max(1, (128 if heavy else 256) // lanes)
        return cls(rows=rows, lanes=lanes, warps=rows * lanes // (32 if heavy else 64))


def lambda_returns(steps: Steps, sequences: Sequences, numbers: Numbers, options: ScanOptions, moments: Tensor) -> tuple[Tensor | None, Tensor]:
    """(advantages, returns) of ``[rows, time]``."""
    dtype = result_dtype(steps)
    returns = torch.empty(steps.rewards.shape, dtype=dtype, device=steps.rewards.device)
    advantages = torch.empty_like(returns) if options.with_advantages else None
    if sequences.cu_seqlens is None:
        rows, length = steps.rewards.shape
        strides, mean_length = [0 if x is None else x.stride(0) for x in steps], length
    else:
        rows, length = sequences.cu_seqlens.numel() - 1, 1  # the kernel's rows begin at tokens, which lie one apart
        strides, mean_length = [1] * len(steps), steps.rewards.numel() // max(rows, 1)
    config = TileConfig.of(mean_length, heavy=steps.logprobs is not None or dtype == torch.float64)
    tile = 4 * config.lanes
    # Few long rows leave most of the GPU idle: split them, though that reads the inputs twice. The state of V-trace, or of a truncation without
    # next_values, is more than the one number that is handed on between the parts. Packed, one sequence may have all the tokens.
    one_number = steps.logprobs is None and (steps.truncated is None or steps.next_values is not None)
    split = one_number and mean_length >= 8 * tile and rows < multiprocessors(returns)
    chunks = -(-steps.rewards.shape[1] // tile) if split else 1
    summary = returns.new_empty(rows, chunks, 2) if split else None
    programs = -(-rows // config.rows) * chunks
    partial = moments.new_empty(programs, 3) if len(moments) else None
    with device_of(returns):
        for summarise in (False,) if summary is None else (True, False):
            kernels.lambda_returns_kernel[(programs,)](
                *(x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x for x in steps),
                *strides,
                *sequences,
                advantages,
                returns,
                summary,
                partial,
                rows,
                length,
                chunks,
                *numbers,
                DECAY=options.decay,
                ROWS=config.rows,
                LANES=config.lanes,
                CHUNKS=1 << (chunks - 1).bit_length(),
                SUMMARISE=summarise,
                **compiled(config.warps),
            )
    if partial is not None:
        moments.copy_(partial.sum(0))
    return advantages, returns


def normalise(advantages: Tensor, mask: Tensor | None, moments: Tensor, eps: float, out: Tensor) -> None:
    """Fill ``out``."""
    flags = None if mask is None else as_steps(mask)
    with device_of(out):
        kernels.normalise_kernel[(-(-out.numel() // NORMALISED),)](
            advantages,
            flags.view(torch.uint8) if flags is not None and flags.dtype == torch.bool else flags,
            moments,
            out,
            0 if flags is None else flags.stride(0),
            out.shape[-1],
            out.numel(),
            eps,
            BLOCK=NORMALISED,
            **compiled(4),
        )
