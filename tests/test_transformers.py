"""Hidden states and head of the common decoder families give what the model's own logits give."""

from types import SimpleNamespace

import pytest
import torch
import transformers

import rlkern as rk
from rlkern.integrations.transformers import LastHidden, head_of, last_hidden_and_head, unwrap

from .judge import assert_accurate
from .pages import before_and_after

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": EXPERTS,
    "Mistral": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "Gemma3Text": {"head_dim": 8},
    "Phi": {},
    "Phi3": {},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def make(family):
    config = getattr(transformers, f"{family.split()[0]}Config")(**SIZE | FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model, ids = make(family), torch.randint(3, 97, (2, 9))
    logits = model(input_ids=ids).logits
    expected, entropy = rk.token_logprobs(logits[:, :-1], ids[:, 1:], with_entropy=True)
    hidden, head = last_hidden_and_head(model, input_ids=ids)
    assert hidden.shape == (2, 9, 32)
    logprobs, own_entropy = rk.linear_token_logprobs(hidden[:, :-1], ids=ids[:, 1:], with_entropy=True, **head._asdict())
    assert_accurate(logprobs, expected, eps=2e-6)
    assert_accurate(own_entropy, entropy, eps=2e-6)
    names, parameters = zip(*model.named_parameters(), strict=True)
    exact = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    mine = torch.autograd.grad(logprobs.square().sum(), parameters, allow_unused=True)
    for name, x, y in zip(names, mine, exact, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert_accurate(x, y, eps=2e-5 * max(1.0, float(y.abs().max())))


def test_wrapped_models():
    model = make("Llama")
    ids = torch.randint(3, 97, (2, 5))

    class Parallel(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    for wrapped in (Parallel(model), torch.compile(model, backend="eager"), Parallel(torch.compile(model, backend="eager"))):
        assert unwrap(wrapped) is model
        assert torch.equal(LastHidden(wrapped)(input_ids=ids), model.model(input_ids=ids).last_hidden_state)
        assert head_of(wrapped).weight is model.lm_head.weight


def test_a_decoder_that_is_the_whole_model(monkeypatch):
    """As transformers 4 has it for GPT-2."""
    model, ids = make("GPT2"), torch.randint(3, 97, (2, 9))
    expected = model.transformer(input_ids=ids).last_hidden_state
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self)
    assert torch.equal(LastHidden(model)(input_ids=ids), expected)


def test_no_head_is_an_error():
    with pytest.raises(TypeError, match="Linear has no language-model head"):
        head_of(torch.nn.Linear(2, 3))


def test_the_program_of_the_page():
    """The program in docs/integrations.md gives the same log-probs before and after."""
    model, ids = make("Llama"), torch.randint(3, 97, (2, 9))
    results = []
    for program in before_and_after("docs/integrations.md", "last_hidden_and_head"):
        names = {"model": model, "ids": ids, "rk": rk}
        exec(program, names)
        results.append(names["logprobs"])
    assert_accurate(results[1], results[0], eps=2e-6)


def test_scales_of_other_families():
    """Factors under other names; before a soft-cap, the cap is divided by them: cap tanh(x scale / cap)."""
    model = make("Llama")
    for options, scale in (
        ({"lm_head_multiplier": 0.5}, 0.5),
        ({"output_multiplier": 0.25}, 0.25),
        ({"logits_scaling": 4.0}, 0.25),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0),
        ({"output_multiplier": 0.25, "final_logit_softcapping": 3.0}, 0.25),
    ):
        model.config = SimpleNamespace(**options)
        head = head_of(model)
        assert head.logit_scale == scale
        assert head.softcap == (3.0 / 0.25 if "final_logit_softcapping" in options else None)
        x = torch.linspace(-30, 30, 7)
        if head.softcap is not None:
            assert_accurate(head.softcap * torch.tanh(x / head.softcap) * scale, 3.0 * torch.tanh(x * 0.25 / 3.0), eps=1e-6)
