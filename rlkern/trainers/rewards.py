"""Reward functions of the user's own and reward models, loaded by name.

A reward function is called with keyword arguments and gives one number a completion::

    def reward(prompts, completions, answer, **fields):
        return [1.0 if completion.strip() == a else 0.0 for completion, a in zip(completions, answer)]

``prompts`` and ``completions`` are lists of equal length (a prompt as it is in the data, a completion as text without special tokens); every other
field of the data is passed under its name as a list of the same length. A function without ``**`` gets only the fields that it names.

A reward model, such as ``rlkern reward`` trains, is a directory or a name on the hub in place of the function's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlkern.trainers.arguments import nearest
from rlkern.trainers.data import Row
from rlkern.trainers.errors import InputError
from rlkern.trainers.loading import load_scorer, load_tokenizer
from rlkern.trainers.named import describe, load_named
from rlkern.trainers.rollout import answer_tokens, scores

_CPU = torch.device("cpu")


class Reward(NamedTuple):
    """One reward function with its weight in the sum."""

    name: str
    function: Callable[..., Any]
    weight: float


class RewardModel:
    """A sequence-classification model with one output as a reward function: its score of each prompt and completion."""

    def __init__(
        self, name: str, device: torch.device, *, field: str, batch_size: int | None = None, template_options: Mapping[str, Any] | None = None
    ):
        self.tokenizer = load_tokenizer(name, field=field, template_options=template_options)
        self.model = load_scorer(name, torch.float32, self.tokenizer, field=field, trained=True).to(device).eval().requires_grad_(False)
        self.device, self.batch_size = device, batch_size

    def __call__(self, prompts: list[Any], completions: list[str]) -> list[float]:
        tokens = [answer_tokens(self.model, self.tokenizer, *pair, place="a prompt") for pair in zip(prompts, completions, strict=True)]
        size = self.batch_size or len(tokens)
        with torch.no_grad():
            return torch.cat([scores(self.model, tokens[i : i + size], self.device) for i in range(0, len(tokens), size)]).tolist()


def load_rewards(
    specs: Iterable[str],
    rows: Sequence[Row],
    *,
    device: torch.device = _CPU,
    batch_size: int | None = None,
    template_options: Mapping[str, Any] | None = None,
    field: str = "reward",
) -> list[Reward]:
    """The functions named by ``module:function``, ``package.module:function=weight`` or ``path/to/file.py:function``, and reward models.

    ``rows`` are a row of each data file: a function that asks for a field which the data lack is refused here, not an hour later. Reward models run
    on ``device``, ``batch_size`` completions at a time, with these options for their chat templates. ``field`` is the setting that holds ``specs``.
    """
    rewards: list[Reward] = []
    for spec in specs:
        directory, where, name, weight_text = _parts(spec)
        try:
            weight = float(weight_text or 1.0)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise InputError(f"{spec!r}: the weight must be a number, got {weight_text!r}", field=field)
        function: Callable[..., Any]
        if directory:
            function = RewardModel(directory, device, field=field, batch_size=batch_size, template_options=template_options)
        elif where and name:
            function = load_named(spec, where, name, kind="function", field=field)
        else:
            raise InputError(f"{spec!r}: expected module:function, file.py:function or a reward model's directory; =weight if not 1", field=field)
        if name in (reward.name for reward in rewards):
            name = spec
        for row in rows:
            _check_signature(spec, function, row, field)
        rewards.append(Reward(name, function, weight))
    return rewards


def _parts(spec: str) -> tuple[str, str, str, str]:
    """(directory or name of a reward model, module or file of a function, its name, weight) of ``spec``; a directory's name may hold = and :."""
    if Path(spec).is_dir():
        return spec, "", spec, ""
    head, _, weight = spec.rpartition("=")
    if head and Path(head).is_dir():
        return head, "", head, weight
    where, _, name = spec.rpartition(":")
    name, _, weight = name.partition("=")
    return (name if not where and "/" in name else ""), where, name, weight


def _check_signature(spec: str, function: Callable[..., Any], row: Row, field: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    for p in parameters:
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in (*row.fields, "prompts", "completions"):
            raise InputError(f"{spec!r} needs a field {p.name!r}, which {row.place} does not have{nearest(p.name, row.fields)}", field=field)


def _call(function: Callable[..., Any], rows: Sequence[Row], completions: Sequence[str]) -> Any:
    arguments: dict[str, Any] = {name: [row.fields[name] for row in rows] for name in rows[0].fields}
    arguments.update(prompts=[row.prompt for row in rows], completions=list(completions))
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    return function(**arguments)


def _outputs(reward: Reward, rows: Sequence[Row], completions: Sequence[str], wanted: str) -> Sequence[Any]:
    """What the function gives for ``completions``, one thing for each. InputError where it raises or gives another number of them."""
    try:
        result = _call(reward.function, rows, completions)
    except Exception as error:
        raise InputError(f"reward {reward.name!r} raised {describe(error)}{_culprit(reward, rows, completions)}") from error
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, (list, tuple)) or len(values) != len(completions):
        got = f"{len(values)} of them" if isinstance(values, (list, tuple)) else type(values).__name__
        raise InputError(f"reward {reward.name!r} must give a list of {len(completions)} {wanted}, one a completion; got {got}")
    return values


def _number(reward: Reward, value: Any, row: Row, what: str) -> float:
    if isinstance(value, str) or not hasattr(value, "__float__") or not math.isfinite(value):
        raise InputError(f"reward {reward.name!r} gave {value!r} for the {what} of {row.place}; expected a finite number")
    return float(value)


def score(reward: Reward, rows: Sequence[Row], completions: Sequence[str]) -> list[float]:
    """One function's rewards for ``completions``, of which the i-th answers ``rows[i]``. InputError where it does not give finite numbers."""
    return [_number(reward, value, row, what) for value, row, what in _scored(reward, rows, completions)]


def _scored(reward: Reward, rows: Sequence[Row], completions: Sequence[str]) -> list[tuple[Any, Row, str]]:
    """What the function gives for each completion, with its row and what it is called in an error."""
    if not completions:
        return []
    values = _outputs(reward, rows, completions, "numbers")
    return [(value, row, f"completion {text!r}") for value, row, text in zip(values, rows, completions, strict=True)]


def steps_of(completion: str, separator: str) -> list[str]:
    """The steps of a completion, each with the separator that ends it; at least one."""
    *steps, rest = completion.split(separator)
    return [step + separator for step in steps] + ([rest] if rest or not steps else [])


def score_steps(reward: Reward, rows: Sequence[Row], completions: Sequence[str], steps: Sequence[list[str]]) -> list[list[float]]:
    """A process reward: a list of numbers a completion, one for each of its ``steps``, which the function gets under that name."""
    rows = [row._replace(fields={**row.fields, "steps": each}) for row, each in zip(rows, steps, strict=True)]
    scores = []
    for values, row, text, each in zip(_outputs(reward, rows, completions, "lists of numbers"), rows, completions, steps, strict=True):
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)) or len(values) != len(each):
            raise InputError(f"reward {reward.name!r} gave {values!r} for the {len(each)} steps {each!r} of {row.place}; expected a number a step")
        scores.append([_number(reward, value, row, f"step {step!r} of {text!r}") for value, step in zip(values, each, strict=True)])
    return scores


def _culprit(reward: Reward, rows: Sequence[Row], completions: Sequence[str]) -> str:
    """Which sample makes the function raise when it is scored alone."""
    for row, completion in zip(rows, completions, strict=True):
        try:
            _call(reward.function, [row], [completion])
        except Exception:
            return f", for the completion {completion!r} of {row.place}"
    return ""


def total(rewards: Sequence[Reward], rows: Sequence[Row], completions: Sequence[str]) -> tuple[list[float], dict[str, float]]:
    """The weighted sum of the rewards of each completion, and the mean of each reward, named ``reward/...``, where there are several.

    Of several, one that gives None does not apply to that completion, and is left out of its sum and of the mean.
    """
    if len(rewards) == 1:
        (reward,) = rewards
        return [reward.weight * value for value in score(reward, rows, completions)], {}
    each: dict[str, list[float | None]] = {
        reward.name: [None if value is None else _number(reward, value, row, what) for value, row, what in _scored(reward, rows, completions)]
        for reward in rewards
    }
    sums = []
    for i, row in enumerate(rows):
        given = [(reward.weight, value) for reward in rewards if (value := each[reward.name][i]) is not None]
        if not given:
            raise InputError(f"no reward applies to the completion {completions[i]!r} of {row.place}: all gave None")
        sums.append(sum(weight * value for weight, value in given))
    applied = {name: [value for value in values if value is not None] for name, values in each.items()}
    return sums, {f"reward/{name}": sum(values) / max(1, len(values)) for name, values in applied.items()}
