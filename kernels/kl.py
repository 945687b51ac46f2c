"""Estimators of D(policy || reference) from the log-probs of one token, d = ref - lp in nats: each gives (value, derivative in d).

k1, k2 and k3 are Schulman's (http://joschu.net/blog/kl-approx.html). A "plus" estimator has the derivative of k2, whose expectation is the
gradient of the KL.
"""

import triton
import triton.language as tl


@triton.jit
def clamp(x, low, high):
    """x within [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def outside(x, low, high):
    """Where clamp stops the gradient; on the edges it passes, as it does for NaN."""
    return (x < low) | (x > high)


@triton.jit
def times(x, y):
    """x y, 0 where x is 0 whatever y is: what the objective does not need may have overflowed."""
    return tl.where(x == 0.0, 0.0, x * y)


@triton.jit
def expm1_minus(x):
    """e^x - 1 - x without cancellation: its series where x is small."""
    series = x * (1.0 / 13) + 1.0
    for n in tl.static_range(12, 2, -1):
        series = series * x * (1.0 / n) + 1.0
    return tl.where(tl.abs(x) < 0.25, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def k1(d):
    return -d, tl.zeros_like(d) - 1.0


@triton.jit
def absolute(d):
    return tl.abs(d), tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))


@triton.jit
def absolute_plus(d):
    return tl.abs(d), d


@triton.jit
def k2(d):
    return 0.5 * d * d, d


@triton.jit
def k3(d):
    value = expm1_minus(d)
    return value, tl.where(value < float("inf"), value + d, value)


@triton.jit
def k1_plus(d):
    return -d, d


@triton.jit
def k3_plus(d):
    return expm1_minus(d), d


@triton.jit
def penalty(lp, ref, weight, o, ESTIMATOR: tl.constexpr):
    """(KL, d KL / d lp, d KL / d weight): input clamp, estimator, times the weight, output clamp. Where a clamp acts nothing has a gradient."""
    d = ref - lp
    value, slope = ESTIMATOR(clamp(d, o.kl_input_low, o.kl_input_high))
    kl = times(value, weight)
    stopped = outside(d, o.kl_input_low, o.kl_input_high) | outside(kl, o.kl_output_low, o.kl_output_high)
    return clamp(kl, o.kl_output_low, o.kl_output_high), tl.where(stopped, 0.0, times(-slope, weight)), tl.where(stopped, 0.0, value)
