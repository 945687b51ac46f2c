"""From 16-bit hidden states and head, by default: the numbers of exact products, in every function and mode; and the products themselves."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rlkern as rk
from rlkern import reference
from rlkern.ops import products

from .judge import HEADROOM, assert_accurate, error
from .ranks import on_ranks

N, V, H = 24, 500, 64
HALF = [torch.bfloat16, torch.float16]
ROUNDING = HEADROOM  # roundings to 16 bits, by far the largest error of a gradient, are the same on every processor: their number is exact
CONFIG = rk.PolicyLossConfig.ppo(entropy_coef=0.1, clip_low=0.5, clip_high=0.5)


class Problem:
    """Peaked rows, chosen logits of about 10 and a policy that has moved, so that an error in the logits shows in the ratio and in the gradient."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        hidden, weight, bias = torch.randn(N, H), torch.randn(V, H) / 3, torch.randn(V)
        self.given = [t.to(device, dtype) for t in (hidden, weight, bias)]
        self.ref = [t.to(device, dtype) for t in (hidden + 0.3 * torch.randn(N, H), weight, bias)]
        self.ids = torch.randint(V, (N,), device=device)
        self.advantages = torch.randn(N, device=device)
        self.up = torch.randn(2, N, device=device)
        self.old = self.logprobs(*self.leaves(torch.float64), backend="torch")[0][0].detach().float() + 0.1 * torch.randn(N, device=device)

    def leaves(self, dtype: torch.dtype | None = None, *, frozen: bool = False) -> list[Tensor]:
        leaves = [t.detach().clone() if dtype is None else t.to(dtype) for t in self.given]
        return [t.requires_grad_(i == 0 or not frozen) for i, t in enumerate(leaves)]

    def run(self, function, leaves: list[Tensor], **options) -> tuple[list[Tensor], list[Tensor]]:
        """Values, and the gradients of those leaves that take them."""
        values, loss = function(*leaves, **options)
        return [v.detach() for v in values], list(torch.autograd.grad(loss, [t for t in leaves if t.requires_grad]))

    def logprobs(self, hidden: Tensor, weight: Tensor, bias: Tensor, **options) -> tuple[list[Tensor], Tensor]:
        lp, entropy = rk.linear_token_logprobs(hidden, weight, self.ids, bias=bias, with_entropy=True, **options)
        return [lp, entropy], (lp * self.up[0] + entropy * self.up[1]).sum()

    def logprobs_alone(self, hidden: Tensor, weight: Tensor, bias: Tensor, **options) -> tuple[list[Tensor], Tensor]:
        lp = rk.linear_token_logprobs(hidden, weight, self.ids, bias=bias, **options)
        return [lp], (lp * self.up[0]).sum()

    def loss(self, hidden: Tensor, weight: Tensor, bias: Tensor, **options) -> tuple[list[Tensor], Tensor]:
        out = rk.fused_linear_policy_loss(
            hidden,
            weight,
            self.ids,
            self.old.to(torch.promote_types(hidden.dtype, torch.float32)),
            self.advantages,
            bias=bias,
            config=CONFIG,
            **options,
        )
        return [out.logprobs, out.entropy], out.loss

    def own_loss(self, hidden: Tensor, weight: Tensor, bias: Tensor, **options) -> tuple[list[Tensor], Tensor]:
        out = rk.fused_linear_loss(hidden, weight, self.ids, lambda lp, h: -lp - 0.1 * h, bias=bias, **options)
        return [out.logprobs, out.entropy], out.loss

    def jsd(self, hidden: Tensor, weight: Tensor, bias: Tensor, **options) -> tuple[list[Tensor], Tensor]:
        ref = [t.to(hidden.dtype) for t in self.ref]
        found = rk.linear_generalized_jsd(hidden, weight, *ref[:2], bias=bias, ref_bias=ref[2], **options)
        return [found], (found * self.up[0]).sum()

    def exact(self, function: str, *, frozen: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Values and gradients by the reference, of the same numbers in float64."""
        leaves = self.leaves(torch.float64, frozen=frozen)
        logits = leaves[0] @ leaves[1].t() + leaves[2]
        lp, entropy = reference.token_logprobs(logits, self.ids, with_entropy=True)
        values = [lp, entropy]
        if function == "logprobs":
            loss = (lp * self.up[0] + entropy * self.up[1]).sum()
        elif function == "logprobs_alone":
            values, loss = [lp], (lp * self.up[0]).sum()
        elif function == "loss":
            loss = reference.policy_loss(lp, self.old.double(), self.advantages.double(), entropy=entropy, config=CONFIG)[0]
        elif function == "own_loss":
            loss = (-lp - 0.1 * entropy).mean()
        else:
            hidden, weight, bias = (t.double() for t in self.ref)
            values = [reference.generalized_jsd(logits, hidden @ weight.t() + bias)]
            loss = (values[0] * self.up[0]).sum()
        return [v.detach() for v in values], list(torch.autograd.grad(loss, [t for t in leaves if t.requires_grad]))


MODES = {
    "logprobs": ("logprobs", {}, False),
    "logprobs, frozen head": ("logprobs_alone", {}, True),
    "loss, in the forward": ("loss", {"mode": "in-forward"}, False),
    "loss, recomputed": ("loss", {"mode": "recompute"}, False),
    "loss, frozen head": ("loss", {"mode": "frozen-head"}, True),
    "own loss": ("own_loss", {}, False),
    "JSD": ("jsd", {}, False),
    "JSD, frozen head": ("jsd", {}, True),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_defaults_are_exact(name, dtype, backend, device):
    function, options, frozen = MODES[name]
    p = Problem(dtype, device)
    options = {**options, "chunk_bytes": 7 * 6 * V}
    exact, exact_grads = p.exact(function, frozen=frozen)
    mine, grads = p.run(getattr(p, function), p.leaves(frozen=frozen), **options, backend=backend)
    assert_accurate(mine[0], exact[0], eps=1e-5)
    for x, y in zip(mine[1:], exact[1:], strict=True):
        assert_accurate(x, y, eps=1e-4)
    # J of a frozen head is rounded too, or by kernels the gradient of the logits; the interpreter cuts off where a GPU rounds, twice as far.
    k = 2 if backend == "torch" else 4
    for x, y in zip(grads, exact_grads, strict=True):
        assert x.dtype == dtype
        assert_accurate(x, y, y.to(dtype), k=k * ROUNDING, eps=0.0)


def test_narrow_logits_are_there_by_name(backend, device):
    p = Problem(torch.bfloat16, device)
    exact = p.logprobs(*p.leaves(torch.float64), backend="torch")[0][0]
    wide, narrow = (p.logprobs(*p.leaves(), logits_dtype=d, backend=backend)[0][0] for d in (None, torch.bfloat16))
    assert error(wide, exact) < 1e-5 < 1e-3 < error(narrow, exact)


def test_the_ratio_of_an_unchanged_policy_is_one(backend, device):
    """Old log-probs without a gradient, in chunks of another size, and the loss of the first update."""
    p = Problem(torch.bfloat16, device)
    hidden, weight, bias = p.given
    old = rk.linear_token_logprobs(hidden, weight, p.ids, bias=bias, backend=backend)
    for mode in ("in-forward", "recompute"):
        leaves = p.leaves()
        out = rk.fused_linear_policy_loss(
            *leaves[:2], p.ids, old, p.advantages, bias=leaves[2], mode=mode, chunk_bytes=5 * 6 * V, backend=backend, config=rk.PolicyLossConfig.ppo()
        )
        assert abs(float(out.metrics["ratio_max"]) - 1) < 1e-5
        assert abs(float(out.metrics["approx_kl"])) < 1e-5


def test_mixed_operands(backend, device):
    """Of hidden states in one dtype and a head in another the products are exact as well."""
    p = Problem(torch.bfloat16, device)
    for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)):
        hidden, weight = (t.to(dtype) for t, dtype in zip(p.given[:2], dtypes, strict=True))
        for bias in (None, p.given[2], p.given[2].float()):
            logits = hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())
            exact = reference.token_logprobs(logits, p.ids)
            assert_accurate(rk.linear_token_logprobs(hidden, weight, p.ids, bias=bias, backend=backend), exact, eps=1e-5)


def divided(rank: int, world: int) -> list[list[Tensor]]:
    """What a rank with its part of the head finds, and the exact answer."""
    torch.manual_seed(0)
    p = Problem(torch.bfloat16, torch.device("cpu"))
    hidden, weight, bias = p.leaves()
    part = [x.detach().chunk(world)[rank].clone().requires_grad_() for x in (weight, bias)]
    values, loss = p.logprobs(hidden, part[0], part[1], process_group=dist.group.WORLD, chunk_bytes=7 * 6 * V // world)
    exact, gradients = p.exact("logprobs", frozen=False)
    share = [gradients[0], *(x.chunk(world)[rank] for x in gradients[1:])]
    return [[v.detach() for v in values], exact, list(torch.autograd.grad(loss, [hidden, *part])), share]


def test_a_divided_head_is_exact_by_default():
    for values, exact, gradients, share in on_ranks(2, divided):
        assert_accurate(values[0], exact[0], eps=1e-5)
        assert_accurate(values[1], exact[1], eps=1e-4)
        # The ranks' terms of d hidden are rounded, and then their sum.
        for k, x, y in zip((4, 2, 2), gradients, share, strict=True):
            assert x.dtype == torch.bfloat16
            assert_accurate(x, y, y.bfloat16(), k=k * ROUNDING, eps=0.0)


# ---- products -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3, 40), (5, 40, 3), (40, 5, 3), (4, 4, 4), (1, 1, 1), (0, 3, 4), (3, 0, 4)], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_products_on_a_cpu(shape, out_dtype, accumulate, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 64)  # several blocks
    n, k, m = shape
    for dtypes in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ):
        a, b = torch.randn(n, k).to(dtypes[0]), torch.randn(m, k).to(dtypes[1]).t()
        held = torch.randn(n, m).to(out_dtype)
        exact = a.double() @ b.double() + (held.double() if accumulate else 0)
        out = held.clone() if accumulate else torch.full_like(held, torch.nan)  # which is not read
        products.product(a, b, out, accumulate=accumulate)
        assert_accurate(out, exact, exact.to(out_dtype), k=1.01 * ROUNDING, eps=2e-6 * max(1, k) ** 0.5)


class Recorded(TorchDispatchMode):
    """The operators that were called, with their dtypes and beta."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.dtype], float]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        self.calls.append((str(func), [t.dtype for t in tensors], (kwargs or {}).get("beta", 1)))
        return tensors[-1]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_products_of_a_device_with_tensor_cores(dtype):
    """What they multiply stays 16-bit, and their result is float32: nothing is converted before or after."""
    a, b, out = (torch.empty(4, 4, dtype=d, device="meta") for d in (dtype, dtype, torch.float32))
    for accumulate in (False, True):
        with Recorded() as recorded:
            products.product(a, b, out, accumulate=accumulate)
        assert recorded.calls == [("aten.addmm.dtype_out", [torch.float32, dtype, dtype, torch.float32], int(accumulate))]
    with Recorded() as recorded:
        products.product(a, b, a)
    assert recorded.calls == [("aten.addmm.out", [dtype] * 4, 0)]


def test_a_wide_head_is_never_whole(device):
    """The 16-bit head is widened a block at a time."""
    if device.type == "cuda":
        pytest.skip("the CPU's products")
    sizes = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                sizes.append(out.untyped_storage().nbytes())
            return out

    vocabulary, width, rows = 60_000, 128, 16
    hidden, weight = torch.randn(rows, width).bfloat16(), torch.randn(vocabulary, width).bfloat16()
    ids = torch.arange(rows)
    with Allocations():
        rk.linear_token_logprobs(hidden.requires_grad_(), weight.requires_grad_(), ids, chunk_bytes=4 * 6 * vocabulary)
    assert max(sizes) < 4 * vocabulary * width
