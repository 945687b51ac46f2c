"""Two logits tensors to full KL and JSD of each token: forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rlkern as rk
from bench import peers
from bench.harness import DEVICE, OURS, Contest, Replay
from rlkern import reference

GPU = DEVICE.type == "cuda"
CASES = [
    # rows, vocabulary, dtype, beta: 1 is KL(policy || ref)
    *([(8192, v, torch.bfloat16, beta) for v in (32000, 128256) for beta in (1.0, 0.5)] if GPU else []),
    *([] if GPU else [(256, 32000, torch.float32, 1.0), (256, 32000, torch.float32, 0.5)]),
]
CONTENDERS = (OURS, "log_softmax, kl_div", "log_softmax, kl_div, torch.compile")


def textbook(logits: Tensor, ref_logits: Tensor, beta: float) -> Tensor:
    """GKD's loss, in float32."""
    student, teacher = (F.log_softmax(x.float(), dim=-1) for x in (logits, ref_logits))
    if beta == 1:
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    from_teacher, from_student = (F.kl_div(mixture, x, reduction="none", log_target=True).sum(-1) for x in (teacher, student))
    return beta * from_teacher + (1 - beta) * from_student


@cache
def contest(rows: int, vocabulary: int, dtype: torch.dtype, beta: float) -> Contest:
    torch.manual_seed(0)
    x = 4 * torch.randn(rows, vocabulary, device=DEVICE)
    ref_logits = (x + torch.randn_like(x)).to(dtype)
    logits = x.to(dtype).requires_grad_()
    del x
    upstream = torch.randn(rows, device=DEVICE)

    def exact() -> list[Tensor]:
        parts = []
        for x, y, grad in zip(*(t.split(256) for t in (logits.detach(), ref_logits, upstream)), strict=True):
            z = x.double().requires_grad_()
            result = reference.generalized_jsd(z, y.double(), beta=beta)
            parts.append([result.detach(), *torch.autograd.grad(result, z, grad.double())])
        return [torch.cat(p) for p in zip(*parts, strict=True)]

    def timed(function: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        return peers.with_gradient(lambda: function(logits, ref_logits, beta=beta), [logits], [upstream])

    contenders = (lambda: timed(rk.generalized_jsd), lambda: timed(textbook), lambda: timed(peers.compiled(textbook)))
    return Contest(
        title=f"{'full_kl' if beta == 1 else f'generalized_jsd, beta {beta}'}, {rows} x {vocabulary}, {str(dtype).removeprefix('torch.')}",
        exact=exact,
        contenders=dict(zip(CONTENDERS, contenders, strict=True)),
        tolerance=5e-3 if dtype == torch.bfloat16 else 1e-5,  # the gradient is rounded to the dtype of the logits
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(x).removeprefix("torch.") for x in c))
def test_divergence(replay: Replay, case: tuple[int, int, torch.dtype, float], contender: str) -> None:
    replay(contest(*case), contender)
