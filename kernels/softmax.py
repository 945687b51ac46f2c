"""The online softmax, once: statistics of a row in one pass, their merge, and the gradient that follows from them.

A row of values ``x`` (soft-capped, not yet scaled) has logits ``z = c * x`` in base 2, ``c = log2(e) * logit_scale / T``.
Its state is ``m = max x``, ``s = sum 2^d`` and ``t = sum 2^d * d`` with ``d = c * (x - m)``: everything is relative to the running maximum, so
neither the log-prob nor the entropy cancels when the logits are large. Scaling after the subtraction keeps differences of bf16 values exact.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
# Stands for -inf where it meets a probability of 0: the product is 0, not NaN.
LOWEST = tl.constexpr(-1e30)
# The same in bits: 2 to it is 0, and its products with large gradients are finite.
LOWEST_LOG2 = tl.constexpr(-1e4)
# No logit is less but -inf, which this may be subtracted from: the maximum of what has no other.
FINITE_MIN = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def shift(m, m_new, c):
    """How far, in bits, distances from a maximum move as it rises: 0 at most, and finite for a state that holds nothing yet."""
    return tl.maximum(m - m_new, LOWEST) * c


@triton.jit
def tile(UNROLL: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of the columns of a block, ``[UNROLL, LANES * WIDTH]``: of a row of these each thread has WIDTH neighbours, a load of 16 bytes."""
    return tl.arange(0, UNROLL)[:, None] * (LANES * WIDTH) + tl.arange(0, LANES * WIDTH)[None, :]


@triton.jit
def in_lanes(x, LANES: tl.constexpr):
    """A block as ``[UNROLL, LANES, WIDTH]``, of which a thread has one lane."""
    return tl.reshape(x, [x.shape[0], LANES, x.shape[1] // LANES])


@triton.jit
def widened(x):
    """To float32, exactly."""
    if x.dtype == tl.bfloat16:
        # Of two in a register the upper one is there but for the lower's bits: one instruction where a conversion takes two.
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def lane_max(x):
    """Over what each lane has of a block; like the next, within a thread."""
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def lane_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def of_lane(x):
    """One number a lane, beside what it has of a block."""
    return x[None, :, None]


@triton.jit
def start(LANES: tl.constexpr):
    """The states of lanes that have seen nothing."""
    return tl.full([LANES], FINITE_MIN, tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)


@triton.jit
def half(x, m):
    """Half of what ``x [UNROLL, LANES, WIDTH]`` is from the maxima of its lanes; as exact as the whole."""
    return 0.5 * x - of_lane(0.5 * m)


@triton.jit
def update(m, s, t, x, c, ENTROPY: tl.constexpr, HALF: tl.constexpr = False):
    """Take a block ``x [UNROLL, LANES, WIDTH]`` into the states of its lanes: one 2^d an element, and all else once a lane. HALF: d, and so 2^d, by
    :func:`half`, for a caller that needs this too."""
    m_new = tl.maximum(m, lane_max(x))
    moved = shift(m, m_new, c)
    scale = tl.exp2(moved)
    d = half(x, m_new) * (2.0 * c) if HALF else (x - of_lane(m_new)) * c
    e = tl.exp2(d)
    if ENTROPY:
        t = scale * (t + moved * s) + lane_sum(e * tl.maximum(d, LOWEST_LOG2))
    return m_new, scale * s + lane_sum(e), t


@triton.jit
def merge(m, s, t, c, AXIS: tl.constexpr):
    """Merge states along an axis; ``c`` is a number, or broadcasts to them."""
    moved = shift(m, tl.max(m, AXIS, keep_dims=True), c)
    scale = tl.exp2(moved)
    return tl.max(m, AXIS), tl.sum(scale * s, AXIS), tl.sum(scale * (t + moved * s), AXIS)


@triton.jit
def statistics(m, s, t, x_target, scale):
    """(logprob, entropy, log2 s) of a finished state: nats, nats, bits. A row of -inf, or with +inf or NaN, gives NaN.

    ``scale`` is logit_scale / T: the target's distance from the maximum stays in nats, so that with scale 1 it is exact.
    """
    log2_s = tl.log2(s)
    return (x_target - m) * scale - log2_s * LN2, (log2_s - t / s) * LN2, log2_s


@triton.jit
def slopes(a, b, entropy, scale):
    """(k0, k1, k2) of d loss / d x = p (k0 + k1 log2 p), and k2 more at the target, given a = d loss / d logprob and b = d loss / d entropy:

    d loss / d z = a (1[v = id] - p) + b p ((lse - entropy) - z),  and z - lse is log p.
    """
    return -(a + b * entropy) * scale, -b * LN2 * scale, a * scale


@triton.jit
def gradient(x, m, log2_s, c, k0, k1, ENTROPY: tl.constexpr):
    """p (k0 + k1 log2 p): 0 where x = -inf, but NaN there too in a row whose statistics are not finite."""
    log2_p = (x - m) * c - log2_s
    p = tl.exp2(log2_p)
    if ENTROPY:
        dz = p * (k0 + k1 * tl.maximum(log2_p, LOWEST_LOG2))
    else:
        dz = p * k0
    return dz
