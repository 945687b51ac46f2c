"""A token-level policy loss and its gradients from logits in one go; and what it shares with the loss from hidden states."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import PolicyLossConfig
from .backends import backend_of
from .logits import Rows, Statistics
from .operators import fake_of, operator
from .policy import Tokens


class PolicyRows(NamedTuple):
    """What a token-level objective reads of each row beside its log-prob, all ``[N]``."""

    old_logprobs: Tensor | None
    advantages: Tensor
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    sampling_logprobs: Tensor | None
    entropy_mask: Tensor | None

    def tokens(self, logprobs: Tensor, mask: Tensor) -> Tokens:
        """With log-probs and mask: as :func:`rlkern.ops.policy.policy_loss_op` takes them."""
        return Tokens(logprobs, self.old_logprobs, self.advantages, mask, self.ref_logprobs, None, *self[3:], None, None)


class Weights(NamedTuple):
    """Of each row: the weight of its loss in the sum, and of its entropy, None for 0."""

    loss: Tensor
    entropy: Tensor | None


class LossFromLogits(NamedTuple):
    """Log-prob and entropy of each row (empty where not wanted), and d loss / d logits."""

    logprob: Tensor
    entropy: Tensor
    gradient: Tensor


class LossOverLogits(NamedTuple):
    """The same where d loss / d logits is written over the logits."""

    logprob: Tensor
    entropy: Tensor


def _fill(
    gradient: Tensor, logits: Tensor, rows: Rows, terms: PolicyRows, weights: Weights, config: PolicyLossConfig, with_entropy: bool, validate: bool
) -> LossOverLogits:
    """Write d loss / d logits into ``gradient``, which may be ``logits``."""
    if validate:
        rows.check_ids(logits.shape[-1])
    found = Statistics.empty(logits.dtype, rows.ids.shape, logits.device, with_entropy)
    if rows.ids.numel():
        backend_of(rows.backend).policy_gradients(gradient, logits, rows, terms, weights, config.of_a_token, found)
    return LossOverLogits(found.logprob, found.entropy)


@operator("policy_gradients")
def policy_gradients_op(
    logits: Tensor, rows: Rows, terms: PolicyRows, weights: Weights, config: PolicyLossConfig, with_entropy: bool, validate: bool
) -> LossFromLogits:
    """For  loss = sum weights.loss * per-token loss + sum weights.entropy * entropy.  ``logits`` has N rows in any shape; ``rows.mask`` is the whole
    mask."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return LossFromLogits(*_fill(gradient, logits, rows, terms, weights, config, with_entropy, validate), gradient)


@fake_of(policy_gradients_op)
def _(
    logits: Tensor, rows: Rows, terms: PolicyRows, weights: Weights, config: PolicyLossConfig, with_entropy: bool, validate: bool
) -> LossFromLogits:
    found = Statistics.empty(logits.dtype, rows.ids.shape, logits.device, with_entropy)
    return LossFromLogits(found.logprob, found.entropy, torch.empty(logits.shape, dtype=logits.dtype, device=logits.device))


@operator("policy_gradients_", mutates=("logits",))
def policy_gradients_inplace_op(
    logits: Tensor, rows: Rows, terms: PolicyRows, weights: Weights, config: PolicyLossConfig, with_entropy: bool, validate: bool
) -> LossOverLogits:
    """:func:`policy_gradients_op` with d loss / d logits written over ``logits``."""
    return _fill(logits, logits, rows, terms, weights, config, with_entropy, validate)


@fake_of(policy_gradients_inplace_op)
def _(
    logits: Tensor, rows: Rows, terms: PolicyRows, weights: Weights, config: PolicyLossConfig, with_entropy: bool, validate: bool
) -> LossOverLogits:
    found = Statistics.empty(logits.dtype, rows.ids.shape, logits.device, with_entropy)
    return LossOverLogits(found.logprob, found.entropy)


@operator("scale_", mutates=("x",))
def scale_inplace_op(x: Tensor, factor: Tensor, backend: str) -> None:
    """``x *= factor``, one number that stays on its device, with the factor as it is and one rounding; where it is 1, ``x`` is not touched."""
    if x.numel():
        backend_of(backend).scale(x, factor)


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
