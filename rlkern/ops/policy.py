"""The policy loss on tokens: loss, gradients and metrics in one forward; the backward only scales. Triton launcher and PyTorch path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._backend import device_of
from .._checks import state_dtype
from ..config import PolicyLossConfig
from ..reference import one_a_sequence, per_token, sequence_sum, to_tokens
from ..surrogates import own_surrogate
from .operators import fake_of, operator
from .policy_terms import ESTIMATORS, Options, clamp, log_weight, objective, outside, surrogate_of, zero_where
from .select import bits, select, times
from .tokens import WARPS, Layout, divisor

METRICS = (
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "dual_clip_fraction",
    "approx_kl",
    "kl",
    "entropy",
    "ratio_mean",
    "ratio_max",
    "outside_support",
)
# Beside the loss: by what the stored gradients with respect to logprobs and to entropy are to be multiplied, and the metrics.
RESULTS = 2 + len(METRICS)


class Tokens(NamedTuple):
    """The tensors of a policy loss, in the order of the operator's arguments."""

    logprobs: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor | None
    ref_logprobs: Tensor | None
    entropy: Tensor | None
    importance_weights: Tensor | None
    sampling_logprobs: Tensor | None
    entropy_mask: Tensor | None
    normalizer: Tensor | None
    cu_seqlens: Tensor | None


def needs_statistics(config: PolicyLossConfig) -> bool:
    """Whether a token's loss depends on its sequence, be it by the sequence's length alone."""
    return (
        surrogate_of(config).summand is not None
        or config.ratio_level != "token"
        or config.off_policy_threshold is not None
        or "seq-mean-token-mean" in (config.aggregation, config.own_entropy_aggregation)
    )


# ---- Triton ---------------------------------------------------------------------------------------------------------------------------------


def term_functions(config: PolicyLossConfig) -> dict[str, Any]:
    """The functions of ``kernels/policy.py`` and ``kernels/kl.py``, or the user's, that a kernel is specialised to."""
    from ..kernels import kl, policy

    own = own_surrogate(config.surrogate)
    return {
        "TERM": getattr(policy, surrogate_of(config).term.__name__) if own is None else own.on("triton"),
        "ESTIMATOR": getattr(kl, ESTIMATORS[config.kl_estimator].__name__),
        "KL_WEIGHT": {"False": "none", "True": "ratio"}.get(str(config.kl_ratio_weighted), config.kl_ratio_weighted),
    }


def _triton_path(
    x: Tokens, config: PolicyLossConfig, loss_out: Tensor, results: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> None:
    from ..kernels import policy, tokens

    by_sequence = config.needs_sequences or (
        x.cu_seqlens is not None and any(t is not None and t.shape == (x.cu_seqlens.shape[0] - 1,) for t in (x.advantages, x.importance_weights))
    )
    layout = Layout.of(x.logprobs, x.cu_seqlens if by_sequence else None, whole_sequences=config.needs_sequences)
    surrogate = surrogate_of(config)
    with device_of(x.logprobs):
        tokens.policy_kernel[(layout.programs,)](
            *(layout.rows(t) for t in x[:9]),
            layout.rows(grad_logprobs),
            layout.rows(grad_entropy),
            x.normalizer,
            layout.cu_seqlens,
            torch.empty(tokens.PARTIALS.value * layout.programs, dtype=results.dtype, device=results.device),
            torch.zeros((), dtype=torch.int32, device=results.device),
            loss_out,
            results,
            layout.time,
            layout.tiles,
            layout.tile,
            Options.of(config, layout.time),
            **term_functions(config),
            EDGES=getattr(policy, surrogate.edges.__name__),
            SUMMAND=None if surrogate.summand is None else getattr(policy, surrogate.summand.__name__),
            LEVEL=config.ratio_level,
            AGGREGATION=config.aggregation,
            ENTROPY_AGGREGATION=config.own_entropy_aggregation or "",
            OFF_POLICY=config.off_policy_threshold is not None,
            STATISTICS=needs_statistics(config),
            REDUCTION=surrogate.reduction,
            ONE_WEIGHT=x.importance_weights is not None and one_a_sequence(x.importance_weights, x.logprobs, x.cu_seqlens),
            BLOCK=layout.block,
            num_warps=WARPS,
        )


# ---- PyTorch --------------------------------------------------------------------------------------------------------------------------------


def _torch_path(
    x: Tokens, config: PolicyLossConfig, loss_out: Tensor, results: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> None:
    dtype, time, cu_seqlens = results.dtype, x.logprobs.shape[-1], x.cu_seqlens
    o, surrogate = Options.of(config, time), surrogate_of(config)
    mask = None if x.mask is None else x.mask != 0
    outside_support = x.logprobs == -torch.inf if mask is None else mask & (x.logprobs == -torch.inf)
    if x.logprobs.device.type != "cpu" or bool(outside_support.any()):  # elsewhere, asking would be a synchronisation
        mask = ~outside_support if mask is None else mask & ~outside_support
    kept_mask = mask if x.entropy_mask is None else (x.entropy_mask != 0 if mask is None else mask & (x.entropy_mask != 0))
    live, kept = (None if t is None else bits(t, dtype) for t in (mask, kept_mask))

    def counted(values: Tensor, where: Tensor | None) -> Tensor:
        return values if where is None else select(where, values)

    def read(t: Tensor) -> Tensor:  # a masked position is never read
        return counted(per_token(t, x.logprobs, cu_seqlens).to(dtype), live)

    def sum_of(values: Tensor) -> Tensor:
        return counted(values, live).sum()

    def over_sequences(values: Tensor) -> Tensor:
        return to_tokens(sequence_sum(values, cu_seqlens), values, cu_seqlens)

    lp = read(x.logprobs)
    old = lp if x.old_logprobs is None else read(x.old_logprobs)
    A = read(x.advantages)
    w = None if x.importance_weights is None else read(x.importance_weights)
    sampling = None if x.sampling_logprobs is None else read(x.sampling_logprobs)
    ones = torch.ones_like(lp)
    m, kept_m = counted(ones, live), counted(ones, kept)

    length = kept_length = ones
    if needs_statistics(config):
        length, kept_length = over_sequences(m).clamp(min=1), over_sequences(kept_m).clamp(min=1)

    raw = lp - old
    if config.ratio_level != "token":
        raw = over_sequences(raw)
        if config.ratio_level != "sequence_sum":
            raw = raw / length
    stopped = outside(raw, o.log_ratio_low, o.log_ratio_high)
    log_r = surrogate_log_r = clamp(raw, o.log_ratio_low, o.log_ratio_high)
    slope = None
    if surrogate.summand is not None:
        summand, slope = surrogate.summand(log_r, A, o)
        if surrogate.reduction == "kept-mean":
            surrogate_log_r = over_sequences(counted(summand, kept)) / kept_length
        else:
            surrogate_log_r = over_sequences(counted(summand, live))
            if x.importance_weights is not None and w is not None:
                log_w = counted(log_weight(w), live)
                surrogate_log_r = surrogate_log_r + (log_w if one_a_sequence(x.importance_weights, lp, cu_seqlens) else over_sequences(log_w))
            w = None

    keep = mask if surrogate.reduction == "kept-mean" else kept_mask
    if config.off_policy_threshold is not None and sampling is not None:
        fresh = (A >= 0) | (over_sequences(sampling - lp) / length <= config.off_policy_threshold)
        keep = fresh if keep is None else keep & fresh
    ref = None if x.ref_logprobs is None else read(x.ref_logprobs)
    loss, d_lp, d_log_r, d_own, kl = objective(lp, old, log_r, surrogate_log_r, A, w, keep, ref, sampling, config, o)

    by = divisor(config.aggregation, x.normalizer, m, cu_seqlens, o.max_length)
    scale = 1 / length if config.aggregation == "seq-mean-token-mean" else None  # what the lengths put into the weight of a token
    entropy_m, entropy_scale, entropy_by = m, scale, by
    own = config.own_entropy_aggregation
    if own:
        entropy_m, entropy_scale = kept_m, 1 / kept_length if own == "seq-mean-token-mean" else None
        entropy_by = divisor(own, None, kept_m, cu_seqlens, o.max_length)
    entropy_weights = entropy_m if entropy_scale is None else entropy_m * entropy_scale

    def scaled(values: Tensor) -> Tensor:
        return values if scale is None else values * scale

    total = sum_of(scaled(loss)) / by
    h = None if x.entropy is None else read(x.entropy)
    if h is not None and config.entropy_coef != 0:
        total = total - config.entropy_coef * ((entropy_weights * h).sum() / entropy_by)
    loss_out.copy_(total)

    count = m.sum().clamp(min=1)
    r = log_r.exp()
    low, high, dual = (t.count_nonzero() for t in surrogate.edges(lp, old, log_r, A, o))  # nowhere where A = 0, and so nowhere where masked
    sums = [low + high, low, high, dual, (old - lp).sum(), *(total.new_zeros(()) if t is None else sum_of(t) for t in (kl, h)), sum_of(r)]
    largest = counted(r, live).amax()
    results.copy_(torch.stack([1 / by, 1 / entropy_by, *(t.to(dtype) / count for t in sums), largest, outside_support.sum().to(dtype)]))

    if grad_entropy is not None:
        grad_entropy.copy_(-o.entropy_coef * entropy_weights)
    if grad_logprobs is not None:
        gradient = d_lp
        if surrogate.summand is None:
            d_log_r = d_log_r + d_own
        elif slope is not None and isinstance(d_own, Tensor):
            share = over_sequences(counted(d_own, live)) / kept_length
            gradient = gradient + times(counted(zero_where(stopped, slope), kept), share)
        if isinstance(d_log_r, Tensor):
            d_log_r = zero_where(stopped, d_log_r)
            if config.ratio_level in ("sequence", "sequence_sum"):
                d_log_r = over_sequences(counted(d_log_r, live)) / (length if config.ratio_level == "sequence" else 1.0)
            gradient = gradient + d_log_r
        grad_logprobs.copy_(counted(scaled(torch.as_tensor(gradient)), live))


# ---- custom op and autograd -----------------------------------------------------------------------------------------------------------------


@operator("policy_loss")
def policy_loss_op(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    importance_weights: Tensor | None,
    sampling_logprobs: Tensor | None,
    entropy_mask: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    with_logprobs_gradient: bool,
    with_entropy_gradient: bool,
    config: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, results, gradient wrt logprobs, gradient wrt entropy); the gradients are undivided: ``results`` begins with their factors."""
    x = Tokens(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        ref_logprobs,
        entropy,
        importance_weights,
        sampling_logprobs,
        entropy_mask,
        normalizer,
        cu_seqlens,
    )
    out = _outputs(logprobs, with_logprobs_gradient, with_entropy_gradient)
    loss, results, grad_logprobs, grad_entropy = out
    if logprobs.numel() == 0:
        loss.zero_()
        results.zero_()
        return out
    if cu_seqlens is not None:  # tokens beyond the last sequence belong to no program
        grad_logprobs.zero_()
        grad_entropy.zero_()
    run = _triton_path if backend == "triton" else _torch_path
    run(
        x,
        PolicyLossConfig.from_text(config),
        loss,
        results,
        grad_logprobs if with_logprobs_gradient else None,
        grad_entropy if with_entropy_gradient else None,
    )
    return out


def _outputs(logprobs: Tensor, with_logprobs_gradient: bool, with_entropy_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, device = state_dtype(logprobs), logprobs.device
    loss = torch.empty((), dtype=dtype, device=device)
    results = torch.empty(RESULTS, dtype=dtype, device=device)
    grad_logprobs = torch.empty(logprobs.shape if with_logprobs_gradient else (0,), dtype=dtype, device=device)
    grad_entropy = torch.empty(logprobs.shape if with_entropy_gradient else (0,), dtype=dtype, device=device)
    return loss, results, grad_logprobs, grad_entropy


@fake_of(policy_loss_op)
def _(logprobs: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(logprobs, *args[10:12])


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, config: str, backend: str, *x: Any) -> tuple[Tensor, Tensor]:
        t = Tokens(*x)
        _, _, needs_logprobs, *_ = ctx.needs_input_grad
        needs_entropy = ctx.needs_input_grad[2 + Tokens._fields.index("entropy")]
        loss, results, grad_logprobs, grad_entropy = policy_loss_op(*t, needs_logprobs, needs_entropy, config, backend)
        ctx.save_for_backward(results, grad_logprobs, grad_entropy)
        ctx.dtypes = t.logprobs.dtype, None if t.entropy is None else t.entropy.dtype
        ctx.mark_non_differentiable(results)
        return loss, results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        results, grad_logprobs, grad_entropy = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * (2 + len(Tokens._fields))
        for name, gradient, factor, dtype in zip(("logprobs", "entropy"), (grad_logprobs, grad_entropy), results[:2], ctx.dtypes, strict=True):
            index = 2 + Tokens._fields.index(name)
            if ctx.needs_input_grad[index]:
                grads[index] = (gradient * (grad_loss * factor)).to(dtype)
        return tuple(grads)


def policy_loss(x: Tokens, config: PolicyLossConfig, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics); differentiable in ``x.logprobs`` and ``x.entropy``. Arguments are checked by the caller."""
    # Detached, the constants are also distinct tensors where one serves twice (old as sampling log-probs), which torch.compile insists on.
    constants = {name: t.detach() for name, t in x._asdict().items() if t is not None and name not in ("logprobs", "entropy")}
    loss, results = _PolicyLoss.apply(config.text, backend, *x._replace(**constants))
    return loss, dict(zip(METRICS, results[2:].unbind(), strict=True))
