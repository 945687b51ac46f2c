"""Every kernel, in every variant that differs in more than numbers: ``bench.compile`` compiles them, ``bench.guard`` counts, ``bench.gpu`` judges.

The rows are few, and the vocabulary is a real one, since block sizes follow from it. A launch names what it does; add one for each new kernel, dtype
or option that changes the types of what a launcher passes, with tensors of which every part counts.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import rlkern as rk
from bench import peers
from examples import own_surrogate
from rlkern import reference
from rlkern.ops.divergence import Comparison
from rlkern.ops.logits import Rows
from rlkern.reference import policy
from rlkern.surrogates import SURROGATES

ROWS = (2, 3)
VOCABULARY = 128256
BACKEND = "triton"  # this, the rows and the vocabulary are read at the call; others are put in their places
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Tensors = dict[str, Tensor]


class Blank:
    """Makes inputs whose values do not matter, on the CPU."""

    def around(self, mean: float, spread: float, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, mean, dtype=dtype)

    def ids(self, shape: Sequence[int], vocabulary: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def flags(self, shape: Sequence[int], often: float = 0.75) -> Tensor:
        return torch.ones(shape, dtype=torch.bool)

    def given(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype)


class Random(Blank):
    """Makes inputs from a seed, the same on every device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator, self.device = torch.Generator().manual_seed(seed), device

    def around(self, mean: float, spread: float, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return (mean + spread * torch.randn(shape, generator=self.generator)).to(self.device, dtype)

    def ids(self, shape: Sequence[int], vocabulary: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(vocabulary, shape, generator=self.generator).to(self.device, dtype)

    def flags(self, shape: Sequence[int], often: float = 0.75) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < often).to(self.device)

    def given(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return super().given(values, dtype).to(self.device)


@dataclass(frozen=True)
class Launch:
    """A call of the library, what it is given, and what it has to compute. Called, it runs forward and backward on blank inputs."""

    inputs: Callable[[Blank], Tensors]
    ours: Callable[..., Tensors]  # of the inputs by name: the results by name
    exact: Callable[..., Tensors]  # the same by rlkern.reference, in whatever dtype the inputs have
    wanted: tuple[str, ...] = ()  # inputs that are given a gradient
    judged: Callable[[Tensors], Tensors] = lambda results: results  # what of ``ours`` is compared with ``exact``

    def results(self, inputs: Tensors) -> Tensors:
        for name in self.wanted:
            inputs[name].requires_grad_()
        return self.ours(**inputs)

    def __call__(self) -> None:
        results = self.results(self.inputs(Blank()))
        if self.wanted:
            parts = (r.sum() if r.ndim else r for r in results.values() if r.requires_grad)
            functools.reduce(operator.add, parts).backward()


def _loss(output: rk.LossOutput) -> Tensors:
    return {"loss": output.loss, **output.metrics}


def _exact_loss(output: tuple[Tensor, Mapping[str, Tensor]]) -> Tensors:
    return {"loss": output[0], **output[1]}


def token_logprobs(
    dtype: torch.dtype = torch.bfloat16,
    *,
    vocabulary: int | None = None,
    ids: torch.dtype = torch.int64,
    by_row: bool = False,
    kept: torch.dtype | None = None,
    inplace: bool = False,
    **options: Any,
) -> Launch:
    """``by_row``: with a mask and temperatures. ``kept``: of two tokens a row, the dtype of their numbers."""

    def inputs(fill: Blank) -> Tensors:
        size = vocabulary or VOCABULARY
        x = {"logits": fill.around(0.0, 2.0, (*ROWS, size), dtype), "ids": fill.ids(ROWS, size, ids)}
        if by_row:
            x |= {"mask": fill.flags(ROWS), "temperature": fill.around(1.0, 0.1, ROWS)}
        if kept:
            n = math.prod(ROWS)
            x["ids"] = fill.given(range(0, 2 * n, 2)).view(ROWS)
            x |= {"offsets": fill.given(range(0, 2 * n + 2, 2), kept), "token_ids": fill.given(range(2 * n), kept)}
        return x

    def named(results: Tensor | tuple[Tensor, Tensor]) -> Tensors:
        return {"logprob": results} if isinstance(results, Tensor) else dict(zip(("logprob", "entropy"), results, strict=True))

    def ours(offsets: Tensor | None = None, token_ids: Tensor | None = None, **x: Any) -> Tensors:
        keep = None if offsets is None or token_ids is None else rk.KeptTokens(offsets, token_ids)
        return named(rk.token_logprobs(**x, keep=keep, inplace_backward=inplace, backend=BACKEND, **options))

    def exact(offsets: Tensor | None = None, token_ids: Tensor | None = None, **x: Any) -> Tensors:
        return named(reference.token_logprobs(**x, keep=None if offsets is None or token_ids is None else (offsets, token_ids), **options))

    return Launch(inputs, ours, exact, ("logits",))


def _exact_policy_loss(*tensors: Tensor, config: rk.PolicyLossConfig, **x: Any) -> Tensors:
    """By the reference, to which a user's own objective is added; of that only the loss."""
    if config.surrogate in SURROGATES:
        return _exact_loss(reference.policy_loss(*tensors, config=config, **x))

    def own(t: policy.Token, c: rk.PolicyLossConfig) -> Tensor:
        return own_surrogate.smooth_clip_torch(t.lp, None, t.log_r, t.A, SimpleNamespace(high=c.clip_high))

    with mock.patch.dict(policy.SURROGATES, {config.surrogate: own}):
        return {"loss": reference.policy_loss(*tensors, config=config, **x)[0]}


def fused_policy_loss(
    config: rk.PolicyLossConfig, dtype: torch.dtype = torch.bfloat16, *, vocabulary: int | None = None, every_input: bool = False, **options: Any
) -> Launch:
    def inputs(fill: Blank) -> Tensors:
        size = vocabulary or VOCABULARY
        x = {"logits": fill.around(0.0, 2.0, (*ROWS, size), dtype), "ids": fill.ids(ROWS, size)}
        x |= {"old_logprobs": fill.around(-math.log(size), 0.5, ROWS), "advantages": fill.around(0.5, 1.0, ROWS)}
        if every_input:
            x |= {"mask": fill.flags(ROWS), "temperature": fill.around(1.0, 0.1, ROWS), "entropy_mask": fill.flags(ROWS)}
            x |= {name: fill.around(-math.log(size), 0.5, ROWS) for name in ("ref_logprobs", "sampling_logprobs")}
            x["importance_weights"] = fill.around(1.0, 0.2, ROWS).abs_()
        return x

    def ours(**x: Any) -> Tensors:
        output = rk.fused_policy_loss(**x, config=config, backend=BACKEND, **options)
        return _loss(output) if config.surrogate in SURROGATES else {"loss": output.loss}

    def exact(
        logits: Tensor, ids: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Any = None, temperature: float | Tensor = 1.0, **x: Any
    ) -> Tensors:
        logprobs, entropy = reference.token_logprobs(
            logits, ids, mask=mask, temperature=temperature, softcap=options.get("softcap"), with_entropy=True
        )
        wanted = {"entropy": entropy} if options.get("with_entropy", True) else {}
        return _exact_policy_loss(logprobs, old_logprobs, advantages, mask=mask, config=config, **wanted, **x)

    return Launch(inputs, ours, exact, ("logits",))


def policy_loss(config: rk.PolicyLossConfig, *, packed: bool = False, dtype: torch.dtype = torch.float32) -> Launch:
    """With every input there is, so that nothing is left out of what is compiled."""

    def inputs(fill: Blank) -> Tensors:
        shape = (96,) if packed else ROWS
        logprobs = fill.around(2.0, 0.5, shape, dtype).abs_().neg_()
        old, ref, sampling = (logprobs + fill.around(0.0, 0.15, shape, dtype) for _ in range(3))
        x = {"logprobs": logprobs, "old_logprobs": old, "ref_logprobs": ref, "sampling_logprobs": sampling}
        x |= {"advantages": fill.around(0.0, 1.0, shape, dtype), "entropy": fill.around(3.0, 1.0, shape, dtype)}
        x |= {"importance_weights": fill.around(1.0, 0.2, shape, dtype).abs_(), "mask": fill.flags(shape), "entropy_mask": fill.flags(shape)}
        return x | ({"cu_seqlens": fill.given([0, 32, 96], torch.int32)} if packed else {})

    def ours(**x: Any) -> Tensors:
        output = rk.policy_loss(**x, normalizer=5, config=config, backend=BACKEND)
        return _loss(output) if config.surrogate in SURROGATES else {"loss": output.loss}

    def exact(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, **x: Any) -> Tensors:
        return _exact_policy_loss(logprobs, old_logprobs, advantages, normalizer=5, config=config, **x)

    return Launch(inputs, ours, exact, ("logprobs", "entropy"))


def value_loss(*, packed: bool = False, dtype: torch.dtype = torch.float32, clip_range: float | None = 0.2, **options: Any) -> Launch:
    def inputs(fill: Blank) -> Tensors:
        shape = (96,) if packed else ROWS
        x = {name: fill.around(0.0, 1.0, shape, dtype) for name in ("values", "old_values", "returns")} | {"mask": fill.flags(shape)}
        return x | ({"cu_seqlens": fill.given([0, 32, 96], torch.int32)} if packed else {})

    def ours(**x: Any) -> Tensors:
        return _loss(rk.value_loss(**x, clip_range=clip_range, backend=BACKEND, **options))

    def exact(**x: Any) -> Tensors:
        return _exact_loss(reference.value_loss(**x, clip_range=clip_range, **options))

    return Launch(inputs, ours, exact, ("values",))


def _pair(fill: Blank, dtype: torch.dtype, ref_dtype: torch.dtype, vocabulary: int | None) -> Tensors:
    shape = (*ROWS, vocabulary or VOCABULARY)
    return {"logits": fill.around(0.0, 2.0, shape, dtype), "ref_logits": fill.around(0.0, 2.0, shape, ref_dtype)}


def divergence(
    beta: float,
    dtype: torch.dtype = torch.bfloat16,
    ref_dtype: torch.dtype = torch.bfloat16,
    *,
    vocabulary: int | None = None,
    by_row: bool = False,
    **options: Any,
) -> Launch:
    """KL for beta 1, reverse KL for 0, JSD between. ``by_row``: with a mask and temperatures."""

    def inputs(fill: Blank) -> Tensors:
        x = _pair(fill, dtype, ref_dtype, vocabulary)
        return x | ({"mask": fill.flags(ROWS), "temperature": fill.around(1.0, 0.1, ROWS)} if by_row else {})

    def ours(**x: Any) -> Tensors:
        return {"divergence": rk.generalized_jsd(**x, beta=beta, backend=BACKEND, **options)}

    def exact(**x: Any) -> Tensors:
        return {"divergence": reference.generalized_jsd(**x, beta=beta, **options)}

    return Launch(inputs, ours, exact, ("logits",))


# What a rank does for its part of the vocabulary, between two collectives; judged as if that part were all.


def token_logprobs_of_a_part() -> Launch:
    def inputs(fill: Blank) -> Tensors:
        return {"logits": fill.around(0.0, 2.0, (*ROWS, VOCABULARY), torch.bfloat16), "ids": fill.ids(ROWS, VOCABULARY)}

    def ours(logits: Tensor, ids: Tensor) -> Tensors:
        return {"states": Rows(ids, None, None, 1.0, None, BACKEND).states(logits, True)}

    def judged(results: Tensors) -> Tensors:
        m, s, t, x = results["states"].unbind(-1)
        return {"logprob": x - m - s.log(), "entropy": s.log() - t / s * math.log(2.0)}

    def exact(logits: Tensor, ids: Tensor) -> Tensors:
        logprob, entropy = reference.token_logprobs(logits, ids, with_entropy=True)
        return {"logprob": logprob.flatten(), "entropy": entropy.flatten()}

    return Launch(inputs, ours, exact, judged=judged)


def divergence_of_a_part(beta: float) -> Launch:

    def ours(logits: Tensor, ref_logits: Tensor) -> Tensors:
        comparison = Comparison(None, None, 1.0, None, beta, BACKEND)
        states = comparison.states(logits, ref_logits)
        if comparison.kind != "jsd":
            return {"states": states}
        states[:, 1::2].log2_()
        return {"terms": comparison.terms(logits, ref_logits, states)}

    def judged(results: Tensors) -> Tensors:
        if "terms" in results:
            of_p, of_q = results["terms"].unbind(-1)
            return {"divergence": (1 - beta) * of_p + beta * of_q}
        _, s_p, _, s_q, t = results["states"].unbind(-1)
        return {"divergence": (t / s_p - s_p.log2() + s_q.log2()) * math.log(2.0)}

    def exact(**x: Tensor) -> Tensors:
        return {"divergence": reference.generalized_jsd(**x, beta=beta).flatten()}

    return Launch(lambda fill: _pair(fill, torch.bfloat16, torch.bfloat16, None), ours, exact, judged=judged)


def _on_cpu(x: Tensors) -> Tensors:
    """The reference of a scan is a loop over the steps: of a GPU's launches it would take minutes."""
    return {name: t.cpu() for name, t in x.items()}


GAMMA, LAM = 0.99, 0.95


def gae(*shape: int, dtype: torch.dtype = torch.float32, boundaries: Sequence[int] = (), truncated: bool = False, whitened: bool = False) -> Launch:
    """``boundaries``: of packed sequences. ``whitened``: with a mask, where the reference can be waited for."""
    long = shape[-1] > 1 << 16

    def inputs(fill: Blank) -> Tensors:
        x = {"rewards": fill.around(0.0, 1.0, shape, dtype), "values": fill.around(0.0, 1.0, shape, dtype)}
        x |= {"cu_seqlens": fill.given(boundaries)} if boundaries else {}
        x |= {"truncated": fill.flags(shape, 0.02)} if truncated else {}
        x |= {"mask": fill.flags(shape)} if whitened and not long else {}
        return x

    def ours(**x: Any) -> Tensors:
        return dict(zip(("advantages", "returns"), rk.gae(**x, gamma=GAMMA, lam=LAM, whitened=whitened, backend=BACKEND), strict=True))

    def exact(**x: Any) -> Tensors:
        x = _on_cpu(x)
        if long:
            advantages, returns = peers.loop_gae(x["rewards"], x["values"], GAMMA, LAM)
        else:
            advantages, returns = reference.gae(**x, gamma=GAMMA, lam=LAM)
        return {"advantages": reference.whiten(advantages, x.get("mask")) if whitened else advantages, "returns": returns}

    return Launch(inputs, ours, exact)


def discounted_returns() -> Launch:
    return Launch(
        lambda fill: {"rewards": fill.around(0.0, 1.0, (8, 512))},
        lambda rewards: {"returns": rk.discounted_returns(rewards, gamma=GAMMA, backend=BACKEND)},
        lambda rewards: {"returns": reference.discounted_returns(rewards.cpu(), gamma=GAMMA)},
    )


def vtrace(*shape: int, masked: str, dtype: torch.dtype = torch.float32) -> Launch:
    """With every input there is."""

    def inputs(fill: Blank) -> Tensors:
        x = {name: fill.around(0.0, 1.0, shape, dtype) for name in ("rewards", "values", "next_values")}
        x |= {name: fill.around(-2.0, 0.3, shape, dtype) for name in ("logprobs", "old_logprobs")}
        x |= {"gamma": fill.around(1.0, 0.0, shape[:1]), "last_values": fill.around(0.0, 1.0, shape[:1], dtype), "mask": fill.flags(shape)}
        return x | {name: fill.flags(shape, 0.02) for name in ("terminated", "truncated")}

    def ours(**x: Any) -> Tensors:
        return dict(zip(("values", "advantages"), rk.vtrace(**x, masked=masked, backend=BACKEND), strict=True))

    def exact(**x: Any) -> Tensors:
        on_cpu: dict[str, Any] = _on_cpu(x)
        return dict(zip(("values", "advantages"), reference.vtrace(**on_cpu, masked=masked), strict=True))

    return Launch(inputs, ours, exact)


LAUNCHES: dict[str, Launch] = {
    **{f"token_logprobs {name}": token_logprobs(dtype) for name, dtype in DTYPES.items()},
    **{f"token_logprobs {name}, entropy": token_logprobs(dtype, with_entropy=True) for name, dtype in DTYPES.items()},
    "token_logprobs mask, temperatures, soft-cap": token_logprobs(by_row=True, softcap=30.0, with_entropy=True),
    "token_logprobs small odd vocabulary, int32 ids": token_logprobs(vocabulary=1009, ids=torch.int32, with_entropy=True),
    "token_logprobs in place": token_logprobs(inplace=True),
    "token_logprobs of kept tokens": token_logprobs(kept=torch.int64),
    "token_logprobs of kept tokens, int32": token_logprobs(torch.float32, kept=torch.int32),
    **{f"fused_policy_loss {name}": fused_policy_loss(rk.PolicyLossConfig.ppo(), dtype) for name, dtype in DTYPES.items()},
    "fused_policy_loss with every input": fused_policy_loss(
        rk.PolicyLossConfig.dppo(kl_coef=0.1, kl_ratio_weighted="sampling", entropy_coef=0.1), every_input=True, softcap=30.0, inplace=True
    ),
    "fused_policy_loss small odd vocabulary": fused_policy_loss(rk.PolicyLossConfig.cispo(), vocabulary=1009, with_entropy=False),
    "policy_loss of tokens": policy_loss(rk.PolicyLossConfig.ppo(dual_clip=3.0, kl_coef=0.1, entropy_coef=0.1)),
    "policy_loss of tokens, bf16": policy_loss(rk.PolicyLossConfig.dppo(surrogate="dppo_kl"), dtype=torch.bfloat16),
    "policy_loss of packed sequences": policy_loss(
        rk.PolicyLossConfig.gspo(
            kl_coef=0.1, kl_ratio_weighted=True, off_policy_threshold=0.1, entropy_coef=0.1, entropy_aggregation="seq-mean-token-mean"
        ),
        packed=True,
    ),
    "policy_loss of geometric means": policy_loss(rk.PolicyLossConfig.gmpo(kl_coef=0.1, kl_ratio_weighted=True)),
    **{f"policy_loss by {surrogate}": policy_loss(rk.PolicyLossConfig(surrogate=surrogate)) for surrogate in SURROGATES},
    "policy_loss by a user's own surrogate": policy_loss(own_surrogate.CONFIG),
    "fused_policy_loss by a user's own surrogate": fused_policy_loss(own_surrogate.CONFIG),
    "value_loss": value_loss(),
    "value_loss of bf16, without a clip": value_loss(dtype=torch.bfloat16, clip_range=None),
    "value_loss of packed sequences": value_loss(packed=True, aggregation="seq-mean-token-mean", normalizer=5),
    **{f"full_kl {name}": divergence(1.0, dtype, dtype) for name, dtype in DTYPES.items()},
    **{f"full_kl in reverse, {name}": divergence(0.0, dtype, dtype) for name, dtype in DTYPES.items()},
    **{f"generalized_jsd {name}": divergence(0.5, dtype, dtype) for name, dtype in DTYPES.items()},
    **{
        f"generalized_jsd with every input, beta {beta}": divergence(beta, ref_dtype=torch.float32, by_row=True, softcap=30.0)
        for beta in (0.0, 0.5, 1.0)
    },
    "token_logprobs of a part": token_logprobs_of_a_part(),
    **{f"{name} of a part": divergence_of_a_part(beta) for name, beta in (("full_kl", 1.0), ("generalized_jsd", 0.5))},
    "generalized_jsd small odd vocabulary": divergence(0.5, vocabulary=1009),
    **{f"gae of {steps} steps": gae(8, steps) for steps in (16, 512, 8192)},
    "gae of bf16": gae(8, 512, dtype=torch.bfloat16),
    "gae of float64, packed": gae(4096, dtype=torch.float64, boundaries=[0, 1000, 4096]),
    "gae of few long rows": gae(4, 131072),
    "gae truncated, of a length that is no multiple": gae(8, 1001, truncated=True),
    "gae whitened": gae(8, 512, whitened=True),
    "gae of few long rows, whitened": gae(4, 131072, whitened=True),
    "discounted_returns": discounted_returns(),
    "vtrace, masked steps skipped": vtrace(8, 2048, masked="skip"),
    "vtrace, masked steps decay": vtrace(8, 2048, masked="decay"),
    "vtrace of float64": vtrace(8, 2048, masked="skip", dtype=torch.float64),
}

# Variants that differ from their neighbours by a dtype of the same size, a bound or a number: `--thin` compiles them for one target alone.
VARIATIONS = [
    name
    for name in LAUNCHES
    if any(part in name for part in ("fp16", "int32", "odd", "reverse", "beta", "no multiple", "decay", "geometric", "loss by"))
]
