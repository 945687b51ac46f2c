"""rlkern: fused GPU kernels for reinforcement-learning post-training of language models, as plain functions on tensors."""

from . import _versions as _versions
from ._inputs import KeptTokens
from .advantages import group_advantages, process_advantages, shaped_rewards
from .config import PolicyLossConfig
from .distributed import VocabShard, gather_parameter
from .divergence import full_kl, generalized_jsd, linear_full_kl, linear_generalized_jsd
from .fused import fused_linear_loss, fused_linear_policy_loss, fused_policy_loss
from .logprobs import linear_token_logprobs, token_logprobs
from .losses import (
    LossOutput,
    importance_ratio,
    importance_weights,
    kl_penalty,
    policy_loss,
    preference_loss,
    ranking_loss,
    value_loss,
)
from .returns import discounted_returns, gae, td_lambda, vtrace, whiten
from .surrogates import register_surrogate

__version__ = "0.2.0"

__all__ = [
    "KeptTokens",
    "LossOutput",
    "PolicyLossConfig",
    "VocabShard",
    "__version__",
    "discounted_returns",
    "full_kl",
    "fused_linear_loss",
    "fused_linear_policy_loss",
    "fused_policy_loss",
    "gae",
    "gather_parameter",
    "generalized_jsd",
    "group_advantages",
    "importance_ratio",
    "importance_weights",
    "kl_penalty",
    "linear_full_kl",
    "linear_generalized_jsd",
    "linear_token_logprobs",
    "policy_loss",
    "preference_loss",
    "process_advantages",
    "ranking_loss",
    "register_surrogate",
    "shaped_rewards",
    "td_lambda",
    "token_logprobs",
    "value_loss",
    "vtrace",
    "whiten",
]
