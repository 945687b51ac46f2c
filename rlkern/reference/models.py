"""The losses of a critic and of a reward model."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import compute_dtype
from .policy import aggregation_weights


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
