"""Log-probs, entropies and divergences over the vocabulary, from logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .common import IGNORE_INDEX, compute_dtype


def scaled_logits(logits: Tensor, temperature: float | Tensor = 1.0, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """z = cap * tanh(x / cap) * logit_scale / T;  -inf stays -inf."""
    x = logits.to(compute_dtype(logits))
    if softcap is not None:
        x = torch.where(x == -torch.inf, x, softcap * torch.tanh(x / softcap))
    if isinstance(temperature, Tensor):
        temperature = temperature.to(x.dtype).unsqueeze(-1)
    return x * logit_scale / temperature


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    keep: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """logprob = z_id - lse,  entropy = lse - sum_v p_v z_v  (nats);  0 at masked positions and ids of -100;  NaN where an id is outside [0, V)."""
    vocabulary = logits.shape[-1]
    valid = ids != IGNORE_INDEX
    if mask is not None:
        valid = valid & (mask != 0)
    inside = (ids >= 0) & (ids < vocabulary)
    logits = torch.where(valid.unsqueeze(-1), logits, torch.zeros_like(logits))  # a masked row is never read
    z = scaled_logits(logits, temperature, softcap, logit_scale)
    if keep is not None:  # (offsets, token_ids): the sums run over the kept tokens only
        offsets, token_ids = keep
        kept = torch.zeros(ids.numel(), vocabulary, dtype=torch.bool, device=z.device)
        kept[torch.arange(ids.numel(), device=z.device).repeat_interleave(offsets[1:] - offsets[:-1]), token_ids.long()] = True
        z = torch.where(kept.view(z.shape), z, -torch.inf)
    z = torch.where(valid.unsqueeze(-1), z, torch.zeros_like(z))  # nor its temperature, nor which of its tokens are kept
    dead = z == -torch.inf  # probability 0 and gradient 0, also where the token was chosen; no 0 * inf is formed there
    z = torch.where(dead, z.detach(), z)
    lse = torch.logsumexp(z, dim=-1)
    lse = torch.where(lse.isfinite(), lse, torch.nan)  # a row of -inf, or with +inf, is no distribution
    logprob = z.gather(-1, torch.where(inside, ids, 0).long().unsqueeze(-1)).squeeze(-1) - lse
    p = torch.where(dead, torch.zeros_like(z), torch.exp(z - lse.unsqueeze(-1)))
    entropy = lse - (p * torch.where(dead, torch.zeros_like(z), z)).sum(-1)
    broken = torch.where(inside, 0.0, torch.nan).to(z.dtype)
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    logprob = torch.where(valid, logprob + broken, zero)
    entropy = torch.where(valid, entropy + broken, zero)
    return (logprob, entropy) if with_entropy else logprob


def log_softmax(
    logits: Tensor, mask: Tensor | None, temperature: float | Tensor = 1.0, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """z - lse;  NaN in a row of -inf, or with +inf or NaN;  masked rows are not read (and have no meaning)."""
    if mask is not None:
        logits = torch.where((mask != 0).unsqueeze(-1), logits, 0.0)
    z = scaled_logits(logits, temperature, softcap, logit_scale)
    if mask is not None:
        z = torch.where((mask != 0).unsqueeze(-1), z, 0.0)
    lse = torch.logsumexp(z, dim=-1, keepdim=True)
    return z - torch.where(lse.isfinite(), lse, torch.nan)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p_v (log p_v - log q_v):  0 where p_v = 0, inf where only q_v = 0."""
    dead = log_p == -torch.inf
    log_p, log_q = (torch.where(dead, 0.0, x) for x in (log_p, log_q))  # no gradient forms 0 * inf there
    terms = torch.where(log_q == -torch.inf, torch.inf, log_p.exp() * (log_p - log_q))
    return torch.where(dead, 0.0, terms).sum(-1)


def full_kl(logits: Tensor, ref_logits: Tensor, *, mask: Tensor | None = None, reverse: bool = False, **scaling: Any) -> Tensor:
    """KL(policy || ref) over the whole vocabulary, or KL(ref || policy) in reverse;  0 at masked positions.  ``ref_logits`` is constant."""
    log_p, log_q = (log_softmax(x, mask, **scaling) for x in (logits, ref_logits.detach()))
    kl = kl_divergence(log_q, log_p) if reverse else kl_divergence(log_p, log_q)
    return kl if mask is None else torch.where(mask != 0, kl, 0.0)


def generalized_jsd(logits: Tensor, ref_logits: Tensor, *, beta: float = 0.5, mask: Tensor | None = None, **scaling: Any) -> Tensor:
    """beta KL(q || M) + (1 - beta) KL(p || M),  M = beta q + (1 - beta) p,  p of the student's logits, q of the teacher's ``ref_logits``.

    By definition (Agarwal et al. 2023, TRL) KL(q || p) for beta = 0 and KL(p || q) for beta = 1, where the mixture gives 0.
    """
    if beta in (0, 1):
        return full_kl(logits, ref_logits, mask=mask, reverse=beta == 0, **scaling)
    log_p, log_q = (log_softmax(x, mask, **scaling) for x in (logits, ref_logits.detach()))
    nowhere = (log_p == -torch.inf) & (log_q == -torch.inf)
    inside = (torch.where(nowhere, 0.0, x) for x in (log_q + math.log(beta), log_p + math.log1p(-beta)))
    log_m = torch.logaddexp(*inside)
    jsd = beta * kl_divergence(log_q, log_m) + (1 - beta) * kl_divergence(log_p, log_m)
    return jsd if mask is None else torch.where(mask != 0, jsd, 0.0)
