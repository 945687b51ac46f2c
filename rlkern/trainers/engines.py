"""What samples completions: a small protocol, and the engines behind it, by the names that the setting ``engine`` knows.

generate      the policy itself, by transformers' ``generate``
continuous    the policy itself, by transformers' continuous batching: a completion that ends makes room for the next
vllm          an engine of vLLM in the same process, with weights of its own
http://...    a server of vLLM (``vllm serve``), through TRL's client
module:Class  one of the user's own, or ``file.py:Class``: an :class:`Engine`, made with a model and a :class:`Sampling`

Log-probs of an engine are comparable with those of training: of softmax(logits / temperature) over the whole vocabulary, whatever top-k and top-p
leave of it for sampling. Where an engine can only say something else, asking for them is an error.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import transformers
from torch import Tensor

import rlkern as rk
from rlkern.trainers.errors import InputError
from rlkern.trainers.named import load_named


@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    temperature: float
    top_k: int  #: 0: all
    top_p: float
    max_new_tokens: int
    max_length: int  #: of a prompt with its completion
    ends: list[int]  #: tokens of which each ends a completion
    pad: int
    logprobs: bool  #: whether log-probs are wanted
    device: torch.device  #: of the process
    batch_size: int | None = None  #: completions sampled at once; None: all
    memory: float = 0.3  #: share of the device's memory for an engine with weights of its own
    stop: list[str] = field(default_factory=list)  #: texts of which each ends a completion, with the token that completes it
    tokenizer: Any = None  #: makes text of tokens

    def generation_config(self, temperature: float | None = None) -> Any:
        """For transformers; with another temperature than ``self.temperature`` if one is given, 0 for the likeliest tokens."""
        temperature = self.temperature if temperature is None else temperature
        how = {"do_sample": True, "temperature": temperature, "top_k": self.top_k, "top_p": self.top_p} if temperature else {"do_sample": False}
        return transformers.GenerationConfig(**how, max_new_tokens=self.max_new_tokens, eos_token_id=self.ends, pad_token_id=self.pad)

    def length(self, tokens: Sequence[int]) -> int | None:
        """How many of these tokens a completion has, the one that ends it included; None where nothing ends it."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.ends), None)

        def stopped(count: int) -> bool:
            text = self.tokenizer.decode(tokens[:count], skip_special_tokens=True)
            return any(stop in text for stop in self.stop)

        last = len(tokens) if end is None else end
        return bisect_left(range(last), True, key=stopped) if self.stop and stopped(last) else end

    def require_whole_vocabulary(self, engine: str) -> None:
        """InputError where log-probs after top-k and top-p would not be those of the whole vocabulary."""
        if self.logprobs and (self.top_k or self.top_p < 1):
            why = f"{engine} gives log-probs after top_k and top_p, which training's cannot be compared with"
            raise InputError(f"{why}: leave these at 0 and 1, or sample with generate", field="top_k" if self.top_k else "top_p")


class Sample(NamedTuple):
    """A completion: its tokens, up to and including the first that ends it, and the log-prob of each where these were wanted."""

    tokens: list[int]
    logprobs: list[float] | None = None


@runtime_checkable
class Engine(Protocol):
    """What samples completions. A process has its own; what is random in it should come from torch's generator, which every step seeds."""

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """The policy's weights as they are now, by their names in it, each whole, one at a time.

        Called in all processes before completions are asked for. An engine that wants them reads all, in every process, since a sharded weight is
        gathered when it is read; one that samples from the policy itself leaves them unread, and a sharded policy is then gathered for it.
        """
        ...

    def sample(self, prompts: Sequence[list[int]], temperature: float | None = None) -> list[Sample]:
        """A completion for each prompt, with ``max_new_tokens`` tokens where nothing ends it before. The model is in eval mode.

        Tokens after one of the texts of ``Sampling.stop`` is complete may be there, and are cut off. ``temperature``: in evaluations with
        ``eval_temperature``, and only there: this one in place of ``Sampling.temperature``, 0 for the likeliest tokens; log-probs are not wanted.
        """
        ...


class FromPolicy:
    """What samples from the policy itself, by transformers."""

    def __init__(self, model: Any, sampling: Sampling):
        self.model, self.sampling = model, sampling

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """The policy has them."""


class Generate(FromPolicy):
    def sample(self, prompts: Sequence[list[int]], temperature: float | None = None) -> list[Sample]:
        ids, mask = pad_left(prompts, self.sampling.pad, self.sampling.device)
        size = self.sampling.batch_size or len(prompts)
        return [sample for part in zip(ids.split(size), mask.split(size), strict=True) for sample in self._batch(*part, temperature)]

    def _batch(self, ids: Tensor, mask: Tensor, temperature: float | None) -> Iterator[Sample]:
        how = self.sampling
        taken = _TakenLogprobs(how.temperature) if how.logprobs and temperature is None else None
        stops = _Stops(how, ids.shape[1]) if how.stop else None
        config = how.generation_config(temperature)
        self.model.generation_config = config  # else transformers 4 takes from there what is a default in the other
        watching = {"logits_processor": taken and [taken], "stopping_criteria": stops and [stops]}
        out = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **watching)
        rows = out[:, ids.shape[1] :].tolist()
        logprobs = taken.finish(out).tolist() if taken else [None] * len(rows)
        for i, (tokens, each) in enumerate(zip(rows, logprobs, strict=True)):
            written = tokens[: stops.lengths.get(i)] if stops else tokens  # padding comes after a stop
            count = how.length(written) or len(written)
            yield Sample(tokens[:count], each and each[:count])


class _Stops(transformers.StoppingCriteria):
    """Ends each row when the last of what was written to it holds one of the texts that stop it."""

    def __init__(self, sampling: Sampling, prompt: int):
        self.sampling, self.prompt = sampling, prompt
        self.lengths: dict[int, int] = {}  #: of the rows that were stopped, in tokens
        self.window = 8 + 4 * max(map(len, sampling.stop))  # tokens that surely hold such a text: a character may take four

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        for i, tokens in enumerate(input_ids[:, self.prompt :][:, -self.window :].tolist()):
            if i not in self.lengths and self.sampling.length(tokens) is not None:
                self.lengths[i] = input_ids.shape[1] - self.prompt
        return torch.tensor([i in self.lengths for i in range(len(input_ids))], device=input_ids.device)


class _TakenLogprobs(transformers.LogitsProcessor):
    """Watches the logits before temperature, top-k and top-p act on them, and scores the token that was taken when the next are made."""

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.logits: Tensor | None = None  #: of the step at hand alone, [N, V]
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._score(input_ids)
        self.logits = scores
        return scores

    def _score(self, input_ids: Tensor) -> None:
        if self.logits is not None:
            self.steps.append(rk.token_logprobs(self.logits, input_ids[:, -1], temperature=self.temperature))

    def finish(self, input_ids: Tensor) -> Tensor:
        """Log-probs of all that was taken, [N, T], given the whole."""
        self._score(input_ids)
        return torch.stack(self.steps, 1)


PAGE = 256  # tokens in a page of the cache; kernels of flash attention want multiples of 256


class Continuous(FromPolicy):
    def __init__(self, model: Any, sampling: Sampling):
        if not hasattr(getattr(transformers, "ContinuousBatchingConfig", None), "page_size"):
            raise InputError(f"continuous batching needs transformers 5.20 or newer, not {transformers.__version__}", field="engine")
        sampling.require_whole_vocabulary("continuous batching")
        super().__init__(model, sampling)

    def sample(self, prompts: Sequence[list[int]], temperature: float | None = None) -> list[Sample]:
        size, wanted = min(self.sampling.batch_size or len(prompts), len(prompts)), self.sampling.logprobs and temperature is None
        batching = transformers.ContinuousBatchingConfig(
            return_logprobs=wanted,
            seed=int(torch.randint(2**31, ())),
            max_requests_per_batch=size,
            # By default these follow the memory that happens to be free, and the samples with them.
            page_size=PAGE,
            num_blocks=size * -(-self.sampling.max_length // PAGE),
            max_batch_tokens=max(size, min(1024, sum(map(len, prompts)))),
            auto_switch_to_flash=self.model.dtype != torch.float32,  # which flash attention does not take
            disable_nccl_graph_mixing=False,  # would set an environment variable, for models divided among GPUs
        )
        manager = self.model.init_continuous_batching(self.sampling.generation_config(temperature), batching)
        names = manager.add_requests(list(prompts))  # all before the start, so that batches do not depend on the threads' timing
        results: dict[str, Any] = {}
        try:
            manager.warmup()
            manager.start()
            while len(results) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.error is None:
                    results[result.request_id] = result
                elif result is not None or not manager.is_running():
                    raise RuntimeError(f"continuous batching failed: {result.error if result else 'its thread has ended'}")
        finally:
            manager.stop(block=True)
            manager.destroy()
        return [Sample(results[name].generated_tokens, results[name].logprobs if wanted else None) for name in names]


def load_engine(spec: str, model: Any, sampling: Sampling) -> Engine:
    """The engine that the setting ``engine`` names. ``model``: the policy; if sharded, it has weights only while completions are asked for."""
    from rlkern.trainers.vllm_engines import VLLM, VLLMServer

    named: dict[str, Callable[..., Engine]] = {"generate": Generate, "continuous": Continuous, "vllm": VLLM}
    where, _, name = spec.rpartition(":")
    if spec in named:
        return named[spec](model, sampling)
    if spec.startswith(("http://", "https://")):
        return VLLMServer(spec, model, sampling)
    if not (where and name):
        raise InputError(f"{spec!r}: expected {', '.join(named)}, the URL of a vLLM server, module:Class or file.py:Class", field="engine")
    engine = load_named(spec, where, name, kind="class", field="engine")(model, sampling)
    if not isinstance(engine, Engine):
        raise InputError(f"{spec!r} is no engine: it needs the methods load_weights and sample", field="engine")
    return engine


def pad_left(prompts: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as one tensor, padded on the left, with the mask of their tokens."""
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=device)
    return ids, torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
