"""Fair timing: contenders checked against float64 first, then run in turn, round after round, so that a noisy machine is noisy for all of them.

A contest has an exact answer and contenders; ``hold`` measures it. A contender is a function that prepares: it returns the call to be timed.
A peer that is not installed, raises or is wrong is not timed, and the table says why; ours has to be right.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Call = Callable[[], Sequence[Tensor]]
Prepare = Callable[[], Call]


@dataclass(frozen=True)
class Contest:
    """``contenders[OURS]`` must be right to ``tolerance``, peers to ``sanity``: largest difference over largest entry, of the worst tensor."""

    title: str
    exact: Call
    contenders: Mapping[str, Prepare]
    tolerance: float
    sanity: float = 0.1


OURS = "rlkern"
Replay = Callable[[Contest, str], None]  # bench/conftest.py's fixture


@dataclass
class Measured:
    """One contender's figures: seconds a call, bytes above the inputs at the peak, error against float64; or why there are none."""

    missing: str = ""
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    error: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: Measured) -> tuple[float, float]:
        """How many times as long as ``other`` takes: the median of the rounds' ratios, and half their interquartile range."""
        ratios = [mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return middle, (high - low) / 2


def clock() -> float:
    """Seconds; on a GPU, after all the work that was launched is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(call: Call) -> int:
    """Bytes allocated at the worst moment of a call, above what was there before; exact on both devices."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = top = 0
    for event in profile.profiler.kineto_results.events():  # every allocation and release, in order
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return top


def error(results: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The largest difference over the largest entry, of the worst tensor."""
    worst = 0.0
    for x, y in zip(results, exact, strict=True):
        difference = (x.detach().double() - y.detach().double()).abs().max() / y.detach().double().abs().max()
        worst = max(worst, float(difference.nan_to_num(nan=torch.inf)))
    return worst


def hold(contest: Contest, *, seconds: float = 6.0, rounds: tuple[int, int] = (3, 50)) -> dict[str, Measured]:
    """Check every contender, then time them in turn: ``rounds`` at least and at most, within about ``seconds`` for the contest."""
    exact = contest.exact()
    table = {name: Measured() for name in contest.contenders}
    calls: dict[str, Call] = {}
    for name, prepare in contest.contenders.items():
        try:
            call = prepare()
            table[name].error = error(call(), exact)
        except Exception as why:
            if name == OURS:
                raise
            table[name].missing = str(why) if isinstance(why, ImportError) else f"{type(why).__name__}: {why}"
            continue
        if table[name].error > (contest.tolerance if name == OURS else contest.sanity):
            assert name != OURS, f"{contest.title}: our error is {table[name].error:.1e}, allowed {contest.tolerance:.1e}"
            table[name].missing = f"wrong, with an error of {table[name].error:.1e}"
            continue
        table[name].peak = peak_memory(call)
        calls[name] = call
    least, most = rounds
    end = clock() + seconds
    names = list(calls)
    for done in range(most):
        if done >= least and clock() > end:
            break
        for name in names[done % len(names) :] + names[: done % len(names)]:
            start = clock()
            calls[name]()
            table[name].seconds.append(clock() - start)
    return table


def render(contest: Contest, table: Mapping[str, Measured]) -> str:
    """The figures as text, fastest first. Ratios are to ours, in the same round; memory is above the inputs."""
    ours = table[OURS]
    lines = [contest.title, f"  {'':40}{'time':>12}{'x ours':>16}{'peak':>12}{'x ours':>8}{'error':>10}"]
    for name, m in sorted(((name, m) for name, m in table.items() if not m.missing), key=lambda item: item[1].over(ours)):
        ratio, spread = m.over(ours)
        memory = f"{m.peak / 1e6:9.1f} MB{m.peak / max(ours.peak, 1):8.2f}"
        lines.append(f"  {name:40}{1e3 * m.median:9.3f} ms{ratio:9.2f} +-{spread:4.2f}{memory}{m.error:10.1e}")
    lines += [f"  {name:40}not measured: {m.missing}" for name, m in table.items() if m.missing]
    return "\n".join(lines)


class ReplayClock:
    """A timer for pytest-benchmark that replays durations which were measured in turn, so that its statistics, JSON and comparisons serve here."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


REPLAY = ReplayClock()
