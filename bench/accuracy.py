"""Error against float64 arithmetic on the same numbers: log-prob, entropy and their gradients, at random and peaked as a trained policy's are.

:func:`measure` begins with logits, bfloat16 and float32; :func:`measure_head` with bfloat16 hidden states and head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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


def errors(contenders: Mapping[str, Callable[[], list[Tensor | None]]], exact: Mapping[str, Tensor | None]) -> list[dict[str, Any]]:
    """The largest differences of each contender's results, or why there are none."""
    table: list[dict[str, Any]] = []
    for name, call in contenders.items():
        try:
            results = call()
        except Exception as why:
            if name == OURS:
                raise
            table.append({"name": name, "missing": str(why) if isinstance(why, ImportError) else f"{type(why).__name__}: {why}"})
            continue
        found = {q: largest(r, e, relative=q.startswith("d ")) for (q, e), r in zip(exact.items(), results, strict=True) if e is not None}
        table.append({"name": name, "errors": found})
    return table


def contender(prepare: Callable[[], Function], logits: Tensor, ids: Tensor) -> list[Tensor | None]:
    return with_gradients(prepare(), logits, ids)


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
            prepared = {name: partial(contender, prepare, logits, ids) for name, prepare in contenders(device).items()}
            table = errors(prepared, dict(zip(QUANTITIES, exact, strict=True)))
            cases.append({"logits": kind, "dtype": str(dtype).removeprefix("torch."), "contenders": table})
    return {"shape": {"N": rows, "V": vocabulary}, "cases": cases}


# ---- from hidden states ---------------------------------------------------------------------------------------------------------------------

HEAD_QUANTITIES = ("logprob", "ratio", "entropy", "d hidden", "d head", "d hidden, entropy", "d head, entropy")
ONE_ROUNDING = "exact, rounded to bfloat16 once"
HeadFunction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def hidden_and_head(kind: str, rows: int, width: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """bfloat16. ``random``: logits spread 4 around 0. ``peaked``: a token of each row stands 20 above the others too."""
    weight = torch.randn(vocabulary, width, device=device).mul_(4 / width**0.5).bfloat16()
    hidden = torch.randn(rows, width, device=device)
    if kind == "peaked":
        at = weight[torch.randint(vocabulary, (rows,), device=device)].float()
        hidden += at * (20 / at.square().sum(-1, keepdim=True))
    return hidden.bfloat16(), weight


def exact_head(hidden: Tensor, weight: Tensor, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens drawn from the policy, and the exact results and gradients."""
    h, w = (t.double().requires_grad_() for t in (hidden, weight))
    logits = h @ w.t()
    with torch.no_grad():
        probabilities = torch.softmax(logits, -1).cpu()
        ids = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1).to(h.device)
    logprob, entropy = reference.token_logprobs(logits, ids, with_entropy=True)
    by_logprob = torch.autograd.grad(logprob.sum(), (h, w), retain_graph=True)
    by_entropy = torch.autograd.grad(entropy.sum(), (h, w))
    found = (logprob.detach(), torch.ones_like(logprob.detach()), entropy.detach(), *by_logprob, *by_entropy)
    return ids, dict(zip(HEAD_QUANTITIES, found, strict=True))


def eager_head(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return peers.gather_logprobs_and_entropy(F.linear(hidden, weight), ids)


def eager_head_upcast(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits are converted to float32, but were rounded before."""
    return peers.gather_logprobs_and_entropy(F.linear(hidden, weight).float(), ids)


def trl_head() -> HeadFunction:
    head = peers.trl("ChunkedLogProbFunction", "trl.kernels.chunked_logprob")

    def of(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logprob, entropy = head.apply(hidden, weight, None, ids, 1.0, 8192, None, 1.0, ("entropy",))[:2]
        return logprob, entropy

    return of


def trl_float32_head() -> HeadFunction:
    head = trl_head()
    return lambda hidden, weight, ids: head(hidden.float(), weight.float(), ids)


def liger_head() -> HeadFunction:
    """What its fused GRPO and PPO losses make of a chunk."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return lambda hidden, weight, ids: (LigerFusedLinearPPOBase.chunk_forward(hidden[:, None], weight, ids[:, None]).squeeze(1), None)


def cut_cross_entropy_head(device: torch.device) -> HeadFunction:
    logprobs = peers.cut_cross_entropy_logprobs(device)
    return lambda hidden, weight, ids: (logprobs(hidden, weight, ids), None)


def head_contenders(device: torch.device) -> dict[str, Callable[[], HeadFunction]]:
    def ours(hidden: Tensor, weight: Tensor, ids: Tensor, logits_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        logprob, entropy = rk.linear_token_logprobs(hidden, weight, ids, with_entropy=True, logits_dtype=logits_dtype)
        return logprob, entropy

    return {
        OURS: lambda: ours,
        "rlkern, bfloat16 logits": lambda: partial(ours, logits_dtype=torch.bfloat16),
        "PyTorch eager": lambda: eager_head,
        "PyTorch eager, logits then float32": lambda: eager_head_upcast,
        "TRL's head": trl_head,
        "TRL's head, cast_lm_head_to_fp32": trl_float32_head,
        "Liger's chunked head": liger_head,
        "Cut Cross-Entropy": lambda: cut_cross_entropy_head(device),
    }


def head_results(prepare: Callable[[], HeadFunction], hidden: Tensor, weight: Tensor, ids: Tensor, exact: Tensor) -> list[Tensor | None]:
    """The quantities of a contender; the ratio is against exact log-probs of the same policy, and would be 1."""
    h, w = (t.detach().requires_grad_() for t in (hidden, weight))
    logprob, entropy = prepare()(h, w, ids)
    found: list[Tensor | None] = [logprob.detach(), (logprob.detach().double() - exact).exp(), None if entropy is None else entropy.detach()]
    found += torch.autograd.grad(logprob.sum(), (h, w), retain_graph=True)
    return found + ([None, None] if entropy is None else list(torch.autograd.grad(entropy.sum(), (h, w))))


def measure_head(device: torch.device, *, full: bool) -> dict[str, Any]:
    """As :func:`measure`, of bfloat16 hidden states and head; ``ratio`` is how far exp(log-prob - exact log-prob) is from 1."""
    rows, vocabulary, widths = (64, 32000, (1024, 4096)) if full else (16, 8000, (256,))
    cases = []
    for width in widths:
        for kind in ("random", "peaked"):
            torch.manual_seed(0)
            hidden, weight = hidden_and_head(kind, rows, width, vocabulary, device)
            ids, exact = exact_head(hidden, weight, seed=0)
            calls: dict[str, Callable[[], list[Tensor | None]]] = {
                name: partial(head_results, prepare, hidden, weight, ids, exact["logprob"]) for name, prepare in head_contenders(device).items()
            }
            calls[ONE_ROUNDING] = lambda exact=exact: [x.bfloat16() if q.startswith("d ") else None for q, x in exact.items()]  # type: ignore[misc]
            cases.append({"H": width, "logits": kind, "contenders": errors(calls, exact)})
    return {"shape": {"N": rows, "V": vocabulary, "dtype": "bfloat16"}, "cases": cases}
