"""Kernels over logits: log-prob and entropy of the chosen token in one read, their gradient in one read and one write, and a policy loss with both.

A row is ``V`` logits of any float dtype with unit stride. Rows lie at two strides, so that a slice such as ``logits[:, :-1]`` is read in place.
A row that is masked, or whose id is -100, is dead: none of its logits is loaded. A live row with an id outside [0, V) becomes NaN.
"""

import triton
import triton.language as tl

from . import kl, policy, softcap, softmax

IGNORE_INDEX = tl.constexpr(-100)


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Where a row starts; int64, since a batch of logits passes 2^31 elements."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def row_pointer(base, row, inner, outer_stride, inner_stride):
    return base + row_offset(row, inner, outer_stride, inner_stride)


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
def load_target(x_row, token, V, live):
    """The chosen token's logit; NaN where the id is outside the vocabulary, which is then not read."""
    inside = (token >= 0) & (token < V)
    return tl.load(x_row + token, mask=live & inside, other=float("nan")).to(tl.float32)


@triton.jit
def take(state, x, c, cap, ENTROPY: tl.constexpr):
    """A block of a row, taken into the states of its lanes."""
    x = softmax.in_lanes(softmax.widened(x), state[0].shape[0])
    return softmax.update(state[0], state[1], state[2], softcap.capped(x, cap), softcap.times_unit(c, cap), ENTROPY)


@triton.jit
def segment_statistics(x_row, start, stop, V, c, cap, columns, LANES: tl.constexpr, ENTROPY: tl.constexpr, EVICTION: tl.constexpr):
    """State of the online softmax over the columns [start, stop) of a row: whole blocks, which need no mask, and the rest of the row.

    ``columns``: a :func:`softmax.tile`.
    """
    BLOCK: tl.constexpr = columns.numel
    m, s, t = softmax.start(LANES)
    rest = start + (stop - start) // BLOCK * BLOCK
    block = x_row + start
    for _ in tl.range(0, (stop - start) // BLOCK, num_stages=1):
        x = tl.load(block + columns, eviction_policy=EVICTION)
        m, s, t = take((m, s, t), x, c, cap, ENTROPY)
        block += BLOCK
    if rest < stop:
        # V itself bounds the columns: where it is a multiple of 16, the compiler sees that and loads 128 bits at a time.
        column = tl.multiple_of(rest, BLOCK) + columns
        x = tl.load(x_row + column, mask=column < V, other=softmax.NEG_INF, eviction_policy=EVICTION)
        m, s, t = take((m, s, t), x, c, cap, ENTROPY)
    m, s, t = softmax.merge(m, s, t, softcap.times_unit(c, cap), 0)
    return softcap.uncapped(m, cap), s, t


@triton.jit
def store_statistics(row, keep, live, state, x_target, scale, results, V, token):
    """Finish a state (m, s, t) and store ``results``, pointers to what the caller wants and the backward needs; zeros for a dead row."""
    logprob_ptr, entropy_ptr, max_ptr, log2_sum_ptr = results
    logprob, entropy, log2_s = softmax.statistics(state[0], state[1], state[2], x_target, scale)
    tl.store(logprob_ptr + row, tl.where(live, logprob, 0.0), mask=keep)
    tl.store(max_ptr + row, tl.where(live, state[0], 0.0), mask=keep)
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
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
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
    m, s, t = segment_statistics(x_row, start, stop, V, scale * softmax.LOG2E, cap, softmax.tile(UNROLL, LANES, WIDTH), LANES, ENTROPY, "")
    if partial_ptr is None:
        x_target = softcap.value_and_slope(load_target(x_row, token, V, live), cap)[0]
        store_statistics(row, True, live, (m, s, t), x_target, scale, (logprob_ptr, entropy_ptr, max_ptr, log2_sum_ptr), V, token)
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
    m = tl.load(partial, mask=there, other=softmax.FINITE_MIN)
    s = tl.load(partial + 1, mask=there, other=0.0)
    t = tl.load(partial + 2, mask=there, other=0.0)
    m, s, t = softmax.merge(m, s, t, (scale * softmax.LOG2E)[:, None], 1)
    x_target = softcap.value_and_slope(load_target(row_pointer(x_ptr, row, inner, outer_stride, inner_stride), token, V, live), cap)[0]
    store_statistics(row, keep, live, (m, s, t), x_target, scale, (logprob_ptr, entropy_ptr, max_ptr, log2_sum_ptr), V, token)


# ---- the gradient: of each element on its own, and so by addresses instead of columns. Where V is no multiple of 16, rows begin anywhere:
# of each, the ``body`` is loaded and stored 16 bytes at a time, the ``head`` before it and what is left after it one by one.


@triton.jit
def pieces(offset, V, WIDTH: tl.constexpr):
    """(head, body) of a row at this offset: how many columns come before those in whole aligned pieces of WIDTH, and how many these are."""
    head = tl.minimum(-offset & (WIDTH - 1), V).to(tl.int32)
    return head, (V - head) // WIDTH * WIDTH


@triton.jit
def body_pointer(base, offset, head, WIDTH: tl.constexpr):
    """Where the body of a row starts. The launcher has seen to it that one head fits all tensors."""
    return base + tl.multiple_of(offset + head, WIDTH)


@triton.jit
def share(part, parts, head, body, V, COLUMNS: tl.constexpr):
    """What a part of a row has: (start, stop), columns of the body, and (low, high), the same as columns of the row, with the edges beside them."""
    start = tl.minimum(part * COLUMNS, body)
    stop = tl.minimum(start + COLUMNS, body)
    return start, stop, tl.where(part == 0, 0, head + start), tl.where(part == parts - 1, V, head + stop)


@triton.jit
def edges(head, body, low, high, LANES: tl.constexpr):
    """The columns before and after the body, one a lane, and which of the lanes have one that lies in [low, high)."""
    i = softmax.tile(1, LANES, 1)
    column = tl.where(i < head, i, i + body)
    return column, (column >= low) & (column < high)


@triton.jit
def slope_at(x, saved, k, c, cap, ENTROPY: tl.constexpr, TARGET: tl.constexpr):
    """d loss / d logits, where they are ``x``. ``saved`` = (m, log2 s), ``k`` = (k0, k1, k2) of :func:`softmax.slopes`."""
    m, log2_s = saved
    z = x
    if cap is not None:
        q = softcap.rest(x, cap, 1.0)
        z = softcap.times_unit(q, -cap)  # less cap, like m
        m -= cap
    dx = softmax.gradient(z, m, log2_s, c, k[0], k[1], ENTROPY)
    if TARGET:
        dx = tl.where(x > softmax.NEG_INF, dx + k[2], dx)  # a target of -inf has no gradient either
    if cap is not None:
        dx *= q - q * q  # 0 for -inf
    return dx


@triton.jit
def store_gradient(x_row, dx_row, column, mask, saved, k, c, cap, ENTROPY: tl.constexpr):
    """Read columns of a row's logits and write d loss / d logits over the same of ``dx_row``, as if none was the target: see :func:`store_target`.

    ``mask``: None where all of them are there.
    """
    x = softmax.widened(tl.load(x_row + column, mask=mask, other=None if mask is None else 0.0))
    tl.store(dx_row + column, slope_at(x, saved, k, c, cap, ENTROPY, False).to(dx_row.dtype.element_ty), mask=mask)


@triton.jit
def store_target(dx_row, token, here, x_target, saved, k, c, cap, ENTROPY: tl.constexpr):
    """Once a row and not for each element: the target's gradient, over what its block wrote there. ``x_target`` was read before."""
    tl.debug_barrier()  # the block's write is another thread's
    tl.store(dx_row + token, slope_at(x_target, saved, k, c, cap, ENTROPY, True).to(dx_row.dtype.element_ty), mask=here)


@triton.jit
def store_zeros(dx_row, edge, inside, dx_body, start, stop, columns):
    """Over the edges of a row that are ``inside``, and the columns [start, stop) of its body."""
    tl.store(dx_row + edge, tl.zeros(edge.shape, dx_row.dtype.element_ty), mask=inside)
    for begin in tl.range(start, stop, columns.numel):
        column = tl.multiple_of(begin, columns.numel) + columns
        tl.store(dx_body + column, tl.zeros(columns.shape, dx_body.dtype.element_ty), mask=column < stop)


@triton.jit(do_not_specialize=["inner", "parts", "first", "total"])
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
    parts,
    scale,
    cap,
    BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a (row, BLOCKS blocks of columns). Rows with no upstream gradient are written, not read. ``dx_ptr`` may be ``x_ptr``.

    The columns are the tokens [first, first + V) of a vocabulary of ``total``, and the statistics those of all of it.
    """
    BLOCK: tl.constexpr = UNROLL * LANES * WIDTH
    ENTROPY: tl.constexpr = grad_entropy_ptr is not None
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
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
    at = row_offset(row, inner, outer_stride, inner_stride)
    dx_at = row_offset(row, inner, dx_outer_stride, dx_inner_stride)
    x_row, dx_row = x_ptr + at, dx_ptr + dx_at
    k = softmax.slopes(a, b, entropy, scale if cap is None else 4.0 * scale)  # see softcap.value_and_slope
    columns = softmax.tile(UNROLL, LANES, WIDTH)
    head, body = pieces(at, V, WIDTH)
    x_body, dx_body = body_pointer(x_ptr, at, head, WIDTH), body_pointer(dx_ptr, dx_at, head, WIDTH)
    start, stop, low, high = share(program % parts, parts, head, body, V, BLOCKS * BLOCK)
    edge, inside = edges(head, body, low, high, LANES)
    token -= first
    c = scale * softmax.LOG2E
    if live:
        here = (token >= low) & (token < high)
        x_target = tl.load(x_row + token, mask=here, other=0.0).to(tl.float32)
        tl.debug_barrier()  # every thread has read it before any writes over it
        rest = start + (stop - start) // BLOCK * BLOCK
        for begin in tl.range(start, rest, BLOCK, num_stages=1):
            store_gradient(x_body, dx_body, tl.multiple_of(begin, BLOCK) + columns, None, (m, log2_s), k, c, cap, ENTROPY)
        if rest < stop:
            column = tl.multiple_of(rest, BLOCK) + columns
            store_gradient(x_body, dx_body, column, column < body, (m, log2_s), k, c, cap, ENTROPY)
        store_gradient(x_row, dx_row, edge, inside, (m, log2_s), k, c, cap, ENTROPY)
        store_target(dx_row, token, here, x_target, (m, log2_s), k, c, cap, ENTROPY)
    else:
        store_zeros(dx_row, edge, inside, dx_body, start, stop, columns)


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
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    HOLD: tl.constexpr,
):
    """One program a row: statistics, the token's objective, and d loss / d logits, over the logits themselves where ``dx_ptr`` is ``x_ptr``.

    The second pass, which loads and stores PIECE neighbours at a time, runs backwards: it begins with what was read last and the cache still holds.
    """
    row = tl.program_id(0).to(tl.int64)
    token, live = is_live(row, ids_ptr, live_ptr, True)
    scale = row_scale(row, scale, temperature_ptr, live)
    at = row_offset(row, inner, outer_stride, inner_stride)
    dx_at = row_offset(row, inner, dx_outer_stride, dx_inner_stride)
    x_row, dx_row = x_ptr + at, dx_ptr + dx_at
    # Before the reductions, and so before any thread of the program may write over it.
    x_target = load_target(x_row, token, V, live)
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    stop = tl.where(live, V, 0)
    c = scale * softmax.LOG2E
    columns = softmax.tile(UNROLL, LANES, WIDTH)
    m, s, t = segment_statistics(x_row, 0, stop, V, c, cap, columns, LANES, HAS_ENTROPY, "evict_last" if HOLD else "")
    lp, entropy, log2_s = softmax.statistics(m, s, t, softcap.value_and_slope(x_target, cap)[0], scale)
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
        (log_r, log_r),
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
    k = softmax.slopes(a, b, entropy, scale if cap is None else 4.0 * scale)  # see softcap.value_and_slope
    BONUS: tl.constexpr = entropy_weights_ptr is not None
    columns = softmax.tile((UNROLL * WIDTH + PIECE - 1) // PIECE, LANES, PIECE)
    BLOCK: tl.constexpr = columns.numel
    head, body = pieces(at, V, PIECE)
    x_body, dx_body = body_pointer(x_ptr, at, head, PIECE), body_pointer(dx_ptr, dx_at, head, PIECE)
    edge, inside = edges(head, body, 0, V, LANES)
    tl.debug_barrier()  # every thread has read its part of the row before any writes over it
    if live & ((a != 0.0) | (b != 0.0)):
        store_gradient(x_row, dx_row, edge, inside, (m, log2_s), k, c, cap, BONUS)
        whole = body // BLOCK
        if whole * BLOCK < body:
            column = tl.multiple_of(whole * BLOCK, BLOCK) + columns
            store_gradient(x_body, dx_body, column, column < body, (m, log2_s), k, c, cap, BONUS)
        x_body += whole * BLOCK
        dx_body += whole * BLOCK
        for _turn in tl.range(0, whole, num_stages=1):
            x_body -= BLOCK
            dx_body -= BLOCK
            store_gradient(x_body, dx_body, columns, None, (m, log2_s), k, c, cap, BONUS)
        store_target(dx_row, token, (token >= 0) & (token < V), x_target, (m, log2_s), k, c, cap, BONUS)
    else:
        store_zeros(dx_row, edge, inside, dx_body, 0, body, columns)


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
