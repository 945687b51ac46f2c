"""rlkern: fused GPU kernels for reinforcement-learning post-training of language models, as plain functions on tensors."""

from .logprobs import token_logprobs

__version__ = "0.1.0"

__all__ = ["__version__", "token_logprobs"]
