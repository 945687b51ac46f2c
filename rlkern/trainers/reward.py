"""A reward model, from preferences between answers to a model that scores them.

Each step: score the answers to a few prompts by a language model whose head has one output, and raise the scores of the better ones above those of
the worse: ``-log sigmoid(r_chosen - r_rejected - margin)`` of pairs, the mean over all pairs of ranked answers (InstructGPT, arXiv 2203.02155).
The losses are rlkern's: ``rk.preference_loss`` and ``rk.ranking_loss``. The result is a sequence-classification model of transformers, which
``--reward`` of ``rlkern ppo`` and ``rlkern grpo`` takes.

The algorithm is in this file; what other trainers need too stands beside it: data in data.py, scoring in rollout.py, the loop over the steps with its
log and its checkpoints in runs.py.

Left out, to keep it readable: DeepSpeed (data parallelism and FSDP2 work), packing of answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import rlkern as rk
from rlkern.trainers import runs, tutorial
from rlkern.trainers.arguments import option
from rlkern.trainers.data import Preference, Row, batch_at, drop_long, read_preferences, split
from rlkern.trainers.errors import InputError
from rlkern.trainers.loading import load_scorer, load_tokenizer
from rlkern.trainers.rewards import Reward, RewardModel, total
from rlkern.trainers.rollout import answer_tokens, check_length, joined_tokens, scores
from rlkern.trainers.settings import RunArguments


@dataclass(kw_only=True)
class RewardArguments(RunArguments):
    """Settings of ``rlkern reward``. Without model and data, preferences of the built-in task of :mod:`rlkern.trainers.tutorial` are learned."""

    model: str | None = option(None, "what to start from, a language model as a rule: a directory or a name on the hub")
    data: str | None = option(None, "JSON lines of prompt, chosen and rejected, or of prompt and ranked, the best answer first")
    steps: int = option(500, "training steps; each learns from one batch of prompts")
    prompts_per_step: int = option(32, "prompts with their answers a step, over all processes")
    learning_rate: float = option(1e-5, "of AdamW, at its peak")
    max_tokens: int | None = option(None, "longest prompt with an answer: rows with a longer one are left out, and their number is said")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("at least 1", lambda x: x >= 1, "prompts_per_step")
        self.require("at least 1", lambda x: x is None or x >= 1, "max_tokens")
        self.all_or_none("model", "data")


class RewardRun(runs.Run):
    """A run, and its training step."""

    name, title, shown = "reward", "training", ("loss", "accuracy", "margin")
    args: RewardArguments

    def __init__(self, args: RewardArguments):
        super().__init__(args)
        args = self.args
        self.share = self.share_of(args.prompts_per_step)
        if args.model is None:
            task = self.built_in_task()
            files = {"data": f"{task}/preferences.jsonl", "eval_data": f"{task}/held_out_preferences.jsonl"}
            args = replace(args, model=f"{task}/model", data=files["data"], eval_data=files["eval_data"])
        assert args.model is not None
        self.args = args
        self.rows, self.held_out = split(read_preferences, args)
        if self.held_out and len(self.held_out[0].answers) != len(self.rows[0].answers):
            first, other = self.rows[0], self.held_out[0]
            raise InputError(f"{other.place} has {len(other.answers)} answers, but {first.place} has {len(first.answers)}", field="eval_data")
        self.tokenizer = load_tokenizer(args.model, template_options=args.options_of_template())
        self.model = load_scorer(args.model, getattr(torch, args.dtype), self.tokenizer)
        self.tokens: dict[str, list[list[int]]] = {}  # of each row, by its place: every answer, the best first, with the prompt before it
        for row in (*self.rows, *self.held_out):
            self.tokens[row.place] = [joined_tokens(self.model, self.tokenizer, *answer, row.place) for answer in row.answers]
        (self.rows, self.held_out), self.left_out = drop_long(
            (self.rows, self.held_out), lambda row: max(self.tokens[row.place], key=len), args.max_tokens, field="max_tokens"
        )
        for row in (*self.rows, *self.held_out):
            for answer, tokens in zip(row.answers, self.tokens[row.place], strict=True):
                check_length(self.model, tokens, answer.text, row.place)
        self.ready(self.model)
        optimizer = self.adamw(self.model, args.learning_rate)
        self.scorer, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.keep_settings()

    def loss(self, rows: Sequence[Preference]) -> rk.LossOutput:
        """The loss of these rows, with accuracy and margin: the mean over their pairs."""
        score = scores(self.scorer, [tokens for row in rows for tokens in self.tokens[row.place]], self.device).view(len(rows), -1)
        if score.shape[1] > 2:
            return rk.ranking_loss(score)
        return rk.preference_loss(*score.unbind(1), margin=torch.tensor([row.margin for row in rows], device=self.device))

    def parts(self, rows: Sequence[Preference], total: int) -> list[Sequence[Preference]]:
        """This process's rows of so many in all, in pieces of at most ``micro_batch_size`` answers, but whole rows; as many in every process."""
        answers, size = len(self.rows[0].answers), self.args.micro_batch_size
        return [rows[part] for part in runs.passes(len(rows), None if size is None else max(1, size // answers), -(-total // self.world))]

    def step(self, step: int) -> dict[str, float]:
        args, accelerator = self.args, self.accelerator
        runs.seed_all(args.seed, step, self.rank)
        learning_rate = self.set_learning_rate(self.optimizer, args.learning_rate, step)

        # 1. Draw prompts with their answers; every process takes its share.
        total = args.prompts_per_step
        parts = self.parts([self.rows[i] for i in batch_at(step, total, len(self.rows), args.seed)[self.share]], total)

        # 2. One gradient step. A part counts by its rows: how a batch is split, for the sake of memory or among processes, changes nothing.
        sums: list[Tensor] = []
        for part in parts:
            with nullcontext() if part is parts[-1] else accelerator.no_sync(self.scorer):
                out = self.loss(part or self.rows[:1])  # a process that has none left takes part in the pass all the same
                accelerator.backward(out.loss * (len(part) * self.world / total))  # data parallelism averages the processes' gradients
            sums.append(torch.stack([out.loss.detach(), out.metrics["accuracy"], out.metrics["margin"]]) * (len(part) / total))
        (norm,) = self.descend((self.scorer, self.optimizer))

        # 3. Report.
        loss, accuracy, margin = accelerator.reduce(torch.stack(sums).sum(0), "sum").tolist()
        return {"loss": loss, "accuracy": accuracy, "margin": margin, "grad_norm": float(norm), "learning_rate": learning_rate}

    @torch.no_grad()
    def evaluate(self, title: str) -> dict[str, float]:
        if not self.held_out:
            return {}
        sums, size = torch.zeros(3, device=self.device), self.args.prompts_per_step
        for i in range(0, len(self.held_out), size):
            rows = self.held_out[i : i + size]
            for part in self.parts(rows[self.share_of(len(rows))], len(rows)):
                out = self.loss(part or rows[:1])
                sums += torch.stack([out.metrics["accuracy"], out.metrics["margin"], out.loss.new_ones(())]) * len(part)
        accuracy, margin, count = self.accelerator.reduce(sums, "sum").tolist()
        figures = {"accuracy": accuracy / count, "margin": margin / count}
        if self.accelerator.is_main_process:
            tqdm.write(f"{title}: {self.describe(figures)}")
        return {f"held_out_{name}": value for name, value in figures.items()}

    @staticmethod
    def describe(figures: dict[str, float]) -> str:
        return f"accuracy {figures['accuracy']:.1%}, margin {figures['margin']:.3f}"

    def introduction(self) -> str:
        counts = f"{len(self.rows)} preferences to train on, {len(self.held_out)} held out"
        return f"{counts}, {len(self.rows[0].answers)} answers each{self.left_out}; {self.size_of(self.model)}"

    def save(self) -> None:
        self.save_pretrained(self.model, self.tokenizer, "model")

    def plot(self, rows: list[dict[str, Any]]) -> Path:
        path, label = self.directory / "accuracy.png", "share of pairs in the right order"
        return runs.plot_curve(rows, path, key="accuracy", held_out="held_out_accuracy", label=label, title="Reward model")


class OnlineRewardModel:
    """A reward model that keeps learning while a policy is trained (iterative GRPO, arXiv 2402.03300, algorithm 1). Part of a checkpoint.

    At the end of a round, a judge compares the policy's completions, and the model learns from these preferences and, a ``replay`` share, older ones.
    Every process does the same with the preferences of all.
    """

    def __init__(self, reward_model: RewardModel, judge: Sequence[Reward], *, learning_rate: float, replay: float):
        self.model, self.tokenizer, self.device = reward_model.model, reward_model.tokenizer, reward_model.device
        self.model.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0)
        self.judge, self.replay = judge, replay
        self.memory: list[list[list[int]]] = []  # tokens of the better and of the worse answer

    def compare(self, rows: Sequence[Row], texts: Sequence[str], group: int) -> list[list[list[int]]]:
        """A pair of each group's completions, the one that the judge scores higher first, where there is one."""
        judged, _ = total(self.judge, rows, texts)
        pairs = []
        for first in range(0, len(rows), group):
            members = [i for i in range(first, first + group) if texts[i].strip()]
            different = [(i, j) for i in members for j in members if judged[i] > judged[j]]
            if different:
                row, pair = rows[first], random.choice(different)
                pairs.append([answer_tokens(self.model, self.tokenizer, row.prompt, texts[i], row.place) for i in pair])
        return pairs

    def learn(self, fresh: list[list[list[int]]], updates: int, size: int) -> dict[str, float]:
        """Gradient steps on ``size`` preferences each; their mean loss and accuracy."""
        if not fresh:
            return {}
        sums = torch.zeros(2, device=self.device)
        for _ in range(updates):
            old = round(size * self.replay) if self.memory else 0
            batch = random.choices(self.memory, k=old) + random.choices(fresh, k=size - old)
            out = rk.preference_loss(*scores(self.model, [tokens for pair in batch for tokens in pair], self.device).view(size, 2).unbind(1))
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            sums += torch.stack([out.loss.detach(), out.metrics["accuracy"]])
        self.memory += fresh
        loss, accuracy = (sums / updates).tolist()
        return {"reward_model_loss": loss, "reward_model_accuracy": accuracy}

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.memory = state["memory"]


def train(args: RewardArguments) -> dict[str, Any]:
    """The whole run; gives what summary.json holds. InputError where what the user gave cannot be used."""
    return runs.train(RewardRun, args)


def main(argv: Sequence[str]) -> None:
    """``rlkern reward``."""
    inputs = ("model", "data")
    runs.command(RewardRun, RewardArguments, argv, train, description=str(__doc__), built_in=tutorial.REWARD_MODEL_SETTINGS, given_by_user=inputs)
