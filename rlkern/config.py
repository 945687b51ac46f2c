"""``PolicyLossConfig``: the policy objective and every number in it. One frozen object for all three depths of fusion and both backends."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any

from ._checks import check_choice, check_number
from .surrogates import Surrogate, name_of, parts_of

RATIO_LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
# And their functions, which ``kernels/kl.py`` and ``ops/torch_backend/terms.py`` both have.
KL_ESTIMATORS = {"k1": "k1", "abs": "absolute", "k2": "k2", "k3": "k3", "k1+": "k1_plus", "abs+": "absolute_plus", "k3+": "k3_plus"}
KL_RATIO_WEIGHTS = (False, True, "score", "sampling")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "sum")
SEQUENCE_AGGREGATIONS = ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")

Clamp = float | tuple[float | None, float | None] | None
INF = float("inf")


def bounds(clamp: Clamp) -> tuple[float, float]:
    """(low, high) of a clamp: a number x is (-x, x), a None is no bound on that side."""
    if clamp is None:
        return -INF, INF
    if not isinstance(clamp, tuple):
        return -clamp, clamp
    low, high = clamp
    return -INF if low is None else low, INF if high is None else high


def check_clamp(name: str, clamp: Any) -> Clamp:
    """Check that ``clamp`` is one; returns it with floats, and None for one that bounds nothing."""
    if clamp is None:
        return None
    if isinstance(clamp, (tuple, list)):
        if len(clamp) != 2:
            raise ValueError(f"{name} must be a number, or a pair (low, high) with None for no bound; got {clamp!r}")
        low, high = (None if x is None else check_number(f"{name}[{i}]", x) for i, x in enumerate(clamp))
        if low is not None and high is not None and low > high:
            raise ValueError(f"{name} must be a pair (low, high) with low <= high, got {clamp!r}")
        return None if low is None and high is None else (low, high)
    return check_number(name, clamp, at_least=0)


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """The objective of :func:`rlkern.policy_loss` and its fused forms. Frozen, keyword-only; a bad value is a ValueError or TypeError at once.

    With r the ratio, A the advantage, lp the log-prob of the policy, sg stop-gradient:

    surrogate: the per-token loss.
        "clip"       -min(min(r, ratio_cap) A, clamp(r, 1 - clip_low, 1 + clip_high) A); where A < 0, at most -dual_clip A  (PPO, GRPO, GSPO ...)
        "cispo"      -sg(clamp(r, 1 - clip_low, 1 + clip_high)) A lp, or -sg(min(r, cispo_cap)) A lp  (MiniMax-M1)
        "sapo"       -sigmoid(tau (r - 1)) 4 / tau A, tau = tau_pos where A > 0, else tau_neg
        "gmpo"       -A exp(mean over the sequence of log r, clamped to [-clip_low, clip_high] on the side that the sign of A makes pessimistic)
        "vespo"      -sg(phi) A lp, phi = exp(lambda + k s - lambda e^s), s the clamped sum of log r over the sequence
        "dppo_tv"    trust region on p - p_old: the token is dropped above clip_high with A > 0, below -clip_low with A <= 0;
                     dppo_form "ratio": -r A, "score": -sg(min(r, ratio_cap)) A lp
        "dppo_kl"    the same with the binary KL of p_old and p
        "reinforce"  -A lp
        or a term of your own: its name, given to :func:`rlkern.register_surrogate`, or its ``@triton.jit`` function (the field then has its name)
    ratio_level: "token", "sequence" (GSPO; gradient through the mean), "sequence_token" (GSPO-token), "sequence_sum" (RLOO). "gmpo" and "vespo"
        reduce over the sequence by themselves and take "token".
    clip_low, clip_high: distances from 1 (clip, cispo), of log r from 0 (gmpo), of p from p_old (dppo_tv), or of divergence (dppo_kl);
        None: no clip on that side.
    ratio_cap: upper bound of the ratio before the product with A (TRL's ``delta``; verl's ``clip_ratio_c`` in DPPO).
    dual_clip: > 1; bounds the loss of tokens with A < 0 (verl's ``clip_ratio_c``).
    log_ratio_clamp: a number x for [-x, x], or (low, high) with None for no bound: clamps log r before exp; no gradient outside.
    off_policy_threshold: in sequences whose mean of ``sampling_logprobs - lp`` exceeds it, tokens with A < 0 are dropped (DeepSeek-V3.2). In nats.
    kl_estimator, kl_coef: the estimator of D(policy || reference), added times the coefficient. "k1+", "abs+" and "k3+" have the gradient of "k2".
    kl_input_clamp, kl_output_clamp: clamps of ref - lp and of the estimate after the ratio weight, given as log_ratio_clamp is.
    kl_ratio_weighted: True: times r (DeepSeek-V3.2); "score": times exp(lp - sg(lp)) (NeMo); "sampling": times exp(lp - sampling_logprobs).
    entropy_coef, entropy_aggregation: the loss has ``- entropy_coef * aggregate(entropy)``. Without entropy_aggregation that is by the policy's own
        aggregation and normalizer (as in verl); with it, by that one over mask and entropy_mask with the local count (TRL: "token-mean").
    aggregation: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm" (divided by max_length as well) or "sum".
    max_length: for "seq-mean-token-sum-norm"; None: the length of the time dimension of padded inputs.
    """

    surrogate: str | Any = "clip"
    ratio_level: str = "token"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    ratio_cap: float | None = None
    dual_clip: float | None = None
    log_ratio_clamp: Clamp = None
    cispo_cap: float | None = None
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    dppo_form: str = "ratio"
    off_policy_threshold: float | None = None
    kl_estimator: str = "k3"
    kl_coef: float = 0.0
    kl_input_clamp: Clamp = None
    kl_output_clamp: Clamp = None
    kl_ratio_weighted: bool | str = False
    entropy_coef: float = 0.0
    entropy_aggregation: str | None = None
    aggregation: str = "token-mean"
    max_length: float | None = None
    # The whole as one string: what the custom operators, which take no Python objects, are given.
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "surrogate", name_of(self.surrogate))
        check_choice("ratio_level", self.ratio_level, RATIO_LEVELS)
        check_choice("dppo_form", self.dppo_form, ("ratio", "score"))
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("kl_ratio_weighted", self.kl_ratio_weighted, KL_RATIO_WEIGHTS)
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        if self.entropy_aggregation is not None:
            check_choice("entropy_aggregation", self.entropy_aggregation, AGGREGATIONS)
        if self.parts.reduction and self.ratio_level != "token":
            raise ValueError(
                f"surrogate {self.surrogate!r} reduces over the sequence by itself: ratio_level must be 'token', got {self.ratio_level!r}"
            )
        for name, limits in _LIMITS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                check_number(name, value, **limits)
        for name in ("log_ratio_clamp", "kl_input_clamp", "kl_output_clamp"):
            object.__setattr__(self, name, check_clamp(name, getattr(self, name)))
        object.__setattr__(self, "text", ", ".join([f"{name!r}: {getattr(self, name)!r}" for name in _NAMES]))

    @cached_property
    def of_a_token(self) -> PolicyLossConfig:
        """The objective of a token by itself: no weight of aggregation, no entropy bonus."""
        return replace(self, aggregation="sum", entropy_coef=0.0, entropy_aggregation=None)

    @property
    def parts(self) -> Surrogate:
        """The functions of the surrogate."""
        return parts_of(self.surrogate, self.dppo_form)

    @property
    def sequence_option(self) -> str | None:
        """The first option that speaks of sequences, None if there is none."""
        if self.parts.reduction:
            return f"surrogate={self.surrogate!r}"
        if self.ratio_level != "token":
            return f"ratio_level={self.ratio_level!r}"
        if self.off_policy_threshold is not None:
            return "off_policy_threshold"
        if self.aggregation in SEQUENCE_AGGREGATIONS:
            return f"aggregation={self.aggregation!r}"
        if self.own_entropy_aggregation in SEQUENCE_AGGREGATIONS:
            return f"entropy_aggregation={self.entropy_aggregation!r}"
        return None

    @property
    def needs_sequences(self) -> bool:
        """Whether the objective speaks of sequences, so that packed inputs need ``cu_seqlens``."""
        return self.sequence_option is not None

    @property
    def is_token_level(self) -> bool:
        """Whether a token's loss, before its weight, depends on no other token: then its gradient can be made where its logits are."""
        return self.ratio_level == "token" and not self.parts.reduction and self.off_policy_threshold is None

    @property
    def own_entropy_aggregation(self) -> str | None:
        """The entropy bonus's own aggregation; None where it is the policy's, or there is no bonus."""
        return self.entropy_aggregation if self.entropy_coef != 0 else None

    @property
    def needs_sampling_logprobs(self) -> bool:
        """Whether ``sampling_logprobs`` are read."""
        return self.off_policy_threshold is not None or (self.kl_coef != 0 and self.kl_ratio_weighted == "sampling")

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_text(text: str) -> PolicyLossConfig:
        """The configuration whose ``text`` this is."""
        return PolicyLossConfig(**ast.literal_eval(f"{{{text}}}"))

    # Presets. Each takes overrides: PolicyLossConfig.grpo(kl_coef=0.04). KL and entropy terms are off unless asked for.

    @classmethod
    def ppo(cls, **overrides: Any) -> PolicyLossConfig:
        """PPO (arXiv 1707.06347): clip 0.2, mean over tokens."""
        return cls(**overrides)

    @classmethod
    def grpo(cls, **overrides: Any) -> PolicyLossConfig:
        """GRPO (DeepSeekMath, arXiv 2402.03300): clip 0.2, mean over sequences of the mean over tokens. The paper's KL: ``kl_coef=0.04`` with k3."""
        return cls(**{"aggregation": "seq-mean-token-mean", **overrides})

    @classmethod
    def dapo(cls, **overrides: Any) -> PolicyLossConfig:
        """DAPO (arXiv 2503.14476, section 4.1): clip 0.2 below and 0.28 above, mean over all tokens."""
        return cls(**{"clip_high": 0.28, **overrides})

    @classmethod
    def dr_grpo(cls, **overrides: Any) -> PolicyLossConfig:
        """Dr. GRPO (arXiv 2503.20783): clip 0.2, token sum over a constant length; pass ``max_length`` = the longest completion allowed."""
        return cls(**{"aggregation": "seq-mean-token-sum-norm", **overrides})

    @classmethod
    def bnpo(cls, **overrides: Any) -> PolicyLossConfig:
        """BNPO as TRL means it: clip 0.2, mean over the tokens of the local batch (leave ``normalizer`` out)."""
        return cls(**overrides)

    @classmethod
    def luspo(cls, **overrides: Any) -> PolicyLossConfig:
        """LUSPO (arXiv 2602.05261, section 5.1): GSPO whose sequences weigh by their length; clip 2e-3 and 2.5e-3."""
        return cls(**{"ratio_level": "sequence", "clip_low": 2e-3, "clip_high": 2.5e-3, "aggregation": "seq-mean-token-sum", **overrides})

    @classmethod
    def gspo(cls, **overrides: Any) -> PolicyLossConfig:
        """GSPO (arXiv 2507.18071, section 5.1): ratio of sequences, clip 3e-4 and 4e-4, no KL."""
        return cls(**{"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "seq-mean-token-mean", **overrides})

    @classmethod
    def gspo_token(cls, **overrides: Any) -> PolicyLossConfig:
        """GSPO-token (arXiv 2507.18071, section 4.3): GSPO's ratio with a gradient per token, so that advantages may differ by token."""
        return cls.gspo(**{"ratio_level": "sequence_token", **overrides})

    @classmethod
    def cispo(cls, **overrides: Any) -> PolicyLossConfig:
        """CISPO (MiniMax-M1, arXiv 2506.13585) with the cap of 5 of ScaleRL (arXiv 2510.13786), as in TRL."""
        return cls(**{"surrogate": "cispo", "cispo_cap": 5.0, **overrides})

    @classmethod
    def sapo(cls, **overrides: Any) -> PolicyLossConfig:
        """SAPO (arXiv 2511.20347): temperatures 1 and 1.05, mean over sequences of the mean over tokens."""
        return cls(**{"surrogate": "sapo", "aggregation": "seq-mean-token-mean", **overrides})

    @classmethod
    def gmpo(cls, **overrides: Any) -> PolicyLossConfig:
        """GMPO (arXiv 2507.20673, section 4): geometric mean of ratios that are clipped to (e^-0.4, e^0.4), mean over sequences."""
        return cls(**{"surrogate": "gmpo", "clip_low": 0.4, "clip_high": 0.4, "aggregation": "seq-mean-token-mean", **overrides})

    @classmethod
    def vespo(cls, **overrides: Any) -> PolicyLossConfig:
        """VESPO (arXiv 2602.10693, section 3.4): (k, lambda) = (2, 3) where A >= 0 and (3, 2) where A < 0, mean over tokens."""
        return cls(**{"surrogate": "vespo", **overrides})

    @classmethod
    def dppo(cls, **overrides: Any) -> PolicyLossConfig:
        """DPPO with the binary total variation (arXiv 2602.04879) as verl runs it: threshold 0.15, score form, ratio capped at 20."""
        values = {"surrogate": "dppo_tv", "dppo_form": "score", "clip_low": 0.15, "clip_high": 0.15, "ratio_cap": 20.0, "log_ratio_clamp": 20.0}
        return cls(**{**values, **overrides})

    @classmethod
    def rloo(cls, **overrides: Any) -> PolicyLossConfig:
        """RLOO (arXiv 2402.14740) as in TRL: ratio of whole sequences, clip 0.2, mean over sequences; advantages by the leave-one-out baseline."""
        return cls(**{"ratio_level": "sequence_sum", "aggregation": "seq-mean-token-mean", **overrides})

    @classmethod
    def reinforce(cls, **overrides: Any) -> PolicyLossConfig:
        """REINFORCE, and GPG (arXiv 2504.02546): -A lp, mean over tokens."""
        return cls(**{"surrogate": "reinforce", **overrides})


_NAMES = tuple(f.name for f in fields(PolicyLossConfig) if f.init)
_LIMITS: dict[str, dict[str, float]] = {
    "clip_low": {"at_least": 0},
    "clip_high": {"at_least": 0},
    "ratio_cap": {"above": 0},
    "dual_clip": {"above": 1},
    "cispo_cap": {"above": 0},
    "tau_pos": {"above": 0},
    "tau_neg": {"above": 0},
    "vespo_k_pos": {},
    "vespo_lambda_pos": {"at_least": 0},
    "vespo_k_neg": {},
    "vespo_lambda_neg": {"at_least": 0},
    "off_policy_threshold": {},
    "kl_coef": {},
    "entropy_coef": {},
    "max_length": {"above": 0},
}
_OPTIONAL = ("clip_low", "clip_high", "ratio_cap", "dual_clip", "cispo_cap", "off_policy_threshold", "max_length")
