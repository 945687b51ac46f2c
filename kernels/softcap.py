"""The soft-cap: cap tanh(x / cap) = cap - 2 cap q, with q = 1 / (1 + e^(2 x / cap)), since not every target has a tanh. ``cap`` None: x itself."""

import triton
import triton.language as tl

from . import softmax

LEAST_NORMAL = tl.constexpr(1.1754943508222875e-38)  # the least number is -4 / this


@triton.jit
def rest(x, cap, one):
    """q, where ``one`` is 1."""
    root = tl.rsqrt(one + tl.exp2(x * (2.0 * softmax.LOG2E / cap)))  # its square is a reciprocal, for which a division takes three times as long
    return root * root


@triton.jit
def capped(x, cap):
    """-q, as good as the soft-capped logit where only differences count. -inf stays -inf."""
    if cap is not None:
        # 0 for -inf, 1 for any number: one instruction, where to choose takes two.
        x = -rest(x, cap, tl.clamp(x * LEAST_NORMAL + 5.0, 0.0, 1.0))
    return x


@triton.jit
def times_unit(c, cap):
    """c times what a step of 1 in :func:`capped` is in soft-capped logits."""
    return c if cap is None else (2.0 * cap) * c


@triton.jit
def uncapped(x, cap):
    """The soft-capped logit, from what :func:`capped` gives."""
    return x if cap is None else cap + times_unit(x, cap)


@triton.jit
def value_and_slope(x, cap):
    """(soft-capped logit, a quarter of its derivative), without a cap (x, 1). -inf stays -inf, with a derivative of 0."""
    if cap is None:
        z = x
        slope = 1.0
    else:
        q = rest(x, cap, 1.0)
        z = tl.where(x == softmax.NEG_INF, softmax.NEG_INF, cap - times_unit(q, cap))
        slope = q - q * q
    return z, slope
