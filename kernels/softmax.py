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


@triton.jit
def anchored(m):
    """The maximum to subtract: 0 for a row of -inf so far, where -inf - -inf would be NaN."""
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def shift(m, m_new, c):
    """How far, in bits, distances from a maximum move as it rises: 0 at most, and 0 for a state that holds nothing yet."""
    return tl.where(m == NEG_INF, 0.0, (m - anchored(m_new)) * c)


@triton.jit
def update(m, s, t, x, c, ENTROPY: tl.constexpr):
    """Take a block ``x`` into the state: a scalar maximum, one 2^d an element, and vector sums that are reduced only at the end."""
    m_new = tl.maximum(m, tl.max(x, 0))
    moved = shift(m, m_new, c)
    scale = tl.exp2(moved)
    d = (x - anchored(m_new)) * c
    e = tl.exp2(d)
    if ENTROPY:
        t = scale * (t + moved * s) + e * tl.maximum(d, LOWEST)
    return m_new, scale * s + e, t


@triton.jit
def merge(m, s, t, c, AXIS: tl.constexpr):
    """Merge states along an axis."""
    top = tl.max(m, AXIS)
    moved = shift(m, tl.expand_dims(top, AXIS), tl.expand_dims(c, AXIS))
    scale = tl.exp2(moved)
    return top, tl.sum(scale * s, AXIS), tl.sum(scale * (t + moved * s), AXIS)


@triton.jit
def statistics(m, s, t, x_target, scale):
    """(logprob, entropy, log2 s) of a finished state: nats, nats, bits. A row of -inf, or with +inf or NaN, gives NaN.

    ``scale`` is logit_scale / T: the target's distance from the maximum stays in nats, so that with scale 1 it is exact.
    """
    log2_s = tl.log2(s)
    return (x_target - m) * scale - log2_s * LN2, (log2_s - t / s) * LN2, log2_s


@triton.jit
def gradient(x, is_target, m, log2_s, entropy, a, b, c, ENTROPY: tl.constexpr):
    """d loss / d z = a (1[v = id] - p) + b p ((lse - entropy) - z), with a = d loss / d logprob and b = d loss / d entropy.

    0 where x = -inf, but NaN there too in a row whose statistics are not finite.
    """
    log2_p = (x - m) * c - log2_s
    p = tl.exp2(log2_p)
    dz = a * (tl.where(is_target, 1.0, 0.0) - p)
    if ENTROPY:
        dz -= b * p * (tl.maximum(log2_p, LOWEST) * LN2 + entropy)
    return tl.where(x == NEG_INF, 0.0 * log2_s, dz)
