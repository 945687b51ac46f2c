"""How a run was launched, and models that FSDP2 divides among the processes: which the trainers take, and their weights whole."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from rlkern.trainers.errors import InputError
from rlkern.trainers.settings import PRECISIONS


def shards_models(accelerator: Accelerator) -> bool:
    """Whether models are divided among the processes. InputError for ways of dividing them that the trainers do not know."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        name = "FSDP version 1" if kind == DistributedType.FSDP else kind.value
        raise InputError(f"accelerate was launched with {name}, which the trainers do not support; there are data parallelism and FSDP version 2")
    if not accelerator.is_fsdp2:
        return False
    plugin = accelerator.state.fsdp_plugin
    if plugin.cpu_ram_efficient_loading:
        raise InputError("fsdp_cpu_ram_efficient_loading must be false: every process loads what it is to shard, and reward models whole")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise InputError("fsdp_offload_params must be false: parameters that stay on the CPU cannot be gathered to sample from")
    return True


def shard_frozen(accelerator: Accelerator, model: nn.Module) -> None:
    """Divide a model that is not trained like those that accelerate prepares with their optimisers."""
    fsdp2_prepare_model(accelerator, model)


def reshard(model: Any) -> None:
    """Divide again what FSDP2 left whole: after a forward its outermost module, which waits for a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(prepared: nn.Module, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter of a model that accelerate ``prepared``; sharded ones are gathered one after the other.

    Every process has to go through all of them.
    """
    reshard(prepared)
    for name, parameter in fsdp2_canonicalize_names(dict(model.named_parameters())).items():
        value = parameter.detach()
        yield name, value.full_tensor() if isinstance(value, DTensor) else value


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state of a model, gathered, on the CPU of the first process; empty in the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


class Shell:
    """A model without weights of its own, made before it is divided, to be filled with them while it samples: sampling is then no business of FSDP's,
    and processes may make as many passes as they need."""

    def __init__(self, model: nn.Module, device: torch.device):
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
        self.model: Any = copy.deepcopy(model, dict(empty))
        self._names = dict(self.model.named_parameters())
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}  # of each parameter: more than one where weights are tied
        for module in self.model.modules():
            for name, p in module.named_parameters(recurse=False):
                self._places.setdefault(id(p), []).append((module, name))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @contextmanager
    def filled(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[None]:
        """Have these weights inside the block, and none after it."""
        try:
            for name, value in weights:
                self._put(self._names[name], nn.Parameter(value, requires_grad=False))
            yield
        finally:
            for empty in self._names.values():
                self._put(empty, empty)

    def _put(self, of: nn.Parameter, value: nn.Parameter) -> None:
        for module, name in self._places[id(of)]:
            setattr(module, name, value)


def launched_as(args: Any) -> Any:
    """The settings, completed by what ``accelerate launch`` and accelerate's environment ask for; InputError for what would act by halves."""
    accumulated = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulated != "1":
        raise InputError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {accumulated}, and would divide all gradients; the size of a pass is micro_batch_size here",
            field="micro_batch_size",
        )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = launched if args.mixed_precision is None else args.mixed_precision
    if precision not in PRECISIONS:
        raise InputError(f"accelerate was launched with {precision!r}, which is none of {', '.join(PRECISIONS)}", field="mixed_precision")
    if precision != launched and "ACCELERATE_MIXED_PRECISION" in os.environ:
        tqdm.write(f"mixed_precision is {precision}, as set here; accelerate was launched with {launched}")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise InputError("accelerate was launched with a compiler (ACCELERATE_DYNAMO_BACKEND), which these trainers do not use", field=None)
    return replace(args, mixed_precision=precision)
