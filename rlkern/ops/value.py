"""The value loss on tokens: loss, gradient and metrics in one forward; the backward only scales. The work is the backends'."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import state_dtype
from .backends import backend_of
from .operators import fake_of, operator, split

METRICS = ("clip_fraction", "error", "value_mean", "return_mean", "explained_variance")


class Values(NamedTuple):
    """The tensors of a value loss."""

    values: Tensor
    old_values: Tensor | None
    returns: Tensor
    mask: Tensor | None
    normalizer: Tensor | None
    cu_seqlens: Tensor | None


class ValueOptions(NamedTuple):
    clip: float  # read where there are old values
    aggregation: str
    max_length: float
    with_metrics: bool


class ValueResults(NamedTuple):
    """``numbers``: the factor by which the gradient, undivided, is to be multiplied; then the metrics, if these are
    wanted. The gradient is empty where it is not."""

    loss: Tensor
    numbers: Tensor
    grad: Tensor

    @classmethod
    def empty(cls, values: Tensor, with_gradient: bool) -> ValueResults:
        """Unfilled."""
        dtype = state_dtype(values.dtype)
        return cls(*(values.new_empty(shape, dtype=dtype) for shape in ((), (1 + len(METRICS),), values.shape if with_gradient else (0,))))


# ---- operator and autograd ------------------------------------------------------------------------------------------------------------------


@operator("value_loss")
def value_loss_op(x: Values, options: ValueOptions, with_gradient: bool, backend: str) -> ValueResults:
    """Loss, metrics, and the gradient where it is wanted. Without ``old_values`` no clip."""
    out = ValueResults.empty(x.values, with_gradient)
    if x.values.numel() == 0:
        out.loss.zero_()
        out.numbers.zero_()
        return out
    if x.cu_seqlens is not None:  # tokens beyond the last sequence belong to no program
        out.grad.zero_()
    backend_of(backend).value_loss(x, options, out)
    return out


@fake_of(value_loss_op)
def _(x: Values, options: ValueOptions, with_gradient: bool, backend: str) -> ValueResults:
    return ValueResults.empty(x.values, with_gradient)


class ValueLoss(torch.autograd.Function):
    """(loss, numbers), differentiable in values. ``apply(*x, *options, backend)``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, options, backend = split(arguments, Values, ValueOptions)
        out = value_loss_op(x, options, ctx.needs_input_grad[0], backend)
        ctx.save_for_backward(out.numbers, out.grad)
        ctx.dtype = x.values.dtype
        ctx.mark_non_differentiable(out.numbers)
        return out.loss, out.numbers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        numbers, grad = ctx.saved_tensors
        return (grad * (grad_loss * numbers[0])).to(ctx.dtype), *(None,) * (len(ctx.needs_input_grad) - 1)


def value_loss(x: Values, options: ValueOptions, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics, none unless wanted); differentiable in ``x.values``. Arguments are checked by the caller."""
    constants = Values._make(None if t is None else t.detach() for t in x)
    loss, numbers = ValueLoss.apply(*constants._replace(values=x.values), *options, backend)
    return loss, dict(zip(METRICS, numbers[1:].unbind(), strict=True)) if options.with_metrics else {}
