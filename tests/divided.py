"""A problem whose vocabulary is divided among ranks, in parts of different sizes; what they find is compared with what one process does."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .judge import assert_accurate, rounding

nan = float("nan")
V, H = 23, 8
# Columns of each rank, with one of padding in all; one rank has nothing.
SIZES = {2: (12, 12), 3: (5, 11, 8), 4: (9, 0, 8, 7)}
SCALING = {"softcap": 3.0, "logit_scale": 0.8}


def problem(world: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """[3, 6] tokens, among them the first and last of every rank; NaN where the mask is 0."""
    g = torch.Generator().manual_seed(world)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    ids = torch.randint(V, (3, 6), generator=g)
    first = 0
    for i, size in enumerate(SIZES[world]):
        if size:
            ids[i % 3, i // 3], ids[i % 3, 2 + i // 3] = first, min(first + size, V) - 1
        first += size
    ids[1, 5] = -100
    mask = torch.ones(3, 6)
    mask[2, 4:] = mask[0, 5] = 0
    hidden, weight, bias = normal(3, 6, H), normal(V, H) / 2, normal(V) / 2
    lp = torch.log_softmax(hidden @ weight.t() + bias, -1).gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    old = lp + 0.2 * normal(3, 6)
    return {
        "hidden": hidden.masked_fill(mask[..., None] == 0, nan).to(dtype),
        "weight": weight.to(dtype),
        "bias": bias.to(dtype),
        "ids": ids,
        "mask": mask,
        "old": old.masked_fill(mask == 0, nan),
        "ref": (old + 0.2 * normal(3, 6)).masked_fill(mask == 0, nan),
        "advantages": normal(3),
        "temperature": 0.5 + normal(3, 6).abs(),
        "up": normal(2, 3, 6),
    }


def part(x: Tensor, rank: int, world: int) -> Tensor:
    """The rank's rows of a tensor over the vocabulary, with NaN in the padding."""
    padded = torch.cat([x, x.new_full((sum(SIZES[world]) - len(x), *x.shape[1:]), nan)])
    return padded.split(SIZES[world])[rank]


def shareable(p: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tokens as [6, 3]: 2 or 3 ranks can share them."""
    turned = {name: x.transpose(0, 1) for name, x in p.items() if x.shape[:2] == (3, 6)}
    return {**p, **turned, "advantages": torch.cat([p["advantages"], -p["advantages"]]), "up": p["up"].transpose(1, 2)}


def inputs(p: dict[str, Tensor], rank: int | None, world: int, *, sharing: bool = False) -> dict[str, Tensor]:
    """What a rank, or one process for all, differentiates with respect to; ``sharing``: a rank has its share of the hidden states."""
    logits = torch.nan_to_num(p["hidden"].float()) @ p["weight"].float().t()
    leaves = {"hidden": p["hidden"], "weight": p["weight"], "bias": p["bias"], "logits": logits.masked_fill(p["mask"][..., None] == 0, nan)}
    if rank is not None:
        leaves["logits"] = part(logits.movedim(-1, 0), rank, world).movedim(0, -1)
        leaves["weight"], leaves["bias"] = part(p["weight"], rank, world), part(p["bias"], rank, world)
        if sharing:
            leaves["hidden"] = p["hidden"].chunk(world)[rank]
    return {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}


def assemble(parts: list[Tensor], whole: Tensor, world: int) -> Tensor:
    """One tensor of those of the ranks: put together where the vocabulary is a dimension or tokens are shared, otherwise the same on all."""
    for dim in (0, whole.dim() - 1):
        if whole.dim() and [x.shape[dim] for x in parts] == list(SIZES[world]) and whole.shape[dim] == V:
            joined = torch.cat(parts, dim)
            assert not joined.narrow(dim, V, joined.shape[dim] - V).any(), "padding has a gradient"
            return joined.narrow(dim, 0, V)
    if whole.dim() and parts[0].shape[0] * world == whole.shape[0]:
        return torch.cat(parts)
    assert all(((x == parts[0]) | (x.isnan() & parts[0].isnan())).all() for x in parts), "ranks differ"
    return parts[0]


def exactly(*inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The same numbers in float64, for the exact answer."""
    return [{n: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for n, x in named.items()} for named in inputs]


def backend_for(x: Tensor, backend: str) -> str:
    """The kernels over logits take no float64; the exact answer is the other backend's."""
    return "torch" if x.dtype == torch.float64 else backend


def assert_same(ranks: list[dict[str, list[Tensor]]], whole: dict[str, list[Tensor]], exact: dict[str, list[Tensor]], world: int) -> None:
    """What the ranks found, by name, is as near to the exact answer as what one process did: sums in another order, of terms of about 1."""
    for name, tensors in whole.items():
        for i, (one, answer) in enumerate(zip(tensors, exact[name], strict=True)):
            mine = assemble([r[name][i] for r in ranks], one, world)
            try:
                assert_accurate(mine, answer, one, k=4.0, eps=16 * max(torch.finfo(torch.float32).eps, rounding(torch.float32, answer)))
            except AssertionError as e:
                raise AssertionError(f"{name}, result {i}: {e}") from e


def collectives(run: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """What it gives, and how many collectives of each kind that took."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    kinds = {"c10d::_allgather_base_": "gather", "c10d::allreduce_": "sum", "c10d::_reduce_scatter_base_": "share of the sum"}
    counts = Counter(kinds.get(e.name, e.name) for e in profile.events() if e.name.startswith("c10d::"))
    return result, dict(counts)


def errors_of(attempts: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """What each says on this rank; all ranks make the same attempts."""
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "no error"
        except (ValueError, TypeError) as e:
            said[name] = str(e)
        dist.barrier()  # nobody is left behind in a collective
    return said


def assert_said_on_every_rank(said: list[dict[str, str]], expected: dict[str, str]) -> None:
    """Each says of each attempt what the pattern of that name wants."""
    for rank in said:
        assert rank.keys() == expected.keys()
        for name, pattern in expected.items():
            assert re.search(pattern, rank[name]), f"{name}: {rank[name]}"


def assert_said_on_one_rank(said: list[dict[str, str]], expected: dict[str, str]) -> None:
    """The last rank says what is wrong with its arguments, the others that it is the last rank's, or all how they differ."""
    *others, last = said
    elsewhere = rf"ranks whose arguments cannot be used, \[{len(others)}\]"
    assert_said_on_every_rank([last], expected)
    assert_said_on_every_rank(others, {name: pattern if pattern.startswith("differ") else elsewhere for name, pattern in expected.items()})
