"""Two reward functions for examples/grpo/grpo.yaml: one number a completion; a field of the data (here ``answer``) comes under its name."""

import re


def correct(completions: list[str], answer: list[int], **fields: list) -> list[float]:
    """1 where the last number of the completion is the answer."""
    numbers = [re.findall(r"\d+", completion) for completion in completions]
    return [float(bool(found) and int(found[-1]) == right) for found, right in zip(numbers, answer, strict=True)]


def brief(completions: list[str], **fields: list) -> list[float]:
    """1 for an empty completion, falling to 0 at 40 characters."""
    return [max(0.0, 1 - len(completion) / 40) for completion in completions]
