"""Advantages and returns: recursions over time (GAE and its relatives), baselines over groups, whitening. All are data: no gradient flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._backend import choose_backend, choose_validate
from ._checks import FLOATS, INTS, check_choice, check_cu_seqlens, check_number, check_tensor, state_dtype
from .distributed import check_group
from .losses import kl_penalty
from .ops import groups, scan
from .ops.scan import Advantages, Numbers, ScanOptions, Sequences, Steps
from .ops.sequences import sequence_of_token, to_tokens
from .ops.shards import concatenated, gathered

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
        rewards: ``S``, any floating dtype: ``[..., time]``, or ``[tokens]`` packed with ``cu_seqlens``. ``values[t]`` is V before step t and
            ``rewards[t]`` what that step earned.
        values: ``S``, any floating dtype.
        gamma, lam: numbers in [0, 1], or tensors with one for each sequence: ``S[:-1]``, or ``[sequences]`` with ``cu_seqlens``.
        mask: ``S``, any dtype, non-zero where a step counts. Elsewhere no input is read, flags included, and both results are 0.
        masked: what a masked step is to the steps before it. "skip": nothing; V and A pass over it, so that the valid steps get what the sequence
            without the others would. "decay": a step of r = V = 0 without flags, through which A decays by gamma lam and V_{t+1} is 0; padding at the
            end counts too, so there ``last_values`` lies beyond the padding.
        last_values: V beyond the end of each sequence, for one that goes on: ``S[:-1]``, or ``[sequences]``. Default: ``next_values`` at its last
            valid step where these are given, else 0.
        next_values: ``S``; V of the observation that step t led to, read where ``truncated`` (and not ``terminated``), and at the last valid step
            without ``last_values``.
        terminated: ``S``, any dtype, non-zero where step t ended its episode: V_{t+1} and A_{t+1} count as 0.
        truncated: ``S``, non-zero where the episode was cut short after step t: A_{t+1} counts as 0, V_{t+1} is ``next_values[t]``, without
            ``next_values`` the next valid step's V (``last_values`` at the end). A step that is both has terminated.
        cu_seqlens: ``[sequences + 1]``, int32 or int64: where the packed sequences begin, and the number of tokens. None passes from one to another.
        whitened: give the advantages with mean 0 and variance 1 over the mask, as :func:`whiten` would; the sums that this takes are gathered while
            the advantages are made.
        process_group: with ``whitened``, the ``torch.distributed`` group over whose ranks mean and variance are taken, by one all-reduce of three
            numbers.
        time_group: the ``torch.distributed`` group among whose ranks time is divided (context parallelism): each has some steps of all sequences, of
            ``[..., time]``, the first rank the earliest. Two all-gathers carry values and advantages from the later ranks to the earlier ones.
            ``last_values`` and the rates are those of the sequences, on all ranks; masked steps are skipped.
        validate: check that ``cu_seqlens`` rises from 0 to the number of tokens (one synchronisation on a GPU). Default: on the CPU, or with
            RLKERN_VALIDATE=1.
        backend: "triton" or "torch"; default: by device, or RLKERN_BACKEND.

    Returns:
        ``(advantages, returns)``, each ``S``; float32 (float64 where rewards or values are).

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
    """Discounted sums of the rewards to come, ``R_t = r_t + gamma R_{t+1}``, without R_{t+1} where ``terminated``.

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

    At ratio 1 these are the advantages and returns of ``gae``. Log-probs (nats) are ``S``, of the policy to be improved and of the one that acted;
    they too count as constants, and are not read at masked steps. ``rho_clip`` and ``c_clip`` are positive; the rest is as for ``gae``.

    Returns:
        ``(advantages, targets)``, each ``S``; float32 (float64 where rewards or values are).
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


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    baseline: str | Tensor = "mean",
    scale: str = "group",
    eps: float = 1e-4,
    lengths: Tensor | None = None,
    singleton: str = "zero",
    process_group: Any = None,
    validate: bool | None = None,
) -> Tensor:
    """Each reward against those of its group, the samples of one prompt: ``(reward - baseline) / (std + eps)``.

    The defaults are GRPO (Shao et al. 2024, arXiv:2402.03300); ``scale="none"`` is Dr. GRPO (arXiv:2503.20783), ``baseline="leave-one-out"`` RLOO
    (arXiv:2402.14740), ``"length-weighted"`` OPO (arXiv:2505.23585), the rewards of greedy answers ReMax (arXiv:2310.10505). Deviations are taken in
    float64, and are exactly 0 in a group of equal rewards.
    A NaN reward is one that could not be scored: it is left out of mean and std, and its advantage is 0. The result is data: no gradient flows.

    Args:
        rewards: ``[N]``, any floating dtype.
        group_size: the group is each run of so many neighbours; divides N. Either this or ``group_ids``.
        group_ids: ``[N]``, int32 or int64, any numbers in any order: equal ids are a group, of any size.
        baseline: "mean" of the group, "leave-one-out" (the mean of the others), or "length-weighted", sum l r / sum l (the mean where sum l = 0).
            Or what it is: ``[N]``, the reward of the greedy answer to the same prompt for one; then there are no groups.
        scale: divide by the std of the "group" or of all rewards of the "batch" (both with Bessel's correction, plus ``eps``), or by "none".
        eps: a number of at least 0.
        lengths: ``[N]``, number of tokens of each sample; read for "length-weighted" alone.
        singleton: the advantage in a group with one scorable reward: "zero", or the "raw" reward.
        process_group: a ``torch.distributed`` group, each of whose ranks has some of the rewards: groups of equal ids, and the std of the batch, are
            over all of them. Ranks may have different numbers (exchanged first: one synchronisation on a GPU).
        validate: warn (UserWarning) of the number of NaN rewards, which is one synchronisation on a GPU. Default: on the CPU, or with
            RLKERN_VALIDATE=1.

    Returns:
        ``[N]``, float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: for arguments of another type, dtype, shape, device or range.
    """
    check_tensor("rewards", rewards, dtypes=FLOATS)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [N], got {tuple(rewards.shape)}")
    if isinstance(baseline, Tensor):
        check_tensor("baseline", baseline, shape=rewards.shape, dtypes=FLOATS, device=rewards.device)
        if scale == "group" or group_size is not None or group_ids is not None:
            raise ValueError("a baseline that is given needs no groups: pass scale='none' or 'batch', and neither group_size nor group_ids")
    else:
        check_choice("baseline", baseline, ("mean", "leave-one-out", "length-weighted"))
        _check_groups(len(rewards), rewards.device, group_size, group_ids)
    check_choice("scale", scale, ("group", "batch", "none"))
    check_choice("singleton", singleton, ("zero", "raw"))
    if baseline == "length-weighted" and lengths is None:
        raise ValueError("lengths must be given for baseline='length-weighted'")
    if lengths is not None:
        check_tensor("lengths", lengths, shape=rewards.shape, dtypes=(*INTS, *FLOATS), device=rewards.device)
        lengths = lengths.detach()
    eps = check_number("eps", eps, at_least=0)
    given, name = (baseline.detach(), "given") if isinstance(baseline, Tensor) else (None, baseline)
    tensors, mine = [rewards.detach(), group_ids, lengths, given], slice(None)
    if process_group is not None:
        check_group(process_group)
        sizes = gathered(torch.tensor([len(rewards)], device=rewards.device), process_group).flatten().tolist()
        before = sum(sizes[: dist.get_rank(process_group)])
        mine = slice(before, before + len(rewards))
        tensors = [None if x is None else concatenated(x, sizes, process_group) for x in tensors]
    return groups.group_advantages(*tensors, group_size or 1, name, scale, eps, singleton, choose_validate(validate, rewards))[mine]


def _check_groups(answers: int, device: torch.device, group_size: int | None, group_ids: Tensor | None) -> None:
    if (group_size is None) == (group_ids is None):
        raise ValueError(f"exactly one of group_size and group_ids must be given, got {'neither' if group_size is None else 'both'}")
    if group_ids is not None:
        check_tensor("group_ids", group_ids, shape=(answers,), dtypes=INTS, device=device)
    if group_size is not None:
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise TypeError(f"group_size must be an int, got {type(group_size).__name__}")
        if group_size < 1 or answers % group_size:
            raise ValueError(f"group_size must divide the number of rewards, {answers}; got {group_size}")


def process_advantages(
    step_rewards: Tensor,
    step_ends: Tensor,
    length: int,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    eps: float = 1e-4,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advantages of process supervision (Shao et al. 2024, arXiv:2402.03300, section 4.1.3), where each step of an answer has a reward::

        A_t = sum of (r - mean) / (std + eps) over the steps that end at or after t

    with mean and std (Bessel) of all steps of all answers of the group. The result is data: no gradient flows.

    Args:
        step_rewards: ``[N, steps]``, any floating dtype. NaN: could not be scored, left out of mean and std, and adds 0.
        step_ends: ``[N, steps]``, int32 or int64: the position of the step's last token, in [0, length); -1 where there is no step.
        length: tokens of an answer, the padding included.
        group_size, group_ids: which of the ``[N]`` answers are a group, as in :func:`group_advantages`.
        eps: a number of at least 0.
        validate: check ``step_ends``, and warn of the number of NaN rewards (one synchronisation each on a GPU). Default: on the CPU, or with
            RLKERN_VALIDATE=1.
        backend: "triton" or "torch"; default: by device, or RLKERN_BACKEND.

    Returns:
        ``[N, length]``, float32 (float64 for float64 rewards); 0 after the last step.

    Raises:
        TypeError, ValueError: for arguments of another type, dtype, shape, device or range.
    """
    check_tensor("step_rewards", step_rewards, dtypes=FLOATS)
    if step_rewards.dim() != 2:
        raise ValueError(f"step_rewards must have shape [N, steps], got {tuple(step_rewards.shape)}")
    check_tensor("step_ends", step_ends, shape=step_rewards.shape, dtypes=INTS, device=step_rewards.device)
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise ValueError(f"length must be an int of at least 0, got {length!r}")
    answers, steps = step_rewards.shape
    _check_groups(answers, step_rewards.device, group_size, group_ids)
    there = step_ends >= 0
    if choose_validate(validate, step_rewards):
        if bool(((step_ends < -1) | (step_ends >= length)).any()):
            wrong = step_ends[(step_ends < -1) | (step_ends >= length)][0]
            raise ValueError(f"step_ends must be in [0, {length}), or -1 for no step; got {int(wrong)}")
        groups.warn_of_nan(step_rewards.masked_fill(~there, 0))
    if group_ids is None:
        group_ids = torch.arange(answers, device=step_rewards.device) // (group_size or 1)
    rewards = step_rewards.detach().masked_fill(~there, torch.nan).flatten()  # no step: not scorable
    ids = group_ids.repeat_interleave(steps, output_size=rewards.numel())
    normalised = groups.group_advantages(rewards, ids, None, None, 0, "mean", "group", check_number("eps", eps, at_least=0), "zero", False)
    at_ends = normalised.new_zeros(answers, length + 1)
    at_ends = at_ends.index_put_(
        (torch.arange(answers, device=rewards.device)[:, None], torch.where(there, step_ends, length).long()),
        normalised.view(answers, steps),
        accumulate=True,
    )
    return discounted_returns(at_ends[:, :length], gamma=1.0, backend=backend)


def shaped_rewards(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    mask: Tensor,
    kl_coef: float | Tensor,
    kl_estimator: str = "k1",
    cu_seqlens: Tensor | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Rewards per token: minus the KL to the reference, and the score of the whole on the last valid token (Ouyang et al. 2022, arXiv:2203.02155)::

        r_t = -kl_coef KL_t + 1[t is the last valid token] R

    Args:
        rewards: R, one a sequence: ``S[:-1]``, or ``[sequences]`` with ``cu_seqlens``. That of a sequence without valid tokens goes nowhere.
        logprobs, ref_logprobs: of the tokens under policy and reference (nats), shape S: ``[..., time]``, or ``[tokens]``.
        mask: shape S, any dtype; non-zero counts. Elsewhere log-probs are not read, and the result is 0.
        kl_coef: a number of at least 0, or a 0-dim tensor.
        kl_estimator: see :func:`kl_penalty`.
        cu_seqlens: ``[sequences + 1]``, int32 or int64: the packed sequences of ``[tokens]``.
        validate: also check the values of ``cu_seqlens`` (synchronises a GPU); by default on the CPU.

    Returns:
        Shape S, float32 (float64 for float64 log-probs); data, no gradient flows.

    Raises:
        TypeError, ValueError: for arguments of another type, dtype, shape, device or range.
    """
    check_tensor("logprobs", logprobs, dtypes=FLOATS, min_dim=1 if cu_seqlens is not None else 2)
    check_tensor("mask", mask, shape=logprobs.shape, device=logprobs.device)
    sequences: Sequence[int] = logprobs.shape[:-1]
    if cu_seqlens is not None:
        if logprobs.dim() != 1:
            raise ValueError(f"cu_seqlens goes with packed tensors of shape [tokens], got {tuple(logprobs.shape)}")
        check_cu_seqlens(cu_seqlens, logprobs.numel(), like=logprobs, validate=choose_validate(validate, logprobs))
        sequences = (cu_seqlens.numel() - 1,)
    check_tensor("rewards", rewards, shape=sequences, dtypes=FLOATS, device=logprobs.device)
    if isinstance(kl_coef, Tensor):
        check_tensor("kl_coef", kl_coef, shape=(), dtypes=FLOATS, device=logprobs.device)
    else:
        check_number("kl_coef", kl_coef, at_least=0)
    kl = kl_penalty(logprobs.detach(), ref_logprobs, kl_estimator, mask=mask)
    place = torch.arange(logprobs.shape[-1], device=logprobs.device)
    valid_place = torch.where(mask != 0, place, -1)
    if cu_seqlens is None:
        last = valid_place.amax(-1, keepdim=True) if len(place) else valid_place
        score = rewards.unsqueeze(-1)
    else:
        sequence = sequence_of_token(len(place), cu_seqlens)  # tokens beyond the last sequence: of one more
        last = place.new_full((len(cu_seqlens),), -1).scatter_reduce_(0, sequence, valid_place, "amax")[sequence]
        score = to_tokens(rewards, logprobs, cu_seqlens)
    return torch.where((mask != 0) & (place == last), score.detach().to(kl.dtype), 0.0) - kl_coef * kl


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
        mask: of the shape of ``x``, any dtype, non-zero where a position counts. Elsewhere ``x`` is not read and the result is 0.
        eps: a number of at least 0.
        unbiased: divide the sum of squares by n - 1 (Bessel) rather than n. A single position has variance 0.
        shift_mean: False adds the mean again after scaling: ``(x - mean) / sqrt(var + eps) + mean``.
        eps_outside: ``(x - mean) / (std + eps)``.
        process_group: a ``torch.distributed`` group, such as ``torch.distributed.group.WORLD``, to take mean and variance over the positions of all
            its ranks, which must all call: two all-reduces, of two numbers and of one. None: this process alone.

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
