"""GRPO, from prompts and a reward function to a trained model, in one file.

Each step: sample a group of completions for each of a few prompts, score them, subtract the group's mean (no value network), and take a few
clipped gradient steps on the policy, held near the initial model by a KL penalty (DeepSeekMath, arXiv 2402.03300). Log-probs, advantages and the
objective are rlkern's: ``rk.linear_token_logprobs``, ``rk.group_advantages``, ``rk.fused_linear_policy_loss``. They start from the last hidden
states, so that training builds no logits. Any preset of ``rk.PolicyLossConfig`` can stand in for GRPO's.

Left out, to keep it readable: sampling by a separate engine (vLLM, SGLang), sharded models (FSDP, DeepSpeed; data parallelism works), LoRA,
tools and several turns, asynchronous rollouts.

The numbers of a step are a function of the settings and of the state that a checkpoint holds: every step seeds its random generators anew and
draws its prompts by its number. Hence a run that was killed and resumed gives the numbers of one that was not.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import rlkern as rk
from rlkern.integrations.transformers import LastHidden, head_of
from rlkern.trainers import tutorial
from rlkern.trainers.arguments import option, parse
from rlkern.trainers.data import Row, batch_at, hold_out, read_jsonl
from rlkern.trainers.errors import InputError
from rlkern.trainers.rewards import load_rewards, score
from rlkern.trainers.rollout import Completions, Sampler, load_model, load_tokenizer
from rlkern.trainers.runs import Checkpoints, Metrics, plot_rewards, run_directory, store_settings, stored_settings, write_json

LOSSES = ("grpo", "dapo", "dr_grpo", "ppo", "gspo", "gspo_token", "luspo", "cispo", "sapo", "gmpo", "vespo", "dppo", "rloo", "reinforce")
METRICS = ("clip_fraction", "approx_kl", "kl", "entropy", "ratio_mean")


@dataclass(kw_only=True)
class GRPOArguments:
    """Settings of ``rlkern grpo``. Without model, data and reward, the built-in task of :mod:`rlkern.trainers.tutorial` is trained."""

    # What to train, and on what
    model: str | None = option(None, "model to train: a directory or a name on the hub")
    data: str | None = option(None, "JSON lines of prompts, with whatever else the rewards need (an answer, say)")
    reward: list[str] = option([], "module:function or file.py:function, =weight if not 1; several are summed")  # noqa: RUF009
    prompt_field: str = option("prompt", "field of the data that holds the prompt: text, or a list of chat messages")
    eval_data: str | None = option(None, "JSON lines of held-out prompts")
    eval_fraction: float = option(0.1, "without eval_data: share of the prompts that is held out of training")
    output_dir: str | None = option(None, "directory of the run; by default the next free runs/grpo-N")
    # Rollouts
    steps: int = option(500, "training steps; each samples, scores and learns from one batch")
    prompts_per_step: int = option(32, "prompts a step, over all processes")
    samples_per_prompt: int = option(8, "completions a prompt: the group")
    max_new_tokens: int = option(256, "longest completion")
    temperature: float = option(1.0, "of sampling, and of the log-probs that are trained")
    top_k: int = option(0, "sample from the k likeliest tokens; 0: from all")
    top_p: float = option(1.0, "sample from the likeliest tokens of this total probability")
    rollout_batch_size: int | None = option(None, "completions sampled at once by each process; by default all")
    # Objective
    loss: str = option("grpo", "preset of rlkern.PolicyLossConfig", choices=LOSSES)
    clip_low: float | None = option(None, "clip range below ratio 1; by default the preset's")
    clip_high: float | None = option(None, "clip range above ratio 1; by default the preset's")
    kl_coef: float = option(0.0, "weight of the KL divergence from the initial model, which is kept in memory only if this is not 0")
    kl_estimator: str = option("k3", "estimator of that KL", choices=("k1", "abs", "k2", "k3", "k1+", "k3+"))
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    advantage_baseline: str = option("mean", "what is subtracted from a reward", choices=("mean", "leave-one-out", "length-weighted"))
    advantage_scale: str = option("group", "whose standard deviation divides it", choices=("group", "batch", "none"))
    # Optimisation
    epochs: int = option(1, "passes over a batch")
    minibatches: int = option(1, "optimiser steps a pass")
    micro_batch_size: int | None = option(None, "completions in one forward and backward pass; less is less memory, with the same result")
    learning_rate: float = option(1e-6, "of AdamW, at its peak")
    lr_schedule: str = option("constant", "what follows the linear warm-up of the learning rate", choices=("constant", "linear", "cosine"))
    lr_warmup_steps: int = option(0, "steps of that warm-up")
    weight_decay: float = option(0.0, "of AdamW")
    adam_beta2: float = option(0.999, "of AdamW")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    # Machine
    dtype: str = option("float32", "of the weights and the optimiser", choices=("float32", "bfloat16"))
    mixed_precision: str = option("no", "precision of the passes through the model", choices=("no", "bf16", "fp16"))
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: slower, far less memory")
    cpu: bool = option(False, "stay on the CPU even where there is a GPU")
    seed: int = option(0, "of everything random")
    # Evaluation, log, checkpoints
    eval_every: int = option(0, "steps between evaluations on the held-out prompts; 0: only before and after training")
    eval_samples: int = option(1, "completions for each held-out prompt, sampled as in training")
    success_reward: float = option(1.0, "a completion with at least this reward counts as right in the accuracy")
    tensorboard: bool = option(False, "write logs for tensorboard too")
    save_every: int = option(50, "steps between checkpoints; 0: none")
    keep_checkpoints: int = option(2, "how many of the latest checkpoints are kept")
    resume: bool = option(False, "continue the run in output_dir (by default the latest) from its last checkpoint, to the same numbers")

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "max_new_tokens", "epochs", "minibatches", "eval_samples", "keep_checkpoints"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("rollout_batch_size", "micro_batch_size"):
            _require(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name in ("top_k", "lr_warmup_steps", "eval_every", "save_every", "weight_decay", "seed"):
            _require(self, name, 0 <= getattr(self, name) < math.inf, "at least 0")
        for name in ("temperature", "learning_rate", "max_grad_norm"):
            _require(self, name, 0 < getattr(self, name) < math.inf, "above 0")
        _require(self, "samples_per_prompt", self.samples_per_prompt >= 2, "at least 2: a group of one has nothing to be compared with")
        _require(self, "eval_fraction", 0 <= self.eval_fraction < 1, "at least 0 and below 1")
        _require(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        _require(self, "adam_beta2", 0 < self.adam_beta2 < 1, "above 0 and below 1")
        missing = [name for name in ("model", "data", "reward") if not getattr(self, name)]
        if 0 < len(missing) < 3:
            raise InputError(f"{' and '.join(missing)} must be given too: model, data and reward, or none of them for the built-in task")
        self.loss_config()  # checks the rest

    def loss_config(self) -> rk.PolicyLossConfig:
        """The objective: the preset with what was set here."""
        clips = {name: value for name in ("clip_low", "clip_high") if (value := getattr(self, name)) is not None}
        preset = getattr(rk.PolicyLossConfig, self.loss)
        try:
            return preset(
                **clips,
                kl_coef=self.kl_coef,
                kl_estimator=self.kl_estimator,
                entropy_coef=self.entropy_coef,
                max_length=self.max_new_tokens,
            )
        except ValueError as error:
            raise InputError(str(error)) from None

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step ``step``, from 0."""
        if step < self.lr_warmup_steps:
            return self.learning_rate * (step + 1) / self.lr_warmup_steps
        done = (step - self.lr_warmup_steps) / max(1, self.steps - self.lr_warmup_steps)
        return self.learning_rate * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.lr_schedule]


# Settings that a resumed run may change: its numbers do not depend on them.
FREE = {"output_dir", "resume", "save_every", "keep_checkpoints", "tensorboard"}


def _require(args: GRPOArguments, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise InputError(f"must be {wanted}, got {getattr(args, name)}", field=name)


def seed_all(*parts: int | str) -> None:
    """Seed the generators of Python, NumPy and PyTorch from all of ``parts``."""
    set_seed(random.Random("/".join(map(str, parts))).getrandbits(32))


class GRPO:
    """A run: what the settings name, checked and loaded, and the training step."""

    def __init__(self, args: GRPOArguments):
        self.accelerator = accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.cpu)
        self.rank, self.world, self.device = accelerator.process_index, accelerator.num_processes, accelerator.device
        here, rest = divmod(args.prompts_per_step, self.world)
        if rest or here * args.samples_per_prompt % args.minibatches:
            sizes = f"{args.prompts_per_step} prompts x {args.samples_per_prompt} samples in {self.world} processes"
            raise InputError(f"{sizes} do not divide into {args.minibatches} minibatches", field="minibatches")
        self.directory = Path(broadcast_object_list([str(run_directory(args.output_dir, name="grpo", resume=args.resume))])[0])
        settings, free = asdict(args), FREE | ({"steps"} if args.lr_schedule == "constant" else set())
        main, self.warm_up = accelerator.is_main_process, None
        if args.model is None:  # the built-in task: files like a user's own
            task = self.directory / "tutorial"
            with accelerator.main_process_first():
                if main:
                    store_settings(self.directory, settings, free=free)
                self.warm_up = tutorial.prepare(task, args.seed, self.device)
            args = replace(args, model=f"{task}/model", data=f"{task}/train.jsonl", eval_data=f"{task}/held_out.jsonl", reward=[tutorial.REWARD])
        assert args.model is not None
        assert args.data is not None
        self.args = args

        self.rows = read_jsonl(args.data, prompt_field=args.prompt_field, field="data")
        if args.eval_data is not None:
            self.held_out = read_jsonl(args.eval_data, prompt_field=args.prompt_field, field="eval_data")
        else:
            self.rows, self.held_out = hold_out(self.rows, args.eval_fraction, args.seed)
            if not self.rows:
                raise InputError(f"{args.eval_fraction} of the prompts of {args.data} leaves none to train on", field="eval_fraction")
        self.rewards = load_rewards(args.reward, [*self.rows[:1], *self.held_out[:1]])

        dtype = getattr(torch, args.dtype)
        self.model = load_model(args.model, dtype)
        self.sample = Sampler(
            self.model,
            load_tokenizer(args.model),
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.rollout_batch_size,
        )
        for row in (*self.rows, *self.held_out):
            self.sample.tokens(row)  # a prompt that cannot be used is an error now, not in the step that draws it
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.reference = LastHidden(load_model(args.model, dtype)).to(self.device).requires_grad_(False) if args.kl_coef else None
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.learning_rate, betas=(0.9, args.adam_beta2), weight_decay=args.weight_decay)
        self.policy, self.optimizer = accelerator.prepare(LastHidden(self.model), optimizer)
        if main:
            store_settings(self.directory, settings, free=free)

    def scored(self, model: Any, batch: Completions) -> dict[str, Any]:
        """What the functions from hidden states take: the states that predict the completions' tokens, these tokens, and the model's head."""
        new = batch.mask.shape[1]
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)  # padding on the left must not shift them
        hidden = model(input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=positions, use_cache=False)
        head = head_of(model)
        if self.args.mixed_precision != "no":  # as autocast has it for the layers before
            precision = torch.get_autocast_dtype(self.device.type)
            hidden, head = hidden.to(precision), head._replace(weight=head.weight.to(precision))
        # The state at one position predicts the token at the next.
        tokens = {"hidden": hidden[:, -new - 1 : -1], "ids": batch.ids[:, -new:], "mask": batch.mask}
        return {**tokens, "temperature": self.args.temperature, **head._asdict()}

    @torch.no_grad()
    def frozen_logprobs(self, model: Any, batch: Completions, size: int) -> Tensor:
        """Log-probs without gradients, ``size`` completions at a time."""
        with self.accelerator.autocast():
            parts = torch.arange(len(batch.ids), device=self.device).split(size)
            return torch.cat([rk.linear_token_logprobs(**self.scored(model, batch.rows(part))) for part in parts])

    def total_rewards(self, rows: Sequence[Row], texts: Sequence[str]) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the rewards of each completion, [N], and the mean of each reward where there are several."""
        each = {reward.name: score(reward, rows, texts) for reward in self.rewards}
        total = [sum(reward.weight * each[reward.name][i] for reward in self.rewards) for i in range(len(texts))]
        means = {f"reward/{name}": sum(values) / max(1, len(values)) for name, values in each.items()} if len(each) > 1 else {}
        return torch.tensor(total, device=self.device), means

    def step(self, step: int) -> dict[str, float]:
        """Step ``step`` (from 0); the numbers to report."""
        args, accelerator, config = self.args, self.accelerator, self.args.loss_config()
        seed_all(args.seed, step, self.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = args.learning_rate_at(step)

        # 1. Sample a group of completions for each prompt; every process takes its share of the prompts.
        here = args.prompts_per_step // self.world
        prompts = batch_at(step, args.prompts_per_step, len(self.rows), args.seed)[self.rank * here : (self.rank + 1) * here]
        rows = [self.rows[i] for i in prompts for _ in range(args.samples_per_prompt)]
        batch, texts = self.sample(rows)
        lengths = batch.mask.sum(1)

        # 2. Score them. The advantage of a completion is how much better it is than its group.
        rewards, each = self.total_rewards(rows, texts)
        advantages = rk.group_advantages(
            accelerator.gather(rewards),
            group_size=args.samples_per_prompt,
            baseline=args.advantage_baseline,
            scale=args.advantage_scale,
            lengths=accelerator.gather(lengths),
        )[self.rank * len(rows) : (self.rank + 1) * len(rows)]

        # 3. Log-probs of what was sampled: under the policy before it moves (not needed if it moves only once), and under the reference.
        size, updates = args.micro_batch_size or len(rows), args.epochs * args.minibatches
        old = self.frozen_logprobs(self.policy, batch, size) if updates > 1 else None
        ref = self.frozen_logprobs(self.reference, batch, size) if self.reference is not None else None

        # 4. A few clipped gradient steps on the batch. Losses are divided by a count over the whole minibatch, in all processes: how it is split,
        #    for the sake of memory or of speed, changes nothing.
        losses, norms, sums = [], [], []
        for _ in range(args.epochs):
            for minibatch in torch.randperm(len(rows)).to(self.device).chunk(args.minibatches):
                count = lengths[minibatch].sum() if config.aggregation == "token-mean" else torch.tensor(len(minibatch), device=self.device)
                normalizer = accelerator.reduce(count, "sum")
                parts = minibatch.split(size)
                for part in parts:
                    with nullcontext() if part is parts[-1] else accelerator.no_sync(self.policy):
                        out = rk.fused_linear_policy_loss(
                            **self.scored(self.policy, batch.rows(part)),
                            old_logprobs=None if old is None else old[part],
                            advantages=advantages[part],
                            ref_logprobs=None if ref is None else ref[part],
                            normalizer=normalizer,
                            config=config,
                        )
                        accelerator.backward(out.loss * self.world)  # data parallelism averages the processes' gradients; their sum is meant
                    losses.append(out.loss.detach())
                    sums.append(torch.stack([out.metrics[name] for name in METRICS]) * lengths[part].sum())
                norms.append(accelerator.clip_grad_norm_(self.policy.parameters(), args.max_grad_norm))
                self.optimizer.step()
                self.optimizer.zero_grad()

        # 5. Report.
        spread = rewards.view(here, -1).std(1)
        own = {"reward": rewards.mean(), "reward_std": spread.mean(), "equal_groups": (spread == 0).float().mean()}
        own |= {"completion_tokens": lengths.float().mean(), **{name: rewards.new_tensor(mean) for name, mean in each.items()}}
        means = accelerator.reduce(torch.stack(list(own.values())), "mean")
        totals = accelerator.reduce(torch.cat([torch.stack(sums).sum(0), torch.stack([torch.stack(losses).sum(), lengths.sum()])]), "sum").tolist()
        numbers = dict(zip(own, means.tolist(), strict=True))
        numbers |= {name: total / (totals[-1] * args.epochs) for name, total in zip(METRICS, totals, strict=False)}
        if ref is None:
            del numbers["kl"]
        return numbers | {"loss": totals[-2] / updates, "grad_norm": torch.stack(norms).mean().item(), "learning_rate": args.learning_rate_at(step)}

    def evaluate(self, title: str) -> dict[str, float]:
        """Mean reward and accuracy on the held-out prompts, with the same random numbers each time."""
        if not self.held_out:
            return {}
        seed_all(self.args.seed, "evaluation", self.rank)
        rows = [row for row in self.held_out[self.rank :: self.world] for _ in range(self.args.eval_samples)]
        size = self.args.prompts_per_step * self.args.samples_per_prompt
        texts = [text for i in range(0, len(rows), size) for text in self.sample(rows[i : i + size])[1]]
        rewards = self.total_rewards(rows, texts)[0]
        right = rewards >= self.args.success_reward
        sums = self.accelerator.reduce(torch.stack([rewards.sum(), right.sum(), torch.ones_like(rewards).sum()]), "sum")
        reward, accuracy, _ = (sums / sums[-1]).tolist()
        if self.accelerator.is_main_process:
            tqdm.write(f"{title}: mean reward {reward:.3f}, accuracy {accuracy:.1%}")
            for i in range(0, len(rows), self.args.eval_samples)[:3]:
                tqdm.write(f"    {rows[i].prompt!r} -> {texts[i]!r}, reward {rewards[i]:g}")
        return {"held_out_reward": reward, "held_out_accuracy": accuracy}

    def finish(self, rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        """Save the model for ``from_pretrained``, draw the reward curve, and sum the run up."""
        self.model.generation_config = self.sample.defaults
        self.model.save_pretrained(self.directory / "model")
        self.sample.tokenizer.save_pretrained(self.directory / "model")
        plot_rewards(rows, self.directory / "reward.png", title=f"GRPO ({self.args.loss})")
        summary: dict[str, Any] = {"directory": str(self.directory), "steps": self.args.steps, "seconds": round(seconds, 1), "warm_up": self.warm_up}
        if self.held_out:
            for when, row in (("before", rows[0]), ("after", rows[-1])):
                summary[when] = {"reward": row["held_out_reward"], "accuracy": row["held_out_accuracy"]}
        write_json(self.directory / "summary.json", summary)
        return summary


def train(args: GRPOArguments) -> dict[str, Any]:
    """The whole run; gives what summary.json holds. InputError where what the user gave cannot be used."""
    started = time.perf_counter()
    run = GRPO(args)
    main = run.accelerator.is_main_process
    checkpoints = Checkpoints(run.directory / "checkpoints", run.accelerator, args.keep_checkpoints)
    start = checkpoints.load() if args.resume else 0
    metrics = Metrics(run.directory, start=start, tensorboard=args.tensorboard, enabled=main)
    if main:
        print(f"{run.directory}: {len(run.rows)} prompts to train on, {len(run.held_out)} held out; {run.model.num_parameters():,} parameters")
        if args.resume:
            print(f"resumed after step {start}" if start else "no checkpoint to resume from: starting at the beginning")
    if start == 0:
        metrics.log(0, run.evaluate("held out, before GRPO"), {})

    every = 0.1 if sys.stderr.isatty() else 10.0  # seconds: a log file is not to fill with bars
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="GRPO", mininterval=every, disable=not main)
    for step in bar:
        clock = time.perf_counter()
        numbers = run.step(step)
        timings = {"seconds_per_step": time.perf_counter() - clock}
        shown = {name: f"{numbers[name]:.3f}" for name in ("reward", "kl", "clip_fraction", "entropy") if name in numbers}
        bar.set_postfix(shown, refresh=False)
        if not math.isfinite(numbers["grad_norm"]) and args.mixed_precision != "fp16":  # fp16 skips such a step and lowers its loss scale
            raise InputError(f"step {step + 1}: the gradient is not finite; a lower learning rate or another precision may help")
        done = step + 1
        if done == args.steps or (args.eval_every and done % args.eval_every == 0):
            numbers |= run.evaluate(f"held out, after {done} steps")
        metrics.log(done, numbers, timings)
        if args.save_every and (done == args.steps or done % args.save_every == 0):
            checkpoints.save(done)
    metrics.close()
    return run.finish(metrics.rows, time.perf_counter() - started) if main else {}


def main(argv: Sequence[str]) -> None:
    """``rlkern grpo``. What the command line does not set comes from the YAML file, then the run that is resumed, then the built-in task."""
    transformers_logging.disable_progress_bar()
    given, places = parse(GRPOArguments, argv, prog="rlkern grpo", description=str(__doc__).split("\n\n")[0])
    try:
        if given.get("resume"):
            given = {**stored_settings(run_directory(given.get("output_dir"), name="grpo", resume=True)), **given}
        if not any(given.get(name) for name in ("model", "data", "reward")):
            given = {**tutorial.SETTINGS, **given}
        summary = train(GRPOArguments(**given))
    except InputError as error:
        raise error.at(places) from error
    if warm_up := summary.get("warm_up"):
        print(f"supervised warm-up: {warm_up['steps']} steps, {warm_up['seconds']:.0f} s")
    for when in ("before", "after"):
        if when in summary:
            print(f"held out, {when:6} GRPO: mean reward {summary[when]['reward']:.3f}, accuracy {summary[when]['accuracy']:.1%}")
    if summary:
        print(f"{summary['steps']} steps, {summary['seconds']:.0f} s in all; model/, metrics.jsonl and reward.png in {summary['directory']}")
