"""Launch configurations to choose from: for each that ``rlkern.ops`` has, candidates written down beforehand, and the calls that they are timed on.

python -m bench.gpu --minutes 6 --out DIR                                    # times them: DIR/configs.json
python -m bench.compile --launches bench.configurations --target sm_90       # registers, spills and load widths of each, without a GPU
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rlkern as rk
from bench import launches
from bench.compile import replaced
from bench.harness import FLUSHED, cold_seconds, error
from bench.launches import Launch, Tensors
from bench.verdict import once
from rlkern import ops, reference
from rlkern.reference.common import compute_dtype

WIDTH = 4096  # of hidden states
Changes = Mapping[str, int]  # of the fields of a configuration; of constants, in capitals, of its module and the launcher's
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Case:
    """A call, its size on a GPU, and the candidates for the configuration ``owner`` (a class of ``rlkern.ops``) that it is timed with."""

    title: str
    owner: str
    launcher: str  # the last part of the name of the module whose constants are changed
    launch: Callable[[], Launch]
    timed: str
    candidates: Sequence[Changes]
    rows: tuple[int, int] = (8, 1024)
    vocabulary: int = 128256  # 0: there is none


# (lanes, unroll, blocks): 16 bytes each of so many lanes, so many times, make a block.
_BLOCKS = ((64, 2, 4), (128, 1, 4), (128, 2, 2), (128, 2, 8), (128, 4, 1), (256, 1, 2), (256, 2, 1), (256, 2, 4), (512, 1, 2))


def _lanes(*changes: tuple[int, int]) -> list[Changes]:
    return [{"lanes": lanes, "unroll": unroll} for lanes, unroll in changes]


_STATISTICS = [
    *_lanes((64, 2), (64, 4), (128, 1), (128, 4), (256, 1), (256, 2), (512, 1), (512, 2)),
    *({"segment": segment} for segment in (16384, 65536, 262144)),
]
_GRADIENT = [{"lanes": lanes, "unroll": unroll, "blocks": blocks} for lanes, unroll, blocks in _BLOCKS]
_LOSS = [*_lanes((128, 2), (256, 1), (256, 2), (256, 4), (512, 1), (512, 2), (512, 4), (1024, 1), (1024, 2)), {"hold": 0}]
_PAIR = [{"lanes": lanes, "unroll": unroll, "blocks": blocks} for lanes, unroll, blocks in _BLOCKS]
_TOKENS = [{"BLOCK": block, "WARPS": warps} for block, warps in ((256, 4), (256, 8), (512, 2), (512, 16), (1024, 4), (1024, 8), (2048, 8))]
_SCAN = [
    {"rows": rows, "lanes": lanes, "warps": warps}
    for rows, lanes, warps in ((1, 256, 2), (1, 256, 4), (1, 512, 4), (1, 512, 8), (2, 128, 4), (4, 64, 4))
]
_CHUNKS = [{"chunk_bytes": mib << 20} for mib in (256, 512, 1024, 2048, 4096)]


def linear_policy_loss(chunk_bytes: int | None = None) -> Launch:
    """From hidden states, gradients made in the forward."""
    width = WIDTH

    def inputs(fill: launches.Blank) -> Tensors:
        size, n = launches.VOCABULARY, math.prod(launches.ROWS)
        x = {"hidden": fill.around(0.0, 1.0, (n, width), torch.bfloat16), "weight": fill.around(0.0, 2 / width**0.5, (size, width), torch.bfloat16)}
        x |= {"ids": fill.ids((n,), size), "old_logprobs": fill.around(-math.log(size), 0.5, (n,)), "advantages": fill.around(0.5, 1.0, (n,))}
        return x

    def ours(**x: Any) -> Tensors:
        return {"loss": rk.fused_linear_policy_loss(**x, chunk_bytes=chunk_bytes, backend=launches.BACKEND).loss}

    def exact(hidden: Tensor, weight: Tensor, ids: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensors:
        logprobs = reference.token_logprobs(hidden.to(compute_dtype(hidden)) @ weight.to(compute_dtype(weight)).t(), ids)
        assert isinstance(logprobs, Tensor)
        return {"loss": reference.policy_loss(logprobs, old_logprobs, advantages, config=rk.PolicyLossConfig.ppo())[0]}

    return Launch(inputs, ours, exact, ("hidden", "weight"))


def _cases() -> Iterator[Case]:
    logprobs = functools.partial(launches.token_logprobs, with_entropy=True)
    for vocabulary in (128256, 32000):
        yield Case("token_logprobs and entropy", "RowConfig", "logits", logprobs, FORWARD, _STATISTICS, vocabulary=vocabulary)
        yield Case("token_logprobs and entropy", "GradientConfig", "logits", logprobs, BACKWARD, _GRADIENT, vocabulary=vocabulary)
        loss = functools.partial(launches.fused_policy_loss, rk.PolicyLossConfig.ppo())
        yield Case("fused_policy_loss", "LossTiling", "logits", loss, FORWARD, _LOSS, vocabulary=vocabulary)
    yield Case("fused_linear_policy_loss", CHUNKS, "", linear_policy_loss, FORWARD, _CHUNKS)
    for beta, name in ((1.0, "full_kl"), (0.5, "generalized_jsd")):
        for timed in (FORWARD, BACKWARD):
            yield Case(name, "PairTiling", "divergence", functools.partial(launches.divergence, beta), timed, _PAIR, rows=(4, 1024))
    tokens = functools.partial(launches.policy_loss, rk.PolicyLossConfig.ppo())
    yield Case("policy_loss", "Layout", "policy", tokens, FORWARD, _TOKENS, rows=(512, 2048), vocabulary=0)
    yield Case("value_loss", "Layout", "value", launches.value_loss, FORWARD, _TOKENS, rows=(512, 2048), vocabulary=0)
    for rows in ((8192, 2048), (256, 2048)):
        yield Case("gae", "TileConfig", "scan", functools.partial(launches.gae, *rows), FORWARD, _SCAN, rows=rows, vocabulary=0)


CHUNKS = "chunk_bytes"  # no class, but an argument of the functions from hidden states
CASES = tuple(_cases())


def named(case: Case) -> str:
    size = f", V {case.vocabulary}" if case.vocabulary else f", {case.rows[0]} x {case.rows[1]}"
    return f"{case.title}, {case.timed}{size}"


def label(changes: Changes) -> str:
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or "as it is"


@functools.cache
def _operators() -> list[Any]:
    """The modules of ``rlkern.ops``, some of which the library imports when they are first needed."""
    return [importlib.import_module(found.name) for found in pkgutil.walk_packages(ops.__path__, "rlkern.ops.")]


def _modules(attribute: str) -> list[Any]:
    return [module for module in _operators() if hasattr(module, attribute)]


@contextlib.contextmanager
def configured(case: Case, changes: Changes) -> Iterator[list[Any]]:
    """Inside, whatever configuration ``of`` gives has these fields changed. Gives the configurations that were asked for, as they were given."""
    asked: list[Any] = []
    fields = {name: value for name, value in changes.items() if not name.isupper()}
    constants = {name: value for name, value in changes.items() if name.isupper()}
    if case.owner == CHUNKS:
        yield asked
        return
    owner = getattr(_modules(case.owner)[0], case.owner)
    of = owner.__dict__["of"]

    def changed(cls: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(dataclasses.replace(of.__func__(cls, *args, **kwargs), **fields))
        return asked[-1]

    with contextlib.ExitStack() as stack:
        for name, value in constants.items():
            for module in _modules(name):
                if module.__name__ == owner.__module__ or module.__name__.rsplit(".", 1)[1] == case.launcher:
                    stack.enter_context(replaced(module, **{name: value}))
        stack.enter_context(replaced(owner, of=classmethod(changed)))
        yield asked


def made(case: Case, changes: Changes) -> Launch:
    return case.launch(**changes) if case.owner == CHUNKS else case.launch()


def objections(changes: Changes) -> list[str]:
    """What a candidate must not be, by its numbers alone."""
    found = [f"{name} {value}: no power of 2" for name, value in changes.items() if value & (value - 1)]
    numbers = {name.lower(): value for name, value in changes.items()}
    block, warps = numbers.get("block", numbers.get("lanes", 0) * numbers.get("rows", 1) * 4), numbers.get("warps", 0)
    if warps > 32:
        found.append(f"{warps} warps: 1024 threads are the most there are")
    if block and warps and not 1 <= block / (32 * warps) <= 32:
        found.append(f"{block} elements for {32 * warps} threads: more than 32 for one would not stay in registers, and none may be idle")
    if "lanes" in numbers and not warps and not 32 <= numbers["lanes"] <= 1024:
        found.append(f"{numbers['lanes']} lanes: a thread has one, and 32 to 1024 threads are possible")
    if numbers.get("unroll", 1) > 8:
        found.append(f"{numbers['unroll']} loads of 16 bytes would not stay in a thread's registers")
    return found


# ---- timing ---------------------------------------------------------------------------------------------------------------------------------


class OnDevice(launches.Blank):
    """Random inputs made where they are needed: the large ones of a timing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(0)

    def around(self, mean: float, spread: float, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype).mul_(spread).add_(mean)

    def ids(self, shape: Sequence[int], vocabulary: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(vocabulary, shape, generator=self.generator, device=self.device, dtype=dtype)

    def flags(self, shape: Sequence[int], often: float = 0.75) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device) < often

    def given(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return super().given(values, dtype).to(self.device)


def call_of(case: Case, launch: Launch, inputs: Tensors) -> Callable[[], list[Tensor]]:
    """What is timed: the forward, or the backward of a forward that was made before."""
    if case.timed == FORWARD:
        return lambda: list(launch.results(inputs).values())
    results = [r for r in launch.results(inputs).values() if r.requires_grad]
    upstream = [torch.full_like(r, 0.5) for r in results]
    return lambda: list(torch.autograd.grad(results, [inputs[name] for name in launch.wanted], upstream, retain_graph=True))


def sample(x: Tensor) -> Tensor:
    """Enough of its numbers to see whether they are right."""
    return (x.detach() if x.numel() < 1 << 20 else x.detach().flatten()[::257]).nan_to_num()


@contextlib.contextmanager
def sized(case: Case, *, small: bool) -> Iterator[None]:
    rows, vocabulary = ((2, 4), min(case.vocabulary, 1000)) if small else (case.rows, case.vocabulary)
    with replaced(launches, ROWS=rows, VOCABULARY=vocabulary):
        yield


def compiled(case: Case, changes: Changes, device: torch.device) -> None:
    """Run it once, forward and backward, on few rows of the real vocabulary: what it compiles is what the timing needs."""
    with replaced(launches, ROWS=(2, 32), VOCABULARY=case.vocabulary), configured(case, changes):
        launch = made(case, changes)
        once(launch, launch.inputs(OnDevice(device)))


def seconds_of(call: Callable[[], Any], flush: Tensor | None) -> float:
    """Of one call, on a GPU the least of three between two events."""
    if flush is not None:
        return min(cold_seconds(call, 1, flush) for _ in range(3))
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compared(case: Case, device: torch.device, *, rounds: int = 5, small: bool = False) -> dict[str, Any]:
    """All candidates and the configuration as it is, in turn, round after round. A candidate that fails or is wrong says so, and is not chosen."""
    todo: list[Changes] = [{}, *case.candidates]
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    fields: dict[str, Any] = {}
    with sized(case, small=small):
        size = {"rows": launches.ROWS, "vocabulary": launches.VOCABULARY}
        inputs = case.launch().inputs(OnDevice(device))
        flush = torch.empty(FLUSHED, dtype=torch.uint8, device=device) if device.type == "cuda" else None
        calls, answer = {}, None
        for changes in todo:
            name = label(changes)
            try:
                with configured(case, changes) as asked:
                    launch = made(case, changes)
                    results = [sample(r) for r in once(launch, inputs).values()]
                    calls[name] = call_of(case, launch, inputs)
            except Exception as why:
                if not changes:
                    raise
                failed[name] = f"{type(why).__name__}: {str(why).strip().splitlines()[0] if str(why).strip() else ''}"
                continue
            answer = results if answer is None else answer
            off = error(results, answer)
            if off > max(64 * torch.finfo(r.dtype).eps for r in results):
                failed[name] = f"differs from the configuration as it is by {off:.1e}"
                calls.pop(name)
                continue
            used = asked[0 if case.timed == FORWARD else -1] if asked else None
            fields[name] = {"text": repr(used), "fields": _plain(used)} if used else {"text": label(changes), "fields": dict(changes)}
            fields[name]["constants"] = {key: value for key, value in changes.items() if key.isupper()}
            times[name] = []
        for _ in range(rounds):
            for changes in todo:
                if (name := label(changes)) in calls:
                    with configured(case, changes):
                        times[name].append(seconds_of(calls[name], flush))
    medians = {name: statistics.median(t) for name, t in times.items()}
    best = min(medians, key=lambda name: medians[name])
    return {
        "configuration": case.owner,
        "call": f"{case.title}, {case.timed}",
        **size,
        "now": {**fields[label({})], "seconds": medians[label({})]},
        "best": {**fields[best], "changes": best, "seconds": medians[best]},
        "gain": medians[label({})] / medians[best],
        "seconds": medians,
        "failed": failed,
    }


def _plain(configuration: Any) -> dict[str, Any]:
    """The fields that are numbers."""
    return {field.name: value for field in dataclasses.fields(configuration) if isinstance(value := getattr(configuration, field.name), int)}


# ---- for bench.compile ----------------------------------------------------------------------------------------------------------------------


def _run(case: Case, changes: Changes) -> None:
    with replaced(launches, VOCABULARY=case.vocabulary), configured(case, changes):
        made(case, changes)()


LAUNCHES = {
    f"{named(case)}: {label(changes)}": functools.partial(_run, case, changes)
    for case in CASES
    if case.owner != CHUNKS
    for changes in case.candidates
}
VARIATIONS: list[str] = []
