"""Models and tokenizers, loaded so that what is trained is what was meant: every weight from its file, and nothing random but the seed's."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rlkern.integrations.transformers import LastHidden
from rlkern.trainers.arguments import nearest
from rlkern.trainers.errors import InputError
from rlkern.trainers.rollout import fitting_pad, vocabulary_of

# What maps the last hidden states to logits, of which a model with a score head has no use.
LANGUAGE_HEADS = ("lm_head.", "embed_out.", "output.", "cls.")


def load_tokenizer(name: str, *, field: str = "model", template_options: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer of that path or name, whose chat template gets these options; ``field`` is the setting that named it."""
    tokenizer = _load(AutoTokenizer, name, field)
    if template_options:
        if field == "model":
            _check_template(tokenizer, template_options)
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **template_options)
    return tokenizer


def _check_template(tokenizer: Any, options: Mapping[str, Any]) -> None:
    """InputError where the chat template would not look at an option: it says nothing of those that it does not know."""
    words = re.findall(r"\w+", str(tokenizer.chat_template or ""))
    for name in options:
        if name not in words:
            near = nearest(name, []) if not words else nearest(name, set(words))
            raise InputError(
                f"the tokenizer's chat template {'does not look at' if words else 'is missing, for'} {name!r}{near}", field="template_options"
            )


def load_model(name: str, dtype: torch.dtype) -> Any:
    """The causal language model of that path or name, without dropout: a policy's ratio must come from its weights alone."""
    model, info = _load(AutoModelForCausalLM, name, "model", dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    _check_weights(name, "model", info)
    return without_dropout(model)


def load_scorer(name: str, dtype: torch.dtype, tokenizer: Any, *, field: str = "model", trained: bool = False) -> Any:
    """A sequence-classification model with one output, without dropout: a reward model or a critic.

    From a language model its head is new, and 0; ``trained`` refuses that. ``tokenizer`` names the padding that the model is to look away from.
    """
    config = _load(AutoConfig, name, field)
    classifies = any("SequenceClassification" in architecture for architecture in config.architectures or ())
    if classifies and config.num_labels != 1:
        raise InputError(f"{name} has {config.num_labels} outputs, not 1: it is no reward model", field=field)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what is missing is said here
    options = {"dtype": dtype, "num_labels": 1, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = _load(AutoModelForSequenceClassification, name, field, **options)
    finally:
        transformers_logging.set_verbosity(level)
    head = {key for key, _ in model.named_parameters() if not key.startswith(f"{model.base_model_prefix}.")}
    fresh = head & set(info["missing_keys"])
    if fresh and (trained or classifies):
        raise InputError(f"{name} has no trained score head ({', '.join(sorted(fresh))}): its scores would mean nothing", field=field)
    _check_weights(name, field, info, may_be_new=head, may_be_left=LANGUAGE_HEADS if fresh else ())
    for key in fresh:
        torch.nn.init.zeros_(model.get_parameter(key))
    if fresh and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
        tqdm.write(f"{name}: a new score head, of zeros")
    model.config.get_text_config().pad_token_id = fitting_pad(tokenizer, vocabulary_of(model), tokenizer.eos_token_id or 0)
    return without_dropout(model)


def without_dropout(model: Any) -> Any:
    """The model, with every dropout switched off for good: modules, and rates that modules or configurations hold by whatever name."""

    def holds_a_rate(name: str, value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and ("drop" in name.lower() or "jitter" in name.lower())

    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if holds_a_rate(name, value):
                setattr(module, name, 0.0)
    for config in {id(c): c for c in (model.config, model.config.get_text_config(), *_configs(model))}.values():
        for name, value in list(vars(config).items()):
            if holds_a_rate(name, value):
                setattr(config, name, 0.0)
    return model


@torch.no_grad()
def check_settled(model: Any, *, field: str) -> None:
    """InputError where the same tokens give other hidden states a second time, in the model's mode: by dropout under an unknown name, say."""
    ids = torch.arange(4, device=model.device).remainder(vocabulary_of(model))[None]
    first, second = (LastHidden(model)(input_ids=ids, attention_mask=torch.ones_like(ids)).float() for _ in range(2))
    if (first - second).abs().max() > 0.01 * first.abs().max():  # kernels that add in any order differ by far less
        raise InputError(
            f"{type(model).__name__} gives other hidden states for the same tokens a second time: something in it is random, "
            "and the ratio of a policy to itself would not be 1",
            field=field,
        )


def _configs(model: Any) -> list[Any]:
    return [module.config for module in model.modules() if hasattr(module, "config")]


def _load(auto: Any, name: str, field: str, **options: Any) -> Any:
    """``from_pretrained``, whatever goes wrong in which is an InputError with its reason."""
    _check_files(name, field)
    try:
        return auto.from_pretrained(name, **options)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else ""
        if isinstance(error, KeyError) or not reason:
            reason = f"{type(error).__name__}: {reason}"
        raise InputError(f"cannot load {name}: {reason}", field=field) from error


def _check_files(name: str, field: str) -> None:
    """What a directory holds that is not a model, and would be taken for one or end in a message about something else."""
    directory = Path(name)
    if not directory.is_dir():
        return
    if (directory / "adapter_config.json").exists():
        how = "peft's merge_and_unload; the trainers here save a model merged with lora_save"
        raise InputError(f"{name} is a PEFT adapter, not a model: merge it into its base model first ({how})", field=field)
    for file in directory.iterdir():
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            raise InputError(f"{file} is a pointer of git-lfs, not the file itself: git lfs pull fetches it", field=field)
    for index in directory.glob("*.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        if absent := sorted(shard for shard in shards if not (directory / shard).exists()):
            raise InputError(f"{name} lacks {', '.join(absent)}, which {index.name} lists: the download is not complete", field=field)


def _check_weights(name: str, field: str, info: dict[str, Any], may_be_new: Collection[str] = (), may_be_left: tuple[str, ...] = ()) -> None:
    """InputError where the files lack weights, have some of other shapes, or some that the model does not know."""

    def some(keys: list[str]) -> str:
        return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")

    missing = sorted(set(info["missing_keys"]) - set(may_be_new))
    unknown = sorted(key for key in info["unexpected_keys"] if not key.startswith(may_be_left))
    if mismatched := sorted(info["mismatched_keys"], key=str):
        first = mismatched[0]
        what = f"{first[0]} is {list(first[1])}, expected {list(first[2])}" if isinstance(first, (tuple, list)) else str(first)
        raise InputError(f"{name} has {len(mismatched)} weights of other shapes than its configuration says: {what}", field=field)
    if missing:
        also = f"; it has {some(unknown)} instead" if unknown else ""
        raise InputError(f"{name} lacks weights of the model: {some(missing)}{also}", field=field)
    if unknown:
        raise InputError(f"{name} has weights that the model does not know: {some(unknown)}", field=field)
