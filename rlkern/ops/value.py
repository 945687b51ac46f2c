"""The value loss on tokens: loss, gradient and metrics in one forward; the backward only scales. Triton launcher and PyTorch path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._backend import device_of
from .._checks import state_dtype
from ..config import SEQUENCE_AGGREGATIONS
from ..reference import sequence_sum, to_tokens
from .operators import fake_of, operator
from .select import as_number, bits, select, times
from .tokens import Layout, divisor

WARPS = 4  # four tokens of a block a thread; compilers give smaller programs the registers that the float64 sums take
METRICS = ("clip_fraction", "error", "value_mean", "return_mean", "explained_variance")


class Values(NamedTuple):
    """The tensors of a value loss, in the order of the operator's arguments."""

    values: Tensor
    old_values: Tensor | None
    returns: Tensor
    mask: Tensor | None
    normalizer: Tensor | None
    cu_seqlens: Tensor | None


# ---- Triton ---------------------------------------------------------------------------------------------------------------------------------


def _triton_path(x: Values, clip: float, aggregation: str, max_length: float, loss_out: Tensor, results: Tensor, grad: Tensor | None) -> None:
    from ..kernels import value

    by_sequence = aggregation in SEQUENCE_AGGREGATIONS
    layout = Layout.of(x.values, x.cu_seqlens if by_sequence else None, whole_sequences=by_sequence)
    with device_of(x.values):
        value.value_kernel[(layout.programs,)](
            *(layout.rows(t) for t in (*x[:4], grad)),
            x.normalizer,
            layout.cu_seqlens,
            torch.empty(value.PARTIALS.value * layout.programs, dtype=torch.float64, device=results.device),
            torch.zeros((), dtype=torch.int32, device=results.device),
            loss_out,
            results,
            layout.time,
            layout.tiles,
            layout.tile,
            clip,
            max_length,
            AGGREGATION=aggregation,
            BLOCK=layout.block,
            num_warps=WARPS,
        )


# ---- PyTorch --------------------------------------------------------------------------------------------------------------------------------


def _torch_path(x: Values, clip: float, aggregation: str, max_length: float, loss_out: Tensor, results: Tensor, grad: Tensor | None) -> None:
    dtype = results.dtype
    live = None if x.mask is None else bits(x.mask != 0, dtype)

    def read(t: Tensor) -> Tensor:  # a masked position is never read
        return t.to(dtype) if live is None else select(live, t.to(dtype))

    v, target = read(x.values), read(x.returns)
    m = torch.ones_like(v) if live is None else select(live, torch.ones_like(v))
    error = v - target
    squared, slope, clip_fraction = error.square(), error, v.new_zeros(())
    count = m.sum().clamp(min=1)
    plain = squared.sum(dtype=torch.float64) / count
    if x.old_values is not None:
        old = read(x.old_values)
        low, high = old - clip, old + clip
        clipped = (torch.maximum(torch.minimum(v, high), low) - target).square()
        # Numbers instead of bools: 1 where the plain error is the larger, 1/2 where it is as large, unless that is because nothing was clipped.
        plain_slope = as_number(torch.gt, squared, clipped).add_(as_number(torch.ge, squared, clipped)).mul_(0.5)
        moves = as_number(torch.ge, v, low).mul_(as_number(torch.le, v, high))
        slope = times(torch.maximum(plain_slope, moves), error)
        clip_fraction = (clipped > squared).count_nonzero() / count
        squared = torch.maximum(squared, clipped)
    by = divisor(aggregation, x.normalizer, m, x.cu_seqlens, max_length)
    if aggregation == "seq-mean-token-mean":
        scale = 1 / to_tokens(sequence_sum(m, x.cu_seqlens), m, x.cu_seqlens).clamp(min=1)
        squared, slope = squared * scale, slope * scale
    loss_out.copy_(0.5 * squared.sum() / by)
    value_mean, return_mean = v.sum(dtype=torch.float64) / count, target.sum(dtype=torch.float64) / count

    def variance(y: Tensor) -> Tensor:
        return ((y - y.sum() / count) * m).square().sum() / count

    spread = variance(target.double())
    explained = torch.where(spread > 0, 1 - variance(target.double() - v) / spread, 0.0)
    results.copy_(torch.stack([1 / by.double(), clip_fraction.double(), plain, value_mean, return_mean, explained]))
    if grad is not None:
        grad.copy_(slope)


# ---- custom op and autograd -----------------------------------------------------------------------------------------------------------------


@operator("value_loss")
def value_loss_op(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    clip: float,
    aggregation: str,
    max_length: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, results, gradient wrt values); the gradient is undivided: ``results`` begins with its factor. Without ``old_values`` no clip."""
    out = _outputs(values, with_gradient)
    loss, results, grad = out
    if values.numel() == 0:
        loss.zero_()
        results.zero_()
        return out
    if cu_seqlens is not None:  # tokens beyond the last sequence belong to no program
        grad.zero_()
    run = _triton_path if backend == "triton" else _torch_path
    x = Values(values, old_values, returns, mask, normalizer, cu_seqlens)
    run(x, clip, aggregation, max_length, loss, results, grad if with_gradient else None)
    return out


def _outputs(values: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(values)
    return (
        values.new_empty((), dtype=dtype),
        values.new_empty(1 + len(METRICS), dtype=dtype),
        values.new_empty(values.shape if with_gradient else (0,), dtype=dtype),
    )


@fake_of(value_loss_op)
def _(values: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(values, args[-2])


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        *options, backend = args
        loss, results, grad = value_loss_op(values, *options, ctx.needs_input_grad[0], backend)
        ctx.save_for_backward(results, grad)
        ctx.dtype = values.dtype
        ctx.mark_non_differentiable(results)
        return loss, results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        results, grad = ctx.saved_tensors
        return (grad * (grad_loss * results[0])).to(ctx.dtype), *[None] * 9


def value_loss(x: Values, clip: float, aggregation: str, max_length: float, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics); differentiable in ``x.values``. Arguments are checked by the caller."""
    values, *constants = x
    tensors = [None if t is None else t.detach() for t in constants]
    loss, results = _ValueLoss.apply(values, *tensors, clip, aggregation, max_length, backend)
    return loss, dict(zip(METRICS, results[1:].unbind(), strict=True))
