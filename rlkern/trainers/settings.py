"""The settings that trainers share, with their checks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import rlkern as rk
from rlkern.trainers.arguments import option
from rlkern.trainers.errors import InputError

PRECISIONS = ("no", "bf16", "fp16")


@dataclass(kw_only=True)
class RunArguments:
    """Settings of every trainer."""

    # What to train, and on what
    model: str | None = option(None, "model to train: a directory or a name on the hub")
    data: str | None = option(None, "JSON lines to train on")
    prompt_field: str = option("prompt", "field of the data that holds the prompt: text, or a list of chat messages")
    template_options: list[str] = option([], "name=value for the chat template, enable_thinking=false, say; values are JSON, else text")  # noqa: RUF009
    eval_data: str | None = option(None, "JSON lines of held-out prompts")
    eval_fraction: float = option(0.1, "without eval_data: share of the prompts that is held out of training")
    output_dir: str | None = option(None, "directory of the run; by default the next free runs/<command>-N")
    # Optimisation
    steps: int = option(500, "training steps")
    learning_rate: float = option(1e-6, "of AdamW, at its peak")
    lr_schedule: str = option("constant", "what follows the linear warm-up of the learning rate", choices=("constant", "linear", "cosine"))
    lr_warmup_steps: int = option(0, "steps of that warm-up")
    weight_decay: float = option(0.0, "of AdamW")
    adam_beta2: float = option(0.999, "of AdamW")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    # LoRA
    lora_rank: int | None = option(None, "train an adapter of this rank (LoRA, by peft) in place of the model's weights; by default the weights")
    lora_alpha: float | None = option(None, "the adapter's product counts lora_alpha / lora_rank times; by default twice")
    lora_targets: list[str] = option(["all-linear"], "names of the layers that get an adapter, as peft's target_modules")  # noqa: RUF009
    lora_save: str = option("adapter", "save the adapter alone, or the model with the adapter merged", choices=("adapter", "merged"))
    # Machine
    micro_batch_size: int | None = option(None, "answers in one forward and backward pass; less is less memory, with the same result")
    dtype: str = option("float32", "of the weights and the optimiser", choices=("float32", "bfloat16"))
    mixed_precision: str | None = option(
        None, "precision of the passes through the model; by default what accelerate was launched with, else no", choices=PRECISIONS
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: slower, far less memory")
    cpu: bool = option(False, "stay on the CPU even where there is a GPU")
    seed: int = option(0, "of everything random")
    # Evaluation, log, checkpoints
    eval_every: int = option(0, "steps between evaluations on the held-out prompts; 0: only before and after training")
    log_with: list[str] = option([], "trackers of accelerate that get the log too: tensorboard, wandb, trackio, mlflow ...")  # noqa: RUF009
    log_project: str = option("rlkern", "the project that they file the run under")
    save_every: int = option(50, "steps between checkpoints; 0: none")
    keep_checkpoints: int = option(2, "how many of the latest checkpoints are kept")
    resume: bool = option(False, "continue the run in output_dir (by default the latest) from its last checkpoint, to the same numbers")

    def __post_init__(self) -> None:
        self.require("at least 1", lambda x: x >= 1, "steps", "keep_checkpoints")
        self.require("at least 1", lambda x: x is None or x >= 1, "micro_batch_size", "lora_rank")
        self.require("at least 0", lambda x: 0 <= x < math.inf, "lr_warmup_steps", "eval_every", "save_every", "weight_decay", "seed")
        self.require("above 0", lambda x: 0 < x < math.inf, "learning_rate", "max_grad_norm")
        self.require("at least 0 and below 1", lambda x: 0 <= x < 1, "eval_fraction")
        self.require("above 0 and below 1", lambda x: 0 < x < 1, "adam_beta2")
        self.require("above 0", lambda x: x is None or 0 < x < math.inf, "lora_alpha")
        self.require("one name or more", bool, "lora_targets")
        self.options_of_template()  # checks them
        if self.lora_rank is None and (self.lora_alpha, self.lora_targets, self.lora_save) != (None, ["all-linear"], "adapter"):
            raise InputError("must be set for the other settings of LoRA to act", field="lora_rank")

    def require(self, wanted: str, holds: Any, *names: str) -> None:
        """InputError where the setting of one of these names is not as wanted."""
        for name in names:
            if not holds(getattr(self, name)):
                raise InputError(f"must be {wanted}, got {getattr(self, name)}", field=name)

    def options_of_template(self) -> dict[str, Any]:
        """What the chat template gets besides the messages."""
        options = {}
        for text in self.template_options:
            name, equals, value = text.partition("=")
            if not (equals and name.isidentifier()) or name in ("add_generation_prompt", "continue_final_message", "tokenize"):
                raise InputError(f"expected name=value with a name that the trainer does not set itself, got {text!r}", field="template_options")
            try:
                options[name] = json.loads(value)
            except json.JSONDecodeError:
                options[name] = value
        return options

    def all_or_none(self, *names: str) -> None:
        """InputError where some of these are given and some are not: the built-in task sets them all."""
        missing = [name for name in names if not getattr(self, name)]
        if 0 < len(missing) < len(names):
            listed = f"{', '.join(names[:-1])} and {names[-1]}"
            raise InputError(f"{' and '.join(missing)} must be given too: {listed}, or none of them for the built-in task")

    def learning_rate_factor(self, step: int) -> float:
        """What the peak of a learning rate is multiplied by in step ``step``, from 0."""
        if step < self.lr_warmup_steps:
            return (step + 1) / self.lr_warmup_steps
        done = (step - self.lr_warmup_steps) / max(1, self.steps - self.lr_warmup_steps)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.lr_schedule]


@dataclass(kw_only=True)
class PolicyArguments(RunArguments):
    """Settings of the trainers that sample completions and learn from their rewards."""

    data: str | None = option(None, "JSON lines of prompts, with whatever else the rewards need (an answer, say)")
    reward: list[str] = option([], "module:function, file.py:function or a reward model, =weight if not 1; several are summed")  # noqa: RUF009
    eval_reward: list[str] = option([], "what scores held-out completions, if not the same")  # noqa: RUF009
    # Rollouts
    steps: int = option(500, "training steps; each samples, scores and learns from one batch")
    prompts_per_step: int = option(32, "prompts a step, over all processes")
    samples_per_prompt: int = option(8, "completions a prompt: the group")
    max_new_tokens: int = option(256, "longest completion")
    max_prompt_tokens: int | None = option(None, "longest prompt: longer ones are left out, and their number is said; by default none is")
    stop: list[str] = option([], "texts, or tokens of the tokenizer, that end a completion besides its end-of-sequence tokens")  # noqa: RUF009
    mask_truncated: bool = option(False, "leave completions that max_new_tokens cut off out of the losses; their rewards count otherwise as they are")
    temperature: float = option(1.0, "of sampling, and of the log-probs that are trained")
    top_k: int = option(0, "sample from the k likeliest tokens; 0: from all")
    top_p: float = option(1.0, "sample from the likeliest tokens of this total probability")
    rollout_batch_size: int | None = option(None, "completions sampled at once by each process; by default all")
    engine: str = option("generate", "what samples: generate, continuous, vllm, the URL of a vLLM server, module:Class or file.py:Class")
    engine_memory: float = option(0.3, "share of the GPU's memory for vllm")
    # Engine against policy
    rollout_correction: str = option(
        "none", "importance weights for the tokens of an engine that is not quite the policy", choices=("none", "truncate", "mask")
    )
    correction_level: str = option("token", "what a weight belongs to", choices=("token", "sequence"))
    correction_low: float | None = option(None, "least weight; truncate sets a lesser one to this, mask to 0")
    correction_high: float | None = option(3.0, "greatest weight; truncate sets a greater one to this, mask to 0; none: no bound")
    track_mismatch: bool = option(False, "report how the engine differs from the policy, even where rollout_correction is none")
    # Objective
    loss: str = option("ppo", "preset of rlkern.PolicyLossConfig")
    clip_low: float | None = option(None, "clip range below ratio 1; by default the preset's")
    clip_high: float | None = option(None, "clip range above ratio 1; by default the preset's")
    kl_coef: float = option(0.0, "weight of the KL divergence from the initial model, which is kept in memory only if this is not 0")
    track_kl: bool = option(False, "keep the initial model, and report the KL divergence from it, even where kl_coef is 0")
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    # Optimisation
    epochs: int = option(1, "passes over a batch")
    minibatches: int = option(1, "optimiser steps a pass")
    # Evaluation
    eval_samples: int = option(1, "completions for each held-out prompt")
    eval_temperature: float | None = option(None, "of sampling them; 0: always the likeliest token; by default temperature")
    save_completions: bool = option(False, "write every completion of training with its reward to completions.jsonl")
    success_reward: float = option(1.0, "a held-out completion with at least this reward counts as right in the accuracy")

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("prompts_per_step", "samples_per_prompt", "max_new_tokens", "epochs", "minibatches", "eval_samples")
        self.require("at least 1", lambda x: x >= 1, *counts)
        self.require("at least 1", lambda x: x is None or x >= 1, "rollout_batch_size", "max_prompt_tokens")
        self.require("texts that are not empty", all, "stop")
        self.require("at least 0", lambda x: 0 <= x < math.inf, "top_k")
        self.require("above 0", lambda x: 0 < x < math.inf, "temperature")
        self.require("above 0 and at most 1", lambda x: 0 < x <= 1, "top_p", "engine_memory")
        self.require("at least 0", lambda x: x is None or 0 <= x < math.inf, "correction_low", "correction_high", "eval_temperature")
        low, high = self.correction_low, self.correction_high
        if low is not None and high is not None and low > high:
            raise InputError(f"must be at most correction_high, {high}, got {low}", field="correction_low")
        if (low, high, self.correction_level) != (None, 3.0, "token") and self.rollout_correction == "none" and not self.track_mismatch:
            raise InputError("must be truncate or mask (or track_mismatch set) for what correction_... says to act", field="rollout_correction")
        if (self.loss, self.rollout_correction, self.correction_level) == ("vespo", "mask", "token"):
            why = "vespo multiplies the weights of a completion, so that one masked token would drop all of it"
            raise InputError(f"{why}: with mask, take the level of sequences", field="correction_level")
        self.all_or_none("model", "data", "reward")
        self.loss_config()  # checks the rest

    def loss_config(self, **options: Any) -> rk.PolicyLossConfig:
        """The objective: the preset with what was set here, and ``options``."""
        clips = {name: value for name in ("clip_low", "clip_high") if (value := getattr(self, name)) is not None}
        preset = getattr(rk.PolicyLossConfig, self.loss)
        try:
            return preset(**clips, entropy_coef=self.entropy_coef, max_length=self.max_new_tokens, **options)
        except ValueError as error:
            raise InputError(str(error)) from None
