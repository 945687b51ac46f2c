"""What users of the trainers ask for: checkpoints at Ctrl-C and after damage, ends that are no special tokens."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from rlkern.trainers import grpo, rollout, tutorial
from rlkern.trainers.errors import InputError
from rlkern.trainers.runs import Checkpoints, read_metrics

from .runs import TRAINERS, Killed, assert_same_run, die_at, fresh_accelerate, save_files_of_all, short_settings  # noqa: F401


@pytest.fixture
def files(tmp_path) -> Path:
    return save_files_of_all(tmp_path)


@pytest.fixture(autouse=True)
def interruptible():
    """Where the tests were started in the background, Ctrl-C is ignored from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def settings(kind: str, files: Path, output: Path, **changes):
    return short_settings(kind, files, output, **{"steps": 3, "save_every": 1, **changes})


def run(kind: str, files: Path, output: Path, **changes):
    return TRAINERS[kind][1](settings(kind, files, output, **changes))


@pytest.mark.parametrize("kind", TRAINERS)
def test_of_a_damaged_checkpoint_the_one_before_is_taken(kind, files, capsys):
    whole, damaged = files / "whole", files / "damaged"
    run(kind, files, whole)
    run(kind, files, damaged)
    file = damaged / "checkpoints" / "step-00000003" / "optimizer.bin"
    os.truncate(file, file.stat().st_size // 2)
    run(kind, files, damaged, resume=True)
    assert "step-00000003 cannot be loaded" in (said := capsys.readouterr().out)
    assert "resumed after step 2" in said
    assert_same_run(whole, damaged)
    assert sorted(path.name for path in (damaged / "checkpoints").iterdir()) == ["damaged-00000003", "step-00000002", "step-00000003"]
    for path in (damaged / "checkpoints").glob("step-*"):
        (path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="step-00000003 cannot be loaded, nor one before it: ") as raised:
        run(kind, files, damaged, resume=True)
    assert raised.value.field == "resume"
    assert (damaged / "checkpoints" / "step-00000003").exists()


@pytest.mark.parametrize("kind", TRAINERS)
def test_ctrl_c_keeps_the_step(kind, files, monkeypatch):
    whole, broken = files / "whole", files / "broken"
    run(kind, files, whole, save_every=0)
    trainer = TRAINERS[kind][2]
    step = trainer.step

    def interrupted(self, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(kind, files, broken, save_every=0)
    monkeypatch.undo()
    assert [row["step"] for row in read_metrics(broken / "metrics.jsonl")] == [0, 1, 2]
    assert [path.name for path in (broken / "checkpoints").iterdir()] == ["step-00000002"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(kind, files, broken, save_every=0, resume=True)
    assert_same_run(whole, broken)


def test_the_second_ctrl_c_ends_the_run_at_once(files, monkeypatch):
    def interrupted(self, number):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step goes on")

    monkeypatch.setattr(grpo.GRPO, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("grpo", files, files / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run(kind, bad, files, monkeypatch):
    trainer = TRAINERS[kind][2]
    step = trainer.step
    monkeypatch.setattr(trainer, "step", lambda self, number: step(self, number) | ({"grad_norm": bad} if number == 1 else {}))
    with pytest.raises(InputError, match="step 2: the gradient is not finite"):
        run(kind, files, files / "run")
    assert [path.name for path in (files / "run" / "checkpoints").iterdir()] == ["step-00000001"]  # of the weights before it


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_ends_that_are_no_special_tokens_are_no_text(kind, files):
    path = files / "model" / "generation_config.json"
    seven = tutorial.build_tokenizer().convert_tokens_to_ids("7")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [seven]}))
    trained = TRAINERS[kind][2](settings(kind, files, files / "run"))
    batch, texts = trained.rollout(0)[1:]
    ended = 0
    for ids, mask, text in zip(batch.ids[:, -batch.mask.shape[1] :], batch.mask, texts, strict=True):
        written = ids[mask.bool()].tolist()
        ended += written[-1] == seven
        assert text == trained.sample.tokenizer.decode([token for token in written if token not in trained.sample.ends], skip_special_tokens=True)
    assert ended  # a model that knows nothing comes to it


def test_prompts_are_tokenised_once(files, monkeypatch):
    calls = []
    original = rollout.prompt_tokens
    monkeypatch.setattr(rollout, "prompt_tokens", lambda tokenizer, prompt, place: calls.append(place) or original(tokenizer, prompt, place))
    run("grpo", files, files / "run")
    assert sorted(calls) == [f"{files}/data.jsonl:{line}" for line in range(1, 7)]


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_completions_are_written_down_and_a_resumed_run_writes_the_same(kind, files, monkeypatch):
    whole, broken = files / "whole", files / "broken"
    run(kind, files, whole, save_completions=True)
    lines = [json.loads(line) for line in (whole / "completions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 16 + [2] * 16 + [3] * 16
    assert all(
        line["reward"] == line["completion"].count("7") and set(line) == {"step", "prompt", "completion", "reward", "truncated"} for line in lines
    )
    for row in read_metrics(whole / "metrics.jsonl")[1:]:
        of_step = [line for line in lines if line["step"] == row["step"]]
        assert row["truncated"] == pytest.approx(sum(line["truncated"] for line in of_step) / 16)
        assert row["reward"] == pytest.approx(sum(line["reward"] for line in of_step) / 16)
    die_at(monkeypatch, Checkpoints, "save", 2)
    with pytest.raises(Killed):
        run(kind, files, broken, save_completions=True)
    monkeypatch.undo()
    run(kind, files, broken, save_completions=True, resume=True)
    assert (whole / "completions.jsonl").read_bytes() == (broken / "completions.jsonl").read_bytes()


@pytest.mark.parametrize("loss", ["grpo", "dapo", "gspo", "dr_grpo"])
def test_completions_that_were_cut_off_are_left_out_of_the_loss(loss, files, monkeypatch):
    seen = []
    original = grpo.rk.fused_linear_policy_loss
    monkeypatch.setattr(grpo.rk, "fused_linear_policy_loss", lambda **inputs: seen.append(inputs) or original(**inputs))
    trained = grpo.GRPO(settings("grpo", files, files / "run", mask_truncated=True, loss=loss, micro_batch_size=1, max_new_tokens=12))
    numbers = trained.step(0)
    assert 0 < numbers["truncated"] < 1
    left = [inputs for inputs in seen if inputs["mask"].sum() > 0]
    assert len(left) == round((1 - numbers["truncated"]) * len(seen))
    assert all(torch.isin(inputs["ids"], torch.tensor(trained.sample.ends)).any() for inputs in left)
    count = sum(int(inputs["mask"].sum()) for inputs in left) if loss == "dapo" else len(left)
    assert all(inputs["normalizer"] == count for inputs in seen)
    assert all(math.isfinite(value) for value in numbers.values())


def test_a_step_in_which_all_are_cut_off_moves_nothing(files, monkeypatch):
    trained = grpo.GRPO(settings("grpo", files, files / "run", mask_truncated=True))
    monkeypatch.setattr(trained.sample, "ended", lambda batch: torch.zeros(len(batch.ids), dtype=torch.bool))
    before = [weight.clone() for weight in trained.model.parameters()]
    numbers = trained.step(0)
    assert numbers["truncated"] == 1
    assert numbers["grad_norm"] == 0
    assert all(map(torch.equal, before, trained.model.parameters()))
    assert all(math.isfinite(value) for value in numbers.values())
