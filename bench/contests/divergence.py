"""Two logits tensors to full KL and JSD of each token: forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import rlkern as rk
from bench import peers
from bench.harness import OURS, Call, Contest, Prepare
from rlkern import reference


def textbook(logits: Tensor, ref_logits: Tensor, beta: float) -> Tensor:
    """GKD's loss, in float32."""
    student, teacher = (F.log_softmax(x.float(), dim=-1) for x in (logits, ref_logits))
    if beta == 1:
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    from_teacher, from_student = (F.kl_div(mixture, x, reduction="none", log_target=True).sum(-1) for x in (teacher, student))
    return beta * from_teacher + (1 - beta) * from_student


class Inputs(NamedTuple):
    logits: Tensor  # [N, V]
    ref_logits: Tensor
    upstream: Tensor


def contest(device: torch.device, rows: int, vocabulary: int, dtype: torch.dtype, beta: float) -> Contest:
    """``beta``: 1 is KL(policy || ref)."""
    every = max(1, rows // 64)

    def inputs() -> Inputs:
        torch.manual_seed(0)
        logits = torch.randn(rows, vocabulary, device=device, dtype=dtype).mul_(4)
        return Inputs(logits.requires_grad_(), logits.detach() + torch.randn_like(logits), torch.randn(rows, device=device))

    def exact(x: Inputs) -> list[Tensor]:
        logits = x.logits.detach()[::every].double().requires_grad_()
        result = reference.generalized_jsd(logits, x.ref_logits[::every].double(), beta=beta)
        return [result.detach(), *torch.autograd.grad(result, logits, x.upstream[::every].double())]

    def timed(function: Callable[[], Callable[..., Tensor]]) -> Prepare:
        def prepare(x: Inputs) -> Call:
            divergence = function()
            return peers.with_gradient(lambda: divergence(x.logits, x.ref_logits, beta=beta), [x.logits], [x.upstream])

        return prepare

    reads = 2 if beta == 1 else 3  # a mixture is known only when both sums are
    return Contest(
        "full_kl" if beta == 1 else f"generalized_jsd, beta {beta}",
        {"N": rows, "V": vocabulary, "dtype": str(dtype).removeprefix("torch.")},
        device,
        inputs,
        exact,
        {
            OURS: timed(lambda: rk.generalized_jsd),
            "log_softmax, kl_div": timed(lambda: textbook),
            "log_softmax, kl_div, torch.compile": timed(lambda: peers.compiled(textbook, device)),
        },
        tolerance=5e-3 if dtype == torch.bfloat16 else 1e-5,  # the gradient is rounded to the dtype of the logits
        bytes=(2 * reads + 1) * rows * vocabulary * dtype.itemsize,
        every=every,
    )


def contests(device: torch.device, full: bool) -> Iterator[Contest]:
    if device.type == "cuda":
        vocabularies = (32000, 128256, 262144) if full else (32000, 128256)
        yield from (contest(device, 8192, v, torch.bfloat16, beta) for v in vocabularies for beta in (1.0, 0.5))
        return
    yield from (contest(device, 256 if full else 64, 32000, torch.float32, beta) for beta in (1.0, 0.5))
