"""Log-probs and entropies of chosen tokens."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ._inputs import Chunking, KeptTokens, Scaling, Where, check_linear, check_logits, check_writable, freezes_head
from .distributed import ProcessGroup
from .ops.keep import Restrict
from .ops.linear import Linear, LinearLogprobs
from .ops.logits import TokenLogprobs
from .ops.operators import flat


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
        logits: ``S + [V]``; float16, bfloat16, float32, or float64 (torch backend). ``S`` is any shape of rank 1 or more. They are read in place if
            the last dimension has unit stride and the others have two strides at most, as in ``logits[:, :-1]``; otherwise copied. A slice still
            costs a copy of its gradient in PyTorch; all of a model's logits, with an id of -100 at the last position, cost none.
        ids: ``S``, int32 or int64. ``ids[i]`` is the token that ``logits[i]`` scores: nothing is shifted. -100 counts as masked.
        mask: ``S``, any dtype, non-zero where a position counts. Other positions are not read, and both results and the gradient are 0 there.
        temperature: a positive number, or a tensor of shape ``S`` with one for each token.
        softcap: positive bound of the logits (Gemma), or None.
        logit_scale: positive factor of the logits (Cohere, Granite).
        with_entropy: also return the entropy.
        inplace_backward: write the gradient over ``logits`` during the backward, which saves a tensor of their size. Safe if nothing else needs
            the logits afterwards; if autograd saved them for another operation, the backward raises an error.
        keep: the tokens that the sampler's top-k or top-p kept in each row. The softmax runs over these alone; an id that is not among them has
            log-prob -inf.
        process_group: the ranks among which the vocabulary is divided: a group whose ranks hold equally many entries, or a
            :class:`rlkern.VocabShard`. Each rank passes the logits of its part, in the order of the ranks, for the same tokens. Logits that are a
            DTensor need no group. The forward makes one all-gather of four numbers a row, the backward none; all ranks get the same bits. Every rank
            must compute the same loss, over all tokens: the gradient that comes back is taken to be equal on all ranks, and a loss of the rank's own
            tokens alone gives wrong gradients.
        validate: check that ids lie in ``[0, V)`` (one synchronisation on a GPU). Default: on the CPU, or with RLKERN_VALIDATE=1. Without the check,
            a row whose id lies outside is NaN.
        backend: "triton" or "torch"; default: by device, or RLKERN_BACKEND.

    Returns:
        ``logprobs`` of shape ``S``, or ``(logprobs, entropy)``; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: for arguments of another type, dtype, shape, device or range, and, when validating, for an id outside ``[0, V)``.
    """
    x = check_logits(logits, ids, mask, Scaling(temperature, softcap, logit_scale), keep, Where(process_group, validate, backend))
    if inplace_backward:
        check_writable("inplace_backward=True", x.logits)
    here = x.logits
    if keep is not None:  # the gradient may go over the copy, which is ours
        here, inplace_backward = Restrict.apply(here, *x.kept, x.rows.backend), True
    logprob, entropy = TokenLogprobs.apply(here, *x.rows, with_entropy, inplace_backward, x.validate)
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

    Differentiable in ``hidden``, ``weight`` and ``bias``, through both results, once. The backward depends on which inputs take gradients:

    - none (or under no_grad): one product with the head in all, and no memory beyond a chunk;
    - ``hidden`` alone (a frozen head, as in LoRA): the forward keeps ``J = d logprob / d hidden``, as large as ``hidden``, and the backward only
      scales its rows, whatever the loss; if a gradient comes through the entropy too, both are recomputed;
    - the head too: the backward makes the logits again, chunk by chunk, and adds up d weight in float32.

    Args:
        hidden: ``S + [H]``; float16, bfloat16, float32, or float64 (torch backend).
        weight: ``[V, H]``, as in ``torch.nn.Linear``; its dtype may differ from that of ``hidden`` (products are then in the wider one).
        ids, mask, temperature, softcap, logit_scale, with_entropy, keep, validate, backend: as in :func:`token_logprobs`.
        bias: ``[V]``.
        logits_dtype: dtype of the logits of a chunk. Default: float32 (float64 for float64), so that products of 16-bit operands are not rounded;
            their gradient is rounded to the operands' dtype. The operands' own dtype, such as bfloat16, takes less memory traffic, and puts log-probs
            off by 1e-2.
        chunk_bytes: memory for the logits of a chunk, and for their gradient if it has another dtype. Default: 64 MiB on a CPU, 2 GiB on a GPU.
        rows: ``[n]``, int32 or int64: the positions of flattened ``S`` to compute, if the caller knows them; the others count as masked.
        compact: leave masked rows out of the products. Counting them takes one synchronisation on a GPU. Default: on the CPU.
        mode: force "recompute", or "frozen-head" (an error where the head takes gradients), for comparison.
        process_group: the ranks among which the head is divided, as in :func:`token_logprobs`. Each rank passes its rows of ``weight`` and ``bias``,
            and all of ``hidden``. Besides the all-gather (one in all; with a frozen head one for each chunk), d loss / d hidden is summed over the
            ranks, chunk by chunk, while the products that follow run. With sequence parallelism (see :class:`rlkern.VocabShard`; also if ``hidden``
            is a DTensor that is divided along the first dimension) each rank passes a share of ``hidden`` instead: the shares are all-gathered, and
            d loss / d hidden is reduce-scattered.

    Returns:
        As :func:`token_logprobs`: shape ``S``, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for arguments of another type, dtype, shape, device or range, and, when validating, for an id outside ``[0, V)``.
    """
    x = check_linear(
        (hidden, weight, bias),
        ids,
        mask,
        Scaling(temperature, softcap, logit_scale),
        Chunking(logits_dtype, chunk_bytes, rows, compact),
        keep,
        Where(process_group, validate, backend),
    )
    logprob, entropy = linear_logprobs(x, with_entropy, mode)
    return (logprob.view(ids.shape), entropy.view(ids.shape)) if with_entropy else logprob.view(ids.shape)


def linear_logprobs(x: Linear, with_entropy: bool, mode: str | None = None) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy ``[N]`` (empty if not wanted) of checked inputs."""
    frozen = freezes_head(x.head.needs_grad(), mode)
    logprob, entropy = LinearLogprobs.apply(*flat(x), with_entropy, frozen)
    return logprob, entropy
