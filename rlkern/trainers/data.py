"""Prompts and preferences from JSON lines, and the order in which training sees them."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rlkern.trainers.arguments import nearest
from rlkern.trainers.errors import InputError
from rlkern.trainers.settings import RunArguments

RESERVED = ("prompts", "completions")  # what a reward function is called with besides the fields


Prompt = str | list[dict[str, str]]  # text, or a conversation of {"role": ..., "content": ...}


class Row(NamedTuple):
    """One line of a data file."""

    place: str  #: ``file:line``
    prompt: Prompt
    fields: dict[str, Any]  #: the other fields, for the reward functions


class Preference(NamedTuple):
    """Answers to a prompt, the best first: two of ``chosen`` and ``rejected``, or all of ``ranked``."""

    place: str  #: ``file:line``
    prompt: Prompt
    answers: list[Answer]
    margin: float  #: by how much the score of the first of two is to be larger


class Answer(NamedTuple):
    """A text, and what it answers: the row's prompt, with the messages after it where the answer is a conversation."""

    prompt: Prompt
    text: str


AnyRow = TypeVar("AnyRow", Row, Preference)


def read_jsonl(path: str | Path, *, prompt_field: str = "prompt", field: str = "data") -> list[Row]:
    """The rows of a JSON-lines file: one object a line, all with the fields of the first, blank lines skipped.

    Raises InputError naming file, line and field; ``field`` is the setting that named the file.
    """
    rows: list[Row] = []
    for place, value in _objects(path, f'{{"{prompt_field}": "...", "answer": "..."}}', field):
        if not rows:
            if prompt_field not in value:
                raise InputError(f"{place}: no field {prompt_field!r}{nearest(prompt_field, value)}")
            for name in RESERVED:
                if name in value and name != prompt_field:
                    raise InputError(f"{place}: field {name!r}: the name is taken, reward functions are called with {' and '.join(RESERVED)}")
        rows.append(Row(place, _prompt(place, prompt_field, value.pop(prompt_field)), value))
    return rows


def _objects(path: str | Path, example: str, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of the file with its place, all with the same fields; one at least."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise InputError(
            f"cannot read {path}: not text in UTF-8 ({error.reason} at byte {error.start}): compressed, or encoded otherwise?", field=field
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", field=field) from None
    first, fields = "", []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line, object_pairs_hook=_without_repetition)
        except json.JSONDecodeError as error:
            raise InputError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise InputError(f"{place}: {error}") from None
        if not isinstance(value, dict):
            raise InputError(f"{place}: expected an object like {example}, got {type(value).__name__}")
        if not first:
            first, fields = place, list(value)
        for name in value:
            if name not in fields:
                raise InputError(f"{place}: unknown field {name!r}, which {first} does not have{nearest(name, fields)}")
        for name in fields:
            if name not in value:
                raise InputError(f"{place}: no field {name!r}, which {first} has")
        yield place, value
    if not first:
        raise InputError(f"{path} holds no rows", field=field)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where a name stands in it twice, of which json would keep the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return value


def _prompt(place: str, name: str, prompt: Any) -> Prompt:
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

    Answers are texts, or lists of messages that end with the assistant's and follow the prompt's; without a prompt, whole conversations, whose prompt
    is what they begin with alike. Other fields are passed over. Raises InputError naming file, line and field; ``field`` is the setting that named
    the file.
    """
    rows = list(_objects(path, f'{{"{prompt_field}": "...", "chosen": "...", "rejected": "..."}}', field))
    place, names = rows[0]
    if "ranked" in names and {"chosen", "rejected"} & set(names):
        raise InputError(f"{place}: expected either 'chosen' and 'rejected' or 'ranked', got both")
    for name in ("ranked",) if "ranked" in names else ("chosen", "rejected"):
        if name not in names:
            raise InputError(f"{place}: no field {name!r}: expected 'chosen' and 'rejected', or 'ranked'{nearest(name, names)}")
    preferences = [_preference(place, fields, prompt_field) for place, fields in rows]
    for preference in preferences:
        if len(preference.answers) != len(preferences[0].answers):
            got, first = len(preference.answers), len(preferences[0].answers)
            raise InputError(f"{preference.place}: field 'ranked': {got} answers, but {place} has {first}; all rows must rank as many")
    return preferences


def _preference(place: str, fields: dict[str, Any], prompt_field: str) -> Preference:
    if "ranked" in fields:
        if not isinstance(fields["ranked"], list) or len(fields["ranked"]) < 2:
            raise InputError(f"{place}: field 'ranked': expected a list of two or more answers, the best first; got {fields['ranked']!r}")
        answers = {f"'ranked', answer {i}": answer for i, answer in enumerate(fields["ranked"])}
    else:
        answers = {f"{name!r}": fields[name] for name in ("chosen", "rejected")}
    prompt, given = _conversations(place, fields, prompt_field, answers)
    seen: dict[str, str] = {}
    for name, (of, answer) in zip(answers, given, strict=True):
        if not answer.strip():
            raise InputError(f"{place}: field {name}: the answer is empty")
        key = json.dumps([of, answer])
        if key in seen:
            raise InputError(f"{place}: field {name}: the same answer as field {seen[key]}, {answer!r}: neither is better")
        seen[key] = name
    margin = fields.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise InputError(f"{place}: field 'margin': expected a number, got {margin!r}")
    if margin and "ranked" in fields:
        raise InputError(f"{place}: field 'margin': goes with 'chosen' and 'rejected', not with 'ranked'")
    return Preference(place, prompt, given, float(margin))


def _conversations(place: str, fields: dict[str, Any], prompt_field: str, answers: dict[str, Any]) -> tuple[Prompt, list[Answer]]:
    """The prompt of a row, and its answers, texts or lists of messages, by what they are called in an error."""
    whole = prompt_field not in fields
    if whole and not all(isinstance(answer, list) for answer in answers.values()):
        raise InputError(f"{place}: no field {prompt_field!r}{nearest(prompt_field, fields)}: only answers that are whole conversations do without")
    prompt: Prompt = [] if whole else _prompt(place, prompt_field, fields[prompt_field])
    messages: list[list[dict[str, str]]] = []
    for name, answer in answers.items():
        if isinstance(answer, str):
            messages.append([{"role": "assistant", "content": answer}])
            continue
        given = _prompt(place, name.strip("'"), answer) if isinstance(answer, list) else None
        if not isinstance(given, list):
            raise InputError(f"{place}: field {name}: expected text or a list of messages, got {answer!r}")
        if isinstance(prompt, str):
            raise InputError(f"{place}: field {name} is a list of messages, but the prompt is text: both must be messages, or the answer its text")
        if given[-1]["role"] != "assistant":
            raise InputError(f"{place}: field {name}: expected the assistant's message at the end, got that of {given[-1]['role']!r}")
        messages.append(given)
    if whole:
        alike = 0
        while all(len(one) > alike + 1 and one[alike] == messages[0][alike] for one in messages):
            alike += 1
        prompt, messages = messages[0][:alike], [one[alike:] for one in messages]
        if not prompt:
            raise InputError(f"{place}: without {prompt_field!r} the conversations must begin alike: what they begin with is the prompt")
    return prompt, [Answer(prompt if isinstance(prompt, str) else prompt + one[:-1], one[-1]["content"]) for one in messages]


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


def drop_long(
    parts: Sequence[list[AnyRow]], tokens: Callable[[AnyRow], list[int]], most: int | None, *, field: str
) -> tuple[list[list[AnyRow]], str]:
    """The rows of each of the parts that have at most so many tokens, and what to say of how many are left out.

    InputError where that leaves nothing of a part; ``field`` is the setting that says ``most``.
    """
    if most is None:
        return list(parts), ""
    kept = [[row for row in part if len(tokens(row)) <= most] for part in parts]
    for before, after in zip(parts, kept, strict=True):
        if before and not after:
            shortest = min(len(tokens(row)) for row in before)
            raise InputError(f"{most} tokens leave none of {len(before)} rows from {before[0].place} on: the shortest has {shortest}", field=field)
    count = sum(map(len, parts)) - sum(map(len, kept))
    return kept, f"; {count} of more than {most} tokens left out"


def split(read: Callable[..., list[AnyRow]], args: RunArguments) -> tuple[list[AnyRow], list[AnyRow]]:
    """(training, held-out) rows as the settings have it, read by ``read``."""
    rows = read(args.data, prompt_field=args.prompt_field, field="data")
    if args.eval_data is not None:
        return rows, read(args.eval_data, prompt_field=args.prompt_field, field="eval_data")
    rows, held_out = hold_out(rows, args.eval_fraction, args.seed)
    if not rows:
        raise InputError(f"{args.eval_fraction} of the prompts of {args.data} leaves none to train on", field="eval_fraction")
    return rows, held_out
