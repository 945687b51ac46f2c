"""The calls whose kernels ``bench.compile`` compiles and ``bench.guard`` guards: every kernel, in every variant that differs in more than numbers.

The rows are few, and the vocabulary is a real one, since block sizes follow from it. A call names what it does; add one for each new kernel, dtype
or option that changes the types of what a launcher passes, with tensors of which every part counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import rlkern as rk
from examples import own_surrogate
from rlkern.ops.divergence import Comparison
from rlkern.surrogates import SURROGATES

ROWS = (2, 3)
VOCABULARY = 128256
BACKEND = "triton"  # this and the vocabulary are read at the call; the guard takes others
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _logits(dtype: torch.dtype = torch.bfloat16, *, vocabulary: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(*ROWS, vocabulary or VOCABULARY, dtype=dtype, requires_grad=True), torch.zeros(ROWS, dtype=torch.int64)


def _token_logprobs(dtype: torch.dtype = torch.bfloat16, *, vocabulary: int | None = None, ids: torch.dtype = torch.int64, **options: Any) -> None:
    logits, tokens = _logits(dtype, vocabulary=vocabulary)
    results = rk.token_logprobs(logits, tokens.to(ids), backend=BACKEND, **options)
    sum(r.sum() for r in results).backward() if isinstance(results, tuple) else results.sum().backward()


def _fused_policy_loss(config: rk.PolicyLossConfig, dtype: torch.dtype = torch.bfloat16, *, vocabulary: int | None = None, **options: Any) -> None:
    logits, tokens = _logits(dtype, vocabulary=vocabulary)
    rk.fused_policy_loss(logits, tokens, torch.zeros(ROWS), torch.ones(ROWS), config=config, backend=BACKEND, **options).loss.backward()


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
        backend=BACKEND,
    ).loss.backward()


def _value_loss(*, packed: bool = False, dtype: torch.dtype = torch.float32, clip_range: float | None = 0.2, **options: Any) -> None:
    shape = (96,) if packed else ROWS
    values, old, returns = (torch.zeros(shape, dtype=dtype) for _ in range(3))
    rk.value_loss(
        values.requires_grad_(),
        old,
        returns,
        mask=torch.ones(shape, dtype=torch.bool),
        clip_range=clip_range,
        cu_seqlens=torch.tensor([0, 32, 96], dtype=torch.int32) if packed else None,
        backend=BACKEND,
        **options,
    ).loss.backward()


def _divergence(
    beta: float, dtype: torch.dtype = torch.bfloat16, ref_dtype: torch.dtype = torch.bfloat16, *, vocabulary: int | None = None, **options: Any
) -> None:
    """KL for beta 1, reverse KL for 0, JSD between."""
    logits, _ = _logits(dtype, vocabulary=vocabulary)
    rk.generalized_jsd(logits, torch.zeros(logits.shape, dtype=ref_dtype), beta=beta, backend=BACKEND, **options).sum().backward()


def _divergence_of_a_part(beta: float) -> None:
    """What a rank does for its part of the vocabulary, between two collectives."""
    logits = _logits()[0].detach()
    comparison = Comparison(None, None, 1.0, None, beta, BACKEND)
    states = comparison.states(logits, logits)
    if comparison.kind == "jsd":
        comparison.terms(logits, logits, states)


def _gae(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    rk.gae(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), gamma=0.99, lam=0.95, backend=BACKEND, **options)


def _vtrace(*shape: int, masked: str, dtype: torch.dtype = torch.float32) -> None:
    """With every input there is."""
    rewards, values, logprobs, old, following = (torch.zeros(shape, dtype=dtype) for _ in range(5))
    terminated, truncated = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    rk.vtrace(
        rewards,
        values,
        logprobs,
        old,
        gamma=torch.ones(shape[0]),
        mask=torch.ones(shape, dtype=torch.bool),
        masked=masked,
        last_values=values[:, 0],
        next_values=following,
        terminated=terminated,
        truncated=truncated,
        backend=BACKEND,
    )


LAUNCHES: dict[str, Callable[[], Any]] = {
    **{f"token_logprobs {name}": partial(_token_logprobs, dtype) for name, dtype in DTYPES.items()},
    **{f"token_logprobs {name}, entropy": partial(_token_logprobs, dtype, with_entropy=True) for name, dtype in DTYPES.items()},
    "token_logprobs mask, temperatures, soft-cap": partial(
        _token_logprobs, mask=torch.ones(ROWS, dtype=torch.bool), temperature=torch.ones(ROWS), softcap=30.0, with_entropy=True
    ),
    "token_logprobs small odd vocabulary, int32 ids": partial(_token_logprobs, vocabulary=1009, ids=torch.int32, with_entropy=True),
    "token_logprobs in place": partial(_token_logprobs, inplace_backward=True),
    "token_logprobs of kept tokens": partial(_token_logprobs, keep=rk.KeptTokens(torch.arange(0, 14, 2), torch.arange(12))),
    "token_logprobs of kept tokens, int32": partial(
        _token_logprobs, torch.float32, keep=rk.KeptTokens(torch.arange(0, 14, 2, dtype=torch.int32), torch.arange(12, dtype=torch.int32))
    ),
    **{f"fused_policy_loss {name}": partial(_fused_policy_loss, rk.PolicyLossConfig.ppo(), dtype) for name, dtype in DTYPES.items()},
    "fused_policy_loss with every input": partial(
        _fused_policy_loss,
        rk.PolicyLossConfig.dppo(kl_coef=0.1, kl_ratio_weighted="sampling", entropy_coef=0.1),
        mask=torch.ones(ROWS, dtype=torch.bool),
        temperature=torch.ones(ROWS),
        softcap=30.0,
        ref_logprobs=torch.zeros(ROWS),
        importance_weights=torch.ones(ROWS),
        sampling_logprobs=torch.zeros(ROWS),
        entropy_mask=torch.ones(ROWS, dtype=torch.bool),
        inplace=True,
    ),
    "fused_policy_loss small odd vocabulary": partial(_fused_policy_loss, rk.PolicyLossConfig.cispo(), vocabulary=1009, with_entropy=False),
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
    **{f"policy_loss by {surrogate}": partial(_policy_loss, rk.PolicyLossConfig(surrogate=surrogate)) for surrogate in SURROGATES},
    "policy_loss by a user's own surrogate": partial(_policy_loss, own_surrogate.CONFIG),
    "fused_policy_loss by a user's own surrogate": partial(_fused_policy_loss, own_surrogate.CONFIG),
    "value_loss": partial(_value_loss),
    "value_loss of bf16, without a clip": partial(_value_loss, dtype=torch.bfloat16, clip_range=None),
    "value_loss of packed sequences": partial(_value_loss, packed=True, aggregation="seq-mean-token-mean", normalizer=5),
    **{f"full_kl {name}": partial(_divergence, 1.0, dtype, dtype) for name, dtype in DTYPES.items()},
    **{f"full_kl in reverse, {name}": partial(_divergence, 0.0, dtype, dtype) for name, dtype in DTYPES.items()},
    **{f"generalized_jsd {name}": partial(_divergence, 0.5, dtype, dtype) for name, dtype in DTYPES.items()},
    **{
        f"generalized_jsd with every input, beta {beta}": partial(
            _divergence, beta, ref_dtype=torch.float32, mask=torch.ones(ROWS, dtype=torch.bool), temperature=torch.ones(ROWS), softcap=30.0
        )
        for beta in (0.0, 0.5, 1.0)
    },
    **{f"{name} of a part": partial(_divergence_of_a_part, beta) for name, beta in (("full_kl", 1.0), ("generalized_jsd", 0.5))},
    "generalized_jsd small odd vocabulary": partial(_divergence, 0.5, vocabulary=1009),
    **{f"gae of {steps} steps": partial(_gae, 8, steps) for steps in (16, 512, 8192)},
    "gae of bf16": partial(_gae, 8, 512, dtype=torch.bfloat16),
    "gae of float64, packed": partial(_gae, 4096, dtype=torch.float64, cu_seqlens=torch.tensor([0, 1000, 4096])),
    "gae of few long rows": partial(_gae, 4, 131072),
    "gae truncated, of a length that is no multiple": partial(_gae, 8, 1001, truncated=torch.zeros(8, 1001, dtype=torch.bool)),
    "gae whitened": partial(_gae, 8, 512, whitened=True, mask=torch.ones(8, 512, dtype=torch.bool)),
    "gae of few long rows, whitened": partial(_gae, 4, 131072, whitened=True),
    "discounted_returns": lambda: rk.discounted_returns(torch.zeros(8, 512), gamma=0.99, backend=BACKEND),
    "vtrace, masked steps skipped": partial(_vtrace, 8, 2048, masked="skip"),
    "vtrace, masked steps decay": partial(_vtrace, 8, 2048, masked="decay"),
    "vtrace of float64": partial(_vtrace, 8, 2048, masked="skip", dtype=torch.float64),
}

# Variants that differ from their neighbours by a dtype of the same size, a bound or a number: `--thin` compiles them for one target alone.
VARIATIONS = [
    name
    for name in LAUNCHES
    if any(part in name for part in ("fp16", "int32", "odd", "reverse", "beta", "no multiple", "decay", "geometric", "loss by"))
]
