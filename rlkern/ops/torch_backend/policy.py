"""The policy loss on tokens in PyTorch, with the gradients written out."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import PolicyLossConfig
from ..fused import PolicyRows
from ..policy import Options, PolicyResults, Tokens, needs_statistics
from ..select import bits, select, times
from ..sequences import divisor, one_a_sequence, per_token, sequence_sum, to_tokens
from .terms import clamp, functions_of, log_weight, objective, outside, zero_where


def policy_loss(x: Tokens, config: PolicyLossConfig, out: PolicyResults) -> None:
    """Fill ``out``."""
    dtype, time, cu_seqlens = out.numbers.dtype, x.logprobs.shape[-1], x.cu_seqlens
    o, parts, surrogate = Options.of(config, time), config.parts, functions_of(config)
    mask = None if x.mask is None else x.mask != 0
    outside_support = x.logprobs == -torch.inf if mask is None else mask & (x.logprobs == -torch.inf)
    if x.logprobs.device.type != "cpu" or bool(outside_support.any()):  # elsewhere, asking would be a synchronisation
        mask = ~outside_support if mask is None else mask & ~outside_support
    kept_mask = mask if x.entropy_mask is None else (x.entropy_mask != 0 if mask is None else mask & (x.entropy_mask != 0))
    live, kept = (None if t is None else bits(t, dtype) for t in (mask, kept_mask))

    def counted(values: Tensor, where: Tensor | None) -> Tensor:
        return values if where is None else select(where, values)

    def read(t: Tensor) -> Tensor:  # a masked position is never read
        return counted(per_token(t, x.logprobs, cu_seqlens).to(dtype), live)

    def sum_of(values: Tensor) -> Tensor:
        return counted(values, live).sum()

    def over_sequences(values: Tensor) -> Tensor:
        return to_tokens(sequence_sum(values, cu_seqlens), values, cu_seqlens)

    lp = read(x.logprobs)
    old = lp if x.old_logprobs is None else read(x.old_logprobs)
    A = read(x.advantages)
    w = None if x.importance_weights is None else read(x.importance_weights)
    sampling = None if x.sampling_logprobs is None else read(x.sampling_logprobs)
    ones = torch.ones_like(lp)
    m, kept_m = counted(ones, live), counted(ones, kept)

    length = kept_length = ones
    if needs_statistics(config):
        length, kept_length = over_sequences(m).clamp(min=1), over_sequences(kept_m).clamp(min=1)

    raw = lp - old
    if config.ratio_level != "token":
        raw = over_sequences(raw)
        if config.ratio_level != "sequence_sum":
            raw = raw / length
    stopped = outside(raw, o.log_ratio_low, o.log_ratio_high)
    log_r = surrogate_log_r = clamp(raw, o.log_ratio_low, o.log_ratio_high)
    slope = None
    if surrogate.summand is not None:
        summand, slope = surrogate.summand(log_r, A, o)
        if parts.reduction == "kept-mean":
            surrogate_log_r = over_sequences(counted(summand, kept)) / kept_length
        else:
            surrogate_log_r = over_sequences(counted(summand, live))
            if x.importance_weights is not None and w is not None:
                log_w = counted(log_weight(w), live)
                surrogate_log_r = surrogate_log_r + (log_w if one_a_sequence(x.importance_weights, lp, cu_seqlens) else over_sequences(log_w))
            w = None

    keep = mask if parts.reduction == "kept-mean" else kept_mask
    if config.off_policy_threshold is not None and sampling is not None:
        fresh = (A >= 0) | (over_sequences(sampling - lp) / length <= config.off_policy_threshold)
        keep = fresh if keep is None else keep & fresh
    ref = None if x.ref_logprobs is None else read(x.ref_logprobs)
    loss, d_lp, d_log_r, d_own, kl = objective(lp, old, log_r, surrogate_log_r, A, w, keep, ref, sampling, config, o)

    by = divisor(config.aggregation, x.normalizer, m, cu_seqlens, o.max_length)
    scale = 1 / length if config.aggregation == "seq-mean-token-mean" else None  # what the lengths put into the weight of a token
    entropy_m, entropy_scale, entropy_by = m, scale, by
    own = config.own_entropy_aggregation
    if own:
        entropy_m, entropy_scale = kept_m, 1 / kept_length if own == "seq-mean-token-mean" else None
        entropy_by = divisor(own, None, kept_m, cu_seqlens, o.max_length)
    entropy_weights = entropy_m if entropy_scale is None else entropy_m * entropy_scale

    def scaled(values: Tensor) -> Tensor:
        return values if scale is None else values * scale

    total = sum_of(scaled(loss)) / by
    h = None if x.entropy is None else read(x.entropy)
    if h is not None and config.entropy_coef != 0:
        total = total - config.entropy_coef * ((entropy_weights * h).sum() / entropy_by)
    out.loss.copy_(total)

    count = m.sum().clamp(min=1)
    r = log_r.exp()
    low, high, dual = (t.count_nonzero() for t in surrogate.edges(lp, old, log_r, A, o))  # nowhere where A = 0, and so nowhere where masked
    sums = [low + high, low, high, dual, (old - lp).sum(), *(total.new_zeros(()) if t is None else sum_of(t) for t in (kl, h)), sum_of(r)]
    largest = counted(r, live).amax()
    out.numbers.copy_(torch.stack([1 / by, 1 / entropy_by, *(t.to(dtype) / count for t in sums), largest, outside_support.sum().to(dtype)]))

    if out.grad_entropy.numel():
        out.grad_entropy.copy_(-o.entropy_coef * entropy_weights)
    if out.grad_logprobs.numel():
        gradient = d_lp
        if surrogate.summand is None:
            d_log_r = d_log_r + d_own
        elif slope is not None and isinstance(d_own, Tensor):
            share = over_sequences(counted(d_own, live)) / kept_length
            gradient = gradient + times(counted(zero_where(stopped, slope), kept), share)
        if isinstance(d_log_r, Tensor):
            d_log_r = zero_where(stopped, d_log_r)
            if config.ratio_level in ("sequence", "sequence_sum"):
                d_log_r = over_sequences(counted(d_log_r, live)) / (length if config.ratio_level == "sequence" else 1.0)
            gradient = gradient + d_log_r
        out.grad_logprobs.copy_(counted(scaled(torch.as_tensor(gradient)), live))


def token_slopes(logprobs: Tensor, live: Tensor, terms: PolicyRows, config: PolicyLossConfig) -> Tensor:
    """As :func:`policy_loss` has them, for tokens by themselves."""
    dtype, o = logprobs.dtype, Options.of(config, 1)
    counted = bits(live & (logprobs != -torch.inf), dtype)

    def read(t: Tensor | None) -> Tensor | None:
        return None if t is None else select(counted, t.to(dtype))

    lp, old, A, ref, w, sampling = (read(t) for t in (logprobs, *terms[:5]))
    assert lp is not None
    assert A is not None
    old = lp if old is None else old
    raw = lp - old
    log_r = clamp(raw, o.log_ratio_low, o.log_ratio_high)
    kept = None if terms.entropy_mask is None else terms.entropy_mask != 0
    _, d_lp, d_log_r, d_own, _ = objective(lp, old, log_r, log_r, A, w, kept, ref, sampling, config, o)
    slope = d_log_r + d_own
    if isinstance(slope, Tensor):
        d_lp = d_lp + zero_where(outside(raw, o.log_ratio_low, o.log_ratio_high), slope)
    return select(counted, torch.as_tensor(d_lp))
