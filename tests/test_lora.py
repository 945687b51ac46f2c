"""LoRA in the trainers: what is trained and what is not, the reference, what is saved, and that a killed run resumes to the same numbers."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import rlkern as rk
from rlkern import reference
from rlkern.integrations.transformers import LastHidden
from rlkern.trainers import runs
from rlkern.trainers.errors import InputError
from rlkern.trainers.lora import Adapter, check_lora
from rlkern.trainers.rewards import RewardModel

from .judge import assert_accurate, rounding
from .runs import TRAINERS, Killed, assert_same_run, die_at, fresh_accelerate, save_files_of_all, short_settings  # noqa: F401

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return save_files_of_all(tmp_path_factory.mktemp("files"))


def start(kind: str, files: Path, output: Path, **changes: Any) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    return TRAINERS[kind][2](short_settings(kind, files, output, **{"lora_rank": 4, "learning_rate": 0.01, **changes}))


def moved(adapter: Adapter) -> Adapter:
    """The adapter at a place where it does something: a new one's B is 0, and A has no gradient there."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B["default"].weight.normal_(std=0.2)
    return adapter


def test_gradients_are_those_of_peft_and_eager_pytorch(files, tmp_path):
    """Of the adapter, from the fused loss on a batch, against autograd through the logits of a model that peft made. The KL is to the base model."""
    run = start("grpo", files, tmp_path / "run")
    adapter = moved(run.adapters[run.model])
    rows, batch, _ = run.rollout(0)
    advantages, config = torch.randn(len(rows)), run.args.loss_config()
    old = run.frozen_logprobs(run.policy, batch) + 0.3 * torch.randn(batch.mask.shape)
    ref = run.frozen_logprobs(run.reference, batch)
    scored = run.scored(run.policy, batch)
    assert not scored["weight"].requires_grad
    rk.fused_linear_policy_loss(**scored, old_logprobs=old, advantages=advantages, ref_logprobs=ref, config=config).loss.backward()
    mine = {name: parameter.grad for name, parameter in run.model.named_parameters() if parameter.grad is not None}
    state = {name.replace("default.", ""): value for name, value in peft.get_peft_model_state_dict(adapter.peft).items()}

    def eager(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(files / "model", dtype=dtype)
        plain = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        assert not peft.set_peft_model_state_dict(plain, state).unexpected_keys
        plain = plain.to(dtype)
        new = batch.mask.shape[1]

        def logprobs() -> torch.Tensor:
            logits = plain(**run.inputs(batch)).logits[:, -new - 1 : -1] / run.args.temperature
            return logits.log_softmax(-1).gather(-1, batch.ids[:, -new:, None]).squeeze(-1)

        with torch.no_grad(), plain.disable_adapter():
            plain_ref = logprobs()
        loss, _ = reference.policy_loss(logprobs(), old.to(dtype), advantages.to(dtype), mask=batch.mask, ref_logprobs=plain_ref, config=config)
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    exact, peer = eager(torch.float64), eager(torch.float32)
    assert mine.keys() == exact.keys()
    assert all("lora_" in name for name in mine)
    assert len(mine) == 2 * 7  # of one layer of Llama: q, k, v, o, gate, up, down
    for name in mine:
        assert exact[name].any()
        assert_accurate(mine[name], exact[name], peer[name], k=4, eps=4 * rounding(torch.float32, exact[name]))


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_base_model_stays_as_it_is_and_the_reference_is_it(kind, files, tmp_path):
    run = start(kind, files, tmp_path / "run")
    run.step(0)
    run.step(1)
    own = {name: parameter for name, parameter in run.model.named_parameters() if not parameter.requires_grad}
    base = load_file(files / "model" / "model.safetensors")
    compared = {name.replace(".base_layer", ""): parameter for name, parameter in own.items() if "score" not in name}
    assert compared.keys() | {"lm_head.weight"} == base.keys()
    assert all(torch.equal(parameter, base[name]) for name, parameter in compared.items())
    assert all(p.any() for n, p in run.model.named_parameters() if "lora_B" in n), "the adapter has not learned"
    if kind != "reward":
        _, batch, _ = run.rollout(2)
        plain = LastHidden(AutoModelForCausalLM.from_pretrained(files / "model"))
        ref, expected = (run.frozen_logprobs(model, batch) for model in (run.reference, plain))
        assert torch.equal(ref, expected)
        assert not torch.equal(ref, run.frozen_logprobs(run.policy, batch))
    for model in run.adapters:  # policy; policy and critic; reward model
        assert {p.requires_grad for n, p in model.named_parameters() if ".lora_" in n or "score.modules_to_save" in n} == {True}
    assert len(run.adapters) == (2 if kind == "ppo" else 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_loads_with_peft_and_with_transformers(dtype, files, tmp_path):
    """Adapter and merged model, of policy and critic; merged weights are peft's to the bit, and an engine with weights of its own gets them."""
    run = start("ppo", files, tmp_path / "run", dtype=dtype, engine="tests.own_engines:Spelling")
    run.step(0)
    inputs = {"input_ids": torch.tensor([[3, 5, 24, 7]])}
    kinds: dict[Any, Any] = {
        run.model: ("model", AutoModelForCausalLM, {}),
        run.critic.model: ("critic", AutoModelForSequenceClassification, {"num_labels": 1}),
    }
    with run.sampling():
        given = run.sample.engine.weights[-1]
    run.save()
    run.args.lora_save = "merged"
    for model, (name, auto, options) in kinds.items():
        adapter = run.adapters[model]
        base = auto.from_pretrained(files / "model", dtype=getattr(torch, dtype), **options)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run" / name)
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        run.save_pretrained(model, run.sample.tokenizer, f"merged-{name}")
        merged = auto.from_pretrained(tmp_path / "run" / f"merged-{name}", dtype=getattr(torch, dtype))
        expected = loaded.merge_and_unload().state_dict()
        assert merged.state_dict().keys() == expected.keys()
        for key, value in merged.state_dict().items():
            assert torch.equal(value, expected[key]), key
            assert model is not run.model or key == "lm_head.weight" or torch.equal(value, given[key])
        assert adapter.layers
    assert given.keys() == dict(AutoModelForCausalLM.from_pretrained(files / "model").named_parameters()).keys()


def test_a_run_that_ended_is_saved_in_another_form(files, tmp_path):
    """A reward model, as an adapter and then merged, when it can score; and as an adapter again."""
    changes = {"lora_rank": 2, "lora_targets": ["q_proj", "v_proj"], "lora_alpha": 1.0}
    TRAINERS["reward"][1](short_settings("reward", files, tmp_path / "run", **changes))
    first = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    with pytest.raises(InputError, match="is a PEFT adapter"):
        RewardModel(str(tmp_path / "run" / "model"), device=torch.device("cpu"), field="reward")
    TRAINERS["reward"][1](short_settings("reward", files, tmp_path / "run", **changes, resume=True, lora_save="merged"))
    model = RewardModel(str(tmp_path / "run" / "model"), device=torch.device("cpu"), field="reward")
    assert len({model(prompts=["What is 1 + 2?"], completions=[text])[0] for text in ("3", "4")}) == 2
    TRAINERS["reward"][1](short_settings("reward", files, tmp_path / "run", **changes, resume=True))
    assert {path.name for path in (tmp_path / "run" / "model").iterdir()} == first


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_killed_run_resumes_to_the_same_bits(kind, files, tmp_path, monkeypatch):
    changes = {"lora_rank": 4, "learning_rate": 0.01, "steps": 4, "save_every": 2}
    _, train, trainer = TRAINERS[kind]
    train(short_settings(kind, files, tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        die_at(patch, trainer, "step", 4)
        with pytest.raises(Killed):
            train(short_settings(kind, files, tmp_path / "cut", **changes))
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").iterdir()
    for file in checkpoint.glob("model*.safetensors"):  # small: what is not trained is not in it
        assert all(".lora_" in name or ".modules_to_save." in name for name in load_file(file))
    train(short_settings(kind, files, tmp_path / "cut", **changes, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_checkpointed_activations_give_the_same_step(files, tmp_path):
    logs = [start("grpo", files, tmp_path / str(on), gradient_checkpointing=on).step(0) for on in (False, True)]
    assert logs[0] == logs[1]
    assert logs[0]["grad_norm"] > 0


def test_what_cannot_be_had_is_refused_at_the_start(files, tmp_path, monkeypatch):
    for changes, message in (
        ({"lora_targets": ["nowhere"]}, "nowhere: .*not found"),
        ({"lora_targets": ["lm_head"]}, "embedding or head"),
        ({"lora_targets": ["q_proj", "embed_tokens"]}, "embedding or head"),
        ({"lora_rank": 0}, "at least 1"),
        ({"lora_rank": None, "lora_save": "merged"}, "must be set"),
        ({"refresh_every": 2}, "cannot be refreshed"),
    ):
        with pytest.raises(InputError, match=message):
            start("grpo", files, tmp_path / "run", **changes)
    with pytest.raises(InputError, match="LoRA under FSDP"):
        check_lora(sharded=True)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "shards_models", lambda accelerator: True)
        with pytest.raises(InputError, match="LoRA under FSDP"):
            start("reward", files, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"LoRA needs peft.*rlkern\[lora\]"):
        start("grpo", files, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tied_weights_and_transposed_ones(files, tmp_path):
    """GPT-2: its layers hold their weights transposed, and its head is its embedding."""
    model = str(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    tokenizer.save_pretrained(model)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=tokenizer.eos_token_id)
    ).save_pretrained(model)
    run = start("grpo", files, tmp_path / "run", model=model, lora_save="merged")
    assert run.step(0)["grad_norm"] > 0
    moved(run.adapters[run.model])
    run.save()
    ids = torch.tensor([[3, 5, 24, 7]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    plain = AutoModelForCausalLM.from_pretrained(model)
    run.model.eval()
    with torch.no_grad():
        mine, off, peer = merged(ids).logits, plain(ids).logits, run.model(ids).logits
        exact = run.model.double()(ids).logits
    assert (off - exact).abs().max() > 0.01  # or the adapter does nothing
    assert_accurate(mine, exact, peer, k=4, eps=4 * rounding(torch.float32, exact))
    assert merged.lm_head.weight is merged.transformer.wte.weight


def test_a_new_adapter_changes_nothing(files, tmp_path):
    run = start("grpo", files, tmp_path / "run")
    plain = AutoModelForCausalLM.from_pretrained(files / "model")
    ids = torch.tensor([[3, 5, 24, 7]])
    assert torch.equal(run.model(ids).logits, plain(ids).logits)
    other = copy.deepcopy(plain)
    other.load_state_dict(dict(run.adapters[run.model].merged()), strict=False)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), plain.parameters(), strict=True))
