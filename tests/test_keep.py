"""Distributions restricted to what the sampler kept: at every depth as in the reference, and as softmax over the kept logits alone."""

import pytest
import torch

import rlkern as rk
from rlkern import reference
from rlkern.ops.keep import restrict_op

from .judge import assert_accurate, opcheck

SHAPE, H, V = (2, 5), 8, 1300


def problem(device, dtype=torch.float32):
    hidden = torch.randn(*SHAPE, H, device=device, dtype=dtype)
    weight = torch.randn(V, H, device=device, dtype=dtype)
    scores = torch.rand(*SHAPE, V, device=device)
    kept = scores > scores.quantile(0.9, dim=-1, keepdim=True)
    kept[0, 1] = True  # everything, which is more than one block
    kept[0, 2] = False
    kept[0, 2, 7] = True  # one token: log-prob 0
    ids = torch.stack([row.nonzero()[len(row.nonzero()) // 2, 0] for row in kept.view(-1, V)]).view(SHAPE)
    ids[1, 3] = int((~kept[1, 3]).nonzero()[0])  # not kept
    return hidden, weight, ids, kept


def test_from_mask_lists_each_row():
    keep = rk.KeptTokens.from_mask(torch.tensor([[[0, 1, 1], [0, 0, 0]], [[1, 0, 0], [1, 1, 1]]]))
    assert keep.offsets.tolist() == [0, 2, 2, 3, 6]
    assert keep.token_ids.tolist() == [1, 2, 0, 0, 1, 2]


def test_is_the_softmax_of_the_kept_logits(backend, device):
    hidden, weight, ids, kept = problem(device)
    logits = hidden @ weight.t()
    logprobs, entropy = rk.token_logprobs(logits, ids, keep=rk.KeptTokens.from_mask(kept), with_entropy=True, backend=backend)
    row = logits[1, 0][kept[1, 0]].double().log_softmax(0)
    assert_accurate(logprobs[1, 0], row[kept[1, 0].nonzero().flatten().tolist().index(int(ids[1, 0]))], eps=1e-5)
    assert_accurate(entropy[1, 0], -(row.exp() * row).sum(), eps=1e-5)
    assert float(logprobs[0, 2]) == float(entropy[0, 2]) == 0.0
    assert float(logprobs[1, 3]) == -torch.inf


@pytest.mark.parametrize("int_dtype", [torch.int32, torch.int64])
def test_values_and_gradients(backend, device, int_dtype):
    hidden, weight, ids, kept = problem(device)
    keep = rk.KeptTokens(*(t.to(int_dtype) for t in rk.KeptTokens.from_mask(kept)))
    mask = torch.ones(SHAPE, device=device)
    mask[1, 3] = 0
    a, b = torch.randn(2, *SHAPE, dtype=torch.float64, device=device)
    options = {"mask": mask, "with_entropy": True, "softcap": 9.0, "temperature": 0.7}
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    logits = leaves[0] @ leaves[1].t()
    lp, entropy = reference.token_logprobs(logits, ids, keep=keep, **options)
    exact = [lp, entropy, *torch.autograd.grad((lp * a).sum() + (entropy * b).sum(), [logits, *leaves])]

    leaf = (hidden @ weight.t()).requires_grad_()
    mine = rk.token_logprobs(leaf, ids, keep=keep, backend=backend, **options)
    gradient = torch.autograd.grad((mine[0] * a).sum() + (mine[1] * b).sum(), leaf)[0]
    assert torch.all(gradient[~kept] == 0)
    for x, y in zip((*mine, gradient), exact, strict=False):
        assert_accurate(x, y, eps=2e-5)
    for linear_options in ({}, {"compact": False}, {"chunk_bytes": 3 * V * 4}):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        mine = rk.linear_token_logprobs(*leaves, ids, keep=keep, backend=backend, **options, **linear_options)
        gradients = torch.autograd.grad((mine[0] * a).sum() + (mine[1] * b).sum(), leaves)
        for x, y in zip((*mine, *gradients), (*exact[:2], *exact[3:]), strict=True):
            assert_accurate(x, y, eps=2e-5 * max(1.0, float(y.detach().abs().max())))


@pytest.mark.parametrize("config", [rk.PolicyLossConfig(), rk.PolicyLossConfig.gspo()], ids=["token", "sequence"])
def test_fused_losses(backend, device, config):
    hidden, weight, ids, kept = problem(device)
    keep = rk.KeptTokens.from_mask(kept)
    ids[1, 3] = -100
    old, advantages = torch.full(SHAPE, -4.0, device=device), torch.randn(SHAPE, device=device)
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    logits = leaves[0] @ leaves[1].t()
    lp, entropy = reference.token_logprobs(logits, ids, keep=keep, with_entropy=True)
    loss, _ = reference.policy_loss(lp, old.double(), advantages.double(), mask=ids != -100, entropy=entropy, config=config)
    exact = torch.autograd.grad(loss, [*leaves, logits])
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    out = rk.fused_linear_policy_loss(*leaves, ids, old, advantages, keep=keep, config=config, backend=backend)
    leaf = (hidden @ weight.t()).requires_grad_()
    before = leaf.detach().clone()
    from_logits = rk.fused_policy_loss(leaf, ids, old, advantages, keep=keep, config=config, backend=backend)
    for mine in (out.loss, from_logits.loss):
        assert_accurate(mine, loss, eps=1e-5)
    for x, y in zip((*torch.autograd.grad(out.loss, leaves), *torch.autograd.grad(from_logits.loss, leaf)), exact, strict=True):
        assert_accurate(x, y, eps=1e-5)
    assert torch.equal(leaf.detach(), before)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("options", [{}, {"softcap": 9.0}, {"with_entropy": False}], ids=str)
def test_logits_that_the_caller_restricted(backend, device, aggregation, options):
    """Without ``keep``: -inf written into the logits, or into the head's bias. A chosen token there is left out, of the denominators too."""
    hidden, weight, ids, _ = problem(device)
    bias = torch.zeros(V, device=device)
    bias[[3, 70, int(ids[0, 0]), int(ids[1, 4])]] = -torch.inf
    ids[1, 1] = -100
    old, advantages = torch.full(SHAPE, -7.0, device=device), torch.randn(SHAPE, device=device)
    config = rk.PolicyLossConfig(aggregation=aggregation, entropy_coef=0.1 * options.get("with_entropy", True))
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    logits = leaves[0] @ leaves[1].t() + bias
    lp, entropy = reference.token_logprobs(logits, ids, with_entropy=True, softcap=options.get("softcap"))
    loss, metrics = reference.policy_loss(lp, old.double(), advantages.double(), mask=ids != -100, entropy=entropy, config=config)
    exact = torch.autograd.grad(loss, [*leaves, logits])
    assert metrics["outside_support"] == 2
    leaf = (hidden @ weight.t() + bias).requires_grad_()
    from_logits = rk.fused_policy_loss(leaf, ids, old, advantages, config=config, backend=backend, **options)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    from_hidden = rk.fused_linear_policy_loss(*leaves, ids, old, advantages, bias=bias, config=config, backend=backend, **options)
    for out in (from_logits, from_hidden):
        assert_accurate(out.loss, loss, eps=1e-5)
        assert out.metrics["outside_support"] == 2
    for x, y in zip((*torch.autograd.grad(from_hidden.loss, leaves), *torch.autograd.grad(from_logits.loss, leaf)), exact, strict=True):
        assert_accurate(x, y, eps=1e-5)


def test_slices_and_opcheck(backend, device):
    hidden, weight, ids, kept = problem(device)
    logits = torch.nn.functional.pad(hidden @ weight.t(), (0, 0, 0, 1))
    keep = rk.KeptTokens.from_mask(kept)
    assert torch.equal(
        rk.token_logprobs(logits[:, :-1], ids, keep=keep, backend=backend), rk.token_logprobs(hidden @ weight.t(), ids, keep=keep, backend=backend)
    )
    opcheck(restrict_op, logits[:, :-1], *keep, backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda keep: tuple(keep), TypeError, "keep must be a KeptTokens, got tuple"),
        (lambda keep: keep._replace(offsets=keep.offsets[1:]), ValueError, r"keep.offsets must have shape \(11,\)"),
        (lambda keep: keep._replace(offsets=keep.offsets + 1), ValueError, "keep.offsets must rise from 0"),
        (lambda keep: keep._replace(token_ids=keep.token_ids.float()), TypeError, "keep.token_ids must have a dtype"),
        (lambda keep: keep._replace(token_ids=keep.token_ids + V), ValueError, r"keep.token_ids\[0\] is \d+, outside the vocabulary"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    hidden, weight, ids, kept = problem("cpu")
    keep = change(rk.KeptTokens.from_mask(kept))
    with pytest.raises(error, match=message):
        rk.token_logprobs(hidden @ weight.t(), ids, keep=keep)
    with pytest.raises(error, match=message):
        rk.linear_token_logprobs(hidden, weight, ids, keep=keep)


# ---- tokens outside the support in losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "grpo", "gspo", "gmpo", "vespo", "cispo"])
def test_tokens_outside_the_support_count_as_masked(name, backend, device):
    """At every depth: left out of loss, denominators, gradients and metrics, and counted."""
    config = getattr(rk.PolicyLossConfig, name)(entropy_coef=0.1)
    hidden, weight = torch.randn(3, 5, H := 8, device=device, requires_grad=True), torch.randn(V := 11, H, device=device, requires_grad=True)
    ids = torch.randint(V, (3, 5), device=device)
    mask = torch.ones(3, 5, device=device)
    mask[0, -1] = 0
    kept = torch.rand(3, 5, V, device=device) > 0.4
    kept.scatter_(-1, ids[..., None], True)
    for at in ((0, 1), (1, 0), (0, 4)):  # the last one is masked anyway
        kept[at][ids[at]] = False
        kept[at][(ids[at] + 1) % V] = True
    keep = rk.KeptTokens.from_mask(kept)
    inside = mask * kept.gather(-1, ids[..., None])[..., 0]
    logits = hidden @ weight.t()
    lp, entropy = rk.token_logprobs(logits, ids, mask=mask, keep=keep, with_entropy=True, backend=backend)
    old = torch.where(inside != 0, lp.detach() + 0.1 * torch.randn_like(lp), 0.0)
    advantages = torch.randn(3, device=device)
    shared = {"config": config, "backend": backend}
    without = rk.token_logprobs(logits, ids, mask=inside, keep=keep, with_entropy=True, backend=backend)
    exact = rk.policy_loss(without[0], old, advantages, mask=inside, entropy=without[1], **shared)
    expected = torch.autograd.grad(exact.loss, (hidden, weight), retain_graph=True)
    depths = {
        "tokens": rk.policy_loss(lp, old, advantages, mask=mask, entropy=entropy, **shared),
        "logits": rk.fused_policy_loss(logits, ids, old, advantages, mask=mask, keep=keep, **shared),
        "hidden": rk.fused_linear_policy_loss(hidden, weight, ids, old, advantages, mask=mask, keep=keep, **shared),
    }
    for out in depths.values():
        found = torch.autograd.grad(out.loss, (hidden, weight), retain_graph=True)
        assert out.metrics["outside_support"] == 2
        assert_accurate(out.loss, exact.loss, eps=1e-5)
        for a, b in zip(found, expected, strict=True):
            assert_accurate(a, b, eps=2e-5)
        for metric, value in exact.metrics.items():
            if metric != "outside_support":
                assert_accurate(out.metrics[metric], value, eps=1e-5 * max(1.0, float(value.abs())))
    loss, metrics = reference.policy_loss(lp, old, advantages, mask=mask, entropy=entropy, config=config)
    assert_accurate(loss, exact.loss, eps=1e-5)
    assert metrics["outside_support"] == 2
    own = rk.fused_linear_loss(hidden, weight, ids, lambda lp, h: -lp, mask=mask, keep=keep, backend=backend)
    assert own.metrics["outside_support"] == 2
    assert_accurate(own.loss, -(without[0] * inside).sum() / inside.sum(), eps=1e-5)
