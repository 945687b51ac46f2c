"""Policy losses fused with what comes before them: from logits, or from hidden states and the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._backend import choose_backend
from ._checks import check_choice, check_tensor, state_dtype
from .config import PolicyLossConfig
from .distributed import ProcessGroup
from .logprobs import KeptTokens, LinearInputs, check_keep, check_linear, check_logits, check_scaling, check_writable, linear_logprobs
from .losses import LossOutput, check_config, check_tokens, token_weights
from .ops.fused import GradientsInForward, PolicyRows, per_token_config, policy_gradients_inplace_op, policy_gradients_op
from .ops.keep import Restrict, supported
from .ops.linear import gradients_in_forward, linear_policy_gradients_op
from .ops.logits import TRITON_DTYPES, TokenLogprobs, live_rows
from .ops.policy import Tokens
from .ops.policy import policy_loss as policy_loss_on_tokens
from .ops.shards import Shard
from .surrogates import check_backend, own_surrogate


class Objective(NamedTuple):
    """A policy loss whose log-probs are still to come."""

    tokens: Tokens  # of shape S; logprobs and entropy unfilled, the mask includes the ids
    config: PolicyLossConfig
    evaluated: Tensor | None  # bool, S: the rows whose log-probs are needed; None for all of the mask
    backend: str
    outside_support: Tensor | None = None  # how many tokens the mask leaves out because the sampler's support does

    def live(self) -> Tensor:
        """Flat: the rows to compute."""
        live = self.tokens.mask if self.evaluated is None else self.evaluated
        assert live is not None
        return live.flatten()

    def rows(self) -> PolicyRows:
        """What a token's loss reads, ``[N]``."""
        t = self.tokens

        def flat(x: Tensor | None) -> Tensor | None:
            return None if x is None else reference.per_token(x.detach(), t.logprobs, t.cu_seqlens).flatten()

        advantages = reference.per_token(t.advantages.detach(), t.logprobs, t.cu_seqlens).flatten()
        optional = (t.importance_weights, t.sampling_logprobs, t.entropy_mask)
        ref = t.ref_logprobs if self.config.kl_coef != 0 else None
        return PolicyRows(flat(t.old_logprobs), advantages, flat(ref), *(flat(x) for x in optional))

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Flat: the weight of each token's loss, and of its entropy: d loss / d entropy, None where that is 0."""
        t, c = self.tokens, self.config
        assert t.mask is not None
        kept = t.mask if t.entropy_mask is None else t.mask & (t.entropy_mask != 0)
        dtype, by = t.logprobs.dtype, {"max_length": c.max_length, "cu_seqlens": t.cu_seqlens}
        loss = bonus = reference.aggregation_weights(t.mask, c.aggregation, dtype=dtype, normalizer=t.normalizer, **by)  # type: ignore[arg-type]
        if c.entropy_coef == 0:
            return loss.flatten(), None
        if c.entropy_aggregation is not None:
            bonus = reference.aggregation_weights(kept, c.entropy_aggregation, dtype=dtype, **by)  # type: ignore[arg-type]
        return loss.flatten(), (-c.entropy_coef * bonus).flatten()

    def loss(self, logprobs: Tensor, entropy: Tensor | None) -> LossOutput:
        """The loss of these log-probs and entropies ``[N]``."""
        shape = self.tokens.logprobs.shape
        logprobs = logprobs.view(shape)
        entropy = None if entropy is None else entropy.view(shape)
        tokens = self.tokens._replace(logprobs=logprobs, entropy=entropy)
        if self.evaluated is None:
            loss, metrics = policy_loss_on_tokens(tokens, self.config, self.backend)
        else:
            # Rows without an advantage add nothing to the loss but stay in its denominators; the metrics are of the others.
            old = torch.zeros_like(logprobs) if tokens.old_logprobs is None else tokens.old_logprobs.to(logprobs.dtype)
            loss, _ = policy_loss_on_tokens(tokens._replace(logprobs=torch.where(self.evaluated, logprobs, old)), self.config, self.backend)
            with torch.no_grad():
                _, metrics = policy_loss_on_tokens(tokens._replace(mask=self.evaluated), self.config, self.backend)
        if self.outside_support is not None:
            metrics["outside_support"] = metrics["outside_support"] + self.outside_support
        return LossOutput(loss, metrics, logprobs.detach(), None if entropy is None else entropy.detach())


def _inside_support(ids: Tensor, live: Tensor, keep: KeptTokens | None) -> tuple[Tensor, Tensor | None]:
    """``live``, without the tokens that the sampler's support excludes; and how many these are, where there is one."""
    if keep is None:
        return live, None
    inside = supported(ids.flatten(), keep.offsets, keep.token_ids).view(ids.shape)
    return live & inside, (live & ~inside).sum()


def _objective(
    ids: Tensor,
    live: Tensor,
    like: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    with_entropy: bool,
    skip: bool,
    validate: bool,
    backend: str,
    config: PolicyLossConfig,
    **tokens: Tensor | float | None,
) -> Objective:
    """Check the arguments of the objective. ``skip``: leave out the rows whose advantage is 0, where nothing else gives them a gradient."""
    check_config(config)
    check_backend(config.surrogate, backend)
    unfilled = torch.empty(ids.shape, dtype=state_dtype(like), device=ids.device)
    entropy = unfilled if with_entropy else None
    checked = check_tokens(unfilled, old_logprobs, advantages, mask=live, entropy=entropy, config=config, validate=validate, **tokens)  # type: ignore[arg-type]
    evaluated = None
    if skip and config.kl_coef == 0 and config.entropy_coef == 0 and own_surrogate(config.surrogate) is None:
        evaluated = live & (reference.per_token(checked.advantages, unfilled, checked.cu_seqlens) != 0)
        if not config.is_token_level:  # a sequence is needed whole
            some = reference.sequence_sum(evaluated.to(unfilled.dtype), checked.cu_seqlens) > 0
            evaluated = live & reference.to_tokens(some, live, checked.cu_seqlens)
    return Objective(checked, config, evaluated, backend)


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
    inplace: bool = False,
    keep: KeptTokens | None = None,
    process_group: ProcessGroup = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> LossOutput:
    """:func:`rlkern.policy_loss` of :func:`rlkern.token_logprobs`, with the gradient of a token-level objective made while the logits are at hand.

    The numbers are those of the two functions one after the other. Where a token's loss depends on its own log-prob alone (ratio level "token", and
    neither GMPO, VESPO nor the off-policy mask), d loss / d logits is made in the forward; otherwise in the backward.

    Args:
        logits, ids, temperature, softcap, logit_scale, keep: as in :func:`rlkern.token_logprobs`; ids of -100 count as masked.
        old_logprobs, advantages, mask, ref_logprobs, importance_weights, sampling_logprobs, entropy_mask, normalizer, cu_seqlens, config: as in
            :func:`rlkern.policy_loss`.
        with_entropy: compute the entropies, for the metric and ``LossOutput.entropy``; needed by an entropy bonus.
        process_group: as in :func:`rlkern.token_logprobs`; the gradient is then made in the backward.
        inplace: write the gradient over ``logits``, in the forward where it is made there: they are gone afterwards. Nothing else may use them.
        validate, backend: as in :func:`rlkern.token_logprobs`.

    Returns:
        :class:`rlkern.LossOutput`. Gradients flow to ``logits``, once: where they were made in the forward, a second backward is an error.

    Raises:
        TypeError, ValueError: as the two functions.
    """
    logits, shape, device, shard, must_validate = check_logits(logits, ids, mask, process_group, validate)
    per_token, scale, cap = check_scaling(temperature, softcap, logit_scale, shape, device)
    if inplace:
        check_writable("inplace=True", logits)
    backend = choose_backend(backend, logits, triton_dtypes=TRITON_DTYPES)
    kept = None if keep is None else check_keep(keep, ids, logits.shape[-1], shard, must_validate)
    live, outside_support = _inside_support(ids, live_rows(ids, mask), keep)
    objective = _objective(
        ids,
        live,
        logits,
        old_logprobs,
        advantages,
        with_entropy,
        False,
        must_validate,
        backend,
        config,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        sampling_logprobs=sampling_logprobs,
        entropy_mask=entropy_mask,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
    )._replace(outside_support=outside_support)
    if kept is not None:  # the gradient may go over the copy, which is ours
        logits = Restrict.apply(logits, *kept, backend)
        inplace = True
    if shard is not None or not (torch.is_grad_enabled() and logits.requires_grad and config.is_token_level):
        part = "" if shard is None else shard.text
        logprobs, entropy = TokenLogprobs.apply(
            logits, ids, objective.tokens.mask, per_token, scale, cap, with_entropy, inplace, must_validate, backend, part
        )
        return objective.loss(logprobs, entropy if with_entropy else None)
    flat = (ids.flatten(), objective.live(), None if per_token is None else per_token.flatten(), *objective.rows(), *objective.weights())
    options = (per_token_config(config).text, scale, cap, with_entropy, must_validate, backend)
    if inplace:
        gradient = logits.detach()
        logprobs, entropy = policy_gradients_inplace_op(gradient, *flat, *options)
    else:
        logprobs, entropy, gradient = policy_gradients_op(logits.detach(), *flat, *options)
    output = objective.loss(logprobs, entropy if with_entropy else None)
    return output._replace(loss=GradientsInForward.apply(output.loss, backend, gradient, logits))


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

    The numbers are those of the two functions one after the other. Where a token's loss depends on its own log-prob alone (ratio level "token", and
    neither GMPO, VESPO nor the off-policy mask), all gradients are made in the forward, chunk by chunk; otherwise as
    :func:`rlkern.linear_token_logprobs` makes them.

    Args:
        hidden, weight, ids, bias, temperature, softcap, logit_scale, logits_dtype, chunk_bytes, keep: as in :func:`rlkern.linear_token_logprobs`.
        old_logprobs, advantages, mask, ref_logprobs, importance_weights, sampling_logprobs, entropy_mask, normalizer, cu_seqlens, config: as in
            :func:`rlkern.policy_loss`; ids of -100 count as masked.
        with_entropy: compute the entropies, for the metric and ``LossOutput.entropy``; needed by an entropy bonus.
        rows: ``[n]``, int32 or int64: the positions of flattened ``S`` whose loss can have a gradient, where the caller knows them. The others must
            be masked, or have advantage 0 with neither a KL nor an entropy term (nor a surrogate of your own that is not 0 there): they still
            count in the denominators, but not in the metrics.
        compact: leave rows out of the products by counting them (on a GPU: a synchronisation). None: masked rows, and in the products of the
            gradients those that the clip stopped, where this is free (on the CPU). True: anywhere, and also, where there is no KL or entropy term
            and the surrogate is built in, rows whose advantage is 0. These add nothing to loss or gradients and still count in the denominators;
            the metrics are means over the rest, and their log-prob and entropy come back as 0. False: every row is computed.
        mode: force "in-forward", "recompute" or "frozen-head", for comparison; an error where that cannot be.
        process_group: as in :func:`rlkern.linear_token_logprobs`; gradients that are made in the forward take its collectives there.
        validate, backend: as in :func:`rlkern.token_logprobs`.

    Returns:
        :class:`rlkern.LossOutput`. Gradients flow to ``hidden``, ``weight`` and ``bias``, once: where they were made in the forward, a second
        backward is an error.

    Raises:
        TypeError, ValueError: as the two functions.
    """
    x = check_linear(
        hidden,
        weight,
        ids,
        bias=bias,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        logits_dtype=logits_dtype,
        chunk_bytes=chunk_bytes,
        rows=rows,
        compact=compact,
        keep=keep,
        process_group=process_group,
        validate=validate,
        backend=backend,
    )
    check_config(config)
    if mode is not None:
        check_choice("mode", mode, ("in-forward", "recompute", "frozen-head"))
    if mode == "in-forward" and not config.is_token_level:
        raise ValueError(f"mode='in-forward' needs a token-level objective; this one is not: {config}")
    live, outside_support = _inside_support(ids, live_rows(ids, mask), keep)
    objective = _objective(
        ids,
        live,
        torch.empty(0, dtype=x.logits_dtype),
        old_logprobs,
        advantages,
        with_entropy,
        compact is True,
        x.validate,
        x.backend,
        config,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        sampling_logprobs=sampling_logprobs,
        entropy_mask=entropy_mask,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
    )._replace(outside_support=outside_support)
    if x.rows is not None:
        computed = objective.live() & torch.zeros_like(objective.live()).index_fill_(0, x.rows, True)
        objective = objective._replace(evaluated=computed.view(ids.shape))
    x = x._replace(mask=objective.live())
    needs = x.needs_grad()
    if not (any(needs) and config.is_token_level and mode in (None, "in-forward")):
        logprobs, entropy = linear_logprobs(x, with_entropy, mode)
        return objective.loss(logprobs, entropy if with_entropy else None)
    return _in_forward(x, objective, needs, with_entropy)


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
        rows, compact, keep, process_group, validate, backend: as there.
        loss_fn: ``loss_fn(logprobs, entropy, *per_token) -> loss``, in PyTorch operations that autograd can differentiate, on a chunk of tokens: the
            first two are ``[n]``, float32 (float64 for float64), the result must be too. The loss of a token may depend on that token only.
        per_token: tensors that begin with the shape ``S``, handed to ``loss_fn`` with these dimensions flattened and cut to the chunk; constants.
        aggregation, normalizer, max_length, cu_seqlens: as in :func:`rlkern.policy_loss` and :class:`rlkern.PolicyLossConfig`.

    Returns:
        :class:`rlkern.LossOutput`; its metrics are the means over the mask of "loss" and "entropy", and with ``keep`` "outside_support". Gradients
        flow to ``hidden``, ``weight`` and ``bias``, once; a second backward is an error.

    Raises:
        TypeError, ValueError: for bad arguments, and for a ``loss_fn`` whose result is not a tensor of the shape of its log-probs.
    """
    x = check_linear(
        hidden,
        weight,
        ids,
        bias=bias,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        logits_dtype=logits_dtype,
        chunk_bytes=chunk_bytes,
        rows=rows,
        compact=compact,
        keep=keep,
        process_group=process_group,
        validate=validate,
        backend=backend,
    )
    for i, t in enumerate(per_token):
        check_tensor(f"per_token[{i}]", t, device=ids.device)
        if t.shape[: ids.dim()] != ids.shape:
            raise ValueError(f"per_token[{i}] must have a shape that begins with {tuple(ids.shape)}, got {tuple(t.shape)}")
    live, outside_support = _inside_support(ids, live_rows(ids, mask), keep)
    dtype = state_dtype(torch.empty(0, dtype=x.logits_dtype))
    weights = token_weights(
        live, aggregation, dtype, normalizer=normalizer, max_length=max_length, cu_seqlens=cu_seqlens, validate=x.validate
    ).flatten()
    counted = live.flatten()
    x = x._replace(mask=counted)
    extras = [t.detach().flatten(0, ids.dim() - 1) for t in per_token]
    losses = torch.zeros(ids.numel(), dtype=dtype, device=ids.device)

    def loss_of(rows: slice | Tensor, logprob: Tensor, entropy: Tensor) -> Tensor:
        loss = loss_fn(logprob, entropy, *(t[rows] for t in extras))
        if not isinstance(loss, Tensor) or loss.shape != logprob.shape:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must give one loss a token, a tensor of shape {tuple(logprob.shape)}; got {what}")
        return torch.where(counted[rows], loss, 0.0)

    needs = x.needs_grad()
    if torch.compiler.is_compiling() or not any(needs):
        logprobs, entropy = linear_logprobs(x, True)
        losses = loss_of(slice(None), logprobs, entropy)
        loss = (weights * losses).sum()
    else:

        def slopes(rows: slice | Tensor, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
            with torch.enable_grad():
                inputs = logprob.detach().requires_grad_(), entropy.detach().requires_grad_()
                loss = loss_of(rows, *inputs)
                slopes = torch.autograd.grad(loss, inputs, weights[rows], allow_unused=True) if loss.requires_grad else (None, None)
            losses[rows] = loss.detach()
            a, b = (None if g is None else torch.where(counted[rows], g, 0.0) for g in slopes)
            return torch.zeros_like(logprob) if a is None else a, b

        with torch.no_grad():
            logprobs, entropy, *gradients = gradients_in_forward(
                x.hidden,
                x.weight,
                x.bias,
                x.ids,
                counted,
                x.temperature,
                x.rows,
                x.offsets,
                x.token_ids,
                x.scale,
                x.cap,
                x.logits_dtype,
                x.chunk,
                True,
                needs,
                x.compact,
                x.validate,
                x.backend,
                Shard.from_text(x.shard),
                slopes,
            )
            loss = (weights * losses).sum()
        loss = GradientsInForward.apply(loss, x.backend, *gradients, x.hidden, x.weight, x.bias)
    count = live.sum().clamp(min=1)
    metrics = {"loss": losses.detach().sum() / count, "entropy": entropy.detach().sum() / count}
    if outside_support is not None:
        metrics["outside_support"] = outside_support
    return LossOutput(loss, metrics, logprobs.detach().view(ids.shape), entropy.detach().view(ids.shape))


def _in_forward(x: LinearInputs, objective: Objective, needs: tuple[bool, bool, bool], with_entropy: bool) -> LossOutput:
    heads = (x.hidden, x.weight, x.bias)
    logprobs, entropy, *gradients = linear_policy_gradients_op(
        *(None if t is None else t.detach() for t in heads),
        x.ids,
        objective.live(),
        x.temperature,
        x.rows,
        x.offsets,
        x.token_ids,
        *objective.rows(),
        *objective.weights(),
        per_token_config(objective.config).text,
        x.scale,
        x.cap,
        x.logits_dtype,
        x.chunk,
        with_entropy,
        *needs,
        x.compact,
        x.validate,
        x.backend,
        x.shard,
    )
    output = objective.loss(logprobs, entropy if with_entropy else None)
    return output._replace(loss=GradientsInForward.apply(output.loss, x.backend, *gradients, *heads))
