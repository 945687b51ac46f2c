"""The PyTorch backend: what :class:`rlkern.ops.backends.Backend` asks for."""

from .divergence import divergence, divergence_gradient, divergence_states, divergence_terms
from .logits import gradient, policy_gradients, restrict, scale, states, statistics
from .policy import policy_loss, token_slopes
from .scan import lambda_returns, normalise
from .value import value_loss

__all__ = [
    "divergence",
    "divergence_gradient",
    "divergence_states",
    "divergence_terms",
    "gradient",
    "lambda_returns",
    "normalise",
    "policy_gradients",
    "policy_loss",
    "restrict",
    "scale",
    "states",
    "statistics",
    "token_slopes",
    "value_loss",
]
