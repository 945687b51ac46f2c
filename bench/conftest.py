"""What ``bench/test_contests.py`` needs of pytest-benchmark."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.harness import REPLAY, Ceilings, Contest, Record
from bench.tables import contest_table

Replay = Callable[[Contest, str], None]
_held: dict[str, Record] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=2.0, help="time to spend on the rounds of one contest")
    parser.addoption("--threads", type=int, help="CPU threads (default: PyTorch's own choice; 1 is the steadiest on a shared machine)")


def pytest_configure(config: pytest.Config) -> None:
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)


@pytest.fixture
def replay(benchmark: Any, request: pytest.FixtureRequest) -> Replay:
    """``replay(contest, contender)``: hand pytest-benchmark this contender's times in the contest, which is held when first asked for."""

    def report(contest: Contest, contender: str) -> None:
        if contest.title not in _held:
            record = Record(contest, Ceilings(contest.device, contest.dtype))
            _held[contest.title] = record.sit(seconds=request.config.getoption("--seconds"))
        measured = _held[contest.title].table[contender]
        if measured.missing:
            pytest.skip(f"{contender}: {measured.missing}")
        benchmark.group = contest.title
        benchmark.extra_info.update(peak_bytes=measured.peak, error=measured.error, device=str(contest.device), torch=torch.__version__)
        durations = iter(measured.seconds[0])
        benchmark.pedantic(lambda: REPLAY.advance(next(durations)), rounds=len(measured.seconds[0]))

    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("interleaved rounds, medians")
    for record in _held.values():
        terminalreporter.write_line(contest_table(record.json()) + "\n")
