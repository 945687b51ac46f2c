"""verl's functions with rlkern behind them give the numbers of verl's own, as tests/data/make_verl_numbers.py recorded them."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors import safe_open

import rlkern as rk
from rlkern.integrations import verl as ours

from .judge import assert_accurate
from .pages import before_and_after


def load():
    with safe_open(Path(__file__).parent / "data" / "verl.safetensors", "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["cases"])  # noqa: SIM118


NUMBERS, CASES = load()
INPUTS = {name.removeprefix("inputs/"): x for name, x in NUMBERS.items() if name.startswith("inputs/")}


def cases(kind):
    return pytest.mark.parametrize("case", [case for case in CASES if case["kind"] == kind], ids=lambda case: case["name"])


def actor_config(agg="token-mean", info=None, weights=False, old=None, **settings):
    """What the losses read of verl's ActorConfig, with its defaults."""
    defaults = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0, "tau_pos": 1.0, "tau_neg": 1.05}
    config = SimpleNamespace(**{**defaults, **settings}, policy_loss=SimpleNamespace(dro_beta=0.3), global_batch_info=info or {})
    config.get = lambda name, default: getattr(config, name, default)
    return config


def check(case, function, *names):
    """The result of ``function`` of the inputs of these names, and its gradient in each."""
    leaves = [INPUTS[name].clone().requires_grad_() for name in names]
    result = function(*leaves)
    (result if result.dim() == 0 else (result * INPUTS["upstream"]).sum()).backward()
    for name, x in (("result", result), *((f"d {name}", leaf.grad) for name, leaf in zip(names, leaves, strict=True))):
        expected = NUMBERS[f"{case['name']}/{name}"]
        assert_accurate(x, expected, eps=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("beta", [None, 0.0, -1.0])
def test_dro_without_its_coefficient(beta):
    config = actor_config()
    config.policy_loss.dro_beta = beta
    with pytest.raises(ValueError, match=r"needs policy_loss\.dro_beta, a number > 0; got"):
        ours.policy_loss_fn("dro")(INPUTS["old_log_prob"], INPUTS["old_log_prob"], INPUTS["advantages"], INPUTS["mask"], "token-mean", config, None)


@cases("policy")
def test_policy_losses(case):
    settings, metrics = case["settings"], {}

    def loss(log_prob):
        weights = INPUTS["weights"] if settings.get("weights") else None
        options = (INPUTS["mask"], settings.get("agg", "token-mean"), actor_config(**settings), weights)
        value, found = ours.policy_loss_fn(case["mode"])(INPUTS[settings.get("old", "old_log_prob")], log_prob, INPUTS["advantages"], *options)
        metrics.update(found)
        return value

    check(case, loss, "log_prob")
    assert metrics == pytest.approx(case["metrics"], abs=1e-5)


@cases("policy")
def test_configurations(case):
    """``policy_loss_config`` alone, as docs/frameworks.md has it, and masked positions that hold NaN."""
    settings, mode, mask = case["settings"], case["mode"], INPUTS["mask"]
    if settings.get("weights") or (settings.get("info") and mode != "geo_mean"):
        return
    old, advantages = (torch.where(mask != 0, INPUTS[name], torch.nan) for name in (settings.get("old", "old_log_prob"), "advantages"))

    def loss(log_prob):
        return rk.policy_loss(
            torch.where(mask != 0, log_prob, torch.nan),
            old,
            advantages,
            mask=mask,
            ref_logprobs=old if mode == "dro" else None,
            normalizer=len(mask) if mode == "geo_mean" else None,
            config=ours.policy_loss_config(mode, actor_config(**settings), settings.get("agg", "token-mean")),
        ).loss

    check(case, loss, "log_prob")


@cases("agg")
def test_agg_loss(case):
    check(case, lambda x: ours.agg_loss(x, INPUTS["mask"], case["agg"], **case["info"]), "values")


@cases("value")
def test_value_loss(case):
    def loss(values):
        return ours.compute_value_loss(values, INPUTS["returns"], INPUTS["old_values"], INPUTS["mask"], case["clip"], case["agg"], **case["info"])

    check(case, lambda values: loss(values)[0], "values")
    assert float(loss(INPUTS["values"])[1]) == pytest.approx(case["metrics"]["fraction"], abs=1e-6)


@cases("kl")
def test_kl_penalty(case):
    check(case, lambda log_prob: ours.kl_penalty(log_prob, INPUTS["old_log_prob"], case["penalty"]), "log_prob")


@cases("gae")
def test_gae(case):
    results = ours.compute_gae_advantage_return(INPUTS["rewards"], INPUTS["values"], INPUTS["mask"], case["gamma"], case["lam"])
    for name, x in zip(("advantages", "returns"), results, strict=True):
        assert_accurate(x, NUMBERS[f"{case['name']}/{name}"], eps=1e-5)


@cases("logprobs")
@pytest.mark.parametrize("inplace", [False, True])
def test_logprobs(case, inplace):
    check(case, lambda logits: ours.logprobs_from_logits(logits * 1, INPUTS["labels"], inplace_backward=inplace), "logits")


@cases("entropy")
def test_entropy(case):
    check(case, ours.entropy_from_logits, "logits")


@cases("linear")
def test_linear_cross_entropy(case):
    def part(hidden, weight):
        return ours.linear_cross_entropy(hidden, weight, INPUTS["labels"], case["temperature"])[case["part"]].view_as(INPUTS["upstream"])

    check(case, part, "hidden", "weight")


def test_reductions_of_linear_cross_entropy():
    arguments = (INPUTS["hidden"], INPUTS["weight"], INPUTS["labels"])
    logprobs, entropy = ours.linear_cross_entropy(*arguments)
    assert logprobs.shape == entropy.shape == (35,)
    for reduction in ("sum", "mean"):
        assert torch.equal(ours.linear_cross_entropy(*arguments, reduction=reduction)[0], getattr(logprobs, reduction)())
    with pytest.raises(ValueError, match="reduction must be"):
        ours.linear_cross_entropy(*arguments, reduction="max")
    with pytest.raises(ValueError, match="dist_process_group"):
        ours.linear_cross_entropy(*arguments, dist_process_group=object())


def test_padding_removed():
    """From logits whose padding was removed, the log-probs of the padded batch; what follows a sequence's last token is no token of it."""
    attention_mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    ids, logits = torch.randint(23, (3, 6)), torch.randn(3, 6, 23, requires_grad=True)
    expected = rk.token_logprobs(logits[:, :-1], ids[:, 1:], mask=(attention_mask[:, :-1] * attention_mask[:, 1:]))[:, -3:]
    indices = attention_mask.flatten().nonzero().squeeze(1)
    removed = logits.flatten(0, 1)[indices]
    for logprobs in (
        ours.log_probs_from_logits_response_rmpad(ids, attention_mask, removed, 3),
        ours.log_probs_from_logits_all_rmpad(ids.flatten()[indices][None], removed, indices, 3, 6, 3),
    ):
        assert_accurate(logprobs, expected, eps=1e-6)
        assert_accurate(
            torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)[0], torch.autograd.grad(expected.sum(), logits, retain_graph=True)[0]
        )


@pytest.fixture
def registry(monkeypatch):
    """A stand-in for verl's registry, which is no more than this; the losses themselves are those tested above."""
    functions = {}
    module = ModuleType("verl.trainer.ppo.core_algos")
    module.register_policy_loss = lambda name: lambda function: functions.setdefault(name, function)
    module.get_policy_loss_fn = functions.__getitem__
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return functions


def test_register(registry):
    assert ours.register() == [f"rlkern_{mode}" for mode in ours.MODES] == list(registry)
    assert ours.register(["gspo"], prefix="") == ["gspo"]
    arguments = (INPUTS["old_log_prob"], INPUTS["log_prob"], INPUTS["advantages"], INPUTS["mask"])
    loss, _ = registry["rlkern_gspo"](*arguments, "seq-mean-token-mean", actor_config())
    assert_accurate(loss, NUMBERS["gspo, sequence means/result"], eps=1e-5)
    for mode in ("clip_cov", "kl_cov", "bypass_mode", "new"):
        with pytest.raises(ValueError, match=f"loss mode '{mode}' has no counterpart"):
            ours.register([mode])


def test_the_program_of_the_page(registry):
    """The program in docs/integrations.md, whose numbers before are those recorded."""
    _, after = before_and_after("docs/integrations.md", "from verl")
    names = {name: INPUTS[name] for name in ("old_log_prob", "log_prob", "advantages")}
    names |= {"response_mask": INPUTS["mask"], "config": actor_config()}
    exec(after, names)
    assert_accurate(names["loss"], NUMBERS["vanilla, as it comes/result"], eps=1e-5)
    assert names["metrics"] == pytest.approx(next(case["metrics"] for case in CASES if case["name"] == "vanilla, as it comes"), abs=1e-5)


def test_refusals(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=r"needs verl.*pip install verl"):
        ours.register()
    arguments = (INPUTS["old_log_prob"], INPUTS["log_prob"], INPUTS["advantages"], INPUTS["mask"])
    with pytest.raises(ValueError, match="'dro' with rollout_is_weights"):
        ours.policy_loss_fn("dro")(*arguments, "token-mean", actor_config(), INPUTS["weights"])
    with pytest.raises(ValueError, match="loss_agg_mode must be one of"):
        ours.policy_loss_fn("vanilla")(*arguments, "median", actor_config())
    with pytest.raises(ValueError, match="loss_agg_mode must be one of"):
        ours.agg_loss(INPUTS["values"], INPUTS["mask"], "median")
    with pytest.raises(ValueError, match=r"batch_num_tokens .* needed when dp_size > 1"):
        ours.agg_loss(INPUTS["values"], INPUTS["mask"], "token-mean", dp_size=2)
    with pytest.raises(ValueError, match=r"global_batch_size .* needed when dp_size > 1"):
        ours.policy_loss_fn("gspo")(*arguments, "seq-mean-token-mean", actor_config(info={"dp_size": 2}))
    with pytest.raises(ValueError, match=r"kl_penalty must be one of .*rk\.full_kl"):
        ours.kl_penalty(INPUTS["log_prob"], INPUTS["old_log_prob"], "full")


def test_more_exact_in_bfloat16():
    """Log-probs of bfloat16 logits, against float64 on the same numbers: what rounding them, as the row-wise log-softmax does, costs."""
    logits, labels = (4 * torch.randn(4, 9, 500)).bfloat16(), torch.randint(500, (4, 9))
    exact = logits.double().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    rounded = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    assert_accurate(ours.logprobs_from_logits(logits, labels), exact, eps=1e-5)
    assert (rounded.double() - exact).abs().max() > 1e-2
