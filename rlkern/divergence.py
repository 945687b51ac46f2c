"""Divergences between two models' distributions over the whole vocabulary, token by token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._checks import check_number
from ._inputs import Chunking, LinearPair, Scaling, Where, check_linear_pair, check_pair, freezes_head
from .distributed import ProcessGroup
from .ops.divergence import Divergence, LinearDivergence


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reverse: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: ProcessGroup = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Exact KL divergence of each token's distribution, in nats: the sum that :func:`rlkern.kl_penalty` estimates from the sampled token.

    With p the softmax of ``cap * tanh(logits / cap) * logit_scale / temperature`` (no tanh without a soft-cap) and q that of ``ref_logits``::

        KL(p || q) = sum_v p_v (log p_v - log q_v)        in reverse: KL(q || p)

    Differentiable in ``logits``, once; ``ref_logits`` is a constant. A token that is ``-inf`` on both sides (a sampling mask, a padded vocabulary)
    contributes nothing; where q_v = 0 and p_v > 0, KL(p || q) is infinite.

    Args:
        logits: ``S + [V]``; float16, bfloat16, float32, or float64 (torch backend). ``S`` is any shape of rank 1 or more. They are read in place if
            the last dimension has unit stride and the others have two strides at most, as in ``logits[:, :-1]``; otherwise copied.
        ref_logits: ``S + [V]``, of any of these dtypes, over the same vocabulary: cut a padded one by ``ref_logits[..., :V]``, which copies nothing.
        temperature: a positive number, or a tensor of shape ``S`` with one for each token. It applies to both sides, as softcap and logit_scale do.
        mask: ``S``, any dtype, non-zero where a position counts. Other positions are not read, and the result and the gradient are 0 there.
        reverse: KL(ref || policy) instead of KL(policy || ref).
        softcap: positive bound of the logits (Gemma), or None.
        logit_scale: positive factor of the logits (Cohere, Granite).
        process_group: the ranks among which the vocabulary of both models is divided alike, as in :func:`rlkern.token_logprobs`. The forward makes
            one all-gather of five numbers a row (for a JSD another of two), the backward none; all ranks get the same bits.
        validate: check that the ranks of ``process_group`` have the same tokens (one collective and a synchronisation). Default: on the CPU, or with
            RLKERN_VALIDATE=1.
        backend: "triton" or "torch"; default: by device, or RLKERN_BACKEND.

    Returns:
        Shape ``S``, float32 (float64 if either input is).

    Raises:
        TypeError, ValueError: for arguments of another type, dtype, shape, device or range.
    """
    scaling, where = Scaling(temperature, softcap, logit_scale), Where(process_group, validate, backend)
    here, ref_here, comparison = check_pair(logits, ref_logits, 0.0 if reverse else 1.0, mask, scaling, where)
    return Divergence.apply(here, ref_here, *comparison)


def generalized_jsd(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: ProcessGroup = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of a student and a teacher, in nats: the distillation loss of GKD, token by token.

    With p the distribution of the student, whose ``logits`` take the gradient, q that of the teacher, whose ``ref_logits`` are constant, and the
    mixture ``M = beta q + (1 - beta) p``::

        JSD = beta KL(q || M) + (1 - beta) KL(p || M)        0 < beta < 1

    As in TRL's GKDTrainer, ``beta=0`` is KL(teacher || student) (forward KL, as in supervised distillation) and ``beta=1`` KL(student || teacher)
    (reverse KL, mode-seeking); both are definitions, since the formula tends to 0 there. The symmetric ``beta=0.5`` is at most log 2.

    Args:
        logits: of the student, ``S + [V]``.
        ref_logits: of the teacher, ``S + [V]``.
        beta: weight of the teacher in the mixture, in [0, 1].
        temperature, mask, softcap, logit_scale, process_group, validate, backend: as in :func:`full_kl`; so are shapes, dtypes, result and errors.

    Source: Agarwal et al., On-Policy Distillation of Language Models (2023), https://arxiv.org/abs/2306.13649.
    """
    beta = check_number("beta", beta, at_least=0, at_most=1)
    scaling, where = Scaling(temperature, softcap, logit_scale), Where(process_group, validate, backend)
    here, ref_here, comparison = check_pair(logits, ref_logits, beta, mask, scaling, where)
    return Divergence.apply(here, ref_here, *comparison)


def linear_full_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reverse: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    rows: Tensor | None = None,
    compact: bool | None = None,
    mode: Literal["recompute", "frozen-head"] | None = None,
    process_group: ProcessGroup = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`full_kl` of ``hidden @ weight.T + bias`` and ``ref_hidden @ ref_weight.T + ref_bias``, of which only a chunk of rows exists at a time.

    Differentiable in ``hidden``, ``weight`` and ``bias``, once; all of the reference is constant. The backward depends on which inputs take
    gradients, as in :func:`rlkern.linear_token_logprobs`. If none does, there is one product with each head. If ``hidden`` alone does (a frozen
    head), the forward keeps ``J = d KL / d hidden``, and the backward scales its rows. If the head does too, the backward makes the logits of both
    models again.

    Args:
        hidden: ``S + [H]``; float16, bfloat16, float32, or float64 (torch backend).
        weight: ``[V, H]``, as in ``torch.nn.Linear``; its dtype may differ from that of ``hidden`` (products are then in the wider one).
        ref_hidden, ref_weight: ``S + [H']`` and ``[V, H']``: the models may differ in width, not in vocabulary.
        bias, ref_bias: ``[V]``.
        temperature, mask, reverse, softcap, logit_scale, backend: as in :func:`full_kl`.
        logits_dtype: dtype of the policy's logits of a chunk, as in :func:`rlkern.linear_token_logprobs`; if it is less than float32, the reference's
            logits have the dtype of the reference's operands.
        chunk_bytes: memory for the policy's logits of a chunk, and for their gradient if it has another dtype. The reference's logits take memory
            besides. Default: 64 MiB on a CPU, 2 GiB on a GPU.
        rows, compact, mode, validate: as in :func:`rlkern.linear_token_logprobs`.
        process_group: the ranks among which both heads are divided alike, as in :func:`rlkern.linear_token_logprobs`. A KL takes one all-gather, or
            with a frozen head one for each chunk. A JSD takes one for each chunk and one more, or with a frozen head two for each chunk.

    Returns:
        Shape ``S``, float32 (float64 if any logits are).

    Raises:
        TypeError, ValueError: for arguments of another type, dtype, shape, device or range.
    """
    x = check_linear_pair(
        (hidden, weight, bias),
        (ref_hidden, ref_weight, ref_bias),
        0.0 if reverse else 1.0,
        mask,
        Scaling(temperature, softcap, logit_scale),
        Chunking(logits_dtype, chunk_bytes, rows, compact),
        Where(process_group, validate, backend),
    )
    return _linear_divergence(x, mode)


def linear_generalized_jsd(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    beta: float = 0.5,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    rows: Tensor | None = None,
    compact: bool | None = None,
    mode: Literal["recompute", "frozen-head"] | None = None,
    process_group: ProcessGroup = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`generalized_jsd` of a student, ``hidden`` and ``weight``, and a teacher, ``ref_hidden`` and ``ref_weight``, with no ``[S, V]`` logits.

    Arguments, gradients, result and errors are those of :func:`linear_full_kl`, and ``beta`` that of :func:`generalized_jsd`.
    """
    x = check_linear_pair(
        (hidden, weight, bias),
        (ref_hidden, ref_weight, ref_bias),
        check_number("beta", beta, at_least=0, at_most=1),
        mask,
        Scaling(temperature, softcap, logit_scale),
        Chunking(logits_dtype, chunk_bytes, rows, compact),
        Where(process_group, validate, backend),
    )
    return _linear_divergence(x, mode)


def _linear_divergence(x: LinearPair, mode: str | None) -> Tensor:
    frozen = freezes_head(x.policy.needs_grad(), mode)
    return LinearDivergence.apply(*x.policy, *x.ref, *x.work, *x.comparison, frozen).view(x.shape)
