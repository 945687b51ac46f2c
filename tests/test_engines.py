"""What samples: every engine's completions and log-probs, and the importance weights that correct for an engine which is not quite the policy."""

import json
import math
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

import rlkern as rk
from rlkern.trainers import grpo, ppo
from rlkern.trainers.arguments import parse
from rlkern.trainers.engines import Sampling
from rlkern.trainers.errors import InputError
from rlkern.trainers.grpo import GRPO, GRPOArguments
from rlkern.trainers.policy import PolicyRun
from rlkern.trainers.ppo import PPO, PPOArguments
from rlkern.trainers.rollout import Completions
from rlkern.trainers.runs import Checkpoints, read_metrics, seed_all

from .runs import Killed, assert_same_run, die_at, fresh_accelerate, sampling_settings, save_files  # noqa: F401

REWARDS = """
def sevens(completions, **fields):
    return [completion.count("7") / 4 + len(completion) / 20 for completion in completions]
"""
TRAINERS: dict[str, Any] = {"grpo": (GRPO, GRPOArguments, grpo.train), "ppo": (PPO, PPOArguments, ppo.train)}
OWN = Path(__file__).with_name("own_engines.py")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"), REWARDS)


def arguments(files: Path, output: Path, kind: str = "grpo", **changes) -> Any:
    return TRAINERS[kind][1](**{**sampling_settings(files, output), "eval_reward": [], **changes})


def start(files: Path, output: Path, kind: str = "grpo", **changes) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    return TRAINERS[kind][0](arguments(files, output, kind, **changes))


def rollout(run: PolicyRun, copies: int = 8) -> Completions:
    seed_all("test")
    with run.sampling():
        return run.sample(run.rows * copies)[0]


# ---- Completions and their log-probs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("size", [None, 5])
def test_generate_gives_the_tokens_that_the_model_generates(files, tmp_path, wanted, size):
    """Log-probs or not, tokens are those of a plain ``generate`` with the same seed, batch by batch."""
    changes = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "rollout_batch_size": size, "max_new_tokens": 20, "track_mismatch": wanted}
    run = start(files, tmp_path / "run", **changes)
    batch = rollout(run)
    assert (batch.logprobs is not None) == wanted
    seed_all("test")
    prompt = batch.attention_mask.shape[1] - batch.mask.shape[1]
    run.model.eval()
    row = 0
    for part in torch.arange(len(batch.ids)).split(size or len(batch.ids)):
        ids, mask = batch.ids[part, :prompt], batch.attention_mask[part, :prompt]
        for tokens in run.model.generate(input_ids=ids, attention_mask=mask, generation_config=run.model.generation_config)[:, prompt:]:
            new = batch.ids[row, prompt:][batch.mask[row].bool()]
            torch.testing.assert_close(new, tokens[: len(new)], rtol=0, atol=0)
            row += 1
    assert row == len(batch.ids)


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("engine", ["generate", "continuous"])
def test_kept_logprobs_are_those_of_training(files, tmp_path, engine, size):
    """At another temperature than 1, with padding, for completions that ended and for others; ``generate`` with top-k and top-p too."""
    cut = {"top_k": 9, "top_p": 0.9} if engine == "generate" else {}
    run = start(
        files,
        tmp_path / "run",
        engine=engine,
        temperature=0.7,
        rollout_batch_size=size,
        max_new_tokens=24,
        track_mismatch=True,
        micro_batch_size=7,
        **cut,
    )
    batch = rollout(run)
    assert batch.logprobs is not None
    assert batch.logprobs.dtype == torch.float32
    assert len({tuple(row) for row in batch.ids.tolist()}) > 20
    ended = run.sample.ended(batch)
    assert ended.any()
    assert not ended.all()
    expected = run.frozen_logprobs(run.policy, batch)
    mask = batch.mask.bool()
    torch.testing.assert_close(batch.logprobs[mask], expected[mask], atol=1e-5, rtol=0)
    assert not batch.logprobs[~mask].any()
    weights, numbers = run.mismatch(batch, expected)
    assert weights is None  # tracked, not corrected
    assert abs(numbers["mismatch_kl"]) < 1e-6
    assert numbers["mismatch_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert numbers["mismatch_outside"] == 0


def test_continuous_batching_samples_from_the_policy_as_it_is_now(files, tmp_path):
    run = start(files, tmp_path / "run", engine="continuous", max_new_tokens=8)
    with torch.no_grad():
        run.model.get_output_embeddings().weight.zero_()
        run.model.get_input_embeddings().weight.zero_()
        run.model.get_output_embeddings().bias = torch.nn.Parameter(torch.full((run.model.config.vocab_size,), -50.0))
        run.model.get_output_embeddings().bias[7] = 50.0
    batch = rollout(run)
    assert (batch.ids[:, -8:] == 7).all()
    assert run.model.training


def test_continuous_batching_repeats_and_resumes_to_the_last_bit(files, tmp_path, monkeypatch):
    changes = {"engine": "continuous", "rollout_correction": "truncate", "steps": 2, "rollout_batch_size": 5, "save_every": 1, "eval_fraction": 0.0}
    for name in ("one", "two"):
        AcceleratorState._reset_state(reset_partial_state=True)
        grpo.train(arguments(files, tmp_path / name, **changes))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch:
        die_at(patch, Checkpoints, "save", 2)
        with pytest.raises(Killed):
            grpo.train(arguments(files, tmp_path / "part", **changes))
    AcceleratorState._reset_state(reset_partial_state=True)
    grpo.train(arguments(files, tmp_path / "part", resume=True, **changes))
    assert_same_run(tmp_path / "one", tmp_path / "part")


def test_a_failure_of_continuous_batching_is_an_error(files, tmp_path, monkeypatch):
    run = start(files, tmp_path / "run", engine="continuous")
    monkeypatch.setattr(run.model, "forward", lambda **kwargs: 1 / 0)
    with pytest.raises(RuntimeError, match="continuous batching failed"):
        rollout(run)


# ---- An engine of one's own -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [f"{OWN}:Spelling", "tests.own_engines:Spelling"])
def test_an_engine_of_ones_own_gets_the_weights_and_its_completions_are_learned_from(files, tmp_path, spec):
    run = start(files, tmp_path / "run", engine=spec, epochs=1, minibatches=1)
    engine = run.sample.engine
    longest, tokenizer = engine.sampling.max_length, run.sample.tokenizer
    assert engine.sampling == Sampling(1.0, 0, 1.0, 6, longest, run.sample.ends, run.sample.pad, False, run.device, tokenizer=tokenizer)
    assert engine.sampling.max_length == 6 + max(len(run.sample.tokens(row)) for row in (*run.rows, *run.held_out))
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    numbers = run.step(0)
    assert numbers["completion_tokens"] == 2
    assert "mismatch_kl" not in numbers
    run.step(1)
    assert run.evaluate("held out")["held_out_reward"] > 0
    assert len(engine.weights) == 3  # two rollouts and an evaluation
    assert all(engine.weights[0][name].equal(weight) for name, weight in before.items())
    assert all(engine.weights[2][name].equal(weight) for name, weight in run.model.named_parameters())
    assert not all(engine.weights[2][name].equal(weight) for name, weight in before.items())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("TooFew", "gave 47 completions for 48 prompts"),
        ("TooLong", r"\[5, 5, 5, 5, 5, 5, 5\]; expected 6 tokens, or up to the first of"),
        ("CutShort", r"\[5, 5, 5\]; expected 6 tokens"),
        ("PastTheEnd", "expected 6 tokens"),
        ("Empty", r"completion \[\]; expected 6 tokens"),
        ("NoLogprobs", "log-probs None for the tokens"),
        ("TooFewLogprobs", "expected a finite one for each"),
        ("NotFinite", "nan.* expected a finite one for each"),
    ],
)
def test_an_engine_that_does_not_keep_to_the_protocol(files, tmp_path, spec, message):
    run = start(files, tmp_path / "run", engine=f"tests.own_engines:{spec}", track_mismatch=True, eval_fraction=0.0)
    with pytest.raises(InputError, match=message) as error:
        rollout(run)
    assert error.value.field == "engine"


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        (
            {"engine": "generator"},
            "engine",
            "'generator': expected generate, continuous, vllm, the URL of a vLLM server, module:Class or file.py:Class",
        ),
        ({"engine": "no_such_module:Engine"}, "engine", "cannot import no_such_module"),
        ({"engine": "tests.own_engines:Spellling"}, "engine", "has no class 'Spellling'; did you mean 'Spelling'"),
        ({"engine": "tests.own_engines:NoEngine"}, "engine", "needs the methods load_weights and sample"),
        ({"engine": "vllm"}, "engine", "vllm cannot be imported"),
        ({"engine": "http://127.0.0.1:9"}, "engine", "http://127.0.0.1:9: "),
        ({"engine": "continuous", "track_mismatch": True, "top_k": 5}, "top_k", "continuous batching gives log-probs after top_k and top_p"),
        ({"engine": "continuous", "rollout_correction": "mask", "top_p": 0.9}, "top_p", "leave these at 0 and 1"),
        ({"engine_memory": 0.0}, "engine_memory", "above 0 and at most 1"),
        ({"correction_low": -1.0}, "correction_low", "at least 0"),
        ({"correction_high": math.inf}, "correction_high", "at least 0"),
        ({"correction_low": 2.0, "correction_high": 1.5}, "correction_low", "at most correction_high, 1.5, got 2.0"),
        ({"correction_high": 2.0}, "rollout_correction", "must be truncate or mask"),
        ({"loss": "vespo", "rollout_correction": "mask"}, "correction_level", "one masked token would drop all of it"),
    ],
)
def test_settings_that_cannot_be_used(files, tmp_path, changes, name, message):
    with pytest.raises(InputError, match=message) as error:
        start(files, tmp_path / "run", **changes)
    assert error.value.field == name
    assert not (tmp_path / "run").exists()


def test_an_engine_from_a_file_may_be_a_dataclass(files, tmp_path):
    """Dataclasses look their module up, by name."""
    lines = ["from __future__ import annotations", "import dataclasses", "from rlkern.trainers.engines import Sample"]
    lines += ["@dataclasses.dataclass", "class Mine:", "    model: object", "    sampling: object"]
    lines += ["    def load_weights(self, weights): pass", "    def sample(self, prompts): return [Sample([self.sampling.ends[0]]) for _ in prompts]"]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    run = start(files, tmp_path / "run", engine=f"{tmp_path}/mine.py:Mine")
    assert rollout(run, copies=1).mask.tolist() == [[1]] * len(run.rows)


@pytest.mark.parametrize("setting", ["rollout_correction", "correction_level"])
def test_choices_are_checked_on_the_command_line(setting):
    with pytest.raises(InputError, match=f"--{setting.replace('_', '-')}: expected one of .*got 'tis'"):
        grpo.main([f"--{setting.replace('_', '-')}", "tis"])


@pytest.mark.parametrize("line", ["correction_high: none", "correction_high: null"])
def test_a_number_that_may_be_none(tmp_path, line):
    (tmp_path / "settings.yaml").write_text(line)
    for words in (["--correction-high", "none"], ["--config", str(tmp_path / "settings.yaml")]):
        assert parse(GRPOArguments, words, prog="rlkern grpo", description="")[0] == {"correction_high": None}
    with pytest.raises(InputError, match="expected a number, got 'none'"):
        parse(GRPOArguments, ["--temperature", "none"], prog="rlkern grpo", description="")


# ---- Importance weights ---------------------------------------------------------------------------------------------------------------------


def by_hand(old: list[list[float]], sampled: list[list[float]], args: Any) -> tuple[list[list[float]], dict[str, float]]:
    """Weights and metrics of math.md, section 6, a float at a time."""
    low, high = args.correction_low or 0.0, math.inf if args.correction_high is None else args.correction_high
    weights, kl, outside, largest, tokens = [], 0.0, 0, 0.0, 0
    for row, other in zip(old, sampled, strict=True):
        d = [a - b for a, b in zip(row, other, strict=True)]
        ratios = [math.exp(x) for x in d] if args.correction_level == "token" else [math.exp(sum(d))] * len(d)
        inside = [low <= r <= high for r in ratios]
        limited = [min(max(r, low), high) for r in ratios]
        weights.append(limited if args.rollout_correction != "mask" else [r * i for r, i in zip(ratios, inside, strict=True)])
        kl += sum(math.exp(x) - 1 - x for x in d)
        outside += inside.count(False)
        largest = max(largest, *ratios)
        tokens += len(d)
    return weights, {"mismatch_kl": kl / tokens, "mismatch_outside": outside / tokens, "mismatch_ratio_max": largest}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["none", "truncate", "mask"])
@pytest.mark.parametrize(("low", "high"), [(False, True), (True, True), (True, False)])
def test_weights_and_metrics_are_the_formulas(files, tmp_path, level, correction, low, high):
    width = {"token": 1.03, "sequence": 1.2}[level]
    run = start(
        files,
        tmp_path / "run",
        engine="tests.own_engines:Hotter",
        rollout_correction=correction,
        correction_level=level,
        correction_low=1 / width if low else None,
        correction_high=width if high else None,
        track_mismatch=True,
        max_new_tokens=12,
        temperature=0.5,
    )
    batch = rollout(run)
    assert batch.logprobs is not None
    old = run.frozen_logprobs(run.policy, batch)
    mask = batch.mask.bool()
    weights, numbers = run.mismatch(batch, old)
    lists = [[x[row][mask[row]].double().tolist() for row in range(len(mask))] for x in (old, batch.logprobs)]
    expected, expected_numbers = by_hand(lists[0], lists[1], run.args)
    assert numbers == pytest.approx(expected_numbers, rel=1e-4, abs=1e-6)
    assert 0.05 < numbers["mismatch_outside"] < 0.95
    assert numbers["mismatch_kl"] > 1e-5
    if correction == "none":
        assert weights is None
        return
    if level == "sequence":
        assert weights.tolist() == pytest.approx([each[0] for each in expected], rel=1e-5)
        return
    for row, each in enumerate(expected):
        assert weights[row][mask[row]].tolist() == pytest.approx(each, rel=1e-5)
    assert not weights[~mask].any()


@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_one_weight_a_completion_scales_every_loss(files, tmp_path, loss):
    """Also of those that multiply the weights of a completion's tokens: the same on all, it would count as often as there are tokens."""
    run = start(files, tmp_path / "run", loss=loss, kl_coef=0.0, max_new_tokens=4, rollout_correction="truncate", correction_level="sequence")
    batch = rollout(run)
    old = run.frozen_logprobs(run.policy, batch)
    batch = batch._replace(logprobs=(old - 0.1) * batch.mask)
    weights, _ = run.mismatch(batch, old)
    torch.testing.assert_close(weights, (0.1 * batch.mask.sum(1)).exp())
    options = {"old_logprobs": old, "advantages": torch.ones(len(old)), "config": run.args.loss_config()}
    out = rk.fused_linear_policy_loss(**run.scored(run.policy, batch), **options, importance_weights=weights)
    if loss != "vespo":  # whose weight of a completion is not linear in w
        plain = rk.policy_loss(old, old, options["advantages"][:, None] * weights[:, None].expand_as(old), mask=batch.mask, config=options["config"])
        assert out.loss.item() == pytest.approx(plain.loss.item(), rel=1e-4, abs=1e-6)
    else:
        lp = old.clone().requires_grad_()
        summed = rk.policy_loss(lp, old, options["advantages"], mask=batch.mask, importance_weights=weights[:, None], config=options["config"]).loss
        assert out.loss.item() == pytest.approx(summed.item(), rel=1e-4)
        assert torch.autograd.grad(summed, lp)[0].abs().max() > 1e-3


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_weights_reach_the_loss(files, tmp_path, kind, monkeypatch):
    """Each token's weight with its own completion; ratios stay those of training."""
    run = start(
        files, tmp_path / "run", kind, engine="tests.own_engines:Hotter", rollout_correction="truncate", correction_high=1.01, micro_batch_size=3
    )
    made, seen = [], []
    mismatch, loss = run.mismatch, rk.fused_linear_policy_loss
    monkeypatch.setattr(run, "mismatch", lambda batch, old: made.append((batch, old, *mismatch(batch, old))) or made[-1][2:])
    monkeypatch.setattr(rk, "fused_linear_policy_loss", lambda **kwargs: seen.append(kwargs) or loss(**kwargs))
    numbers = run.step(0)
    ((batch, old, weights, _),) = made
    tokens = batch.ids[:, -batch.mask.shape[1] :]
    rows = [torch.cat(row).tolist() for row in zip(tokens, old, weights, strict=True)]
    used = [torch.cat(row).tolist() for call in seen for row in zip(call["ids"], call["old_logprobs"], call["importance_weights"], strict=True)]
    assert sorted(used) == sorted(rows * run.args.epochs)
    assert len({tuple(row) for row in weights.tolist()}) > 5
    assert numbers["mismatch_ratio_max"] > 1.01
    assert 0 < numbers["mismatch_outside"] < 1


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("kind", TRAINERS)
def test_where_every_token_is_masked_nothing_is_learned(files, tmp_path, kind, updates):
    masked = {"rollout_correction": "mask", "correction_high": 0.0, "epochs": updates, "kl_coef": 0.0}
    run = start(files, tmp_path / "run", kind, **masked)
    before = [weight.clone() for weight in run.model.parameters()]
    numbers = run.step(0)
    assert numbers["loss"] == numbers["grad_norm"] == 0
    assert numbers["mismatch_outside"] == 1
    assert all(weight.equal(other) for weight, other in zip(run.model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_engine_that_is_the_policy_needs_no_correction(files, tmp_path, kind):
    """Nearly the numbers of a run without, which has no word of it in its log."""
    logs = {}
    for correction in ("none", "truncate"):
        AcceleratorState._reset_state(reset_partial_state=True)
        TRAINERS[kind][2](arguments(files, tmp_path / correction, kind, rollout_correction=correction, epochs=1, minibatches=1, steps=3))
        logs[correction] = read_metrics(tmp_path / correction / "metrics.jsonl")
    assert "mismatch" not in json.dumps(logs["none"])
    for plain, corrected in zip(logs["none"], logs["truncate"], strict=True):
        extra = set() if plain["step"] == 0 else {"mismatch_kl", "mismatch_outside", "mismatch_ratio_max"}
        if kind == "grpo" and plain["step"] == 1:  # whose one update needs no earlier log-probs otherwise
            extra.add("first_ratio_deviation")
        assert corrected.keys() - plain.keys() == extra
        assert {name: corrected[name] for name in plain} == pytest.approx(plain, rel=1e-3, abs=1e-4)


# ---- vLLM: against stand-ins, whose signatures are those of its sources ----------------------------------------------------------------------


@dataclass
class SamplingParams:
    """The fields in use, of ``vllm.SamplingParams``."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True
    stop: list[str] = field(default_factory=list)


@dataclass
class LLM:
    """``vllm.LLM``, with a model of transformers inside."""

    model: str
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    logprobs_mode: str = "raw_logprobs"
    distributed_executor_backend: str | None = None
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    cached: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.network = AutoModelForCausalLM.from_pretrained(self.model, dtype=getattr(torch, self.dtype)).eval()

    def load_weights(self, weights) -> set[str]:
        own = dict(self.network.named_parameters())
        loaded = set()
        for name, weight in weights:
            own[name].data.copy_(weight)
            loaded.add(name)
        return loaded

    def apply_model(self, func) -> list[Any]:
        return [func(self)]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.cached = False
        return True

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None, tokenization_kwargs=None) -> list[Any]:
        assert not self.cached, "stale keys and values"
        self.cached = True
        return [self._request(prompt["prompt_token_ids"], how) for prompt, how in zip(prompts, sampling_params, strict=True)]

    @torch.no_grad()
    def _request(self, prompt: list[int], how: SamplingParams) -> Any:
        assert len(prompt) + how.max_tokens <= self.max_model_len
        assert how.detokenize or not how.stop
        generator = torch.Generator().manual_seed(how.seed)
        tokens, logprobs = [], []
        while len(tokens) < how.max_tokens and (not tokens or tokens[-1] not in how.stop_token_ids):
            logits = self.network(torch.tensor([prompt + tokens])).logits[0, -1]
            processed = logits / max(how.temperature, 1e-5)  # 0: the likeliest token
            if how.top_k > 0:
                processed = processed.where(processed >= processed.topk(how.top_k).values[-1], -torch.inf)
            token = int(processed.softmax(-1).multinomial(1, generator=generator))
            tokens.append(token)
            stated = (logits if self.logprobs_mode == "raw_logprobs" else processed).log_softmax(-1)
            logprobs.append({token: types.SimpleNamespace(logprob=stated[token].item(), rank=1, decoded_token=None)})
        output = types.SimpleNamespace(index=0, text="", token_ids=tokens, logprobs=None if how.logprobs is None else logprobs)
        return types.SimpleNamespace(prompt_token_ids=prompt, outputs=[output], finished=True)


@pytest.fixture
def vllm(monkeypatch) -> None:
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("changes", [{"temperature": 0.7}, {"top_k": 5}, {"top_k": 5, "temperature": 0.7, "track_mismatch": False}])
def test_vllm_samples_from_the_weights_it_is_given(files, tmp_path, changes):
    run = start(files, tmp_path / "run", **{"engine": "vllm", "engine_memory": 0.4, "max_new_tokens": 12, "track_mismatch": True, **changes})
    llm = run.sample.engine.llm
    longest = max(len(run.sample.tokens(row)) for row in (*run.rows, *run.held_out))
    assert (llm.model, llm.dtype, llm.max_model_len, llm.gpu_memory_utilization) == (run.args.model, "float32", longest + 12, 0.4)
    assert llm.hf_overrides == {"head_dtype": "float32"}
    with torch.no_grad():
        for weight in run.model.parameters():
            weight.mul_(1.5)
    batch = rollout(run, copies=4)
    assert rollout(run, copies=4).ids.equal(batch.ids)  # the seeds are those of the step
    if run.args.track_mismatch:
        mask = batch.mask.bool()
        expected = run.frozen_logprobs(run.policy, batch)
        torch.testing.assert_close(batch.logprobs[mask], expected[mask], atol=1e-5, rtol=0)
    else:
        assert batch.logprobs is None


@pytest.mark.usefixtures("vllm")
def test_vllm_with_texts_that_stop_and_another_temperature_in_evaluations(files, tmp_path):
    run = start(files, tmp_path / "run", engine="vllm", max_new_tokens=30, track_mismatch=True, stop=["7"], eval_temperature=0.0)
    batch = rollout(run, copies=4)
    written = [ids[mask.bool()].tolist() for ids, mask in zip(batch.ids[:, -batch.mask.shape[1] :], batch.mask, strict=True)]
    texts = run.sample.tokenizer.batch_decode(written)
    assert any("7" in text for text in texts)
    assert not any("7" in run.sample.tokenizer.decode(tokens[:-1]) for tokens in written)
    assert run.sample.ended(batch).tolist() == ["7" in text or "<end>" in text for text in texts]
    with run.sampling():
        greedy, texts = run.sample(run.rows[:1] * 3, 0.0)
    assert greedy.logprobs is None
    assert len(set(texts)) == 1


@pytest.mark.usefixtures("vllm")
def test_logprobs_that_vllm_cannot_give(files, tmp_path):
    with pytest.raises(InputError, match="vLLM gives log-probs after top_k and top_p") as error:
        start(files, tmp_path / "run", engine="vllm", temperature=0.7, top_k=5, track_mismatch=True)
    assert error.value.field == "top_k"


def completions_of_a_server(prompts: list[list[int]], generation_kwargs: dict[str, Any], logprobs: int | None, **rest) -> dict[str, Any]:
    """What TRL's ``VLLMClient.generate`` gives, by its documentation."""
    tokens = [7, 8, *generation_kwargs["stop_token_ids"][:1]]
    given = None if logprobs is None else [[[-1.0], [-2.0], [-0.5]]] * len(prompts)
    return {"prompt_ids": prompts, "completion_ids": [tokens] * len(prompts), "logprobs": given, "logprob_token_ids": None}


@pytest.fixture
def client(monkeypatch) -> Any:
    """TRL's client of a vLLM server, that accepts only what the real one does."""
    module = pytest.importorskip("trl.generation.vllm_client")
    made = create_autospec(module.VLLMClient)
    client = made.return_value
    client.get_server_info.return_value = {"model_config": {"logprobs_mode": "processed_logprobs"}}
    client.generate.side_effect = completions_of_a_server
    monkeypatch.setattr(module, "VLLMClient", made)
    return client


@pytest.mark.parametrize("tracked", [False, True])
def test_a_vllm_server_gets_the_weights_and_then_the_prompts(files, tmp_path, client, tracked):
    run = start(files, tmp_path / "run", engine="http://localhost:8000", temperature=0.7, track_mismatch=tracked)
    batch = rollout(run, copies=2)
    names = [name for name, *_ in client.method_calls]
    weights = [call.args for call in client.update_named_param.call_args_list]
    sending = ["weight_update", *["update_named_param"] * len(weights), "reset_prefix_cache"]
    assert names == ["get_server_info", "init_communicator", *sending, "generate"]
    assert dict(weights).keys() == dict(run.model.named_parameters()).keys()
    asked = client.generate.call_args.kwargs
    assert asked["prompts"] == [run.sample.tokens(row) for row in run.rows * 2]
    assert (asked["temperature"], asked["max_tokens"], asked["logprobs"]) == (0.7, 6, 0 if tracked else None)
    assert asked["generation_kwargs"] == {"stop_token_ids": run.sample.ends}
    assert batch.mask.sum(1).tolist() == [3] * len(batch.ids)
    assert (batch.logprobs is None) if not tracked else (batch.logprobs[0].tolist() == [-1.0, -2.0, -0.5])


def test_a_vllm_server_is_told_what_stops_and_of_the_temperature_in_evaluations(files, tmp_path, client):
    run = start(files, tmp_path / "run", engine="http://localhost:8000", track_mismatch=True, stop=["no", "yes"], eval_temperature=0.3)
    with run.sampling():
        run.sample(run.rows, 0.3)
    asked = client.generate.call_args.kwargs
    assert asked["generation_kwargs"] == {"stop_token_ids": run.sample.ends, "stop": ["no", "yes"]}
    assert (asked["temperature"], asked["logprobs"]) == (0.3, None)


@pytest.mark.parametrize("error", [OSError("Connection refused"), Exception("Request failed: 500")])
def test_a_vllm_server_that_does_not_answer_is_an_input_error(files, tmp_path, client, error):
    client.get_server_info.side_effect = error
    with pytest.raises(InputError, match=f"http://localhost:8000: {error}") as raised:
        start(files, tmp_path / "run", engine="http://localhost:8000")
    assert raised.value.field == "engine"


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("raw_logprobs", {"temperature": 0.7}, "need vLLM's --logprobs-mode processed_logprobs, not raw_logprobs"),
        ("raw_logits", {}, "not raw_logits"),
        ("processed_logprobs", {"top_p": 0.9}, "after top_k and top_p"),
        ("raw_logprobs", {"top_p": 0.9}, None),
        ("raw_logits", {"temperature": 0.7, "top_k": 5, "track_mismatch": False}, None),
    ],
)
def test_what_a_vllm_server_means_by_log_probs(files, tmp_path, client, mode, changes, message):
    client.get_server_info.return_value = {"model_config": {"logprobs_mode": mode}}
    options = {"engine": "http://localhost:8000", "track_mismatch": True, **changes}
    if message is None:
        rollout(start(files, tmp_path / "run", **options), copies=1)
        return
    with pytest.raises(InputError, match=message):
        start(files, tmp_path / "run", **options)
