"""What must not get worse, counted, not timed, against ``baseline.json``: bytes, launches, memory, registers, spills, load widths, instructions.

    python -m bench.guard              # compare with the baseline; exit code 1, and by how much, if anything is worse
    python -m bench.guard --renew      # write the baseline anew: after an improvement, or with a new call in bench/launches.py

The calls are those of ``bench/launches.py``, with a smaller vocabulary, and of the functions from hidden states. Bytes and launches are counted in
Triton's interpreter, memory is that of a call above its inputs, on both backends. Memory is compared for the version of PyTorch that the baseline was
made with, and what compilers make for its version of Triton.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

import rlkern as rk
from bench import launches
from bench.compile import replaced
from bench.harness import memory
from bench.traffic import traffic

BASELINE = Path(__file__).with_name("baseline.json")
RENEW = "python -m bench.guard --renew"
VOCABULARY = 6000  # more than one block of each kernel, and no multiple of any
LOADS = "narrowest load of a loop, bits"  # the one figure that is better when it is larger
ROWS = 16  # of what starts from hidden states
CPU = torch.device("cpu")

Json = dict[str, Any]


def _linear(function: Callable[..., Any], *, frozen: bool = False, grad: bool = True, **options: Any) -> None:
    """All rows in four chunks."""
    hidden, weight = torch.ones(ROWS, 96, requires_grad=grad), torch.ones(VOCABULARY, 96, requires_grad=grad and not frozen)
    ids = torch.zeros(ROWS, dtype=torch.int64)
    result = function(hidden, weight, ids, chunk_bytes=ROWS // 4 * 4 * VOCABULARY, backend=launches.BACKEND, **options)
    if grad:
        getattr(result, "loss", result).sum().backward()


def _policy(hidden: Any, weight: Any, ids: Any, **options: Any) -> rk.LossOutput:
    return rk.fused_linear_policy_loss(hidden, weight, ids, torch.zeros(ROWS), torch.ones(ROWS), **options)


def _divergence(hidden: Any, weight: Any, ids: Any, **options: Any) -> torch.Tensor:
    return rk.linear_full_kl(hidden, weight, hidden.detach(), weight.detach(), **options)


def _left_out(name: str) -> bool:
    """Variants that differ in dtype or length alone, and scans that take the interpreter most of a minute; tests/test_traffic.py has those."""
    return name in launches.VARIATIONS or any(part in name for part in ("fp32", "2 steps", "few long", "gae of bf16", "gae of float64", "vtrace"))


CALLS: dict[str, Callable[[], Any]] = {
    **{name: call for name, call in launches.LAUNCHES.items() if not _left_out(name)},
    "fused_linear_policy_loss": partial(_linear, _policy),
    "fused_linear_policy_loss, frozen head": partial(_linear, _policy, frozen=True),
    "fused_linear_policy_loss of sequences": partial(_linear, _policy, config=rk.PolicyLossConfig.gspo(), cu_seqlens=torch.tensor([0, 5, ROWS])),
    "linear_token_logprobs": partial(_linear, rk.linear_token_logprobs),
    "linear_token_logprobs without gradient": partial(_linear, rk.linear_token_logprobs, grad=False),
    "linear_full_kl": partial(_linear, _divergence),
}


def moved(calls: Mapping[str, Callable[[], Any]] = CALLS) -> Json:
    """What the kernels of each call move, and the call's peak of memory on each backend."""
    found: Json = {"moved": {}, "memory": {"triton": {}, "torch": {}}}
    with replaced(launches, VOCABULARY=VOCABULARY):
        for name, call in calls.items():
            with traffic() as counted:
                found["memory"]["triton"][name] = _peak(call)
            found["moved"][name] = {k: {"bytes loaded": m.loaded, "bytes stored": m.stored, "launches": m.launches} for k, m in counted.items()}
            if "own surrogate" not in name:  # which is written for Triton alone
                with replaced(launches, BACKEND="torch"):
                    found["memory"]["torch"][name] = _peak(call)
    return found


def _peak(call: Callable[[], Any]) -> int:
    def run() -> None:
        call()

    gc.collect()  # what earlier calls left in cycles must not be freed in this one
    return memory(run, CPU)[0]


def compiled(reports: Iterable[Mapping[str, Any]]) -> Json:
    """What ``bench.compile --json --thin`` reports, of several variants in one launch the worst."""
    found: Json = {}
    for r in reports:
        figures = {"registers": r["registers"], "bytes spilled": r["spilled"]}
        figures |= {LOADS: min(r["loop_load_bits"])} if r["loop_load_bits"] else {}
        if r.get("loops"):
            for i, one in enumerate(r["passes"]):
                figures[f"instructions a column, tenths{f', loop {i + 1}' if i else ''}"] = round(10 * one["issued"])
        kernel = found.setdefault(r["target"], {}).setdefault(r["launch"], {}).setdefault(r["kernel"], figures)
        for name, value in figures.items():
            kernel[name] = (min if name == LOADS else max)(kernel.get(name, value), value)
    return found


def compile_reports() -> list[Json]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile", "--json", "--thin", "--target", "sm_90", "sm_80", "sm_100", "gfx942"]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def worse(now: Json, baseline: Json) -> list[str]:
    """One line for each figure that is worse than in the baseline or is not there, with by how much."""
    before = dict(_figures(baseline))
    lines = []
    for path, value in _figures(now):
        where = ", ".join(path)
        if path not in before:
            lines.append(f"{where}: {value:,}, and the baseline knows nothing of it; {RENEW}")
        elif (value < before[path]) if path[-1] == LOADS else (value > before[path]):
            change = f", {value / before[path] - 1:+.1%}" if before[path] else ""
            lines.append(f"{where}: {value:,}, was {before[path]:,}{change}")
    return lines


def _figures(section: Json, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _figures(value, (*path, name))
        else:
            yield (*path, name), value


def base(version: str) -> str:
    """Without what tells builds apart: 2.13.0+cpu is 2.13.0."""
    return version.split("+")[0]


def read() -> Json:
    return json.loads(BASELINE.read_text())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="write the baseline anew")
    options = parser.parse_args(argv)
    if not triton.knobs.runtime.interpret:  # which is decided when triton is imported
        return subprocess.run([sys.executable, "-m", "bench.guard", *(argv or sys.argv[1:])], env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # infinities that a kernel then discards
    now = moved() | {"compiled": compiled(compile_reports())}
    versions = {"torch": base(torch.__version__), "triton": triton.__version__}
    if options.renew:
        BASELINE.write_text(json.dumps({"versions": versions} | now, indent=1) + "\n")
        return 0
    baseline = read()
    comparable = {"moved": True, "memory": baseline["versions"]["torch"] == versions["torch"]}
    comparable["compiled"] = baseline["versions"]["triton"] == versions["triton"]
    lines = [line for section, same in comparable.items() if same for line in worse(now[section], baseline[section])]
    lines += [f"{section}: not compared, since the baseline is of {baseline['versions']}" for section, same in comparable.items() if not same]
    print("\n".join(lines) or "nothing is worse")
    return int(any(comparable[section] and worse(now[section], baseline[section]) for section in comparable))


if __name__ == "__main__":
    sys.exit(main())
