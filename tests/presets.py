"""Every preset of the library, by name: a new one is in all the tests that go over them."""

from __future__ import annotations

from typing import Any

from rlkern import PolicyLossConfig
from rlkern.surrogates import TABLE

NAMES = [name for name, method in vars(PolicyLossConfig).items() if isinstance(method, classmethod)]


def preset(name: str, *, max_length: int, **overrides: Any) -> PolicyLossConfig:
    """With overrides; ``max_length`` for those that need one."""
    config = getattr(PolicyLossConfig, name)(**overrides)
    return getattr(PolicyLossConfig, name)(max_length=max_length, **overrides) if config.aggregation == "seq-mean-token-sum-norm" else config


def surrogates() -> dict[str, PolicyLossConfig]:
    """A configuration for each entry of the table of surrogates, with bounds at which some tokens are clipped."""
    found = {}
    for entry in TABLE:
        name, _, form = entry.partition("/")
        found[f"{entry}, by default"] = PolicyLossConfig(surrogate=name, clip_low=0.05, clip_high=0.1, **({"dppo_form": form} if form else {}))
    return found
