"""The policy loss on tokens: loss, gradients and metrics in one forward; the backward only scales. The work is the backends'."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import state_dtype
from ..config import INF, PolicyLossConfig, bounds
from .backends import backend_of
from .operators import fake_of, operator, split

METRICS = (
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "dual_clip_fraction",
    "approx_kl",
    "kl",
    "entropy",
    "ratio_mean",
    "ratio_max",
    "outside_support",
)


class Tokens(NamedTuple):
    """The tensors of a policy loss."""

    logprobs: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor | None
    ref_logprobs: Tensor | None
    entropy: Tensor | None
    importance_weights: Tensor | None
    sampling_logprobs: Tensor | None
    entropy_mask: Tensor | None
    normalizer: Tensor | None
    cu_seqlens: Tensor | None


def needs_statistics(config: PolicyLossConfig) -> bool:
    """Whether a token's loss depends on its sequence, be it by the sequence's length alone."""
    return (
        bool(config.parts.summand)
        or config.ratio_level != "token"
        or config.off_policy_threshold is not None
        or "seq-mean-token-mean" in (config.aggregation, config.own_entropy_aggregation)
    )


class Options(NamedTuple):
    """The numbers of a :class:`PolicyLossConfig` as the terms read them: an option that is absent is neutral."""

    low: float  # of the ratio (clip, cispo), its logarithm (gmpo), p - p_old (dppo_tv), minus the divergence (dppo_kl); -clip_low for users' own
    high: float
    ratio_cap: float
    dual_clip: float
    tau_pos: float
    tau_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    log_ratio_low: float
    log_ratio_high: float
    off_policy_threshold: float
    kl_coef: float
    kl_input_low: float
    kl_input_high: float
    kl_output_low: float
    kl_output_high: float
    entropy_coef: float
    max_length: float

    @classmethod
    def of(cls, config: PolicyLossConfig, time: int) -> Options:
        """``time``: the length of the time dimension, which stands for ``max_length`` where that is None."""

        def or_infinite(x: float | None) -> float:
            return INF if x is None else x

        center = config.parts.center
        low, high = center - or_infinite(config.clip_low), center + or_infinite(config.clip_high)
        if config.surrogate == "cispo" and config.cispo_cap is not None:
            low, high = -INF, config.cispo_cap
        return cls(
            low,
            high,
            or_infinite(config.ratio_cap),
            or_infinite(config.dual_clip),
            config.tau_pos,
            config.tau_neg,
            config.vespo_k_pos,
            config.vespo_lambda_pos,
            config.vespo_k_neg,
            config.vespo_lambda_neg,
            *bounds(config.log_ratio_clamp),
            or_infinite(config.off_policy_threshold),
            config.kl_coef,
            *bounds(config.kl_input_clamp),
            *bounds(config.kl_output_clamp),
            config.entropy_coef,
            float(time if config.max_length is None else config.max_length),
        )


class Wanted(NamedTuple):
    """Which results of a policy loss are wanted beside the loss: the gradients with respect to log-probs and entropy, and the metrics."""

    grad_logprobs: bool
    grad_entropy: bool
    metrics: bool


class PolicyResults(NamedTuple):
    """``numbers``: the factors by which the gradients with respect to log-probs and to entropy, undivided, are to be multiplied; then the metrics, if
    these are wanted. A gradient is empty where it is not wanted."""

    loss: Tensor
    numbers: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor

    @classmethod
    def empty(cls, logprobs: Tensor, wanted: Wanted) -> PolicyResults:
        """Unfilled."""
        shapes = ((), (2 + len(METRICS),), *(logprobs.shape if there else (0,) for there in wanted[:2]))
        dtype = state_dtype(logprobs.dtype)
        return cls(*(torch.empty(shape, dtype=dtype, device=logprobs.device) for shape in shapes))


# ---- operator and autograd ------------------------------------------------------------------------------------------------------------------


@operator("policy_loss")
def policy_loss_op(tokens: Tokens, config: PolicyLossConfig, wanted: Wanted, backend: str) -> PolicyResults:
    """Loss, metrics, and the gradients that are wanted."""
    out = PolicyResults.empty(tokens.logprobs, wanted)
    if tokens.logprobs.numel() == 0:
        out.loss.zero_()
        out.numbers.zero_()
        return out
    if tokens.cu_seqlens is not None:  # tokens beyond the last sequence belong to no program
        out.grad_logprobs.zero_()
        out.grad_entropy.zero_()
    backend_of(backend).policy_loss(tokens, config, wanted, out)
    return out


@fake_of(policy_loss_op)
def _(tokens: Tokens, config: PolicyLossConfig, wanted: Wanted, backend: str) -> PolicyResults:
    return PolicyResults.empty(tokens.logprobs, wanted)


_DIFFERENTIABLE = [Tokens._fields.index(name) for name in ("logprobs", "entropy")]


class PolicyLoss(torch.autograd.Function):
    """(loss, numbers), differentiable in log-probs and entropy. ``apply(*tokens, config, with_metrics, backend)``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        tokens, config, with_metrics, backend = split(arguments, Tokens)
        takes = dict(zip(Tokens._fields, ctx.needs_input_grad, strict=False))
        out = policy_loss_op(tokens, config, Wanted(takes["logprobs"], takes["entropy"], with_metrics), backend)
        ctx.save_for_backward(out.numbers, out.grad_logprobs, out.grad_entropy)
        ctx.dtypes = tokens.logprobs.dtype, None if tokens.entropy is None else tokens.entropy.dtype
        ctx.mark_non_differentiable(out.numbers)
        return out.loss, out.numbers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        numbers, grad_logprobs, grad_entropy = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, (index, gradient, dtype) in enumerate(zip(_DIFFERENTIABLE, (grad_logprobs, grad_entropy), ctx.dtypes, strict=True)):
            if ctx.needs_input_grad[index]:
                grads[index] = (gradient * (grad_loss * numbers[i])).to(dtype)
        return tuple(grads)


def policy_loss(x: Tokens, config: PolicyLossConfig, with_metrics: bool, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics, none unless wanted); differentiable in ``x.logprobs`` and ``x.entropy``. Arguments are checked by the caller."""
    # Detached, the constants are also distinct tensors where one serves twice (old as sampling log-probs), which torch.compile insists on.
    constants = {name: t.detach() for name, t in x._asdict().items() if t is not None and name not in ("logprobs", "entropy")}
    loss, numbers = PolicyLoss.apply(*x._replace(**constants), config, with_metrics, backend)
    return loss, dict(zip(METRICS, numbers[2:].unbind(), strict=True)) if with_metrics else {}
