"""What the trainers' tests share: a tiny model, runs that die, and the comparison of a resumed run with one that did not."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from rlkern.trainers import grpo, ppo, reward, tutorial


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def save_tiny_model(directory: Path) -> None:
    """A model that knows nothing, with the tutorial's tokenizer."""
    torch.manual_seed(0)
    tokenizer = tutorial.build_tokenizer()
    tutorial.build_model(tokenizer, width=16, layers=1, heads=2).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_questions(path: Path) -> None:
    """Prompts of several lengths, with their answers."""
    pairs = [(1, 2), (13, 4), (7, 22), (11, 30), (5, 5), (29, 6)]
    path.write_text("".join(json.dumps({"prompt": tutorial.question(a, b), "answer": str(a + b)}) + "\n" for a, b in pairs))


def save_files(directory: Path, rewards: str) -> Path:
    """A model that knows nothing, prompts of several lengths, and rewards."""
    save_tiny_model(directory / "model")
    save_questions(directory / "data.jsonl")
    (directory / "rewards.py").write_text(rewards)
    return directory


def sampling_settings(files: Path, output: Path) -> dict[str, Any]:
    """A short run of a trainer that samples, on ``model``, ``data.jsonl`` and ``rewards.py`` of a directory."""
    return {
        "model": str(files / "model"),
        "data": str(files / "data.jsonl"),
        "reward": [f"{files}/rewards.py:sevens"],
        "output_dir": str(output),
        "eval_fraction": 0.34,
        "steps": 6,
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "max_new_tokens": 6,
        "learning_rate": 3e-3,
        "kl_coef": 0.05,
        "epochs": 2,
        "minibatches": 2,
        "save_every": 2,
        "cpu": True,
    }


TRAINERS = {
    "grpo": (grpo.GRPOArguments, grpo.train, grpo.GRPO),
    "ppo": (ppo.PPOArguments, ppo.train, ppo.PPO),
    "reward": (reward.RewardArguments, reward.train, reward.RewardRun),
}


def save_files_of_all(directory: Path) -> Path:
    """What any of the trainers reads: a model, prompts, rewards and preferences."""
    save_files(directory, "def sevens(completions, **fields):\n    return [float(c.count('7')) for c in completions]\n")
    pairs = [{"prompt": tutorial.question(a, 3), "chosen": str(a + 3), "rejected": "0"} for a in range(7)]
    (directory / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return directory


def short_settings(kind: str, files: Path, output: Path, **changes: Any) -> Any:
    """The arguments of a short run of any trainer on :func:`save_files_of_all`."""
    given = sampling_settings(files, output) | {"steps": 1, "epochs": 1, "minibatches": 1}
    if kind == "reward":
        names = ("model", "output_dir", "eval_fraction", "steps", "prompts_per_step", "learning_rate", "cpu", "save_every")
        given = {name: given[name] for name in names} | {"data": str(files / "prefs.jsonl")}
    return TRAINERS[kind][0](**given | changes)


class Killed(BaseException):
    pass


def die_at(monkeypatch, target, name: str, count: int) -> None:
    """The ``count``-th call of ``target.name`` raises instead."""
    original, calls = getattr(target, name), [0]

    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, dying)


def train_and_kill(command: str, output: Path, *, checkpoint: int = 2) -> None:
    """Run Python code that trains into ``output``, and SIGKILL it with half a checkpoint and half a line of the log on the disk."""
    script = f"""
        import os, signal, torch
        torch.set_num_threads({torch.get_num_threads()})
        from accelerate import Accelerator
        save, calls = Accelerator.save_state, []
        def dying(self, path, *args, **kwargs):
            calls.append(path)
            if len(calls) == {checkpoint}:
                os.makedirs(path)
                open(path + "/model.safetensors", "wb").write(b"half")
                open({str(output / "metrics.jsonl")!r}, "a").write('{{"step": 5, "rew')
                os.kill(os.getpid(), signal.SIGKILL)
            return save(self, path, *args, **kwargs)
        Accelerator.save_state = dying
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    code = textwrap.dedent(script) + command
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (output / "checkpoints" / "part").exists()


def assert_same_run(one: Path, other: Path) -> None:
    """The same log to the last byte, and the same models."""
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    files = sorted(path.relative_to(one) for path in one.glob("*/*.safetensors"))
    assert files
    for file in files:
        weights, others = (load_file(path / file) for path in (one, other))
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)
