"""What only a GPU's tensors take, without a GPU: every public function on fake CUDA tensors, which have a device, dtypes and shapes but no numbers.

The operators' bodies run, not only their fake kernels; a launch is a check of its tensors. A synchronisation with the host, operands of dtypes
that have no product, and tensors of two devices in one operation are errors.
"""

import ctypes
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rlkern as rk
from rlkern.ops.logits import Rows, Statistics
from rlkern.ops.products import product

N, V, H = 6, 40, 16
CUDA = torch.device("cuda", 0)
SAME_DTYPE = {torch.ops.aten.addmm: (1, 2), torch.ops.aten.mm: (0, 1), torch.ops.aten.index_put_: (0, 2), torch.ops.aten.index_copy_: (0, 3)}


class Bodies(TorchDispatchMode):
    """Runs our operators themselves where FakeTensorMode would ask their fake kernels.

    ``all_live``: the torch backend, which is made for CPUs, asks whether a mask leaves rows out; here it does not.
    """

    def __init__(self, all_live: bool = False) -> None:
        super().__init__()
        self.all_live = all_live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rlkern":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)
        if self.all_live and func in (torch.ops.aten.is_nonzero.default, torch.ops.aten.item.default) and args[0].dtype == torch.bool:
            return True
        if func.overloadpacket in SAME_DTYPE:  # which a device insists on, and fake tensors do not
            assert len({args[i].dtype for i in SAME_DTYPE[func.overloadpacket]}) == 1, f"{func}: {args}"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def _device_guard() -> Iterator[None]:
    """Without a GPU, or a CUDA build of torch, autograd and views find no guard for CUDA devices; that of the meta device stands in, a no-op."""
    if torch.cuda.is_available():
        yield
        return
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    try:  # indexed by DeviceType: CUDA is 1, meta 14
        guards = (ctypes.c_void_p * 15).in_dll(ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError) as e:
        pytest.skip(f"needs a GPU, or a torch whose table of device guards can be found: {e}")
    held, guards[1] = guards[1], guards[14]
    yield
    guards[1] = held


@pytest.fixture
def launches(_device_guard: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched; what they are given is on one GPU."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    launched: list[str] = []

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        assert tensors
        assert all(x.device == CUDA for x in tensors), f"{name}: {[x.device for x in tensors]}"
        launched.append(name)

    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: note(self.fn.__name__, args, kwargs))
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **kwargs: note(self.fn.__name__, args, kwargs))
    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    return launched


def backward(result: Tensor) -> list[torch.dtype]:
    """Runs the backward of ``result`` and gives the dtypes of the leaves' gradients; by hand, for autograd's engine asks the GPU's driver."""
    pending: dict[Any, list[Tensor | None]] = {result.grad_fn: [torch.ones_like(result)]}
    found = []
    while pending:
        node = max(pending, key=lambda n: -1 if hasattr(n, "variable") else n._sequence_nr())
        gradients = pending.pop(node)
        if hasattr(node, "variable"):
            (gradient,) = gradients
            assert gradient is not None
            assert (gradient.shape, gradient.dtype, gradient.device) == (node.variable.shape, node.variable.dtype, CUDA)
            found.append(gradient.dtype)
            continue
        gradients += [None] * (len(node._input_metadata) - len(gradients))
        following = list(node.next_functions)
        if hasattr(node, "apply"):  # a Function in Python: a result for every argument, and a node for every tensor among them
            results = [g for g, needed in zip(node.apply(*gradients), node.needs_input_grad, strict=False) if needed]
            following = [pair for pair in following if pair[0] is not None]
        else:
            results = node(*gradients)
            results = results if isinstance(results, tuple) else (results,)
        for (node, index), gradient in zip(following, results, strict=True):
            if node is not None and gradient is not None:
                slots = pending.setdefault(node, [])
                slots += [None] * (index + 1 - len(slots))
                held = slots[index]
                slots[index] = gradient if held is None else held + gradient
    return found


class Inputs:
    """Fake tensors on the GPU; ``leaf`` takes a gradient."""

    def __init__(self, dtype: torch.dtype, backend: str) -> None:
        self.dtype, self.backend = dtype, backend
        self.ids = torch.zeros(N, dtype=torch.int64, device=CUDA)
        self.mask = torch.ones(N, dtype=torch.bool, device=CUDA)
        self.cu_seqlens = torch.zeros(3, dtype=torch.int32, device=CUDA)

    def leaf(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=CUDA, requires_grad=True)

    def data(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=CUDA)

    @property
    def logits(self) -> Tensor:
        return self.leaf(N, V) * 1

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        return self.leaf(N, H), self.leaf(V, H)

    @property
    def row(self) -> Tensor:
        return self.data(N)

    @property
    def keep(self) -> rk.KeptTokens:
        return rk.KeptTokens(self.data(N + 1, dtype=torch.int64), self.data(3 * N, dtype=torch.int64))


def both(results: tuple[Tensor, Tensor]) -> Tensor:
    return results[0].sum() + results[1].sum()


CONFIG = rk.PolicyLossConfig.ppo(entropy_coef=0.1, kl_coef=0.1)
# Each gives what is differentiated, or None where nothing is.
CALLS: dict[str, Callable[[Inputs], Tensor | None]] = {
    "token_logprobs": lambda x: rk.token_logprobs(x.logits, x.ids, mask=x.mask, backend=x.backend).sum(),
    "token_logprobs, entropy": lambda x: both(rk.token_logprobs(x.logits, x.ids, temperature=x.row, with_entropy=True, backend=x.backend)),
    "token_logprobs, in place": lambda x: rk.token_logprobs(x.logits, x.ids, inplace_backward=True, backend=x.backend).sum(),
    "token_logprobs, keep": lambda x: rk.token_logprobs(x.logits, x.ids, keep=x.keep, backend=x.backend).sum(),
    "linear_token_logprobs": lambda x: rk.linear_token_logprobs(*x.head, x.ids, mask=x.mask, backend=x.backend).sum(),
    "linear_token_logprobs, bias, entropy": lambda x: both(
        rk.linear_token_logprobs(*x.head, x.ids, bias=x.leaf(V), with_entropy=True, chunk_bytes=2 * 6 * V, backend=x.backend)
    ),
    "linear_token_logprobs, frozen head": lambda x: rk.linear_token_logprobs(
        x.leaf(N, H), x.data(V, H, dtype=x.dtype), x.ids, backend=x.backend
    ).sum(),
    "linear_token_logprobs, narrow logits": lambda x: rk.linear_token_logprobs(*x.head, x.ids, logits_dtype=x.dtype, backend=x.backend).sum(),
    "linear_token_logprobs, float32 head": lambda x: rk.linear_token_logprobs(
        x.leaf(N, H), x.leaf(V, H, dtype=torch.float32), x.ids, rows=x.data(3, dtype=torch.int64), backend=x.backend
    ).sum(),
    "linear_token_logprobs, float32 head, frozen": lambda x: rk.linear_token_logprobs(x.leaf(N, H), x.data(V, H), x.ids, backend=x.backend).sum(),
    "fused_linear_policy_loss, float32 hidden states": lambda x: (
        rk.fused_linear_policy_loss(x.leaf(N, H, dtype=torch.float32), x.leaf(V, H), x.ids, x.row, x.row, backend=x.backend).loss
    ),
    "linear_full_kl, float32 head": lambda x: rk.linear_full_kl(
        x.leaf(N, H), x.leaf(V, H, dtype=torch.float32), x.data(N, H), x.data(V, H), backend=x.backend
    ).sum(),
    "linear_token_logprobs, keep": lambda x: rk.linear_token_logprobs(*x.head, x.ids, keep=x.keep, backend=x.backend).sum(),
    "policy_loss": lambda x: (
        rk.policy_loss(
            x.leaf(N, dtype=torch.float32),
            x.row,
            x.row,
            mask=x.mask,
            ref_logprobs=x.row,
            entropy=x.leaf(N, dtype=torch.float32),
            cu_seqlens=x.cu_seqlens,
            config=CONFIG,
            backend=x.backend,
        ).loss
    ),
    "policy_loss of sequences": lambda x: (
        rk.policy_loss(
            x.leaf(N, dtype=torch.float32), x.row, x.row, cu_seqlens=x.cu_seqlens, config=rk.PolicyLossConfig.gspo(), backend=x.backend
        ).loss
    ),
    "fused_policy_loss": lambda x: rk.fused_policy_loss(x.logits, x.ids, x.row, x.row, ref_logprobs=x.row, config=CONFIG, backend=x.backend).loss,
    "fused_policy_loss, in place": lambda x: rk.fused_policy_loss(x.logits, x.ids, x.row, x.row, mask=x.mask, inplace=True, backend=x.backend).loss,
    **{
        f"fused_linear_policy_loss, {mode}": lambda x, mode=mode: (
            rk.fused_linear_policy_loss(
                *x.head, x.ids, x.row, x.row, bias=x.leaf(V), mask=x.mask, ref_logprobs=x.row, config=CONFIG, mode=mode, backend=x.backend
            ).loss
        )
        for mode in (None, "in-forward", "recompute")
    },
    "fused_linear_policy_loss, frozen head": lambda x: (
        rk.fused_linear_policy_loss(x.leaf(N, H), x.data(V, H, dtype=x.dtype), x.ids, x.row, x.row, mode="frozen-head", backend=x.backend).loss
    ),
    "value_loss": lambda x: rk.value_loss(x.leaf(N), x.row, x.row, mask=x.mask, clip_range=0.2, backend=x.backend).loss,
    "kl_penalty": lambda x: rk.kl_penalty(x.leaf(N), x.row, mask=x.mask).sum(),
    "importance_ratio": lambda x: rk.importance_ratio(x.leaf(N), x.row, level="sequence", cu_seqlens=x.cu_seqlens).sum(),
    "preference_loss": lambda x: rk.preference_loss(x.leaf(N), x.leaf(N)).loss,
    "ranking_loss": lambda x: rk.ranking_loss(x.leaf(2, N)).loss,
    "full_kl": lambda x: rk.full_kl(x.logits, x.logits.detach(), mask=x.mask, backend=x.backend).sum(),
    "generalized_jsd": lambda x: rk.generalized_jsd(x.logits, x.logits.detach(), temperature=x.row, backend=x.backend).sum(),
    "linear_full_kl": lambda x: rk.linear_full_kl(*x.head, *(t.detach() for t in x.head), backend=x.backend).sum(),
    "linear_generalized_jsd": lambda x: rk.linear_generalized_jsd(
        *x.head, *(t.detach() for t in x.head), bias=x.leaf(V), ref_bias=x.data(V), mask=x.mask, backend=x.backend
    ).sum(),
    "importance_weights": lambda x: data(rk.importance_weights(x.row, x.row, mask=x.mask, high=2.0)),
    "gae": lambda x: data(*rk.gae(x.data(2, N), x.data(2, N), gamma=0.99, lam=0.95, terminated=x.data(2, N, dtype=torch.bool), backend=x.backend)),
    "gae, whitened": lambda x: data(*rk.gae(x.row, x.row, gamma=0.99, lam=0.95, cu_seqlens=x.cu_seqlens, whitened=True, backend=x.backend)),
    "discounted_returns": lambda x: data(rk.discounted_returns(x.data(2, N), gamma=0.99, backend=x.backend)),
    "td_lambda": lambda x: data(rk.td_lambda(x.data(2, N), x.data(2, N), gamma=0.99, lam=0.95, backend=x.backend)),
    "vtrace": lambda x: data(*rk.vtrace(x.data(2, N), x.data(2, N), x.data(2, N), x.data(2, N), gamma=0.99, backend=x.backend)),
    "group_advantages": lambda x: data(rk.group_advantages(x.row, group_size=3)),
    "group_advantages of ids": lambda x: data(rk.group_advantages(x.row, group_ids=x.ids)),
    "process_advantages": lambda x: data(rk.process_advantages(x.data(N, 2), x.data(N, 2, dtype=torch.int64), 5, group_size=3, backend=x.backend)),
    "shaped_rewards": lambda x: data(rk.shaped_rewards(x.row[:2], x.data(2, N), x.data(2, N), mask=x.data(2, N, dtype=torch.bool), kl_coef=0.1)),
    "whiten": lambda x: data(rk.whiten(x.row, x.mask)),
}
LEFT_OUT = {
    "register_surrogate",  # takes no tensors
    "gather_parameter",  # needs several processes
    "fused_linear_loss",  # runs autograd's engine
}


def function_of(name: str) -> str:
    return name.split(",")[0].split(" ")[0]


def data(*results: Tensor) -> None:
    """Checks what takes no gradient."""
    assert results
    assert all(r.device == CUDA for r in results)


def test_every_public_function_is_called():
    functions = {name for name in rk.__all__ if callable(getattr(rk, name)) and not isinstance(getattr(rk, name), type)}
    assert {function_of(name) for name in CALLS} == functions - LEFT_OUT


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # whether two buffers are one is asked by their addresses
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_forward_and_backward(name, dtype, backend, launches):
    if backend == "torch" and "keep" in name:
        pytest.skip("the torch backend counts what is kept, which fake tensors do not know")
    with FakeTensorMode(), Bodies(all_live=backend == "torch"):
        result = CALLS[name](Inputs(dtype, backend))
        if result is not None:
            assert result.device == CUDA
            assert backward(result)
    takes_backend = "backend" in inspect.signature(getattr(rk, function_of(name))).parameters
    assert bool(launches) == (backend == "triton" and takes_backend)


def test_what_would_fail(launches):
    """A synchronisation, a product that there is not, and a launch with what is elsewhere."""
    with FakeTensorMode(), Bodies():
        x = Inputs(torch.bfloat16, "triton")
        with pytest.raises(DataDependentOutputException):
            rk.linear_token_logprobs(*x.head, x.ids, mask=x.mask, compact=True)
        with pytest.raises(RuntimeError, match="out_dtype must be the same"):
            product(x.data(2, 2), x.data(2, 2), x.data(2, 2, dtype=torch.bfloat16))
        with pytest.raises(AssertionError, match="_kernel"):
            Rows(x.ids.cpu(), None, None, 1.0, None, "triton").statistics(x.logits, Statistics.empty(x.logits.dtype, (N,), x.logits.device, False))
