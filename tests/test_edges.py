"""Points where two cases of a formula meet, and rows of several segments: each a fault that was once put in and noticed by no test."""

import pytest
import torch

import rlkern as rk
from rlkern import PolicyLossConfig as Config
from rlkern import reference

from .judge import assert_accurate


def pair(config, backend, lp, old, advantages, **tensors):
    """(loss, gradient, metrics) of ours in float32 on ``backend`` and of the reference in float64."""
    found = []
    for dtype, function in (
        (torch.float32, lambda *a, **k: rk.policy_loss(*a, **k, backend=backend)[:2]),
        (torch.float64, reference.policy_loss),
    ):
        leaf = lp.to(dtype).requires_grad_()
        named = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
        loss, metrics = function(leaf, old.to(dtype), advantages.to(dtype), config=config, **named)
        found.append((loss, torch.autograd.grad(loss, leaf)[0], metrics))
    return found


@pytest.mark.parametrize("segments", [3, 5])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_negative_rows_of_several_segments(segments, with_entropy, backend, device):
    """What lies beyond a row's end must count as -inf, not as 0, in every segment and in their merge."""
    vocabulary = segments * 32768 - 4000
    logits = (-20 - 5 * torch.rand(2, vocabulary)).to(device).requires_grad_()
    ids = torch.tensor([vocabulary - 1, 40000], device=device)
    out = rk.token_logprobs(logits, ids, with_entropy=with_entropy, backend=backend)
    exact_logits = logits.detach().double().requires_grad_()
    exact = reference.token_logprobs(exact_logits, ids, with_entropy=with_entropy)
    out, exact = (x if with_entropy else (x,) for x in (out, exact))
    for x, y in zip(out, exact, strict=True):
        assert_accurate(x, y, eps=1e-5)
    (g,), (exact_g,) = (torch.autograd.grad(sum(x.sum() for x in y), leaf) for y, leaf in ((out, logits), (exact, exact_logits)))
    assert_accurate(g, exact_g, eps=1e-6)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("vocabulary", [64, 4100])
def test_no_gradient_at_excluded_tokens(vocabulary, with_entropy, backend, device):
    """A logit of -inf takes none, the chosen one included; a row of -inf alone has NaN everywhere."""
    logits = torch.randn(4, vocabulary, device=device)
    logits[0, 3], logits[1, ::2], logits[3] = -torch.inf, -torch.inf, -torch.inf
    ids = torch.tensor([3, 2, 5, 1], device=device)
    leaf = logits.requires_grad_()
    out = rk.token_logprobs(leaf, ids, with_entropy=with_entropy, backend=backend)
    lp, *entropy = out if with_entropy else (out,)
    assert lp[:2].tolist() == [-torch.inf, -torch.inf]
    (g,) = torch.autograd.grad(lp.sum() + sum(h.sum() for h in entropy), leaf)
    assert not g[:3][logits[:3] == -torch.inf].any()
    assert bool(g[2].isfinite().all())
    assert bool(g[3].isnan().all())


def test_largest_ratio_below_one(backend, device):
    lp = -3 - torch.rand(2, 4, device=device)
    old, mask = torch.full_like(lp, -1.0), torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]], device=device)
    (_, _, metrics), (_, _, exact) = pair(Config(), backend, lp, old, torch.ones_like(lp), mask=mask)
    assert_accurate(metrics["ratio_max"], exact["ratio_max"], eps=1e-6)
    assert 0 < float(metrics["ratio_max"]) < 1


def test_off_policy_mask_where_the_advantage_is_zero(backend, device):
    """It drops tokens with A < 0 alone; with A = 0 there is nothing to drop, and nothing must overflow."""
    lp = torch.full((3, 4), -1.0, device=device)
    old, sampling = lp + 0.1, lp + 5.0
    advantages = torch.tensor([[0.0], [-1.0], [1.0]], device=device).expand(3, 4)
    ours, exact = pair(Config(off_policy_threshold=0.5), backend, lp, old, advantages, sampling_logprobs=sampling)
    for x, y in zip(ours[:2], exact[:2], strict=True):
        assert_accurate(x, y, eps=1e-6)
    assert not ours[1][:2].any()
    assert ours[1][2].all()


@pytest.mark.parametrize(
    "config", [Config(), Config.cispo(cispo_cap=None), Config.gmpo(), Config.gspo(), Config(dual_clip=1.5), Config(surrogate="dppo_tv")]
)
def test_exactly_on_an_edge(config, backend, device):
    """With no room to clip in, a ratio of exactly 1 lies on both bounds: the gradient passes there, as that of a clamp does."""
    lp = torch.full((2, 3), -1.0, device=device)
    advantages = torch.tensor([[1.0], [-1.0]], device=device).expand(2, 3)
    on_the_edge = Config(
        **{name: getattr(config, name) for name in ("surrogate", "ratio_level", "dual_clip", "aggregation")}, clip_low=0.0, clip_high=0.0
    )
    ours, exact = pair(on_the_edge, backend, lp, lp, advantages)
    for x, y in zip(ours[:2], exact[:2], strict=True):
        assert_accurate(x, y, eps=1e-6)
    assert ours[1].all()
    for name in ("clip_fraction", "clip_fraction_low", "clip_fraction_high"):
        assert float(ours[2][name]) == float(exact[2][name])


@pytest.mark.parametrize("weight", [0.0, 1e-30, 1e30, float("inf")])
def test_vespo_s_weight_of_a_sequence(weight, backend, device):
    """Its logarithm is clamped: a weight may be 0 or overflow."""
    lp = -1 - torch.rand(2, 4, device=device)
    ours, exact = pair(Config.vespo(), backend, lp, lp + 0.1, torch.ones(2, 4), importance_weights=torch.full((2, 4), weight, device=device))
    for x, y in zip(ours[:2], exact[:2], strict=True):
        assert bool(x.isfinite().all())
        assert_accurate(x, y, eps=1e-5 * max(1.0, float(y.abs().max())))


@pytest.mark.parametrize("packed", [False, True])
def test_steps_that_are_truncated_and_terminated_have_terminated(packed, backend, device):
    torch.manual_seed(0)
    r, v, following = torch.randn(3, 2, 6, dtype=torch.float64).to(device)
    terminated = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 0, 1]], device=device)
    truncated = torch.tensor([[0, 1, 0, 1, 0, 1], [1, 0, 1, 1, 0, 0]], device=device)
    x = {"next_values": following, "terminated": terminated, "truncated": truncated}
    if packed:
        r, v, x = r.flatten(), v.flatten(), {name: t.flatten() for name, t in x.items()} | {"cu_seqlens": torch.tensor([0, 6, 12], device=device)}
    for mine, exact in zip(rk.gae(r, v, gamma=0.9, lam=0.8, **x, backend=backend), reference.gae(r, v, gamma=0.9, lam=0.8, **x), strict=True):
        assert_accurate(mine, exact, eps=1e-12)


def test_vespo_beyond_its_lower_bound(backend, device):
    """The sum of log-ratios is held at log 1e-8: a weight of 1e-15, and a third of that where it is not, which only a relative error shows."""
    logprobs = torch.full((1, 2), -12.0, dtype=torch.float64, device=device, requires_grad=True)
    old, advantages = torch.full_like(logprobs, -2.4).detach(), torch.ones(1, dtype=torch.float64, device=device)
    config = Config.vespo()
    mine = rk.policy_loss(logprobs, old, advantages, config=config, backend=backend).loss
    exact = reference.policy_loss(logprobs, old, advantages, config=config)[0]
    for x, y in ((mine, exact), (torch.autograd.grad(mine, logprobs)[0], torch.autograd.grad(exact, logprobs)[0])):
        assert_accurate(x / y, torch.ones_like(y), eps=1e-6)  # a GPU's kernel takes its options in float32


def test_vespo_holds_each_token_before_it_adds_them(backend, device):
    """-30 counts as -20."""
    logprobs = torch.tensor([[-31.0, -1.0]], dtype=torch.float64, device=device)
    old, advantages = torch.tensor([[-1.0, -16.0]], dtype=torch.float64, device=device), torch.ones(1, dtype=torch.float64, device=device)
    config = Config.vespo()
    mine = rk.policy_loss(logprobs, old, advantages, config=config, backend=backend).loss
    exact = reference.policy_loss(logprobs, old, advantages, config=config)[0]
    assert_accurate(mine / exact, torch.ones_like(exact), eps=1e-6)


def test_vespo_s_weight_that_overflows_counts_nothing(backend, device):
    """As with TRL. Its exponent is 2000 at this log-ratio."""
    logprobs = torch.full((1, 1), -1.0, dtype=torch.float64, device=device, requires_grad=True)
    config = Config.vespo(vespo_k_pos=200.0, vespo_lambda_pos=1e-4)
    loss = rk.policy_loss(logprobs, logprobs.detach() - 10.0, torch.ones(1, dtype=torch.float64, device=device), config=config, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert (loss.item(), gradient.item()) == (0.0, 0.0)


@pytest.mark.parametrize("config", [Config(surrogate="dppo_tv", clip_low=0.1, clip_high=0.1), Config(surrogate="dppo_kl")], ids=["tv", "kl"])
def test_a_token_of_no_advantage_leaves_the_trust_region_downwards(config, backend, device):
    """It has no loss, but is counted."""
    logprobs, zeros = torch.tensor([[-9.0, -0.1]], device=device), torch.zeros(1, device=device)
    old = torch.tensor([[-0.1, -9.0]], device=device)
    mine = rk.policy_loss(logprobs, old, zeros, config=config, backend=backend)
    _, exact = reference.policy_loss(logprobs, old, zeros, config=config)
    assert float(mine.loss) == 0.0
    for name in exact:
        assert_accurate(mine.metrics[name], exact[name], eps=1e-5 * (1.0 + abs(float(exact[name]))))
    assert any(name.startswith("clip") and float(exact[name]) == 0.5 for name in exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 6, 1027])
def test_gradients_wherever_rows_begin(device, vocabulary, dtype):
    """Kernels go over them 16 bytes at a time from a row's first aligned address on, and over the columns before and after one by one."""
    rows = 9
    ids = torch.cat([torch.arange(4), vocabulary - 1 - torch.arange(5)]).clamp(0, vocabulary - 1).to(device)
    mask = torch.arange(rows, device=device) != 5
    values, other = torch.randn(2, rows, vocabulary, device=device).to(dtype)
    a, b = torch.randn(2, rows, device=device)
    config = rk.PolicyLossConfig.reinforce(entropy_coef=0.1)

    def laid_out(x, skipped, left):
        whole = torch.full((rows, skipped + vocabulary + left), torch.nan, dtype=dtype, device=device)
        whole[:, skipped : skipped + vocabulary] = x
        return whole, whole[:, skipped : skipped + vocabulary].requires_grad_()

    expected = None
    for skipped, left in ((0, 0), (0, 1), (3, 0)):
        found = []
        for inplace in (False, True):
            for losses in (
                lambda x, i=inplace: rk.token_logprobs(x, ids, mask=mask, with_entropy=True, inplace_backward=i, backend="triton"),
                lambda x, i=inplace: [rk.fused_policy_loss(x, ids, a, b, mask=mask, config=config, inplace=i, backend="triton").loss],
                lambda x, place=(skipped, left): [rk.full_kl(x, laid_out(other, *place)[1].detach(), mask=mask, backend="triton")],
            ):
                whole, x = laid_out(values, skipped, left)
                results = losses(x)
                upstream = [a[: r.numel()].view(r.shape) if r.dim() else torch.ones_like(r) for r in results]
                found += torch.autograd.grad(results, x, upstream)
                assert whole.isnan().sum() == rows * (skipped + left)
        expected = expected or found
        assert all(torch.equal(g, e) for g, e in zip(found, expected, strict=True)), (skipped, left)
