"""A vocabulary divided among ranks: which part is here, and the two collectives that a softmax over all of it takes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# The latter are deprecated from torch 2.13 on, which has the former.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
LOG2E = 1 / math.log(2.0)
# Operators take strings, not process groups.
_GROUPS: dict[str, dist.ProcessGroup] = {}


class Shard(NamedTuple):
    """Of ``size`` columns on this rank those are tokens that lie below ``total``: the tokens from ``first`` on.

    Of hidden states it has all rows, or under sequence parallelism part ``sp_rank`` of ``sp_size`` equal ones.
    """

    first: int
    size: int
    total: int
    sp_rank: int
    sp_size: int
    group_name: str

    @classmethod
    def of(cls, first: int, size: int, total: int, group: dist.ProcessGroup) -> Shard:
        """On this rank of ``group``, with all rows."""
        _GROUPS[group.group_name] = group
        return cls(first, size, total, 0, 1, group.group_name)

    def sequence_parallel(self) -> Shard:
        """With a part of the rows, as has each rank of the group."""
        return self._replace(sp_rank=dist.get_rank(self.group), sp_size=self.ranks)

    @property
    def text(self) -> str:
        """As operators take it; :meth:`from_text` reads it."""
        return " ".join(str(x) for x in self)

    @classmethod
    def from_text(cls, text: str) -> Shard | None:
        """None for "", a vocabulary that is here whole."""
        if not text:
            return None
        first, size, total, sp_rank, sp_size, group_name = text.split(" ", 5)
        return cls(int(first), int(size), int(total), int(sp_rank), int(sp_size), group_name)

    @property
    def columns(self) -> int:
        """How many are tokens; the rest are padding."""
        return min(self.size, max(self.total - self.first, 0))

    @property
    def group(self) -> dist.ProcessGroup:
        return _GROUPS[self.group_name]

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def gather(self, x: Tensor) -> Tensor:
        """``x`` of every rank, ``[ranks, *x.shape]``, in the order of the ranks."""
        return gathered(x, self.group)

    def start_sum(self, x: Tensor) -> dist.Work:
        """Begin to replace contiguous ``x`` by its sum over the ranks."""
        work = dist.all_reduce(x, group=self.group, async_op=True)
        assert work is not None
        return work

    def gather_rows(self, x: Tensor) -> Tensor:
        """``x`` of all rows, given this rank's share; one collective where that is not all."""
        return x if self.sp_size == 1 else self.gather(x).flatten(0, 1)

    def sum_of_my_rows(self, x: Tensor) -> Tensor:
        """This rank's share of the rows of the sum of ``x`` over the ranks, by one collective."""
        out = x.new_empty(x.shape[0] // self.sp_size, *x.shape[1:])
        _reduce_scatter(out, x, group=self.group)
        return out


def all_rows(x: Tensor, part: Shard | None) -> int:
    """How many rows there are, where this rank has those of ``x [..., H]``."""
    return x.shape[:-1].numel() * (1 if part is None else part.sp_size)


def my_rows(x: Tensor, part: Shard | None) -> Tensor:
    """This rank's share of the rows of ``x``."""
    if part is None:
        return x
    rows = x.shape[0] // part.sp_size
    return x[part.sp_rank * rows : (part.sp_rank + 1) * rows]


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x`` of every rank of the group, ``[ranks, *x.shape]``."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    _all_gather(out.view(-1), x.contiguous().view(-1), group=group)
    return out


def concatenated(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """``x`` of every rank, of which rank i has ``sizes[i]`` rows, one after the other."""
    padded = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, max(sizes) - len(x)))
    return torch.cat([part[:size] for part, size in zip(gathered(padded, group), sizes, strict=True)])


def raised(m: Tensor, c: float | Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of maxima along the first dimension, and how far, in bits, distances from each move; ``c`` is a number or one for each row."""
    top = m.amax(0)
    return top, torch.where(m == -torch.inf, 0.0, (m - torch.where(top == -torch.inf, 0.0, top)) * c)


def merged(m: Tensor, s: Tensor, t: Tensor, c: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States of the online softmax (kernels/softmax.py) along the first dimension as one."""
    top, moved = raised(m, c)
    scale = moved.exp2()
    return top, (scale * s).sum(0), (scale * (t + moved * s)).sum(0)
