"""OpenRLHF: ``PolicyLoss``, ``ValueLoss`` and functions of the same names and signatures, to import in the place of its own.

Its trainers import them in ``openrlhf/trainer/ray/ppo_actor.py`` and ``ppo_critic.py``. Nothing here needs OpenRLHF. Checked against OpenRLHF 0.11.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rlkern as rk

from ._tokens import aggregate, masked_mean

_CHOICES = {
    "policy_loss_type": ("ppo", "gspo"),
    "is_correction_level": ("off", "token", "seq"),
    "is_correction_mode": ("mask", "clip"),
    "is_correction_gating": ("ratio", "binary_kl", "tv"),
}


class PolicyLoss(nn.Module):
    """``openrlhf.models.PolicyLoss``, which gives (loss, clip fraction, KL of the policy's step, KL between engines, share filtered).

    The last two are None without a correction for the rollout engine. A bad option is a ValueError when it is made.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        given = (policy_loss_type, is_correction_level, is_correction_mode, is_correction_gating)
        for (name, choices), value in zip(_CHOICES.items(), given, strict=True):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError("is_correction_mode='clip' goes with is_correction_level='token' and is_correction_gating='ratio'")
        self.low, self.high = is_correction_threshold
        if is_correction_level != "off" and is_correction_gating != "ratio" and self.low > 0:
            raise ValueError(
                f"is_correction_gating={is_correction_gating!r} has an upper bound only, got is_correction_threshold {(self.low, self.high)}"
            )
        self.is_correction_level, self.is_correction_mode, self.is_correction_gating = given[1:]
        self.sequences = policy_loss_type == "gspo"
        self.token_level_loss = token_level_loss and not self.sequences
        self.config = rk.PolicyLossConfig(
            ratio_level="sequence" if self.sequences else "token",
            clip_low=clip_eps_low,
            clip_high=clip_eps_high,
            dual_clip=dual_clip,
            log_ratio_clamp=None if self.sequences else 20.0,
            aggregation=_aggregation(self.token_level_loss),
        )

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """All ``[batch, time]``; the mask is of the actions."""
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        old, weights, engine_kl, filtered = old_log_probs, None, None, None
        if self.is_correction_level != "off":
            if rollout_log_probs is None:
                raise ValueError(f"is_correction_level={self.is_correction_level!r} needs rollout_log_probs, got None")
            if self.sequences:
                old = rollout_log_probs  # its ratio is then that of the policy and the engine, and nothing is filtered
            else:
                weights, filtered = self._correction(old_log_probs, rollout_log_probs, mask)
                engine_kl = masked_mean(rollout_log_probs - old_log_probs, mask)
        normalizer = _normalizer(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        out = rk.policy_loss(log_probs, old, advantages, mask=mask, importance_weights=weights, normalizer=normalizer, config=self.config)
        return out.loss, out.metrics["clip_fraction"], masked_mean(old_log_probs - log_probs.detach(), mask), engine_kl, filtered

    @torch.no_grad()
    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, share of the tokens or sequences outside the band) of the training engine against the rollout engine."""
        by_sequence = self.is_correction_level == "seq"
        ratio = rk.importance_weights(old, rollout, mask=mask)
        if self.is_correction_gating == "ratio":
            statistic = rk.importance_ratio(old, rollout, mask=mask, level="sequence") if by_sequence else ratio
        else:
            p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
            binary_kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            statistic = binary_kl if self.is_correction_gating == "binary_kl" else (p - q).abs()
            if by_sequence:
                statistic = masked_mean(statistic, mask, -1).unsqueeze(-1).expand_as(old)
        outside = (statistic < self.low) | (statistic > self.high)
        weights = ratio.clamp(self.low, self.high) if self.is_correction_mode == "clip" else torch.where(outside, 0.0, ratio)
        if by_sequence:  # counted once each; an empty sequence passes no band
            return weights, ((outside | (mask == 0)).all(-1)).float().mean()
        return weights, masked_mean(outside, mask)


class ValueLoss(nn.Module):
    """``openrlhf.models.ValueLoss``: half the (clipped) squared error."""

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps, self.token_level_loss = clip_eps, token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """All ``[batch, time]``; the mask is of the actions."""
        normalizer = _normalizer(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        by: dict[str, Any] = {"clip_range": self.clip_eps, "aggregation": _aggregation(self.token_level_loss), "normalizer": normalizer}
        return rk.value_loss(values, old_values, returns, mask=action_mask, **by).loss


def aggregate_loss(
    loss: Tensor,
    loss_mask: Tensor | None,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> Tensor:
    """``openrlhf.models.aggregate_loss``; masked entries are not read, and an empty batch gives 0."""
    mask = torch.ones_like(loss) if loss_mask is None else loss_mask
    normalizer = _normalizer(token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    return aggregate(loss, mask, _aggregation(token_level_loss), normalizer=normalizer)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """``openrlhf.models.utils.compute_approx_kl``: "k1", "k2" or "k3" with OpenRLHF's clamps, float32.

    unbiased_gradient: the same value, with the gradient of k2 times the ratio to ``log_probs_old``, capped at 10.
    """
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"kl_estimator must be 'k1', 'k2' or 'k3', got {kl_estimator!r}")
    value = rk.kl_penalty(log_probs, log_probs_base, kl_estimator, input_clamp=(None, 10.0) if kl_estimator == "k3" else None, output_clamp=10.0)
    if not unbiased_gradient:
        return value
    with_gradient = rk.kl_penalty(log_probs, log_probs_base, "k2")
    if log_probs_old is not None:
        with_gradient = with_gradient * rk.importance_weights(log_probs.detach(), log_probs_old, high=10.0)
    return with_gradient + (value - with_gradient).detach()


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """``openrlhf.models.utils.log_probs_from_logits``, float32 (float64 for float64). The logits are not divided in place."""
    return rk.token_logprobs(logits, labels, temperature=temperature)


def get_advantages_and_returns(values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
    """``get_advantages_and_returns`` of its experience maker: GAE in which a masked step is one of r = V = 0; both results are 0 there."""
    return rk.gae(rewards, values, gamma=gamma, lam=lambd, mask=action_mask, masked="decay")


def get_cumulative_returns(rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
    """``get_cumulative_returns`` of its experience maker: discounted returns; 0 at masked positions."""
    return rk.discounted_returns(rewards, gamma=gamma, mask=action_mask, masked="decay")


def _aggregation(token_level_loss: bool) -> str:
    return "token-mean" if token_level_loss else "seq-mean-token-mean"


def _normalizer(token_level_loss: bool, dp_size: int, batch_num_tokens: float | None, global_batch_size: float | None) -> float | None:
    """What to divide by, so that the mean over ``dp_size`` ranks is that of the global batch; None for the local count."""
    count = batch_num_tokens if token_level_loss else global_batch_size
    return None if count is None else count / dp_size
