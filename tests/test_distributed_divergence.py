"""Divergences over a vocabulary that ranks share: values and all gradients are those of one process, to rounding; every rank gets the same bits."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import rlkern as rk

from .divided import (
    SCALING,
    SIZES,
    V,
    assert_said_on_every_rank,
    assert_said_on_one_rank,
    assert_same,
    backend_for,
    collectives,
    errors_of,
    exactly,
    inputs,
    nan,
    part,
    problem,
    shareable,
)
from .judge import assert_accurate
from .ranks import on_ranks

inf = float("inf")
H_REF = 5
# By the weight of the reference in the mixture: 0 is KL(ref || policy), 1 KL(policy || ref).
BETAS = (0.0, 0.3, 1.0)


def reference(p: dict[str, Tensor], rank: int | None, world: int, *, sharing: bool = False) -> dict[str, Tensor]:
    """The other model's hidden states, head and logits, of which a rank has what it has of the policy's."""
    g = torch.Generator().manual_seed(10 + world)
    hidden, weight, bias = (torch.randn(shape, generator=g) for shape in ((*p["mask"].shape, H_REF), (V, H_REF), (V,)))
    dead = p["mask"][..., None] == 0
    y = {"weight": weight, "bias": bias, "logits": (hidden @ weight.t() + bias).masked_fill(dead, nan).movedim(-1, 0)}
    y = {name: x if rank is None else part(x, rank, world) for name, x in y.items()}
    hidden = hidden.masked_fill(dead, nan)
    return {**y, "hidden": hidden.chunk(world)[rank or 0] if sharing else hidden, "logits": y["logits"].movedim(0, -1)}


def from_logits(p: dict[str, Tensor], x: dict[str, Tensor], y: dict[str, Tensor], beta: float, **options: Any) -> list[Tensor]:
    """Divergence and gradient."""
    options |= {"mask": p["mask"], "temperature": p["temperature"], **SCALING}
    found = rk.generalized_jsd(x["logits"], y["logits"], beta=beta, **options)
    return [found, *torch.autograd.grad(found, x["logits"], p["up"][0])]


def from_hidden(p: dict[str, Tensor], x: dict[str, Tensor], y: dict[str, Tensor], beta: float, *, head: bool, **options: Any) -> list[Tensor]:
    """The same, without a gradient too, in chunks of a few rows; ``head``: it takes gradients."""
    w, b = (x[n] if head else x[n].detach() for n in ("weight", "bias"))
    options |= {"bias": b, "ref_bias": y["bias"], "mask": p["mask"], "temperature": p["temperature"], "chunk_bytes": 200, **SCALING}
    arguments = x["hidden"], w, y["hidden"], y["weight"]
    with torch.no_grad():
        plain = rk.linear_generalized_jsd(*arguments, beta=beta, **options)
    found = rk.linear_generalized_jsd(*arguments, beta=beta, **options)
    wanted = [x["hidden"], x["weight"], x["bias"]] if head else [x["hidden"]]
    return [plain, found, *torch.autograd.grad(found, wanted, p["up"][0])]


def all_from_hidden(p: dict[str, Tensor], x: dict[str, Tensor], y: dict[str, Tensor], process_group: Any = None) -> dict[str, list[Tensor]]:
    return {
        f"linear, beta {beta}, head {head}": from_hidden(p, x, y, beta, head=head, process_group=process_group)
        for beta in BETAS
        for head in (True, False)
    }


def everything(p: dict[str, Tensor], x: dict[str, Tensor], y: dict[str, Tensor], world: int, process_group: Any = None) -> dict[str, list[Tensor]]:
    """The interpreter, which takes its time, not in every case."""
    options = {"process_group": process_group}
    found = all_from_hidden(p, x, y, process_group)
    for beta in BETAS:
        for backend in ("torch", "triton")[: 2 if world == 2 else 1]:
            found[f"logits, beta {beta}, {backend}"] = from_logits(p, x, y, beta, backend=backend_for(x["logits"], backend), **options)
    if world == 4:
        found["linear, triton"] = from_hidden(p, x, y, 0.3, head=True, backend=backend_for(x["logits"], "triton"), compact=False, **options)
    for reverse in (True, False):
        found[f"KL, reverse {reverse}"] = [rk.full_kl(x["logits"], y["logits"], mask=p["mask"], reverse=reverse, **options)]
    return found


def on_a_rank(rank: int, world: int) -> dict[str, list[Tensor]]:
    p = problem(world)
    shard = rk.VocabShard.of(SIZES[world][rank], dist.group.WORLD, vocab_size=V)
    found = everything(p, inputs(p, rank, world), reference(p, rank, world), world, shard)
    return {name: [t.detach() for t in tensors] for name, tensors in found.items()}


@pytest.mark.parametrize("world", SIZES)
def test_equals_one_process(world):
    p = problem(world)
    given = p, inputs(p, None, world), reference(p, None, world)
    assert_same(on_ranks(world, on_a_rank), everything(*given, world), everything(*exactly(*given), world), world)


def sharing_on_a_rank(rank: int, world: int) -> dict[str, list[Tensor]]:
    p = shareable(problem(world))
    shard = rk.VocabShard.of(SIZES[world][rank], dist.group.WORLD, vocab_size=V, sequence_parallel=True)
    x, y = (z(p, rank, world, sharing=True) for z in (inputs, reference))
    found = all_from_hidden(p, x, y, shard)
    unmasked = {**p, "mask": None}
    x, y = ({**z, "hidden": torch.nan_to_num(z["hidden"]).detach().requires_grad_()} for z in (x, y))
    found |= {f"{name}, no mask": tensors for name, tensors in all_from_hidden(unmasked, x, y, shard).items()}
    return {name: [t.detach() for t in tensors] for name, tensors in found.items()}


@pytest.mark.parametrize("world", [2, 3])
def test_hidden_states_that_ranks_share(world):
    p = shareable(problem(world))

    def of_one(p: dict[str, Tensor], x: dict[str, Tensor], y: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        found = all_from_hidden(p, x, y)
        x, y = ({**z, "hidden": torch.nan_to_num(z["hidden"]).detach().requires_grad_()} for z in (x, y))
        return found | {f"{name}, no mask": tensors for name, tensors in all_from_hidden({**p, "mask": None}, x, y).items()}

    given = p, inputs(p, None, world), reference(p, None, world)
    assert_same(on_ranks(world, sharing_on_a_rank), of_one(*given), of_one(*exactly(*given)), world)


# ---- tokens that are excluded ---------------------------------------------------------------------------------------------------------------

ROWS = {
    "neither has mass on a rank": 0,
    "policy has none there": 1,
    "reference has none there": 2,
    "and the policy's rounds to 0": 3,
    "all mass is there": 4,
    "no policy": 5,
    "no reference": 6,
    "NaN among -inf": 7,
    "NaN in the reference": 8,
    "inf": 9,
    "huge, equal": 10,
}


def excluded(world: int) -> tuple[Tensor, Tensor]:
    """[rows, V] logits of both sides, with -inf and worse on the second rank that has any columns."""
    g = torch.Generator().manual_seed(world)
    x, y = torch.randn(2, len(ROWS), V, generator=g).unbind(0)
    first = SIZES[world][0]
    there = slice(first, first + next(size for size in SIZES[world][1:] if size))
    there = slice(there.start, min(there.stop, V))
    x[:2, there] = -inf
    y[0, there] = -inf
    y[2:4, there] = -inf
    x[3, there] -= 1e4
    x[4], y[4] = x[4].where((torch.arange(V) >= there.start) & (torch.arange(V) < there.stop), torch.tensor(-inf)), y[4]
    x[5] = y[6] = -inf
    x[7, there], x[7, there.start + 1] = -inf, nan
    y[8, there.start] = nan
    x[9, there.start] = inf
    x[10] = y[10] = x[10] * 1e6
    return x, y


def excluded_of(x: Tensor, y: Tensor, **options: Any) -> dict[str, list[Tensor]]:
    found = {}
    for beta in BETAS:
        for backend in ("torch", "triton"):
            leaf = x.clone().requires_grad_()
            result = rk.generalized_jsd(leaf, y, beta=beta, backend=backend_for(x, backend), **options)
            found[f"beta {beta}, {backend}"] = [result.detach(), *torch.autograd.grad(result.sum(), leaf)]
    return found


def excluded_on_a_rank(rank: int, world: int) -> dict[str, list[Tensor]]:
    shard = rk.VocabShard.of(SIZES[world][rank], dist.group.WORLD, vocab_size=V)
    return excluded_of(*(part(z.t(), rank, world).t() for z in excluded(world)), process_group=shard)


@pytest.mark.parametrize("world", [2, 4])
def test_excluded_tokens(world):
    whole = excluded_of(*excluded(world))
    assert_same(on_ranks(world, excluded_on_a_rank), whole, excluded_of(*(x.double() for x in excluded(world))), world)
    for beta, infinite in ((1.0, [2, 3]), (0.0, [1, 4]), (0.3, [])):
        for backend in ("torch", "triton"):
            result = whole[f"beta {beta}, {backend}"][0]
            assert result.isinf().nonzero().flatten().tolist() == infinite
            assert result.isnan().nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
            assert result[10] == 0


# ---- collectives ----------------------------------------------------------------------------------------------------------------------------


def count_on_a_rank(rank: int, world: int, sharing: bool) -> dict[str, dict[str, int]]:
    """How many collectives forward and backward take when nothing is validated; from hidden states in two chunks."""
    p = shareable(problem(world))
    x, y = (z(p, rank, world, sharing=sharing) for z in (inputs, reference))
    shard = rk.VocabShard.of(SIZES[world][rank], dist.group.WORLD, vocab_size=V, sequence_parallel=sharing)
    options = {"mask": p["mask"], "process_group": shard, "validate": False}
    chunks = 4 * 12 * 8  # bytes of half the 15 rows that count, and one more
    counts = {}
    for name, beta in (("KL", 1.0), ("reverse", 0.0), ("JSD", 0.5)):
        calls = {
            "logits": lambda: rk.generalized_jsd(x["logits"], y["logits"], beta=beta, **options),  # noqa: B023
            "trained head": lambda: linear(x["weight"]),
            "frozen head": lambda: linear(x["weight"].detach()),
        }

        def linear(weight: Tensor) -> Tensor:
            return rk.linear_generalized_jsd(x["hidden"], weight, y["hidden"], y["weight"], beta=beta, chunk_bytes=chunks, **options)  # noqa: B023

        for kind, call in calls.items():
            result, counts[f"{name} {kind}, forward"] = collectives(call)
            wanted = x["logits"] if kind == "logits" else x["hidden"]
            _, counts[f"{name} {kind}, backward"] = collectives(lambda: torch.autograd.grad(result.sum(), wanted))  # noqa: B023
    return counts


def test_collectives_are_few():
    for counts in on_ranks(2, count_on_a_rank, False):
        for name, rounds in (("KL", 1), ("reverse", 1), ("JSD", 2)):
            assert counts[f"{name} logits, forward"] == {"gather": rounds}
            assert counts[f"{name} logits, backward"] == {}
            assert counts[f"{name} trained head, forward"] == {
                "gather": 1 if rounds == 1 else 3
            }  # the statistics of a chunk are needed for its terms
            assert counts[f"{name} trained head, backward"] == {"sum": 2}
            assert counts[f"{name} frozen head, forward"] == {"gather": 2 * rounds, "sum": 2}
            assert counts[f"{name} frozen head, backward"] == {}


def test_collectives_of_shared_hidden_states():
    """Those of both models are gathered where logits are made of them, and all gradients of the policy's go back in one."""
    for counts in on_ranks(2, count_on_a_rank, True):
        for name, rounds in (("KL", 1), ("reverse", 1), ("JSD", 2)):
            assert counts[f"{name} trained head, forward"] == {"gather": 2 + (1 if rounds == 1 else 3)}
            assert counts[f"{name} trained head, backward"] == {"gather": 2, "share of the sum": 1}
            assert counts[f"{name} frozen head, forward"] == {"gather": 2 + 2 * rounds, "share of the sum": 1}
            assert counts[f"{name} frozen head, backward"] == {}


# ---- errors ---------------------------------------------------------------------------------------------------------------------------------


def fail_on_a_rank(rank: int, world: int) -> dict[str, str]:
    """What each bad set-up says on this rank."""
    p = problem(world)
    x, y = inputs(p, rank, world), reference(p, rank, world)
    group = dist.group.WORLD
    sharing = rk.VocabShard(group, 12 * rank, 12, V, sequence_parallel=True)
    x, y = ({name: torch.nan_to_num(t.detach()) for name, t in z.items()} for z in (x, y))
    attempts = {
        "other sizes": lambda: rk.full_kl(x["logits"], y["logits"][..., : 12 - rank], process_group=group),
        "other masks": lambda: rk.full_kl(x["logits"], y["logits"], mask=p["mask"] * (rank + 1) - 1, process_group=group),
        "gap": lambda: rk.full_kl(x["logits"], y["logits"], process_group=rk.VocabShard(group, 13 * rank, 12, V)),
        "other head": lambda: rk.linear_full_kl(x["hidden"], x["weight"], y["hidden"], y["weight"][: 11 + rank], process_group=group),
        "other width": lambda: rk.linear_full_kl(
            x["hidden"], x["weight"], y["hidden"][..., : 5 - rank], y["weight"][:, : 5 - rank], process_group=group
        ),
        "unequal shares": lambda: rk.linear_full_kl(
            x["hidden"].split((1, 2))[rank], x["weight"], y["hidden"].split((1, 2))[rank], y["weight"], mask=p["mask"], process_group=sharing
        ),
        "unequal shares of one": lambda: rk.linear_full_kl(
            x["hidden"], x["weight"], y["hidden"].split((1, 2))[rank], y["weight"], mask=p["mask"], process_group=sharing
        ),
        "mask of a share": lambda: rk.linear_full_kl(x["hidden"], x["weight"], y["hidden"], y["weight"], mask=p["mask"], process_group=sharing),
        "other rows": lambda: rk.linear_full_kl(
            x["hidden"], x["weight"], y["hidden"], y["weight"], rows=torch.tensor([1, 3]).roll(rank), process_group=group
        ),
        "no group": lambda: rk.generalized_jsd(x["logits"], y["logits"], process_group="world"),
    }
    return errors_of(attempts)


def test_bad_set_ups_are_errors_on_every_rank():
    expected = {
        "other sizes": "differ in reference's vocabulary: \\[24, 22\\]",
        "other masks": "differ in ids or mask",
        "gap": "rank 1 begins at 13, but those before it end at 12",
        "other head": "differ in reference's vocabulary: \\[22, 24\\]",
        "other width": "differ in reference's hidden width: \\[5, 4\\]",
        "unequal shares": "differ in first dimension of hidden: \\[1, 2\\]",
        "unequal shares of one": "differ in reference's first dimension of hidden: \\[1, 2\\]",
        "mask of a share": "mask must have shape \\(6, 6\\), got \\(3, 6\\)",
        "other rows": "differ in rows",
        "no group": "process_group must be a torch.distributed.ProcessGroup or a rlkern.VocabShard, got str",
    }
    assert_said_on_every_rank(on_ranks(2, fail_on_a_rank), expected)


def fail_on_one_rank(rank: int, world: int) -> dict[str, str]:
    p = problem(world)
    x, y = inputs(p, rank, world), reference(p, rank, world)
    x, y = ({name: torch.nan_to_num(t.detach()) for name, t in z.items()} for z in (x, y))
    group, bad = dist.group.WORLD, rank == world - 1
    part = rk.VocabShard(group, 12 * rank, 11 if bad else 12, V)

    def linear(**options: Any) -> Tensor:
        return rk.linear_full_kl(x["hidden"], x["weight"], y["hidden"], options.pop("ref_weight", y["weight"]), process_group=group, **options)

    attempts = {
        "another shard": lambda: rk.full_kl(x["logits"], y["logits"], process_group=part),
        "no reference": lambda: rk.full_kl(x["logits"], None if bad else y["logits"], process_group=group),
        "mask": lambda: rk.full_kl(x["logits"], y["logits"], mask="all" if bad else p["mask"], process_group=group),
        "one divided otherwise": lambda: linear(ref_weight=y["weight"][: 11 if bad else 12]),
        "width": lambda: linear(ref_weight=y["weight"][:, : 4 if bad else 5]),
        "logit_scale": lambda: linear(logit_scale=-1.0 if bad else 1.0),
    }
    return errors_of(attempts)


def test_what_is_bad_on_one_rank_is_an_error_on_all():
    expected = {
        "another shard": "VocabShard is of 11 tokens, but the tensor has 12",
        "no reference": "ref_logits must be a torch.Tensor, got NoneType",
        "mask": "mask must be a torch.Tensor, got str",
        "one divided otherwise": "differ in reference's vocabulary: \\[24, 22\\]",
        "width": "ref_weight must have shape \\[V, 5\\]",
        "logit_scale": "logit_scale must be a number > 0",
    }
    assert_said_on_one_rank(on_ranks(2, fail_on_one_rank), expected)


# ---- DTensor --------------------------------------------------------------------------------------------------------------------------------


def dtensors_on_a_rank(rank: int, world: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    p = problem(world)
    mesh = init_device_mesh("cpu", (world,))
    placements = {"hidden": Replicate(), "weight": Shard(0), "bias": Shard(0), "logits": Shard(-1)}
    whole = [{name: torch.nan_to_num(t.detach()) for name, t in z(p, None, world).items()} for z in (inputs, reference)]
    divided = [{name: distribute_tensor(z[name], mesh, [placement]) for name, placement in placements.items()} for z in whole]
    for z in (whole[0], divided[0]):
        for t in z.values():
            t.requires_grad_()
    with pytest.raises(ValueError, match=r"must be divided alike; here this rank has tokens \d+ to \d+ of 23, rows by 1 and whole"):
        rk.full_kl(divided[0]["logits"], whole[1]["logits"])
    shared = [{**z, "hidden": z["hidden"].detach().redistribute(placements=[Shard(0)])} for z in divided]
    cases = [(from_logits, divided), (from_hidden, divided)]
    if world == 3:
        with pytest.raises(ValueError, match=r"must be divided alike; here this rank has .*, rows by 3 and .*, rows by 1"):
            rk.linear_full_kl(shared[0]["hidden"], shared[0]["weight"], divided[1]["hidden"], divided[1]["weight"])
        shared[0]["hidden"].requires_grad_()
        cases.append((from_hidden, shared))
    found = []
    for function, given in cases:
        options = {} if function is from_logits else {"head": True}
        mine = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in function(p, *given, 0.3, **options)]
        found.append(([t.detach() for t in mine], [t.detach() for t in function(p, *whole, 0.3, **options)]))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_dtensors_say_how_they_are_divided(world):
    for found in on_ranks(world, dtensors_on_a_rank):
        for mine, exact in found:
            for a, b in zip(mine, exact, strict=True):
                assert_accurate(a, b, eps=5e-6)  # two sums in float32, of terms of about 1, in another order
