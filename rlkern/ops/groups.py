"""Advantages within groups of samples: one path for all devices, since a batch has a few thousand rewards at most."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .._checks import state_dtype
from .operators import fake_of, operator


@operator("group_advantages")
def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | None,
    lengths: Tensor | None,
    given: Tensor | None,
    group_size: int,
    baseline: str,
    scale: str,
    eps: float,
    singleton: str,
    validate: bool,
) -> Tensor:
    """``[N]`` advantages in groups of ``group_size`` neighbours, or of equal ids; or to the ``given`` baseline. ``validate``: warn of NaN rewards,
    which synchronises."""
    if validate:
        warn_of_nan(rewards)
    n = len(rewards)
    if group_ids is None:
        group, groups = torch.arange(n, device=rewards.device) // group_size, n // group_size
    else:
        group, groups = _ranks(group_ids), n
    scorable = ~rewards.isnan()
    r = rewards.double()

    def total(x: Tensor) -> Tensor:
        # Not index_add_, whose order varies on a GPU: this one sorts there, and for float64 goes one by one on a CPU.
        sums = torch.zeros(groups, dtype=torch.float64, device=x.device).index_put_((group,), x.masked_fill(~scorable, 0), accumulate=True)
        return sums[group]

    count = total(torch.ones_like(r))
    # Measured from the lowest reward of the group, so that equal rewards have a deviation of exactly 0.
    lowest = torch.full((groups,), torch.inf, dtype=r.dtype, device=r.device).scatter_reduce_(0, group, r.masked_fill(~scorable, torch.inf), "amin")
    d = (r - lowest[group]).masked_fill(~scorable, 0)
    deviation = d - total(d) / count
    if given is not None:
        advantages = r - given.double()
    elif baseline == "mean":
        advantages = deviation
    elif baseline == "leave-one-out":
        advantages = deviation * count / (count - 1)
    else:
        assert lengths is not None
        weight = total(lengths.double())
        advantages = torch.where(weight > 0, d - total(lengths * d) / weight, deviation)
    if scale == "group":
        advantages = advantages / ((total(deviation.square()) / (count - 1)).sqrt() + eps)
    elif scale == "batch":
        everywhere = scorable.sum()
        spread = (r - r.masked_fill(~scorable, 0).sum() / everywhere).masked_fill(~scorable, 0)
        advantages = advantages / ((spread.square().sum() / (everywhere - 1)).sqrt() + eps)
    if given is None:
        advantages = torch.where(count > 1, advantages, r if singleton == "raw" else torch.zeros_like(r))
    return advantages.masked_fill(~scorable, 0).to(state_dtype(rewards.dtype))


@fake_of(group_advantages)
def _(rewards: Tensor, *args: object) -> Tensor:
    return torch.empty(rewards.shape, dtype=state_dtype(rewards.dtype), device=rewards.device)


def warn_of_nan(rewards: Tensor) -> None:
    """Say how many rewards could not be scored."""
    if missing := int(rewards.isnan().sum()):
        warnings.warn(f"{missing} of {rewards.numel()} rewards are NaN: left out of their groups, with advantage 0", stacklevel=3)


def _ranks(ids: Tensor) -> Tensor:
    """The ids as consecutive numbers from 0, in their order, without a synchronisation."""
    ordered, order = torch.sort(ids, stable=True)
    rank = torch.cat([torch.zeros_like(order[:1]), (ordered[1:] != ordered[:-1]).cumsum(0)])
    return torch.empty_like(order).scatter_(0, order, rank)
