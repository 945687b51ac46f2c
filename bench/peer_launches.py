"""Kernels of other libraries, where installed: ``python -m bench.compile --launches bench.peer_launches`` counts them as ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from bench.launches import ROWS, VOCABULARY


def _liger_grpo(*, backward: bool) -> None:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    batch, length = ROWS
    logits = torch.zeros(batch, length + 1, VOCABULARY, dtype=torch.bfloat16, requires_grad=backward)
    ids, per_token = torch.zeros(batch, length, dtype=torch.int64), torch.zeros(batch, length)
    if not backward:
        fused_selective_log_softmax(logits, ids, 1.0, None)
        return
    loss, *_ = triton_grpo_loss(logits, per_token, None, ids, torch.zeros(batch), torch.ones(batch, length, dtype=torch.int64), beta=0.0)
    loss.sum().backward()


LAUNCHES: dict[str, Callable[[], None]] = {}
if importlib.util.find_spec("liger_kernel") is not None:
    LAUNCHES = {
        "Liger, selective log-softmax": partial(_liger_grpo, backward=False),
        "Liger, GRPO loss and its backward": partial(_liger_grpo, backward=True),
    }
VARIATIONS: list[str] = []
