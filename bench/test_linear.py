"""From hidden states and the head to GRPO's loss (clip at 0.2, mean over tokens), forward and backward, with a trained and with a frozen head."""

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
CONFIG = rk.PolicyLossConfig.ppo()
SHAPE = (8192, 4096, 128256) if GPU else (2048, 1024, 32000)  # tokens, hidden, vocabulary
FROZEN, HALF = "rlkern, frozen head", "rlkern, half the rows masked"
CONTENDERS = (
    OURS,
    "the three products alone",
    "log_softmax, gather, entropy in chunks",
    "TRL's eager path",
    "TRL's chunked head",
    "Liger's fused linear GRPO",
    FROZEN,
    HALF,
)


@cache
def contest() -> Contest:
    torch.manual_seed(0)
    rows, width, vocabulary = SHAPE
    dtype = torch.bfloat16 if GPU else torch.float32
    hidden = torch.randn(rows, width, device=DEVICE).to(dtype).requires_grad_()
    weight = (2 / width**0.5 * torch.randn(vocabulary, width, device=DEVICE)).to(dtype).requires_grad_()
    ids = torch.randint(vocabulary, (rows,), device=DEVICE)
    advantages = torch.randn(rows, device=DEVICE)
    mask = torch.ones(rows, device=DEVICE)
    with torch.no_grad():
        old = rk.linear_token_logprobs(hidden, weight, ids)
        assert isinstance(old, Tensor)
        old = old + 0.02 * torch.randn(rows, device=DEVICE)  # a first minibatch: few tokens are clipped

    def exact() -> list[Tensor]:
        loss, dh, dw = torch.zeros((), dtype=torch.float64, device=DEVICE), [], torch.zeros(vocabulary, width, dtype=torch.float64, device=DEVICE)
        w = weight.detach().double()
        for h, i, o, a in zip(*(t.split(512) for t in (hidden.detach(), ids, old, advantages)), strict=True):
            h = h.double().requires_grad_()
            logits = (h.detach() @ w.t()).requires_grad_()
            lp = reference.token_logprobs(logits, i)
            assert isinstance(lp, Tensor)
            part, _ = reference.policy_loss(lp, o.double(), a.double(), normalizer=float(rows), config=CONFIG)
            (g,) = torch.autograd.grad(part, logits)
            loss += part.detach()
            dh.append(g @ w)
            dw += g.t() @ h.detach()
        return [loss, torch.cat(dh), dw]

    answer = cache(exact)
    one = torch.ones((), device=DEVICE)

    def timed(loss: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        return peers.with_gradient(loss, [hidden, weight], [one])

    def ours() -> Tensor:
        return rk.fused_linear_policy_loss(hidden, weight, ids, old, advantages, config=CONFIG).loss

    def eager() -> Tensor:
        logits = hidden @ weight.t()
        with torch.no_grad():  # the metric that trainers log
            peers.chunked_entropy(logits)
        return peers.clipped_loss(peers.gather_logprobs(logits, ids), old, advantages, mask, old, kl_coef=0.0)

    def trl_eager() -> Callable[[], list[Tensor]]:
        logprobs, entropy = peers.trl("selective_log_softmax"), peers.trl("entropy_from_logits")

        def loss() -> Tensor:  # as its GRPO trainer called them before it had a chunked head: a model scores one position too many
            states = torch.cat([hidden.view(8, -1, width), hidden.new_zeros(8, 1, width)], dim=1)
            logits = (states @ weight.t())[:, :-1] / 1.0
            with torch.no_grad():
                entropy(logits)
            return peers.clipped_loss(logprobs(logits, ids.view(8, -1)).flatten(), old, advantages, mask, old, kl_coef=0.0)

        return timed(loss)

    def trl_chunked() -> Callable[[], list[Tensor]]:
        head = peers.trl("ChunkedLogProbFunction", "trl.kernels.chunked_logprob")

        def loss() -> Tensor:
            logprobs = head.apply(hidden, weight, None, ids, 1.0, 8192, None, 1.0, ("entropy",))[0]
            return peers.clipped_loss(logprobs, old, advantages, mask, old, kl_coef=0.0)

        return timed(loss)

    def products() -> list[Tensor]:
        with torch.no_grad():
            logits = hidden @ weight.t()
            logits @ weight, logits.t() @ hidden
        return answer()  # nothing to be judged: it is the floor

    def frozen() -> list[Tensor]:
        loss = rk.fused_linear_policy_loss(hidden, weight.detach(), ids, old, advantages, config=CONFIG).loss
        return [loss, *torch.autograd.grad(loss, hidden), answer()[2]]

    half = torch.arange(rows, device=DEVICE) % 2 == 0

    def masked() -> list[Tensor]:
        loss = rk.fused_linear_policy_loss(hidden, weight, ids, old, advantages, mask=half, compact=True, config=CONFIG).loss
        torch.autograd.grad(loss, [hidden, weight])
        return answer()  # another loss than the others'

    contenders = (
        lambda: timed(ours),
        lambda: products,
        lambda: timed(eager),
        trl_eager,
        trl_chunked,
        lambda: timed(peers.liger_linear_grpo_loss(hidden, weight, ids, old, advantages, mask)),
        lambda: frozen,
        lambda: masked,
    )
    title = f"fused_linear_policy_loss, {rows} x {width} x {vocabulary}, {str(dtype).removeprefix('torch.')}"
    return Contest(title, answer, dict(zip(CONTENDERS, contenders, strict=True)), tolerance=2e-2 if GPU else 1e-4)


@pytest.mark.parametrize("contender", CONTENDERS)
def test_fused_linear_policy_loss(replay: Replay, contender: str) -> None:
    replay(contest(), contender)
