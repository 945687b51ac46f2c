"""Is a launch right? Against ``rlkern.reference`` in float64, by the error that the same plain computation makes in the launch's own dtype."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

from bench.compile import replaced
from bench.launches import Launch, Random, Tensors
from rlkern import kernels

TIMES = 4.0  # the plain computation's error
# And units in the last place of the largest number, since that error may be 0: 2 for what is stored in 16 bits. float64 has nothing more exact to be
# judged by, and a scan adds up many; losses and metrics are of ratios, which are as exact as log-probs of 10 or more, by a GPU's own exponentials.
UNITS = {torch.float64: 64.0, torch.float32: 16.0}
SCALAR_UNITS = 64.0


@dataclass(frozen=True)
class Finding:
    """Of one result of a launch, or the gradient of one of its inputs: largest difference to float64, and how large it may be."""

    of: str
    error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed


def judge(launch: Launch, device: torch.device, seed: int = 0) -> list[Finding]:
    """Run it on random inputs, forward and backward. The inputs are the same on every device."""
    fill = Random(seed, device)
    inputs = launch.inputs(fill)
    shared = {name: x.clone() for name, x in inputs.items()}  # a launch may write over its inputs
    results = launch.results(inputs)
    upstream = {name: fill.around(0.5, 1.0 if r.ndim else 0.0, r.shape, r.dtype) for name, r in results.items() if r.requires_grad}
    mine = launch.judged(results) | gradients(launch, inputs, results, upstream)
    exact, plain = (computed(launch, shared, upstream, dtype) for dtype in (torch.float64, None))
    if set(mine) - {"states", "terms"} != set(exact):
        raise AssertionError(f"results {sorted(mine)}, the reference has {sorted(exact)}")
    return [Finding(name, largest_difference(mine[name], x), allowed(mine[name], x, plain[name])) for name, x in exact.items()]


def once(launch: Launch, inputs: Tensors) -> Tensors:
    """Its results and gradients, as they are."""
    results = launch.results(inputs)
    return results | gradients(launch, inputs, results, {name: torch.full_like(r, 0.5) for name, r in results.items() if r.requires_grad})


def objections(launch: Launch, device: torch.device) -> list[str]:
    """What keeps a second run from giving the same bits: on a GPU without a synchronisation, and from a CUDA graph; elsewhere just again."""
    if device.type != "cuda":
        return _objections(launch, device)
    # All of it in the stream that is captured: the engine makes an input's node for gradients wait for the stream that first used it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = _objections(launch, device)
    torch.cuda.current_stream().wait_stream(stream)
    return found


def _objections(launch: Launch, device: torch.device) -> list[str]:
    inputs = launch.inputs(Random(0, device))
    before = {name: x.clone() for name, x in inputs.items()}

    def restored() -> Tensors:
        with torch.no_grad():
            for name, x in inputs.items():
                x.copy_(before[name])
        return inputs

    first = {name: r.detach().clone() for name, r in once(launch, inputs).items()}
    gpu = device.type == "cuda"
    found = []
    restored()
    if gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        again = once(launch, inputs)
    except RuntimeError as why:
        return [f"synchronises: {why}"]
    finally:
        if gpu:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{name} differs in a second run" for name in different(first, again)]
    if not gpu:
        return found
    graph = torch.cuda.CUDAGraph()
    restored()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            replayed = once(launch, inputs)
    except RuntimeError as why:
        # The second is what broke the capture, where it was not its end.
        causes = [str(e).splitlines()[0] for e in (why, why.__context__) if e is not None]
        return [*found, f"no CUDA graph captures it: {', after '.join(causes)}"]
    restored()
    graph.replay()
    torch.cuda.synchronize()
    return found + [f"{name} differs from a CUDA graph" for name in different(first, replayed)]


def different(first: Tensors, again: Tensors) -> list[str]:
    return [name for name, x in first.items() if not torch.equal(x.nan_to_num(), again[name].nan_to_num())]


def computed(launch: Launch, inputs: Tensors, upstream: Tensors, dtype: torch.dtype | None) -> Tensors:
    """The reference's results and gradients, of the inputs in this dtype; None for their own."""
    given = {name: x.detach().to(dtype) if dtype and x.is_floating_point() else x.detach().clone() for name, x in inputs.items()}
    for name in launch.wanted:
        given[name].requires_grad_()
    results = launch.exact(**given)
    return results | gradients(launch, given, results, {name: g.to(results[name]) for name, g in upstream.items()})


def gradients(launch: Launch, inputs: Tensors, results: Tensors, upstream: Tensors) -> Tensors:
    if not launch.wanted:
        return {}
    wanted = [inputs[name] for name in launch.wanted]
    found = torch.autograd.grad([results[name] for name in upstream], wanted, list(upstream.values()), materialize_grads=True)
    return {f"d {name}": g for name, g in zip(launch.wanted, found, strict=True)}


def largest_difference(x: Tensor, exact: Tensor) -> float:
    x, exact = x.detach().double().cpu(), exact.detach().double().cpu()
    if x.shape != exact.shape:
        raise AssertionError(f"shape {tuple(x.shape)}, expected {tuple(exact.shape)}")
    return float((x - exact).abs().nan_to_num(nan=torch.inf).max()) if x.numel() else 0.0


def allowed(x: Tensor, exact: Tensor, plain: Tensor) -> float:
    size = float(exact.detach().abs().max()) if exact.numel() else 0.0
    units = UNITS.get(x.dtype, 2.0)
    if x.ndim == 0:
        size, units = max(size, 1.0), SCALAR_UNITS  # of a loss terms of about 1 cancel
    return TIMES * largest_difference(plain, exact) + units * torch.finfo(x.dtype).eps * size


@contextlib.contextmanager
def kernels_launched() -> Iterator[set[str]]:
    """The names of the kernels that are launched inside, compiled or interpreted."""
    names: set[str] = set()
    launched = KernelInterface.__getitem__

    def noted(self: Any, grid: Any) -> Any:
        names.add(self.__name__)
        return launched(self, grid)

    with replaced(KernelInterface, __getitem__=noted):
        yield names


def entry_kernels() -> set[str]:
    """The names of all kernels that a host launches."""
    files = [file for folder in kernels.__path__ for file in Path(folder).glob("*.py")]
    return {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)}
