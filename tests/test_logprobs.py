"""token_logprobs: values and gradients of both backends against the float64 reference, and the promises of the interface."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkern as rk
from rlkern import reference
from rlkern.ops import logits as ops
from rlkern.ops.backends import backend_of

from .judge import assert_accurate, opcheck, rounding

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(logits, ids, temperature=1.0, softcap=None, logit_scale=1.0):
    """What a user writes, in the dtype of the logits: the error of this is what ours is judged by."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.unsqueeze(-1).to(logits.dtype)
    logp = torch.log_softmax(logits * logit_scale / temperature, -1)
    # 0 * -inf would be NaN
    return logp.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)


def gradients(function, logits, a, b):
    logits = logits.detach().clone().requires_grad_()
    logprobs, entropy = function(logits)
    ((logprobs.double() * a).sum() + (entropy.double() * b).sum()).backward()
    return logprobs.detach(), entropy.detach(), logits.grad


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "temperature per token": {"temperature": "tensor"},
    "softcap": {"softcap": 20.0},
    "everything": {"temperature": "tensor", "softcap": 15.0, "logit_scale": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(backend, device, dtype, options):
    shape, vocabulary = (3, 4), 999
    logits = (torch.randn(*shape, vocabulary, device=device) * 4).to(dtype)
    logits[1] *= 5  # peaked: gradients that matter
    ids = torch.randint(vocabulary, shape, device=device)
    options = dict(options)
    if options.get("temperature") == "tensor":
        options["temperature"] = torch.rand(shape, device=device) + 0.5
    a, b = torch.randn(2, *shape, dtype=torch.float64, device=device)
    exact = gradients(lambda x: reference.token_logprobs(x, ids, with_entropy=True, **options), logits.double(), a, b)
    peer = gradients(lambda x: eager(x, ids, **options), logits, a, b)
    mine = gradients(lambda x: rk.token_logprobs(x, ids, with_entropy=True, backend=backend, **options), logits, a, b)
    assert mine[0].dtype == mine[1].dtype == torch.float32
    assert mine[2].dtype == dtype
    # whatever plain PyTorch's error is: 1e-5, and the rounding of log-probs of hundreds
    assert_accurate(mine[0], exact[0], eps=1e-5 + 2 * rounding(torch.float32, exact[0]))
    assert_accurate(mine[1], exact[1], eps=1e-5)
    assert_accurate(mine[2], exact[2], peer[2], eps=1e-6 + rounding(dtype, exact[2]))


def test_segments_of_a_long_row_are_merged(backend, device):
    vocabulary = 2 * 32768 + 77
    logits = torch.randn(3, vocabulary, device=device) * 3
    logits[1, : 32768 + 5] = -torch.inf  # a whole leading segment, and a part of the next
    ids = torch.tensor([0, vocabulary - 1, 40000], device=device)
    a, b = torch.randn(2, 3, dtype=torch.float64, device=device)
    exact = gradients(lambda x: reference.token_logprobs(x, ids, with_entropy=True), logits.double(), a, b)
    mine = gradients(lambda x: rk.token_logprobs(x, ids, with_entropy=True, backend=backend), logits, a, b)
    for x, y in zip(mine, exact, strict=True):
        assert_accurate(x, y, eps=5e-6)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocabulary=st.sampled_from([1, 2, 3, 127, 128, 129, 1000]),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
    spread=st.sampled_from([0.1, 3.0, 60.0]),
    offset=st.sampled_from([0.0, 1000.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(rows, vocabulary, dtype, index, spread, offset, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = (torch.randn(rows, vocabulary, device=device) * spread + offset).to(dtype)
    ids = torch.randint(vocabulary, (rows,), dtype=index, device=device)
    mask = torch.rand(rows, device=device) > 0.3
    a, b = torch.randn(2, rows, dtype=torch.float64, device=device)
    exact = gradients(lambda x: reference.token_logprobs(x, ids, mask=mask, with_entropy=True), logits.double(), a, b)
    peer = gradients(lambda x: eager(torch.where(mask[:, None], x, 0.0), ids), logits, a * mask, b * mask)
    for backend in ("torch", "triton"):
        mine = gradients(lambda x, backend=backend: rk.token_logprobs(x, ids, mask=mask, with_entropy=True, backend=backend), logits, a, b)
        assert_accurate(mine[0], exact[0], eps=1e-5 + 1e-7 * float(exact[0].abs().sum()))
        assert_accurate(mine[1], exact[1], eps=1e-5)
        assert_accurate(mine[2], exact[2], peer[2], eps=2e-5 + rounding(dtype, exact[2]))


def test_bf16_is_within_1e_5_of_float64(backend, device):
    logits = (torch.randn(8, 4000, device=device) * 8).bfloat16()
    ids = torch.randint(4000, (8,), device=device)
    exact = torch.log_softmax(logits.double(), -1).gather(-1, ids[:, None])[:, 0]
    assert_accurate(rk.token_logprobs(logits, ids, backend=backend), exact, eps=1e-5)
    assert (torch.log_softmax(logits, -1).gather(-1, ids[:, None])[:, 0] - exact).abs().max() > 1e-3  # as the usual path is not


def test_masked_positions_are_never_read_and_give_zero(backend, device):
    logits = torch.randn(4, 200, device=device)
    logits[1], logits[2] = torch.nan, torch.inf
    logits.requires_grad_()
    ids = torch.tensor([5, 10**6, -100, 7], device=device)
    mask = torch.tensor([2, 0, 1, 1], device=device)
    logprobs, entropy = rk.token_logprobs(logits, ids, mask=mask, with_entropy=True, backend=backend)
    assert logprobs[1:3].tolist() == entropy[1:3].tolist() == [0.0, 0.0]
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.all(logits.grad[1:3] == 0)
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_mask_of_any_dtype(backend, device, dtype):
    logits, ids = torch.randn(4, 50, device=device), torch.arange(4, device=device)
    mask = torch.tensor([1, 0, 1, 0], device=device).to(dtype)
    logprobs = rk.token_logprobs(logits, ids, mask=mask, backend=backend)
    assert (logprobs == 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_infinite_logits(backend, device, softcap):
    logits = torch.randn(6, 300, device=device)
    logits[0, :130] = -torch.inf  # a leading block
    logits[1, 7] = -torch.inf  # the target
    logits[2] = -torch.inf
    logits[3, 5] = torch.nan
    if softcap is None:
        logits[4, 5] = torch.inf
    ids = torch.tensor([200, 7, 7, 7, 7, 7], device=device)
    a, b = torch.ones(2, 6, dtype=torch.float64, device=device)
    options = {"softcap": softcap, "with_entropy": True}
    logprobs, entropy, grad = gradients(lambda x: rk.token_logprobs(x, ids, backend=backend, **options), logits, a, b)
    exact = reference.token_logprobs(logits.double(), ids, **options)
    assert_accurate(logprobs, exact[0], eps=1e-5)
    assert_accurate(entropy, exact[1], eps=1e-5)
    assert logprobs[1] == -torch.inf
    assert torch.isnan(logprobs).nonzero().flatten().tolist() == ([2, 3, 4] if softcap is None else [2, 3])
    assert torch.all(grad[0, :130] == 0)
    assert torch.isfinite(grad[[0, 1, 5]]).all()
    assert torch.isnan(grad[2:4]).all()


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_large_gradients_pass_infinite_logits(backend, device, softcap):
    """A loss may be scaled by 2^40: where a probability is 0 so is the gradient, and all others scale with it."""
    logits, ids = torch.randn(4, 300, device=device), torch.tensor([200, 7, 7, 7], device=device)
    logits[:, 8:130] = -torch.inf
    logits[1, 130:200] = -1e4
    ones, options = torch.ones(4, dtype=torch.float64, device=device), {"softcap": softcap, "with_entropy": True}
    _, _, grad = gradients(lambda x: rk.token_logprobs(x, ids, backend=backend, **options), logits, ones, ones)
    _, _, large = gradients(lambda x: rk.token_logprobs(x, ids, backend=backend, **options), logits, ones * 2**40, ones * 2**40)
    assert torch.isfinite(grad).all()
    assert torch.equal(large, grad * 2**40)


def test_id_outside_the_vocabulary(backend, device):
    logits, ids = torch.randn(2, 3, 10, device=device), torch.zeros(2, 3, dtype=torch.long, device=device)
    ids[1, 2] = 10
    with pytest.raises(ValueError, match=r"ids\[1, 2\] is 10, outside the vocabulary \[0, 10\)"):
        rk.token_logprobs(logits, ids, validate=True, backend=backend)
    ids[0, 1] = -1
    logits.requires_grad_()
    logprobs, entropy = rk.token_logprobs(logits, ids, with_entropy=True, validate=False, backend=backend)
    broken = torch.tensor([[False, True, False], [False, False, True]], device=device)
    assert torch.equal(torch.isnan(logprobs), broken)
    assert torch.equal(torch.isnan(entropy), broken)
    logprobs.sum().backward()
    assert torch.equal(torch.isnan(logits.grad).all(-1), broken)
    assert torch.isfinite(logits.grad[~broken]).all()


MASKS = {
    "a prefix of each": torch.arange(40) < torch.tensor([[40], [23], [0], [1], [17]]),
    "a suffix of each": torch.arange(40) >= torch.tensor([[39], [23], [0], [1], [17]]),
    "scattered": (torch.arange(200) % 3 == 1).view(5, 40),
    "runs and single rows": ((torch.arange(200) % 50 < 25) | (torch.arange(200) % 7 == 0)).view(5, 40),
    "one row": (torch.arange(200) == 83).view(5, 40),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "slice"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_row_is_the_same_in_any_chunk(mask, sliced, dtype, monkeypatch):
    """Runs of live rows are walked as views, others as copies: log-prob and entropy are to the bit what each row gives among all."""
    logits = torch.randn(5, 40 + sliced, 300).to(dtype)
    logits = logits[:, :-1] if sliced else logits
    ids, upstream = torch.randint(300, (5, 40)), torch.randn(2, 5, 40, dtype=torch.float64)

    def call(x, mask):
        return gradients(lambda y: rk.token_logprobs(y, ids, mask=mask, temperature=0.7, with_entropy=True, backend="torch"), x, *upstream)

    among_all = call(logits, None)
    monkeypatch.setattr("rlkern.ops.torch_backend.logits.CHUNK", 32 * 300)
    masked = call(torch.where(mask[..., None], logits, torch.nan), mask)
    assert all(torch.equal(mine[mask], all_rows[mask]) for mine, all_rows in zip(masked[:2], among_all[:2], strict=True))
    assert_accurate(masked[2][mask], among_all[2][mask], eps=1e-6 + rounding(dtype, among_all[2]))
    assert not any(mine[~mask].any() for mine in masked)


@pytest.mark.parametrize("vocabulary", [33000, 33008])
def test_how_rows_are_aligned_does_not_depend_on_how_many_there_are(vocabulary):
    """The compiler lays out a row by what divides all strides, and so adds up in that order."""

    def aligned(x):
        return all(stride % 16 == 0 for stride in ops.as_rows(x).stride()[:2])

    batch = torch.empty(2, 16, vocabulary)
    one_level = batch.flatten(0, 1)
    few = [batch, batch[:1], batch[:, :1], batch[1:, 3:4], batch[:, :7], one_level, one_level[:1], one_level[5], one_level[[3]], one_level[[3, 9]]]
    assert {aligned(x) for x in few} == {vocabulary % 16 == 0}


def test_a_row_does_not_depend_on_the_others(backend, device):
    if backend == "torch" and device.type == "cuda":
        pytest.skip("there PyTorch's own sums depend on how many rows there are")
    logits, ids = torch.randn(9, 33000, device=device), torch.randint(33000, (9,), device=device)
    together = rk.token_logprobs(logits, ids, with_entropy=True, backend=backend)
    for rows in ([0], [8], [3, 8], [1, 2, 3, 4, 5]):
        alone = rk.token_logprobs(logits[rows], ids[rows], with_entropy=True, backend=backend)
        assert torch.equal(alone[0], together[0][rows])
        assert torch.equal(alone[1], together[1][rows])
    mask = torch.arange(9, device=device) == 4
    assert torch.equal(rk.token_logprobs(logits, ids, mask=mask, backend=backend)[4], together[0][4])


def test_slices_are_read_in_place(backend, device, monkeypatch):
    whole = torch.randn(3, 6, 40, device=device)
    slices = {
        "shifted": whole[:, :-1],
        "strided": whole[:, ::2],
        "padded vocabulary": whole[..., :33],
        "transposed batch": whole.transpose(0, 1),
        "column": whole[:, 2],
    }
    for name, logits in slices.items():
        assert ops.as_rows(logits).data_ptr() == logits.data_ptr(), name
        ids = torch.randint(33, logits.shape[:-1], device=device)
        logits = logits.detach().requires_grad_()
        exact = reference.token_logprobs(logits.double(), ids)
        mine = rk.token_logprobs(logits, ids, backend=backend)
        assert_accurate(mine, exact, eps=2e-6)
        (g,) = torch.autograd.grad(exact.square().sum(), logits)
        assert_accurate(torch.autograd.grad(mine.square().sum(), logits)[0], g, eps=1e-5)
    columns = whole.transpose(1, 2).contiguous().transpose(1, 2)  # no unit stride: copied, and still right
    ids = torch.randint(40, (3, 6), device=device)
    assert_accurate(rk.token_logprobs(columns, ids, backend=backend), reference.token_logprobs(whole, ids), eps=1e-6)
    apart = torch.randn(40, 3, 6, device=device).movedim(0, -1)  # here a reshape would give a view, whose columns still lie apart
    ids = torch.randint(40, (3, 6), device=device)
    assert_accurate(rk.token_logprobs(apart, ids, backend=backend), reference.token_logprobs(apart, ids), eps=1e-6)
    for unusual in (columns, apart):
        with pytest.raises(ValueError, match="inplace_backward=True needs logits with unit stride"):
            rk.token_logprobs(unusual, ids, inplace_backward=True, backend=backend)
    deep = torch.randn(2, 3, 2, 8, device=device)[:, :2, ::2]
    ids = torch.randint(8, deep.shape[:-1], device=device)
    assert_accurate(rk.token_logprobs(deep, ids, backend=backend), reference.token_logprobs(deep, ids), eps=1e-6)


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward(backend, device, sliced, dtype):
    data = torch.randn(2, 5, 70, device=device).to(dtype)
    ids, mask = torch.randint(70, (2, 4), device=device), torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]], device=device)
    results = {}
    for inplace in (False, True):
        leaf = data.clone().requires_grad_()
        logits = leaf * 1.0
        rows = logits[:, :-1] if sliced else logits[:, 1:].contiguous()
        address = rows.data_ptr()
        rk.token_logprobs(rows, ids, mask=mask, inplace_backward=inplace, softcap=5.0, backend=backend).square().sum().backward()
        results[inplace] = leaf.grad
        assert torch.equal(rows.detach(), (data[:, :-1] if sliced else data[:, 1:])) != inplace
        assert rows.data_ptr() == address
    assert torch.equal(results[False], results[True])


@pytest.mark.parametrize("rows", [1, 3])
def test_inplace_backward_of_a_last_row_alone(backend, device, rows):
    """The torch backend goes over a cache's worth of rows at a time; one may be left over."""
    x = torch.randn(rows, 128256, device=device, requires_grad=True)
    ids = torch.arange(rows, device=device)
    (expected,) = torch.autograd.grad(rk.token_logprobs(x, ids, backend=backend).sum(), x)
    (gradient,) = torch.autograd.grad(rk.token_logprobs(x * 1.0, ids, inplace_backward=True, backend=backend).sum(), x)
    assert torch.equal(gradient, expected)


def test_inplace_backward_is_noticed_by_other_users(backend, device):
    logits = torch.randn(2, 30, device=device, requires_grad=True) * 1.0
    other = logits.exp()
    shared = (logits * logits).sum()
    loss = rk.token_logprobs(logits, torch.tensor([1, 2], device=device), inplace_backward=True, backend=backend).sum()
    loss.backward(retain_graph=True)
    assert torch.isfinite(other).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        shared.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match="share memory"):
        rk.token_logprobs(
            torch.randn(1, 30, device=device).expand(2, 30), torch.tensor([1, 2], device=device), inplace_backward=True, backend=backend
        )


def test_gradcheck():
    logits = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(11, (2, 3))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    temperature = torch.rand(2, 3, dtype=torch.float64) + 0.5
    for options in ({}, {"temperature": temperature, "softcap": 2.0, "logit_scale": 0.5, "mask": mask}):
        assert torch.autograd.gradcheck(lambda x, o=options: rk.token_logprobs(x, ids, with_entropy=True, **o), (logits,))
        assert torch.autograd.gradcheck(lambda x, o=options: rk.token_logprobs(x, ids, **o), (logits,))


def test_float64_stays_float64(device):
    logits, ids = torch.randn(4, 100, dtype=torch.float64, device=device), torch.randint(100, (4,), device=device)
    mine = rk.token_logprobs(logits, ids, with_entropy=True, backend="torch")
    exact = reference.token_logprobs(logits, ids, with_entropy=True)
    assert mine[0].dtype == torch.float64
    assert_accurate(mine[0], exact[0], eps=1e-13)
    assert_accurate(mine[1], exact[1], eps=1e-13)
    with pytest.raises(ValueError, match=r"'triton' cannot run here: its kernel takes .* not torch.float64"):
        rk.token_logprobs(logits, ids, backend="triton")


def test_gradient_through_one_result_only(backend, device):
    logits = torch.randn(3, 64, device=device, requires_grad=True)
    ids = torch.randint(64, (3,), device=device)
    for which in (0, 1):
        mine = rk.token_logprobs(logits, ids, with_entropy=True, backend=backend)[which]
        exact = reference.token_logprobs(logits, ids, with_entropy=True)[which]
        assert_accurate(torch.autograd.grad(mine.sum(), logits)[0], torch.autograd.grad(exact.sum(), logits)[0], eps=1e-6)


def test_double_backward_is_an_error(backend, device):
    logits = torch.randn(2, 30, device=device, requires_grad=True)
    logprobs = rk.token_logprobs(logits, torch.tensor([1, 2], device=device), backend=backend)
    (g,) = torch.autograd.grad(logprobs.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        g.sum().backward()


def test_compile(backend, device):
    ids = torch.randint(50, (3, 4), device=device)

    def loss(x):
        logprobs, entropy = rk.token_logprobs(x, ids, with_entropy=True, temperature=0.8, backend=backend)
        return (logprobs * 2 + entropy).sum()

    data = torch.randn(3, 4, 50, device=device)
    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        logits = data.clone().requires_grad_()
        f(logits).backward()
        grads.append(logits.grad)
    assert torch.equal(*grads)


def test_compile_inplace_backward(backend, device):
    ids = torch.randint(50, (3,), device=device)

    def loss(leaf):
        return rk.token_logprobs(leaf * 2.0, ids, inplace_backward=True, backend=backend).sum()

    data = torch.randn(3, 50, device=device)
    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = data.clone().requires_grad_()
        f(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_opcheck(backend, device):
    logits, ids = torch.randn(3, 4, 50, device=device), torch.randint(50, (3, 4), device=device)
    mask, temperature = torch.ones(3, 4, device=device), torch.full((3, 4), 0.7, device=device)
    rows = ops.Rows(ids, mask, temperature, 1.0, 30.0, backend)
    opcheck(ops.token_logprobs_op, logits, rows, True, True)
    found = ops.token_logprobs_op(logits, rows, True, True)
    backward = (logits, rows, ops.Slopes(torch.randn(3, 4, device=device), None), found.for_gradient)
    opcheck(ops.token_logprobs_backward_op, *backward)
    opcheck(ops.token_logprobs_backward_inplace_op, *backward)


def test_autocast_does_not_lower_the_precision(backend, device):
    logits, ids = torch.randn(3, 500, device=device) * 5, torch.randint(500, (3,), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        mine = rk.token_logprobs(logits, ids, backend=backend)
    assert torch.equal(mine, rk.token_logprobs(logits, ids, backend=backend))


def test_uniform_distribution(backend, device):
    logprobs, entropy = rk.token_logprobs(
        torch.full((2, 64), 3.0, device=device), torch.tensor([0, 63], device=device), with_entropy=True, backend=backend
    )
    assert_accurate(logprobs, torch.full((2,), -math.log(64)), eps=1e-6)
    assert_accurate(entropy, torch.full((2,), math.log(64)), eps=1e-6)


def test_logits_are_not_modified(backend, device):
    logits = torch.randn(3, 4, 77, device=device, requires_grad=True)
    before = logits.detach().clone()
    rk.token_logprobs(logits, torch.zeros(3, 4, dtype=torch.int32, device=device), softcap=3.0, backend=backend).sum().backward()
    assert torch.equal(logits.detach(), before)


LOGITS, IDS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], IDS), {}, TypeError, "logits must be a torch.Tensor, got list"),
        ((torch.zeros(5), IDS), {}, ValueError, "at least 2 dimensions"),
        ((LOGITS.int(), IDS), {}, TypeError, "got torch.int32"),
        ((torch.zeros(2, 3, 0), IDS), {}, ValueError, "vocabulary of at least 1"),
        ((LOGITS, IDS[:, :2]), {}, ValueError, r"ids must have shape \(2, 3\), got \(2, 2\)"),
        ((LOGITS, IDS.float()), {}, TypeError, "ids must have a dtype of torch.int32, torch.int64; got torch.float32"),
        ((LOGITS, IDS.to("meta")), {}, ValueError, "ids must be on cpu"),
        ((LOGITS, IDS), {"mask": torch.ones(2)}, ValueError, "mask must have shape"),
        ((LOGITS, IDS), {"temperature": 0.0}, ValueError, "temperature must be a number > 0"),
        ((LOGITS, IDS), {"temperature": torch.ones(3)}, ValueError, "temperature must have shape"),
        ((LOGITS, IDS), {"softcap": -1.0}, ValueError, "softcap must be a number > 0"),
        ((LOGITS, IDS), {"logit_scale": math.nan}, ValueError, "logit_scale"),
        ((LOGITS, IDS), {"backend": "cuda"}, ValueError, "expected one of"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        rk.token_logprobs(*arguments, **options)


@pytest.mark.gpu
def test_more_logits_than_an_int32_can_count():
    rows, vocabulary = 70_000, 32_000
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[-1, 5] = 4.0
    logits.requires_grad_()
    ids = torch.full((rows,), 5, device="cuda")
    logprobs = rk.token_logprobs(logits, ids, inplace_backward=True)
    exact = torch.log_softmax(logits.detach()[-1].double(), -1)[5]
    assert abs(float(logprobs[-1]) - float(exact)) < 1e-5
    logprobs.sum().backward()
    assert abs(float(logits.grad[-1, 5]) - (1 - math.exp(float(exact)))) < 1e-2


@pytest.mark.gpu
def test_cuda_graph():
    logits, ids = torch.randn(8, 40_000, device="cuda", requires_grad=True), torch.randint(40_000, (8,), device="cuda")

    def step():
        (g,) = torch.autograd.grad(rk.token_logprobs(logits, ids).sum(), logits)
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


def test_the_reference_gives_minus_infinity_no_gradient_and_reads_no_masked_row():
    logits = torch.tensor([[-torch.inf, 1.0, 2.0], [torch.nan, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    found = reference.token_logprobs(logits, torch.tensor([0, 0]), mask=torch.tensor([1, 0]), softcap=5.0)
    assert isinstance(found, torch.Tensor)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient[0, 0] == 0.0
    assert gradient[0, 1] < 0.0
    assert torch.equal(gradient[1], torch.zeros(3, dtype=torch.float64))


def test_the_state_of_a_part_of_minus_infinity_is_empty(backend, device):
    """As a rank's part of the vocabulary may be: what it merges with is all there is."""
    rows = ops.Rows(torch.zeros(1, dtype=torch.int64, device=device), None, None, 1.0, None, backend, None)
    state = backend_of(backend).states(torch.full((1, 40), -torch.inf, device=device), rows, True)
    assert state[0, 0] <= torch.finfo(torch.float32).min
    assert state[0, 1:3].tolist() == [0.0, 0.0]


def test_logits_masked_by_the_least_number(backend, device):
    """Whole blocks of them, before any other: no distance from them is a number, and their probability is 0."""
    logits = torch.randn(3, 5000, device=device) * 4
    logits[0, :4500] = logits[1, 4500:] = torch.finfo(torch.float32).min
    logits.requires_grad_()
    ids = torch.tensor([4600, 7, 7], device=device)
    found = rk.token_logprobs(logits, ids, with_entropy=True, backend=backend)
    exact_logits = logits.detach().double().requires_grad_()
    exact = reference.token_logprobs(exact_logits, ids, with_entropy=True)
    for x, y in zip(found, exact, strict=True):
        assert_accurate(x.detach(), y.detach(), eps=1e-5)
    (grad,) = torch.autograd.grad(found[0].sum() + found[1].sum(), logits)
    (exact_grad,) = torch.autograd.grad(exact[0].sum() + exact[1].sum(), exact_logits)
    assert_accurate(grad, exact_grad, eps=1e-5)
