"""Logits to log-probs of the chosen tokens, and their entropies: forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import rlkern as rk
from bench import peers
from bench.harness import OURS, Call, Contest, Prepare
from rlkern import reference


class Inputs(NamedTuple):
    logits: Tensor  # [N, V]
    ids: Tensor
    upstream: list[Tensor]  # of log-probs, and of entropies where those are wanted


def contest(device: torch.device, rows: int, vocabulary: int, dtype: torch.dtype, *, entropy: bool) -> Contest:
    every = max(1, rows // 64)

    def inputs() -> Inputs:
        torch.manual_seed(0)
        logits = torch.randn(rows, vocabulary, device=device, dtype=dtype).mul_(4).requires_grad_()
        ids = torch.randint(vocabulary, (rows,), device=device)
        return Inputs(logits, ids, [torch.randn(rows, device=device) for _ in range(1 + entropy)])

    def exact(x: Inputs) -> list[Tensor]:
        logits = x.logits.detach()[::every].double().requires_grad_()
        results = reference.token_logprobs(logits, x.ids[::every], with_entropy=True)[: 1 + entropy]
        return [*(r.detach() for r in results), *torch.autograd.grad(results, logits, [g[::every].double() for g in x.upstream])]

    def timed(function: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]) -> Prepare:
        def prepare(x: Inputs) -> Call:
            return peers.with_gradient(lambda: function(x.logits, x.ids), [x.logits], x.upstream)

        return prepare

    def late(function: Callable[[], Callable[..., Tensor]]) -> Prepare:
        """Of a function that may not be there."""
        return lambda x: timed(function())(x)

    def ours(logits: Tensor, ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return rk.token_logprobs(logits, ids, with_entropy=True) if entropy else rk.token_logprobs(logits, ids)

    def rowwise(logits: Tensor, ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logprobs = peers.rowwise_logprobs(logits, ids)
        return (logprobs, peers.chunked_entropy(logits)) if entropy else logprobs

    textbook = peers.gather_logprobs_and_entropy if entropy else peers.gather_logprobs
    contenders = {
        OURS: timed(ours),
        "log_softmax, gather": timed(textbook),
        "rows one by one, entropy in chunks": timed(rowwise),
        "log_softmax, gather, torch.compile": late(lambda: peers.compiled(textbook, device)),
        "TRL": late(lambda: peers.trl("selective_log_softmax_and_entropy" if entropy else "selective_log_softmax")),
    }
    if not entropy:
        contenders["flash-attention's cross-entropy"] = late(lambda: peers.flash_attention_logprobs(device))
    return Contest(
        "token_logprobs and entropy" if entropy else "token_logprobs",
        {"N": rows, "V": vocabulary, "dtype": str(dtype).removeprefix("torch.")},
        device,
        inputs,
        exact,
        contenders,
        tolerance=5e-3 if dtype == torch.bfloat16 else 1e-5,  # the gradient is rounded to the dtype of the logits
        bytes=3 * rows * vocabulary * dtype.itemsize,  # the logits twice, since the gradient is wanted after all statistics are known
        every=every,
    )


def contests(device: torch.device, full: bool) -> Iterator[Contest]:
    if device.type == "cuda":
        bf16 = torch.bfloat16
        vocabularies = (32000, 128256, 151936, 262144)
        yield from (contest(device, 8192, v, bf16, entropy=e) for e in (True, False) for v in vocabularies)
        if full:
            yield from (contest(device, n, 128256, bf16, entropy=True) for n in (1024, 2048, 4096, 16384, 32768, 65536))
            yield contest(device, 8192, 128256, torch.float32, entropy=True)
        return
    rows, fp32 = (512 if full else 64), torch.float32
    yield from (contest(device, rows, v, fp32, entropy=True) for v in (8000, 16000, 32000, 64000, *([128256] if full else [])))
    yield from (contest(device, n, 32000, fp32, entropy=True) for n in (rows // 4, rows // 2, rows * 2))
    yield contest(device, rows, 32000, fp32, entropy=False)
    yield contest(device, rows, 32000, torch.bfloat16, entropy=True)
