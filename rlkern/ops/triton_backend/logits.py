"""Launchers of ``kernels/logits.py``: statistics of rows, their gradient, the loss with its gradient, and what goes with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._backend import device_of, multiprocessors
from ...config import PolicyLossConfig
from ...kernels import logits as kernels
from ..fused import PolicyRows, Weights
from ..logits import Rows, Saved, Slopes, Statistics, as_rows
from ..policy import Options
from ..shards import LOG2E, merged
from .launch import compiled
from .policy import term_functions

WARP = 64 if torch.version.hip else 32


@dataclass(frozen=True)
class Tile:
    """How a block of a row's columns is cut: ``unroll`` times ``width`` neighbours for each of ``lanes`` lanes, one a thread.

    By the vocabulary and the size of an element alone, never by the number of rows or where they lie: results must not depend on the batch.
    """

    lanes: int
    unroll: int
    width: int

    @property
    def columns(self) -> int:
        """Of a block."""
        return self.lanes * self.unroll * self.width

    @property
    def arguments(self) -> dict[str, int]:
        """As kernels take them."""
        return {"UNROLL": self.unroll, "LANES": self.lanes, "WIDTH": self.width} | compiled(self.lanes // WARP)


def cut(vocabulary: int, itemsize: int, threads: int, loads: int, aligned: bool) -> tuple[int, int, int]:
    """The fields of a :class:`Tile`: up to so many ``loads`` of 16 bytes for each of up to so many threads, as a row can fill.

    Where blocks are not ``aligned`` there is no load of 16 bytes: neighbouring threads take single neighbours.
    """
    wide = 16 // itemsize
    pieces = -(-vocabulary // wide)
    lanes = min(threads, max(WARP, 1 << (pieces - 1).bit_length()))
    unroll = min(loads, max(1, 1 << (-(-pieces // lanes) - 1).bit_length()))
    return (lanes, unroll, wide) if aligned else (lanes, unroll * wide, 1)


def fixed(vocabulary: int) -> bool:
    """Whether blocks that begin at the same columns in each row are aligned. Sums need such: where a row lies must not change them."""
    return vocabulary % 16 == 0


def alike(*tensors: Tensor) -> bool:
    """Whether all of these ``[outer, inner, V]`` are aligned, and each row begins equally many elements after an aligned address: of one layout they
    do. Aligned pieces are then of the same columns, and what is done to each element on its own can follow addresses."""
    wide = 16 // min(x.element_size() for x in tensors)
    strides = {tuple(x.stride(i) % wide for i in (0, 1) if x.shape[i] > 1) for x in tensors}
    return len(strides) == 1 and all(x.data_ptr() % (wide * x.element_size()) == 0 for x in tensors)


@dataclass(frozen=True)
class RowConfig(Tile):
    """For statistics: ``segment`` columns a program."""

    segment: int

    @classmethod
    def of(cls, vocabulary: int, itemsize: int) -> RowConfig:
        return cls(*cut(vocabulary, itemsize, threads=128, loads=2, aligned=fixed(vocabulary)), segment=32768)


@dataclass(frozen=True)
class GradientConfig(Tile):
    """For the gradient: ``blocks`` blocks a program. More loads a thread would take the registers of other programs."""

    blocks: int

    @classmethod
    def of(cls, vocabulary: int, itemsize: int, aligned: bool) -> GradientConfig:
        return cls(*cut(vocabulary, itemsize, threads=128, loads=2, aligned=aligned), blocks=4)


@dataclass(frozen=True)
class LossTiling(Tile):
    """For one program that passes over a row twice, the second time by ``piece`` neighbours instead of ``width``; ``hold``: it asks the cache to keep
    the row meanwhile."""

    piece: int
    hold: bool = True

    @property
    def arguments(self) -> dict[str, int]:
        return super().arguments | {"PIECE": self.piece, "HOLD": self.hold}

    @classmethod
    def of(cls, vocabulary: int, itemsize: int, aligned: bool) -> LossTiling:
        """The rows in flight have to stay in the L2 cache (50 MB on an H100) from the first pass to the second: long ones go one to a multiprocessor,
        which 1024 threads fill; short ones several."""
        threads = 1024 if vocabulary * itemsize > 96 << 10 else 512
        return cls(*cut(vocabulary, itemsize, threads, loads=2, aligned=fixed(vocabulary)), piece=16 // itemsize if aligned else 1)


def statistics(logits: Tensor, rows: Rows, out: Statistics) -> None:
    """Fill ``out``."""
    results = (out.logprob, out.entropy if out.entropy.numel() else None, out.row_max, out.log2_sum)
    x, arguments, layout = _launch_statistics(logits, rows, results, out.entropy.numel() > 0)
    if arguments[-1] is not None:
        n, segments, block = rows.ids.numel(), layout[4], 32
        with device_of(x):
            kernels.combine_kernel[(-(-n // block),)](*arguments, n, *layout, ROWS=block, SEGMENTS=1 << (segments - 1).bit_length(), **compiled(1))


def states(logits: Tensor, rows: Rows, with_entropy: bool) -> Tensor:
    """``[n, 4]``, see :meth:`Rows.states`."""
    _, arguments, _ = _launch_statistics(logits, rows, None, with_entropy)
    m, s, t = arguments[-1].double().movedim(1, 0).unbind(-1)
    return rows.with_target(torch.stack(merged(m, s, t, rows.scales(torch.float64) * LOG2E), -1).float(), logits)


def _launch_statistics(
    logits: Tensor, rows: Rows, results: tuple[Tensor | None, ...] | None, with_entropy: bool
) -> tuple[Tensor, tuple[Any, ...], tuple[Any, ...]]:
    """Fill ``results``, or where there are none, or a row has several segments, their states: the last of the arguments, ``[n, segments, 3]`` or
    None. Gives the rows of logits, and the arguments and the layout that the kernel was launched with."""
    x, n = as_rows(logits), rows.ids.numel()
    _, columns, _ = rows.columns(logits)
    config = RowConfig.of(x.shape[-1], x.element_size())
    segments = max(1, -(-columns // config.segment))
    partial = None
    if results is None:
        partial = torch.zeros(n, segments, 3, dtype=torch.float32, device=x.device)  # of dead rows too
    elif segments > 1:
        partial = torch.empty(n, segments, 3, dtype=torch.float32, device=x.device)
    arguments = (x, *rows.contiguous(), *(results or (None,) * 4), partial)
    layout = (columns, x.shape[1], x.stride(0), x.stride(1), segments, rows.scale, rows.cap)
    with device_of(x):
        kernels.statistics_kernel[(n * segments,)](
            *arguments,
            *layout,
            ENTROPY=with_entropy,
            SEGMENT=config.segment,
            **config.arguments,
        )
    return x, arguments, layout


def gradient(out: Tensor, logits: Tensor, rows: Rows, slopes: Slopes, saved: Saved) -> None:
    """Fill ``out`` with d loss / d logits."""
    x = as_rows(logits)
    dx = as_rows(out).view(x.shape)  # a new tensor is of one level, but the kernel splits row numbers once
    first, columns, total = rows.columns(logits)
    config = GradientConfig.of(x.shape[-1], x.element_size(), alike(x, dx))
    parts = -(-columns // (config.blocks * config.columns))
    if columns < x.shape[-1]:  # padding of the vocabulary
        dx[..., columns:] = 0
    with device_of(x):
        kernels.backward_kernel[(rows.ids.numel() * parts,)](
            x,
            dx,
            *rows.contiguous(),
            *saved,
            *(None if t is None else t.contiguous() for t in slopes),
            columns,
            first,
            total,
            x.shape[1],
            x.stride(0),
            x.stride(1),
            dx.stride(0),
            dx.stride(1),
            parts,
            rows.scale,
            rows.cap,
            BLOCKS=config.blocks,
            **config.arguments,
        )


def policy_gradients(
    out: Tensor, logits: Tensor, rows: Rows, terms: PolicyRows, weights: Weights, config: PolicyLossConfig, found: Statistics
) -> None:
    """Fill ``out`` with d loss / d logits, and log-prob and entropy of ``found``, in one launch."""
    x = as_rows(logits)
    dx = as_rows(out).view(x.shape)
    vocabulary = x.shape[-1]
    with device_of(x):
        kernels.loss_kernel[(rows.ids.numel(),)](
            x,
            dx,
            *rows.contiguous(),
            *(None if t is None else t.contiguous() for t in (*terms, *weights)),
            found.logprob,
            found.entropy if found.entropy.numel() else None,
            vocabulary,
            x.shape[1],
            x.stride(0),
            x.stride(1),
            dx.stride(0),
            dx.stride(1),
            rows.scale,
            rows.cap,
            Options.of(config, 1),
            **term_functions(config),
            **LossTiling.of(vocabulary, x.element_size(), alike(x, dx)).arguments,
        )


def restrict(out: Tensor, logits: Tensor, offsets: Tensor, token_ids: Tensor, rows: Tensor | None) -> None:
    """Fill ``out``, see :func:`rlkern.ops.keep.restrict_into`."""
    x = as_rows(logits)
    with device_of(x):
        kernels.restrict_kernel[(out.shape[0],)](
            x, out, offsets, token_ids, rows, out.shape[1], x.shape[1], x.stride(0), x.stride(1), BLOCK=1024, **compiled(4)
        )


# Of the kernel that multiplies: elements of a row that a program takes at once, and programs on a multiprocessor.
SCALE_BLOCK, SCALE_PROGRAMS = 4096, 8


def scale(x: Tensor, factor: Tensor) -> None:
    """x *= factor, see :func:`rlkern.ops.fused.scale_inplace_op`."""
    rows = as_rows(x)
    block = min(SCALE_BLOCK, 1 << (rows.shape[-1] - 1).bit_length())
    tiles = rows.shape[0] * rows.shape[1] * -(-rows.shape[-1] // block)
    grid = (min(tiles, SCALE_PROGRAMS * multiprocessors(x)),)
    with device_of(x):
        kernels.scale_kernel[grid](rows, factor, rows.shape[-1], tiles, rows.shape[1], rows.stride(0), rows.stride(1), BLOCK=block, **compiled(8))
