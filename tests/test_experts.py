"""Mixtures of experts whose configuration asks for their load-balancing loss: they sample, train with it, and are saved asking for it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from rlkern.integrations.transformers import load_balancing_loss
from rlkern.trainers import tutorial
from rlkern.trainers.errors import InputError
from rlkern.trainers.experts import Balanced, last_hidden
from rlkern.trainers.runs import read_metrics

from .runs import TRAINERS, fresh_accelerate, save_files_of_all, short_settings  # noqa: F401

COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
FAMILIES = {
    "Mixtral": {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "head_dim": 8},
    "GptOss": {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "Olmoe": {"intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def build(family: str, coefficient: float = 0.7):
    torch.manual_seed(0)
    tokenizer = tutorial.build_tokenizer()
    options = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family], **options, router_aux_loss_coef=coefficient)
    config.output_router_logits = True
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_familys_own(family):
    model = build(family)
    torch.manual_seed(1)
    ids, mask = torch.randint(3, 20, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    theirs = model(input_ids=ids, attention_mask=mask, use_cache=False)
    out = model.model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    assert torch.equal(load_balancing_loss(model, out.router_logits, mask), theirs.aux_loss)
    hidden = last_hidden(model, family)
    states, loss = hidden(input_ids=ids, attention_mask=mask)
    assert torch.equal(states, out.last_hidden_state)
    assert torch.equal(loss, 0.7 * theirs.aux_loss)
    assert not model.config.output_router_logits  # sampling does without


def test_a_family_without_such_a_loss_is_refused():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, intermediate_size=16, **COMMON))
    with pytest.raises(TypeError, match="LlamaForCausalLM has no load-balancing loss"):
        load_balancing_loss(model, (), None)
    assert not isinstance(last_hidden(model, "m"), Balanced)
    model.config.output_router_logits = True
    with pytest.raises(InputError, match="m asks for output_router_logits, but LlamaForCausalLM has no load-balancing loss"):
        last_hidden(model, "m")


@pytest.fixture
def files(tmp_path) -> Path:
    return save_files_of_all(tmp_path)


def gradients(kind: str, files: Path, name: str, coefficient: float, **changes):
    """Of the one update of a step, with its numbers; and the run."""
    build("Mixtral", coefficient).save_pretrained(files / "model")
    run = TRAINERS[kind][2](short_settings(kind, files, files / name, **changes))
    found = {}
    descend = run.descend

    def watching(*trained):
        found.update({n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None})
        return descend(*trained)

    run.descend = watching
    return found, run.step(0), run


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_its_gradient_is_added(kind, size, files, monkeypatch):
    batches = []
    original = TRAINERS[kind][2].rollout
    monkeypatch.setattr(TRAINERS[kind][2], "rollout", lambda self, step: batches.append(original(self, step)) or batches[-1])
    without, numbers, _ = gradients(kind, files, "without", 0.0, micro_batch_size=size)
    assert numbers["load_balancing_loss"] == 0
    both, numbers, _ = gradients(kind, files, "with", 0.7, micro_batch_size=size)
    assert batches[0][2] == batches[1][2]
    # By transformers itself, with all completions in one pass: with the passes of 4, whose order is random, only the value can be near.
    fresh = AutoModelForCausalLM.from_pretrained(files / "model")
    batch = batches[1][1]
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    loss = 0.7 * fresh(input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=positions, use_cache=False).aux_loss
    assert numbers["load_balancing_loss"] == pytest.approx(loss.item(), rel=1e-5 if size is None else 0.2)
    if size is None:
        loss.backward()
        for name, parameter in fresh.named_parameters():
            expected = without[name] + (0 if parameter.grad is None else parameter.grad)
            torch.testing.assert_close(both[name], expected, atol=1e-6, rtol=1e-4)
        assert any("gate" in name and parameter.grad.abs().max() > 1e-4 for name, parameter in fresh.named_parameters() if "gate" in name)


@pytest.mark.parametrize(
    ("kind", "changes"), [("grpo", {}), ("ppo", {"kl_coef": 0.1}), ("grpo", {"lora_rank": 2, "lora_save": "merged"}), ("reward", {})]
)
def test_runs(kind, changes, files):
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    build("Mixtral").save_pretrained(files / "model")
    TRAINERS[kind][1](short_settings(kind, files, files / "run", steps=2, **changes))
    rows = read_metrics(files / "run" / "metrics.jsonl")
    assert all(("load_balancing_loss" in row) == (kind != "reward") for row in rows[1:])
    assert json.loads((files / "run" / "model" / "config.json").read_text())["output_router_logits"]
