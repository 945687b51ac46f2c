"""A model card beside each saved model: what it is, from what it was trained and how, and what came of it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

import rlkern

MARK = "<!-- This card was written by rlkern, which writes it anew when the run is continued. Without this line it is left alone. -->"


class Subject(NamedTuple):
    """What a card is about."""

    name: str
    what: str  #: it is and how it was trained
    tags: list[str]
    base: str | None  #: directory or name on the hub; None: the model of the built-in task
    scores: bool  #: whether it has a score for an output, not a token
    adapter: bool
    command: str  #: that trains it
    place: str  #: processes and device


def is_ours(path: Path) -> bool:
    """Whether this is a card that a run wrote."""
    return path.exists() and MARK in path.read_text(encoding="utf-8")


def write_card(directory: Path, subject: Subject, summary: Mapping[str, Any], curve: Path) -> None:
    """Write ``directory/README.md``, with a copy of the plot ``curve`` beside it; a card that is not from here stays as it is."""
    path = directory / "README.md"
    if path.exists() and not is_ours(path):
        tqdm.write(f"{path} is another's: no model card is written")
        return
    shutil.copyfile(curve, directory / curve.name)
    path.write_text(card(subject, summary, curve.name), encoding="utf-8")


def card(subject: Subject, summary: Mapping[str, Any], curve: str) -> str:
    """The text of a card, with the front matter that the hub reads."""
    base, adapter = subject.base, subject.adapter
    on_hub = base is not None and not Path(base).exists()
    front = {
        **({"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"} if on_hub else {}),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if subject.scores else "text-generation",
        "tags": ["rlkern", *subject.tags, *(["lora"] if adapter else [])],
    }
    start = "the model of the built-in task" if base is None else f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`"
    kind = "SequenceClassification" if subject.scores else "CausalLM"
    loader = f"AutoPeftModelFor{kind}" if adapter else f"AutoModelFor{kind}"
    options = ", num_labels=1" if adapter and subject.scores else ""
    figures = [(when, summary[when]) for when in ("before", "after") if when in summary]
    names = list(figures[0][1]) if figures else []
    table = [
        f"| held out | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
        *(f"| {when} | {' | '.join(f'{value:.4g}' for value in row.values())} |" for when, row in figures),
    ]
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{MARK}",
        f"# {subject.name}",
        f"{subject.what} from {start} with rlkern {rlkern.__version__}, steps: {summary['steps']}, {subject.place}. "
        f"{'The adapter' if adapter else 'It'} loads by `{loader}.from_pretrained(...{options})`.",
        f"![the run's curve]({curve})",
        *(["\n".join(table)] if figures else []),
        f"The command, without settings that have their defaults:\n\n```bash\n{subject.command}\n```",
        f"Versions: {', '.join(f'{name} {number}' for name, number in versions(adapter).items())}.",
    ]
    return "\n\n".join(lines) + "\n"


def versions(adapter: bool) -> dict[str, str]:
    """What the run was made with."""
    found = {"Python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "accelerate", *(("peft",) if adapter else ())):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # triton, on some systems
            continue
    return found
