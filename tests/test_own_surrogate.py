"""A user's own surrogate: known by its name, differentiated, equal to autograd through the plain formula at every depth, on both backends."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import rlkern as rk
from examples import own_surrogate
from rlkern import reference
from rlkern.config import RATIO_LEVELS
from rlkern.ops.policy import METRICS

from .judge import assert_accurate

ROOT = Path(__file__).parents[1]
Config = rk.PolicyLossConfig
SHAPE, H, V = (3, 6), 8, 40


@triton.jit
def smooth(lp, old, log_r, A, o):
    """-A eps tanh((r - 1) / eps) - tau_pos (|A| + 0.1) lp: both derivatives, two options, and not 0 where A is."""
    r = tl.exp(log_r)
    gate = 2.0 * tl.sigmoid(2.0 * (r - 1.0) / o.high) - 1.0
    weight = o.tau_pos * (tl.abs(A) + 0.1)
    return -A * o.high * gate - weight * lp, -weight, -A * (1.0 - gate * gate) * r


def smooth_torch(lp, old, log_r, A, o):
    return -A * o.high * torch.tanh((log_r.exp() - 1) / o.high) - o.tau_pos * (A.abs() + 0.1) * lp


@triton.jit
def only_triton(lp, old, log_r, A, o):
    return -A * lp, -A, tl.zeros_like(lp)


@triton.jit
def three_arguments(lp, log_r, A):
    return lp


rk.register_surrogate("smooth", triton=smooth, torch=smooth_torch)
rk.register_surrogate("only torch", torch=lambda lp, old, log_r, A, o: -A * lp)
CONFIG = Config(surrogate="smooth", clip_high=0.3, tau_pos=0.2)


class Batch:
    """Inputs of a policy loss from hidden states, NaN where masked if in float64."""

    def __init__(self, dtype=torch.float64, device="cpu"):
        def normal(*shape):
            return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

        self.hidden, self.weight, self.ids = normal(*SHAPE, H), normal(V, H), torch.randint(V, SHAPE, device=device)
        self.mask = torch.rand(SHAPE, device=device) > 0.3
        with torch.no_grad():
            lp = rk.token_logprobs(self.logits().double(), self.ids, backend="torch")
        self.old, self.ref = ((lp + 0.4 * torch.randn_like(lp)).to(dtype) for _ in range(2))
        self.advantages = normal(*SHAPE)
        self.advantages[0, :3] = 0
        self.importance_weights = normal(*SHAPE).abs()
        if dtype == torch.float64:
            for x in (self.old, self.ref, self.advantages, self.importance_weights):
                x[~self.mask] = torch.nan

    def logits(self):
        return self.hidden @ self.weight.t()

    def kwargs(self, config):
        return {"mask": self.mask, "ref_logprobs": self.ref, "importance_weights": self.importance_weights, "config": config}

    def leaves(self, dtype=None):
        return [(x if dtype is None else x.to(dtype)).detach().clone().requires_grad_() for x in (self.hidden, self.weight)]

    def exact(self, config):
        """By autograd in float64 through the formula: (loss, its gradients with respect to hidden, weight, logits and log-probs)."""
        leaves = self.leaves(torch.float64)
        logits = leaves[0] @ leaves[1].t()
        lp = reference.token_logprobs(logits, self.ids)

        def read(x):
            return torch.where(self.mask, x.double(), 0.0)

        masked_lp, old, A, w, ref = (read(x) for x in (lp, self.old, self.advantages, self.importance_weights, self.ref))
        log_r = reference.log_ratio(masked_lp, old, self.mask, config.ratio_level, config.log_ratio_clamp, None)
        loss = -A * config.clip_high * torch.tanh((log_r.exp() - 1) / config.clip_high) - config.tau_pos * (A.abs() + 0.1) * masked_lp
        loss = w * loss + config.kl_coef * reference.kl_penalty(masked_lp, ref, config.kl_estimator)
        loss = (reference.aggregation_weights(self.mask, config.aggregation, dtype=torch.float64) * loss)[self.mask].sum()
        return loss, *torch.autograd.grad(loss, [*leaves, logits, lp])


def assert_same(mine, exact, eps):
    for x, y in zip(mine, exact, strict=True):
        assert_accurate(x, y, eps=eps * max(1.0, float(y.detach().abs().max())))


def check(batch, config, backend, eps, **options):
    """All three depths against autograd."""
    loss, *grads = batch.exact(config)
    kwargs = {**batch.kwargs(config), "backend": backend}
    lp = rk.token_logprobs(batch.logits(), batch.ids, backend="torch").detach().requires_grad_()
    out = rk.policy_loss(lp, batch.old, batch.advantages, **kwargs)
    assert_same([out.loss, *torch.autograd.grad(out.loss, lp)], [loss, grads[3]], eps)
    assert set(out.metrics) == set(METRICS)
    assert float(out.metrics["clip_fraction"]) == 0
    logits = batch.logits().detach().requires_grad_()
    out = rk.fused_policy_loss(logits, batch.ids, batch.old, batch.advantages, **kwargs)
    assert_same([out.loss, *torch.autograd.grad(out.loss, logits)], [loss, grads[2]], eps)
    leaves = batch.leaves()
    out = rk.fused_linear_policy_loss(*leaves, batch.ids, batch.old, batch.advantages, **kwargs, **options)
    assert_same([out.loss, *torch.autograd.grad(out.loss, leaves)], [loss, *grads[:2]], eps)


@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_equals_autograd_at_every_depth(level, device):
    config = replace(CONFIG, ratio_level=level, aggregation="seq-mean-token-mean", log_ratio_clamp=0.5)
    assert config.is_token_level == (level == "token")
    check(Batch(device=device), config, "torch", 1e-12)
    check(Batch(device=device), replace(config, kl_coef=0.1), "torch", 1e-12, chunk_bytes=5 * V * 8)
    check(Batch(torch.float32, device), replace(config, kl_coef=0.1), "triton", 1e-5)


def test_float64_on_triton(device):
    batch = Batch(device=device)
    found = []
    for backend in ("triton", "torch"):
        lp = torch.randn(SHAPE, dtype=torch.float64, device=device, generator=torch.Generator(device).manual_seed(1)).requires_grad_()
        out = rk.policy_loss(lp, batch.old, batch.advantages, mask=batch.mask, config=CONFIG, backend=backend)
        found.append((out.loss, *torch.autograd.grad(out.loss, lp)))
    assert_same(*found, 1e-12 if device.type == "cpu" else 1e-6)  # options reach a compiled kernel as float32


def test_rows_without_an_advantage_count(device):
    """A term of one's own need not be 0 there, so that compact=True may leave out masked rows only."""
    check(Batch(device=device), CONFIG, "torch", 1e-12, compact=True)


def test_jit_function_itself(device):
    """Is its own registration, by its qualified name; one that has a name already keeps it."""
    config = Config(surrogate=only_triton)
    assert config.surrogate == f"{__name__}.only_triton"
    assert config == Config(surrogate=only_triton) == Config(surrogate=config.surrogate)
    assert Config(surrogate=smooth).surrogate == "smooth"
    lp = torch.randn(SHAPE, device=device)
    ours, mine = (rk.policy_loss(lp, None, lp, config=c, backend="triton").loss for c in (Config.reinforce(), config))
    assert torch.equal(ours, mine)


def test_operator_is_differentiated_wherever_it_runs():
    """By autograd, below which an operator runs: with views written in place, without gradients, in inference mode, under hooks, compiled."""
    differentiable = []

    def first_token_twice(lp, old, log_r, A, o):
        loss = -A * log_r.exp()
        loss[:, 0].mul_(2)
        differentiable.append(loss.requires_grad and not loss.is_inference())
        return loss

    config = Config(surrogate=rk.register_surrogate("first token twice", torch=first_token_twice), aggregation="sum")
    lp, old, A = torch.randn(3, *SHAPE).unbind()
    lp.requires_grad_()

    def loss_of(lp):
        return rk.policy_loss(lp, old, A, config=config, backend="torch").loss

    exact = -A * (lp - old).detach().exp()
    exact[:, 0] *= 2
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        loss = loss_of(lp)
    assert len(packed) == 3  # what the loss itself saves
    assert_same(torch.autograd.grad(loss, lp), [exact], 1e-6)
    assert_same(torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss_of, lp, use_reentrant=False), lp), [exact], 1e-6)
    with torch.no_grad():
        assert torch.equal(loss_of(lp), loss)
    with torch.inference_mode():
        assert torch.equal(loss_of(lp.detach().clone()), loss)
    assert_same(torch.autograd.grad(torch.compile(loss_of, fullgraph=True, backend="aot_eager")(lp), lp), [exact], 1e-6)
    assert differentiable == [True] * 6


def test_compiles_without_a_graph_break(backend, device):
    batch = Batch(torch.float32, device)

    def losses(logits, hidden, weight):
        positional, options = (batch.ids, batch.old, batch.advantages), {"mask": batch.mask, "config": CONFIG, "backend": backend}
        lp = rk.token_logprobs(logits, batch.ids, backend=backend)
        return (
            rk.policy_loss(lp, *positional[1:], **options).loss
            + rk.fused_policy_loss(logits, *positional, **options).loss
            + rk.fused_linear_policy_loss(hidden, weight, *positional, **options).loss
        )

    found = []
    for f in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        leaves = [batch.logits().detach().requires_grad_(), *batch.leaves()]
        loss = f(*leaves)
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    assert_same(*found, 1e-6)


def test_no_derivative_is_zero():
    rk.register_surrogate("constant", torch=lambda lp, old, log_r, A, o: A * A)
    lp = torch.randn(4, requires_grad=True)
    out = rk.policy_loss(lp, None, torch.ones(4), config=Config(surrogate="constant"), backend="torch")
    assert float(out.loss.detach()) == 1
    assert torch.autograd.grad(out.loss, lp)[0].tolist() == [0] * 4


# ---- errors ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "missing", "kind"), [("only torch", "triton", "@triton.jit"), (only_triton, "torch", "PyTorch")])
def test_missing_form_is_an_error_before_anything_runs(name, missing, kind, device):
    config = Config(surrogate=name)
    logits, x = torch.randn(2, 5, device=device, requires_grad=True), torch.zeros(2, device=device)
    calls = [
        lambda **o: rk.policy_loss(x, None, x, **o),
        lambda **o: rk.fused_policy_loss(logits, x.long(), None, x, **o),
        lambda **o: rk.fused_linear_policy_loss(logits, torch.randn(7, 5, device=device), x.long(), None, x, **o),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"has no {kind} form, which backend='{missing}' needs.*register_surrogate\(.*{missing}="):
            call(config=config, backend=missing)


def test_a_form_may_come_later():
    name = rk.register_surrogate("later", triton=only_triton)
    rk.register_surrogate(name, torch=smooth_torch)
    rk.register_surrogate(name, triton=only_triton, torch=smooth_torch)  # the same again
    out = rk.policy_loss(torch.ones(1), None, torch.zeros(1), config=Config(surrogate=name, tau_pos=0.5), backend="torch")
    assert_accurate(out.loss, torch.tensor(-0.05))


def test_bad_registrations():
    with pytest.raises(ValueError, match="'smooth' has another triton function already"):
        rk.register_surrogate("smooth", triton=only_triton)
    with pytest.raises(ValueError, match="'smooth' has another torch function already"):
        rk.register_surrogate("smooth", torch=lambda lp, old, log_r, A, o: lp)
    with pytest.raises(ValueError, match="'clip' is built in"):
        rk.register_surrogate("clip", torch=smooth_torch)
    with pytest.raises(ValueError, match="needs a function"):
        rk.register_surrogate("nothing")
    with pytest.raises(TypeError, match=r"triton must be a @triton\.jit function, got function"):
        rk.register_surrogate("mixed up", triton=smooth_torch)
    with pytest.raises(TypeError, match="torch must be a function of tensors"):
        rk.register_surrogate("mixed up", torch=smooth)
    with pytest.raises(TypeError, match=r"triton must be a function of \(lp, old, log_r, A, o\), got one of \(lp, log_r, A\)"):
        rk.register_surrogate("short", triton=three_arguments)
    with pytest.raises(TypeError, match="name must be a str"):
        rk.register_surrogate(smooth)  # type: ignore[arg-type]


def test_bad_surrogates():
    with pytest.raises(ValueError, match=r"surrogate must be one of 'clip'.*'smooth'.*; got 'smoth'"):
        Config(surrogate="smoth")
    with pytest.raises(TypeError, match=r"a name or a @triton\.jit function, got function; .*register_surrogate\(name, torch=...\)"):
        Config(surrogate=smooth_torch)
    with pytest.raises(ValueError, match="no formula for surrogate 'smooth'"):
        reference.policy_loss(torch.zeros(2), None, torch.zeros(2), config=CONFIG)


@pytest.mark.parametrize("result", [torch.zeros(()), 0.0])
def test_loss_of_the_wrong_shape(result):
    name = rk.register_surrogate(f"returns {result!r}", torch=lambda lp, old, log_r, A, o: result)
    with pytest.raises(ValueError, match=r"must give the loss of each token, a tensor \(3,\); got (\(\)|float)"):
        rk.policy_loss(torch.zeros(3), None, torch.zeros(3), config=Config(surrogate=name), backend="torch")


# ---- the documented example ----------------------------------------------------------------------------------------------------------------


def test_example_runs_without_a_gpu_and_learns():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "own_surrogate.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rewards = [float(line.split("reward ")[1].split(",")[0]) for line in done.stdout.splitlines()]
    assert rewards[-1] > rewards[0] + 0.2


def test_forms_of_the_example_agree(device):
    lp, old, A = torch.randn(3, *SHAPE, device=device).unbind()
    found = []
    for backend in ("triton", "torch"):
        leaf = lp.clone().requires_grad_()
        loss = rk.policy_loss(leaf, old, A, config=own_surrogate.CONFIG, backend=backend).loss
        found.append((loss, *torch.autograd.grad(loss, leaf)))
    assert_same(*found, 1e-6)


def test_docs_show_the_example():
    page, source = (ROOT / "docs" / "losses.md").read_text(), (ROOT / "examples" / "own_surrogate.py").read_text()
    shown = page.split("```py\n")[1].split("```")[0]
    assert shown.strip() in source
