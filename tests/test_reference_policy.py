"""The reference itself: the worked examples, identities, and the objectives as the libraries that people come from write them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rlkern as rk
from rlkern import reference

from .judge import assert_accurate
from .presets import NAMES

Config = rk.PolicyLossConfig


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- worked examples and identities -------------------------------------------------------------------------------------------------------------


def test_ratio_of_the_example():
    """The old policy gives "rug" 0.1 and the new one 0.3: the ratio is 3, whatever the other tokens do."""
    old = torch.tensor([[0.6, 0.1, 0.3]], dtype=torch.float64)
    for others in (0.6, 0.4, 0.01):
        new = torch.tensor([[others, 0.3, 0.7 - others]], dtype=torch.float64)
        rug = torch.tensor([1])
        lp, lp_old = (rk.token_logprobs(p.log(), rug, backend="torch") for p in (new, old))
        assert_accurate(rk.importance_ratio(lp, lp_old), torch.tensor([3.0]), eps=1e-9)
        out = rk.policy_loss(lp, lp_old, torch.ones(1, dtype=torch.float64), config=Config.ppo())
        assert out.loss == pytest.approx(-1.2)  # clipped at 1 + 0.2
        assert (out.metrics["ratio_max"], out.metrics["clip_fraction_high"]) == (pytest.approx(3), 1)


def test_clip_by_hand():
    """The four cases of PPO: with A > 0 only above, with A < 0 only below does the clip act; dual clip bounds the loss of a bad token that grew."""
    r = torch.tensor([1.5, 0.5, 1.5, 0.5, 4.0], dtype=torch.float64)
    A = torch.tensor([2.0, 2.0, -2.0, -2.0, -2.0], dtype=torch.float64)
    losses = [-2.4, -1.0, 3.0, 1.6, 6.0]
    for i, expected in enumerate(losses):
        one = slice(i, i + 1)
        loss, _ = reference.policy_loss(r.log()[one], torch.zeros(1, dtype=torch.float64), A[one], config=Config.ppo(dual_clip=3.0))
        assert loss == pytest.approx(expected)


@given(st.floats(-20, 5), st.floats(-20, 5))
def test_kl_estimators(lp, ref):
    """k3 >= 0 and k2 >= 0; the plus forms have the value of their namesakes and the gradient of k2."""
    x = torch.tensor([lp], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([ref], dtype=torch.float64)
    found = {}
    for name in rk.config.KL_ESTIMATORS:
        kl = reference.kl_penalty(x, y, name)
        found[name] = (kl.item(), torch.autograd.grad(kl.sum(), x)[0].item())
    assert found["k3"][0] >= 0
    assert found["k2"][0] >= 0
    for name in ("k1", "k3"):
        assert found[f"{name}+"] == (found[name][0], found["k2"][1])


def test_kl_estimators_in_expectation():
    """Over the whole vocabulary E_p[k1] = E_p[k3] = KL, and E_p of the gradient of k2 is the gradient of the KL."""
    logits, ref = randn(7).requires_grad_(), randn(7).log_softmax(-1)
    lp = logits.log_softmax(-1)
    p = lp.exp().detach()
    kl = (lp.exp() * (lp - ref)).sum()
    for name in ("k1", "k3"):
        assert_accurate((p * reference.kl_penalty(lp, ref, name)).sum(), kl, eps=1e-12)
    (exact,) = torch.autograd.grad(kl, logits, retain_graph=True)
    for name in ("k2", "k1+", "k3+"):
        (mine,) = torch.autograd.grad((p * reference.kl_penalty(lp, ref, name)).sum(), logits, retain_graph=True)
        assert_accurate(mine, exact, eps=1e-12)


def test_on_policy_every_ratio_loss_has_the_gradient_of_reinforce():
    """At r = 1 clip, cispo, sapo, dppo and gspo_token have the gradient of -A lp, in each of their forms."""
    lp, A = randn(3, 4).requires_grad_(), randn(3, 4)

    def gradient(config: Config) -> Tensor:
        return torch.autograd.grad(reference.policy_loss(lp, None, A, config=config)[0], lp)[0]

    exact = gradient(Config.reinforce())
    for config in (Config.ppo(), Config.cispo(), Config.dppo(), Config(surrogate="dppo_kl"), Config(ratio_level="sequence_token")):
        assert_accurate(gradient(config), exact, eps=1e-12)
    assert_accurate(gradient(Config.sapo(tau_pos=1.0, tau_neg=1.0, aggregation="token-mean")), exact, eps=1e-12)


def test_gspo_and_gspo_token_agree_where_advantages_are_one_a_sequence():
    lp, old, A = randn(3, 4).requires_grad_(), randn(3, 4), randn(3)
    gradients = []
    for config in (Config.gspo(clip_low=0.5, clip_high=0.5), Config.gspo_token(clip_low=0.5, clip_high=0.5)):
        gradients.append(torch.autograd.grad(reference.policy_loss(lp, old, A, config=config)[0], lp)[0])
    assert_accurate(gradients[0], gradients[1], eps=1e-12)


def test_vespo_weight_is_one_on_policy():
    """phi(1) = 1: on-policy, VESPO is REINFORCE."""
    lp, A = randn(2, 3), randn(2)
    assert_accurate(
        reference.policy_loss(lp, None, A, config=Config.vespo())[0], reference.policy_loss(lp, None, A, config=Config.reinforce())[0], eps=1e-12
    )


@pytest.mark.parametrize("aggregation", rk.config.AGGREGATIONS)
def test_aggregation_weights(aggregation):
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]])
    a = reference.aggregation_weights(mask, aggregation, dtype=torch.float64, max_length=10)
    expected = {
        "token-mean": [[1 / 3, 1 / 3, 0], [0] * 3, [1 / 3, 0, 0]],
        "seq-mean-token-mean": [[1 / 4, 1 / 4, 0], [0] * 3, [1 / 2, 0, 0]],
        "seq-mean-token-sum": [[1 / 2, 1 / 2, 0], [0] * 3, [1 / 2, 0, 0]],
        "seq-mean-token-sum-norm": [[1 / 20, 1 / 20, 0], [0] * 3, [1 / 20, 0, 0]],
        "sum": [[1, 1, 0], [0] * 3, [1, 0, 0]],
    }[aggregation]
    assert_accurate(a, torch.tensor(expected), eps=1e-7)
    packed = reference.aggregation_weights(
        mask.flatten(), aggregation, dtype=torch.float64, max_length=10, cu_seqlens=torch.tensor([0, 3, 3, 6, 9], dtype=torch.int32)
    )
    assert_accurate(packed, a.flatten(), eps=1e-12)


# ---- as others write it -------------------------------------------------------------------------------------------------------------------------


class Data:
    """A batch as TRL and verl have it: finite everywhere, padding on the right, one advantage a sequence."""

    def __init__(self) -> None:
        self.lp = randn(4, 6).abs().neg().requires_grad_()
        self.old = self.lp.detach() + 0.3 * randn(4, 6)
        self.ref = self.lp.detach() + 0.3 * randn(4, 6)
        self.sampling = self.old + 0.1 * randn(4, 6)
        self.A = torch.tensor([1.5, -1.0, 0.5, -2.0], dtype=torch.float64)
        self.mask = (torch.arange(6) < torch.tensor([[6], [3], [1], [4]])).double()
        self.w = randn(4, 6).abs()

    def check(self, config: Config, theirs: Tensor, **options) -> None:
        """Value and gradient of ``theirs`` from the reference and from policy_loss."""
        (gradient,) = torch.autograd.grad(theirs, self.lp, retain_graph=True)
        options = {"mask": self.mask, "ref_logprobs": self.ref, **options}
        for loss in (
            reference.policy_loss(self.lp, self.old, self.A, config=config, **options)[0],
            rk.policy_loss(self.lp, self.old, self.A, config=config, backend="torch", **options).loss,
        ):
            assert_accurate(loss, theirs, eps=1e-12)
            assert_accurate(torch.autograd.grad(loss, self.lp)[0], gradient, eps=1e-12)


@pytest.fixture
def data() -> Data:
    return Data()


def k3_of(d: Data) -> Tensor:
    return torch.exp(d.ref - d.lp) - (d.ref - d.lp) - 1


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo", "cispo", "sapo"])
def test_trl(loss_type, data):
    """TRL's GRPOTrainer: its per-token losses, KL with use_bias_correction_kl, and its three ways to average."""
    d, A, m = data, data.A.unsqueeze(1), data.mask
    log_ratio = d.lp - d.old
    if loss_type in ("luspo", "gspo"):
        log_ratio = ((log_ratio * m).sum(-1) / m.sum(-1)).unsqueeze(-1)
    r = log_ratio.exp()
    if loss_type == "cispo":
        per_token = -r.clamp(max=5.0).detach() * A * d.lp
    elif loss_type == "sapo":
        tau = torch.where(A > 0, 1.0, torch.full_like(A, 1.05))
        per_token = -torch.sigmoid(tau * (r - 1)) * 4 / tau * A
    else:
        per_token = -torch.min(r.clamp(max=1.5) * A, r.clamp(0.8, 1.28) * A)
    per_token = per_token * d.w + 0.04 * k3_of(d) * r
    shape = {"clip_low": 0.2, "clip_high": 0.28, "ratio_cap": 1.5, "kl_coef": 0.04, "kl_ratio_weighted": True}
    if loss_type in ("grpo", "gspo", "sapo"):
        theirs, options = ((per_token * m).sum(-1) / m.sum(-1)).mean(), {}
    elif loss_type == "bnpo":
        theirs, options = (per_token * m).sum() / m.sum(), {}
    elif loss_type == "dr_grpo":
        theirs, options = (per_token * m).sum() / (4 * 100), {}
        shape["max_length"] = 100
    elif loss_type == "luspo":
        theirs, options = ((per_token * m).sum(-1)).mean(), {}
    else:  # a global count of tokens
        theirs, options = (per_token * m).sum() / 50, {"normalizer": 50}
    data.check(getattr(Config, loss_type)(**shape), theirs, importance_weights=d.w, **options)


def test_trl_counts_empty_sequences(data):
    """TRL's grpo is the mean over all sequences; here, over the non-empty ones unless ``normalizer`` says otherwise."""
    data.mask[2] = 0
    r = (data.lp - data.old).exp()
    A = data.A.unsqueeze(1)
    per_token = -torch.min(r * A, r.clamp(0.8, 1.2) * A)
    theirs = ((per_token * data.mask).sum(-1) / data.mask.sum(-1).clamp(min=1)).mean()
    data.check(Config.grpo(), theirs, normalizer=4)


def test_trl_off_policy_and_entropy_masks(data):
    """DeepSeek-V3.2's sequence mask and the top-entropy mask, which spare the KL; the entropy bonus over both masks."""
    d, A, m = data, data.A.unsqueeze(1), data.mask
    entropy = randn(4, 6).abs().requires_grad_()
    entropy_mask = entropy.detach() > 0.5
    drift = ((d.sampling - d.lp.detach()) * m).sum(1, keepdim=True) / m.sum(1, keepdim=True)
    keep = (A >= 0) | (drift <= drift[1].item() - 1e-9)
    assert 0 < keep.sum() < 4
    r = (d.lp - d.old).exp()
    per_token = -torch.min(r * A, r.clamp(0.8, 1.2) * A) * keep * entropy_mask + 0.1 * k3_of(d)
    effective = m * entropy_mask
    theirs = ((per_token * m).sum(-1) / m.sum(-1)).mean() - 0.2 * (entropy * effective).sum() / effective.sum()
    config = Config.grpo(off_policy_threshold=drift[1].item() - 1e-9, kl_coef=0.1, entropy_coef=0.2, entropy_aggregation="token-mean")
    data.check(config, theirs, sampling_logprobs=d.sampling, entropy=entropy, entropy_mask=entropy_mask)


def test_trl_vespo(data):
    d, A, m = data, data.A.unsqueeze(1), data.mask
    low = math.log(1e-8)
    log_w = ((d.lp - d.old).clamp(-20, 20) * m).sum(-1, keepdim=True) + (d.w.log().clamp(low, 20) * m).sum(-1, keepdim=True)
    log_w = log_w.clamp(low, 20)
    k, lam = torch.where(A >= 0, 2.0, 3.0), torch.where(A >= 0, 3.0, 2.0)
    phi = torch.exp(lam + k * log_w - lam * log_w.exp()).detach()
    data.check(Config.vespo(), (-phi * A * d.lp * m).sum() / m.sum(), importance_weights=d.w)


def test_trl_gmpo(data):
    """The geometric mean over the kept tokens; the entropy mask acts there and nowhere else, the loss is one a sequence."""
    d, A, m = data, data.A.unsqueeze(1), data.mask
    kept = m * (randn(4, 6) > -0.5)
    limited = (d.lp - d.old).clamp(-0.2, 0.1)
    clipped = torch.where(A > 0, torch.minimum(d.lp - d.old, limited), torch.maximum(d.lp - d.old, limited))
    per_sequence = -torch.exp((clipped * kept).sum(-1) / kept.sum(-1).clamp(min=1)) * d.A + 0.1 * (k3_of(d) * m).sum(-1) / m.sum(-1)
    data.check(Config.gmpo(clip_low=0.2, clip_high=0.1, kl_coef=0.1), per_sequence.mean(), entropy_mask=kept)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_verl_dual_clip(aggregation, data):
    """verl's vanilla loss with its clamps, low_var_kl, and agg_loss."""
    d, A, m = data, data.A.unsqueeze(1), data.mask
    r = (d.lp - d.old).clamp(-20, 20).exp()
    clipped = torch.maximum(-A * r, -A * r.clamp(0.8, 1.28))
    loss = torch.where(A < 0, torch.min(-A * 1.1, clipped), clipped)
    kl = torch.clamp(torch.exp(d.ref - d.lp) - (d.ref - d.lp) - 1, -10, 10)
    loss = loss + 0.001 * kl
    theirs = {
        "token-mean": (loss * m).sum() / m.sum(),
        "seq-mean-token-sum": (loss * m).sum(-1).mean(),
        "seq-mean-token-mean": ((loss * m).sum(-1) / m.sum(-1)).mean(),
        "seq-mean-token-sum-norm": (loss * m).sum() / 6,
    }[aggregation]
    config = Config.dapo(dual_clip=1.1, log_ratio_clamp=20, kl_coef=0.001, kl_input_clamp=20, kl_output_clamp=10, aggregation=aggregation)
    # verl divides the last by the length of the time dimension alone: a normalizer of 1 sequence
    data.check(config, theirs, normalizer=1 if aggregation.endswith("norm") else None)


def test_verl_gspo(data):
    d, A, m = data, data.A.unsqueeze(1), data.mask
    mean = ((d.lp - d.old) * m).sum(-1) / m.sum(-1)
    r = torch.exp((d.lp - d.lp.detach() + mean.detach().unsqueeze(-1)).clamp(max=10.0))
    loss = torch.maximum(-A * r, -A * r.clamp(1 - 0.0003, 1 + 0.0004))
    data.check(Config.gspo_token(log_ratio_clamp=(None, 10.0)), ((loss * m).sum(-1) / m.sum(-1)).mean())


def test_verl_cispo(data):
    d, A, m = data, data.A.unsqueeze(1), data.mask
    r = (d.lp - d.old).exp().clamp(0.8, 1.2).detach()
    data.check(Config.cispo(cispo_cap=None), (-r * A * d.lp * m).sum() / m.sum())


@pytest.mark.parametrize("surrogate", ["dppo_tv", "dppo_kl"])
def test_verl_dppo(surrogate, data):
    d, A, m = data, data.A.unsqueeze(1), data.mask
    p, q = d.lp.exp(), d.old.exp()
    if surrogate == "dppo_tv":
        up, down = p - q <= 0.05, p - q >= -0.05
    else:
        kl = q * (d.old - d.lp) + (1 - q) * torch.log((1 - q) / (1 - p))
        up, down = (kl <= 0.02) | (p <= q), (kl <= 0.02) | (p >= q)
    valid = torch.where(A > 0, up, down)
    assert 0 < (valid * m).sum() < m.sum()
    r = (d.lp - d.old).exp().clamp(max=1.05).detach()
    threshold = 0.05 if surrogate == "dppo_tv" else 0.02
    config = Config.dppo(surrogate=surrogate, clip_low=threshold, clip_high=threshold, ratio_cap=1.05)
    data.check(config, (-A * r * d.lp * valid * m).sum() / m.sum())


def test_trl_rloo(data):
    """TRL's RLOOTrainer: PPO's clip on the ratio of whole sequences."""
    d, m = data, data.mask
    r = ((d.lp - d.old) * m).sum(-1).exp()
    data.check(Config.rloo(), -torch.min(r * d.A, r.clamp(0.8, 1.2) * d.A).mean())


@pytest.mark.parametrize("name", NAMES)
def test_presets_take_overrides(name):
    preset = getattr(Config, name)
    changed = preset(clip_high=0.77, kl_coef=0.5)
    assert (changed.clip_high, changed.kl_coef) == (0.77, 0.5)
    assert (preset().kl_coef, preset().entropy_coef) == (0.0, 0.0)
    with pytest.raises(TypeError):
        preset(epsilon=0.2)
