"""Settings of a trainer: one dataclass, filled from the command line and from a YAML file. The command line wins."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from rlkern.trainers.errors import InputError


def option(default: Any, help: str, *, choices: Sequence[str] | None = None) -> Any:
    """A field of a settings dataclass: its default, what it means, and what it may be."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or what there is to choose from where nothing comes near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}" if 0 < len(known) <= 12 else ""


class _Kind(typing.NamedTuple):
    base: type
    many: bool
    optional: bool


def _kinds(cls: type) -> dict[str, _Kind]:
    """What each field holds: ``int``, ``float``, ``str`` or ``bool``, one or a list of it, None or not."""
    kinds = {}
    for name, hint in typing.get_type_hints(cls).items():
        arms = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        inner = next(arm for arm in arms if arm is not types.NoneType)
        many = typing.get_origin(inner) is list
        kinds[name] = _Kind(typing.get_args(inner)[0] if many else inner, many, types.NoneType in arms)
    return kinds


def _convert(kind: _Kind, choices: Sequence[str] | None, value: Any) -> Any:
    """``value`` as the field wants it. YAML reads 1e-5 as text, so text is converted too. ValueError where it does not fit."""
    if kind.optional and (value is None or (value == "none" and kind.base is not str)):
        return None
    if kind.many:
        one = kind._replace(many=False, optional=False)
        return [_convert(one, choices, item) for item in (value if isinstance(value, list) else [value])]
    if kind.base is bool:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {value!r}")
        return value
    if isinstance(value, (bool, list, dict)) or value is None or (kind.base is int and isinstance(value, float)):
        raise ValueError(f"expected {_NAMES[kind.base]}, got {value!r}")
    try:
        value = kind.base(value)
    except ValueError:
        raise ValueError(f"expected {_NAMES[kind.base]}, got {value!r}") from None
    if choices and value not in choices:
        raise ValueError(f"expected one of {', '.join(choices)}; got {value!r}")
    return value


_NAMES: dict[type, str] = {int: "an integer", float: "a number", str: "text"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def command_line(args: Any, *, without: Collection[str] = ()) -> list[str]:
    """The arguments that :func:`parse` makes these settings of, but for defaults and what is named by ``without``."""
    words = []
    for field in dataclasses.fields(args):
        default = field.default_factory() if callable(field.default_factory) else field.default
        value = getattr(args, field.name)
        if field.name in without or value == default:
            continue
        if isinstance(value, bool):
            words.append(_flag(field.name if value else f"no_{field.name}"))
        else:
            words += [_flag(field.name), *(map(str, value) if isinstance(value, list) else ["none" if value is None else str(value)])]
    return words


def read_yaml(cls: type, path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings in a YAML file, and the place of each, ``file:line: key``. Unknown keys and values that do not fit are errors."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: not YAML: {error.problem}") from None
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{path}:{node.start_mark.line + 1}: expected lines of `setting: value`")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    kinds = _kinds(cls)
    loader = yaml.SafeLoader("")
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        name = str(key.value).replace("-", "_")
        if name not in fields:
            raise InputError(f"{place}: unknown setting {key.value!r}{nearest(name, fields)}")
        if name in values:
            raise InputError(f"{place}: {key.value!r} is set a second time")
        try:
            read = loader.construct_object(value, deep=True)
            if isinstance(read, (bool, int, float)) and kinds[name].base is str:
                read = value.value  # YAML's no, off, 1e-6 or 007, as it stands there
            values[name] = _convert(kinds[name], fields[name].metadata["choices"], read)
        except (ValueError, yaml.YAMLError) as error:
            raise InputError(f"{place}: {key.value}: {error}") from None
        places[name] = f"{place}: {key.value}"
    return values, places


def parse(cls: type, argv: Sequence[str], *, prog: str, description: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What the command line and the file named by ``--config`` set, and where each value came from.

    Only what was set is in the answer, so that a trainer can tell a default from a choice.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, named as below with underscores; the command line overrides it")
    kinds = _kinds(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, field in fields.items():
        default = field.default_factory() if callable(field.default_factory) else field.default
        kind, choices = kinds[name], field.metadata["choices"]
        text = field.metadata["help"] + (f" ({' | '.join(choices)})" if choices else "") + ("" if default in (None, []) else f" [{default}]")
        text = text.replace("%", "%%")
        if kind.base is bool:
            parser.add_argument(_flag(name), action="store_true", help=text + f"; {_flag('no_' + name)} to unset")
            parser.add_argument(_flag("no_" + name), dest=name, action="store_false", help=argparse.SUPPRESS)
        elif kind.many:
            parser.add_argument(_flag(name), nargs="+", action="extend", metavar=kind.base.__name__.upper(), help=text)
        else:
            parser.add_argument(_flag(name), metavar=kind.base.__name__.upper(), help=text)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        raise InputError(
            f"unknown argument {unknown[0]!r}" + nearest(name, map(_flag, [*fields, "config"]))
            if name.startswith("-")
            else f"unexpected argument {name!r}; settings are given as --name value"
        )
    values, places = read_yaml(cls, given.config) if "config" in given else ({}, {})
    for name, value in vars(given).items():
        if name == "config":
            continue
        try:
            values[name] = _convert(kinds[name], fields[name].metadata["choices"], value)
        except ValueError as error:
            raise InputError(f"{_flag(name)}: {error}") from None
        places[name] = _flag(name)
    return values, places
