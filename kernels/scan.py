"""Reverse linear recurrences over time: GAE, discounted returns, TD(lambda) and V-trace, in one read of the inputs and one write of the results.

With V' and R' the value and the return at the next step, g = gamma (0 where an episode terminates) and f = lam g (0 where the trace is cut)::

    R = r + g U',  A = R - V,  U = (1 - lam) V + lam R                                             GAE: one recurrence, U = ... + f U'
    R = V + rho (r + g V' - V) + f c (R' - V'),  A = rho (r + (g - f) V' + f R' - V)               V-trace

Each step is a map y' -> x + f y', and maps compose associatively, so a block of steps is one ``tl.associative_scan``. Time runs backwards: lanes
lie at falling indices, so that a forward scan walks from the last step to the first. A tile is ``[ROWS, LANES, 4]``, four neighbouring steps a lane
in the order of memory: they are loaded and stored as one vector, stay in one thread, and leave the scan a quarter of the steps to walk.
"""

import triton
import triton.language as tl

WIDTH = tl.constexpr(4)


@triton.jit
def split(x):
    """``[ROWS, LANES, 4]`` as four ``[ROWS, LANES]``, in the order of time."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join(x0, x1, x2, x3):
    """The inverse of split."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (x0.shape[0], x0.shape[1], WIDTH))


@triton.jit
def through(y, f, x):
    """x + f y. Where f is 0 nothing of y passes, not even a NaN."""
    return x + tl.where(f == 0, 0.0, f * y)


@triton.jit
def compose(f_a, x_a, e_a, z_a, f_b, x_b, e_b, z_b):
    """The map (f, x) of run a, then that of run b; and (e, z), the map of all but the last member of the run."""
    return f_b * f_a, through(x_a, f_b, x_b), e_b * f_a, through(x_a, e_b, z_b)


@triton.jit
def recurrence(f, x, y_after):
    """y = x + f y' over a tile, backwards in time from ``y_after [ROWS]``. Returns y, y', and y at the first step of each row."""
    f0, f1, f2, f3 = split(f)
    x0, x1, x2, x3 = split(x)
    f_lane = f3 * f2 * f1 * f0
    x_lane = through(through(through(x3, f2, x2), f1, x1), f0, x0)
    ones = tl.full(f_lane.shape, 1.0, f.dtype)
    _, _, e, z = tl.associative_scan((f_lane, x_lane, ones, tl.zeros_like(x_lane)), 1, compose)
    y4 = through(y_after[:, None], e, z)
    y3 = through(y4, f3, x3)
    y2 = through(y3, f2, x2)
    y1 = through(y2, f1, x1)
    y0 = through(y1, f0, x0)
    last_lane = tl.arange(0, x.shape[1])[None, :] == x.shape[1] - 1
    return join(y0, y1, y2, y3), join(y1, y2, y3, y4), tl.sum(tl.where(last_lane, y0, 0.0), 1)


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def through_chunks(summary_ptr, chunk, live, y, CHUNKS: tl.constexpr):
    """y [ROWS], known at the end of each row, at the end of its chunk: through the ``chunk`` chunks between, by their summaries (f, x)."""
    index = tl.arange(0, CHUNKS)[None, :]
    between = live[:, None] & (index < chunk)
    f = tl.load(summary_ptr[:, None] + index * 2, mask=between, other=1.0)
    x = tl.load(summary_ptr[:, None] + index * 2 + 1, mask=between, other=0.0)
    f, x, _, _ = tl.associative_scan((f, x, tl.full(f.shape, 1.0, f.dtype), tl.zeros_like(x)), 1, compose)
    return tl.sum(tl.where(index == CHUNKS - 1, through(y[:, None], f, x), 0.0), 1)


@triton.jit
def per_row(number, row_ptr, row, live, DTYPE: tl.constexpr):
    """gamma or lam, to be broadcast over a tile: one for each row where there is a pointer, else the number."""
    if row_ptr is None:
        return tl.full((row.shape[0], 1, 1), number, DTYPE)
    else:
        return tl.load(row_ptr + row, mask=live, other=0.0).to(DTYPE)[:, None, None]


@triton.jit
def flag(ptr, at, where):
    """Whether ``ptr`` holds a non-zero number; False, unread, outside ``where``."""
    if ptr is None:
        return tl.zeros_like(where)
    else:
        return tl.load(ptr + at, mask=where, other=0) != 0


@triton.jit(do_not_specialize=["rows", "chunks"])
def lambda_returns_kernel(
    rewards_ptr,
    values_ptr,
    logprobs_ptr,
    old_logprobs_ptr,
    mask_ptr,
    next_values_ptr,
    terminated_ptr,
    truncated_ptr,
    rewards_stride,
    values_stride,
    logprobs_stride,
    old_logprobs_stride,
    mask_stride,
    next_values_stride,
    terminated_stride,
    truncated_stride,
    last_values_ptr,
    cu_seqlens_ptr,
    gamma_ptr,
    lam_ptr,
    advantages_ptr,
    returns_ptr,
    summary_ptr,
    moments_ptr,
    rows,
    length,
    chunks,
    gamma: tl.float64,
    lam: tl.float64,
    rho_clip: tl.float64,
    c_clip: tl.float64,
    DECAY: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    SUMMARISE: tl.constexpr,
):
    """ROWS rows a program, from their ends to their beginnings in tiles of LANES x 4 steps, with the state carried from tile to tile.

    With ``summary_ptr [rows, chunks, 2]`` a tile a program instead, in two launches, for few long rows: with SUMMARISE each stores the map from the
    state after its tile to the state before, and no results; then each finds the state after its tile from those of the tiles that follow it.

    A row is ``length`` steps, or a sequence of packed tokens with ``cu_seqlens``. Absent inputs are None: values count as 0, without log-probs
    rho = c = 1, without ``last_values`` a row ends in 0. With ``moments_ptr [programs, 3]``, float64, each program stores what whitening needs of
    its advantages: number, sum and sum of squares. A masked step is the identity, or with DECAY a step of r = V = 0 and no flags.
    """
    DTYPE: tl.constexpr = returns_ptr.dtype.element_ty
    VTRACE: tl.constexpr = logprobs_ptr is not None
    # U does not tell V' apart, which these need.
    NEXT_VALUE: tl.constexpr = VTRACE or (truncated_ptr is not None and next_values_ptr is None)
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * ROWS + tl.arange(0, ROWS)
    live = row < rows
    if cu_seqlens_ptr is None:
        start = row
        steps = tl.where(live, length, 0).to(tl.int64)
    else:
        start = tl.load(cu_seqlens_ptr + row, mask=live, other=0).to(tl.int64)
        steps = tl.load(cu_seqlens_ptr + row + 1, mask=live, other=0).to(tl.int64) - start
    start = start[:, None, None]
    gamma = per_row(gamma, gamma_ptr, row, live, DTYPE)
    lam = per_row(lam, lam_ptr, row, live, DTYPE)
    value_after = tl.zeros([ROWS], DTYPE)
    if last_values_ptr is not None:
        value_after = tl.load(last_values_ptr + row, mask=live, other=0.0).to(DTYPE)
    state_after = value_after  # U, or for V-trace R
    within = tl.arange(0, WIDTH)[None, None, :] - (tl.arange(0, LANES)[None, :, None] + 1) * WIDTH
    count = tl.full([], 0.0, tl.float64)
    total, squares = count, count
    first, stop = 0, tl.max(steps, 0)
    if summary_ptr is not None:
        chunk = program % chunks
        first = chunk * (LANES * WIDTH)
        stop = tl.minimum(stop, first + LANES * WIDTH)
        summary = summary_ptr + row * chunks * 2 + chunk * 2
        if SUMMARISE:
            state_after = tl.zeros([ROWS], DTYPE)
        else:
            state_after = through_chunks(summary_ptr + row * chunks * 2, chunk, live, state_after, CHUNKS)
    for done in range(first, stop, LANES * WIDTH):
        t = (steps - done)[:, None, None] + within
        inside = t >= 0
        valid = inside
        if mask_ptr is not None:
            valid = flag(mask_ptr, start * mask_stride + t, inside)
        counts = valid
        if DECAY:
            counts = inside
        r = tl.load(rewards_ptr + start * rewards_stride + t, mask=valid, other=0.0).to(DTYPE)
        v = tl.zeros_like(r)
        if values_ptr is not None:
            v = tl.load(values_ptr + start * values_stride + t, mask=valid, other=0.0).to(DTYPE)
        terminated = flag(terminated_ptr, start * terminated_stride + t, valid)
        truncated = flag(truncated_ptr, start * truncated_stride + t, valid & ~terminated)
        g = tl.where(terminated, 0.0, gamma)
        f = tl.where(truncated, 0.0, g * lam)
        v_next = v
        if NEXT_VALUE:
            # A recurrence too: each step that counts takes the place of the value held so far.
            _, v_next, value_after = recurrence(tl.where(counts, 0.0, 1.0).to(DTYPE), v, value_after)
        if next_values_ptr is not None:
            v_final = tl.load(next_values_ptr + start * next_values_stride + t, mask=truncated, other=0.0).to(DTYPE)
            v_next = tl.where(truncated, v_final, v_next)
        if VTRACE:
            v_next = tl.where(terminated, 0.0, v_next)
            lp = tl.load(logprobs_ptr + start * logprobs_stride + t, mask=valid, other=0.0).to(DTYPE)
            old = tl.load(old_logprobs_ptr + start * old_logprobs_stride + t, mask=valid, other=0.0).to(DTYPE)
            ratio = tl.exp(lp - old)
            rho = tl.minimum(ratio, tl.full((1, 1, 1), rho_clip, DTYPE))
            f_c = f * tl.minimum(ratio, tl.full((1, 1, 1), c_clip, DTYPE))
            x = v + rho * (r + g * v_next - v) - f_c * v_next
            returns, r_next, state_after = recurrence(tl.where(counts, f_c, 1.0), tl.where(counts, x, 0.0), state_after)
            advantages = rho * (through(r_next, f, r + (g - f) * v_next) - v)
        else:
            bootstrap = tl.where(truncated, g * v_next, 0.0)
            u = through(r + bootstrap, lam, (1 - lam) * v)
            f = tl.where(counts, f, 1.0)
            _, u_next, state_after = recurrence(f, tl.where(counts, u, 0.0), state_after)
            returns = tl.where(truncated, r + bootstrap, through(u_next, g, r))
            advantages = returns - v
        if SUMMARISE:
            tl.store(summary, tl.reduce(tl.reduce(f, 2, multiply), 1, multiply), mask=live)
            tl.store(summary + 1, state_after, mask=live)
        else:
            if advantages_ptr is not None:
                tl.store(advantages_ptr + start * length + t, tl.where(valid, advantages, 0.0), mask=inside)
            tl.store(returns_ptr + start * length + t, tl.where(valid, returns, 0.0), mask=inside)
            if moments_ptr is not None:
                wide = tl.where(valid, advantages, 0.0).to(tl.float64)
                count += tl.sum(valid.to(tl.float64))
                total += tl.sum(wide)
                squares += tl.sum(wide * wide)
    if moments_ptr is not None and not SUMMARISE:
        tl.store(moments_ptr + program * 3, count)
        tl.store(moments_ptr + program * 3 + 1, total)
        tl.store(moments_ptr + program * 3 + 2, squares)


@triton.jit
def normalise_kernel(x_ptr, mask_ptr, moments_ptr, out_ptr, mask_stride, length, elements, eps: tl.float64, BLOCK: tl.constexpr):
    """(x - mean) / sqrt(var + eps), 0 where masked; Bessel's variance, from the number, sum and sum of squares in ``moments_ptr``."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    valid = inside
    if mask_ptr is not None:
        valid = flag(mask_ptr, at // length * mask_stride + at % length, inside)
    count, total, squares = tl.load(moments_ptr), tl.load(moments_ptr + 1), tl.load(moments_ptr + 2)
    mean = total / tl.maximum(count, 1.0)
    variance = tl.maximum(squares - total * mean, 0.0) / tl.maximum(count - 1.0, 1.0)
    x = tl.load(x_ptr + at, mask=valid, other=0.0).to(DTYPE)
    scale = (1.0 / tl.sqrt(variance + eps)).to(DTYPE)
    tl.store(out_ptr + at, tl.where(valid, (x - mean.to(DTYPE)) * scale, 0.0), mask=inside)
