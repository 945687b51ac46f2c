"""Full KL, reverse KL and generalised JSD: both backends against the float64 reference, identities of divergences, promises of the interface."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkern as rk
from bench.harness import memory
from rlkern import reference
from rlkern.ops import divergence as ops
from rlkern.ops import head as head_ops
from rlkern.ops.head import Head, Needs, Work

from .judge import assert_accurate, opcheck, rounding

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# By the weight of the teacher in the mixture, which says it all: 0 is KL(ref || policy), 1 KL(policy || ref).
BETAS = [0.0, 0.3, 1.0]


def eager(logits, ref_logits, beta, mask=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """What a user writes, in the dtype of the logits (GKD's loss as TRL has it): the error of this is what ours is judged by."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.unsqueeze(-1).to(logits.dtype)
    capped = [x if softcap is None else softcap * torch.tanh(x / softcap) for x in (logits, ref_logits)]
    student, teacher = (torch.log_softmax(x * logit_scale / temperature, -1) for x in capped)

    def kl(target, x):
        return torch.nn.functional.kl_div(x, target, reduction="none", log_target=True)

    if beta == 0:
        terms = kl(teacher, student)
    elif beta == 1:
        terms = kl(student, teacher)
    else:
        mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
        terms = beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
    return terms.sum(-1) if mask is None else terms.sum(-1) * (mask != 0)


def gradient(function, logits, upstream):
    logits = logits.detach().clone().requires_grad_()
    result = function(logits)
    return result.detach(), torch.autograd.grad((result.double() * upstream).sum(), logits)[0]


def two_models(*shape, dtype=torch.float32, device="cpu", apart=1.0, spread=4.0):
    x = torch.randn(shape, device=device) * spread
    return x.to(dtype), (x + torch.randn(shape, device=device) * apart).to(dtype)


OPTIONS = {
    "plain": {},
    "everything": {"temperature": "tensor", "softcap": 15.0, "logit_scale": 0.6, "mask": "tensor"},
}


def with_tensors(options, shape, device):
    tensors = {"temperature": torch.rand(shape, device=device) + 0.5, "mask": torch.rand(shape, device=device) > 0.3}
    return {name: tensors[name] if value == "tensor" else value for name, value in options.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(backend, device, dtype, beta, options):
    shape, vocabulary = (2, 3), 999
    x, y = two_models(*shape, vocabulary, dtype=dtype, device=device)
    x[1] *= 3  # peaked, and far apart
    options = with_tensors(options, shape, device)
    upstream = torch.randn(shape, dtype=torch.float64, device=device)
    exact = gradient(lambda z: reference.generalized_jsd(z, y.double(), beta=beta, **options), x.double(), upstream)
    peer = gradient(lambda z: eager(z, y, beta, **options), x, upstream)
    mine = gradient(lambda z: rk.generalized_jsd(z, y, beta=beta, backend=backend, **options), x, upstream)
    assert mine[0].dtype == torch.float32
    assert mine[1].dtype == dtype
    assert_accurate(mine[0], exact[0], eps=2e-6 + 1e-6 * float(exact[0].max()))  # whatever plain PyTorch's error is
    assert_accurate(mine[1], exact[1], peer[1], eps=1e-6 + rounding(dtype, exact[1]))


@pytest.mark.parametrize("reverse", [False, True])
def test_full_kl_is_an_end_of_jsd(backend, device, reverse):
    x, y = two_models(5, 300, device=device)
    kl = rk.full_kl(x, y, reverse=reverse, backend=backend)
    assert torch.equal(kl, rk.generalized_jsd(x, y, beta=0 if reverse else 1, backend=backend))
    p, q = (z.double().softmax(-1) for z in ((y, x) if reverse else (x, y)))
    assert_accurate(kl, (p * (p.log() - q.log())).sum(-1), eps=2e-6)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocabulary=st.sampled_from([1, 2, 127, 128, 129, 1000]),
    dtype=st.sampled_from(DTYPES),
    ref_dtype=st.sampled_from(DTYPES),
    beta=st.sampled_from([0.0, 0.01, 0.5, 0.9, 1.0]),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    apart=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    offset=st.sampled_from([0.0, 1000.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(rows, vocabulary, dtype, ref_dtype, beta, spread, apart, offset, seed):
    torch.manual_seed(seed)
    x, y = two_models(rows, vocabulary, spread=spread, apart=apart)
    x, y = (x + offset).to(dtype), y.to(ref_dtype)
    both = (torch.rand(vocabulary) < 0.2) & (torch.arange(vocabulary) > 0)  # tokens that neither side has
    x[:, both], y[:, both] = -torch.inf, -torch.inf
    mask = torch.rand(rows) > 0.3
    upstream = torch.randn(rows, dtype=torch.float64)
    exact = gradient(lambda z: reference.generalized_jsd(z, y.double(), beta=beta, mask=mask), x.double(), upstream)
    for backend in ("torch", "triton"):
        mine = gradient(lambda z, b=backend: rk.generalized_jsd(z, y, beta=beta, mask=mask, backend=b), x, upstream)
        assert_accurate(mine[0], exact[0], eps=3e-6 + 1e-6 * float(exact[0].abs().sum()))
        assert_accurate(mine[1], exact[1], eps=4e-5 + 4e-6 * float(exact[1].abs().sum()) + rounding(dtype, exact[1]))


def test_identities(backend, device):
    x, y = two_models(6, 500, device=device)

    def jsd(a, b, beta):
        return rk.generalized_jsd(a, b, beta=beta, backend=backend)

    for beta in BETAS:
        assert torch.all(jsd(x, x, beta) == 0)  # of a distribution from itself, without rounding
        assert torch.all(jsd(x, y, beta) > 0)
        assert_accurate(jsd(x + 3.0, y - 700.0, beta), jsd(x, y, beta), eps=4e-5)  # float32 near 700 is rounded to 6e-5
        assert_accurate(jsd(y, x, 1 - beta), jsd(x, y, beta), eps=1e-6)  # p and q change sides
    apart = torch.full((1, 8), -torch.inf, device=device)
    left, right = apart.clone(), apart.clone()
    left[:, :4], right[:, 4:] = 0.0, 1.0
    assert_accurate(jsd(left, right, 0.5), torch.tensor([math.log(2)]), eps=1e-6)  # its upper bound, of disjoint supports
    # Near the student the JSD is beta (1 - beta) / 2 times chi-squared, and KL half of that.
    near = x + 0.01 * torch.randn_like(x)
    p, q = (z.double().softmax(-1) for z in (x, near))
    chi = ((p - q).square() / p).sum(-1)
    assert_accurate(jsd(x, near, 0.5), chi / 8, eps=1e-6)
    assert_accurate(jsd(x, near, 1.0), chi / 2, eps=2e-6)


def test_a_coin(backend, device):
    """p = (3/4, 1/4), q = (1/2, 1/2), by hand."""
    x = torch.tensor([[math.log(3.0), 0.0]], device=device)
    y = torch.zeros(1, 2, device=device)
    assert rk.full_kl(x, y, backend=backend).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert rk.full_kl(x, y, reverse=True, backend=backend).item() == pytest.approx(-0.5 * math.log(1.5) - 0.5 * math.log(0.5), abs=1e-6)
    m = (0.9 * 0.75 + 0.1 * 0.5, 0.9 * 0.25 + 0.1 * 0.5)
    teacher = 0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
    student = 0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1])
    assert rk.generalized_jsd(x, y, beta=0.1, backend=backend).item() == pytest.approx(0.1 * teacher + 0.9 * student, abs=1e-6)


def test_estimators_sample_it(backend, device):
    x, y = two_models(1, 40, spread=1.0, apart=0.5, device=device)
    log_p, log_q = torch.log_softmax(x[0], -1), torch.log_softmax(y[0], -1)
    k3 = rk.kl_penalty(log_p, log_q, "k3")
    assert_accurate((log_p.exp() * k3).sum(), rk.full_kl(x, y, backend=backend)[0], eps=1e-6)


def test_masked_positions_are_never_read_and_give_zero(backend, device):
    x, y = two_models(4, 200, device=device)
    x[1], y[1], y[2] = torch.nan, torch.inf, torch.nan
    mask = torch.tensor([2, 0, 0, 1], device=device)
    for beta in BETAS:
        result, grad = gradient(
            lambda z, b=beta: rk.generalized_jsd(z, y, beta=b, mask=mask, backend=backend), x, torch.ones(4, dtype=torch.float64, device=device)
        )
        assert result[1:3].tolist() == [0.0, 0.0]
        assert torch.all(grad[1:3] == 0)
        assert torch.isfinite(grad).all()
        assert torch.all(grad[[0, 3]].abs().sum(-1) > 0)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_infinite_logits(backend, device, softcap):
    x, y = two_models(8, 700, device=device)
    x[0, :530], y[0, :530] = -torch.inf, -torch.inf  # a leading block of both
    x[1, 3] = -torch.inf  # p = 0 < q
    y[2, 3] = -torch.inf  # q = 0 < p
    y[3, :600] = -torch.inf
    x[3, :600] = x[3, :600] - 1e4 if softcap is None else x[3, :600]  # though p rounds to 0, and later logits are larger
    y[4] = -torch.inf
    x[5] = -torch.inf
    y[6, 9] = torch.nan
    x[7, 9] = torch.nan if softcap is not None else torch.inf
    broken, ones = [4, 5, 6, 7], torch.ones(8, dtype=torch.float64, device=device)
    for beta, infinite in ((1.0, [2, 3]), (0.0, [1]), (0.3, [])):
        result, grad = gradient(lambda z, b=beta: rk.generalized_jsd(z, y, beta=b, softcap=softcap, backend=backend), x, ones)
        assert result.isinf().nonzero().flatten().tolist() == infinite
        assert result.isnan().nonzero().flatten().tolist() == broken
        finite = [i for i in range(4) if i not in infinite]
        x_ok, y_ok = x[finite].double(), y[finite].double()
        exact = gradient(lambda z, b=beta, y=y_ok: reference.generalized_jsd(z, y, beta=b, softcap=softcap), x_ok, ones[finite])
        assert_accurate(result[finite], exact[0], eps=1e-5)
        assert_accurate(grad[finite], exact[1], eps=1e-6)
        assert torch.all(grad[0, :530] == 0)
        assert grad[1, 3] == 0  # though the divergence may be infinite
        assert torch.isnan(grad[broken]).all()


@pytest.mark.parametrize("beta", BETAS)
def test_large_gradients_pass_infinite_logits(backend, device, beta):
    """A loss may be scaled by 2^40: where a probability is 0 so is the gradient, and all others scale with it."""
    x, y = two_models(4, 700, device=device)
    x[0, :530], y[0, :530] = -torch.inf, -torch.inf
    x[1, 3:9] = -torch.inf if beta > 0 else -1e4  # p = 0 < q
    y[2, 3:9] = -torch.inf if beta < 1 else -1e4
    ones = torch.ones(4, dtype=torch.float64, device=device)
    _, grad = gradient(lambda z: rk.generalized_jsd(z, y, beta=beta, backend=backend), x, ones)
    _, large = gradient(lambda z: rk.generalized_jsd(z, y, beta=beta, backend=backend), x, ones * 2**40)
    assert torch.isfinite(grad).all()
    assert torch.equal(large, grad * 2**40)


def test_masks_by_the_least_number_are_no_infinities(backend, device):
    """Where the reference is masked by it and p rounds to 0, nothing is infinite; nor where both are masked so."""
    x, y = two_models(3, 700, device=device)
    least = torch.finfo(torch.float32).min
    x[0, :90], y[0, :90] = -1e9, least
    x[1, 40:], y[1, 40:] = least, least
    x[2, 3], y[2, 3] = -torch.inf, -torch.inf  # beside it in a lane, maybe
    x[2, 4], y[2, 4] = -1e9, least
    ones = torch.ones(3, dtype=torch.float64, device=device)
    for beta in (1.0, 0.0, 0.3):
        result, grad = gradient(lambda z, b=beta: rk.generalized_jsd(z, y, beta=b, backend=backend), x, ones)
        exact = gradient(lambda z, b=beta: reference.generalized_jsd(z, y.double(), beta=b), x.double(), ones)
        assert_accurate(result, exact[0], eps=1e-5)
        assert_accurate(grad, exact[1], eps=1e-6)


def test_a_row_does_not_depend_on_the_others(backend, device):
    if backend == "torch" and device.type == "cuda":
        pytest.skip("there PyTorch's own sums depend on how many rows there are")
    x, y = two_models(6, 3000, device=device)
    for beta in (0.3, 1.0):
        together = rk.generalized_jsd(x, y, beta=beta, backend=backend)
        for rows in ([0], [3, 5]):
            assert torch.equal(rk.generalized_jsd(x[rows], y[rows], beta=beta, backend=backend), together[rows])
        mask = torch.arange(6, device=device) == 4
        assert torch.equal(rk.generalized_jsd(x, y, beta=beta, mask=mask, backend=backend)[4], together[4])


def test_slices_are_read_in_place(backend, device):
    whole, other = two_models(2, 4, 40, device=device)
    slices = [
        lambda z: z[:, :-1],
        lambda z: z[:, ::2],
        lambda z: z[..., :33],
        lambda z: z.transpose(0, 1),
        lambda z: z[:, 2],
    ]
    for cut in slices:
        x, y = cut(whole).detach().requires_grad_(), cut(other)
        for a, b in ((x, y), (x.detach().contiguous().requires_grad_(), y)):
            exact = reference.generalized_jsd(a, b, beta=0.3)
            mine = rk.generalized_jsd(a, b, beta=0.3, backend=backend)
            assert_accurate(mine, exact, eps=1e-6)
            (g,) = torch.autograd.grad(exact.square().sum(), a)
            assert_accurate(torch.autograd.grad(mine.square().sum(), a)[0], g, eps=1e-6)


def test_gradients_flow_to_the_policy_alone(backend, device):
    x, y = (z.requires_grad_() for z in two_models(2, 3, 50, device=device))
    before = x.detach().clone(), y.detach().clone()
    rk.full_kl(x, y, backend=backend).sum().backward()
    assert y.grad is None
    assert torch.equal(x.detach(), before[0])
    assert torch.equal(y.detach(), before[1])


def test_gradcheck():
    x, y = two_models(2, 3, 7, dtype=torch.float64, spread=1.0)
    x.requires_grad_()
    temperature, mask = torch.rand(2, 3, dtype=torch.float64) + 0.5, torch.tensor([[1, 1, 0], [1, 1, 1]])
    for beta in BETAS:
        for options in ({}, {"temperature": temperature, "softcap": 2.0, "logit_scale": 0.5, "mask": mask}):
            assert torch.autograd.gradcheck(lambda z, b=beta, o=options: rk.generalized_jsd(z, y, beta=b, **o), (x,))


def test_float64_stays_float64(device):
    x, y = two_models(4, 100, dtype=torch.float64, device=device)
    for beta in BETAS:
        mine = rk.generalized_jsd(x, y.float(), beta=beta, backend="torch")
        assert mine.dtype == torch.float64
        assert_accurate(mine, reference.generalized_jsd(x, y.float().double(), beta=beta), eps=1e-13)
    with pytest.raises(ValueError, match=r"'triton' cannot run here: its kernel takes .* not torch.float64"):
        rk.full_kl(x.float(), y, backend="triton")


def test_double_backward_is_an_error(backend, device):
    x, y = two_models(2, 30, device=device)
    x.requires_grad_()
    (g,) = torch.autograd.grad(rk.full_kl(x, y, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        g.sum().backward()


def test_empty_batch(backend, device):
    for shape in ((0, 4), (2, 0), (0,)):
        x = torch.randn(*shape, 10, device=device, requires_grad=True)
        result = rk.generalized_jsd(x, torch.randn(*shape, 10, device=device), backend=backend)
        result.sum().backward()
        assert result.shape == shape
        assert x.grad.shape == x.shape


# ---- from hidden states ---------------------------------------------------------------------------------------------------------------------

SHAPE, H, H_REF, V = (3, 6), 12, 7, 70


class Problem:
    """Hidden states, heads and biases of two models of different widths."""

    def __init__(self, dtype=torch.float64, *, head=None, device="cpu"):
        def normal(*shape, dtype=dtype):
            return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

        self.policy = normal(*SHAPE, H), normal(V, H, dtype=head or dtype), normal(V, dtype=head or dtype)
        self.ref = normal(*SHAPE, H_REF), normal(V, H_REF), normal(V)
        self.mask = torch.rand(SHAPE, device=device) > 0.3
        self.upstream = torch.randn(SHAPE, dtype=torch.float64, device=device)

    def leaves(self, dtype=None, *, takes=(1, 1, 1)):
        return [t.to(dtype or t.dtype).detach().clone().requires_grad_(bool(taken)) for t, taken in zip(self.policy, takes, strict=True)]

    def exact(self, beta, takes=(1, 1, 1), **options):
        leaves = self.leaves(torch.float64, takes=takes)
        logits, ref_logits = (h @ w.t() + b for h, w, b in (leaves, [t.double() for t in self.ref]))
        result = reference.generalized_jsd(logits, ref_logits, beta=beta, mask=self.mask, **options)
        return result, torch.autograd.grad((result * self.upstream).sum(), [t for t in leaves if t.requires_grad])

    def run(self, beta, takes=(1, 1, 1), mask="own", **options):
        leaves = self.leaves(takes=takes)
        h, w, b = leaves
        rh, rw, rb = self.ref
        mask = self.mask if isinstance(mask, str) else mask
        result = rk.linear_generalized_jsd(h, w, rh, rw, beta=beta, bias=b, ref_bias=rb, mask=mask, **options)
        return result, torch.autograd.grad((result.double() * self.upstream).sum(), [t for t in leaves if t.requires_grad])


@pytest.mark.parametrize("options", [{}, {"compact": False}, {"compact": True}, {"chunk_bytes": 4 * V * 8}, {"mode": "recompute"}], ids=str)
@pytest.mark.parametrize("takes", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (1, 0, 1)], ids=str)
def test_linear(takes, options):
    problem = Problem()
    for beta in (0.0, 0.3, 1.0):
        for scaling in ({}, {"temperature": torch.rand(SHAPE) + 0.5, "softcap": 9.0, "logit_scale": 0.7}):
            exact, grads = problem.exact(beta, takes, **scaling)
            mine, my_grads = problem.run(beta, takes, **scaling, **options)
            assert_accurate(mine, exact, eps=1e-12)
            for x, y in zip(my_grads, grads, strict=True):
                assert_accurate(x, y, eps=1e-12)


@pytest.mark.parametrize(("dtype", "head"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_linear_dtypes(backend, device, dtype, head, logits_dtype):
    problem = Problem(dtype, head=head, device=device)
    for takes in ((1, 1, 1), (1, 0, 0)):
        exact, grads = problem.exact(0.5, takes)
        mine, my_grads = problem.run(0.5, takes, logits_dtype=logits_dtype, backend=backend, chunk_bytes=5 * V * 4)
        assert mine.dtype == torch.float32
        unrounded = dtype == torch.float32 or logits_dtype == torch.float32
        assert_accurate(mine, exact, eps=1e-5 if unrounded else 0.1)
        for x, y, leaf in zip(my_grads, grads, problem.leaves(), strict=False):
            assert x.dtype == leaf.dtype
            assert_accurate(x, y, eps=(1e-5 if dtype == torch.float32 else 0.02) * float(y.abs().max()) + rounding(x.dtype, y))


def test_linear_kl_is_that_of_the_logits(backend, device):
    problem = Problem(torch.float32, device=device)
    (h, w, b), (rh, rw, rb) = problem.policy, problem.ref
    for reverse in (False, True):
        mine = rk.linear_full_kl(h, w, rh, rw, bias=b, ref_bias=rb, reverse=reverse, backend=backend)
        assert_accurate(mine, rk.full_kl(h @ w.t() + b, rh @ rw.t() + rb, reverse=reverse, backend=backend), eps=2e-5)


def test_rows_are_all_that_is_computed():
    problem = Problem()
    rows = torch.tensor([1, 5, 8, 13])
    problem.mask = torch.zeros(18, dtype=torch.bool).index_fill_(0, rows, True).view(SHAPE)
    for takes in ((1, 1, 1), (1, 0, 0)):
        by_mask = problem.run(0.3, takes)
        by_rows = problem.run(0.3, takes, mask=None, rows=rows.int(), compact=False)
        for x, y in zip((by_rows[0], *by_rows[1]), (by_mask[0], *by_mask[1]), strict=True):
            assert_accurate(x, y, eps=1e-13)


def test_linear_masked_rows_are_not_read():
    problem = Problem()
    problem.policy[0][~problem.mask] = torch.nan
    problem.ref[0][~problem.mask] = torch.nan
    result, grads = problem.run(0.3)
    assert torch.all(result[~problem.mask] == 0)
    assert all(torch.isfinite(g).all() for g in grads)


def test_linear_memory_does_not_grow_with_the_rows():
    width, vocabulary, chunk = 16, 2000, 64 * 2000 * 4
    w, rw = torch.randn(2, vocabulary, width)
    extra = []
    for rows in (256, 1024):
        h, rh = torch.randn(2, rows, width)
        extra.append(memory(lambda h=h, rh=rh: [rk.linear_full_kl(h, w, rh, rw, chunk_bytes=chunk)], h.device)[0])
    assert extra[1] - extra[0] < 768 * 4 * 16  # the per-token tensors
    assert extra[0] < 10 * chunk  # of two buffers, and blocks of rows that fit the cache


def test_linear_products():
    """How often the logits of a model are multiplied: those of the reference need no gradient."""
    problem = Problem()
    problem.mask = torch.ones(SHAPE)
    products = []
    original = head_ops.product

    def counted(a, b, out, **named):
        products.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        original(a, b, out, **named)

    (h, w, _), (rh, rw, _) = problem.policy, problem.ref
    policy, ref = 2 * 18 * H * V, 2 * 18 * H_REF * V
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_ops, "product", counted)
        for takes, expected in (((0, 0), policy + ref), ((1, 0), 2 * policy + ref), ((1, 1), 4 * policy + 2 * ref)):
            products.clear()
            hidden, weight = (t.detach().requires_grad_(bool(taken)) for t, taken in zip((h, w), takes, strict=True))
            result = rk.linear_full_kl(hidden, weight, rh, rw).sum()
            if result.requires_grad:
                result.backward()
            assert sum(products) == expected


def test_linear_empty_batch(backend, device):
    w, rw = torch.randn(V, H, device=device, requires_grad=True), torch.randn(V, H_REF, device=device)
    for shape in ((0, 4), (2, 0), (0,)):
        h = torch.randn(*shape, H, device=device, requires_grad=True)
        result = rk.linear_full_kl(h, w, torch.randn(*shape, H_REF, device=device), rw, backend=backend)
        result.sum().backward()
        assert result.shape == shape
        assert h.grad.shape == h.shape
        assert torch.all(w.grad == 0)


# ---- the interface --------------------------------------------------------------------------------------------------------------------------


def test_compile(backend, device):
    x, y = two_models(3, 4, 50, device=device)
    problem = Problem(torch.float32, device=device)
    rh, rw, _ = problem.ref

    def from_logits(z):
        return rk.generalized_jsd(z, y, beta=0.3, temperature=0.8, backend=backend).square().sum()

    def from_hidden(h, w):
        return rk.linear_full_kl(h, w, rh, rw, mask=problem.mask, backend=backend).square().sum()

    for f, leaves in ((from_logits, [x.requires_grad_()]), (from_hidden, problem.leaves()[:2])):
        expected = torch.autograd.grad(f(*leaves), leaves)
        for a, b in zip(torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves), leaves), expected, strict=True):
            assert torch.equal(a, b)


def test_opcheck(backend, device):
    x, y = two_models(3, 4, 50, device=device)
    mask, temperature = torch.ones(3, 4, device=device), torch.full((3, 4), 0.7, device=device)
    forward = (x, y, ops.Comparison(mask, temperature, 1.0, 30.0, 0.3, backend))
    opcheck(ops.divergence_op, *forward)
    found = ops.divergence_op(*forward)
    opcheck(ops.divergence_backward_op, *forward, found.statistics, found.divergence)

    problem = Problem(torch.float32, device=device)
    policy, ref = (Head(h.flatten(0, 1), w, b, torch.float32) for h, w, b in (problem.policy, problem.ref))
    rows = torch.arange(4, 12, device=device)
    forward = (policy, ref, Work(rows, False, 5), ops.Comparison(problem.mask.view(-1), None, 1.0, None, 0.3, backend))
    opcheck(ops.linear_divergence_op, *forward, True)
    found = ops.linear_divergence_op(*forward, False)
    opcheck(ops.linear_divergence_backward_op, *forward, found.statistics, found.divergence, Needs(True, True, True))


def test_autocast_does_not_lower_the_precision(backend, device):
    x, y = two_models(3, 500, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        mine = rk.full_kl(x, y, backend=backend)
    assert torch.equal(mine, rk.full_kl(x, y, backend=backend))


X = torch.zeros(2, 3, 5)
HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], X), {}, TypeError, "logits must be a torch.Tensor, got list"),
        ((torch.zeros(5), X), {}, ValueError, "at least 2 dimensions"),
        ((X[..., :0], X[..., :0]), {}, ValueError, "vocabulary of at least 1"),
        ((X, X.int()), {}, TypeError, "ref_logits must have a dtype of"),
        ((X, X[..., :4]), {}, ValueError, r"ref_logits must have shape \(2, 3, 5\), got \(2, 3, 4\)"),
        ((X, X.to("meta")), {}, ValueError, "ref_logits must be on cpu"),
        ((X, X), {"mask": torch.ones(2)}, ValueError, "mask must have shape"),
        ((X, X), {"temperature": 0.0}, ValueError, "temperature must be a number > 0"),
        ((X, X), {"softcap": -1.0}, ValueError, "softcap must be a number > 0"),
        ((X, X), {"beta": 1.5}, ValueError, "beta must be a number >= 0 and <= 1, got 1.5"),
        ((X, X), {"beta": "half"}, TypeError, "beta must be a number"),
        ((X, X), {"backend": "cuda"}, ValueError, "expected one of"),
        ((HIDDEN, WEIGHT, HIDDEN[:1], WEIGHT), {}, ValueError, r"ref_hidden must have shape \(2, 3, 4\), got \(1, 3, 4\)"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT[:, :3]), {}, ValueError, r"ref_weight must have shape \[V, 4\]"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT[:4]), {}, ValueError, r"ref_weight must have shape \(5, 4\), got \(4, 4\)"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"ref_bias": torch.zeros(4)}, ValueError, "ref_bias must have shape"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"rows": torch.tensor([6])}, ValueError, r"rows must be different positions in \[0, 6\)"),
        ((HIDDEN, WEIGHT.clone().requires_grad_(), HIDDEN, WEIGHT), {"mode": "frozen-head"}, ValueError, "take no gradient"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"chunk_bytes": 0}, ValueError, "chunk_bytes must be a positive number"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        (rk.generalized_jsd if len(arguments) == 2 else rk.linear_generalized_jsd)(*arguments, **options)


@pytest.mark.gpu
def test_cuda_graph():
    x, y = two_models(8, 40_000, device="cuda")
    x.requires_grad_()

    def step():
        (g,) = torch.autograd.grad(rk.generalized_jsd(x, y).sum(), x)
        return g

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        g = step()
    graph.replay()
    assert torch.equal(g, expected)


@pytest.mark.parametrize("beta", BETAS)
def test_maxima_that_rise_from_block_to_block(beta, backend, device):
    """Of either row alone, or of both: a row of several blocks of the kernel."""
    rise = torch.linspace(0.0, 20.0, 9000, device=device)
    noise = torch.randn(3, 9000, device=device)
    x, y = (
        noise + rise * torch.tensor([[1.0], [0.0], [1.0]], device=device),
        noise.flip(1) + rise * torch.tensor([[0.0], [1.0], [1.0]], device=device),
    )
    exact = reference.generalized_jsd(x.double(), y.double(), beta=beta)
    peer = reference.generalized_jsd(x, y, beta=beta)
    assert_accurate(rk.generalized_jsd(x, y, beta=beta, backend=backend), exact, peer, eps=1e-5)
