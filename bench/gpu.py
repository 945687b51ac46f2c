"""A verdict from a GPU within minutes: one command that checks, measures, and keeps what it has when time runs out.

    python -m bench.gpu --minutes 6 --out DIR       # on a GPU
    python -m bench.gpu --dry --out DIR             # anywhere: the same stages, tiny, in Triton's interpreter
    python -m bench.report DIR/gpu.json             # tables and plots of what was measured

Stages run in order of worth. Each has its share of the time and what earlier ones left of theirs. Its parts are processes of their own, so that an
illegal access in one kernel leaves the others alone; they are killed when the stage's time is up. A part replaces ``DIR/<part>.json`` after
each thing done, ``DIR/<part>.log`` is what it said, ``DIR/summary.json`` and ``DIR/gpu.json`` are written anew after each stage.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DRY_MINUTES = 5.0  # a bound for a busy machine; a quiet one takes 20 seconds
# Of what is measured, in order of worth, with shares of the time: torch.compile takes the most of it.
GROUPS = {"token_logprobs": 0.16, "fused_policy_loss": 0.12, "fused_linear_policy_loss": 0.16, "gae": 0.06, "policy_loss": 0.06}
TESTS = [f"tests/test_{name}.py" for name in ("logprobs", "policy_loss", "fused", "scan", "divergence", "value_loss")]
ALL = "headline"  # the groups together
DRY_LAUNCHES = ("token_logprobs bf16", "policy_loss of tokens", "full_kl bf16", "gae of 16 steps")
Json = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Parts that run side by side, name -> command, and the share of the whole time that the stage has."""

    name: str
    share: float
    parts: Mapping[str, Sequence[str]]
    environment: Mapping[str, str]
    table: Callable[[Path], str] | None = None  # made of what the parts wrote, into ``<name>.txt``


def put(path: Path, result: object) -> None:
    put_text(path, json.dumps(result, indent=1) + "\n")


def put_text(path: Path, text: str) -> None:
    """Whole or not at all, whenever this process is killed."""
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text(text)
    fresh.replace(path)


def stages(out: Path, *, dry: bool) -> list[Stage]:
    """What is done, in order of worth."""
    this = [sys.executable, "-m", "bench.gpu", "--out", str(out), *(["--dry"] if dry else [])]
    # Each worker compiles and runs its part of the calls: compilation in parallel, by the very launches that the cache is asked for later.
    workers = 1 if dry else min(16, os.cpu_count() or 1)
    plain = {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else {})
    kernels = {f"kernels-{i}": [*this, "--part", f"kernels-{i}", "--slice", f"{i}/{workers}"] for i in range(workers)}
    found = [Stage("kernels", 0.2, kernels, plain, verdict_table)]
    # A dry run has one process for all groups: most of its time is imports.
    found += [Stage(part, share, {part: [*this, "--part", part]}, plain) for part, share in ({ALL: 0.5} if dry else GROUPS).items()]
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *(["tests/test_gpu_run.py", "-k", "whole_or_not"] if dry else [*TESTS, "-n", "4", "--dist", "loadgroup"]),
    ]
    if shutil.which("compute-sanitizer") and not dry:
        # Without PyTorch's caching allocator, a kernel that leaves its tensor leaves its allocation too.
        alone = plain | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        some = max(1, workers // 2)
        for tool in ("memcheck", "racecheck"):
            checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *this]
            parts = {f"{tool}-{i}": [*checked, "--part", f"{tool}-{i}", "--slice", f"{i}/{some}"] for i in range(some)}
            found.append(Stage(tool, 0.08, parts, alone))
    return [*found, Stage("tests", 0.1, {"tests": tests}, {} if dry else plain)]


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
                became[name] = "killed: its time was up"
    finally:
        for process in running.values():
            # The whole group: what a part started goes with it.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return became


def measured(out: Path, command: str) -> Json | None:
    """The groups' contests in one result, in the form of ``python -m bench``."""
    files = [out / f"{part}.json" for part in (*GROUPS, ALL)]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    contests = [contest for result in results for contest in result["contests"]]
    return {"command": command, "environment": results[0]["environment"], "contests": contests} if contests else None


def conduct(todo: Sequence[Stage], out: Path, seconds: float, command: str) -> bool:
    """Run them all; whether all passed."""
    start = end = time.monotonic()
    summary: dict[str, Json] = {}
    for stage in todo:
        end += seconds * stage.share / sum(s.share for s in todo)
        began = time.monotonic()
        try:
            became = run(stage, out, end) if began < end else dict.fromkeys(stage.parts, "not run: no time was left")
        except OSError as why:
            became = dict.fromkeys(stage.parts, f"failed: {why}")
        summary[stage.name] = {"seconds": round(time.monotonic() - began, 1), "parts": became}
        put(out / "summary.json", summary)
        if result := measured(out, command):
            put(out / "gpu.json", result)
        if stage.table is not None:
            put_text(out / f"{stage.name}.txt", stage.table(out) + "\n")
        wrong = [f"{part} {what}" for part, what in became.items() if what != "passed"]
        print(f"{stage.name}: {'; '.join(wrong) or 'passed'} ({summary[stage.name]['seconds']} s)", flush=True)
    passed = all(what == "passed" for stage in summary.values() for what in stage["parts"].values())
    print(f"{'all passed' if passed else 'not all passed'} in {time.monotonic() - start:.0f} s; written to {out}")
    return passed


# ---- parts: what runs in a process of its own --------------------------------------------------------------------------------------------------


def each(calls: Mapping[str, Callable[[], Any]], done: Callable[[str, Any, str], None]) -> bool:
    """Run them; each ends, and its errors show, before the next begins. Whether all did what they should."""
    import torch

    well = True
    for name, call in calls.items():
        result, failure = None, ""
        try:
            result = call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as why:
            failure, well = f"{type(why).__name__}: {why}", False
        done(name, result, failure)
        print(f"{name}: {failure or 'passed'}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):  # after an illegal access every call raises; the next one's failure says so
                torch.cuda.empty_cache()
    return well


def kernels(out: Path, part: str, piece: str, *, dry: bool) -> bool:
    """A slice of the calls of ``bench/launches.py``, once each: results and gradients against float64."""
    import torch

    from bench import launches
    from bench.verdict import entry_kernels, judge, kernels_launched

    index, of = map(int, piece.split("/"))
    names = list(launches.LAUNCHES)[index::of]
    if dry:
        launches.VOCABULARY, names = 2048, list(DRY_LAUNCHES)
    device = torch.device("cpu" if dry else "cuda")
    result: Json = {"entry_kernels": sorted(entry_kernels()), "launches": {}}

    def judged(name: str) -> Json:
        with kernels_launched() as launched:
            findings = judge(launches.LAUNCHES[name], device)
        found = [{"of": f.of, "error": f.error, "allowed": f.allowed} for f in findings]
        return {"kernels": sorted(launched), "findings": found, "wrong": [f.of for f in findings if not f.right]}

    def done(name: str, found: Json | None, failure: str) -> None:
        result["launches"][name] = found or {"failure": failure}
        put(out / f"{part}.json", result)

    well = each({name: partial(judged, name) for name in names}, done)
    return well and not any(found["wrong"] for found in result["launches"].values())


def verdict_table(out: Path) -> str:
    """Of what the workers of the first stage wrote: a line for each launch, with the result that is nearest to its bound, or beyond it."""
    results = [json.loads(file.read_text()) for file in sorted(out.glob("kernels-*.json"))]
    found = {name: x for result in results for name, x in result["launches"].items()}
    put(out / "kernels.json", found)
    lines = [f"{'':8}{'launch':50}{'kernels':58}{'nearest to its bound':26}{'error':>10}{'allowed':>10}"]
    for name, x in sorted(found.items()):
        if "failure" in x:
            lines.append(f"{'FAILED':8}{name:50}{x['failure'].splitlines()[0]}")
        else:
            worst = max(x["findings"], key=lambda f: f["error"] / f["allowed"] if f["allowed"] else math.inf if f["error"] else 0.0)
            of, error, allowed = worst["of"], worst["error"], worst["allowed"]
            lines.append(f"{'WRONG' if x['wrong'] else 'right':8}{name:50}{', '.join(x['kernels']):58}{of:26}{error:10.1e}{allowed:10.1e}")
    missing = {kernel for result in results for kernel in result["entry_kernels"]} - {k for x in found.values() for k in x.get("kernels", ())}
    return "\n".join([*lines, f"kernels that did not run: {', '.join(sorted(missing)) or 'none'}"])


def contests(group: str, *, dry: bool) -> Iterator[Any]:
    """Of the headline table, at real shapes; tiny ones for a dry run."""
    import torch

    from bench.contests import gae, linear, logprobs, policy_loss

    device, dtype = (torch.device("cpu"), torch.float32) if dry else (torch.device("cuda"), torch.bfloat16)
    vocabularies = (64,) if dry else (32000, 128256, 151936)
    if group == "token_logprobs":
        yield from (logprobs.contest(device, 4 if dry else 8192, v, dtype, entropy=True) for v in vocabularies)
    elif group == "fused_policy_loss":
        yield from (policy_loss.from_logits(device, *((2, 4) if dry else (8, 1024)), v, dtype) for v in vocabularies)
    elif group == "fused_linear_policy_loss":
        shape = (64, 16, 64) if dry else (8192, 4096, 128256)
        yield from (linear.loss_contest(device, *shape, dtype, **options) for options in ({}, {"frozen": True}, {"rollouts": True}))
        yield linear.logprobs_contest(device, *shape, dtype)
    elif group == "gae":
        yield from (gae.contest(device, *shape) for shape in ([(2, 16)] if dry else [(8192, 2048), (256, 2048)]))
    else:
        yield from (policy_loss.from_logprobs(device, *shape) for shape in ([(2, 16)] if dry else [(32, 2048), (512, 2048)]))


def headline(out: Path, group: str, *, dry: bool) -> bool:
    """Ours against float64, then all contenders and the ceilings in turn."""
    import torch

    from bench.environment import environment
    from bench.harness import Ceilings, Record

    todo = [contest for one in (GROUPS if group == ALL else [group]) for contest in contests(one, dry=dry)]
    result: Json = {"environment": environment(todo[0].device), "contests": [], "failed": {}}
    ceilings = {contest.dtype: None if dry else Ceilings(contest.device, contest.dtype) for contest in todo}

    def measure(contest: Any) -> Json:
        record = Record(contest, ceilings[contest.dtype])
        return record.sit(seconds=0.05 if dry else 3.0, rounds=(2, 3) if dry else (5, 50)).json()

    def done(name: str, figures: Any, failure: str) -> None:
        if failure:
            result["failed"][name] = failure
        else:
            result["contests"].append(figures)
        put(out / f"{group}.json", result)

    if dry:
        torch.set_num_threads(1)
    return each({contest.title: partial(measure, contest) for contest in todo}, done)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="for everything (default: 6)")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results; what an earlier run left there is removed")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU: does the script itself work?")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--slice", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if options.part:
        well = kernels(out, options.part, options.slice, dry=options.dry) if options.slice else headline(out, options.part, dry=options.dry)
        return 0 if well else 1
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: more than 0 is expected")
    if out.exists() and not out.is_dir():
        parser.error(f"--out {options.out}: a folder is expected")
    sees = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]  # no CUDA in this process, which outlives all
    if not options.dry and subprocess.run(sees, check=False).returncode:
        parser.error("torch sees no GPU here; --dry needs none")
    out.mkdir(parents=True, exist_ok=True)
    todo = stages(out, dry=options.dry)
    for name in ("summary", "gpu", *GROUPS, ALL, *(name for stage in todo for name in (stage.name, *stage.parts))):
        for suffix in ("json", "log", "txt"):
            (out / f"{name}.{suffix}").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the parts, which have groups of their own, go too
    seconds = 60 * (DRY_MINUTES if options.dry else options.minutes)
    return 0 if conduct(todo, out, seconds, shlex.join(["python", "-m", "bench.gpu", *arguments])) else 1


if __name__ == "__main__":
    sys.exit(main())
