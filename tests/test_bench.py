"""The benchmark's own promises: nobody is timed who is wrong, nobody is dropped in silence, memory is counted exactly, spreads hold."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

import bench.__main__ as command
from bench import accuracy, harness, hazards, instructions, report, tables
from bench.contests import OPERATIONS, update
from bench.harness import OURS, Ceilings, Contest, Measured, Record, memory, ratio

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def answer(value: float) -> harness.Prepare:
    return lambda inputs: lambda: [torch.full((4,), value)]


def absent(inputs: object) -> harness.Call:
    raise ImportError("No module named 'peer'")


def crashing(inputs: object) -> harness.Call:
    raise RuntimeError("no such kernel\nand more")


def contest(**contenders: harness.Prepare) -> Contest:
    exact = [torch.full((4,), 2.0, dtype=torch.float64)]
    return Contest("a contest", {"N": 4, "dtype": "float32"}, CPU, lambda: None, lambda inputs: exact, contenders, tolerance=1e-6, bytes=32)


# ---- contests -------------------------------------------------------------------------------------------------------------------------------


def test_peers_that_are_absent_crash_or_are_wrong_are_named_not_timed():
    record = Record(contest(rlkern=answer(2.0), rough=answer(2.1), absent=absent, crashing=crashing, wrong=answer(3.0))).sit(seconds=0.0)
    record.sit(seconds=0.0)
    assert [name for name, m in record.table.items() if not m.missing] == [OURS, "rough"]
    assert record.table["rough"].error == pytest.approx(0.05)
    text = tables.contest_table(record.json())
    for part in ("absent (No module named 'peer')", "crashing (RuntimeError: no such kernel)", "wrong (wrong, with an error of 5.0e-01)"):
        assert part in text


def test_we_must_be_right():
    with pytest.raises(ArithmeticError, match="our error is"):
        Record(contest(rlkern=answer(2.001))).sit()
    with pytest.raises(RuntimeError, match="no such kernel"):
        Record(contest(rlkern=crashing)).sit()


def test_nan_is_an_error():
    assert harness.error([torch.tensor([torch.nan, 1.0])], [torch.ones(2)]) == torch.inf


def test_contenders_take_turns(monkeypatch):
    monkeypatch.setattr(harness, "_repeats", lambda call, device: 1)
    order: list[str] = []

    def named(name: str) -> harness.Prepare:
        return lambda inputs: lambda: [order.append(name) or torch.full((4,), 2.0)]

    record = Record(contest(rlkern=named("a"), peer=named("b"))).sit(seconds=0.0, rounds=(20, 20))
    turns = order[-40:]
    rounds = ["".join(turns[i : i + 2]) for i in range(0, 40, 2)]
    assert set(rounds) == {"ab", "ba"}  # nobody always follows the same one
    assert [len(m.seconds[0]) for m in record.table.values()] == [20, 20]


def test_short_calls_are_made_once_before_they_are_timed(monkeypatch):
    monkeypatch.setattr(harness, "_repeats", lambda call, device: 3)
    made: list[int] = []
    Record(contest(rlkern=lambda inputs: lambda: [made.append(1) or torch.full((4,), 2.0)])).sit(seconds=0.0, rounds=(1, 1))
    monkeypatch.setattr(harness, "_repeats", lambda call, device: 1)
    once: list[int] = []
    Record(contest(rlkern=lambda inputs: lambda: [once.append(1) or torch.full((4,), 2.0)])).sit(seconds=0.0, rounds=(1, 1))
    assert len(made) - len(once) == 3  # three timed calls instead of one, and one before them


def test_fractions_of_ceilings_are_of_the_same_run():
    ceilings = Ceilings(CPU, torch.float32)
    figures = Record(contest(rlkern=answer(2.0)), ceilings).sit(seconds=0.0).json()
    (ours,) = figures["contenders"]
    assert figures["ceilings"]["copy_bytes_per_second"] > 1e8
    assert ours["bandwidth_fraction"] == pytest.approx(32 / ours["median_seconds"] / figures["ceilings"]["copy_bytes_per_second"])
    assert ours["roofline_fraction"] == max(ours["bandwidth_fraction"], ours["flops_fraction"])


class FakeEvent:
    """Of a GPU's queue in which each thing takes as many milliseconds as the queue says."""

    queue: ClassVar[list[float]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = sum(self.queue)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


def test_on_a_gpu_short_calls_are_timed_with_a_cold_cache(monkeypatch):
    """The flush comes before each of them, and is not in their time."""
    queue: list[float] = []
    monkeypatch.setattr(FakeEvent, "queue", queue)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append(50.0))
    flush = SimpleNamespace(zero_=lambda: queue.append(100.0))
    _, cold = harness._timed(lambda: queue.append(3.0), 4, torch.device("cuda"), flush)
    assert cold == pytest.approx(3e-3)
    assert queue == [3.0] * 4 + [100.0, 50.0, 3.0] * 4
    _, warm = harness._timed(lambda: queue.append(2.0), 4, torch.device("cuda"), None)
    assert warm == pytest.approx(2e-3)
    assert harness._timed(lambda: None, 4, CPU, None)[1] is None


def test_rates_on_a_gpu_are_of_its_own_time():
    record = Record(contest(rlkern=answer(2.0)))
    record.table[OURS] = Measured(seconds=[[4.0]], device_seconds=[[2.0]], error=0.0)
    (ours,) = record.json()["contenders"]
    assert (ours["median_seconds"], ours["bytes_per_second"]) == (4.0, 16.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the CPU's allocator gives out")
def test_peak_memory_is_exact():
    def one_after_the_other() -> list[torch.Tensor]:
        torch.zeros(250_000)
        return [torch.zeros(250_000)]

    assert memory(one_after_the_other, CPU) == (1_000_000, 1_000_000)
    assert memory(lambda: [torch.zeros(250_000) + torch.zeros(250_000)], CPU) == (3_000_000, 1_000_000)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_contests_cost_nothing_to_name_and_have_names_of_their_own(device, full):
    contests = [contest for make in OPERATIONS.values() for contest in make(torch.device(device), full)]
    assert len({c.title for c in contests}) == len(contests)
    assert all(OURS in c.contenders and (c.bytes or c.flops) and isinstance(c.dtype, torch.dtype) for c in contests)


# ---- spreads --------------------------------------------------------------------------------------------------------------------------------


def test_ratios_are_of_the_same_round():
    """A machine that slows down for a while slows both: the ratio stays."""
    assert ratio([[2.0, 10.0], [2.0, 18.0]], [[1.0, 5.0], [1.0, 9.0]]) == (2.0, 0.0)


class NoisyMachine:
    """A clock, and calls that take their time by it: noise of each call, neighbours that stop it now and then, and moods."""

    def __init__(self, seed: int) -> None:
        self.now, self.random = 0.0, np.random.default_rng(seed)

    def run(self, seconds: float) -> list[torch.Tensor]:
        mood = 1 + 0.5 * np.sin(self.now / 3)
        noise = np.exp(0.15 * self.random.standard_normal()) * (4.0 if self.random.random() < 0.05 else 1.0)
        self.now += seconds * mood * noise
        return [torch.full((4,), 2.0)]


def noisy_run(seed: int, monkeypatch: pytest.MonkeyPatch) -> dict:
    machine = NoisyMachine(seed)
    monkeypatch.setattr(harness, "clock", lambda device: machine.now)
    monkeypatch.setattr(harness, "memory", lambda call, device: (0, 0))
    times = {OURS: 0.1, "slower": 0.15, "faster": 0.08, "much slower": 1.0}
    record = Record(contest(**{name: lambda inputs, s=s: lambda: machine.run(s) for name, s in times.items()}))
    for _ in range(2):
        record.sit(seconds=5.0, rounds=(3, 50))
        machine.now += 60
    return {"contests": [record.json()]}


def test_two_runs_on_a_noisy_machine_agree_within_their_spreads(monkeypatch):
    runs = [noisy_run(seed, monkeypatch) for seed in range(60)]
    apart = [line for one, other in zip(runs[::2], runs[1::2], strict=True) for line in report.disagreements(one, other)]
    assert apart == []
    spreads = [c["ratio_spread"] / c["ratio"] for run in runs for c in run["contests"][0]["contenders"] if c["name"] != OURS]
    assert 0.05 < np.median(spreads) < 0.5  # and say something


def test_runs_of_different_code_disagree(monkeypatch):
    one, other = noisy_run(0, monkeypatch), noisy_run(1, monkeypatch)
    for c in other["contests"][0]["contenders"]:
        c["ratio"] *= 3
    assert len(list(report.disagreements(one, other))) >= 3


# ---- the command ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "nothing"], "'token_logprobs'"),
        (["--device", "tpu"], "'cuda'"),
        (["--quick", "--full"], "not allowed with"),
        (["--threads", "0"], "at least 1 is allowed"),
        (["--seconds", "-1"], "0 or more is allowed"),
        (["--out", "result.txt"], "a file named *.json is expected"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "torch sees no GPU here; allowed is cpu")]),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    assert said in capsys.readouterr().err


def test_command_writes_what_was_measured_and_where(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(OPERATIONS, "gae", lambda device, full: [contest(rlkern=answer(2.0), absent=absent)])
    out = tmp_path / "new" / "result.json"
    assert command.main(["--quick", "--device", "cpu", "--op", "gae", "--seconds", "0", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"commit", "rlkern", "torch", "triton", "peers", "device", "clocks", "threads", "date"} <= set(result["environment"])
    (found,) = result["contests"]
    ours, peer = found["contenders"]
    assert [len(sitting) for sitting in ours["seconds"]] == [3, 3]
    assert peer == {"name": "absent", "missing": "No module named 'peer'"}
    assert "Not measured: absent" in capsys.readouterr().out


def test_exponents():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    assert tables.exponent(x, 3 * x**1.5) == pytest.approx((1.5, 0.0), abs=1e-9)
    slope, spread = tables.exponent(x, x * np.array([1.1, 0.9, 1.1, 0.9]))
    assert abs(slope - 1) < spread < 0.2


def test_longest_sequence_by_bisection():
    asked: list[int] = []

    def peak(length: int) -> int:
        asked.append(length)
        if length > 9000:
            raise torch.OutOfMemoryError
        return 10 * length

    assert update.bisect(peak, 100, 77_777) == 77
    assert update.bisect(peak, 10_000, 1 << 60) == 0
    assert len(asked) < 20


def test_accuracy_names_every_contender():
    names = list(accuracy.contenders(CPU))
    assert names[0] == OURS
    logits = accuracy.logits_of("peaked", 4, 50, CPU)
    assert (logits.max(-1).values > 30).all()


def test_accuracy_from_hidden_states():
    """Tokens are the policy's own, the gradients' floor is one rounding, and ours reaches it; who is missing says why."""
    result = accuracy.measure_head(CPU, full=False)
    for case in result["cases"]:
        by_name = {c["name"]: c for c in case["contenders"]}
        assert list(by_name) == [*accuracy.head_contenders(CPU), accuracy.ONE_ROUNDING]
        assert by_name["Cut Cross-Entropy"]["missing"]
        ours, narrow, floor = (by_name[name]["errors"] for name in (OURS, "rlkern, bfloat16 logits", accuracy.ONE_ROUNDING))
        assert max(ours["logprob"], ours["ratio"]) < 1e-5 < 1e-3 < min(narrow["logprob"], narrow["ratio"])
        assert ours["entropy"] < 1e-4
        assert all(0 < ours[q] <= 2 * floor[q] for q in accuracy.HEAD_QUANTITIES if q.startswith("d "))
    text = tables.head_accuracy_table({"head_accuracy": result})
    assert "Peaked logits, H = 256, N = 16, V = 8,000, bfloat16" in text
    assert "Cut Cross-Entropy (" in text


# ---- pages ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_pages_show_the_committed_result(page):
    """A page cannot deny its own table: python -m bench.report bench/results/cpu.json --write"""
    text = page.read_text()
    assert "<!-- bench: end -->" in text
    assert report.filled(text, report.blocks(report.read(report.DOCUMENTED))) == text


def test_plots_are_there():
    run = report.kept(report.GPU)
    of_gpu = report.plots(run["gpu"], "bench-gpu") if report.is_of_gpu(run) else {}
    wanted = [*report.plots(report.read(report.DOCUMENTED)).values(), *of_gpu.values(), report.HEAD_PLOT]
    assert [path for path in wanted if not path.exists()] == []


def test_measured_reads_its_sittings():
    assert Measured(seconds=[[3.0, 1.0], [2.0]]).median == 2.0


def test_our_column_of_the_hazards_has_no_nan():
    """And PyTorch's has one wherever it is a hazard of that kind."""
    for title, (contenders, judged, _) in hazards.HAZARDS.items():
        mine, eager = (judged(contenders[name]()) for name in ("rlkern", "PyTorch"))
        assert "nan" not in mine, title
        assert "inf" not in mine, title
        assert ("nan" in eager) == (title != "bfloat16 logits, 32,000 tokens"), title


def test_headroom_is_that_of_the_busiest_unit():
    chip = instructions.Chip("sm_90", multiprocessors=100, clock=1.0, bandwidth=1.0)
    seconds = 64 / 0.9e12  # to move the bytes
    issued = instructions.Loop(128, {"multiply-add": 100, "special": 8}, 64, 0, 128)
    assert chip.headroom(issued) == pytest.approx(seconds / (1 / 100e9))
    special = instructions.Loop(128, {"multiply-add": 100, "special": 32}, 48, 16, 128)
    assert chip.headroom(special) == pytest.approx(seconds / (2 / 100e9))
