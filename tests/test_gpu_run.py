"""The GPU run: what it does without a GPU, and what it keeps when a stage fails, hangs or is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu, gpu_parts

ROOT = Path(__file__).parents[1]


def _stage(name: str, code: str, share: float = 1.0) -> gpu.Stage:
    return gpu.Stage(name, share, {name: [sys.executable, "-S", "-c", code]}, {})


def test_a_failing_or_hanging_stage_leaves_the_others_alone_and_the_time_is_kept(tmp_path: Path) -> None:
    todo = [_stage("fails", "raise SystemExit(3)"), _stage("hangs", "import time; time.sleep(600)"), _stage("runs", "print('there')", 2.0)]
    start = time.monotonic()
    assert gpu.conduct(todo, tmp_path, 8.0, "command") == 1
    assert time.monotonic() - start < 8.0
    summary = json.loads((tmp_path / "summary.json").read_text())
    parts = {part: what for stage in summary.values() for part, what in stage["parts"].items()}
    assert "exit status 3" in parts["fails"]
    assert "time was up" in parts["hangs"]
    assert parts["runs"] == "passed"
    assert (tmp_path / "runs.log").read_text() == "there\n"


def test_a_command_that_is_not_there_is_a_failure_of_its_stage(tmp_path: Path) -> None:
    todo = [gpu.Stage("absent", 1.0, {"absent": ["/nonexistent/program"]}, {}), _stage("runs", "", 4.0)]
    assert gpu.conduct(todo, tmp_path, 10.0, "command") == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "failed" in summary["absent"]["parts"]["absent"]
    assert summary["runs"]["parts"]["runs"] == "passed"


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """whole_or_not: killed before the new one takes the old one's place, the old one stands."""
    gpu_parts.put(tmp_path / "x.json", {"a": 1})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu_parts.put(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("after", [0, 1, 2])
def test_killed_after_a_stage_the_files_before_are_whole(tmp_path: Path, after: int) -> None:
    code = f"""
import os, sys
from pathlib import Path
from bench import gpu
out = Path({str(tmp_path)!r})
write = "from pathlib import Path; from bench import gpu_parts; gpu_parts.put(Path({str(tmp_path)!r}) / '%d.json', [%d])"
todo = [gpu.Stage(str(i), 1.0, {{str(i): [sys.executable, "-c", write % (i, i)]}}, {{}}) for i in range(3)]
put = gpu.put
def then_die(path, result):
    put(path, result)
    if {str(after)!r} in result:
        os._exit(9)
gpu.put = then_die
gpu.conduct(todo, out, 100, "command")
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True).returncode == 9
    assert [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(after + 1)] == [[i] for i in range(after + 1)]
    assert list(json.loads((tmp_path / "summary.json").read_text())) == [str(i) for i in range(after + 1)]
    assert not (tmp_path / f"{after + 1}.json").exists()


def test_the_dry_run_passes_and_can_be_reported(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry", "--out", str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr + "".join(f.read_text()[-2000:] for f in tmp_path.glob("*.log"))
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {c["operation"].split(" ")[0] for c in result["contests"]} >= {"token_logprobs", "gae", "policy_loss"}
    table = (tmp_path / "kernels.txt").read_text()
    assert table.count("right") == len(gpu_parts.DRY_LAUNCHES)
    assert "kernels that did not run" in table
    assert "value_loss, forward" in (tmp_path / "configs.txt").read_text()
    assert list(json.loads((tmp_path / "graphs-0.json").read_text()).values()) == [[], []]
    assert json.loads((tmp_path / "compile-0.json").read_text()) == {}
    assert set(json.loads((tmp_path / "memcheck-0.json").read_text()).values()) == {"passed"}
    said = subprocess.run([sys.executable, "-m", "bench.report", str(tmp_path / "gpu.json")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr


def test_without_a_gpu_the_real_run_says_so(tmp_path: Path) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "bench.gpu", "--out", str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr


def test_the_table_of_verdicts_says_what_is_wrong_and_what_never_ran(tmp_path: Path) -> None:
    finding = {"of": "logprob", "error": 2e-6, "allowed": 1e-6}
    right = {"kernels": ["a_kernel"], "findings": [{**finding, "error": 1e-7}], "wrong": []}
    gpu_parts.put(tmp_path / "environment.json", {"entry_kernels": ["a_kernel", "b_kernel", "c_kernel"]})
    gpu_parts.put(tmp_path / "kernels-0.json", {"one": right, "two": {"failure": "RuntimeError: no\nmore"}})
    wrong = {"kernels": ["b_kernel"], "findings": [{**finding, "error": 0.0, "allowed": 0.0}, finding], "wrong": ["logprob"]}
    gpu_parts.put(tmp_path / "kernels-1.json", {"three": wrong})
    _, one, three, two, missing = gpu.verdict_table(tmp_path).splitlines()
    assert [line.split()[:2] for line in (one, three, two)] == [["right", "one"], ["WRONG", "three"], ["FAILED", "two"]]
    assert "2.0e-06" in three
    assert missing == "kernels that did not run: c_kernel"
    assert set(json.loads((tmp_path / "kernels.json").read_text())) == {"one", "two", "three"}


def test_what_a_part_started_goes_with_it(tmp_path: Path) -> None:
    """Also where the part itself is over: compilers and test runners have workers."""
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']).pid, flush=True)"
    assert gpu.run(_stage("leaves", code), tmp_path, time.monotonic() + 20) == {"leaves": "passed"}
    worker = int((tmp_path / "leaves.log").read_text())
    for _ in range(100):
        status = Path(f"/proc/{worker}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":  # whoever adopted it has yet to ask for its status
            return
        time.sleep(0.05)
    raise AssertionError("the worker still runs")


def test_the_stages_of_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order of worth, whatever the machine has; what is marked for GPUs is tested first."""
    monkeypatch.setattr(gpu, "sanitizer_path", lambda: "/opt/cuda/bin/compute-sanitizer")
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 64)
    stages = {stage.name: stage for stage in gpu.stages(tmp_path, dry=False)}
    assert list(stages) == ["kernels", "headline", "compile", "configs", "checks", "memcheck", "racecheck"]
    assert len(stages["kernels"].parts) == gpu.WORKERS
    assert stages["memcheck"].parts["memcheck-0"][:2] == ["/opt/cuda/bin/compute-sanitizer", "--tool"]
    checks = stages["checks"].parts
    marked = checks["gpu-tests"]
    assert {"-m", "gpu", "tests/test_logprobs.py", "tests/test_divergence.py"} <= set(marked)
    assert all((ROOT / file).exists() for part in ("gpu-tests", "tests") for file in checks[part] if file.endswith(".py"))
    monkeypatch.setattr(gpu, "shareable", lambda: False)
    assert list(gpu.stages(tmp_path, dry=False)[0].parts) == ["kernels-0"]
    monkeypatch.setattr(gpu, "sanitizer_path", lambda: None)
    monkeypatch.setattr(gpu, "there", lambda package: package != "pytest")
    assert set(gpu.stages(tmp_path, dry=False)[-1].parts) == {"graphs-0"}


def test_exit_status_tells_failures_from_a_time_that_was_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.conduct([_stage("runs", "")], tmp_path, 20.0, "command") == 0
    hangs = _stage("hangs", "import time; time.sleep(600)")
    assert gpu.conduct([_stage("runs", ""), hangs, _stage("after", "")], tmp_path, 1.0, "command") == 3
    assert "not finished in time: hangs" in capsys.readouterr().out


def test_a_process_that_can_do_no_more_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an illegal access: what it found stands, the rest is done, and the part has failed."""
    import torch

    dead: list[str] = []

    def synchronize() -> None:
        if dead:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    started: list[list[str]] = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, check: started.append(command))
    found: dict[str, str] = {}

    def done(name: str, _: object, failure: str) -> None:
        found[name] = failure or "passed"
        gpu_parts.put(tmp_path / "part.json", found)

    calls = {"one": lambda: None, "two": lambda: dead.append("two"), "three": lambda: None}
    assert not gpu_parts.each(calls, done, resumable=True)
    assert found == {"one": "passed", "two": "RuntimeError: an illegal memory access was encountered"}
    assert started[0][-1] == "--resume"
    assert gpu_parts.taken_up(tmp_path, "part", "0/2", ["one", "x", "two", "y", "three"], resumed=True) == (found, ["three"])
    assert gpu_parts.taken_up(tmp_path, "part", "0/2", ["one", "x", "two", "y", "three"], resumed=False) == ({}, ["one", "two", "three"])


def test_the_checkers_come_by_every_kernel_first(tmp_path: Path) -> None:
    names = ["a", "a again", "b and c", "c", "d"]
    assert gpu_parts.every_kernel_first(tmp_path, names) == names
    launched = zip(names, ("a", "a", "bc", "c", "d"), strict=True)
    gpu_parts.put(tmp_path / "kernels.json", {name: {"kernels": list(kernels)} for name, kernels in launched} | {"failed": {"failure": "why"}})
    assert gpu_parts.every_kernel_first(tmp_path, names) == ["a", "b and c", "d", "a again", "c"]


def test_an_earlier_run_leaves_nothing_behind_and_other_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine with more cores, say, whose workers this one does not have."""
    for name in ("kernels-15.json", "gpu.17.tmp", "gpu-tests.log", "configs.txt", "notes.txt", "kernels.png"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(gpu, "conduct", lambda *_: 0)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "kernels.png"}


def test_whether_processes_may_share_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.shareable()
    for mode, expected in (("Default", True), ("Exclusive_Process", False)):
        program.write_text(f"#!/bin/sh\necho {mode}\n")
        program.chmod(0o755)
        assert gpu.shareable() == expected
