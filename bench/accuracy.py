"""Error against float64 of log-prob, entropy and their gradients: bfloat16 and float32, logits at random and peaked as a trained policy's are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlkern as rk
from bench import peers
from bench.harness import OURS
from rlkern import reference

QUANTITIES = ("logprob", "entropy", "d logprob", "d entropy")
Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def logits_of(kind: str, rows: int, vocabulary: int, device: torch.device) -> Tensor:
    """``random``: spread 4 around 20. ``peaked``: one logit 20 above the others too, so that its probability is nearly 1."""
    logits = 20 + 4 * torch.randn(rows, vocabulary, device=device)
    if kind == "peaked":
        logits[torch.arange(rows, device=device), torch.randint(vocabulary, (rows,), device=device)] += 20
    return logits


def upcast(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return peers.gather_logprobs_and_entropy(logits.float(), ids)


def rowwise(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return peers.rowwise_logprobs(logits, ids), peers.chunked_entropy(logits)


def trl_eager() -> Function:
    logprobs, entropy = peers.trl("selective_log_softmax"), peers.trl("entropy_from_logits")
    return lambda logits, ids: (logprobs(logits, ids), entropy(logits))


def contenders(device: torch.device) -> dict[str, Callable[[], Function]]:
    def flash_attention() -> Function:
        logprobs = peers.flash_attention_logprobs(device)
        return lambda logits, ids: (logprobs(logits, ids), None)

    return {
        OURS: lambda: lambda logits, ids: rk.token_logprobs(logits, ids, with_entropy=True),
        "log_softmax, gather": lambda: peers.gather_logprobs_and_entropy,
        "log_softmax, gather, in float32": lambda: upcast,
        "rows one by one, entropy in chunks": lambda: rowwise,
        "TRL's eager path": trl_eager,
        "TRL's fused": lambda: peers.trl("selective_log_softmax_and_entropy"),
        "flash-attention's cross-entropy": flash_attention,
    }


def with_gradients(function: Function, logits: Tensor, ids: Tensor) -> list[Tensor | None]:
    x = logits.detach().requires_grad_()
    results = function(x, ids)
    gradients = [None if r is None else torch.autograd.grad(r.sum(), x, retain_graph=True)[0] for r in results]
    return [*(None if r is None else r.detach() for r in results), *gradients]


def largest(x: Tensor | None, exact: Tensor, *, relative: bool) -> float | None:
    if x is None:
        return None
    difference = float((x.double() - exact).abs().max())
    return difference / float(exact.abs().max()) if relative else difference


def measure(device: torch.device, *, full: bool) -> dict[str, Any]:
    """Largest differences over all rows: of log-probs and entropies in nats, of gradients as a part of the largest entry."""
    rows, vocabulary = (512, 128256) if full and device.type == "cuda" else (128, 32000)
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        for kind in ("random", "peaked"):
            torch.manual_seed(0)
            logits = logits_of(kind, rows, vocabulary, device).to(dtype)
            drawn = torch.randint(vocabulary, (rows,), device=device)
            ids = torch.where(torch.arange(rows, device=device) % 2 == 0, logits.argmax(-1), drawn)  # a policy's own tokens are mostly likely ones
            exact = with_gradients(lambda x, i: reference.token_logprobs(x, i, with_entropy=True), logits.double(), ids)  # type: ignore[arg-type,return-value]
            table: list[dict[str, Any]] = []
            for name, prepare in contenders(device).items():
                try:
                    results = with_gradients(prepare(), logits, ids)
                except Exception as why:
                    if name == OURS:
                        raise
                    table.append({"name": name, "missing": str(why) if isinstance(why, ImportError) else f"{type(why).__name__}: {why}"})
                    continue
                errors = {q: largest(r, e, relative=q.startswith("d ")) for q, r, e in zip(QUANTITIES, results, exact, strict=True) if e is not None}
                table.append({"name": name, "errors": errors})
            cases.append({"logits": kind, "dtype": str(dtype).removeprefix("torch."), "contenders": table})
    return {"shape": {"N": rows, "V": vocabulary}, "cases": cases}
