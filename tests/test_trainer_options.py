"""What a user may ask of sampling and of the data: texts that end a completion, another temperature in evaluations, prompts up to a length, options
of the chat template, conversations that go on, preferences between conversations."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rlkern.trainers import grpo, ppo, tutorial
from rlkern.trainers.data import Answer, read_preferences
from rlkern.trainers.errors import InputError
from rlkern.trainers.loading import load_tokenizer
from rlkern.trainers.rollout import prompt_tokens
from rlkern.trainers.runs import read_metrics

from .runs import TRAINERS, fresh_accelerate, save_files_of_all, short_settings  # noqa: F401

USER, OTHER, SAYS = ({"role": role, "content": text} for role, text in (("user", "1 + 2"), ("user", "3 + 4"), ("assistant", "3")))
RUNS = itertools.count()


@pytest.fixture
def files(tmp_path) -> Path:
    return save_files_of_all(tmp_path)


def make(kind: str, files: Path, **changes):
    return TRAINERS[kind][2](short_settings(kind, files, files / f"run-{next(RUNS)}", **changes))


def give_template(files: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(files / "model")


# ---- what ends a completion -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["generate", "continuous"])
@pytest.mark.parametrize("correction", ["none", "truncate"])
def test_a_text_that_stops_completions(files, engine, correction):
    run = make("grpo", files, stop=[" +", "37"], max_new_tokens=30, engine=engine, rollout_correction=correction, micro_batch_size=1)
    _, batch, texts = run.rollout(0)
    new, ended, stopped = batch.ids[:, -batch.mask.shape[1] :], run.sample.ended(batch), 0
    for ids, mask, end, text in zip(new, batch.mask, ended.tolist(), texts, strict=True):
        tokens = ids[mask.bool()].tolist()
        before = run.sample.tokenizer.decode(tokens[:-1], skip_special_tokens=True)
        assert " +" not in before
        assert "37" not in before
        by_text = " +" in text or "37" in text
        assert end == (by_text or tokens[-1] in run.sample.ends)
        assert end or len(tokens) == 30
        stopped += by_text
    assert stopped
    if correction != "none":
        assert batch.logprobs.shape == batch.mask.shape
        # of the very tokens that are left
        deviation = (run.frozen_logprobs(run.policy, batch) - batch.logprobs).abs() * batch.mask
        assert deviation.max() < 1e-4


def test_a_token_of_the_tokenizer_stops_completions_and_is_no_text(files):
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    name = next(name for name in tokenizer.get_added_vocab() if name != tokenizer.eos_token)
    run = make("grpo", files, stop=[name])
    assert run.sample.stop == []
    assert run.sample.ends == sorted({tokenizer.eos_token_id, tokenizer.get_added_vocab()[name]})
    tokenizer.add_tokens(["<far>"])
    tokenizer.save_pretrained(files / "model")
    with pytest.raises(InputError, match=r"'<far>' is token .*, beyond the model's vocabulary") as raised:
        make("grpo", files, stop=["<far>"])
    assert raised.value.field == "stop"
    with pytest.raises(InputError, match="texts that are not empty"):
        make("grpo", files, stop=["a", ""])


def test_a_run_with_a_stop_counts_what_was_stopped_as_ended(files):
    grpo.train(short_settings("grpo", files, files / "run", stop=["1", "2", "3", "4", "5", "6", "7", "8", "9", "0", "+", "="], save_completions=True))
    lines = [json.loads(line) for line in (files / "run" / "completions.jsonl").read_text().splitlines()]
    assert all(not (line["truncated"] and set(line["completion"]) & set("1234567890+=")) for line in lines)
    assert any(not line["truncated"] for line in lines)


# ---- evaluation -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["generate", "continuous"])
def test_evaluations_have_their_own_temperature(files, engine):
    run = make("grpo", files, eval_temperature=0.0, eval_samples=5, engine=engine, rollout_correction="truncate")
    seen = []
    rewards = run.total_rewards
    run.total_rewards = lambda functions, rows, texts: seen.append((rows, texts)) or rewards(functions, rows, texts)
    run.evaluate("here")
    ((rows, texts),) = seen
    for i in range(0, len(rows), 5):
        assert len(set(texts[i : i + 5])) == 1  # the likeliest tokens
        ids = torch.tensor([run.sample.tokens(rows[i])])
        written = []
        for _ in range(run.args.max_new_tokens):
            token = int(run.model(input_ids=torch.cat([ids, torch.tensor([written], dtype=torch.long)], 1)).logits[0, -1].argmax())
            if token in run.sample.ends:
                break
            written.append(token)
        assert texts[i] == run.sample.tokenizer.decode(written, skip_special_tokens=True)
    _, batch, texts = run.rollout(0)
    assert batch.logprobs is not None
    assert len(set(texts[:4])) > 1


def test_an_engine_that_takes_no_temperature_is_refused(files):
    lines = ["class Mine:", "    def __init__(self, model, sampling): pass", "    def load_weights(self, weights): pass"]
    (files / "mine.py").write_text("\n".join([*lines, "    def sample(self, prompts): return []"]))
    make("grpo", files, engine=f"{files}/mine.py:Mine")
    with pytest.raises(InputError, match=r"takes no temperature in sample") as raised:
        make("grpo", files, engine=f"{files}/mine.py:Mine", eval_temperature=0.5)
    assert raised.value.field == "eval_temperature"


# ---- lengths --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_longer_prompts_are_left_out_and_counted(files, kind):
    with open(files / "data.jsonl", "a") as file:
        file.writelines(json.dumps({"prompt": "1" * count, "answer": "0"}) + "\n" for count in (90, 14))
    with pytest.raises(InputError, match=r"data.jsonl:7: the prompt's 90 tokens .*; max_prompt_tokens leaves longer prompts out"):
        make(kind, files, eval_fraction=0.0)
    run = make(kind, files, eval_fraction=0.0, max_prompt_tokens=14)
    lengths = [len(run.sample.tokens(row)) for row in run.rows]
    assert 0 < max(lengths) <= 14
    assert f"{len(lengths)} prompts to train on, 0 held out; {8 - len(lengths)} of more than 14 tokens left out;" in run.introduction()
    with pytest.raises(InputError, match=r"1 tokens leave none of 8 rows .*: the shortest has \d+") as raised:
        make(kind, files, eval_fraction=0.0, max_prompt_tokens=1)
    assert raised.value.field == "max_prompt_tokens"


def test_longer_preferences_are_left_out_and_counted(files):
    with open(files / "prefs.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "What is 1 + 1?", "chosen": "2", "rejected": "1" * 100}) + "\n")
    with pytest.raises(InputError, match="more than the model's 64"):
        make("reward", files, eval_fraction=0.0)
    run = make("reward", files, eval_fraction=0.0, max_tokens=40)
    assert [row.place.rpartition(":")[2] for row in run.rows] == list("1234567")
    assert "2 answers each; 1 of more than 40 tokens left out;" in run.introduction()


# ---- completions that were cut off, in PPO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("baseline", ["critic", "none"])
def test_ppo_leaves_out_what_was_cut_off(files, baseline, whiten, monkeypatch):
    seen: dict[str, list] = {"fused_linear_policy_loss": [], "value_loss": []}
    for name, calls in seen.items():
        original = getattr(ppo.rk, name)

        def watching(*inputs, original=original, calls=calls, **options):
            calls.append(options)
            return original(*inputs, **options)

        monkeypatch.setattr(ppo.rk, name, watching)
    run = make("ppo", files, mask_truncated=True, baseline=baseline, whiten=whiten, max_new_tokens=12, samples_per_prompt=4)
    numbers = run.step(0)
    assert 0 < numbers["truncated"] < 1
    assert all(torch.isfinite(torch.tensor(list(numbers.values()))))
    (policy,) = seen["fused_linear_policy_loss"]
    left = policy["mask"].sum(1) > 0
    assert left.float().mean().item() == pytest.approx(1 - numbers["truncated"])
    assert all(torch.isin(ids, torch.tensor(run.sample.ends)).any() for ids in policy["ids"][left])
    assert policy["normalizer"] == policy["mask"].sum() or run.args.loss_config().aggregation != "token-mean"
    for value in seen["value_loss"]:
        assert torch.equal(value["mask"], policy["mask"])
        assert value["normalizer"] == policy["mask"].sum()


def test_ppo_learns_nothing_where_all_were_cut_off(files, monkeypatch, capsys):
    run = make("ppo", files, mask_truncated=True, kl_target=0.1)
    monkeypatch.setattr(run.sample, "ended", lambda batch: torch.zeros(len(batch.ids), dtype=torch.bool))
    before = [weight.clone() for model in (run.model, run.critic) for weight in model.parameters()]
    numbers = run.step(0)
    assert all(torch.isfinite(torch.tensor(list(numbers.values()))))
    assert numbers["grad_norm"] == numbers["critic_grad_norm"] == 0
    assert all(map(torch.equal, before, [weight for model in (run.model, run.critic) for weight in model.parameters()]))
    assert run.kl.coef == run.args.kl_coef
    assert "no reward was learned from" in capsys.readouterr().out


# ---- conversations --------------------------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ '1' if m['role'] == 'user' else '2' }}{{ m['content'] }}?{% endfor %}"
    "{% if add_generation_prompt %}2{% if thinking is defined and thinking is false %}0{% elif thinking == 'deep' %}9{% endif %}{% endif %}"
)


def test_a_conversation_that_ends_with_the_assistant_goes_on(files):
    give_template(files, TEMPLATE)
    tokenizer = load_tokenizer(str(files / "model"))
    assert prompt_tokens(tokenizer, [USER], "p") == tokenizer("11 + 2?2")["input_ids"]
    assert prompt_tokens(tokenizer, [USER, SAYS], "p") == tokenizer("11 + 2?23")["input_ids"]
    assert prompt_tokens(tokenizer, [USER, SAYS, OTHER], "p") == tokenizer("11 + 2?23?13 + 4?2")["input_ids"]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize(("option", "ending"), [("thinking=false", "20"), ("thinking=deep", "29"), ('thinking="deep"', "29"), ("thinking=true", "2")])
def test_options_of_the_chat_template(files, kind, option, ending):
    give_template(files, TEMPLATE)
    rows = [{"prompt": [USER]}, {"prompt": [OTHER]}]
    (files / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (files / "prefs.jsonl").write_text("".join(json.dumps(row | {"chosen": "3", "rejected": "4"}) + "\n" for row in rows))
    run = make(kind, files, template_options=[option], eval_fraction=0.0)
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    expected = tokenizer("11 + 2?" + ending)["input_ids"]
    if kind == "reward":
        assert run.tokens[run.rows[0].place][0] == [*expected, *tokenizer("3")["input_ids"], tokenizer.eos_token_id]
    else:
        assert run.sample.tokens(run.rows[0]) == expected


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize(
    ("option", "message"),
    [("thinkin=false", r"does not look at 'thinkin'; did you mean 'thinking'"), ("thinking", "expected name=value"), ("tokenize=1", "itself")],
)
def test_options_that_no_chat_template_takes(files, kind, option, message):
    give_template(files, TEMPLATE)
    with pytest.raises(InputError, match=message) as raised:
        make(kind, files, template_options=[option])
    assert raised.value.field == "template_options"


def test_reward_models_read_what_their_training_read(files):
    """The options go to the reward model's template too; one that does not look at them has no use for them."""
    give_template(files, TEMPLATE)
    row = {"prompt": [USER], "chosen": [SAYS], "rejected": [SAYS | {"content": "4"}]}
    (files / "prefs.jsonl").write_text(json.dumps(row) + "\n")
    (files / "data.jsonl").write_text(json.dumps({"prompt": [USER]}) + "\n" + json.dumps({"prompt": [OTHER]}) + "\n")
    options = {"template_options": ["thinking=false"], "eval_fraction": 0.0}
    trained = make("reward", files, **options)
    trained.save()
    run = make("grpo", files, reward=[f"{trained.directory}/model"], **options)
    tokenizer = run.rewards[0].function.tokenizer
    assert prompt_tokens(tokenizer, [USER], "p") + tokenizer("3")["input_ids"] + [tokenizer.eos_token_id] == trained.tokens[trained.rows[0].place][0]


def preferences(path: Path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences(path)


def test_preferences_between_conversations(tmp_path):
    text = Answer([USER], "3"), Answer([USER], "4")
    four = SAYS | {"content": "4"}
    path = tmp_path / "p.jsonl"
    for row in (
        {"prompt": [USER], "chosen": "3", "rejected": "4"},
        {"prompt": [USER], "chosen": [SAYS], "rejected": [four]},
        {"chosen": [USER, SAYS], "rejected": [USER, four]},
        {"ranked": [[USER, SAYS], [USER, four]]},
    ):
        (found,) = preferences(path, row)
        assert (found.prompt, tuple(found.answers)) == ([USER], text)
    (longer,) = preferences(path, {"prompt": [USER], "chosen": [SAYS, OTHER, SAYS], "rejected": [four]})
    assert longer.answers == [Answer([USER, SAYS, OTHER], "3"), Answer([USER], "4")]
    # The same last words to different messages before them are different answers.
    (parted,) = preferences(path, {"chosen": [USER, SAYS, OTHER, SAYS], "rejected": [USER, four, OTHER, SAYS]})
    assert parted.prompt == [USER]
    assert parted.answers == [Answer([USER, SAYS, OTHER], "3"), Answer([USER, four, OTHER], "3")]
    (plain,) = preferences(path, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5})
    assert (plain.answers, plain.margin) == ([Answer("a", "b"), Answer("a", "c")], 0.5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": [SAYS], "rejected": "4"}, r"field 'chosen' is a list of messages, but the prompt is text"),
        (
            {"prompt": [USER], "chosen": [SAYS], "rejected": [OTHER]},
            r"field 'rejected': expected the assistant's message at the end, got that of 'user'",
        ),
        ({"prompt": [USER], "chosen": [SAYS], "rejected": [{"role": "assistant"}]}, r"field 'rejected': message 0 must be"),
        ({"prompt": [USER], "chosen": [SAYS], "rejected": []}, r"field 'rejected': expected text or a list of messages, neither empty"),
        ({"prompt": [USER], "chosen": [SAYS], "rejected": "3"}, r"field 'rejected': the same answer as field 'chosen'"),
        ({"chosen": [USER, SAYS], "rejected": [USER, SAYS]}, r"field 'rejected': the same answer as field 'chosen'"),
        ({"chosen": [USER, SAYS], "rejected": [OTHER, SAYS]}, r"without 'prompt' the conversations must begin alike"),
        ({"chosen": [USER, SAYS], "rejected": "4"}, r"no field 'prompt'.*: only answers that are whole conversations do without"),
    ],
)
def test_bad_conversations_are_named(tmp_path, row, message):
    with pytest.raises(InputError, match=r"p.jsonl:1: " + message):
        preferences(tmp_path / "p.jsonl", row)


def test_a_reward_model_learns_from_conversations(files):
    give_template(files, TEMPLATE)
    rows = [{"chosen": [USER, SAYS | {"content": str(i)}], "rejected": [USER, SAYS | {"content": "0"}]} for i in range(1, 8)]
    (files / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    TRAINERS["reward"][1](short_settings("reward", files, files / "run", steps=2, eval_fraction=0.0))
    assert len(read_metrics(files / "run" / "metrics.jsonl")) == 3


# ---- files ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a", "answer": "1", "answer": "2"}\n', r"data.jsonl:1: field 'answer' stands there twice"),
        ('{"prompt": "a"}\n'.encode("utf-16"), r"cannot read .*data.jsonl: not text in UTF-8"),
        (b"\x1f\x8b\x08\x00", r"cannot read .*data.jsonl: not text in UTF-8 .*compressed"),
    ],
)
@pytest.mark.parametrize("kind", ["grpo", "reward"])
def test_files_that_are_no_json_lines(files, kind, content, message):
    name = "prefs.jsonl" if kind == "reward" else "data.jsonl"
    (files / name).write_bytes(content)
    with pytest.raises(InputError, match=message.replace("data.jsonl", name)):
        make(kind, files)


def test_the_settings_of_the_built_in_task_still_do(files):
    """None of these options acts unless it is asked for."""
    for kind in ("grpo", "ppo"):
        args = TRAINERS[kind][0](**(tutorial.SETTINGS if kind == "grpo" else tutorial.PPO_SETTINGS))
        assert (args.stop, args.eval_temperature, args.max_prompt_tokens, args.mask_truncated, args.template_options) == ([], None, None, False, [])
