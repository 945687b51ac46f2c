"""Advantages from rewards compared within a group, or from rewards of steps; rewards with a KL penalty. All are data: no gradient flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._backend import choose_validate
from ._checks import FLOATS, INTS, check_choice, check_cu_seqlens, check_number, check_tensor
from .distributed import check_group
from .losses import kl_penalty
from .ops import groups
from .ops.sequences import sequence_of_token, to_tokens
from .ops.shards import concatenated, gathered
from .returns import discounted_returns


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
    """Rewards compared within a group, the samples of one prompt: ``(reward - baseline) / (std + eps)``.

    The defaults are GRPO (Shao et al. 2024, arXiv:2402.03300); ``scale="none"`` is Dr. GRPO (arXiv:2503.20783), ``baseline="leave-one-out"`` RLOO
    (arXiv:2402.14740), ``"length-weighted"`` OPO (arXiv:2505.23585), a tensor with the rewards of greedy answers ReMax (arXiv:2310.10505). Deviations
    are taken in float64, and are exactly 0 in a group of equal rewards. A NaN reward means that the sample could not be scored: it is left out of
    mean and std, and its advantage is 0. The result is data: no gradient flows.

    Args:
        rewards: ``[N]``, any floating dtype.
        group_size: number of neighbours that form a group; must divide N. Pass either this or ``group_ids``.
        group_ids: ``[N]``, int32 or int64, any numbers in any order: equal ids are a group, of any size.
        baseline: "mean" of the group, "leave-one-out" (the mean of the others), or "length-weighted", sum l r / sum l (the mean where sum l = 0). Or
            a tensor ``[N]`` with the baseline of each sample, such as the reward of the greedy answer to the same prompt; then there are no groups.
        scale: divide by the std of the "group" or of all rewards of the "batch" (both with Bessel's correction, plus ``eps``), or do not divide:
            "none".
        eps: a number of at least 0.
        lengths: ``[N]``, number of tokens of each sample; read for "length-weighted" alone.
        singleton: the advantage in a group with one scorable reward: "zero", or the "raw" reward.
        process_group: a ``torch.distributed`` group whose ranks have some of the rewards each; groups of equal ids, and the std of the batch, are
            then over all ranks. Ranks may hold different numbers of rewards, which are exchanged first (one synchronisation on a GPU).
        validate: warn (UserWarning) of the number of NaN rewards, which takes one synchronisation on a GPU. Default: on the CPU, or with
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
    """Advantages of process supervision, with a reward for each step of an answer (Shao et al. 2024, arXiv:2402.03300, section 4.1.3)::

        A_t = sum of (r - mean) / (std + eps) over the steps that end at or after t

    with mean and std (Bessel) of all steps of all answers of the group. The result is data: no gradient flows.

    Args:
        step_rewards: ``[N, steps]``, any floating dtype. NaN: the step could not be scored; it is left out of mean and std, and adds 0.
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
    """Rewards per token: a KL penalty on each, and the score of the answer on its last valid token (Ouyang et al. 2022, arXiv:2203.02155)::

        r_t = -kl_coef KL_t + 1[t is the last valid token] R

    Args:
        rewards: R, one for each sequence: ``S[:-1]``, or ``[sequences]`` with ``cu_seqlens``. The reward of a sequence without valid tokens is
            dropped.
        logprobs, ref_logprobs: log-probs of the tokens under policy and reference (nats), shape S: ``[..., time]``, or ``[tokens]``.
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
