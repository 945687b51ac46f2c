"""What was measured, as tables: Markdown whose columns line up, so that they are text as well."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.harness import OURS
from rlkern.ops.products import chunk_rows

HEADLINE = "fused_linear_policy_loss"
DIMENSIONS = {
    "N": "tokens N",
    "V": "vocabulary V",
    "H": "hidden width H",
    "G": "sequences G",
    "T": "length T",
}

Json = dict[str, Any]

# ---- numbers as people read them ------------------------------------------------------------------------------------------------------------


def three(x: float) -> str:
    """Three significant digits, without an exponent."""
    if x == 0:
        return "0"
    return f"{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}"


def seconds(x: float) -> str:
    return next(f"{three(x * k)} {unit}" for k, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")) if x * k >= 1 or unit == "µs")


def size(x: float) -> str:
    return next(f"{three(x / k)} {unit}" for k, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if x >= k or k == 1)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown whose columns line up, so that it is text as well."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def missing(contenders: Sequence[Json]) -> str:
    """A sentence that names who could not be measured, or nothing."""
    by_reason: dict[str, list[str]] = {}
    for c in contenders:
        if "missing" in c:
            by_reason.setdefault(c["missing"], []).append(c["name"])
    return "Not measured: " + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()) + "." if by_reason else ""


def paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


# ---- tables ---------------------------------------------------------------------------------------------------------------------------------


def shape_text(shape: Mapping[str, int | str]) -> str:
    return ", ".join(
        str(value) if name == "dtype" else f"{name} {value}" if isinstance(value, str) else f"{name} = {value:,}" for name, value in shape.items()
    )


def contest_table(contest: Json) -> str:
    """The contenders of one contest, fastest first."""
    measured = sorted((c for c in contest["contenders"] if "missing" not in c), key=lambda c: c["ratio"])
    on_device = any("device_median_seconds" in c for c in measured)
    header = ["", "time", *(["GPU time"] if on_device else []), "x ours", "peak memory", "held", "of the ceiling", "error"]
    rows = []
    for c in measured:
        name, judged = c["name"], c["error"] is not None
        rows.append(
            [
                f"**{name}**" if name == OURS else name,
                seconds(c["median_seconds"]),
                *([seconds(c["device_median_seconds"])] if on_device else []),
                "1" if name == OURS else f"{c['ratio']:.2f} ± {c['ratio_spread']:.2f}",
                size(c["peak_bytes"]) if judged else "",
                size(c["held_bytes"]) if judged else "",
                f"{c['roofline_fraction']:.0%}" if "roofline_fraction" in c else "",
                f"{c['error']:.0e}" if judged else "",
            ]
        )
    title = f"`{contest['operation']}`, {shape_text(contest['shape'])}"
    return paragraphs(title, table(header, rows), missing(contest["contenders"]))


def headline(result: Json) -> Json:
    """The largest contest of the fused linear loss with a trained head and every row counted."""
    plain = [c for c in result["contests"] if c["operation"] == HEADLINE and not {"head", "mask"} & set(c["shape"])]
    return max(plain, key=lambda c: c["flops"])


def threads(e: Json) -> str:
    return f"{e['threads']} thread{'s' if e['threads'] != 1 else ''}"


def machine(result: Json) -> str:
    e = result["environment"]
    peers = [f"{name} {version}" for name, version in e["peers"].items() if version]
    absent = [name for name, version in e["peers"].items() if not version]
    parts = [e["device"], size(e["memory_bytes"]) if "memory_bytes" in e else threads(e)]
    parts += [f"rlkern {e['rlkern']} at {e['commit']}", f"torch {e['torch']}", f"triton {e['triton']}", *peers, e["date"][:10]]
    return ", ".join(parts) + (f"; not installed: {', '.join(absent)}" if absent else "") + f"; by `{result['command']}`"


def summary_table(result: Json) -> str:
    """A line for each operation, at its largest shape: ours and the best of the others."""
    rows = []
    for operation in dict.fromkeys(c["operation"] for c in result["contests"]):
        contest = max((c for c in result["contests"] if c["operation"] == operation), key=lambda c: (c["flops"], c["bytes"]))
        by_name = {c["name"]: c for c in contest["contenders"] if "missing" not in c}
        ours = by_name[OURS]
        others = [c for name, c in by_name.items() if not name.startswith(OURS) and c["error"] is not None]
        if not others:
            continue
        fastest, leanest = min(others, key=lambda c: c["ratio"]), min(others, key=lambda c: c["peak_bytes"])
        rows.append(
            [
                f"`{operation}`",
                shape_text(contest["shape"]),
                seconds(ours["median_seconds"]),
                f"{fastest['ratio']:.2f} ± {fastest['ratio_spread']:.2f} ({fastest['name']})",
                size(ours["peak_bytes"]),
                f"{leanest['peak_bytes'] / max(1, ours['peak_bytes']):.2f} ({leanest['name']})",
            ]
        )
    return table(["operation", "shape", "ours", "fastest other, x ours", "our peak", "leanest other, x ours"], rows)


def longest_table(result: Json) -> str:
    found = result["longest"]
    rows = []
    for c in sorted((c for c in found["contenders"] if "missing" not in c), key=lambda c: -c.get("longest", math.inf)):
        name = f"**{c['name']}**" if c["name"] == OURS else c["name"]
        measured = ", ".join(f"{n:,}: {size(p)}" for n, p in zip(c["lengths"], c["peak_bytes"], strict=True)) if "lengths" in c else ""
        rows.append([name, *([measured] if measured else []), f"{c['longest']:,}" if "longest" in c else "beyond what was measured"])
    header = ["", *(["measured peaks, by length"] if len(rows[0]) == 3 else []), "longest sequence"]
    fits = f"The longest sequence an update of which fits in {size(found['budget_bytes'])} above model and optimiser state"
    title = f"{fits}, {shape_text(found['shape'])}; {found['by']}."
    return paragraphs(title, table(header, rows), missing(found["contenders"]))


def accuracy_table(result: Json) -> str:
    found = result["accuracy"]
    parts = []
    for case in found["cases"]:
        parts += [f"{case['dtype']}, {case['logits']} logits, {shape_text(found['shape'])}", error_table(case["contenders"])]
    return paragraphs(*parts, missing(found["cases"][0]["contenders"]))


def error_table(contenders: Sequence[Json]) -> str:
    measured = [c for c in contenders if "missing" not in c]
    quantities = list(measured[0]["errors"])
    rows = [
        [f"**{c['name']}**" if c["name"] == OURS else c["name"], *("" if c["errors"][q] is None else f"{c['errors'][q]:.1e}" for q in quantities)]
        for c in measured
    ]
    return table(["", *quantities], rows)


def head_accuracy_table(result: Json) -> str:
    found = result["head_accuracy"]
    parts = []
    for case in found["cases"]:
        shape = {"H": case["H"], **found["shape"]}
        parts += [f"{case['logits'].capitalize()} logits, {shape_text(shape)}", error_table(case["contenders"])]
    return paragraphs(*parts, missing(found["cases"][0]["contenders"]))


# ---- how cost grows -------------------------------------------------------------------------------------------------------------------------


class Sweep(NamedTuple):
    """Contests of one operation that differ in one dimension alone."""

    operation: str
    dimension: str
    fixed: Json
    contests: list[Json]  # by growing dimension

    def curve(self, contender: str, figure: str) -> tuple[list[int], list[float]]:
        """(values of the dimension, figure) of those contests where there is one."""
        points = [
            (contest["shape"][self.dimension], c[figure])
            for contest in self.contests
            for c in contest["contenders"]
            if c["name"] == contender and c.get(figure)
        ]
        return [x for x, _ in points], [y for _, y in points]

    def contenders(self) -> list[str]:
        return [c["name"] for c in self.contests[0]["contenders"] if "missing" not in c]


def sweeps(result: Json) -> list[Sweep]:
    """Every set of three contests or more that differ in one dimension; of several of one operation and dimension, the longest."""
    found: dict[tuple[str, str], Sweep] = {}
    for dimension in DIMENSIONS:
        groups: dict[str, list[Json]] = {}
        for contest in result["contests"]:
            if dimension in contest["shape"]:
                fixed = {k: v for k, v in contest["shape"].items() if k != dimension}
                groups.setdefault(contest["operation"] + json.dumps(fixed), []).append(contest)
        for group in groups.values():
            operation = group[0]["operation"]
            fixed = {k: v for k, v in group[0]["shape"].items() if k != dimension}
            sweep = Sweep(operation, dimension, fixed, sorted(group, key=lambda c: c["shape"][dimension]))
            best = found.get((operation, dimension))
            if len(group) >= 3 and (best is None or len(group) > len(best.contests)):
                found[operation, dimension] = sweep
    return list(found.values())


def exponent(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """The power by which y grows with x, by least squares on logarithms, and its standard error."""
    u, v = np.log(x) - np.mean(np.log(x)), np.log(y) - np.mean(np.log(y))
    slope = float(u @ v / (u @ u))
    residual = v - slope * u
    return slope, float(np.sqrt(residual @ residual / max(1, len(x) - 2) / (u @ u)))


def scaling_table(result: Json) -> str:
    rows = []
    for s in sweeps(result):
        for name in s.contenders():
            (x, times), (at, peaks) = s.curve(name, "median_seconds"), s.curve(name, "peak_bytes")
            if len(x) < 3 or len(at) < 3:
                continue
            of_time, of_memory = (f"{e:.2f} ± {d:.2f}" for e, d in (exponent(x, times), exponent(at, peaks)))
            across = f"{DIMENSIONS[s.dimension]}, {x[0]:,} to {x[-1]:,}"
            rows.append([f"`{s.operation}`", across, f"**{name}**" if name == OURS else name, of_time, of_memory])
    return table(["operation", "against", "", "time grows by the power", "peak memory by the power"], rows)


# ---- what follows for large runs ------------------------------------------------------------------------------------------------------------


class LargeModel(NamedTuple):
    name: str
    parameters: float
    width: int
    vocabulary: int


LARGE = (LargeModel("7B (Qwen 2.5 7B)", 7.6e9, 3584, 152064), LargeModel("70B (Llama 3 70B)", 70.6e9, 8192, 128256))
TOKENS = 1024 * 8192  # an update
MICRO = 8192  # tokens of a micro-batch on one GPU
RATES = {"matrix products": 400e12, "memory": 3e12}  # assumed, a GPU and second
GPUS = (8, 64, 256, 1024)
WHOLE = ("log_softmax, gather, entropy in chunks", "TRL's eager path")  # who hold all logits at once: their memory grows as N V


def bytes_a_logit(result: Json) -> dict[str, float]:
    """By how many bytes the measured peak of those who hold all logits at once grows for each of them: between the two longest batches."""
    (sweep,) = (s for s in sweeps(result) if (s.operation, s.dimension) == (HEADLINE, "N"))
    slopes = {}
    for name in WHOLE:
        x, peaks = sweep.curve(name, "peak_bytes")
        if len(x) >= 2:
            slopes[name] = (peaks[-1] - peaks[-2]) / (x[-1] - x[-2]) / sweep.fixed["V"]
    return slopes


def memory_table(result: Json) -> str:
    def chunk(m: LargeModel) -> int:
        """Of float32 logits with their bf16 gradient, and the gradient of the hidden states in float32."""
        logits = chunk_rows(m.vocabulary, torch.float32, torch.bfloat16, torch.device("cuda"), None) * m.vocabulary * 6
        return logits + 4 * MICRO * m.width

    rows = [[name, f"{slope:.2f}", *(size(slope * MICRO * m.vocabulary) for m in LARGE)] for name, slope in bytes_a_logit(result).items()]
    rows.append([f"**{OURS}**, by its chunk", "", *(size(chunk(m)) for m in LARGE)])
    return table(["", "measured: bytes a logit", *(f"derived: {MICRO:,} tokens of {m.name}" for m in LARGE)], rows)


def work_table(result: Json) -> str:
    """Does not depend on what was measured; it stands here so that its arithmetic is run, not typed."""
    rows = []
    for m in LARGE:
        products = m.width * m.vocabulary
        for gpus in GPUS:
            tokens = TOKENS / gpus
            at_rate = 8 * products * tokens / RATES["matrix products"]
            logits = 2 * 2 * m.vocabulary * tokens / RATES["memory"]
            rows.append(
                [
                    m.name,
                    f"{gpus:,}",
                    f"{tokens:,.0f}",
                    three(8 * products * tokens / 1e15),
                    f"{products / m.parameters:.1%}",
                    seconds(at_rate),
                    seconds(logits),
                ]
            )
    header = [
        "model",
        "GPUs",
        "tokens a GPU",
        "PFLOP of the loss a GPU",
        "of the model's",
        "at 400 TFLOP/s",
        "one pass over bf16 logits, there and back, at 3 TB/s",
    ]
    return table(header, rows)
