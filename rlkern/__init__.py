"""rlkern: fused GPU kernels for reinforcement-learning post-training of language models, as plain functions on tensors."""

from .config import PolicyLossConfig
from .logprobs import token_logprobs
from .losses import LossOutput, importance_ratio, importance_weights, kl_penalty, policy_loss

__version__ = "0.1.0"

__all__ = [
    "LossOutput",
    "PolicyLossConfig",
    "__version__",
    "importance_ratio",
    "importance_weights",
    "kl_penalty",
    "policy_loss",
    "token_logprobs",
]
