"""Engines for the tests, named as a user names his own."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlkern.trainers.engines import Generate, Sample, Sampling


class Hotter(Generate):
    """Samples at twice the temperature, and says how likely its tokens were there."""

    def __init__(self, model: Any, sampling: Sampling):
        super().__init__(model, replace(sampling, temperature=2 * sampling.temperature))


class Copy(Generate):
    """Samples from a model of its own."""

    def __init__(self, model: Any, sampling: Sampling):
        super().__init__(AutoModelForCausalLM.from_pretrained(model.name_or_path), sampling)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            own.pop(name).data.copy_(weight)
        assert not own


class Spelling:
    """Keeps every set of weights that it is given, and writes one token and the end."""

    def __init__(self, model: Any, sampling: Sampling):
        self.sampling = sampling
        self.weights: list[dict[str, torch.Tensor]] = []

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.weights.append({name: weight.clone() for name, weight in weights})

    def sample(self, prompts: Sequence[list[int]]) -> list[Sample]:
        return [Sample([3 + i % 7, *self.sampling.ends[:1]], [-1.0, -2.0]) for i in range(len(prompts))]


class Wrong(Spelling):
    """Gives what its subclasses say."""

    tokens: tuple[int, ...] = (5,) * 6
    logprobs: list[float] | None = [-1.0] * 6

    def sample(self, prompts: Sequence[list[int]]) -> list[Sample]:
        return [Sample([self.sampling.ends[0] if token < 0 else token for token in self.tokens], self.logprobs) for _ in prompts]


class TooFew(Wrong):
    def sample(self, prompts: Sequence[list[int]]) -> list[Sample]:
        return super().sample(prompts)[1:]


class TooLong(Wrong):
    tokens = (5,) * 7


class CutShort(Wrong):
    tokens = (5,) * 3


class PastTheEnd(Wrong):
    tokens = (5, -1, 5)


class Empty(Wrong):
    tokens = ()


class NoLogprobs(Wrong):
    logprobs = None


class TooFewLogprobs(Wrong):
    logprobs = [-1.0] * 5


class NotFinite(Wrong):
    logprobs = [-1.0] * 5 + [float("nan")]


class NoEngine:
    def __init__(self, model: Any, sampling: Sampling):
        pass
