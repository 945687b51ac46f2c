"""The two implementations of the operators' work. An operator's record says which; this is where the name becomes one."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

if TYPE_CHECKING:
    from ..config import PolicyLossConfig
    from .divergence import Comparison, Divergences
    from .fused import PolicyRows, Weights
    from .logits import Rows, Saved, Slopes, Statistics
    from .policy import PolicyResults, Tokens, Wanted
    from .scan import Numbers, ScanOptions, Sequences, Steps
    from .value import ValueOptions, ValueResults, Values


class Backend(Protocol):
    """Each function fills what it is given to fill; shapes and dtypes are checked before."""

    def statistics(self, logits: Tensor, rows: Rows, out: Statistics) -> None:
        """Log-prob and entropy of rows of a whole vocabulary."""

    def states(self, logits: Tensor, rows: Rows, with_entropy: bool) -> Tensor:
        """Of a part of the vocabulary: what :meth:`Rows.states` gives."""

    def gradient(self, out: Tensor, logits: Tensor, rows: Rows, slopes: Slopes, saved: Saved) -> None:
        """d loss / d logits, maybe over the logits."""

    def policy_gradients(
        self, out: Tensor, logits: Tensor, rows: Rows, terms: PolicyRows, weights: Weights, config: PolicyLossConfig, found: Statistics
    ) -> None:
        """d loss / d logits of a token-level objective, maybe over the logits, with log-prob and entropy."""

    def token_slopes(self, logprobs: Tensor, live: Tensor, terms: PolicyRows, config: PolicyLossConfig) -> Tensor:
        """d loss / d logprob of tokens by themselves."""

    def policy_loss(self, tokens: Tokens, config: PolicyLossConfig, wanted: Wanted, out: PolicyResults) -> None:
        """Loss, metrics and gradients on tokens; of metrics that are not wanted, anything."""

    def value_loss(self, x: Values, options: ValueOptions, out: ValueResults) -> None:
        """Loss, metrics and gradient on tokens; of metrics that are not wanted, anything."""

    def divergence(self, logits: Tensor, ref_logits: Tensor, comparison: Comparison, out: Divergences) -> None:
        """Divergence of rows of whole vocabularies."""

    def divergence_states(self, logits: Tensor, ref_logits: Tensor, comparison: Comparison) -> Tensor:
        """Of a part of the vocabulary: see ops/divergence.py."""

    def divergence_terms(self, logits: Tensor, ref_logits: Tensor, comparison: Comparison, statistics: Tensor) -> Tensor:
        """Of a part of the vocabulary: see ops/divergence.py."""

    def divergence_gradient(self, out: Tensor, logits: Tensor, ref_logits: Tensor, comparison: Comparison, statistics: Tensor, grad: Tensor) -> None:
        """d loss / d logits, maybe over the logits."""

    def lambda_returns(
        self, steps: Steps, sequences: Sequences, numbers: Numbers, options: ScanOptions, moments: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Advantages (None where not wanted) and returns of ``[rows, time]``; ``moments`` of the former, if it has room."""

    def normalise(self, advantages: Tensor, mask: Tensor | None, moments: Tensor, eps: float, out: Tensor) -> None:
        """Advantages with mean 0 and variance 1."""

    def restrict(self, out: Tensor, logits: Tensor, offsets: Tensor, token_ids: Tensor, rows: Tensor | None) -> None:
        """Logits where kept, -inf elsewhere."""

    def scale(self, x: Tensor, factor: Tensor) -> None:
        """x *= factor in place."""


@cache
def backend_of(name: str) -> Backend:
    """The backend called "triton" or "torch"."""
    return cast(Backend, import_module(f".{name}_backend", __package__))
