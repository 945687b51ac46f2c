"""Last hidden states and head of a transformers causal language model: the inputs of the functions from hidden states."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn


class Head(NamedTuple):
    """A model's way from its last hidden states to logits; ``**head._asdict()`` are arguments of ``rk.linear_token_logprobs`` and its kin."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float


def unwrap(model: Any) -> Any:
    """The transformers model inside data parallelism, torch.compile, PEFT and :class:`LastHidden`."""
    while True:
        if isinstance(model, LastHidden):
            model = model.model
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):  # PEFT: its layers stand inside the model itself
            model = model.get_base_model()
        elif not hasattr(model, "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def head_of(model: nn.Module) -> Head:
    """The head of a causal language model: weight and bias, soft-cap (Gemma), factor of the logits (Cohere, Granite, Falcon-H1, Muse).

    Raises:
        TypeError: for a model without a linear language-model head.
    """
    inner = unwrap(model)
    linear = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    weight = getattr(linear, "weight", None)
    if weight is None:
        raise TypeError(f"{type(inner).__name__} has no language-model head with a weight; expected a transformers causal language model")
    config = inner.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale *= float(getattr(config, name, None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    scale = scale * divisor if getattr(config, "model_type", None) == "hyperclovax" else scale / divisor  # HyperCLOVA X multiplies by it
    softcap = getattr(config, "final_logit_softcapping", None)
    # Models with both scale before the soft-cap: cap * tanh(x * scale / cap), which is the cap over the scale, then the scale.
    return Head(weight, getattr(linear, "bias", None), None if softcap is None else softcap / scale, scale)


class LastHidden(nn.Module):
    """A causal language model whose forward stops before the head: ``[batch, time, width]`` instead of logits. Parameters are the model's own.

    Wrap this, not the model, in data parallelism, so that its hooks see the forward.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # by which accelerate finds the layers to shard

    def body(self, **inputs: Any) -> Any:
        """What the model without its head gives for the arguments of the model's own forward."""
        inner = unwrap(self.model)
        body = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
        if body is inner:  # as transformers 4 has it for GPT-2
            body = inner.base_model
        return body(**inputs)

    def forward(self, **inputs: Any) -> Any:
        """The last hidden states for the arguments of the model's own forward."""
        return self.body(**inputs).last_hidden_state


def load_balancing_loss(model: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The loss that keeps the experts of a mixture evenly used, as the model's own family defines it; not yet times ``router_aux_loss_coef``.

    ``router_logits``: of the model's body, called with ``output_router_logits=True``. ``attention_mask [batch, time]``: 0 on padding.

    Raises:
        TypeError: for a model whose family has no such loss.
    """
    inner = unwrap(model)
    function = getattr(sys.modules[type(inner).__module__], "load_balancing_loss_func", None)
    if function is None or not (hasattr(inner, "num_experts") and hasattr(inner, "num_experts_per_tok")):
        raise TypeError(f"{type(inner).__name__} has no load-balancing loss that rlkern knows; expected a mixture of experts of transformers")
    return function(router_logits, inner.num_experts, inner.num_experts_per_tok, attention_mask)


def last_hidden_and_head(model: nn.Module, **inputs: Any) -> tuple[Tensor, Head]:
    """(last hidden states ``[batch, time, width]``, head) of a causal language model, whose logits are not computed.

    Takes the arguments of the model's own forward. ``rk.linear_token_logprobs(hidden[:, :-1], ids=ids[:, 1:], **head._asdict())`` then gives the
    log-probs of its tokens.
    """
    return LastHidden(model)(**inputs), head_of(model)
