"""GRPO, from prompts and a reward function to a trained model.

Each step: sample a group of completions for each of a few prompts, score them, subtract the group's mean (no value network), and take a few
clipped gradient steps on the policy, held near the initial model by a KL penalty (DeepSeekMath, arXiv 2402.03300). Log-probs, advantages and the
objective are rlkern's: ``rk.linear_token_logprobs``, ``rk.group_advantages``, ``rk.fused_linear_policy_loss``. They start from the last hidden
states, so that training builds no logits. Any preset of ``rk.PolicyLossConfig`` can stand in for GRPO's.

The algorithm is in this file; what other trainers need too stands beside it: sampling, rewards, log-probs and evaluation in policy.py, the loop over
the steps with its log and its checkpoints in runs.py.

Left out, to keep it readable: sampling by a separate engine (vLLM, SGLang), sharded models (FSDP, DeepSpeed; data parallelism works), LoRA,
tools and several turns, asynchronous rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import rlkern as rk
from rlkern.trainers import runs, tutorial
from rlkern.trainers.arguments import option
from rlkern.trainers.policy import PolicyRun
from rlkern.trainers.settings import PolicyArguments

LOSSES = ("grpo", "dapo", "dr_grpo", "ppo", "gspo", "gspo_token", "luspo", "cispo", "sapo", "gmpo", "vespo", "dppo", "rloo", "reinforce")
METRICS = ("clip_fraction", "approx_kl", "kl", "entropy", "ratio_mean")


@dataclass(kw_only=True)
class GRPOArguments(PolicyArguments):
    """Settings of ``rlkern grpo``. Without model, data and reward, the built-in task of :mod:`rlkern.trainers.tutorial` is trained."""

    loss: str = option("grpo", "preset of rlkern.PolicyLossConfig", choices=LOSSES)
    kl_estimator: str = option("k3", "estimator of the KL divergence in the loss", choices=("k1", "abs", "k2", "k3", "k1+", "k3+"))
    advantage_baseline: str = option("mean", "what is subtracted from a reward", choices=("mean", "leave-one-out", "length-weighted"))
    advantage_scale: str = option("group", "whose standard deviation divides it", choices=("group", "batch", "none"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("at least 2: a group of one has nothing to be compared with", lambda x: x >= 2, "samples_per_prompt")

    def loss_config(self, **options: Any) -> rk.PolicyLossConfig:
        return super().loss_config(kl_coef=self.kl_coef, kl_estimator=self.kl_estimator, **options)


class GRPO(PolicyRun):
    """A run, and its training step."""

    name, title = "grpo", "GRPO"
    args: GRPOArguments

    def __init__(self, args: GRPOArguments):
        super().__init__(args)
        self.keep_settings()

    def step(self, step: int) -> dict[str, float]:
        args, accelerator, config = self.args, self.accelerator, self.args.loss_config()
        learning_rate = args.learning_rate * args.learning_rate_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        # 1. Sample a group of completions for each prompt; every process takes its share of the prompts.
        rows, batch, texts = self.rollout(step)
        lengths = batch.mask.sum(1)

        # 2. Score them. The advantage of a completion is how much better it is than its group.
        rewards, each = self.total_rewards(self.rewards, rows, texts)
        advantages = rk.group_advantages(
            accelerator.gather(rewards),
            group_size=args.samples_per_prompt,
            baseline=args.advantage_baseline,
            scale=args.advantage_scale,
            lengths=accelerator.gather(lengths),
        )[self.rank * len(rows) : (self.rank + 1) * len(rows)]

        # 3. Log-probs of what was sampled: under the policy before it moves (not needed if it moves only once), and under the reference.
        updates = args.epochs * args.minibatches
        old = self.frozen_logprobs(self.policy, batch) if updates > 1 else None
        ref = self.frozen_logprobs(self.reference, batch) if self.reference is not None else None

        # 4. A few clipped gradient steps on the batch.
        losses, norms, sums = [], [], []
        for _ in range(args.epochs):
            for minibatch in torch.randperm(len(rows)).to(self.device).chunk(args.minibatches):
                normalizer = self.normalizer(lengths[minibatch], config.aggregation)
                parts = minibatch.split(args.micro_batch_size or len(rows))
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
                norms.append(self.descend(self.policy, self.optimizer))

        # 5. Report.
        spread = rewards.view(self.prompts_here, -1).std(1)
        own = {"reward": rewards.mean(), "reward_std": spread.mean(), "equal_groups": (spread == 0).float().mean()}
        own |= {"completion_tokens": lengths.float().mean(), **{name: rewards.new_tensor(mean) for name, mean in each.items()}}
        means = accelerator.reduce(torch.stack(list(own.values())), "mean")
        totals = accelerator.reduce(torch.cat([torch.stack(sums).sum(0), torch.stack([torch.stack(losses).sum(), lengths.sum()])]), "sum").tolist()
        numbers = dict(zip(own, means.tolist(), strict=True))
        numbers |= {name: total / (totals[-1] * args.epochs) for name, total in zip(METRICS, totals, strict=False)}
        if ref is None:
            del numbers["kl"]
        return numbers | {"loss": totals[-2] / updates, "grad_norm": torch.stack(norms).mean().item(), "learning_rate": learning_rate}


def train(args: GRPOArguments) -> dict[str, Any]:
    """The whole run; gives what summary.json holds. InputError where what the user gave cannot be used."""
    return runs.train(GRPO, args)


def main(argv: Sequence[str]) -> None:
    """``rlkern grpo``."""
    inputs = ("model", "data", "reward")
    runs.command(GRPO, GRPOArguments, argv, train, description=str(__doc__), built_in=tutorial.SETTINGS, given_by_user=inputs)
