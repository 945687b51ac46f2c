"""``rlkern`` on the command line: where settings come from, and that what a user gives wrong is one line and exit code 2."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rlkern import cli
from rlkern.trainers import grpo, tutorial
from rlkern.trainers.arguments import parse
from rlkern.trainers.grpo import GRPOArguments

EXAMPLE = Path(__file__).parents[1] / "examples" / "grpo"


def read(argv: list[str]) -> dict:
    return parse(GRPOArguments, argv, prog="rlkern grpo", description="")[0]


@pytest.fixture
def trained(monkeypatch) -> list[GRPOArguments]:
    """What the trainer is called with, instead of training."""
    seen: list[GRPOArguments] = []
    monkeypatch.setattr(grpo, "train", lambda args: seen.append(args) or {})
    return seen


def test_the_command_line_overrides_the_file(tmp_path):
    config = tmp_path / "grpo.yaml"
    config.write_text("steps: 7\nlearning-rate: 1e-5\nreward: a:b\ngradient_checkpointing: true\nclip_high: null\nkl_coef: 1\n")
    values = read(["--config", str(config), "--steps", "9", "--no-gradient-checkpointing"])
    assert values == {"steps": 9, "learning_rate": 1e-5, "reward": ["a:b"], "gradient_checkpointing": False, "clip_high": None, "kl_coef": 1.0}
    assert isinstance(values["kl_coef"], float)
    assert read(["--reward", "a:b", "c:d=2", "--reward", "e:f"]) == {"reward": ["a:b", "c:d=2", "e:f"]}
    assert read([]) == {}


def test_every_setting_can_be_given(tmp_path):
    config = tmp_path / "grpo.yaml"
    values = {field.name: getattr(GRPOArguments(), field.name) for field in fields(GRPOArguments)}
    config.write_text(json.dumps(values))  # which is YAML
    assert read(["--config", str(config)]) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 5\nlearning_rat: 1\n", "grpo.yaml:2: unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ("\nsteps: many\n", "grpo.yaml:2: steps: expected an integer, got 'many'"),
        ("steps: 2.5\n", "grpo.yaml:1: steps: expected an integer, got 2.5"),
        ("steps: true\n", "grpo.yaml:1: steps: expected an integer, got True"),
        ("cpu: 1\n", "grpo.yaml:1: cpu: expected true or false, got 1"),
        ("steps:\n", "grpo.yaml:1: steps: expected an integer, got None"),
        ("loss: gropo\n", "grpo.yaml:1: loss: expected one of grpo, "),
        ("steps: 1\nsteps: 2\n", "grpo.yaml:2: 'steps' is set a second time"),
        ("steps: [1\n", "grpo.yaml:2: not YAML: "),
        ("- steps\n", "grpo.yaml:1: expected lines of `setting: value`"),
        ("seed: 1\ntemperature: 0\n", "grpo.yaml:2: temperature: must be above 0, got 0.0"),
        ("model: m\ndata: nowhere.jsonl\nreward: a:b\n", "grpo.yaml:2: data: cannot read nowhere.jsonl: No such file or directory"),
    ],
)
def test_errors_in_the_file_name_file_line_and_setting(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    Path("grpo.yaml").write_text(text)
    assert cli.main(["grpo", "--config", "grpo.yaml"]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith(f"rlkern grpo: error: {message}")
    assert captured.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gpro"], "rlkern: error: no command 'gpro'; there are: grpo"),
        (["grpo", "--learning-rat", "1"], "rlkern grpo: error: unknown argument '--learning-rat'; did you mean '--learning-rate'?"),
        (["grpo", "7"], "rlkern grpo: error: unexpected argument '7'"),
        (["grpo", "--steps"], "rlkern grpo: error: argument --steps: expected one argument"),
        (["grpo", "--steps", "x"], "rlkern grpo: error: --steps: expected an integer, got 'x'"),
        (["grpo", "--steps", "0"], "rlkern grpo: error: --steps: must be at least 1, got 0"),
        (["grpo", "--kl-coef", "nan"], "rlkern grpo: error: kl_coef must be a number finite, got nan"),
        (["grpo", "--samples-per-prompt", "1"], "rlkern grpo: error: --samples-per-prompt: must be at least 2"),
        (
            ["grpo", "--prompts-per-step", "3", "--samples-per-prompt", "3", "--minibatches", "10"],
            "rlkern grpo: error: --minibatches: 3 prompts x 3 ",
        ),
        (["grpo", "--model", "m"], "rlkern grpo: error: data and reward must be given too"),
        (["grpo", "--config", "nowhere.yaml"], "rlkern grpo: error: --config: cannot read nowhere.yaml: No such file or directory"),
    ],
)
def test_errors_on_the_command_line_are_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    captured = capsys.readouterr().err
    assert captured.startswith(message)
    assert captured.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_errors_in_data_rewards_and_model_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["grpo", "--model", str(tmp_path / "nowhere"), "--data", "data.jsonl", "--reward", "rewards.py:f", "--cpu"]
    Path("data.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "answr": 1}\n')
    assert cli.main(given) == 2
    assert "data.jsonl:2: unknown field 'answr'" in capsys.readouterr().err
    Path("data.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert cli.main(given) == 2
    assert "--reward: 'rewards.py:f': cannot import rewards.py" in capsys.readouterr().err
    Path("rewards.py").write_text("def f(completions): return [0.0] * len(completions)\n")
    assert cli.main(given) == 2
    captured = capsys.readouterr().err
    assert captured.startswith(f"rlkern grpo: error: --model: cannot load {tmp_path}/nowhere: ")
    assert captured.count("\n") == 1


def test_without_arguments_the_tutorial_is_trained(trained):
    assert cli.main(["grpo"]) == 0
    assert trained == [GRPOArguments(**tutorial.SETTINGS)]
    assert cli.main(["grpo", "--seed", "2", "--steps", "3"]) == 0
    assert trained[1] == GRPOArguments(**{**tutorial.SETTINGS, "seed": 2, "steps": 3})


def test_a_resumed_run_takes_the_settings_that_it_was_started_with(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/grpo-1").mkdir(parents=True)
    stored = {"model": "m", "data": "d", "reward": ["a:b"], "steps": 7, "learning_rate": 0.5}
    Path("runs/grpo-1/settings.json").write_text(json.dumps(stored))
    assert cli.main(["grpo", "--resume", "--save-every", "9"]) == 0
    assert trained == [GRPOArguments(**stored, save_every=9, resume=True)]
    assert cli.main(["grpo", "--resume", "--output-dir", "empty"]) == 2  # and does not begin another run
    assert len(trained) == 1


def test_help_and_the_module(capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    assert "rlkern <command>" in capsys.readouterr().out
    process = subprocess.run([sys.executable, "-m", "rlkern", "grpo", "--help"], capture_output=True, text=True, timeout=300, cwd=EXAMPLE.parents[1])
    assert process.returncode == 0
    for field in fields(GRPOArguments):
        assert "--" + field.name.replace("_", "-") in process.stdout


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    """As examples/grpo/grpo.yaml stands, but for a model from here and fewer steps."""
    tokenizer = tutorial.build_tokenizer()
    tutorial.build_model(tokenizer, width=16, layers=1, heads=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(EXAMPLE.parents[1])
    argv = [
        "grpo",
        "--config",
        "examples/grpo/grpo.yaml",
        "--model",
        str(tmp_path / "model"),
        "--output-dir",
        str(tmp_path / "run"),
        "--steps",
        "2",
        "--cpu",
    ]
    assert cli.main(argv) == 0
    assert "held out, after  GRPO: mean reward" in capsys.readouterr().out
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"reward/correct", "reward/brief", "held_out_accuracy"} <= last.keys()
