"""A token-level policy loss and its gradients from logits in one go; and what it shares with the loss from hidden states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._backend import device_of, multiprocessors
from ..config import PolicyLossConfig
from .logits import LossTiling, Rows, Statistics, as_rows, check_ids, locate
from .operators import fake_of, operator
from .policy import Tokens, policy_loss_op, term_functions
from .policy_terms import Options


class PolicyRows(NamedTuple):
    """What a token-level objective reads of each row, all ``[N]``."""

    old_logprobs: Tensor | None
    advantages: Tensor
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    sampling_logprobs: Tensor | None
    entropy_mask: Tensor | None

    def of(self, index: slice | Tensor | None) -> PolicyRows:
        """Those of some rows."""
        return self if index is None else PolicyRows._make(None if x is None else x[index] for x in self)

    def slope(self, logprobs: Tensor, mask: Tensor, config: str, backend: str) -> Tensor:
        """d (per-token loss) / d logprob."""
        tokens = Tokens(logprobs, self.old_logprobs, self.advantages, mask, self.ref_logprobs, None, *self[3:], None, None)
        return policy_loss_op(*tokens, True, False, config, backend)[2]


def per_token_config(config: PolicyLossConfig) -> PolicyLossConfig:
    """The objective of a token by itself: no weight of aggregation, no entropy bonus."""
    return replace(config, aggregation="sum", entropy_coef=0.0, entropy_aggregation=None)


def _triton_policy_gradients(
    out: Tensor,
    logits: Tensor,
    rows: Rows,
    terms: PolicyRows,
    loss_weights: Tensor,
    entropy_weights: Tensor | None,
    config: str,
    statistics: Statistics,
) -> None:
    from ..kernels import logits as kernels

    if not rows.ids.numel():
        return
    x = as_rows(logits)
    dx = as_rows(out).view(x.shape)
    vocabulary, objective = x.shape[-1], PolicyLossConfig.from_text(config)
    tiling = LossTiling.of(vocabulary, x.element_size())
    with device_of(x):
        kernels.loss_kernel[(rows.ids.numel(),)](
            x,
            dx,
            *rows.contiguous(),
            *(None if t is None else t.contiguous() for t in (*terms, loss_weights, entropy_weights)),
            statistics.logprob,
            statistics.entropy if statistics.entropy.numel() else None,
            vocabulary,
            x.shape[1],
            x.stride(0),
            x.stride(1),
            dx.stride(0),
            dx.stride(1),
            rows.scale,
            rows.cap,
            Options.of(objective, 1),
            **term_functions(objective),
            BLOCK=tiling.block,
            STAGES=tiling.stages,
            num_warps=tiling.warps,
        )


# Rows of logits between whose two passes the cache is kept, on a CPU.
CHUNK_ROWS = 256


def _policy_gradients(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    live: Tensor,
    temperature: Tensor | None,
    terms: PolicyRows,
    loss_weights: Tensor,
    entropy_weights: Tensor | None,
    config: str,
    scale: float,
    cap: float | None,
    with_entropy: bool,
    validate: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy), and d loss / d logits in ``out``, which may be ``logits``."""
    if validate:
        check_ids(ids, live, logits.shape[-1])
    statistics, rows = Statistics.empty(logits, ids.shape, with_entropy), Rows(ids, live, temperature, scale, cap, backend)
    if backend == "triton":
        _triton_policy_gradients(out, logits, rows, terms, loss_weights, entropy_weights, config, statistics)
        return statistics.logprob, statistics.entropy
    x, dx = as_rows(logits), as_rows(out)
    for start in range(0, ids.numel(), CHUNK_ROWS):
        at = slice(start, start + CHUNK_ROWS)
        here, stored = rows.at(at), statistics.at(at)
        chunk, place = x[locate(x, at)], dx[locate(dx, at)]  # views where the rows are evenly spaced, else copies
        here.statistics(chunk, stored)
        a = terms.of(at).slope(stored.logprob, live[at], config, backend).mul_(loss_weights[at])
        here.gradient(place, chunk, a, None if entropy_weights is None else entropy_weights[at], stored)
        if dx.shape[0] > 1:
            dx[locate(dx, at)] = place
    return statistics.logprob, statistics.entropy


@operator("policy_gradients")
def policy_gradients_op(
    logits: Tensor,
    ids: Tensor,
    live: Tensor,
    temperature: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    sampling_logprobs: Tensor | None,
    entropy_mask: Tensor | None,
    loss_weights: Tensor,
    entropy_weights: Tensor | None,
    config: str,
    scale: float,
    cap: float | None,
    with_entropy: bool,
    validate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, d loss / d logits) for  loss = sum loss_weights * per-token loss + sum entropy_weights * entropy.

    ``logits`` has N rows in any shape, the rest are ``[N]``; ``live`` is the whole mask; ``config`` a per-token one.
    """
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    terms = PolicyRows(old_logprobs, advantages, ref_logprobs, importance_weights, sampling_logprobs, entropy_mask)
    options = (loss_weights, entropy_weights, config, scale, cap, with_entropy, validate, backend)
    return *_policy_gradients(out, logits, ids, live, temperature, terms, *options), out


@fake_of(policy_gradients_op)
def _(logits: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = Statistics.empty(logits, ids.shape, args[-3])
    return statistics.logprob, statistics.entropy, torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@operator("policy_gradients_", mutates=("logits",))
def policy_gradients_inplace_op(
    logits: Tensor,
    ids: Tensor,
    live: Tensor,
    temperature: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    sampling_logprobs: Tensor | None,
    entropy_mask: Tensor | None,
    loss_weights: Tensor,
    entropy_weights: Tensor | None,
    config: str,
    scale: float,
    cap: float | None,
    with_entropy: bool,
    validate: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The same with d loss / d logits written over ``logits``."""
    terms = PolicyRows(old_logprobs, advantages, ref_logprobs, importance_weights, sampling_logprobs, entropy_mask)
    options = (loss_weights, entropy_weights, config, scale, cap, with_entropy, validate, backend)
    return _policy_gradients(logits, logits, ids, live, temperature, terms, *options)


@fake_of(policy_gradients_inplace_op)
def _(logits: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    statistics = Statistics.empty(logits, ids.shape, args[-3])
    return statistics.logprob, statistics.entropy


# Of the kernel that multiplies: elements of a row that a program takes at once, and programs on a multiprocessor.
SCALE_BLOCK, SCALE_PROGRAMS = 4096, 8


def _triton_scale(x: Tensor, factor: Tensor) -> None:
    from ..kernels import logits as kernels

    rows = as_rows(x)
    block = min(SCALE_BLOCK, 1 << (rows.shape[-1] - 1).bit_length())
    tiles = rows.shape[0] * rows.shape[1] * -(-rows.shape[-1] // block)
    grid = (min(tiles, SCALE_PROGRAMS * multiprocessors(x)),)
    with device_of(x):
        kernels.scale_kernel[grid](rows, factor, rows.shape[-1], tiles, rows.shape[1], rows.stride(0), rows.stride(1), BLOCK=block, num_warps=8)


@operator("scale_", mutates=("x",))
def scale_inplace_op(x: Tensor, factor: Tensor, backend: str) -> None:
    """``x *= factor``, one number that stays on its device, with the factor as it is and one rounding; where it is 1, ``x`` is not touched."""
    if not x.numel():
        return
    if backend == "triton":
        _triton_scale(x, factor)
    elif x.device.type == "cpu":
        number = factor.item()
        if number != 1:
            x.mul_(number)  # in float32 for 16-bit numbers too
    else:
        torch.mul(x, factor.view(1), out=x)  # a tensor with no dimension would be rounded to the dtype of x first


class GradientsInForward(torch.autograd.Function):
    """A loss whose gradients were made with it: the backward multiplies them, in place, by the upstream gradient, and leaves them where that is 1.

    ``apply(loss, backend, *gradients, *inputs)``: as many gradients as inputs, in the same order; None, or empty, where an input takes none.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, backend: str, *gradients_and_inputs: Tensor | None) -> Tensor:
        half = len(gradients_and_inputs) // 2
        ctx.save_for_backward(*gradients_and_inputs[:half])
        ctx.dtypes = [None if x is None else x.dtype for x in gradients_and_inputs[half:]]
        ctx.backend, ctx.spent = backend, False
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "a second backward through a loss whose gradients were made in its forward: the first one gave them away. Pass mode='recompute' to "
                "functions from hidden states, call token_logprobs and policy_loss instead of fused_policy_loss, or scale the loss instead"
            )
        gradients = ctx.saved_tensors
        scaled: list[Tensor | None] = []
        for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs_input_grad[2 + len(gradients) :], strict=True):
            if gradient is None or not needed:
                scaled.append(None)
            elif gradient.dtype == dtype:
                ctx.spent = True
                scale_inplace_op(gradient, grad_loss, ctx.backend)
                scaled.append(gradient)
            else:  # kept in float32, rounded once
                scaled.append(torch.mul(gradient, grad_loss, out=torch.empty_like(gradient, dtype=dtype)))
        return None, None, *(None for _ in gradients), *scaled
