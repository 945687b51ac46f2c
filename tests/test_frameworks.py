"""Every row of docs/frameworks.md: the library's option and our configuration, both as the page writes them, give the same loss and gradients.

The library's side are the integrations, whose numbers test_trl.py, test_verl.py and test_openrlhf.py compare with the libraries' own.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rlkern as rk
from rlkern.integrations import openrlhf, trl, verl

from .judge import assert_accurate

PAGE = (Path(__file__).parents[1] / "docs" / "frameworks.md").read_text()
ROWS, TIME = 4, 6


def table(heading):
    """The rows of the table whose first column has this heading: the code in the cells."""
    lines = PAGE[PAGE.index(f"| {heading} | rlkern |") :].split("\n\n")[0].splitlines()[2:]
    rows = [re.fullmatch(r"\| `(.+?)` \| `(.+?)` (?:\| `(\w+)` )?\|", line) for line in lines]
    assert all(rows), "a row of another form"
    return pytest.mark.parametrize("row", [row.groups() for row in rows], ids=lambda row: row[0])


@pytest.fixture
def batch():
    mask = (torch.arange(TIME) < torch.tensor([6, 3, 0, 5])[:, None]).float()
    tensors = {name: -2 * torch.rand(ROWS, TIME) for name in ("old", "ref", "sampling")}
    values = {name: torch.randn(ROWS, TIME) for name in ("r", "v", "v_old", "returns")}
    return {"mask": mask, "lp": -2 * torch.rand(ROWS, TIME), "entropy": torch.rand(ROWS, TIME), "A": torch.randn(ROWS), **tensors, **values}


def normalizers(batch):
    return {"sequences": ROWS, "tokens": 31.0, "None": None}


def loss_and_gradients(config, batch, normalizer):
    lp, entropy = (batch[name].clone().requires_grad_() for name in ("lp", "entropy"))
    options = {"mask": batch["mask"], "ref_logprobs": batch["ref"], "entropy": entropy, "sampling_logprobs": batch["sampling"]}
    out = rk.policy_loss(lp, batch["old"], batch["A"], normalizer=normalizer, config=config, **options)
    gradients = torch.autograd.grad(out.loss, (lp, entropy), allow_unused=True)
    return out.loss, *(torch.zeros(ROWS, TIME) if g is None else g for g in gradients)


def assert_same(theirs, config, batch, normalizer=None):
    assert isinstance(config, rk.PolicyLossConfig)
    for mine, expected in zip(loss_and_gradients(config, batch, normalizer), loss_and_gradients(theirs, batch, normalizer), strict=True):
        assert_accurate(mine, expected, eps=1e-6)


@table("TRL")
def test_trl(row, batch, tmp_path):
    library = pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")
    options, ours, normalizer = row
    args = library.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **eval(f"dict({options})"))
    expected = {"grpo": "sequences", "sapo": "sequences", "dr_grpo": "sequences", "luspo": "sequences", "bnpo": "None"}.get(args.loss_type, "tokens")
    assert normalizer == expected  # as test_trl.py has it
    assert_same(trl.policy_loss_config(args), eval(ours), batch, normalizers(batch)[normalizer])


@table("verl")
def test_verl(row, batch):
    options, ours, normalizer = row
    options = eval(f"dict({options})")
    mode, agg = options.pop("loss_mode"), options.pop("loss_agg_mode", "token-mean")
    info = {"loss_scale_factor": options.pop("loss_scale_factor", None)}
    settings = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0, "tau_pos": 1.0, "tau_neg": 1.05}
    policy_loss = SimpleNamespace(dro_beta=options.pop("dro_beta", None))
    assert options.keys() <= settings.keys()
    config = SimpleNamespace(**settings | options, policy_loss=policy_loss, global_batch_info=info)
    config.get = lambda name, default: getattr(config, name, default)
    if mode == "dro":
        batch["ref"] = batch["old"]
    assert (normalizer == "sequences") == (mode == "geo_mean")
    assert (normalizer == "None") == (agg != "token-mean" or mode == "sapo")
    assert_same(verl.policy_loss_config(mode, config, agg), eval(ours), batch, normalizers(batch)[normalizer])
    # The registered function, with the batch's own count
    info.update(batch_num_tokens=31.0 if normalizer == "tokens" else None)
    lp = batch["lp"].clone().requires_grad_()
    loss, _ = verl.policy_loss_fn(mode)(batch["old"], lp, batch["A"][:, None].expand(ROWS, TIME), batch["mask"], agg, config)
    expected = loss_and_gradients(eval(ours), batch, normalizers(batch)[normalizer])
    assert_accurate(loss, expected[0], eps=1e-6)
    assert_accurate(torch.autograd.grad(loss, lp)[0], expected[1], eps=1e-6)


@table("OpenRLHF")
def test_openrlhf(row, batch):
    options, ours, normalizer = row
    module = openrlhf.PolicyLoss(**eval(f"dict({options})"))
    assert (normalizer == "tokens") == module.token_level_loss
    assert_same(module.config, eval(ours), batch, normalizers(batch)[normalizer])


@table("theirs")
def test_functions(row, batch):
    theirs, ours, _ = row
    results = []
    for code in (theirs, ours):
        names = {name: x.clone().requires_grad_() if name in ("lp", "v") else x for name, x in batch.items()}
        result = eval(code, {"rk": rk, "verl": verl, "openrlhf": openrlhf, **names})
        parts = list(result) if isinstance(result, tuple) else [result]
        leaves = [x for x in names.values() if x.requires_grad]
        if parts[0].requires_grad:
            parts += [x for x in torch.autograd.grad(parts[0].sum(), leaves, allow_unused=True) if x is not None]
        results.append(parts)
    for mine, expected in zip(results[1], results[0], strict=True):
        assert_accurate(mine, expected, eps=1e-6)
