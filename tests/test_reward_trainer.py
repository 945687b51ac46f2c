"""The reward-model trainer on models of a few thousand weights: what it computes and writes, resuming, and that a bad row is named."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlkern import cli
from rlkern.trainers import reward, tutorial
from rlkern.trainers.data import Row, hold_out, read_preferences
from rlkern.trainers.errors import InputError
from rlkern.trainers.reward import RewardArguments, RewardRun, train
from rlkern.trainers.rewards import load_rewards, score
from rlkern.trainers.runs import Checkpoints, read_metrics

from .runs import Killed, assert_same_run, die_at, fresh_accelerate, save_tiny_model, train_and_kill  # noqa: F401

QUESTIONS = [(a, b) for a in (1, 5, 13, 22, 7) for b in (2, 8, 17, 20)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model that knows nothing, pairs in which the longer answer is better, and triples in which sevens are."""
    directory = tmp_path_factory.mktemp("files")
    save_tiny_model(directory / "model")
    pairs = [{"prompt": tutorial.question(a, b), "chosen": f"{a} + {b} = {a + b}", "rejected": f"{a + b}"} for a, b in QUESTIONS]
    ranked = [{"prompt": tutorial.question(a, b), "ranked": [f"7{a}77", f"{b}7", f"{a}"]} for a, b in QUESTIONS]
    for name, rows in (("pairs", pairs), ("ranked", ranked)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def settings(files: Path, output: Path, **changes) -> RewardArguments:
    values = {
        "model": str(files / "model"),
        "data": str(files / "pairs.jsonl"),
        "output_dir": str(output),
        "eval_fraction": 0.25,
        "steps": 6,
        "prompts_per_step": 6,
        "learning_rate": 3e-3,
        "save_every": 2,
        "cpu": True,
    }
    return RewardArguments(**{**values, **changes})


# ---- What it computes -----------------------------------------------------------------------------------------------------------------------


def score_alone(run: RewardRun, prompt: str, answer: str) -> torch.Tensor:
    """By transformers alone, without padding."""
    text = run.tokenizer(prompt)["input_ids"] + run.tokenizer(answer)["input_ids"] + [run.tokenizer.eos_token_id]
    return run.model(torch.tensor([text])).logits[0, 0]


@pytest.mark.parametrize("data", ["pairs", "ranked"])
def test_the_loss_is_that_of_each_answer_alone(files, tmp_path, data):
    run = RewardRun(settings(files, tmp_path / "run", data=str(files / f"{data}.jsonl")))
    torch.nn.init.normal_(run.model.score.weight)  # it starts at 0
    rows = [row._replace(margin=0.5 * i if data == "pairs" else 0.0) for i, row in enumerate(run.rows[:5])]
    out = run.loss(rows)
    losses, wins = [], []
    for row in rows:
        scores = [score_alone(run, *answer) for answer in row.answers]
        gaps = [scores[i] - scores[j] for i in range(len(scores)) for j in range(i + 1, len(scores))]
        losses.append(torch.stack([torch.log1p(torch.exp(row.margin - gap)) for gap in gaps]).mean())
        wins.append(sum(float(gap > 0) for gap in gaps) / len(gaps))
    torch.testing.assert_close(out.loss, torch.stack(losses).mean(), atol=1e-6, rtol=1e-5)
    assert float(out.metrics["accuracy"]) == pytest.approx(sum(wins) / len(wins))


def test_it_starts_from_scores_of_0_and_learns(files, tmp_path):
    summary = train(settings(files, tmp_path / "run", steps=15, learning_rate=1e-2, save_every=0))
    assert summary["before"] == {"accuracy": 0.0, "margin": 0.0}
    assert summary["after"]["accuracy"] == 1.0
    assert summary["after"]["margin"] > 0.5


def test_it_learns_ranks(files, tmp_path):
    summary = train(settings(files, tmp_path / "run", data=str(files / "ranked.jsonl"), steps=25, learning_rate=1e-2, save_every=0))
    assert summary["after"]["accuracy"] > 0.9


@pytest.mark.parametrize("data", ["pairs", "ranked"])
def test_micro_batches_change_nothing(files, tmp_path, data):
    weights, numbers = [], []
    for size in (None, 7):
        run = RewardRun(settings(files, tmp_path / f"run-{size}", data=str(files / f"{data}.jsonl"), micro_batch_size=size, learning_rate=1e-4))
        torch.manual_seed(1)
        torch.nn.init.normal_(run.model.score.weight)
        numbers.append(run.step(0))
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-6)
    assert numbers[0]["grad_norm"] > 0.01
    assert (weights[0] - weights[1]).abs().median() < 1e-8


def test_settings_that_change_the_arithmetic_run(files, tmp_path):
    for name, changes in (("a", {"mixed_precision": "bf16", "gradient_checkpointing": True}), ("b", {"dtype": "bfloat16"})):
        run = RewardRun(settings(files, tmp_path / name, **changes))
        assert run.step(0)["grad_norm"] > 0
        layer = run.model.model.layers[0]
        assert (layer.gradient_checkpointing and layer.training) == ("gradient_checkpointing" in changes)
        AcceleratorState._reset_state(reset_partial_state=True)


# ---- What it writes, and what becomes of it -------------------------------------------------------------------------------------------------


def test_the_files_of_a_run_and_the_reward_that_it_is(files, tmp_path):
    summary = train(settings(files, tmp_path / "run", steps=4, eval_every=2))
    run = tmp_path / "run"
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "held_out_accuracy" in row] == [0, 2, 4]
    assert {"loss", "accuracy", "margin", "grad_norm", "learning_rate"} <= rows[1].keys()
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["after"] == {"accuracy": rows[-1]["held_out_accuracy"], "margin": rows[-1]["held_out_margin"]}
    assert (run / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    # As a reward: the scores that transformers gives by itself, however the answers are batched.
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    data = [Row("f:1", "What is 1 + 2?", {"answer": "3"}), Row("f:2", "What is 13 + 20?", {"answer": "33"})] * 2
    answers = ["3", "13 + 20 = 33", "", "7"]
    expected = []
    for row, answer in zip(data, answers, strict=True):
        ids = tokenizer(row.prompt)["input_ids"] + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        expected.append(model(torch.tensor([ids])).logits.item())
    assert len(set(expected)) == 4
    for size in (None, 3):
        loaded = load_rewards([f"{run}/model=0.5"], data[:1], batch_size=size)[0]
        assert loaded.weight == 0.5
        assert score(loaded, data, answers) == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_that_gives_nan_is_named(files, tmp_path):
    run = RewardRun(settings(files, tmp_path / "run"))
    run.model.score.weight.data.fill_(torch.nan)
    run.save()
    loaded = load_rewards([f"{tmp_path}/run/model"], [])[0]
    with pytest.raises(InputError, match=r"reward '.*/run/model' gave nan for the completion '3' of f:1; expected a finite number"):
        score(loaded, [Row("f:1", "What is 1 + 2?", {})], ["3"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", r"'nowhere': expected module:function, file.py:function or a reward model's directory; =weight if not 1"),
        ("no/where", r"cannot load no/where: "),
        ("{files}/model=much", r"the weight must be a number, got 'much'"),
    ],
)
def test_reward_models_that_cannot_be_loaded_are_named(files, monkeypatch, spec, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=message):
        load_rewards([spec.format(files=files)], [])


# ---- Resuming -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(files, tmp_path_factory) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path_factory.mktemp("unbroken") / "run"
    train(settings(files, output, eval_every=3))
    return output


@pytest.mark.parametrize(
    ("target", "name", "count"),
    [
        pytest.param(RewardRun, "step", 4, id="between checkpoints"),
        pytest.param(Checkpoints, "save", 2, id="after the log, before the checkpoint of a step"),
        pytest.param(os, "fsync", 7, id="while a checkpoint is written"),
        pytest.param(RewardRun, "finish", 1, id="after the last step"),
    ],
)
def test_a_killed_run_resumes_to_the_same_numbers(files, tmp_path, unbroken, monkeypatch, target, name, count):
    with monkeypatch.context() as patch:
        die_at(patch, target, name, count)
        with pytest.raises(Killed):
            train(settings(files, tmp_path / "run", eval_every=3))
    train(settings(files, tmp_path / "run", eval_every=3, resume=True))
    assert_same_run(tmp_path / "run", unbroken)


def test_a_killed_process_resumes_to_the_same_numbers(files, tmp_path, unbroken):
    arguments = settings(files, tmp_path / "run", eval_every=3)
    train_and_kill(f"from rlkern.trainers.reward import RewardArguments, train; train({arguments!r})", tmp_path / "run")
    train(settings(files, tmp_path / "run", eval_every=3, resume=True))
    assert_same_run(tmp_path / "run", unbroken)


# ---- Bad rows -------------------------------------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
RANKED = '{"prompt": "a", "ranked": ["b", "c", "d"]}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "chosen": "b"}\n', r":1: no field 'rejected': expected 'chosen' and 'rejected', or 'ranked'"),
        ('{"prompt": "a", "chosen": "b", "rejcted": "c"}\n', r":1: no field 'rejected': .*; did you mean 'rejcted'\?"),
        ('{"prompt": "a"}\n', r":1: no field 'chosen': expected 'chosen' and 'rejected', or 'ranked'"),
        ('{"chosen": "b", "rejected": "c"}\n', r":1: no field 'prompt'"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c", "ranked": ["d", "e"]}\n',
            r":1: expected either 'chosen' and 'rejected' or 'ranked', got both",
        ),
        (GOOD + '{"prompt": "a", "chosen": "b"}\n', r":2: no field 'rejected', which .*:1 has"),
        (GOOD + "\n" + '{"prompt": "a", "chosen": "b", "rejected": "b"}\n', r":3: field 'rejected': the same answer as field 'chosen', 'b'"),
        (GOOD + '{"prompt": "a", "chosen": " ", "rejected": "b"}\n', r":2: field 'chosen': the answer is empty"),
        (GOOD + '{"prompt": "a", "chosen": "b", "rejected": ""}\n', r":2: field 'rejected': the answer is empty"),
        (GOOD + '{"prompt": "a", "chosen": 7, "rejected": "b"}\n', r":2: field 'chosen': expected text or a list of messages, got 7"),
        (GOOD + '{"prompt": "a", "chosen": "b", "rejected": null}\n', r":2: field 'rejected': expected text or a list of messages, got None"),
        (GOOD + '{"prompt": 3, "chosen": "b", "rejected": "c"}\n', r":2: field 'prompt': expected text or a list of messages"),
        (GOOD + '{"prompt": "a", "chosen": "b", "rejected": \n', r":2: not JSON"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}\n', r":1: field 'margin': expected a number, got '1'"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}\n', r":1: field 'margin': expected a number, got nan"),
        ('{"prompt": "a", "ranked": ["b", "c"], "margin": 1}\n', r":1: field 'margin': goes with 'chosen' and 'rejected'"),
        (RANKED + '{"prompt": "a", "ranked": ["b", "c"]}\n', r":2: field 'ranked': 2 answers, but .*:1 has 3; all rows must rank as many"),
        (RANKED + '{"prompt": "a", "ranked": ["b", "c", "b"]}\n', r":2: field 'ranked', answer 2: the same answer as field 'ranked', answer 0, 'b'"),
        (RANKED + '{"prompt": "a", "ranked": ["b", 1, "c"]}\n', r":2: field 'ranked', answer 1: expected text or a list of messages, got 1"),
        (RANKED + '{"prompt": "a", "ranked": ["b", "", "c"]}\n', r":2: field 'ranked', answer 1: the answer is empty"),
        (RANKED + '{"prompt": "a", "ranked": ["b"]}\n', r":2: field 'ranked': expected a list of two or more answers, the best first; got \['b'\]"),
        (RANKED + '{"prompt": "a", "ranked": "b"}\n', r":2: field 'ranked': expected a list"),
    ],
)
def test_bad_rows_are_named(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=r"data.jsonl" + message):
        read_preferences(path)


def test_answers_that_the_model_cannot_take_are_named(files, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD + json.dumps({"prompt": "What is 1 + 1?", "chosen": "2", "rejected": "1" * 100}) + "\n")
    with pytest.raises(InputError, match=r"data.jsonl:2: prompt and answer '1+' are 104 tokens, more than the model's 64"):
        RewardRun(settings(files, tmp_path / "run", data=str(path)))
    with pytest.raises(InputError, match=r"ranked.jsonl:1 has 3 answers, but .*pairs.jsonl:1 has 2"):
        RewardRun(settings(files, tmp_path / "run", eval_data=str(files / "ranked.jsonl")))
    assert not (tmp_path / "run" / "settings.json").exists()


def test_no_prompt_is_on_both_sides(files):
    rows = read_preferences(files / "pairs.jsonl")
    training, held_out = hold_out(rows + [row._replace(answers=row.answers[::-1]) for row in rows], 0.3, seed=0)
    assert len(held_out) == 12
    assert not {row.prompt for row in training} & {row.prompt for row in held_out}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "m"], "data must be given too: model and data, or none of them for the built-in task"),
        (["--prompts-per-step", "0"], "--prompts-per-step: must be at least 1, got 0"),
        (["--learning-rat", "1"], "unknown argument '--learning-rat'; did you mean '--learning-rate'?"),
        (["--model", "m", "--data", "nowhere.jsonl"], "--data: cannot read nowhere.jsonl: No such file or directory"),
        (["--model", "m", "--data", "data.jsonl"], "data.jsonl:1: field 'rejected': the answer is empty"),
    ],
)
def test_errors_on_the_command_line_are_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": ""}\n')
    assert cli.main(["reward", "--cpu", *argv]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith(f"rlkern reward: error: {message}")
    assert captured.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# ---- The built-in task ----------------------------------------------------------------------------------------------------------------------


def test_without_arguments_the_built_in_preferences_are_learned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tutorial, "WARM_UP_STEPS", 3)
    monkeypatch.setattr(tutorial, "PREFERENCES", 1)
    seen = []
    monkeypatch.setattr(reward, "train", lambda args: seen.append(args) or train(args))
    assert cli.main(["reward", "--steps", "2", "--cpu"]) == 0
    assert seen == [RewardArguments(**{**tutorial.REWARD_MODEL_SETTINGS, "steps": 2, "cpu": True})]
    assert "held out, after  training: accuracy" in capsys.readouterr().out
    assert (tmp_path / "runs" / "reward-1" / "model" / "model.safetensors").exists()
    training, held_out = (read_preferences(tmp_path / f"runs/reward-1/tutorial/{name}preferences.jsonl") for name in ("", "held_out_"))
    assert not {row.prompt for row in training} & {row.prompt for row in held_out}
    for row in held_out:
        a, b = map(int, row.prompt.removeprefix("What is ").removesuffix("?").split(" + "))
        better, worse = tutorial.reward([row.prompt] * 2, [answer.text for answer in row.answers], [str(a + b)] * 2)
        assert better > worse
