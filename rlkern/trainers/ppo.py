"""PPO with a critic, as RLHF has it: from prompts and a reward model or function to a trained model.

Each step: sample completions, score them, and take from the rewards, token by token, the KL divergence from the initial model; estimate by a critic
how much better each token was than expected (GAE), whiten that, and take a few clipped gradient steps on the policy and on the critic (PPO, arXiv
1707.06347; for language models Ziegler et al., arXiv 1909.08593, and InstructGPT, arXiv 2203.02155). The parts are rlkern's: log-probs and policy
loss from the last hidden states, so that training builds no logits (``rk.linear_token_logprobs``, ``rk.fused_linear_policy_loss``),
``rk.shaped_rewards``, ``rk.gae``, ``rk.whiten``, ``rk.value_loss``.

The algorithm is in this file; what other trainers need too stands beside it: sampling, rewards, log-probs and evaluation in policy.py, the loop over
the steps with its log and its checkpoints in runs.py.

Left out, to keep it readable: DeepSpeed (data parallelism and FSDP2 work), a trunk that policy and critic share, tools and several turns,
asynchronous rollouts. What samples is behind the seam in engines.py; where it is not quite the policy, importance weights correct for it
(``rollout_correction``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import rlkern as rk
from rlkern.trainers import runs, tutorial
from rlkern.trainers.arguments import option
from rlkern.trainers.errors import InputError
from rlkern.trainers.loading import load_scorer, load_tokenizer
from rlkern.trainers.policy import PolicyRun
from rlkern.trainers.rollout import Completions, positions_of, vocabulary_of
from rlkern.trainers.settings import PolicyArguments

POLICY_METRICS = ("clip_fraction", "approx_kl", "entropy", "ratio_mean")


@dataclass(kw_only=True)
class PPOArguments(PolicyArguments):
    """Settings of ``rlkern ppo``. Without model, data and reward, the built-in task of :mod:`rlkern.trainers.tutorial` is trained."""

    prompts_per_step: int = option(64, "prompts a step, over all processes")
    samples_per_prompt: int = option(1, "completions a prompt")
    epochs: int = option(4, "passes over a batch")
    # Objective
    loss: str = option("ppo", "preset of rlkern.PolicyLossConfig", choices=("ppo", "dapo", "cispo", "sapo", "dppo", "reinforce"))
    kl_coef: float = option(0.05, "weight of the KL divergence from the initial model in the rewards; at first, with kl_target")
    kl_estimator: str = option("k1", "estimator of that KL", choices=("k1", "abs", "k2", "k3"))
    kl_target: float | None = option(None, "adapt kl_coef so that the KL, in nats a token, comes to this")
    kl_horizon: int = option(10000, "completions in which kl_coef may about double or halve")
    truncated: str | None = option(
        None,
        "what a completion that max_new_tokens cut off gets: the critic's value of what was to follow, or its score; without a critic: score",
        choices=("bootstrap", "score"),
    )
    gamma: float = option(1.0, "discount of a token")
    lam: float = option(0.95, "of GAE: 0 trusts the critic, 1 the rewards")
    whiten: bool = option(True, "scale the advantages of a batch to mean 0 and standard deviation 1")
    # Critic
    baseline: str = option("critic", "what is subtracted from the returns; none: no critic, and lam does not act", choices=("critic", "none"))
    critic: str | None = option(None, "what the critic starts from, a reward model, say: directory or name; by default the model with a new head")
    critic_learning_rate: float | None = option(None, "of the critic's AdamW, at its peak; by default learning_rate")
    value_clip: float | None = option(0.2, "how far an update may move a value; none: no clip")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("at least 0 and at most 1", lambda x: 0 <= x <= 1, "gamma", "lam")
        self.require("at least 0", lambda x: 0 <= x < math.inf, "kl_coef")
        self.require("at least 1", lambda x: x >= 1, "kl_horizon")
        self.require("above 0", lambda x: x is None or 0 < x < math.inf, "kl_target", "critic_learning_rate", "value_clip")
        if self.kl_target is not None and self.kl_coef == 0:
            raise InputError("kl_target adapts kl_coef, which must be above 0 to start from", field="kl_target")
        if self.baseline == "none" and self.truncated == "bootstrap":
            raise InputError("without a critic there is no value to bootstrap from", field="truncated")


class Critic(nn.Module):
    """The value of every state by a sequence-classification model with one output, [batch, time], float32. Parameters are the model's own."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        if not isinstance(getattr(model, "score", None), nn.Linear):
            raise InputError(f"{name}: {type(model).__name__} has no linear head `score` over its states; expected a decoder", field="critic")
        self.model: Any = model
        self._no_split_modules = model._no_split_modules  # by which accelerate finds the layers to shard

    def forward(self, **inputs: Any) -> Tensor:
        return self.model.score(self.model.base_model(**inputs).last_hidden_state).squeeze(-1).float()


class KLController:
    """The coefficient of the KL divergence, fixed or drawn towards a target (Ziegler et al., section 2.2). Part of a checkpoint."""

    def __init__(self, coef: float, target: float | None, horizon: int):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, completions: int) -> None:
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= max(0.0, 1 + error * completions / self.horizon)

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


class Experience(NamedTuple):
    """What a step learns from: completions, and of each of their tokens [N, T]:"""

    batch: Completions
    old: Tensor  #: log-prob under the policy, before it moves
    values: Tensor  #: the critic's, of the state before it
    advantages: Tensor
    returns: Tensor
    weights: Tensor | None = None  #: importance weight, with rollout_correction

    def rows(self, index: Tensor) -> Experience:
        return Experience._make([self.batch.rows(index), *(None if x is None else x[index] for x in self[1:])])


class PPO(PolicyRun):
    """A run, and its training step."""

    name, title = "ppo", "PPO"
    args: PPOArguments

    def __init__(self, args: PPOArguments):
        super().__init__(args)
        args, source = self.args, self.args.critic or self.args.model
        assert source is not None
        self.critic: Any = None
        self.critic_optimizer: Any = None
        if args.baseline == "critic":
            model = load_scorer(source, getattr(torch, args.dtype), self.sample.tokenizer, field="critic" if args.critic else "model")
            if args.critic:
                self.check_critic(model, args.critic)
            critic = Critic(model, source)
            self.ready(model, field="critic" if args.critic else "model")
            optimizer = self.adamw(critic, args.critic_learning_rate or args.learning_rate)
            self.critic, self.critic_optimizer = self.accelerator.prepare(critic, optimizer)
        self.kl = KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        self.accelerator.register_for_checkpointing(self.kl)
        self.keep_settings()

    def check_critic(self, model: Any, name: str) -> None:
        """InputError where a critic of its own cannot read what the policy reads: it gets the same token ids, at the same positions."""
        known = vocabulary_of(model)
        if known < min(self.sample.vocabulary, len(self.sample.tokenizer)):
            raise InputError(f"{name} knows {known} tokens, the policy's tokenizer has {len(self.sample.tokenizer)}", field="critic")
        if Path(name).is_dir() and any(Path(name).glob("*token*")):
            other = load_tokenizer(name, field="critic").get_vocab()
            mine = self.sample.tokenizer.get_vocab()
            if different := [token for token, i in mine.items() if i < self.sample.vocabulary and other.get(token) != i]:
                raise InputError(f"{name} has another tokenizer than the policy: of {different[0]!r}, for one", field="critic")
        longest, needed = positions_of(model), self.sample.sampling.max_length
        if longest is not None and needed > longest:
            raise InputError(f"{name} reads {longest} tokens, but prompts and completions have up to {needed}", field="critic")

    def values(self, batch: Completions) -> Tensor:
        """The critic's value of the state before each token of the completions, and of that after the last: [N, T + 1]."""
        return self.critic(**self.inputs(batch))[:, -batch.mask.shape[1] - 1 :]

    def experience(self, batch: Completions, rewards: Tensor, ended: Tensor) -> tuple[Experience, Tensor]:
        """Log-probs, values, rewards per token and advantages of what was sampled, of which some ``ended`` [N]; and the KL divergence from the
        initial model, [N, T]."""
        args, mask = self.args, batch.mask
        old = self.frozen_logprobs(self.policy, batch)
        ref = self.frozen_logprobs(self.reference, batch) if self.reference is not None else old
        values = self.frozen(self.values, batch) if self.critic is not None else old.new_zeros(len(old), old.shape[1] + 1)

        # The score belongs to the last token. A completion that was cut off has not earned it yet: what the critic expects stands in for it.
        bootstrap = self.critic is not None and args.truncated != "score"
        scores = rewards.where(ended, 0.0) if bootstrap else rewards
        shaped = rk.shaped_rewards(scores, old, ref, mask=mask, kl_coef=self.kl.coef, kl_estimator=args.kl_estimator)
        last = (mask.cumsum(1) == mask.sum(1, keepdim=True)) & (mask != 0)
        cut = last & ~ended[:, None] & bootstrap
        values, next_values = values[:, :-1], values[:, 1:]
        lam = args.lam if self.critic is not None else 1.0
        advantages, returns = rk.gae(
            shaped, values, gamma=args.gamma, lam=lam, mask=mask, next_values=next_values, truncated=cut, terminated=last & ~cut
        )
        if args.whiten:
            advantages = rk.whiten(advantages, mask, process_group=self.everyone)
        return Experience(batch, old, values, advantages, returns), rk.kl_penalty(old, ref, args.kl_estimator, mask=mask)

    def losses(self, now: Experience, tokens: Tensor, normalizer: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Add the gradients of the policy's and the critic's loss to theirs; both losses, and metrics summed over the tokens.

        ``share``: of this process's minibatch.
        """
        out = rk.fused_linear_policy_loss(
            **self.scored(self.policy, now.batch),
            old_logprobs=now.old,
            advantages=now.advantages,
            importance_weights=now.weights,
            normalizer=normalizer,
            config=self.args.loss_config(),
        )
        self.backward(out.loss, share)
        self.watch_ratio(out.logprobs, now.old, now.batch.mask)
        losses, metrics = [out.loss.detach()], [out.metrics[name] for name in POLICY_METRICS]
        if self.critic is not None:
            values = self.values(now.batch)[:, :-1]
            fit = rk.value_loss(values, now.values, now.returns, mask=now.batch.mask, clip_range=self.args.value_clip, normalizer=tokens)
            self.backward(fit.loss, share)
            losses.append(fit.loss.detach())
            metrics.append(fit.metrics["clip_fraction"])
        return torch.stack(losses), torch.stack(metrics) * now.batch.mask.sum()

    def step(self, step: int) -> dict[str, float]:
        args, accelerator = self.args, self.accelerator
        learning_rate = self.set_learning_rate(self.optimizer, args.learning_rate, step)
        trained = {"grad_norm": (self.policy, self.optimizer)}
        if self.critic is not None:
            self.set_learning_rate(self.critic_optimizer, args.critic_learning_rate or args.learning_rate, step)
            trained["critic_grad_norm"] = self.critic, self.critic_optimizer

        # 1. Sample completions and score them; every process takes its share of the prompts.
        rows, batch, texts = self.rollout(step)
        rewards, each = self.total_rewards(self.rewards, rows, texts)
        lengths, ended = batch.mask.sum(1), self.sample.ended(batch)
        self.record(step, rows, texts, rewards, ended)

        # 2. Compare each token with what the critic expected.
        if args.mask_truncated:
            batch = batch._replace(mask=batch.mask * ended[:, None])
        tokens_of = batch.mask.sum(1)
        experience, kl = self.experience(batch, rewards, ended)
        weights, mismatch = self.mismatch(batch, experience.old)
        experience = experience._replace(weights=weights)

        # 3. A few clipped gradient steps, on the policy and on the critic.
        losses: list[Tensor] = []
        sums: list[Tensor] = []
        norms: dict[str, list[Tensor]] = {name: [] for name in trained}
        for _ in range(args.epochs):
            for parts in self.minibatches(len(rows)):
                minibatch = tokens_of[torch.cat(parts)]
                tokens = self.normalizer(minibatch, "token-mean")
                normalizer = self.normalizer(minibatch, args.loss_config().aggregation)
                for part in parts:
                    with ExitStack() as stack:
                        for model, _ in trained.values() if part is not parts[-1] else ():
                            stack.enter_context(accelerator.no_sync(model))
                        loss, metrics = self.losses(experience.rows(part), tokens, normalizer, len(part) / len(minibatch))
                    losses.append(loss)
                    sums.append(metrics)
                for name, norm in zip(trained, self.descend(*trained.values()), strict=True):
                    norms[name].append(norm)

        # 4. Report.
        own = {"reward": rewards.mean(), "completion_tokens": lengths.float().mean(), "truncated": (~ended).float().mean()}
        own |= {name: rewards.new_tensor(mean) for name, mean in each.items()}
        numbers = self.means(own, self.weight) | {"reward_std": self.moments(rewards, torch.ones_like(rewards))[1] ** 0.5}
        numbers["return"], spread = self.moments(experience.returns, batch.mask)
        if self.critic is not None:
            unexplained = self.moments(experience.returns - experience.values, batch.mask)[1]
            numbers["explained_variance"] = 1 - unexplained / spread if spread > 0 else 0.0
        if self.reference is not None:
            numbers["kl"] = self.moments(kl, batch.mask)[0]
        updates = args.epochs * args.minibatches
        totals = accelerator.reduce(torch.stack(sums).sum(0) / accelerator.reduce(tokens_of.sum() * args.epochs, "sum").clamp(min=1), "sum").tolist()
        numbers |= dict(zip((*POLICY_METRICS, "value_clip_fraction"), totals, strict=False))
        numbers |= dict(zip(("loss", "value_loss"), (accelerator.reduce(torch.stack(losses).sum(0), "sum") / updates).tolist(), strict=False))
        numbers |= {name: torch.stack(of).mean().item() for name, of in norms.items()}
        numbers |= mismatch | self.first_ratio(step) | self.balance_of(updates) | {"kl_coef": self.kl.coef, "learning_rate": learning_rate}
        unseen = args.mask_truncated and numbers["truncated"] == 1
        if self.reference is not None and not unseen:
            self.kl.update(numbers["kl"], args.prompts_per_step * args.samples_per_prompt)
        if unseen or (numbers["truncated"] == 1 and self.critic is not None and args.truncated != "score"):
            tqdm.write(f"step {step + 1}: every completion was cut off at max_new_tokens, so that no reward was learned from")
        return numbers

    def save(self) -> None:
        super().save()
        if self.critic is not None:
            self.save_pretrained(self.accelerator.unwrap_model(self.critic).model, self.sample.tokenizer, "critic")


def train(args: PPOArguments) -> dict[str, Any]:
    """The whole run; gives what summary.json holds. InputError where what the user gave cannot be used."""
    return runs.train(PPO, args)


def main(argv: Sequence[str]) -> None:
    """``rlkern ppo``."""
    inputs = ("model", "data", "reward")
    runs.command(PPO, PPOArguments, argv, train, description=str(__doc__), built_in=tutorial.PPO_SETTINGS, given_by_user=inputs)
