"""Logits to log-probs of the chosen tokens, and their entropies: forward and backward."""

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
CASES = [
    # rows, vocabulary, dtype, entropy
    *([(8192, v, torch.bfloat16, e) for v in (32000, 128256, 151936) for e in (False, True)] if GPU else []),
    *([] if GPU else [(256, 32000, torch.float32, False), (256, 32000, torch.float32, True), (256, 32000, torch.bfloat16, True)]),
]
CONTENDERS = (OURS, "log_softmax, gather", "rows one by one, entropy in chunks", "TRL", "log_softmax, gather, torch.compile")


@cache
def contest(rows: int, vocabulary: int, dtype: torch.dtype, entropy: bool) -> Contest:
    torch.manual_seed(0)
    logits = (4 * torch.randn(rows, vocabulary, device=DEVICE)).to(dtype).requires_grad_()
    ids = torch.randint(vocabulary, (rows,), device=DEVICE)
    upstream = [torch.randn(rows, device=DEVICE) for _ in range(1 + entropy)]

    def exact() -> list[Tensor]:
        parts = []
        for x, i, *grads in zip(*(t.split(512) for t in (logits.detach(), ids, *upstream)), strict=True):
            y = x.double().requires_grad_()
            results = reference.token_logprobs(y, i, with_entropy=True)[: 1 + entropy]
            parts.append([*(r.detach() for r in results), *torch.autograd.grad(results, y, [g.double() for g in grads])])
        return [torch.cat(p) for p in zip(*parts, strict=True)]

    def timed(function: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]) -> Callable[[], list[Tensor]]:
        return peers.with_gradient(lambda: function(logits, ids), [logits], upstream)

    def rowwise(logits: Tensor, ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logprobs = peers.rowwise_logprobs(logits, ids)
        return (logprobs, peers.chunked_entropy(logits)) if entropy else logprobs

    textbook = peers.gather_logprobs_and_entropy if entropy else peers.gather_logprobs
    return Contest(
        title=f"token_logprobs{' and entropy' * entropy}, {rows} x {vocabulary}, {str(dtype).removeprefix('torch.')}",
        exact=exact,
        contenders=dict(
            zip(
                CONTENDERS,
                (
                    lambda: timed(rk.token_logprobs if not entropy else lambda x, i: rk.token_logprobs(x, i, with_entropy=True)),
                    lambda: timed(textbook),
                    lambda: timed(rowwise),
                    lambda: timed(peers.trl("selective_log_softmax_and_entropy" if entropy else "selective_log_softmax")),
                    lambda: timed(peers.compiled(textbook)),
                ),
                strict=True,
            )
        ),
        tolerance=5e-3 if dtype == torch.bfloat16 else 1e-5,  # the gradient is rounded to the dtype of the logits
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(x).removeprefix("torch.") for x in c))
def test_token_logprobs(replay: Replay, case: tuple[int, int, torch.dtype, bool], contender: str) -> None:
    replay(contest(*case), contender)
