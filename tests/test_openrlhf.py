"""OpenRLHF's losses and functions with rlkern behind them give the numbers of its own, as tests/data/make_openrlhf_numbers.py recorded them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rlkern.integrations import openrlhf as ours

from .judge import assert_accurate
from .pages import before_and_after


def load():
    with safe_open(Path(__file__).parent / "data" / "openrlhf.safetensors", "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["cases"])  # noqa: SIM118


NUMBERS, CASES = load()
INPUTS = {name.removeprefix("inputs/"): x for name, x in NUMBERS.items() if name.startswith("inputs/")}
MASK = INPUTS["mask"]


def cases(kind):
    return pytest.mark.parametrize("case", [case for case in CASES if case["kind"] == kind], ids=lambda case: case["name"])


def check(case, function, name):
    """The result of ``function`` of the input of this name, and its gradient."""
    leaf = INPUTS[name].clone().requires_grad_()
    result = function(leaf)
    (result if result.dim() == 0 else (result * INPUTS["upstream"]).sum()).backward()
    for part, x in (("result", result), (f"d {name}", leaf.grad)):
        expected = NUMBERS[f"{case['name']}/{part}"]
        assert_accurate(x, expected, eps=1e-5 * max(1.0, float(expected.abs().max())))


@cases("policy")
def test_policy_loss(case):
    metrics = []

    def loss(log_probs):
        rest = (INPUTS["old_log_probs"], INPUTS["advantages"], MASK, INPUTS["rollout_log_probs"])
        value, *found = ours.PolicyLoss(**case["options"])(log_probs, *rest, **case["info"])
        metrics.extend(None if x is None else float(x) for x in found)
        return value

    check(case, loss, "log_probs")
    assert metrics == [None if x is None else pytest.approx(x, abs=1e-5) for x in case["metrics"]]


@cases("value")
def test_value_loss(case):
    module = ours.ValueLoss(case["clip"], case["by_token"])
    check(case, lambda values: module(values, INPUTS["old_values"], INPUTS["returns"], MASK, **case["info"]), "values")


@cases("aggregate")
def test_aggregate_loss(case):
    check(case, lambda values: ours.aggregate_loss(values, MASK, case["by_token"], **case["info"]), "values")


@cases("kl")
def test_approx_kl(case):
    old = INPUTS["old_log_probs"] if case["old"] else None
    check(case, lambda log_probs: ours.compute_approx_kl(log_probs, INPUTS["base_log_probs"], old, **case["options"]), "log_probs")


@cases("gae")
def test_advantages(case):
    gamma, lambd = case["gamma"], case["lambd"]
    results = ours.get_advantages_and_returns(INPUTS["values"], INPUTS["rewards"], MASK, gamma, lambd)
    results = (*results, ours.get_cumulative_returns(INPUTS["rewards"], MASK, gamma))
    for name, x in zip(("advantages", "returns", "cumulative"), results, strict=True):
        assert_accurate(x, NUMBERS[f"{case['name']}/{name}"], eps=1e-5)


@cases("logprobs")
def test_logprobs(case):
    check(case, lambda logits: ours.log_probs_from_logits(logits, INPUTS["labels"], case["temperature"]), "logits")


def test_the_program_of_the_page():
    """The program in docs/integrations.md, whose numbers before are those recorded."""
    _, after = before_and_after("docs/integrations.md", "import PolicyLoss")
    names = {name: INPUTS[name] for name in ("log_probs", "old_log_probs", "advantages")} | {"action_mask": MASK}
    exec(after, names)
    assert_accurate(names["loss"], NUMBERS["policy ppo tokens/result"], eps=1e-5)
    metrics = next(case["metrics"] for case in CASES if case["name"] == "policy ppo tokens")
    assert [float(names["clip_fraction"]), float(names["policy_kl"])] == pytest.approx(metrics[:2], abs=1e-5)
    assert [names["engine_kl"], names["filtered"]] == metrics[2:] == [None, None]


def test_without_a_mask():
    whole = torch.ones_like(MASK)
    rest = (INPUTS["old_log_probs"], INPUTS["advantages"])
    for options in ({}, {"policy_loss_type": "gspo"}, {"token_level_loss": False}):
        without, masked = (ours.PolicyLoss(**options)(INPUTS["log_probs"], *rest, mask) for mask in (None, whole))
        assert torch.equal(without[0], masked[0])
    assert torch.equal(ours.aggregate_loss(INPUTS["values"], None), ours.aggregate_loss(INPUTS["values"], whole))


def test_masked_positions_are_not_read():
    """OpenRLHF multiplies by the mask, so that NaN in the padding is NaN in its loss."""
    bad = {name: torch.where(MASK != 0, x, torch.nan) for name, x in INPUTS.items() if x.shape == MASK.shape}
    arguments = ("log_probs", "old_log_probs", "advantages", "mask", "rollout_log_probs")
    for options in ({}, {"is_correction_level": "token"}, {"is_correction_level": "seq"}, {"policy_loss_type": "gspo"}):
        good, poisoned = (ours.PolicyLoss(**options)(*(x[name] for name in arguments)) for x in (INPUTS, bad | {"mask": MASK}))
        assert [None if x is None else float(x) for x in good] == [None if x is None else float(x) for x in poisoned]


def test_an_empty_sequence():
    """It counts for nothing in the loss, and is one of the sequences that the filter drops."""
    mask = MASK.clone()
    mask[3] = 0
    arguments = (INPUTS["log_probs"], INPUTS["old_log_probs"], INPUTS["advantages"])
    rows = torch.tensor([0, 1, 2, 4])
    module = ours.PolicyLoss(token_level_loss=False, is_correction_level="seq", is_correction_threshold=(0.8, 1.2))
    loss, *_, filtered = module(*arguments, mask, INPUTS["rollout_log_probs"])
    fewer, *_, of_fewer = module(*(x[rows] for x in (*arguments, mask, INPUTS["rollout_log_probs"])))
    assert_accurate(loss, fewer, eps=1e-6)
    assert float(filtered) == pytest.approx((4 * float(of_fewer) + 1) / 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_loss_type": "cispo"}, "policy_loss_type must be one of 'ppo', 'gspo'; got 'cispo'"),
        ({"is_correction_level": "word"}, "is_correction_level must be one of"),
        ({"is_correction_mode": "drop"}, "is_correction_mode must be one of"),
        ({"is_correction_gating": "kl"}, "is_correction_gating must be one of"),
        ({"is_correction_mode": "clip", "is_correction_level": "seq"}, "is_correction_mode='clip' goes with"),
        ({"is_correction_level": "token", "is_correction_gating": "tv"}, "has an upper bound only"),
        ({"dual_clip": 0.5}, "dual_clip"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ours.PolicyLoss(**options)


def test_bad_arguments():
    with pytest.raises(ValueError, match="needs rollout_log_probs"):
        ours.PolicyLoss(is_correction_level="token")(INPUTS["log_probs"], INPUTS["old_log_probs"], INPUTS["advantages"], MASK)
    with pytest.raises(ValueError, match="kl_estimator must be"):
        ours.compute_approx_kl(INPUTS["log_probs"], INPUTS["base_log_probs"], kl_estimator="k4")
