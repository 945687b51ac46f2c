"""A vocabulary divided among ranks: which part is here, and the two collectives that a softmax over all of it takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# The latter is deprecated from torch 2.13 on, which has the former.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Operators take strings, not process groups.
_GROUPS: dict[str, dist.ProcessGroup] = {}


class Shard(NamedTuple):
    """Of ``size`` columns on this rank those are tokens that lie below ``total``: the tokens from ``first`` on."""

    first: int
    size: int
    total: int
    group_name: str

    @classmethod
    def of(cls, first: int, size: int, total: int, group: dist.ProcessGroup) -> Shard:
        """On this rank of ``group``."""
        _GROUPS[group.group_name] = group
        return cls(first, size, total, group.group_name)

    @property
    def text(self) -> str:
        """As operators take it; :meth:`from_text` reads it."""
        return f"{self.first} {self.size} {self.total} {self.group_name}"

    @classmethod
    def from_text(cls, text: str) -> Shard | None:
        """None for "", a vocabulary that is here whole."""
        if not text:
            return None
        first, size, total, group_name = text.split(" ", 3)
        return cls(int(first), int(size), int(total), group_name)

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
