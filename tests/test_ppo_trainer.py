"""The PPO trainer on models of a few thousand weights: its arithmetic against plain PyTorch, what it writes, resuming, and errors."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from rlkern import cli
from rlkern.trainers import ppo, tutorial
from rlkern.trainers.errors import InputError
from rlkern.trainers.loading import load_scorer
from rlkern.trainers.ppo import PPO, KLController, PPOArguments, train
from rlkern.trainers.rollout import Completions, Sampler
from rlkern.trainers.runs import Checkpoints, read_metrics

from .runs import (  # noqa: F401
    Killed,
    assert_same_run,
    die_at,
    fresh_accelerate,
    sampling_settings,
    save_files,
    train_and_kill,
)

REWARDS = """
def sevens(completions, **fields):
    return [completion.count("7") / 4 for completion in completions]

def unsure(completions):
    return [float("nan") if i == 3 else 0.0 for i in range(len(completions))]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"), REWARDS)


@pytest.fixture(scope="module")
def reward_model(files) -> str:
    """One that scores at random, and remembers nothing else."""
    run = files / "reward_model"
    tokenizer = tutorial.build_tokenizer()
    model = load_scorer(str(files / "model"), torch.float32, tokenizer)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(run)
    tokenizer.save_pretrained(run)
    return str(run)


def settings(files: Path, output: Path, **changes) -> PPOArguments:
    return PPOArguments(**{**sampling_settings(files, output), **changes})


# ---- What it computes -----------------------------------------------------------------------------------------------------------------------


def logprobs_and_values(policy, critic, ids, attention_mask, new, temperature):
    """By transformers and PyTorch alone: log-probs and entropies of the last ``new`` tokens, and values of the ``new + 1`` states around them."""
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": attention_mask, "position_ids": positions}
    logits = policy(**inputs).logits[:, -new - 1 : -1] / temperature
    distribution = logits.log_softmax(-1)
    values = critic.score(critic.model(**inputs).last_hidden_state)[..., 0]
    return distribution.gather(-1, ids[:, -new:, None])[..., 0], -(distribution.exp() * distribution).sum(-1), values[:, -new - 1 :]


@pytest.mark.parametrize("truncated", [None, "score"])
def test_an_update_is_that_of_plain_pytorch(files, tmp_path, monkeypatch, reward_model, truncated):
    """One whole step with three updates, from tokens to weights, against loops over tokens and autograd through the logits."""
    args = settings(
        files,
        tmp_path / "run",
        samples_per_prompt=6,
        epochs=3,
        minibatches=1,
        kl_coef=0.3,
        gamma=0.97,
        lam=0.8,
        value_clip=0.05,
        clip_low=0.05,
        clip_high=0.1,
        entropy_coef=0.02,
        temperature=0.8,
        critic=reward_model,
        critic_learning_rate=1e-3,
        truncated=truncated,
        max_grad_norm=0.1,
    )
    run = PPO(args)
    for p in run.model.parameters():  # away from the reference
        p.data += 0.05 * torch.randn_like(p)
    policy, reference = AutoModelForCausalLM.from_pretrained(files / "model"), AutoModelForCausalLM.from_pretrained(files / "model")
    policy.load_state_dict(run.model.state_dict())
    critic = AutoModelForSequenceClassification.from_pretrained(reward_model)

    taken = []
    experience = PPO.experience
    monkeypatch.setattr(PPO, "experience", lambda self, *inputs: taken.append((*inputs, experience(self, *inputs)[0])) or experience(self, *inputs))
    numbers = run.step(0)
    (batch, rewards, _, got), rows = taken[0], len(taken[0][1])
    mask, new = batch.mask.bool(), batch.mask.shape[1]
    lengths = mask.sum(1).tolist()
    end = run.sample.ends[0]
    ended = [batch.ids[i, -new:][lengths[i] - 1].item() == end for i in range(rows)]
    assert 3 < sum(ended) < rows - 3  # both kinds

    with torch.no_grad():
        old, _, values = logprobs_and_values(policy, critic, batch.ids, batch.attention_mask, new, 0.8)
        ref, _, _ = logprobs_and_values(reference, critic, batch.ids, batch.attention_mask, new, 0.8)
    advantages, returns = torch.zeros(rows, new), torch.zeros(rows, new)
    for i in range(rows):
        bootstrap = not ended[i] and truncated is None
        following = 0.0
        for t in reversed(range(lengths[i])):
            final = t == lengths[i] - 1
            reward = -0.3 * (old[i, t] - ref[i, t]) + (rewards[i] if final and not bootstrap else 0.0)
            next_value = values[i, t + 1] if not final or bootstrap else 0.0
            following = reward + 0.97 * next_value - values[i, t] + 0.97 * 0.8 * following
            advantages[i, t], returns[i, t] = following, following + values[i, t]
    white = torch.where(mask, (advantages - advantages[mask].mean()) / advantages[mask].std(), 0.0)
    torch.testing.assert_close(got.returns, returns, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.advantages, white, atol=1e-4, rtol=1e-4)

    models = (policy, critic)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.0) for m, lr in ((policy, 3e-3), (critic, 1e-3))]
    value_losses, clipped = [], []
    for _ in range(3):
        lp, entropy, v = logprobs_and_values(policy, critic, batch.ids, batch.attention_mask, new, 0.8)
        ratio, v = (lp - old).exp(), v[:, :-1]
        surrogate = torch.maximum(-ratio * white, -ratio.clamp(0.95, 1.1) * white) - 0.02 * entropy
        clamped = torch.minimum(torch.maximum(v, values[:, :-1] - 0.05), values[:, :-1] + 0.05)
        errors = torch.maximum((v - returns) ** 2, (clamped - returns) ** 2) / 2
        surrogate[mask].mean().backward()
        errors[mask].mean().backward()
        value_losses.append(errors[mask].mean().item())
        clipped.append((((ratio > 1.1) & (white > 0)) | ((ratio < 0.95) & (white < 0)))[mask].float().mean().item())
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert numbers["value_loss"] == pytest.approx(sum(value_losses) / 3, rel=1e-3)
    assert numbers["clip_fraction"] == pytest.approx(sum(clipped) / 3, abs=0.02)
    assert numbers["clip_fraction"] > 0.01
    assert numbers["kl"] == pytest.approx((old - ref)[mask].mean().item(), abs=1e-5)
    assert numbers["truncated"] == pytest.approx(1 - sum(ended) / rows)
    for mine, plain in ((run.model, policy), (run.critic.model, critic)):
        for (name, p), q in zip(mine.named_parameters(), plain.parameters(), strict=True):
            # Adam divides a gradient by its own size: where it is all rounding, a step may go either way.
            assert (p - q).abs().median() < 1e-5, name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_first_ratio_is_one(files, tmp_path, precision, monkeypatch):
    monkeypatch.setattr(torch, "randperm", torch.arange)  # the same batch twice: what is left is the head's
    run = PPO(settings(files, tmp_path / "run", mixed_precision=precision, minibatches=1))
    assert 0 <= run.step(0)["first_ratio_deviation"] < 1e-5
    assert "first_ratio_deviation" not in run.step(1)


def test_micro_batches_change_nothing(files, tmp_path):
    weights, numbers = [], []
    for size in (None, 3):
        run = PPO(settings(files, tmp_path / f"run-{size}", micro_batch_size=size, entropy_coef=0.01, epochs=1, learning_rate=1e-4))
        numbers.append(run.step(0))
        weights.append(torch.cat([p.detach().flatten() for model in (run.model, run.critic) for p in model.parameters()]))
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-6)
    assert numbers[0]["grad_norm"] > 0.01
    assert numbers[0]["critic_grad_norm"] > 0.01
    assert (weights[0] - weights[1]).abs().median() < 1e-7


def test_completions_that_were_cut_off_are_told_apart(files, tmp_path):
    run = PPO(settings(files, tmp_path / "run"))
    end, pad = run.sample.ends[0], run.sample.pad
    ids = torch.tensor([[3, 5, 7, 8, end], [3, 5, 7, end, pad], [3, 5, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    assert run.sample.ended(Completions(ids, torch.ones_like(ids), mask)).tolist() == [True, True, False]


def test_a_step_in_which_nothing_ended_says_so(files, tmp_path, monkeypatch, capsys):
    message = "step 1: every completion was cut off at max_new_tokens, so that no reward was learned from"
    monkeypatch.setattr(Sampler, "ended", lambda self, batch: torch.zeros(len(batch.ids), dtype=torch.bool))
    for name, truncated in (("a", None), ("b", "score")):
        assert PPO(settings(files, tmp_path / name, truncated=truncated)).step(0)["truncated"] == 1
        assert (message in capsys.readouterr().out) == (truncated is None)


def test_the_coefficient_of_the_kl_follows_its_target():
    fixed = KLController(0.1, None, 100)
    fixed.update(5.0, 50)
    assert fixed.coef == 0.1
    control = KLController(0.1, 0.02, 100)
    control.update(0.03, 50)  # half as much again, but 0.2 at most
    assert control.coef == pytest.approx(0.1 * 1.1)
    control.update(0.018, 50)
    assert control.coef == pytest.approx(0.1 * 1.1 * 0.95)
    other = KLController(1.0, 0.02, 100)
    other.load_state_dict(control.state_dict())
    assert other.coef == control.coef


def test_it_learns_and_the_critic_with_it(files, tmp_path):
    changes = {"steps": 20, "prompts_per_step": 4, "samples_per_prompt": 16, "eval_samples": 16, "learning_rate": 1e-2, "kl_coef": 0.01}
    summary = train(settings(files, tmp_path / "run", **changes, truncated="score", save_every=0))
    assert summary["after"]["reward"] > summary["before"]["reward"] + 0.5
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["kl"] > 0.01
    assert max(row["clip_fraction"] for row in rows[1:]) > 0
    assert max(row["explained_variance"] for row in rows[1:]) > 0.1


def test_it_learns_from_a_reward_model(files, tmp_path, reward_model):
    changes = {"steps": 12, "samples_per_prompt": 16, "learning_rate": 1e-2, "eval_samples": 8, "kl_coef": 0.0}
    run = train(settings(files, tmp_path / "run", reward=[reward_model], **changes, critic=reward_model, truncated="score", save_every=0))
    assert run["after"]["reward"] > run["before"]["reward"] + 0.1
    assert "kl" not in read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {"dtype": "bfloat16", "value_clip": None, "whiten": False},
        {"baseline": "none", "loss": "reinforce", "whiten": False, "kl_coef": 0.0, "track_kl": True},
        {"loss": "sapo", "kl_estimator": "k3", "kl_target": 0.1},
        {"loss": "cispo"},
        {"loss": "dppo"},
        {"loss": "dapo"},
    ],
)
def test_settings_that_change_the_arithmetic_run(files, tmp_path, changes):
    run = PPO(settings(files, tmp_path / "run", **changes))
    numbers = run.step(0)
    assert numbers["grad_norm"] > 0
    assert "kl" in numbers
    if changes.get("gradient_checkpointing"):
        assert all(m.gradient_checkpointing and m.training for m in (run.model.model.layers[0], run.critic.model.model.layers[0]))
    assert (run.critic is None) == (changes.get("baseline") == "none") == ("value_loss" not in numbers)


# ---- What it writes -------------------------------------------------------------------------------------------------------------------------


def test_the_files_of_a_run(files, tmp_path, reward_model):
    changes = {"steps": 3, "reward": [f"{files}/rewards.py:sevens=2", f"{reward_model}=0.5"], "eval_reward": [f"{files}/rewards.py:sevens"]}
    summary = train(settings(files, tmp_path / "run", **changes, eval_every=2))
    run = tmp_path / "run"
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "held_out_reward" in row] == [0, 2, 3]
    for row in rows[1:]:
        assert row["reward"] == pytest.approx(2 * row["reward/sevens"] + 0.5 * row[f"reward/{reward_model}"], abs=1e-5)
        assert {"kl", "kl_coef", "clip_fraction", "value_clip_fraction", "value_loss", "explained_variance", "entropy", "truncated"} <= row.keys()
    assert all(0 <= row["held_out_reward"] <= 1.5 for row in rows if "held_out_reward" in row)  # of the sevens alone
    assert summary == json.loads((run / "summary.json").read_text())
    assert (run / "reward.png").read_bytes().startswith(b"\x89PNG")
    first = AutoModelForCausalLM.from_pretrained(files / "model")
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(run / "model").lm_head.weight, first.lm_head.weight)
    assert AutoModelForSequenceClassification.from_pretrained(run / "critic").score.weight.abs().max() > 0


# ---- Resuming -------------------------------------------------------------------------------------------------------------------------------

WHOLE = {"eval_every": 3, "kl_target": 0.01, "kl_horizon": 20}  # the coefficient, too, has to survive


@pytest.fixture(scope="module")
def unbroken(files, tmp_path_factory) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path_factory.mktemp("unbroken") / "run"
    train(settings(files, output, **WHOLE))
    assert len({row["kl_coef"] for row in read_metrics(output / "metrics.jsonl")[1:]}) == 6
    return output


@pytest.mark.parametrize(
    ("target", "name", "count"),
    [
        pytest.param(PPO, "step", 4, id="between checkpoints"),
        pytest.param(Checkpoints, "save", 2, id="after the log, before the checkpoint of a step"),
        pytest.param(os, "fsync", 12, id="while a checkpoint is written"),
        pytest.param(PPO, "finish", 1, id="after the last step"),
    ],
)
def test_a_killed_run_resumes_to_the_same_numbers(files, tmp_path, unbroken, monkeypatch, target, name, count):
    with monkeypatch.context() as patch:
        die_at(patch, target, name, count)
        with pytest.raises(Killed):
            train(settings(files, tmp_path / "run", **WHOLE))
    train(settings(files, tmp_path / "run", **WHOLE, resume=True))
    assert_same_run(tmp_path / "run", unbroken)


def test_a_killed_process_resumes_to_the_same_numbers(files, tmp_path, unbroken):
    arguments = settings(files, tmp_path / "run", **WHOLE)
    train_and_kill(f"from rlkern.trainers.ppo import PPOArguments, train; train({arguments!r})", tmp_path / "run")
    train(settings(files, tmp_path / "run", **WHOLE, resume=True))
    assert_same_run(tmp_path / "run", unbroken)


# ---- Errors ---------------------------------------------------------------------------------------------------------------------------------


def test_nan_rewards_stop_the_run_before_it_learns(files, tmp_path):
    with pytest.raises(InputError, match=r"reward 'unsure' gave nan for the completion '.*' of .*data.jsonl:\d; expected a finite number"):
        PPO(settings(files, tmp_path / "run", reward=[f"{files}/rewards.py:unsure"])).step(0)


def test_critics_that_cannot_be_used_are_named(files, tmp_path):
    with pytest.raises(InputError, match=r"cannot load .*/nowhere: ") as raised:
        PPO(settings(files, tmp_path / "run", critic=f"{files}/nowhere"))
    assert raised.value.field == "critic"
    tokenizer = tutorial.build_tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match=r"bert: BertForSequenceClassification has no linear head `score` over its states; expected a decoder"):
        PPO(settings(files, tmp_path / "run", critic=str(tmp_path / "bert")))
    two = AutoModelForSequenceClassification.from_pretrained(files / "model", num_labels=2)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(InputError, match=r"/two has 2 outputs, not 1"):
        PPO(settings(files, tmp_path / "run", critic=str(tmp_path / "two")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gamma", "1.1"], "--gamma: must be at least 0 and at most 1, got 1.1"),
        (["--kl-coef", "-1"], "--kl-coef: must be at least 0, got -1.0"),
        (["--kl-target", "0"], "--kl-target: must be above 0, got 0.0"),
        (["--kl-target", "1", "--kl-coef", "0"], "--kl-target: kl_target adapts kl_coef, which must be above 0 to start from"),
        (["--baseline", "none", "--truncated", "bootstrap"], "--truncated: without a critic there is no value to bootstrap from"),
        (["--value-clip", "-1"], "--value-clip: must be above 0, got -1.0"),
        (["--loss", "grpo"], "--loss: expected one of ppo, "),
        (["--prompts-per-step", "3", "--minibatches", "4"], "--minibatches: 3 prompts x 1 samples in 1 processes are too few for 4 minibatches"),
        (["--reward", "a:b"], "model and data must be given too"),
    ],
)
def test_errors_on_the_command_line_are_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ppo", "--cpu", *argv]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith(f"rlkern ppo: error: {message}")
    assert captured.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- The built-in task ----------------------------------------------------------------------------------------------------------------------


def test_without_arguments_the_built_in_task_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tutorial, "WARM_UP_STEPS", 3)
    seen = []
    monkeypatch.setattr(ppo, "train", lambda args: seen.append(args) or train(args))
    assert cli.main(["ppo", "--steps", "1", "--eval-samples", "1", "--cpu"]) == 0
    assert seen == [PPOArguments(**{**tutorial.PPO_SETTINGS, "steps": 1, "eval_samples": 1, "cpu": True})]
    assert "held out, after  PPO: mean reward" in capsys.readouterr().out


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pipeline_runs_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tutorial, "WARM_UP_STEPS", 3)
    monkeypatch.setattr(tutorial, "PREFERENCES", 1)
    for name, value in {"prompts_per_step": 16, "eval_samples": 1}.items():
        monkeypatch.setitem(tutorial.PPO_SETTINGS, name, value)
    said = []
    for options in ([], ["--resume"]):
        monkeypatch.setattr("sys.argv", ["rlhf.py", "--steps", "1", *options])
        example("rlhf").main()
        said.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("held-out questions")])
    assert len(said[0]) == 2
    assert said[0] == said[1]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["rlhf-1"]


def test_the_road_of_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tutorial, "WARM_UP_STEPS", 3)
    monkeypatch.setattr(tutorial, "PREFERENCES", 1)
    road = example("tutorial")
    road.COMMON |= {"eval_samples": 1, "epochs": 1}
    for name in set(road.ROAD) - {"reward only", "+ reference KL", "GRPO"}:
        del road.ROAD[name]
    monkeypatch.setattr("sys.argv", ["tutorial.py", "--steps", "2", "--output-dir", str(tmp_path)])
    road.main()
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in road.ROAD)
    assert (tmp_path / "tutorial.png").read_bytes().startswith(b"\x89PNG")
