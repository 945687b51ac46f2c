"""TRL: ``enable(trainer)`` lets a GRPOTrainer or RLOOTrainer score and train from hidden states; ``patch()`` is for all its trainers.

TRL's own ``_compute_loss`` still computes the value of the loss and every metric. Log-probs, entropies and gradients come from rlkern:

- log-probs and entropies from ``rk.linear_token_logprobs``, in float32 whatever the model's dtype;
- with GRPO, if a token's loss depends on its own log-prob alone, the gradient from ``rk.fused_linear_policy_loss``, made while a chunk of
  logits is at hand. Otherwise (RLOO, ratios of sequences, VESPO, the off-policy mask, the entropy quantile) TRL's loss is differentiated through the
  log-probs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import rlkern as rk

from .transformers import head_of, load_balancing_loss, unwrap
from .trl_patch import (
    VERSIONS,
    Patched,
    entropy_from_logits,
    patch,
    precision_of,
    require_trl,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)

__all__ = [
    "VERSIONS",
    "Enabled",
    "Patched",
    "enable",
    "entropy_from_logits",
    "patch",
    "policy_loss_config",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]

_LOSSES = {
    "grpo": ("clip", "seq-mean-token-mean"),
    "bnpo": ("clip", "token-mean"),
    "dr_grpo": ("clip", "seq-mean-token-sum-norm"),
    "dapo": ("clip", "token-mean"),
    "luspo": ("clip", "seq-mean-token-sum"),
    "cispo": ("cispo", "token-mean"),
    "sapo": ("sapo", "seq-mean-token-mean"),
    "vespo": ("vespo", "token-mean"),
}
_LEVELS = ("token", "sequence")


def policy_loss_config(args: Any) -> rk.PolicyLossConfig:
    """The :class:`rlkern.PolicyLossConfig` of a ``GRPOConfig``.

    The caller still passes the tensors: the entropy quantile as ``entropy_mask``, vLLM's ratios as ``importance_weights``, and the ``normalizer``
    (``"grpo"``, ``"sapo"``, ``"dr_grpo"`` and ``"luspo"`` divide by all sequences, empty ones too).

    Raises:
        ValueError: an option is unknown here, or has no counterpart; the message names it.
    """
    _check_loss(args)
    surrogate, aggregation = _LOSSES[args.loss_type]
    level = args.importance_sampling_level
    if surrogate == "vespo" and level == "sequence":
        if args.beta != 0 and args.use_bias_correction_kl:
            raise ValueError("loss_type='vespo' with importance_sampling_level='sequence' and use_bias_correction_kl=True has no counterpart")
        level = "token"  # TRL's VESPO does not look at it
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    return rk.PolicyLossConfig(
        surrogate=surrogate,
        aggregation=aggregation,
        ratio_level=level,
        clip_low=args.epsilon,
        clip_high=high,
        cispo_cap=high if surrogate == "cispo" else None,
        ratio_cap=args.delta if surrogate == "clip" else None,
        tau_pos=args.sapo_temperature_pos,
        tau_neg=args.sapo_temperature_neg,
        vespo_k_pos=args.vespo_k_pos,
        vespo_lambda_pos=args.vespo_lambda_pos,
        vespo_k_neg=args.vespo_k_neg,
        vespo_lambda_neg=args.vespo_lambda_neg,
        off_policy_threshold=args.off_policy_mask_threshold,
        kl_coef=args.beta,
        kl_ratio_weighted=args.use_bias_correction_kl,
        entropy_coef=args.entropy_coef,
        entropy_aggregation="token-mean",
        max_length=args.max_completion_length,
    )


class _Forward:
    """A model's forward, ``make(model, before)``. A deep copy of the model gets one of its own, as it would get its own bound methods."""

    def __init__(self, make: Callable[[Any, Any], Any], model: Any, before: Any, copied: bool = False) -> None:
        self.make, self.model, self.before, self.copied = make, model, before, copied
        self.call = make(model, before)
        functools.update_wrapper(self, before, updated=())  # whose signature TRL and transformers read

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if self.copied and not options.get("fused_lm_head"):  # which TRL's forward, though copied, would pass on to the original model
            return type(self.model).forward(self.model, *inputs, **options)
        return self.call(*inputs, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        return _Forward(self.make, copy.deepcopy(self.model, memo), copy.deepcopy(self.before, memo), copied=True)


class Enabled:
    """The result of :func:`enable`: ``disable()``, or the end of a ``with`` block, gives the trainer its own methods back."""

    def __init__(self, trainer: Any, fuse_loss: bool) -> None:
        self.trainer, self.active = trainer, True
        self._undo: list[Callable[[], None]] = []
        self.config = policy_loss_config(trainer.args) if fuse_loss and _is_token_level(trainer.args) else None
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            if model is not None:
                inner = unwrap(model)
                self._replace(inner, "forward", _Forward(self._forward, inner, inner.forward))
        if self.config is not None:
            self._compute_loss = trainer._compute_loss
            self._replace(trainer, "_compute_loss", self._loss)
        trainer._rlkern = self

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *error: object) -> None:
        self.disable()

    def disable(self) -> None:
        """Give the trainer and its models their own methods back."""
        self.active = False
        while self._undo:
            self._undo.pop()()
        if getattr(self.trainer, "_rlkern", None) is self:
            del self.trainer._rlkern

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        own = vars(owner).get(name)

        def undo() -> None:
            if vars(owner).get(name) is not new:
                return  # wrapped since, as accelerate does: what is wrapped passes everything on
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

        setattr(owner, name, new)
        self._undo.append(undo)

    def _forward(self, model: Any, before: Any) -> Any:
        """The forward of a model: with TRL's ``fused_lm_head=True``, log-probs and entropies from hidden states, and the loss of an objective."""
        from trl.trainer.utils import FusedCausalLMOutput

        args = self.trainer.args

        def forward(*inputs: Any, **options: Any) -> Any:
            if not (self.active and options.get("fused_lm_head")):
                return before(*inputs, **options)
            del options["fused_lm_head"]
            labels, objective = options.pop("labels"), options.pop("rlkern_objective", None)
            body = model.base_model(*inputs, **options, use_cache=False)
            hidden, ids, head = body.last_hidden_state[:, :-1], labels[:, 1:], head_of(model)
            precision = torch.float32 if getattr(args, "cast_lm_head_to_fp32", False) else precision_of(hidden)
            weight, bias = (None if x is None else rk.gather_parameter(x.to(precision)) for x in (head.weight, head.bias))
            scored = {**head._asdict(), "weight": weight, "bias": bias, "temperature": args.temperature}
            hidden = hidden.to(precision)
            aux_loss = load_balancing_loss(model, body.router_logits, options.get("attention_mask")) if options.get("output_router_logits") else None
            if objective is None:
                logprobs, entropy = rk.linear_token_logprobs(hidden, ids=ids, rows=_rows(ids != -100), with_entropy=True, **scored)
                return FusedCausalLMOutput(log_probs=logprobs, entropy=entropy, label_mask=ids != -100, aux_loss=aux_loss)
            new = objective["mask"].shape[1]
            hidden, ids = hidden[:, -new:], ids[:, -new:]
            rows = _rows((ids != -100) & (objective["mask"] != 0))
            out = rk.fused_linear_policy_loss(hidden, ids=ids, rows=rows, **scored, **objective)
            return FusedCausalLMOutput(loss=out.loss, log_probs=out.logprobs, entropy=out.entropy, label_mask=ids != -100, aux_loss=aux_loss)

        return forward

    def _loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """``GRPOTrainer._compute_loss``: TRL's value and metrics, of log-probs that carry no gradient, and the gradient of the fused loss."""
        if not torch.is_grad_enabled():
            return self._compute_loss(model, inputs)
        objective = self._objective(inputs)
        fused: list[Tensor] = []

        def scored(**options: Any) -> Any:  # through the model's own call, so that the hooks of data parallelism see the loss
            output = model(**options, rlkern_objective=objective)
            fused.append(output.loss)
            return output

        value = self._compute_loss(scored, inputs)
        (loss,) = fused
        return value + (loss - loss.detach())

    def _objective(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of ``rk.fused_linear_policy_loss`` for a batch of TRL's."""
        assert self.config is not None
        trainer, args = self.trainer, self.trainer.args
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        training = trainer.model.training  # TRL's "mode": evaluation neither splits nor accumulates
        steps = trainer.current_gradient_accumulation_steps if training else 1
        if args.loss_type in ("cispo", "dapo"):
            share = steps / args.steps_per_generation if training else 1.0
            normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes * share
        elif args.loss_type == "bnpo":
            normalizer = mask.sum().clamp(min=1) * steps
        else:
            normalizer = len(mask) * steps
        coef = trainer.entropy_coef  # of this step: the adaptive control moves it, and switches it off
        if trainer.use_adaptive_entropy and trainer._last_world_entropy > args.entropy_target:
            coef = 0.0
        weighted = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        return {
            "old_logprobs": inputs.get("old_per_token_logps"),
            "advantages": inputs["advantages"],
            "mask": mask,
            "ref_logprobs": inputs["ref_per_token_logps"] if args.beta != 0 else None,
            "importance_weights": inputs["importance_sampling_ratio"] if weighted else None,
            "normalizer": normalizer,
            "config": replace(self.config, entropy_coef=coef / steps),
        }


def enable(trainer: Any, *, fuse_loss: bool = True) -> Enabled:
    """Let a GRPOTrainer or RLOOTrainer score and train from hidden states, without logits. Call it before ``trainer.train()``.

    The losses, metrics and gradients stay TRL's, for every option of its loss; an option that is not supported is an error here, which names it.
    Works with PEFT adapters (the frozen head takes no part in the backward), gradient checkpointing, several iterations, ``cast_lm_head_to_fp32``,
    soft-caps and logit scales, mixed precision, DDP and FSDP2.

    Args:
        trainer: a GRPOTrainer or RLOOTrainer of TRL 1.15 or 1.16.
        fuse_loss: make the gradient of GRPO's loss in the forward, if the loss is token-level. False: log-probs alone are replaced, for trainers
            that override ``_compute_loss``.

    Returns:
        :class:`Enabled`: ``with enable(trainer): trainer.train()`` or ``.disable()`` undo it.

    Raises:
        ImportError: TRL is not installed, or is of another version.
        TypeError: another kind of trainer, or one with a log-prob or loss method of its own.
        ValueError: an option that cannot be honoured exactly.
    """
    require_trl("enable")
    from trl import GRPOTrainer, RLOOTrainer

    kind = next((kind for kind in (GRPOTrainer, RLOOTrainer) if isinstance(trainer, kind)), None)
    if kind is None:
        raise TypeError(f"enable takes a GRPOTrainer or RLOOTrainer, got {type(trainer).__name__}")
    fuse_loss = fuse_loss and kind is GRPOTrainer
    for method in ("_get_per_token_logps_and_entropies", *(("_compute_loss",) if fuse_loss else ())):
        if getattr(type(trainer), method) is not getattr(kind, method):
            hint = "; with fuse_loss=False it keeps its loss" if method == "_compute_loss" else ""
            raise TypeError(f"{type(trainer).__name__} overrides {method}, which enable would replace{hint}")
    if hasattr(trainer, "_rlkern"):
        raise ValueError("rlkern is enabled for this trainer already")
    if kind is GRPOTrainer:
        _check_loss(trainer.args)
    _check_model(trainer.model)
    return Enabled(trainer, fuse_loss)


def _is_token_level(args: Any) -> bool:
    """Whether a token's loss depends on its own log-prob alone, and not on entropies that are known after the forward."""
    by_itself = args.loss_type != "vespo" and args.importance_sampling_level == "token" and args.off_policy_mask_threshold is None
    return by_itself and args.top_entropy_quantile == 1.0


def _check_loss(args: Any) -> None:
    for name, choices in (("loss_type", tuple(_LOSSES)), ("importance_sampling_level", _LEVELS)):
        if getattr(args, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))} for rlkern; got {getattr(args, name)!r}")


def _check_model(model: Any) -> None:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ValueError("DeepSpeed ZeRO-3 is not supported: it keeps only a shard of the head's weight; use ZeRO-2, DDP or FSDP2")
    for name, adapter in getattr(model, "peft_config", {}).items():
        if adapter.is_prompt_learning:
            raise ValueError(
                f"the PEFT adapter {name!r} is prompt learning ({adapter.peft_type}), which shifts positions; use LoRA or another that does not"
            )
    inner = unwrap(model)
    if len(set(getattr(inner, "hf_device_map", {}).values())) > 1:
        raise ValueError(f"device_map splits the model over {sorted(set(map(str, inner.hf_device_map.values())))}; expected one device a process")
    if hasattr(inner.get_output_embeddings(), "base_layer"):
        raise ValueError("a PEFT adapter on the head (lm_head in target_modules) would be ignored; leave it out")
    head_of(inner)


def _rows(mask: Tensor) -> Tensor:
    """The positions that count: one synchronisation on a GPU, as in TRL."""
    return mask.flatten().nonzero().squeeze(1)
