"""Log-probs and entropies of chosen tokens."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ._backend import choose_backend, choose_validate
from ._checks import FLOATS, INTS, check_number, check_tensor
from .ops.logits import TRITON_DTYPES, TokenLogprobs


@overload
def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    with_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
    validate: bool | None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    with_entropy: Literal[True],
    inplace_backward: bool = ...,
    validate: bool | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    inplace_backward: bool = False,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each token, and optionally the entropy of its distribution, in nats; the softmax is never materialised.

    With ``z = cap * tanh(logits / cap) * logit_scale / temperature`` (no tanh without a soft-cap)::

        logprob = z[id] - logsumexp(z)        entropy = logsumexp(z) - sum_v p_v z_v

    Differentiable in ``logits``, through both results, once: a double backward is an error. ``-inf`` logits have probability 0 and gradient 0.

    Args:
        logits: ``S + [V]``; float16, bfloat16, float32, or float64 (torch backend). ``S`` is any shape of rank 1 or more. Read in place wherever the
            last dimension has unit stride and the rest two strides at most, as in ``logits[:, :-1]``; otherwise copied.
        ids: ``S``, int32 or int64. ``ids[i]`` is the token that ``logits[i]`` scores: nothing is shifted. -100 counts as masked.
        mask: ``S``, any dtype, non-zero where a position counts. Elsewhere nothing is read, and both results and the gradient are 0.
        temperature: a positive number, or a tensor of shape ``S`` with one for each token.
        softcap: positive bound of the logits (Gemma), or None.
        logit_scale: positive factor of the logits (Cohere, Granite).
        with_entropy: also return the entropy.
        inplace_backward: write the gradient over ``logits`` during the backward, which saves a tensor of their size. Safe when nothing else needs
            them after; where autograd saved them for something else, that raises.
        validate: check that ids lie in ``[0, V)`` (one synchronisation on a GPU). Default: on the CPU, or with RLKERN_VALIDATE=1. Unchecked, a row
            whose id does not is NaN.
        backend: "triton" or "torch"; default: by device, or RLKERN_BACKEND.

    Returns:
        ``logprobs`` of shape ``S``, or ``(logprobs, entropy)``; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: for arguments of another type, dtype, shape, device or range, and, when validating, for an id outside ``[0, V)``.
    """
    check_tensor("logits", logits, min_dim=2, dtypes=FLOATS)
    shape, device = logits.shape[:-1], logits.device
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have a vocabulary of at least 1 in the last dimension, got shape {tuple(logits.shape)}")
    check_tensor("ids", ids, shape=shape, dtypes=INTS, device=device)
    if mask is not None:
        check_tensor("mask", mask, shape=shape, device=device)
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, shape=shape, dtypes=FLOATS, device=device)
        per_token: Tensor | None = temperature.detach()
        scale = check_number("logit_scale", logit_scale, above=0)
    else:
        per_token = None
        scale = check_number("logit_scale", logit_scale, above=0) / check_number("temperature", temperature, above=0)
    cap = None if softcap is None else check_number("softcap", softcap, above=0)
    if inplace_backward and any(stride == 0 and size > 1 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(f"inplace_backward=True needs logits whose elements do not share memory, got strides {logits.stride()}")
    backend = choose_backend(backend, logits, triton_dtypes=TRITON_DTYPES)
    logprob, entropy = TokenLogprobs.apply(
        logits, ids, mask, per_token, scale, cap, with_entropy, inplace_backward, choose_validate(validate, logits), backend
    )
    return (logprob, entropy) if with_entropy else logprob
