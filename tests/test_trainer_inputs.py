"""What trainers are given: models that are not what they seem, directories that are somebody's, settings of accelerate's environment."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

from rlkern.trainers import directories, grpo, ppo, reward, tutorial
from rlkern.trainers.errors import InputError
from rlkern.trainers.loading import load_model, load_scorer, load_tokenizer, without_dropout
from rlkern.trainers.runs import read_metrics

from .runs import fresh_accelerate, sampling_settings, save_files  # noqa: F401

KINDS = {
    "grpo": (grpo.GRPOArguments, grpo.train),
    "ppo": (ppo.PPOArguments, ppo.train),
    "reward": (reward.RewardArguments, reward.train),
}


@pytest.fixture
def files(tmp_path) -> Path:
    save_files(tmp_path, "def sevens(completions, **fields):\n    return [float(c.count('7')) for c in completions]\n")
    pairs = [{"prompt": tutorial.question(a, 3), "chosen": str(a + 3), "rejected": "0"} for a in range(7)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return tmp_path


def run(kind: str, files: Path, output: Path, **changes):
    arguments, train = KINDS[kind]
    settings = sampling_settings(files, output) | {"steps": 1, "epochs": 1, "minibatches": 1}
    if kind == "reward":
        settings = {k: settings[k] for k in ("model", "output_dir", "eval_fraction", "steps", "prompts_per_step", "learning_rate", "cpu")}
        settings["data"] = str(files / "prefs.jsonl")
    return train(arguments(**settings | changes))


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
