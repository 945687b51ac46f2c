"""Prompts and preferences from JSON lines, and the order in which training sees them."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rlkern.trainers.arguments import nearest
from rlkern.trainers.errors import InputError
from rlkern.trainers.settings import RunArguments

RESERVED = ("prompts", "completions")  # what a reward function is called with besides the fields


class Row(NamedTuple):
    """One line of a data file."""

    place: str  #: ``file:line``
    prompt: str | list[dict[str, str]]  #: text, or a conversation of ``{"role": ..., "content": ...}``
    fields: dict[str, Any]  #: the other fields, for the reward functions


class Preference(NamedTuple):
    """Answers to a prompt, the best first: two of ``chosen`` and ``rejected``, or all of ``ranked``."""

    place: str  #: ``file:line``
    prompt: str | list[dict[str, str]]
    answers: list[str]
    margin: float  #: by how much the score of the first of two is to be larger


AnyRow = TypeVar("AnyRow", Row, Preference)


def read_jsonl(path: str | Path, *, prompt_field: str = "prompt", field: str = "data") -> list[Row]:
    """The rows of a JSON-lines file: one object a line, all with the fields of the first, blank lines skipped.

    Raises InputError naming file, line and field; ``field`` is the setting that named the file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # with or without a byte-order mark
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
                if name in value and name != prompt_field:
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


def read_preferences(path: str | Path, *, prompt_field: str = "prompt", field: str = "data") -> list[Preference]:
    """The preferences of a JSON-lines file: ``chosen`` and ``rejected`` (and a ``margin``, if wanted), or ``ranked``, as many in each row.

    Other fields are passed over. Raises InputError naming file, line and field; ``field`` is the setting that named the file.
    """
    rows = read_jsonl(path, prompt_field=prompt_field, field=field)
    place, names = rows[0].place, rows[0].fields
    if "ranked" in names and {"chosen", "rejected"} & set(names):
        raise InputError(f"{place}: expected either 'chosen' and 'rejected' or 'ranked', got both")
    for name in ("ranked",) if "ranked" in names else ("chosen", "rejected"):
        if name not in names:
            raise InputError(f"{place}: no field {name!r}: expected 'chosen' and 'rejected', or 'ranked'{nearest(name, names)}")
    preferences = [_preference(row) for row in rows]
    for preference in preferences:
        if len(preference.answers) != len(preferences[0].answers):
            got, first = len(preference.answers), len(preferences[0].answers)
            raise InputError(f"{preference.place}: field 'ranked': {got} answers, but {place} has {first}; all rows must rank as many")
    return preferences


def _preference(row: Row) -> Preference:
    place, fields = row.place, row.fields
    if "ranked" in fields:
        if not isinstance(fields["ranked"], list) or len(fields["ranked"]) < 2:
            raise InputError(f"{place}: field 'ranked': expected a list of two or more answers, the best first; got {fields['ranked']!r}")
        answers = {f"'ranked', answer {i}": answer for i, answer in enumerate(fields["ranked"])}
    else:
        answers = {f"{name!r}": fields[name] for name in ("chosen", "rejected")}
    seen: dict[str, str] = {}
    for name, answer in answers.items():
        if not isinstance(answer, str):
            raise InputError(f"{place}: field {name}: expected text, got {answer!r}")
        if not answer.strip():
            raise InputError(f"{place}: field {name}: the answer is empty")
        if answer in seen:
            raise InputError(f"{place}: field {name}: the same answer as field {seen[answer]}, {answer!r}: neither is better")
        seen[answer] = name
    margin = fields.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise InputError(f"{place}: field 'margin': expected a number, got {margin!r}")
    if margin and "ranked" in fields:
        raise InputError(f"{place}: field 'margin': goes with 'chosen' and 'rejected', not with 'ranked'")
    return Preference(place, row.prompt, list(answers.values()), float(margin))


def hold_out(rows: list[AnyRow], fraction: float, seed: int) -> tuple[list[AnyRow], list[AnyRow]]:
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
    return [_order(seed, position // rows, rows)[position % rows] for position in range(step * size, (step + 1) * size)]


@functools.lru_cache(maxsize=2)  # a batch takes from two passes at most, or from many short ones
def _order(seed: int, passed: int, rows: int) -> list[int]:
    """The order of the rows in a pass over the data."""
    return random.Random(f"{seed}/{passed}").sample(range(rows), rows)


def split(read: Callable[..., list[AnyRow]], args: RunArguments) -> tuple[list[AnyRow], list[AnyRow]]:
    """(training, held-out) rows as the settings have it, read by ``read``."""
    rows = read(args.data, prompt_field=args.prompt_field, field="data")
    if args.eval_data is not None:
        return rows, read(args.eval_data, prompt_field=args.prompt_field, field="eval_data")
    rows, held_out = hold_out(rows, args.eval_fraction, args.seed)
    if not rows:
        raise InputError(f"{args.eval_fraction} of the prompts of {args.data} leaves none to train on", field="eval_fraction")
    return rows, held_out
