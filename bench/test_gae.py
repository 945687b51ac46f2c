"""Advantages and returns by GAE, from rewards and values of complete sequences."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import rlkern as rk
from bench import peers
from bench.harness import DEVICE, OURS, Contest, Replay

GPU = DEVICE.type == "cuda"
SHAPES = [(256, 1024), (8192, 2048), (16, 131072)] if GPU else [(64, 1024), (4, 4096)]  # sequences, steps
CONTENDERS = (OURS, "PyTorch, a loop over the steps")
GAMMA, LAM = 0.99, 0.95


@cache
def contest(*shape: int) -> Contest:
    torch.manual_seed(0)
    rewards, values = (torch.randn(shape, device=DEVICE) for _ in range(2))

    def exact() -> tuple[Tensor, Tensor]:
        return peers.loop_gae(rewards.double(), values.double(), GAMMA, LAM)

    contenders = (
        lambda: lambda: rk.gae(rewards, values, gamma=GAMMA, lam=LAM),
        lambda: lambda: peers.loop_gae(rewards, values, GAMMA, LAM),
    )
    return Contest(f"gae, {shape[0]} x {shape[1]}, float32", exact, dict(zip(CONTENDERS, contenders, strict=True)), tolerance=1e-5)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gae(replay: Replay, shape: tuple[int, int], contender: str) -> None:
    replay(contest(*shape), contender)
