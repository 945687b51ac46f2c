"""policy_loss on tokens, both backends against the float64 reference: values, gradients and metrics, over what a configuration and a batch can be."""

import dataclasses
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import rlkern as rk
from bench.traffic import traffic
from rlkern import config as config_module
from rlkern import reference
from rlkern.ops.policy import Tokens, Wanted, policy_loss_op
from rlkern.ops.triton_backend import layout as tokens

from .judge import assert_accurate, error, opcheck
from .presets import surrogates

Config = rk.PolicyLossConfig
INTERPRETED = not torch.cuda.is_available()


class Batch(NamedTuple):
    """Per-token tensors in float64 that hold NaN wherever the mask is 0; 12 of 20 positions count, one sequence has none."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    importance_weights: Tensor
    sampling_logprobs: Tensor
    entropy_mask: Tensor
    cu_seqlens: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Batch":
        return Batch(*(x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float64 else x for x in self))

    def kwargs(self, *, without: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
        return {k: v for k, v in {**self._asdict(), **changes}.items() if k not in without}


def make_batch(device: torch.device, *, spread: float = 0.4) -> Batch:
    g = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(4, 5, generator=g, dtype=torch.float64)

    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    old = -normal().abs() - 0.02
    logprobs = (old + spread * normal()).clamp(max=-1e-3)
    values = [logprobs, old, normal(), logprobs + spread * normal(), normal().abs(), normal().abs() + 0.2, old + spread * normal()]
    values[2][0] = values[2][0].abs()  # a sequence of one sign, for the objectives over sequences
    lp, old, advantages, ref, entropy, weights, sampling = (x.masked_fill(mask == 0, torch.nan).to(device) for x in values)
    entropy_mask = (torch.rand(4, 5, generator=g) > 0.3).to(device)
    return Batch(lp, old, advantages, mask.to(device), ref, entropy, weights, sampling, entropy_mask)


def pack(batch: Batch) -> Batch:
    """The same tokens without their padding, the empty sequence kept; the hole in the third sequence stays, masked."""
    ends = [(0, 5), (0, 0), (0, 4), (1, 5)]
    keep = torch.cat([torch.arange(b, e) + 5 * i for i, (b, e) in enumerate(ends)]).to(batch.mask.device)
    cu = torch.tensor([0, 5, 5, 9, 13], dtype=torch.int32, device=batch.mask.device)
    return Batch(*(x.flatten()[keep] for x in batch[:-1]), cu_seqlens=cu)


def results(loss_fn: Any, arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Loss, both gradients and the metrics, by name."""
    arguments = dict(arguments)
    for name in ("logprobs", "entropy"):
        if arguments.get(name) is not None:
            arguments[name] = arguments[name].detach().clone().requires_grad_()
    out = loss_fn(**arguments, **options)
    loss, metrics = out[0], out[1]
    found = {"loss": loss, **metrics}
    if loss.requires_grad:
        loss.backward()
    for name in ("logprobs", "entropy"):
        x = arguments.get(name)
        if x is not None:
            found[f"d {name}"] = torch.zeros_like(x) if x.grad is None else x.grad
    return {name: x.detach() for name, x in found.items()}


def assert_equals_reference(
    batch: Batch, config: Config, backend: str, dtype: torch.dtype = torch.float32, without: tuple[str, ...] = (), **changes: Any
):
    exact = results(reference.policy_loss, batch.kwargs(without=without, **changes), config=config)
    arguments = batch.to(dtype).kwargs(without=without, **changes)
    peer = results(reference.policy_loss, arguments, config=config)
    mine = results(rk.policy_loss, arguments, config=config, backend=backend)
    assert mine.keys() == exact.keys()
    for name, x in mine.items():
        assert x.dtype == dtype
        # Options reach a compiled kernel as float32.
        eps = 1e-12 if dtype == torch.float64 and (backend == "torch" or INTERPRETED) else 1e-6
        try:
            assert_accurate(x, exact[name], peer[name], eps=eps)
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from e


def _entropy(**kwargs: Any) -> dict[str, Any]:
    return {"entropy_coef": 0.3, **kwargs}


# Every surrogate, ratio level, estimator, weight, clamp, mask and aggregation, and the pairs of them that meet in the code.
CASES: dict[str, Config] = {
    **surrogates(),
    "ppo": Config.ppo(),
    "ppo, everything": Config.ppo(ratio_cap=1.3, dual_clip=1.1, log_ratio_clamp=0.5, kl_coef=0.2, **_entropy()),
    "dapo, k1 by sampling": Config.dapo(kl_coef=0.2, kl_estimator="k1", kl_ratio_weighted="sampling", aggregation="sum"),
    "grpo, clamped k3": Config.grpo(kl_coef=0.2, kl_input_clamp=0.3, kl_output_clamp=0.02, **_entropy()),
    "grpo, one-sided": Config.grpo(clip_low=None, clip_high=0.1, log_ratio_clamp=(None, 0.2), kl_coef=0.1, kl_estimator="abs"),
    "grpo, abs+": Config.grpo(kl_coef=0.1, kl_estimator="abs+"),
    "dr_grpo": Config.dr_grpo(max_length=7, **_entropy(entropy_aggregation="token-mean")),
    "luspo, k3+ by ratio": Config.luspo(kl_coef=0.2, kl_estimator="k3+", kl_ratio_weighted=True, off_policy_threshold=0.05),
    "gspo": Config.gspo(**_entropy(entropy_aggregation="seq-mean-token-mean")),
    "gspo, wide, k2 by ratio": Config.gspo(
        clip_low=0.2, clip_high=0.3, kl_coef=0.2, kl_estimator="k2", kl_ratio_weighted=True, kl_input_clamp=(-0.3, None)
    ),
    "gspo, clamped": Config.gspo(log_ratio_clamp=(-0.05, 0.05), kl_coef=0.2, kl_ratio_weighted=True),
    "gspo_token, k1+ by score": Config.gspo_token(kl_coef=0.2, kl_estimator="k1+", kl_ratio_weighted="score", log_ratio_clamp=(None, 10.0)),
    "rloo, k3 by ratio": Config.rloo(clip_low=0.9, clip_high=2.0, kl_coef=0.2, kl_ratio_weighted=True, kl_output_clamp=(None, 0.1)),
    "cispo": Config.cispo(),
    "cispo, two-sided": Config.cispo(cispo_cap=None, kl_coef=0.2, **_entropy(entropy_aggregation="seq-mean-token-sum-norm", max_length=4)),
    "cispo of sequences": Config.cispo(ratio_level="sequence", cispo_cap=1.01, aggregation="seq-mean-token-sum"),
    "sapo": Config.sapo(off_policy_threshold=0.05),
    "sapo of sequences": Config.sapo(ratio_level="sequence_sum", tau_pos=0.5, tau_neg=2.0, kl_coef=0.1, kl_ratio_weighted="score"),
    "gmpo": Config.gmpo(clip_low=0.1, clip_high=0.2, off_policy_threshold=0.3),
    "gmpo, clamped, k3 by ratio": Config.gmpo(log_ratio_clamp=0.3, kl_coef=0.2, kl_ratio_weighted=True, aggregation="token-mean"),
    "vespo": Config.vespo(**_entropy()),
    "vespo, steep": Config.vespo(vespo_k_pos=400.0, vespo_lambda_pos=2.0, vespo_k_neg=1.0, vespo_lambda_neg=0.0, kl_coef=0.2, kl_ratio_weighted=True),
    "dppo": Config.dppo(clip_low=0.02, clip_high=0.02, ratio_cap=1.1),
    "dppo_tv, ratio": Config.dppo(dppo_form="ratio", clip_low=0.05, ratio_level="sequence_token"),
    "dppo_kl, ratio": Config.dppo(surrogate="dppo_kl", dppo_form="ratio", clip_low=0.01, clip_high=0.01),
    "dppo_kl, score": Config.dppo(surrogate="dppo_kl", clip_low=0.02, clip_high=None),
    "reinforce": Config.reinforce(kl_coef=0.1, **_entropy(entropy_aggregation="sum")),
}


CHOICES = {
    "ratio_level": config_module.RATIO_LEVELS,
    "kl_estimator": config_module.KL_ESTIMATORS,
    "kl_ratio_weighted": config_module.KL_RATIO_WEIGHTS,
    "aggregation": config_module.AGGREGATIONS,
}


@pytest.mark.parametrize("option", [f.name for f in dataclasses.fields(Config) if f.init])
def test_cases_cover(option):
    used = {getattr(c, option) for c in CASES.values()}
    assert len(used) > 1
    assert set(CHOICES.get(option, ())) <= used


@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, backend, device):
    batch = make_batch(device)
    # One layout a case and backend, the two alternating, since the interpreter is slow; the torch path has both below.
    packed = (list(CASES).index(case) + (backend == "torch")) % 2
    assert_equals_reference(pack(batch) if packed else batch, CASES[case], backend)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_torch_path_is_exact_in_float64(case, layout, device):
    batch = make_batch(device)
    assert_equals_reference(pack(batch) if layout == "packed" else batch, CASES[case], "torch", torch.float64)


@pytest.mark.parametrize("case", ["grpo, clamped k3", "gspo, wide, k2 by ratio", "gmpo", "vespo", "dppo_kl, ratio"])
def test_triton_float64(case, device):
    assert_equals_reference(make_batch(device), CASES[case], "triton", torch.float64)


def test_packed_equals_padded(backend, device):
    batch = make_batch(device).to(torch.float32)
    config = Config.gspo(kl_coef=0.1, entropy_coef=0.2)
    padded = results(rk.policy_loss, batch.kwargs(), config=config, backend=backend)
    packed = results(rk.policy_loss, pack(batch).kwargs(), config=config, backend=backend)
    for name in ("loss", "ratio_max", "kl"):
        assert_accurate(packed[name], padded[name], eps=1e-6)
    counts = batch.mask.bool()
    assert_accurate(packed["d logprobs"][pack(batch).mask.bool()], padded["d logprobs"][counts], eps=1e-6)


# ---- blocks and programs ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["ppo, everything", "gspo, wide, k2 by ratio", "gmpo"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_sequences_longer_than_a_block(case, layout, device, monkeypatch):
    """Many blocks a sequence, many tiles a row: the same as one."""
    monkeypatch.setattr(tokens, "BLOCK", 2)
    batch = make_batch(device)
    assert_equals_reference(pack(batch) if layout == "packed" else batch, CASES[case], "triton")


def test_tiles_grow_with_the_batch(device, monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", 2)
    monkeypatch.setattr(tokens, "PROGRAMS", 3)
    batch = pack(make_batch(device))
    assert_equals_reference(batch, CASES["ppo"], "triton", cu_seqlens=None)


@pytest.mark.skipif(not INTERPRETED, reason="bytes are counted in the interpreter")
def test_reads_each_token_once():
    """One launch: the mask, three inputs where it is set and nowhere else, the gradient written."""
    n = 4096
    x = [torch.randn(n) for _ in range(3)]
    mask = torch.arange(n) % 8 != 0
    with traffic() as moved:
        rk.policy_loss(x[0].requires_grad_(), x[1], x[2], mask=mask, backend="triton")
    live = n // 8 * 7
    floor = n + 3 * 4 * live + 4 * n
    assert (moved.launches, moved.total) == (1, pytest.approx(floor, rel=0.02))
    assert moved.of(x[1]).loaded == 4 * live


# ---- edges --------------------------------------------------------------------------------------------------------------------------------------


def _edge_batch(log_r: list[float], device: torch.device) -> dict[str, Any]:
    """Each log-ratio with advantages 1, -1 and 0, in float32, in which e^0 is exactly 1."""
    log_ratios = torch.tensor(log_r, device=device).repeat_interleave(3)
    return {
        "logprobs": log_ratios - 4.0,
        "old_logprobs": torch.full_like(log_ratios, -4.0),
        "advantages": torch.tensor([1.0, -1.0, 0.0], device=device).repeat(len(log_r)),
    }


@pytest.mark.parametrize(
    "config",
    [
        Config(clip_low=0.0, clip_high=0.0),  # on both edges at r = 1
        Config(clip_low=0.0, clip_high=0.5),
        Config(clip_low=0.5, clip_high=0.0),
        Config(ratio_cap=1.0),
        Config(ratio_cap=0.5, dual_clip=1.5),
        Config(clip_low=0.0, clip_high=0.0, ratio_cap=1.0, log_ratio_clamp=0.0),
        Config(log_ratio_clamp=(-0.5, 0.5)),
        Config(surrogate="cispo", clip_low=0.0, clip_high=0.0),
    ],
)
def test_gradient_on_the_edges_is_that_of_pytorch(config, backend, device):
    arguments = _edge_batch([0.0, 0.5, -0.5, 1.0, -1.0], device)
    config = dataclasses.replace(config, aggregation="sum")
    mine = results(rk.policy_loss, arguments, config=config, backend=backend)
    theirs = results(reference.policy_loss, arguments, config=config)
    assert_accurate(mine["d logprobs"], theirs["d logprobs"], eps=1e-6)


def test_tie_of_the_dual_clip_splits_the_gradient(backend, device):
    """min(loss, -c A) with both equal: PyTorch's minimum gives each half."""
    log_r = torch.tensor([0.75], device=device)
    c = float(log_r.exp())
    arguments = {"logprobs": log_r - 4, "old_logprobs": torch.full_like(log_r, -4.0), "advantages": -torch.ones_like(log_r)}
    if backend == "triton":  # whose exponential may round otherwise
        c = float(rk.policy_loss(**arguments, backend=backend, config=Config(aggregation="sum")).loss)
    mine = results(rk.policy_loss, arguments, config=Config(dual_clip=c, aggregation="sum"), backend=backend)
    assert mine["d logprobs"].item() == pytest.approx(c / 2)
    assert mine["dual_clip_fraction"] == 0


def test_infinities_stay_in_their_token(backend, device):
    """A log-prob of -inf, in the policy or in the behaviour policy, leaves the gradients of all other tokens as they are."""
    batch = make_batch(device).to(torch.float32)
    config = Config.ppo(log_ratio_clamp=20.0, aggregation="sum")  # whose denominator does not count tokens
    without = ("ref_logprobs", "entropy", "importance_weights", "sampling_logprobs", "entropy_mask")
    clean = results(rk.policy_loss, batch.kwargs(without=without), config=config, backend=backend)
    lp, old = batch.logprobs.clone(), batch.old_logprobs.clone()
    lp[0, 1] = old[2, 0] = -torch.inf
    dirty = results(rk.policy_loss, batch.kwargs(without=without, logprobs=lp, old_logprobs=old), config=config, backend=backend)
    same = torch.ones(4, 5, dtype=torch.bool)
    same[0, 1] = same[2, 0] = False
    assert torch.equal(dirty["d logprobs"][same], clean["d logprobs"][same])
    assert dirty["loss"].isfinite()


def test_nan_in_a_live_position_is_not_hidden(backend, device):
    batch = make_batch(device).to(torch.float32)
    for name in ("logprobs", "old_logprobs", "advantages"):
        x = getattr(batch, name).clone()
        x[0, 0] = torch.nan
        assert results(rk.policy_loss, batch.kwargs(**{name: x}), config=Config.ppo(), backend=backend)["loss"].isnan()


@pytest.mark.parametrize("config", [Config.ppo(entropy_coef=0.1), Config.gspo(entropy_coef=0.1), Config.gmpo(), Config.dr_grpo(max_length=4)])
def test_nothing_counts(config, backend, device):
    """A batch that is all masked, or has no tokens, has loss 0, not NaN, and zero gradients."""
    batch = make_batch(device).to(torch.float32)
    for arguments in (
        batch.kwargs(mask=torch.zeros_like(batch.mask)),
        {k: x[:0] if isinstance(x, Tensor) else x for k, x in batch.kwargs().items()},
        {k: x[:, :0] if isinstance(x, Tensor) else x for k, x in batch.kwargs().items()},
        {
            **{k: x.flatten()[:0] for k, x in batch.kwargs(without=("cu_seqlens",)).items()},
            "cu_seqlens": torch.zeros(3, dtype=torch.int64, device=device),
        },
    ):
        found = results(rk.policy_loss, arguments, config=config, backend=backend)
        assert all(bool((x == 0).all()) for x in found.values()), found


# ---- layouts ------------------------------------------------------------------------------------------------------------------------------------


def test_advantages_one_a_sequence(backend, device):
    """[batch] for [batch, time], also where batch == time; [sequences] for packed tokens."""
    batch = make_batch(device).to(torch.float32)
    square = Batch(*(x[:, :4] for x in batch[:-1]))
    a = torch.tensor([1.0, -2.0, 3.0, -4.0], device=device)
    for b in (square, pack(batch)):
        whole = a.unsqueeze(1).expand(4, 4) if b is square else a.repeat_interleave(torch.tensor([5, 0, 4, 4], device=device))
        expected = results(rk.policy_loss, b.kwargs(advantages=whole), config=Config.ppo(), backend=backend)
        found = results(rk.policy_loss, b.kwargs(advantages=a), config=Config.ppo(), backend=backend)
        assert_accurate(found["d logprobs"], expected["d logprobs"], eps=1e-7)


def test_importance_weights_broadcast(backend, device):
    """[batch, 1], [batch] and, packed, [sequences]; vespo counts one weight a sequence once."""
    batch = make_batch(device).to(torch.float32)
    w = torch.tensor([0.5, 9.0, 1.5, 2.0], device=device)
    for config, b, shaped in ((Config.ppo(), batch, w.unsqueeze(1)), (Config.vespo(), batch, w), (Config.vespo(), pack(batch), w)):
        exact = results(reference.policy_loss, batch.kwargs(importance_weights=w.unsqueeze(1)), config=config)
        found = results(rk.policy_loss, b.kwargs(importance_weights=shaped), config=config, backend=backend)
        assert_accurate(found["loss"], exact["loss"], eps=1e-5)
    scalar = results(rk.policy_loss, batch.kwargs(importance_weights=torch.tensor(2.0, device=device)), config=Config.ppo(), backend=backend)
    one = results(rk.policy_loss, batch.kwargs(importance_weights=None), config=Config.ppo(), backend=backend)
    assert_accurate(scalar["loss"], 2 * one["loss"], eps=1e-6)


def test_strides_and_leading_dimensions(backend, device):
    """Transposed, expanded and three-dimensional inputs are the same numbers; nothing is written to an input."""
    batch = make_batch(device).to(torch.float32)
    config = Config.gspo(kl_coef=0.1)
    straight = results(rk.policy_loss, batch.kwargs(), config=config, backend=backend)
    transposed = {k: x.t().contiguous().t() if isinstance(x, Tensor) else x for k, x in batch.kwargs().items()}
    before = {k: x.clone() for k, x in transposed.items() if isinstance(x, Tensor)}
    found = results(rk.policy_loss, transposed, config=config, backend=backend)
    assert torch.equal(found["d logprobs"], straight["d logprobs"])
    assert all(torch.equal(x.nan_to_num(), transposed[k].nan_to_num()) for k, x in before.items())
    cube = {k: x.reshape(2, 2, 5) if isinstance(x, Tensor) else x for k, x in batch.kwargs().items()}
    found = results(rk.policy_loss, cube, config=config, backend=backend)
    assert torch.equal(found["d logprobs"].reshape(4, 5), straight["d logprobs"])
    assert torch.equal(found["loss"], straight["loss"])


def test_masks_of_any_dtype(backend, device):
    batch = make_batch(device).to(torch.float32)
    losses = [rk.policy_loss(**batch.kwargs(mask=mask), backend=backend).loss for mask in (batch.mask.bool(), batch.mask.to(torch.bfloat16) * -0.5)]
    assert torch.equal(*losses)
    assert losses[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype, backend, device):
    """Computed in float32 on the rounded numbers; the gradient has the dtype of its input."""
    batch = make_batch(device).to(dtype)
    config = Config.gspo(clip_low=0.2, clip_high=0.2, kl_coef=0.1, entropy_coef=0.1)
    exact = results(
        reference.policy_loss,
        batch.to(torch.float64)
        ._replace(**{f: x.double() for f, x in batch._asdict().items() if isinstance(x, Tensor) and x.dtype == dtype})
        .kwargs(),
        config=config,
    )
    mine = results(rk.policy_loss, batch.kwargs(), config=config, backend=backend)
    assert (mine["loss"].dtype, mine["kl"].dtype, mine["d logprobs"].dtype, mine["d entropy"].dtype) == (torch.float32, torch.float32, dtype, dtype)
    assert_accurate(mine["loss"], exact["loss"], eps=1e-6)
    assert_accurate(mine["d logprobs"], exact["d logprobs"], exact["d logprobs"].to(dtype), eps=1e-6)


def test_advantages_of_a_sequence_may_have_a_dimension_of_one(backend, device):
    batch = make_batch(device)
    A = torch.randn(batch.logprobs.shape[0], dtype=batch.logprobs.dtype, device=device)
    flat, column = (results(rk.policy_loss, batch._replace(advantages=x).kwargs(), config=Config(), backend=backend) for x in (A, A.unsqueeze(1)))
    assert all(torch.equal(flat[name], column[name]) for name in flat)


# ---- promises -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "normalizer"),
    [
        (Config.dapo(kl_coef=0.1, entropy_coef=0.1), "tokens"),
        (Config.grpo(kl_coef=0.1, entropy_coef=0.1), "sequences"),
        (Config.gspo(), "sequences"),
        (Config.dr_grpo(max_length=9), "sequences"),
        (Config.gmpo(), "sequences"),
        (Config.ppo(aggregation="sum"), None),
    ],
)
def test_any_partition_gives_the_same_loss(config, normalizer, backend, device):
    """Micro-batches with the global count add up to the whole, in values and gradients."""
    if backend == "triton" and config.surrogate == "clip" and config.aggregation in ("seq-mean-token-sum-norm", "sum"):
        pytest.skip("the slow interpreter has the other four")
    batch = make_batch(device).to(torch.float64 if backend == "torch" else torch.float32)
    count = {"tokens": batch.mask.sum(), "sequences": 3, None: None}[normalizer]
    whole = results(rk.policy_loss, batch.kwargs(), config=config, backend=backend)
    parts = [
        results(
            rk.policy_loss,
            {k: x[rows] if isinstance(x, Tensor) else x for k, x in batch.kwargs().items()},
            config=config,
            backend=backend,
            normalizer=count,
        )
        for rows in ([2], [0, 3, 1])
    ]
    eps = 1e-12 if backend == "torch" else 1e-6
    assert_accurate(sum(p["loss"] for p in parts), whole["loss"], eps=eps)
    assert_accurate(torch.cat([p["d logprobs"] for p in parts])[[1, 3, 0, 2]], whole["d logprobs"], eps=eps)
    assert_accurate(torch.cat([p["d entropy"] for p in parts])[[1, 3, 0, 2]], whole["d entropy"], eps=eps)


def test_on_policy_gradient_is_that_of_reinforce(backend, device):
    """With old=None the ratio is 1: GRPO has the gradient of -A lp, and nothing is clipped."""
    batch = make_batch(device).to(torch.float32)
    config = Config.grpo()
    on_policy = results(rk.policy_loss, batch.kwargs(old_logprobs=None), config=config, backend=backend)
    plain = results(rk.policy_loss, batch.kwargs(old_logprobs=None), config=dataclasses.replace(config, surrogate="reinforce"), backend=backend)
    assert_accurate(on_policy["d logprobs"], plain["d logprobs"], eps=1e-7)
    assert (on_policy["clip_fraction"], on_policy["ratio_mean"], on_policy["ratio_max"], on_policy["approx_kl"]) == (0, 1, 1, 0)


def test_gradients_flow_to_logprobs_and_entropy_only(backend, device):
    batch = make_batch(device).to(torch.float32)
    names = ("logprobs", "entropy", "old_logprobs", "advantages", "ref_logprobs", "importance_weights", "sampling_logprobs")
    leaves = {name: getattr(batch, name).clone().requires_grad_() for name in names}
    normalizer = torch.tensor(3.0, requires_grad=True, device=device)
    config = Config.grpo(kl_coef=0.1, kl_ratio_weighted="sampling", entropy_coef=0.1, off_policy_threshold=0.1)
    out = rk.policy_loss(**batch.kwargs(**leaves), normalizer=normalizer, config=config, backend=backend)
    (3 * out.loss).backward()
    assert [name for name, x in leaves.items() if x.grad is not None] == ["logprobs", "entropy"]
    assert normalizer.grad is None
    assert not any(x.requires_grad for x in (*out.metrics.values(), out.logprobs, out.entropy))
    assert all(x.dim() == 0 for x in out.metrics.values())
    once = results(rk.policy_loss, batch.kwargs(), normalizer=3, config=config, backend=backend)
    assert_accurate(leaves["logprobs"].grad, 3 * once["d logprobs"], eps=1e-6)


def test_no_gradient_wanted(backend, device):
    batch = make_batch(device).to(torch.float32)
    out = rk.policy_loss(**batch.kwargs(), config=Config.gspo(kl_coef=0.1, entropy_coef=0.1), backend=backend)
    assert not out.loss.requires_grad
    entropy = batch.entropy.clone().requires_grad_()
    rk.policy_loss(**batch.kwargs(entropy=entropy), config=Config.gspo(entropy_coef=0.5), backend=backend).loss.backward()
    lengths = batch.mask.sum(1, keepdim=True).clamp(min=1)
    assert_accurate(entropy.grad, -0.5 * batch.mask / lengths / 3, eps=1e-7)


def test_bitwise_the_same_on_every_run(backend, device, monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", 4)
    batch = make_batch(device).to(torch.float32)
    config = Config.grpo(kl_coef=0.1)
    first, second = (results(rk.policy_loss, batch.kwargs(), config=config, backend=backend) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_second_derivative_is_an_error(backend, device):
    batch = make_batch(device).to(torch.float32)
    lp = batch.logprobs.clone().requires_grad_()
    loss = rk.policy_loss(**batch.kwargs(logprobs=lp), backend=backend).loss
    (g,) = torch.autograd.grad(loss * loss, lp, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@pytest.mark.parametrize("case", ["gspo", "gspo, clamped", "gmpo, clamped, k3 by ratio", "sapo", "rloo, k3 by ratio", "ppo, everything"])
def test_gradcheck(case, device):
    """The written-out derivatives against finite differences, in float64, where the loss is a function (no stop-gradient) of its log-probs."""
    batch = pack(make_batch(device))
    live = batch.mask.bool()

    def loss(lp: Tensor, entropy: Tensor) -> Tensor:
        full = [x.clone() for x in (batch.logprobs, batch.entropy)]
        full[0][live], full[1][live] = lp, entropy
        return rk.policy_loss(**batch.kwargs(logprobs=full[0], entropy=full[1]), config=CASES[case], backend="torch").loss

    assert torch.autograd.gradcheck(loss, (batch.logprobs[live].requires_grad_(), batch.entropy[live].requires_grad_()))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed, backend, device):
    batch = make_batch(device).to(torch.float32)
    batch = pack(batch) if packed else batch
    opcheck(policy_loss_op, Tokens(*batch[:-1], None, batch.cu_seqlens), Config.gspo(kl_coef=0.1), Wanted(True, True, True), backend)


@pytest.mark.skipif(os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="Inductor's own code does not compile without vector instructions")
def test_torch_compile(backend, device):
    """In one graph: packed sequences, a configuration made inside, the same tensor twice."""
    batch = pack(make_batch(device).to(torch.float32))

    def step(logprobs: Tensor, old: Tensor, **tensors: Any) -> tuple[Tensor, Tensor]:
        config = Config.grpo(kl_coef=0.1, entropy_coef=0.1, off_policy_threshold=0.1)
        tensors["sampling_logprobs"] = old
        out = rk.policy_loss(logprobs, old, **tensors, normalizer=3, config=config, backend=backend)
        return out.loss, out.metrics["kl"]

    leaves = [batch.logprobs.clone().requires_grad_() for _ in range(2)]
    rest = batch.kwargs(without=("logprobs", "old_logprobs"))
    compiled_step = torch.compile(step, fullgraph=True, options={"fx_graph_cache": False})  # what another version left there is another graph
    eager, compiled = step(leaves[0], batch.old_logprobs, **rest), compiled_step(leaves[1], batch.old_logprobs, **rest)
    eager[0].backward()
    compiled[0].backward()
    assert torch.equal(eager[0], compiled[0])
    assert torch.equal(eager[1], compiled[1])
    assert torch.equal(leaves[0].grad, leaves[1].grad)


# ---- errors -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "config", "error_type", "message"),
    [
        ({"old_logprobs": torch.zeros(4, 4)}, Config(), ValueError, r"old_logprobs must have shape \(4, 5\), got \(4, 4\)"),
        ({"logprobs": [0.0]}, Config(), TypeError, "logprobs must be a torch.Tensor, got list"),
        ({"logprobs": torch.zeros(4, 5, dtype=torch.int64)}, Config(), TypeError, "logprobs must have a dtype of"),
        ({"advantages": torch.zeros(5)}, Config(), ValueError, r"advantages must have shape \(4, 5\) or \(4,\); got \(5,\)"),
        (
            {"importance_weights": torch.zeros(3, 1)},
            Config(),
            ValueError,
            r"importance_weights must have shape \(4, 5\) or \(4,\) or what broadcasts",
        ),
        ({"mask": torch.ones(5)}, Config(), ValueError, "mask must have shape"),
        ({"ref_logprobs": None}, Config(kl_coef=0.1), ValueError, "ref_logprobs is needed"),
        ({"entropy": None}, Config(entropy_coef=0.1), ValueError, "entropy is needed"),
        ({"sampling_logprobs": None}, Config(off_policy_threshold=0.1), ValueError, "sampling_logprobs is needed"),
        ({"normalizer": torch.ones(2)}, Config(), ValueError, r"normalizer must have shape \(\), got \(2,\)"),
        ({"normalizer": -1}, Config(), ValueError, "normalizer must be a number >= 0, got -1"),
        ({"cu_seqlens": torch.tensor([0, 20])}, Config(), ValueError, r"cu_seqlens goes with packed tensors of shape \[tokens\], got \(4, 5\)"),
        ({"backend": "cuda"}, Config(), ValueError, "'cuda' is not a backend"),
        ({}, "ppo", TypeError, "config must be a PolicyLossConfig, got str"),
    ],
)
def test_errors(changes, config, error_type, message):
    arguments = {**make_batch(torch.device("cpu")).kwargs(), **changes}
    with pytest.raises(error_type, match=message):
        rk.policy_loss(**arguments, config=config)


@pytest.mark.parametrize(
    "config",
    [Config.gspo(), Config.grpo(), Config.gmpo(), Config(off_policy_threshold=0.1), Config(entropy_coef=1, entropy_aggregation="seq-mean-token-sum")],
)
def test_one_dimension_without_cu_seqlens_has_no_sequences(config):
    arguments = pack(make_batch(torch.device("cpu"))).kwargs(cu_seqlens=None)
    with pytest.raises(ValueError, match=r"needs sequences: pass \[batch, time\], or cu_seqlens with \[tokens\]; got shape \(13,\)"):
        rk.policy_loss(**arguments, config=config)


def test_errors_of_packed_inputs():
    arguments = pack(make_batch(torch.device("cpu"))).kwargs()
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 13"):
        rk.policy_loss(**{**arguments, "cu_seqlens": torch.tensor([0, 5, 12])})
    for config in (Config.dr_grpo(), Config(entropy_coef=0.1, entropy_aggregation="seq-mean-token-sum-norm")):
        with pytest.raises(ValueError, match="needs max_length"):
            rk.policy_loss(**arguments, config=config)
    with pytest.raises(ValueError, match=r"advantages must have shape \(13,\) or \(4,\); got \(3,\)"):
        rk.policy_loss(**{**arguments, "advantages": torch.zeros(3)})


@pytest.mark.parametrize(
    ("options", "error_type", "message"),
    [
        ({"surrogate": "trpo"}, ValueError, "surrogate must be one of 'clip', 'cispo'"),
        ({"ratio_level": "word"}, ValueError, "ratio_level must be one of"),
        ({"aggregation": "mean"}, ValueError, "aggregation must be one of"),
        ({"entropy_aggregation": "mean"}, ValueError, "entropy_aggregation must be one of"),
        ({"kl_estimator": "full"}, ValueError, "kl_estimator must be one of"),
        ({"kl_ratio_weighted": "token"}, ValueError, "kl_ratio_weighted must be one of"),
        ({"clip_low": -0.1}, ValueError, "clip_low must be a number >= 0, got -0.1"),
        ({"clip_high": "0.2"}, TypeError, "clip_high must be a number, got str"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip must be a number > 1, got 1.0"),
        ({"tau_pos": None}, TypeError, "tau_pos must be a number, got NoneType"),
        ({"kl_coef": float("nan")}, ValueError, "kl_coef must be a number finite"),
        ({"log_ratio_clamp": (1, 0)}, ValueError, "low <= high"),
        ({"log_ratio_clamp": (1, 2, 3)}, ValueError, "a pair"),
        ({"kl_input_clamp": -1}, ValueError, "kl_input_clamp must be a number >= 0"),
        ({"surrogate": "gmpo", "ratio_level": "sequence"}, ValueError, "reduces over the sequence by itself"),
        ({"max_length": 0}, ValueError, "max_length must be a number > 0"),
    ],
)
def test_errors_of_the_config(options, error_type, message):
    with pytest.raises(error_type, match=message):
        Config(**options)


def test_config_is_a_value():
    a, b = Config.gspo(log_ratio_clamp=[None, 10]), Config.gspo(log_ratio_clamp=(None, 10.0))
    assert a == b
    assert hash(a) == hash(b)
    assert Config.from_text(a.text) == a
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.clip_low = 1.0
    assert dataclasses.replace(a, clip_low=0.5).text != a.text
    assert Config(kl_input_clamp=(None, None)).kl_input_clamp is None
    with pytest.raises(TypeError):
        Config("clip")


# ---- parts --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "sequence_sum"])
def test_importance_ratio(level):
    batch = make_batch(torch.device("cpu"))
    for b in (batch, pack(batch)):
        lp = b.logprobs.clone().requires_grad_()
        r = rk.importance_ratio(lp, b.old_logprobs, mask=b.mask, level=level, log_ratio_clamp=(None, 10), cu_seqlens=b.cu_seqlens)
        assert r.shape == lp.shape
        assert bool((r[b.mask == 0] == 0).all())
        r.sum().backward()
        assert bool((lp.grad[b.mask == 0] == 0).all())
        difference = torch.where(b.mask != 0, b.logprobs - b.old_logprobs, 0.0)
        first = difference[:5] if b.cu_seqlens is not None else difference[0]  # the first sequence, all of whose tokens count
        expected = {"token": first, "sequence_sum": first.sum().expand(5)}.get(level, first.mean().expand(5)).exp()
        assert_accurate(r[:5] if b.cu_seqlens is not None else r[0], expected, eps=1e-12)
        slope = lp.grad[:5] if b.cu_seqlens is not None else lp.grad[0]
        assert_accurate(slope, {"sequence_sum": 5 * expected}.get(level, expected), eps=1e-12)
    on_policy = rk.importance_ratio(lp, None, mask=b.mask, level=level, cu_seqlens=b.cu_seqlens)
    assert bool((on_policy[b.mask != 0] == 1).all())
    with pytest.raises(ValueError, match="level must be one of"):
        rk.importance_ratio(lp, None, level="word")
    if level != "token":
        with pytest.raises(ValueError, match="needs sequences"):
            rk.importance_ratio(lp, None, level=level)


def test_importance_weights():
    sampling = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, torch.nan, -2.0]])
    old = torch.tensor([[-1.0, -0.5, -2.0], [-1.0, -7.0, -1.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    w = rk.importance_weights(old, sampling, mask=mask)
    e = torch.tensor([0.0, 0.5, -1.0, 0.0, 0.0, 1.0]).exp().view(2, 3)
    assert_accurate(w, e * mask, eps=1e-6)
    assert_accurate(rk.importance_weights(old, sampling, mask=mask, low=0.5, high=2.0), e.clamp(0.5, 2.0) * mask, eps=1e-6)
    zeroed = rk.importance_weights(old, sampling, mask=mask, low=0.5, high=2.0, outside="zero")
    assert_accurate(
        zeroed, torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]]).where(torch.tensor([[True, False, True], [True, True, True]]), e), eps=1e-6
    )
    whole = torch.tensor([-0.5, 1.0]).exp().unsqueeze(1) * mask
    assert_accurate(rk.importance_weights(old, sampling, mask=mask, level="sequence"), whole, eps=1e-6)
    packed = rk.importance_weights(old.flatten(), sampling.flatten(), mask=mask.flatten(), level="sequence", cu_seqlens=torch.tensor([0, 3, 6]))
    assert_accurate(packed, whole.flatten(), eps=1e-6)
    with pytest.raises(ValueError, match="low must be at most high"):
        rk.importance_weights(old, sampling, low=2, high=1)


def test_kl_penalty():
    lp = torch.tensor([-1.0, -2.0, -3.0, torch.nan], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.5, -2.0, -1.0, torch.nan], dtype=torch.float64)
    mask = torch.tensor([1, 1, 1, 0])
    d = torch.tensor([-0.5, 0.0, 2.0], dtype=torch.float64)
    slopes = {"k1": torch.ones(3), "abs": -d.sign(), "k2": -d, "k3": -torch.expm1(d), "k1+": -d, "k3+": -d}
    values = {"k1": -d, "abs": d.abs(), "k2": d * d / 2, "k3": d.exp() - 1 - d}
    for name, slope in slopes.items():
        lp.grad = None
        kl = rk.kl_penalty(lp, ref, name, mask=mask)
        kl.sum().backward()
        assert_accurate(kl, torch.cat([values[name.rstrip("+")], torch.zeros(1)]), eps=1e-12)
        assert_accurate(lp.grad, torch.cat([slope, torch.zeros(1)]), eps=1e-12)
    lp.grad = None
    kl = rk.kl_penalty(lp, ref, "k3+", mask=mask, input_clamp=1.0, output_clamp=(None, 0.5))
    kl.sum().backward()
    assert_accurate(kl, torch.cat([values["k3"][:2], torch.tensor([0.5, 0.0])]), eps=1e-12)
    assert_accurate(lp.grad, torch.tensor([0.5, 0.0, 0.0, 0.0]), eps=1e-12)
    with pytest.raises(ValueError, match="estimator must be one of"):
        rk.kl_penalty(lp, ref, "k4")


def test_small_kl_keeps_its_digits(device):
    """k3 of nearly equal policies is d^2 / 2 times a series: the kernel does not form it as a difference."""
    lp = torch.full((1, 8), -1.0, device=device)
    ref = lp + torch.tensor([1e-3, -1e-3, 1e-2, -1e-2, 0.1, -0.1, 0.2499, 0.2501], device=device)
    config = Config(surrogate="reinforce", kl_coef=1.0)
    d = (ref.double() - lp.double()).flatten()
    for i in range(0, 8, 3):
        only = torch.zeros_like(lp)
        only[0, i] = 1
        kl = rk.policy_loss(lp, None, torch.zeros_like(lp), mask=only, ref_logprobs=ref, config=config, backend="triton").metrics["kl"]
        exact = torch.expm1(d[i]) - d[i]
        assert error(kl, exact) < 1e-5 * exact
