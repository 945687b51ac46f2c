"""Baselines over groups and whitening, against the reference and by hand."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import rlkern as rk
from rlkern import reference
from rlkern.ops import groups as ops

from .judge import assert_accurate, error, opcheck

nan = math.nan

# ---- groups ---------------------------------------------------------------------------------------------------------------------------------


def test_the_group_of_the_tutorial(device):
    """What is 2 + 3?  "5" scores 1, "6" scores 0, "2 + 3 = 5" scores 2; the mean is 1."""
    rewards = torch.tensor([1.0, 0.0, 2.0], device=device)
    assert rk.group_advantages(rewards, group_size=3, scale="none").tolist() == [0.0, -1.0, 1.0]
    scaled = rk.group_advantages(rewards, group_size=3)
    assert scaled.sign().tolist() == [0.0, -1.0, 1.0]
    assert_accurate(scaled, torch.tensor([0.0, -1.0, 1.0]) / (1 + 1e-4), eps=1e-7)  # Bessel: the std is 1


def test_baselines_by_hand(device):
    rewards = torch.tensor([3.0, 0.0, 0.0, 1.0], device=device)
    options = {"group_size": 4, "scale": "none"}
    assert rk.group_advantages(rewards, **options).tolist() == [2.0, -1.0, -1.0, 0.0]
    others = torch.tensor([1 / 3, 4 / 3, 4 / 3, 1.0])  # mean of the three other rewards
    assert_accurate(rk.group_advantages(rewards, baseline="leave-one-out", **options), rewards.cpu() - others, eps=1e-7)
    lengths = torch.tensor([2, 1, 4, 1], device=device)
    weighted = rk.group_advantages(rewards, baseline="length-weighted", lengths=lengths, **options)
    assert_accurate(weighted, rewards.cpu() - 7 / 8, eps=1e-7)
    no_lengths = rk.group_advantages(rewards, baseline="length-weighted", lengths=0 * lengths, **options)
    assert no_lengths.tolist() == [2.0, -1.0, -1.0, 0.0]


def test_a_given_baseline(device):
    """ReMax: the reward less that of the greedy answer, for groups of one too; NaN is left out; the std is that of the raw rewards."""
    rewards = torch.tensor([1.0, 0.0, 2.0, nan], device=device)
    greedy = torch.tensor([1.0, 1.0, 0.5, 0.0], device=device)
    assert rk.group_advantages(rewards, baseline=greedy, scale="none", validate=False).tolist() == [0.0, -1.0, 1.5, 0.0]
    by_batch = rk.group_advantages(rewards, baseline=greedy, scale="batch", validate=False)
    assert_accurate(by_batch, torch.tensor([0.0, -1.0, 1.5, 0.0]) / (1 + 1e-4), eps=1e-7)
    for wrong in ({"scale": "group"}, {"scale": "none", "group_size": 2}):
        with pytest.raises(ValueError, match="needs no groups"):
            rk.group_advantages(rewards, baseline=greedy, **wrong)


def test_reinforce_plus_plus(device):
    """Per-token KL and the score on the last token, summed from the end, whitened over the batch: against its formula, written out."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], device=device)
    lp, ref = torch.randn(2, 3, 4, dtype=torch.float64, device=device).masked_fill(mask == 0, nan)
    scores = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64, device=device)
    shaped = rk.shaped_rewards(scores, lp, ref, mask=mask, kl_coef=0.1)
    mine = rk.whiten(rk.discounted_returns(shaped, gamma=1.0, mask=mask), mask)
    raw = {}
    for b, length in enumerate((3, 4, 1)):
        for t in range(length):
            raw[b, t] = float(scores[b]) - 0.1 * sum(float(lp[b, u] - ref[b, u]) for u in range(t, length))
    values = torch.tensor(list(raw.values()), dtype=torch.float64)
    exact = (values - values.mean()) / (values.var() + 1e-8).sqrt()
    assert_accurate(torch.stack([mine[at] for at in raw]), exact, eps=1e-10)


GROUPS: dict[str, dict[str, Any]] = {
    "size": {"group_size": 4},
    "size 1": {"group_size": 1},
    "all": {"group_size": 12},
    "ids": {"group_ids": torch.tensor([7, -3, 7, 7, 2**31 - 1, -3, 7, 0, 0, 5, 0, -3], dtype=torch.int32)},
    "big ids": {"group_ids": torch.tensor([0, 2**62, 0, 2**62, 2**62, 1, 1, 1, -(2**62), 0, 0, 1])},
}


@pytest.mark.filterwarnings("ignore:.*are NaN")
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out", "length-weighted"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("missing", [(), (1,), (0, 1, 3, 9)], ids=str)
def test_group_advantages(groups, baseline, scale, missing, device):
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rewards = torch.randn(12).to(dtype)
        rewards[list(missing)] = nan
        lengths = torch.randint(0, 9, (12,)) if baseline == "length-weighted" else None
        for singleton in ("zero", "raw"):
            options = {"baseline": baseline, "scale": scale, "lengths": lengths, "singleton": singleton, **GROUPS[groups]}
            exact = reference.group_advantages(rewards.double(), **options)
            ours = rk.group_advantages(rewards.to(device), **{k: x.to(device) if isinstance(x, Tensor) else x for k, x in options.items()})
            assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_accurate(ours, exact, eps=1e-13 if dtype == torch.float64 else 1e-6)


def test_equal_rewards_have_advantage_zero(device):
    """Exactly, so that work on them can be left out; also where their mean rounds."""
    rewards = torch.tensor([0.1] * 7 + [-12345.67] * 7, device=device)
    for baseline in ("mean", "leave-one-out", "length-weighted"):
        advantages = rk.group_advantages(rewards, group_size=7, baseline=baseline, lengths=torch.arange(14, device=device), eps=1e-12)
        assert not advantages.any()


def test_order_of_samples_does_not_matter(device):
    rewards, ids = torch.randn(50, device=device), torch.randint(8, (50,), device=device)
    order = torch.randperm(50, device=device)
    straight, shuffled = (rk.group_advantages(rewards[i], group_ids=ids[i], scale="none") for i in (torch.arange(50, device=device), order))
    assert error(straight[order], shuffled) < 1e-6
    assert error(straight, rk.group_advantages(rewards, group_ids=1000 - 3 * ids, scale="none")) == 0


def test_missing_rewards_are_counted(device):
    rewards = torch.tensor([1.0, nan, 3.0, nan, nan, nan], device=device)
    with pytest.warns(UserWarning, match="4 of 6 rewards are NaN"):
        advantages = rk.group_advantages(rewards, group_size=3, scale="none", validate=True)
    assert advantages.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rk.group_advantages(rewards, group_size=3, validate=False)
        rk.group_advantages(torch.zeros(6, device=device), group_size=3, validate=True)


def test_singletons(device):
    rewards, ids = torch.tensor([1.5, 2.0, 4.0], device=device), torch.tensor([5, 1, 1], device=device)
    assert rk.group_advantages(rewards, group_ids=ids, scale="none").tolist() == [0.0, -1.0, 1.0]
    assert rk.group_advantages(rewards, group_ids=ids, scale="none", singleton="raw").tolist() == [1.5, -1.0, 1.0]


def test_no_rewards(device):
    none = torch.empty(0, device=device)
    assert rk.group_advantages(none, group_size=4).shape == (0,)
    assert rk.group_advantages(none, group_ids=none.long(), scale="batch").shape == (0,)


BAD_GROUPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rewards": ({"rewards": [1.0]}, TypeError, "rewards must be a torch.Tensor, got list"),
    "integers": ({"rewards": torch.ones(6, dtype=torch.int64)}, TypeError, "rewards must have a dtype"),
    "matrix": ({"rewards": torch.ones(2, 3)}, ValueError, r"rewards must have shape \[N\], got \(2, 3\)"),
    "neither": ({"group_size": None}, ValueError, "exactly one of group_size and group_ids must be given, got neither"),
    "both": ({"group_ids": torch.ones(6).long()}, ValueError, "exactly one of group_size and group_ids must be given, got both"),
    "uneven": ({"group_size": 4}, ValueError, "group_size must divide the number of rewards, 6; got 4"),
    "size": ({"group_size": 0}, ValueError, "group_size must divide the number of rewards, 6; got 0"),
    "size type": ({"group_size": 3.0}, TypeError, "group_size must be an int, got float"),
    "ids": ({"group_size": None, "group_ids": torch.ones(6)}, TypeError, "group_ids must have a dtype of torch.int32, torch.int64"),
    "baseline": ({"baseline": "median"}, ValueError, "baseline must be one of 'mean', 'leave-one-out', 'length-weighted'; got 'median'"),
    "scale": ({"scale": None}, ValueError, "scale must be one of"),
    "singleton": ({"singleton": 0}, ValueError, "singleton must be one of"),
    "lengths": ({"baseline": "length-weighted"}, ValueError, "lengths must be given for baseline='length-weighted'"),
    "length": ({"lengths": torch.ones(5)}, ValueError, r"lengths must have shape \(6,\), got \(5,\)"),
    "eps": ({"eps": -1}, ValueError, "eps must be a number >= 0, got -1"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_errors_of_groups(case):
    changes, kind, message = BAD_GROUPS[case]
    with pytest.raises(kind, match=message):
        rk.group_advantages(**{"rewards": torch.ones(6), "group_size": 3} | changes)


# ---- whitening ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("eps_outside", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_whiten(unbiased, shift_mean, eps_outside, masked, device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = (torch.randn(4, 9) * 3 + 5).to(dtype)
        mask = torch.rand(4, 9) > 0.3 if masked else None
        options = {"unbiased": unbiased, "shift_mean": shift_mean, "eps_outside": eps_outside, "eps": 1e-3}
        exact = reference.whiten(x.double(), mask, **options)
        if mask is not None:
            x = x.masked_fill(~mask, nan)
        ours = rk.whiten(x.to(device), None if mask is None else mask.to(device), **options)
        assert_accurate(ours, exact, eps=1e-13 if dtype == torch.float64 else 1e-6)


def test_whiten_far_from_zero(device):
    x = (1e4 + torch.randn(1000)).to(device)
    white = rk.whiten(x).double()
    assert abs(float(white.mean())) < 1e-7
    assert abs(float(white.var()) - 1) < 1e-6


def test_whiten_nothing_and_next_to_nothing(device):
    x, none = torch.tensor([3.0, 4.0], device=device), torch.zeros(2, device=device)
    assert rk.whiten(x, none).tolist() == [0.0, 0.0]
    assert rk.whiten(x, torch.tensor([1, 0], device=device)).tolist() == [0.0, 0.0]
    assert rk.whiten(x, torch.tensor([1, 0], device=device), shift_mean=False).tolist() == [3.0, 0.0]
    assert rk.whiten(torch.full((3,), 0.1, device=device)).abs().max() < 1e-7
    assert rk.whiten(torch.empty(0, 4, device=device)).shape == (0, 4)


def _whiten_on_a_rank(rank: int, x: Tensor, mask: Tensor, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    white = rk.whiten(x[rank], mask[rank], process_group=dist.group.WORLD)
    advantages, _ = rk.gae(x[rank], 0 * x[rank], gamma=0.0, lam=0.0, mask=mask[rank], whitened=True, process_group=dist.group.WORLD)  # A = r
    torch.save((white, advantages), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_whiten_over_a_process_group(tmp_path):
    x, mask = torch.randn(2, 3, 5) + torch.tensor([0.0, 100.0])[:, None, None], torch.rand(2, 3, 5) > 0.3
    torch.multiprocessing.spawn(_whiten_on_a_rank, (x, mask, str(tmp_path)), nprocs=2)
    ours, advantages = (torch.stack(parts) for parts in zip(*(torch.load(tmp_path / str(rank)) for rank in range(2)), strict=True))
    assert_accurate(ours, reference.whiten(x.double(), mask), eps=1e-6)
    assert torch.equal(ours, rk.whiten(x, mask))
    assert_accurate(advantages, ours, eps=1e-6)
    with pytest.raises(ValueError, match="process_group is for whitened=True"):
        rk.gae(x[0], x[0], gamma=1.0, lam=1.0, process_group=object())


def test_errors_of_whitening(device):
    x = torch.ones(2, 3, device=device)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\), got \(3,\)"):
        rk.whiten(x, x[0])
    with pytest.raises(TypeError, match="x must have a dtype"):
        rk.whiten(x.long())
    with pytest.raises(ValueError, match="eps must be a number >= 0, got -1"):
        rk.whiten(x, eps=-1.0)


# ---- promises -------------------------------------------------------------------------------------------------------------------------------


def test_results_are_data(device):
    x = torch.randn(6, device=device, requires_grad=True)
    assert not rk.group_advantages(x, group_size=3).requires_grad
    assert not rk.whiten(x).requires_grad


def test_opcheck(device):
    rewards, ids = torch.randn(6, device=device), torch.tensor([3, 3, 1, 1, 1, 3], device=device)
    for scale in ("group", "batch"):
        opcheck(ops.group_advantages, rewards, ids, None, None, 1, "mean", scale, 1e-4, "zero", True)
    opcheck(ops.group_advantages, rewards, None, ids, None, 3, "length-weighted", "none", 1e-4, "raw", False)
    opcheck(ops.group_advantages, rewards, None, None, rewards.clone(), 1, "given", "batch", 1e-4, "zero", False)


def test_compile(device):
    def together(rewards: Tensor, ids: Tensor, x: Tensor, mask: Tensor) -> list[Tensor]:
        return [rk.group_advantages(rewards, group_ids=ids), rk.group_advantages(rewards, group_size=2, scale="batch"), rk.whiten(x, mask)]

    inputs = (torch.randn(6, device=device), torch.tensor([3, 3, 1, 1, 1, 3], device=device), torch.randn(2, 5, device=device))
    mask = torch.rand(2, 5, device=device) > 0.3
    compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*inputs, mask), together(*inputs, mask), strict=True):
        assert torch.equal(a, b)


# ---- what only the reference has so far -----------------------------------------------------------------------------------------------------


def test_process_supervision_by_hand():
    """Two completions of one group, step rewards 1, 0 and 2: mean 1, std 1. Steps end at 1 and 3 in the first, at 2 in the second."""
    rewards, ends = torch.tensor([[1.0, 0.0], [2.0, nan]], dtype=torch.float64), torch.tensor([[1, 3], [2, -1]])
    advantages = reference.process_advantages(rewards, ends, 5, group_size=2, eps=0.0)
    assert_accurate(advantages, torch.tensor([[-1.0, -1.0, -1.0, -1.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0]]), eps=1e-12)


def test_shaped_rewards_by_hand():
    """-0.1 (lp - ref) on valid tokens, and the score on the last of them."""
    lp, ref = torch.tensor([[-1.0, -2.0, nan], [nan, -1.0, -3.0]]).double(), torch.tensor([[-2.0, -1.0, nan], [nan, -1.0, -1.0]]).double()
    shaped = reference.shaped_rewards(torch.tensor([5.0, 7.0]), lp, ref, mask=torch.tensor([[1, 1, 0], [0, 1, 1]]), kl_coef=0.1)
    assert_accurate(shaped, torch.tensor([[-0.1, 5.1, 0.0], [0.0, 0.0, 7.2]], dtype=torch.float64), eps=1e-12)


# ---- rewards of steps and of tokens ---------------------------------------------------------------------------------------------------------


def _steps(device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Six answers of up to four steps in ten tokens; one without any, two steps that end together."""
    rewards = torch.randn(6, 4, dtype=torch.float64, device=device).to(dtype)
    ends = torch.tensor([[1, 4, 6, 9], [2, 2, -1, -1], [-1, -1, -1, -1], [0, 9, -1, -1], [5, -1, -1, -1], [3, 1, 8, -1]], device=device)
    return rewards.masked_fill(ends < 0, nan), ends


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
def test_process_advantages(group_size, dtype, backend, device):
    rewards, ends = _steps(device, dtype)
    exact = reference.process_advantages(rewards.double(), ends, 10, group_size=group_size)
    mine = rk.process_advantages(rewards, ends, 10, group_size=group_size, backend=backend)
    assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_accurate(mine, exact, eps=1e-12 if dtype == torch.float64 else 1e-5)
    ids = torch.arange(6, device=device) // group_size * 7 - 3
    assert torch.equal(rk.process_advantages(rewards, ends.int(), 10, group_ids=ids, backend=backend), mine)


def test_process_advantages_by_hand(device):
    """Two answers with step rewards 1, 0 and 1: mean 2/3; each token has the sum of its own step and of those that follow."""
    rewards = torch.tensor([[1.0, 0.0], [1.0, nan]], dtype=torch.float64, device=device)
    ends = torch.tensor([[1, 2], [0, -1]], device=device)
    std = math.sqrt(1 / 3)
    up, down = 1 / 3 / std, -2 / 3 / std
    mine = rk.process_advantages(rewards, ends, 4, group_size=2, eps=0.0)
    assert_accurate(mine, torch.tensor([[up + down, up + down, down, 0.0], [up, 0.0, 0.0, 0.0]]), eps=1e-7)


def test_process_rewards_that_could_not_be_scored(device):
    rewards, ends = _steps(device)
    rewards[0, 1] = nan
    with pytest.warns(UserWarning, match="1 of 24 rewards are NaN"):
        mine = rk.process_advantages(rewards, ends, 10, group_size=3, validate=True)
    without = torch.where(rewards.isnan(), -1, ends)
    assert_accurate(mine, reference.process_advantages(rewards.nan_to_num(), without, 10, group_size=3), eps=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_shaped_rewards(estimator, device):
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]], device=device)
    lp, ref = torch.randn(2, 3, 5, device=device).masked_fill(mask == 0, nan)
    rewards = torch.tensor([1.0, 5.0, -2.0], device=device)
    options = {"kl_coef": 0.2, "kl_estimator": estimator}
    mine = rk.shaped_rewards(rewards, lp, ref, mask=mask, **options)
    assert_accurate(mine, reference.shaped_rewards(rewards.double(), lp.double(), ref.double(), mask=mask, **options), eps=1e-6)
    assert float(mine[2, 3]) == pytest.approx(-2.0 - 0.2 * float(rk.kl_penalty(lp[2, 3], ref[2, 3], estimator)), abs=1e-6)
    assert torch.equal(rk.shaped_rewards(rewards, lp, ref, mask=mask, kl_coef=torch.tensor(0.2, device=device), kl_estimator=estimator), mine)
    keep = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13, 14], device=device)
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
    flat = [t.flatten()[keep] for t in (lp, ref, mask, mine)]
    assert torch.equal(rk.shaped_rewards(rewards, *flat[:2], mask=flat[2], cu_seqlens=cu, **options), flat[3])
    assert torch.equal(reference.shaped_rewards(rewards, *flat[:2], mask=flat[2], cu_seqlens=cu, **options), flat[3])
    assert not rk.shaped_rewards(rewards, lp.requires_grad_(), ref, mask=mask, **options).requires_grad


@pytest.mark.parametrize(
    ("call", "error_type", "message"),
    [
        (lambda x, e: rk.process_advantages(x[0], e, 10, group_size=2), ValueError, r"step_rewards must have shape \[N, steps\]"),
        (lambda x, e: rk.process_advantages(x, e[:, :2], 10, group_size=2), ValueError, "step_ends must have shape"),
        (lambda x, e: rk.process_advantages(x, e.float(), 10, group_size=2), TypeError, "step_ends must have a dtype"),
        (lambda x, e: rk.process_advantages(x, e, 9, group_size=2), ValueError, r"step_ends must be in \[0, 9\), or -1 for no step; got 9"),
        (lambda x, e: rk.process_advantages(x, e, 10), ValueError, "exactly one of group_size and group_ids"),
        (lambda x, e: rk.process_advantages(x, e, 10, group_size=4), ValueError, "group_size must divide"),
        (lambda x, e: rk.process_advantages(x, e, 1.5, group_size=2), ValueError, "length must be an int"),
        (lambda x, e: rk.shaped_rewards(x[:, 0], x, x[:, 1:], mask=x, kl_coef=0.1), ValueError, "ref_logprobs must have shape"),
        (lambda x, e: rk.shaped_rewards(x[:2, 0], x, x, mask=x, kl_coef=0.1), ValueError, r"rewards must have shape \(6,\)"),
        (lambda x, e: rk.shaped_rewards(x[:, 0], x, x, mask=x, kl_coef=-1), ValueError, "kl_coef must be a number >= 0"),
        (lambda x, e: rk.shaped_rewards(x[:, 0], x, x, mask=x, kl_coef=1, kl_estimator="k9"), ValueError, "estimator must be one of"),
        (lambda x, e: rk.shaped_rewards(x[0], x[0], x[0], mask=x[0], kl_coef=1), ValueError, "at least 2 dimension"),
        (lambda x, e: rk.shaped_rewards(x[0], x, x, mask=x, kl_coef=1, cu_seqlens=torch.tensor([0, 6])), ValueError, "cu_seqlens goes with packed"),
    ],
)
def test_errors_of_steps_and_tokens(call, error_type, message):
    with pytest.raises(error_type, match=message):
        call(*_steps(torch.device("cpu"), torch.float32))
