"""Divergences between two models' distributions over the whole vocabulary, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from ._backend import choose_backend
from ._checks import FLOATS, check_number, check_tensor
from .logprobs import check_scaling
from .ops.divergence import Divergence
from .ops.logits import TRITON_DTYPES


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reverse: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Exact KL divergence of each token's distribution, in nats, which the estimators of :func:`rlkern.kl_penalty` sample.

    With p the softmax of ``cap * tanh(logits / cap) * logit_scale / temperature`` (no tanh without a soft-cap) and q that of ``ref_logits``::

        KL(p || q) = sum_v p_v (log p_v - log q_v)        in reverse: KL(q || p)

    Differentiable in ``logits``, once; ``ref_logits`` is a constant. A token that is ``-inf`` on both sides (a sampling mask, a padded vocabulary)
    contributes nothing; where q_v = 0 and p_v > 0, KL(p || q) is infinite.

    Args:
        logits: ``S + [V]``; float16, bfloat16, float32, or float64 (torch backend). ``S`` is any shape of rank 1 or more. Read in place wherever the
            last dimension has unit stride and the rest two strides at most, as in ``logits[:, :-1]``; otherwise copied.
        ref_logits: ``S + [V]``, of any of these dtypes, over the same vocabulary: cut a padded one by ``ref_logits[..., :V]``, which copies nothing.
        temperature: a positive number, or a tensor of shape ``S`` with one for each token; of both sides, like softcap and logit_scale.
        mask: ``S``, any dtype, non-zero where a position counts. Elsewhere nothing is read, and the result and the gradient are 0.
        reverse: KL(ref || policy) instead of KL(policy || ref).
        softcap: positive bound of the logits (Gemma), or None.
        logit_scale: positive factor of the logits (Cohere, Granite).
        backend: "triton" or "torch"; default: by device, or RLKERN_BACKEND.

    Returns:
        Shape ``S``, float32 (float64 where either is).

    Raises:
        TypeError, ValueError: for arguments of another type, dtype, shape, device or range.
    """
    return _divergence(logits, ref_logits, 0.0 if reverse else 1.0, temperature, mask, softcap, logit_scale, backend)


def generalized_jsd(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
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
        temperature, mask, softcap, logit_scale, backend: as in :func:`full_kl`, as are shapes, dtypes, result and errors.

    Source: Agarwal et al., On-Policy Distillation of Language Models (2023), https://arxiv.org/abs/2306.13649.
    """
    return _divergence(logits, ref_logits, check_number("beta", beta, at_least=0, at_most=1), temperature, mask, softcap, logit_scale, backend)


def _divergence(
    logits: Tensor,
    ref_logits: Tensor,
    beta: float,
    temperature: float | Tensor,
    mask: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    backend: str | None,
) -> Tensor:
    check_tensor("logits", logits, min_dim=2, dtypes=FLOATS)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have a vocabulary of at least 1 in the last dimension, got shape {tuple(logits.shape)}")
    shape, device = logits.shape[:-1], logits.device
    check_tensor("ref_logits", ref_logits, shape=logits.shape, dtypes=FLOATS, device=device)
    if mask is not None:
        check_tensor("mask", mask, shape=shape, device=device)
    per_token, scale, cap = check_scaling(temperature, softcap, logit_scale, shape, device)
    wider = torch.empty(0, dtype=torch.promote_types(logits.dtype, ref_logits.dtype), device=device)
    backend = choose_backend(backend, wider, triton_dtypes=TRITON_DTYPES)
    return Divergence.apply(logits, ref_logits.detach(), mask, per_token, scale, cap, beta, backend)
