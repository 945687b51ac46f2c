"""What models write: completions of prompts as an engine samples them, and scoring them."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern.integrations.transformers import unwrap
from rlkern.trainers.data import Prompt, Row
from rlkern.trainers.engines import Engine, Sample, Sampling, load_engine, pad_left
from rlkern.trainers.errors import InputError
from rlkern.trainers.settings import PolicyArguments

# Generation settings that mean something in sampling alone, with what means nothing there.
SAMPLED = {"temperature": (1.0,), "top_p": (1.0,), "top_k": (50, 0), "min_p": (0.0,), "typical_p": (1.0,)}


class Completions(NamedTuple):
    """Prompts of one length (padded on the left) with their completions (padded on the right); one row a completion."""

    ids: Tensor  #: [N, P + T]
    attention_mask: Tensor  #: [N, P + T]: 1 on tokens, 0 on padding
    mask: Tensor  #: [N, T]: 1 on the tokens of the completion, its end-of-sequence token included
    logprobs: Tensor | None = None  #: [N, T], where they were wanted: of these tokens, as the engine that sampled them has them

    def rows(self, index: Tensor | slice) -> Completions:
        return Completions._make(None if x is None else x[index] for x in self)


class Sampler:
    """Samples completions of a model for rows of data, by the settings alone: the model's own sampling defaults are put aside.

    ``defaults`` are those, to be put back before the model is saved.
    """

    sampling: Sampling
    engine: Engine

    def __init__(self, model: Any, tokenizer: Any, args: PolicyArguments, device: torch.device):
        self.model, self.tokenizer, self.args, self.device, self.max_new_tokens = model, tokenizer, args, device, args.max_new_tokens
        self._prompts: dict[str, list[int]] = {}  # tokens of each, by its place
        self.defaults = model.generation_config
        ends = self.defaults.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if not self.defaults.do_sample and any(getattr(self.defaults, name, None) not in (None, *neutral) for name, neutral in SAMPLED.items()):
            self.defaults.do_sample = True  # which these settings mean; transformers 4 would refuse to save the model without
        self.vocabulary = vocabulary_of(model)
        added = tokenizer.get_added_vocab()
        self.stop = [text for text in args.stop if text not in added]
        stops = [added[text] for text in args.stop if text in added]
        for text in args.stop:
            if added.get(text, 0) >= self.vocabulary:
                raise InputError(f"{text!r} is token {added[text]}, beyond the model's vocabulary of {self.vocabulary}", field="stop")
        self.ends = sorted(end for end in {*ends, *stops, tokenizer.eos_token_id} - {None} if end < self.vocabulary)
        if not self.ends:
            raise InputError("neither the tokenizer nor the model has an end-of-sequence token that the model knows", field="model")
        self.pad = fitting_pad(tokenizer, self.vocabulary, self.ends[0])

    def start(self, longest: int) -> None:
        """Make the engine, for prompts of at most that many tokens. Whatever else is to live on the device is there by now."""
        args = self.args
        self.sampling = Sampling(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
            max_length=longest + args.max_new_tokens,
            ends=self.ends,
            pad=self.pad,
            logprobs=args.rollout_correction != "none" or args.track_mismatch,
            batch_size=args.rollout_batch_size,
            memory=args.engine_memory,
            device=self.device,
            stop=self.stop,
            tokenizer=self.tokenizer,
        )
        self.model.generation_config = self.sampling.generation_config()
        self.engine = load_engine(args.engine, self.model, self.sampling)
        if args.eval_temperature is not None and "temperature" not in inspect.signature(self.engine.sample).parameters:
            raise InputError(f"the engine {args.engine} takes no temperature in sample(prompts, temperature=None)", field="eval_temperature")

    def prompt(self, row: Row) -> list[int]:
        """The prompt as token ids that the model knows; made once for each row of the files."""
        if row.place not in self._prompts:
            self._prompts[row.place] = prompt_tokens(self.tokenizer, row.prompt, row.place)
            check_fit(self._prompts[row.place], self.vocabulary, self.tokenizer, row.place)
        return self._prompts[row.place]

    def tokens(self, row: Row) -> list[int]:
        """The prompt as token ids, short enough for the model to answer it."""
        ids, longest = self.prompt(row), positions_of(self.model)
        if longest is not None and len(ids) + self.max_new_tokens > longest:
            raise InputError(
                f"{row.place}: the prompt's {len(ids)} tokens and {self.max_new_tokens} new ones are more than the model's {longest}; "
                "max_prompt_tokens leaves longer prompts out"
            )
        return ids

    def ended(self, batch: Completions) -> Tensor:
        """Which completions ended by themselves, [N]; the others were cut off at ``max_new_tokens``."""
        rows, counts = batch.ids[:, -batch.mask.shape[1] :].tolist(), batch.mask.sum(1).tolist()  # at once: each is a synchronisation
        return torch.tensor([self.sampling.length(row[:n]) is not None for row, n in zip(rows, counts, strict=True)], device=batch.ids.device)

    def step_ends(self, ids: Tensor, mask: Tensor, steps: Sequence[str]) -> list[int]:
        """The position in a completion, of one row of :class:`Completions`, of the token with which each of the steps of its text ends."""
        tokens = ids[-len(mask) :][mask.bool()].tolist()
        characters, ends = 0, []
        for step in steps:
            characters += len(step)
            wanted = characters
            ends.append(bisect_left(range(len(tokens)), wanted, key=lambda i: len(self.tokenizer.decode(tokens[: i + 1], skip_special_tokens=True))))
        return [*ends[:-1], len(tokens) - 1]  # the last step has the end of the sequence too

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row], temperature: float | None = None) -> tuple[Completions, list[str]]:
        """One completion for each row, as tokens and as text; at another temperature than in training if one is given, and then without log-probs."""
        prompts = [self.tokens(row) for row in rows]
        self.model.eval()  # gradient checkpointing would switch off the cache of keys and values
        samples = self.engine.sample(prompts) if temperature is None else self.engine.sample(prompts, temperature=temperature)
        self.model.train()
        with_logprobs = self.sampling.logprobs and temperature is None
        samples = self._checked(samples, len(prompts), with_logprobs)
        ids, prompt_mask = pad_left(prompts, self.pad, self.device)
        longest = max(len(tokens) for tokens, _ in samples)
        new = torch.tensor([tokens + [self.pad] * (longest - len(tokens)) for tokens, _ in samples], device=ids.device)
        logprobs = None
        if with_logprobs:
            logprobs = torch.tensor([each + [0.0] * (longest - len(each)) for _, each in samples if each is not None], device=ids.device)
        mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in samples], device=ids.device)
        # Not all ends are special tokens of the tokenizer's.
        written = [tokens[:-1] if tokens and tokens[-1] in self.ends else tokens for tokens, _ in samples]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return Completions(torch.cat([ids, new], 1), torch.cat([prompt_mask, mask], 1), mask, logprobs), texts

    def _checked(self, samples: Sequence[Sample], count: int, with_logprobs: bool) -> list[Sample]:
        """The samples, without what comes after a text that stops them. InputError where the engine did not keep to the protocol."""
        if len(samples) != count:
            raise InputError(f"the engine gave {len(samples)} completions for {count} prompts", field="engine")
        checked = []
        for tokens, logprobs in samples:
            end = self.sampling.length(tokens) or self.max_new_tokens
            if len(tokens) < end or any(token in self.ends for token in tokens[:-1]) or len(tokens) > self.max_new_tokens:
                wanted = f"{self.max_new_tokens} tokens, or up to the first of {self.ends}, included" + (f", or of {self.stop}" if self.stop else "")
                raise InputError(f"the engine gave the completion {tokens}; expected {wanted}", field="engine")
            if with_logprobs and (logprobs is None or len(logprobs) != len(tokens) or not all(map(math.isfinite, logprobs))):
                raise InputError(f"the engine gave the log-probs {logprobs} for the tokens {tokens}; expected a finite one for each", field="engine")
            checked.append(Sample(tokens[:end], logprobs and logprobs[:end]))
        return checked


def prompt_tokens(tokenizer: Any, prompt: Prompt, place: str) -> list[int]:
    """A prompt as token ids; a conversation through the tokenizer's chat template: what is to follow answers it, or goes on with the assistant's last
    message.

    With one beginning of the sequence, also where the text has it and the tokenizer puts another before it; and no end that the text does not have.
    """
    if not isinstance(prompt, str) and tokenizer.chat_template is None:
        raise InputError(f"{place}: the prompt is a list of messages, but the tokenizer has no chat template")
    try:
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            goes_on = prompt[-1]["role"] == "assistant"
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=not goes_on, continue_final_message=goes_on, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:  # a template raises what it likes
        how = "made into tokens" if isinstance(prompt, str) else "rendered by the chat template"
        raise InputError(f"{place}: the prompt cannot be {how}: {type(error).__name__}: {error}") from error
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    while begin is not None and ids[:2] == [begin, begin]:
        ids = ids[1:]
    if isinstance(prompt, str) and end not in (None, begin) and ids[-1:] == [end] and not prompt.rstrip().endswith(tokenizer.eos_token):
        ids = ids[:-1]
    if not ids:
        raise InputError(f"{place}: the prompt has no tokens")
    return ids


def vocabulary_of(model: Any) -> int:
    """How many tokens the model has embeddings for."""
    embeddings = unwrap(model).get_input_embeddings()
    return getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]


def positions_of(model: Any) -> int | None:
    """How many tokens a sequence may have, where the model says so."""
    return getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)


def fitting_pad(tokenizer: Any, vocabulary: int, other: int) -> int:
    """The tokenizer's padding, or where the model does not know that, another token: it is masked."""
    return other if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary else tokenizer.pad_token_id


def check_fit(ids: Sequence[int], vocabulary: int, tokenizer: Any, place: str) -> None:
    """InputError for a token that the model has no embedding of."""
    if (most := max(ids)) >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(most)
        raise InputError(
            f"{place}: token {most}, {token!r}, is beyond the model's vocabulary of {vocabulary}: resize its embeddings to its tokenizer"
        )


def answer_tokens(model: Any, tokenizer: Any, prompt: Prompt, answer: str, place: str) -> list[int]:
    """A prompt and an answer to it as a reward model reads them: ended by the end-of-sequence token, if there is one. InputError where it cannot."""
    ids = joined_tokens(model, tokenizer, prompt, answer, place)
    check_length(model, ids, answer, place)
    return ids


def check_length(model: Any, ids: Sequence[int], answer: str, place: str) -> None:
    """InputError where a prompt and an answer are more tokens than the model reads."""
    longest = positions_of(model)
    if longest is not None and len(ids) > longest:
        raise InputError(f"{place}: prompt and answer {answer[:30]!r} are {len(ids)} tokens, more than the model's {longest}")


def joined_tokens(model: Any, tokenizer: Any, prompt: Prompt, answer: str, place: str) -> list[int]:
    """The same, of any length."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        answered = tokenizer(answer, add_special_tokens=False)["input_ids"]
    except Exception as error:
        raise InputError(f"{place}: answer {answer[:30]!r} cannot be made into tokens: {type(error).__name__}: {error}") from error
    ids = prompt_tokens(tokenizer, prompt, place) + answered + end
    check_fit(ids, vocabulary_of(model), tokenizer, place)
    return ids


def scores(model: Any, tokens: Sequence[list[int]], device: torch.device) -> Tensor:
    """The model's score of each sequence, [N], float32. ``model``: of ``load_scorer``, as it is or made data-parallel."""
    longest = max(map(len, tokens))
    pad = unwrap(model).config.get_text_config().pad_token_id
    ids = torch.tensor([t + [pad] * (longest - len(t)) for t in tokens], device=device)
    mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in tokens], device=device)
    return model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).float()
