"""Vocabularies divided among ranks: what ``process_group=`` takes, beside a plain group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import check_number
from .ops.shards import Shard, gathered


@dataclass(frozen=True)
class VocabShard:
    """The part of a vocabulary that this rank of ``group`` holds: ``size`` rows of the head (or columns of the logits), from token ``first`` on, of a
    vocabulary of ``total``. Those beyond ``total`` are padding: they count as absent, and their gradient is 0."""

    group: dist.ProcessGroup
    first: int
    size: int
    total: int

    @classmethod
    def of(cls, size: int, group: dist.ProcessGroup, *, vocab_size: int | None = None, device: torch.device | str = "cpu") -> VocabShard:
        """Ask all ranks for their sizes, which may differ; in the order of the ranks they make up the vocabulary. One collective: do it once.

        Args:
            size: rows of the head on this rank.
            group: the ranks among which the head is divided; each calls this.
            vocab_size: the number of tokens, where the sizes add up to more. None: there is no padding.
            device: of the tensors that the group exchanges: "cuda" for NCCL.

        Raises:
            TypeError, ValueError: for bad arguments; on every rank, where the ranks disagree on ``vocab_size``.
        """
        check_group(group)
        for name, x in (("size", size), ("vocab_size", vocab_size)):
            if x is not None and check_number(name, x, at_least=0) != int(x):
                raise ValueError(f"{name} must be a whole number, got {x}")
        mine = torch.tensor([size, -1 if vocab_size is None else vocab_size], dtype=torch.int64, device=device)
        sizes, totals = gathered(mine, group).t().tolist()
        if len(set(totals)) > 1:
            raise ValueError(f"vocab_size must be the same on all ranks, got {[None if t < 0 else t for t in totals]}")
        if vocab_size is not None and sum(sizes) < vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}, but the ranks hold {sizes}, which is {sum(sizes)} in all")
        rank = dist.get_rank(group)
        return cls(group, sum(sizes[:rank]), size, sum(sizes) if vocab_size is None else vocab_size)


ProcessGroup = dist.ProcessGroup | VocabShard | None


def check_group(group: Any, name: str = "process_group", expected: str = "a torch.distributed.ProcessGroup") -> None:
    """Check that this process is one of a process group."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name} must be {expected}, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError(f"this process is not a member of {name}")


def shard_of(process_group: ProcessGroup, size: int) -> Shard | None:
    """Which part of the vocabulary ``size`` local columns are. By a plain group, all ranks hold as many, without padding."""
    if process_group is None:
        return None
    if isinstance(process_group, VocabShard):
        s = process_group
        if s.size != size:
            raise ValueError(f"the VocabShard is of {s.size} tokens, but the tensor has {size}")
        return Shard.of(s.first, size, s.total, s.group)
    check_group(process_group, expected="a torch.distributed.ProcessGroup or a rlkern.VocabShard")
    ranks = dist.get_world_size(process_group)
    return Shard.of(dist.get_rank(process_group) * size, size, ranks * size, process_group)


def local(name: str, x: Tensor, dim: int, process_group: ProcessGroup, *, same_tokens: bool = True) -> tuple[Tensor, ProcessGroup]:
    """A DTensor that is divided along ``dim`` as its local part and a VocabShard; replicated, as it is, whole. Other tensors pass, with the group.

    ``same_tokens``: the ranks are known to have the same tokens. Otherwise the group has to be given: a parameter under FSDP is divided too.
    """
    if not isinstance(x, Tensor) or not is_distributed(x):
        return x, process_group  # what is no tensor is refused later
    from torch.distributed.tensor import DTensor  # takes its time to import

    assert isinstance(x, DTensor)
    dim %= x.dim()
    mesh, sharded = x.device_mesh, [i for i, p in enumerate(x.placements) if not p.is_replicate()]
    if any(not x.placements[i].is_shard(dim) for i in sharded) or len(sharded) > 1:
        raise ValueError(f"{name} must be replicated, or divided along dimension {dim} of one mesh dimension; its placements are {x.placements}")
    if not sharded:
        return x.to_local(), process_group
    group, total = mesh.get_group(sharded[0]), x.shape[dim]
    if process_group is None and not same_tokens:
        raise ValueError(
            f"{name} is a DTensor of which each rank has a part. Where all ranks have the same tokens (tensor parallelism), pass its group as "
            f"process_group; where each has its own (FSDP), pass rlkern.gather_parameter({name})"
        )
    if process_group is not None and getattr(process_group, "group_name", None) != group.group_name:
        raise ValueError(f"{name} is a DTensor: process_group must be None, or the group of the mesh dimension that it is divided over")
    part = x.to_local()
    share = -(-total // dist.get_world_size(group))  # as torch.chunk divides
    return part, VocabShard(group, min(dist.get_rank(group) * share, total), part.shape[dim], total)


def is_distributed(x: Tensor) -> bool:
    """Whether it is a DTensor."""
    return type(x) not in (Tensor, torch.nn.Parameter) and hasattr(x, "device_mesh")


class _GatherParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        ctx.mesh, ctx.placements = x.device_mesh, x.placements
        return x.full_tensor()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        mean = grad / ctx.mesh.size()
        return DTensor.from_local(mean, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False).redistribute(ctx.mesh, ctx.placements)


def gather_parameter(x: Tensor) -> Tensor:
    """A parameter that FSDP2 divides among ranks with tokens of their own, whole; as it is where it is no DTensor.

    Its gradient is the mean over the ranks, as FSDP and DDP have it for the parameters that they gather themselves (``x.full_tensor()`` alone takes
    the gradients of the ranks for equal, and keeps one rank's for each part). For a head that is used outside the forward of its module::

        hidden = model(...)                               # stops before the head
        out = rk.fused_linear_policy_loss(hidden, rk.gather_parameter(head.weight), ...)

    Args:
        x: a parameter, any shape; a DTensor over a mesh whose dimensions are all data parallelism.

    Returns:
        A tensor of the whole shape, in the dtype of ``x``. Forward: one all-gather; backward: one reduce-scatter.
    """
    return _GatherParameter.apply(x) if is_distributed(x) else x


def check_same_inputs(shard: Shard, ids: Tensor, mask: Tensor | None, width: int) -> None:
    """ValueError on every rank unless all have the same tokens, and parts that follow each other. One collective and a synchronisation."""
    counted = ids.flatten().long() if mask is None else torch.where(mask.flatten() != 0, ids.flatten().long(), -1)
    weights = torch.arange(1, counted.numel() + 1, device=ids.device)  # a sum that depends on the order
    shape = [*ids.shape, 0, 0, 0, 0][:4]
    mine = torch.tensor([shard.first, shard.size, shard.total, width, ids.numel(), *shape, 0], dtype=torch.int64, device=ids.device)
    mine[-1] = ((counted * weights) % 2147483647).sum()
    everyone = shard.gather(mine).tolist()
    for what, column in (("a vocabulary", 2), ("a hidden width", 3), ("a number of tokens", 4)):
        values = [row[column] for row in everyone]
        if len(set(values)) > 1:
            raise ValueError(f"the ranks of process_group differ in {what}: {values}")
    if any(row[5:] != everyone[0][5:] for row in everyone):
        raise ValueError("the ranks of process_group differ in ids or mask; each needs all tokens, and the part of the vocabulary that is its own")
    at = 0
    for rank, (first, size, total, *_) in enumerate(everyone):
        if min(first, total) != min(at, total):
            raise ValueError(
                f"the parts of the vocabulary do not follow each other: rank {rank} begins at {first}, but those before it end at {at}; "
                f"sizes {[row[1] for row in everyone]}. Where they differ, pass VocabShard.of(size, group)"
            )
        at = first + size
    if at < shard.total:
        raise ValueError(f"the parts of the vocabulary end at {at}, before its {shard.total} tokens do")
