"""The specification: what every backend computes, as plain PyTorch. Short, slow, any floating dtype, differentiable by autograd.

It materialises everything, checks nothing and is meant to be read; tests compare the fast backends with it in float64.
Notation: ``S`` is the shape of per-token tensors (``[..., time]`` padded, or ``[tokens]`` packed with ``cu_seqlens``), ``m`` a binary mask,
``lp``, ``old``, ``ref`` log-probs of the policy, the behaviour policy and the reference policy, ``A`` advantages, ``sg`` stop-gradient.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .config import PolicyLossConfig

IGNORE_INDEX = -100
Limits = float | tuple[float | None, float | None] | None  # [-x, x], or (low, high) with None for no bound


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- Where a number overflows ---------------------------------------------------------------------------------------------------------------
# exp(log r) is not a number to multiply by where the objective does not need it: 0 times infinity is 0, in values and in gradients.


def times(x: Tensor, y: Tensor) -> Tensor:
    """x y, 0 where x is 0, whatever y is."""
    return torch.where(x == 0, torch.zeros_like(x), x * y)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return times(x, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return torch.where(y == 0, torch.zeros_like(g), times(g, y)), torch.where(g == 0, torch.zeros_like(g), times(x, g))


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return torch.where(slope == 0, torch.zeros_like(g), times(g, slope)), None, None


def product(x: Tensor, y: Tensor) -> Tensor:
    """x y, 0 where x is 0, of equal shapes;  a derivative is 0 where one of its two factors is."""
    return _Product.apply(x, y)


def chain(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """``value``, a function of x with the derivative ``slope``, whose products by the chain rule are 0 where one of the factors is."""
    return _Chain.apply(x, value.detach(), slope.detach())


def exp(x: Tensor) -> Tensor:
    y = x.detach().exp()
    return chain(x, y, y)


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
    keep: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """logprob = z_id - lse,  entropy = lse - sum_v p_v z_v  (nats);  0 at masked positions and ids of -100;  NaN where an id is outside [0, V)."""
    vocabulary = logits.shape[-1]
    valid = ids != IGNORE_INDEX
    if mask is not None:
        valid = valid & (mask != 0)
    inside = (ids >= 0) & (ids < vocabulary)
    z = scaled_logits(logits, temperature, softcap, logit_scale)
    if keep is not None:  # (offsets, token_ids): the sums run over the kept tokens only
        offsets, token_ids = keep
        kept = torch.zeros(ids.numel(), vocabulary, dtype=torch.bool, device=z.device)
        kept[torch.arange(ids.numel(), device=z.device).repeat_interleave(offsets[1:] - offsets[:-1]), token_ids.long()] = True
        z = torch.where(kept.view(z.shape), z, -torch.inf)
    z = torch.where(valid.unsqueeze(-1), z, torch.zeros_like(z))  # a masked row is never read
    dead = z == -torch.inf  # probability 0; detached, so that no gradient forms 0 * inf there
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


# ---- 2. Ratio -------------------------------------------------------------------------------------------------------------------------------


def clamp(x: Tensor, limits: Limits) -> Tensor:
    """x clamped to [-limit, limit], or to a pair (low, high) in which None is no bound.  The gradient passes on the edges, not outside."""
    low, high = limits if isinstance(limits, tuple) else (None if limits is None else -limits, limits)
    return x if low is None and high is None else torch.clamp(x, low, high)


def sequence_of_token(tokens: int, cu_seqlens: Tensor) -> Tensor:
    """The sequence that each packed token belongs to; the number of sequences for tokens beyond the last one."""
    return torch.bucketize(torch.arange(tokens, device=cu_seqlens.device), cu_seqlens[1:].long(), right=True)


def sequence_sum(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sum over each sequence: [..., time] -> [...], or [tokens] -> [sequences]."""
    if cu_seqlens is None:
        return x.sum(-1)
    return torch.segment_reduce(x, "sum", offsets=cu_seqlens.long(), unsafe=True)


def to_tokens(y: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """One value a sequence, given to each of its tokens: the shape of ``like``."""
    if cu_seqlens is None:
        return y.unsqueeze(-1).expand_as(like)
    return torch.cat([y, y.new_zeros(1)])[sequence_of_token(len(like), cu_seqlens)]


def one_a_sequence(x: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether x has one value for each sequence: a number, [..., 1], [batch] for [batch, time], [sequences] for [tokens]."""
    if x.dim() == 0 or cu_seqlens is not None:
        return x.shape != like.shape
    return x.shape == like.shape[:-1] or x.shape[-1] == 1


def per_token(x: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x in the shape of ``like``. A 1-D x for [batch, time] is one value a sequence; for [tokens], it is where it does not have that shape."""
    if cu_seqlens is not None and x.shape != like.shape and x.shape == (len(cu_seqlens) - 1,):
        return to_tokens(x, like, cu_seqlens)
    return (x.unsqueeze(-1) if x.shape == like.shape[:-1] else x).expand_as(like)


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


# ---- 3. Surrogates --------------------------------------------------------------------------------------------------------------------------


def clip_surrogate(r: Tensor, A: Tensor, c: PolicyLossConfig) -> Tensor:
    """-min(min(r, ratio_cap) A, clamp(r, 1 - clip_low, 1 + clip_high) A);  where A < 0, at most -dual_clip A."""
    loss = -torch.minimum(product(A, clamp(r, (None, c.ratio_cap))), product(A, clamp(r, ratio_limits(c))))
    if c.dual_clip is not None:
        loss = torch.where(A < 0, torch.minimum(loss, -c.dual_clip * A), loss)
    return loss


def ratio_limits(c: PolicyLossConfig) -> tuple[float | None, float | None]:
    """(1 - clip_low, 1 + clip_high)."""
    return None if c.clip_low is None else 1 - c.clip_low, None if c.clip_high is None else 1 + c.clip_high


def cispo_surrogate(lp: Tensor, r: Tensor, A: Tensor, c: PolicyLossConfig) -> Tensor:
    """-sg(clamp(r, 1 - clip_low, 1 + clip_high)) A lp;  with cispo_cap: -sg(min(r, cispo_cap)) A lp."""
    limited = clamp(r, ratio_limits(c) if c.cispo_cap is None else (None, c.cispo_cap)).detach()
    return -product(product(A, limited), lp)


def by_sign(positive: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """a where ``positive``, else b, in the dtype of ``like``: torch.where of two Python numbers would round them to float32."""
    return torch.where(positive, torch.full_like(like, a), torch.full_like(like, b))


def sapo_surrogate(r: Tensor, A: Tensor, c: PolicyLossConfig) -> Tensor:
    """-sigmoid(tau (r - 1)) 4 / tau A."""
    tau = by_sign(A > 0, c.tau_pos, c.tau_neg, r)
    return -product(A, torch.sigmoid(tau * (r - 1)) * 4 / tau)


def gmpo_surrogate(log_r: Tensor, A: Tensor, kept: Tensor, c: PolicyLossConfig, cu_seqlens: Tensor | None) -> Tensor:
    """-A exp(mean of the clipped log r over the kept tokens of the sequence)."""
    limited = clamp(log_r, (None if c.clip_low is None else -c.clip_low, c.clip_high))
    clipped = torch.where(A > 0, torch.minimum(log_r, limited), torch.maximum(log_r, limited))
    total = sequence_sum(torch.where(kept, clipped, 0.0), cu_seqlens)
    mean = total / sequence_sum(kept.to(total.dtype), cu_seqlens).clamp(min=1)
    return -product(A, to_tokens(exp(mean), A, cu_seqlens))


def vespo_surrogate(
    lp: Tensor, log_r: Tensor, A: Tensor, w: Tensor | None, w_by_sequence: bool, c: PolicyLossConfig, cu_seqlens: Tensor | None
) -> Tensor:
    """-sg(phi) A lp,  phi = exp(lambda + k s - lambda e^s).  ``log_r`` and ``log w`` are 0 at masked positions."""
    low, high = math.log(1e-8), 20.0
    s = to_tokens(sequence_sum(log_r.clamp(-20, 20), cu_seqlens), lp, cu_seqlens)
    if w is not None:
        log_w = w.log().clamp(low, high)
        s = s + (log_w if w_by_sequence else to_tokens(sequence_sum(log_w, cu_seqlens), lp, cu_seqlens))
    s = s.clamp(low, high)
    k = by_sign(A >= 0, c.vespo_k_pos, c.vespo_k_neg, s)
    lam = by_sign(A >= 0, c.vespo_lambda_pos, c.vespo_lambda_neg, s).clamp(min=1e-4)
    phi = torch.exp(lam + k * s - lam * s.exp()).nan_to_num(nan=0.0, posinf=0.0)
    return -product(product(A, phi.detach()), lp)


def dppo_surrogate(lp: Tensor, old: Tensor, r: Tensor, A: Tensor, c: PolicyLossConfig) -> Tensor:
    """-r A keep  or  -sg(min(r, ratio_cap)) A lp keep."""
    low, high = dppo_dropped(lp.detach(), old, A, c)
    loss = -product(A, r) if c.dppo_form == "ratio" else -product(product(A, clamp(r, (None, c.ratio_cap)).detach()), lp)
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


# ---- 4. KL estimators -----------------------------------------------------------------------------------------------------------------------


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


def log_softmax(
    logits: Tensor, mask: Tensor | None, temperature: float | Tensor = 1.0, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """z - lse;  NaN in a row of -inf, or with +inf or NaN;  masked rows are not read (and have no meaning)."""
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


# ---- 5. Aggregation -------------------------------------------------------------------------------------------------------------------------


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

    if c.surrogate == "clip":
        loss = clip_surrogate(r, A, c)
    elif c.surrogate == "cispo":
        loss = cispo_surrogate(lp, r, A, c)
    elif c.surrogate == "sapo":
        loss = sapo_surrogate(r, A, c)
    elif c.surrogate == "gmpo":
        loss = gmpo_surrogate(log_r, A, kept, c, cu_seqlens)
    elif c.surrogate == "vespo":
        loss = vespo_surrogate(lp, log_r.detach(), A, w, w_by_sequence, c, cu_seqlens)
    elif c.surrogate in ("dppo_tv", "dppo_kl"):
        loss = dppo_surrogate(lp, old, r, A, c)
    elif c.surrogate == "reinforce":
        loss = -product(A, lp)
    else:
        raise ValueError(f"the reference has no formula for surrogate {c.surrogate!r}")

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


# ---- 6. Advantages --------------------------------------------------------------------------------------------------------------------------


def importance_weights(
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    level: str = "token",
    low: float | None = None,
    high: float | None = None,
    outside: str = "clamp",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """w = exp(d), d = old - sampling, or exp of its sum over the sequence;  outside [low, high] clamped, or zero.  0 at masked positions."""
    dtype = compute_dtype(old_logprobs)
    m = torch.ones_like(old_logprobs, dtype=torch.bool) if mask is None else mask != 0
    d = torch.where(m, (old_logprobs.to(dtype) - sampling_logprobs.to(dtype)).detach(), 0.0)
    if level == "sequence":
        d = to_tokens(sequence_sum(d, cu_seqlens), d, cu_seqlens)
    w = d.exp()
    limited = clamp(w, (low, high))
    return torch.where(m, limited if outside == "clamp" else torch.where(limited == w, w, 0.0), 0.0)


def td_errors(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    rho: Tensor,
    c: Tensor,
    mask: Tensor | None = None,
    masked: str = "skip",
    last_values: Tensor | None = None,
    next_values: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recursion that all the functions of time share, from the last step to the first:

    delta_t = rho_t (r_t + gamma V' - V_t),   D_t = delta_t + gamma lam c_t D'
    V', D'    of the next step; beyond the end D' = 0, V' = last_values, else next_values at the last valid step, else 0
    terminated: V' = D' = 0;   truncated: D' = 0, and V' is next_values[t] where given;   a step that is both is terminated
    masked:   "skip" leaves the step out;  "decay" takes it as r = V = 0, neither terminated nor truncated

    Returns D and Q - V, where Q_t = r_t + gamma (V' + lam D') is the target seen one step on; both are 0 at masked positions.
    """
    if cu_seqlens is not None:
        pieces = []
        bounds = cu_seqlens.tolist()
        for i, begin in enumerate(bounds[:-1]):
            end = bounds[i + 1]
            one = {"gamma": gamma, "lam": lam, "last_values": last_values}
            one = {name: x[i] if isinstance(x, Tensor) else x for name, x in one.items()}
            each = {"rho": rho, "c": c, "mask": mask, "next_values": next_values, "terminated": terminated, "truncated": truncated}
            each = {name: x if x is None else x[begin:end] for name, x in each.items()}
            pieces.append(td_errors(rewards[begin:end], values[begin:end], masked=masked, **one, **each))  # type: ignore[arg-type]
        return torch.cat([d for d, _ in pieces]), torch.cat([q for _, q in pieces])
    dtype = torch.promote_types(compute_dtype(rewards), compute_dtype(values))
    no = torch.zeros(rewards.shape, dtype=torch.bool, device=rewards.device)
    m = ~no if mask is None else mask != 0
    r, v = (torch.where(m, x.to(dtype), 0.0) for x in (rewards, values))
    rho, c = rho.to(dtype), c.to(dtype)
    stop = no if terminated is None else m & (terminated != 0)
    cut = stop if truncated is None else stop | (m & (truncated != 0))
    D = torch.zeros(rewards.shape[:-1], dtype=dtype, device=rewards.device)
    V = D if last_values is None else last_values.to(dtype)
    if last_values is None and next_values is not None and m.shape[-1]:
        last = torch.where(m, torch.arange(m.shape[-1], device=m.device), -1).amax(-1, keepdim=True)
        V = torch.where(last >= 0, next_values.gather(-1, last.clamp(min=0)).to(dtype), 0.0).squeeze(-1)
    errors, advantages = [], []
    for t in reversed(range(rewards.shape[-1])):
        V_next = V if next_values is None else torch.where(cut[..., t] & ~stop[..., t], next_values[..., t].to(dtype), V)
        V_next = torch.where(stop[..., t], 0.0, V_next)
        D_next = torch.where(cut[..., t], 0.0, D)
        delta = rho[..., t] * (r[..., t] + gamma * V_next - v[..., t])
        errors.append(delta + times(gamma * lam * c[..., t], D_next))
        advantages.append(r[..., t] + gamma * (V_next + times(lam * torch.ones_like(D_next), D_next)) - v[..., t])
        step = m[..., t] if masked == "skip" else ~no[..., t]
        D, V = torch.where(step, errors[-1], D), torch.where(step, v[..., t], V)
    if not errors:
        return r, r.clone()
    return tuple(torch.where(m, torch.stack(x[::-1], -1), 0.0) for x in (errors, advantages))  # type: ignore[return-value]


def gae(rewards: Tensor, values: Tensor, *, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """A_t = delta_t + gamma lam A_{t+1},  returns = A + V   (Schulman et al. 2016).  ``options``: those of td_errors."""
    one = torch.ones_like(rewards)
    A, _ = td_errors(rewards, values, rho=one, c=one, mask=mask, **options)
    return A, A + (values if mask is None else torch.where(mask != 0, values, 0.0)).to(A.dtype)


def td_lambda(rewards: Tensor, values: Tensor, **options: Any) -> Tensor:
    """R_t = r_t + gamma ((1 - lam) V_{t+1} + lam R_{t+1}), which is A_t + V_t."""
    return gae(rewards, values, **options)[1]


def discounted_returns(rewards: Tensor, *, gamma: float | Tensor, **options: Any) -> Tensor:
    """R_t = r_t + gamma R_{t+1}: GAE with V = 0 and lam = 1."""
    return gae(rewards, torch.zeros_like(rewards), gamma=gamma, lam=1.0, **options)[0]


def vtrace(
    rewards: Tensor,
    values: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    *,
    gamma: float | Tensor,
    lam: float | Tensor = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """vs = V + D with rho = min(rho_clip, ratio), c = min(c_clip, ratio);  advantages rho (r + gamma vs' - V)   (Espeholt et al. 2018)."""
    dtype = torch.promote_types(compute_dtype(rewards), compute_dtype(values))
    m = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask != 0
    ratio = torch.where(m, torch.exp(logprobs.to(dtype) - old_logprobs.to(dtype)), 1.0)
    rho = ratio.clamp(max=rho_clip)
    D, A = td_errors(rewards, values, gamma=gamma, lam=lam, rho=rho, c=ratio.clamp(max=c_clip), mask=mask, **options)
    return rho * A, D + torch.where(m, values.to(dtype), 0.0)


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    baseline: str = "mean",
    scale: str = "group",
    eps: float = 1e-4,
    lengths: Tensor | None = None,
    singleton: str = "zero",
) -> Tensor:
    """(r - baseline) / (std + eps) over the scorable (not NaN) rewards of each group, std with Bessel's correction.

    mean: of the group (GRPO);  leave-one-out: of the others (RLOO);  length-weighted: sum l r / sum l, the plain mean where sum l = 0 (OPO).
    group: std of the group;  batch: of all rewards;  none: no division (Dr. GRPO).  A group of one gives 0, or "raw" its reward.
    """
    r = rewards.to(compute_dtype(rewards))
    ids = group_ids if group_size is None else torch.arange(len(r)) // group_size
    assert ids is not None
    scorable = ~r.isnan()
    out = torch.zeros_like(r)
    for group in ids.unique():
        members = (ids == group) & scorable
        x, n = r[members], int(members.sum())
        if n < 2:
            out[members] = x if singleton == "raw" else torch.zeros_like(x)
            continue
        if baseline == "leave-one-out":
            b = (x.sum() - x) / (n - 1)
        elif baseline == "length-weighted" and lengths[members].sum() > 0:  # type: ignore[index]
            b = (lengths[members] * x).sum() / lengths[members].sum()  # type: ignore[index]
        else:
            b = x.mean()
        std = {"group": x, "batch": r[scorable]}[scale].std() + eps if scale != "none" else 1.0
        out[members] = (x - b) / std
    return out


def whiten(
    x: Tensor, mask: Tensor | None = None, *, eps: float = 1e-8, unbiased: bool = True, shift_mean: bool = True, eps_outside: bool = False
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the mask, or / (std + eps); plus the mean again unless shift_mean.  0 at masked positions."""
    m = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    x = torch.where(m, x.to(compute_dtype(x)), 0.0)
    n = m.sum()
    mean = x.sum() / n.clamp(min=1)
    var = (torch.where(m, x - mean, 0.0) ** 2).sum() / (n - int(unbiased)).clamp(min=1)
    white = (x - mean) / (var.sqrt() + eps if eps_outside else (var + eps).sqrt())
    return torch.where(m, white if shift_mean else white + mean, 0.0)


def process_advantages(step_rewards: Tensor, step_ends: Tensor, time: int, *, group_size: int, eps: float = 1e-4) -> Tensor:
    """Process supervision of the GRPO paper: A_t = sum of the normalised rewards of the steps that end at or after t.  [sequences, time]

    ``step_rewards`` and ``step_ends`` are ``[sequences, steps]``; an end is the position of the step's last token, -1 where there is no step. Rewards
    are normalised over all steps of the sequence's group: (r - mean) / (std + eps), Bessel.
    """
    there = step_ends >= 0
    r = torch.where(there, step_rewards.to(compute_dtype(step_rewards)), torch.nan)
    normalised = torch.zeros_like(r)
    for rows in torch.arange(len(r), device=r.device).split(group_size):
        group = r[rows][there[rows]]
        std = group.std() if len(group) > 1 else torch.zeros_like(group.sum())
        normalised[rows] = torch.where(there[rows], (r[rows] - group.mean()) / (std + eps), 0.0)
    at_or_after = step_ends.unsqueeze(-1) >= torch.arange(time, device=r.device)
    return (at_or_after * normalised.unsqueeze(-1)).sum(1)


def shaped_rewards(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    mask: Tensor,
    kl_coef: float,
    kl_estimator: str = "k1",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """r_t = -kl_coef KL_t + 1[t is the last valid token] R  (InstructGPT).  rewards [batch], the rest [batch, time]; 0 at masked positions."""
    if cu_seqlens is not None:
        pieces, bounds = [], cu_seqlens.tolist()
        for i, begin in enumerate(bounds[:-1]):
            lp, ref, m = (x[None, begin : bounds[i + 1]] for x in (logprobs, ref_logprobs, mask))
            pieces.append(shaped_rewards(rewards[i : i + 1], lp, ref, mask=m, kl_coef=kl_coef, kl_estimator=kl_estimator)[0])
        return torch.cat(pieces)
    m = mask != 0
    kl = kl_penalty(logprobs.detach(), ref_logprobs, kl_estimator, mask=m)
    following = m.flip(-1).cumsum(-1).flip(-1)  # valid tokens from here on
    return -kl_coef * kl + torch.where(m & (following == 1), rewards.unsqueeze(-1).to(kl.dtype), 0.0)


# ---- 7. Value loss and reward model ---------------------------------------------------------------------------------------------------------


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    mask: Tensor | None = None,
    clip_range: float | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    max_length: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics).  loss = 0.5 sum_i a_i max((v - R)^2, (clamp(v, v_old - c, v_old + c) - R)^2);  c = None: no clip   (PPO's reference code)."""
    dtype = compute_dtype(values)
    m = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
    v, R = torch.where(m, values.to(dtype), 0.0), torch.where(m, returns.detach().to(dtype), 0.0)
    squared = plain = (v - R) ** 2
    if clip_range is not None:
        assert old_values is not None
        old = torch.where(m, old_values.detach().to(dtype), 0.0)
        squared = torch.maximum(plain, (torch.clamp(v, old - clip_range, old + clip_range) - R) ** 2)
    a = aggregation_weights(m, aggregation, dtype=dtype, normalizer=normalizer, max_length=max_length, cu_seqlens=cu_seqlens)
    metrics = {
        "clip_fraction": (squared > plain).to(dtype).sum() / m.sum().clamp(min=1),
        "error": plain.sum() / m.sum().clamp(min=1),
        "value_mean": v.sum() / m.sum().clamp(min=1),
        "return_mean": R.sum() / m.sum().clamp(min=1),
        "explained_variance": 1 - (R - v)[m].var(correction=0) / R[m].var(correction=0)
        if m.any() and R[m].var(correction=0) > 0
        else v.new_zeros(()),
    }
    return 0.5 * (a * squared).sum(), {name: x.detach().to(dtype) for name, x in metrics.items()}


def preference_loss(chosen: Tensor, rejected: Tensor, *, margin: float | Tensor | None = None) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin), averaged over the pairs   (Bradley and Terry 1952)."""
    d = chosen.to(compute_dtype(chosen)) - rejected.to(compute_dtype(rejected)) - (0.0 if margin is None else margin)
    return -torch.nn.functional.logsigmoid(d).sum() / max(d.numel(), 1)


def ranking_loss(scores: Tensor, *, mask: Tensor | None = None, margin: float | None = None) -> Tensor:
    """The K-wise form: scores [questions, K], best first; preference_loss over the K(K-1)/2 pairs of a question, averaged over the questions.

    Questions with fewer than two valid answers have no pair, and are left out.
    """
    losses = []
    for i, row in enumerate(scores):
        r = row if mask is None else row[mask[i] != 0]
        better, worse = torch.triu_indices(len(r), len(r), 1, device=r.device)
        if len(better):
            losses.append(preference_loss(r[better], r[worse], margin=margin))
    return torch.stack(losses).mean() if losses else 0.0 * scores.to(compute_dtype(scores)).nansum()
