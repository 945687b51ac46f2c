"""Advantages and returns over time: GAE and its relatives, and whitening. All are data: no gradient flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._backend import choose_backend, choose_validate
from ._checks import FLOATS, check_choice, check_cu_seqlens, check_number, check_tensor, state_dtype
from .distributed import check_group
from .ops import scan
from .ops.scan import Advantages, Numbers, ScanOptions, Sequences, Steps
from .ops.shards import gathered

WHITEN_EPS = 1e-8


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask: Tensor | None = None,
    masked: str = "skip",
    last_values: Tensor | None = None,
    next_values: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    whitened: bool = False,
    process_group: Any = None,
    time_group: Any = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (Schulman et al. 2016, arXiv:1506.02438, eq. 16), by a parallel scan::

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        returns = A + V

    A and returns are data: inputs count as constants, and no gradient flows.

    Args:
        rewards: ``S``, any floating dtype: ``[..., time]``, or ``[tokens]`` packed with ``cu_seqlens``. ``values[t]`` is V before step t, and
            ``rewards[t]`` the reward of that step.
        values: ``S``, any floating dtype.
        gamma, lam: numbers in [0, 1], or tensors with one for each sequence: ``S[:-1]``, or ``[sequences]`` with ``cu_seqlens``.
        mask: ``S``, any dtype, non-zero where a step counts. At other steps no input is read, flags included, and both results are 0.
        masked: how a masked step acts on the steps before it. "skip": not at all. V and A pass over it, and the valid steps get the results of the
            sequence without the masked ones. "decay": as a step with r = V = 0 and no flags. A decays by gamma lam, and V_{t+1} before it is 0;
            padding at the end counts as steps too, so that ``last_values`` lies beyond the padding.
        last_values: V after the end of each sequence, for sequences that go on: ``S[:-1]``, or ``[sequences]``. Default: ``next_values`` at the last
            valid step if they are given, else 0.
        next_values: ``S``; V of the observation after step t. Read at steps that are ``truncated`` and not ``terminated``, and at the last valid step
            if ``last_values`` are not given.
        terminated: ``S``, any dtype, non-zero where step t ended its episode: V_{t+1} and A_{t+1} count as 0.
        truncated: ``S``, non-zero where the episode was cut short after step t: A_{t+1} counts as 0, and V_{t+1} is ``next_values[t]``, or without
            ``next_values`` the V of the next valid step (``last_values`` at the end). A step with both flags counts as terminated.
        cu_seqlens: ``[sequences + 1]``, int32 or int64: the start of each packed sequence, then the number of tokens. Nothing passes from one
            sequence to another.
        whitened: return the advantages with mean 0 and variance 1 over the mask, as :func:`whiten` would; the sums for this are gathered while the
            advantages are made.
        process_group: with ``whitened``, a ``torch.distributed`` group: mean and variance are taken over all its ranks, by one all-reduce of three
            numbers.
        time_group: a ``torch.distributed`` group whose ranks divide time among them (context parallelism). Each rank has some steps of all sequences,
            ``[..., time]``; the first rank has the earliest. Two all-gathers carry values and advantages from the later ranks to the earlier ones.
            ``last_values``, ``gamma`` and ``lam`` belong to whole sequences and are the same on all ranks; ``masked`` must be "skip".
        validate: check that ``cu_seqlens`` rises from 0 to the number of tokens (one synchronisation on a GPU). Default: on the CPU, or with
            RLKERN_VALIDATE=1.
        backend: "triton" or "torch"; default: by device, or RLKERN_BACKEND.

    Returns:
        ``(advantages, returns)``, each ``S``; float32 (float64 if rewards or values are float64).

    Raises:
        TypeError, ValueError: for arguments of another type, dtype, shape, device or range.
    """
    steps = Steps(rewards, values, None, None, mask, next_values, terminated, truncated)
    rest = (gamma, lam, masked, last_values, cu_seqlens, validate, backend)
    if process_group is not None and not whitened:
        raise ValueError("process_group is for whitened=True alone: advantages of ranks are otherwise independent")
    if time_group is not None:
        advantages, returns = _gae_over_ranks(steps, *rest, time_group)
        return whiten(advantages, mask, process_group=process_group or time_group) if whitened else advantages, returns
    advantages, returns, moments = _returns(steps, *rest, with_moments=whitened)
    if whitened:
        if process_group is not None:
            dist.all_reduce(moments, group=process_group)
        advantages = scan.normalise(advantages, mask, moments, WHITEN_EPS, choose_backend(backend, rewards))
    return advantages, returns


def _gae_over_ranks(
    steps: Steps,
    gamma: float | Tensor,
    lam: float | Tensor,
    masked: str,
    last_values: Tensor | None,
    cu_seqlens: Tensor | None,
    validate: bool | None,
    backend: str | None,
    group: Any,
) -> tuple[Tensor, Tensor]:
    """GAE of this rank's steps: as if nothing followed but the next value, and then what the advantage that follows adds to each."""
    check_group(group, "time_group")
    if masked != "skip" or cu_seqlens is not None:
        raise ValueError(
            "time_group takes padded sequences, [..., time], with masked='skip'; got " + ("cu_seqlens" if cu_seqlens is not None else masked)
        )
    rewards, values, _, _, mask, next_values, terminated, truncated = steps
    check_tensor("rewards", rewards, min_dim=2, dtypes=FLOATS)
    check_tensor("values", values, shape=rewards.shape, dtypes=FLOATS, device=rewards.device)
    assert values is not None
    rank, dtype = dist.get_rank(group), scan.result_dtype(steps)

    def first_valid(x: Tensor) -> Tensor:
        """Of each sequence at its first valid step; 0 where there is none here."""
        return (
            torch.where(valid, x.to(dtype), 0.0).gather(-1, valid.long().argmax(-1, keepdim=True))[..., 0]
            if x.shape[-1]
            else x.new_zeros(x.shape[:-1])
        )

    def following(carry: Tensor, own: Tensor, through: Tensor) -> Tensor:
        """What comes to this rank from the later ones: each hands on own + through * what came to it."""
        parts = gathered(torch.stack([own, through]), group)
        for later in range(len(parts) - 1, rank, -1):
            carry = parts[later, 0] + torch.where(parts[later, 1] == 0, 0.0, parts[later, 1] * carry)
        return carry

    valid = torch.ones(rewards.shape, dtype=torch.bool, device=rewards.device) if mask is None else mask != 0
    empty = ~valid.any(-1)
    beyond = values.new_zeros(empty.shape, dtype=dtype) if last_values is None else last_values.to(dtype)
    if last_values is None and next_values is not None:  # of the rank that has the last valid step; what others take for it reaches no step
        check_tensor("next_values", next_values, shape=rewards.shape, dtypes=FLOATS, device=rewards.device)
        beyond = _beyond_the_end(next_values, mask, None).to(dtype)
    value_after = following(beyond, first_valid(values.detach()), empty.to(dtype))
    advantages, returns, _ = _returns(steps, gamma, lam, masked, value_after, None, validate, backend)

    cut = torch.zeros_like(valid)
    for flags in (terminated, truncated):
        cut = cut if flags is None else cut | (valid & (flags != 0))
    rate = gamma * lam
    power = rate ** valid.sum(-1).to(dtype) if isinstance(rate, Tensor) else torch.pow(rate, valid.sum(-1).to(dtype))
    through = torch.where(cut.any(-1), 0.0, power)
    after = following(torch.zeros_like(beyond), first_valid(advantages), through)
    last = valid & (valid.flip(-1).cumsum(-1).flip(-1) == 1)
    handed = torch.where(last & ~cut, (rate * after).unsqueeze(-1).to(dtype), 0.0)
    more = discounted_returns(handed, gamma=rate, mask=mask, terminated=cut, validate=validate, backend=backend)
    return advantages + more, returns + more


def td_lambda(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask: Tensor | None = None,
    masked: str = "skip",
    last_values: Tensor | None = None,
    next_values: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """TD(lambda) returns (Sutton and Barto 2018, eq. 12.18): the returns of ``gae``, without its advantages::

        R_t = r_t + gamma ((1 - lam) V_{t+1} + lam R_{t+1})

    Arguments, dtypes and errors are those of ``gae``.
    """
    steps = Steps(rewards, values, None, None, mask, next_values, terminated, truncated)
    return _returns(steps, gamma, lam, masked, last_values, cu_seqlens, validate, backend, with_advantages=False).returns


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float | Tensor,
    mask: Tensor | None = None,
    masked: str = "skip",
    terminated: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Discounted sums of the rewards from each step on, ``R_t = r_t + gamma R_{t+1}``; R_{t+1} counts as 0 where ``terminated``.

    Arguments, dtypes and errors are those of ``gae``.
    """
    steps = Steps(rewards, None, None, None, mask, None, terminated, None)
    return _returns(steps, gamma, 1.0, masked, None, cu_seqlens, validate, backend, with_advantages=False, required=()).returns


def vtrace(
    rewards: Tensor,
    values: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    *,
    gamma: float | Tensor,
    lam: float | Tensor = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    mask: Tensor | None = None,
    masked: str = "skip",
    last_values: Tensor | None = None,
    next_values: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """V-trace advantages and value targets for off-policy data (Espeholt et al. 2018, arXiv:1802.01561, eq. 1)::

        ratio = exp(logprobs - old_logprobs)        rho = min(rho_clip, ratio)        c = lam min(c_clip, ratio)
        targets_t = V_t + rho_t (r_t + gamma V_{t+1} - V_t) + gamma c_t (targets_{t+1} - V_{t+1})
        advantages_t = rho_t (r_t + gamma ((1 - lam) V_{t+1} + lam targets_{t+1}) - V_t)

    At ratio 1 these are the advantages and returns of ``gae``. ``logprobs`` are those of the policy that is trained, ``old_logprobs`` those of the
    policy that acted, both in nats and of shape ``S``. They count as constants too, and are not read at masked steps. ``rho_clip`` and ``c_clip`` are
    positive; the other arguments are those of ``gae``.

    Returns:
        ``(advantages, targets)``, each ``S``; float32 (float64 if rewards or values are float64).
    """
    steps = Steps(rewards, values, logprobs, old_logprobs, mask, next_values, terminated, truncated)
    rest = (gamma, lam, masked, last_values, cu_seqlens, validate, backend)
    advantages, targets, _ = _returns(steps, *rest, clips=(rho_clip, c_clip), required=("values", "logprobs", "old_logprobs"))
    return advantages, targets


def _beyond_the_end(next_values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``next_values`` at the last valid step of each sequence, which is V of what follows it; 0 where no step is valid."""
    valid = torch.ones_like(next_values, dtype=torch.bool) if mask is None else mask != 0
    steps = torch.arange(valid.shape[-1], device=valid.device)
    if cu_seqlens is None:
        last = torch.where(valid, steps, -1).amax(-1) if len(steps) else torch.full(valid.shape[:-1], -1, device=valid.device)
        first = torch.zeros_like(last)
    else:
        # Of an empty sequence the step before its end is another's, before its first.
        first, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        last = torch.cat([steps.new_full((1,), -1), torch.where(valid, steps, -1).cummax(0).values if len(steps) else steps])[end]
    padded = torch.cat([next_values.new_zeros(*next_values.shape[:-1], 1), next_values], -1)
    found = padded.gather(-1, (last + 1).unsqueeze(-1)).squeeze(-1) if cu_seqlens is None else padded[last + 1]
    return torch.where(last >= first, found, 0.0).detach()


def _returns(
    steps: Steps,
    gamma: float | Tensor,
    lam: float | Tensor,
    masked: str,
    last_values: Tensor | None,
    cu_seqlens: Tensor | None,
    validate: bool | None,
    backend: str | None,
    *,
    clips: tuple[float, float] = (1.0, 1.0),
    with_advantages: bool = True,
    with_moments: bool = False,
    required: tuple[str, ...] = ("values",),
) -> Advantages:
    """Check everything and scan. ``clips``: those of V-trace."""
    rewards = steps.rewards
    check_tensor("rewards", rewards, min_dim=1, dtypes=FLOATS)
    shape, device = rewards.shape, rewards.device
    floats = ("values", "logprobs", "old_logprobs", "next_values")
    for name in (*floats, "mask", "terminated", "truncated"):
        x = getattr(steps, name)
        if x is not None or name in required:
            check_tensor(name, x, shape=shape, dtypes=FLOATS if name in floats else None, device=device)
    check_choice("masked", masked, ("skip", "decay"))
    sequences: Sequence[int] = shape[:-1]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, rewards.numel(), like=rewards, validate=False)  # its values are checked in the op
        if rewards.dim() != 1:
            raise ValueError(f"rewards must have shape [tokens] with cu_seqlens, got {tuple(shape)}")
        sequences = (cu_seqlens.numel() - 1,)
    if last_values is not None:
        check_tensor("last_values", last_values, shape=sequences, dtypes=FLOATS, device=device)
    elif steps.next_values is not None:
        last_values = _beyond_the_end(steps.next_values, steps.mask, cu_seqlens)
    numbers, rates = [], []
    for name, y in (("gamma", gamma), ("lam", lam)):
        if isinstance(y, Tensor):
            check_tensor(name, y, shape=sequences, dtypes=FLOATS, device=device)
        numbers.append(1.0 if isinstance(y, Tensor) else check_number(name, y, at_least=0, at_most=1))
        rates.append(y if isinstance(y, Tensor) else None)
    numbers += [check_number(name, clip, above=0) for name, clip in zip(("rho_clip", "c_clip"), clips, strict=True)]
    return scan.lambda_returns(
        Steps._make(None if x is None else x.detach() for x in steps),
        Sequences._make(None if x is None else x.detach() for x in (last_values, cu_seqlens, *rates)),
        Numbers(*numbers),
        ScanOptions(masked == "decay", with_advantages, with_moments),
        choose_validate(validate, rewards),
        choose_backend(backend, rewards),
    )


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = WHITEN_EPS,
    unbiased: bool = True,
    shift_mean: bool = True,
    eps_outside: bool = False,
    process_group: Any = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over all positions of the mask; mean and variance in two passes, in float64.

    Args:
        x: any shape, any floating dtype; a constant, no gradient flows.
        mask: of the shape of ``x``, any dtype, non-zero where a position counts. At other positions ``x`` is not read and the result is 0.
        eps: a number of at least 0.
        unbiased: divide the sum of squares by n - 1 (Bessel) rather than n. A single position has variance 0.
        shift_mean: False adds the mean again after scaling: ``(x - mean) / sqrt(var + eps) + mean``.
        eps_outside: ``(x - mean) / (std + eps)``.
        process_group: a ``torch.distributed`` group, such as ``torch.distributed.group.WORLD``: mean and variance are taken over the positions of all
            its ranks, by two all-reduces, of two numbers and of one. All ranks must call. None: this process alone.

    Returns:
        The shape of ``x``, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for arguments of another type, dtype, shape, device or range.
    """
    check_tensor("x", x, dtypes=FLOATS)
    if mask is not None:
        check_tensor("mask", mask, shape=x.shape, device=x.device)
    eps = check_number("eps", eps, at_least=0)
    valid = None if mask is None else mask != 0

    def keep(y: Tensor) -> Tensor:
        return y if valid is None else torch.where(valid, y, 0.0)

    def over_ranks(sums: Tensor) -> Tensor:
        if process_group is not None:
            dist.all_reduce(sums, group=process_group)
        return sums

    count = torch.full((), x.numel(), dtype=torch.float64, device=x.device) if valid is None else valid.sum(dtype=torch.float64)
    wide = keep(x.detach().double())
    total, count = over_ranks(torch.stack([wide.sum(), count])).unbind()
    mean = total / count.clamp(min=1)
    centred = keep(wide - mean)
    var = over_ranks(centred.square().sum()) / (count - int(unbiased)).clamp(min=1)
    white = centred / (var.sqrt() + eps if eps_outside else (var + eps).sqrt())
    return (white if shift_mean else keep(white + mean)).to(state_dtype(x.dtype))
