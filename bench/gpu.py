"""A verdict from a GPU within minutes: one command that checks, measures, and keeps what it has when time runs out.

    python -m bench.gpu --minutes 6 --out DIR       # on a GPU
    python -m bench.gpu --dry --out DIR             # anywhere: the same stages, tiny, in Triton's interpreter
    python -m bench.report DIR                      # what was found, in tables

Stages run in order of worth. Each has its share of the time and what earlier ones left of theirs. Its parts are processes of their own, so that an
illegal access in one kernel leaves the others alone; they are killed when the stage's time is up. A part replaces ``DIR/<part>.json`` after
each thing done, ``DIR/<part>.log`` is what it said, ``DIR/summary.json`` and ``DIR/gpu.json`` are written anew after each stage.

Exit status: 0 where all passed, 1 where anything failed or was wrong, 3 where nothing did but the time was up before the end.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_parts import ALL, put, put_text, work

ROOT = Path(__file__).parents[1]
DRY_MINUTES = 5.0  # a bound for a busy machine; a quiet one takes 20 seconds
TESTS = [f"tests/test_{name}.py" for name in ("logprobs", "policy_loss", "fused", "scan", "divergence", "value_loss")]
PYTEST = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors"]
KILLED, NO_TIME = "killed: its time was up", "not run: no time was left"
PATIENCE = 5.0  # seconds for a killed process to end
WORKERS = 16  # at most; each holds half a GiB of the GPU and a core
Json = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Parts that run side by side, name -> command, and the share of the whole time that the stage has."""

    name: str
    share: float
    parts: Mapping[str, Sequence[str]]
    environment: Mapping[str, str]
    table: Callable[[Path], str] | None = None  # made of what the parts wrote, into ``<name>.txt``


def stages(out: Path, *, dry: bool) -> list[Stage]:
    """What is done, in order of worth."""
    this = [sys.executable, "-m", "bench.gpu", "--out", str(out), *(["--dry"] if dry else [])]
    workers = 1 if dry or not shareable() else min(WORKERS, os.cpu_count() or 1)
    plain = {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else {})

    def shared(task: str, of: int, *before: str) -> dict[str, list[str]]:
        """One part for each worker: its slice of what there is to do."""
        return {f"{task}-{i}": [*before, *this, "--part", f"{task}-{i}", "--slice", f"{i}/{of}"] for i in range(of)}

    # Each worker compiles and runs its part of the calls: compilation in parallel, by the very launches that the cache is asked for later.
    found = [Stage("kernels", 0.2, shared("kernels", workers), plain, verdict_table)]
    found.append(Stage(ALL, 0.48, {ALL: [*this, "--part", ALL]}, plain))
    if dry:  # has few processes: most of its time is imports
        together = [*this, "--part", "compile-0+configs+graphs-0+memcheck-0", "--slice", "0/1"]
        pytest = [*PYTEST, "--noconftest", "tests/test_gpu_run.py", "-k", "whole_or_not"]
        return [*found, Stage("configs", 0.2, {"configs": together}, plain, configs_table), Stage("tests", 0.1, {"tests": pytest}, {})]
    found.append(Stage("compile", 0.08, shared("compile", workers), plain))
    found.append(Stage("configs", 0.14, {"configs": [*this, "--part", "configs"]}, plain, configs_table))
    found.append(Stage("checks", 0.2, shared("graphs", max(1, workers // 4)) | tests(), plain))
    if sanitizer := sanitizer_path():
        # Without PyTorch's caching allocator, a kernel that leaves its tensor leaves its allocation too.
        alone = plain | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for tool in ("memcheck", "racecheck"):
            checked = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
            found.append(Stage(tool, 0.06, shared(tool, max(1, workers // 2), *checked), alone))
    else:
        print("memcheck, racecheck: not run, there is no compute-sanitizer here (it comes with the CUDA toolkit)", flush=True)
    return found


def tests() -> dict[str, list[str]]:
    """Those that need a GPU, and those of the kernels."""
    if not there("pytest"):
        print("tests: not run, pytest is not installed", flush=True)
        return {}
    parallel = ["-n", "8", "--dist", "loadgroup"] if there("xdist") else []
    marked = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("test_*.py") if "@pytest.mark.gpu" in file.read_text())
    return {"gpu-tests": [*PYTEST, "-m", "gpu", *marked], "tests": [*PYTEST, "-m", "not gpu", *TESTS, *parallel]}


def shareable() -> bool:
    """Whether several processes may use the GPU at once; some machines forbid it."""
    query = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return "Exclusive" not in subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout
    return True  # there is no such program: not NVIDIA's


def there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def sanitizer_path() -> str | None:
    """Also where CUDA's toolkit is that PATH does not name."""
    return shutil.which("compute-sanitizer") or next((str(x) for x in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None)


def run(stage: Stage, out: Path, end: float) -> dict[str, str]:
    """Part -> what became of it, "passed" where it did; all are over when this returns."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | dict(stage.environment)
    running: dict[str, subprocess.Popen[bytes]] = {}
    became: dict[str, str] = {}
    try:
        for name, command in stage.parts.items():
            with (out / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
        for name, process in running.items():
            try:
                status = process.wait(max(0.0, end - time.monotonic()))
                became[name] = "passed" if status == 0 else f"failed with exit status {status}: see {name}.log"
            except subprocess.TimeoutExpired:
                became[name] = KILLED
    finally:
        for process in running.values():  # pytest then says what failed
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
        patient = time.monotonic() + PATIENCE
        for name, process in running.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, patient - time.monotonic()))
            # The whole group, also where its leader is over: the workers that a part started go with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:  # it hangs in the driver: what comes next may hang too, but not here
                became[name] = "killed, and does not end"
    return became


def measured(out: Path, command: str) -> Json | None:
    """The contests so far, in the form of ``python -m bench``."""
    file = out / f"{ALL}.json"
    result = json.loads(file.read_text()) if file.exists() else {"contests": []}
    return {"command": command, **result} if result["contests"] else None


def conduct(todo: Sequence[Stage], out: Path, seconds: float, command: str) -> int:
    """Run them all; the exit status."""
    start = end = time.monotonic()
    summary: dict[str, Json] = {}
    for stage in todo:
        end += seconds * stage.share / sum(s.share for s in todo)
        began = time.monotonic()
        try:
            became = run(stage, out, end) if began < end else dict.fromkeys(stage.parts, NO_TIME)
        except OSError as why:
            became = dict.fromkeys(stage.parts, f"failed: {why}")
        summary[stage.name] = {"seconds": round(time.monotonic() - began, 1), "parts": became}
        put(out / "summary.json", summary)
        if result := measured(out, command):
            put(out / "gpu.json", result)
        if stage.table is not None and (table := stage.table(out)):
            put_text(out / f"{stage.name}.txt", table + "\n")
        wrong = [f"{part} {what}" for part, what in became.items() if what != "passed"]
        print(f"{stage.name}: {'; '.join(wrong) or 'passed'} ({summary[stage.name]['seconds']} s)", flush=True)
    all_parts = {part: what for stage in summary.values() for part, what in stage["parts"].items() if what != "passed"}
    late = [part for part, what in all_parts.items() if what in (KILLED, NO_TIME)]
    failed = [part for part in all_parts if part not in late]
    lines = [f"{word}: {', '.join(parts)}" for word, parts in (("failed", failed), ("not finished in time", late)) if parts]
    print(
        "\n".join(
            [*lines, f"{'all passed' if not lines else 'done'} in {time.monotonic() - start:.0f} s; what was found: python -m bench.report {out}"]
        )
    )
    return 1 if failed else 3 if late else 0


# ---- what parts wrote, as tables -------------------------------------------------------------------------------------------------------------------


def verdict_table(out: Path) -> str:
    """Of what the workers of the first stage wrote: a line for each launch, with the result that is nearest to its bound, or beyond it."""
    found: Json = {}
    for file in sorted(out.glob("kernels-*.json")):
        found |= json.loads(file.read_text())
    put(out / "kernels.json", found)
    lines = [f"{'':8}{'launch':50}{'kernels':58}{'nearest to its bound':26}{'error':>10}{'allowed':>10}"]
    for name, x in sorted(found.items()):
        if "failure" in x:
            lines.append(f"{'FAILED':8}{name:50}{x['failure'].splitlines()[0]}")
        else:
            worst = max(x["findings"], key=lambda f: f["error"] / f["allowed"] if f["allowed"] else math.inf if f["error"] else 0.0)
            of, error, allowed = worst["of"], worst["error"], worst["allowed"]
            lines.append(f"{'WRONG' if x['wrong'] else 'right':8}{name:50}{', '.join(x['kernels']):58}{of:26}{error:10.1e}{allowed:10.1e}")
    if (out / "environment.json").exists():
        written = set(json.loads((out / "environment.json").read_text())["entry_kernels"])
        missing = written - {kernel for x in found.values() for kernel in x.get("kernels", ())}
        lines.append(f"kernels that did not run: {', '.join(sorted(missing)) or 'none'}")
    return "\n".join(lines)


def configs_table(out: Path) -> str:
    """A line for each call: what the best candidate gains, and how to write it."""
    if not (out / "configs.json").exists():
        return ""
    lines = [f"{'call':58}{'now':>10}{'best':>10}{'gain':>7}  best configuration"]
    for x in json.loads((out / "configs.json").read_text())["configurations"]:
        call = f"{x['call']}, {x['rows'][0]} x {x['rows'][1]}" + (f", V {x['vocabulary']}" if x["vocabulary"] else "")
        constants = ", ".join(f"{name} = {value}" for name, value in x["best"]["constants"].items())
        best = " with ".join(filter(None, (x["best"]["text"], constants)))
        lines.append(f"{call:58}{x['now']['seconds'] * 1e3:7.3f} ms{x['best']['seconds'] * 1e3:7.3f} ms{x['gain']:7.2f}  {best}")
        lines += [f"    {name}: {why}" for name, why in x["failed"].items()]
    return "\n".join(lines)


# What a run writes: names up to the first dash.
WRITTEN = {"environment", "summary", "gpu", ALL, "kernels", "compile", "configs", "graphs", "memcheck", "racecheck", "tests"}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="for everything (default: 6)")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results; what an earlier run left there is removed")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU: does the script itself work?")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--slice", default="", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if options.part:
        return 0 if work(out, options.part, options.slice, dry=options.dry, resumed=options.resume) else 1
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: more than 0 is expected")
    if out.exists() and not out.is_dir():
        parser.error(f"--out {options.out}: a folder is expected")
    sees = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]  # no CUDA in this process, which outlives all
    if not options.dry and subprocess.run(sees, check=False).returncode:
        parser.error("torch sees no GPU here; --dry needs none")
    out.mkdir(parents=True, exist_ok=True)
    todo = stages(out, dry=options.dry)
    for file in out.iterdir():
        if file.suffix in (".json", ".log", ".txt", ".tmp") and file.name.split(".")[0].split("-")[0] in WRITTEN:
            file.unlink()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # so that the parts, which have groups of their own, go too
    seconds = 60 * (DRY_MINUTES if options.dry else options.minutes)
    return conduct(todo, out, seconds, shlex.join(["python", "-m", "bench.gpu", *arguments]))


if __name__ == "__main__":
    sys.exit(main())
