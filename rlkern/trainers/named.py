"""Python objects of the user's own, loaded by name: ``package.module:name`` or ``path/to/file.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlkern.trainers.arguments import nearest
from rlkern.trainers.errors import InputError

_KINDS: dict[str, Callable[[Any], bool]] = {"function": inspect.isfunction, "class": inspect.isclass}


def load_named(spec: str, where: str, name: str, *, kind: str, field: str) -> Any:
    """``name`` of the module or file ``where``, a ``kind`` ("function" or "class"); ``spec`` is how the setting ``field`` named it."""
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:
        raise InputError(f"{spec!r}: cannot import {where}: {describe(error)}", field=field) from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if _KINDS[kind](value)]
        raise InputError(f"{spec!r}: {where} has no {kind} {name!r}{nearest(name, known)}", field=field)
    return found


def _load_file(path: Path) -> Any:
    name = f"rlkern_user_{path.stem}"  # dataclasses, among others, look their module up
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # so that it can import its neighbours, as when run as a script
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.pop(0)
    return module


def describe(error: BaseException) -> str:
    """An exception in one line, with the file and line where it was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and not isinstance(error, (ImportError, OSError)) else ""
    return f"{type(error).__name__}: {error}{where}".replace("\n", " ")
