"""Trackers of experiments (tensorboard, wandb, trackio, mlflow ...), by accelerate, which has one name for each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers, get_available_trackers
from accelerate.utils import LoggerType

from rlkern.trainers.arguments import nearest
from rlkern.trainers.errors import InputError

KNOWN = [str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL]


def check_trackers(names: Sequence[str]) -> None:
    """InputError for a name that accelerate does not know, or whose package is not installed: accelerate itself would leave that one out."""
    there = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in KNOWN:
            raise InputError(f"accelerate has no tracker {name!r}{nearest(name, KNOWN)}", field="log_with")
        if name not in there:
            raise InputError(f"the package of {name} is not installed: pip install {name}", field="log_with")


def start_trackers(accelerator: Accelerator, directory: Path, *, names: Sequence[str], project: str, settings: dict[str, Any], start: int) -> None:
    """Begin a run in each of these trackers, with its settings. ``start``: steps that are behind it.

    Those that write files of their own put them into ``directory/logs``; the name of the run is that of its directory, where a tracker wants one.
    """
    accelerator.project_configuration.set_directories(str(directory / "logs"))
    accelerator.log_with = filter_trackers(list(names), accelerator.logging_dir)
    name = directory.resolve().name
    options = {
        "tensorboard": {"purge_step": start + 1},  # what came after the checkpoint will come again
        "wandb": {"name": name, "dir": str(directory)},
        "trackio": {"name": name},
        "mlflow": {"run_name": name},
    }
    plain = {key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value) for key, value in settings.items()}
    accelerator.init_trackers(project, plain, options)


def finish_trackers(accelerator: Accelerator) -> None:
    """The end of a run. accelerate's own ``end_training`` would also end the process group, which the caller may want yet."""
    for tracker in accelerator.trackers:
        tracker.finish()
