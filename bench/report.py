"""Tables and plots of what ``python -m bench`` measured.

    python -m bench.report bench/results/cpu.json                        # tables, as text
    python -m bench.report bench/results/cpu.json --write                # into README.md and docs/, with plots beside them
    python -m bench.report one.json --against other.json                      # ratios on which two runs disagree; exit code 1 if there are any
    python -m bench.report DIR                          # of a GPU run, python -m bench.gpu --out DIR: with verdicts and configurations
    python -m bench.report DIR --write                  # and into the pages; what they show is kept in bench/results/gpu

The pages hold a table between ``<!-- bench: NAME -->`` and ``<!-- bench: end -->``; what stands there is written by this program alone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.harness import OURS
from rlkern.ops.products import chunk_rows

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCUMENTED = ROOT / "bench" / "results" / "cpu.json"
GPU = ROOT / "bench" / "results" / "gpu"  # what the pages show of python -m bench.gpu; not there: nothing has been measured
HEAD_ACCURACY = ROOT / "bench" / "results" / "head.json"  # python -m bench --full --op head_accuracy --out bench/results/head.json
HEAD_PLOT = ROOT / "docs" / "bench-head-accuracy.png"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "scaling.md")
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


def head_accuracy_table(result: Json, cases: slice = slice(None)) -> str:
    found = result["head_accuracy"]
    parts = []
    for case in found["cases"][cases]:
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


# ---- plots ----------------------------------------------------------------------------------------------------------------------------------


def plot(result: Json, operation: str, path: Path) -> None:
    """Time, peak memory and the part of the ceiling that was reached, against each dimension that was swept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = [s for s in sweeps(result) if s.operation == operation]
    figures = {"median_seconds": "seconds", "peak_bytes": "peak bytes above inputs", "roofline_fraction": "part of the ceiling"}
    figure, axes = pyplot.subplots(len(figures), len(columns), figsize=(4.2 * len(columns), 8), squeeze=False, sharex="col", sharey="row")
    names = list(dict.fromkeys(name for s in columns for name in s.contenders()))
    colours = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))
    for column, sweep in enumerate(columns):
        for row, (key, label) in enumerate(figures.items()):
            ax = axes[row][column]
            for name in sweep.contenders():
                x, y = sweep.curve(name, key)
                if x:
                    ax.plot(x, y, "o-", color=colours[name], label=name, linewidth=2.5 if name == OURS else 1.2, markersize=4)
            ax.set_xscale("log", base=2)
            if key != "roofline_fraction":
                ax.set_yscale("log")
            ax.grid(alpha=0.3)
            if column == 0:
                ax.set_ylabel(label)
        axes[-1][column].set_xlabel(DIMENSIONS[sweep.dimension])
        axes[0][column].set_title(shape_text(sweep.fixed), fontsize=8)
        axes[-1][column].set_ylim(bottom=0)
    handles = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=8, frameon=False)
    e = result["environment"]
    figure.suptitle(f"{operation}: {e['device']}, {threads(e)}, torch {e['torch']}, {e['date'][:10]}", fontsize=10)
    figure.tight_layout(rect=(0, 0.03 + 0.02 * math.ceil(len(names) / 3), 1, 1))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def plot_head_accuracy(result: Json, path: Path) -> None:
    """The errors of all cases, a line of points for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = result["head_accuracy"]["cases"]
    names = [c["name"] for c in cases[0]["contenders"] if "missing" not in c]
    panels = {"ratio": "ratio off from 1", "entropy": "entropy, nats", "d hidden": "gradient of hidden", "d head": "gradient of head"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 3.6), sharey=True)
    for ax, (quantity, label) in zip(axes, panels.items(), strict=True):
        for case, marker in zip(cases, "os^D", strict=False):
            by_name = {c["name"]: c["errors"][quantity] for c in case["contenders"] if "missing" not in c}
            points = [(x, len(names) - y) for y, name in enumerate(names) if (x := by_name[name]) is not None]
            ax.plot(*zip(*points, strict=True), marker, label=f"{case['logits']}, H = {case['H']:,}", alpha=0.7)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ax.set_xlim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
        ax.set_title(label, fontsize=10)
        ax.grid(alpha=0.3)
    axes[0].set_yticks(range(len(names), 0, -1), names)
    axes[0].get_yticklabels()[names.index(OURS)].set_fontweight("bold")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    e = result["environment"]
    shape = shape_text(result["head_accuracy"]["shape"])
    figure.suptitle(f"largest error against float64, {shape}: {e['device']}, torch {e['torch']}, {e['date'][:10]}", fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def plots(result: Json, prefix: str = "bench") -> dict[str, Path]:
    """Operations that have a sweep, and where their plots go."""
    return {s.operation: DOCS / f"{prefix}-{s.operation.replace(' ', '-').replace('_', '-')}.png" for s in sweeps(result)}


def pictures(of: Mapping[str, Path]) -> str:
    return "\n\n".join(f"![{operation}: time, memory and part of the ceiling]({path.name})" for operation, path in of.items())


# ---- a GPU run ------------------------------------------------------------------------------------------------------------------------------

NOT_MEASURED = "Not measured yet: no GPU has run `python -m bench.gpu`."
KEPT = ("gpu", "kernels", "configs", "summary")  # of a run's folder


def kept(folder: Path) -> dict[str, Json]:
    """What there is of a GPU run's results; a run whose time was up may lack some."""
    return {name: read(file) for name in KEPT if (file := folder / f"{name}.json").exists()}


def is_of_gpu(run: Mapping[str, Json]) -> bool:
    """Whether times were measured, and on a GPU: not of a dry run."""
    return "gpu" in run and "memory_bytes" in run["gpu"]["environment"]


def verdicts(launches: Json) -> str:
    """How many of the launches gave what they have to, and which did not."""
    wrong = {name: x.get("failure") or f"wrong in {', '.join(x['wrong'])}" for name, x in launches.items() if "failure" in x or x["wrong"]}
    text = f"{len(launches) - len(wrong)} of {len(launches)} kernel launches were right against float64, results and gradients"
    return f"{text}; not: {'; '.join(f'{name} ({why.splitlines()[0]})' for name, why in wrong.items())}." if wrong else f"{text}."


def configurations_table(found: Json) -> str:
    """What the best of the candidates gains over the configuration as it is."""
    rows = []
    for x in found["configurations"]:
        call = f"{x['call']}, {x['rows'][0]:,} x {x['rows'][1]:,}" + (f", V = {x['vocabulary']:,}" if x["vocabulary"] else "")
        rows.append(
            [f"`{x['configuration']}`", call, seconds(x["now"]["seconds"]), seconds(x["best"]["seconds"]), f"{x['gain']:.2f}", x["best"]["changes"]]
        )
    return table(["configuration", "call", "as it is", "best", "gain", "best candidate"], rows)


def run_text(run: Mapping[str, Json]) -> str:
    """All that a GPU run found."""
    stages = run.get("summary", {})
    became = [f"{part}: {what}" for stage in stages.values() for part, what in stage["parts"].items() if what != "passed"]
    return paragraphs(
        text(run["gpu"]) if "gpu" in run else "",
        verdicts(run["kernels"]) if "kernels" in run else "",
        configurations_table(run["configs"]) if "configs" in run else "",
        "\n".join(became) or ("every stage passed" if stages else ""),
    )


def gpu_blocks(folder: Path) -> dict[str, str]:
    """What the pages show of a GPU, by name."""
    run = kept(folder)
    if not is_of_gpu(run):
        return {"gpu": NOT_MEASURED, "gpu_headline": NOT_MEASURED}
    result = run["gpu"]
    checked = verdicts(run["kernels"]) if "kernels" in run else ""
    chosen = configurations_table(run["configs"]) if "configs" in run else ""
    return {
        "gpu": paragraphs(f"{machine(result)}.", checked, *map(contest_table, result["contests"]), pictures(plots(result, "bench-gpu")), chosen),
        "gpu_headline": paragraphs(summary_table(result), f"{machine(result)}. {checked}".strip()),
    }


def publish(run: Mapping[str, Json], folder: Path) -> None:
    """Keep a GPU run's results where the pages come from, and draw its plots."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        (folder / f"{name}.json").unlink(missing_ok=True)
        if name in run:
            (folder / f"{name}.json").write_text(json.dumps(run[name], indent=1) + "\n")
    for operation, path in plots(run["gpu"], "bench-gpu").items():
        plot(run["gpu"], operation, path)


# ---- pages ----------------------------------------------------------------------------------------------------------------------------------


def blocks(result: Json) -> dict[str, str]:
    """What the pages show, by name."""
    of: dict[str, list[Json]] = {}
    for contest in result["contests"]:
        of.setdefault(contest["operation"], []).append(contest)
    largest = {operation: max(contests, key=lambda c: (c["flops"], c["bytes"])) for operation, contests in of.items()}
    shown = [
        c
        for operation, contests in of.items()
        for c in contests
        if c is largest[operation] or {"head", "mask"} & set(c["shape"]) or len(contests) < 3
    ]
    head = result if "head_accuracy" in result else read(HEAD_ACCURACY)
    return {
        "headline": paragraphs(contest_table(headline(result)), f"{machine(result)}."),
        "summary": summary_table(result),
        "machine": f"{machine(result)}.",
        "operations": paragraphs(*map(contest_table, shown)),
        "plots": pictures(plots(result)),
        "longest": longest_table(result),
        "accuracy": accuracy_table(result),
        "head_accuracy": paragraphs(head_accuracy_table(head), f"{machine(head)}."),
        "head_accuracy_headline": paragraphs(head_accuracy_table(head, slice(-1, None)), f"{machine(head)}."),
        "exponents": scaling_table(result),
        "memory": memory_table(result),
        "work": work_table(result),
        **gpu_blocks(GPU),
    }


_BLOCK = re.compile(r"(<!-- bench: (?P<name>\w+) -->\n).*?(<!-- bench: end -->)", re.S)


def filled(page: str, shown: Mapping[str, str]) -> str:
    """The page with its tables written anew.

    Raises:
        KeyError: for a table that is not made here.
    """
    return _BLOCK.sub(lambda match: f"{match[1]}{shown[match['name']]}\n{match[3]}", page)


def fill_pages(shown: Mapping[str, str]) -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(), shown))


def text(result: Json) -> str:
    """All tables that the result has."""
    parts = [f"{machine(result)}.", *map(contest_table, result["contests"])]
    for key, make in (("longest", longest_table), ("accuracy", accuracy_table), ("head_accuracy", head_accuracy_table)):
        if key in result:
            parts.append(make(result))
    if sweeps(result):
        parts.append(scaling_table(result))
    return paragraphs(*parts)


def disagreements(one: Json, other: Json) -> Iterator[str]:
    """Ratios that two runs put further apart than their spreads together."""
    ratios = {(c["title"], x["name"]): (x["ratio"], x["ratio_spread"]) for c in other["contests"] for x in c["contenders"] if "missing" not in x}
    for contest in one["contests"]:
        for c in contest["contenders"]:
            theirs = ratios.get((contest["title"], c["name"]))
            if "missing" in c or theirs is None:
                continue
            if abs(c["ratio"] - theirs[0]) > c["ratio_spread"] + theirs[1]:
                yield f"{contest['title']}: {c['name']}: {c['ratio']:.3f} ± {c['ratio_spread']:.3f} and {theirs[0]:.3f} ± {theirs[1]:.3f}"


def read(path: Path) -> Json:
    return json.loads(path.read_text())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what python -m bench wrote; or the folder of a GPU run")
    parser.add_argument("--write", action="store_true", help="write tables and plots into README.md and docs/; needs a whole result")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="compare the ratios with those of another run")
    options = parser.parse_args(argv)
    if options.result.is_dir():
        if options.against:
            parser.error("--against compares two result files; of a GPU run that is its gpu.json")
        run = kept(options.result)
        if not run:
            parser.error(f"{options.result}: there are no results of python -m bench.gpu")
        if not options.write:
            print(run_text(run))
            return 0
        if not is_of_gpu(run):
            parser.error(f"{options.result}: no GPU was measured there; a dry run, or one that measured nothing, is not for the pages")
        publish(run, GPU)
        fill_pages(blocks(read(DOCUMENTED)))
        return 0
    for path in filter(None, (options.result, options.against)):
        if not path.is_file():
            parser.error(f"{path}: there is no such file; python -m bench writes one")
    result = read(options.result)
    if options.against:
        apart = list(disagreements(result, read(options.against)))
        print("\n".join(apart) or "every ratio agrees within the spreads")
        return int(bool(apart))
    if not options.write:
        print(text(result))
        return 0
    fill_pages(blocks(result))
    for operation, path in plots(result).items():
        plot(result, operation, path)
    plot_head_accuracy(result if "head_accuracy" in result else read(HEAD_ACCURACY), HEAD_PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
