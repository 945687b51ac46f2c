"""The parts of a GPU run: what ``bench/gpu.py`` starts, each in a process of its own."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ALL = "headline"
SLOW_PEER = "rows one by one"  # on a GPU a call takes a second, with a launch a row: the others' time
PEERS_LEFT_OUT = ("trl", "liger_kernel", "torchrl")  # of a dry run: importing them takes longer than all else
DRY_LAUNCHES = ("token_logprobs bf16", "policy_loss of tokens", "full_kl bf16", "gae of 16 steps")
Json = dict[str, Any]


def put(path: Path, result: object) -> None:
    put_text(path, json.dumps(result, indent=1) + "\n")


def put_text(path: Path, text: str) -> None:
    """Whole or not at all, whenever this process is killed."""
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text(text)
    fresh.replace(path)


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


def contests(*, dry: bool) -> Iterator[Any]:
    """Of the headline table, at real shapes, those that matter most first; tiny ones for a dry run."""
    import torch

    from bench.contests import gae, linear, logprobs, policy_loss

    device, dtype = (torch.device("cpu"), torch.float32) if dry else (torch.device("cuda"), torch.bfloat16)
    rows, batch, head = (4, (2, 4), (64, 16, 64)) if dry else (8192, (8, 1024), (8192, 4096, 128256))
    for main in (True,) if dry else (True, False):
        for vocabulary in (64,) if dry else (128256,) if main else (151936, 32000):
            yield logprobs.contest(device, rows, vocabulary, dtype, entropy=True)
            yield policy_loss.from_logits(device, *batch, vocabulary, dtype)
        if main:
            yield linear.loss_contest(device, *head, dtype)
            yield gae.contest(device, *((2, 16) if dry else (8192, 2048)))
            yield policy_loss.from_logprobs(device, *((2, 16) if dry else (512, 2048)))
            yield linear.logprobs_contest(device, *head, dtype)
            yield from (linear.loss_contest(device, *head, dtype, **options) for options in ({"frozen": True}, {"rollouts": True}))
        else:
            yield gae.contest(device, 256, 2048)
            yield policy_loss.from_logprobs(device, 32, 2048)


def headline(out: Path, *, dry: bool) -> bool:
    """Ours against float64, then all contenders and the ceilings in turn; with torch.compile, which is ready last, when all else is kept."""
    import torch

    from bench.environment import environment
    from bench.harness import OURS, Ceilings, Record

    todo = list(contests(dry=dry))
    result: Json = {"environment": environment(todo[0].device), "contests": [], "failed": {}}
    ceilings = {contest.dtype: None if dry else Ceilings(contest.device, contest.dtype) for contest in todo}

    def chosen(contest: Any, late: bool) -> Any:
        def is_chosen(name: str) -> bool:
            return name == OURS or (("torch.compile" in name) == late and not name.startswith(SLOW_PEER))

        return replace(contest, contenders={name: c for name, c in contest.contenders.items() if is_chosen(name)})

    def measure(contest: Any) -> Json:
        record = Record(contest, ceilings[contest.dtype])
        return record.sit(seconds=0.05 if dry else 2.0, rounds=(2, 3) if dry else (5, 30)).json()

    def done(name: str, figures: Json | None, failure: str) -> None:
        before = next((contest for contest in result["contests"] if contest["title"] == name), None)
        if figures is None:
            result["failed"][name] = failure
        elif before is None:
            result["contests"].append(figures)
        else:
            before["contenders"] += [contender for contender in figures["contenders"] if contender["name"] != OURS]
        put(out / f"{ALL}.json", result)

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
    return headline(out, dry=dry)
