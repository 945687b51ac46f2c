"""The benchmark's own promises: nobody is timed who is wrong, nobody is dropped in silence, memory is counted exactly."""

import pytest
import torch

from bench import harness
from bench.harness import OURS, Contest, Measured, hold, peak_memory, render


def answer(value: float) -> harness.Prepare:
    return lambda: lambda: [torch.full((4,), value)]


def absent() -> harness.Call:
    raise ImportError("No module named 'peer'")


def crashing() -> harness.Call:
    raise RuntimeError("no such kernel")


def contest(**contenders: harness.Prepare) -> Contest:
    return Contest("a contest", exact=lambda: [torch.full((4,), 2.0, dtype=torch.float64)], contenders=contenders, tolerance=1e-6, sanity=0.1)


def test_peers_that_are_absent_crash_or_are_wrong_are_named_not_timed():
    held = hold(contest(rlkern=answer(2.0), rough=answer(2.1), absent=absent, crashing=crashing, wrong=answer(3.0)), seconds=0.0)
    assert [name for name, m in held.items() if not m.missing] == [OURS, "rough"]
    assert held["rough"].error == pytest.approx(0.05)
    table = render(contest(), held)
    for line in ("absent", "No module named 'peer'", "RuntimeError: no such kernel", "wrong, with an error of 5.0e-01"):
        assert line in table


def test_we_must_be_right():
    with pytest.raises(AssertionError, match="our error is"):
        hold(contest(rlkern=answer(2.001)))
    with pytest.raises(RuntimeError, match="no such kernel"):
        hold(contest(rlkern=crashing))


def test_nan_is_an_error():
    assert harness.error([torch.tensor([torch.nan, 1.0])], [torch.ones(2)]) == torch.inf


def test_contenders_take_turns():
    order: list[str] = []

    def named(name: str) -> harness.Prepare:
        return lambda: lambda: [order.append(name) or torch.full((4,), 2.0)]

    held = hold(contest(rlkern=named("a"), peer=named("b")), seconds=0.0, rounds=(4, 4))
    assert "".join(order[-8:]) == "abbaabba"  # after the check and the count of memory; each round begins with the next one
    assert len(held[OURS].seconds) == len(held["peer"].seconds) == 4


def test_ratios_are_of_the_same_round():
    """A machine that slows down for a while slows both: the ratio stays."""
    ours, peer = Measured(seconds=[1.0, 5.0, 1.0, 9.0]), Measured(seconds=[2.0, 10.0, 2.0, 18.0])
    assert peer.over(ours) == (2.0, 0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the CPU's allocator gives out")
def test_peak_memory_is_exact():
    def one_after_the_other() -> list[torch.Tensor]:
        torch.zeros(250_000)
        return [torch.zeros(250_000)]

    assert peak_memory(one_after_the_other) == 1_000_000
    assert peak_memory(lambda: [torch.zeros(250_000), torch.zeros(250_000)]) == 2_000_000
