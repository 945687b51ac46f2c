"""Checks of what the losses on tokens are given; they end in the records of ``ops/``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._backend import choose_validate
from ._checks import FLOATS, INTS, check_choice, check_cu_seqlens, check_number, check_tensor, state_dtype
from .config import AGGREGATIONS, SEQUENCE_AGGREGATIONS, PolicyLossConfig
from .ops.policy import Tokens
from .ops.sequences import aggregation_weights


def check_config(config: PolicyLossConfig) -> None:
    """Check that it is one."""
    if not isinstance(config, PolicyLossConfig):
        raise TypeError(f"config must be a PolicyLossConfig, got {type(config).__name__}")


def check_tokens(given: Tokens, config: PolicyLossConfig, validate: bool | None) -> Tokens:
    """Check what :func:`rlkern.policy_loss` and its fused forms are given, the normalizer as it was given; gives the operator's record."""
    check_config(config)
    logprobs, advantages, cu_seqlens = given.logprobs, given.advantages, given.cu_seqlens
    check_tensor("logprobs", logprobs, dtypes=FLOATS, min_dim=1)
    shape, device = logprobs.shape, logprobs.device
    for name in ("old_logprobs", "ref_logprobs", "entropy", "sampling_logprobs", "mask", "entropy_mask"):
        x = getattr(given, name)
        if x is not None:
            check_tensor(name, x, shape=shape, dtypes=None if name.endswith("mask") else FLOATS, device=device)
    for aggregation in (config.aggregation, config.own_entropy_aggregation or config.aggregation):
        check_aggregation(aggregation, config.max_length, cu_seqlens)
    check_sequences(logprobs, cu_seqlens, validate, config.sequence_option)
    if isinstance(advantages, Tensor) and len(shape) > 1 and cu_seqlens is None and advantages.shape == (*shape[:-1], 1):
        advantages = advantages.squeeze(-1)  # one a sequence
    _check_per_token("advantages", advantages, logprobs, cu_seqlens)
    if given.importance_weights is not None:
        _check_per_token("importance_weights", given.importance_weights, logprobs, cu_seqlens, broadcast=True)
    for needed, name in (
        (config.kl_coef != 0, "ref_logprobs"),
        (config.entropy_coef != 0, "entropy"),
        (config.needs_sampling_logprobs, "sampling_logprobs"),
    ):
        if needed and getattr(given, name) is None:
            raise ValueError(f"{name} is needed by this config, got None: {config}")
    return given._replace(advantages=advantages, normalizer=as_normalizer(given.normalizer, logprobs))


def token_weights(
    mask: Tensor,
    aggregation: str,
    dtype: torch.dtype,
    *,
    normalizer: float | Tensor | None,
    max_length: float | None,
    cu_seqlens: Tensor | None,
    validate: bool | None,
) -> Tensor:
    """Check how losses are to be aggregated, and give each token's weight, of the shape of ``mask``."""
    like = torch.empty(mask.shape, dtype=dtype, device=mask.device)
    check_sequences(like, cu_seqlens, validate, check_aggregation(aggregation, max_length, cu_seqlens))
    return aggregation_weights(mask, aggregation, dtype, as_normalizer(normalizer, like), max_length, cu_seqlens)


def check_aggregation(aggregation: str, max_length: float | None, cu_seqlens: Tensor | None) -> str | None:
    """Check how losses are to be aggregated; what that is, if it needs sequences."""
    check_choice("aggregation", aggregation, AGGREGATIONS)
    if max_length is not None:
        check_number("max_length", max_length, above=0)
    elif aggregation == "seq-mean-token-sum-norm" and cu_seqlens is not None:
        raise ValueError(f"aggregation {aggregation!r} of packed sequences needs max_length")
    return f"aggregation {aggregation!r}" if aggregation in SEQUENCE_AGGREGATIONS else None


def check_sequences(like: Tensor, cu_seqlens: Tensor | None, validate: bool | None, needed_by: str | None) -> None:
    """Check that there are sequences in tensors like this one, where something needs them."""
    if cu_seqlens is not None:
        if like.dim() != 1:
            raise ValueError(f"cu_seqlens goes with packed tensors of shape [tokens], got {tuple(like.shape)}")
        check_cu_seqlens(cu_seqlens, like.shape[0], like=like, validate=choose_validate(validate, like))
    elif needed_by is not None and like.dim() == 1:
        raise ValueError(f"{needed_by} needs sequences: pass [batch, time], or cu_seqlens with [tokens]; got shape {tuple(like.shape)}")


def _check_per_token(name: str, x: Tensor, logprobs: Tensor, cu_seqlens: Tensor | None, broadcast: bool = False) -> None:
    """``x`` has shape S or one value a sequence; with ``broadcast``, anything that broadcasts to S will do as well."""
    check_tensor(name, x, dtypes=FLOATS, device=logprobs.device)
    shape = logprobs.shape
    expected = [tuple(shape)]
    if cu_seqlens is not None:
        expected.append((cu_seqlens.shape[0] - 1,))
    elif len(shape) > 1:
        expected.append(tuple(shape[:-1]))
    if tuple(x.shape) in expected:
        return
    if broadcast:
        try:
            if torch.broadcast_shapes(x.shape, shape) == shape:
                return
        except RuntimeError:
            pass
        expected.append("what broadcasts to the first")  # type: ignore[arg-type]
    raise ValueError(f"{name} must have shape {' or '.join(str(e) for e in expected)}; got {tuple(x.shape)}")


def as_normalizer(normalizer: float | Tensor | None, logprobs: Tensor) -> Tensor | None:
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        check_tensor("normalizer", normalizer, shape=(), dtypes=(*FLOATS, *INTS), device=logprobs.device)
        return normalizer.detach()
    return torch.full((), check_number("normalizer", normalizer, at_least=0), dtype=state_dtype(logprobs.dtype), device=logprobs.device)
