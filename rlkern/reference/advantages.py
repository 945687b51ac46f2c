"""Importance weights, recursions over time, baselines over groups, whitening, shaped rewards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import clamp, compute_dtype, sequence_sum, times, to_tokens
from .policy import kl_penalty


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
    factors: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    masked: str = "skip",
    last_values: Tensor | None = None,
    next_values: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recursion that all the functions of time share, from the last step to the first, with the factors (rho, c):

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
            one: dict[str, Any] = {"gamma": gamma, "lam": lam, "last_values": last_values}
            one = {name: x[i] if isinstance(x, Tensor) else x for name, x in one.items()}
            each: dict[str, Any] = {"mask": mask, "next_values": next_values, "terminated": terminated, "truncated": truncated}
            each = {name: x if x is None else x[begin:end] for name, x in each.items()}
            each["factors"] = tuple(x[begin:end] for x in factors)
            pieces.append(td_errors(rewards[begin:end], values[begin:end], masked=masked, **one, **each))
        return torch.cat([d for d, _ in pieces]), torch.cat([q for _, q in pieces])
    dtype = torch.promote_types(compute_dtype(rewards), compute_dtype(values))
    no = torch.zeros(rewards.shape, dtype=torch.bool, device=rewards.device)
    m = ~no if mask is None else mask != 0
    r, v = (torch.where(m, x.to(dtype), 0.0) for x in (rewards, values))
    rho, c = (x.to(dtype) for x in factors)
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
    A, _ = td_errors(rewards, values, factors=(one, one), mask=mask, **options)
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
    D, A = td_errors(rewards, values, gamma=gamma, lam=lam, factors=(rho, ratio.clamp(max=c_clip)), mask=mask, **options)
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
