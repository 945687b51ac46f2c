"""The policy loss on tokens in PyTorch, with the gradients written out."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import PolicyLossConfig
from ...surrogates import own_surrogate
from ..fused import PolicyRows
from ..policy import Options, PolicyResults, Tokens, Wanted, needs_statistics
from ..select import as_bool, times
from ..sequences import one_a_sequence
from .counted import Counted
from .terms import clamp, functions_of, log_weight, objective, outside, plus, zero_where


def policy_loss(x: Tokens, config: PolicyLossConfig, wanted: Wanted, out: PolicyResults) -> None:
    """Fill ``out``."""
    dtype, o, parts, surrogate = out.numbers.dtype, Options.of(config, x.logprobs.shape[-1]), config.parts, functions_of(config)
    mask = None if x.mask is None else as_bool(x.mask)
    # Where there is a log-prob of -inf: elsewhere than on a CPU, asking would be a synchronisation; a NaN may hide one.
    nothing = outside_support = out.numbers.new_zeros(())
    if x.logprobs.device.type != "cpu" or not x.logprobs.amin().item() > -torch.inf:
        found = x.logprobs == -torch.inf
        outside_support = (found if mask is None else mask & found).sum(dtype=dtype)
        mask = ~found if mask is None else mask & ~found
    c = Counted(x.logprobs, mask, x.cu_seqlens, dtype)
    # What a masked token holds need not be made 0 where nothing is added up but its loss.
    alone = not (needs_statistics(config) or wanted.metrics or own_surrogate(config.surrogate) or x.entropy is not None)
    of_token = c.per_token if alone else c.read

    def read(t: Tensor | None) -> Tensor | None:
        return None if t is None else of_token(t)

    lp, A = of_token(x.logprobs), of_token(x.advantages)
    old, ref, w, sampling, h = (read(t) for t in (x.old_logprobs, x.ref_logprobs, x.importance_weights, x.sampling_logprobs, x.entropy))
    old = lp if old is None else old
    kept = None if x.entropy_mask is None else c.read(as_bool(x.entropy_mask))  # 1 or 0
    length = kept_length = nothing
    if needs_statistics(config):
        length = c.lengths()
        kept_length = length if kept is None else c.lengths(kept)

    raw = lp - old
    approx_kl = 0 - raw.sum() if wanted.metrics else nothing
    if config.ratio_level != "token":
        raw = c.over_sequences(raw)
        if config.ratio_level != "sequence_sum":
            raw = raw / length
    stopped = outside(raw, o.log_ratio_low, o.log_ratio_high)
    log_r = surrogate_log_r = clamp(raw, o.log_ratio_low, o.log_ratio_high)
    slope = None
    if surrogate.summand is not None:
        summand, slope = surrogate.summand(log_r, A, o)
        if parts.reduction == "kept-mean":
            surrogate_log_r = c.over_sequences(c.zeroed(summand) if kept is None else times(kept, summand)) / kept_length
        else:
            surrogate_log_r = c.over_sequences(c.zeroed(summand))
            if x.importance_weights is not None and w is not None:
                log_w = c.zeroed(log_weight(w))
                one = one_a_sequence(x.importance_weights, x.logprobs, x.cu_seqlens)
                surrogate_log_r = surrogate_log_r + (log_w if one else c.over_sequences(log_w))
            w = None

    keep = None if kept is None or parts.reduction == "kept-mean" else kept != 0
    if config.off_policy_threshold is not None and sampling is not None:
        fresh = (A >= 0) | (c.over_sequences(sampling - lp) / length <= config.off_policy_threshold)
        keep = fresh if keep is None else keep & fresh
    loss, d_lp, d_log_r, d_own, kl = objective(lp, old, log_r, surrogate_log_r, A, w, keep, ref, sampling, config, o)

    by = c.divisor(config.aggregation, x.normalizer, o.max_length)
    scale = 1 / length if config.aggregation == "seq-mean-token-mean" else None  # of a token, by its sequence
    entropy_weights, entropy_by = scale, by
    own = config.own_entropy_aggregation
    if own:
        entropy_weights = 1 / kept_length if own == "seq-mean-token-mean" else None
        if kept is not None:
            entropy_weights = kept if entropy_weights is None else kept * entropy_weights
        entropy_by = c.divisor(own, None, o.max_length, kept)

    loss = c.zeroed(loss)
    torch.div((loss if scale is None else loss * scale).sum(), by, out=out.loss)
    if h is not None and config.entropy_coef != 0:
        out.loss.sub_((h if entropy_weights is None else entropy_weights * h).sum() / entropy_by, alpha=config.entropy_coef)

    torch.stack([by, entropy_by], out=out.numbers[:2]).reciprocal_()
    if wanted.metrics:
        r = c.zeroed(log_r.exp())
        low, high, dual = (t.sum(dtype=dtype) for t in surrogate.edges(lp, old, log_r, r, A, o))  # nowhere where A = 0, and so nowhere where masked
        kl_sum, entropy = (nothing if t is None else t.sum() for t in (None if kl is None else c.zeroed(kl), h))
        sums = [low + high, low, high, dual, approx_kl, kl_sum, entropy, r.sum(), r.amax(), outside_support]
        torch.stack(sums, out=out.numbers[2:])[:-2].div_(c.count.clamp(min=1))

    if out.grad_entropy.numel():
        out.grad_entropy.copy_(-o.entropy_coef * (c.ones if entropy_weights is None else c.zeroed(entropy_weights)))
    if out.grad_logprobs.numel():
        gradient = d_lp
        if surrogate.summand is None:
            d_log_r = plus(d_log_r, d_own)
        elif slope is not None and isinstance(d_own, Tensor):
            share = c.over_sequences(c.zeroed(d_own)) / kept_length
            own_slope = zero_where(stopped, slope)
            gradient = plus(gradient, times(own_slope if kept is None else kept * own_slope, share))
        if isinstance(d_log_r, Tensor):
            d_log_r = zero_where(stopped, d_log_r)
            if config.ratio_level in ("sequence", "sequence_sum"):
                d_log_r = c.over_sequences(c.zeroed(d_log_r))
                d_log_r = d_log_r / length if config.ratio_level == "sequence" else d_log_r
            gradient = plus(gradient, d_log_r)
        if isinstance(gradient, Tensor):
            c.zeroed(gradient if scale is None else gradient * scale, out.grad_logprobs)
        else:
            out.grad_logprobs.zero_()


def token_slopes(logprobs: Tensor, live: Tensor, terms: PolicyRows, config: PolicyLossConfig) -> Tensor:
    """By the loss, of which no other result is wanted."""
    wanted = Wanted(True, False, False)
    out = PolicyResults.empty(logprobs, wanted)
    policy_loss(terms.tokens(logprobs, live), config, wanted, out)
    return out.grad_logprobs
