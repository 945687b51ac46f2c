"""The specification: what every backend computes, as plain PyTorch. Short, slow, any floating dtype, differentiable by autograd.

It materialises everything, checks nothing and is meant to be read; tests compare the fast backends with it in float64.
Notation: ``S`` is the shape of per-token tensors (``[..., time]`` padded, or ``[tokens]`` packed with ``cu_seqlens``), ``m`` a binary mask,
``lp``, ``old``, ``ref`` log-probs of the policy, the behaviour policy and the reference policy, ``A`` advantages, ``sg`` stop-gradient.
"""

from .advantages import (
    discounted_returns,
    gae,
    group_advantages,
    importance_weights,
    process_advantages,
    shaped_rewards,
    td_errors,
    td_lambda,
    vtrace,
    whiten,
)
from .logits import full_kl, generalized_jsd, kl_divergence, log_softmax, scaled_logits, token_logprobs
from .models import preference_loss, ranking_loss, value_loss
from .policy import aggregation_weights, dppo_dropped, importance_ratio, kl_penalty, log_ratio, policy_loss

__all__ = [
    "aggregation_weights",
    "discounted_returns",
    "dppo_dropped",
    "full_kl",
    "gae",
    "generalized_jsd",
    "group_advantages",
    "importance_ratio",
    "importance_weights",
    "kl_divergence",
    "kl_penalty",
    "log_ratio",
    "log_softmax",
    "policy_loss",
    "preference_loss",
    "process_advantages",
    "ranking_loss",
    "scaled_logits",
    "shaped_rewards",
    "td_errors",
    "td_lambda",
    "token_logprobs",
    "value_loss",
    "vtrace",
    "whiten",
]
