"""The policy loss on per-token tensors: ratio, surrogate, KL, aggregation, metrics and all gradients in one launch.

A program owns a segment of a row: a whole sequence where the objective speaks of sequences, else a tile of tokens. It goes over its segment
once for the sequence's statistics (if any are needed), once for the losses, their sums and the direct gradients, and a third time where a gradient
with respect to the sequence's ratio is spread over its tokens. The program that arrives last adds the partial sums up, in a fixed order, and
so knows the counts that the loss is divided by; gradients are therefore stored undivided, and the backward scales them.

Masked positions are never read.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import policy
from .kl import clamp, outside, times


class Rows(NamedTuple):
    """A tensor read as [sequences, time] at any two strides; the stride of sequences is 0 where the time runs through packed sequences."""

    pointer: Any
    row: int
    column: int


# The rows of ``partials``, one column a program; the last is a maximum, the others sums.
PARTIALS = tl.constexpr(15)


@triton.jit
def at(x, row, columns):
    return x.pointer + row * x.row + columns * x.column


@triton.jit
def read(x, row, columns, live, DTYPE: tl.constexpr):
    return tl.load(at(x, row, columns), mask=live, other=0.0).to(DTYPE)


@triton.jit
def read_flag(x, row, columns, live):
    """Where ``live`` and, if there is a mask ``x``, it is not zero."""
    if x is None:
        flag = live
    else:
        flag = live & (tl.load(at(x, row, columns), mask=live, other=0) != 0)
    return flag


@triton.jit
def read_logprob(logprobs, mask, row, columns, inside, DTYPE: tl.constexpr):
    """(log-prob, or 0 where the token does not count; where it counts; where it is excluded, with log-prob -inf, and would otherwise count)."""
    allowed = read_flag(mask, row, columns, inside)
    lp = read(logprobs, row, columns, allowed, DTYPE)
    excluded = lp == float("-inf")
    return tl.where(excluded, 0.0, lp), allowed & ~excluded, excluded


@triton.jit
def read_old(old, lp, row, columns, live, DTYPE: tl.constexpr):
    """The behaviour log-prob; the policy's own where there is none."""
    if old is None:
        value = lp
    else:
        value = read(old, row, columns, live, DTYPE)
    return value


@triton.jit
def segment(cu_seqlens, time, tiles, tile):
    """The program's row and the columns [begin, end) that it goes over."""
    row = tl.program_id(0).to(tl.int64)
    if cu_seqlens is None:
        begin = (row % tiles) * tile
        end = tl.minimum(begin + tile, time)
        row = row // tiles
    else:
        begin = tl.maximum(tl.load(cu_seqlens + row).to(tl.int64), 0)
        end = tl.minimum(tl.load(cu_seqlens + row + 1).to(tl.int64), time)
    return row, begin, end


@triton.jit
def store_partial(partials, k: tl.constexpr, value):
    tl.store(partials + k * tl.num_programs(0).to(tl.int64) + tl.program_id(0), value)


@triton.jit
def arrives_last(arrivals):
    """Whether all the other programs have stored their partial sums."""
    tl.debug_barrier()  # this one's are stored before its arrival is announced
    return tl.atomic_add(arrivals, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def add_up(partials, k: tl.constexpr, programs, BLOCK: tl.constexpr):
    """Row k of the partial sums, summed in float64 and in one order: counts stay exact, results the same in every run."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        total += tl.load(partials + k * programs.to(tl.int64) + p, mask=p < programs, other=0.0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def divisor(AGGREGATION: tl.constexpr, normalizer, tokens, sequences, max_length):
    """What the sum of (weighted) losses is divided by. A count of 0 divides by 1."""
    if normalizer is not None:
        count = tl.load(normalizer).to(tl.float64)
    elif AGGREGATION == "token-mean":
        count = tokens
    elif AGGREGATION == "sum":
        count = tl.full([], 1.0, tl.float64)
    else:
        count = sequences
    count = tl.where(count == 0.0, 1.0, count)
    if AGGREGATION == "seq-mean-token-sum-norm":
        count = count * max_length
    return count


@triton.jit
def finish(partials, loss_out, results, normalizer, o, AGGREGATION: tl.constexpr, ENTROPY_AGGREGATION: tl.constexpr, BLOCK: tl.constexpr):
    """From the partial sums to the loss, and to ``results``: 1 / divisor of the loss and of the entropy bonus, metrics."""
    programs = tl.num_programs(0)
    tokens, sequences = add_up(partials, 2, programs, BLOCK), add_up(partials, 3, programs, BLOCK)
    by = divisor(AGGREGATION, normalizer, tokens, sequences, o.max_length)
    entropy_by = by
    if ENTROPY_AGGREGATION != "":
        kept_tokens, kept_sequences = add_up(partials, 4, programs, BLOCK), add_up(partials, 5, programs, BLOCK)
        entropy_by = divisor(ENTROPY_AGGREGATION, None, kept_tokens, kept_sequences, o.max_length)
    loss = add_up(partials, 0, programs, BLOCK) / by - o.entropy_coef * (add_up(partials, 1, programs, BLOCK) / entropy_by)
    tl.store(loss_out, loss)
    tl.store(results, 1.0 / by)
    tl.store(results + 1, 1.0 / entropy_by)
    count = tl.maximum(tokens, 1.0)
    low, high = add_up(partials, 6, programs, BLOCK) / count, add_up(partials, 7, programs, BLOCK) / count
    tl.store(results + 2, low + high)
    tl.store(results + 3, low)
    tl.store(results + 4, high)
    for k in tl.static_range(8, 13):
        tl.store(results + k - 3, add_up(partials, k, programs, BLOCK) / count)
    tl.store(results + 11, add_up(partials, 13, programs, BLOCK))
    largest = tl.full([BLOCK], float("-inf"), partials.dtype.element_ty)
    for start in range(0, programs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        largest = tl.maximum(
            largest, tl.load(partials + 14 * programs.to(tl.int64) + p, mask=p < programs, other=float("-inf"), cache_modifier=".cg")
        )
    tl.store(results + 10, tl.where(tokens > 0.0, tl.max(largest, 0), 0.0))


@triton.jit
def policy_kernel(
    logprobs,
    old,
    advantages,
    mask,
    ref,
    entropy,
    weights,
    sampling,
    entropy_mask,
    grad_logprobs,
    grad_entropy,
    normalizer,
    cu_seqlens,
    partials,
    arrivals,
    loss_out,
    results,
    time,
    tiles,
    tile,
    o,
    TERM: tl.constexpr,
    EDGES: tl.constexpr,
    SUMMAND: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    LEVEL: tl.constexpr,
    KL_WEIGHT: tl.constexpr,
    AGGREGATION: tl.constexpr,
    ENTROPY_AGGREGATION: tl.constexpr,
    OFF_POLICY: tl.constexpr,
    STATISTICS: tl.constexpr,
    REDUCTION: tl.constexpr,
    ONE_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tensors up to ``grad_entropy`` are Rows, or None where absent. A row has ``tiles`` programs of ``tile`` columns each; or cu_seqlens says
    where the one program of a sequence begins and ends.

    REDUCTION: how a surrogate that has a SUMMAND reduces it over the sequence: "kept-mean" (gmpo: mean over mask and entropy mask) or "weighted-sum"
    (vespo: sum, with the logarithms of the weights; ONE_WEIGHT: of one weight for the sequence), else "". STATISTICS: a first pass is needed.
    ENTROPY_AGGREGATION "": the policy's own.
    """
    DTYPE: tl.constexpr = partials.dtype.element_ty
    SPREAD: tl.constexpr = LEVEL == "sequence" or LEVEL == "sequence_sum"
    KEPT_MEAN: tl.constexpr = REDUCTION == "kept-mean"
    row, begin, end = segment(cu_seqlens, time, tiles, tile)
    offsets = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], DTYPE)

    # First pass: the sequence's length, ratio and drift.
    length = tl.full([], 1.0, DTYPE)
    kept_length = length
    sequence_log_r = tl.full([], 0.0, DTYPE)
    own_log_r = sequence_log_r
    drift = sequence_log_r
    if STATISTICS:
        n, kept_n, total, own_total, drift_total = zero, zero, zero, zero, zero
        for start in range(begin, end, BLOCK):
            columns = start + offsets
            lp, live, _ = read_logprob(logprobs, mask, row, columns, columns < end, DTYPE)
            kept = read_flag(entropy_mask, row, columns, live)
            n += live.to(DTYPE)
            kept_n += kept.to(DTYPE)
            if LEVEL != "token" or REDUCTION != "" or OFF_POLICY:
                if LEVEL != "token" or REDUCTION != "":
                    log_r = lp - read_old(old, lp, row, columns, live, DTYPE)
                    total += log_r
                if REDUCTION != "":
                    A = read(advantages, row, columns, live, DTYPE)
                    summand, _ = SUMMAND(clamp(log_r, o.log_ratio_low, o.log_ratio_high), A, o)
                    own_total += tl.where(kept if KEPT_MEAN else live, summand, 0.0)
                    if REDUCTION == "weighted-sum" and weights is not None and not ONE_WEIGHT:
                        own_total += tl.where(live, policy.log_weight(read(weights, row, columns, live, DTYPE)), 0.0)
                if OFF_POLICY:
                    drift_total += read(sampling, row, columns, live, DTYPE) - lp
        tokens = tl.sum(n, 0)
        length = tl.maximum(tokens, 1.0)
        kept_length = tl.maximum(tl.sum(kept_n, 0), 1.0)
        sequence_log_r = tl.sum(total, 0)
        if LEVEL != "sequence_sum":
            sequence_log_r = sequence_log_r / length
        own_log_r = tl.sum(own_total, 0)
        if KEPT_MEAN:
            own_log_r = own_log_r / kept_length
        if REDUCTION == "weighted-sum" and weights is not None and ONE_WEIGHT:
            own_log_r += policy.log_weight(tl.load(at(weights, row, begin), mask=tokens > 0.0, other=1.0).to(DTYPE))
        drift = tl.sum(drift_total, 0) / length
    # What the lengths put into the weight of a token.
    scale = 1.0 / length if AGGREGATION == "seq-mean-token-mean" else tl.full([], 1.0, DTYPE)
    entropy_scale = scale
    if ENTROPY_AGGREGATION != "":
        entropy_scale = 1.0 / kept_length if ENTROPY_AGGREGATION == "seq-mean-token-mean" else tl.full([], 1.0, DTYPE)

    # Second pass: losses, direct gradients, metrics.
    losses, kept_counts, entropies, kept_entropies, spread = zero, zero, zero, zero, zero
    duals, drifts, kls, ratios, largest = zero, zero, zero, zero, zero + float("-inf")
    # Two counts in a number, since registers are short: of a lane, which sees a token in BLOCK, each stays below 2^15.
    tallies, clips = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        columns = start + offsets
        inside = columns < end
        lp, live, excluded = read_logprob(logprobs, mask, row, columns, inside, DTYPE)
        kept = read_flag(entropy_mask, row, columns, live)
        tallies += live.to(tl.int32) + (excluded.to(tl.int32) << 16)
        behaviour = read_old(old, lp, row, columns, live, DTYPE)
        A = read(advantages, row, columns, live, DTYPE)
        log_r = lp - behaviour if LEVEL == "token" else zero + sequence_log_r
        stopped = outside(log_r, o.log_ratio_low, o.log_ratio_high)
        log_r = clamp(log_r, o.log_ratio_low, o.log_ratio_high)
        keep = live if KEPT_MEAN else kept  # the geometric mean has taken the entropy mask into account
        if OFF_POLICY:
            keep = keep & ((A >= 0.0) | (zero + drift <= o.off_policy_threshold))
        w = read(weights, row, columns, live, DTYPE) if weights is not None and REDUCTION != "weighted-sum" else None
        reference = read(ref, row, columns, live, DTYPE) if ref is not None else None
        sampled = read(sampling, row, columns, live, DTYPE) if KL_WEIGHT == "sampling" else None
        loss, d_lp, d_log_r, d_own, kl = policy.objective(
            lp, behaviour, (log_r, zero + own_log_r if REDUCTION != "" else log_r), A, w, keep, reference, sampled, o, TERM, ESTIMATOR, KL_WEIGHT
        )
        if REDUCTION == "":
            d_log_r += d_own
        elif KEPT_MEAN:
            spread += tl.where(live, d_own, 0.0)
        d_log_r = tl.where(stopped, 0.0, d_log_r)
        if SPREAD:
            spread += tl.where(live, d_log_r, 0.0)
        else:
            d_lp += d_log_r
        if grad_logprobs is not None:
            tl.store(at(grad_logprobs, row, columns), tl.where(live, scale * d_lp, 0.0), mask=inside)

        losses += tl.where(live, loss, 0.0)
        if ENTROPY_AGGREGATION != "":
            kept_counts += kept.to(DTYPE)
        if entropy is not None:
            h = read(entropy, row, columns, live, DTYPE)
            entropies += h
            if ENTROPY_AGGREGATION != "":
                kept_entropies += tl.where(kept, h, 0.0)
            if grad_entropy is not None:
                counted = live if ENTROPY_AGGREGATION == "" else kept
                tl.store(at(grad_entropy, row, columns), tl.where(counted, -o.entropy_coef * entropy_scale, 0.0), mask=inside)
        low, high, dual = EDGES(lp, behaviour, log_r, A, o)
        clips += (live & low).to(tl.int32) + ((live & high).to(tl.int32) << 16)
        duals += (live & dual).to(DTYPE)
        drifts += behaviour - lp
        kls += tl.where(live, kl, 0.0)
        r = tl.exp(log_r)
        ratios += tl.where(live, r, 0.0)
        largest = tl.maximum(largest, tl.where(live, r, float("-inf")))

    # Third pass: a gradient with respect to the sequence's ratio goes to all of its tokens.
    if grad_logprobs is not None and (SPREAD or KEPT_MEAN):
        share = scale * tl.sum(spread, 0)
        excludes = tl.max(tallies, 0) >= 65536
        if KEPT_MEAN:
            share = share / kept_length
        elif LEVEL == "sequence":
            share = share / length
        tl.debug_barrier()  # the direct gradients were stored by other threads of the program
        for start in range(begin, end, BLOCK):
            columns = start + offsets
            takes = read_flag(mask, row, columns, columns < end)
            if KEPT_MEAN or excludes:
                lp, takes, _ = read_logprob(logprobs, mask, row, columns, columns < end, DTYPE)
            gradient = read(grad_logprobs, row, columns, takes, DTYPE)
            if KEPT_MEAN:
                takes = read_flag(entropy_mask, row, columns, takes)
                log_r = lp - read_old(old, lp, row, columns, takes, DTYPE)
                A = read(advantages, row, columns, takes, DTYPE)
                _, slope = SUMMAND(clamp(log_r, o.log_ratio_low, o.log_ratio_high), A, o)
                gradient += times(tl.where(outside(log_r, o.log_ratio_low, o.log_ratio_high), 0.0, slope), share)
            else:
                gradient += share
            tl.store(at(grad_logprobs, row, columns), gradient, mask=takes)

    count = tl.sum((tallies & 65535).to(DTYPE), 0)
    kept_count = tl.sum(kept_counts, 0)
    if ENTROPY_AGGREGATION == "":
        kept_count, kept_entropies = count, entropies
    store_partial(partials, 0, scale * tl.sum(losses, 0))
    store_partial(partials, 1, entropy_scale * tl.sum(kept_entropies, 0))
    store_partial(partials, 2, count)
    store_partial(partials, 3, tl.where(count > 0.0, 1.0, 0.0))
    store_partial(partials, 4, kept_count)
    store_partial(partials, 5, tl.where(kept_count > 0.0, 1.0, 0.0))
    store_partial(partials, 6, tl.sum((clips & 65535).to(DTYPE), 0))
    store_partial(partials, 7, tl.sum((clips >> 16).to(DTYPE), 0))
    store_partial(partials, 8, tl.sum(duals, 0))
    store_partial(partials, 9, tl.sum(drifts, 0))
    store_partial(partials, 10, tl.sum(kls, 0))
    store_partial(partials, 11, tl.sum(entropies, 0))
    store_partial(partials, 12, tl.sum(ratios, 0))
    store_partial(partials, 13, tl.sum((tallies >> 16).to(DTYPE), 0))
    store_partial(partials, 14, tl.max(largest, 0))
    if arrives_last(arrivals):
        finish(partials, loss_out, results, normalizer, o, AGGREGATION, ENTROPY_AGGREGATION, BLOCK)
