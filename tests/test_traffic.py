"""Bytes moved by each kernel, counted in the interpreter and held to the floor: a second pass over the logits by accident fails here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import rlkern as rk
from bench.traffic import Traffic, traffic
from rlkern.ops.divergence import Comparison
from rlkern.ops.triton_backend.logits import SCALE_PROGRAMS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted in Triton's interpreter, which does not run on a GPU machine")


def size(*tensors: Tensor) -> int:
    """Bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(call: Callable[[], Any]) -> tuple[Traffic, Any]:
    with traffic() as moved:
        result = call()
    return moved, result


def assert_at_floor(moved: Traffic, floor: int) -> None:
    assert floor <= moved.total <= 1.02 * floor, f"{moved.total} bytes moved, the floor is {floor}"


# ---- log-probs ------------------------------------------------------------------------------------------------------------------------------

# Rows of the second begin anywhere; the third is cut into segments, whose states are merged by a second kernel.
VOCABULARIES = [6000, 6001, 40000]


def _logits(vocabulary: int, dtype: torch.dtype = torch.bfloat16, *, rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, vocabulary).to(dtype).requires_grad_(), torch.randint(vocabulary, (rows,))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_logprobs_read_the_logits_once(vocabulary, dtype, with_entropy):
    logits, ids = _logits(vocabulary, dtype)
    moved, results = measure(lambda: rk.token_logprobs(logits, ids, with_entropy=with_entropy, backend="triton"))
    assert moved.of(logits).loaded <= size(logits) + size(ids)  # one more for the target
    saved = 2 * ids.numel() * 4  # maximum and sum of a row, for the backward
    assert_at_floor(moved, size(logits, ids, *(results if with_entropy else [results])) + saved)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_reads_and_writes_the_logits_once(vocabulary, inplace):
    logits, ids = _logits(vocabulary)
    lp, entropy = rk.token_logprobs(logits, ids, with_entropy=True, inplace_backward=inplace, backend="triton")
    upstream = [torch.randn_like(lp), torch.randn_like(lp)]
    moved, (gradient,) = measure(lambda: torch.autograd.grad([lp, entropy], logits, upstream))
    assert (gradient.data_ptr() == logits.data_ptr()) == inplace
    assert moved.of(logits).loaded == moved.of(gradient).stored == size(logits, logits[:, 0])  # one more of each row: the target
    assert moved.launches == 1
    assert_at_floor(moved, 2 * size(logits) + size(ids, lp, entropy, *upstream))


def test_rows_that_do_not_count_are_not_read():
    logits, ids = _logits(6000)
    ids[1] = -100
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    moved, lp = measure(lambda: rk.token_logprobs(logits, ids, mask=mask, backend="triton"))
    live = size(logits) * 4 // 6
    assert live <= moved.of(logits).loaded <= live + 4 * logits.element_size()
    upstream = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0])  # a row whose gradient is zero is not read either
    moved, (gradient,) = measure(lambda: torch.autograd.grad(lp, logits, upstream))
    assert moved.of(logits).loaded == size(logits, logits[:, 0]) * 3 // 6  # and of each row its target once more
    assert moved.of(gradient).stored == size(gradient, gradient[:3, 0])


def test_of_a_replayed_support_only_the_kept_logits_are_read():
    logits, ids = _logits(6000)
    keep = rk.KeptTokens(torch.arange(0, 70, 10), torch.randint(6000, (60,)).sort().values)
    moved, _ = measure(lambda: rk.token_logprobs(logits, ids, keep=keep, backend="triton"))
    assert moved.of(logits).loaded <= keep.token_ids.numel() * logits.element_size()
    assert moved["restrict_kernel"].total <= 1.02 * size(logits, keep.token_ids)


@pytest.mark.parametrize("inplace", [False, True])
def test_fused_loss_reads_the_logits_twice_and_writes_them_once(inplace):
    logits, ids = _logits(6000, rows=8)
    old, advantages = torch.randn(8), torch.randn(8)

    def step() -> Tensor:
        loss = rk.fused_policy_loss(logits, ids, old, advantages, inplace=inplace, backend="triton").loss
        return torch.autograd.grad(loss, logits)[0]

    moved, gradient = measure(step)
    assert moved.of(logits).loaded <= 2 * size(logits) + 8 * logits.element_size()
    assert moved.of(gradient).stored <= size(gradient, gradient[:, 0])  # the target of a row twice
    assert 0 < moved["scale_kernel"].loaded <= 4 * SCALE_PROGRAMS  # the upstream gradient, which is 1, and nothing else
    assert moved["scale_kernel"].stored == 0


def test_an_upstream_gradient_other_than_one_takes_one_more_pass():
    logits, ids = _logits(6000, rows=8)
    loss = rk.fused_policy_loss(logits, ids, torch.randn(8), torch.randn(8), backend="triton").loss
    moved, gradient = measure(lambda: torch.autograd.grad(loss, logits, torch.tensor(0.5))[0])
    assert moved.of(gradient).loaded == moved.of(gradient).stored == size(gradient)
    assert moved.launches == 1


# ---- divergences ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_divergences_read_each_model_once_and_mixtures_twice(beta, vocabulary):
    """A mixture is known only when both sums are: the second time from L2."""
    logits, ref_logits = _logits(vocabulary)[0], _logits(vocabulary)[0].detach()
    moved, result = measure(lambda: rk.generalized_jsd(logits, ref_logits, beta=beta, backend="triton"))
    reads = 2 if beta == 0.5 else 1
    for x in (logits, ref_logits):
        assert moved.of(x).loaded == reads * size(x)
    assert moved.launches == 1
    statistics = 5 * result.numel() * 4
    assert_at_floor(moved, reads * size(logits, ref_logits) + size(result) + statistics)

    upstream = torch.randn_like(result)
    moved, (gradient,) = measure(lambda: torch.autograd.grad(result, logits, upstream))
    assert moved.of(logits).loaded == moved.of(ref_logits).loaded == moved.of(gradient).stored == size(logits)
    assert moved.launches == 1
    assert_at_floor(moved, 3 * size(logits) + size(upstream) + statistics)


def test_divergences_of_a_part_take_no_more():
    """Of a vocabulary that ranks share, a KL reads each model once, and a JSD once before and once after its collective."""
    x, y = _logits(6000)[0].detach(), _logits(6000)[0].detach()
    for beta in (0.0, 1.0, 0.5):
        comparison = Comparison(None, None, 1.0, None, beta, "triton")
        moved, states = measure(lambda: comparison.states(x, y))  # noqa: B023
        assert moved.launches == 1
        assert_at_floor(moved, size(x, y, states))
    moved, terms = measure(lambda: comparison.terms(x, y, states))
    assert moved.launches == 1
    assert_at_floor(moved, size(x, y, states, terms) - states.shape[0] * 4)


def test_masked_rows_of_divergences_are_not_read():
    logits, ref_logits = _logits(6000)[0], _logits(6000)[0].detach()
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    moved, result = measure(lambda: rk.full_kl(logits, ref_logits, mask=mask, backend="triton"))
    assert moved.of(logits).loaded == moved.of(ref_logits).loaded == size(logits) * 5 // 6
    upstream = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    moved, (gradient,) = measure(lambda: torch.autograd.grad(result, logits, upstream))
    assert moved.of(logits).loaded == moved.of(ref_logits).loaded == size(logits) * 4 // 6
    assert moved.of(gradient).stored == size(gradient)


# ---- the policy loss on tokens --------------------------------------------------------------------------------------------------------------


def _rollouts() -> dict[str, Tensor]:
    shape = (4, 5000)
    tokens = {name: -2 * torch.rand(shape) for name in ("logprobs", "old_logprobs", "ref_logprobs")}
    return tokens | {"advantages": torch.randn(shape), "mask": torch.ones(shape, dtype=torch.bool)}


@pytest.mark.parametrize("preset", ["ppo", "dapo", "cispo", "sapo"])
def test_token_level_loss_reads_and_writes_each_tensor_once(preset):
    inputs = _rollouts()
    inputs["logprobs"].requires_grad_()
    config = getattr(rk.PolicyLossConfig, preset)(kl_coef=0.1, aggregation="token-mean")
    moved, _ = measure(lambda: rk.policy_loss(**inputs, config=config, backend="triton"))
    assert moved.launches == 1
    assert_at_floor(moved, size(*inputs.values(), inputs["logprobs"]))


def test_masked_tokens_are_not_read():
    inputs = _rollouts()
    inputs["mask"][:, 2000:] = False
    moved, _ = measure(lambda: rk.policy_loss(**inputs, config=rk.PolicyLossConfig.dapo(), backend="triton"))
    assert moved.of(inputs["logprobs"]).loaded == size(inputs["logprobs"]) * 2 // 5


def test_sequence_level_loss_reads_twice():
    """GSPO needs a sequence's ratio before its losses, and the losses before the gradient of the ratio: the second time from L2."""
    inputs = _rollouts()
    inputs["logprobs"].requires_grad_()
    moved, _ = measure(lambda: rk.policy_loss(**inputs, config=rk.PolicyLossConfig.gspo(), backend="triton"))
    assert moved.launches == 1
    for name in ("logprobs", "old_logprobs"):
        assert moved.of(inputs[name]).loaded == 2 * size(inputs[name])
    assert moved.of(inputs["advantages"]).loaded == size(inputs["advantages"])


# ---- advantages -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [7, 500, 5000])
def test_gae_moves_sixteen_bytes_an_element(steps):
    rewards, values = torch.randn(2, 9, steps)
    moved, results = measure(lambda: rk.gae(rewards, values, gamma=0.99, lam=0.95, backend="triton"))
    assert moved.launches == 1
    assert_at_floor(moved, size(rewards, values, *results))


def test_whitening_costs_one_more_read_and_write():
    rewards, values = torch.randn(2, 9, 500)
    moved, results = measure(lambda: rk.gae(rewards, values, gamma=0.99, lam=0.95, whitened=True, backend="triton"))
    assert moved.launches == 2
    assert_at_floor(moved, size(rewards, values, *results) + 2 * size(results[0]))


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_value_loss_reads_and_writes_each_tensor_once(clip_range):
    values, old_values, returns = torch.randn(3, 4, 5000)
    moved, _ = measure(lambda: rk.value_loss(values.requires_grad_(), old_values, returns, clip_range=clip_range, backend="triton"))
    assert moved.launches == 1
    sums = 4 * 10 * 8 * 8  # of each tile, in float64: written, and read by the program that arrives last
    assert_at_floor(moved, size(values, returns, values) + (size(old_values) if clip_range else 0) + 2 * sums)


# ---- the counter itself ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def _count_kernel(x_ptr, sum_ptr, flag_ptr):
    tl.atomic_add(sum_ptr, tl.load(x_ptr + tl.program_id(0)))
    tl.atomic_cas(flag_ptr, 0, 1)


@triton.jit
def _broadcast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at // 4))


def test_counts_unmasked_lanes_by_element_size():
    x, y = torch.arange(100, dtype=torch.bfloat16), torch.empty(100, dtype=torch.float32)
    with traffic() as moved:
        _copy_kernel[(2,)](x, y, 100, BLOCK=64)
    assert torch.equal(x.float(), y)
    assert list(moved) == ["_copy_kernel"]
    copied = moved["_copy_kernel"]
    assert (copied.loaded, copied.stored, copied.launches, copied.total) == (200, 400, 1, 600)
    assert (moved.of(x).loaded, moved.of(x).stored, moved.of(y).loaded, moved.of(y).stored) == (200, 0, 0, 400)
    assert (moved.of(x[:64]).loaded, moved.of(x[64:]).loaded) == (128, 72)
    assert (moved.loaded, moved.stored, moved.total, moved.launches) == (200, 400, 600, 1)


def test_counts_atomics_and_launches():
    x, total, flag = torch.ones(3), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    with traffic() as moved:
        _count_kernel[(3,)](x, total, flag)
        _count_kernel[(3,)](x, total, flag)
    assert total.item() == 6
    assert (moved["_count_kernel"].loaded, moved["_count_kernel"].stored, moved["_count_kernel"].launches) == (6 * 12, 6 * 8, 2)
    with pytest.raises(KeyError, match="_copy_kernel was not launched"):
        moved["_copy_kernel"]


def test_lanes_that_share_an_address_count_once():
    x, y = torch.ones(4), torch.empty(16)
    with traffic() as moved:
        _broadcast_kernel[(1,)](x, y, BLOCK=16)
    assert (moved.loaded, moved.stored) == (16, 64)


def test_stops_counting_afterwards():
    x, y = torch.zeros(4), torch.empty(4)
    with traffic() as moved:
        pass
    _copy_kernel[(1,)](x, y, 4, BLOCK=4)
    assert len(moved) == 0
    assert moved.total == 0


@pytest.mark.parametrize("mode", ["in-forward", "recompute"])
def test_float32_logits_of_a_16_bit_head(mode):
    """Beside the products: 4 V bytes a row are read for the statistics and 4 V for the gradient, of which 2 V are written."""
    rows, vocabulary, width = 6, 6000, 8
    hidden, weight = (torch.randn(n, width).bfloat16().requires_grad_() for n in (rows, vocabulary))
    ids, old = torch.randint(vocabulary, (rows,)), torch.full((rows,), -9.0)

    def call() -> None:
        config = rk.PolicyLossConfig.reinforce()
        loss = rk.fused_linear_policy_loss(hidden, weight, ids, old, torch.ones(rows), config=config, mode=mode, backend="triton").loss
        loss.backward()

    moved, _ = measure(call)
    logits = rows * vocabulary
    assert_at_floor(moved, logits * (4 + 4 + 2))
