"""Launcher of ``kernels/tokens.py``: the policy loss on tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._backend import device_of
from ...config import KL_ESTIMATORS, PolicyLossConfig
from ...kernels import kl, policy, tokens
from ...surrogates import own_surrogate
from ..fused import PolicyRows
from ..policy import Options, PolicyResults, Tokens, Wanted, needs_statistics, policy_loss_op
from ..sequences import one_a_sequence
from .launch import compiled
from .layout import WARPS, Layout


def term_functions(config: PolicyLossConfig) -> dict[str, Any]:
    """The functions of ``kernels/policy.py`` and ``kernels/kl.py``, or the user's, that a kernel is specialised to."""
    own = own_surrogate(config.surrogate)
    return {
        "TERM": getattr(policy, config.parts.term) if own is None else own.on("triton"),
        "ESTIMATOR": getattr(kl, KL_ESTIMATORS[config.kl_estimator]),
        "KL_WEIGHT": {"False": "none", "True": "ratio"}.get(str(config.kl_ratio_weighted), config.kl_ratio_weighted),
    }


def policy_loss(x: Tokens, config: PolicyLossConfig, wanted: Wanted, out: PolicyResults) -> None:
    """Fill ``out`` in one launch, which makes the metrics whether they are wanted or not."""
    by_sequence = config.needs_sequences or (
        x.cu_seqlens is not None and any(t is not None and t.shape == (x.cu_seqlens.shape[0] - 1,) for t in (x.advantages, x.importance_weights))
    )
    layout = Layout.of(x.logprobs, x.cu_seqlens if by_sequence else None, whole_sequences=config.needs_sequences)
    parts = config.parts
    with device_of(x.logprobs):
        tokens.policy_kernel[(layout.programs,)](
            *(layout.rows(t) for t in x[:9]),
            *(layout.rows(t if t.numel() else None) for t in (out.grad_logprobs, out.grad_entropy)),
            x.normalizer,
            layout.cu_seqlens,
            torch.empty(tokens.PARTIALS.value * layout.programs, dtype=out.numbers.dtype, device=out.numbers.device),
            torch.zeros((), dtype=torch.int32, device=out.numbers.device),
            out.loss,
            out.numbers,
            layout.time,
            layout.tiles,
            layout.tile,
            Options.of(config, layout.time),
            **term_functions(config),
            EDGES=getattr(policy, parts.edges),
            SUMMAND=getattr(policy, parts.summand) if parts.summand else None,
            LEVEL=config.ratio_level,
            AGGREGATION=config.aggregation,
            ENTROPY_AGGREGATION=config.own_entropy_aggregation or "",
            OFF_POLICY=config.off_policy_threshold is not None,
            STATISTICS=needs_statistics(config),
            REDUCTION=parts.reduction,
            ONE_WEIGHT=x.importance_weights is not None and one_a_sequence(x.importance_weights, x.logprobs, x.cu_seqlens),
            BLOCK=layout.block,
            **compiled(WARPS),
        )


def token_slopes(logprobs: Tensor, live: Tensor, terms: PolicyRows, config: PolicyLossConfig) -> Tensor:
    """By the kernel of the loss, of which no other result is wanted."""
    return policy_loss_op(terms.tokens(logprobs, live), config, Wanted(True, False, False), "triton").grad_logprobs
