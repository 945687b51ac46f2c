"""rlkern: fused GPU kernels for reinforcement-learning post-training of language models, as plain functions on tensors."""

__version__ = "0.1.0"

__all__ = ["__version__"]
