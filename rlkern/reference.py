"""The specification: what every backend computes, as plain PyTorch. Short, slow, any floating dtype, differentiable by autograd.

It materialises everything, checks nothing and is meant to be read; tests compare the fast backends with it in float64.
Notation: ``S`` is the shape of per-token tensors (``[..., time]`` padded, or ``[tokens]`` packed with ``cu_seqlens``), ``m`` a binary mask,
``lp``, ``old``, ``ref`` log-probs of the policy, the behaviour policy and the reference policy, ``A`` advantages, ``sg`` stop-gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- 1. From logits to per-token statistics -------------------------------------------------------------------------------------------------


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
) -> Tensor | tuple[Tensor, Tensor]:
    """logprob = z_id - lse,  entropy = lse - sum_v p_v z_v  (nats);  0 at masked positions and ids of -100;  NaN where an id is outside [0, V)."""
    vocabulary = logits.shape[-1]
    valid = ids != IGNORE_INDEX
    if mask is not None:
        valid = valid & (mask != 0)
    inside = (ids >= 0) & (ids < vocabulary)
    z = scaled_logits(logits, temperature, softcap, logit_scale)
    z = torch.where(valid.unsqueeze(-1), z, torch.zeros_like(z))  # a masked row is never read
    dead = z == -torch.inf  # probability 0; detached, so that no gradient forms 0 * inf there
    lse = torch.logsumexp(z, dim=-1)
    logprob = z.gather(-1, torch.where(inside, ids, 0).long().unsqueeze(-1)).squeeze(-1) - lse
    p = torch.where(dead, torch.zeros_like(z), torch.exp(z - lse.unsqueeze(-1)))
    entropy = lse - (p * torch.where(dead, torch.zeros_like(z), z)).sum(-1)
    broken = torch.where(inside, 0.0, torch.nan).to(z.dtype)
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    logprob = torch.where(valid, logprob + broken, zero)
    entropy = torch.where(valid, entropy + broken, zero)
    return (logprob, entropy) if with_entropy else logprob


# ---- 2. Ratio -------------------------------------------------------------------------------------------------------------------------------


# ---- 3. Surrogates --------------------------------------------------------------------------------------------------------------------------


# ---- 4. KL estimators -----------------------------------------------------------------------------------------------------------------------


# ---- 5. Aggregation -------------------------------------------------------------------------------------------------------------------------


# ---- 6. Advantages --------------------------------------------------------------------------------------------------------------------------
