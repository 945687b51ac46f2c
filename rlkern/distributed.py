"""Vocabularies divided among ranks: ``VocabShard``, which ``process_group=`` takes beside a plain group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._backend import choose_validate
from ._checks import INTS, check_number, check_tensor
from .ops.shards import Shard, gathered


@dataclass(frozen=True)
class VocabShard:
    """The part of a vocabulary that this rank of ``group`` holds: ``size`` rows of the head (or columns of the logits), from token ``first`` on, of a
    vocabulary of ``total``. Rows beyond ``total`` are padding: they count as absent, and their gradient is 0.

    ``sequence_parallel``: each rank passes an equal share of the hidden states (of the reference's too), along the first dimension and in the order
    of the ranks, and gets the gradient of its share. All other tensors that belong to tokens, and the result, are of all tokens on all ranks.

    All ranks must compute the same loss, over all tokens: the gradient that comes back to the result is taken to be equal on all ranks, and is not
    exchanged. A loss of the rank's own tokens alone gives a wrong d loss / d hidden, without an error.
    """

    group: dist.ProcessGroup
    first: int
    size: int
    total: int
    sequence_parallel: bool = False

    @classmethod
    def of(
        cls,
        size: int,
        group: dist.ProcessGroup,
        *,
        vocab_size: int | None = None,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
    ) -> VocabShard:
        """This rank's shard. The ranks exchange their sizes, which may differ; in the order of the ranks they make up the vocabulary.

        That is one collective: call it once and keep the result.

        Args:
            size: rows of the head on this rank.
            group: the ranks among which the head is divided; each calls this.
            vocab_size: the number of tokens, if the sizes add up to more. None: there is no padding.
            sequence_parallel: hidden states are shared among the ranks, as above.
            device: of the tensors that the group exchanges. None: the CPU if a backend of the group takes CPU tensors, otherwise the current GPU.

        Raises:
            TypeError, ValueError: for bad arguments; on every rank, if the ranks disagree on ``vocab_size`` or ``sequence_parallel``.
        """
        check_group(group)
        for name, x in (("size", size), ("vocab_size", vocab_size)):
            if x is not None and check_number(name, x, at_least=0) != int(x):
                raise ValueError(f"{name} must be a whole number, got {x}")
        numbers = [size, -1 if vocab_size is None else vocab_size, sequence_parallel]
        mine = torch.tensor(numbers, dtype=torch.int64, device=device_of_group(group) if device is None else device)
        sizes, totals, sharing = gathered(mine, group).t().tolist()
        if len(set(totals)) > 1:
            raise ValueError(f"vocab_size must be the same on all ranks, got {[None if t < 0 else t for t in totals]}")
        if len(set(sharing)) > 1:
            raise ValueError(f"sequence_parallel must be the same on all ranks, got {[bool(s) for s in sharing]}")
        if vocab_size is not None and sum(sizes) < vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}, but the ranks hold {sizes}, which is {sum(sizes)} in all")
        rank = dist.get_rank(group)
        return cls(group, sum(sizes[:rank]), size, sum(sizes) if vocab_size is None else vocab_size, sequence_parallel)


ProcessGroup = dist.ProcessGroup | VocabShard | None


def check_group(group: Any, name: str = "process_group", expected: str = "a torch.distributed.ProcessGroup") -> None:
    """Check that this process is one of a process group."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name} must be {expected}, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError(f"this process is not a member of {name}")


def device_of_group(group: dist.ProcessGroup) -> torch.device:
    """Where the group can exchange numbers: the CPU, or for NCCL alone the current GPU."""
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]  # as in "cpu:gloo,cuda:nccl"
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def shard_of(process_group: ProcessGroup, size: int) -> Shard | None:
    """Which part of the vocabulary ``size`` local columns are. By a plain group, all ranks hold as many, without padding."""
    if process_group is None:
        return None
    if isinstance(process_group, VocabShard):
        s = process_group
        if s.size != size:
            raise ValueError(f"the VocabShard is of {s.size} tokens, but the tensor has {size}")
        shard = Shard.of(s.first, size, s.total, s.group)
        return shard.sequence_parallel() if s.sequence_parallel else shard
    check_group(process_group, expected="a torch.distributed.ProcessGroup or a rlkern.VocabShard")
    ranks = dist.get_world_size(process_group)
    return Shard.of(dist.get_rank(process_group) * size, size, ranks * size, process_group)


def local(name: str, x: Tensor, dim: int, process_group: ProcessGroup, *, same_tokens: bool = True, hint: str = "") -> tuple[Tensor, ProcessGroup]:
    """A DTensor that is divided along ``dim`` as its local part and a VocabShard; replicated, as it is, whole. Other tensors pass, with the group.

    ``same_tokens``: the ranks are known to have the same tokens. Otherwise the group has to be given: a parameter under FSDP is divided too.
    ``hint``: what to do about a wrong dimension.
    """
    if not isinstance(x, Tensor) or not is_distributed(x):
        return x, process_group  # what is no tensor is refused later
    from torch.distributed.tensor import DTensor  # takes its time to import

    assert isinstance(x, DTensor)
    dim %= x.dim()
    mesh, sharded = x.device_mesh, [i for i, p in enumerate(x.placements) if not p.is_replicate()]
    if any(not x.placements[i].is_shard(dim) for i in sharded) or len(sharded) > 1:
        raise ValueError(
            f"{name} must be replicated, or divided along dimension {dim} over one mesh dimension; its placements are {x.placements}{hint}"
        )
    if not sharded:
        return x.to_local(), process_group
    group, total = mesh.get_group(sharded[0]), x.shape[dim]
    if process_group is None and not same_tokens:
        raise ValueError(
            f"{name} is a DTensor of which each rank has a part. Where all ranks have the same tokens (tensor parallelism), pass its group as "
            f"process_group; where each has its own (FSDP), pass rlkern.gather_parameter({name})"
        )
    given = process_group.group if isinstance(process_group, VocabShard) else process_group
    if given is not None and getattr(given, "group_name", None) != group.group_name:
        raise ValueError(
            f"{name} is a DTensor: process_group must be None, the group of the mesh dimension that it is divided over, or a VocabShard of that"
        )
    part = x.to_local()
    if isinstance(process_group, VocabShard):
        return part, process_group
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
    """The whole of a parameter that FSDP2 divides among ranks with tokens of their own; a parameter that is no DTensor is returned as it is.

    Its gradient is the mean over the ranks, as for the parameters that FSDP and DDP gather themselves. (``x.full_tensor()`` alone takes the gradients
    of the ranks for equal, and keeps one rank's for each part.) Use it for a head that is used outside the forward of its module::

        hidden = model(...)                               # stops before the head
        out = rk.fused_linear_policy_loss(hidden, rk.gather_parameter(head.weight), ...)

    Args:
        x: a parameter, any shape; a DTensor over a mesh whose dimensions are all data parallelism.

    Returns:
        A tensor of the whole shape, in the dtype of ``x``. Forward: one all-gather; backward: one reduce-scatter, and an all-reduce over the replicas
        of HSDP, in the dtype of ``x`` (FSDP's own may be in a wider one, by its ``MixedPrecisionPolicy.reduce_dtype``).
    """
    return _GatherParameter.apply(x) if is_distributed(x) else x


# What all ranks put down, in this order; those of a divergence for its reference too.
_PART = ("first token", "size", "vocabulary", "hidden width", "number of shares of hidden", "first dimension of hidden")
_WHOSE = ("", "reference's ")
_TOKENS = ("number of tokens", *(f"dimension {i} of the tokens" for i in range(4)), "ids or mask", "number of rows", "rows", "rows of a chunk")
_NAMES = (*(whose + name for whose in _WHOSE for name in _PART), *_TOKENS)
_OWN = {whose + name for whose in _WHOSE for name in _PART[:2]}  # differ from rank to rank
_SUMS = {"ids or mask", "rows"}  # numbers that say nothing to a reader
_UNKNOWN = -(2**62)


class Agreement:
    """``with`` this, the ranks of a group check their arguments together, where values are validated: what is not the same on all is a ValueError on
    all, and an error on one is raised there, and as a ValueError on the others, which would wait for it otherwise.

    One collective and a synchronisation, at the end. ``x`` decides whether values are validated, where ``validate`` does not.
    """

    def __init__(self, process_group: Any, validate: bool | None, x: Any) -> None:
        group = process_group.group if isinstance(process_group, VocabShard) else process_group
        self.group = group if isinstance(group, dist.ProcessGroup) and dist.get_rank(group) >= 0 else None
        known = x if isinstance(x, Tensor) else torch.empty(0, device=None if self.group is None else device_of_group(self.group))
        self.validate = choose_validate(validate, known)
        self.numbers: dict[str, int | Tensor] = {}

    @property
    def is_sought(self) -> bool:
        """Whether there is anything to put down."""
        return self.validate and self.group is not None

    def part(self, shard: Shard | None, hidden: Tensor | None = None, whose: Literal["", "reference's "] = "") -> None:
        """Put down which part of a vocabulary is here, and which hidden states."""
        if shard is None or not self.validate:
            return
        self.group = shard.group  # known by now of a DTensor as well
        rows, width = (0, 0) if hidden is None else (hidden.shape[0], hidden.shape[-1])
        numbers = (shard.first, shard.size, shard.total, width, shard.sp_size, rows)
        self.numbers |= {whose + name: number for name, number in zip(_PART, numbers, strict=True)}

    def tokens(self, ids: Tensor, mask: Tensor | None, device: torch.device) -> None:
        """Put down the tokens."""
        if not self.is_sought:
            return
        check_tensor("ids", ids, dtypes=INTS, device=device)
        if mask is not None:
            check_tensor("mask", mask, shape=ids.shape, device=device)
        counted = ids.flatten() if mask is None else torch.where(mask.flatten() != 0, ids.flatten(), -1)
        numbers = (ids.numel(), *[*ids.shape, 0, 0, 0, 0][:4], _checksum(counted))
        self.numbers |= dict(zip(_TOKENS, numbers, strict=False))

    def rows(self, rows: Tensor | None, chunk: int) -> None:
        """Put down which tokens are computed, and how many at a time."""
        if not self.is_sought:
            return
        number, checksum = (-1, 0) if rows is None else (rows.numel(), _checksum(rows))
        self.numbers |= {"number of rows": number, "rows": checksum, "rows of a chunk": chunk}

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if self.group is not None and self.validate and (error is None or isinstance(error, Exception)):
            self._compare(self.group, error)

    def _compare(self, group: dist.ProcessGroup, error: Exception | None) -> None:
        mine = [self.numbers.get(name, _UNKNOWN) for name in _NAMES]
        sent = torch.tensor([error is not None, *(0 if isinstance(n, Tensor) else n for n in mine)], dtype=torch.int64, device=device_of_group(group))
        for i, n in enumerate(mine, 1):
            if isinstance(n, Tensor):
                sent[i] = n
        failed, *columns = gathered(sent, group).t().tolist()
        found = {name: values for name, values in zip(_NAMES, columns, strict=True) if _UNKNOWN not in values}
        for name, values in found.items():
            if name not in _OWN and len(set(values)) > 1:
                what = f"{name}; each needs all tokens, and the part of the vocabulary that is its own" if name in _SUMS else f"{name}: {values}"
                raise ValueError(f"the ranks of process_group differ in {what}") from error
        for whose in _WHOSE:
            if whose + _PART[0] in found:
                _check_that_parts_follow(*(found[whose + name] for name in _PART[:3]))
        if error is None and any(failed):
            bad = [rank for rank, flag in enumerate(failed) if flag]
            raise ValueError(f"process_group has ranks whose arguments cannot be used, {bad}; the errors that they raise say why")


def _checksum(x: Tensor) -> Tensor:
    """A number that depends on the values and their order; integers wrap round."""
    mixed = (x.long() + torch.arange(1, x.numel() + 1, device=x.device) * 0x1E3779B97F4A7C15) * 0x3F58476D1CE4E5B9
    return ((mixed ^ (mixed >> 31)) * 0x14D049BB133111EB).sum()


def _check_that_parts_follow(firsts: list[int], sizes: list[int], totals: list[int]) -> None:
    at, total = 0, totals[0]
    for rank, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
        if min(first, total) != min(at, total):
            raise ValueError(
                f"the parts of the vocabulary do not follow each other: rank {rank} begins at {first}, but those before it end at {at}; "
                f"sizes {sizes}. Where they differ, pass VocabShard.of(size, group)"
            )
        at = first + size
    if at < total:
        raise ValueError(f"the parts of the vocabulary end at {at}, before its {total} tokens do")
