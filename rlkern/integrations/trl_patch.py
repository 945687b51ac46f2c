"""rlkern's versions of TRL's functions of logits and of its fused head, and ``patch()``, which puts them in the place of TRL's in every trainer.

TRL has two ways to a token's log-prob. ORPO, CPO, SDPO and others call functions of ``trl.trainer.utils`` on logits; DPO, KTO, SFT, GRPO
and RLOO call the model with ``fused_lm_head=True``, which asks ``trl.kernels.ChunkedLogProbFunction``. Both are replaced.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import rlkern as rk
from rlkern.ops.logits import soft_capped

VERSIONS = ("1.15", "1.16")  # whose models have a fused head, as these releases have it
_CHUNK_BYTES = 64 << 20


def require_trl(name: str) -> None:
    """ImportError unless TRL is there, in a version that is known."""
    try:
        import trl
    except ImportError as e:
        raise ImportError(f"rlkern.integrations.trl needs TRL {' or '.join(VERSIONS)}: pip install 'trl>=1.15,<1.17'") from e
    if not trl.__version__.startswith(tuple(f"{version}." for version in VERSIONS)):
        raise ImportError(
            f"rlkern.integrations.trl.{name} knows TRL {' and '.join(VERSIONS)}, found {trl.__version__}: pip install 'trl>=1.15,<1.17'"
        )


def precision_of(hidden: Tensor) -> torch.dtype:
    """The dtype in which a head multiplies: autocast's, or that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None) -> Tensor:
    """``trl.trainer.utils.selective_log_softmax``: log-probs of ``index``, shape ``S`` or ``S + [K]``, under ``logits / temperature``, ``S + [V]``.

    float32 (float64 for float64 logits) where TRL gives the dtype of the logits: its bfloat16 log-probs are off by a few hundredths.
    """
    if index.dim() == logits.dim():
        columns = [selective_log_softmax(logits, index[..., k], temperature) for k in range(index.shape[-1])]
        gathered = torch.stack(columns, -1)
        return gathered if row_mask is None else torch.where(row_mask != 0, gathered, 0.0)
    return rk.token_logprobs(logits, index, mask=row_mask, temperature=temperature)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """``trl.trainer.utils.entropy_from_logits``: entropy in nats of each row, float32 (float64 for float64). ``chunk_size`` has no use here."""
    return rk.token_logprobs(logits, torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device), with_entropy=True)[1]


def selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, entropy_requires_grad: bool = True, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``trl.trainer.utils.selective_log_softmax_and_entropy``, in one pass over the logits."""
    logprobs, entropy = rk.token_logprobs(logits, index, mask=row_mask, temperature=temperature, with_entropy=True)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


class FusedHead:
    """``trl.kernels.ChunkedLogProbFunction``: its ``apply`` gives (log-probs, entropy, log sum p^2, mean logit, is the target the argmax)."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """``hidden [N, H]``, ``weight [V, H]``, ``bias [V]``, ``targets [N]``; results ``[N]``, None where ``outputs`` does not name them.

        Log-probs and entropy are differentiable. ``chunk_size`` has no use here.

        Raises:
            ValueError: the head is a shard of DeepSpeed ZeRO-3, which is gone when the backward needs it.
        """
        if hasattr(weight, "ds_id"):
            raise ValueError("DeepSpeed ZeRO-3 is not supported: it keeps only a shard of the head's weight; use ZeRO-2, DDP or FSDP2")
        dtype = precision_of(hidden)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        scaled: dict[str, Any] = {"temperature": temperature, "logit_scale": logit_scale}
        # TRL scales before the soft-cap, rlkern after it: cap tanh(s x / cap) = s c tanh(x / c) with c = cap / s.
        scaled["softcap"] = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
        entropy: Tensor | None = None
        if "entropy" in outputs:
            logprobs, entropy = rk.linear_token_logprobs(hidden, weight, targets, bias=bias, with_entropy=True, **scaled)
        else:
            logprobs = rk.linear_token_logprobs(hidden, weight, targets, bias=bias, **scaled)
        return logprobs, entropy, *_measures(hidden.detach(), weight.detach(), bias, targets, outputs, scaled)


@torch.no_grad()
def _measures(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, outputs: tuple[str, ...], scaled: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What TRL logs of all logits: log sum p^2, their mean, whether the target is the first of the largest. None where not asked for."""
    rows = len(hidden)
    squares, mean, top = (
        torch.empty(rows, device=hidden.device, dtype=dtype) if name in outputs else None
        for name, dtype in (("log_sum_sq_probs", torch.float32), ("mean_logits", torch.float32), ("is_top1", torch.bool))
    )
    if mean is not None and scaled["softcap"] is None:  # linear in the weight: no logits are needed
        middle = hidden.float() @ weight.mean(0, dtype=torch.float32) + (0.0 if bias is None else bias.float().mean())
        mean.copy_(middle * (scaled["logit_scale"] / scaled["temperature"]))
        if squares is None and top is None:
            return None, mean, None
    elif squares is None and mean is None and top is None:
        return None, None, None
    step = max(1, _CHUNK_BYTES // (4 * len(weight)))
    for i in range(0, rows, step):
        chunk = slice(i, i + step)
        logits = torch.nn.functional.linear(hidden[chunk], weight, bias).float()
        logits = soft_capped(logits, scaled["softcap"], logits).mul_(scaled["logit_scale"] / scaled["temperature"])
        if squares is not None:
            squares[chunk] = (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)
        if mean is not None and scaled["softcap"] is not None:
            mean[chunk] = logits.mean(-1)
        if top is not None:
            top[chunk] = logits.argmax(-1) == targets[chunk]
    return squares, mean, top


def _always(device: torch.device) -> bool:
    """``trl.trainer.utils._use_triton``, which says whether masked rows are left out of the head: on a CPU too."""
    return True


class Patched:
    """The result of :func:`patch`: ``undo()``, or the end of a ``with`` block, puts TRL's functions back.

    Attributes:
        places: the names that were replaced, like ``"trl.experimental.cpo.cpo_trainer.selective_log_softmax"``.
    """

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        import trl.trainer.utils as theirs

        self._ours = [(new, old) for old, new in pairs]
        self.places = _exchange(pairs)
        self._use_triton = getattr(theirs, "_use_triton", None)  # TRL 1.16; other modules ask it before they launch, and are left alone
        if self._use_triton is not None:
            theirs._use_triton = _always

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Put TRL's functions back, in modules that were imported since then too. A second call does nothing."""
        import trl.trainer.utils as theirs

        _exchange(self._ours)
        self._ours = []
        if self._use_triton is not None:
            theirs._use_triton, self._use_triton = self._use_triton, None


def _exchange(pairs: list[tuple[Any, Any]]) -> list[str]:
    """Replace objects by others wherever a module of TRL, or of its user, has them by name; where that was."""
    places = []
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] == "rlkern" or name == "trl.kernels" or name.startswith("trl.kernels."):
            continue
        for key, value in list(vars(module).items()):
            for old, new in pairs:
                if value is old:
                    setattr(module, key, new)
                    places.append(f"{name}.{key}")
    return sorted(places)


def patch() -> Patched:
    """Put rlkern's functions in the place of TRL's, for all of its trainers: log-probs and entropies from logits, and the fused head.

    It reaches every module that has imported them by name, before or after: DPO, KTO, SFT, GRPO and RLOO through the fused head; ORPO, CPO, SDFT,
    SDPO, TPO and A2PO through ``selective_log_softmax`` and its kin. Losses and metrics stay TRL's. For GRPO and RLOO :func:`enable` does more: it
    makes the gradient of the loss in the forward. Distillation's divergence over chunks of logits stays TRL's.

    Returns:
        :class:`Patched`: ``with patch(): trainer.train()`` or ``.undo()`` undo it.

    Raises:
        ImportError: TRL is not installed, or is of another version than 1.15 or 1.16.
        RuntimeError: it is patched already.
    """
    require_trl("patch")
    import trl.trainer.utils as theirs

    if theirs._ChunkedLogProbFunction is FusedHead:
        raise RuntimeError("TRL is patched already; undo() of what patch() gave first")
    pairs: list[tuple[Any, Any]] = [
        (theirs.selective_log_softmax, selective_log_softmax),
        (theirs.entropy_from_logits, entropy_from_logits),
        (theirs.selective_log_softmax_and_entropy, selective_log_softmax_and_entropy),
        (theirs._ChunkedLogProbFunction, FusedHead),
    ]
    return Patched([(old, new) for old, new in pairs if old is not None])  # None: TRL 1.15 without Triton
