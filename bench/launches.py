"""The calls whose kernels ``bench.compile`` compiles: every kernel, in every variant that differs in more than numbers.

Nothing runs: the rows are few, and the vocabulary is a real one, since block sizes follow from it. A call names what it does; add one for each
new kernel, dtype or option that changes the types of what a launcher passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import rlkern as rk

ROWS = (2, 3)
VOCABULARY = 128256
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _logits(dtype: torch.dtype = torch.bfloat16, *, vocabulary: int = VOCABULARY) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(*ROWS, vocabulary, dtype=dtype, requires_grad=True), torch.zeros(ROWS, dtype=torch.int64)


def _token_logprobs(dtype: torch.dtype = torch.bfloat16, *, vocabulary: int = VOCABULARY, ids: torch.dtype = torch.int64, **options: Any) -> None:
    logits, tokens = _logits(dtype, vocabulary=vocabulary)
    results = rk.token_logprobs(logits, tokens.to(ids), backend="triton", **options)
    sum(r.sum() for r in results).backward() if isinstance(results, tuple) else results.sum().backward()


def _policy_loss(config: rk.PolicyLossConfig, *, packed: bool = False, dtype: torch.dtype = torch.float32) -> None:
    """With every input there is, so that nothing is left out of what is compiled."""
    shape = (96,) if packed else ROWS
    per_token = [torch.zeros(shape, dtype=dtype) for _ in range(7)]
    logprobs, old, ref, entropy, weights, sampling, advantages = per_token
    rk.policy_loss(
        logprobs.requires_grad_(),
        old,
        advantages,
        mask=torch.ones(shape, dtype=torch.bool),
        ref_logprobs=ref,
        entropy=entropy.requires_grad_(),
        importance_weights=weights,
        sampling_logprobs=sampling,
        entropy_mask=torch.ones(shape, dtype=torch.bool),
        normalizer=5,
        cu_seqlens=torch.tensor([0, 32, 96], dtype=torch.int32) if packed else None,
        config=config,
        backend="triton",
    ).loss.backward()


LAUNCHES: dict[str, Callable[[], Any]] = {
    **{f"token_logprobs {name}": partial(_token_logprobs, dtype) for name, dtype in DTYPES.items()},
    **{f"token_logprobs {name}, entropy": partial(_token_logprobs, dtype, with_entropy=True) for name, dtype in DTYPES.items()},
    "token_logprobs mask, temperatures, soft-cap": partial(
        _token_logprobs, mask=torch.ones(ROWS, dtype=torch.bool), temperature=torch.ones(ROWS), softcap=30.0, with_entropy=True
    ),
    "token_logprobs small odd vocabulary, int32 ids": partial(_token_logprobs, vocabulary=1009, ids=torch.int32, with_entropy=True),
    "token_logprobs in place": partial(_token_logprobs, inplace_backward=True),
    "policy_loss of tokens": partial(_policy_loss, rk.PolicyLossConfig.ppo(dual_clip=3.0, kl_coef=0.1, entropy_coef=0.1)),
    "policy_loss of tokens, bf16": partial(_policy_loss, rk.PolicyLossConfig.dppo(surrogate="dppo_kl"), dtype=torch.bfloat16),
    "policy_loss of packed sequences": partial(
        _policy_loss,
        rk.PolicyLossConfig.gspo(
            kl_coef=0.1, kl_ratio_weighted=True, off_policy_threshold=0.1, entropy_coef=0.1, entropy_aggregation="seq-mean-token-mean"
        ),
        packed=True,
    ),
    "policy_loss of geometric means": partial(_policy_loss, rk.PolicyLossConfig.gmpo(kl_coef=0.1, kl_ratio_weighted=True)),
    "policy_loss by VESPO": partial(_policy_loss, rk.PolicyLossConfig.vespo()),
}
