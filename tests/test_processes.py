"""The trainers on several processes: a batch divided among them gives the numbers of one process; a run goes on with another number of them."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import CONTEXT
from runs import fresh_accelerate, save_tiny_model  # noqa: F401

from rlkern.trainers import grpo, ppo, tutorial
from rlkern.trainers.data import batch_at
from rlkern.trainers.policy import PolicyRun
from rlkern.trainers.runs import read_metrics, seed_all

REWARDS = """
def sevens(completions, **fields):
    return [completion.count("7") / 4 for completion in completions]
"""
CORRECTED = {"engine": "own_engines:Hotter", "rollout_correction": "mask", "correction_level": "sequence", "correction_high": 1.05}
TRAINERS = {"grpo": (grpo.GRPOArguments, grpo.train), "ppo": (ppo.PPOArguments, ppo.train)}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    save_tiny_model(directory / "model")
    pairs = [(1, 2), (13, 4), (7, 22), (11, 30), (5, 5), (29, 6), (8, 1), (2, 40)]
    lines = [json.dumps({"prompt": tutorial.question(a, b), "answer": str(a + b)}) for a, b in pairs]
    (directory / "data.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "rewards.py").write_text(REWARDS)
    return directory


def same_for_any_world(self: PolicyRun, step: int) -> tuple[list[Any], Any, list[str]]:
    """``PolicyRun.rollout`` that samples the whole batch in every process, by the same seed, and takes this process's share."""
    seed_all(self.args.seed, step)
    samples, here = self.args.samples_per_prompt, self.prompts_here * self.args.samples_per_prompt
    prompts = batch_at(step, self.args.prompts_per_step, len(self.rows), self.args.seed)
    rows = [self.rows[i] for i in prompts for _ in range(samples)]
    batch, texts = self.sample(rows)
    mine = slice(self.rank * here, (self.rank + 1) * here)
    return rows[mine], batch.rows(torch.arange(len(rows))[mine]), texts[mine]


def _process(rank: int, world: int, port: int, kind: str, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()} if world > 1 else {}
    PolicyRun.rollout = same_for_any_world  # type: ignore[method-assign]
    arguments, train = TRAINERS[kind]
    train(arguments(**settings))
    if world > 1:
        torch.distributed.destroy_process_group()


def run(world: int, kind: str, files: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    """Train on so many processes; the log."""
    settings = {
        "model": str(files / "model"),
        "data": str(files / "data.jsonl"),
        "reward": [f"{files}/rewards.py:sevens"],
        "output_dir": str(output),
        "steps": 5,
        "prompts_per_step": 4,
        "samples_per_prompt": 3,
        "max_new_tokens": 6,
        "learning_rate": 3e-3,
        "kl_coef": 0.05,
        "epochs": 2,
        "minibatches": 1,  # which completions make up a smaller one depends on the processes
        "save_every": 2,
        "eval_every": 0,
        "eval_fraction": 0.0,
        "cpu": True,
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=_process, args=(rank, world, port, kind, {**settings, **changes})) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        hung = process.is_alive()
        process.kill()
        assert not hung, "a process did not come back"
        assert process.exitcode == 0
    return read_metrics(output / "metrics.jsonl")


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 4}, CORRECTED], ids=["whole", "micro-batches", "corrected"])
def test_numbers_do_not_depend_on_the_processes(kind, changes, files, tmp_path):
    one, two = (run(world, kind, files, tmp_path / str(world), **changes) for world in (1, 2))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in set(a) - {"seconds_per_step", "reward_std"}:  # the latter is the mean of the processes' own
            assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-4), f"step {a['step']}, {name}"


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_is_resumed_by_another_number_of_processes(kind, before, after, files, tmp_path):
    whole = run(1, kind, files, tmp_path / "whole", lr_schedule="constant")
    run(before, kind, files, tmp_path / "part", lr_schedule="constant", steps=2)
    resumed = run(after, kind, files, tmp_path / "part", lr_schedule="constant", resume=True)
    assert [row["step"] for row in resumed] == [row["step"] for row in whole]
    for a, b in zip(whole[1:], resumed[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4, rel=1e-4)
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-4)
