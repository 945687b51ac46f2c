"""What the trainers that sample completions and learn from their rewards have in common: prompts, rewards, policy and reference, evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

import rlkern as rk
from rlkern.integrations.transformers import LastHidden, head_of
from rlkern.trainers import tutorial
from rlkern.trainers.data import Row, batch_at, drop_long, read_jsonl, split
from rlkern.trainers.errors import InputError
from rlkern.trainers.experts import ask_again, last_hidden
from rlkern.trainers.loading import load_model, load_tokenizer
from rlkern.trainers.rewards import Reward, load_rewards, total
from rlkern.trainers.rollout import Completions, Sampler
from rlkern.trainers.runs import Run, passes, plot_curve, read_metrics, seed_all
from rlkern.trainers.settings import PolicyArguments
from rlkern.trainers.sharding import Shell, reshard, shard_frozen, whole_weights


class PolicyRun(Run):
    """A run that samples: what it samples for, from what, and how that is scored. The trainer adds its optimisers and its step."""

    args: PolicyArguments
    shown = ("reward", "kl", "clip_fraction", "entropy")

    def __init__(self, args: PolicyArguments):
        super().__init__(args)
        args = self.args
        self.everyone = torch.distributed.group.WORLD if self.world > 1 else None
        self.share = self.share_of(args.prompts_per_step)
        self.weight = (self.share.stop - self.share.start) / args.prompts_per_step
        # All processes make as many passes through the models, which are collective; none may be empty.
        each, most = (n * args.samples_per_prompt for n in (args.prompts_per_step // self.world, -(-args.prompts_per_step // self.world)))
        self.most = -(-most // args.minibatches)  # completions in a minibatch here
        if each // args.minibatches < len(passes(0, args.micro_batch_size, self.most)):
            sizes = f"{args.prompts_per_step} prompts x {args.samples_per_prompt} samples in {self.world} processes"
            of = "" if args.micro_batch_size is None else f", in passes of {args.micro_batch_size}"
            raise InputError(f"{sizes} are too few for {args.minibatches} minibatches a process{of}", field="minibatches")
        if args.model is None:
            task = self.built_in_task()
            args = replace(args, model=f"{task}/model", data=f"{task}/train.jsonl", eval_data=f"{task}/held_out.jsonl", reward=[tutorial.REWARD])
        assert args.model is not None
        self.args = args

        self.rows, self.held_out = split(read_jsonl, args)
        kinds = [*self.rows[:1], *self.held_out[:1]]
        self.rewards = self.load_rewards(args.reward, kinds)
        self.eval_rewards = self.load_rewards(args.eval_reward, kinds, field="eval_reward") or self.rewards

        self.model = load_model(args.model, getattr(torch, args.dtype))
        self.hidden = last_hidden(self.model, args.model)
        self.shell = Shell(self.model, self.device) if self.sharded else None
        tokenizer = load_tokenizer(args.model, template_options=args.options_of_template())
        self.sample = Sampler(self.model if self.shell is None else self.shell.model, tokenizer, args, self.device)
        # A prompt that cannot be used is an error now, not in the step that draws it.
        most = args.max_prompt_tokens
        (self.rows, self.held_out), self.left_out = drop_long((self.rows, self.held_out), self.sample.prompt, most, field="max_prompt_tokens")
        longest = max(len(self.sample.tokens(row)) for row in (*self.rows, *self.held_out))
        self.ready(self.model)
        self.reference: LastHidden | None = None
        adapter = self.adapters.get(self.model)
        if adapter is not None and (args.kl_coef or args.track_kl):
            self.reference = adapter.reference()
        elif args.kl_coef or args.track_kl:
            self.reference = LastHidden(load_model(args.model, getattr(torch, args.dtype))).requires_grad_(False)
            if self.sharded:
                shard_frozen(self.accelerator, self.reference)
            else:
                self.reference.to(self.device)
        optimizer = self.adamw(self.model, args.learning_rate)
        self.policy, self.optimizer = self.accelerator.prepare(self.hidden, optimizer)
        self.sample.start(longest)
        self.ratio_deviation: torch.Tensor | None = None  # see watch_ratio
        self.recorded = False  # see record
        self.balance: torch.Tensor | None = None  # see backward
        self.balances: list[torch.Tensor] = []

    def load_rewards(self, specs: Sequence[str], rows: Sequence[Row], *, field: str = "reward") -> list[Reward]:
        """The rewards that a setting names."""
        options = self.args.options_of_template()
        return load_rewards(specs, rows, device=self.device, batch_size=self.args.micro_batch_size, template_options=options, field=field)

    def rollout(self, step: int) -> tuple[list[Row], Completions, list[str]]:
        """This process's share of the prompts of a step, ``samples_per_prompt`` rows each, and a completion of every row."""
        seed_all(self.args.seed, step, self.rank)
        prompts = batch_at(step, self.args.prompts_per_step, len(self.rows), self.args.seed)[self.share]
        rows = [self.rows[i] for i in prompts for _ in range(self.args.samples_per_prompt)]
        with self.sampling():
            return rows, *self.sample(rows)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside this block the engine has the weights as they are: it was given them, or it left them unread, to sample from the policy itself.

        A sharded policy is gathered for that.
        """
        adapter = self.adapters.get(self.model)
        weights = whole_weights(self.policy, self.model) if adapter is None else adapter.merged()
        self.sample.engine.load_weights(weights)
        with nullcontext() if self.shell is None else self.shell.filled(weights):
            yield

    def inputs(self, batch: Completions) -> dict[str, Any]:
        """What a transformers model takes."""
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)  # padding on the left must not shift them
        return {"input_ids": batch.ids, "attention_mask": batch.attention_mask, "position_ids": positions, "use_cache": False}

    def scored(self, model: Any, batch: Completions) -> dict[str, Any]:
        """What the functions from hidden states take: the states that predict the completions' tokens, these tokens, and the model's head."""
        new = batch.mask.shape[1]
        hidden = model(**self.inputs(batch))
        if isinstance(hidden, tuple):  # of a mixture of experts
            hidden, self.balance = hidden
        head = head_of(model)
        parts = [head.weight, head.bias]
        if self.args.mixed_precision != "no":  # as autocast has it for the layers before
            precision = torch.get_autocast_dtype(self.device.type)
            hidden, parts = hidden.to(precision), [None if x is None else x.to(precision) for x in parts]
        weight, bias = (None if x is None else rk.gather_parameter(x) for x in parts)  # where FSDP has their module sharded again
        # The state at one position predicts the token at the next.
        tokens = {"hidden": hidden[:, -new - 1 : -1], "ids": batch.ids[:, -new:], "mask": batch.mask}
        return {**tokens, "temperature": self.args.temperature, **head._asdict(), "weight": weight, "bias": bias}

    def backward(self, loss: Tensor, share: float) -> None:
        """Add the gradients of a loss to the model's, and those of the load-balancing loss of the pass that it comes from, if there is one.

        That counts by the pass's ``share`` of this process's minibatch.
        """
        if self.balance is not None:
            balance, self.balance = self.balance * (share * self.weight), None
            self.balances.append(balance.detach())
            loss = loss + balance
        self.accelerator.backward(loss * self.world)  # data parallelism averages the processes' gradients; their sum is meant

    def balance_of(self, updates: int) -> dict[str, float]:
        """What to report of these losses: their mean over the step's updates."""
        if not self.balances:
            return {}
        total, self.balances = torch.stack(self.balances).sum(), []
        return {"load_balancing_loss": self.accelerator.reduce(total, "sum").item() / updates}

    @torch.no_grad()
    def frozen(self, function: Callable[[Completions], Tensor], batch: Completions) -> Tensor:
        """``function`` of the batch without gradients, as many completions at a time as the settings allow."""
        with self.accelerator.autocast():
            parts = passes(len(batch.ids), self.args.micro_batch_size, self.most * self.args.minibatches)
            return torch.cat([function(batch.rows(part)) for part in parts])

    def minibatches(self, completions: int) -> Iterator[list[Tensor]]:
        """The minibatches of a pass over this process's completions, in random order: the indices of each in as many parts as it is to be run in."""
        for indices in torch.randperm(completions).to(self.device).tensor_split(self.args.minibatches):
            yield [indices[part] for part in passes(len(indices), self.args.micro_batch_size, self.most)]

    def frozen_logprobs(self, model: Any, batch: Completions) -> Tensor:
        """Log-probs of the completions' tokens, [N, T], as data."""
        logprobs = self.frozen(lambda rows: rk.linear_token_logprobs(**self.scored(model, rows)), batch)
        if model is self.reference:
            reshard(model)  # no backward will
        return logprobs

    def mismatch(self, batch: Completions, old: Tensor | None) -> tuple[Tensor | None, dict[str, float]]:
        """How the engine that sampled differs from the policy, whose log-probs before the step's updates are ``old``.

        Importance weights of the tokens, [N, T], or of the completions, [N], where rollout_correction asks for them; and what to report, over all
        processes.
        """
        args, mask, sampled = self.args, batch.mask, batch.logprobs
        if sampled is None or old is None:
            return None, {}
        weigh = partial(rk.importance_weights, old, sampled, mask=mask, level=args.correction_level)
        ratio = weigh()
        weights = weigh(low=args.correction_low, high=args.correction_high, outside="zero" if args.rollout_correction == "mask" else "clamp")
        kl = rk.kl_penalty(sampled, old, "k3", mask=mask)  # of the engine's distribution from the policy's
        sums = self.accelerator.reduce(torch.stack([kl.sum(), (weights != ratio).sum(), mask.sum()]), "sum")
        numbers = dict(zip(("mismatch_kl", "mismatch_outside"), (sums / sums[-1].clamp(min=1)).tolist(), strict=False))
        numbers["mismatch_ratio_max"] = self.accelerator.gather(ratio.max()).max().item()
        if args.rollout_correction == "none":
            return None, numbers
        return weights if args.correction_level == "token" else weights[:, 0], numbers  # one a completion, whose first token always counts

    def watch_ratio(self, logprobs: Tensor | None, old: Tensor | None, mask: Tensor) -> None:
        """Of the first update: how far from 1 the ratio is of the policy that has not moved yet. By rounding alone, if all is well."""
        if self.ratio_deviation is None and logprobs is not None and old is not None:
            self.ratio_deviation = torch.where(mask != 0, torch.expm1(logprobs.detach() - old).abs(), 0.0).max()

    def first_ratio(self, step: int) -> dict[str, float]:
        """What to report of it: the largest deviation in all processes, once, in the first step."""
        if step or self.ratio_deviation is None:
            return {}
        return {"first_ratio_deviation": self.accelerator.gather(self.ratio_deviation).max().item()}

    def normalizer(self, lengths: Tensor, aggregation: str) -> Tensor:
        """What the losses of a minibatch are divided by: its tokens or completions, in all processes; splitting it then changes nothing."""
        count = lengths.sum() if aggregation == "token-mean" else (lengths > 0).sum()  # one without tokens is left out of the loss
        return self.accelerator.reduce(count, "sum").clamp(min=1)

    def means(self, own: dict[str, Tensor], weight: float | Tensor) -> dict[str, float]:
        """The means over all processes of their ``own`` numbers, by the ``weight`` of each process."""
        return dict(zip(own, self.accelerator.reduce(torch.stack([x.float() for x in own.values()]) * weight, "sum").tolist(), strict=True))

    def moments(self, x: Tensor, mask: Tensor) -> tuple[float, float]:
        """Mean and variance of ``x`` over the mask, in all processes."""
        x, live = x.double(), mask != 0
        count, total = self.accelerator.reduce(torch.stack([live.sum(), x.where(live, 0.0).sum()]), "sum").tolist()
        count = max(1, count)
        deviations = (x - total / count).square().where(live, 0.0)
        return total / count, self.accelerator.reduce(deviations.sum(), "sum").item() / count

    def total_rewards(self, rewards: Sequence[Reward], rows: Sequence[Row], texts: Sequence[str]) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the rewards of each completion, [N], and the mean of each reward where there are several."""
        sums, means = total(rewards, rows, texts)
        return torch.tensor(sums, device=self.device), means

    def record(self, step: int, rows: Sequence[Row], texts: Sequence[str], rewards: Tensor, ended: Tensor) -> None:
        """Write down the completions of step ``step`` (from 0), if wanted; in a run that is resumed, in place of what came later."""
        if not self.args.save_completions:
            return
        each = zip(rows, texts, rewards.tolist(), ended.tolist(), strict=True)
        lines = [{"step": step + 1, "prompt": row.prompt, "completion": text, "reward": r, "truncated": not e} for row, text, r, e in each]
        lines = gather_object(lines)
        if self.accelerator.is_main_process:
            path = self.directory / "completions.jsonl"
            if not self.recorded:
                lines = [line for line in read_metrics(path) if line["step"] <= step] + lines
            with open(path, "a" if self.recorded else "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            self.recorded = True

    def evaluate(self, title: str) -> dict[str, float]:
        if not self.held_out:
            return {}
        seed_all(self.args.seed, "evaluation", self.rank)
        rows = [row for row in self.held_out[self.rank :: self.world] for _ in range(self.args.eval_samples)]
        size, temperature = self.args.prompts_per_step * self.args.samples_per_prompt, self.args.eval_temperature
        with self.sampling():
            texts = [text for i in range(0, len(rows), size) for text in self.sample(rows[i : i + size], temperature)[1]]
        rewards = self.total_rewards(self.eval_rewards, rows, texts)[0]
        right = rewards >= self.args.success_reward
        sums = self.accelerator.reduce(torch.stack([rewards.sum(), right.sum(), torch.ones_like(rewards).sum()]), "sum")
        reward, accuracy, _ = (sums / sums[-1]).tolist()
        if self.accelerator.is_main_process:
            tqdm.write(f"{title}: {self.describe({'reward': reward, 'accuracy': accuracy})}")
            for i in range(0, len(rows), self.args.eval_samples)[:3]:
                tqdm.write(f"    {rows[i].prompt!r} -> {texts[i]!r}, reward {rewards[i]:g}")
        return {"held_out_reward": reward, "held_out_accuracy": accuracy}

    @staticmethod
    def describe(figures: dict[str, float]) -> str:
        return f"mean reward {figures['reward']:.3f}, accuracy {figures['accuracy']:.1%}"

    def introduction(self) -> str:
        counts = f"{len(self.rows)} prompts to train on, {len(self.held_out)} held out"
        return f"{counts}{self.left_out}; {self.size_of(self.model)}"

    def save(self) -> None:
        self.model.generation_config = self.sample.defaults
        ask_again(self.hidden)
        self.save_pretrained(self.model, self.sample.tokenizer, "model")

    def plot(self, rows: list[dict[str, Any]]) -> Path:
        title, own_axis = f"{self.title} ({self.args.loss})", self.eval_rewards is not self.rewards
        path = self.directory / "reward.png"
        return plot_curve(rows, path, key="reward", held_out="held_out_reward", label="mean reward", title=title, own_axis=own_axis)
