"""Logits far from 0: the PyTorch backend takes their distances from the maximum in one pass or two, and no row may depend on what the others need."""

import pytest
import torch

import rlkern as rk
from rlkern import reference
from rlkern.ops.torch_backend import logits as torch_backend

from .judge import assert_accurate

LEAST = torch.finfo(torch.float32).min
CENTRES = (0.0, 300.0, -3e4, 5e6, -9e7, 2e9, -1e20, 2e38, LEAST)
VOCABULARY = 1234


def far_rows(device):
    """Each of logits around a centre: as many different numbers as float32 has there; the last is all of its least number."""
    logits = torch.randn(len(CENTRES), VOCABULARY, device=device) * 4 + torch.tensor(CENTRES, device=device)[:, None]
    return logits.clamp(min=LEAST).requires_grad_()


def plain(logits, ids):
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)


def with_gradient(function, logits, ids):
    logprobs, entropy = function(logits, ids)
    (gradient,) = torch.autograd.grad(logprobs.sum() + 0.7 * entropy.sum(), logits)
    return logprobs.detach(), entropy.detach(), gradient


@pytest.fixture(params=["as PyTorch rounds here", "rounded twice"])
def rounds(request, monkeypatch):
    """With processors that cannot fuse a product and a sum, too."""
    if request.param == "rounded twice":
        monkeypatch.setattr(torch_backend, "_fuses", lambda: False)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.usefixtures("rounds")
def test_rows_far_from_zero(backend, device, temperature):
    logits = far_rows(device)
    ids = logits.detach().topk(3).indices[:, 2]
    exact = with_gradient(
        lambda x, y: reference.token_logprobs(x, y, temperature=temperature, with_entropy=True), logits.detach().double().requires_grad_(), ids
    )
    peer = with_gradient(lambda x, y: plain((x - x.detach().amax(-1, keepdim=True)) / temperature, y), logits, ids)
    mine = with_gradient(lambda x, y: rk.token_logprobs(x, y, temperature=temperature, with_entropy=True, backend=backend), logits, ids)
    for x, y, z in zip(mine, exact, peer, strict=True):
        for i in range(len(CENTRES)):
            assert_accurate(x[i], y[i], z[i], eps=2e-6 * max(1.0, float(y[i].abs().max())))


@pytest.mark.usefixtures("rounds")
def test_a_row_far_from_zero_changes_no_other(backend, device):
    if backend == "torch" and device.type == "cuda":
        pytest.skip("there PyTorch's own sums depend on how many rows there are")

    logits, ids = far_rows(device).detach(), torch.arange(len(CENTRES), device=device)
    together = rk.token_logprobs(logits, ids, with_entropy=True, backend=backend)
    for i in range(len(CENTRES)):
        alone = rk.token_logprobs(logits[i : i + 1], ids[i : i + 1], with_entropy=True, backend=backend)
        assert all(torch.equal(x[0], y[i]) for x, y in zip(alone, together, strict=True)), CENTRES[i]


def test_one_pass_moves_a_row_by_its_zero():
    """To the last bit that float64 can tell: d - zero = (x - m) k, where PyTorch fuses; elsewhere nothing takes one pass."""
    logits = torch.randn(7, 1003) * 5 + torch.randn(7, 1) * 1000
    rows = torch_backend.Rows(torch.zeros(7, dtype=torch.int64), None, None, 0.83, None, "torch")
    way = torch_backend.one_pass(logits, rows)
    if way is None:
        assert not torch_backend._fuses()
        return
    m = logits.amax(-1, keepdim=True)
    d = way.into(torch.empty_like(logits), logits, way.origin(m))
    zero, far = way.zeros(m)
    assert far is None
    assert zero.any()
    assert torch.equal(d, ((logits.double() - m.double()) * way.k + zero).float())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("vocabulary", [5, 37, 1001])
def test_no_row_depends_on_where_it_lies_in_a_chunk(vocabulary, threads, monkeypatch):
    """Of a few rows as of many: PyTorch rounds 2^x otherwise at the end of what a thread gets than elsewhere."""
    before = torch.get_num_threads()
    logits, ids = torch.randn(100_000 // vocabulary, vocabulary), torch.zeros(100_000 // vocabulary, dtype=torch.int64)
    logits[:, :-2] -= 5  # the last two columns are most of the sum
    many = rk.token_logprobs(logits, ids, with_entropy=True, backend="torch")
    monkeypatch.setattr(torch_backend, "CHUNK", 3 * vocabulary)
    try:
        torch.set_num_threads(threads)
        few = rk.token_logprobs(logits, ids, with_entropy=True, backend="torch")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(few[0], many[0])
    assert torch.equal(few[1], many[1])
