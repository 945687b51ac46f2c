"""Measure rlkern against what is there: time, memory, error and the machine's ceilings, side by side.

python -m bench --quick                                     # a CPU: 3 minutes on two cores; a GPU where there is one
python -m bench --full --out bench/results/cpu.json         # more and larger shapes, more rounds
python -m bench --op token_logprobs --op gae                # these alone
python -m bench.report bench/results/cpu.json               # tables and plots of it
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import accuracy, report
from bench.contests import OPERATIONS
from bench.contests.update import longest
from bench.environment import environment
from bench.harness import Ceilings, Record

PARTS = (*OPERATIONS, "accuracy", "head_accuracy")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small shapes and few rounds (this is the default)")
    size.add_argument("--full", action="store_true", help="more and larger shapes, more rounds")
    parser.add_argument(
        "--op", action="append", choices=PARTS, metavar="NAME", help=f"measure this alone; may be given again; one of: {', '.join(PARTS)}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--seconds", type=float, help="to spend on the rounds of one contest (default: 1, with --full 12)")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON (default: bench/results/<device>-<quick or full>.json)")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; allowed is cpu")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads {options.threads}: at least 1 is allowed")
    if options.seconds is not None and options.seconds < 0:
        parser.error(f"--seconds {options.seconds}: 0 or more is allowed")
    options.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options.out = options.out or Path(__file__).parent / "results" / f"{options.device.type}-{'full' if options.full else 'quick'}.json"
    if options.out.is_dir() or options.out.suffix != ".json":
        parser.error(f"--out {options.out}: a file named *.json is expected")
    return options


def compact(result: dict[str, Any]) -> str:
    """JSON with five digits a number and a list of numbers on one line."""
    text = json.dumps(json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.5g}")), indent=1)
    return re.sub(r"\[[-+.eE\d\s,]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    device, full = options.device, options.full
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench", *arguments]),
        "environment": environment(device),
    }
    wanted = options.op or PARTS
    # Sittings far apart: what the machine does for a minute is then a difference between them, and in the spread.
    sittings, rounds = (2, 4) if full else (2, 3)
    seconds = (12.0 if full else 1.0) if options.seconds is None else options.seconds
    records = [Record(contest) for name in OPERATIONS if name in wanted for contest in OPERATIONS[name](device, full)]
    steps = sittings * len(records) + ("accuracy" in wanted) + ("head_accuracy" in wanted) + ("update" in wanted)
    ceilings = {dtype: Ceilings(device, dtype) for dtype in dict.fromkeys(record.contest.dtype for record in records)}
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for _ in range(sittings):
            for record in records:
                bar.set_postfix_str(record.contest.title)
                record.ceilings = ceilings[record.contest.dtype]
                record.sit(seconds=seconds / sittings, rounds=(rounds, 50))
                bar.update()
        result["contests"] = [record.json() for record in records]
        options.out.write_text(compact(result))  # whatever becomes of the rest
        if "update" in wanted:
            bar.set_postfix_str("the longest sequence that fits")
            result["longest"] = longest(device, full=full)
            bar.update()
        if "accuracy" in wanted:
            bar.set_postfix_str("accuracy")
            result["accuracy"] = accuracy.measure(device, full=full)
            bar.update()
        if "head_accuracy" in wanted:
            bar.set_postfix_str("accuracy from hidden states")
            result["head_accuracy"] = accuracy.measure_head(device, full=full)
            bar.update()
    options.out.write_text(compact(result))
    print(report.text(result))
    print(f"\nwritten to {options.out}; tables and plots: python -m bench.report {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
