"""The GRPO trainer on models of a few thousand weights: what it computes, what it writes, and that a killed run resumes to the same numbers."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import rlkern as rk
from rlkern.trainers import grpo, tutorial
from rlkern.trainers.data import Row, batch_at, hold_out, read_jsonl
from rlkern.trainers.errors import InputError
from rlkern.trainers.grpo import GRPO, GRPOArguments, train
from rlkern.trainers.loading import load_scorer
from rlkern.trainers.rewards import load_rewards, score, steps_of
from rlkern.trainers.rollout import Completions
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

def short(completions):
    return [-len(completion) / 10 for completion in completions]

def sevens_of_steps(steps, **fields):
    return [[step.count("7") / 4 for step in each] for each in steps]

def too_few(steps, **fields):
    return [[0.0] for each in steps]

def unsure(steps, **fields):
    return [[float("nan")] * len(each) for each in steps]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"), REWARDS)


def settings(files: Path, output: Path, **changes) -> GRPOArguments:
    return GRPOArguments(**{**sampling_settings(files, output), **changes})


# ---- What it computes -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # GPT-2 has absolute positions, and dropout by default
def test_log_probs_are_those_of_each_completion_alone(files, tmp_path, architecture):
    """Padding on the left, the shift by one, the temperature and the end of a completion, against a completion at a time without any padding."""
    model = str(files / "model")
    if architecture == "gpt2":
        model = str(tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(files / "model")
        tokenizer.save_pretrained(model)
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=tokenizer.eos_token_id)
        GPT2LMHeadModel(config).save_pretrained(model)
    run = GRPO(settings(files, tmp_path / "run", model=model, temperature=0.7))
    run.policy.train()
    end, pad = run.sample.ends[0], run.sample.pad
    prompts, answers = [[3, 5, 24], [3, 5, 6, 15, 24]], [[7, 8, end], [9, end]]
    ids = torch.tensor([[pad, pad, *prompts[0], *answers[0]], [*prompts[1], *answers[1], 17]])  # 17: garbage after the end
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    logprobs, entropy = rk.linear_token_logprobs(**run.scored(run.policy, Completions(ids, attention_mask, mask)), with_entropy=True)
    run.model.eval()
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logits = run.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1)
        torch.testing.assert_close(logprobs[row, : len(answer)], expected.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1), atol=3e-5, rtol=0)
        torch.testing.assert_close(entropy[row, : len(answer)], -(expected.exp() * expected).sum(-1), atol=1e-5, rtol=0)
    assert logprobs[1, 2] == 0
    assert entropy[1, 2] == 0


def test_a_completion_ends_with_its_first_end_token(files, tmp_path):
    run = GRPO(settings(files, tmp_path / "run", samples_per_prompt=64, max_new_tokens=12, rollout_batch_size=100))
    completions, texts = run.sample(run.rows * 60)
    new = completions.ids[:, -completions.mask.shape[1] :]
    assert len(texts) == len(new) == len(run.rows) * 60
    ended = 0
    for ids, mask, text in zip(new.tolist(), completions.mask.tolist(), texts, strict=True):
        length = ids.index(run.sample.ends[0]) + 1 if run.sample.ends[0] in ids else len(ids)
        ended += length < len(ids)
        assert mask == [1] * length + [0] * (len(ids) - length)
        assert text == run.sample.tokenizer.decode(ids[:length], skip_special_tokens=True)
    assert ended > 20  # or the test shows nothing


def test_the_models_own_sampling_defaults_do_not_act_but_are_saved(files, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=5.0)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(files / "model").save_pretrained(tmp_path / "model")
    run = GRPO(settings(files, tmp_path / "run", model=str(tmp_path / "model")))
    assert len(set(run.sample(run.rows[:1] * 20)[1])) > 10
    run.save()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").generation_config.top_k == 1


def test_processes_that_do_not_see_each_other_are_an_error(files, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="4 processes were launched, but accelerate sees 1"):
        GRPO(settings(files, tmp_path / "run", cpu=False))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_first_ratio_is_one(files, tmp_path, precision, monkeypatch):
    monkeypatch.setattr(torch, "randperm", torch.arange)  # the same batch twice: what is left is the head's
    run = GRPO(settings(files, tmp_path / "run", mixed_precision=precision, minibatches=1))
    assert 0 <= run.step(0)["first_ratio_deviation"] < 1e-5
    assert "first_ratio_deviation" not in run.step(1)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_micro_batches_change_nothing(files, tmp_path, loss):
    weights, numbers = [], []
    for size in (None, 3):
        run = GRPO(settings(files, tmp_path / f"run-{size}", loss=loss, micro_batch_size=size, entropy_coef=0.01, epochs=1, learning_rate=1e-4))
        numbers.append(run.step(0))
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-6)
    assert numbers[0]["grad_norm"] > 0.01
    # Adam divides a gradient by its own size: where it is all rounding, the first steps may go either way.
    assert (weights[0] - weights[1]).abs().median() < 1e-8


def test_on_policy_with_the_initial_model_there_is_nothing_to_clip_and_no_divergence(files, tmp_path):
    numbers = GRPO(settings(files, tmp_path / "run", epochs=1, minibatches=1)).step(0)
    assert numbers["ratio_mean"] == 1
    assert numbers["clip_fraction"] == numbers["approx_kl"] == 0
    assert abs(numbers["kl"]) < 1e-9
    assert "kl" not in GRPO(settings(files, tmp_path / "other", kl_coef=0.0)).step(0)


def test_it_learns(files, tmp_path):
    summary = train(
        settings(files, tmp_path / "run", steps=25, prompts_per_step=4, samples_per_prompt=16, eval_samples=16, learning_rate=1e-2, save_every=0)
    )
    assert summary["after"]["reward"] > summary["before"]["reward"] + 0.5
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["kl"] > 0.01
    assert max(row["clip_fraction"] for row in rows[1:]) > 0
    assert rows[-1]["entropy"] < rows[1]["entropy"]


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {"dtype": "bfloat16", "advantage_baseline": "length-weighted", "advantage_scale": "batch", "loss": "cispo"},
        {"loss": "rloo", "advantage_baseline": "leave-one-out", "advantage_scale": "none", "top_k": 5, "top_p": 0.9},
    ],
)
def test_settings_that_change_the_arithmetic_run(files, tmp_path, changes):
    numbers = GRPO(settings(files, tmp_path / "run", **changes)).step(0)
    assert numbers["grad_norm"] > 0


def test_every_loss_gives_a_gradient(files, tmp_path):
    run = GRPO(settings(files, tmp_path / "run", samples_per_prompt=8))
    for loss in grpo.LOSSES:
        run.args = settings(files, tmp_path / "run", samples_per_prompt=8, loss=loss, minibatches=1)
        assert run.step(0)["grad_norm"] > 1e-3, loss


def test_the_learning_rate_warms_up_and_falls(files, tmp_path):
    args = settings(files, tmp_path, steps=10, learning_rate=1.0, lr_warmup_steps=2, lr_schedule="linear")
    assert [args.learning_rate_factor(step) for step in (0, 1, 2, 6, 9)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.125])
    args = settings(files, tmp_path, steps=10, learning_rate=1.0, lr_schedule="cosine")
    assert [args.learning_rate_factor(step) for step in (0, 5)] == pytest.approx([1.0, 0.5])


# ---- Process supervision and iterative GRPO -------------------------------------------------------------------------------------------------


def test_a_completion_is_cut_into_steps():
    assert steps_of("a;b;c", ";") == ["a;", "b;", "c"]
    assert steps_of("a;b;", ";") == ["a;", "b;"]
    assert steps_of(";a", ";") == [";", "a"]
    assert steps_of("a", ";") == ["a"]
    assert steps_of("", ";") == [""]


def test_the_rewards_of_steps_reach_the_tokens_up_to_their_ends(files, tmp_path):
    run = GRPO(settings(files, tmp_path / "run", samples_per_prompt=2, process_reward=f"{files}/rewards.py:sevens_of_steps", step_separator=" + "))
    words, end = run.sample.tokenizer.get_vocab(), run.sample.ends[0]
    answers = [["7", "7 + ", "1", "7 + ", "7"], ["1 + ", "2", "3"]]
    new = torch.tensor([[words[word] for word in answers[0]] + [end], [words[word] for word in answers[1]] + [end, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    batch = Completions(torch.cat([torch.tensor([[3, 5], [3, 5]]), new], 1), torch.ones(2, 8), mask)
    texts = ["".join(words) for words in answers]
    advantages, mean = run.process_advantages(run.rows[:2], batch, texts)
    scores = torch.tensor([2, 1, 1, 0, 0]) / 4  # "77 + ", "17 + ", "7" and "1 + ", "23"
    r = ((scores - scores.mean()) / (scores.std() + 1e-4)).tolist()
    expected = [[sum(r[:3])] * 2 + [r[1] + r[2]] * 2 + [r[2]] * 2, [r[3] + r[4]] + [r[4]] * 3 + [0.0] * 2]
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=1e-5, rtol=0)
    assert float(mean) == pytest.approx(scores.mean().item())


def test_it_learns_from_rewards_of_steps(files, tmp_path):
    changes = {"process_reward": f"{files}/rewards.py:sevens_of_steps", "step_separator": " + ", "learning_rate": 1e-2, "save_every": 0}
    summary = train(settings(files, tmp_path / "run", steps=12, samples_per_prompt=16, eval_samples=16, **changes))
    assert summary["after"]["reward"] > summary["before"]["reward"] + 0.2
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["process_reward"] > 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", r"reward 'too_few' gave \[0.0\] for the \d+ steps \[.*\] of .*data.jsonl:\d; expected a number a step"),
        ("unsure", r"reward 'unsure' gave nan for the step '.*' of '.*' of .*data.jsonl:\d; expected a finite number"),
        ("sevens", r"reward 'sevens' gave .* for the \d+ steps"),
    ],
)
def test_rewards_of_steps_that_fail_are_named(files, tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        GRPO(settings(files, tmp_path / "run", process_reward=f"{files}/rewards.py:{name}", step_separator=" ")).step(0)


@pytest.fixture(scope="module")
def iterative(files) -> dict:
    """Settings of rounds of two steps, in which a reward model that knows nothing is taught to like sevens."""
    tokenizer = tutorial.build_tokenizer()
    load_scorer(str(files / "model"), torch.float32, tokenizer).save_pretrained(files / "reward_model")
    tokenizer.save_pretrained(files / "reward_model")
    judge = {"judge": [f"{files}/rewards.py:sevens"], "judge_updates": 5, "judge_learning_rate": 3e-3}
    return {"refresh_every": 2, "reward": [str(files / "reward_model")], "eval_reward": judge["judge"], **judge}


def test_the_reference_becomes_the_policy_at_the_end_of_a_round(files, tmp_path):
    run = GRPO(settings(files, tmp_path / "run", refresh_every=2, epochs=1, minibatches=1))
    kl = [run.step(step)["kl"] for step in range(5)]
    assert abs(kl[0]) < 1e-9
    assert abs(kl[2]) < 1e-9
    assert abs(kl[4]) < 1e-9
    assert min(kl[1], kl[3]) > 1e-5


def test_the_reward_model_learns_in_rounds_and_the_policy_from_it(files, tmp_path, iterative):
    changes = {**iterative, "judge_updates": 10, "steps": 14, "samples_per_prompt": 16, "eval_samples": 16, "learning_rate": 1e-2, "kl_coef": 0.0}
    summary = train(settings(files, tmp_path / "run", **changes, save_every=0))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "reward_model_accuracy" in row] == [2, 4, 6, 8, 10, 12, 14]
    assert rows[1]["equal_groups"] == 1  # it starts from scores of 0
    assert rows[10]["reward_model_accuracy"] > 0.7
    assert summary["after"]["reward"] > summary["before"]["reward"] + 0.2


def test_a_killed_iterative_run_resumes_to_the_same_numbers(files, tmp_path, iterative, monkeypatch):
    """Reference, reward model, its optimiser and its memory are parts of a checkpoint."""
    train(settings(files, tmp_path / "unbroken", **iterative, track_kl=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch:
        die_at(patch, GRPO, "step", 6)
        with pytest.raises(Killed):
            train(settings(files, tmp_path / "run", **iterative, track_kl=True))
    train(settings(files, tmp_path / "run", **iterative, track_kl=True, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refresh_every": 2, "kl_coef": 0.0}, r"there is nothing to refresh: neither a reference \(kl_coef, track_kl\) nor a judge"),
        ({"judge": ["a:b"]}, r"a judge is asked every refresh_every steps, which is 0"),
        ({"judge": ["{files}/rewards.py:short"], "refresh_every": 2}, r"a judge teaches the one reward model of reward, which names 0"),
        ({"judge_replay": 1.5}, r"must be at least 0 and at most 1, got 1.5"),
        ({"step_separator": ""}, r"must be some text, got "),
        ({"process_reward": "{files}/rewards.py:nothing"}, r"has no function 'nothing'"),
    ],
)
def test_rounds_and_steps_that_cannot_be_are_named(files, tmp_path, changes, message):
    changes = json.loads(json.dumps(changes).replace("{files}", str(files)))
    with pytest.raises(InputError, match=message):
        GRPO(settings(files, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


# ---- What it writes -------------------------------------------------------------------------------------------------------------------------


def test_the_files_of_a_run(files, tmp_path):
    rewards = [f"{files}/rewards.py:sevens=2", f"{files}/rewards.py:short=0.5"]
    summary = train(settings(files, tmp_path / "run", steps=3, reward=rewards, eval_every=2, eval_samples=2))
    run = tmp_path / "run"
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "held_out_reward" in row] == [0, 2, 3]
    for row in rows[1:]:
        assert row["reward"] == pytest.approx(2 * row["reward/sevens"] + 0.5 * row["reward/short"], abs=1e-6)
        assert {"kl", "clip_fraction", "entropy", "approx_kl", "loss", "grad_norm", "learning_rate", "completion_tokens"} <= row.keys()
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["after"] == {"reward": rows[-1]["held_out_reward"], "accuracy": rows[-1]["held_out_accuracy"]}
    assert (run / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]
    tokenizer, model = AutoTokenizer.from_pretrained(run / "model"), AutoModelForCausalLM.from_pretrained(run / "model")
    first = AutoModelForCausalLM.from_pretrained(files / "model")
    assert tokenizer.decode(tokenizer("What is 2 + 13?")["input_ids"]) == "What is 2 + 13?"
    assert not torch.equal(model.lm_head.weight, first.lm_head.weight)


def test_a_second_run_needs_a_directory_of_its_own(files, tmp_path, monkeypatch):
    train(settings(files, tmp_path / "run", steps=1))
    with pytest.raises(InputError, match="holds a run already: --resume"):
        train(settings(files, tmp_path / "run", steps=1))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train(settings(files, tmp_path, output_dir=None, steps=1))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["grpo-1", "grpo-2"]


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
        pytest.param(GRPO, "step", 1, id="before the first step"),
        pytest.param(GRPO, "step", 4, id="between checkpoints"),
        pytest.param(Checkpoints, "save", 2, id="after the log, before the checkpoint of a step"),
        pytest.param(os, "fsync", 7, id="while a checkpoint is written"),
        pytest.param(GRPO, "finish", 1, id="after the last step"),
    ],
)
def test_a_killed_run_resumes_to_the_same_numbers(files, tmp_path, unbroken, monkeypatch, target, name, count):
    with monkeypatch.context() as patch:
        die_at(patch, target, name, count)
        with pytest.raises(Killed):
            train(settings(files, tmp_path / "run", eval_every=3))
    train(settings(files, tmp_path / "run", eval_every=3, resume=True))
    assert_same_run(tmp_path / "run", unbroken)


def test_a_process_killed_while_it_writes_a_checkpoint_resumes_to_the_same_numbers(files, tmp_path, unbroken):
    arguments = settings(files, tmp_path / "run", eval_every=3)
    train_and_kill(f"from rlkern.trainers.grpo import GRPOArguments, train; train({arguments!r})", tmp_path / "run")
    train(settings(files, tmp_path / "run", eval_every=3, resume=True))
    assert_same_run(tmp_path / "run", unbroken)


def test_a_finished_run_can_go_on(files, tmp_path, unbroken):
    """With a constant learning rate, 4 steps and then 6 are 6 steps, but for the evaluation after step 4."""
    train(settings(files, tmp_path / "run", steps=4, eval_every=3))
    train(settings(files, tmp_path / "run", eval_every=3, resume=True))
    rows, expected = (read_metrics(path / "metrics.jsonl") for path in (tmp_path / "run", unbroken))
    for row in (*rows, *expected):
        if row["step"] == 4:
            row.pop("held_out_reward", None), row.pop("held_out_accuracy", None)
    assert rows == expected


def test_a_resumed_run_keeps_its_settings(files, tmp_path):
    train(settings(files, tmp_path / "run", steps=1))
    with pytest.raises(InputError, match=r"learning_rate is 0.5, but the run in .* was started with 0.003"):
        train(settings(files, tmp_path / "run", steps=1, resume=True, learning_rate=0.5))


# ---- Data and rewards -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"data.jsonl:2: not JSON: Expecting value at column"),
        ('{"prompt": "a"}\n\n["b"]\n', r"data.jsonl:3: expected an object .*, got list"),
        ('{"promt": "a", "answer": 1}\n', r"data.jsonl:1: no field 'prompt'; did you mean 'promt'\?"),
        (
            '{"prompt": "a", "answer": 1}\n{"prompt": "b", "anwser": 2}\n',
            r"data.jsonl:2: unknown field 'anwser', which .*:1 does not have; did you mean 'answer'",
        ),
        ('{"prompt": "a", "answer": 1}\n{"prompt": "b"}\n', r"data.jsonl:2: no field 'answer', which .*:1 has"),
        ('{"prompt": "a"}\n{"prompt": 7}\n', r"data.jsonl:2: field 'prompt': expected text or a list of messages, neither empty; got 7"),
        ('{"prompt": " "}\n', r"data.jsonl:1: field 'prompt': expected text"),
        ('{"prompt": [{"role": "user"}]}\n', r"data.jsonl:1: field 'prompt': message 0 must be"),
        ('{"prompt": "a", "completions": 1}\n', r"data.jsonl:1: field 'completions': the name is taken"),
        ("\n", r"data.jsonl holds no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_jsonl(path)


def test_prompts_that_the_model_cannot_take_are_named(files, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "What is 1 + 1?"}\n' + json.dumps({"prompt": "1" * 100}) + "\n")
    with pytest.raises(InputError, match=r"data.jsonl:2: the prompt's 100 tokens and 6 new ones are more than the model's 64"):
        GRPO(settings(files, tmp_path / "run", data=str(path), eval_fraction=0.0))
    path.write_text('{"prompt": [{"role": "user", "content": "What is 1 + 1?"}]}\n')
    with pytest.raises(InputError, match=r"data.jsonl:1: the prompt is a list of messages, but the tokenizer has no chat template"):
        GRPO(settings(files, tmp_path / "run", data=str(path), eval_fraction=0.0))
    with pytest.raises(InputError, match=r"0.9 of the prompts of .* leaves none to train on"):
        GRPO(settings(files, tmp_path / "run", data=str(path), eval_fraction=0.9))
    assert not (tmp_path / "run" / "settings.json").exists()  # so that the next try is not taken for a second run


def test_conversations_go_through_the_chat_template(files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    tokenizer.chat_template = "{% for m in messages %}What is {{ m['content'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    tokenizer.save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(files / "model").save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": [{"role": "user", "content": "1 + 2"}]}\n')
    run = GRPO(settings(files, tmp_path / "run", model=str(tmp_path / "model"), data=str(tmp_path / "data.jsonl"), eval_fraction=0.0))
    assert run.sample.tokens(run.rows[0]) == tokenizer("What is 1 + 2?")["input_ids"]


def test_every_pass_sees_every_row_once():
    for size in (3, 5, 12):
        seen = [i for step in range(15) for i in batch_at(step, size, 5, seed=1)]
        passes = [seen[i : i + 5] for i in range(0, len(seen) - 4, 5)]
        assert all(sorted(order) == [0, 1, 2, 3, 4] for order in passes)
        assert len({tuple(order) for order in passes}) > 1


def test_no_prompt_is_on_both_sides():
    rows = [Row(f"f:{i}", f"prompt {i % 10}", {}) for i in range(40)]
    training, held_out = hold_out(rows, 0.3, seed=0)
    assert len(held_out) == 12
    assert not {row.prompt for row in training} & {row.prompt for row in held_out}
    assert sorted(training + held_out) == sorted(rows)


ROWS = [Row("data.jsonl:4", "p", {"answer": "1"}), Row("data.jsonl:9", "q", {"answer": "2"})]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rewards", r"expected module:function"),
        ("bad.py:good=much", r"the weight must be a number, got 'much'"),
        ("no_such_module:f", r"cannot import no_such_module: ModuleNotFoundError"),
        ("missing.py:f", r"cannot import missing.py: .*No such file"),
        ("broken.py:f", r"cannot import broken.py: .*broken.py:2: "),
        ("bad.py:god", r"bad.py has no function 'god'; did you mean 'good'\?"),
        ("bad.py:needy", r"needs a field 'anwser', which data.jsonl:4 does not have; did you mean 'answer'\?"),
    ],
)
def test_rewards_that_cannot_be_loaded_are_named(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text("def good(completions): ...\ndef needy(completions, anwser): ...\n")
    Path("broken.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(InputError, match=message):
        load_rewards([spec], ROWS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [0.0, float('nan')]", r"reward 'f' gave nan for the completion 'b' of data.jsonl:9; expected a finite number"),
        ("return [1.0]", r"reward 'f' must give a list of 2 numbers, one a completion; got 1 of them"),
        ("return 1.0", r"reward 'f' must give a list of 2 numbers, one a completion; got float"),
        ("return [0.0, None]", r"reward 'f' gave None for the completion 'b'"),
        ("return [0.0, '1']", r"reward 'f' gave '1' for the completion 'b'"),
        ("return [1 / (c != 'b') for c in completions]", r"raised ZeroDivisionError: .* \(.*rewards.py:2\), for the completion 'b' of data.jsonl:9"),
    ],
)
def test_rewards_that_fail_are_named(tmp_path, body, message):
    (tmp_path / "rewards.py").write_text(f"def f(completions, **fields):\n    {body}\n")
    reward = load_rewards([f"{tmp_path}/rewards.py:f"], ROWS)[0]
    with pytest.raises(InputError, match=message):
        score(reward, ROWS, ["a", "b"])


def test_rewards_get_the_fields_that_they_name(tmp_path):
    (tmp_path / "rewards.py").write_text(
        "import torch\ndef some(completions, answer): return torch.tensor([float(c == a) for c, a in zip(completions, answer)])\n"
        "def all(prompts, **fields): return [len(fields) + len(p) for p in prompts]\n"
    )
    some, everything = load_rewards([f"{tmp_path}/rewards.py:some=-0.5", f"{tmp_path}/rewards.py:all"], ROWS)
    assert (some.weight, everything.weight) == (-0.5, 1.0)
    assert score(some, ROWS, ["1", "1"]) == [1.0, 0.0]
    assert score(everything, ROWS, ["x", "y"]) == [3.0, 3.0]  # completions and answer, and one letter


# ---- The built-in task ----------------------------------------------------------------------------------------------------------------------


def test_the_rewards_of_the_tutorial():
    answers = ["5", "6", "2 + 3 = 5", "2 + 3 = 6", "3 + 2 = 5", " 5", ""]
    assert tutorial.reward(["What is 2 + 3?"] * 7, answers, ["5"] * 7) == [1, 0, 2, 0, 0, 0, 0]


def test_held_out_sums_are_not_trained_on_either_way_round():
    training, held_out = tutorial.split(seed=0)
    assert len(training) + len(held_out) == 31 * 31
    assert not {frozenset(pair) for pair in training} & {frozenset(pair) for pair in held_out}
    assert len(held_out) > 100
    assert tutorial.split(seed=1)[1] != held_out


def test_the_tokenizer_gives_back_every_text(tmp_path):
    tutorial.build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for a in range(0, 31, 3):
        for b in range(31):
            for text in (tutorial.question(a, b), f"{a} + {b} = {a + b}", f"{a + b}"):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text


def test_the_task_is_made_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(tutorial, "WARM_UP_STEPS", 3)
    known = tutorial.prepare(tmp_path / "task", 0, torch.device("cpu"))
    again = tutorial.prepare(tmp_path / "task", 0, torch.device("cpu"))
    assert known == again
    assert known["steps"] == 3
    training, held_out = (read_jsonl(tmp_path / "task" / f"{name}.jsonl") for name in ("train", "held_out"))
    assert not {row.prompt for row in training} & {row.prompt for row in held_out}
    tutorial.prepare(tmp_path / "other", 0, torch.device("cpu"))
    weights, others = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("task", "other"))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_the_warm_up_teaches(tmp_path):
    tokenizer = tutorial.build_tokenizer()
    model = tutorial.build_model(tokenizer, width=32)
    short = tutorial.warm_up(model, tokenizer, [(1, 2), (2, 1), (13, 4), (4, 13)], steps=40)
    assert short["loss"] < 2.5  # untrained: log 44 = 3.8 nats a token
