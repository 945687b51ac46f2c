"""Ratios, surrogates, KL estimates, aggregation, and the policy loss that they make."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .common import Limits, chain, clamp, compute_dtype, exp, one_a_sequence, per_token, product, sequence_sum, to_tokens

if TYPE_CHECKING:
    from ..config import PolicyLossConfig

# ---- ratio ---------------------------------------------------------------------------------------------------------------------------------


def log_ratio(lp: Tensor, old: Tensor, m: Tensor, level: str, limits: Limits = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """log r of shape S.  token: lp - old;  sequence: its mean over the sequence;  sequence_token: lp - sg(lp) + sg(that);  sequence_sum: its sum."""
    d = torch.where(m, lp - old, torch.zeros_like(lp))
    if level != "token":
        total = sequence_sum(d, cu_seqlens)
        if level != "sequence_sum":
            total = total / sequence_sum(m.to(d.dtype), cu_seqlens).clamp(min=1)
        total = to_tokens(total, lp, cu_seqlens)
        d = lp - lp.detach() + total.detach() if level == "sequence_token" else total
    return clamp(d, limits)


def importance_ratio(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    *,
    mask: Tensor | None = None,
    level: str = "token",
    log_ratio_clamp: Limits = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """r = exp(log r) of shape S, 0 at masked positions."""
    m = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0
    lp = torch.where(m, logprobs.to(compute_dtype(logprobs)), 0.0)
    old = lp.detach() if old_logprobs is None else torch.where(m, old_logprobs.detach().to(lp.dtype), 0.0)
    return torch.where(m, log_ratio(lp, old, m, level, log_ratio_clamp, cu_seqlens).exp(), 0.0)


# ---- surrogates -----------------------------------------------------------------------------------------------------------------------------


class Token(NamedTuple):
    """The numbers that a surrogate reads, each of shape S: constants but ``lp``, ``log_r`` and ``r = exp(log r)``; 0 at masked positions."""

    lp: Tensor
    old: Tensor
    log_r: Tensor
    r: Tensor
    A: Tensor
    kept: Tensor  # counts, and is in the entropy mask
    w: Tensor | None  # importance weights, 1 at masked positions
    w_by_sequence: bool
    cu_seqlens: Tensor | None


def clip_surrogate(t: Token, c: PolicyLossConfig) -> Tensor:
    """-min(min(r, ratio_cap) A, clamp(r, 1 - clip_low, 1 + clip_high) A);  where A < 0, at most -dual_clip A.

    PPO (Schulman et al. 2017, arXiv:1707.06347, eq. 7); dual clip (Ye et al. 2020, arXiv:1912.09729).
    """
    loss = -torch.minimum(product(t.A, clamp(t.r, (None, c.ratio_cap))), product(t.A, clamp(t.r, ratio_limits(c))))
    if c.dual_clip is not None:
        loss = torch.where(t.A < 0, torch.minimum(loss, -c.dual_clip * t.A), loss)
    return loss


def ratio_limits(c: PolicyLossConfig) -> tuple[float | None, float | None]:
    """(1 - clip_low, 1 + clip_high)."""
    return None if c.clip_low is None else 1 - c.clip_low, None if c.clip_high is None else 1 + c.clip_high


def cispo_surrogate(t: Token, c: PolicyLossConfig) -> Tensor:
    """-sg(clamp(r, 1 - clip_low, 1 + clip_high)) A lp;  with cispo_cap: -sg(min(r, cispo_cap)) A lp   (MiniMax-M1, arXiv:2506.13585)."""
    limited = clamp(t.r, ratio_limits(c) if c.cispo_cap is None else (None, c.cispo_cap)).detach()
    return -product(product(t.A, limited), t.lp)


def by_sign(positive: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """a where ``positive``, else b, in the dtype of ``like``: torch.where of two Python numbers would round them to float32."""
    return torch.where(positive, torch.full_like(like, a), torch.full_like(like, b))


def sapo_surrogate(t: Token, c: PolicyLossConfig) -> Tensor:
    """-sigmoid(tau (r - 1)) 4 / tau A   (SAPO, arXiv:2511.20347)."""
    tau = by_sign(t.A > 0, c.tau_pos, c.tau_neg, t.r)
    return -product(t.A, torch.sigmoid(tau * (t.r - 1)) * 4 / tau)


def gmpo_surrogate(t: Token, c: PolicyLossConfig) -> Tensor:
    """-A exp(mean of the clipped log r over the kept tokens of the sequence)   (GMPO, arXiv:2507.20673)."""
    limited = clamp(t.log_r, (None if c.clip_low is None else -c.clip_low, c.clip_high))
    clipped = torch.where(t.A > 0, torch.minimum(t.log_r, limited), torch.maximum(t.log_r, limited))
    total = sequence_sum(torch.where(t.kept, clipped, 0.0), t.cu_seqlens)
    mean = total / sequence_sum(t.kept.to(total.dtype), t.cu_seqlens).clamp(min=1)
    return -product(t.A, to_tokens(exp(mean), t.A, t.cu_seqlens))


def vespo_surrogate(t: Token, c: PolicyLossConfig) -> Tensor:
    """-sg(phi) A lp,  phi = exp(lambda + k s - lambda e^s),  s the clamped sum of log r (and log w) over the sequence   (VESPO, arXiv:2602.10693)."""
    low, high = math.log(1e-8), 20.0
    s = to_tokens(sequence_sum(t.log_r.detach().clamp(-20, 20), t.cu_seqlens), t.lp, t.cu_seqlens)
    if t.w is not None:
        log_w = t.w.log().clamp(low, high)
        s = s + (log_w if t.w_by_sequence else to_tokens(sequence_sum(log_w, t.cu_seqlens), t.lp, t.cu_seqlens))
    s = s.clamp(low, high)
    k = by_sign(t.A >= 0, c.vespo_k_pos, c.vespo_k_neg, s)
    lam = by_sign(t.A >= 0, c.vespo_lambda_pos, c.vespo_lambda_neg, s).clamp(min=1e-4)
    phi = torch.exp(lam + k * s - lam * s.exp()).nan_to_num(nan=0.0, posinf=0.0)
    return -product(product(t.A, phi.detach()), t.lp)


def dppo_surrogate(t: Token, c: PolicyLossConfig) -> Tensor:
    """-r A keep  or  -sg(min(r, ratio_cap)) A lp keep   (DPPO, arXiv:2602.04879)."""
    low, high = dppo_dropped(t.lp.detach(), t.old, t.A, c)
    loss = -product(t.A, t.r) if c.dppo_form == "ratio" else -product(product(t.A, clamp(t.r, (None, c.ratio_cap)).detach()), t.lp)
    return torch.where(low | high, torch.zeros_like(loss), loss)


def dppo_dropped(lp: Tensor, old: Tensor, A: Tensor, c: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """(A <= 0 and too far below p_old, A > 0 and too far above): the tokens outside the trust region, in total variation or binary KL."""
    p, p_old = lp.exp(), old.exp()
    clip_low, clip_high = (math.inf if x is None else x for x in (c.clip_low, c.clip_high))
    if c.surrogate == "dppo_tv":
        return (A <= 0) & (p - p_old < -clip_low), (A > 0) & (p - p_old > clip_high)
    other, other_old = -torch.expm1(lp), -torch.expm1(old)  # 1 - p, 1 - p_old; 0 log 0 = 0
    distance = torch.where(p_old > 0, p_old * (old - lp), 0.0) + torch.where(other_old > 0, other_old * (other_old.log() - other.log()), 0.0)
    return (A <= 0) & (distance > clip_low) & (p < p_old), (A > 0) & (distance > clip_high) & (p > p_old)


def reinforce_surrogate(t: Token, c: PolicyLossConfig) -> Tensor:
    """-A lp   (Williams 1992)."""
    return -product(t.A, t.lp)


SURROGATES = {
    "clip": clip_surrogate,
    "cispo": cispo_surrogate,
    "sapo": sapo_surrogate,
    "gmpo": gmpo_surrogate,
    "vespo": vespo_surrogate,
    "dppo_tv": dppo_surrogate,
    "dppo_kl": dppo_surrogate,
    "reinforce": reinforce_surrogate,
}


def clipped_tokens(lp: Tensor, old: Tensor, log_r: Tensor, A: Tensor, c: PolicyLossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that the surrogate clips (below with A < 0, above with A > 0, by dual_clip); none for sapo, vespo and reinforce."""
    r, none = log_r.exp(), torch.zeros_like(A, dtype=torch.bool)
    if c.surrogate in ("dppo_tv", "dppo_kl"):
        return *dppo_dropped(lp, old, A, c), none
    if c.surrogate not in ("clip", "cispo", "gmpo"):
        return none, none, none
    low, high = ratio_limits(c)
    if c.surrogate == "cispo" and c.cispo_cap is not None:
        low, high = None, c.cispo_cap
    if c.surrogate == "gmpo":
        r, low, high = log_r, None if c.clip_low is None else -c.clip_low, c.clip_high
    dual = none
    if c.surrogate == "clip" and c.dual_clip is not None:
        undual = -torch.minimum(product(A, clamp(r, (None, c.ratio_cap))), product(A, clamp(r, (low, high))))
        dual = (A < 0) & (undual > -c.dual_clip * A)
    return none if low is None else (A < 0) & (r < low), none if high is None else (A > 0) & (r > high), dual


# ---- KL estimators --------------------------------------------------------------------------------------------------------------------------


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: str = "k3",
    *,
    mask: Tensor | None = None,
    input_clamp: Limits = None,
    output_clamp: Limits = None,
    weight: Tensor | None = None,
) -> Tensor:
    """k1 = -d,  abs = |d|,  k2 = d^2 / 2,  k3 = expm1(d) - d  with d = ref - lp;  a "+": that value with the gradient of k2, d.

    ``weight`` multiplies before the output clamp, with its gradient. Where the input clamp acts nothing has a gradient. 0 at masked positions.
    """
    m = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0
    lp = torch.where(m, logprobs.to(compute_dtype(logprobs)), 0.0)
    unclamped = torch.where(m, ref_logprobs.detach().to(lp.dtype), 0.0) - lp
    d = clamp(unclamped, input_clamp)
    growth = torch.expm1(d.detach())
    kl = {"k1": -d, "abs": d.abs(), "k2": chain(d, d * d / 2, d), "k3": chain(d, growth - d, growth)}[estimator.removesuffix("+")]
    if estimator.endswith("+"):
        kl = chain(d, kl, d)
    if weight is not None:
        kl = product(kl, weight)
    if input_clamp is not None:
        kl = torch.where(d == unclamped, kl, kl.detach())
    return torch.where(m, clamp(kl, output_clamp), 0.0)


# ---- aggregation ------------------------------------------------------------------------------------------------------------------------------


def aggregation_weights(
    m: Tensor,
    aggregation: str,
    *,
    dtype: torch.dtype,
    normalizer: float | Tensor | None = None,
    max_length: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The vector a of shape S with which every aggregation is  sum_i a_i l_i.

    token-mean m / M;  seq-mean-token-mean m / (len_b B);  seq-mean-token-sum m / B;  seq-mean-token-sum-norm m / (B max_length);  sum m / 1.
    M: valid tokens, B: non-empty sequences, or ``normalizer`` instead of M, B and 1; a count of 0 divides by 1.
    """
    a = m.to(dtype)
    lengths = sequence_sum(a, cu_seqlens)
    if normalizer is None:
        normalizer = {"token-mean": a.sum(), "sum": torch.ones_like(a.sum())}.get(aggregation, (lengths > 0).sum().to(dtype))
    else:
        normalizer = torch.as_tensor(normalizer, device=a.device).to(dtype)
    if aggregation == "seq-mean-token-mean":
        a = a / to_tokens(lengths, a, cu_seqlens).clamp(min=1)
    if aggregation == "seq-mean-token-sum-norm":
        a = a / (m.shape[-1] if max_length is None else max_length)
    return a / torch.where(normalizer == 0, 1.0, normalizer)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    importance_weights: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: PolicyLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics).  loss = sum_i a_i (off_policy_i entropy_mask_i w_i surrogate_i + kl_coef KL_i) - entropy_coef sum_i a'_i entropy_i."""
    c, dtype = config, compute_dtype(logprobs)
    allowed = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0
    m = allowed & (logprobs != -torch.inf)  # a token outside the replayed support counts as little as a masked one

    def read(x: Tensor, masked: float = 0.0) -> Tensor:  # a masked position is never read
        return torch.where(m, x.to(dtype), masked)

    def constant(x: Tensor) -> Tensor:
        return read(x.detach())

    lp = read(logprobs)
    old = lp.detach() if old_logprobs is None else constant(old_logprobs)
    A = constant(per_token(advantages, lp, cu_seqlens))
    log_r = log_ratio(lp, old, m, c.ratio_level, c.log_ratio_clamp, cu_seqlens)
    r = exp(log_r)
    kept = m if entropy_mask is None else m & (entropy_mask != 0)
    w, w_by_sequence = None, False
    if importance_weights is not None:
        w_by_sequence = one_a_sequence(importance_weights, lp, cu_seqlens)
        w = read(per_token(importance_weights.detach(), lp, cu_seqlens), masked=1.0)

    if c.surrogate not in SURROGATES:
        raise ValueError(f"the reference has no formula for surrogate {c.surrogate!r}")
    loss = SURROGATES[c.surrogate](Token(lp, old, log_r, r, A, kept, w, w_by_sequence, cu_seqlens), c)

    if c.off_policy_threshold is not None and sampling_logprobs is not None:
        drift = sequence_sum(constant(sampling_logprobs) - lp.detach(), cu_seqlens)
        drift = drift / sequence_sum(m.to(dtype), cu_seqlens).clamp(min=1)
        loss = torch.where((A < 0) & (to_tokens(drift, lp, cu_seqlens) > c.off_policy_threshold), 0.0, loss)
    if c.surrogate != "gmpo":  # there the mask has already acted, on the mean
        loss = torch.where(kept, loss, 0.0)
    if w is not None and c.surrogate != "vespo":
        loss = product(loss, w)
    kl = torch.zeros_like(lp)
    if ref_logprobs is not None:
        weight = None
        if c.kl_ratio_weighted is True:
            weight = r
        elif c.kl_ratio_weighted == "score":
            weight = exp(lp - lp.detach())
        elif c.kl_ratio_weighted == "sampling" and sampling_logprobs is not None:
            weight = exp(lp - constant(sampling_logprobs))
        kl = kl_penalty(lp, constant(ref_logprobs), c.kl_estimator, input_clamp=c.kl_input_clamp, output_clamp=c.kl_output_clamp, weight=weight)
    if c.kl_coef != 0:
        loss = loss + c.kl_coef * kl

    a = aggregation_weights(m, c.aggregation, dtype=dtype, normalizer=normalizer, max_length=c.max_length, cu_seqlens=cu_seqlens)
    total = (a * torch.where(m, loss, 0.0)).sum()
    if c.entropy_coef != 0 and entropy is not None:
        if c.entropy_aggregation is not None:
            a = aggregation_weights(kept, c.entropy_aggregation, dtype=dtype, max_length=c.max_length, cu_seqlens=cu_seqlens)
        total = total - c.entropy_coef * (a * read(entropy)).sum()

    count = m.sum().clamp(min=1)
    low, high, dual = clipped_tokens(lp.detach(), old, log_r.detach(), A, c)
    per_token_metrics = {
        "clip_fraction": low | high,
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "dual_clip_fraction": dual,
        "approx_kl": old - lp,
        "kl": kl,
        "entropy": torch.zeros_like(lp) if entropy is None else read(entropy),
        "ratio_mean": r,
    }
    metrics = {name: torch.where(m, x.detach().to(dtype), 0.0).sum() / count for name, x in per_token_metrics.items()}
    largest = torch.where(m, r.detach(), -torch.inf).amax() if r.numel() else torch.zeros((), dtype=dtype, device=r.device)
    metrics["ratio_max"] = torch.where(m.any(), largest, 0.0)
    metrics["outside_support"] = (allowed & ~m).sum().to(dtype)
    return total, metrics
