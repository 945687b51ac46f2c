"""What trainers are given: models that are not what they seem, directories that are somebody's, settings of accelerate's environment."""

import json
import multiprocessing
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlkern.trainers import directories, grpo, policy, ppo, reward
from rlkern.trainers.arguments import parse
from rlkern.trainers.data import batch_at, read_jsonl
from rlkern.trainers.errors import InputError
from rlkern.trainers.loading import load_model, load_scorer, load_tokenizer, without_dropout
from rlkern.trainers.rewards import Reward, load_rewards, total
from rlkern.trainers.rollout import prompt_tokens
from rlkern.trainers.runs import read_metrics

from .runs import TRAINERS, fresh_accelerate, save_files_of_all, short_settings  # noqa: F401

KINDS = list(TRAINERS)


@pytest.fixture
def files(tmp_path) -> Path:
    return save_files_of_all(tmp_path)


def run(kind: str, files: Path, output: Path, **changes):
    return TRAINERS[kind][1](short_settings(kind, files, output, **changes))


def spoil_weights(files: Path, change) -> str:
    """A copy of the model whose weights are changed."""
    broken = files / "broken"
    shutil.copytree(files / "model", broken)
    weights = load_file(broken / "model.safetensors")
    save_file(change(weights), broken / "model.safetensors", {"format": "pt"})
    return str(broken)


# ---- models ---------------------------------------------------------------------------------------------------------------------------------

CHANGES = {
    "prefixed": (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, r"lacks weights of the model: .*it has _orig_mod\."),
    "missing": (lambda w: {k: v for k, v in w.items() if "embed" not in k}, r"lacks weights of the model: model\.embed_tokens\.weight"),
    "unknown": (lambda w: {**w, "model.extra.weight": torch.zeros(2)}, r"weights that the model does not know: model\.extra\.weight"),
    "other shapes": (
        lambda w: {k: v[..., :-1].contiguous() if "gate" in k else v for k, v in w.items()},
        r"weights of other shapes",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_all_there_and_known(kind, name, files):
    change, message = CHANGES[name]
    broken = spoil_weights(files, change)
    with pytest.raises(InputError, match=message) as raised:
        run(kind, files, files / "run", **({"critic": broken} if kind == "ppo" else {"model": broken}))
    assert raised.value.field == ("critic" if kind == "ppo" else "model")
    assert not (files / "run").exists()


def half(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:3000])


def pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 123\n")


def adapter(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")


def lost_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


def quantised(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))


def no_tokenizer(model: Path) -> None:
    for file in model.glob("token*"):
        file.unlink()


DAMAGES = {
    half: r"cannot load .*: .*\w",
    pointer: r"is a pointer of git-lfs",
    adapter: r"is a PEFT adapter, not a model: merge it",
    lost_shard: r"lacks model-00001-of-00002\.safetensors",
    quantised: r"cannot load .*bitsandbytes",
    no_tokenizer: r"cannot load .*: .*\w",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("kind", ["grpo", "reward"])
def test_what_cannot_be_loaded_says_why(kind, damage, files):
    damage(files / "model")
    with pytest.raises(InputError, match=DAMAGES[damage]) as raised:
        run(kind, files, files / "run")
    assert raised.value.field == "model"


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_language_model_is_no_reward_model(kind, files):
    with pytest.raises(InputError, match=r"no trained score head \(score\.weight\)"):
        run(kind, files, files / "run", reward=[str(files / "model")])


def test_a_reward_model_of_several_outputs(files):
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_labels=3
    )
    LlamaForSequenceClassification(config).save_pretrained(files / "rm")
    load_tokenizer(str(files / "model")).save_pretrained(files / "rm")
    with pytest.raises(InputError, match="has 3 outputs, not 1"):
        run("grpo", files, files / "run", reward=[str(files / "rm")])


def test_a_new_score_head_is_said_and_a_trained_one_is_kept(files, capsys):
    tokenizer = load_tokenizer(str(files / "model"))
    fresh = load_scorer(str(files / "model"), torch.float32, tokenizer)
    assert "a new score head, of zeros" in "".join(capsys.readouterr())
    assert not fresh.score.weight.any()
    torch.nn.init.ones_(fresh.score.weight)
    fresh.save_pretrained(files / "rm")
    kept = load_scorer(str(files / "rm"), torch.float32, tokenizer, trained=True)
    assert (kept.score.weight == 1).all()
    assert "new score head" not in "".join(capsys.readouterr())


def test_a_classifier_that_lost_its_head_is_no_critic(files):
    tokenizer = load_tokenizer(str(files / "model"))
    load_scorer(str(files / "model"), torch.float32, tokenizer).save_pretrained(files / "rm")
    weights = load_file(files / "rm" / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if name != "score.weight"}, files / "rm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"no trained score head \(score\.weight\)") as raised:
        run("ppo", files, files / "run", critic=str(files / "rm"))
    assert raised.value.field == "critic"


def test_no_family_keeps_dropout(tmp_path):
    config = GPT2Config(
        vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, summary_first_dropout=0.2
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), torch.float32).train()
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.config.attn_pdrop == model.config.summary_first_dropout == 0

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden_dropout_prob, self.layerdrop, self.router_jitter_noise = 0.1, 0.2, 0.3
            self.config = AutoModelForCausalLM.from_pretrained(tmp_path).config
            self.inner = torch.nn.Sequential(torch.nn.Dropout2d(0.4), torch.nn.AlphaDropout(0.5))

    own = without_dropout(Own())
    assert (own.hidden_dropout_prob, own.layerdrop, own.router_jitter_noise, own.inner[0].p, own.inner[1].p) == (0,) * 5


@pytest.mark.parametrize("kind", KINDS)
def test_randomness_by_an_unknown_name_is_found(kind, files, monkeypatch):
    def noisy(module, inputs, output):
        return output + 0.1 * torch.rand(()) if module.training else output

    for name in ("load_model", "load_scorer"):
        for module in (policy, ppo, reward):
            if (load := getattr(module, name, None)) is not None:

                def loading(*inputs, load=load, **options):
                    model = load(*inputs, **options)
                    model.base_model.norm.register_forward_hook(noisy)
                    return model

                monkeypatch.setattr(module, name, loading)
    with pytest.raises(InputError, match="gives other hidden states for the same tokens a second time") as raised:
        run(kind, files, files / "run")
    assert raised.value.field == "model"


# ---- directories ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grpo", "reward"])
@pytest.mark.parametrize(("where", "how"), [(".", "holds"), ("model", "is"), ("model/run", "lies in")])
def test_a_run_does_not_take_the_place_of_its_inputs(kind, where, how, files):
    before = (files / "model" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=rf"{how} .*model, which model names") as raised:
        run(kind, files, files / where)
    assert raised.value.field == "output_dir"
    assert (files / "model" / "model.safetensors").read_bytes() == before


def test_nor_through_a_link_or_of_a_data_file(files, tmp_path):
    (files / "link").symlink_to(files / "model")
    with pytest.raises(InputError, match=r"is .*model, which model names"):
        run("grpo", files, files / "link")
    (files / "box").mkdir()
    shutil.move(files / "data.jsonl", files / "box" / "data.jsonl")
    with pytest.raises(InputError, match=r"holds .*data\.jsonl, which data names"):
        run("grpo", files, files / "box", data=str(files / "box" / "data.jsonl"))


def test_directories_that_cannot_be(files, monkeypatch):
    for given, message in (
        ("", "empty name"),
        ("  ", "empty name"),
        (str(files / "data.jsonl"), "is a file"),
        (str(files / "data.jsonl/x"), "is a file"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            directories.run_directory(given, name="grpo", resume=False)
        assert raised.value.field == "output_dir"
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(InputError, match="cannot be written to"):
        directories.run_directory(str(files / "new"), name="grpo", resume=False)


def test_there_must_be_a_run_to_resume(files, monkeypatch):
    monkeypatch.chdir(files)
    for given in (None, "nowhere", "model"):
        with pytest.raises(InputError, match=r"no run .*to resume") as raised:
            directories.run_directory(given, name="grpo", resume=True)
        assert raised.value.field == "resume"


def _claim(path: str, queue) -> None:
    os.chdir(path)
    queue.put(str(directories.run_directory(None, name="grpo", resume=False)))


def test_runs_that_start_together_take_directories_of_their_own(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_claim, args=(str(tmp_path), queue)) for _ in range(6)]
    for process in processes:
        process.start()
    taken = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(taken) == [f"runs/grpo-{n}" for n in range(1, 7)]


def test_of_two_runs_in_one_directory_the_second_is_refused(tmp_path):
    directories.store_settings(tmp_path / "run", {"steps": 1}, free=set(), new=True)
    with pytest.raises(InputError, match="another run has just begun in"):
        directories.store_settings(tmp_path / "run", {"steps": 2}, free=set(), new=True)
    assert directories.stored_settings(tmp_path / "run") == {"steps": 1}
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["settings.json"]


def test_a_start_that_fails_leaves_nothing(files, monkeypatch):
    monkeypatch.chdir(files)
    with pytest.raises(InputError):
        run("grpo", files, files, output_dir=None, model="nowhere")
    assert not (files / "runs").exists()


# ---- accelerate -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_accumulation_of_the_launcher_is_refused(kind, files, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(InputError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 4"):
        run(kind, files, files / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_the_launchers_precision_is_taken_where_the_settings_have_none(kind, files, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(kind, files, files / "run")
    assert json.loads((files / "run" / "settings.json").read_text())["mixed_precision"] == "bf16"


def test_a_precision_that_is_set_wins_and_is_said(files, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run("grpo", files, files / "run", mixed_precision="no")
    assert "mixed_precision is no, as set here; accelerate was launched with bf16" in "".join(capsys.readouterr())


def test_one_loss_scale_for_two_optimisers(files, monkeypatch):
    """That the policy's step makes the scale grow changes nothing of the critic's gradient in the same step."""
    norms = []
    for growth in (10**9, 1):

        def scaled(*args, growth=growth, make=Accelerator, **options):
            accelerator = make(*args, **options)
            accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth), True
            return accelerator

        with monkeypatch.context() as patch:
            patch.setattr("rlkern.trainers.runs.Accelerator", scaled)
            run("ppo", files, files / f"run-{growth}", mixed_precision="fp16")
        (row,) = (row for row in read_metrics(files / f"run-{growth}" / "metrics.jsonl") if row["step"] == 1)
        norms.append(row["critic_grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


# ---- tokens ---------------------------------------------------------------------------------------------------------------------------------


def letters(count: int) -> PreTrainedTokenizerFast:
    """Another tokenizer: a token for each letter."""
    vocabulary = {"<pad>": 0, "<end>": 1, "<unk>": 2} | {chr(97 + i): 3 + i for i in range(count)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def rewrite(files: Path, change) -> None:
    """All prompts, changed."""
    for name in ("data", "prefs"):
        rows = [json.loads(line) for line in (files / f"{name}.jsonl").read_text().splitlines()]
        (files / f"{name}.jsonl").write_text("".join(json.dumps({**row, "prompt": change(row["prompt"])}) + "\n" for row in rows))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_the_model_does_not_know(kind, files):
    tokenizer = load_tokenizer(str(files / "model"))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(files / "model")
    run(kind, files, files / "padded")  # padding is masked: another token stands for it
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(files / "model")
    rewrite(files, lambda prompt: prompt + "<think>")
    with pytest.raises(InputError, match=r"jsonl:1: token \d+, '<think>', is beyond the model's vocabulary of"):
        run(kind, files, files / "run")


@pytest.mark.parametrize(("count", "message"), [(41, "another tokenizer than the policy"), (5, "the policy's tokenizer has")])
def test_a_critic_reads_the_policys_tokens(count, message, files):
    tokenizer = letters(count)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1, pad_token_id=0
    )
    LlamaForSequenceClassification(config).save_pretrained(files / "critic")
    tokenizer.save_pretrained(files / "critic")
    with pytest.raises(InputError, match=message) as raised:
        run("ppo", files, files / "run", critic=str(files / "critic"))
    assert raised.value.field == "critic"


def test_scorers_of_few_positions(files):
    tokenizer = load_tokenizer(str(files / "model"))
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=6, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0, bos_token_id=None, eos_token_id=1
    )
    GPT2ForSequenceClassification(config).save_pretrained(files / "short")
    tokenizer.save_pretrained(files / "short")
    with pytest.raises(InputError, match="reads 6 tokens, but prompts and completions have up to"):
        run("ppo", files, files / "run", critic=str(files / "short"))
    with pytest.raises(InputError, match="tokens, more than the model's 6"):
        run("grpo", files, files / "run", reward=[str(files / "short")])


def test_one_beginning_and_no_end(files):
    tokenizer = load_tokenizer(str(files / "model"))
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    special = [("<bos>", begin), (tokenizer.eos_token, end)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=f"<bos> $A {tokenizer.eos_token}", special_tokens=special)
    plain = prompt_tokens(tokenizer, "What is 1 + 2?", "p")
    assert plain == prompt_tokens(tokenizer, "<bos>What is 1 + 2?", "p")
    assert plain.count(begin) == 1
    assert end not in plain


TEMPLATES = {
    "{{ raise_exception('no system messages') }}": "TemplateError: no system messages",
    "{% for m in messages %}{{ m.name + m.content }}{% endfor %}": "cannot be rendered by the chat template",
    "{% for m in messages %}": "cannot be rendered by the chat template",
    "{{ '' }}": "the prompt has no tokens",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["grpo", "reward"])
def test_prompts_that_cannot_be_rendered_are_named(kind, template, files):
    tokenizer = load_tokenizer(str(files / "model"))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(files / "model")
    rewrite(files, lambda prompt: [{"role": "user", "content": prompt}])
    with pytest.raises(InputError, match=rf"jsonl:1: .*{TEMPLATES[template]}"):
        run(kind, files, files / "run")


def test_half_a_surrogate_pair(files):
    rewrite(files, lambda prompt: prompt + "\ud800")
    with pytest.raises(InputError, match=r"data\.jsonl:1: the prompt cannot be made into tokens"):
        run("grpo", files, files / "run")


# ---- settings and data ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["", "=0.5"])
@pytest.mark.parametrize("name", ["lr=1e-5/model", "lr=0.1", "beta=0.1", "2026-01-01T10:00:00/model"])
def test_paths_of_reward_models_may_hold_anything(name, weight, files):
    fresh = load_scorer(str(files / "model"), torch.float32, load_tokenizer(str(files / "model")))
    fresh.save_pretrained(files / name)
    load_tokenizer(str(files / "model")).save_pretrained(files / name)
    (loaded,) = load_rewards([f"{files}/{name}{weight}"], [])
    assert (loaded.name, loaded.weight) == (f"{files}/{name}", 0.5 if weight else 1.0)


def test_a_function_in_a_folder_with_an_equals_sign(files):
    (files / "lr=1").mkdir()
    shutil.copy(files / "rewards.py", files / "lr=1" / "rewards.py")
    (loaded,) = load_rewards([f"{files}/lr=1/rewards.py:sevens=2"], [])
    assert (loaded.name, loaded.weight) == ("sevens", 2.0)


@pytest.mark.parametrize("name", ["prompts", "completions"])
def test_the_prompt_may_have_any_name(name, files):
    text = (files / "data.jsonl").read_text().replace('"prompt"', f'"{name}"')
    (files / "data.jsonl").write_text(text, encoding="utf-8-sig")  # with a byte-order mark
    assert len(read_jsonl(files / "data.jsonl", prompt_field=name)) == 6


def test_a_reward_that_does_not_apply(files):
    def of(values):
        return lambda completions: list(values)

    rows = read_jsonl(files / "data.jsonl")[:3]
    two = [Reward("a", of([1.0, None, 3.0]), 1.0), Reward("b", of([None, 2.0, 4.0]), 0.5)]
    sums, means = total(two, rows, ["x", "y", "z"])
    assert sums == [1.0, 1.0, 5.0]
    assert means == {"reward/a": 2.0, "reward/b": 3.0}
    with pytest.raises(InputError, match="no reward applies to the completion 'y'"):
        total([two[0], Reward("c", of([0.0, None, 0.0]), 1.0)], rows, ["x", "y", "z"])
    with pytest.raises(InputError, match="gave None"):
        total(two[:1], rows, ["x", "y", "z"])


def test_yaml_keeps_text_as_it_stands(tmp_path):
    (tmp_path / "c.yaml").write_text("mixed_precision: no\nlearning_rate: 1e-6\nprompt_field: 007\n")
    values, _ = parse(grpo.GRPOArguments, ["--config", str(tmp_path / "c.yaml")], prog="x", description="x")
    assert values == {"mixed_precision": "no", "learning_rate": 1e-6, "prompt_field": "007"}


def test_generation_settings_that_contradict_themselves_are_mended(files):
    path = files / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.9, "top_p": 0.6}))
    run("grpo", files, files / "run")
    assert json.loads((files / "run" / "model" / "generation_config.json").read_text())["do_sample"]


def test_a_batch_is_drawn_without_an_order_of_all_rows_each_time(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        random.Random, "sample", lambda self, population, k, sample=random.Random.sample: drawn.append(k) or sample(self, population, k)
    )
    batches = [batch_at(step, 4, 1000, seed=123) for step in range(250)]
    assert drawn == [1000]
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
