"""GRPO, from prompts and a reward function to a trained model.

Each step: sample a group of completions for each of a few prompts, score them, subtract the group's mean (no value network), and take a few
clipped gradient steps on the policy, held near the initial model by a KL penalty (DeepSeekMath, arXiv 2402.03300). Log-probs, advantages and the
objective are rlkern's: ``rk.linear_token_logprobs``, ``rk.group_advantages``, ``rk.fused_linear_policy_loss``. They start from the last hidden
states, so that training builds no logits. Any preset of ``rk.PolicyLossConfig`` can stand in for GRPO's. Of the same paper: rewards of single steps
(``process_reward``), and iterative GRPO (``refresh_every``), in rounds after which the reference, and with a ``judge`` the reward model, is renewed.

The algorithm is in this file; what other trainers need too stands beside it: sampling, rewards, log-probs and evaluation in policy.py, the loop over
the steps with its log and its checkpoints in runs.py.

Left out, to keep it readable: DeepSpeed (data parallelism and FSDP2 work), tools and several turns, asynchronous rollouts. What samples is
behind the seam in engines.py; where it is not quite the policy, importance weights correct for it (``rollout_correction``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

import rlkern as rk
from rlkern.trainers import runs, tutorial
from rlkern.trainers.arguments import option
from rlkern.trainers.data import Row
from rlkern.trainers.errors import InputError
from rlkern.trainers.policy import PolicyRun
from rlkern.trainers.reward import OnlineRewardModel
from rlkern.trainers.rewards import RewardModel, load_rewards, score_steps, steps_of
from rlkern.trainers.rollout import Completions
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
    # Process supervision
    process_reward: str | None = option(None, "module:function or file.py:function that scores every step; advantages then come from these alone")
    step_separator: str = option("\n", "what ends a step of a completion")
    # Iterative GRPO
    refresh_every: int = option(0, "steps in a round, at whose end reference and reward model are refreshed; 0: they stay what they are")
    judge: list[str] = option([], "what compares completions at the end of a round, for the reward model to learn from; named as reward")  # noqa: RUF009
    judge_updates: int = option(20, "gradient steps on the reward model a round")
    judge_learning_rate: float = option(1e-5, "of the reward model's AdamW")
    judge_replay: float = option(0.1, "share of preferences of earlier rounds in what it learns from")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("at least 2: a group of one has nothing to be compared with", lambda x: x >= 2, "samples_per_prompt")
        self.require("at least 0", lambda x: x >= 0, "refresh_every")
        self.require("at least 1", lambda x: x >= 1, "judge_updates")
        self.require("above 0", lambda x: 0 < x < math.inf, "judge_learning_rate")
        self.require("at least 0 and at most 1", lambda x: 0 <= x <= 1, "judge_replay")
        self.require("some text", bool, "step_separator")
        if self.refresh_every and not (self.kl_coef or self.track_kl or self.judge):
            raise InputError("there is nothing to refresh: neither a reference (kl_coef, track_kl) nor a judge", field="refresh_every")
        if self.refresh_every and self.lora_rank and (self.kl_coef or self.track_kl):
            raise InputError("with LoRA the reference is the model without its adapter, which cannot be refreshed", field="refresh_every")
        if self.judge and not self.refresh_every:
            raise InputError("a judge is asked every refresh_every steps, which is 0", field="judge")

    def loss_config(self, **options: Any) -> rk.PolicyLossConfig:
        return super().loss_config(kl_coef=self.kl_coef, kl_estimator=self.kl_estimator, **options)


class GRPO(PolicyRun):
    """A run, and its training step."""

    name, title = "grpo", "GRPO"
    args: GRPOArguments

    def __init__(self, args: GRPOArguments):
        super().__init__(args)
        kinds = [*self.rows[:1], *self.held_out[:1]]
        self.process_reward = None
        if args.process_reward:
            if "steps" in self.rows[0].fields:
                raise InputError(f"{self.rows[0].place}: field 'steps': the name is taken, process rewards are called with the steps of a completion")
            with_steps = [row._replace(fields={**row.fields, "steps": []}) for row in kinds]
            (self.process_reward,) = load_rewards([args.process_reward], with_steps, field="process_reward")
        self.online = None
        if args.judge:
            learners = [reward.function for reward in self.rewards if isinstance(reward.function, RewardModel)]
            if len(learners) != 1:
                raise InputError(f"a judge teaches the one reward model of reward, which names {len(learners)}", field="judge")
            judge = self.load_rewards(args.judge, kinds, field="judge")
            self.online = OnlineRewardModel(learners[0], judge, learning_rate=args.judge_learning_rate, replay=args.judge_replay)
        if args.refresh_every:
            if self.sharded:
                raise InputError(
                    "must be 0 where FSDP shards the models: what a round refreshes would be no part of a checkpoint", field="refresh_every"
                )
            self.accelerator.register_for_checkpointing(*(state for state in (self.reference, self.online) if state is not None))
        self.keep_settings()

    def process_advantages(self, rows: Sequence[Row], batch: Completions, texts: Sequence[str]) -> tuple[Tensor, float]:
        """Of each token, the sum of the normalised rewards of the steps that end at or after it, [N, T]; and a step's mean reward, of all."""
        assert self.process_reward is not None
        steps = [steps_of(text, self.args.step_separator) for text in texts]
        scores = score_steps(self.process_reward, rows, texts, steps)
        most = max(map(len, steps))
        ends = [self.sample.step_ends(*one) for one in zip(batch.ids, batch.mask, steps, strict=True)]
        padded_scores = torch.tensor([each + [0.0] * (most - len(each)) for each in scores], device=self.device)
        padded_ends = torch.tensor([each + [-1] * (most - len(each)) for each in ends], device=self.device)
        advantages = rk.process_advantages(padded_scores, padded_ends, batch.mask.shape[1], group_size=self.args.samples_per_prompt)
        return advantages, self.moments(padded_scores, padded_ends >= 0)[0]

    def refresh(self, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, float]:
        """The end of a round: the policy becomes the reference, and the reward model learns from what the judge says of ``texts``."""
        if self.reference is not None:
            self.reference.model.load_state_dict(self.model.state_dict())
        if self.online is None:
            return {}
        pairs = gather_object(self.online.compare(rows, texts, self.args.samples_per_prompt))
        random.seed(repr(pairs))  # alike in all processes
        return self.online.learn(pairs, self.args.judge_updates, self.args.prompts_per_step)

    def step(self, step: int) -> dict[str, float]:
        args, accelerator, config = self.args, self.accelerator, self.args.loss_config()
        learning_rate = self.set_learning_rate(self.optimizer, args.learning_rate, step)

        # 1. Sample a group of completions for each prompt; every process takes its share of the prompts.
        rows, batch, texts = self.rollout(step)
        lengths, ended = batch.mask.sum(1), self.sample.ended(batch)

        # 2. Score them. The advantage of a completion is how much better it is than its group.
        rewards, each = self.total_rewards(self.rewards, rows, texts)
        self.record(step, rows, texts, rewards, ended)
        advantages = rk.group_advantages(
            rewards,
            group_size=args.samples_per_prompt,
            baseline=args.advantage_baseline,
            scale=args.advantage_scale,
            lengths=lengths,
            process_group=self.everyone,
        )
        own = {"reward": rewards.mean(), **{name: rewards.new_tensor(mean) for name, mean in each.items()}}
        if self.process_reward is not None:
            advantages, mean = self.process_advantages(rows, batch, texts)

        # 3. Log-probs of what was sampled: under the policy before it moves (if it moves more than once, or the engine's are held against them), and
        # under the reference.
        updates = args.epochs * args.minibatches
        old = self.frozen_logprobs(self.policy, batch) if updates > 1 or batch.logprobs is not None else None
        weights, mismatch = self.mismatch(batch, old)
        ref = self.frozen_logprobs(self.reference, batch) if self.reference is not None else None

        # 4. A few clipped gradient steps on the batch.
        learned = batch._replace(mask=batch.mask * ended[:, None]) if args.mask_truncated else batch
        tokens = learned.mask.sum(1)
        losses, norms, sums = [], [], []
        for _ in range(args.epochs):
            for parts in self.minibatches(len(rows)):
                normalizer = self.normalizer(tokens[torch.cat(parts)], config.aggregation)
                for part in parts:
                    with nullcontext() if part is parts[-1] else accelerator.no_sync(self.policy):
                        out = rk.fused_linear_policy_loss(
                            **self.scored(self.policy, learned.rows(part)),
                            old_logprobs=None if old is None else old[part],
                            advantages=advantages[part],
                            ref_logprobs=None if ref is None else ref[part],
                            importance_weights=None if weights is None else weights[part],
                            normalizer=normalizer,
                            config=config,
                        )
                        self.backward(out.loss, len(part) / sum(map(len, parts)))
                    self.watch_ratio(out.logprobs, None if old is None else old[part], learned.mask[part])
                    losses.append(out.loss.detach())
                    sums.append(torch.stack([out.metrics[name] for name in METRICS]) * tokens[part].sum())
                norms += self.descend((self.policy, self.optimizer))

        # 5. Report.
        spread = rewards.view(-1, args.samples_per_prompt).std(1)
        own |= {"reward_std": spread.mean(), "equal_groups": (spread == 0).float().mean(), "completion_tokens": lengths.float().mean()}
        own["truncated"] = (~ended).float().mean()
        totals = accelerator.reduce(torch.cat([torch.stack(sums).sum(0), torch.stack([torch.stack(losses).sum(), tokens.sum()])]), "sum").tolist()
        numbers = self.means(own, self.weight) | ({} if self.process_reward is None else {"process_reward": mean})
        numbers |= {name: total / (max(1, totals[-1]) * args.epochs) for name, total in zip(METRICS, totals, strict=False)}
        if ref is None:
            del numbers["kl"]
        numbers |= mismatch | self.first_ratio(step) | self.balance_of(updates)
        if args.refresh_every and (step + 1) % args.refresh_every == 0:
            numbers |= self.refresh(rows, texts)
        return numbers | {"loss": totals[-2] / updates, "grad_norm": torch.stack(norms).mean().item(), "learning_rate": learning_rate}


def train(args: GRPOArguments) -> dict[str, Any]:
    """The whole run; gives what summary.json holds. InputError where what the user gave cannot be used."""
    return runs.train(GRPO, args)


def main(argv: Sequence[str]) -> None:
    """``rlkern grpo``."""
    inputs = ("model", "data", "reward")
    runs.command(GRPO, GRPOArguments, argv, train, description=str(__doc__), built_in=tutorial.SETTINGS, given_by_user=inputs)
