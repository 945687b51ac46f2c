"""The model card of a run: the hub reads it, its command is the run's, and a card of someone else's stays."""

import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from rlkern.trainers.arguments import command_line, parse
from rlkern.trainers.cards import Subject, card
from rlkern.trainers.grpo import GRPOArguments

from .runs import TRAINERS, fresh_accelerate, save_files_of_all, short_settings  # noqa: F401


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return save_files_of_all(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_saved_model_has_a_card(kind, files, tmp_path):
    arguments, train, _ = TRAINERS[kind]
    settings = short_settings(kind, files, tmp_path / "a run", lr_schedule="cosine")
    summary = train(settings)
    models = [path.parent for path in (tmp_path / "a run").glob("*/config.json")]
    assert sorted(path.name for path in models) == (["critic", "model"] if kind == "ppo" else ["model"])
    for model in models:
        loaded = ModelCard.load(model / "README.md")
        assert loaded.data.library_name == "transformers"
        assert loaded.data.base_model is None  # a directory is nothing that the hub could point to
        assert loaded.data.pipeline_tag == ("text-generation" if model.name == "model" and kind != "reward" else "text-classification")
        assert "rlkern" in loaded.data.tags
        assert f"from `{files}/model`" in loaded.text
        figures = summary["after"]
        assert all(f"{value:.4g}" in loaded.text for value in figures.values())
        (image,) = model.glob("*.png")
        assert f"]({image.name})" in loaded.text
        assert image.read_bytes() == (tmp_path / "a run" / image.name).read_bytes()
        (command,) = (line for line in loaded.text.splitlines() if line.startswith("rlkern "))
        given, _ = parse(arguments, shlex.split(command)[2:], prog="", description="")
        assert arguments(**given, output_dir=settings.output_dir) == arguments(**asdict(settings) | {"mixed_precision": "no"})


def test_a_card_of_another_stays(files, tmp_path):
    train = TRAINERS["reward"][1]
    train(short_settings("reward", files, tmp_path / "run"))
    path = tmp_path / "run" / "model" / "README.md"
    ours = path.read_text()
    path.write_text("ours, but edited\n" + ours)
    train(short_settings("reward", files, tmp_path / "run", resume=True))
    assert path.read_text() == ours
    path.write_text("mine\n")
    train(short_settings("reward", files, tmp_path / "run", resume=True))
    assert path.read_text() == "mine\n"


def test_the_front_matter_of_an_adapter_of_a_model_on_the_hub():
    subject = Subject(
        "run: model", "A language model", ["grpo"], "someone/a-model", scores=False, adapter=True, command="rlkern grpo", place="on cpu"
    )
    data = ModelCard(card(subject, {"steps": 3}, "reward.png")).data
    assert data.to_dict() == {
        "base_model": "someone/a-model",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["rlkern", "grpo", "lora"],
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reward": ["a b:c", "d:e=2"], "model": "m", "data": "it's.jsonl", "correction_high": None, "correction_low": 0.1, "track_mismatch": True},
        {"lora_rank": 4, "kl_coef": 1e-7, "loss": "dapo", "step_separator": "\n\n", "log_with": ["tensorboard", "wandb"]},
    ],
)
def test_a_command_line_sets_what_it_was_made_of(changes):
    words = shlex.split(shlex.join(command_line(GRPOArguments(**changes))))
    given, _ = parse(GRPOArguments, words, prog="", description="")
    assert GRPOArguments(**given) == GRPOArguments(**changes)
