"""Prompts from JSON lines, and the order in which training sees them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from rlkern.trainers.arguments import nearest
from rlkern.trainers.errors import InputError

RESERVED = ("prompts", "completions")  # what a reward function is called with besides the fields


class Row(NamedTuple):
    """One line of a data file."""

    place: str  #: ``file:line``
    prompt: str | list[dict[str, str]]  #: text, or a conversation of ``{"role": ..., "content": ...}``
    fields: dict[str, Any]  #: the other fields, for the reward functions


def read_jsonl(path: str | Path, *, prompt_field: str = "prompt", field: str = "data") -> list[Row]:
    """The rows of a JSON-lines file: one object a line, all with the fields of the first, blank lines skipped.

    Raises InputError naming file, line and field; ``field`` is the setting that named the file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", field=field) from None
    rows: list[Row] = []
    first, fields = "", []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(value, dict):
            raise InputError(f'{place}: expected an object like {{"{prompt_field}": "...", "answer": "..."}}, got {type(value).__name__}')
        if not rows:
            first, fields = place, list(value)
            if prompt_field not in value:
                raise InputError(f"{place}: no field {prompt_field!r}{nearest(prompt_field, value)}")
            for name in RESERVED:
                if name in value:
                    raise InputError(f"{place}: field {name!r}: the name is taken, reward functions are called with {' and '.join(RESERVED)}")
        for name in value:
            if name not in fields:
                raise InputError(f"{place}: unknown field {name!r}, which {first} does not have{nearest(name, fields)}")
        for name in fields:
            if name not in value:
                raise InputError(f"{place}: no field {name!r}, which {first} has")
        rows.append(Row(place, _prompt(place, prompt_field, value.pop(prompt_field)), value))
    if not rows:
        raise InputError(f"{path} holds no rows", field=field)
    return rows


def _prompt(place: str, name: str, prompt: Any) -> str | list[dict[str, str]]:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt:
        for i, message in enumerate(prompt):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise InputError(f'{place}: field {name!r}: message {i} must be {{"role": "...", "content": "..."}}, got {message!r}')
        return prompt
    raise InputError(f"{place}: field {name!r}: expected text or a list of messages, neither empty; got {prompt!r}")


def hold_out(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows: the rows of a random ``fraction`` of the prompts, so that no prompt is on both sides."""
    keys = [json.dumps(row.prompt) for row in rows]
    prompts = list(dict.fromkeys(keys))
    chosen = set(random.Random(seed).sample(prompts, round(fraction * len(prompts))))
    return [row for row, key in zip(rows, keys, strict=True) if key not in chosen], [
        row for row, key in zip(rows, keys, strict=True) if key in chosen
    ]


def batch_at(step: int, size: int, rows: int, seed: int) -> list[int]:
    """Which of ``rows`` rows step ``step`` (from 0) trains on: each pass over the data goes in an order of its own, which the seed and the pass fix.

    A function of the step alone, so a resumed run needs no position.
    """
    positions = range(step * size, (step + 1) * size)
    orders = {p: random.Random(f"{seed}/{p}").sample(range(rows), rows) for p in {position // rows for position in positions}}
    return [orders[position // rows][position % rows] for position in positions]
