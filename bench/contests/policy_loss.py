"""GRPO's loss (clip at 0.2, k3 with 0.04), forward and backward: from log-probs, and from logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import rlkern as rk
from bench import peers
from bench.harness import OURS, Call, Contest, Prepare
from rlkern import reference

CONFIG = rk.PolicyLossConfig.grpo(kl_coef=0.04, aggregation="token-mean")


class Tokens(NamedTuple):
    """``[G, T]``, and advantages ``[G]``."""

    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor  # a third of the tokens are padding
    ref: Tensor


def tokens_of(logprobs: Tensor) -> Tokens:
    device = logprobs.device
    old, ref = (logprobs + 0.2 * torch.randn_like(logprobs) for _ in range(2))
    sequences, length = logprobs.shape
    lengths = torch.randint(length // 3, length + 1, (sequences, 1), device=device)
    return Tokens(logprobs, old, torch.randn(sequences, device=device), torch.arange(length, device=device) < lengths, ref)


def exact_loss(t: Tokens) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d logprobs) in float64."""
    lp = t.logprobs.detach().double().requires_grad_()
    loss, _ = reference.policy_loss(lp, t.old.double(), t.advantages.double(), mask=t.mask, ref_logprobs=t.ref.double(), config=CONFIG)
    return loss.detach(), torch.autograd.grad(loss, lp)[0]


def from_logprobs(device: torch.device, sequences: int, length: int) -> Contest:
    def inputs() -> Tokens:
        torch.manual_seed(0)
        tokens = tokens_of(-2 * torch.rand(sequences, length, device=device))
        tokens.logprobs.requires_grad_()
        return tokens

    def ours(t: Tokens, with_metrics: bool = False) -> Tensor:  # the others make no metrics
        return rk.policy_loss(t.logprobs, t.old, t.advantages, mask=t.mask, ref_logprobs=t.ref, config=CONFIG, with_metrics=with_metrics).loss

    def timed(function: Callable[[], Callable[[Tokens], Tensor]]) -> Prepare:
        def prepare(t: Tokens) -> Call:
            loss = function()
            return peers.with_gradient(lambda: loss(t), [t.logprobs], [torch.ones((), device=device)])

        return prepare

    def plain(clipped_loss: Callable[..., Tensor]) -> Callable[[Tokens], Tensor]:
        return lambda t: clipped_loss(t.logprobs, t.old, t.advantages.unsqueeze(1), t.mask, t.ref)

    return Contest(
        "policy_loss",
        {"G": sequences, "T": length, "dtype": "float32"},
        device,
        inputs,
        exact_loss,
        {
            OURS: timed(lambda: ours),
            "rlkern, with metrics": timed(lambda: partial(ours, with_metrics=True)),
            "PyTorch": timed(lambda: plain(peers.clipped_loss)),
            "PyTorch, torch.compile": timed(lambda: plain(peers.compiled(peers.clipped_loss, device))),
        },
        tolerance=1e-5,
        bytes=17 * sequences * length,  # three numbers and a byte of mask read, one number written
    )


class Logits(NamedTuple):
    logits: Tensor  # [G, T + 1, V]: a model's logits have one position more than there are ids to score; the gradient of the last is 0
    ids: Tensor
    tokens: Tokens


def past_the_end(x: Tensor) -> Tensor:
    """With the last position of a model's logits, which scores nothing: masked there, all of the logits go in. A slice of them would have its
    gradient copied into one of the whole."""
    return F.pad(x, (0, 1), value=-100 if x.dtype == torch.int64 else 0)


def from_logits(device: torch.device, sequences: int, length: int, vocabulary: int, dtype: torch.dtype) -> Contest:
    every = max(1, sequences // 4)

    def inputs() -> Logits:
        torch.manual_seed(0)
        logits = torch.randn(sequences, length + 1, vocabulary, device=device, dtype=dtype).mul_(4)
        ids = torch.randint(vocabulary, (sequences, length), device=device)
        logprobs = rk.token_logprobs(logits[:, :-1], ids)
        assert isinstance(logprobs, Tensor)
        return Logits(logits.requires_grad_(), ids, tokens_of(logprobs))

    def exact(x: Logits) -> list[Tensor]:
        lp = x.tokens.logprobs.double()
        states = x.logits.detach()[:, :-1]
        for b in range(sequences):
            lp[b] = reference.token_logprobs(states[b].double(), x.ids[b], with_entropy=True)[0]
        loss, upstream = exact_loss(x.tokens._replace(logprobs=lp))
        gradients = []
        for b in range(0, sequences, every):
            y = states[b].double().requires_grad_()
            (g,) = torch.autograd.grad(reference.token_logprobs(y, x.ids[b], with_entropy=True)[0], y, upstream[b])
            gradients.append(torch.cat([g, torch.zeros_like(g[:1])]))
        return [loss, torch.stack(gradients)]

    def timed(function: Callable[[], Callable[[Logits], Tensor]]) -> Prepare:
        def prepare(x: Logits) -> Call:
            loss = function()
            return peers.with_gradient(lambda: loss(x), [x.logits], [torch.ones((), device=device)])

        return prepare

    def ours(x: Logits) -> Tensor:
        t = x.tokens
        lp = rk.token_logprobs(x.logits, past_the_end(x.ids))
        assert isinstance(lp, Tensor)
        lp = lp[:, :-1]
        return rk.policy_loss(lp, t.old, t.advantages, mask=t.mask, ref_logprobs=t.ref, config=CONFIG).loss

    def fused(x: Logits) -> Tensor:
        t = x.tokens
        ids, old, mask, ref = map(past_the_end, (x.ids, t.old, t.mask, t.ref))
        options = {"mask": mask, "ref_logprobs": ref, "config": CONFIG, "with_entropy": False, "with_metrics": False}
        return rk.fused_policy_loss(x.logits, ids, old, t.advantages, **options).loss  # type: ignore[arg-type]

    def after(logprobs: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Logits], Tensor]:
        def loss(x: Logits) -> Tensor:
            t = x.tokens
            return peers.clipped_loss(logprobs(x.logits[:, :-1], x.ids), t.old, t.advantages.unsqueeze(1), t.mask, t.ref)

        return loss

    def liger() -> Callable[[Logits], Tensor]:
        loss = peers.liger_grpo_loss(device)
        return lambda x: loss(x.logits, x.ids, x.tokens.old, x.tokens.advantages, x.tokens.mask, x.tokens.ref)

    return Contest(
        "fused_policy_loss",
        {"G": sequences, "T": length, "V": vocabulary, "dtype": str(dtype).removeprefix("torch.")},
        device,
        inputs,
        exact,
        {
            OURS: timed(lambda: fused),
            "rlkern, token_logprobs and policy_loss": timed(lambda: ours),
            "log_softmax, gather, PyTorch loss": timed(lambda: after(peers.gather_logprobs)),
            "rows one by one, PyTorch loss": timed(lambda: after(peers.rowwise_logprobs)),
            "log_softmax, gather, PyTorch loss, torch.compile": timed(lambda: peers.compiled(after(peers.gather_logprobs), device)),
            "TRL, PyTorch loss": timed(lambda: after(peers.trl("selective_log_softmax"))),
            "Liger's Triton GRPO loss": timed(liger),
        },
        tolerance=5e-3 if dtype == torch.bfloat16 else 1e-5,
        bytes=2 * sequences * length * vocabulary * dtype.itemsize,  # read and, in the same launch, written
        every=every,
    )


def contests_from_logprobs(device: torch.device, full: bool) -> Iterator[Contest]:
    if device.type == "cuda":
        shapes = [(512, 2048), (1024, 8192)]
        shapes += [(512, 512), (512, 8192), (128, 2048), (2048, 2048)] if full else []
    else:
        shapes = [(64, 256), (64, 1024), (64, 4096), (16, 1024), (256, 1024)]
        shapes += [(64, 16384), (1024, 1024)] if full else []
    yield from (from_logprobs(device, *shape) for shape in shapes)


def contests_from_logits(device: torch.device, full: bool) -> Iterator[Contest]:
    if device.type == "cuda":
        vocabularies = (32000, 128256, 151936, 262144) if full else (128256, 151936)
        yield from (from_logits(device, 8, 1024, v, torch.bfloat16) for v in vocabularies)
        return
    yield from (from_logits(device, 4, length, 32000, torch.float32) for length in ((64, 256) if full else (32,)))
