"""How operators are registered: a first call is cheap, and what an operator writes to is known to autograd."""

import subprocess
import sys

import pytest
import torch

from rlkern.ops.operators import fake_of, operator

from .judge import opcheck

EAGER = """
import sys, torch, rlkern as rk
hidden, weight, ids, ones = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8), torch.arange(4), torch.ones(4)
rk.fused_linear_policy_loss(hidden, weight, ids, -ones, ones).loss.backward()
rk.token_logprobs(torch.randn(4, 10, requires_grad=True), ids).sum().backward()
rk.gae(ones, ones, gamma=1.0, lam=0.9)
assert "torch._dynamo" not in sys.modules
"""


@operator("scaled_for_tests_", mutates=("x",))
def scaled_(x: torch.Tensor, factor: float) -> None:
    x.detach().numpy()[:] *= factor  # as a kernel does: unseen by autograd


@operator("doubled_for_tests")
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@fake_of(doubled)
def _(x):
    return torch.empty_like(x)


def test_eager_calls_do_not_import_the_compiler():
    subprocess.run([sys.executable, "-c", EAGER], check=True, timeout=120)


def test_what_is_written_to_is_known():
    x = torch.ones(3)
    kept = x * torch.ones(3, requires_grad=True)  # saves x
    scaled_(x, 3.0)
    assert x.tolist() == [3.0] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()
    with torch.inference_mode():
        x = torch.ones(3)
        scaled_(x, 3.0)
        assert x.tolist() == [3.0] * 3


def test_opcheck():
    opcheck(scaled_, torch.ones(3), 2.0)
    opcheck(doubled, torch.ones(3))
