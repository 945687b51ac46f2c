"""What a user would write without rlkern, and other libraries' functions where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import GPU_ONLY


def gather_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """The textbook: the whole log-softmax, of which one number a row is kept."""
    return F.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def gather_logprobs_and_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = F.log_softmax(logits, dim=-1)
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def rowwise_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """As trainers do to spare memory: logsumexp a row at a time, in the logits' dtype below float32."""
    if logits.dtype in (torch.float32, torch.float64):
        lse = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
        return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - lse
    rows = [F.log_softmax(row, dim=-1).gather(-1, i.unsqueeze(-1)).squeeze(-1) for row, i in zip(logits, ids, strict=True)]
    return torch.stack(rows)


def chunked_entropy(logits: Tensor, chunk: int = 128) -> Tensor:
    """Entropy over chunks of rows."""
    flat = logits.reshape(-1, logits.shape[-1])
    parts = []
    for rows in flat.split(chunk):
        logprobs = F.log_softmax(rows, dim=-1)
        parts.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(parts).view(logits.shape[:-1])


def clipped_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, ref: Tensor, clip: float = 0.2, kl_coef: float = 0.04) -> Tensor:
    """GRPO's loss with k3, averaged over the counted tokens."""
    ratio = torch.exp(logprobs - old)
    loss = -torch.min(ratio * advantages, torch.clamp(ratio, 1 - clip, 1 + clip) * advantages)
    loss = loss + kl_coef * (torch.exp(ref - logprobs) - (ref - logprobs) - 1)
    return (loss * mask).sum() / mask.sum()


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """PPO's loss of the critic, averaged over the counted tokens."""
    clipped = torch.clamp(values, old - clip, old + clip)
    return 0.5 * (torch.max((values - returns).square(), (clipped - returns).square()) * mask).sum() / mask.sum()


def loop_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The recursion, a step of all sequences at a time."""
    advantage = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(advantage)
    steps = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = delta + gamma * lam * advantage
        following = values[:, t]
        steps.append(advantage)
    advantages = torch.stack(steps[::-1], dim=1)
    return advantages, advantages + values


def on_gpu(device: torch.device) -> None:
    """For a peer that is a GPU's."""
    if device.type != "cuda":
        raise ImportError(GPU_ONLY)


def torchrl_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Callable[[], list[Tensor]]:
    """TorchRL's, as a convolution; it takes a trailing dimension, and the next values."""
    estimate = importlib.import_module("torchrl.objectives.value.functional").vec_generalized_advantage_estimate
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    columns = [x.unsqueeze(-1) for x in (values, following, rewards)]
    ends = torch.zeros_like(columns[0], dtype=torch.bool)

    def call() -> list[Tensor]:
        return [x.squeeze(-1) for x in estimate(gamma, lam, *columns, ends, ends)]

    return call


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """By torch.compile; on a GPU, since a CPU takes most of a minute to compile one of these."""
    on_gpu(device)
    return torch.compile(function)


def trl(name: str, module: str = "trl.trainer.utils") -> Any:
    """One of TRL's functions."""
    return getattr(importlib.import_module(module), name)


def flash_attention_logprobs(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Its fused cross-entropy of logits."""
    loss = importlib.import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
    on_gpu(device)
    return lambda logits, ids: -loss(logits, ids)[0]


def cut_cross_entropy_logprobs(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Apple's Cut Cross-Entropy, with its own choices of what gradients to drop."""
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    on_gpu(device)
    return lambda hidden, weight, ids: -loss(hidden, weight, ids, reduction="none")


def verl_logprobs(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """verl's fused head, which makes entropies too."""
    head = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    on_gpu(device)
    return lambda hidden, weight, ids: head(hidden, weight, ids)[0]


def liger_grpo_loss(device: torch.device) -> Callable[..., Tensor]:
    """(logits, ids, old, advantages, mask, ref) -> loss: Liger's Triton kernel; it wants a position more than there are ids, as a model gives."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    on_gpu(device)
    options = {"temperature": 1.0, "beta": 0.04, "eps_low": 0.2, "eps_high": 0.2, "inplace": False, "loss_type": "bnpo", "reduce": True}
    return lambda logits, ids, old, advantages, mask, ref: triton_grpo_loss(logits, old, ref, ids, advantages, completion_mask=mask, **options)[0]


def liger_linear_grpo_loss(rows: int) -> Callable[[Any], Tensor]:
    """Liger's chunked loss from hidden states, one sequence of one token each, so that every token may have its own advantage."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", chunk_size=max(1, rows // 4))

    def of(x: Any) -> Tensor:
        ids, mask, old = (t.unsqueeze(1) for t in (x.ids, x.mask, x.old))
        return loss(x.hidden.unsqueeze(1), x.weight, ids, mask, x.advantages, old_per_token_logps=old)[0]

    return of


def with_gradient(function: Callable[[], Any], wanted: Sequence[Tensor], upstream: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """The call to be timed: forward, backward with these upstream gradients, and both results."""

    def call() -> list[Tensor]:
        results = function()
        outputs = list(results) if isinstance(results, tuple) else [results]
        gradients = torch.autograd.grad(outputs, wanted, upstream[: len(outputs)])
        return [*outputs, *gradients]

    return call
