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
import gc
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DRY_MINUTES = 5.0  # a bound for a busy machine; a quiet one takes 20 seconds
# Of what is measured, in order of worth, with shares of the time: torch.compile takes the most of it.
GROUPS = {"token_logprobs": 0.13, "fused_policy_loss": 0.1, "fused_linear_policy_loss": 0.13, "tokens": 0.06}
TESTS = [f"tests/test_{name}.py" for name in ("logprobs", "policy_loss", "fused", "scan", "divergence", "value_loss")]
KILLED, NO_TIME = "killed: its time was up", "not run: no time was left"
PATIENCE = 5.0  # seconds for a killed process to end
WORKERS = 16  # at most; each holds half a GiB of the GPU and a core
ALL = "headline"  # the groups together
PEERS_LEFT_OUT = ("trl", "liger_kernel", "torchrl")  # of a dry run: importing them takes longer than all else
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
    workers = 1 if dry or not shareable() else min(WORKERS, os.cpu_count() or 1)
    plain = {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else {})

    def shared(task: str, of: int, *before: str) -> dict[str, list[str]]:
        """One part for each worker: its slice of what there is to do."""
        return {f"{task}-{i}": [*before, *this, "--part", f"{task}-{i}", "--slice", f"{i}/{of}"] for i in range(of)}

    # Each worker compiles and runs its part of the calls: compilation in parallel, by the very launches that the cache is asked for later.
    found = [Stage("kernels", 0.2, shared("kernels", workers), plain, verdict_table)]
    # A dry run has few processes: most of its time is imports.
    found += [Stage(part, share, {part: [*this, "--part", part]}, plain) for part, share in ({ALL: 0.4} if dry else GROUPS).items()]
    if dry:
        found.append(
            Stage("configs", 0.2, {"configs": [*this, "--part", "compile-0+configs+graphs-0+memcheck-0", "--slice", "0/1"]}, plain, configs_table)
        )
    else:
        found.append(Stage("compile", 0.08, shared("compile", workers), plain))
        found.append(Stage("configs", 0.14, {"configs": [*this, "--part", "configs"]}, plain, configs_table))
        found.append(Stage("graphs", 0.06, shared("graphs", max(1, workers // 4)), plain))
    sanitizer = None if dry else sanitizer_path()
    if sanitizer:
        # Without PyTorch's caching allocator, a kernel that leaves its tensor leaves its allocation too.
        alone = plain | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for tool in ("memcheck", "racecheck"):
            checked = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
            found.append(Stage(tool, 0.06, shared(tool, max(1, workers // 2), *checked), alone))
    elif not dry:
        print("memcheck, racecheck: not run, there is no compute-sanitizer here (it comes with the CUDA toolkit)", flush=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors"]
    if dry:
        return [*found, Stage("tests", 0.1, {"tests": [*pytest, "--noconftest", "tests/test_gpu_run.py", "-k", "whole_or_not"]}, {})]
    if not there("pytest"):
        print("tests: not run, pytest is not installed", flush=True)
        return found
    parallel = ["-n", "4", "--dist", "loadgroup"] if there("xdist") else []
    marked = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("test_*.py") if "@pytest.mark.gpu" in file.read_text())
    found.append(Stage("gpu-tests", 0.04, {"gpu-tests": [*pytest, "-m", "gpu", *marked]}, plain))
    return [*found, Stage("tests", 0.1, {"tests": [*pytest, "-m", "not gpu", *TESTS, *parallel]}, plain)]


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
        for name, process in running.items():
            # The whole group, also where its leader is over: the workers that a part started go with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:  # it hangs in the driver: what comes next may hang too, but not here
                became[name] = "killed, and does not end"
    return became


def measured(out: Path, command: str) -> Json | None:
    """The groups' contests in one result, in the form of ``python -m bench``."""
    files = [out / f"{part}.json" for part in (*GROUPS, ALL)]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    contests = [contest for result in results for contest in result["contests"]]
    failed = {title: why for result in results for title, why in result["failed"].items()}
    return {"command": command, "environment": results[0]["environment"], "contests": contests, "failed": failed} if contests else None


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


# ---- parts: what runs in a process of its own --------------------------------------------------------------------------------------------------


def each(calls: Mapping[str, Callable[[], Any]], done: Callable[[str, Any, str], None], *, resumable: bool = False) -> bool:
    """Run them; each ends, and its errors show, before the next begins. Whether all did what they should.

    After an illegal access a process can do no more on a GPU. ``resumable``: a new one goes on, and leaves out what this one has written.
    """
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
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                if resumable:
                    print("this process can do no more on the GPU; a new one goes on", flush=True)
                    subprocess.run([sys.executable, "-m", "bench.gpu", *sys.argv[1:], "--resume"], check=False)
                    return False
    return well


def taken_up(out: Path, part: str, piece: str, names: Sequence[str], *, resumed: bool) -> tuple[dict[str, Any], list[str]]:
    """(what a process that could do no more has found of a part, the names that are left of its slice)."""
    index, of = map(int, piece.split("/"))
    file = out / f"{part}.json"
    found = json.loads(file.read_text()) if resumed and file.exists() else {}
    return found, [name for name in names[index::of] if name not in found]


def kernels(out: Path, part: str, piece: str, *, dry: bool, resumed: bool) -> bool:
    """A slice of the calls of ``bench/launches.py``, once each: results and gradients against float64."""
    import torch

    from bench import launches
    from bench.environment import environment
    from bench.verdict import entry_kernels, judge, kernels_launched

    device = torch.device("cpu" if dry else "cuda")
    result, names = taken_up(out, part, piece, DRY_LAUNCHES if dry else list(launches.LAUNCHES), resumed=resumed)
    launches.ROWS, launches.VOCABULARY = (
        (launches.ROWS, 500) if dry else ((3, 15), launches.VOCABULARY)
    )  # more rows than a program of any kernel takes
    if piece.startswith("0/"):
        put(out / "environment.json", environment(device) | {"entry_kernels": sorted(entry_kernels())})

    def judged(name: str) -> Json:
        with kernels_launched() as launched:
            findings = judge(launches.LAUNCHES[name], device)
        found = [{"of": f.of, "error": f.error, "allowed": f.allowed} for f in findings]
        return {"kernels": sorted(launched), "findings": found, "wrong": [f.of for f in findings if not f.right]}

    def done(name: str, found: Json | None, failure: str) -> None:
        result[name] = found or {"failure": failure}
        put(out / f"{part}.json", result)

    well = each({name: partial(judged, name) for name in names}, done, resumable=True)
    return well and not any(found["wrong"] for found in result.values())


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


def contests(group: str, *, dry: bool) -> Iterator[Any]:
    """Of the headline table, at real shapes, the one that matters most first; tiny ones for a dry run."""
    import torch

    from bench.contests import gae, linear, logprobs, policy_loss

    device, dtype = (torch.device("cpu"), torch.float32) if dry else (torch.device("cuda"), torch.bfloat16)
    vocabularies = (64,) if dry else (128256, 151936, 32000)
    if group == "token_logprobs":
        yield from (logprobs.contest(device, 4 if dry else 8192, v, dtype, entropy=True) for v in vocabularies)
    elif group == "fused_policy_loss":
        yield from (policy_loss.from_logits(device, *((2, 4) if dry else (8, 1024)), v, dtype) for v in vocabularies)
    elif group == "fused_linear_policy_loss":
        shape = (64, 16, 64) if dry else (8192, 4096, 128256)
        yield from (linear.loss_contest(device, *shape, dtype, **options) for options in ({}, {"frozen": True}, {"rollouts": True}))
        yield linear.logprobs_contest(device, *shape, dtype)
    else:
        yield from (gae.contest(device, *shape) for shape in ([(2, 16)] if dry else [(8192, 2048), (256, 2048)]))
        yield from (policy_loss.from_logprobs(device, *shape) for shape in ([(2, 16)] if dry else [(512, 2048), (32, 2048)]))


def headline(out: Path, group: str, *, dry: bool) -> bool:
    """Ours against float64, then all contenders and the ceilings in turn; with torch.compile, which is ready last, when all else is kept."""
    import torch

    from bench.environment import environment
    from bench.harness import OURS, Ceilings, Record

    todo = [contest for one in (GROUPS if group == ALL else [group]) for contest in contests(one, dry=dry)]
    result: Json = {"environment": environment(todo[0].device), "contests": [], "failed": {}}
    ceilings = {contest.dtype: None if dry else Ceilings(contest.device, contest.dtype) for contest in todo}

    def chosen(contest: Any, late: bool) -> Any:
        return replace(contest, contenders={name: c for name, c in contest.contenders.items() if name == OURS or ("torch.compile" in name) == late})

    def measure(contest: Any) -> Json:
        record = Record(contest, ceilings[contest.dtype])
        return record.sit(seconds=0.05 if dry else 3.0, rounds=(2, 3) if dry else (5, 50)).json()

    def done(name: str, figures: Json | None, failure: str) -> None:
        before = next((contest for contest in result["contests"] if contest["title"] == name), None)
        if figures is None:
            result["failed"][name] = failure
        elif before is None:
            result["contests"].append(figures)
        else:
            before["contenders"] += [contender for contender in figures["contenders"] if contender["name"] != OURS]
        put(out / f"{group}.json", result)

    if dry:
        torch.set_num_threads(1)
        sys.modules.update(dict.fromkeys(PEERS_LEFT_OUT))  # type: ignore[arg-type]  # None: it cannot be imported
    well = each({contest.title: partial(measure, chosen(contest, False)) for contest in todo}, done)
    return each({c.title: partial(measure, chosen(c, True)) for c in todo if len(chosen(c, True).contenders) > 1}, done) and well


def tried(*, dry: bool) -> list[Any]:
    """The cases of launch configurations."""
    from bench import configurations

    if not dry:
        return list(configurations.CASES)
    return [replace(case, candidates=case.candidates[:2]) for case in configurations.CASES if case.title == "value_loss"]


def compile_candidates(out: Path, part: str, piece: str, *, dry: bool) -> bool:
    """A slice of the candidates for launch configurations: what does not compile says so again when it is timed."""
    import torch

    from bench import configurations

    index, of = map(int, piece.split("/"))
    todo = [(case, changes) for case in tried(dry=dry) if case.owner != configurations.CHUNKS for changes in case.candidates][index::of]
    failed: dict[str, str] = {}

    def done(name: str, _: None, failure: str) -> None:
        failed.update({name: failure} if failure else {})
        put(out / f"{part}.json", failed)

    device = torch.device("cpu" if dry else "cuda")
    names = [f"{configurations.named(case)}: {configurations.label(changes)}" for case, changes in todo]
    calls = {name: partial(configurations.compiled, *candidate, device) for name, candidate in zip(names, todo, strict=True)}
    each(calls, done)
    return True


def configs(out: Path, *, dry: bool) -> bool:
    """Every candidate against the configuration as it is."""
    import torch

    from bench import configurations
    from bench.environment import environment

    device = torch.device("cpu" if dry else "cuda")
    cases = tried(dry=dry)
    result: Json = {"environment": environment(device), "configurations": [], "failed": {}}

    def done(name: str, found: Json | None, failure: str) -> None:
        if found is None:
            result["failed"][name] = failure
        else:
            result["configurations"].append(found)
        put(out / "configs.json", result)

    names = list(map(configurations.named, cases))
    return each(
        {name: partial(configurations.compared, case, device, rounds=1 if dry else 5, small=dry) for name, case in zip(names, cases, strict=True)},
        done,
    )


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


def graphs(out: Path, part: str, piece: str, *, dry: bool, resumed: bool) -> bool:
    """A slice of the calls again: the same bits, without a synchronisation, and from a CUDA graph."""
    import torch

    from bench import launches
    from bench.verdict import objections

    found, names = taken_up(out, part, piece, DRY_LAUNCHES[:2] if dry else list(launches.LAUNCHES), resumed=resumed)
    launches.VOCABULARY = 500 if dry else launches.VOCABULARY
    device = torch.device("cpu" if dry else "cuda")

    def done(name: str, objected: list[str] | None, failure: str) -> None:
        found[name] = [failure] if objected is None else objected
        for line in objected or ():
            print(f"{name}: {line}", flush=True)
        put(out / f"{part}.json", found)

    return each({name: partial(objections, launches.LAUNCHES[name], device) for name in names}, done, resumable=True) and not any(found.values())


def once_each(out: Path, part: str, piece: str, *, dry: bool, resumed: bool) -> bool:
    """A slice of the calls, for a program that watches them: nothing else runs on the GPU."""
    import torch

    from bench import launches
    from bench.verdict import once

    order = every_kernel_first(out, DRY_LAUNCHES[:2] if dry else list(launches.LAUNCHES))
    passed, names = taken_up(out, part, piece, order, resumed=resumed)
    launches.VOCABULARY = 500 if dry else launches.VOCABULARY
    device = torch.device("cpu" if dry else "cuda")

    def done(name: str, _: Any, failure: str) -> None:
        passed[name] = failure or "passed"
        put(out / f"{part}.json", passed)

    def call(launch: launches.Launch) -> None:
        once(launch, launch.inputs(launches.Random(0, device)))

    return each({name: partial(call, launches.LAUNCHES[name]) for name in names}, done, resumable=True)


def every_kernel_first(out: Path, names: Sequence[str]) -> list[str]:
    """The launches, those first that between them run every kernel that ran in the first stage."""
    file = out / "kernels.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    seen: set[str] = set()
    first = []
    for name in names:
        launched = set(found.get(name, {}).get("kernels", ()))
        if launched - seen:
            first.append(name)
            seen |= launched
    return [*first, *(name for name in names if name not in first)]


def work(out: Path, part: str, piece: str, *, dry: bool, resumed: bool) -> bool:
    """What a part does; whether all of it is well. Of several, with a + between them, one after the other."""
    if "+" in part:
        well = [work(out, one, piece, dry=dry, resumed=resumed) for one in part.split("+")]
        return all(well)
    task = part.split("-")[0]
    if task == "kernels":
        return kernels(out, part, piece, dry=dry, resumed=resumed)
    if task == "compile":
        return compile_candidates(out, part, piece, dry=dry)
    if task == "configs":
        return configs(out, dry=dry)
    if task == "graphs":
        return graphs(out, part, piece, dry=dry, resumed=resumed)
    if task in ("memcheck", "racecheck"):
        return once_each(out, part, piece, dry=dry, resumed=resumed)
    return headline(out, part, dry=dry)


# What a run writes: names up to the first dash.
WRITTEN = {"environment", "summary", "gpu", *GROUPS, ALL, "kernels", "compile", "configs", "graphs", "memcheck", "racecheck", "tests"}


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
