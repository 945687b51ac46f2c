"""Advantages and returns by GAE, from rewards and values of complete sequences."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import rlkern as rk
from bench import peers
from bench.harness import OURS, Contest

GAMMA, LAM = 0.99, 0.95
Inputs = tuple[Tensor, Tensor]  # rewards and values


def contest(device: torch.device, sequences: int, steps: int) -> Contest:
    def inputs() -> Inputs:
        torch.manual_seed(0)
        return torch.randn(sequences, steps, device=device), torch.randn(sequences, steps, device=device)

    def exact(x: Inputs) -> tuple[Tensor, Tensor]:
        return peers.loop_gae(x[0].double(), x[1].double(), GAMMA, LAM)

    return Contest(
        "gae",
        {"G": sequences, "T": steps, "dtype": "float32"},
        device,
        inputs,
        exact,
        {
            OURS: lambda x: lambda: rk.gae(x[0], x[1], gamma=GAMMA, lam=LAM),
            "TorchRL": lambda x: peers.torchrl_gae(x[0], x[1], GAMMA, LAM),
            "PyTorch, a loop over the steps": lambda x: lambda: peers.loop_gae(x[0], x[1], GAMMA, LAM),
        },
        tolerance=1e-5,
        bytes=16 * sequences * steps,
    )


def contests(device: torch.device, full: bool) -> Iterator[Contest]:
    if device.type == "cuda":
        shapes = [(256, 1024), (8192, 2048), (16, 131072)]
        shapes += [(256, 4096), (256, 16384), (1024, 1024), (4096, 1024)] if full else []
    else:
        shapes = [(64, 256), (64, 1024), (64, 4096), (16, 1024), (256, 1024)]
        shapes += [(64, 16384), (256, 2048), (1024, 1024)] if full else []
    yield from (contest(device, *shape) for shape in shapes)
