"""Fair timing: contenders checked against float64 first, then run in turn, round after round, so that a noisy machine is noisy for all of them.

A contest has inputs, an exact answer and contenders; ``sit`` measures it for a while, once or several times in a run. A contender is a function that
prepares: from the inputs it makes the call to be timed. A peer that is not installed, raises or is wrong is not timed, and the record says why; ours
has to be right. Every round also copies memory and multiplies matrices: the ceilings that times are held against are of the same moments.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

OURS = "rlkern"
COPY, PRODUCT = "copy", "matrix product"  # the ceilings
GPU_ONLY = "only on a GPU"
# Bytes that are allocated and freed first: glibc then keeps twice as much, as in any process that holds a model, instead of giving the temporaries of
# a short call back to the system each time, to be faulted in again by the next.
SETTLING = 31 << 20

Call = Callable[[], Sequence[Tensor] | None]  # None: there is nothing to judge
Prepare = Callable[[Any], Call]


@dataclass(frozen=True)
class Contest:
    """One operation at one shape. Building it costs nothing: tensors are made by ``inputs``.

    ``contenders[OURS]`` must be right to ``tolerance``, peers to ``sanity``: largest difference over largest entry, of the worst tensor.
    ``bytes`` and ``flops`` are what the operation cannot do without: each input read once, each result written once, the products it needs.
    """

    operation: str
    shape: Mapping[str, int | str]  # what tables and plots are by: N, V, H, G, T, dtype ...
    device: torch.device
    inputs: Callable[[], Any]
    exact: Callable[[Any], Sequence[Tensor]]
    contenders: Mapping[str, Prepare]
    tolerance: float
    sanity: float = 0.1
    bytes: int = 0
    flops: int = 0
    every: int = 1  # of the leading dimension of each result, ``exact`` gives this part

    @property
    def title(self) -> str:
        return ", ".join([self.operation, *(f"{name} = {value}" for name, value in self.shape.items())])

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, str(self.shape["dtype"]))


@dataclass
class Measured:
    """One contender's figures, or why there are none. Seconds a call, by sitting; bytes above the inputs; error against float64."""

    missing: str = ""
    seconds: list[list[float]] = field(default_factory=list)
    device_seconds: list[list[float]] = field(default_factory=list)  # on a GPU, between two events in its own queue
    peak: int = 0  # at the worst moment of a call
    held: int = 0  # by its results
    error: float | None = None  # None where there is nothing to judge

    @property
    def median(self) -> float:
        return statistics.median(flat(self.seconds))

    @property
    def device_median(self) -> float:
        """On a GPU without what the host takes to launch; elsewhere the same."""
        return statistics.median(flat(self.device_seconds) or flat(self.seconds))


def flat(sittings: Sequence[Sequence[float]]) -> list[float]:
    return [seconds for sitting in sittings for seconds in sitting]


def ratio(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """How many times as long as ``theirs`` takes, and within what another run on the same machine should find it.

    The median of the ratios of the same rounds. The spread is half their interquartile range, which is what one round may be off by, and half the
    95 % interval of the median when sittings, and rounds within them, are drawn anew: what the whole run may be off by.
    """
    groups = [np.divide(a, b) for a, b in zip(mine, theirs, strict=True)]
    pooled = np.concatenate(groups)
    generator = np.random.default_rng(0)
    medians = []
    for _ in range(400):
        drawn = generator.integers(len(groups), size=len(groups))
        medians.append(np.median(np.concatenate([generator.choice(groups[i], groups[i].size) for i in drawn])))
    low, high = np.quantile(pooled, [0.25, 0.75])
    least, most = np.quantile(medians, [0.025, 0.975])
    return float(np.median(pooled)), float((high - low + most - least) / 2)


def clock(device: torch.device) -> float:
    """Seconds; on a GPU, after all the work that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(call: Call, device: torch.device) -> tuple[int, int]:
    """Bytes above what was allocated before a call: at the worst moment, and while its results are held. Exact on both devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results = call()
        torch.cuda.synchronize(device)
        peak, held = torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
        del results
        return peak, held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        results = call()
    now = top = 0
    for event in profile.profiler.kineto_results.events():  # every allocation and release, in order
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    del results
    return top, now


def error(results: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The largest difference over the largest entry, of the worst tensor; of a loss, in which terms of about 1 cancel, over 1 at least."""
    worst = 0.0
    for x, y in zip(results, exact, strict=True):
        x, y = x.detach().double(), y.detach().double()
        difference = (x - y).abs().max()
        if difference != 0.0:  # of zeros there is nothing to divide by
            difference = difference / (y.abs().max() if y.ndim else y.abs().clamp(min=1.0))
        worst = max(worst, float(difference.nan_to_num(nan=torch.inf)))
    return worst


@dataclass
class Ceilings:
    """A copy larger than the caches and a square matrix product: bytes moved and operations of one call, and the calls."""

    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        gpu = self.device.type == "cuda"
        elements, side = (1 << 28, 8192) if gpu else (1 << 24, 1024)
        self.bytes, self.flops = 2 * 4 * elements, 2 * side**3
        self._from = torch.randn(elements, device=self.device)  # zeros and ones cost less power, and a GPU then runs faster
        self._to = torch.empty_like(self._from)
        # A CPU multiplies smaller dtypes by way of float32, which is the rate to be held against.
        dtype = self.dtype if gpu or self.dtype == torch.float64 else torch.float32
        self._a = torch.randn(side, side, device=self.device, dtype=dtype)
        self._product = torch.empty_like(self._a)

    def calls(self) -> dict[str, Call]:
        def copy() -> None:
            self._to.copy_(self._from)

        def product() -> None:
            torch.mm(self._a, self._a, out=self._product)

        return {COPY: copy, PRODUCT: product}


@dataclass
class Record:
    """What was measured of a contest so far."""

    contest: Contest
    table: dict[str, Measured] = field(init=False)
    ceilings: Ceilings | None = None
    _ceiling_times: dict[str, Measured] = field(default_factory=lambda: {COPY: Measured(), PRODUCT: Measured()})

    def __post_init__(self) -> None:
        self.table = {name: Measured() for name in self.contest.contenders}

    def sit(self, *, seconds: float = 6.0, rounds: tuple[int, int] = (3, 50)) -> Record:
        """Check every contender, if that was not done before, then time them in turn: ``rounds`` at least and at most, within about ``seconds``."""
        device = self.contest.device
        if device.type == "cpu":
            torch.empty(SETTLING, dtype=torch.uint8).fill_(1)
        calls = self._prepared()
        timed = {name: self.table[name] for name in calls}
        if self.ceilings is not None:
            calls |= self.ceilings.calls()
            timed |= self._ceiling_times
        for measured in timed.values():
            measured.seconds.append([])
            measured.device_seconds.append([])
        names = list(calls)
        fits = device.type == "cuda" and self.contest.bytes <= torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(FLUSHED, dtype=torch.uint8, device=device) if fits else None
        repeats = {name: _repeats(calls[name], device) for name in names}
        least, most = rounds
        end = clock(device) + seconds
        order = random.Random(0)
        for done in range(most):
            if done >= least and clock(device) > end:
                break
            for name in order.sample(names, len(names)):
                if repeats[name] > 1:
                    calls[name]()  # what a short call finds in the caches is its own
                wall, on_device = _timed(calls[name], repeats[name], device, flush)
                timed[name].seconds[-1].append(wall)
                if on_device is not None:
                    timed[name].device_seconds[-1].append(on_device)
        return self

    def _prepared(self) -> dict[str, Call]:
        """The calls of those who can be measured; who can is found out once."""
        contest = self.contest
        first = not any(m.seconds or m.missing for m in self.table.values())
        inputs = contest.inputs()
        exact = contest.exact(inputs) if first else []
        calls: dict[str, Call] = {}
        for name, prepare in contest.contenders.items():
            measured = self.table[name]
            if measured.missing:
                continue
            try:
                call = prepare(inputs)
                if first:
                    self._check(name, call(), exact)
                    measured.peak, measured.held = memory(call, contest.device)
            except Exception as why:
                if name == OURS:
                    raise
                self.table[name] = Measured(missing=_reason(why))
            else:
                calls[name] = call
        return calls

    def _check(self, name: str, results: Sequence[Tensor] | None, exact: Sequence[Tensor]) -> None:
        """Raises ArithmeticError for results that are wrong."""
        if results is None:
            return
        contest = self.contest
        off = error((r[:: contest.every] if r.ndim else r for r in results), exact)
        if off > (contest.tolerance if name == OURS else contest.sanity):
            raise ArithmeticError(
                f"wrong, with an error of {off:.1e}" if name != OURS else f"{contest.title}: our error is {off:.1e}, allowed {contest.tolerance:.1e}"
            )
        self.table[name].error = off

    def json(self) -> dict[str, Any]:
        """For the result file; rates and fractions are of medians."""
        contest = self.contest
        rates = {}
        if self.ceilings is not None:
            rates = {
                "copy_bytes_per_second": self.ceilings.bytes / self._ceiling_times[COPY].device_median,
                "product_flops_per_second": self.ceilings.flops / self._ceiling_times[PRODUCT].device_median,
            }
        ours = self.table[OURS]
        contenders = []
        for name, m in self.table.items():
            if m.missing:
                contenders.append({"name": name, "missing": m.missing})
                continue
            times, spread = ratio(m.seconds, ours.seconds)
            figures: dict[str, Any] = {"name": name, "median_seconds": m.median, "ratio": times, "ratio_spread": spread}
            figures |= {"peak_bytes": m.peak, "held_bytes": m.held, "error": m.error, "seconds": m.seconds}
            if flat(m.device_seconds):
                figures |= {"device_median_seconds": statistics.median(flat(m.device_seconds)), "device_seconds": m.device_seconds}
            figures |= {"bytes_per_second": contest.bytes / m.device_median, "flops_per_second": contest.flops / m.device_median}
            if rates:
                of_bytes = figures["bytes_per_second"] / rates["copy_bytes_per_second"]
                of_flops = figures["flops_per_second"] / rates["product_flops_per_second"]
                figures |= {"bandwidth_fraction": of_bytes, "flops_fraction": of_flops, "roofline_fraction": max(of_bytes, of_flops)}
            contenders.append(figures)
        return {
            "operation": contest.operation,
            "title": contest.title,
            "shape": dict(contest.shape),
            "bytes": contest.bytes,
            "flops": contest.flops,
            "tolerance": contest.tolerance,
            "ceilings": rates,
            "contenders": contenders,
        }


def _reason(why: Exception) -> str:
    """One line."""
    return (
        str(why)
        if isinstance(why, ImportError | ArithmeticError)
        else f"{type(why).__name__}: {str(why).strip().splitlines()[0] if str(why).strip() else ''}"
    )


def _repeats(call: Call, device: torch.device) -> int:
    """How often a call is made for one measurement: short ones for some milliseconds, in which a clock and a busy machine matter less. On a GPU
    longer: the host is ahead of it then, as it is in training."""
    start = clock(device)
    call()
    return max(1, min(1000, int((2e-2 if device.type == "cuda" else 5e-3) / max(clock(device) - start, 1e-6))))


FLUSHED = 1 << 28  # bytes written over the L2 cache before a call: more than any has
CYCLES_PER_SECOND = 2e9  # of a GPU, about
HOST = 2e-3  # seconds in which the host queues a call, launches and all


def _timed(call: Call, repeats: int, device: torch.device, flush: Tensor | None) -> tuple[float, float | None]:
    """Seconds a call by the synchronising clock, and on a GPU those between two events: with ``flush``, of calls whose inputs are in no cache."""
    start = clock(device)
    for _ in range(repeats):
        call()
    wall = (clock(device) - start) / repeats
    if device.type != "cuda":
        return wall, None
    if flush is not None:
        return wall, cold_seconds(call, repeats, flush)
    begin, end = _events()
    torch.cuda._sleep(int(CYCLES_PER_SECOND * min(wall * repeats, 0.05)))  # the host has queued the calls before the first begins
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return wall, begin.elapsed_time(end) / 1e3 / repeats


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def cold_seconds(call: Callable[[], object], repeats: int, flush: Tensor) -> float:
    """A call's, between two events in the GPU's queue, after ``flush`` was written over the cache."""
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(int(CYCLES_PER_SECOND * HOST))
        begin, end = _events()
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3 / repeats


class ReplayClock:
    """A timer for pytest-benchmark that replays durations which were measured in turn, so that its statistics, JSON and comparisons serve here."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


REPLAY = ReplayClock()
