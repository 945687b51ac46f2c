"""Log-probs and entropies of chosen tokens."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ._backend import choose_backend
from ._checks import FLOATS, INTS, check_choice, check_number, check_tensor
from .distributed import Agreement, ProcessGroup, VocabShard, is_distributed, local, shard_of
from .ops.keep import Restrict
from .ops.linear import LinearLogprobs, chunk_rows
from .ops.logits import TRITON_DTYPES, TokenLogprobs, row_levels
from .ops.shards import Shard


def check_logits(
    logits: Tensor, ids: Tensor, mask: Tensor | None, process_group: ProcessGroup, validate: bool | None
) -> tuple[Tensor, torch.Size, torch.device, Shard | None, bool]:
    """Check logits, ids and mask; gives the logits that are here, S, the device, the part of the vocabulary, and whether to validate."""
    with Agreement(process_group, validate, logits) as agreement:
        check_tensor("logits", logits, min_dim=2, dtypes=FLOATS)
        logits, process_group = local("logits", logits, -1, process_group)
        shape, device, shard = logits.shape[:-1], logits.device, shard_of(process_group, logits.shape[-1])
        if logits.shape[-1] == 0 and shard is None:
            raise ValueError(f"logits must have a vocabulary of at least 1 in the last dimension, got shape {tuple(logits.shape)}")
        agreement.part(shard)
        agreement.tokens(ids, mask, device)
        _check_ids(ids, mask, shape, device)
    return logits, shape, device, shard, agreement.validate


def _check_ids(ids: Tensor, mask: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    check_tensor("ids", ids, shape=shape, dtypes=INTS, device=device)
    if mask is not None:
        check_tensor("mask", mask, shape=shape, device=device)


def check_scaling(
    temperature: float | Tensor, softcap: float | None, logit_scale: float, shape: torch.Size, device: torch.device
) -> tuple[Tensor | None, float, float | None]:
    """Check what is done to logits before the softmax; gives (temperature per token, logit_scale / T or without that T, soft-cap)."""
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


class KeptTokens(NamedTuple):
    """The support that a sampler left of each row's distribution: row i keeps ``token_ids[offsets[i] : offsets[i + 1]]``, each token once.

    offsets: ``[N + 1]``, token_ids: ``[nnz]``, int32 or int64, for the N positions of flattened ``S``.
    """

    offsets: Tensor
    token_ids: Tensor

    @classmethod
    def from_mask(cls, kept: Tensor) -> KeptTokens:
        """From ``S + [V]``, non-zero where a token was kept. Counts them: a synchronisation on a GPU."""
        check_tensor("kept", kept, min_dim=2)
        flat = kept.reshape(-1, kept.shape[-1]) != 0
        return cls(torch.nn.functional.pad(flat.sum(-1).cumsum(0), (1, 0)), flat.nonzero()[:, 1])


def check_keep(keep: KeptTokens, ids: Tensor, vocabulary: int, shard: Shard | None, validate: bool) -> tuple[Tensor, Tensor]:
    """Check the kept tokens; gives offsets, and token ids as columns of what is here."""
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
    return offsets.contiguous(), token_ids.contiguous() if shard is None else token_ids - shard.first


class LinearInputs(NamedTuple):
    """Checked arguments of a function from hidden states, the per-token ones flattened to ``[N]``."""

    hidden: Tensor  # [N, H], or this rank's share of the rows
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    mask: Tensor | None
    temperature: Tensor | None
    rows: Tensor | None
    offsets: Tensor | None
    token_ids: Tensor | None
    scale: float
    cap: float | None
    logits_dtype: torch.dtype
    chunk: int
    compact: bool
    validate: bool
    backend: str
    shard: str

    def needs_grad(self) -> tuple[bool, bool, bool]:
        """Whether hidden, weight and bias take gradients."""
        return take_gradients(self.hidden, self.weight, self.bias)


def local_head(
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


def shape_of_tokens(hidden: Tensor, shard: Shard | None) -> torch.Size:
    """S, also where the ranks share the hidden states."""
    return torch.Size((hidden.shape[0] * (1 if shard is None else shard.sp_size), *hidden.shape[1:-1]))


def check_head(
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


def check_chunk(chunk_bytes: int | None, hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype, shard: Shard | None = None) -> int:
    """Check the memory for a chunk of logits; gives its rows, equally many on all ranks."""
    if chunk_bytes is not None and (isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int) or chunk_bytes < 1):
        raise ValueError(f"chunk_bytes must be a positive number of bytes, got {chunk_bytes!r}")
    columns = weight.shape[0] if shard is None else -(-shard.total // shard.ranks)
    return chunk_rows(max(columns, 1), logits_dtype, torch.promote_types(hidden.dtype, weight.dtype), weight.device, chunk_bytes)


def check_rows(rows: Tensor | None, tokens: int, device: torch.device, validate: bool) -> Tensor | None:
    """Check positions in flattened per-token tensors; gives them as int64."""
    if rows is None:
        return None
    check_tensor("rows", rows, dtypes=INTS, device=device)
    if rows.dim() != 1:
        raise ValueError(f"rows must be 1-D positions of flattened tokens, got shape {tuple(rows.shape)}")
    if validate and rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < tokens and rows.unique().numel() == rows.numel()):
        raise ValueError(f"rows must be different positions in [0, {tokens}), got {rows.tolist() if rows.numel() < 20 else rows}")
    return rows.long()


def take_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    """Which of them do."""
    needs_hidden, needs_weight, needs_bias = (torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    return needs_hidden, needs_weight, needs_bias


def freezes_head(needs: tuple[bool, bool, bool], mode: str | None) -> bool:
    """Whether the forward keeps the derivative by hidden, given which of hidden, weight and bias take gradients; checks ``mode``."""
    needs_hidden, needs_weight, needs_bias = needs
    if mode is not None:
        check_choice("mode", mode, ("recompute", "frozen-head"))
    if mode == "frozen-head" and (needs_weight or needs_bias):
        raise ValueError("mode='frozen-head' needs weight and bias that take no gradient; here they require one")
    return needs_hidden and not needs_weight and not needs_bias and mode != "recompute"


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    logits_dtype: torch.dtype | None,
    chunk_bytes: int | None,
    rows: Tensor | None,
    compact: bool | None,
    keep: KeptTokens | None,
    process_group: ProcessGroup,
    validate: bool | None,
    backend: str | None,
) -> LinearInputs:
    """Check the arguments that functions from hidden states share."""
    with Agreement(process_group, validate, hidden) as agreement:
        hidden, weight, bias, shard = local_head(hidden, weight, bias, process_group)
        dtype = check_head(hidden, weight, bias, logits_dtype, sharded=shard is not None)
        shape, device, must_validate = shape_of_tokens(hidden, shard), hidden.device, agreement.validate
        agreement.part(shard, hidden)
        agreement.tokens(ids, mask, device)
        _check_ids(ids, mask, shape, device)
        per_token, scale, cap = check_scaling(temperature, softcap, logit_scale, shape, device)
        rows = check_rows(rows, ids.numel(), device, must_validate)
        chunk = check_chunk(chunk_bytes, hidden, weight, dtype, shard)
        agreement.rows(rows, chunk)
        offsets, token_ids = (None, None) if keep is None else check_keep(keep, ids, weight.shape[0], shard, must_validate)
        backend = choose_backend(backend, hidden, triton_dtypes=TRITON_DTYPES)
    return LinearInputs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ids.flatten(),
        None if mask is None else mask.flatten(),
        None if per_token is None else per_token.flatten(),
        rows,
        offsets,
        token_ids,
        scale,
        cap,
        dtype,
        chunk,
        device.type == "cpu" if compact is None else compact,
        must_validate,
        backend,
        "" if shard is None else shard.text,
    )


@overload
def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    with_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
    keep: KeptTokens | None = ...,
    process_group: ProcessGroup = ...,
    validate: bool | None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    with_entropy: Literal[True],
    inplace_backward: bool = ...,
    keep: KeptTokens | None = ...,
    process_group: ProcessGroup = ...,
    validate: bool | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    inplace_backward: bool = False,
    keep: KeptTokens | None = None,
    process_group: ProcessGroup = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each token, and optionally the entropy of its distribution, in nats; the softmax is never materialised.

    With ``z = cap * tanh(logits / cap) * logit_scale / temperature`` (no tanh without a soft-cap)::

        logprob = z[id] - logsumexp(z)        entropy = logsumexp(z) - sum_v p_v z_v

    Differentiable in ``logits``, through both results, once: a double backward is an error. ``-inf`` logits have probability 0 and gradient 0.

    Args:
        logits: ``S + [V]``; float16, bfloat16, float32, or float64 (torch backend). ``S`` is any shape of rank 1 or more. Read in place wherever the
            last dimension has unit stride and the rest two strides at most, as in ``logits[:, :-1]``; otherwise copied.
        ids: ``S``, int32 or int64. ``ids[i]`` is the token that ``logits[i]`` scores: nothing is shifted. -100 counts as masked.
        mask: ``S``, any dtype, non-zero where a position counts. Elsewhere nothing is read, and both results and the gradient are 0.
        temperature: a positive number, or a tensor of shape ``S`` with one for each token.
        softcap: positive bound of the logits (Gemma), or None.
        logit_scale: positive factor of the logits (Cohere, Granite).
        with_entropy: also return the entropy.
        inplace_backward: write the gradient over ``logits`` during the backward, which saves a tensor of their size. Safe when nothing else needs
            them after; where autograd saved them for something else, that raises.
        keep: the tokens that the sampler's top-k or top-p left in each row, over which alone the sums run; an id that is not among them has
            log-prob -inf.
        process_group: the ranks among which the vocabulary is divided, each with the logits of its part, in the order of the ranks, for the same
            tokens; a group whose ranks hold equally many, or a :class:`rlkern.VocabShard`. A DTensor says so itself. One all-gather of four numbers a
            row in the forward, nothing in the backward; all ranks get the same bits. All must make the same loss of the result, of all tokens: the
            gradient that comes back is taken to be equal on all ranks. A loss of the rank's own tokens alone gives wrong gradients.
        validate: check that ids lie in ``[0, V)`` (one synchronisation on a GPU). Default: on the CPU, or with RLKERN_VALIDATE=1. Unchecked, a row
            whose id does not is NaN.
        backend: "triton" or "torch"; default: by device, or RLKERN_BACKEND.

    Returns:
        ``logprobs`` of shape ``S``, or ``(logprobs, entropy)``; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: for arguments of another type, dtype, shape, device or range, and, when validating, for an id outside ``[0, V)``.
    """
    logits, shape, device, shard, must_validate = check_logits(logits, ids, mask, process_group, validate)
    per_token, scale, cap = check_scaling(temperature, softcap, logit_scale, shape, device)
    if inplace_backward:
        check_writable("inplace_backward=True", logits)
    backend = choose_backend(backend, logits, triton_dtypes=TRITON_DTYPES)
    if keep is not None:  # the gradient may go over the copy, which is ours
        logits = Restrict.apply(logits, *check_keep(keep, ids, logits.shape[-1], shard, must_validate), backend)
        inplace_backward = True
    part = "" if shard is None else shard.text
    logprob, entropy = TokenLogprobs.apply(logits, ids, mask, per_token, scale, cap, with_entropy, inplace_backward, must_validate, backend, part)
    return (logprob, entropy) if with_entropy else logprob


@overload
def linear_token_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, *, with_entropy: Literal[False] = ..., **options: Any) -> Tensor: ...


@overload
def linear_token_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, *, with_entropy: Literal[True], **options: Any) -> tuple[Tensor, Tensor]: ...


def linear_token_logprobs(  # type: ignore[misc]  # the options are those below
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    rows: Tensor | None = None,
    compact: bool | None = None,
    keep: KeptTokens | None = None,
    mode: Literal["recompute", "frozen-head"] | None = None,
    process_group: ProcessGroup = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`token_logprobs` of ``logits = hidden @ weight.T + bias``, of which only a chunk of rows exists at a time.

    Differentiable in ``hidden``, ``weight`` and ``bias``, through both results, once. What the backward does depends on who takes gradients:

    - nobody (or under no_grad): one product with the head in all, and no memory beyond a chunk;
    - ``hidden`` alone, a frozen head as in LoRA: the forward keeps ``J = d logprob / d hidden`` (as large as ``hidden``), and the backward only
      scales its rows, whatever the loss; where a gradient comes through the entropy too, both are recomputed;
    - the head too: the backward makes the logits again, chunk by chunk, and adds up d weight in float32.

    Args:
        hidden: ``S + [H]``; float16, bfloat16, float32, or float64 (torch backend).
        weight: ``[V, H]``, as in ``torch.nn.Linear``; its dtype may differ from that of ``hidden`` (products are then in the wider one).
        ids, mask, temperature, softcap, logit_scale, with_entropy, keep, validate, backend: as in :func:`token_logprobs`.
        bias: ``[V]``.
        logits_dtype: dtype of the logits of a chunk. Default: float32 (float64 for float64), the products of 16-bit operands unrounded; their
            gradient is rounded to the operands' dtype. The operands' own dtype, say bfloat16, takes less memory traffic; log-probs are then off by
            1e-2.
        chunk_bytes: memory for the logits of a chunk, and for their gradient where it is of another dtype. Default: 64 MiB on a CPU, 1 GiB on a GPU.
        rows: ``[n]``, int32 or int64: the positions of flattened ``S`` to compute, where the caller knows them; others count as masked.
        compact: leave masked rows out of the products, by counting them (on a GPU: one synchronisation). Default: on the CPU.
        mode: force "recompute", or "frozen-head" (an error where the head takes gradients), for comparison.
        process_group: the ranks among which the head is divided, each with its rows of ``weight`` and ``bias`` and all of ``hidden``, as in
            :func:`token_logprobs`. Beside the all-gather (one for all, or with a frozen head one a chunk) d loss / d hidden is summed over the ranks,
            chunk by chunk, beside the products that follow. With sequence parallelism (see :class:`rlkern.VocabShard`; of a DTensor that is divided
            along the first dimension, too) each has a share of ``hidden`` instead: these are all-gathered, and d loss / d hidden is reduce-scattered.

    Returns:
        As :func:`token_logprobs`: shape ``S``, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for arguments of another type, dtype, shape, device or range, and, when validating, for an id outside ``[0, V)``.
    """
    inputs = check_linear(
        hidden,
        weight,
        ids,
        bias=bias,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        logits_dtype=logits_dtype,
        chunk_bytes=chunk_bytes,
        rows=rows,
        compact=compact,
        keep=keep,
        process_group=process_group,
        validate=validate,
        backend=backend,
    )
    logprob, entropy = linear_logprobs(inputs, with_entropy, mode)
    return (logprob.view(ids.shape), entropy.view(ids.shape)) if with_entropy else logprob.view(ids.shape)


def linear_logprobs(x: LinearInputs, with_entropy: bool, mode: str | None = None) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy ``[N]`` (empty if not wanted) of checked inputs."""
    frozen = freezes_head(x.needs_grad(), mode)
    *tensors, scale, cap, logits_dtype, chunk, compact, validate, backend, shard = x
    logprob, entropy = LinearLogprobs.apply(*tensors, scale, cap, logits_dtype, chunk, with_entropy, frozen, compact, validate, backend, shard)
    return logprob, entropy
