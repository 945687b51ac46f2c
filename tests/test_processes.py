"""The trainers on several processes: a batch divided among them gives the numbers of one process; a run goes on with another number of them."""

import json
import os
import signal
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy
from tqdm import tqdm

from rlkern.trainers import tutorial
from rlkern.trainers.data import batch_at
from rlkern.trainers.errors import InputError
from rlkern.trainers.policy import PolicyRun
from rlkern.trainers.runs import Checkpoints, Run, read_metrics, seed_all
from rlkern.trainers.sharding import Shell, shards_models

from .ranks import CONTEXT
from .runs import TRAINERS, fresh_accelerate, save_tiny_model  # noqa: F401

REWARDS = """
def sevens(completions, **fields):
    return [completion.count("7") / 4 for completion in completions]
"""
CORRECTED = {"engine": "tests.own_engines:Hotter", "rollout_correction": "mask", "correction_level": "sequence", "correction_high": 1.05}
SAMPLING = ["grpo", "ppo"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    save_tiny_model(directory / "model")
    pairs = [(1, 2), (13, 4), (7, 22), (11, 30), (5, 5), (29, 6), (8, 1), (2, 40)]
    lines = [json.dumps({"prompt": tutorial.question(a, b), "answer": str(a + b)}) for a, b in pairs]
    (directory / "data.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "rewards.py").write_text(REWARDS)
    lines = [json.dumps({"prompt": tutorial.question(a, b), "chosen": str(a + b), "rejected": "3" * (a % 4 + 1)}) for a, b in pairs]
    (directory / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def same_for_any_world(self: PolicyRun, step: int) -> tuple[list[Any], Any, list[str]]:
    """``PolicyRun.rollout`` that samples the whole batch in every process, by the same seed, and takes this process's share."""
    seed_all(self.args.seed, step)
    samples = self.args.samples_per_prompt
    prompts = batch_at(step, self.args.prompts_per_step, len(self.rows), self.args.seed)
    rows = [self.rows[i] for i in prompts for _ in range(samples)]
    with self.sampling():
        batch, texts = self.sample(rows)
    mine = slice(self.share.start * samples, self.share.stop * samples)
    return rows[mine], batch.rows(torch.arange(len(rows))[mine]), texts[mine]


def steady_adamw(self: Run, model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """``Run.adamw`` that does not magnify rounding: Adam moves a weight whose gradient is all rounding as far as any, and so flips sampled tokens."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, self.args.adam_beta2), weight_decay=self.args.weight_decay, eps=1e-3)


def _process(rank: int, world: int, port: int, kind: str, settings: dict[str, Any], how: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared by what is forked, and stays held when a process is killed that draws its bar
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()} if world > 1 else {}
    if how["fsdp"]:  # as `accelerate launch --use-fsdp --fsdp-version 2` has it, which on its own knows FSDP on GPUs only
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = how["fsdp"]
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if how["dies_at"] is not None:
        step = TRAINERS[kind][2].step
        TRAINERS[kind][2].step = lambda self, n: os.kill(os.getpid(), signal.SIGKILL) if n == how["dies_at"] and rank == 1 else step(self, n)
    if how["same_samples"]:
        PolicyRun.rollout = same_for_any_world  # type: ignore[method-assign]
    arguments, train, trainer = TRAINERS[kind]
    trainer.adamw = steady_adamw
    train(arguments(**settings))
    if world > 1:
        torch.distributed.destroy_process_group()


# What FSDP shards by itself; of the second the head is one, which is whole nowhere.
LAYERS, LINEAR = "LlamaDecoderLayer", "LlamaDecoderLayer,Linear"


def run(
    world: int,
    kind: str,
    files: Path,
    output: Path,
    *,
    fsdp: str | None = None,
    dies_at: int | None = None,
    same_samples: bool = True,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Train on so many processes, of which the second may be killed before some step; the log. ``same_samples``: for any number of processes."""
    how = {"fsdp": fsdp, "dies_at": dies_at, "same_samples": same_samples}
    settings = {
        "model": str(files / "model"),
        "output_dir": str(output),
        "steps": 5,
        "prompts_per_step": 4,
        "learning_rate": 3e-3,
        "save_every": 2,
        "eval_every": 0,
        "cpu": True,
    }
    if kind == "reward":
        settings |= {"data": f"{files}/pairs.jsonl", "eval_fraction": 0.4, "eval_every": 1}
    else:
        settings |= {
            "data": f"{files}/data.jsonl",
            "eval_fraction": 0.0,
            "reward": [f"{files}/rewards.py:sevens"],
            "samples_per_prompt": 3,
            "max_new_tokens": 6,
            "kl_coef": 0.05,
            "epochs": 2,
            "minibatches": 1,  # which completions make up a smaller one depends on the processes
        }
    if kind == "ppo":
        settings["truncated"] = "score"  # few completions of such a model end by themselves
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(rank, world, port, kind, {**settings, **changes}, how) for rank in range(world)]
    processes = [CONTEXT.Process(target=_process, args=each, daemon=True) for each in arguments]
    try:
        for process in processes:
            process.start()
        for process in processes if dies_at is None else processes[1:]:
            process.join(120)
            assert not process.is_alive(), "a process did not come back"
            assert process.exitcode == (0 if dies_at is None else -signal.SIGKILL)
    finally:
        for process in processes:
            process.kill()  # as launchers do with the others when one has died
            process.join()
    return read_metrics(output / "metrics.jsonl")


def assert_same_numbers(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in one] == [row["step"] for row in other]
    assert all(row["grad_norm"] > 0 for row in one[1:]), "nothing was learned"
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-4), f"step {a['step']}, {name}"


@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize(
    ("worlds", "changes"),
    [((2,), {}), ((2,), {"micro_batch_size": 4}), ((3,), {"micro_batch_size": 2}), ((3,), CORRECTED)],
    ids=["whole", "micro-batches", "uneven shares in micro-batches", "another engine, corrected for"],
)
def test_numbers_do_not_depend_on_the_processes(kind, worlds, changes, files, tmp_path):
    one = run(1, kind, files, tmp_path / "1", **changes)
    for world in worlds:
        assert_same_numbers(one, run(world, kind, files, tmp_path / str(world), **changes))


def test_adapters_do_not_depend_on_the_processes(files, tmp_path):
    """LoRA by data parallelism, of policy and critic; a checkpoint of adapters is resumed by another number of processes."""
    pytest.importorskip("peft")
    changes = {"lora_rank": 4, "lr_schedule": "constant", "micro_batch_size": 4}
    one = run(1, "ppo", files, tmp_path / "1", steps=4, **changes)
    assert_same_numbers(one[:3], run(2, "ppo", files, tmp_path / "2", steps=2, **changes))
    assert_same_numbers(one, run(1, "ppo", files, tmp_path / "2", steps=4, resume=True, **changes))


@pytest.mark.parametrize(("kind", "fsdp"), [*((kind, LAYERS) for kind in TRAINERS), ("grpo", LINEAR)])
def test_fsdp2(kind, fsdp, files, tmp_path):
    """Sharded models give the numbers of one process, are resumed by another number of them, and saved whole."""
    one = run(1, kind, files, tmp_path / "1", steps=4)
    run(2, kind, files, tmp_path / "2", steps=2, fsdp=fsdp)
    assert_same_numbers(one, run(3, kind, files, tmp_path / "2", steps=4, fsdp=fsdp, resume=True, lr_schedule="constant"))
    for model in ("model", "critic") if kind == "ppo" else ("model",):
        weights, others = (load_file(tmp_path / world / model / "model.safetensors") for world in "12")
        assert weights.keys() == others.keys()
        for name in weights:
            torch.testing.assert_close(weights[name], others[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ["continuous", "tests.own_engines:Copy"])
def test_engines_under_fsdp2(engine, files, tmp_path):
    """The policy gathered, to sample from it; its weights given to an engine that has its own."""
    changes = {"steps": 3, "engine": engine, "rollout_correction": "truncate"}
    sharded = run(2, "grpo", files, tmp_path / "2", fsdp=LAYERS, **changes)
    assert all(row["mismatch_ratio_max"] == pytest.approx(1, abs=1e-4) for row in sharded[1:])
    if engine != "continuous":  # which adds the number of the process to the seed
        assert_same_numbers(run(1, "grpo", files, tmp_path / "1", **changes), sharded)


@pytest.mark.parametrize(("kind", "fsdp"), [("grpo", None), ("ppo", LAYERS)])
def test_samples_of_its_own_in_every_process(kind, fsdp, files, tmp_path):
    """4 prompts and 3 held-out ones among 3 processes: all count, each once."""
    changes = {"eval_fraction": 0.4, "eval_every": 1, "steps": 2, "success_reward": -1.0}
    log = run(3, kind, files, tmp_path / "run", fsdp=fsdp, same_samples=False, **changes)
    assert all(row["held_out_accuracy"] == 1 for row in log)
    for row in log:
        total = row["held_out_reward"] * 3 * 4  # three completions, rewards in quarters
        assert total == pytest.approx(round(total), abs=1e-4)
    for row in log[1:]:
        total = row["reward"] * 4 * 3 * 4
        assert total == pytest.approx(round(total), abs=1e-4)


@pytest.mark.parametrize("changes", [{"prompts_per_step": 5, "micro_batch_size": 2}, {"prompts_per_step": 2}], ids=["uneven", "fewer than processes"])
def test_reward_models_do_not_depend_on_the_processes(changes, files, tmp_path):
    assert_same_numbers(*(run(world, "reward", files, tmp_path / str(world), **changes) for world in (1, 3)))


@pytest.mark.parametrize("kind", SAMPLING)
def test_a_killed_process_leaves_a_checkpoint(kind, files, tmp_path):
    whole = run(2, kind, files, tmp_path / "whole")
    cut = run(2, kind, files, tmp_path / "cut", dies_at=3)
    assert [row["step"] for row in cut] == [0, 1, 2, 3]
    assert run(2, kind, files, tmp_path / "cut", resume=True) == whole


@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_is_resumed_by_another_number_of_processes(kind, before, after, files, tmp_path):
    whole = run(1, kind, files, tmp_path / "whole", lr_schedule="constant")
    run(before, kind, files, tmp_path / "part", lr_schedule="constant", steps=2)
    assert_same_numbers(whole, run(after, kind, files, tmp_path / "part", lr_schedule="constant", resume=True))


def test_kinds_of_sharding():
    def accelerator(kind: DistributedType, **plugin: Any) -> Any:
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**{"cpu_ram_efficient_loading": False, "cpu_offload": None, **plugin}))
        return SimpleNamespace(distributed_type=kind, is_fsdp2=kind == DistributedType.FSDP and "v1" not in plugin, state=state)

    assert shards_models(accelerator(DistributedType.FSDP))
    assert not shards_models(accelerator(DistributedType.MULTI_GPU))
    for kind, plugin, message in (
        (DistributedType.FSDP, {"v1": True}, "FSDP version 1"),
        (DistributedType.DEEPSPEED, {}, "DEEPSPEED"),
        (DistributedType.FSDP, {"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading must be false"),
        (DistributedType.FSDP, {"cpu_offload": CPUOffloadPolicy()}, "fsdp_offload_params must be false"),
    ):
        with pytest.raises(InputError, match=message):
            shards_models(accelerator(kind, **plugin))


def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path):
    (tmp_path / "step-00000002" / "pytorch_model_fsdp_0").mkdir(parents=True)
    with pytest.raises(InputError, match="written with FSDP, and cannot be resumed without"):
        Checkpoints(tmp_path, SimpleNamespace(is_fsdp2=False), keep=2).load()  # type: ignore[arg-type]
    (tmp_path / "step-00000004").mkdir()
    with pytest.raises(InputError, match="written without FSDP, and cannot be resumed with it"):
        Checkpoints(tmp_path, SimpleNamespace(is_fsdp2=True), keep=2).load()  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_a_shell_samples_what_the_model_does(tied):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=44,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )
    shell = Shell(model, torch.device("cpu"))
    ids = torch.arange(12).view(2, 6)
    with shell.filled((name, p.detach()) for name, p in model.named_parameters()):
        assert torch.equal(shell.model(ids).logits, model(ids).logits)
        assert (shell.model.lm_head.weight is shell.model.model.embed_tokens.weight) == tied
    assert all(p.is_meta for p in shell.model.parameters())
