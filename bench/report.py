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
from typing import Any

from bench.harness import OURS
from bench.tables import (
    DIMENSIONS,
    accuracy_table,
    contest_table,
    head_accuracy_table,
    headline,
    longest_table,
    machine,
    memory_table,
    paragraphs,
    scaling_table,
    seconds,
    shape_text,
    summary_table,
    sweeps,
    table,
    threads,
    work_table,
)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCUMENTED = ROOT / "bench" / "results" / "cpu.json"
GPU = ROOT / "bench" / "results" / "gpu"  # what the pages show of python -m bench.gpu; not there: nothing has been measured
HEAD_ACCURACY = ROOT / "bench" / "results" / "head.json"  # python -m bench --full --op head_accuracy --out bench/results/head.json
HEAD_PLOT = ROOT / "docs" / "bench-head-accuracy.png"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "scaling.md")
Json = dict[str, Any]

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


def fill_one(page: Path, name: str, table: str) -> None:
    """Write one table of a page anew, and leave the others."""
    page.write_text(_BLOCK.sub(lambda match: f"{match[1]}{table}\n{match[3]}" if match["name"] == name else match[0], page.read_text()))


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
