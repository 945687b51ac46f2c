"""The policy objective of one token: surrogates with their derivatives, and their sum with the KL term. Shared by every kernel that has log-probs.

A surrogate is a term

    term(lp, old, log_r, A, o) -> (loss, d loss / d lp, d loss / d log_r)

of log-prob, behaviour log-prob, log-ratio at the configured level, advantage and options: elementwise, float32 or float64 as its inputs are. The two
derivatives are apart because log_r may be one number for a whole sequence. ``o`` is a named tuple of floats; an option that is absent has a
neutral value there (an infinite bound). Ties and points exactly on an edge have the gradient of PyTorch's minimum and clamp.

Beside it stands what counts as clipped, edges(lp, old, log_r, A, o) -> (below with A < 0, above with A > 0, by the dual clip), and for
surrogates that reduce over the sequence by themselves the summand(log_r, A, o) -> (value, derivative), whose mean or sum is their log_r.
"""

import triton
import triton.language as tl

from .kl import clamp, expm1_minus, outside, penalty, times


@triton.jit
def nowhere(A):
    return A < A


@triton.jit
def by_sign(positive, A, a, b):
    """The option a where A is positive, else b, in the dtype of A."""
    zero = tl.zeros_like(A)
    return tl.where(positive, zero + a, zero + b)


@triton.jit
def ratio(log_r, A):
    """r; 1 where A is 0, which is not to be multiplied by an infinite one."""
    return tl.exp(tl.where(A == 0.0, 0.0, log_r))


@triton.jit
def clipped_branch(r, A, o):
    """(-min(min(r, cap) A, clamp(r) A), its derivative in r)."""
    free, clipped = clamp(r, float("-inf"), o.ratio_cap) * A, clamp(r, o.low, o.high) * A
    free_slope = tl.where(r > o.ratio_cap, 0.0, A)
    clipped_slope = tl.where(outside(r, o.low, o.high), 0.0, A)
    slope = tl.where(free < clipped, free_slope, tl.where(free == clipped, 0.5 * (free_slope + clipped_slope), clipped_slope))
    return -tl.where(free < clipped, free, clipped), -slope


@triton.jit
def clip(lp, old, log_r, A, o):
    """-min(min(r, ratio_cap) A, clamp(r, low, high) A);  where A < 0, at most -dual_clip A."""
    r = ratio(log_r, A)
    loss, slope = clipped_branch(r, A, o)
    most = -o.dual_clip * A
    negative = A < 0.0
    slope = tl.where(negative & (loss > most), 0.0, tl.where(negative & (loss == most), 0.5 * slope, slope))
    return tl.where(negative & (loss > most), most, loss), tl.zeros_like(lp), times(slope, r)


@triton.jit
def clip_edges(lp, old, log_r, A, o):
    r = ratio(log_r, A)
    loss, _ = clipped_branch(r, A, o)
    return (A < 0.0) & (r < o.low), (A > 0.0) & (r > o.high), (A < 0.0) & (loss > -o.dual_clip * A)


@triton.jit
def cispo(lp, old, log_r, A, o):
    """-sg(clamp(r, low, high)) A lp."""
    slope = times(A, -clamp(tl.exp(log_r), o.low, o.high))
    return times(slope, lp), slope, tl.zeros_like(lp)


@triton.jit
def ratio_edges(lp, old, log_r, A, o):
    r = tl.exp(log_r)
    return (A < 0.0) & (r < o.low), (A > 0.0) & (r > o.high), nowhere(A)


@triton.jit
def sapo(lp, old, log_r, A, o):
    """-sigmoid(tau (r - 1)) 4 / tau A."""
    r = tl.exp(log_r)
    tau = by_sign(A > 0.0, A, o.tau_pos, o.tau_neg)
    gate = tl.sigmoid(tau * (r - 1.0))
    return times(A, -gate * 4.0 / tau), tl.zeros_like(lp), times(times(A, -4.0 * gate * (1.0 - gate)), r)


@triton.jit
def gmpo(lp, old, log_r, A, o):
    """-A e^q, q the sequence's mean of gmpo_summand."""
    loss = times(A, -tl.exp(log_r))
    return loss, tl.zeros_like(lp), loss


@triton.jit
def gmpo_summand(log_r, A, o):
    """log r clamped to [low, high] on the side that the sign of A makes pessimistic."""
    high = by_sign(A > 0.0, A, o.high, float("inf"))
    low = by_sign(A > 0.0, A, float("-inf"), o.low)
    return clamp(log_r, low, high), tl.where(outside(log_r, low, high), 0.0, 1.0)


@triton.jit
def log_ratio_edges(lp, old, log_r, A, o):
    return (A < 0.0) & (log_r < o.low), (A > 0.0) & (log_r > o.high), nowhere(A)


@triton.jit
def vespo(lp, old, log_r, A, o):
    """-sg(phi) A lp,  phi = exp(lambda + k s - lambda e^s),  s the clamped sum of vespo_summand and of log w over the sequence."""
    s = clamp(log_r, -18.420680743952367, 20.0)  # log 1e-8
    k = by_sign(A >= 0.0, A, o.vespo_k_pos, o.vespo_k_neg)
    scale = tl.maximum(by_sign(A >= 0.0, A, o.vespo_lambda_pos, o.vespo_lambda_neg), 1e-4)
    phi = tl.exp(scale + k * s - scale * tl.exp(s))
    slope = times(A, -tl.where(phi < float("inf"), phi, 0.0))  # NaN too becomes 0
    return times(slope, lp), slope, tl.zeros_like(lp)


@triton.jit
def vespo_summand(log_r, A, o):
    return clamp(log_r, -20.0, 20.0), tl.zeros_like(log_r)


@triton.jit
def log_weight(w):
    """VESPO's log of an importance weight; of 0 it is the lower bound."""
    return clamp(tl.log(w), -18.420680743952367, 20.0)


@triton.jit
def dppo_tv_edges(lp, old, log_r, A, o):
    """p - p_old beyond [low, high] in the direction in which A pushes."""
    moved = tl.exp(lp) - tl.exp(old)
    return (A <= 0.0) & (moved < o.low), (A > 0.0) & (moved > o.high), nowhere(A)


@triton.jit
def dppo_kl_edges(lp, old, log_r, A, o):
    """The binary KL of p_old and p beyond -low or high in the direction in which A pushes."""
    p, p_old = tl.exp(lp), tl.exp(old)
    other, other_old = -(expm1_minus(lp) + lp), -(expm1_minus(old) + old)  # 1 - p
    distance = tl.where(p_old > 0.0, p_old * (old - lp), 0.0)
    distance += tl.where(other_old > 0.0, other_old * (tl.log(other_old) - tl.log(other)), 0.0)
    return (A <= 0.0) & (distance > -o.low) & (p < p_old), (A > 0.0) & (distance > o.high) & (p > p_old), nowhere(A)


@triton.jit
def dppo_ratio(lp, old, log_r, A, o, EDGES: tl.constexpr):
    """-r A inside the trust region."""
    low, high, _ = EDGES(lp, old, log_r, A, o)
    loss = tl.where(low | high, 0.0, times(A, -tl.exp(log_r)))
    return loss, tl.zeros_like(lp), loss


@triton.jit
def dppo_score(lp, old, log_r, A, o, EDGES: tl.constexpr):
    """-sg(min(r, ratio_cap)) A lp inside the trust region."""
    low, high, _ = EDGES(lp, old, log_r, A, o)
    slope = tl.where(low | high, 0.0, times(A, -clamp(tl.exp(log_r), float("-inf"), o.ratio_cap)))
    return times(slope, lp), slope, tl.zeros_like(lp)


@triton.jit
def dppo_tv_ratio(lp, old, log_r, A, o):
    return dppo_ratio(lp, old, log_r, A, o, dppo_tv_edges)


@triton.jit
def dppo_tv_score(lp, old, log_r, A, o):
    return dppo_score(lp, old, log_r, A, o, dppo_tv_edges)


@triton.jit
def dppo_kl_ratio(lp, old, log_r, A, o):
    return dppo_ratio(lp, old, log_r, A, o, dppo_kl_edges)


@triton.jit
def dppo_kl_score(lp, old, log_r, A, o):
    return dppo_score(lp, old, log_r, A, o, dppo_kl_edges)


@triton.jit
def reinforce(lp, old, log_r, A, o):
    """-A lp."""
    return times(-A, lp), -A, tl.zeros_like(lp)


@triton.jit
def no_edges(lp, old, log_r, A, o):
    return A != A, A != A, nowhere(A)


@triton.jit
def objective(lp, old, log_ratios, A, w, keep, ref, sampling, o, TERM: tl.constexpr, ESTIMATOR: tl.constexpr, KL_WEIGHT: tl.constexpr):
    """One token's loss:  keep w surrogate + kl_coef KL.  ``w`` None: 1;  ``ref`` None: no KL.

    ``log_ratios``: the ratio's logarithm at the configured level, and the one that the surrogate reads, which is another where it reduces over the
    sequence itself. Gives (loss, d / d lp, d / d log_r, d / d surrogate_log_r, KL).
    """
    log_r, surrogate_log_r = log_ratios
    loss, d_lp, d_surrogate = TERM(lp, old, surrogate_log_r, A, o)
    if w is not None:
        loss, d_lp, d_surrogate = times(loss, w), times(d_lp, w), times(d_surrogate, w)
    loss, d_lp, d_surrogate = tl.where(keep, loss, 0.0), tl.where(keep, d_lp, 0.0), tl.where(keep, d_surrogate, 0.0)
    d_log_r = tl.zeros_like(lp)
    kl = tl.zeros_like(lp)
    if ref is not None:
        weight = tl.zeros_like(lp) + 1.0
        if KL_WEIGHT == "ratio":
            weight = tl.exp(log_r)
        elif KL_WEIGHT == "sampling":
            weight = tl.exp(lp - sampling)
        kl, d_kl, d_weight = penalty(lp, ref, weight, o, ESTIMATOR)
        unused = o.kl_coef == 0.0  # a metric then, which may be infinite
        loss += tl.where(unused, 0.0, o.kl_coef * kl)
        d_lp += tl.where(unused, 0.0, o.kl_coef * d_kl)
        if KL_WEIGHT == "ratio":
            d_log_r += tl.where(unused, 0.0, o.kl_coef * times(d_weight, weight))
        elif KL_WEIGHT != "none":
            d_lp += tl.where(unused, 0.0, o.kl_coef * times(d_weight, weight))
    return loss, d_lp, d_log_r, d_surrogate, kl
