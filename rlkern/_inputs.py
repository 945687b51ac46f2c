"""From the arguments of functions on logits and on hidden states to the records of ``ops/``: everything is checked here, from top to bottom, once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import choose_backend
from ._checks import FLOATS, INTS, check_choice, check_number, check_tensor
from .distributed import Agreement, ProcessGroup, VocabShard, is_distributed, local, shard_of
from .ops.divergence import Comparison
from .ops.head import ALL_KEPT, Head, Kept, Needs, Work
from .ops.linear import Linear
from .ops.logits import TRITON_DTYPES, Rows, row_levels
from .ops.products import chunk_rows
from .ops.shards import Shard

# ---- arguments that functions share ---------------------------------------------------------------------------------------------------------


class KeptTokens(NamedTuple):
    """The tokens that a sampler kept of each row's distribution: row i keeps ``token_ids[offsets[i] : offsets[i + 1]]``, each token once.

    offsets: ``[N + 1]``, token_ids: ``[nnz]``, int32 or int64, for the N positions of flattened ``S``.
    """

    offsets: Tensor
    token_ids: Tensor

    @classmethod
    def from_mask(cls, kept: Tensor) -> KeptTokens:
        """From a mask ``S + [V]``, non-zero for each token that was kept. Counting them takes a synchronisation on a GPU."""
        check_tensor("kept", kept, min_dim=2)
        flat = kept.reshape(-1, kept.shape[-1]) != 0
        return cls(torch.nn.functional.pad(flat.sum(-1).cumsum(0), (1, 0)), flat.nonzero()[:, 1])


class Scaling(NamedTuple):
    """What is done to logits before the softmax."""

    temperature: float | Tensor
    softcap: float | None
    logit_scale: float


class Chunking(NamedTuple):
    """How logits are made from hidden states."""

    logits_dtype: torch.dtype | None
    chunk_bytes: int | None
    rows: Tensor | None
    compact: bool | None


class Where(NamedTuple):
    """On which ranks, and how, a function runs."""

    process_group: ProcessGroup
    validate: bool | None
    backend: str | None


# ---- from logits ----------------------------------------------------------------------------------------------------------------------------


class LogitsInputs(NamedTuple):
    """Checked arguments of a function from logits."""

    logits: Tensor  # those that are here
    rows: Rows  # of shape S
    kept: Kept
    validate: bool


def check_logits(logits: Tensor, ids: Tensor, mask: Tensor | None, scaling: Scaling, keep: KeptTokens | None, where: Where) -> LogitsInputs:
    """Check the arguments that functions from logits share."""
    with Agreement(where.process_group, where.validate, logits) as agreement:
        check_tensor("logits", logits, min_dim=2, dtypes=FLOATS)
        logits, process_group = local("logits", logits, -1, where.process_group)
        shape, device, shard = logits.shape[:-1], logits.device, shard_of(process_group, logits.shape[-1])
        if logits.shape[-1] == 0 and shard is None:
            raise ValueError(f"logits must have a vocabulary of at least 1 in the last dimension, got shape {tuple(logits.shape)}")
        agreement.part(shard)
        agreement.tokens(ids, mask, device)
        _check_ids(ids, mask, shape, device)
    temperature, scale, cap = _scaled(scaling, shape, device)
    backend = choose_backend(where.backend, logits, triton_dtypes=TRITON_DTYPES)
    kept = ALL_KEPT if keep is None else _kept(keep, ids, logits.shape[-1], shard, agreement.validate)
    return LogitsInputs(logits, Rows(ids, mask, temperature, scale, cap, backend, shard), kept, agreement.validate)


def _check_ids(ids: Tensor, mask: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    check_tensor("ids", ids, shape=shape, dtypes=INTS, device=device)
    if mask is not None:
        check_tensor("mask", mask, shape=shape, device=device)


def _scaled(scaling: Scaling, shape: torch.Size, device: torch.device) -> tuple[Tensor | None, float, float | None]:
    """(temperature per token, logit_scale / T or without that T, soft-cap)."""
    temperature, softcap, logit_scale = scaling
    cap = None if softcap is None else check_number("softcap", softcap, above=0)
    scale = check_number("logit_scale", logit_scale, above=0)
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, shape=shape, dtypes=FLOATS, device=device)
        return temperature.detach(), scale, cap
    return None, scale / check_number("temperature", temperature, above=0), cap


def check_writable(option: str, logits: Tensor) -> None:
    """Check that a gradient can be written over ``logits``."""
    if any(stride == 0 and size > 1 for size, stride in zip(logits.shape, logits.stride(), strict=True)) or row_levels(logits) is None:
        raise ValueError(
            f"{option} needs logits with unit stride in the last dimension and two strides at most in the others, and elements that do not share "
            f"memory; got shape {tuple(logits.shape)} with strides {logits.stride()}"
        )


def _kept(keep: KeptTokens, ids: Tensor, vocabulary: int, shard: Shard | None, validate: bool) -> Kept:
    """The token ids as columns of what is here."""
    vocabulary = vocabulary if shard is None else shard.total
    if not isinstance(keep, KeptTokens):
        raise TypeError(f"keep must be a KeptTokens, got {type(keep).__name__}")
    offsets, token_ids = keep
    check_tensor("keep.offsets", offsets, shape=(ids.numel() + 1,), dtypes=INTS, device=ids.device)
    check_tensor("keep.token_ids", token_ids, dtypes=INTS, device=ids.device)
    if token_ids.dim() != 1:
        raise ValueError(f"keep.token_ids must be 1-D, got shape {tuple(token_ids.shape)}")
    if validate:
        if int(offsets[0]) != 0 or int(offsets[-1]) != token_ids.numel() or bool((offsets[1:] < offsets[:-1]).any()):
            raise ValueError(f"keep.offsets must rise from 0 to the number of token_ids, {token_ids.numel()}")
        wrong = (token_ids < 0) | (token_ids >= vocabulary)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(f"keep.token_ids[{at}] is {int(token_ids[at])}, outside the vocabulary [0, {vocabulary})")
    return Kept(offsets.contiguous(), token_ids.contiguous() if shard is None else token_ids - shard.first)


# ---- from hidden states and a head ----------------------------------------------------------------------------------------------------------


def check_linear(
    head: tuple[Tensor, Tensor, Tensor | None],
    ids: Tensor,
    mask: Tensor | None,
    scaling: Scaling,
    chunking: Chunking,
    keep: KeptTokens | None,
    where: Where,
) -> Linear:
    """Check the arguments that functions from hidden states share; ``head`` is (hidden, weight, bias)."""
    with Agreement(where.process_group, where.validate, head[0]) as agreement:
        hidden, weight, bias, shard = _local_head(*head, where.process_group)
        dtype = _check_head(hidden, weight, bias, chunking.logits_dtype, sharded=shard is not None)
        shape, device = _shape_of_tokens(hidden, shard), hidden.device
        agreement.part(shard, hidden)
        agreement.tokens(ids, mask, device)
        _check_ids(ids, mask, shape, device)
        temperature, scale, cap = _scaled(scaling, shape, device)
        work = _check_work(chunking, Head(hidden, weight, bias, dtype), shard, shape.numel(), agreement)
        kept = ALL_KEPT if keep is None else _kept(keep, ids, weight.shape[0], shard, agreement.validate)
        backend = choose_backend(where.backend, hidden, triton_dtypes=TRITON_DTYPES)
    rows = Rows(ids.flatten(), _flat(mask), _flat(temperature), scale, cap, backend, shard)
    return Linear(Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, dtype), work, kept, rows, agreement.validate)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flatten()


def _local_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, process_group: ProcessGroup, prefix: str = ""
) -> tuple[Tensor, Tensor, Tensor | None, Shard | None]:
    """What is here of hidden states and a head, named with the prefix, and which part of the vocabulary that is."""
    check_tensor(f"{prefix}weight", weight, min_dim=2)
    same_tokens = isinstance(hidden, Tensor) and is_distributed(hidden)
    hidden, tokens = local(f"{prefix}hidden", hidden, 0, None, hint=". Transpose or pack them: tokens are divided along the first dimension")
    bias = None if bias is None else local(f"{prefix}bias", bias, 0, process_group, same_tokens=same_tokens)[0]
    weight, process_group = local(f"{prefix}weight", weight, 0, process_group, same_tokens=same_tokens)
    shard = shard_of(process_group, weight.shape[0])
    if isinstance(tokens, VocabShard) and shard is not None and tokens.group.group_name == shard.group_name:
        if tokens.total % shard.ranks:
            raise ValueError(
                f"{prefix}hidden is a DTensor of {tokens.total} in the first dimension, which {shard.ranks} ranks cannot share equally: pad it"
            )
        shard = shard.sequence_parallel()
    return hidden, weight, bias, shard


def _shape_of_tokens(hidden: Tensor, shard: Shard | None) -> torch.Size:
    """S, also where the ranks share the hidden states."""
    return torch.Size((hidden.shape[0] * (1 if shard is None else shard.sp_size), *hidden.shape[1:-1]))


def _check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None, prefix: str = "", sharded: bool = False
) -> torch.dtype:
    """Check hidden states and a head, named with the prefix, of which nothing need be here if ``sharded``; gives the dtype of their logits."""
    check_tensor(f"{prefix}hidden", hidden, min_dim=2, dtypes=FLOATS)
    device, width = hidden.device, hidden.shape[-1]
    check_tensor(f"{prefix}weight", weight, dtypes=FLOATS, device=device)
    if weight.dim() != 2 or weight.shape[1] != width or (weight.shape[0] == 0 and not sharded) or width == 0:
        raise ValueError(f"{prefix}weight must have shape [V, {width}] for {prefix}hidden of shape {tuple(hidden.shape)}, got {tuple(weight.shape)}")
    if bias is not None:
        check_tensor(f"{prefix}bias", bias, shape=weight.shape[:1], dtypes=FLOATS, device=device)
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if logits_dtype is None:
        return wide
    if logits_dtype not in (dtype, wide):
        raise ValueError(f"logits_dtype must be None, {wide} or {dtype} (as {prefix}hidden and {prefix}weight); got {logits_dtype}")
    return logits_dtype


def _check_work(chunking: Chunking, head: Head, shard: Shard | None, tokens: int, agreement: Agreement) -> Work:
    """Check which rows are computed, and the memory for a chunk of logits, of equally many rows on all ranks."""
    _, chunk_bytes, rows, compact = chunking
    device = head.weight.device
    if rows is not None:
        check_tensor("rows", rows, dtypes=INTS, device=device)
        if rows.dim() != 1:
            raise ValueError(f"rows must be 1-D positions of flattened tokens, got shape {tuple(rows.shape)}")
        if agreement.validate and rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < tokens and rows.unique().numel() == rows.numel()):
            raise ValueError(f"rows must be different positions in [0, {tokens}), got {rows.tolist() if rows.numel() < 20 else rows}")
        rows = rows.long()
    if chunk_bytes is not None and (isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int) or chunk_bytes < 1):
        raise ValueError(f"chunk_bytes must be a positive number of bytes, got {chunk_bytes!r}")
    columns = head.weight.shape[0] if shard is None else -(-shard.total // shard.ranks)
    chunk = chunk_rows(max(columns, 1), head.logits_dtype, head.operand, device, chunk_bytes)
    agreement.rows(rows, chunk)
    return Work(rows, device.type == "cpu" if compact is None else compact, chunk)


def freezes_head(needs: Needs, mode: str | None) -> bool:
    """Whether the forward keeps the derivative by hidden, given what takes gradients; checks ``mode``."""
    if mode is not None:
        check_choice("mode", mode, ("recompute", "frozen-head"))
    if mode == "frozen-head" and (needs.weight or needs.bias):
        raise ValueError("mode='frozen-head' needs weight and bias that take no gradient; here they require one")
    return needs.hidden and not needs.weight and not needs.bias and mode != "recompute"


# ---- two models -----------------------------------------------------------------------------------------------------------------------------


def check_pair(
    logits: Tensor, ref_logits: Tensor, beta: float, mask: Tensor | None, scaling: Scaling, where: Where
) -> tuple[Tensor, Tensor, Comparison]:
    """Check the arguments of a divergence from logits; gives both that are here, and how they are compared."""
    with Agreement(where.process_group, where.validate, logits) as agreement:
        check_tensor("logits", logits, min_dim=2, dtypes=FLOATS)
        check_tensor("ref_logits", ref_logits, min_dim=2, dtypes=FLOATS)
        logits, group = local("logits", logits, -1, where.process_group)
        ref_logits, ref_group = local("ref_logits", ref_logits, -1, where.process_group)
        shape, device = logits.shape[:-1], logits.device
        shard, ref_shard = shard_of(group, logits.shape[-1]), shard_of(ref_group, ref_logits.shape[-1])
        if logits.shape[-1] == 0 and shard is None:
            raise ValueError(f"logits must have a vocabulary of at least 1 in the last dimension, got shape {tuple(logits.shape)}")
        _check_divided_alike(agreement, (shard, None), (ref_shard, None), shape, device, mask)
        check_tensor("ref_logits", ref_logits, shape=logits.shape, device=device)
        temperature, scale, cap = _scaled(scaling, shape, device)
        backend = _backend_for(logits.dtype, ref_logits.dtype, device, where.backend)
    return logits, ref_logits.detach(), Comparison(mask, temperature, scale, cap, beta, backend, shard)


class LinearPair(NamedTuple):
    """Checked arguments of a divergence from hidden states, flattened to ``[N]``."""

    policy: Head
    ref: Head
    work: Work
    comparison: Comparison
    shape: torch.Size  # S


def check_linear_pair(
    policy: tuple[Tensor, Tensor, Tensor | None],
    ref: tuple[Tensor, Tensor, Tensor | None],
    beta: float,
    mask: Tensor | None,
    scaling: Scaling,
    chunking: Chunking,
    where: Where,
) -> LinearPair:
    """Check the arguments of a divergence from hidden states; each model is (hidden, weight, bias)."""
    with Agreement(where.process_group, where.validate, policy[0]) as agreement:
        hidden, weight, bias, shard = _local_head(*policy, where.process_group)
        ref_hidden, ref_weight, ref_bias, ref_shard = _local_head(*ref, where.process_group, "ref_")
        dtype = _check_head(hidden, weight, bias, chunking.logits_dtype, sharded=shard is not None)
        ref_dtype = _check_head(ref_hidden, ref_weight, ref_bias, None, "ref_", sharded=ref_shard is not None)
        if dtype.itemsize < 4:
            ref_dtype = torch.promote_types(ref_hidden.dtype, ref_weight.dtype)
        shape, device = _shape_of_tokens(hidden, shard), hidden.device
        _check_divided_alike(agreement, (shard, hidden), (ref_shard, ref_hidden), shape, device, mask)
        check_tensor("ref_hidden", ref_hidden, shape=(*hidden.shape[:-1], ref_hidden.shape[-1]), device=device)
        check_tensor("ref_weight", ref_weight, shape=(weight.shape[0], ref_weight.shape[1]))
        temperature, scale, cap = _scaled(scaling, shape, device)
        work = _check_work(chunking, Head(hidden, weight, bias, dtype), shard, shape.numel(), agreement)
        backend = _backend_for(dtype, ref_dtype, device, where.backend)
    return LinearPair(
        Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, dtype),
        Head(ref_hidden.reshape(-1, ref_hidden.shape[-1]), ref_weight, ref_bias, ref_dtype).detach(),
        work,
        Comparison(_flat(mask), _flat(temperature), scale, cap, beta, backend, shard),
        shape,
    )


def _check_divided_alike(
    agreement: Agreement,
    policy: tuple[Shard | None, Tensor | None],
    ref: tuple[Shard | None, Tensor | None],
    shape: torch.Size,
    device: torch.device,
    mask: Tensor | None,
) -> None:
    """Check the mask, and that both vocabularies, and hidden states if given, are divided alike."""
    if mask is not None:
        check_tensor("mask", mask, device=device)
    (shard, hidden), (ref_shard, ref_hidden) = policy, ref
    agreement.part(shard, hidden)
    agreement.part(ref_shard, ref_hidden, "reference's ")
    if agreement.is_sought:  # tokens without ids
        agreement.tokens(torch.zeros(shape if mask is None else mask.shape, dtype=torch.int64, device=device), mask, device)
    if shard != ref_shard:
        what = ["whole" if x is None else f"tokens {x.first} to {x.first + x.size} of {x.total}, rows by {x.sp_size}" for x in (shard, ref_shard)]
        raise ValueError(f"policy and reference must be divided alike; here this rank has {what[0]} and {what[1]}")
    if mask is not None:
        check_tensor("mask", mask, shape=shape)


def _backend_for(dtype: torch.dtype, ref_dtype: torch.dtype, device: torch.device, backend: str | None) -> str:
    """The backend for logits of these dtypes."""
    wider = torch.empty(0, dtype=torch.promote_types(dtype, ref_dtype), device=device)
    return choose_backend(backend, wider, triton_dtypes=TRITON_DTYPES)
