"""Policy losses fused with the log-probs that they read: from logits, or from hidden states and the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._checks import check_choice, check_tensor, state_dtype
from ._inputs import Chunking, KeptTokens, Scaling, Where, check_linear, check_logits, check_writable
from ._token_inputs import check_config, check_tokens, token_weights
from .config import PolicyLossConfig
from .distributed import ProcessGroup
from .logprobs import linear_logprobs
from .losses import LossOutput
from .ops.fused import GradientsInForward, PolicyRows, Weights, policy_gradients_inplace_op, policy_gradients_op
from .ops.keep import Restrict, supported
from .ops.linear import gradients_in_forward, linear_policy_gradients_op
from .ops.logits import Slopes, TokenLogprobs, live_rows
from .ops.policy import Tokens
from .ops.policy import policy_loss as policy_loss_on_tokens
from .ops.select import as_bool
from .ops.sequences import aggregation_weights, per_token, sequence_sum, to_tokens
from .surrogates import check_backend, own_surrogate


class Objective(NamedTuple):
    """A policy loss whose log-probs are still to come."""

    tokens: Tokens  # of shape S; logprobs and entropy unfilled, the mask includes the ids
    config: PolicyLossConfig
    evaluated: Tensor | None  # bool, S: the rows whose log-probs are needed; None for all of the mask
    with_metrics: bool
    backend: str
    outside_support: Tensor | None = None  # how many tokens the mask leaves out because the sampler's support does

    def live(self) -> Tensor:
        """Flat: the rows to compute."""
        live = self.tokens.mask if self.evaluated is None else self.evaluated
        assert live is not None
        return live.flatten()

    def terms(self) -> PolicyRows:
        """The numbers that a token's loss reads, ``[N]``."""
        t = self.tokens
        ref = t.ref_logprobs if self.config.kl_coef != 0 else None
        read = (t.old_logprobs, t.advantages, ref, t.importance_weights, t.sampling_logprobs, t.entropy_mask)
        return PolicyRows._make(None if x is None else per_token(x.detach(), t.logprobs, t.cu_seqlens).flatten() for x in read)

    def weights(self) -> Weights:
        """Flat: d loss / d (a token's loss), and d loss / d entropy."""
        t, c = self.tokens, self.config
        assert t.mask is not None
        dtype = t.logprobs.dtype
        loss = bonus = aggregation_weights(t.mask, c.aggregation, dtype, t.normalizer, c.max_length, t.cu_seqlens)
        if c.entropy_coef == 0:
            return Weights(loss.flatten(), None)
        if c.entropy_aggregation is not None:
            kept = t.mask if t.entropy_mask is None else t.mask & as_bool(t.entropy_mask)
            bonus = aggregation_weights(kept, c.entropy_aggregation, dtype, None, c.max_length, t.cu_seqlens)
        return Weights(loss.flatten(), (-c.entropy_coef * bonus).flatten())

    def loss(self, logprobs: Tensor, entropy: Tensor | None) -> LossOutput:
        """The loss of these log-probs and entropies ``[N]``."""
        shape = self.tokens.logprobs.shape
        logprobs = logprobs.view(shape)
        entropy = None if entropy is None else entropy.view(shape)
        tokens = self.tokens._replace(logprobs=logprobs, entropy=entropy)
        if self.evaluated is None:
            loss, metrics = policy_loss_on_tokens(tokens, self.config, self.with_metrics, self.backend)
        else:
            # Rows without an advantage add nothing to the loss but stay in its denominators; the metrics are of the others.
            old = torch.zeros_like(logprobs) if tokens.old_logprobs is None else tokens.old_logprobs.to(logprobs.dtype)
            filled = tokens._replace(logprobs=torch.where(self.evaluated, logprobs, old))
            loss, metrics = policy_loss_on_tokens(filled, self.config, False, self.backend)
            if self.with_metrics:
                with torch.no_grad():
                    _, metrics = policy_loss_on_tokens(tokens._replace(mask=self.evaluated), self.config, True, self.backend)
        if self.outside_support is not None and self.with_metrics:
            metrics["outside_support"] = metrics["outside_support"] + self.outside_support
        return LossOutput(loss, metrics, logprobs.detach(), None if entropy is None else entropy.detach())


def _kept(ids: Tensor, keep: KeptTokens | None) -> Tensor | None:
    """Which of the ids are among those that the sampler kept."""
    return None if keep is None else supported(ids.flatten(), keep.offsets, keep.token_ids).view(ids.shape)


def _possible(x: Tensor | None, ids: Tensor) -> Tensor | None:
    """Which of the ids have a logit, or part of one, above -inf in ``x [..., V]``; those outside the vocabulary count, since they are errors."""
    if x is None:
        return None
    inside = ids.long().clamp(0, x.shape[-1] - 1)
    chosen = x[inside] if x.dim() == 1 else x.detach().gather(-1, inside.unsqueeze(-1)).squeeze(-1)
    return (chosen != -torch.inf) | (inside != ids)


def _counted(ids: Tensor, mask: Tensor | None, in_support: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Which tokens count: those that are not ``in_support``, where that is known, do not; and how many these are."""
    live = live_rows(ids, mask)
    if in_support is None:
        return live, None
    counted = live & in_support
    return counted, (live ^ counted).sum()


def _objective(
    given: Tokens,
    in_support: Tensor | None,
    ids: Tensor,
    config: PolicyLossConfig,
    with_entropy: bool,
    with_metrics: bool,
    skip: bool,
    validate: bool,
    backend: str,
) -> Objective:
    """Check the objective's own arguments, ``given`` with the caller's mask, whose log-probs and entropy are yet unfilled.

    ``skip``: leave out the rows whose advantage is 0, where nothing else gives them a gradient.
    """
    check_config(config)
    check_backend(config.surrogate, backend)
    live, outside_support = _counted(ids, given.mask, in_support)
    tokens = check_tokens(given._replace(mask=live, entropy=given.logprobs if with_entropy else None), config, validate)
    evaluated = None
    if skip and config.kl_coef == 0 and config.entropy_coef == 0 and own_surrogate(config.surrogate) is None:
        evaluated = live & (per_token(tokens.advantages, tokens.logprobs, tokens.cu_seqlens) != 0)
        if not config.is_token_level:  # a sequence is needed whole
            some = sequence_sum(evaluated.to(tokens.logprobs.dtype), tokens.cu_seqlens) > 0
            evaluated = live & to_tokens(some, live, tokens.cu_seqlens)
    return Objective(tokens, config, evaluated, with_metrics, backend, outside_support)


def fused_policy_loss(
    logits: Tensor,
    ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: PolicyLossConfig = PolicyLossConfig(),  # noqa: B008  (frozen)
    with_entropy: bool = True,
    with_metrics: bool = True,
    inplace: bool = False,
    keep: KeptTokens | None = None,
    process_group: ProcessGroup = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> LossOutput:
    """:func:`rlkern.policy_loss` of :func:`rlkern.token_logprobs`, with the gradient of a token-level objective made while the logits are at hand.

    The numbers are those of the two functions one after the other. If a token's loss depends on its own log-prob alone (ratio level "token", and
    neither GMPO, VESPO nor the off-policy mask), d loss / d logits is made in the forward; otherwise in the backward.

    Args:
        logits, ids, temperature, softcap, logit_scale, keep: as in :func:`rlkern.token_logprobs`; ids of -100 count as masked.
        old_logprobs, advantages, mask, ref_logprobs, importance_weights, sampling_logprobs, entropy_mask, normalizer, cu_seqlens, config: as in
            :func:`rlkern.policy_loss`.
        with_entropy: compute the entropies, for the metric and ``LossOutput.entropy``; needed by an entropy bonus.
        with_metrics: as in :func:`rlkern.policy_loss`.
        process_group: as in :func:`rlkern.token_logprobs`; the gradient is then made in the backward.
        inplace: write the gradient over ``logits``, whose values are lost; in the forward if the gradient is made there. Nothing else may use them.
        validate, backend: as in :func:`rlkern.token_logprobs`.

    Returns:
        :class:`rlkern.LossOutput`. Gradients flow to ``logits``, once: if they were made in the forward, a second backward is an error.

    Raises:
        TypeError, ValueError: the errors of the two functions.
    """
    x = check_logits(logits, ids, mask, Scaling(temperature, softcap, logit_scale), keep, Where(process_group, validate, backend))
    if inplace:
        check_writable("inplace=True", x.logits)
    unfilled = torch.empty(ids.shape, dtype=state_dtype(x.logits.dtype), device=ids.device)
    given = Tokens(
        logprobs=unfilled,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        ref_logprobs=ref_logprobs,
        entropy=None,
        importance_weights=importance_weights,
        sampling_logprobs=sampling_logprobs,
        entropy_mask=entropy_mask,
        normalizer=normalizer,  # type: ignore[arg-type]  # made a tensor by the check
        cu_seqlens=cu_seqlens,
    )
    # Gradients that are made with the loss need to know beforehand which tokens it counts; otherwise their log-probs tell.
    in_forward = x.rows.shard is None and torch.is_grad_enabled() and x.logits.requires_grad and config.is_token_level
    in_support = _kept(ids, keep) if keep is not None or not in_forward else _possible(x.logits, ids)
    objective = _objective(given, in_support, ids, config, with_entropy, with_metrics, False, x.validate, x.rows.backend)
    here, rows = x.logits, x.rows._replace(mask=objective.tokens.mask)
    if keep is not None:  # the gradient may go over the copy, which is ours
        here, inplace = Restrict.apply(here, *x.kept, rows.backend), True
    if not in_forward:
        logprobs, entropy = TokenLogprobs.apply(here, *rows, with_entropy, inplace, x.validate)
        return objective.loss(logprobs, entropy if with_entropy else None)
    temperatures = None if rows.temperature is None else rows.temperature.flatten()
    rows = rows._replace(ids=ids.flatten(), mask=objective.live(), temperature=temperatures)
    arguments = (rows, objective.terms(), objective.weights(), config, with_entropy, x.validate)
    if inplace:
        gradient = here.detach()
        logprobs, entropy = policy_gradients_inplace_op(gradient, *arguments)
    else:
        logprobs, entropy, gradient = policy_gradients_op(here.detach(), *arguments)
    output = objective.loss(logprobs, entropy if with_entropy else None)
    return output._replace(loss=GradientsInForward.apply(output.loss, rows.backend, gradient, here))


def fused_linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: PolicyLossConfig = PolicyLossConfig(),  # noqa: B008  (frozen)
    with_entropy: bool = True,
    with_metrics: bool = True,
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    rows: Tensor | None = None,
    compact: bool | None = None,
    keep: KeptTokens | None = None,
    mode: Literal["in-forward", "recompute", "frozen-head"] | None = None,
    process_group: ProcessGroup = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> LossOutput:
    """:func:`rlkern.policy_loss` of :func:`rlkern.linear_token_logprobs`: from hidden states and the head to the loss, with no ``[S, V]`` logits.

    The numbers are those of the two functions one after the other. If a token's loss depends on its own log-prob alone (ratio level "token", and
    neither GMPO, VESPO nor the off-policy mask), all gradients are made in the forward, chunk by chunk; otherwise as
    :func:`rlkern.linear_token_logprobs` makes them.

    Args:
        hidden, weight, ids, bias, temperature, softcap, logit_scale, logits_dtype, chunk_bytes, keep: as in :func:`rlkern.linear_token_logprobs`.
        old_logprobs, advantages, mask, ref_logprobs, importance_weights, sampling_logprobs, entropy_mask, normalizer, cu_seqlens, config: as in
            :func:`rlkern.policy_loss`; ids of -100 count as masked.
        with_entropy: compute the entropies, for the metric and ``LossOutput.entropy``; needed by an entropy bonus.
        with_metrics: as in :func:`rlkern.policy_loss`.
        rows: ``[n]``, int32 or int64: the positions of flattened ``S`` whose loss can have a gradient, if the caller knows them. The others must
            be masked, or have advantage 0 with neither a KL nor an entropy term (nor a surrogate of your own that is not 0 there). They still
            count in the denominators, but not in the metrics.
        compact: leave rows out of the products. Counting them takes a synchronisation on a GPU. None: only on the CPU, where this is free; masked
            rows are left out, and rows that the clip stopped are left out of the products of the gradients. True: on every device, and rows whose
            advantage is 0 too, if there is no KL or entropy term and the surrogate is built in. Such rows add nothing to loss or gradients and still
            count in the denominators; the metrics are means over the others, and their log-prob and entropy come back as 0. False: every row is
            computed.
        mode: force "in-forward", "recompute" or "frozen-head", for comparison; an error if the inputs do not allow it.
        process_group: as in :func:`rlkern.linear_token_logprobs`; for gradients made in the forward its collectives run there.
        validate, backend: as in :func:`rlkern.token_logprobs`.

    Returns:
        :class:`rlkern.LossOutput`. Gradients flow to ``hidden``, ``weight`` and ``bias``, once: if they were made in the forward, a second
        backward is an error.

    Raises:
        TypeError, ValueError: the errors of the two functions.
    """
    x = check_linear(
        (hidden, weight, bias),
        ids,
        mask,
        Scaling(temperature, softcap, logit_scale),
        Chunking(logits_dtype, chunk_bytes, rows, compact),
        keep,
        Where(process_group, validate, backend),
    )
    check_config(config)
    if mode is not None:
        check_choice("mode", mode, ("in-forward", "recompute", "frozen-head"))
    if mode == "in-forward" and not config.is_token_level:
        raise ValueError(f"mode='in-forward' needs a token-level objective; this one is not: {config}")
    unfilled = torch.empty(ids.shape, dtype=state_dtype(x.head.logits_dtype), device=ids.device)
    given = Tokens(
        logprobs=unfilled,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        ref_logprobs=ref_logprobs,
        entropy=None,
        importance_weights=importance_weights,
        sampling_logprobs=sampling_logprobs,
        entropy_mask=entropy_mask,
        normalizer=normalizer,  # type: ignore[arg-type]  # made a tensor by the check
        cu_seqlens=cu_seqlens,
    )
    needs = x.head.needs_grad()
    in_forward = any(needs) and config.is_token_level and mode in (None, "in-forward")
    in_support = _possible(bias, ids) if keep is None and in_forward and x.rows.shard is None else _kept(ids, keep)
    objective = _objective(given, in_support, ids, config, with_entropy, with_metrics, compact is True, x.validate, x.rows.backend)
    if x.work.rows is not None:
        computed = objective.live() & torch.zeros_like(objective.live()).index_fill_(0, x.work.rows, True)
        objective = objective._replace(evaluated=computed.view(ids.shape))
    x = x._replace(rows=x.rows._replace(mask=objective.live()))
    if not in_forward:
        logprobs, entropy = linear_logprobs(x, with_entropy, mode)
        return objective.loss(logprobs, entropy if with_entropy else None)
    made = linear_policy_gradients_op(
        x.head.detach(), x.work, x.kept, x.rows, objective.terms(), objective.weights(), config, with_entropy, needs, x.validate
    )
    output = objective.loss(made.logprob, made.entropy if with_entropy else None)
    return output._replace(loss=GradientsInForward.apply(output.loss, x.rows.backend, *made[2:], *x.head[:3]))


def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    loss_fn: Callable[..., Tensor],
    per_token: Sequence[Tensor] = (),
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    max_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    rows: Tensor | None = None,
    compact: bool | None = None,
    keep: KeptTokens | None = None,
    process_group: ProcessGroup = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> LossOutput:
    """A per-token loss of your own, from hidden states and the head, with no ``[S, V]`` logits and all gradients made in the forward.

        loss = sum_i a_i loss_fn(logprobs_i, entropy_i, *per_token_i)      with the weights a of ``aggregation``

    Args:
        hidden, weight, ids, bias, mask, temperature, softcap, logit_scale, logits_dtype, chunk_bytes: as in :func:`rlkern.linear_token_logprobs`.
        rows, compact, keep, process_group, validate, backend: as in :func:`rlkern.linear_token_logprobs`.
        loss_fn: ``loss_fn(logprobs, entropy, *per_token) -> loss``, in PyTorch operations that autograd can differentiate, on a chunk of tokens: the
            first two are ``[n]``, float32 (float64 for float64), and so must the result be. The loss of a token may depend on that token only.
        per_token: constants whose shapes begin with ``S``; ``loss_fn`` gets them with these dimensions flattened and cut to the chunk.
        aggregation, normalizer, max_length, cu_seqlens: as in :func:`rlkern.policy_loss` and :class:`rlkern.PolicyLossConfig`.

    Returns:
        :class:`rlkern.LossOutput`; its metrics are the means over the mask of "loss" and "entropy", and with ``keep`` "outside_support". Gradients
        flow to ``hidden``, ``weight`` and ``bias``, once; a second backward is an error.

    Raises:
        TypeError, ValueError: for bad arguments, and for a ``loss_fn`` whose result is not a tensor of the shape of its log-probs.
    """
    x = check_linear(
        (hidden, weight, bias),
        ids,
        mask,
        Scaling(temperature, softcap, logit_scale),
        Chunking(logits_dtype, chunk_bytes, rows, compact),
        keep,
        Where(process_group, validate, backend),
    )
    for i, t in enumerate(per_token):
        check_tensor(f"per_token[{i}]", t, device=ids.device)
        if t.shape[: ids.dim()] != ids.shape:
            raise ValueError(f"per_token[{i}] must have a shape that begins with {tuple(ids.shape)}, got {tuple(t.shape)}")
    live, outside_support = _counted(ids, mask, _kept(ids, keep))
    dtype = state_dtype(x.head.logits_dtype)
    weights = token_weights(
        live, aggregation, dtype, normalizer=normalizer, max_length=max_length, cu_seqlens=cu_seqlens, validate=x.validate
    ).flatten()
    counted = live.flatten()
    x = x._replace(rows=x.rows._replace(mask=counted))
    extras = [t.detach().flatten(0, ids.dim() - 1) for t in per_token]
    losses = torch.zeros(ids.numel(), dtype=dtype, device=ids.device)

    def loss_of(rows: slice | Tensor, logprob: Tensor, entropy: Tensor) -> Tensor:
        loss = loss_fn(logprob, entropy, *(t[rows] for t in extras))
        if not isinstance(loss, Tensor) or loss.shape != logprob.shape:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must give one loss a token, a tensor of shape {tuple(logprob.shape)}; got {what}")
        return torch.where(counted[rows], loss, 0.0)

    needs = x.head.needs_grad()
    if torch.compiler.is_compiling() or not any(needs):
        logprobs, entropy = linear_logprobs(x, True)
        losses = loss_of(slice(None), logprobs, entropy)
        loss = (weights * losses).sum()
    else:

        def slopes(rows: slice | Tensor, logprob: Tensor, entropy: Tensor) -> Slopes:
            with torch.enable_grad():
                inputs = logprob.detach().requires_grad_(), entropy.detach().requires_grad_()
                loss = loss_of(rows, *inputs)
                slopes = torch.autograd.grad(loss, inputs, weights[rows], allow_unused=True) if loss.requires_grad else (None, None)
            losses[rows] = loss.detach()
            a, b = (None if g is None else torch.where(counted[rows], g, 0.0) for g in slopes)
            return Slopes(torch.zeros_like(logprob) if a is None else a, b)

        with torch.no_grad():
            logprobs, entropy, *gradients = gradients_in_forward(x, True, needs, slopes)
            loss = (weights * losses).sum()
        loss = GradientsInForward.apply(loss, x.rows.backend, *gradients, *x.head[:3])
    count = live.sum().clamp(min=1)
    metrics = {"loss": losses.detach().sum() / count, "entropy": entropy.detach().sum() / count}
    if outside_support is not None:
        metrics["outside_support"] = outside_support
    return LossOutput(loss, metrics, logprobs.detach().view(ids.shape), entropy.detach().view(ids.shape))
