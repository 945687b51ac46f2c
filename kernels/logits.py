"""Kernels over logits: log-prob and entropy of the chosen token in one read, their gradient in one read and one write, and a policy loss with both.

A row is ``V`` logits of any float dtype with unit stride. Rows lie at two strides, so that a slice such as ``logits[:, :-1]`` is read in place.
A row that is masked, or whose id is -100, is dead: none of its logits is loaded. A live row with an id outside [0, V) becomes NaN.
"""

import triton
import triton.language as tl

from . import kl, policy, softmax

IGNORE_INDEX = tl.constexpr(-100)


@triton.jit
def row_pointer(base, row, inner, outer_stride, inner_stride):
    """Where a row starts; int64, since a batch of logits passes 2^31 elements."""
    return base + (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def is_live(row, ids_ptr, mask_ptr, in_range):
    """The row's id, and whether the row counts."""
    token = tl.load(ids_ptr + row, mask=in_range, other=IGNORE_INDEX)
    live = token != IGNORE_INDEX
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + row, mask=in_range, other=0) != 0)
    return token, live


@triton.jit
def row_scale(row, scale, temperature_ptr, live):
    """logit_scale / T of a row: ``scale`` holds all of it, or only the logit scale where there is a temperature for each token."""
    scale = tl.cast(scale, tl.float32)
    if temperature_ptr is not None:
        scale = scale / tl.load(temperature_ptr + row, mask=live, other=1.0).to(tl.float32)
    return scale


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap), by the exponential since not every target has a tanh; -inf stays -inf."""
    if cap is not None:
        z = cap * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * softmax.LOG2E / cap))))
        x = tl.where(x == softmax.NEG_INF, softmax.NEG_INF, z)
    return x


@triton.jit
def load_target(x_row, token, V, cap, live):
    """The chosen token's soft-capped logit; NaN where the id is outside the vocabulary, which is then not read."""
    inside = (token >= 0) & (token < V)
    x = tl.load(x_row + token, mask=live & inside, other=0.0).to(tl.float32)
    return tl.where(inside, soft_cap(x, cap), float("nan"))


@triton.jit
def segment_statistics(x_row, start, stop, V, c, cap, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, EVICTION: tl.constexpr):
    """State of the online softmax over the blocks of a row that begin in [start, stop)."""
    m = tl.full([], softmax.NEG_INF, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    for begin in tl.range(start, stop, BLOCK, num_stages=STAGES):
        column = tl.multiple_of(begin, BLOCK) + tl.arange(0, BLOCK)
        # V itself bounds the columns: where it is a multiple of 16, the compiler sees that and loads 128 bits at a time.
        x = tl.load(x_row + column, mask=column < V, other=softmax.NEG_INF, eviction_policy=EVICTION).to(tl.float32)
        m, s, t = softmax.update(m, s, t, soft_cap(x, cap), c, ENTROPY)
    return m, tl.sum(s, 0), tl.sum(t, 0)


@triton.jit
def store_statistics(row, keep, live, m, s, t, x_target, scale, logprob_ptr, entropy_ptr, max_ptr, log2_sum_ptr, V, token):
    """Finish a state and store what the caller wants and the backward needs; zeros for a dead row."""
    logprob, entropy, log2_s = softmax.statistics(m, s, t, x_target, scale)
    tl.store(logprob_ptr + row, tl.where(live, logprob, 0.0), mask=keep)
    tl.store(max_ptr + row, tl.where(live, m, 0.0), mask=keep)
    tl.store(log2_sum_ptr + row, tl.where(live, log2_s, 0.0), mask=keep)
    if entropy_ptr is not None:
        entropy = tl.where((token >= 0) & (token < V), entropy, float("nan"))
        tl.store(entropy_ptr + row, tl.where(live, entropy, 0.0), mask=keep)


@triton.jit(do_not_specialize=["inner", "segments"])
def statistics_kernel(
    x_ptr,
    ids_ptr,
    mask_ptr,
    temperature_ptr,
    logprob_ptr,
    entropy_ptr,
    max_ptr,
    log2_sum_ptr,
    partial_ptr,
    V,
    inner,
    outer_stride,
    inner_stride,
    segments,
    scale,
    cap,
    ENTROPY: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program a (row, segment of columns). Segments depend on V alone, so a row's result does not depend on the other rows.

    A row of one segment is finished here; otherwise ``partial_ptr [rows, segments, 3]`` takes the state, for combine_kernel.
    """
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    part = program % segments
    token, live = is_live(row, ids_ptr, mask_ptr, True)
    scale = row_scale(row, scale, temperature_ptr, live)
    x_row = row_pointer(x_ptr, row, inner, outer_stride, inner_stride)
    start = part * SEGMENT
    # A dead row has no columns.
    stop = tl.where(live, tl.minimum(start + SEGMENT, V), start)
    m, s, t = segment_statistics(x_row, start, stop, V, scale * softmax.LOG2E, cap, ENTROPY, BLOCK, STAGES, "evict_first")
    if partial_ptr is None:
        x_target = load_target(x_row, token, V, cap, live)
        store_statistics(row, True, live, m, s, t, x_target, scale, logprob_ptr, entropy_ptr, max_ptr, log2_sum_ptr, V, token)
    else:
        partial = partial_ptr + (row * segments + part) * 3
        tl.store(partial, m, mask=live)
        tl.store(partial + 1, s, mask=live)
        tl.store(partial + 2, t, mask=live)


@triton.jit(do_not_specialize=["N", "inner", "segments"])
def combine_kernel(
    x_ptr,
    ids_ptr,
    mask_ptr,
    temperature_ptr,
    logprob_ptr,
    entropy_ptr,
    max_ptr,
    log2_sum_ptr,
    partial_ptr,
    N,
    V,
    inner,
    outer_stride,
    inner_stride,
    segments,
    scale,
    cap,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Merge the segments of ROWS rows, and fetch their targets. SEGMENTS: a power of two that holds ``segments``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = row < N
    token, live = is_live(row, ids_ptr, mask_ptr, keep)
    scale = row_scale(row, scale, temperature_ptr, live) + tl.zeros([ROWS], tl.float32)
    part = tl.arange(0, SEGMENTS)
    partial = partial_ptr + (row[:, None] * segments + part[None, :]) * 3
    there = live[:, None] & (part < segments)[None, :]
    m = tl.load(partial, mask=there, other=softmax.NEG_INF)
    s = tl.load(partial + 1, mask=there, other=0.0)
    t = tl.load(partial + 2, mask=there, other=0.0)
    m, s, t = softmax.merge(m, s, t, scale * softmax.LOG2E, 1)
    x_target = load_target(row_pointer(x_ptr, row, inner, outer_stride, inner_stride), token, V, cap, live)
    store_statistics(row, keep, live, m, s, t, x_target, scale, logprob_ptr, entropy_ptr, max_ptr, log2_sum_ptr, V, token)


@triton.jit
def store_gradient(x_row, dx_row, column, V, token, m, log2_s, entropy, a, b, scale, cap, live, ENTROPY: tl.constexpr):
    """Read a block of a row's logits and write d loss / d logits over the same columns of ``dx_row``; zeros, unread, where the row is dead."""
    there = column < V
    x = tl.load(x_row + column, mask=there & live, other=softmax.NEG_INF).to(tl.float32)
    z = soft_cap(x, cap)
    dx = softmax.gradient(z, column == token, m, log2_s, entropy, a, b, scale * softmax.LOG2E, ENTROPY) * scale
    if cap is not None:
        u = tl.where(x == softmax.NEG_INF, 0.0, z / cap)
        dx *= 1.0 - u * u
    tl.store(dx_row + column, tl.where(live, dx, 0.0).to(dx_row.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["inner", "blocks", "first", "total"])
def backward_kernel(
    x_ptr,
    dx_ptr,
    ids_ptr,
    mask_ptr,
    temperature_ptr,
    entropy_ptr,
    max_ptr,
    log2_sum_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    V,
    first,
    total,
    inner,
    outer_stride,
    inner_stride,
    dx_outer_stride,
    dx_inner_stride,
    blocks,
    scale,
    cap,
    BLOCK: tl.constexpr,
):
    """One program a (row, block of columns). Rows with no upstream gradient are written, not read. ``dx_ptr`` may be ``x_ptr``.

    The columns are the tokens [first, first + V) of a vocabulary of ``total``, and the statistics those of all of it.
    """
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    token, live = is_live(row, ids_ptr, mask_ptr, True)
    a = tl.load(grad_logprob_ptr + row, mask=live, other=0.0)
    b = 0.0
    entropy = 0.0
    moves = a != 0.0
    if grad_entropy_ptr is not None:
        b = tl.load(grad_entropy_ptr + row, mask=live, other=0.0)
        entropy = tl.load(entropy_ptr + row, mask=live, other=0.0)
        moves = moves | (b != 0.0)
    live = live & moves
    a = tl.where((token >= 0) & (token < total), a, float("nan"))
    m = tl.load(max_ptr + row, mask=live, other=0.0)
    log2_s = tl.load(log2_sum_ptr + row, mask=live, other=0.0)
    scale = row_scale(row, scale, temperature_ptr, live)
    x_row = row_pointer(x_ptr, row, inner, outer_stride, inner_stride)
    dx_row = row_pointer(dx_ptr, row, inner, dx_outer_stride, dx_inner_stride)
    store_gradient(x_row, dx_row, column, V, token - first, m, log2_s, entropy, a, b, scale, cap, live, grad_entropy_ptr is not None)


@triton.jit
def optional(pointer, row, live, default):
    """The row's value of a tensor that may be absent."""
    if pointer is None:
        x = default
    else:
        x = tl.load(pointer + row, mask=live, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["inner"])
def loss_kernel(
    x_ptr,
    dx_ptr,
    ids_ptr,
    live_ptr,
    temperature_ptr,
    old_ptr,
    advantages_ptr,
    ref_ptr,
    weights_ptr,
    sampling_ptr,
    entropy_mask_ptr,
    loss_weights_ptr,
    entropy_weights_ptr,
    logprob_ptr,
    entropy_ptr,
    V,
    inner,
    outer_stride,
    inner_stride,
    dx_outer_stride,
    dx_inner_stride,
    scale,
    cap,
    o,
    TERM: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    KL_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program a row: statistics, the token's objective, and d loss / d logits, over the logits themselves where ``dx_ptr`` is ``x_ptr``.

    The second pass runs backwards: it begins with the blocks that were read last, which the cache still holds.
    """
    row = tl.program_id(0).to(tl.int64)
    token, live = is_live(row, ids_ptr, live_ptr, True)
    scale = row_scale(row, scale, temperature_ptr, live)
    x_row = row_pointer(x_ptr, row, inner, outer_stride, inner_stride)
    dx_row = row_pointer(dx_ptr, row, inner, dx_outer_stride, dx_inner_stride)
    # Before the reductions, and so before any thread of the program may write over it.
    x_target = load_target(x_row, token, V, cap, live)
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    stop = tl.where(live, V, 0)
    m, s, t = segment_statistics(x_row, 0, stop, V, scale * softmax.LOG2E, cap, HAS_ENTROPY, BLOCK, STAGES, "evict_last")
    lp, entropy, log2_s = softmax.statistics(m, s, t, x_target, scale)
    lp = tl.where(live, lp, 0.0)
    tl.store(logprob_ptr + row, lp)
    if HAS_ENTROPY:
        entropy = tl.where((token >= 0) & (token < V), entropy, float("nan"))
        tl.store(entropy_ptr + row, tl.where(live, entropy, 0.0))

    old = optional(old_ptr, row, live, lp)
    log_r = kl.clamp(lp - old, o.log_ratio_low, o.log_ratio_high)
    stopped = kl.outside(lp - old, o.log_ratio_low, o.log_ratio_high)
    kept = live
    if entropy_mask_ptr is not None:
        kept = kept & (tl.load(entropy_mask_ptr + row, mask=live, other=0) != 0)
    A = tl.load(advantages_ptr + row, mask=live, other=0.0).to(tl.float32)
    _, d_lp, d_log_r, d_own, _ = policy.objective(
        lp,
        old,
        log_r,
        log_r,
        A,
        optional(weights_ptr, row, live, None),
        kept,
        optional(ref_ptr, row, live, None),
        optional(sampling_ptr, row, live, None),
        o,
        TERM,
        ESTIMATOR,
        KL_WEIGHT,
    )
    a = (d_lp + tl.where(stopped, 0.0, d_log_r + d_own)) * tl.load(loss_weights_ptr + row, mask=live, other=0.0).to(tl.float32)
    b = optional(entropy_weights_ptr, row, live, 0.0)
    live = live & ((a != 0.0) | (b != 0.0))
    blocks = tl.cdiv(V, BLOCK)
    for k in tl.range(0, blocks):
        column = tl.multiple_of((blocks - 1 - k) * BLOCK, BLOCK) + tl.arange(0, BLOCK)
        store_gradient(x_row, dx_row, column, V, token, m, log2_s, entropy, a, b, scale, cap, live, entropy_weights_ptr is not None)


@triton.jit(do_not_specialize=["inner"])
def restrict_kernel(x_ptr, out_ptr, offsets_ptr, token_ids_ptr, rows_ptr, V, inner, outer_stride, inner_stride, BLOCK: tl.constexpr):
    """A row of ``out [rows, V]``: -inf, but for the kept tokens, which are all that is read. ``rows_ptr``: where a row's kept tokens are listed."""
    row = tl.program_id(0).to(tl.int64)
    listed = row
    if rows_ptr is not None:
        listed = tl.load(rows_ptr + row).to(tl.int64)
    x_row = row_pointer(x_ptr, row, inner, outer_stride, inner_stride)
    out_row = out_ptr + row * V
    for begin in tl.range(0, V, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        tl.store(out_row + column, tl.full([BLOCK], softmax.NEG_INF, tl.float32).to(out_ptr.dtype.element_ty), mask=column < V)
    tl.debug_barrier()  # kept logits go where other threads have just written
    start = tl.load(offsets_ptr + listed).to(tl.int64)
    stop = tl.load(offsets_ptr + listed + 1).to(tl.int64)
    for begin in range(start, stop, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        column = tl.load(token_ids_ptr + k, mask=k < stop, other=-1)
        there = (column >= 0) & (column < V)
        tl.store(out_row + column, tl.load(x_row + column, mask=there, other=0.0), mask=there)


@triton.jit(do_not_specialize=["tiles", "inner"])
def scale_kernel(x_ptr, factor_ptr, V, tiles, inner, outer_stride, inner_stride, BLOCK: tl.constexpr):
    """x *= factor, in float32 and rounded once; where the factor, read here, is 1, nothing of x is touched. Programs share tiles of BLOCK columns."""
    factor = tl.load(factor_ptr).to(tl.float32)
    stop = tl.where(factor == 1.0, 0, tiles)
    blocks = tl.cdiv(V, BLOCK)
    for tile in range(tl.program_id(0), stop, tl.num_programs(0)):
        column = (tile % blocks) * BLOCK + tl.arange(0, BLOCK)
        x = row_pointer(x_ptr, tile // blocks, inner, outer_stride, inner_stride) + column
        inside = column < V
        tl.store(x, tl.load(x, mask=inside).to(tl.float32) * factor, mask=inside)
