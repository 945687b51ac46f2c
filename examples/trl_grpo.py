"""TRL's GRPO with and without rlkern: the same losses and rewards; time and memory of both.

    python examples/trl_grpo.py                        # 20 steps each on a small model with a vocabulary of 32,000
    python examples/trl_grpo.py --set loss_type=grpo --set beta=0.04

Each run is a process of its own, with the same seed. Needs TRL 1.15 or 1.16: pip install 'trl>=1.15,<1.17'
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--completions", type=int, default=16, help="in a step")
    parser.add_argument("--new", type=int, default=32, help="tokens of a completion")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; with 1 the seconds are of CPU time, which other programs do not disturb")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of GRPOConfig")
    parser.add_argument("--one", choices=("trl", "rlkern"), help="run one of them and print it as JSON")
    return parser.parse_args()


def low_ids(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **fields: Any) -> list[float]:
    """A reward that any model can earn: the mean of the token ids, small ones for preference."""
    return [1.0 - sum(ids) / (len(ids) * 32_000) for ids in completion_ids]


def run(args: argparse.Namespace, enabled: bool) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from rlkern.integrations.trl import enable
    from rlkern.trainers.tutorial import build_tokenizer, question

    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocabulary,
            hidden_size=args.width,
            intermediate_size=2 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.width // 64,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)  # where a reference model is loaded from
        model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
        options = {name: json.loads(value) if value[:1] in '-.0123456789"tfn[' else value for name, value in (x.split("=", 1) for x in args.set)}
        settings = {
            "output_dir": directory,
            "max_steps": args.steps,
            "per_device_train_batch_size": args.completions,
            "num_generations": 4,
            "max_completion_length": args.new,
            "learning_rate": 1e-4,
            "beta": 0.04,
            "bf16": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 0,
        }
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=low_ids,
            args=GRPOConfig(**settings | options),
            train_dataset=Dataset.from_list([{"prompt": question(a, b)} for a in range(30) for b in range(30)]),
            processing_class=tokenizer,
        )
        sampling, prepare, memory = 0.0, trainer._prepare_inputs, 0

        def timed(batch: Any) -> Any:
            nonlocal sampling
            started = clock()
            inputs = prepare(batch)
            sampling += clock() - started
            return inputs

        trainer._prepare_inputs = timed
        cuda = torch.cuda.is_available()
        before = torch.cuda.memory_allocated() if cuda else resident()
        started = clock()
        with enable(trainer) if enabled else contextlib.nullcontext(), contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        seconds = clock() - started - sampling
        memory = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log = trainer.state.log_history
    losses, rewards = ([entry[name] for entry in log if name in entry] for name in ("loss", "reward"))
    return {"seconds": seconds, "sampling": sampling, "megabytes": (memory - before) / 1e6, "losses": losses, "rewards": rewards}


def resident() -> int:
    """Bytes of memory that this process holds."""
    import psutil

    return psutil.Process().memory_info().rss


def main() -> None:
    args = arguments()
    if args.one:
        print(json.dumps(run(args, args.one == "rlkern")))
        return
    results = {}
    for one in ("trl", "rlkern"):
        output = subprocess.run([sys.executable, *sys.argv, "--one", one], capture_output=True, text=True)
        if output.returncode != 0:
            sys.exit(output.stderr)
        results[one] = json.loads(output.stdout.splitlines()[-1])
    difference = max(abs(x - y) for x, y in zip(results["trl"]["losses"], results["rlkern"]["losses"], strict=True))
    print(f"{'':10} {'training':>10} {'sampling':>10} {'peak memory':>13}   mean reward, first and last step")
    for one, x in results.items():
        rewards = f"{x['rewards'][0]:.4f} {x['rewards'][-1]:.4f}"
        print(f"{one:10} {x['seconds']:8.1f} s {x['sampling']:8.1f} s {x['megabytes']:10.0f} MB   {rewards}")
    same = "the same" if results["trl"]["rewards"] == results["rlkern"]["rewards"] else "different"
    print(f"{args.steps} steps; rewards {same}; largest difference of a loss {difference:.1e}")


if __name__ == "__main__":
    main()
