"""value_loss, both backends against the float64 reference and by hand; preference_loss and ranking_loss, against the reference and by hand."""

import math

import pytest
import torch
from torch import Tensor

import rlkern as rk
from bench.traffic import traffic
from rlkern import reference
from rlkern.config import AGGREGATIONS
from rlkern.ops.triton_backend import layout as tokens
from rlkern.ops.value import ValueOptions, Values, value_loss_op

from .judge import assert_accurate, opcheck

INTERPRETED = not torch.cuda.is_available()
nan = math.nan


def batch(device: torch.device, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """[4, 5], NaN wherever the mask is 0; one sequence has nothing."""
    g = torch.Generator().manual_seed(0)
    old, returns, step = (torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    values = {"values": old + 0.3 * step, "old_values": old, "returns": returns + 3}
    return {name: x.masked_fill(mask == 0, nan).to(device, dtype) for name, x in values.items()} | {"mask": mask.to(device)}


def packed(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without the padding in front, the second sequence empty."""
    keep = torch.tensor([0, 1, 2, 3, 4, 10, 11, 12, 13, 16, 17, 18, 19], device=x["mask"].device)
    cu = torch.tensor([0, 5, 5, 9, 13], dtype=torch.int32, device=keep.device)
    return {name: t.flatten()[keep] for name, t in x.items()} | {"cu_seqlens": cu}


def results(loss_fn, x: dict[str, Tensor], **options) -> dict[str, Tensor]:
    x = {**x, "values": x["values"].detach().clone().requires_grad_()}
    loss, metrics, *_ = loss_fn(**x, **options)
    (gradient,) = torch.autograd.grad(loss, x["values"])
    return {"loss": loss.detach(), "gradient": gradient, **metrics}


def assert_equals_reference(x: dict[str, Tensor], backend: str, **options) -> None:
    wide = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    exact, peer = results(reference.value_loss, wide, **options), results(reference.value_loss, x, **options)
    mine = results(rk.value_loss, x, backend=backend, **options)
    assert mine.keys() == exact.keys()
    dtype = x["values"].dtype
    for name, t in mine.items():
        assert t.dtype == (dtype if name == "gradient" else exact[name].dtype if dtype == torch.float64 else torch.float32), name
        eps = 1e-12 if dtype == torch.float64 else 2e-7
        assert_accurate(t, exact[name], peer[name], eps=eps * (1 + float(exact[name].abs().max())))


@pytest.mark.parametrize("clip_range", [None, 0.2])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_reference(dtype, aggregation, clip_range, backend, device, monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", 2)  # many blocks a sequence, many tiles a row
    options = {"clip_range": clip_range, "aggregation": aggregation}
    assert_equals_reference(batch(device, dtype), backend, max_length=None, **options)
    assert_equals_reference(packed(batch(device, dtype)), backend, max_length=7, **options)


def test_by_hand(backend, device):
    """Unclipped; clipped with the larger error after the clip, which has no gradient; before it, which has; a tie, which has half."""
    values = torch.tensor([1.1, 2.0, 2.0, 1.0], device=device, requires_grad=True)
    old = torch.tensor([1.0, 1.0, 1.0, 0.0], device=device)
    returns = torch.tensor([0.0, 3.0, 0.0, 0.75], device=device)
    out = rk.value_loss(values, old, returns, clip_range=0.5, aggregation="sum", backend=backend)
    (gradient,) = torch.autograd.grad(out.loss, values)
    assert_accurate(out.loss, torch.tensor(0.5 * (1.21 + 1.5**2 + 4.0 + 0.25**2)), eps=1e-6)
    assert_accurate(gradient, torch.tensor([1.1, 0.0, 2.0, 0.125]), eps=1e-6)
    assert float(out.metrics["clip_fraction"]) == 0.25
    assert_accurate(out.metrics["error"], torch.tensor((1.21 + 1.0 + 4.0 + 0.0625) / 4), eps=1e-6)
    assert out.logprobs is None
    assert out.entropy is None


def test_explained_variance_far_from_zero(backend, device):
    """Returns around 1000 with a spread of 0.1: 1 for a perfect critic, 0 for one that knows the mean, whatever its own mean is."""
    returns = 1000 + 0.1 * torch.randn(3, 200, device=device)
    spread = returns.double().var(correction=0)
    for values in (returns, returns.mean().expand_as(returns), 0.5 * (returns - 1000)):
        explained = rk.value_loss(values, None, returns, backend=backend).metrics["explained_variance"]
        exact = 1 - (returns.double() - values.double()).var(correction=0) / spread
        assert_accurate(explained, exact, eps=1e-4)
    constant = torch.ones(2, 3, device=device)
    assert float(rk.value_loss(0 * constant, None, constant, backend=backend).metrics["explained_variance"]) == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_partition_gives_the_same(aggregation, backend, device):
    x = batch(device, torch.float32)
    normalizer = {"token-mean": 12, "sum": 1}.get(aggregation, 3)
    options = {"clip_range": 0.2, "aggregation": aggregation, "max_length": 5, "backend": backend}
    whole = results(rk.value_loss, x, normalizer=normalizer, **options)
    parts = [results(rk.value_loss, {k: t[rows] for k, t in x.items()}, normalizer=normalizer, **options) for rows in (slice(0, 1), slice(1, 4))]
    assert_accurate(sum(p["loss"] for p in parts), whole["loss"], eps=1e-6 * float(whole["loss"]))
    assert_accurate(torch.cat([p["gradient"] for p in parts]), whole["gradient"], eps=1e-7)
    assert_accurate(whole["loss"], results(rk.value_loss, x, **options)["loss"], eps=1e-6 * float(whole["loss"]))


def test_nothing_to_learn_from(backend, device):
    for shape in ((0,), (0, 3), (3, 0)):
        x = torch.empty(shape, device=device, requires_grad=True)
        out = rk.value_loss(x, None, x.detach(), backend=backend)
        out.loss.backward()
        assert float(out.loss.detach()) == 0
        assert x.grad.shape == shape
    x = torch.full((2, 3), nan, device=device, requires_grad=True)
    out = rk.value_loss(x, x.detach(), x.detach(), mask=torch.zeros(2, 3, device=device), clip_range=0.1, backend=backend)
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert not x.grad.any()
    assert not any(m.isnan() for m in out.metrics.values())


def test_non_contiguous(backend, device):
    x = {name: t.t().contiguous().t() for name, t in batch(device, torch.float32).items()}
    assert_equals_reference(x, backend, clip_range=0.2)


def test_bitwise_the_same_on_every_run(backend, device, monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", 2)
    x = batch(device, torch.float32)
    first, second = (results(rk.value_loss, x, clip_range=0.2, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradcheck(device):
    x = batch(device)
    x = {name: t if name == "mask" else t.nan_to_num() for name, t in x.items()}

    def loss(values: Tensor) -> Tensor:
        return rk.value_loss(
            values, *(x[n] for n in ("old_values", "returns")), mask=x["mask"], clip_range=0.2, aggregation="seq-mean-token-mean"
        ).loss

    assert torch.autograd.gradcheck(loss, x["values"].requires_grad_())


def test_second_derivative_is_an_error(backend, device):
    x = torch.randn(2, 3, device=device, requires_grad=True)
    loss = rk.value_loss(x, None, x.detach() + 1, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss * loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("layout", [dict, packed])
def test_opcheck(layout, backend, device):
    x = layout(batch(device, torch.float32))
    values = Values(x["values"], x["old_values"], x["returns"], x["mask"], None, x.get("cu_seqlens"))
    opcheck(value_loss_op, values, ValueOptions(0.2, "seq-mean-token-mean", 5.0, True), True, backend)


def test_torch_compile(backend, device):
    x = packed(batch(device, torch.float32))

    def step(values: Tensor, old_values: Tensor, **others: Tensor) -> Tensor:
        out = rk.value_loss(values, old_values, **others, clip_range=0.2, backend=backend)
        return out.loss + out.metrics["error"]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plain, traced = (results(lambda **a: (f(**a), {}), x) for f in (step, compiled))  # noqa: B023
    assert all(torch.equal(plain[name], traced[name]) for name in plain)


@pytest.mark.skipif(not INTERPRETED, reason="bytes are counted in the interpreter")
def test_masked_tokens_are_not_read():
    values, old, returns = torch.randn(3, 4096)
    mask = torch.arange(4096) % 8 != 0
    with traffic() as moved:
        rk.value_loss(values, old, returns, mask=mask, clip_range=0.2, backend="triton")
    assert [moved.of(x).loaded for x in (values, old, returns)] == [4096 // 8 * 7 * 4] * 3


@pytest.mark.parametrize(
    ("changes", "error_type", "message"),
    [
        ({"values": [1.0]}, TypeError, "values must be a torch.Tensor, got list"),
        ({"returns": torch.zeros(4, 4)}, ValueError, r"returns must have shape \(4, 5\), got \(4, 4\)"),
        ({"old_values": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "old_values must have a dtype"),
        ({"mask": torch.ones(4)}, ValueError, "mask must have shape"),
        ({"old_values": None}, ValueError, "old_values is needed with clip_range=0.2"),
        ({"clip_range": 0}, ValueError, "clip_range must be a number > 0, got 0"),
        ({"aggregation": "mean"}, ValueError, "aggregation must be one of 'token-mean'"),
        ({"max_length": -1}, ValueError, "max_length must be a number > 0"),
        ({"normalizer": torch.ones(2)}, ValueError, "normalizer must have shape"),
        ({"cu_seqlens": torch.tensor([0, 20])}, ValueError, r"cu_seqlens goes with packed tensors of shape \[tokens\]"),
    ],
)
def test_errors(changes, error_type, message):
    x = {name: t.nan_to_num() for name, t in batch(torch.device("cpu"), torch.float32).items()}
    with pytest.raises(error_type, match=message):
        rk.value_loss(**{**x, "clip_range": 0.2, **changes})


def test_errors_of_packed_inputs():
    x = torch.zeros(4)
    with pytest.raises(ValueError, match=r"needs sequences: pass \[batch, time\], or cu_seqlens"):
        rk.value_loss(x, None, x, aggregation="seq-mean-token-mean")
    with pytest.raises(ValueError, match="needs max_length"):
        rk.value_loss(x, None, x, aggregation="seq-mean-token-sum-norm", cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="must rise from 0"):
        rk.value_loss(x, None, x, cu_seqlens=torch.tensor([0, 3]))


# ---- reward model ---------------------------------------------------------------------------------------------------------------------------


def test_preference_loss_by_hand(device):
    chosen = torch.tensor([1.0, 0.0], device=device, requires_grad=True)
    rejected = torch.tensor([0.0, 2.0], device=device, requires_grad=True)
    out = rk.preference_loss(chosen, rejected)
    out.loss.backward()
    p = [1 / (1 + math.e), 1 / (1 + math.exp(-2))]  # how wrong the model is
    assert_accurate(out.loss, torch.tensor((math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2), eps=1e-6)
    assert_accurate(chosen.grad, -torch.tensor(p) / 2, eps=1e-7)
    assert_accurate(rejected.grad, torch.tensor(p) / 2, eps=1e-7)
    assert float(out.metrics["accuracy"]) == 0.5
    assert float(out.metrics["margin"]) == -0.5


@pytest.mark.parametrize("margin", [None, 0.5, torch.tensor([0.0, 1.0, 2.0, 0.1, 3.0])], ids=["none", "number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_preference_loss_equals_reference(dtype, margin, device):
    chosen, rejected = torch.randn(2, 5, device=device).to(dtype)
    margin = margin.to(device) if isinstance(margin, Tensor) else margin
    loss = rk.preference_loss(chosen, rejected, margin=margin).loss
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_accurate(loss, reference.preference_loss(chosen.double(), rejected.double(), margin=margin), eps=1e-6)


def test_ranking_of_two_is_a_preference(device):
    scores = torch.randn(6, 2, device=device)
    pairs, ranks = rk.preference_loss(scores[:, 0], scores[:, 1], margin=0.3), rk.ranking_loss(scores, margin=0.3)
    assert_accurate(ranks.loss, pairs.loss, eps=1e-7)
    assert all(torch.allclose(ranks.metrics[name], pairs.metrics[name]) for name in pairs.metrics)


def test_ranking_is_the_mean_over_pairs(device):
    scores = torch.randn(5, 4, dtype=torch.float64, device=device)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    by_pair = torch.stack([rk.preference_loss(scores[:, i], scores[:, j]).loss for i, j in pairs])
    assert_accurate(rk.ranking_loss(scores).loss, by_pair.mean(), eps=1e-12)


def test_ranking_loss_equals_reference_where_answers_are_missing(device):
    scores = torch.randn(5, 4, dtype=torch.float64, device=device)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], device=device)
    scores = scores.masked_fill(mask == 0, nan).requires_grad_()
    out = rk.ranking_loss(scores, mask=mask, margin=0.2)
    assert_accurate(out.loss, reference.ranking_loss(scores, mask=mask, margin=0.2), eps=1e-12)
    (gradient,) = torch.autograd.grad(out.loss, scores)
    assert not gradient[mask == 0].any()
    assert not gradient.isnan().any()
    assert gradient[0].abs().min() > 0
    assert torch.autograd.gradcheck(lambda s: rk.ranking_loss(s, mask=mask).loss, scores.detach().nan_to_num().requires_grad_())


def test_no_preferences(device):
    empty = torch.empty(0, device=device, requires_grad=True)
    rk.preference_loss(empty, empty).loss.backward()
    alone = torch.ones(2, 1, device=device, requires_grad=True)
    loss = rk.ranking_loss(alone).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert not alone.grad.any()


@pytest.mark.parametrize(
    ("call", "error_type", "message"),
    [
        (lambda x: rk.preference_loss([1.0], x), TypeError, "chosen must be a torch.Tensor"),
        (lambda x: rk.preference_loss(x, x[:2]), ValueError, r"rejected must have shape \(3,\), got \(2,\)"),
        (lambda x: rk.preference_loss(x, x, margin=x[:1]), ValueError, "margin must have shape"),
        (lambda x: rk.preference_loss(x, x, margin="1"), TypeError, "margin must be a number, got str"),
        (lambda x: rk.preference_loss(x, x.long()), TypeError, "rejected must have a dtype"),
        (lambda x: rk.ranking_loss(x, mask=x[:2]), ValueError, "mask must have shape"),
        (lambda x: rk.ranking_loss(x.sum()), ValueError, "scores must have at least 1 dimension"),
    ],
)
def test_errors_of_preferences(call, error_type, message):
    with pytest.raises(error_type, match=message):
        call(torch.zeros(3))


def test_without_metrics(backend, device):
    x = batch(device, torch.float32)
    values = x.pop("values").requires_grad_()
    full, bare = (rk.value_loss(values, **x, clip_range=0.2, with_metrics=wanted, backend=backend) for wanted in (True, False))
    assert bare.metrics == {}
    assert torch.equal(full.loss, bare.loss)
    assert torch.equal(*(torch.autograd.grad(out.loss, values)[0] for out in (full, bare)))


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_a_value_of_nan_is_not_swallowed(backend, device, clip_range):
    """In the loss and in its own gradient, and nowhere else."""
    values = torch.tensor([0.1, torch.nan, 0.3], device=device, requires_grad=True)
    old = None if clip_range is None else torch.zeros(3, device=device)
    loss = rk.value_loss(values, old, torch.ones(3, device=device), clip_range=clip_range, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.isnan()
    assert gradient.isnan().tolist() == [False, True, False]
