"""A whole GRPO update of a 4-layer Llama with a real vocabulary: forward, loss, backward, optimiser. Only what makes the loss differs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlkern as rk
from bench import peers
from bench.contests.linear import CONFIG, LogprobsOf, trl_chunked
from bench.harness import OURS, Call, Contest, memory
from rlkern import reference
from rlkern.integrations.transformers import last_hidden_and_head


@dataclass(frozen=True)
class Model:
    """Sizes of the model; four layers."""

    vocabulary: int
    width: int
    heads: int
    dtype: torch.dtype

    @property
    def inner(self) -> int:
        return self.width * 8 // 3 // 32 * 32

    @property
    def multiplied(self) -> int:
        """Weights that multiply each token."""
        return 4 * (4 * self.width**2 + 3 * self.width * self.inner) + self.vocabulary * self.width


def sizes_for(device: torch.device, full: bool) -> Model:
    return Model(151936, 2048, 16, torch.bfloat16) if device.type == "cuda" else Model(32000, 256 if full else 128, 4, torch.float32)


class Batch(NamedTuple):
    """``[G, T + 1]`` ids; the rest ``[G, T]``."""

    ids: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor  # the first quarter is the prompt, the last eighth padding


class Inputs(NamedTuple):
    model: Any
    batch: Batch


@cache
def make_model(sizes: Model, device: torch.device) -> Any:
    """A new model; each contender trains a copy of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=4,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM(config).to(device, sizes.dtype)


def make_batch(sizes: Model, device: torch.device, sequences: int, length: int) -> Batch:
    torch.manual_seed(0)
    ids = torch.randint(sizes.vocabulary, (sequences, length + 1), device=device)
    at = torch.arange(length, device=device).expand(sequences, length)
    mask = (at >= length // 4) & (at < length - length // 8)
    old = 0.1 * torch.randn(sequences, length, device=device) - math.log(sizes.vocabulary)
    return Batch(ids, old, torch.randn(sequences, 1, device=device).expand(sequences, length).contiguous(), mask)


def loss_of_logprobs(b: Batch, logprobs: Tensor) -> Tensor:
    return peers.clipped_loss(logprobs, b.old, b.advantages, b.mask, b.old, kl_coef=0.0)


def ours(model: Any, b: Batch) -> Tensor:
    hidden, head = last_hidden_and_head(model, input_ids=b.ids[:, :-1])
    return rk.fused_linear_policy_loss(
        hidden, ids=b.ids[:, 1:], old_logprobs=b.old, advantages=b.advantages, mask=b.mask, config=CONFIG, **head._asdict()
    ).loss


def eager(model: Any, b: Batch) -> Tensor:
    """The model's own logits, TRL's log-probs and entropy of them."""
    logprobs, entropy = peers.trl("selective_log_softmax"), peers.trl("entropy_from_logits")
    logits = model(input_ids=b.ids).logits[:, :-1] / 1.0
    with torch.no_grad():
        entropy(logits)
    return loss_of_logprobs(b, logprobs(logits, b.ids[:, 1:]))


def textbook(model: Any, b: Batch) -> Tensor:
    return loss_of_logprobs(b, peers.gather_logprobs(model(input_ids=b.ids[:, :-1]).logits, b.ids[:, 1:]))


def after(head: Callable[[], LogprobsOf], model: Any, b: Batch) -> Tensor:
    hidden, (weight, *_) = last_hidden_and_head(model, input_ids=b.ids[:, :-1])
    return loss_of_logprobs(b, head()(hidden.flatten(0, 1), weight, b.ids[:, 1:].flatten()).view_as(b.old))


def liger(model: Any, b: Batch) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, (weight, *_) = last_hidden_and_head(model, input_ids=b.ids[:, :-1])
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")
    return loss(hidden, weight, b.ids[:, 1:], b.mask, b.advantages[:, 0], old_per_token_logps=b.old)[0]


LOSSES: dict[str, Callable[[Any, Batch], Tensor]] = {
    OURS: ours,
    "log_softmax, gather": textbook,
    "TRL's eager path": eager,
    "TRL's chunked head": partial(after, trl_chunked),
    "Liger's fused linear GRPO": liger,
}


def prepare(loss: Callable[[Any, Batch], Tensor], x: Inputs) -> Call:
    """The update; its results are the loss and the gradient of the head."""
    model = copy.deepcopy(x.model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def call() -> list[Tensor]:
        value = loss(model, x.batch)
        value.backward()
        optimiser.step()
        gradient = model.lm_head.weight.grad
        optimiser.zero_grad()
        return [value.detach(), gradient]

    return call


def exact(x: Inputs) -> list[Tensor]:
    model = copy.deepcopy(x.model).double()
    logits = model(input_ids=x.batch.ids[:, :-1]).logits
    logprobs = reference.token_logprobs(logits, x.batch.ids[:, 1:])
    b = x.batch
    loss, _ = reference.policy_loss(logprobs, b.old.double(), b.advantages.double(), mask=b.mask, config=CONFIG)  # type: ignore[arg-type]
    loss.backward()
    return [loss.detach(), model.lm_head.weight.grad]


def contest(device: torch.device, sizes: Model, sequences: int, length: int) -> Contest:
    return Contest(
        "update",
        {"G": sequences, "T": length, "H": sizes.width, "V": sizes.vocabulary, "dtype": str(sizes.dtype).removeprefix("torch.")},
        device,
        lambda: Inputs(make_model(sizes, device), make_batch(sizes, device, sequences, length)),
        exact,
        {name: partial(prepare, loss) for name, loss in LOSSES.items()},
        tolerance=0.1 if sizes.dtype == torch.bfloat16 else 1e-4,
        sanity=0.2,
        flops=6 * sequences * length * sizes.multiplied,
    )


def contests(device: torch.device, full: bool) -> Iterator[Contest]:
    shape = (8, 1024) if device.type == "cuda" else (8, 128) if full else (4, 64)
    yield contest(device, sizes_for(device, full), *shape)


# ---- the longest sequence that fits ---------------------------------------------------------------------------------------------------------


def peak(loss: Callable[[Any, Batch], Tensor], model: Any, sizes: Model, device: torch.device, length: int) -> int:
    """Bytes above model, optimiser state and batch, of an update of one sequence."""
    call = prepare(loss, Inputs(model, make_batch(sizes, device, 1, length)))
    call()  # the optimiser makes its state
    return memory(call, device)[0]


def longest(device: torch.device, *, full: bool) -> dict[str, Any]:
    """Of one sequence an update of which fits in a budget of memory above model and optimiser state.

    On a GPU by bisection, in steps of 1024 tokens. On a CPU, where a long update takes minutes, computed: from the peaks measured at a few
    lengths, by the line through the last two.
    """
    sizes = sizes_for(device, full)
    model = make_model(sizes, device)
    gpu = device.type == "cuda"
    budget = 16 << 30 if gpu else 8 << 30
    lengths = (512, 1024, 2048) if full else (256, 1024)
    contenders = []
    for name, loss in LOSSES.items():
        measure = partial(peak, loss, model, sizes, device)
        entry: dict[str, Any] = {"name": name}
        try:
            if gpu:
                entry["longest"] = 1024 * bisect(measure, 1024, budget)
            else:
                peaks = [measure(n) for n in lengths]
                slope = (peaks[-1] - peaks[-2]) / (lengths[-1] - lengths[-2])
                entry |= {"lengths": lengths, "peak_bytes": peaks}
                if slope > 0:  # else the optimiser still needs more than the loss: nothing follows
                    entry["longest"] = int(lengths[-1] + (budget - peaks[-1]) / slope)
        except ImportError as why:
            entry["missing"] = str(why)
        contenders.append(entry)
    by = "bisection in steps of 1024 tokens" if gpu else "computed from the measured peaks, by the line through the last two"
    shape = {"G": 1, "H": sizes.width, "V": sizes.vocabulary, "dtype": str(sizes.dtype).removeprefix("torch.")}
    return {"budget_bytes": budget, "by": by, "shape": shape, "contenders": contenders}


def bisect(peak: Callable[[int], int], step: int, budget: int) -> int:
    """The largest number of steps whose peak is within the budget, where all smaller ones are; 0 if one is not."""

    def fits(k: int) -> bool:
        try:
            return peak(k * step) <= budget
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return False

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
