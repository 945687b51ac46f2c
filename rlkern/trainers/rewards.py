"""Reward functions of the user's own, loaded by name.

A reward function is called with keyword arguments and gives one number a completion::

    def reward(prompts, completions, answer, **fields):
        return [1.0 if completion.strip() == a else 0.0 for completion, a in zip(completions, answer)]

``prompts`` and ``completions`` are lists of equal length (a prompt as it is in the data, a completion as text without special tokens); every other
field of the data is passed under its name as a list of the same length. A function without ``**`` gets only the fields that it names.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlkern.trainers.arguments import nearest
from rlkern.trainers.data import Row
from rlkern.trainers.errors import InputError


class Reward(NamedTuple):
    """One reward function with its weight in the sum."""

    name: str
    function: Callable[..., Any]
    weight: float


def load_rewards(specs: Iterable[str], rows: Sequence[Row]) -> list[Reward]:
    """The functions named by ``module:function``, ``package.module:function=weight`` or ``path/to/file.py:function``.

    ``rows`` are a row of each data file: a function that asks for a field which the data lack is refused here, not an hour later.
    """
    rewards: list[Reward] = []
    for spec in specs:
        where, _, name = spec.rpartition(":")
        name, _, weight_text = name.partition("=")
        if not where or not name:
            raise InputError(f"{spec!r}: expected module:function or file.py:function, and =weight if it is not 1", field="reward")
        try:
            weight = float(weight_text or 1.0)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise InputError(f"{spec!r}: the weight must be a number, got {weight_text!r}", field="reward")
        try:
            module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        except Exception as error:
            raise InputError(f"{spec!r}: cannot import {where}: {_describe(error)}", field="reward") from error
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        function = getattr(module, name, None)
        if not callable(function):
            raise InputError(f"{spec!r}: {where} has no function {name!r}{nearest(name, functions)}", field="reward")
        if name in (reward.name for reward in rewards):
            name = spec
        for row in rows:
            _check_signature(spec, function, row)
        rewards.append(Reward(name, function, weight))
    return rewards


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # so that it can import its neighbours, as when run as a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _describe(error: BaseException) -> str:
    """An exception in one line, with the file and line where it was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and not isinstance(error, (ImportError, OSError)) else ""
    return f"{type(error).__name__}: {error}{where}".replace("\n", " ")


def _check_signature(spec: str, function: Callable[..., Any], row: Row) -> None:
    parameters = inspect.signature(function).parameters.values()
    for p in parameters:
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in (*row.fields, "prompts", "completions"):
            raise InputError(f"{spec!r} needs a field {p.name!r}, which {row.place} does not have{nearest(p.name, row.fields)}", field="reward")


def _call(function: Callable[..., Any], rows: Sequence[Row], completions: Sequence[str]) -> Any:
    arguments: dict[str, Any] = {name: [row.fields[name] for row in rows] for name in rows[0].fields}
    arguments.update(prompts=[row.prompt for row in rows], completions=list(completions))
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    return function(**arguments)


def score(reward: Reward, rows: Sequence[Row], completions: Sequence[str]) -> list[float]:
    """One function's rewards for ``completions``, of which the i-th answers ``rows[i]``. InputError where it does not give finite numbers."""
    if not completions:
        return []
    try:
        result = _call(reward.function, rows, completions)
    except Exception as error:
        raise InputError(f"reward {reward.name!r} raised {_describe(error)}{_culprit(reward, rows, completions)}") from error
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, (list, tuple)) or len(values) != len(completions):
        got = f"{len(values)} of them" if isinstance(values, (list, tuple)) else type(values).__name__
        raise InputError(f"reward {reward.name!r} must give a list of {len(completions)} numbers, one a completion; got {got}")
    for value, row, completion in zip(values, rows, completions, strict=True):
        if isinstance(value, str) or not hasattr(value, "__float__") or not math.isfinite(value):
            raise InputError(f"reward {reward.name!r} gave {value!r} for the completion {completion!r} of {row.place}; expected a finite number")
    return [float(value) for value in values]


def _culprit(reward: Reward, rows: Sequence[Row], completions: Sequence[str]) -> str:
    """Which sample makes the function raise when it is scored alone."""
    for row, completion in zip(rows, completions, strict=True):
        try:
            _call(reward.function, [row], [completion])
        except Exception:
            return f", for the completion {completion!r} of {row.place}"
    return ""
