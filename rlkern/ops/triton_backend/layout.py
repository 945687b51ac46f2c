"""How the kernels of losses over tokens divide the tokens among programs and read their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Two elements a thread: the dozen vector accumulators stay in registers.
BLOCK, WARPS = 512, 8
# Beyond this number tiles grow, since one program adds up what all have found.
PROGRAMS = 4096


@dataclass(frozen=True)
class Layout:
    """``programs`` programs: one for each sequence of ``cu_seqlens`` if there are any, else ``tiles`` a row, of ``tile`` columns each; they take
    ``block`` tokens at a time."""

    shape: torch.Size
    time: int
    tile: int
    tiles: int
    programs: int
    block: int
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, like: Tensor, cu_seqlens: Tensor | None, *, whole_sequences: bool) -> Layout:
        """``cu_seqlens``: None too where it makes no difference. ``whole_sequences``: a row is not to be divided."""
        time = like.shape[-1]
        tile = time if whole_sequences else BLOCK * -(-like.numel() // (BLOCK * PROGRAMS))
        tiles = -(-time // tile)
        programs = like.numel() // time * tiles if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return cls(like.shape, time, tile, tiles, programs, BLOCK, cu_seqlens)

    def rows(self, t: Tensor | None) -> Any:
        """``kernels.tokens.Rows`` of a tensor that has the shape of the tokens, or one value for each sequence, or broadcasts."""
        from ...kernels import tokens

        if t is None:
            return None
        if self.cu_seqlens is not None and t.dim() == 1 and t.shape != self.shape and t.shape[0] != 1:
            return tokens.Rows(t, t.stride(0), 0)
        t = (t.unsqueeze(-1) if t.shape == self.shape[:-1] else t).expand(self.shape)
        if t.dim() == 1:
            return tokens.Rows(t, 0, t.stride(0))
        if t.dim() > 2:
            t = t.reshape(-1, self.time)
        return tokens.Rows(t, t.stride(0), t.stride(1))
