"""Where a run lives: a directory that is nobody's input and no other run's, and the settings in it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkern.trainers.errors import InputError

_taken: list[Path] = []


def run_directory(output_dir: str | None, *, name: str, resume: bool, begun: str = "settings.json") -> Path:
    """Where the run lives: ``output_dir``, or the next free (to resume: the latest) of ``runs/<name>-1``, ``runs/<name>-2``, ...

    ``begun`` is the file that a run to be resumed has. A free one is made in the same step, so that two runs that start together take two;
    :func:`give_back` is for a start that fails.
    """
    if output_dir is None:
        numbers = itertools.count(1)
        if resume:
            latest = next(n for n in numbers if not Path("runs", f"{name}-{n}").exists()) - 1
            if latest == 0:
                raise InputError(f"there is no run runs/{name}-1 to resume", field="resume")
            return _to_resume(Path("runs", f"{name}-{latest}"), begun)
        _writable(Path("runs"), "output_dir")
        Path("runs").mkdir(exist_ok=True)
        for n in numbers:
            try:
                (path := Path("runs", f"{name}-{n}")).mkdir()
            except FileExistsError:
                continue
            _taken.append(path)
            return path
    assert output_dir is not None
    if not output_dir.strip():
        raise InputError("expected a directory, got an empty name", field="output_dir")
    path = Path(output_dir)
    if resume:
        return _to_resume(path, begun)
    if (path / "settings.json").exists():
        raise InputError(f"{path} holds a run already: --resume continues it, another --output-dir starts a new one", field="output_dir")
    _writable(path, "output_dir")
    return path


def _to_resume(path: Path, begun: str) -> Path:
    if not (path / begun).exists():
        raise InputError(f"there is no run to resume in {path}: it has no {begun}", field="resume")
    return path


def _writable(path: Path, field: str) -> None:
    """InputError where ``path`` cannot be a directory to write to, found out before hours go by."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file, not a directory", field=field)
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there} cannot be written to", field=field)


def give_back() -> None:
    """Remove the directories that this process took and put nothing into: its start failed."""
    while _taken:
        if (path := _taken.pop()).is_dir() and not any(path.iterdir()):
            path.rmdir()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def check_apart(directory: Path, inputs: Mapping[str, str | Sequence[str] | None]) -> None:
    """InputError where the run's directory is, holds or lies in a model or a data file that a setting names: its files would take their place."""
    ours = directory.resolve()
    for field, given in inputs.items():
        for text in (given,) if isinstance(given, str) else given or ():
            path = Path(text)
            if not path.exists():  # a name on the hub, or an error that comes later
                continue
            theirs = path.resolve()
            if ours == theirs or ours in theirs.parents or theirs in ours.parents:
                how = "is" if ours == theirs else "lies in" if theirs in ours.parents else "holds"
                raise InputError(f"{directory} {how} {text}, which {field} names: what the run writes could take its place", field="output_dir")


def write_json(path: Path, value: Any) -> None:
    """Write all of a file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _part_of(path, value).replace(path)


def _part_of(path: Path, value: Any) -> Path:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return part


def stored_settings(directory: Path) -> dict[str, Any]:
    """What the run in ``directory`` was started with; nothing if it was not."""
    path = directory / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def store_settings(directory: Path, settings: dict[str, Any], *, free: set[str], new: bool) -> None:
    """Keep the settings of a run. A resumed run has those it was started with, save for ``free`` ones, on which its numbers do not depend.

    ``new``: it must be the first in its directory, which this decides in one step.
    """
    path = directory / "settings.json"
    if new:
        directory.mkdir(parents=True, exist_ok=True)
        part = _part_of(path, settings)
        try:
            os.link(part, path)
        except FileExistsError as error:
            raise InputError(f"another run has just begun in {directory}", field="output_dir") from error
        finally:
            part.unlink()
        return
    for name, before in stored_settings(directory).items():
        if settings.get(name) != before and name not in free:
            now = settings.get(name)
            raise InputError(f"{name} is {now!r}, but the run in {directory} was started with {before!r} and is resumed with that", field=name)
    write_json(path, settings)
