"""Checkpoints that survive a kill, and the one that Ctrl-C asks for."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rlkern.trainers.errors import InputError


class Checkpoints:
    """``step-<n>`` directories; each appears whole or not at all, since it is written under another name and then renamed."""

    def __init__(self, directory: Path, accelerator: Accelerator, keep: int):
        self.directory, self.accelerator, self.keep = directory, accelerator, keep

    def _complete(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"))

    def save(self, step: int) -> None:
        """Save all that was prepared with the accelerator, as the state after ``step`` steps, and delete all but the latest ``keep``."""
        part = self.directory / "part"
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed while it wrote
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for file in part.rglob("*"):
                if file.is_file():
                    with open(file, "rb+") as handle:
                        os.fsync(handle.fileno())  # the name must not reach the disk before the contents
            part.rename(self.directory / f"step-{step:08d}")
            for old in self._complete()[: -self.keep]:
                shutil.rmtree(old)

    def load(self) -> int:
        """Load the latest checkpoint that can be read, if there is any; the number of steps it has behind it.

        Later ones that cannot be read are said, and put aside as ``damaged-<n>``. InputError where none can be read.
        """
        complete = self._complete()
        if not complete:
            return 0
        sharded = any(complete[-1].glob("pytorch_model_fsdp*"))
        if sharded != self.accelerator.is_fsdp2:
            was, now = ("with FSDP", "without") if sharded else ("without FSDP", "with it")
            raise InputError(f"{complete[-1]} was written {was}, and cannot be resumed {now}", field="resume")
        damaged: dict[Path, str] = {}
        for path in reversed(complete):
            if (why := self._load(path)) is None:
                self._put_aside(damaged)
                return int(path.name.removeprefix("step-"))
            damaged[path] = why
        first, why = next(iter(damaged.items()))
        raise InputError(f"{first} cannot be loaded, nor one before it: {why}", field="resume")

    def _load(self, path: Path) -> str | None:
        """Load it in all processes; what the first that cannot says."""
        found = None
        try:
            self.accelerator.load_state(str(path))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what is read decides what is raised
            if self.accelerator.is_fsdp2:  # the others may wait inside
                raise InputError(f"{path} cannot be loaded: {type(error).__name__}: {error}", field="resume") from error
            found = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
        return next((why for why in gather_object([found]) if why is not None), None)

    def _put_aside(self, damaged: dict[Path, str]) -> None:
        """Their names are wanted again: the run comes by these steps once more."""
        if self.accelerator.is_main_process:
            for path, why in damaged.items():
                aside = path.with_name(path.name.replace("step", "damaged"))
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                print(f"warning: {path} cannot be loaded ({why}): put aside as {aside.name}, the checkpoint before it is taken")
        self.accelerator.wait_for_everyone()


class Interruption:
    """Ctrl-C between two steps: the first lets the step finish, so that it can be kept; the second ends the run at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self._came = accelerator, False
        self._before: Any = None
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._note)

    def __enter__(self) -> Interruption:
        return self

    def __exit__(self, *_: Any) -> None:
        self._over()

    def _note(self, *_: Any) -> None:
        self._came = True
        self._over()
        print("interrupted: the step is finished and kept; once more to stop at once", flush=True)

    def came(self) -> bool:
        """Whether it came, in any process; asked in all."""
        if self.accelerator.num_processes == 1:
            return self._came
        return bool(self.accelerator.reduce(torch.tensor(float(self._came), device=self.accelerator.device), "sum").item())

    def _over(self) -> None:
        """What was done at Ctrl-C before is done again."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
