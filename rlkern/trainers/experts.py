"""Mixtures of experts, trained with the load-balancing loss that their configuration asks for (``output_router_logits``)."""

from __future__ import annotations

from typing import Any

import torch

from rlkern.integrations.transformers import LastHidden, load_balancing_loss
from rlkern.trainers.errors import InputError


class Balanced(LastHidden):
    """:class:`LastHidden` of such a mixture. Where gradients are wanted, its forward gives the last hidden states and, times its coefficient, the
    load-balancing loss of the pass."""

    model: Any

    def forward(self, **inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(**inputs)
        out = self.body(**inputs, output_router_logits=True)
        loss = load_balancing_loss(self.model, out.router_logits, inputs["attention_mask"])
        return out.last_hidden_state, self.model.router_aux_loss_coef * loss


def last_hidden(model: Any, name: str) -> LastHidden:
    """The model up to its last hidden states, with the load-balancing loss if its configuration asks for it.

    It is asked no more: when sampling, the model would make that loss of every token. :func:`ask_again` before the model is saved.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return LastHidden(model)
    config.output_router_logits = False
    try:
        load_balancing_loss(model, (torch.zeros(1, model.num_experts),), None)
        assert model.router_aux_loss_coef is not None
    except Exception as error:
        why = f"{type(model).__name__} has no load-balancing loss that can be computed here ({type(error).__name__}: {error})"
        raise InputError(
            f"{name} asks for output_router_logits, but {why}; set it to false in its config.json to train without", field="model"
        ) from None
    return Balanced(model)


def ask_again(hidden: LastHidden) -> None:
    """Let the configuration be what it was, so that it is saved so."""
    if isinstance(hidden, Balanced):
        hidden.model.config.get_text_config().output_router_logits = True
