"""Sampling by vLLM, in the same process or on a server; after the sources of vLLM and of TRL 1.16, which keeps up with vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlkern.trainers.engines import Sample, Sampling
from rlkern.trainers.errors import InputError


def require_comparable(mode: str, sampling: Sampling) -> None:
    """InputError where the log-probs of a vLLM with that ``logprobs_mode`` are not those wanted: "raw" ones are from before the temperature."""
    if not sampling.logprobs or (mode == "raw_logprobs" and sampling.temperature == 1):
        return
    if mode != "processed_logprobs":
        raise InputError(
            f"log-probs at temperature {sampling.temperature} need vLLM's --logprobs-mode processed_logprobs, not {mode}", field="engine"
        )
    sampling.require_whole_vocabulary("vLLM")


class VLLM:
    def __init__(self, model: Any, sampling: Sampling):
        try:
            import vllm
        except ImportError as error:
            raise InputError(f"vllm cannot be imported: {error}", field="engine") from error
        mode = "raw_logprobs" if sampling.temperature == 1 else "processed_logprobs"
        require_comparable(mode, sampling)
        self.vllm, self.sampling = vllm, sampling
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over within the process
        self.llm = vllm.LLM(
            model=model.name_or_path,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=sampling.max_length,
            max_num_seqs=sampling.batch_size,
            gpu_memory_utilization=sampling.memory,
            logprobs_mode=mode,
            hf_overrides={"head_dtype": "float32"},  # as the trainers' own: a logit rounded to 16 bits puts a log-prob off by 1e-2
            distributed_executor_backend="external_launcher" if torch.distributed.is_initialized() else None,  # an engine a process
        )

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.llm.apply_model(lambda model: model.load_weights(weights))
        self.llm.reset_prefix_cache()

    def sample(self, prompts: Sequence[list[int]], temperature: float | None = None) -> list[Sample]:
        how, wanted = self.sampling, self.sampling.logprobs and temperature is None
        options: dict[str, Any] = {"top_k": how.top_k, "top_p": how.top_p, "max_tokens": how.max_new_tokens}
        options |= {"temperature": how.temperature if temperature is None else temperature, "logprobs": 0 if wanted else None}
        options |= {"stop_token_ids": how.ends, "stop": how.stop, "detokenize": bool(how.stop)}
        params = [self.vllm.SamplingParams(seed=seed, **options) for seed in torch.randint(2**31, (len(prompts),)).tolist()]
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [self._sample(output.outputs[0], wanted) for output in outputs]

    def _sample(self, output: Any, wanted: bool) -> Sample:
        tokens = list(output.token_ids)
        if not wanted:
            return Sample(tokens)
        return Sample(tokens, [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)])


class VLLMServer:
    """Every process sends its own prompts; the first sends the weights, by NCCL. The server draws by its own generator: no seed repeats a run."""

    def __init__(self, url: str, model: Any, sampling: Sampling):
        self.sampling = sampling
        self.first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        try:
            from trl.generation.vllm_client import VLLMClient

            self.client = VLLMClient(url)
            mode = self.client.get_server_info()["model_config"]["logprobs_mode"]
            if self.first:
                self.client.init_communicator(device=sampling.device)
        except Exception as error:  # of the import, of the connection, of the server's answers
            raise InputError(f"{url}: {error}", field="engine") from error
        require_comparable(mode, sampling)

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        if self.first:
            with self.client.weight_update():
                for name, weight in weights:
                    self.client.update_named_param(name, weight)
            self.client.reset_prefix_cache()
        else:
            for _ in weights:
                pass
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    def sample(self, prompts: Sequence[list[int]], temperature: float | None = None) -> list[Sample]:
        how, wanted = self.sampling, self.sampling.logprobs and temperature is None
        out = self.client.generate(
            prompts=list(prompts),
            temperature=how.temperature if temperature is None else temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            max_tokens=how.max_new_tokens,
            logprobs=0 if wanted else None,
            generation_kwargs={"stop_token_ids": how.ends} | ({"stop": how.stop} if how.stop else {}),
        )
        logprobs = [[step[0] for step in each] for each in out["logprobs"]] if wanted else [None] * len(prompts)
        return [Sample(*each) for each in zip(out["completion_ids"], logprobs, strict=True)]
