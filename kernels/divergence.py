"""Kernels over two logits tensors: KL, reverse KL and generalised Jensen-Shannon divergence of each row's softmaxes, and the gradient to the first.

``x`` makes p (the policy, the student), ``y`` makes q (the reference, the teacher); see softmax.py for a row's ``m``, ``s`` and ``c``. Both are read
once for a KL; a JSD needs both sums before its terms, and reads them again, backwards: what the cache still holds first. Log-ratios come from
differences to the maxima, ``D = log2 p - log2 q = c ((x - m_p) - (y - m_q)) - (log2 s_p - log2 s_q)``, so that they are as exact as they are small.

``-inf`` on both sides contributes nothing; ``x > -inf`` where ``y = -inf`` makes KL(p || q) infinite, however small p is.
"""

import triton
import triton.language as tl

from . import logits, softcap, softmax

INF = tl.constexpr(float("inf"))
HALF_MAX = tl.constexpr(1.7014117331926443e38)  # of the largest number
# The least factor of a sum that may be infinite already: times 0 it would turn to NaN.
LEAST = tl.constexpr(1e-37)
LEAST_WEIGHT = tl.constexpr(1e-20)


@triton.jit
def cross(t, s, m, m_new, other, other_new, x, y, c):
    """Take a block into the lanes' t = sum 2^d (d - d'), d and d' being the distances of x and y from their maxima, in bits; ``s`` is from before the
    block."""
    shift = softmax.shift(m, m_new, c)
    a = softmax.half(x, m_new)
    b = softmax.half(y, other_new)
    # Finite: 0 where both are -inf. Where only b is, that tells, also if 2^d rounds to 0: half of no number is as far away.
    ratio = tl.maximum(a, softmax.FINITE_MIN) - tl.maximum(b, softmax.FINITE_MIN)
    more = softmax.lane_sum(tl.exp2(a * (2.0 * c)) * ratio) * (2.0 * c)
    t = tl.maximum(tl.exp2(shift), LEAST) * (t + (shift - softmax.shift(other, other_new, c)) * s) + more
    return tl.where(softmax.lane_max(ratio) > HALF_MAX, INF, t)


@triton.jit
def is_live(row, mask_ptr):
    """Whether the row counts."""
    live = row >= 0
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + row) != 0)
    return live


@triton.jit
def load_block(x_row, y_row, column, mask, EVICTION: tl.constexpr = ""):
    """Columns of both rows. ``mask``: None where all of them are there; -inf elsewhere."""
    other = None if mask is None else softmax.NEG_INF
    x = tl.load(x_row + column, mask=mask, other=other, eviction_policy=EVICTION)
    y = tl.load(y_row + column, mask=mask, other=other, eviction_policy=EVICTION)
    return softmax.widened(x), softmax.widened(y)


@triton.jit
def log2_sum(s):
    """log2 s; NaN for a row of -inf, which is no distribution."""
    return tl.where(s == 0.0, float("nan"), tl.log2(s))


@triton.jit
def distances(x, y, m_p, m_q):
    """Of x and y from their maxima; finite, and so is all that follows from them: a probability of 0 makes 0 of what it is multiplied with."""
    return tl.maximum(x - m_p, softmax.LOWEST), tl.maximum(y - m_q, softmax.LOWEST)


# ---- the mixture M = A + B, with A = (1 - beta) p and B = beta q


@triton.jit
def log2_of_sum(r):
    """log2 (1 + r) for r in [0, 1], to 1e-8 before rounding, by the polynomial that errs least: the hardware's logarithm is too rough near 1, and the
    library's takes twice as long, for numbers that are not among these."""
    q = 0.005670459009706974 * r - 0.03441618010401726
    q = q * r + 0.09822550415992737
    q = q * r - 0.18309086561203003
    q = q * r + 0.2679058611392975
    q = q * r - 0.3559516370296478
    q = q * r + 0.4802683889865875
    q = q * r - 0.7213056087493896
    q = q * r + 1.442694067955017
    return q * r


@triton.jit
def weights(beta):
    """(1 - beta, beta), neither 0."""
    return tl.maximum(1.0 - beta, LEAST_WEIGHT), tl.maximum(beta, LEAST_WEIGHT)


@triton.jit
def mixture(beta, log2_p_sum, log2_q_sum):
    """Of a row: how much less log2 A, and log2 B, is than the distance to the maximum, in bits; how much more that is for A; log2 A - log2 B where
    p = q, and log2 (1 + 2^-|that|)."""
    weight_p, weight_q = weights(beta)
    log2_p = tl.log2(weight_p)
    log2_q = tl.log2(weight_q)
    greater = log2_p - log2_q
    return log2_p_sum - log2_p, log2_q_sum - log2_q, (log2_p_sum - log2_q_sum) - greater, greater, log2_of_sum(tl.exp2(-tl.abs(greater)))


@triton.jit
def against_mixture(x, y, m_p, m_q, c, mixed):
    """(A, B, log2 (p / M), log2 (q / M)): 0 where p = q."""
    a, b = distances(x, y, m_p, m_q)
    D = (a - b) * c - mixed[2]  # log2 A - log2 B
    more = log2_of_sum(tl.exp2(-tl.abs(D))) - mixed[4]
    of_p = (tl.minimum(D, 0.0) - tl.minimum(mixed[3], 0.0)) - more
    of_q = (tl.maximum(mixed[3], 0.0) - tl.maximum(D, 0.0)) - more
    return tl.exp2(a * c - mixed[0]), tl.exp2(b * c - mixed[1]), of_p, of_q


@triton.jit
def take(p, q, t, x, y, c, cap, CROSS: tl.constexpr):
    """A block of both rows, taken into the states (m, s) of their lanes, and into t of ``cross`` if it is wanted."""
    LANES: tl.constexpr = t.shape[0]
    x = softcap.capped(softmax.in_lanes(x, LANES), cap)
    y = softcap.capped(softmax.in_lanes(y, LANES), cap)
    m_p, s_p, _ = softmax.update(p[0], p[1], p[1], x, c, False, CROSS)
    m_q, s_q, _ = softmax.update(q[0], q[1], q[1], y, c, False, CROSS)
    if CROSS:
        t = cross(t, p[1], p[0], m_p, q[0], m_q, x, y, c)
    return m_p, s_p, m_q, s_q, t


@triton.jit
def first_pass(
    x_row, y_row, V, stop, c, cap, CROSS: tl.constexpr, EVICTION: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr
):
    """(m_p, s_p, m_q, s_q, t): the states of both rows, and t of ``cross`` if it is wanted."""
    BLOCK: tl.constexpr = UNROLL * LANES * WIDTH
    c = softcap.times_unit(c, cap)
    columns = softmax.tile(UNROLL, LANES, WIDTH)
    m_p, s_p, t = softmax.start(LANES)
    m_q, s_q, _none = softmax.start(LANES)
    rest = stop // BLOCK * BLOCK
    for _ in tl.range(0, stop // BLOCK, num_stages=1):
        x, y = load_block(x_row, y_row, columns, None, EVICTION)
        m_p, s_p, m_q, s_q, t = take((m_p, s_p), (m_q, s_q), t, x, y, c, cap, CROSS)
        x_row += BLOCK
        y_row += BLOCK
    if rest < stop:
        x, y = load_block(x_row, y_row, columns, tl.multiple_of(rest, BLOCK) + columns < V, EVICTION)
        m_p, s_p, m_q, s_q, t = take((m_p, s_p), (m_q, s_q), t, x, y, c, cap, CROSS)
    top_p = tl.max(m_p, 0)
    top_q = tl.max(m_q, 0)
    moved_p = softmax.shift(m_p, top_p, c)
    moved_q = softmax.shift(m_q, top_q, c)
    t = tl.maximum(tl.exp2(moved_p), LEAST) * (t + (moved_p - moved_q) * s_p)
    s_p = tl.sum(tl.exp2(moved_p) * s_p, 0)
    s_q = tl.sum(tl.exp2(moved_q) * s_q, 0)
    return softcap.uncapped(top_p, cap), s_p, softcap.uncapped(top_q, cap), s_q, tl.sum(t, 0)


@triton.jit
def mixture_terms(x, y, m_p, m_q, c, cap, mixed, LANES: tl.constexpr):
    """A log2 (p / M) and B log2 (q / M) of a block, added up for each lane."""
    x = softcap.value_and_slope(x, cap)[0]
    y = softcap.value_and_slope(y, cap)[0]
    A, B, of_p, of_q = against_mixture(x, y, m_p, m_q, c, mixed)
    return softmax.lane_sum(softmax.in_lanes(A * of_p, LANES)), softmax.lane_sum(softmax.in_lanes(B * of_q, LANES))


@triton.jit
def mixture_pass(x_row, y_row, V, stop, c, cap, beta, saved, UNROLL: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """sum p log2 (p / M) and sum q log2 (q / M); backwards, since the cache still holds what was read last. ``saved`` = (m_p, log2 s_p, m_q,
    log2 s_q)."""
    BLOCK: tl.constexpr = UNROLL * LANES * WIDTH
    columns = softmax.tile(UNROLL, LANES, WIDTH)
    m_p, log2_p_sum, m_q, log2_q_sum = saved
    mixed = mixture(beta, log2_p_sum, log2_q_sum)
    of_p = tl.zeros([LANES], tl.float32)
    of_q = tl.zeros([LANES], tl.float32)
    whole = stop // BLOCK
    if whole * BLOCK < stop:
        column = tl.multiple_of(whole * BLOCK, BLOCK) + columns
        x, y = load_block(x_row, y_row, column, column < V)
        of_p, of_q = mixture_terms(x, y, m_p, m_q, c, cap, mixed, LANES)
    for i in tl.range(0, whole, num_stages=1):
        x, y = load_block(x_row, y_row, tl.multiple_of((whole - 1 - i) * BLOCK, BLOCK) + columns, None)
        more_p, more_q = mixture_terms(x, y, m_p, m_q, c, cap, mixed, LANES)
        of_p += more_p
        of_q += more_q
    weight_p, weight_q = weights(beta)
    return tl.sum(of_p, 0) / weight_p, tl.sum(of_q, 0) / weight_q


@triton.jit
def load_statistics(statistics_ptr, row, live):
    """(m_p, log2 s_p, m_q, log2 s_q) of a row."""
    statistics = statistics_ptr + row * 5
    m_p = tl.load(statistics, mask=live, other=0.0)
    log2_p_sum = tl.load(statistics + 1, mask=live, other=0.0)
    m_q = tl.load(statistics + 2, mask=live, other=0.0)
    log2_q_sum = tl.load(statistics + 3, mask=live, other=0.0)
    return m_p, log2_p_sum, m_q, log2_q_sum


@triton.jit
def store_five(ptr, row, live, a, b, c, d, e):
    """A row of ``ptr [rows, 5]``; 0 where it is dead."""
    ptr += row * 5
    tl.store(ptr, tl.where(live, a, 0.0))
    tl.store(ptr + 1, tl.where(live, b, 0.0))
    tl.store(ptr + 2, tl.where(live, c, 0.0))
    tl.store(ptr + 3, tl.where(live, d, 0.0))
    tl.store(ptr + 4, tl.where(live, e, 0.0))


@triton.jit(do_not_specialize=["x_inner", "y_inner"])
def divergence_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    temperature_ptr,
    result_ptr,
    statistics_ptr,
    V,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    y_inner,
    y_outer_stride,
    y_inner_stride,
    scale,
    cap,
    beta,
    KIND: tl.constexpr,
    PART: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row. KIND: "kl" of (p || q), "reverse" for (q || p), or "jsd", of weight ``beta`` on q.

    PART "whole": ``statistics_ptr [rows, 5]`` takes m_p, log2 s_p, m_q, log2 s_q and what the gradient subtracts, in nats: KL(p || q), 0 or
    KL(p || M). Where other ranks have columns too, "states": it takes m_p, s_p, m_q, s_q and t of these columns, of (q, p) in reverse; then for a JSD
    "terms": it holds the statistics of all columns, and ``result_ptr [rows, 2]`` takes the terms of these.
    """
    row = tl.program_id(0).to(tl.int64)
    live = is_live(row, mask_ptr)
    c = logits.row_scale(row, scale, temperature_ptr, live) * softmax.LOG2E
    x_row = logits.row_pointer(x_ptr, row, x_inner, x_outer_stride, x_inner_stride)
    y_row = logits.row_pointer(y_ptr, row, y_inner, y_outer_stride, y_inner_stride)
    if KIND == "reverse":  # the same, from the other side
        x_row, y_row = y_row, x_row
    EVICTION: tl.constexpr = "evict_last" if KIND == "jsd" else ""
    stop = tl.where(live, V, 0)  # a dead row has no columns
    if PART == "terms":
        m_p, log2_p_sum, m_q, log2_q_sum = load_statistics(statistics_ptr, row, live)
    else:
        m_p, p_sum, m_q, q_sum, t = first_pass(x_row, y_row, V, stop, c, cap, KIND != "jsd", EVICTION, UNROLL, LANES, WIDTH)
        if PART == "states":
            store_five(statistics_ptr, row, live, m_p, p_sum, m_q, q_sum, t)
        else:
            log2_p_sum = log2_sum(p_sum)
            log2_q_sum = log2_sum(q_sum)
    if KIND == "jsd" and PART != "states":
        beta = tl.cast(beta, tl.float32)
        of_p, of_q = mixture_pass(x_row, y_row, V, stop, c, cap, beta, (m_p, log2_p_sum, m_q, log2_q_sum), UNROLL, LANES, WIDTH)
        if PART == "terms":
            tl.store(result_ptr + row * 2, of_p * softmax.LN2)
            tl.store(result_ptr + row * 2 + 1, of_q * softmax.LN2)
        else:
            mean = of_p * softmax.LN2 + 0.0 * (log2_p_sum + log2_q_sum)  # NaN if either is
            result = (1.0 - beta) * mean + beta * (of_q * softmax.LN2)
    elif PART == "whole":
        mean = 0.0
        result = (t / p_sum - (log2_p_sum - log2_q_sum)) * softmax.LN2
        if KIND == "kl":
            mean = result
        else:
            m_p, m_q = m_q, m_p
            log2_p_sum, log2_q_sum = log2_q_sum, log2_p_sum
    if PART == "whole":
        tl.store(result_ptr + row, tl.where(live, result, 0.0))
        store_five(statistics_ptr, row, live, m_p, log2_p_sum, m_q, log2_q_sum, mean)


@triton.jit
def store_gradient(rows, column, mask, saved, c, cap, beta, factor, KIND: tl.constexpr):
    """d result / d x of columns of ``rows`` = (x, y, dx). ``saved``: the row's statistics, ``factor``: upstream, scaled."""
    m_p, log2_p_sum, m_q, log2_q_sum, mean = saved
    x, y = load_block(rows[0], rows[1], column, mask)
    x, slope = softcap.value_and_slope(x, cap)
    y = softcap.value_and_slope(y, cap)[0]
    if KIND == "jsd":
        A, _b, of_p, _q = against_mixture(x, y, m_p, m_q, c, mixture(beta, log2_p_sum, log2_q_sum))
        dz = A * (of_p * softmax.LN2 - mean)
    elif KIND == "kl":
        a, b = distances(x, y, m_p, m_q)
        D = (a - b) * c - (log2_p_sum - log2_q_sum)
        dz = tl.exp2(a * c - log2_p_sum) * (D * softmax.LN2 - mean)
    else:
        dz = tl.exp2((x - m_p) * c - log2_p_sum) - tl.exp2((y - m_q) * c - log2_q_sum)
        dz = tl.where(x == softmax.NEG_INF, 0.0 * (log2_p_sum + log2_q_sum), dz)  # NaN there too in a row whose statistics are not finite
    dx = dz * factor  # not before: what a probability of 0 is multiplied with would overflow
    if cap is not None:
        dx *= slope
    tl.store(rows[2] + column, dx.to(rows[2].dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["x_inner", "y_inner", "parts"])
def divergence_backward_kernel(
    x_ptr,
    y_ptr,
    dx_ptr,
    mask_ptr,
    temperature_ptr,
    statistics_ptr,
    grad_ptr,
    V,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    y_inner,
    y_outer_stride,
    y_inner_stride,
    dx_outer_stride,
    dx_inner_stride,
    parts,
    scale,
    cap,
    beta,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """d result / d x, one program a (row, BLOCKS blocks of columns). Rows with no upstream gradient are not read. ``dx_ptr`` may be ``x_ptr``.

    d / d z = p (log p - log q - KL(p || q)),  p - q,  or (1 - beta) p (log p - log M - KL(p || M)).
    """
    BLOCK: tl.constexpr = UNROLL * LANES * WIDTH
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    live = is_live(row, mask_ptr)
    upstream = tl.load(grad_ptr + row, mask=live, other=0.0)
    live = live & (upstream != 0.0)
    m_p, log2_p_sum, m_q, log2_q_sum = load_statistics(statistics_ptr, row, live)
    mean = tl.load(statistics_ptr + row * 5 + 4, mask=live, other=0.0)
    saved = (m_p, log2_p_sum, m_q, log2_q_sum, mean)
    scale = logits.row_scale(row, scale, temperature_ptr, live)
    c = scale * softmax.LOG2E
    factor = upstream * (scale if cap is None else 4.0 * scale)  # see softcap.value_and_slope
    beta = tl.cast(beta, tl.float32)
    x_at = logits.row_offset(row, x_inner, x_outer_stride, x_inner_stride)
    y_at = logits.row_offset(row, y_inner, y_outer_stride, y_inner_stride)
    dx_at = logits.row_offset(row, x_inner, dx_outer_stride, dx_inner_stride)
    columns = softmax.tile(UNROLL, LANES, WIDTH)
    head, body = logits.pieces(x_at, V, WIDTH)
    bodies = (
        logits.body_pointer(x_ptr, x_at, head, WIDTH),
        logits.body_pointer(y_ptr, y_at, head, WIDTH),
        logits.body_pointer(dx_ptr, dx_at, head, WIDTH),
    )
    start, stop, low, high = logits.share(program % parts, parts, head, body, V, BLOCKS * BLOCK)
    edge, inside = logits.edges(head, body, low, high, LANES)
    if live:
        rest = start + (stop - start) // BLOCK * BLOCK
        for begin in tl.range(start, rest, BLOCK, num_stages=1):
            store_gradient(bodies, tl.multiple_of(begin, BLOCK) + columns, None, saved, c, cap, beta, factor, KIND)
        if rest < stop:
            column = tl.multiple_of(rest, BLOCK) + columns
            store_gradient(bodies, column, column < body, saved, c, cap, beta, factor, KIND)
        store_gradient((x_ptr + x_at, y_ptr + y_at, dx_ptr + dx_at), edge, inside, saved, c, cap, beta, factor, KIND)
    else:
        logits.store_zeros(dx_ptr + dx_at, edge, inside, bodies[2], start, stop, columns)
