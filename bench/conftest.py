"""Benchmarks as pytest-benchmark cases: one test a contender, all contenders of a contest measured together by the first of them."""

from typing import Any

import pytest
import torch

from bench.harness import DEVICE, REPLAY, Contest, Measured, Replay, hold, render

_held: dict[str, tuple[Contest, dict[str, Measured]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=4.0, help="time to spend on the rounds of one contest")
    parser.addoption("--threads", type=int, help="CPU threads (default: PyTorch's own choice; 1 is the steadiest on a shared machine)")


def pytest_configure(config: pytest.Config) -> None:
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)


@pytest.fixture
def replay(benchmark: Any, request: pytest.FixtureRequest) -> Replay:
    """``replay(contest, contender)``: hand pytest-benchmark this contender's times in the contest, which is held when first asked for."""

    def report(contest: Contest, contender: str) -> None:
        if contest.title not in _held:
            _held[contest.title] = contest, hold(contest, seconds=request.config.getoption("--seconds"))
        measured = _held[contest.title][1][contender]
        if measured.missing:
            pytest.skip(f"{contender}: {measured.missing}")
        benchmark.group = contest.title
        benchmark.extra_info.update(peak_bytes=measured.peak, error=measured.error, device=str(DEVICE), torch=torch.__version__)
        durations = iter(measured.seconds)
        benchmark.pedantic(lambda: REPLAY.advance(next(durations)), rounds=len(measured.seconds))

    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    terminalreporter.section(f"{where}, torch {torch.__version__}: interleaved rounds, medians")
    for contest, table in _held.values():
        terminalreporter.write_line(render(contest, table) + "\n")
