"""The built-in task of the trainers: sums, scored as a teacher would.

    "What is 2 + 3?"   "6" -> 0 (wrong)   "5" -> 1 (right)   "2 + 3 = 5" -> 2 (right, with the working)

Everything is made here: questions, tokenizer, a small Llama, and a short supervised warm-up that teaches the model to add and the two ways to
answer, mostly without the working. What training adds it learns from the reward alone, or from the teacher's preferences. The result is a model
directory and data files like a user's own: the trainers know no difference.

An eighth of the sums is held out, both ways round (7 + 2 with 2 + 7): nothing ever trains on them.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlkern as rk

LARGEST = 30  # numbers are 0 to this
WARM_UP_STEPS = 600
WARM_UP_BATCH = 64
WITH_WORKING = (0.6, 0.15)  # share of the warm-up's answers that show the working, at its start and, falling steadily, at its end
PREFERENCES = 16  # pairs of answers to each question
# What the built-in task sets where the user sets nothing: for GRPO, for PPO, and for a reward model.
SETTINGS = {
    "steps": 100,
    "prompts_per_step": 32,
    "samples_per_prompt": 8,
    "max_new_tokens": 10,
    "kl_coef": 0.01,
    "epochs": 2,
    "minibatches": 2,
    "learning_rate": 3e-4,
    "lr_schedule": "linear",
    "lr_warmup_steps": 5,
    "adam_beta2": 0.98,
    "eval_every": 25,
    "eval_samples": 4,
    "save_every": 25,
}
PPO_SETTINGS = {
    "steps": 60,
    "prompts_per_step": 256,
    "max_new_tokens": 10,
    "truncated": "score",  # to end in time is part of the task: by the critic's word for it alone, a policy may learn never to
    "kl_coef": 0.01,
    "epochs": 2,
    "minibatches": 2,
    "learning_rate": 3e-4,
    "critic_learning_rate": 1e-3,
    "lr_schedule": "linear",
    "lr_warmup_steps": 5,
    "adam_beta2": 0.98,
    "eval_every": 20,
    "eval_samples": 4,
    "save_every": 20,
}
REWARD_MODEL_SETTINGS = {
    "steps": 900,
    "prompts_per_step": 64,
    "learning_rate": 2e-3,
    "lr_schedule": "linear",
    "lr_warmup_steps": 20,
    "adam_beta2": 0.98,
    "weight_decay": 0.1,
    "eval_every": 300,
    "save_every": 300,
}

REWARD = "rlkern.trainers.tutorial:reward"


def question(a: int, b: int) -> str:
    return f"What is {a} + {b}?"


def reward(prompts: list[str], completions: list[str], answer: list[str], **fields: Any) -> list[float]:
    """2 for "2 + 3 = 5", 1 for "5", 0 for anything else."""
    scores = []
    for prompt, completion, right in zip(prompts, completions, answer, strict=True):
        working = f"{prompt.removeprefix('What is ').removesuffix('?')} = {right}"
        scores.append(2.0 if completion == working else 1.0 if completion == right else 0.0)
    return scores


def preferences(pairs: list[tuple[int, int]], seed: int) -> list[dict[str, str]]:
    """Pairs of answers to each question, of which the teacher scores one higher: with the working against without, and right against wrong."""
    draw = random.Random(f"preferences/{seed}")

    def slip(right: int, largest: int) -> int:
        return draw.choice([number for number in range(largest + 1) if number != right])

    rows = []
    for a, b in pairs:
        for _ in range(PREFERENCES):
            c, d = draw.choice([(slip(a, LARGEST), b), (a, slip(b, LARGEST))])
            working, bare = f"{a} + {b} = {a + b}", f"{a + b}"
            wrong_working = draw.choice([f"{a} + {b} = {slip(a + b, 2 * LARGEST)}", f"{c} + {d} = {c + d}", f"{a} + {b}"])
            wrong_bare = draw.choice([f"{slip(a + b, 2 * LARGEST)}", f"{a + b}{draw.randrange(10)}"])
            pair = [(working, bare), (working, wrong_working), (working, wrong_bare), (bare, wrong_working), (bare, wrong_bare)]
            better, worse = draw.choice(pair)
            rows.append({"prompt": question(a, b), "chosen": better, "rejected": worse})
    return rows


def split(seed: int, largest: int = LARGEST) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(training, held-out) sums as ordered pairs; a held-out sum is held out both ways round."""
    unordered = [(a, b) for a in range(largest + 1) for b in range(a, largest + 1)]
    random.Random(seed).shuffle(unordered)
    cut = len(unordered) // 8
    training, held_out = ([pair for a, b in pairs for pair in dict.fromkeys(((a, b), (b, a)))] for pairs in (unordered[cut:], unordered[:cut]))
    return training, held_out


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Each digit is a token, the last one of a number together with what follows it; the text comes back from the tokens exactly."""
    vocabulary = ["<pad>", "<end>", "<unknown>", "What is ", *(f"{digit}{after}" for after in ("", " + ", "?", " = ") for digit in range(10))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"What is |\d(?: \+ |\?| = )?|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>", clean_up_tokenization_spaces=False
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, width: int = 96, layers: int = 2, heads: int = 4) -> LlamaForCausalLM:
    """An untrained Llama of 190,000 parameters, as random as torch's generator is."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def prepare(directory: Path, seed: int, device: torch.device) -> dict[str, Any]:
    """Make the task in ``directory``: model/, train.jsonl and preferences.jsonl, both with a held_out_ one beside it (held_out.jsonl for the first),
    and warm_up.json, what is known of the warm-up, which is returned.

    All of it or nothing appears; what is there already is kept. On a CPU it leaves torch with one thread: so small a model gains little from a second
    and, where another process wants that core, loses everything by waiting for it.
    """
    if device.type == "cpu":
        torch.set_num_threads(1)
    if not directory.exists():
        part = directory.with_name(directory.name + ".part")
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        part.mkdir(parents=True)
        train, held_out = split(seed)
        files = {
            name: [{"prompt": question(a, b), "answer": str(a + b)} for a, b in pairs] for name, pairs in (("train", train), ("held_out", held_out))
        }
        files |= {"preferences": preferences(train, seed), "held_out_preferences": preferences(held_out, seed)}
        for name, rows in files.items():
            (part / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer).to(device)
        known = warm_up(model, tokenizer, train)
        model.save_pretrained(part / "model")
        tokenizer.save_pretrained(part / "model")
        (part / "warm_up.json").write_text(json.dumps(known), encoding="utf-8")
        part.rename(directory)
    return json.loads((directory / "warm_up.json").read_text(encoding="utf-8"))


def warm_up(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[int, int]], steps: int | None = None) -> dict[str, float]:
    """Supervised training on right answers to ``pairs``; steps, seconds and the last loss."""
    started = time.perf_counter()
    steps = WARM_UP_STEPS if steps is None else steps
    bare = _examples(tokenizer, [(question(a, b), f"{a + b}") for a, b in pairs], model.device)
    working = _examples(tokenizer, [(question(a, b), f"{a} + {b} = {a + b}") for a, b in pairs], model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1 - step / steps))
    order = torch.randperm(len(pairs))
    loss = torch.zeros(())
    for step in tqdm(range(steps), desc="warm-up", mininterval=0.1 if sys.stderr.isatty() else 10.0):
        while len(order) < WARM_UP_BATCH:
            order = torch.cat([order, torch.randperm(len(pairs))])
        batch, order = order[:WARM_UP_BATCH].to(model.device), order[WARM_UP_BATCH:]
        first, last = WITH_WORKING
        cut = round(WARM_UP_BATCH * (first + (last - first) * step / steps))
        parts = [tuple(x[rows] for x in examples) for examples, rows in ((working, batch[:cut]), (bare, batch[cut:]))]
        tokens = sum(mask.sum() for _, _, mask in parts)
        loss = torch.zeros((), device=model.device)
        for ids, attention_mask, mask in parts:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=attention_mask, position_ids=positions).logits
            loss = loss - rk.token_logprobs(logits[:, :-1], ids[:, 1:], mask=mask[:, 1:]).sum() / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {"steps": steps, "seconds": time.perf_counter() - started, "loss": loss.item()}


def _examples(tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, str]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, mask of the answers) of questions with their answers: the answers start at one column and end with the end token."""
    asked = [tokenizer(text)["input_ids"] for text, _ in texts]
    told = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for _, text in texts]
    left, right, pad = max(map(len, asked)), max(map(len, told)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (left - len(q)) + q + a + [pad] * (right - len(a)) for q, a in zip(asked, told, strict=True)], device=device)
    attention_mask = (ids != pad).long()
    mask = attention_mask.clone()
    mask[:, :left] = 0
    return ids, attention_mask, mask
