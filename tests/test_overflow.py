"""Ratios that overflow: what a clip, a cap or a clamp holds has gradient 0, what has advantage 0 counts nothing; true infinities stay."""

import math

import pytest
import torch
from torch import Tensor

import rlkern as rk
from rlkern import PolicyLossConfig as Config
from rlkern import reference

from . import presets
from .judge import assert_accurate

CONFIGS = {
    **{name: presets.preset(name, max_length=4) for name in presets.NAMES},
    "dual clip": Config.ppo(dual_clip=3.0),
    "ratio cap": Config.ppo(ratio_cap=5.0),
    "no clip": Config.ppo(clip_low=None, clip_high=None),
    "clamped log-ratio": Config.ppo(log_ratio_clamp=20.0),
    "dppo score": Config.dppo(dppo_form="score", ratio_cap=4.0),
    "dppo kl": Config(surrogate="dppo_kl"),
    "gspo, dual clip": Config.gspo(dual_clip=3.0),
    "clipped sum": Config(ratio_level="sequence_sum"),
}
# A log-ratio for each of the four tokens of a sequence; float32 overflows at 88.7, float64 at 709.8.
LOG_RATIOS = [(100.0, 0.1, -0.1, 0.0), (0.0, -100.0, 0.3, 0.1), (1000.0, 0.0, 0.0, 0.2), (-1000.0, 0.1, 0.0, 0.0), (0.1, -0.2, 0.3, 0.05)]
ADVANTAGES = [1.0, 0.0, -1.0]


def batch(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, those of the behaviour policy, advantages): every log-ratio with every advantage."""
    log_r = torch.tensor(LOG_RATIOS, dtype=torch.float64).repeat(len(ADVANTAGES), 1)
    lp = -1.0 - torch.rand(log_r.shape, dtype=torch.float64).where(log_r >= 0, -log_r)
    A = torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(len(LOG_RATIOS))
    return tuple(x.float().to(device, dtype) for x in (lp, lp.float().double() - log_r, A))  # type: ignore[return-value]


def is_bounded(config: Config, A: float) -> bool:
    """Whether the objective holds a ratio that grows without end."""
    if config.log_ratio_clamp is not None or config.surrogate in ("cispo", "sapo", "vespo", "reinforce") or A == 0:
        return True
    if config.surrogate.startswith("dppo"):
        return config.dppo_form == "score"  # few tokens leave the trust region by their ratio
    if A > 0:
        return config.clip_high is not None or config.ratio_cap is not None
    return config.surrogate == "clip" and (config.dual_clip is not None or config.ratio_cap is not None)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_of_tokens(name, dtype, backend, device):
    config = CONFIGS[name]
    lp, old, A = batch(dtype, device)
    lp.requires_grad_()
    for row in range(len(A)):
        one = slice(row, row + 1)
        out = rk.policy_loss(lp[one], old[one], A[one], config=config, backend=backend)
        (grad,) = torch.autograd.grad(out.loss, lp)
        exact_loss, _ = reference.policy_loss(lp[one].double(), old[one].double(), A[one].double(), config=config)
        (exact,) = torch.autograd.grad(exact_loss, lp)
        assert not grad.isnan().any()
        assert not exact.isnan().any()
        assert not out.loss.isnan()
        if A[row] == 0:
            assert out.loss == 0
            assert not grad.any()
        if is_bounded(config, float(A[row])):
            assert out.loss.isfinite()
            assert grad.isfinite().all()
        largest = float(exact[exact.isfinite()].abs().max())
        assert_accurate(grad, exact, eps=1e-5 * max(1.0, largest if math.isfinite(largest) and largest < 1e30 else 1.0))
        assert_accurate(out.loss, exact_loss.to(dtype), eps=1e-5 * max(1.0, abs(float(exact_loss)) if exact_loss.isfinite() else 1.0))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_depth(name, backend, device):
    """From logits and from hidden states the same, with advantages whose losses are bounded."""
    config = CONFIGS[name]
    shape, V, H = (len(LOG_RATIOS), 4), 12, 5
    hidden, weight = torch.randn(*shape, H, device=device).requires_grad_(), torch.randn(V, H, device=device).requires_grad_()
    ids = torch.randint(V, shape, device=device)
    logits = hidden @ weight.t()
    lp = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    old = (lp - torch.tensor(LOG_RATIOS, device=device)).detach()
    for A in (1.0, 0.0):
        advantages = torch.full(shape[:1], A, device=device)
        if not is_bounded(config, A):
            continue
        exact = torch.autograd.grad(reference.policy_loss(lp, old, advantages, config=config)[0], (logits, hidden, weight), retain_graph=True)
        leaf = logits.detach().clone().requires_grad_()
        fused = rk.fused_policy_loss(leaf, ids, old, advantages, config=config, backend=backend)
        found = [*torch.autograd.grad(fused.loss, leaf)]
        for mode in ("in-forward", "recompute") if not config.needs_sequences else (None,):
            options = {} if mode is None else {"mode": mode}
            out = rk.fused_linear_policy_loss(hidden, weight, ids, old, advantages, config=config, backend=backend, **options)
            for x, y in zip([*found, *torch.autograd.grad(out.loss, (hidden, weight))], exact, strict=True):
                assert x.isfinite().all()
                assert_accurate(x, y, eps=2e-5 * max(1.0, float(y.abs().max())))


@pytest.mark.parametrize("weighted", [False, True, "score", "sampling"])
@pytest.mark.parametrize("estimator", rk.config.KL_ESTIMATORS)
def test_kl(estimator, weighted, backend, device):
    """An output clamp holds the value of an estimate that overflows, and its gradient is 0; a coefficient of 0 leaves it out of the loss."""
    lp = torch.tensor([[-1.0, -1.0, -101.0, -1.0]], device=device).requires_grad_()
    ref = torch.tensor([[-101.0, -1001.0, -1.0, -1.0]], device=device)
    old = torch.tensor([[-1.0, -1.0, -101.0, -1.1]], device=device)
    A = torch.zeros(1, device=device)
    options = {"kl_estimator": estimator, "kl_ratio_weighted": weighted}
    given = {"ref_logprobs": ref, **({"sampling_logprobs": old} if weighted == "sampling" else {}), "backend": backend}
    out = rk.policy_loss(lp, old, A, config=Config.grpo(kl_coef=0.1, kl_output_clamp=(-10.0, 10.0), **options), **given)
    (grad,) = torch.autograd.grad(out.loss, lp)
    assert out.loss.isfinite()
    held = reference.kl_penalty(lp.detach().double(), ref.double(), estimator).abs() > 10
    assert held.any()
    assert grad.isfinite().all()
    assert not grad[held].any()
    plain = rk.kl_penalty(lp, ref, estimator, output_clamp=(-10.0, 10.0))
    assert not torch.autograd.grad(plain.sum(), lp)[0][held].any()
    tracked = rk.policy_loss(lp, old, A, config=Config.grpo(kl_coef=0.0, **options), **given)
    assert tracked.loss == 0
    assert not torch.autograd.grad(tracked.loss, lp)[0].any()


def test_importance_weights(backend, device):
    """A weight that overflows is clamped or dropped; times a token that counts nothing it is 0."""
    old, sampling = torch.tensor([[0.0, 0.0, 0.0]], device=device), torch.tensor([[-1000.0, 0.0, 1000.0]], device=device)
    assert rk.importance_weights(old, sampling, low=0.5, high=2.0).tolist() == [[2.0, 1.0, 0.5]]
    assert rk.importance_weights(old, sampling, low=0.5, high=2.0, outside="zero").tolist() == [[0.0, 1.0, 0.0]]
    lp = torch.zeros(1, 3, device=device).requires_grad_()
    w = torch.tensor([[torch.inf, 1.0, torch.inf]], device=device)
    A = torch.tensor([[0.0, 1.0, 1.0]], device=device)
    out = rk.policy_loss(
        lp, lp.detach() - torch.tensor([[0.0, 0.0, 3.0]], device=device), A, importance_weights=w, config=Config.ppo(), backend=backend
    )
    (grad,) = torch.autograd.grad(out.loss, lp)
    assert grad[0, 0] == 0  # advantage 0
    assert grad[0, 2] == 0  # clipped
    assert not out.loss.isnan()


def test_value_loss(backend, device):
    """The clipped error is the larger and holds: no gradient, even where the error has overflowed."""
    v = torch.tensor([3e38, 1.0], device=device).requires_grad_()
    target = torch.tensor([3e38, 0.0], device=device)
    old = torch.tensor([-3e38, 1.0], device=device)
    out = rk.value_loss(v, old, target, clip_range=0.2, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, v)
    assert grad.tolist() == [0.0, 0.5]


def test_what_is_infinite_stays_with_its_sequence(backend, device):
    """A trace that is stopped passes nothing on, and neither does lambda = 0."""
    r = torch.tensor([[1.0, 1.0, torch.inf, 1.0]], device=device)
    v = torch.zeros_like(r)
    stop = torch.tensor([[0, 1, 0, 0]], device=device)
    advantages, _ = rk.gae(r, v, gamma=0.9, lam=0.9, terminated=stop, backend=backend)
    assert advantages[0, :2].isfinite().all()
    assert advantages[0, 2] == torch.inf
    assert rk.gae(r, v, gamma=0.9, lam=0.0, backend=backend)[0].tolist() == [[1.0, 1.0, math.inf, 1.0]]
    assert reference.gae(r, v, gamma=0.9, lam=0.0)[0].tolist() == [[1.0, 1.0, math.inf, 1.0]]
