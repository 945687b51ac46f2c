"""Every launch of bench/launches.py is right, here in Triton's interpreter, and is found out where it is not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import launches, verdict

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="python -m bench.gpu judges all of them on a GPU, each at its own size")

# The interpreter takes a second for a hundred steps of a scan; tests/test_scan.py has those, at lengths of its own.
QUICK = [name for name in launches.LAUNCHES if not any(part in name for part in ("gae", "returns", "vtrace"))]
SCANS = ["gae whitened"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "VOCABULARY", 1200)  # no multiple of anything


@pytest.mark.parametrize("name", [*QUICK, *SCANS])
def test_launches_are_right(name):
    findings = verdict.judge(launches.LAUNCHES[name], CPU)
    assert findings
    assert [f for f in findings if not f.right] == []


def test_the_judged_launches_run_every_entry_kernel(monkeypatch):
    """So that on a GPU none is used unjudged."""
    names = ["token_logprobs of kept tokens", "fused_policy_loss bf16", "policy_loss of tokens", "value_loss", "full_kl bf16", *SCANS]
    with verdict.kernels_launched() as launched:
        for name in names:
            verdict.judge(launches.LAUNCHES[name], CPU)
        monkeypatch.setattr(launches, "VOCABULARY", 40000)  # more than one segment
        assert all(f.right for f in verdict.judge(launches.LAUNCHES["token_logprobs bf16"], CPU))
    assert launched == verdict.entry_kernels()


def _off(name: str, factor: float) -> Iterator[verdict.Finding]:
    launch = launches.LAUNCHES[name]
    wrong = dataclasses.replace(launch, ours=lambda **x: {k: factor * r for k, r in launch.ours(**x).items()})
    return (f for f in verdict.judge(wrong, CPU) if not f.right)


def test_a_wrong_launch_is_found_out():
    """Log-probs of float32 by a ten-thousandth, 16 bits by a few hundredths, results and gradients."""
    assert {f.of for f in _off("token_logprobs fp32, entropy", 1.0 + 1e-5)} == {"logprob", "entropy", "d logits"}
    assert "d logits" in {f.of for f in _off("token_logprobs bf16", 1.05)}
    assert {"loss", "kl", "d logprobs"} <= {f.of for f in _off("policy_loss of tokens", 1.01)}
    assert {f.of for f in _off("gae of 16 steps", 1.0 + 1e-4)} == {"advantages", "returns"}


def test_nan_is_wrong():
    assert {f.of for f in _off("value_loss", torch.nan)} >= {"loss", "d values"}


def test_inputs_are_the_same_again_and_differ_by_seed():
    launch = launches.LAUNCHES["policy_loss of packed sequences"]
    one, same, other = (launch.inputs(launches.Random(seed, CPU)) for seed in (0, 0, 1))
    assert all(torch.equal(x, same[name]) for name, x in one.items())
    assert not torch.equal(one["logprobs"], other["logprobs"])
    assert not one["mask"].all()


def test_a_second_run_gives_the_same_bits_and_what_does_not_is_named():
    for name in ("token_logprobs in place", "fused_policy_loss with every input", "policy_loss of packed sequences"):  # two write over their logits
        assert verdict.objections(launches.LAUNCHES[name], CPU) == []
    launch, runs = launches.LAUNCHES["value_loss"], iter((1.0, 2.0))

    def drifting(**x):
        factor = next(runs)
        return {name: factor * r for name, r in launch.ours(**x).items()}

    assert "loss differs in a second run" in verdict.objections(dataclasses.replace(launch, ours=drifting), CPU)


class _Stream:
    def wait_stream(self, other: object) -> None:
        pass


class _Graph:
    def replay(self) -> None:
        pass


@pytest.mark.parametrize(("when", "said"), [("never", []), ("synchronising", ["synchronises: no"]), ("capturing", ["no CUDA graph captures it: no"])])
def test_on_a_gpu_synchronisations_and_graphs_are_asked_for(when, said, monkeypatch):
    """With as much of torch.cuda as that takes."""
    state = {"now": "eager"}

    @contextlib.contextmanager
    def during(name):
        before, state["now"] = state["now"], name
        try:
            yield
        finally:
            state["now"] = before

    def mode(name):
        state["now"] = {"error": "synchronising", "default": "eager"}[name]

    fakes = {"set_sync_debug_mode": mode, "Stream": _Stream, "current_stream": _Stream, "CUDAGraph": _Graph, "synchronize": lambda: None}
    fakes |= {"stream": lambda _: during("warming"), "graph": lambda _, stream: during("capturing")}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def ours(x):
        if state["now"] == when:
            raise RuntimeError("no")
        return {"twice": 2 * x}

    launch = launches.Launch(lambda fill: {"x": torch.ones(3)}, ours, ours, ("x",))
    assert verdict.objections(launch, SimpleNamespace(type="cuda")) == said
    assert state["now"] == "eager"
