"""From hidden states and the head: to GRPO's loss (clip at 0.2, mean over tokens) and its gradients, and to log-probs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import rlkern as rk
from bench import peers
from bench.harness import OURS, Call, Contest, Prepare
from rlkern import reference

CONFIG = rk.PolicyLossConfig.ppo()
SEQUENCES, GROUP = 8, 4


class Inputs(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    ids: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor


def rollout_mask(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(mask, advantages) ``[N]`` of 8 sequences in two groups, as RL has them: a quarter is prompt, ends differ, and one group was all right."""
    length = rows // SEQUENCES
    at = torch.arange(length, device=device)
    ends = length // 2 + torch.randint(length // 2, (SEQUENCES, 1), generator=torch.Generator().manual_seed(0)).to(device)
    mask = (at >= length // 4) & (at < ends)
    advantages = rk.group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0] + GROUP * [1.0], device=device), group_size=GROUP)
    return mask.flatten(), advantages.repeat_interleave(length)


def dense_mask(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.ones(rows, dtype=torch.bool, device=device), torch.randn(rows, device=device)


def make(device: torch.device, rows: int, width: int, vocabulary: int, dtype: torch.dtype, *, frozen: bool, rollouts: bool) -> Inputs:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, device=device, dtype=dtype).mul_(2 / width**0.5).requires_grad_(not frozen)
    ids = torch.randint(vocabulary, (rows,), device=device)
    mask, advantages = (rollout_mask if rollouts else dense_mask)(rows, device)
    with torch.no_grad():
        old = rk.linear_token_logprobs(hidden, weight, ids)
    assert isinstance(old, Tensor)
    return Inputs(hidden, weight, ids, old + 0.02 * torch.randn(rows, device=device), advantages, mask)  # a first minibatch: few tokens are clipped


def exact_logprobs(x: Inputs) -> Iterator[tuple[Tensor, Tensor, Tensor, slice]]:
    """(hidden states, logits, log-probs, rows) in float64, a chunk at a time; the logits want a gradient."""
    weight = x.weight.detach().double()
    for begin in range(0, x.ids.numel(), 512):
        rows = slice(begin, begin + 512)
        hidden = x.hidden.detach()[rows].double()
        logits = (hidden @ weight.t()).requires_grad_()
        logprobs = reference.token_logprobs(logits, x.ids[rows])
        assert isinstance(logprobs, Tensor)
        yield hidden, logits, logprobs, rows


def exact_loss(x: Inputs) -> list[Tensor]:
    """Loss and gradients of hidden states and, if it wants one, of the head."""
    weight = x.weight.detach().double()
    loss, d_hidden = torch.zeros((), dtype=torch.float64, device=weight.device), []
    d_weight = torch.zeros_like(weight) if x.weight.requires_grad else None
    for hidden, logits, lp, rows in exact_logprobs(x):
        options = {"mask": x.mask[rows], "normalizer": x.mask.sum(), "config": CONFIG}
        part, _ = reference.policy_loss(lp, x.old[rows].double(), x.advantages[rows].double(), **options)  # type: ignore[arg-type]
        (g,) = torch.autograd.grad(part, logits)
        loss += part.detach()
        d_hidden.append(g @ weight)
        if d_weight is not None:
            d_weight += g.t() @ hidden
    return [loss, torch.cat(d_hidden), *([] if d_weight is None else [d_weight])]


LogprobsOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, ids)


def logits_at_once(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    with torch.no_grad():  # the metric that trainers log
        peers.chunked_entropy(logits)
    return peers.gather_logprobs(logits, ids)


def trl_eager() -> LogprobsOf:
    """As its GRPO trainer did before it had a chunked head: a model scores one position too many."""
    logprobs, entropy = peers.trl("selective_log_softmax"), peers.trl("entropy_from_logits")

    def of(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        width = hidden.shape[-1]
        states = torch.cat([hidden.view(SEQUENCES, -1, width), hidden.new_zeros(SEQUENCES, 1, width)], dim=1)
        logits = (states @ weight.t())[:, :-1] / 1.0
        with torch.no_grad():
            entropy(logits)
        return logprobs(logits, ids.view(SEQUENCES, -1)).flatten()

    return of


def trl_chunked() -> LogprobsOf:
    head = peers.trl("ChunkedLogProbFunction", "trl.kernels.chunked_logprob")
    return lambda hidden, weight, ids: head.apply(hidden, weight, None, ids, 1.0, 8192, None, 1.0, ("entropy",))[0]


def logprob_peers(device: torch.device) -> dict[str, Callable[[], LogprobsOf]]:
    """What makes log-probs of hidden states."""
    return {
        "log_softmax, gather, entropy in chunks": lambda: logits_at_once,
        "log_softmax, gather, entropy in chunks, torch.compile": lambda: peers.compiled(logits_at_once, device),
        "TRL's eager path": trl_eager,
        "TRL's chunked head": trl_chunked,
        "Cut Cross-Entropy": lambda: peers.cut_cross_entropy_logprobs(device),
        "verl's linear_cross_entropy": lambda: peers.verl_logprobs(device),
    }


def loss_contest(
    device: torch.device, rows: int, width: int, vocabulary: int, dtype: torch.dtype, *, frozen: bool = False, rollouts: bool = False
) -> Contest:
    """``frozen``: the head needs no gradient (LoRA). ``rollouts``: masked and without advantage as RL's batches are; else every row counts."""

    def timed(function: Callable[[], Callable[[Inputs], Tensor]]) -> Prepare:
        def prepare(x: Inputs) -> Call:
            loss = function()
            return peers.with_gradient(lambda: loss(x), [x.hidden] if frozen else [x.hidden, x.weight], [torch.ones((), device=device)])

        return prepare

    def ours(x: Inputs, *, compact: bool | None = True if rollouts else None, mode: Literal["recompute"] | None = None) -> Tensor:
        tokens = (x.hidden, x.weight, x.ids, x.old, x.advantages)
        return rk.fused_linear_policy_loss(*tokens, mask=x.mask, compact=compact, mode=mode, config=CONFIG).loss

    def clipped(logprobs: LogprobsOf, x: Inputs) -> Tensor:
        return peers.clipped_loss(logprobs(x.hidden, x.weight, x.ids), x.old, x.advantages, x.mask, x.old, kl_coef=0.0)

    def selected(x: Inputs) -> Tensor:
        """What a careful user does: masked rows never reach the head."""
        y = Inputs(x.hidden[x.mask], x.weight, *(t[x.mask] for t in x[2:]))
        return clipped(logits_at_once, y)

    def products(x: Inputs) -> Call:
        def call() -> None:
            with torch.no_grad():
                logits = x.hidden @ x.weight.t()
                logits @ x.weight
                if not frozen:
                    logits.t() @ x.hidden

        return call

    contenders: dict[str, Prepare] = {OURS: timed(lambda: ours)}
    if rollouts:
        contenders["rlkern, every row computed"] = timed(lambda: partial(ours, compact=False))
        contenders["log_softmax, gather, masked rows left out"] = timed(lambda: selected)
    else:
        contenders["the matrix products alone"] = products
        if device.type == "cuda":
            contenders["rlkern, logits made twice"] = timed(lambda: partial(ours, mode="recompute"))
    contenders |= {name: timed(lambda function=function: partial(clipped, function())) for name, function in logprob_peers(device).items()}  # type: ignore[misc]
    contenders["Liger's fused linear GRPO"] = timed(lambda: peers.liger_linear_grpo_loss(rows))
    shape: dict[str, int | str] = {"N": rows, "H": width, "V": vocabulary, "dtype": str(dtype).removeprefix("torch.")}
    shape |= {"head": "frozen"} if frozen else {}
    needed = rows
    if rollouts:
        mask, advantages = rollout_mask(rows, torch.device("cpu"))
        needed = int((mask & (advantages != 0)).sum())
        shape["mask"] = f"{int(mask.sum()) / rows:.0%} counted, {needed / rows:.0%} with an advantage"
    size = (2 * rows + (1 if frozen else 2) * vocabulary) * width * dtype.itemsize
    return Contest(
        "fused_linear_policy_loss",
        shape,
        device,
        partial(make, device, rows, width, vocabulary, dtype, frozen=frozen, rollouts=rollouts),
        exact_loss,
        contenders,
        tolerance=2e-2 if dtype == torch.bfloat16 else 1e-4,
        bytes=size,
        flops=(4 if frozen else 6) * needed * width * vocabulary,
    )


def logprobs_contest(device: torch.device, rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> Contest:
    """Without gradient, as old and reference log-probs are made."""

    def exact(x: Inputs) -> list[Tensor]:
        return [torch.cat([lp.detach() for _, _, lp, _ in exact_logprobs(x)])]

    def ours(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return rk.linear_token_logprobs(hidden, weight, ids, with_entropy=True)[0]

    def timed(function: Callable[[], LogprobsOf]) -> Prepare:
        def prepare(x: Inputs) -> Call:
            logprobs = function()

            def call() -> list[Tensor]:
                with torch.no_grad():
                    return [logprobs(x.hidden, x.weight, x.ids)]

            return call

        return prepare

    return Contest(
        "linear_token_logprobs",
        {"N": rows, "H": width, "V": vocabulary, "dtype": str(dtype).removeprefix("torch.")},
        device,
        partial(make, device, rows, width, vocabulary, dtype, frozen=False, rollouts=False),
        exact,
        {OURS: timed(lambda: ours)} | {name: timed(function) for name, function in logprob_peers(device).items()},
        tolerance=2e-2 if dtype == torch.bfloat16 else 1e-5,
        bytes=(rows + vocabulary) * width * dtype.itemsize,
        flops=2 * rows * width * vocabulary,
    )


def loss_contests(device: torch.device, full: bool) -> Iterator[Contest]:
    if device.type == "cuda":
        bf16 = torch.bfloat16
        # Llama 3 8B, Qwen 2.5 7B, Gemma 3 12B
        models = [(4096, 128256), (3584, 151936), (3840, 262144)]
        yield from (loss_contest(device, 8192, h, v, bf16) for h, v in models)
        yield from (loss_contest(device, 8192, 4096, 128256, bf16, **options) for options in ({"frozen": True}, {"rollouts": True}))
        if full:
            yield from (loss_contest(device, n, 4096, 128256, bf16) for n in (1024, 2048, 4096, 16384, 32768, 65536))
            yield from (loss_contest(device, 8192, h, 128256, bf16) for h in (1024, 2048, 8192))
            yield from (loss_contest(device, 8192, 4096, v, bf16) for v in (32000, 64000, 256000))
        return
    fp32 = torch.float32
    rows, width, vocabulary = (2048, 1024, 32000) if full else (256, 512, 16000)
    yield loss_contest(device, rows, width, vocabulary, fp32)
    rows //= 2 if full else 1
    yield loss_contest(device, rows, width, vocabulary, fp32, frozen=True)
    yield loss_contest(device, rows, width, vocabulary, fp32, rollouts=True)
    rows, width, vocabulary = (256, 512, 16384) if full else (128, 256, 8192)
    yield loss_contest(device, rows, width, vocabulary, fp32)
    for k in (1, 2, 8, 16) if full else (1, 2, 8):  # quarters
        yield loss_contest(device, rows * k // 4, width, vocabulary, fp32)
        yield loss_contest(device, rows, width * k // 4, vocabulary, fp32)
        yield loss_contest(device, rows, width, vocabulary * k // 4, fp32)


def logprobs_contests(device: torch.device, full: bool) -> Iterator[Contest]:
    if device.type == "cuda":
        yield from (logprobs_contest(device, 8192, h, v, torch.bfloat16) for h, v in ((4096, 128256), (3584, 151936)))
        return
    yield logprobs_contest(device, *((2048, 1024, 32000) if full else (256, 512, 16000)), torch.float32)
