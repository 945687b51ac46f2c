"""What every run has: a directory, checkpoints that survive a kill, a log of metrics, a curve, and the loop over the steps.

settings.json     what the run was started with
metrics.jsonl     one line a step; only numbers that a run with the same settings reproduces, so that two logs can be compared as files
checkpoints/      step-00000100/ ... (checkpoints.py): models, optimizers and random states as accelerate saves them
model/            the trained model and tokenizer, for from_pretrained, with a model card
summary.json  <curve>.png  logs/

The numbers of a step are a function of the settings and of the state that a checkpoint holds: every step seeds its random generators anew and
draws its rows by its number. Hence a run that was killed and resumed gives the numbers of one that was not.
"""

from __future__ import annotations

import json
import math
import os
import random
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from rlkern.trainers import tutorial
from rlkern.trainers.arguments import command_line, parse
from rlkern.trainers.cards import Subject, write_card
from rlkern.trainers.checkpoints import Checkpoints, Interruption
from rlkern.trainers.directories import check_apart, give_back, run_directory, store_settings, stored_settings, write_json
from rlkern.trainers.errors import InputError
from rlkern.trainers.loading import check_settled
from rlkern.trainers.lora import Adapter, check_lora
from rlkern.trainers.settings import RunArguments
from rlkern.trainers.sharding import launched_as, shards_models, whole_state
from rlkern.trainers.tracking import check_trackers, finish_trackers, start_trackers

# Settings that a resumed run may change: its numbers do not depend on them.
FREE = {"engine_memory", "output_dir", "resume", "save_every", "keep_checkpoints", "log_with", "log_project", "lora_save"}


def seed_all(*parts: int | str) -> None:
    """Seed the generators of Python, NumPy and PyTorch from all of ``parts``."""
    set_seed(random.Random("/".join(map(str, parts))).getrandbits(32))


def passes(count: int, size: int | None, most: int) -> list[slice]:
    """``count`` things in as many passes, of ``size`` of them at most, as the process with ``most`` of them makes: all take part in each.

    Where that is a good deal more than ``count``, some are empty.
    """
    parts = 1 if size is None else -(-most // size)
    return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


class Metrics:
    """The log of a run, one JSON object a step, and the same numbers for its trackers.

    A resumed run drops the lines after its checkpoint: they will come again.
    """

    def __init__(self, directory: Path, accelerator: Accelerator, *, start: int):
        self.rows: list[dict[str, Any]] = []
        self._accelerator = accelerator
        self._enabled = accelerator.is_main_process
        if not self._enabled:
            return
        path = directory / "metrics.jsonl"
        self.rows = [row for row in read_metrics(path) if row["step"] <= start] if start else []
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        part.replace(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, step: int, numbers: dict[str, float], timings: dict[str, float]) -> None:
        """Append a line. ``timings`` differ from run to run and go to the trackers alone."""
        if not self._enabled:
            return
        row = {"step": step, **numbers}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()  # before the checkpoint of the same step
        self._accelerator.log({**numbers, **timings}, step=step)

    def close(self) -> None:
        if self._enabled:
            self._file.close()
        finish_trackers(self._accelerator)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def plot_curve(rows: list[dict[str, Any]], path: Path, *, key: str, held_out: str, label: str, title: str, own_axis: bool = False) -> Path:
    """``key`` of each step, its running mean, and ``held_out`` of the evaluations; ``own_axis``: these two are not on one scale. The file drawn."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    values = [row[key] for row in rows if key in row]
    steps = [row["step"] for row in rows if key in row]
    window = max(1, len(values) // 20)
    smooth = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    points = [(row["step"], row[held_out]) for row in rows if held_out in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    lines = axes.plot(steps, values, color="C0", alpha=0.3, label="training batch")
    lines += axes.plot(steps, smooth, color="C0", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel=label, title=title)
    if points:
        second = axes.twinx() if own_axis else axes
        lines += second.plot(*zip(*points, strict=True), "o--", color="C1", label="held out")
        if own_axis:
            second.set_ylabel(f"held out: {label}", color="C1")
    axes.grid(alpha=0.3)
    axes.legend(handles=lines)
    figure.savefig(path, dpi=120)
    return path


class Run(ABC):
    """A run: what the settings name, checked and loaded by the trainer's ``__init__``, and its training step."""

    name: str  #: the command
    title: str  #: of the algorithm, for people
    shown: tuple[str, ...]  #: the numbers of a step that the progress bar shows
    reads: tuple[str, ...] = ("model", "critic", "data", "eval_data", "reward", "eval_reward", "judge", "process_reward")  #: settings that name paths

    args: RunArguments

    def __init__(self, args: RunArguments):
        self.args = args = launched_as(args)
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.cpu)
        self.sharded = shards_models(self.accelerator)
        check_trackers(args.log_with)
        self.adapters: dict[Any, Adapter] = {}  # of each model that has one
        if args.lora_rank:
            check_lora(self.sharded)
        self.rank, self.world, self.device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if self.world != launched:
            raise InputError(f"{launched} processes were launched, but accelerate sees {self.world}; without GPUs, set cpu", field="cpu")
        self.directory: Path = self.in_first_process(self.claim_directory)
        self._kept = False
        self.warm_up: dict[str, Any] | None = None
        self._given, self._settings = args, asdict(args)
        self.saved: dict[str, Any] = {}  # models by their folders
        self._free = FREE | ({"steps"} if args.lr_schedule == "constant" else set())

    def claim_directory(self) -> Path:
        """The run's own, apart from all that it reads."""
        directory = run_directory(self.args.output_dir, name=self.name, resume=self.args.resume)
        check_apart(directory, {name: getattr(self.args, name, None) for name in self.reads})
        return directory

    def in_first_process(self, function: Callable[[], Any]) -> Any:
        """What ``function`` gives there, in all processes; what it raises, too."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                found = [function()]
            except Exception as error:
                found = [error]
        (result,) = broadcast_object_list(found)
        if isinstance(result, Exception):
            raise result
        return result

    def ready(self, model: Any, *, field: str = "model") -> Any:
        """A model made ready to be trained as the settings have it; it has no dropout, which is tried out. ``field``: the setting that named it."""
        if self.args.lora_rank:
            seed_all(self.args.seed, "adapter", len(self.adapters))
            self.adapters[model] = Adapter(model, self.args)
        if self.args.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # the other form learns nothing behind frozen embeddings
        model.train()  # without which there is no checkpointing
        if not self.sharded:  # where it has no place yet that could hold it
            check_settled(model.to(self.device), field=field)
        return model

    @staticmethod
    def size_of(model: Any) -> str:
        """The number of the model's parameters, and how many are trained where not all are."""
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in model.parameters())
        return f"{total:,} parameters" + ("" if trained == total else f", {trained:,} of them trained")

    def adamw(self, model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
        """An optimiser of the model by the settings."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, self.args.adam_beta2), weight_decay=self.args.weight_decay)

    def set_learning_rate(self, optimizer: Any, peak: float, step: int) -> float:
        """What the schedule makes of ``peak`` in this step, set for the optimiser."""
        learning_rate = peak * self.args.learning_rate_factor(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        return learning_rate

    def share_of(self, count: int) -> slice:
        """Which of ``count`` things are this process's: as many as any other's, or one more or less."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def descend(self, *trained: tuple[Any, Any]) -> list[Tensor]:
        """A step of each model's optimiser along the gradients at hand; their norms before they were clipped."""
        norms = []
        for model, optimizer in trained:
            self.accelerator.unscale_gradients(optimizer)  # accelerate's own clipping, under FSDP, takes one model only
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        scaler = self.accelerator.scaler
        for _, optimizer in trained:
            if scaler is None:
                optimizer.step()
            else:  # accelerate's own step would move the loss scale, which the gradients of the next model still have
                scaler.step(optimizer.optimizer)
            optimizer.zero_grad()
        if scaler is not None:
            scaler.update()
        return norms

    def built_in_task(self) -> Path:
        """Make the built-in task, files like a user's own, and give their directory."""
        task = self.directory / "tutorial"
        self.keep_settings()
        with self.accelerator.main_process_first():
            self.warm_up = tutorial.prepare(task, self._settings["seed"], self.device)
        return task

    def keep_settings(self) -> None:
        """Write down what the run was started with: the last thing before training, so that a start that fails leaves nothing behind."""
        new, self._kept = not (self._kept or self.args.resume), True
        self.in_first_process(lambda: store_settings(self.directory, self._settings, free=self._free, new=new))

    @abstractmethod
    def step(self, step: int) -> dict[str, float]:
        """Step ``step`` (from 0); the numbers to report."""

    @abstractmethod
    def evaluate(self, title: str) -> dict[str, float]:
        """The held-out figures, named ``held_out_...``, with the same random numbers each time; nothing where nothing is held out."""

    @abstractmethod
    def save(self) -> None:
        """Save what was trained; in all processes."""

    def save_pretrained(self, model: Any, tokenizer: Any, name: str) -> None:
        """Save a model and its tokenizer for ``from_pretrained``; in all processes, of which one writes."""
        self.saved[name] = model
        state = whole_state(model) if self.sharded else None
        if self.accelerator.is_main_process:
            if (adapter := self.adapters.get(model)) is not None:
                adapter.save(self.directory / name, merged=self.args.lora_save == "merged")
            else:
                model.save_pretrained(self.directory / name, state_dict=state)
            tokenizer.save_pretrained(self.directory / name)

    @abstractmethod
    def plot(self, rows: list[dict[str, Any]]) -> Path:
        """Draw the curve of the log's ``rows``; its file."""

    @abstractmethod
    def introduction(self) -> str:
        """What is trained, and on how much."""

    @staticmethod
    @abstractmethod
    def describe(figures: dict[str, float]) -> str:
        """Held-out figures (without ``held_out_``) in a few words."""

    def finish(self, rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        """Draw the curve, sum the run up, and write a card beside each saved model."""
        curve = self.plot(rows)
        summary: dict[str, Any] = {"directory": str(self.directory), "steps": self._settings["steps"], "seconds": round(seconds, 1)}
        summary["warm_up"] = self.warm_up
        for when, row in (("before", rows[0]), ("after", rows[-1])) if rows else ():
            if figures := {key.removeprefix("held_out_"): value for key, value in row.items() if key.startswith("held_out_")}:
                summary[when] = figures
        write_json(self.directory / "summary.json", summary)
        for name in self.saved:
            write_card(self.directory / name, self.subject(name), summary, curve)
        return summary

    def subject(self, name: str) -> Subject:
        """What the card of the model in the folder ``name`` says of it."""
        what = "A reward model trained on preferences" if self.name == "reward" else f"A language model trained by {self.title}"
        return Subject(
            name=f"{self.directory.resolve().name}: {name}",
            what=what if name == "model" else f"The {name} of {what[0].lower() + what[1:]}",
            tags=["reward-model"] if self.name == "reward" else [self.name, "reinforcement-learning"],
            base=getattr(self._given, name, None) or self._given.model,
            scores="SequenceClassification" in type(self.saved[name]).__name__,
            adapter=self.saved[name] in self.adapters and self.args.lora_save == "adapter",
            command=shlex.join(["rlkern", self.name, *command_line(self._given, without=("output_dir", "resume"))]),
            place=f"in {self.world} process{'es' if self.world > 1 else ''} on {self.device.type}",
        )


def train(make: Callable[[Any], Run], args: RunArguments) -> dict[str, Any]:
    """The whole run of ``make(args)``; gives what summary.json holds. InputError where what the user gave cannot be used."""
    started = time.perf_counter()
    try:
        run = make(args)
    except BaseException:
        give_back()
        raise
    main = run.accelerator.is_main_process
    checkpoints = Checkpoints(run.directory / "checkpoints", run.accelerator, args.keep_checkpoints)
    start = checkpoints.load() if args.resume else 0
    metrics = Metrics(run.directory, run.accelerator, start=start)
    start_trackers(run.accelerator, run.directory, names=args.log_with, project=args.log_project, settings=asdict(run.args), start=start)
    if main:
        print(f"{run.directory}: {run.introduction()}")
        if args.resume:
            print(f"resumed after step {start}" if start else "no checkpoint to resume from: starting at the beginning")
    if start == 0:
        metrics.log(0, run.evaluate(f"held out, before {run.title}"), {})

    every = 0.1 if sys.stderr.isatty() else 10.0  # seconds: a log file is not to fill with bars
    with closing(metrics), Interruption(run.accelerator) as interruption:
        bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=run.title, mininterval=every, disable=not main)
        for step in bar:
            clock = time.perf_counter()
            numbers = run.step(step)
            timings = {"seconds_per_step": time.perf_counter() - clock}
            bar.set_postfix({name: f"{numbers[name]:.3f}" for name in run.shown if name in numbers}, refresh=False)
            finite = all(math.isfinite(value) for name, value in numbers.items() if name.endswith("grad_norm"))
            if not finite and args.mixed_precision != "fp16":  # fp16 skips such a step and lowers its loss scale
                raise InputError(f"step {step + 1}: the gradient is not finite; a lower learning rate or another precision may help")
            done = step + 1
            if done == args.steps or (args.eval_every and done % args.eval_every == 0):
                numbers |= run.evaluate(f"held out, after {done} steps")
            metrics.log(done, numbers, timings)
            interrupted = interruption.came()
            if (args.save_every and (done == args.steps or done % args.save_every == 0)) or interrupted:
                checkpoints.save(done)
            if interrupted and done < args.steps:
                if main:
                    tqdm.write(f"interrupted after step {done}, of which there is a checkpoint: --resume --output-dir {run.directory} goes on")
                raise KeyboardInterrupt
    run.save()
    return run.finish(metrics.rows, time.perf_counter() - started) if main else {}


def command(
    make: type[Run],
    arguments: type[RunArguments],
    argv: Sequence[str],
    trainer: Callable[[Any], dict[str, Any]],
    *,
    description: str,
    built_in: dict[str, Any],
    given_by_user: tuple[str, ...],
) -> None:
    """A trainer on the command line. What it does not set comes from the YAML file, then the run that is resumed, then the built-in task.

    ``built_in`` are the settings of that task, which is trained where the user sets none of ``given_by_user``.
    """
    transformers_logging.disable_progress_bar()
    given, places = parse(arguments, argv, prog=f"rlkern {make.name}", description=description.split("\n\n")[0])
    try:
        if given.get("resume"):
            given = {**stored_settings(run_directory(given.get("output_dir"), name=make.name, resume=True)), **given}
        if not any(given.get(name) for name in given_by_user):
            given = {**built_in, **given}
        summary = trainer(arguments(**given))
    except InputError as error:
        raise error.at(places) from error
    if warm_up := summary.get("warm_up"):
        print(f"supervised warm-up: {warm_up['steps']} steps, {warm_up['seconds']:.0f} s")
    for when in ("before", "after"):
        if when in summary:
            print(f"held out, {when:6} {make.title}: {make.describe(summary[when])}")
    if summary:
        print(f"{summary['steps']} steps, {summary['seconds']:.0f} s in all; the model, its log and its curve are in {summary['directory']}")
