"""Fused losses, from logits and from hidden states: at every depth, in every mode, the numbers of the reference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkern as rk
from bench.harness import memory
from rlkern import reference
from rlkern._backend import INTERPRETED
from rlkern.config import AGGREGATIONS, KL_ESTIMATORS, RATIO_LEVELS
from rlkern.ops import fused as fused_ops
from rlkern.ops import head as head_ops
from rlkern.ops import linear as linear_ops
from rlkern.ops.head import ALL_KEPT, Head, Needs, Work
from rlkern.ops.logits import Rows, Saved, Slopes
from rlkern.surrogates import SURROGATES

from . import presets
from .judge import assert_accurate, opcheck, rounding

Config = rk.PolicyLossConfig

SHAPE, H, V = (3, 6), 12, 70
CU_SEQLENS = torch.tensor([0, 5, 5, 11, 18])


class Problem:
    """Random inputs of a policy loss from hidden states, in ``dtype``, with everything that a configuration may read."""

    def __init__(self, dtype=torch.float64, *, packed=False, head=None, device="cpu", drift=0.4, bias=True):
        head = head or dtype
        self.shape = (18,) if packed else SHAPE
        self.hidden = torch.randn(*self.shape, H, dtype=torch.float64).to(device, dtype)
        self.weight = torch.randn(V, H, dtype=torch.float64).to(device, head)
        self.bias = torch.randn(V, dtype=torch.float64).to(device, head) if bias else None
        self.ids = torch.randint(V, self.shape, device=device)
        self.ids.view(-1)[3] = -100
        self.mask = torch.rand(self.shape, device=device) > 0.3
        self.mask.view(-1)[4:7] = False  # with cu_seqlens: the head of a sequence
        self.scaling = {"temperature": 0.8, "softcap": 9.0, "logit_scale": 0.7}
        with torch.no_grad():
            lp = reference.token_logprobs(self.logits(torch.float64), self.ids, **self.scaling).nan_to_num()
        noise = torch.randn(3, *self.shape, dtype=torch.float64, device=device) * drift
        per_token_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.old, self.ref, self.sampling = ((lp + n).to(per_token_dtype) for n in noise)
        self.advantages = torch.randn(self.shape, device=device).to(per_token_dtype)
        self.weights = (torch.rand(self.shape, device=device) + 0.5).to(per_token_dtype)
        self.entropy_mask = torch.rand(self.shape, device=device) > 0.2
        self.cu_seqlens = CU_SEQLENS.to(device) if packed else None

    def leaves(self, dtype=None):
        x = (self.hidden, self.weight) if self.bias is None else (self.hidden, self.weight, self.bias)
        return [(t if dtype is None else t.to(dtype)).detach().clone().requires_grad_() for t in x]

    def logits(self, dtype=None):
        hidden, weight = (t if dtype is None else t.to(dtype) for t in (self.hidden, self.weight))
        logits = hidden @ weight.t()
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def arguments(self, config, dtype=None):
        """Positional and keyword arguments that follow (hidden, weight) or (logits,)."""

        def cast(x):
            return x if dtype is None or not x.is_floating_point() else x.to(dtype)

        named = {"mask": self.mask, "cu_seqlens": self.cu_seqlens, "config": config}
        if config.kl_coef:
            named["ref_logprobs"] = cast(self.ref)
        if config.needs_sampling_logprobs:
            named["sampling_logprobs"] = cast(self.sampling)
        return (self.ids, cast(self.old), cast(self.advantages)), named

    def exact(self, config, **named):
        """(loss, metrics, gradients of hidden, weight, bias and logits) in float64, by autograd through the reference."""
        leaves = self.leaves(torch.float64)
        logits = leaves[0] @ leaves[1].t() + (leaves[2] if len(leaves) > 2 else 0)
        (ids, old, advantages), rest = self.arguments(config, torch.float64)
        lp, entropy = reference.token_logprobs(logits, ids, mask=self.mask, with_entropy=True, **self.scaling)
        rest = {**rest, **named, "mask": self.mask & (ids != -100)}
        loss, metrics = reference.policy_loss(lp, old, advantages, entropy=entropy, **rest)
        return loss, metrics, torch.autograd.grad(loss * 1.7, [*leaves, logits])


def check(problem, config, backend, *, eps=1e-12, metrics=True, named=None, **options):
    """Both fused depths against the reference; ``options`` go to the one from hidden states."""
    named = named or {}
    exact, exact_metrics, grads = problem.exact(config, **named)
    (ids, old, advantages), rest = problem.arguments(config)
    rest = {**rest, **named, **problem.scaling, "backend": backend}
    leaves = problem.leaves()
    out = rk.fused_linear_policy_loss(*leaves[:2], ids, old, advantages, bias=leaves[2] if len(leaves) > 2 else None, **rest, **options)
    for x, y in zip(torch.autograd.grad(out.loss * 1.7, leaves), grads, strict=False):
        assert_accurate(x, y, eps=eps * max(1.0, float(y.abs().max())) + (rounding(x.dtype, y) if eps > 1e-9 else 0))
    outputs = [out]
    logits = problem.logits().detach()
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        outputs.append(rk.fused_policy_loss(leaf * 1.0, ids, old, advantages, inplace=inplace, **rest))
        (g,) = torch.autograd.grad(outputs[-1].loss * 1.7, leaf)
        assert_accurate(g, grads[-1], eps=eps * max(1.0, float(grads[-1].abs().max())) + (rounding(g.dtype, grads[-1]) if eps > 1e-9 else 0))
    for output in outputs:
        assert_accurate(output.loss, exact, eps=eps * max(1.0, abs(float(exact.detach()))))
        if metrics:
            for name, value in exact_metrics.items():
                assert_accurate(output.metrics[name], value, eps=eps * max(1.0, abs(float(value))) * 10)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", presets.NAMES)
def test_presets(name, packed):
    config = presets.preset(name, max_length=9)
    problem = Problem(packed=packed)
    check(problem, config, "torch")
    check(problem, replace(config, kl_coef=0.1, entropy_coef=0.05), "torch", compact=False, chunk_bytes=5 * V * 8)


@pytest.mark.parametrize("name", presets.NAMES)
def test_presets_on_triton(name):
    config = presets.preset(name, max_length=9)
    # 1e-5 of the largest entry: log-probs of float32 logits
    check(Problem(torch.float32), replace(config, kl_coef=0.1, entropy_coef=0.05), "triton", eps=2e-5, metrics=config.clip_low not in (3e-4, 2e-3))


@settings(max_examples=40, deadline=None)
@given(
    surrogate=st.sampled_from(SURROGATES),
    level=st.sampled_from(RATIO_LEVELS),
    estimator=st.sampled_from(list(KL_ESTIMATORS)),
    weighting=st.sampled_from([False, True, "score", "sampling"]),
    aggregation=st.sampled_from(AGGREGATIONS),
    kl_coef=st.sampled_from([0.0, 0.1]),
    entropy_coef=st.sampled_from([0.0, 0.03]),
    entropy_aggregation=st.sampled_from([None, "token-mean", "seq-mean-token-mean"]),
    threshold=st.sampled_from([None, 0.05]),
    normalizer=st.sampled_from([None, 7.0]),
    extras=st.booleans(),
    packed=st.booleans(),
    mode=st.sampled_from([None, "recompute"]),
    compact=st.sampled_from([None, False]),
    seed=st.integers(0, 50),
)
def test_any_objective(
    surrogate,
    level,
    estimator,
    weighting,
    aggregation,
    kl_coef,
    entropy_coef,
    entropy_aggregation,
    threshold,
    normalizer,
    extras,
    packed,
    mode,
    compact,
    seed,
):
    torch.manual_seed(seed)
    problem = Problem(packed=packed, drift=0.2)
    config = Config(
        surrogate=surrogate,
        ratio_level="token" if surrogate in ("gmpo", "vespo") else level,
        kl_estimator=estimator,
        kl_ratio_weighted=weighting,
        aggregation=aggregation,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        entropy_aggregation=entropy_aggregation,
        off_policy_threshold=threshold,
        max_length=11,
    )
    named = {"normalizer": normalizer}
    if extras:
        named |= {"importance_weights": problem.weights, "entropy_mask": problem.entropy_mask}
    check(problem, config, "torch", eps=1e-10, named=named, mode=mode, compact=compact)


@pytest.mark.parametrize(("dtype", "head"), [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_dtypes(backend, device, dtype, head, logits_dtype):
    problem = Problem(dtype, head=head, device=device)
    problem.scaling = {}
    config = Config.reinforce(entropy_coef=0.1)
    (ids, old, advantages), rest = problem.arguments(config)

    def run(leaves, loss):
        return [t.detach() for t in (loss, *torch.autograd.grad(loss, leaves))]

    leaves = problem.leaves(torch.float64)
    lp, entropy = reference.token_logprobs(leaves[0] @ leaves[1].t() + leaves[2], ids, mask=problem.mask, with_entropy=True)
    exact = run(leaves, reference.policy_loss(lp, old, advantages, entropy=entropy, **{**rest, "mask": problem.mask & (ids != -100)})[0])

    leaves = problem.leaves()
    wide = torch.promote_types(leaves[0].dtype, leaves[1].dtype)
    lp, entropy = reference.token_logprobs(torch.nn.functional.linear(*(t.to(wide) for t in leaves)), ids, mask=problem.mask, with_entropy=True)
    peer = run(leaves, reference.policy_loss(lp, old, advantages, entropy=entropy, **{**rest, "mask": problem.mask & (ids != -100)})[0])

    leaves = problem.leaves()
    out = rk.fused_linear_policy_loss(*leaves[:2], ids, old, advantages, bias=leaves[2], logits_dtype=logits_dtype, backend=backend, **rest)
    assert out.loss.dtype == torch.float32
    for x, y, z, leaf in zip(run(leaves, out.loss), exact, peer, [out.loss, *leaves], strict=True):
        assert x.dtype == leaf.dtype
        assert_accurate(x, y, z, eps=1e-5 + rounding(x.dtype, y))


def linear_gradients(leaves, ids, a, b, mask, **options):
    bias = leaves[2] if len(leaves) > 2 else None
    lp, entropy = rk.linear_token_logprobs(*leaves[:2], ids, bias=bias, mask=mask, with_entropy=True, **options)
    taking = [t for t in leaves if t.requires_grad]
    return lp, entropy, torch.autograd.grad((lp * a).sum() + (entropy * b).sum(), taking)


@pytest.mark.parametrize("options", [{}, {"compact": False}, {"compact": True}, {"chunk_bytes": 4 * V * 8}, {"mode": "recompute"}], ids=str)
@pytest.mark.parametrize("trained", ["all", "head", "hidden", "hidden and bias"])
def test_linear_token_logprobs(trained, options):
    problem = Problem()
    takes = {"all": (1, 1, 1), "head": (0, 1, 1), "hidden": (1, 0, 0), "hidden and bias": (1, 0, 1)}[trained]
    leaves = [t.requires_grad_(bool(taken)) for t, taken in zip(problem.leaves(), takes, strict=True)]
    a, b = torch.randn(2, *SHAPE, dtype=torch.float64)
    logits = leaves[0] @ leaves[1].t() + leaves[2]
    lp, entropy = reference.token_logprobs(logits, problem.ids, mask=problem.mask, with_entropy=True, **problem.scaling)
    grads = torch.autograd.grad((lp * a).sum() + (entropy * b).sum(), [t for t in leaves if t.requires_grad])
    mine = linear_gradients(leaves, problem.ids, a, b, problem.mask, **problem.scaling, **options)
    for x, y in zip((*mine[:2], *mine[2]), (lp, entropy, *grads), strict=True):
        assert_accurate(x, y, eps=1e-12)
    alone = rk.linear_token_logprobs(*leaves[:2], problem.ids, bias=leaves[2], mask=problem.mask, **problem.scaling, **options)
    assert_accurate(alone, lp, eps=1e-12)
    taking = [t for t in leaves if t.requires_grad]
    expected = torch.autograd.grad(
        (reference.token_logprobs(leaves[0] @ leaves[1].t() + leaves[2], problem.ids, mask=problem.mask, **problem.scaling) * a).sum(), taking
    )
    for x, y in zip(torch.autograd.grad((alone * a).sum(), taking), expected, strict=True):
        assert_accurate(x, y, eps=1e-12)


def test_linear_gradcheck():
    ids = torch.tensor([3, -100, 0])
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (5, 2), (5,))]
    temperature = torch.tensor([0.7, 1.0, 1.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: rk.linear_token_logprobs(h, w, ids, bias=b, temperature=temperature, with_entropy=True, softcap=5.0), leaves
    )
    old, advantages = torch.tensor([[-1.0, 0.0, -2.0], [1.0, 0.0, -0.5]], dtype=torch.float64)
    config = Config.sapo(entropy_coef=0.1, aggregation="token-mean")
    assert torch.autograd.gradcheck(
        lambda h, w, b: rk.fused_linear_policy_loss(h, w, ids, old, advantages, bias=b, config=config, mode="recompute").loss, leaves
    )


def test_rows_are_all_that_is_computed():
    problem = Problem()
    rows = torch.tensor([1, 5, 8, 13])
    mask = torch.zeros(18, dtype=torch.bool).index_fill_(0, rows, True).view(SHAPE)
    a, b = torch.randn(2, *SHAPE, dtype=torch.float64)
    by_mask = linear_gradients(problem.leaves(), problem.ids, a, b, mask, compact=False)
    by_rows = linear_gradients(problem.leaves(), problem.ids, a, b, None, rows=rows.int(), compact=False)
    for x, y in zip((*by_rows[:2], *by_rows[2]), (*by_mask[:2], *by_mask[2]), strict=True):
        assert_accurate(x, y, eps=1e-13)


@pytest.mark.parametrize("preset", ["ppo", "grpo", "gspo", "rloo", "vespo"])
@pytest.mark.parametrize("how", ["compact", "rows"])
def test_rows_without_advantage_are_left_out(preset, how):
    problem = Problem()
    problem.advantages = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
    config = getattr(Config, preset)()
    options = {"compact": True} if how == "compact" else {"rows": torch.tensor([*range(6), *range(12, 18)])}
    check(problem, config, "torch", metrics=False, **options)
    (ids, old, advantages), named = problem.arguments(config)
    out = rk.fused_linear_policy_loss(problem.hidden, problem.weight, ids, old, advantages, bias=problem.bias, **named, **options)
    rest = problem.mask.clone()
    rest[1] = False
    others = rk.fused_linear_policy_loss(problem.hidden, problem.weight, ids, old, advantages, bias=problem.bias, **{**named, "mask": rest})
    for name in others.metrics:
        assert_accurate(out.metrics[name], others.metrics[name], eps=1e-12)
    assert torch.all(out.logprobs[1] == 0)
    hidden = problem.hidden.clone()
    hidden[1] = torch.nan  # and not read
    assert torch.isfinite(rk.fused_linear_policy_loss(hidden, problem.weight, ids, old, advantages, bias=problem.bias, **named, **options).loss)


def test_masked_rows_are_not_read(backend, device):
    problem = Problem(torch.float32, device=device)
    (ids, old, advantages), named = problem.arguments(Config())
    ids[~problem.mask] = 10**6
    for x in (old, advantages):
        x[~problem.mask] = torch.nan
    leaf = problem.logits().detach()
    leaf[~problem.mask] = torch.nan
    leaf.requires_grad_()
    out = rk.fused_policy_loss(leaf, ids, old, advantages, backend=backend, **named)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert torch.all(leaf.grad[~problem.mask] == 0)
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("compact", [None, False])
def test_masked_hidden_states_are_not_read(backend, device, compact):
    problem = Problem(torch.float32, device=device)
    problem.hidden[~problem.mask] = torch.nan
    (ids, old, advantages), named = problem.arguments(Config())
    options = {"bias": problem.bias, "mask": problem.mask, "compact": compact, "backend": backend}

    def results():
        hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
        yield rk.fused_linear_policy_loss(hidden, weight, ids, old, advantages, **named, **{**options, "mask": problem.mask}).loss, hidden, weight
        yield rk.linear_token_logprobs(hidden, weight, ids, **options).sum(), hidden, weight
        yield rk.linear_token_logprobs(hidden, weight.detach(), ids, **options).sum(), hidden, None
        yield rk.linear_full_kl(hidden, weight, problem.hidden, weight.detach(), **{**options, "ref_bias": problem.bias}).sum(), hidden, weight

    named.pop("mask")
    for value, hidden, weight in results():
        assert torch.isfinite(value)
        gradients = torch.autograd.grad(value, [t for t in (hidden, weight) if t is not None])
        assert all(torch.isfinite(g).all() for g in gradients)
        assert torch.all(gradients[0][~problem.mask] == 0)


def test_partition_into_micro_batches():
    problem = Problem()
    for config in (Config(), Config.grpo(), Config.dr_grpo(max_length=6)):
        normalizer = float((problem.mask & (problem.ids != -100)).sum()) if config.aggregation == "token-mean" else 3.0
        whole, _, grads = problem.exact(config)
        leaves = problem.leaves()
        total = torch.zeros((), dtype=torch.float64)
        for row in range(3):
            at = slice(row, row + 1)
            out = rk.fused_linear_policy_loss(
                leaves[0][at],
                leaves[1],
                problem.ids[at],
                problem.old[at],
                problem.advantages[at],
                bias=leaves[2],
                mask=problem.mask[at],
                normalizer=normalizer,
                config=config,
                **problem.scaling,
            )
            (out.loss * 1.7).backward()
            total += out.loss.detach()
        assert_accurate(total, whole, eps=1e-13)
        for leaf, g in zip(leaves, grads, strict=False):
            assert_accurate(leaf.grad, g, eps=1e-12)


def test_empty_batch(backend, device):
    weight = torch.randn(V, H, device=device, requires_grad=True)
    for shape in ((0, 4), (2, 0), (0,)):
        hidden, ids = torch.randn(*shape, H, device=device, requires_grad=True), torch.zeros(shape, dtype=torch.long, device=device)
        zeros = torch.zeros(shape, device=device)
        out = rk.fused_linear_policy_loss(hidden, weight, ids, zeros, zeros, backend=backend)
        out.loss.backward()
        assert out.loss.item() == 0
        assert torch.all(weight.grad == 0)
        assert hidden.grad.shape == hidden.shape
        logits = torch.randn(*shape, V, device=device, requires_grad=True)
        rk.fused_policy_loss(logits, ids, zeros, zeros, backend=backend).loss.backward()
        assert logits.grad.shape == logits.shape
    hidden, ids = torch.randn(2, 4, H, device=device, requires_grad=True), torch.full((2, 4), -100, device=device)
    out = rk.fused_linear_policy_loss(hidden, weight, ids, torch.zeros(2, 4, device=device), torch.ones(2, 4, device=device), backend=backend)
    weight.grad = None
    out.loss.backward()
    assert out.loss.item() == 0
    assert torch.all(weight.grad == 0)
    assert torch.all(hidden.grad == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 37, 5001])
def test_upstream_gradient_is_applied_as_it_is(backend, device, dtype, inplace, vocabulary):
    """Not rounded to the dtype of the logits first: 1.001 is 1 in bf16. The rest of the tensor that the logits are a slice of stays as it was."""
    torch.manual_seed(0)
    whole = torch.randn(3, 5, vocabulary, device=device).to(dtype)
    ids, advantages = torch.randint(vocabulary, (3, 4), device=device), torch.randn(3, 4, device=device)

    def gradient(upstream):
        base = whole.clone()
        x = base[:, :-1].detach().requires_grad_()
        loss = rk.fused_policy_loss(x, ids, None, advantages, inplace=inplace, backend=backend).loss
        found = torch.autograd.grad(loss, x, torch.tensor(upstream, device=device))[0]
        assert torch.equal(base[:, -1], whole[:, -1])
        return found

    one = gradient(1.0)
    for upstream in (1.001, -1 / 3, 0.0):
        exact = one.float() * torch.tensor(upstream, device=device)
        if dtype == torch.bfloat16 and backend == "triton" and INTERPRETED:  # which cuts off what a GPU rounds
            exact = (exact.view(torch.int32) & -(1 << 16)).view(torch.float32)
        assert torch.equal(gradient(upstream), exact.to(dtype))


def test_second_backward_is_an_error():
    problem = Problem()
    (ids, old, advantages), named = problem.arguments(Config())
    leaves = problem.leaves()
    loss = rk.fused_linear_policy_loss(*leaves[:2], ids, old, advantages, bias=leaves[2], **named).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"gradients were made in its forward: .* Pass mode='recompute'"):
        loss.backward()
    (g,) = torch.autograd.grad(rk.fused_linear_policy_loss(*leaves[:2], ids, old, advantages, **named).loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|differentiate twice"):
        g.sum().backward()


def test_second_backward_by_recomputation():
    problem = Problem()
    (ids, old, advantages), named = problem.arguments(Config())
    leaves = problem.leaves()
    loss = rk.fused_linear_policy_loss(*leaves[:2], ids, old, advantages, mode="recompute", **named).loss
    first, second = (torch.autograd.grad(loss, leaves[:2], retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_inplace_is_noticed_by_other_users(backend, device):
    logits = torch.randn(2, 3, V, device=device, requires_grad=True) * 1.0
    other = (logits * logits).sum()
    zeros = torch.zeros(2, 3, device=device)
    rk.fused_policy_loss(logits, zeros.long(), zeros, zeros + 1, inplace=True, backend=backend).loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("config", [Config(), Config.gspo()], ids=["token", "sequence"])
def test_compile(backend, device, config):
    problem = Problem(torch.float32, device=device)
    (ids, old, advantages), named = problem.arguments(config)

    def from_hidden(h, w, b):
        return rk.fused_linear_policy_loss(h, w, ids, old, advantages, bias=b, backend=backend, **named).loss * 2

    def from_logits(h, w, b):
        return rk.fused_policy_loss(h @ w.t() + b, ids, old, advantages, backend=backend, inplace=True, **named).loss * 2

    for f in (from_hidden, from_logits):
        leaves = problem.leaves()
        expected = torch.autograd.grad(f(*leaves), leaves)
        for x, y in zip(torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves), leaves), expected, strict=True):
            assert_accurate(x, y, eps=1e-6)


def test_opcheck(backend, device):
    problem = Problem(torch.float32, device=device)
    head = Head(problem.hidden.view(-1, H), problem.weight, problem.bias, torch.float32)
    rows = Rows(problem.ids.flatten(), problem.mask.flatten() != 0, None, 1.0, 30.0, backend)
    some, all_rows = Work(torch.arange(4, 12, device=device), True, 5), Work(None, False, 5)
    opcheck(linear_ops.linear_logprobs_op, head, some, ALL_KEPT, rows, True, True, True)
    found = linear_ops.linear_logprobs_op(head, all_rows, ALL_KEPT, rows, True, False, True)
    needs, slopes = Needs(True, True, True), Slopes(found.logprob, found.entropy)
    opcheck(linear_ops.linear_logprobs_backward_op, head, all_rows, ALL_KEPT, rows, slopes, Saved(*found[1:4]), needs)
    terms = fused_ops.PolicyRows(problem.old.flatten(), problem.advantages.flatten(), None, None, None, None)
    weights = fused_ops.Weights(torch.ones(18, device=device), None)
    opcheck(linear_ops.linear_policy_gradients_op, head, all_rows, ALL_KEPT, rows, terms, weights, Config(), True, needs, True)
    opcheck(fused_ops.policy_gradients_op, problem.logits(), rows, terms, weights, Config(), True, True)
    opcheck(fused_ops.policy_gradients_inplace_op, problem.logits(), rows, terms, weights, Config(), True, True)


def test_memory_does_not_grow_with_the_rows():
    width, vocabulary, chunk = 16, 2000, 64 * 2000 * 4
    weight = torch.randn(vocabulary, width)
    extra = {}
    for rows in (256, 1024):
        hidden, ids = torch.randn(rows, width), torch.randint(vocabulary, (rows,))
        a, b = torch.randn(2, rows)

        def nothing(hidden=hidden, ids=ids):
            return [rk.linear_token_logprobs(hidden, weight, ids, chunk_bytes=chunk)]

        def frozen(hidden=hidden, ids=ids, a=a, b=b):
            rk.fused_linear_policy_loss(hidden.requires_grad_(), weight, ids, a, b, chunk_bytes=chunk).loss.backward()
            return []

        extra[rows] = memory(nothing, hidden.device)[0], memory(frozen, hidden.device)[0]
    per_row = 4 * 16  # the per-token tensors themselves
    assert extra[1024][0] - extra[256][0] < 768 * per_row
    assert extra[256][0] < 3 * chunk  # far from the 2 MB of all logits
    assert extra[1024][1] - extra[256][1] < 768 * (2 * width * 4 + 16 * per_row)  # d hidden, and its scaled copy
    assert extra[1024][1] < 1024 * vocabulary * 4 / 2


def test_frozen_head_multiplies_less():
    problem = Problem(bias=False)
    products = []
    original = head_ops.product

    def counted(a, b, out, **named):
        products.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        original(a, b, out, **named)

    unit = 2 * 18 * H * V
    mask = torch.ones(SHAPE)
    expected = {"nothing": 1, "frozen": 2, "in-forward": 3, "recompute": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_ops, "product", counted)
        for name, units in expected.items():
            products.clear()
            hidden = problem.hidden.clone().requires_grad_(name != "nothing")
            weight = problem.weight.clone().requires_grad_(name in ("in-forward", "recompute"))
            ids = problem.ids.clamp(min=0)
            if name == "in-forward":
                out = rk.fused_linear_policy_loss(hidden, weight, ids, None, problem.advantages, mask=mask, config=Config.reinforce()).loss
            else:
                out = rk.linear_token_logprobs(hidden, weight, ids, mask=mask).sum()
            if out.requires_grad:
                out.backward()
            assert sum(products) == units * unit, name


def dpo_like(logprobs, entropy, old, table):
    """A loss of nobody's."""
    return -torch.nn.functional.logsigmoid(logprobs - old) * table.sum(-1) - 0.1 * entropy**2


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_a_loss_of_ones_own(backend, device, trained, aggregation):
    dtype = torch.float64 if backend == "torch" else torch.float32
    problem = Problem(dtype, device=device)
    table = torch.randn(*SHAPE, 2, dtype=dtype, device=device)
    old = problem.old.clone()
    old[~problem.mask] = torch.nan
    leaves = problem.leaves(torch.float64)
    lp, entropy = reference.token_logprobs(leaves[0] @ leaves[1].t() + leaves[2], problem.ids, mask=problem.mask, with_entropy=True, temperature=0.8)
    live = problem.mask & (problem.ids != -100)
    weights = reference.aggregation_weights(live, aggregation, dtype=torch.float64, normalizer=5.0)
    loss = (weights * torch.where(live, dpo_like(lp, entropy, problem.old.double(), table.double()), 0.0)).sum()
    grads = torch.autograd.grad(loss * 3, leaves)
    leaves = problem.leaves()
    if not trained:
        leaves[1:] = [t.detach() for t in leaves[1:]]

    def run(h, w, b):
        options = {"bias": b, "mask": problem.mask, "temperature": 0.8, "aggregation": aggregation, "normalizer": 5, "chunk_bytes": 7 * V * 8}
        return rk.fused_linear_loss(h, w, problem.ids, dpo_like, (old, table), backend=backend, **options).loss

    eps = 1e-12 if backend == "torch" else 1e-4
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        mine = f(*leaves)
        assert_accurate(mine, loss, eps=eps)
        taking = [t for t in leaves if t.requires_grad]
        for x, y in zip(torch.autograd.grad(mine * 3, taking), grads, strict=False):
            assert_accurate(x, y, eps=eps)
    with torch.no_grad():
        assert_accurate(run(*leaves), loss, eps=eps)


def test_a_loss_of_ones_own_is_checked():
    hidden, weight, ids = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"loss_fn must give one loss a token, a tensor of shape \(6,\); got shape \(\)"):
        rk.fused_linear_loss(hidden, weight, ids, lambda lp, h: lp.sum())
    with pytest.raises(ValueError, match=r"per_token\[0\] must have a shape that begins with \(2, 3\)"):
        rk.fused_linear_loss(hidden, weight, ids, lambda lp, h, x: lp, (torch.zeros(3),))
    with pytest.raises(ValueError, match="aggregation must be one of"):
        rk.fused_linear_loss(hidden, weight, ids, lambda lp, h: lp, aggregation="mean")
    packed = {"aggregation": "seq-mean-token-sum-norm", "cu_seqlens": torch.tensor([0, 2, 6])}
    with pytest.raises(ValueError, match="needs max_length"):
        rk.fused_linear_loss(hidden.flatten(0, 1), weight, ids.flatten(), lambda lp, h: lp, **packed)
    constant = rk.fused_linear_loss(hidden, weight, ids, lambda lp, h: torch.ones_like(lp))
    constant.loss.backward()
    assert constant.loss.item() == 1
    assert torch.all(hidden.grad == 0)


HIDDEN, WEIGHT, IDS, TOKENS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight must have shape \[V, 4\]"),
        ({"hidden": torch.zeros(4)}, ValueError, "at least 2 dimensions"),
        ({"ids": IDS[:1]}, ValueError, "ids must have shape"),
        ({"ids": IDS + 5}, ValueError, r"ids\[0\] is 5, outside the vocabulary \[0, 5\)"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must have shape"),
        ({"logits_dtype": torch.float16}, ValueError, "logits_dtype must be"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be a positive number"),
        ({"rows": torch.tensor([6])}, ValueError, r"rows must be different positions in \[0, 6\)"),
        ({"rows": torch.tensor([1, 1])}, ValueError, "rows must be different positions"),
        ({"mode": "fast"}, ValueError, "mode must be one of"),
        ({"mode": "in-forward", "config": Config.gspo()}, ValueError, "needs a token-level objective"),
        ({"mode": "frozen-head", "weight": torch.zeros(5, 4, requires_grad=True)}, ValueError, "take no gradient"),
        ({"config": Config(entropy_coef=0.1), "with_entropy": False}, ValueError, "entropy is needed"),
        ({"config": Config(kl_coef=0.1)}, ValueError, "ref_logprobs is needed"),
        ({"advantages": torch.zeros(4)}, ValueError, "advantages must have shape"),
        ({"config": {"clip_low": 0.2}}, TypeError, "config must be a PolicyLossConfig"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "ids": IDS, "old_logprobs": TOKENS, "advantages": TOKENS, **options}
    with pytest.raises(error, match=message):
        rk.fused_linear_policy_loss(**arguments)


def test_inplace_needs_memory_of_its_own():
    with pytest.raises(ValueError, match=r"inplace=True needs logits with unit stride .* elements that do not share memory"):
        rk.fused_policy_loss(torch.zeros(1, 1, 5).expand(2, 3, 5), IDS, TOKENS, TOKENS, inplace=True)


def test_clipped_rows_have_no_gradient_where_all_rows_are_live():
    """They are left out of the products, and what memory held before must not stand in for their zeros."""
    hidden, weight = torch.randn(2, 8, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    ids = torch.randint(5, (2, 8))
    old = rk.linear_token_logprobs(hidden, weight, ids).detach() - torch.tensor([0.0, 1.0]).repeat(8).view(2, 8)  # every second ratio is e
    rk.fused_linear_policy_loss(hidden, weight, ids, old, torch.ones(2), mask=torch.ones(2, 8)).loss.backward()
    assert (hidden.grad[:, 1::2] == 0).all()
    assert (hidden.grad[:, ::2].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("config", [Config(kl_coef=0.1), Config.gspo()], ids=["token", "sequence"])
def test_without_metrics(backend, device, config):
    """The loss and its gradients are the same bits, at every depth."""
    problem = Problem(torch.float32, device=device)
    (ids, old, advantages), named = problem.arguments(config)
    h, w, b = problem.leaves()
    lp, entropy = rk.token_logprobs(problem.logits(), ids, mask=problem.mask, with_entropy=True, backend=backend)
    tokens = {name: x for name, x in named.items() if name not in (*problem.scaling, "validate", "backend")}
    lp, logits = lp.detach().requires_grad_(), problem.logits().detach().requires_grad_()
    for f, leaves in (
        (lambda **o: rk.policy_loss(lp, old, advantages, entropy=entropy, **tokens, **o), [lp]),
        (lambda **o: rk.fused_policy_loss(logits, ids, old, advantages, **named, **o), [logits]),
        (lambda **o: rk.fused_linear_policy_loss(h, w, ids, old, advantages, bias=b, **named, **o), [h, w, b]),
    ):
        full, bare = (f(backend=backend, with_metrics=with_metrics) for with_metrics in (True, False))
        assert full.metrics
        assert bare.metrics == {}
        assert torch.equal(full.loss, bare.loss)
        for x, y in zip(torch.autograd.grad(full.loss, leaves), torch.autograd.grad(bare.loss, leaves), strict=True):
            assert torch.equal(x, y)
