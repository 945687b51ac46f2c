"""What the trainers that sample completions and learn from their rewards have in common: prompts, rewards, policy and reference, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import rlkern as rk
from rlkern.integrations.transformers import LastHidden, head_of
from rlkern.trainers import tutorial
from rlkern.trainers.data import Row, batch_at, read_jsonl, split
from rlkern.trainers.errors import InputError
from rlkern.trainers.rewards import Reward, load_rewards, total
from rlkern.trainers.rollout import Completions, Sampler, load_model, load_tokenizer
from rlkern.trainers.runs import Run, plot_curve, seed_all
from rlkern.trainers.settings import PolicyArguments


class PolicyRun(Run):
    """A run that samples: what it samples for, from what, and how that is scored. The trainer adds its optimisers and its step."""

    args: PolicyArguments
    shown = ("reward", "kl", "clip_fraction", "entropy")

    def __init__(self, args: PolicyArguments):
        super().__init__(args)
        self.everyone = torch.distributed.group.WORLD if self.world > 1 else None
        self.prompts_here, rest = divmod(args.prompts_per_step, self.world)
        if rest or self.prompts_here * args.samples_per_prompt % args.minibatches:
            sizes = f"{args.prompts_per_step} prompts x {args.samples_per_prompt} samples in {self.world} processes"
            raise InputError(f"{sizes} do not divide into {args.minibatches} minibatches", field="minibatches")
        if args.model is None:
            task = self.built_in_task()
            args = replace(args, model=f"{task}/model", data=f"{task}/train.jsonl", eval_data=f"{task}/held_out.jsonl", reward=[tutorial.REWARD])
        assert args.model is not None
        self.args = args

        self.rows, self.held_out = split(read_jsonl, args)
        kinds = [*self.rows[:1], *self.held_out[:1]]
        load = partial(load_rewards, rows=kinds, device=self.device, batch_size=args.micro_batch_size)
        self.rewards = load(args.reward)
        self.eval_rewards = load(args.eval_reward, field="eval_reward") or self.rewards

        self.model = load_model(args.model, getattr(torch, args.dtype))
        self.sample = Sampler(self.model, load_tokenizer(args.model), args)
        # A prompt that cannot be used is an error now, not in the step that draws it.
        longest = max(len(self.sample.tokens(row)) for row in (*self.rows, *self.held_out))
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.reference = None
        if args.kl_coef or args.track_kl:
            self.reference = LastHidden(load_model(args.model, getattr(torch, args.dtype))).to(self.device).requires_grad_(False)
        optimizer = self.adamw(self.model, args.learning_rate)
        self.policy, self.optimizer = self.accelerator.prepare(LastHidden(self.model), optimizer)
        self.sample.start(longest)

    def adamw(self, model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
        """An optimiser of the model by the settings."""
        return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, self.args.adam_beta2), weight_decay=self.args.weight_decay)

    def rollout(self, step: int) -> tuple[list[Row], Completions, list[str]]:
        """This process's share of the prompts of a step, ``samples_per_prompt`` rows each, and a completion of every row."""
        seed_all(self.args.seed, step, self.rank)
        here = self.prompts_here
        prompts = batch_at(step, self.args.prompts_per_step, len(self.rows), self.args.seed)[self.rank * here : (self.rank + 1) * here]
        rows = [self.rows[i] for i in prompts for _ in range(self.args.samples_per_prompt)]
        self.sample.engine.load_weights(self.weights())
        return rows, *self.sample(rows)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights by their names, each made whole when it is read."""
        for name, weight in self.model.named_parameters():
            weight = weight.detach()
            yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight

    def inputs(self, batch: Completions) -> dict[str, Any]:
        """What a transformers model takes."""
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)  # padding on the left must not shift them
        return {"input_ids": batch.ids, "attention_mask": batch.attention_mask, "position_ids": positions, "use_cache": False}

    def scored(self, model: Any, batch: Completions) -> dict[str, Any]:
        """What the functions from hidden states take: the states that predict the completions' tokens, these tokens, and the model's head."""
        new = batch.mask.shape[1]
        hidden = model(**self.inputs(batch))
        head = head_of(model)
        if self.args.mixed_precision != "no":  # as autocast has it for the layers before
            precision = torch.get_autocast_dtype(self.device.type)
            hidden, head = hidden.to(precision), head._replace(weight=head.weight.to(precision))
        # The state at one position predicts the token at the next.
        tokens = {"hidden": hidden[:, -new - 1 : -1], "ids": batch.ids[:, -new:], "mask": batch.mask}
        return {**tokens, "temperature": self.args.temperature, **head._asdict()}

    @torch.no_grad()
    def frozen(self, function: Callable[[Completions], Tensor], batch: Completions) -> Tensor:
        """``function`` of the batch without gradients, as many completions at a time as the settings allow."""
        size = self.args.micro_batch_size or len(batch.ids)
        with self.accelerator.autocast():
            return torch.cat([function(batch.rows(part)) for part in torch.arange(len(batch.ids), device=self.device).split(size)])

    def frozen_logprobs(self, model: Any, batch: Completions) -> Tensor:
        """Log-probs of the completions' tokens, [N, T], as data."""
        return self.frozen(lambda rows: rk.linear_token_logprobs(**self.scored(model, rows)), batch)

    def mismatch(self, batch: Completions, old: Tensor | None) -> tuple[Tensor | None, dict[str, float]]:
        """How the engine that sampled differs from the policy, whose log-probs before the step's updates are ``old``.

        Importance weights of the tokens, [N, T], where rollout_correction asks for them; and what to report, over all processes.
        """
        args, mask, sampled = self.args, batch.mask, batch.logprobs
        if sampled is None or old is None:
            return None, {}
        weigh = partial(rk.importance_weights, old, sampled, mask=mask, level=args.correction_level)
        ratio = weigh()
        weights = weigh(low=args.correction_low, high=args.correction_high, outside="zero" if args.rollout_correction == "mask" else "clamp")
        kl = rk.kl_penalty(sampled, old, "k3", mask=mask)  # of the engine's distribution from the policy's
        sums = self.accelerator.reduce(torch.stack([kl.sum(), (weights != ratio).sum(), mask.sum()]), "sum")
        numbers = dict(zip(("mismatch_kl", "mismatch_outside"), (sums / sums[-1]).tolist(), strict=False))
        numbers["mismatch_ratio_max"] = self.accelerator.gather(ratio.max()).max().item()
        return None if args.rollout_correction == "none" else weights, numbers

    def normalizer(self, lengths: Tensor, aggregation: str) -> Tensor:
        """What the losses of a minibatch are divided by: its tokens or completions, in all processes; splitting it then changes nothing."""
        count = lengths.sum() if aggregation == "token-mean" else torch.tensor(len(lengths), device=self.device)
        return self.accelerator.reduce(count, "sum")

    def descend(self, model: Any, optimizer: Any) -> Tensor:
        """A step of the optimiser along the gradients at hand; their norm before it was clipped."""
        norm = self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def total_rewards(self, rewards: Sequence[Reward], rows: Sequence[Row], texts: Sequence[str]) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the rewards of each completion, [N], and the mean of each reward where there are several."""
        sums, means = total(rewards, rows, texts)
        return torch.tensor(sums, device=self.device), means

    def evaluate(self, title: str) -> dict[str, float]:
        if not self.held_out:
            return {}
        seed_all(self.args.seed, "evaluation", self.rank)
        rows = [row for row in self.held_out[self.rank :: self.world] for _ in range(self.args.eval_samples)]
        size = self.args.prompts_per_step * self.args.samples_per_prompt
        self.sample.engine.load_weights(self.weights())
        texts = [text for i in range(0, len(rows), size) for text in self.sample(rows[i : i + size])[1]]
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
        return f"{len(self.rows)} prompts to train on, {len(self.held_out)} held out; {self.model.num_parameters():,} parameters"

    def save(self, rows: list[dict[str, Any]]) -> None:
        self.model.generation_config = self.sample.defaults
        self.model.save_pretrained(self.directory / "model")
        self.sample.tokenizer.save_pretrained(self.directory / "model")
        title, own_axis = f"{self.title} ({self.args.loss})", self.eval_rewards is not self.rewards
        plot_curve(rows, self.directory / "reward.png", key="reward", held_out="held_out_reward", label="mean reward", title=title, own_axis=own_axis)
