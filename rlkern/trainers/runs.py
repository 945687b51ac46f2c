"""The directory of a run: settings, checkpoints that survive a kill, the log of metrics, the reward curve.

settings.json     what the run was started with
metrics.jsonl     one line a step; only numbers that a run with the same settings reproduces, so that two logs can be compared as files
checkpoints/      step-00000100/ ...: model, optimizer and random states as accelerate saves them
model/            the trained model and tokenizer, for from_pretrained
summary.json  reward.png  tensorboard/
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from rlkern.trainers.errors import InputError


def run_directory(output_dir: str | None, *, name: str, resume: bool) -> Path:
    """Where the run lives: ``output_dir``, or the next free (to resume: the latest) of ``runs/<name>-1``, ``runs/<name>-2``, ..."""
    if output_dir is None:
        free = next(n for n in itertools.count(1) if not Path("runs", f"{name}-{n}").exists())
        return Path("runs", f"{name}-{max(1, free - 1) if resume else free}")
    path = Path(output_dir)
    if not resume and (path / "settings.json").exists():
        raise InputError(f"{path} holds a run already: --resume continues it, another --output-dir starts a new one", field="output_dir")
    return path


def write_json(path: Path, value: Any) -> None:
    """Write all of a file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def stored_settings(directory: Path) -> dict[str, Any]:
    """What the run in ``directory`` was started with; nothing if it was not."""
    path = directory / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def store_settings(directory: Path, settings: dict[str, Any], *, free: set[str]) -> None:
    """Keep the settings of a run. A resumed run has those it was started with, save for ``free`` ones, on which its numbers do not depend."""
    for name, before in stored_settings(directory).items():
        if settings[name] != before and name not in free:
            raise InputError(
                f"{name} is {settings[name]!r}, but the run in {directory} was started with {before!r} and is resumed with that", field=name
            )
    write_json(directory / "settings.json", settings)


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
        """Load the latest checkpoint, if there is one; the number of steps it has behind it."""
        complete = self._complete()
        if not complete:
            return 0
        self.accelerator.load_state(str(complete[-1]))
        return int(complete[-1].name.removeprefix("step-"))


class Metrics:
    """The log of a run, one JSON object a step, and the same numbers for tensorboard when asked.

    A resumed run drops the lines after its checkpoint: they will come again.
    """

    def __init__(self, directory: Path, *, start: int, tensorboard: bool, enabled: bool):
        self.rows: list[dict[str, Any]] = []
        self._enabled = enabled  # in one process only
        self._writer = None
        if not enabled:
            return
        path = directory / "metrics.jsonl"
        self.rows = [row for row in read_metrics(path) if row["step"] <= start] if start else []
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        part.replace(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError(f"tensorboard cannot be imported: {error}", field="tensorboard") from error
            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def log(self, step: int, numbers: dict[str, float], timings: dict[str, float]) -> None:
        """Append a line. ``timings`` differ from run to run and go to tensorboard alone."""
        if not self._enabled:
            return
        row = {"step": step, **numbers}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()  # before the checkpoint of the same step
        if self._writer is not None:
            for key, value in {**numbers, **timings}.items():
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        if self._enabled:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def plot_rewards(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """The reward curve: each step, its running mean, and the held-out evaluations."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    steps = [row["step"] for row in rows if "reward" in row]
    rewards = [row["reward"] for row in rows if "reward" in row]
    window = max(1, len(rewards) // 20)
    smooth = [sum(rewards[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(rewards))]
    held_out = [(row["step"], row["held_out_reward"]) for row in rows if "held_out_reward" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, rewards, color="C0", alpha=0.3, label="training batch")
    axes.plot(steps, smooth, color="C0", label=f"mean of {window} steps")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o--", color="C1", label="held out")
    axes.set(xlabel="step", ylabel="mean reward", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
