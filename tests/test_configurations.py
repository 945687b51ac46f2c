"""The launch configurations that a GPU run chooses from: legal, right, and put back as they were."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import configurations as c
from bench import launches, verdict

CPU = torch.device("cpu")
CLASSES = [case for case in c.CASES if case.owner != c.CHUNKS]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="python -m bench.gpu tries every candidate on a GPU")


def test_every_configuration_of_the_library_has_candidates():
    """Classes with an ``of`` that have a number of warps or a block: launch configurations."""
    found = set()
    for module in c._modules("__name__"):
        for name, x in vars(module).items():
            if dataclasses.is_dataclass(x) and {"block", "warps", "lanes"} & {f.name for f in dataclasses.fields(x)} and "of" in vars(x):
                found.add(name)
    assert found == {case.owner for case in CLASSES}


@pytest.mark.parametrize("case", c.CASES, ids=c.named)
def test_candidates_are_legal_and_all_different(case):
    assert [x for changes in case.candidates for x in c.objections(changes)] == []
    assert len({c.label(changes) for changes in case.candidates}) == len(case.candidates) > 2


def test_cases_have_names_of_their_own():
    assert len({c.named(case) for case in c.CASES}) == len(c.CASES)


def test_objections():
    assert c.objections({"block": 3000, "warps": 4})
    assert c.objections({"block": 1024, "warps": 64})
    assert c.objections({"block": 8192, "warps": 1})
    assert c.objections({"block": 64, "warps": 4})
    assert c.objections({"lanes": 2048, "unroll": 1})
    assert c.objections({"lanes": 128, "unroll": 16})
    assert c.objections({"rows": 3, "lanes": 128, "warps": 4})


def _distinct() -> list[tuple[c.Case, c.Changes]]:
    """Every candidate once: cases share lists."""
    found = {(case.owner, case.title, c.label(changes)): (case, changes) for case in CLASSES for changes in case.candidates}
    return list(found.values())


@pytest.mark.parametrize(("case", "changes"), _distinct(), ids=lambda x: x.title if isinstance(x, c.Case) else c.label(x))
def test_candidates_give_the_right_numbers(case, changes, monkeypatch):
    monkeypatch.setattr(launches, "VOCABULARY", 1500)
    monkeypatch.setattr(launches, "ROWS", (2, 2))
    launch = launches.gae(2, 40) if case.title == "gae" else case.launch()
    with c.configured(case, changes) as asked:
        findings = verdict.judge(launch, CPU)
    assert [f for f in findings if not f.right] == []
    assert asked
    for name, value in changes.items():
        if name != "WARPS":
            assert {getattr(x, name.lower()) for x in asked} == {value}


def test_chunks_of_any_size_give_the_right_numbers(monkeypatch):
    monkeypatch.setattr(launches, "VOCABULARY", 300)
    monkeypatch.setattr(c, "WIDTH", 16)
    for chunk_bytes in (None, 2 * 300 * 6):  # of float32 logits and their gradient: three chunks of two rows
        assert [f for f in verdict.judge(c.linear_policy_loss(chunk_bytes), CPU) if not f.right] == []


def test_constants_reach_the_launcher_and_all_is_as_before():
    (case,) = (case for case in c.CASES if case.title == "value_loss")
    (module,) = (m for m in c._modules("WARPS") if m.__name__.endswith(".value"))
    warps = module.WARPS
    with c.configured(case, {"WARPS": 2 * warps, "BLOCK": 2048}) as asked:
        launches.value_loss()()
        inside = module.WARPS
    assert (inside, module.WARPS) == (2 * warps, warps)
    assert (asked[-1].block, asked[-1].tile) == (2048, 2048)
    with c.configured(case, {}) as asked:
        launches.value_loss()()
    assert asked[-1].block == 512


@pytest.mark.parametrize("title", ["value_loss", "fused_linear_policy_loss"])
def test_comparing_names_the_best_and_what_failed(title, monkeypatch):
    (case,) = (case for case in c.CASES if case.title == title)
    if title == "value_loss":
        case = dataclasses.replace(case, candidates=[{"BLOCK": 256}, {"BLOCK": 300}])  # no power of 2
    else:
        monkeypatch.setattr(c, "WIDTH", 16)
        monkeypatch.setattr(launches, "BACKEND", "torch")  # the interpreter multiplies slowly
    found = c.compared(case, CPU, rounds=2, small=True)
    assert found["gain"] >= 1
    assert found["best"]["seconds"] == min(found["seconds"].values())
    if title == "value_loss":
        assert "Layout(" in found["now"]["text"]
        assert found["now"]["fields"]["block"] == 512
        assert list(found["failed"]) == ["BLOCK 300"]
    else:
        assert len(found["seconds"]) == 1 + len(case.candidates)


def test_a_wrong_candidate_is_not_chosen(monkeypatch):
    (case,) = (case for case in c.CASES if case.title == "value_loss")
    seconds = iter([1.0, 0.1])
    monkeypatch.setattr(c, "seconds_of", lambda *_: next(seconds))
    case = dataclasses.replace(case, candidates=[{"BLOCK": 256}])
    right = case.launch()

    def sometimes_wrong(**x):
        with c.configured(case, {}) as asked:
            results = right.ours(**x)
        return {name: r * (1.01 if asked[-1].block == 256 else 1.0) for name, r in results.items()}

    case = dataclasses.replace(case, launch=lambda: dataclasses.replace(right, ours=sometimes_wrong))
    found = c.compared(case, CPU, rounds=1, small=True)
    assert "differs" in found["failed"]["BLOCK 256"]
    assert found["gain"] == 1
