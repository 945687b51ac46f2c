"""What is measured: for each operation, its contests at the shapes of a device, defined once for the command and for pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.harness import Contest

from . import divergence, gae, linear, logprobs, policy_loss, update, value_loss

# operation -> (device, full) -> contests
OPERATIONS: dict[str, Callable[[torch.device, bool], Iterator[Contest]]] = {
    "token_logprobs": logprobs.contests,
    "linear_token_logprobs": linear.logprobs_contests,
    "policy_loss": policy_loss.contests_from_logprobs,
    "fused_policy_loss": policy_loss.contests_from_logits,
    "fused_linear_policy_loss": linear.loss_contests,
    "divergence": divergence.contests,
    "gae": gae.contests,
    "value_loss": value_loss.contests,
    "update": update.contests,
}
