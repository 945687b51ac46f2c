"""TRL's trainers with rlkern: the same losses, metrics and gradients for every option, the same training runs; and what is refused."""

import contextlib
import copy
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers

import rlkern as rk

from .judge import assert_accurate, error
from .pages import ROOT, before_and_after
from .ranks import on_ranks

trl = pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")
datasets = pytest.importorskip("datasets")

from trl.trainer import utils as trl_utils  # noqa: E402

from rlkern.integrations import trl as ours  # noqa: E402
from rlkern.trainers import tutorial  # noqa: E402

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 0}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A tokenizer, questions, and a function that makes a model of some family from disk, as TRL's reference model needs."""
    root = tmp_path_factory.mktemp("task")
    tokenizer = tutorial.build_tokenizer()

    def model(family="Llama", dtype=torch.float32, **options):
        path = root / f"{family}{options}".replace(" ", "").replace("'", "").replace(":", "=")
        if not path.exists():
            torch.manual_seed(0)
            vocabulary = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
            config = getattr(transformers, f"{family}Config")(**LLAMA | vocabulary | options)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
            tokenizer.save_pretrained(path)
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

    pairs, _ = tutorial.split(0, largest=6)
    rows = [{"prompt": tutorial.question(a, b), "answer": str(a + b)} for a, b in pairs]
    return tokenizer, datasets.Dataset.from_list(rows), model


def make(task, tmp_path, model, kind="GRPO", peft_config=None, **options):
    tokenizer, rows, _ = task
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        **QUIET,
    }
    args = getattr(trl, f"{kind}Config")(**settings | options)
    return getattr(trl, f"{kind}Trainer")(
        model=model, reward_funcs=digits, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
    )


def digits(prompts, completions, **fields):
    """A reward that an untrained model earns: the share of digits in the text."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def batch(trainer, seed=0):
    """What TRL's loss is given: prompts padded on the left, completions on the right, one of them empty, tool output in another."""
    g = torch.Generator().manual_seed(seed)
    rows, asked, new = 4, 5, 8

    def noise(*shape):
        return torch.randn(shape, generator=g)

    ids = torch.randint(3, 40, (rows, asked + new), generator=g)
    completion_mask = (torch.arange(new) < torch.tensor([8, 5, 0, 3])[:, None]).long()
    prompt_mask = (torch.arange(asked) >= torch.tensor([0, 2, 1, 0])[:, None]).long()
    with torch.no_grad():
        now, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.cat([prompt_mask, completion_mask], 1), new, compute_entropy=True
        )
    inputs = {
        "prompt_ids": ids[:, :asked],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, asked:],
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.0, -0.7, 0.3, -1.2]),
        "num_items_in_batch": completion_mask.sum() * 2,
    }
    if isinstance(trainer, trl.RLOOTrainer):
        return inputs | {"old_logps": ((now + 0.1 * noise(rows, new)) * completion_mask).sum(1)}
    tool_mask = torch.ones(rows, new, dtype=torch.long)
    tool_mask[0, 2:4] = 0
    if trainer.use_vllm:  # 1 where masked, as TRL makes them
        inputs["importance_sampling_ratio"] = (0.2 * noise(rows, new) * completion_mask * tool_mask).exp()
    return inputs | {
        "tool_mask": tool_mask,
        "old_per_token_logps": now + 0.2 * noise(rows, new),
        "ref_per_token_logps": now + 0.2 * noise(rows, new),
        "sampling_per_token_logps": now + 0.2 * noise(rows, new),
    }


def step_loss(trainer, inputs):
    """TRL's loss, as a trainer in mid-training computes it."""
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    return trainer.compute_loss(trainer.model, dict(inputs))


def step(trainer, inputs):
    """(loss, gradients by name, metrics) of TRL's loss."""
    loss = step_loss(trainer, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {name: values[:] for name, values in trainer._metrics["train"].items()}


def assert_same_step(mine, theirs, eps=1e-5):
    assert_accurate(mine[0], theirs[0], eps=eps)
    assert mine[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        assert error(mine[1][name], expected) <= eps, name
    assert mine[2].keys() == theirs[2].keys()
    for name, expected in theirs[2].items():
        assert_accurate(torch.tensor(mine[2][name]), torch.tensor(expected), eps=eps)


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
OPTIONS = {
    "as it comes": {},
    "kl": {"beta": 0.1, "use_bias_correction_kl": False},
    "weighted kl": {"beta": 0.1, "use_bias_correction_kl": True},
    "two-sided": {"delta": 1.25, "epsilon": 0.1, "epsilon_high": 0.15},
    "sequences": {"importance_sampling_level": "sequence", "epsilon": 0.01, "epsilon_high": 0.02},
    "sequences and kl": {"importance_sampling_level": "sequence", "beta": 0.1, "use_bias_correction_kl": False},
    "sequences and weighted kl": {"importance_sampling_level": "sequence", "beta": 0.1, "use_bias_correction_kl": True},
    "off-policy mask": {"off_policy_mask_threshold": 0.05},
    "entropy quantile": {"top_entropy_quantile": 0.4, "entropy_coef": 0.01},
    "entropy bonus": {"entropy_coef": 0.02},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.02, "entropy_target": 10.0},
    "vllm": {"vllm_importance_sampling_mode": "token_truncate"},
    "temperature": {"temperature": 0.7},
    "temperatures and powers": {
        "sapo_temperature_pos": 2.0,
        "sapo_temperature_neg": 3.0,
        "vespo_k_pos": 1.0,
        "vespo_lambda_pos": 2.0,
        "vespo_k_neg": 2.0,
        "vespo_lambda_neg": 1.0,
    },
    "everything": {
        "beta": 0.1,
        "entropy_coef": 0.02,
        "temperature": 1.3,
        "epsilon": 0.1,
        "epsilon_high": 0.3,
        "delta": 1.5,
        "vllm_importance_sampling_mode": "token_truncate",
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
    },
}
FUSED = {
    "as it comes",
    "kl",
    "weighted kl",
    "two-sided",
    "entropy bonus",
    "adaptive entropy",
    "vllm",
    "temperature",
    "temperatures and powers",
    "everything",
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_option(task, tmp_path, loss_type, monkeypatch):
    model, fused = task[2](), []
    monkeypatch.setattr(rk, "fused_linear_policy_loss", lambda *a, f=rk.fused_linear_policy_loss, **k: fused.append(1) or f(*a, **k))
    for name, options in OPTIONS.items():
        trainer = make(task, tmp_path, model, loss_type=loss_type, **options)
        trainer.use_vllm = "vllm_importance_sampling_mode" in options
        inputs = batch(trainer)

        def fresh_step(trainer=trainer, inputs=inputs):
            trainer.entropy_coef, trainer._last_world_entropy = trainer.args.entropy_coef, 1.0  # the adaptive control moves both
            return step(trainer, inputs)

        theirs = fresh_step()
        assert not fused
        with ours.enable(trainer):
            mine = fresh_step()
        assert bool(fused) == (name in FUSED and loss_type != "vespo"), name
        fused.clear()
        assert_same_step(mine, theirs)


@pytest.mark.parametrize("adaptive", [0.5, 10.0], ids=["above the target", "below the target"])
def test_adaptive_entropy_moves_the_same(task, tmp_path, adaptive):
    """Over several steps TRL's controller measures our entropies, and our loss uses its coefficient."""
    runs = []
    for enabled in (False, True):
        trainer = make(task, tmp_path, task[2](), use_adaptive_entropy=True, entropy_coef=0.02, entropy_target=adaptive)
        inputs = batch(trainer)
        with ours.enable(trainer) if enabled else contextlib.nullcontext():
            runs.append([step(trainer, inputs) for _ in range(3)])
    for mine, theirs in zip(runs[1], runs[0], strict=True):
        assert_same_step(mine, theirs)


def test_on_policy_and_per_token_advantages(task, tmp_path):
    """Without old log-probs the ratio is 1 and has a gradient; subclasses may give an advantage a token."""
    trainer = make(task, tmp_path, task[2](), loss_type="dapo", beta=0.1)
    inputs = batch(trainer) | {"advantages": torch.randn(4, 8)}
    del inputs["old_per_token_logps"], inputs["tool_mask"]
    theirs = step(trainer, inputs)
    with ours.enable(trainer):
        assert_same_step(step(trainer, inputs), theirs)


MODELS = {
    "soft-cap": ("Gemma2", {"final_logit_softcapping": 3.0}),
    "logit scale": ("Cohere", {"logit_scale": 0.3}),
    "logits divided": ("Granite", {"logits_scaling": 3.0}),
    "tied": ("Qwen3", {"tie_word_embeddings": True}),
    "head with a bias": ("Phi", {}),
    "experts": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.1}),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_models(task, tmp_path, family, kind):
    name, options = MODELS[family]
    trainer = make(task, tmp_path, task[2](name, **options), kind, beta=0.1, gradient_accumulation_steps=2)
    assert trainer.aux_loss_enabled == (family == "experts")
    inputs = batch(trainer)
    theirs = step(trainer, inputs)
    with ours.enable(trainer):
        assert_same_step(step(trainer, inputs), theirs)


def train(task, tmp_path, enabled, kind="GRPO", model=None, peft_config=None, steps=3, **options):
    """(losses, rewards, final parameters) of a short run."""
    torch.manual_seed(0)
    trainer = make(task, tmp_path, model or task[2](), kind, peft_config, max_steps=steps, **options)
    with ours.enable(trainer) if enabled else contextlib.nullcontext():
        trainer.train()
    losses, rewards = ([entry[name] for entry in trainer.state.log_history if name in entry] for name in ("loss", "reward"))
    return losses, rewards, dict(trainer.model.named_parameters())


RUNS = {
    "twenty steps": {"steps": 20, "beta": 0.04},
    "several iterations": {"num_iterations": 2, "steps_per_generation": 2, "steps": 6},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "head in float32": {"cast_lm_head_to_fp32": True, "model": (torch.bfloat16, 2e-3)},
    "accumulated": {"gradient_accumulation_steps": 2, "loss_type": "grpo", "steps": 4},
    "leave-one-out": {"kind": "RLOO", "steps": 6, "num_iterations": 2},
    "bfloat16 autocast": {"bf16": True, "model": (torch.float32, 2e-3)},
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_the_same(task, tmp_path, name):
    options = dict(RUNS[name])
    dtype, eps = options.pop("model", (torch.float32, 1e-4))
    theirs, mine = (train(task, tmp_path, enabled, model=task[2](dtype=dtype), **options) for enabled in (False, True))
    assert len(mine[0]) == options.get("steps", 3)
    assert len(set(theirs[1])) > 1
    assert any(abs(loss) > 10 * eps for loss in theirs[0]) or "beta" not in options
    assert mine[1] == theirs[1]
    assert_accurate(torch.tensor(mine[0]), torch.tensor(theirs[0]), eps=eps)
    for parameter, expected in theirs[2].items():
        assert_accurate(mine[2][parameter], expected, eps=10 * eps)


@pytest.mark.parametrize("lora", [False, True])
def test_a_deep_copy_scores_with_its_own_weights(task, tmp_path, lora):
    config = pytest.importorskip("peft").LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None
    trainer = make(task, tmp_path, task[2](), peft_config=config)
    ids = torch.tensor([[3, 15, 26, 5]])

    def scored(model):
        with torch.no_grad():
            fused = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True).log_probs
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # an ordinary call
        assert_accurate(rk.token_logprobs(logits[:, :-1], ids[:, 1:]), fused)
        return fused

    with ours.enable(trainer):
        before = scored(trainer.model)
        first = copy.deepcopy(trainer.model)
        second = copy.deepcopy(first)
        assert torch.equal(scored(second), before)
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.zero_()
        uniform = torch.full_like(before, -torch.tensor(float(trainer.model.config.vocab_size)).log())
        assert_accurate(scored(first), uniform)
        assert torch.equal(scored(second), before)
        assert torch.equal(scored(trainer.model), before)
    assert_accurate(scored(first), uniform)  # by TRL's forward, which is the copy's own too


def test_lora_keeps_the_head_frozen(task, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    weights = []
    monkeypatch.setattr(rk, "fused_linear_policy_loss", lambda *a, f=rk.fused_linear_policy_loss, **k: weights.append(k["weight"]) or f(*a, **k))
    runs = []
    for enabled in (False, True):
        torch.manual_seed(1)
        runs.append(train(task, tmp_path, enabled, peft_config=config, beta=0.04, steps=4))
    (losses, rewards, after), (mine, my_rewards, my_after) = runs
    assert weights
    assert not any(weight.requires_grad for weight in weights)
    assert my_rewards == rewards
    assert_accurate(torch.tensor(mine), torch.tensor(losses), eps=1e-4)
    for name, expected in after.items():
        assert_accurate(my_after[name], expected, eps=1e-3)

    trainer = make(task, tmp_path, task[2](), peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt learning"):
        ours.enable(trainer)


def test_disable_gives_everything_back(task, tmp_path):
    trainer = make(task, tmp_path, task[2](), beta=0.1)
    models = (trainer.model, trainer.ref_model)
    before = [trainer._compute_loss, *(model.forward for model in models)]
    with ours.enable(trainer) as enabled:
        assert all(new != old for new, old in zip([trainer._compute_loss, *(m.forward for m in models)], before, strict=True))
        with pytest.raises(ValueError, match="enabled for this trainer already"):
            ours.enable(trainer)
    assert [trainer._compute_loss, *(model.forward for model in models)] == before
    enabled.disable()  # once more is harmless

    enabled = ours.enable(trainer, fuse_loss=False)
    assert trainer._compute_loss == before[0]
    wrapped = trainer.model.forward
    trainer.model.forward = lambda *inputs, **options: wrapped(*inputs, **options)  # as accelerate does in train()
    enabled.disable()
    inputs = batch(trainer)
    theirs = step(trainer, inputs)
    with ours.enable(trainer):
        assert_same_step(step(trainer, inputs), theirs)


def test_refusals(task, tmp_path, monkeypatch):
    trainer = make(task, tmp_path, task[2]())
    for name, value in (("loss_type", "new_loss"), ("importance_sampling_level", "paragraph")):
        with monkeypatch.context() as m:
            m.setattr(trainer.args, name, value)
            with pytest.raises(ValueError, match=f"{name} must be one of .*got '{value}'"):
                ours.enable(trainer)

    with monkeypatch.context() as m:
        m.setattr(trainer.args, "delta", -1.0)
        with pytest.raises(ValueError, match="ratio_cap"):  # before training, not in its first step
            ours.enable(trainer)

    class OwnLoss(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) * 2

    with monkeypatch.context() as m:
        m.setattr(trainer, "__class__", OwnLoss)
        with pytest.raises(TypeError, match=r"OwnLoss overrides _compute_loss.*fuse_loss=False"):
            ours.enable(trainer)
        inputs = batch(trainer)
        theirs = step(trainer, inputs)
        with ours.enable(trainer, fuse_loss=False):
            assert_same_step(step(trainer, inputs), theirs)
    with pytest.raises(TypeError, match="GRPOTrainer or RLOOTrainer, got Linear"):
        ours.enable(torch.nn.Linear(2, 2))
    with monkeypatch.context() as m:
        m.setattr(trl, "__version__", "0.29.0")
        with pytest.raises(ImportError, match=r"found 0\.29\.0: pip install"):
            ours.enable(trainer)
    with monkeypatch.context() as m:
        m.setattr(trainer.model, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
        with pytest.raises(ValueError, match="device_map"):
            ours.enable(trainer)


def test_configuration_without_counterpart(task, tmp_path):
    args = make(task, tmp_path, task[2](), loss_type="vespo", importance_sampling_level="sequence", beta=0.1).args
    with pytest.raises(ValueError, match=r"vespo.*use_bias_correction_kl"):
        ours.policy_loss_config(args)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_configuration_gives_the_numbers(task, tmp_path, loss_type):
    """``policy_loss_config`` on TRL's own log-probs is TRL's loss: what docs/frameworks.md says."""
    model = task[2]()
    for name, options in OPTIONS.items():
        if name in ("adaptive entropy", "entropy quantile"):
            continue
        if loss_type == "vespo" and name.startswith("sequences"):
            options = {**options, "use_bias_correction_kl": False}
        trainer = make(task, tmp_path, model, loss_type=loss_type, **options | {"gradient_accumulation_steps": 1, "steps_per_generation": 1})
        trainer.use_vllm = "vllm_importance_sampling_mode" in options
        inputs, seen = batch(trainer), []
        method = trainer._get_per_token_logps_and_entropies

        def spy(*a, method=method, seen=seen, **k):
            logprobs, entropy, aux = method(*a, **k)
            seen.append((logprobs.detach().requires_grad_(), entropy.detach().requires_grad_()))
            return *seen[-1], aux

        trainer._get_per_token_logps_and_entropies = spy
        loss = step_loss(trainer, inputs)
        (logprobs, entropy), mask = seen[0], inputs["completion_mask"] * inputs["tool_mask"]
        expected = torch.autograd.grad(loss, (logprobs, entropy), allow_unused=True)
        normalizer = {
            "bnpo": mask.sum(),
            "dapo": inputs["num_items_in_batch"],
            "cispo": inputs["num_items_in_batch"],
            "vespo": inputs["num_items_in_batch"],
        }
        out = rk.policy_loss(
            logprobs,
            inputs["old_per_token_logps"],
            inputs["advantages"],
            mask=mask,
            ref_logprobs=inputs["ref_per_token_logps"],
            entropy=entropy,
            importance_weights=inputs.get("importance_sampling_ratio"),
            sampling_logprobs=inputs["sampling_per_token_logps"],
            normalizer=normalizer.get(loss_type, 4),
            config=ours.policy_loss_config(trainer.args),
        )
        assert_accurate(out.loss, loss, eps=1e-5)
        for mine, theirs in zip(torch.autograd.grad(out.loss, (logprobs, entropy), allow_unused=True), expected, strict=True):
            if theirs is None:
                assert mine is None or not mine.any()
            else:
                assert_accurate(mine, theirs, eps=1e-5)


def test_functions_of_logits():
    logits, index = torch.randn(3, 7, 50, requires_grad=True), torch.randint(50, (3, 7))
    row_mask = torch.rand(3, 7) > 0.3
    cases = (
        lambda m: m.selective_log_softmax(logits, index),
        lambda m: m.selective_log_softmax(logits, torch.stack([index, index.flip(0)], -1), temperature=0.7),
        lambda m: m.selective_log_softmax(logits, index, temperature=0.7, row_mask=row_mask),
        lambda m: m.entropy_from_logits(logits, chunk_size=4),
        lambda m: torch.stack(m.selective_log_softmax_and_entropy(logits, index, temperature=1.4, row_mask=row_mask)),
        lambda m: torch.stack(m.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)),
    )
    for call in cases:
        mine, theirs = call(ours), call(trl_utils)
        assert_accurate(mine, theirs, eps=1e-5)
        upstream = torch.randn(mine.shape)
        assert_accurate(torch.autograd.grad(mine, logits, upstream)[0], torch.autograd.grad(theirs, logits, upstream)[0], eps=1e-5)


def test_more_exact_in_bfloat16():
    """Against float64 on the same bfloat16 numbers: TRL's functions of logits round to bfloat16 on the way, ours do not."""
    logits, index = (4 * torch.randn(8, 16, 500)).bfloat16(), torch.randint(500, (8, 16))
    for name in ("selective_log_softmax", "entropy_from_logits"):
        inputs = (index,) if name == "selective_log_softmax" else ()
        exact = getattr(trl_utils, name)(logits.double(), *inputs)
        mine, theirs = (error(getattr(m, name)(logits, *inputs), exact) for m in (ours, trl_utils))
        assert mine < 1e-5, name
        assert theirs > 1e-2, name


def _data_parallel(rank, world, how):
    """(gradients of the fused loss of this rank's rows under ``how``, those of the mean of both ranks' losses)."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=44, **LLAMA))
    ids, advantages = torch.randint(3, 44, (world, 3, 10)), torch.randn(world, 3)
    whole = copy.deepcopy(model)
    for m in (model, whole):
        trl_utils.add_fused_lm_head(m, outputs=("log_probs", "entropy"))
        ours.Enabled(SimpleNamespace(model=m, args=SimpleNamespace(temperature=1.0)), fuse_loss=False)
    parallel = model
    if how == "FSDP2":
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
        for part in (*model.model.layers, model.lm_head, model):
            torch.distributed.fsdp.fully_shard(part, mesh=mesh)
    else:
        parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=how == "DDP that finds unused parameters")

    def loss(module, i):
        objective = {"old_logprobs": None, "advantages": advantages[i], "mask": torch.ones(3, 6), "config": rk.PolicyLossConfig.grpo()}
        options = {"attention_mask": torch.ones_like(ids[i]), "labels": ids[i], "fused_lm_head": True}
        return module(input_ids=ids[i], **options, rlkern_objective=objective).loss

    loss(parallel, rank).backward()
    mine = [getattr(p.grad, "full_tensor", p.grad.clone)() for p in model.parameters()]
    return mine, torch.autograd.grad(sum(loss(whole, i) for i in range(world)) / world, list(whole.parameters()))


@pytest.mark.parametrize("how", ["DDP", "DDP that finds unused parameters", "FSDP2"])
def test_data_parallel(how):
    """The hooks of DDP and FSDP2 see a loss that is made inside the model's forward; a head that FSDP2 shards gets the gradient of all ranks."""
    for mine, expected in on_ranks(2, _data_parallel, how):
        for x, y in zip(mine, expected, strict=True):
            assert_accurate(x, y, eps=1e-6)


def test_rloo_configuration(task, tmp_path):
    trainer = make(task, tmp_path, task[2](), "RLOO", epsilon=0.1, epsilon_high=0.3)
    inputs = batch(trainer)
    inputs["completion_mask"][2, :2] = 1  # TRL gives an empty sequence a loss
    loss = step_loss(trainer, inputs)
    mask = inputs["completion_mask"]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    logprobs, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.cat([inputs["prompt_mask"], mask], 1), 8)
    # Behaviour log-probs as TRL keeps them, one sum a sequence: here on its first token
    old = torch.zeros(4, 8).index_copy_(1, torch.tensor([0]), inputs["old_logps"][:, None])
    out = rk.policy_loss(logprobs, old, inputs["advantages"], mask=mask, config=rk.PolicyLossConfig.rloo(clip_low=0.1, clip_high=0.3))
    assert_accurate(out.loss, loss, eps=1e-5)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    for mine, expected in zip(torch.autograd.grad(out.loss, parameters), torch.autograd.grad(loss, parameters), strict=True):
        assert_accurate(mine, expected, eps=1e-5)


def test_the_program_of_the_page(task, tmp_path):
    """The program in docs/integrations.md, as it was and with its two lines more."""
    runs = []
    for program in before_and_after("docs/integrations.md", "from trl import"):
        args = trl.GRPOConfig(str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=8, **QUIET, max_steps=2)
        names = {"model": task[2](), "reward": digits, "args": args, "questions": task[1], "tokenizer": task[0]}
        exec(program, names)
        runs.append((hasattr(names["trainer"], "_rlkern"), [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]))
    (before, losses), (after, mine) = runs
    assert (before, after) == (False, True)
    assert len(mine) == 2
    assert mine == pytest.approx(losses, abs=1e-4)


def test_example(monkeypatch):
    """examples/trl_grpo.py, which measures, in a small size."""
    spec = importlib.util.spec_from_file_location("trl_grpo", ROOT / "examples" / "trl_grpo.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    small = "--steps 2 --vocabulary 500 --width 64 --layers 1 --completions 4 --new 4 --set loss_type=grpo --set epsilon=0.3"
    monkeypatch.setattr(sys, "argv", ["trl_grpo.py", *small.split()])
    theirs, mine = (example.run(example.arguments(), enabled) for enabled in (False, True))
    assert mine["rewards"] == theirs["rewards"]
    assert mine["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
    assert min(theirs["seconds"], mine["seconds"]) > 0
