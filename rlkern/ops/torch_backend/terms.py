"""The policy objective of a token in PyTorch, with derivatives written out: what ``kernels/policy.py`` and ``kernels/kl.py`` are in Triton.

Elementwise on tensors of any shape, in the dtype of the log-probs; used where gradients are made in the forward, without autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import INF, KL_ESTIMATORS, PolicyLossConfig
from ...surrogates import OwnSurrogate, own_surrogate
from ..policy import Options
from ..select import as_number, bits, select, times

Derivative = Tensor | float  # a number is 0


def outside(x: Tensor, low: float, high: float) -> Tensor | None:
    """Where a clamp stops the gradient; None: nowhere, there being no bound."""
    if low == -INF:
        return None if high == INF else x > high
    return x < low if high == INF else (x < low) | (x > high)


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    return x if low == -INF and high == INF else x.clamp(low, high)


def zero_where(where: Tensor | None, x: Tensor) -> Tensor:
    """x, and 0 where ``where`` (None: nowhere)."""
    return x if where is None else select(bits(~where, x.dtype), x)


def plus(x: Derivative, y: Derivative, factor: float = 1.0) -> Derivative:
    """x + factor y; what is no tensor is 0."""
    if not isinstance(y, Tensor):
        return x
    if not isinstance(x, Tensor):
        return y if factor == 1 else y * factor
    return torch.add(x, y, alpha=factor)


# ---- surrogates: (lp, old, log_r, A, o) -> (loss, d loss / d lp, d loss / d log_r); their edges are given r = exp(log_r) as well ------------------

Term = Callable[[Tensor, Tensor, Tensor, Tensor, Options], tuple[Tensor, Derivative, Derivative]]
Edges = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Options], tuple[Tensor, Tensor, Tensor]]
Summand = Callable[[Tensor, Tensor, Options], tuple[Tensor, Tensor]]


def _clipped_branch(r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d log r)"""
    free, clipped = clamp(r, -INF, o.ratio_cap) * A, clamp(r, o.low, o.high) * A
    if o.ratio_cap == INF:  # where the clipped branch is the less, strictly, r lies outside its bounds, and it does not move
        moves = as_number(torch.le, free, clipped)
        loss = torch.minimum(free, clipped, out=clipped).neg_()
        return loss, moves.mul_(loss)  # where it does not move, the loss is finite
    # Numbers instead of bools: 1 where the free branch is the less, 1/2 where it is as much, as autograd divides a tie.
    less = as_number(torch.lt, free, clipped).add_(as_number(torch.le, free, clipped)).mul_(-0.5)
    free_slope = zero_where(outside(r, -INF, o.ratio_cap), A)
    clipped_slope = zero_where(outside(r, o.low, o.high), A)
    return -torch.minimum(free, clipped), times(less * free_slope - (1 + less) * clipped_slope, r)


def clip(lp: Tensor, old: Tensor, log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Derivative, Derivative]:
    loss, slope = _clipped_branch(log_r.exp(), A, o)
    if o.dual_clip < INF:
        most = -o.dual_clip * A
        over = (A < 0) & (loss > most)
        slope = torch.where(over, 0.0, torch.where((A < 0) & (loss == most), 0.5 * slope, slope))
        loss = torch.where(over, most, loss)
    return loss, 0.0, slope


def clip_edges(lp: Tensor, old: Tensor, log_r: Tensor, r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    low, high, dual = ratio_edges(lp, old, log_r, r, A, o)
    if o.dual_clip < INF:
        dual = (A < 0) & (_clipped_branch(r, A, o)[0] > -o.dual_clip * A)
    return low, high, dual


def cispo(lp: Tensor, old: Tensor, log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Derivative, Derivative]:
    slope = -clamp(log_r.exp(), o.low, o.high) * A
    return slope * lp, slope, 0.0


def ratio_edges(lp: Tensor, old: Tensor, log_r: Tensor, r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    return _both(torch.lt, A, 0.0, r, o.low), _both(torch.gt, A, 0.0, r, o.high), nowhere(A)


def by_sign(positive: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """a where ``positive``, else b, in the dtype of ``like``: torch.where of two Python numbers would round them to float32."""
    return torch.where(positive, like.new_tensor(a), like.new_tensor(b))


def sapo(lp: Tensor, old: Tensor, log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Derivative, Derivative]:
    r = log_r.exp()
    tau = by_sign(A > 0, o.tau_pos, o.tau_neg, A)
    gate = torch.sigmoid(tau * (r - 1))
    return -gate * 4 / tau * A, 0.0, times(-4 * A * gate * (1 - gate), r)


def gmpo(lp: Tensor, old: Tensor, log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Derivative, Derivative]:
    loss = -A * log_r.exp()
    return loss, 0.0, loss


def gmpo_summand(log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    up = A > 0
    stopped = (up & (log_r > o.high)) | (~up & (log_r < o.low))
    return torch.where(up, log_r.clamp(max=o.high), log_r.clamp(min=o.low)), (~stopped).to(log_r.dtype)


def log_ratio_edges(lp: Tensor, old: Tensor, log_r: Tensor, r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    return _both(torch.lt, A, 0.0, log_r, o.low), _both(torch.gt, A, 0.0, log_r, o.high), nowhere(A)


def _both(compare: Callable[..., Tensor], x: Tensor, bound: float, y: Tensor, other: float) -> Tensor:
    """1 where both comparisons hold, else 0, in the dtype of x: on a CPU, numbers are compared into numbers three times as fast as into bools."""
    return as_number(compare, x, bound).mul_(as_number(compare, y, other))


VESPO_LOW, VESPO_HIGH = math.log(1e-8), 20.0


def vespo(lp: Tensor, old: Tensor, log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Derivative, Derivative]:
    s = log_r.clamp(VESPO_LOW, VESPO_HIGH)
    k = by_sign(A >= 0, o.vespo_k_pos, o.vespo_k_neg, s)
    scale = by_sign(A >= 0, max(o.vespo_lambda_pos, 1e-4), max(o.vespo_lambda_neg, 1e-4), s)
    slope = -torch.exp(scale + k * s - scale * s.exp()).nan_to_num(nan=0.0, posinf=0.0) * A
    return slope * lp, slope, 0.0


def log_weight(w: Tensor) -> Tensor:
    """VESPO's log of an importance weight; of 0 it is the lower bound."""
    return w.log().clamp(VESPO_LOW, VESPO_HIGH)


def vespo_summand(log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    return log_r.clamp(-20, 20), torch.zeros_like(log_r)


def dppo_tv_edges(lp: Tensor, old: Tensor, log_r: Tensor, r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    moved = lp.exp() - old.exp()
    return (A <= 0) & (moved < o.low), (A > 0) & (moved > o.high), nowhere(A)


def dppo_kl_edges(lp: Tensor, old: Tensor, log_r: Tensor, r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    p, p_old = lp.exp(), old.exp()
    other, other_old = -torch.expm1(lp), -torch.expm1(old)
    distance = torch.where(p_old > 0, p_old * (old - lp), 0.0) + torch.where(other_old > 0, other_old * (other_old.log() - other.log()), 0.0)
    return (A <= 0) & (distance > -o.low) & (p < p_old), (A > 0) & (distance > o.high) & (p > p_old), nowhere(A)


def _dppo_ratio(log_r: Tensor, A: Tensor, dropped: Tensor) -> tuple[Tensor, Derivative, Derivative]:
    loss = (-log_r.exp() * A).masked_fill(dropped, 0.0)
    return loss, 0.0, loss


def _dppo_score(lp: Tensor, log_r: Tensor, A: Tensor, dropped: Tensor, o: Options) -> tuple[Tensor, Derivative, Derivative]:
    slope = (-clamp(log_r.exp(), -INF, o.ratio_cap) * A).masked_fill(dropped, 0.0)
    return times(slope, lp), slope, 0.0


def dppo_tv_ratio(lp: Tensor, old: Tensor, log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Derivative, Derivative]:
    low, high, _ = dppo_tv_edges(lp, old, log_r, log_r, A, o)
    return _dppo_ratio(log_r, A, low | high)


def dppo_tv_score(lp: Tensor, old: Tensor, log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Derivative, Derivative]:
    low, high, _ = dppo_tv_edges(lp, old, log_r, log_r, A, o)
    return _dppo_score(lp, log_r, A, low | high, o)


def dppo_kl_ratio(lp: Tensor, old: Tensor, log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Derivative, Derivative]:
    low, high, _ = dppo_kl_edges(lp, old, log_r, log_r, A, o)
    return _dppo_ratio(log_r, A, low | high)


def dppo_kl_score(lp: Tensor, old: Tensor, log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Derivative, Derivative]:
    low, high, _ = dppo_kl_edges(lp, old, log_r, log_r, A, o)
    return _dppo_score(lp, log_r, A, low | high, o)


def reinforce(lp: Tensor, old: Tensor, log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Derivative, Derivative]:
    return -A * lp, -A, 0.0


def nowhere(A: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.bool, device=A.device)


def no_edges(lp: Tensor, old: Tensor, log_r: Tensor, r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    return nowhere(A), nowhere(A), nowhere(A)


@contextmanager
def autograd_in_operator() -> Iterator[None]:
    """Differentiation as usual inside an operator, which runs below autograd, maybe in inference mode or under somebody's hooks for saved tensors."""
    # To end inference mode is also what lets an operator's calls through to autograd again.
    with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        # Compiled programs leave out, besides, what tells autograd of views that are written in place: gradients would be wrong without a word.
        excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.ADInplaceOrView)
        with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
            yield


def own_term(own: OwnSurrogate) -> Term:
    """The term of a user's function, differentiated by autograd."""

    def term(lp: Tensor, old: Tensor, log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Derivative, Derivative]:
        function = own.on("torch")
        with autograd_in_operator():
            # Inference tensors cannot be saved for a backward; lp and old may be one tensor, of which only the former is differentiated.
            lp, old, log_r, A = (x.clone() if x.is_inference() else x.detach() for x in (lp, old, log_r, A))
            inputs = (lp.requires_grad_(), log_r.requires_grad_())
            loss = function(lp, old, log_r, A, o)
            if not isinstance(loss, Tensor) or loss.shape != A.shape:
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"the PyTorch form of surrogate {own.name!r} must give the loss of each token, a tensor {tuple(A.shape)}; got {got}")
            slopes = torch.autograd.grad(loss.sum(), inputs, allow_unused=True) if loss.requires_grad else (None, None)
        d_lp, d_log_r = (0.0 if x is None else x for x in slopes)
        return loss.detach(), d_lp, d_log_r

    return term


class Functions(NamedTuple):
    """The parts of a surrogate, see :class:`rlkern.surrogates.Surrogate`."""

    term: Term
    edges: Edges
    summand: Summand | None


def functions_of(config: PolicyLossConfig) -> Functions:
    """Those of the surrogate that ``config`` names."""
    own = own_surrogate(config.surrogate)
    if own is not None:
        return Functions(own_term(own), no_edges, None)
    parts = config.parts
    return Functions(globals()[parts.term], globals()[parts.edges], globals()[parts.summand] if parts.summand else None)


# ---- KL: d = ref - lp -> (value, derivative in d) ----------------------------------------------------------------------------------------------


def k1(d: Tensor) -> tuple[Tensor, Derivative]:
    return -d, -1.0


def absolute(d: Tensor) -> tuple[Tensor, Derivative]:
    return d.abs(), d.sign()


def absolute_plus(d: Tensor) -> tuple[Tensor, Derivative]:
    return d.abs(), d


def k2(d: Tensor) -> tuple[Tensor, Derivative]:
    return 0.5 * d * d, d


def k3(d: Tensor) -> tuple[Tensor, Derivative]:
    slope = torch.expm1(d)
    return slope - d, slope


def k1_plus(d: Tensor) -> tuple[Tensor, Derivative]:
    return -d, d


def k3_plus(d: Tensor) -> tuple[Tensor, Derivative]:
    return torch.expm1(d) - d, d


def kl_terms(
    lp: Tensor, ref: Tensor, weight: Tensor | None, estimator: str, input_limits: tuple[float, float], output_limits: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """(KL, d KL / d (ref - lp), weight d KL / d weight): input clamp, estimator, times the weight (None: 1), output clamp."""
    d = ref - lp
    value, slope = globals()[KL_ESTIMATORS[estimator]](clamp(d, *input_limits))
    if not isinstance(slope, Tensor):
        slope = torch.full_like(value, slope)
    if weight is not None:
        value, slope = times(value, weight), times(slope, weight)
    stopped = (outside(d, *input_limits), outside(value, *output_limits))
    d_ref, d_weight = (zero_where(stopped[1], zero_where(stopped[0], x)) for x in (slope, value))
    return clamp(value, *output_limits), d_ref, d_weight


def _may_be_nan(x: Derivative) -> bool:
    """Known on a CPU; elsewhere, asking would be a synchronisation."""
    return isinstance(x, Tensor) and (x.device.type != "cpu" or math.isnan(x.sum()))


def objective(
    lp: Tensor,
    old: Tensor,
    log_r: Tensor,
    surrogate_log_r: Tensor,
    A: Tensor,
    w: Tensor | None,
    keep: Tensor | None,
    ref: Tensor | None,
    sampling: Tensor | None,
    config: PolicyLossConfig,
    o: Options,
) -> tuple[Tensor, Derivative, Derivative, Derivative, Tensor | None]:
    """One token's loss,  keep w surrogate + kl_coef KL:  (loss, d / d lp, d / d log_r, d / d surrogate_log_r, KL)."""
    term = functions_of(config).term
    loss, d_lp, d_own = term(lp, old, surrogate_log_r, A, o)
    if own_surrogate(config.surrogate) is None and any(_may_be_nan(x) for x in (loss, d_lp, d_own)):
        # Ours are multiples of A: where that is 0 they are 0, whatever the rest is.
        moves = bits(A != 0, A.dtype)
        loss, d_lp, d_own = term(select(moves, lp), select(moves, old), select(moves, surrogate_log_r), A, o)

    def weighted(x: Derivative) -> Derivative:
        if isinstance(x, Tensor):
            x = x if w is None else times(x, w)
            x = x if keep is None else select(bits(keep, x.dtype), x)
        return x

    loss, d_lp, d_own = torch.as_tensor(weighted(loss)), weighted(d_lp), weighted(d_own)
    d_log_r: Derivative = 0.0
    kl = None
    if ref is not None:
        weight = None
        if config.kl_ratio_weighted is True:
            weight = log_r.exp()
        elif config.kl_ratio_weighted == "sampling" and sampling is not None:
            weight = torch.exp(lp - sampling)
        limits = (o.kl_input_low, o.kl_input_high), (o.kl_output_low, o.kl_output_high)
        kl, d_ref, d_weight = kl_terms(lp, ref, weight, config.kl_estimator, *limits)
        if o.kl_coef == 0:  # a metric
            return loss, d_lp, d_log_r, d_own, kl
        loss, d_lp = torch.add(loss, kl, alpha=o.kl_coef), plus(d_lp, d_ref, -o.kl_coef)
        if config.kl_ratio_weighted is True:
            d_log_r = o.kl_coef * d_weight
        elif config.kl_ratio_weighted:
            d_lp = plus(d_lp, d_weight, o.kl_coef)
    return loss, d_lp, d_log_r, d_own, kl
