"""Promises that every public function keeps, from one table of them all: a new one cannot be left out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import rlkern as rk

B, T, V, H = 3, 5, 37, 8
Tensors = dict[str, Tensor]


def of_tokens(*names: str) -> Callable[[], Tensors]:
    return lambda: {name: -1 - torch.rand(B, T, dtype=torch.float64) for name in names}


def of_time(*names: str) -> Callable[[], Tensors]:
    return lambda: {name: torch.randn(B, T, dtype=torch.float64) for name in names}


def from_logits(*names: str) -> Callable[[], Tensors]:
    return lambda: {name: torch.randn(B, T, V, dtype=torch.float64) for name in names}


def from_hidden(*prefixes: str) -> Callable[[], Tensors]:
    def inputs() -> Tensors:
        found = {}
        for prefix in prefixes:
            found |= {f"{prefix}hidden": torch.randn(B, T, H, dtype=torch.float64), f"{prefix}weight": torch.randn(V, H, dtype=torch.float64)}
        return found

    return inputs


def together(*parts: Callable[[], Tensors]) -> Callable[[], Tensors]:
    return lambda: {name: x for part in parts for name, x in part().items()}


@dataclass(frozen=True)
class Entry:
    """A public function: its floating inputs, those that take gradients, what else it needs, and which inputs have no element a token."""

    inputs: Callable[[], Tensors]
    leaves: tuple[str, ...] = ()
    options: Callable[[], dict[str, Any]] = dict
    whole: tuple[str, ...] = ()
    vocabulary: bool = False  # its kernels take no float64
    required: bool = False  # a mask, which cannot be left out


def ids() -> dict[str, Any]:
    return {"ids": torch.arange(B * T).view(B, T) % V}


POLICY = of_tokens("old_logprobs", "advantages")
LOGITS, HIDDEN = from_logits("logits"), from_hidden("")
TABLE = {
    "token_logprobs": Entry(LOGITS, ("logits",), ids, vocabulary=True),
    "linear_token_logprobs": Entry(HIDDEN, ("hidden", "weight"), ids, ("weight",), vocabulary=True),
    "policy_loss": Entry(together(of_tokens("logprobs"), POLICY), ("logprobs",)),
    "fused_policy_loss": Entry(together(LOGITS, POLICY), ("logits",), ids, vocabulary=True),
    "fused_linear_policy_loss": Entry(together(HIDDEN, POLICY), ("hidden", "weight"), ids, ("weight",), vocabulary=True),
    "fused_linear_loss": Entry(HIDDEN, ("hidden", "weight"), lambda: ids() | {"loss_fn": lambda lp, h: h - lp}, ("weight",), vocabulary=True),
    "full_kl": Entry(from_logits("logits", "ref_logits"), ("logits",), vocabulary=True),
    "generalized_jsd": Entry(from_logits("logits", "ref_logits"), ("logits",), vocabulary=True),
    "linear_full_kl": Entry(from_hidden("", "ref_"), ("hidden", "weight"), dict, ("weight", "ref_weight"), vocabulary=True),
    "linear_generalized_jsd": Entry(from_hidden("", "ref_"), ("hidden", "weight"), dict, ("weight", "ref_weight"), vocabulary=True),
    "importance_ratio": Entry(of_tokens("logprobs", "old_logprobs"), ("logprobs",)),
    "importance_weights": Entry(of_tokens("old_logprobs", "sampling_logprobs")),
    "kl_penalty": Entry(of_tokens("logprobs", "ref_logprobs"), ("logprobs",)),
    "value_loss": Entry(of_time("values", "old_values", "returns"), ("values",), lambda: {"clip_range": 0.2}),
    "gae": Entry(of_time("rewards", "values"), (), lambda: {"gamma": 0.9, "lam": 0.8}),
    "td_lambda": Entry(of_time("rewards", "values"), (), lambda: {"gamma": 0.9, "lam": 0.8}),
    "discounted_returns": Entry(of_time("rewards"), (), lambda: {"gamma": 0.9}),
    "vtrace": Entry(together(of_time("rewards", "values"), of_tokens("logprobs", "old_logprobs")), (), lambda: {"gamma": 0.9}),
    "whiten": Entry(of_time("x")),
    "shaped_rewards": Entry(
        together(of_tokens("logprobs", "ref_logprobs"), lambda: {"rewards": torch.randn(B, dtype=torch.float64)}),
        (),
        lambda: {"kl_coef": 0.1},
        ("rewards",),
        required=True,
    ),
    "group_advantages": Entry(lambda: {"rewards": torch.randn(6, dtype=torch.float64)}, (), lambda: {"group_size": 3}, ("rewards",)),
    "process_advantages": Entry(
        lambda: {"step_rewards": torch.randn(4, 2, dtype=torch.float64)},
        (),
        lambda: {"step_ends": torch.tensor([[1, 3]] * 4), "length": T, "group_size": 2},
        ("step_rewards",),
    ),
    "preference_loss": Entry(of_time("chosen", "rejected"), ("chosen", "rejected")),
    "ranking_loss": Entry(of_time("scores"), ("scores",)),
}
OTHERS = {"KeptTokens", "LossOutput", "PolicyLossConfig", "VocabShard", "__version__", "gather_parameter", "register_surrogate"}
NAMES = sorted(TABLE)


def test_the_table_is_complete():
    assert set(TABLE) | OTHERS == set(rk.__all__)
    assert not set(TABLE) & OTHERS


def takes(name: str, option: str) -> bool:
    return option in inspect.signature(getattr(rk, name)).parameters


def call(name: str, x: Tensors, backend: str, **options: Any) -> Any:
    entry = TABLE[name]
    options |= {"backend": backend} if takes(name, "backend") else {}
    if entry.required and "mask" not in options:
        options["mask"] = torch.ones(B, T, dtype=torch.bool)
    out = getattr(rk, name)(**x, **entry.options(), **options)
    return out._replace(logprobs=None) if name == "policy_loss" else out  # which are those that it was given


def results(out: Any) -> list[Tensor]:
    """Every tensor that a function made."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        out = tuple(out.values())
    return [t for part in out if part is not None for t in results(part)] if isinstance(out, tuple) else []


def differentiable(out: Any) -> Tensor:
    """One number of which gradients are taken."""
    out = getattr(out, "loss", out)
    return sum((t * t).sum() for t in results(out) if t.requires_grad)  # type: ignore[return-value]


def inputs(name: str, dtype: torch.dtype, *, leaves: bool = False) -> Tensors:
    torch.manual_seed(0)
    return {key: x.to(dtype).requires_grad_(leaves and key in TABLE[name].leaves) for key, x in TABLE[name].inputs().items()}


@pytest.mark.parametrize("name", NAMES)
def test_results_are_float32_or_float64(name, backend):
    """Promise 1, and 9: the Triton kernels over a vocabulary say that they take no float64."""
    for dtype in (torch.bfloat16, torch.float32):
        for t in results(call(name, inputs(name, dtype), backend)):
            assert t.dtype == torch.float32
    if backend == "triton" and TABLE[name].vocabulary:
        with pytest.raises(ValueError, match=r"float64.*backend='torch'"):
            call(name, inputs(name, torch.float64), backend)
    else:
        assert {t.dtype for t in results(call(name, inputs(name, torch.float64), backend))} == {torch.float64}


@pytest.mark.parametrize("name", [name for name in NAMES if takes(name, "mask")])
def test_masked_positions_are_not_read(name, backend):
    """Promise 2: NaN there changes no bit, and the gradient there is 0."""
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0], mask[1, :2] = True, False
    clean = inputs(name, torch.float32, leaves=True)
    dirty = inputs(name, torch.float32)
    for key, x in dirty.items():
        if key not in TABLE[name].whole:
            x[~mask] = torch.nan
    dirty = {key: x.requires_grad_(clean[key].requires_grad) for key, x in dirty.items()}
    of_clean, of_dirty = (call(name, x, backend, mask=mask) for x in (clean, dirty))
    for a, b in zip(results(of_clean), results(of_dirty), strict=True):
        assert torch.equal(a, b)
    if TABLE[name].leaves:
        for out in (of_clean, of_dirty):
            differentiable(out).backward()
        for key in TABLE[name].leaves:
            a, b = clean[key].grad, dirty[key].grad
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)
            if key not in TABLE[name].whole:
                assert not b[~mask].any()


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_and_untouched_inputs(name, backend):
    """Promises 6 and 8."""
    x = inputs(name, torch.float32, leaves=True)
    before = {key: t.detach().clone() for key, t in x.items()}
    first, second = (results(call(name, x, backend)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    if TABLE[name].leaves:
        differentiable(call(name, x, backend)).backward()
    for key, t in x.items():
        assert torch.equal(t.detach(), before[key])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_where_they_should(name, backend):
    """Promise 8: to the leaves of the table, and to nothing else that asks for one."""
    x = {key: t.requires_grad_() for key, t in inputs(name, torch.float32).items()}
    out = call(name, x, backend)
    if not TABLE[name].leaves:
        assert not any(t.requires_grad for t in results(out))
        return
    gradients = torch.autograd.grad(differentiable(out), list(x.values()), allow_unused=True)
    assert {key for key, g in zip(x, gradients, strict=True) if g is not None} == set(TABLE[name].leaves)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if TABLE[name].leaves and name not in ("importance_ratio", "preference_loss", "ranking_loss")]
)
def test_second_derivatives_are_an_error(name, backend):
    """Promise 7. Those left out are plain PyTorch, and have them."""
    x = inputs(name, torch.float32, leaves=True)
    leaf = x[TABLE[name].leaves[0]]
    (gradient,) = torch.autograd.grad(differentiable(call(name, x, backend)), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name, backend):
    """Promise 7."""
    if name in ("group_advantages", "process_advantages", "shaped_rewards", "preference_loss", "ranking_loss"):
        x = {key: t[:0] for key, t in inputs(name, torch.float32).items()}
        options = {"mask": torch.ones(0, T)} if TABLE[name].required else {}
        entry = TABLE[name].options()
        out = getattr(rk, name)(**x, **{k: v[:0] if isinstance(v, Tensor) else v for k, v in entry.items()}, **options)
    else:
        x = {key: t if key in TABLE[name].whole else t[:0] for key, t in inputs(name, torch.float32).items()}
        entry = {k: v[:0] if isinstance(v, Tensor) else v for k, v in TABLE[name].options().items()}
        out = getattr(rk, name)(**x, **entry, **({"backend": backend} if takes(name, "backend") else {}))
    assert all(t.numel() == 0 or bool(t.isfinite().all()) for t in results(out))


@pytest.mark.parametrize("name", NAMES)
def test_errors_name_the_argument(name, backend):
    """Promises 4 and 9: what was given and what is expected."""
    for key in TABLE[name].inputs():
        x: dict[str, Any] = inputs(name, torch.float32)
        with pytest.raises(TypeError, match=f"{key} must be a torch.Tensor, got list"):
            call(name, x | {key: [1.0, 2.0]}, backend)
        with pytest.raises(TypeError, match=f"{key} must have a dtype of .*got torch.int64"):
            call(name, x | {key: x[key].long()}, backend)
    if takes(name, "backend"):
        with pytest.raises(ValueError, match="'cuda' is not a backend"):
            call(name, inputs(name, torch.float32), "cuda")
