"""What is known to break runs, on small inputs: what comes out of rlkern, of PyTorch's formula, of TRL's and Liger's own code.

python -m bench.hazards [--write]       # the table of docs/reliability.md; who is not installed is named
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

import rlkern as rk
from bench import peers
from bench.report import fill_one
from bench.tables import table

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
INF = float("inf")
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (logprobs, old, advantages [B], mask), all else [B, T]


# ---- losses on tokens: clip 0.2, mean over counted tokens ------------------------------------------------------------------------------------


def rlkern_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return rk.policy_loss(logprobs, old, advantages, mask=mask, config=rk.PolicyLossConfig.ppo()).loss


def pytorch_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return peers.clipped_loss(logprobs, old, advantages.unsqueeze(1), mask, logprobs.detach(), kl_coef=0.0)


def trl_loss() -> Loss:
    """Of its trainer, which is given these log-probs instead of a model."""
    trainer = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer

    def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        me = MagicMock(loss_type="bnpo", importance_sampling_level="token", beta=0.0, top_entropy_quantile=1.0, off_policy_mask_threshold=None)
        me.configure_mock(use_vllm=False, epsilon_low=0.2, epsilon_high=0.2, current_gradient_accumulation_steps=1, aux_loss_enabled=False)
        me.configure_mock(_entropy_bonus_enabled=False, **{"args.delta": None})
        me.model.training, me._metrics = True, {"train": defaultdict(list)}
        me.accelerator.gather.side_effect = lambda x: x
        me._get_per_token_logps_and_entropies.return_value = (logprobs, torch.zeros_like(logprobs), None)
        nothing = torch.zeros(len(logprobs), 0, dtype=torch.long)
        ids = torch.zeros(logprobs.shape, dtype=torch.long)
        inputs = {"prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": ids, "completion_mask": mask.long()}
        return trainer._compute_loss(me, None, {**inputs, "advantages": advantages, "old_per_token_logps": old})

    return loss


def liger_loss() -> Loss:
    """What its fused head makes of a chunk's log-probs."""
    of_chunk = importlib.import_module("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOFunction.ppo_loss_fn

    def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        counted = mask.float()
        return of_chunk(logprobs, counted, advantages, counted, old_per_token_logps=old, beta=0.0, loss_type="bnpo")[0]

    return loss


LOSSES: dict[str, Callable[[], Loss]] = {
    "rlkern": lambda: rlkern_loss,
    "PyTorch": lambda: pytorch_loss,
    "TRL": trl_loss,
    "Liger": liger_loss,
}


def of_tokens(log_ratios: list[float], advantage: float, counted: list[int], loss: Loss) -> str:
    """Loss, and the gradient of the first token."""
    log_r = torch.tensor([log_ratios])
    logprobs = (-1.0 - log_r.relu().clamp(max=0.0) - (-log_r).relu()).requires_grad_()
    found = loss(logprobs, (logprobs - log_r).detach(), torch.tensor([advantage]), torch.tensor([counted], dtype=torch.bool))
    (gradient,) = torch.autograd.grad(found, logprobs)
    return f"loss {found.item():.3g}, gradient {gradient[0, 0].item() + 0.0:.3g}"


# ---- log-probs and entropies of logits -------------------------------------------------------------------------------------------------------

Logprobs = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (logits, ids, mask) -> (logprobs, entropies)


def rlkern_logprobs(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    found = rk.token_logprobs(logits, ids, mask=mask, with_entropy=True)
    return found[0], found[1]


def pytorch_logprobs(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    logprobs, entropy = peers.gather_logprobs_and_entropy(logits, ids)
    return logprobs * mask, entropy * mask


def trl_logprobs() -> Logprobs:
    logprobs, entropy = peers.trl("selective_log_softmax"), peers.trl("entropy_from_logits")
    return lambda logits, ids, mask: (logprobs(logits, ids) * mask, entropy(logits) * mask)


LOGPROBS: dict[str, Callable[[], Logprobs]] = {"rlkern": lambda: rlkern_logprobs, "PyTorch": lambda: pytorch_logprobs, "TRL": trl_logprobs}


def of_logits(logits: list[list[float]], counted: list[int], function: Logprobs) -> str:
    """The sum of entropies, and the largest entry of the gradient of the sum of log-probs."""
    x = torch.tensor(logits, requires_grad=True)
    logprobs, entropy = function(x, torch.zeros(len(logits), dtype=torch.long), torch.tensor(counted))
    (gradient,) = torch.autograd.grad(logprobs.sum(), x)
    return f"entropy {entropy.sum().item():.3g}, gradient {gradient.abs().max().item():.3g}"


def of_bfloat16(function: Logprobs) -> str:
    """The largest error of a log-prob."""
    logits = (torch.randn(64, 32000, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    ids, mask = torch.arange(64), torch.ones(64, dtype=torch.long)
    exact = torch.log_softmax(logits.double(), -1)[ids, ids]
    return f"error {(function(logits, ids, mask)[0].double() - exact).abs().max().item():.0e}"


HAZARDS: dict[str, tuple[dict[str, Callable[[], Any]], Callable[[Any], str], str]] = {
    "ratio of e^100, advantage 1, clipped at 1.2": (LOSSES, partial(of_tokens, [100.0], 1.0, [1]), "test_overflow.py"),
    "ratio of e^100, advantage 0": (LOSSES, partial(of_tokens, [100.0], 0.0, [1]), "test_overflow.py"),
    "the sampler's log-prob is -inf, advantage 1": (LOSSES, partial(of_tokens, [INF], 1.0, [1]), "test_overflow.py"),
    "NaN in a masked log-prob": (LOSSES, partial(of_tokens, [0.0, math.nan], 1.0, [1, 0]), "test_policy_loss.py"),
    "no token counts": (LOSSES, partial(of_tokens, [0.0, 0.1], 1.0, [0, 0]), "test_policy_loss.py"),
    "logits of -inf (a sampler's mask)": (LOGPROBS, partial(of_logits, [[1.0, -INF, 2.0]], [1]), "test_logprobs.py"),
    "NaN in the logits of a masked position": (LOGPROBS, partial(of_logits, [[1.0, 0.5], [math.nan, 1.0]], [1, 0]), "test_promises.py"),
    "bfloat16 logits, 32,000 tokens": (LOGPROBS, of_bfloat16, "test_logprobs.py"),
}


def hazards() -> str:
    """The table."""
    columns = list(LOSSES)
    rows = []
    for title, (contenders, judged, test) in HAZARDS.items():
        cells = []
        for name in columns:
            try:
                cells.append(judged(contenders[name]()) if name in contenders else "")
            except ImportError:
                cells.append("not installed")
        rows.append([title, *cells, f"`{test}`"])
    return table(["hazard", *columns, "shown by"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.hazards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/reliability.md")
    options = parser.parse_args()
    text = hazards()
    print(text)
    if options.write:
        fill_one(PAGE, "hazards", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
