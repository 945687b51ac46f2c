"""Losses on tokens (the policy loss, its importance ratio, importance weights and KL penalty, the value loss), and the losses of a reward model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import choose_backend
from ._checks import FLOATS, INTS, check_choice, check_number, check_tensor, state_dtype
from ._token_inputs import as_normalizer, check_aggregation, check_sequences, check_tokens
from .config import KL_ESTIMATORS, RATIO_LEVELS, Clamp, PolicyLossConfig, bounds, check_clamp
from .ops import ratio
from .ops.policy import Tokens
from .ops.policy import policy_loss as policy_loss_on_tokens
from .ops.value import ValueOptions, Values
from .ops.value import value_loss as value_loss_on_tokens
from .surrogates import check_backend


class LossOutput(NamedTuple):
    """The result of a loss: ``loss`` (0-dim, differentiable), ``metrics`` (detached 0-dim tensors), ``logprobs`` and ``entropy`` (detached)."""

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor | None
    entropy: Tensor | None


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    importance_weights: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: PolicyLossConfig = PolicyLossConfig(),  # noqa: B008  (frozen)
    with_metrics: bool = True,
    validate: bool | None = None,
    backend: str | None = None,
) -> LossOutput:
    """The policy objective that ``config`` names, on tokens: loss, gradients and metrics in one launch.

        loss = sum_i a_i (off_policy_i entropy_mask_i w_i surrogate_i + kl_coef KL_i) - entropy_coef sum_i a'_i entropy_i

    with the aggregation as a weight vector a. Gradients flow to ``logprobs`` and ``entropy`` only; a second derivative is an error.

    Args:
        logprobs: log-probs of the policy (nats), shape S: ``[batch, time]`` (any leading dimensions; the last is time), or ``[tokens]``.
        old_logprobs: log-probs of the behaviour policy, which sampled the tokens, shape S. None: on-policy, the ratio is 1 and has a gradient.
        advantages: shape S, or one for each sequence: ``[batch]`` or ``[batch, 1]`` for ``[batch, time]``, ``[sequences]`` with ``cu_seqlens``. For
            ``[batch, time]`` a 1-D tensor is always one for each sequence; with ``cu_seqlens`` and as many tokens as sequences it is one for each
            token.
        mask: shape S, any dtype; non-zero counts. Masked positions are never read, in any input.
        ref_logprobs: log-probs of the reference policy, shape S; needed where ``config.kl_coef`` is not 0.
        entropy: entropies of the policy (nats), shape S; needed where ``config.entropy_coef`` is not 0.
        importance_weights: w, constants: shape S, one for each sequence, or any shape that broadcasts to S.
        sampling_logprobs: log-probs under the sampler (inference engine), shape S; for the off-policy mask and ``kl_ratio_weighted="sampling"``.
        entropy_mask: shape S; a token with 0 has no surrogate, but keeps its KL.
        normalizer: number or 0-dim tensor: the global count of tokens or sequences to divide by (see ``aggregation``), instead of the local one.
            With it the losses of micro-batches or ranks add up to exactly the loss of the whole.
        cu_seqlens: ``[sequences + 1]``, int32 or int64: the packed sequences of ``[tokens]``; empty ones are allowed.
        config: see :class:`PolicyLossConfig`.
        with_metrics: False leaves ``metrics`` empty; on a CPU the metrics take a third of the time of a small call.
        validate: also check the values of ``cu_seqlens`` (synchronises a GPU); by default on the CPU.
        backend: "triton" or "torch"; by default the former on a GPU.

    Returns:
        LossOutput. The loss is float32 (float64 for float64 log-probs), 0 for an empty batch. Metrics are means over the mask: clip_fraction, and its
        parts clip_fraction_low (A < 0, below the bound) and clip_fraction_high (A > 0, above it); dual_clip_fraction; approx_kl (old - lp); kl (as it
        enters the loss, before its coefficient; 0 without ``ref_logprobs``); entropy (0 if not given); ratio_mean. Besides these, ratio_max is the
        largest ratio; ratios are those of ``config.ratio_level``. outside_support is the number of tokens with log-prob -inf, which a replayed
        sampler's support (``keep``) excludes; they count as masked.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or option, or for a missing input that the configuration needs.
    """
    given = Tokens(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        importance_weights=importance_weights,
        sampling_logprobs=sampling_logprobs,
        entropy_mask=entropy_mask,
        normalizer=normalizer,  # type: ignore[arg-type]  # made a tensor by the check
        cu_seqlens=cu_seqlens,
    )
    tokens = check_tokens(given, config, validate)
    backend = choose_backend(backend, logprobs)
    check_backend(config.surrogate, backend)
    loss, metrics = policy_loss_on_tokens(tokens, config, with_metrics, backend)
    return LossOutput(loss, metrics, logprobs.detach(), None if entropy is None else entropy.detach())


def importance_ratio(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    *,
    mask: Tensor | None = None,
    level: str = "token",
    log_ratio_clamp: Clamp = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The importance ratio r = exp(log r), of shape S, float32 (float64 for float64 log-probs); 0 at masked positions.

    With level "token", log r = lp - old. With "sequence" it is the mean of that over the valid tokens of the sequence (GSPO), with "sequence_token"
    the value of the mean with the gradient of the token (GSPO-token), and with "sequence_sum" the sum (RLOO). With ``old_logprobs=None`` r is 1 and
    has a gradient. ``log_ratio_clamp`` is a number x for [-x, x], or a pair (low, high) with None for no bound. Differentiable in ``logprobs``.
    Shapes as in :func:`policy_loss`.
    """
    check_tensor("logprobs", logprobs, dtypes=FLOATS, min_dim=1)
    if old_logprobs is not None:
        check_tensor("old_logprobs", old_logprobs, shape=logprobs.shape, dtypes=FLOATS, device=logprobs.device)
    if mask is not None:
        check_tensor("mask", mask, shape=logprobs.shape, device=logprobs.device)
    check_choice("level", level, RATIO_LEVELS)
    check_sequences(logprobs, cu_seqlens, None, None if level == "token" else f"level {level!r}")
    limits = check_clamp("log_ratio_clamp", log_ratio_clamp)
    return ratio.importance_ratio(logprobs, old_logprobs, mask, level, bounds(limits), cu_seqlens)


def importance_weights(
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    level: str = "token",
    low: float | None = None,
    high: float | None = None,
    outside: str = "clamp",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Weights w = exp(old - sampling) that correct for a sampler which differs from the trained model: shape S, not differentiable, 0 if masked.

    With level "token" each token has its own weight; with "sequence" each token has the product of the weights of its sequence. A weight outside
    [low, high] is moved to the nearer bound with "clamp" (truncated importance sampling), and set to 0 with "zero" (masked importance sampling).
    float32 (float64 for float64).
    """
    check_tensor("old_logprobs", old_logprobs, dtypes=FLOATS, min_dim=1)
    check_tensor("sampling_logprobs", sampling_logprobs, shape=old_logprobs.shape, dtypes=FLOATS, device=old_logprobs.device)
    if mask is not None:
        check_tensor("mask", mask, shape=old_logprobs.shape, device=old_logprobs.device)
    check_choice("level", level, ("token", "sequence"))
    check_choice("outside", outside, ("clamp", "zero"))
    for name, x in (("low", low), ("high", high)):
        if x is not None:
            check_number(name, x, at_least=0)
    if low is not None and high is not None and low > high:
        raise ValueError(f"low must be at most high, got {low} and {high}")
    check_sequences(old_logprobs, cu_seqlens, None, None if level == "token" else f"level {level!r}")
    limits = bounds((low, high))
    return ratio.importance_weights(old_logprobs, sampling_logprobs, mask, level == "sequence", limits, outside == "zero", cu_seqlens)


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: str = "k3",
    *,
    mask: Tensor | None = None,
    input_clamp: Clamp = None,
    output_clamp: Clamp = None,
) -> Tensor:
    """Per-token estimate of D(policy || reference) in nats from the log-probs of the sampled tokens: shape S, float32 (float64 for float64).

    With d = ref - lp: "k1" -d, "abs" |d|, "k2" d^2 / 2, "k3" expm1(d) - d (http://joschu.net/blog/kl-approx.html); "k1+", "abs+" and "k3+" have
    that value and the gradient of k2. ``input_clamp`` acts on d, ``output_clamp`` on the estimate (a number x for [-x, x], or a pair with None for no
    bound); the gradient is 0 where a clamp acts. Masked positions are not read, and the result is 0 there. Differentiable in ``logprobs``.
    """
    check_tensor("logprobs", logprobs, dtypes=FLOATS)
    check_tensor("ref_logprobs", ref_logprobs, shape=logprobs.shape, dtypes=FLOATS, device=logprobs.device)
    if mask is not None:
        check_tensor("mask", mask, shape=logprobs.shape, device=logprobs.device)
    check_choice("estimator", estimator, KL_ESTIMATORS)
    limits = bounds(check_clamp("input_clamp", input_clamp)), bounds(check_clamp("output_clamp", output_clamp))
    return ratio.kl_penalty(logprobs, ref_logprobs, estimator, mask, *limits)


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    mask: Tensor | None = None,
    clip_range: float | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    max_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    with_metrics: bool = True,
    validate: bool | None = None,
    backend: str | None = None,
) -> LossOutput:
    """The critic's loss of PPO on tokens: loss, gradient and metrics in one launch::

        loss = 0.5 sum_i a_i max((v_i - R_i)^2, (clamp(v_i, v_old_i - c, v_old_i + c) - R_i)^2)

    with the aggregation as a weight vector a. The clip keeps v near v_old (Engstrom et al. 2020, arXiv:2005.12729, appendix A). The gradient
    flows to ``values`` only; a second derivative is an error.

    Args:
        values: v, shape S: ``[batch, time]`` (any leading dimensions; the last is time), or ``[tokens]``.
        old_values: v_old, the critic's values that the advantages were made from, shape S; read only with ``clip_range``, otherwise it may be None.
        returns: R, shape S, a constant.
        mask: shape S, any dtype; non-zero counts. Masked positions are never read, in any input.
        clip_range: c, a positive number; None: no clip.
        aggregation, normalizer, max_length: as in :class:`PolicyLossConfig` and :func:`policy_loss`.
        cu_seqlens: ``[sequences + 1]``, int32 or int64: the packed sequences of ``[tokens]``.
        with_metrics: as in :func:`policy_loss`.
        validate: also check the values of ``cu_seqlens`` (synchronises a GPU); by default on the CPU.
        backend: "triton" or "torch"; by default the former on a GPU.

    Returns:
        LossOutput without log-probs and entropy. The loss is float32 (float64 for float64 values), 0 for an empty batch. Metrics are over the mask:
        clip_fraction (where the clipped error is the larger), error (mean of (v - R)^2), value_mean, return_mean, and explained_variance
        (1 - Var(R - v) / Var(R); 0 where the returns are all the same).

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or option.
    """
    check_tensor("values", values, dtypes=FLOATS, min_dim=1)
    check_tensor("returns", returns, shape=values.shape, dtypes=FLOATS, device=values.device)
    if old_values is not None:
        check_tensor("old_values", old_values, shape=values.shape, dtypes=FLOATS, device=values.device)
    if mask is not None:
        check_tensor("mask", mask, shape=values.shape, device=values.device)
    if clip_range is not None:
        check_number("clip_range", clip_range, above=0)
        if old_values is None:
            raise ValueError(f"old_values is needed with clip_range={clip_range}, got None")
    check_sequences(values, cu_seqlens, validate, check_aggregation(aggregation, max_length, cu_seqlens))
    x = Values(values, None if clip_range is None else old_values, returns, mask, as_normalizer(normalizer, values), cu_seqlens)
    longest = float(values.shape[-1] if max_length is None else max_length)
    loss, metrics = value_loss_on_tokens(x, ValueOptions(clip_range or 0.0, aggregation, longest, with_metrics), choose_backend(backend, values))
    return LossOutput(loss, metrics, None, None)


def preference_loss(chosen: Tensor, rejected: Tensor, *, margin: float | Tensor | None = None) -> LossOutput:
    """The loss of a reward model on pairs (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155), averaged over the pairs::

        -log sigmoid(r_chosen - r_rejected - margin)

    Args:
        chosen, rejected: scores of the better and of the worse answer, of one shape, any floating dtype. Differentiable in both.
        margin: the difference by which the better answer should win: a number, or a constant of that shape (Llama 2, arXiv:2307.09288). None: 0.

    Returns:
        LossOutput without log-probs and entropy. The loss is float32 (float64 for float64), 0 for no pairs. Metrics: accuracy (share of pairs with
        chosen > rejected) and margin (mean of chosen - rejected).

    Raises:
        TypeError, ValueError: for a wrong dtype, shape or device.
    """
    check_tensor("chosen", chosen, dtypes=FLOATS)
    check_tensor("rejected", rejected, shape=chosen.shape, dtypes=FLOATS, device=chosen.device)
    if isinstance(margin, Tensor):
        check_tensor("margin", margin, shape=chosen.shape, dtypes=(*FLOATS, *INTS), device=chosen.device)
    elif margin is not None:
        check_number("margin", margin)
    dtype = state_dtype(chosen.dtype)
    won = chosen.to(dtype) - rejected.to(dtype)
    return _preferences(won, torch.ones_like(won) / max(won.numel(), 1), margin)


def ranking_loss(scores: Tensor, *, mask: Tensor | None = None, margin: float | None = None) -> LossOutput:
    """The K-wise form of :func:`preference_loss` for answers that were ranked (Ouyang et al. 2022, eq. 1): the mean over all K(K-1)/2 pairs of a
    question, averaged over the questions.

    Args:
        scores: ``[..., K]``, the scores of the K answers to a question, best first; any floating dtype, differentiable.
        mask: of that shape, any dtype; zero for a missing answer, for questions with fewer than K. Such scores are not read. A question with
            fewer than two answers has no pair and does not count.
        margin: a number, the difference by which the better answer of a pair should win. None: 0.

    Returns:
        As :func:`preference_loss`; accuracy and margin are averaged over pairs and questions in the same way.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape or device.
    """
    check_tensor("scores", scores, dtypes=FLOATS, min_dim=1)
    if mask is not None:
        check_tensor("mask", mask, shape=scores.shape, device=scores.device)
    if margin is not None:
        check_number("margin", margin)
    valid = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask != 0
    s = torch.where(valid, scores.to(state_dtype(scores.dtype)), 0.0)
    better, worse = torch.triu_indices(s.shape[-1], s.shape[-1], 1, device=s.device)
    pairs = (valid[..., better] & valid[..., worse]).to(s.dtype)
    pairs_of_question = pairs.sum(-1, keepdim=True)
    questions = (pairs_of_question > 0).sum().clamp(min=1)
    return _preferences(s[..., better] - s[..., worse], pairs / pairs_of_question.clamp(min=1) / questions, margin)


def _preferences(won: Tensor, weights: Tensor, margin: float | Tensor | None) -> LossOutput:
    """By how much the better answers won, and what each pair counts. A few thousand numbers at most: plain PyTorch on every device."""
    target = margin.detach() if isinstance(margin, Tensor) else margin or 0.0
    loss = -(weights * torch.nn.functional.logsigmoid(won - target)).sum()
    metrics = {"accuracy": (weights * (won > 0)).sum(), "margin": (weights * won.detach()).sum()}
    return LossOutput(loss, metrics, None, None)
