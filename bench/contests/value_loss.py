"""The critic's clipped loss (0.2), forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import rlkern as rk
from bench import peers
from bench.harness import OURS, Call, Contest, Prepare
from rlkern import reference

CLIP = 0.2


class Inputs(NamedTuple):
    """``[G, T]``; a third of the tokens are padding."""

    values: Tensor
    old: Tensor
    returns: Tensor
    mask: Tensor


def contest(device: torch.device, sequences: int, length: int) -> Contest:
    def inputs() -> Inputs:
        torch.manual_seed(0)
        old, returns, step = torch.randn(3, sequences, length, device=device)
        lengths = torch.randint(length // 3, length + 1, (sequences, 1), device=device)
        return Inputs((old + 0.2 * step).requires_grad_(), old, returns, torch.arange(length, device=device) < lengths)

    def exact(x: Inputs) -> tuple[Tensor, Tensor]:
        values = x.values.detach().double().requires_grad_()
        loss, _ = reference.value_loss(values, x.old.double(), x.returns.double(), mask=x.mask, clip_range=CLIP)
        return loss.detach(), torch.autograd.grad(loss, values)[0]

    def ours(x: Inputs, with_metrics: bool = False) -> Tensor:  # the others make no metrics
        return rk.value_loss(x.values, x.old, x.returns, mask=x.mask, clip_range=CLIP, with_metrics=with_metrics).loss

    def timed(function: Callable[[], Callable[[Inputs], Tensor]]) -> Prepare:
        def prepare(x: Inputs) -> Call:
            loss = function()
            return peers.with_gradient(lambda: loss(x), [x.values], [torch.ones((), device=device)])

        return prepare

    return Contest(
        "value_loss",
        {"G": sequences, "T": length, "dtype": "float32"},
        device,
        inputs,
        exact,
        {
            OURS: timed(lambda: ours),
            "rlkern, with metrics": timed(lambda: partial(ours, with_metrics=True)),
            "PyTorch": timed(lambda: lambda x: peers.clipped_value_loss(*x, CLIP)),
            "PyTorch, torch.compile": timed(lambda: lambda x: peers.compiled(peers.clipped_value_loss, device)(*x, CLIP)),
        },
        tolerance=1e-5,
        bytes=17 * sequences * length,  # three numbers and a byte of mask read, one number written
    )


def contests(device: torch.device, full: bool) -> Iterator[Contest]:
    shapes = [(256, 1024), (4096, 1024)] if device.type == "cuda" else [(64, 1024), *([(256, 2048)] if full else [])]
    yield from (contest(device, *shape) for shape in shapes)
