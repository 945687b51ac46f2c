"""Launcher of ``kernels/value.py``: the value loss on tokens."""

from __future__ import annotations

import torch

from ..._backend import device_of
from ...config import SEQUENCE_AGGREGATIONS
from ...kernels import value
from ..value import ValueOptions, ValueResults, Values
from .launch import compiled
from .layout import Layout

WARPS = 4  # four tokens of a block a thread; compilers give smaller programs the registers that the float64 sums take


def value_loss(x: Values, options: ValueOptions, out: ValueResults) -> None:
    """Fill ``out`` in one launch."""
    by_sequence = options.aggregation in SEQUENCE_AGGREGATIONS
    layout = Layout.of(x.values, x.cu_seqlens if by_sequence else None, whole_sequences=by_sequence)
    with device_of(x.values):
        value.value_kernel[(layout.programs,)](
            *(layout.rows(t) for t in (*x[:4], out.grad if out.grad.numel() else None)),
            x.normalizer,
            layout.cu_seqlens,
            torch.empty(value.PARTIALS.value * layout.programs, dtype=torch.float64, device=out.numbers.device),
            torch.zeros((), dtype=torch.int32, device=out.numbers.device),
            out.loss,
            out.numbers,
            layout.time,
            layout.tiles,
            layout.tile,
            options.clip,
            options.max_length,
            AGGREGATION=options.aggregation,
            BLOCK=layout.block,
            **compiled(WARPS),
        )
