"""LoRA (Hu et al., arXiv 2106.09685), by peft: a pair of small matrices beside each linear layer learns, the model's own weights stay as they are.

The layers are exchanged inside the model, which remains the transformers model that it was. Its head is frozen, so that the fused loss computes no
gradient for it. The reference of a KL penalty is the same model with its adapter switched off: no second copy is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlkern._versions import too_old
from rlkern.integrations.transformers import LastHidden
from rlkern.trainers.cards import is_ours
from rlkern.trainers.errors import InputError
from rlkern.trainers.settings import RunArguments

NAME = "default"  # of the adapter, within peft


def check_lora(sharded: bool) -> None:
    """InputError where LoRA, which was asked for, cannot be had."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise InputError(f"LoRA needs peft, which cannot be imported ({error}): pip install 'rlkern[lora]'", field="lora_rank") from error
    if wrong := too_old("peft"):
        raise InputError(wrong, field="lora_rank")
    if sharded:
        raise InputError("LoRA under FSDP is not supported: train on one process or by data parallelism, or without lora_rank", field="lora_rank")


class Adapter:
    """The adapter of a transformers model, new: the model computes what it did before. A score head is trained whole, beside the adapter.

    From now on the model's ``state_dict`` has, of its parameters, only those that are trained, and takes only those: checkpoints are small.
    """

    def __init__(self, model: Any, args: RunArguments):
        import peft

        assert args.lora_rank is not None
        self.model = model
        targets = args.lora_targets
        config = peft.LoraConfig(
            r=args.lora_rank,
            lora_alpha=2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,
            lora_dropout=0.0,  # a policy's ratio must come from its weights alone
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            task_type="SEQ_CLS" if "SequenceClassification" in type(model).__name__ else "CAUSAL_LM",
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of transformers, for what peft asks it
                self.peft: Any = peft.get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"{', '.join(targets)}: {str(error).splitlines()[0]}", field="lora_targets") from error
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
        for name, module in self.layers.items():
            if module.get_base_layer() in self._ends():
                raise InputError(f"{name} is the model's embedding or head, which stays frozen here: name layers between them", field="lora_targets")
        frozen = [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad]

        def leave_out(_: Any, state: dict[str, Any], prefix: str, *__: Any) -> None:
            for name in frozen:
                state.pop(prefix + name, None)

        def do_without(_: Any, keys: Any) -> None:
            keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(tuple(frozen))]

        model.register_state_dict_post_hook(leave_out)
        model.register_load_state_dict_post_hook(do_without)

    def _ends(self) -> list[nn.Module]:
        get_output = getattr(self.model, "get_output_embeddings", lambda: None)
        ends = [self.model.get_input_embeddings(), get_output()]
        return [end.get_base_layer() if hasattr(end, "get_base_layer") else end for end in ends if end is not None]

    def reference(self) -> LastHidden:
        """The model without its adapter, up to its last hidden states."""
        return WithoutAdapter(self.model, self.peft)

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each parameter of the model with its adapter merged, one after the other. The model's own stay as they are."""
        for name, parameter in self.model.named_parameters():
            if (layer := self.layers.get(name.removesuffix(".base_layer.weight"))) is not None:
                yield name.replace(".base_layer.", "."), (parameter + layer.get_delta_weight(NAME)).to(parameter.dtype)
            elif ".original_module." not in name and ".lora_" not in name:
                yield name.replace(".base_layer.", ".").replace(f".modules_to_save.{NAME}.", "."), parameter.detach()

    def save(self, directory: Path, *, merged: bool) -> None:
        """Save the adapter for peft's ``from_pretrained``, or the model with its adapter merged for that of transformers."""
        import peft

        directory.mkdir(parents=True, exist_ok=True)
        if is_ours(directory / "README.md"):  # a run that is continued may save the other form; what is loaded from the folder must be one thing
            for other in ("adapter*",) if merged else ("config.json", "generation_config.json", "model*.safetensors*"):
                for file in directory.glob(other):
                    file.unlink()
        if not merged:
            state = peft.get_peft_model_state_dict(self.peft, save_embedding_layers=False)
            save_file({name: value.contiguous().cpu() for name, value in state.items()}, directory / "adapter_model.safetensors", {"format": "pt"})
            config = self.peft.peft_config[NAME]
            config.inference_mode = True
            config.save_pretrained(str(directory))
            return
        trained = dict(self.model.named_parameters())
        buffers = {name: value for name, value in self.model.state_dict().items() if name not in trained}
        self.model.save_pretrained(directory, state_dict={**buffers, **{name: value.cpu() for name, value in self.merged()}})


class WithoutAdapter(LastHidden):
    """:class:`LastHidden` of a model as it was before its adapter."""

    def __init__(self, model: nn.Module, peft_model: Any):
        super().__init__(model)
        self.peft = [peft_model]  # in a list: it is no module of this one

    def forward(self, **inputs: Any) -> Tensor:
        with self.peft[0].disable_adapter():
            return super().forward(**inputs)
