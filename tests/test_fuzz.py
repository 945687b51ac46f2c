"""Anything that a caller may hand in, extreme numbers above all: both backends in float64, with the memory around inputs watched.

Here a few examples of each, always the same; ``make fuzz`` draws fresh ones for ten minutes.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import rlkern as rk
from rlkern import reference
from rlkern.config import KL_ESTIMATORS

from . import presets

EXAMPLES = int(os.environ.get("RLKERN_FUZZ", "0"))
drawn = settings(max_examples=EXAMPLES or 25, derandomize=not EXAMPLES, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = float("inf"), float("nan")


class Inputs:
    """Random float64 tensors, each inside a larger one of NaN, with gaps between its rows: nothing of that, nor of them, may change."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.owned: list[tuple[Tensor, Tensor]] = []  # (the larger tensor, as it was)

    def random(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def flags(self, *shape: int, often: float = 0.7) -> Tensor:
        return (self.random(*shape) < often).to(DEVICE)

    def spiced(self, x: Tensor, values: list[float], often: float = 0.15) -> Tensor:
        """Some of the entries replaced by these values."""
        if not values:
            return x
        which = torch.randint(len(values), x.shape, generator=self.generator)
        return torch.where(self.random(*x.shape) < often, torch.tensor(values, dtype=torch.float64)[which], x)

    def guarded(self, x: Tensor) -> Tensor:
        around = torch.full((*(n + 2 for n in x.shape[:-1]), x.shape[-1] + 5), NAN, dtype=x.dtype, device=DEVICE)
        inner = around[tuple(slice(1, n + 1) for n in x.shape[:-1])][..., 2 : 2 + x.shape[-1]]
        inner.copy_(x)
        self.owned.append((around, around.clone()))
        return inner

    def check(self) -> None:
        for now, before in self.owned:
            assert torch.equal(now.view(torch.int64), before.view(torch.int64)), "an input, or what lies around it, was written to"


def assert_same(name: str, mine: Tensor, exact: Tensor, scale: float) -> None:
    """NaN and infinities at the same places; the rest to what float64 leaves of terms of this size."""
    mine, exact = mine.detach().double().cpu(), exact.detach().double().cpu()
    assert mine.shape == exact.shape
    assert torch.equal(mine.isnan(), exact.isnan()), f"{name}: {mine.tolist()}, in the reference {exact.tolist()}"
    same = (mine == exact) | mine.isnan()
    off = torch.where(same, 0.0, (mine - exact).abs())
    allowed = 1e-11 * (scale + exact.abs().nan_to_num(posinf=0.0, neginf=0.0))
    worst = int((off - allowed).argmax()) if off.numel() else 0
    assert bool((off <= allowed).all()), f"{name}: {mine.flatten()[worst]}, in the reference {exact.flatten()[worst]}, terms of {scale:.1e}"


def with_gradients(function: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor], upstream: Callable[[Tensor], Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    results = [r for r in function(*leaves) if r.requires_grad]
    return [*results, *torch.autograd.grad(results, leaves, [upstream(r) for r in results], allow_unused=True, materialize_grads=True)]


seeds = st.integers(0, 2**31)


@drawn
@given(
    seed=seeds,
    rows=st.integers(1, 5),
    vocabulary=st.sampled_from([1, 2, 7, 128, 129, 300]),
    spread=st.sampled_from([1e-300, 1.0, 30.0, 1e4]),
    spice=st.lists(st.sampled_from([-INF, -INF, 1e30, -1e30, 700.0, 0.0, 5e-324, INF, NAN]), max_size=3),
    scaling=st.sampled_from([{}, {"temperature": 0.3}, {"softcap": 5.0}, {"logit_scale": 1e-3}, {"softcap": 30.0, "temperature": 2.0}]),
    masked=st.booleans(),
)
def test_logprobs(seed, rows, vocabulary, spread, spice, scaling, masked):
    fill = Inputs(seed)
    logits = fill.guarded(fill.spiced(fill.normal(rows, vocabulary) * spread, spice))
    ids = torch.randint(vocabulary, (rows,), generator=fill.generator).to(DEVICE)
    ids[fill.flags(rows, often=0.1)] = -100
    mask = fill.flags(rows) if masked else None
    a, b = fill.normal(2, rows).to(DEVICE)

    def upstream() -> Callable[[Tensor], Tensor]:
        given = iter((a, b))
        return lambda _: next(given)

    def exact(x: Tensor) -> tuple[Tensor, ...]:
        if "softcap" not in scaling:  # what a common shift changes is nothing but the rounding of large numbers
            x = x - x.detach().amax(1, keepdim=True).nan_to_num(posinf=0.0, neginf=0.0)
        return reference.token_logprobs(x, ids, mask=mask, with_entropy=True, **scaling)  # type: ignore[return-value]

    def ours(x: Tensor) -> tuple[Tensor, ...]:
        return rk.token_logprobs(x, ids, mask=mask, with_entropy=True, backend="torch", **scaling)  # type: ignore[return-value]

    found, expected = (with_gradients(f, [logits], upstream()) for f in (ours, exact))
    expected[2] = torch.where(expected[0].detach().isnan().unsqueeze(1), NAN, expected[2])  # what is no distribution has no slope either
    size = float(logits.abs().nan_to_num(posinf=0.0, neginf=0.0, nan=0.0).max()) if "softcap" not in scaling else 30.0
    size = size * scaling.get("logit_scale", 1.0) / scaling.get("temperature", 1.0)
    for name, x, y in zip(("logprob", "entropy", "d logits"), found, expected, strict=True):
        assert_same(name, x, y, 1.0 + size * (1.0 + size if name == "d logits" else 1.0))
    fill.check()


@drawn
@given(
    seed=seeds,
    name=st.sampled_from(presets.NAMES),
    backend=st.sampled_from(["torch", "torch", "torch", "triton"]),
    batch=st.integers(1, 4),
    time=st.integers(1, 7),
    spice=st.lists(st.sampled_from([1000.0, -1000.0, 25.0, -25.0, 0.2, -0.2]), max_size=3),
    advantages=st.lists(st.sampled_from([0.0, 1e-300, -1e3, 1e3]), max_size=2),
    estimator=st.sampled_from(list(KL_ESTIMATORS)),
    kl_coef=st.sampled_from([0.0, 0.1]),
    entropy_coef=st.sampled_from([0.0, 0.1]),
    clamp=st.sampled_from([None, None, 10.0]),
    packed=st.booleans(),
)
def test_policy_loss(seed, name, backend, batch, time, spice, advantages, estimator, kl_coef, entropy_coef, clamp, packed):
    fill = Inputs(seed)
    overrides = {"kl_estimator": estimator, "kl_coef": kl_coef, "entropy_coef": entropy_coef, "log_ratio_clamp": clamp}
    config = presets.preset(name, max_length=time, **overrides)
    shape = (batch, time)
    mask = fill.flags(*shape)
    log_r = fill.spiced(0.3 * fill.normal(*shape), spice)
    lp = -fill.random(*shape) - 0.01
    lp = torch.where(log_r < 0, lp + log_r, lp)  # the side of the pair that is unlikely
    old = lp - log_r
    A = fill.spiced(fill.normal(*shape), advantages)
    if config.surrogate == "gmpo" or config.ratio_level != "token":
        A = A[:, :1].expand(shape).clone()
    hidden = torch.tensor(NAN, dtype=torch.float64)
    lp, old, A, ref, entropy = (torch.where(mask.cpu(), x, hidden) for x in (lp, old, A, lp + 0.3 * fill.normal(*shape), fill.random(*shape)))
    tensors: dict[str, Any] = {"old_logprobs": old, "advantages": A, "ref_logprobs": ref}
    cu_seqlens = None
    if packed:
        lp, entropy, mask = lp.flatten(), entropy.flatten(), mask.flatten()
        tensors = {key: x.flatten() for key, x in tensors.items()}
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * time
    given = {key: fill.guarded(x) for key, x in tensors.items()}
    leaves = [fill.guarded(lp), fill.guarded(entropy)]

    def of(loss: Any, **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        metrics: dict[str, Tensor] = {}

        def call(logprobs: Tensor, h: Tensor) -> tuple[Tensor]:
            out = loss(logprobs, **given, entropy=h, mask=mask, cu_seqlens=cu_seqlens, config=config, **options)
            metrics.update(out[1])
            return (out[0],)

        return with_gradients(call, leaves, torch.ones_like), metrics

    (found, metrics), (expected, exact_metrics) = of(rk.policy_loss, backend=backend), of(reference.policy_loss)
    largest = float(expected[1].abs().nan_to_num(posinf=0.0, neginf=0.0, nan=0.0).max())
    scale = 1.0 + mask.sum().item() * largest * 1e3
    for key, x, y in zip(("loss", "d logprobs", "d entropy"), found, expected, strict=True):
        assert_same(key, x, y, scale)
    assert metrics.keys() == exact_metrics.keys()
    for key in metrics:
        assert_same(key, metrics[key], exact_metrics[key], scale + float(exact_metrics[key].abs().nan_to_num(posinf=0.0, nan=0.0)))
    fill.check()


@drawn
@given(
    seed=seeds,
    backend=st.sampled_from(["torch", "torch", "torch", "triton"]),
    batch=st.integers(1, 4),
    time=st.integers(1, 40),
    spice=st.lists(st.sampled_from([1e30, -1e30, 0.0, 5e-324, INF]), max_size=2),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    masked=st.sampled_from(["skip", "decay"]),
    ends=st.booleans(),
    bootstrap=st.booleans(),
)
def test_gae(seed, backend, batch, time, spice, gamma, lam, masked, ends, bootstrap):
    fill = Inputs(seed)
    shape = (batch, time)
    mask = fill.flags(*shape)
    hidden = torch.tensor(NAN, dtype=torch.float64)
    rewards = fill.guarded(torch.where(mask.cpu(), fill.spiced(fill.normal(*shape), spice, often=0.05), hidden))
    values = fill.guarded(torch.where(mask.cpu(), fill.normal(*shape), hidden))
    options: dict[str, Any] = {"gamma": gamma, "lam": lam, "mask": mask, "masked": masked}
    if ends:
        options["terminated"] = fill.flags(*shape, often=0.1)
    if bootstrap:
        options["last_values"] = fill.normal(batch).to(DEVICE)
    found, expected = rk.gae(rewards, values, backend=backend, **options), reference.gae(rewards, values, **options)
    size = float(rewards.abs().nan_to_num(posinf=0.0, nan=0.0).max())
    for name, x, y in zip(("advantages", "returns"), found, expected, strict=True):
        assert_same(name, x, y, 1.0 + time * size)
    fill.check()


@drawn
@given(
    seed=seeds,
    backend=st.sampled_from(["torch", "torch", "triton"]),
    batch=st.integers(1, 4),
    time=st.integers(1, 9),
    spice=st.lists(st.sampled_from([1e30, -1e30, 1e150, 0.0, INF, NAN]), max_size=2),
    clip=st.sampled_from([None, 0.2]),
    aggregation=st.sampled_from(["token-mean", "seq-mean-token-mean", "sum"]),
)
def test_value_loss(seed, backend, batch, time, spice, clip, aggregation):
    fill = Inputs(seed)
    shape = (batch, time)
    mask = fill.flags(*shape)
    values = fill.guarded(fill.spiced(fill.normal(*shape), spice))
    old, returns = fill.guarded(fill.normal(*shape)), fill.guarded(fill.normal(*shape))

    def of(loss: Any, **options: Any) -> list[Tensor]:
        def call(x: Tensor) -> tuple[Tensor]:
            return (loss(x, old if clip else None, returns, mask=mask, clip_range=clip, aggregation=aggregation, **options)[0],)

        return with_gradients(call, [values], torch.ones_like)

    for name, x, y in zip(("loss", "d values"), of(rk.value_loss, backend=backend), of(reference.value_loss), strict=True):
        assert_same(name, x, y, 1.0)
    fill.check()


@drawn
@given(
    seed=seeds,
    rows=st.integers(1, 4),
    vocabulary=st.sampled_from([1, 2, 9, 128, 131]),
    spread=st.sampled_from([1e-12, 1.0, 100.0]),
    spice=st.lists(st.sampled_from([-INF, 700.0, -700.0, 1e6]), max_size=2),
    beta=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_divergences(seed, rows, vocabulary, spread, spice, beta):
    fill = Inputs(seed)
    x, y = (fill.guarded(fill.spiced(fill.normal(rows, vocabulary) * spread, spice)) for _ in range(2))
    upstream = fill.normal(rows).to(DEVICE)

    def of(divergence: Any, **options: Any) -> list[Tensor]:
        result, gradient = with_gradients(lambda logits: (divergence(logits, y, beta=beta, **options),), [x], lambda _: upstream)
        return [result, torch.where(result.detach().isinf().unsqueeze(1), 0.0, gradient)]  # what is infinite has no slope

    size = float(max(t.abs().nan_to_num(posinf=0.0, neginf=0.0).max() for t in (x, y)))
    for name, mine, exact in zip(("divergence", "d logits"), of(rk.generalized_jsd, backend="torch"), of(reference.generalized_jsd), strict=True):
        assert_same(name, mine, exact, 1.0 + size + 1e-3 * size**2)  # the reference's probabilities are off by units of the logits
    fill.check()


def test_a_write_around_an_input_is_noticed():
    fill = Inputs(0)
    x = fill.guarded(fill.normal(2, 3))
    fill.check()
    x._base[0, 0] = 1.0
    with pytest.raises(AssertionError, match="was written to"):
        fill.check()
