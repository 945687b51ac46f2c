"""The contests of ``python -m bench --quick`` as pytest-benchmark cases: one a contender, all of a contest measured by the first of them."""

from __future__ import annotations

import pytest
import torch

from bench.conftest import Replay
from bench.contests import OPERATIONS
from bench.harness import Contest

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [(contest, name) for contests in OPERATIONS.values() for contest in contests(DEVICE, False) for name in contest.contenders]


@pytest.mark.parametrize(("contest", "contender"), CASES, ids=[f"{contest.title}: {name}" for contest, name in CASES])
def test_contest(replay: Replay, contest: Contest, contender: str) -> None:
    replay(contest, contender)
