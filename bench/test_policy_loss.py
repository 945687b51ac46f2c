"""GRPO's loss (clip at 0.2, k3 with 0.04), forward and backward: from log-probs, and from logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

import rlkern as rk
from bench import peers
from bench.harness import DEVICE, OURS, Contest, Replay
from rlkern import reference

GPU = DEVICE.type == "cuda"
CONFIG = rk.PolicyLossConfig.grpo(kl_coef=0.04, aggregation="token-mean")
FROM_LOGPROBS = [(512, 2048), (1024, 8192)] if GPU else [(64, 1024)]  # sequences, length
FROM_LOGITS = [(8, 1024, 128256), (8, 1024, 151936)] if GPU else [(4, 64, 32000)]  # sequences, length, vocabulary
PEERS_FROM_LOGPROBS = (OURS, "PyTorch", "PyTorch, torch.compile")
PEERS_FROM_LOGITS = (OURS, "log_softmax, gather, PyTorch loss", "rows one by one, PyTorch loss", "TRL, PyTorch loss", "Liger's Triton GRPO loss")


def rollouts(*shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, old, advantages a sequence, mask with a third of the tokens padded, ref)."""
    logprobs = -2 * torch.rand(shape, device=DEVICE)
    old, ref = (logprobs + 0.2 * torch.randn(shape, device=DEVICE) for _ in range(2))
    lengths = torch.randint(shape[1] // 3, shape[1] + 1, shape[:1], device=DEVICE)
    mask = torch.arange(shape[1], device=DEVICE) < lengths.unsqueeze(1)
    return logprobs, old, torch.randn(shape[0], device=DEVICE), mask, ref


@cache
def from_logprobs(*shape: int) -> Contest:
    torch.manual_seed(0)
    logprobs, old, advantages, mask, ref = rollouts(*shape)
    logprobs.requires_grad_()
    one = torch.ones((), device=DEVICE)

    def exact() -> list[Tensor]:
        lp = logprobs.detach().double().requires_grad_()
        loss, _ = reference.policy_loss(lp, old.double(), advantages.double(), mask=mask, ref_logprobs=ref.double(), config=CONFIG)
        return [loss, *torch.autograd.grad(loss, lp)]

    def ours() -> Tensor:
        return rk.policy_loss(logprobs, old, advantages, mask=mask, ref_logprobs=ref, config=CONFIG).loss

    def timed(loss: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        return peers.with_gradient(lambda: loss(logprobs, old, advantages.unsqueeze(1), mask, ref), [logprobs], [one])

    contenders = (
        lambda: peers.with_gradient(ours, [logprobs], [one]),
        lambda: timed(peers.clipped_loss),
        lambda: timed(peers.compiled(peers.clipped_loss)),
    )
    title = f"policy_loss from log-probs, {shape[0]} x {shape[1]}, float32"
    return Contest(title, exact, dict(zip(PEERS_FROM_LOGPROBS, contenders, strict=True)), tolerance=1e-5)


@cache
def from_logits(sequences: int, length: int, vocabulary: int) -> Contest:
    torch.manual_seed(0)
    _, _, advantages, mask, _ = rollouts(sequences, length)
    dtype = torch.bfloat16 if GPU else torch.float32
    # A model's logits have one position more than there are ids to score; the gradient of the last is 0.
    logits = (4 * torch.randn(sequences, length + 1, vocabulary, device=DEVICE)).to(dtype).requires_grad_()
    ids = torch.randint(vocabulary, (sequences, length), device=DEVICE)
    one = torch.ones((), device=DEVICE)
    with torch.no_grad():
        logprobs = rk.token_logprobs(logits[:, :-1], ids)
    old, ref = (logprobs + 0.2 * torch.randn_like(logprobs) for _ in range(2))

    def exact() -> list[Tensor]:
        lp = logprobs.double()
        x = logits.detach()[:, :-1]
        for b in range(sequences):
            lp[b] = reference.token_logprobs(x[b].double(), ids[b], with_entropy=True)[0]
        lp.requires_grad_()
        loss, _ = reference.policy_loss(lp, old.double(), advantages.double(), mask=mask, ref_logprobs=ref.double(), config=CONFIG)
        (upstream,) = torch.autograd.grad(loss, lp)
        gradient = torch.zeros_like(logits, dtype=torch.float64)
        for b in range(sequences):
            y = x[b].double().requires_grad_()
            gradient[b, :-1] = torch.autograd.grad(reference.token_logprobs(y, ids[b], with_entropy=True)[0], y, upstream[b])[0]
        return [loss.detach(), gradient]

    def timed(loss: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        return peers.with_gradient(lambda: loss(logits), [logits], [one])

    def ours(x: Tensor) -> Tensor:
        return rk.policy_loss(rk.token_logprobs(x[:, :-1], ids), old, advantages, mask=mask, ref_logprobs=ref, config=CONFIG).loss

    def after(logprobs: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: peers.clipped_loss(logprobs(x[:, :-1], ids), old, advantages.unsqueeze(1), mask, ref)

    contenders = (
        lambda: timed(ours),
        lambda: timed(after(peers.gather_logprobs)),
        lambda: timed(after(peers.rowwise_logprobs)),
        lambda: timed(after(peers.trl("selective_log_softmax"))),
        lambda: timed(lambda x: peers.liger_grpo_loss(x, ids, old, advantages, mask, ref)),
    )
    title = f"token_logprobs and policy_loss from logits, {sequences} x {length} x {vocabulary}, {str(dtype).removeprefix('torch.')}"
    return Contest(title, exact, dict(zip(PEERS_FROM_LOGITS, contenders, strict=True)), tolerance=5e-3 if GPU else 1e-5)


@pytest.mark.parametrize("contender", PEERS_FROM_LOGPROBS)
@pytest.mark.parametrize("shape", FROM_LOGPROBS, ids=str)
def test_from_logprobs(replay: Replay, shape: tuple[int, int], contender: str) -> None:
    replay(from_logprobs(*shape), contender)


@pytest.mark.parametrize("contender", PEERS_FROM_LOGITS)
@pytest.mark.parametrize("shape", FROM_LOGITS, ids=str)
def test_from_logits(replay: Replay, shape: tuple[int, int, int], contender: str) -> None:
    replay(from_logits(*shape), contender)
