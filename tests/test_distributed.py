"""Vocabularies divided among ranks: values and all gradients are those of one process, to rounding; every rank gets the same bits."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import rlkern as rk

from . import presets
from .divided import (
    SCALING,
    SIZES,
    H,
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
    problem,
    shareable,
)
from .judge import assert_accurate, rounding
from .ranks import on_ranks

PRESETS = {name: presets.preset(name, max_length=6, kl_coef=0.1) for name in presets.NAMES}
PRESETS |= {"entropy bonus": rk.PolicyLossConfig.grpo(entropy_coef=0.1)}


def logprobs_of(p: dict[str, Tensor], x: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Log-prob, entropy and their gradient, from logits."""
    lp, h = rk.token_logprobs(x["logits"], p["ids"], mask=p["mask"], temperature=p["temperature"], with_entropy=True, **SCALING, **options)
    return [lp, h, *torch.autograd.grad([lp, h], x["logits"], list(p["up"]))]


def linear_logprobs_of(p: dict[str, Tensor], x: dict[str, Tensor], *, head: bool, with_entropy: bool, **options: Any) -> list[Tensor]:
    """The same from hidden states, in chunks of a row or two; ``head``: it takes gradients."""
    w, b = (x[n] if head else x[n].detach() for n in ("weight", "bias"))
    options |= {"bias": b, "mask": p["mask"], "temperature": p["temperature"], "chunk_bytes": 70, **SCALING}
    with torch.no_grad():
        plain = rk.linear_token_logprobs(x["hidden"], w, p["ids"], with_entropy=with_entropy, **options)
    found = rk.linear_token_logprobs(x["hidden"], w, p["ids"], with_entropy=with_entropy, **options)
    outputs = list(found) if with_entropy else [found]
    wanted = [x["hidden"], x["weight"], x["bias"]] if head else [x["hidden"]]
    return [*(plain if with_entropy else [plain]), *outputs, *torch.autograd.grad(outputs, wanted, list(p["up"][: len(outputs)]))]


def loss_of(
    p: dict[str, Tensor], x: dict[str, Tensor], config: rk.PolicyLossConfig, *, linear: bool, head: bool = True, **options: Any
) -> list[Tensor]:
    """Loss, log-probs, entropies, gradients."""
    options |= {"mask": p["mask"], "ref_logprobs": p["ref"], "config": config}
    if linear:
        w, b = (x[n] if head else x[n].detach() for n in ("weight", "bias"))
        out = rk.fused_linear_policy_loss(x["hidden"], w, p["ids"], p["old"], p["advantages"], bias=b, **options)
        wanted = [x["hidden"], x["weight"], x["bias"]] if head else [x["hidden"]]
    else:
        out = rk.fused_policy_loss(x["logits"], p["ids"], p["old"], p["advantages"], **options)
        wanted = [x["logits"]]
    return [out.loss.detach(), out.logprobs, out.entropy, *torch.autograd.grad(out.loss, wanted)]


def everything(p: dict[str, Tensor], x: dict[str, Tensor], process_group: Any = None) -> dict[str, list[Tensor]]:
    """Every function in every mode, by name; where divided, for the last dimensions that are the rank's own see :func:`assemble`."""
    options = {"process_group": process_group}
    found = {
        "logits": logprobs_of(p, x, **options),
        "logits, compiled kernels": logprobs_of(p, x, backend=backend_for(x["logits"], "triton"), **options),
    }
    for head in (True, False):
        for with_entropy in (True, False):
            found[f"linear, head {head}, entropy {with_entropy}"] = linear_logprobs_of(p, x, head=head, with_entropy=with_entropy, **options)
    for name, config in PRESETS.items():
        found[f"fused {name}"] = loss_of(p, x, config, linear=False, **options)
        found[f"fused linear {name}"] = loss_of(p, x, config, linear=True, **options)
    for mode in ("in-forward", "recompute"):
        found[f"fused linear, {mode}"] = loss_of(p, x, PRESETS["ppo"], linear=True, mode=mode, compact=False, **options)
    found["fused linear, frozen head"] = loss_of(p, x, PRESETS["gspo"], linear=True, head=False, **options)
    keep = rk.KeptTokens.from_mask((torch.arange(V) % 3 != 0) | (torch.arange(V) == p["ids"][..., None]))
    found["kept tokens"] = loss_of(p, x, PRESETS["grpo"], linear=True, keep=keep, **options)
    found["kept tokens, logits"] = loss_of(p, x, PRESETS["grpo"], linear=False, keep=keep, **options)
    packed = {**p, **{name: p[name].flatten() for name in ("ids", "mask", "old", "ref")}, "advantages": p["advantages"][:3]}
    flat = {**x, "hidden": x["hidden"].flatten(0, 1)}
    found["packed sequences"] = loss_of(packed, flat, PRESETS["gspo"], linear=True, cu_seqlens=torch.tensor([0, 5, 12, 18]), **options)
    own = rk.fused_linear_loss(x["hidden"], x["weight"], p["ids"], lambda lp, h: -lp - 0.1 * h, mask=p["mask"], **options)
    found["own loss"] = [own.loss.detach(), *torch.autograd.grad(own.loss, [x["hidden"], x["weight"]])]
    return found


def on_a_rank(rank: int, world: int, sharing: bool) -> dict[str, list[Tensor]]:
    p = shareable(problem(world)) if sharing else problem(world)
    shard = rk.VocabShard.of(SIZES[world][rank], dist.group.WORLD, vocab_size=V, sequence_parallel=sharing)
    found = everything(p, inputs(p, rank, world, sharing=sharing), shard)
    return {name: [t.detach() for t in tensors] for name, tensors in found.items()}


@pytest.mark.parametrize("world", SIZES)
def test_equals_one_process(world):
    p = problem(world)
    x = inputs(p, None, world)
    assert_same(on_ranks(world, on_a_rank, False), everything(p, x), everything(*exactly(p, x)), world)


@pytest.mark.parametrize("world", [2, 3])
def test_hidden_states_that_ranks_share(world):
    p = shareable(problem(world))
    x = inputs(p, None, world)
    assert_same(on_ranks(world, on_a_rank, True), everything(p, x), everything(*exactly(p, x)), world)


# ---- collectives ----------------------------------------------------------------------------------------------------------------------------


def count_on_a_rank(rank: int, world: int, sharing: bool) -> dict[str, dict[str, int]]:
    """How many collectives forward and backward take, by name, when ids are not validated."""
    p = shareable(problem(world))
    x = inputs(p, rank, world, sharing=sharing)
    shard = rk.VocabShard.of(SIZES[world][rank], dist.group.WORLD, vocab_size=V, sequence_parallel=sharing)
    options = {"mask": p["mask"], "process_group": shard, "validate": False}
    config = rk.PolicyLossConfig.gspo(clip_low=0.9, clip_high=5.0)

    def logprobs() -> Tensor:
        return rk.token_logprobs(x["logits"], p["ids"], **options)

    def linear(**more: Any) -> Tensor:
        return rk.linear_token_logprobs(x["hidden"], x["weight"], p["ids"], **options, **more)

    def frozen() -> Tensor:
        return rk.linear_token_logprobs(x["hidden"], x["weight"].detach(), p["ids"], **options)

    def loss(config: rk.PolicyLossConfig) -> Tensor:
        return rk.fused_linear_policy_loss(x["hidden"], x["weight"], p["ids"], p["old"], p["advantages"], config=config, **options).loss

    calls = {
        "logits": logprobs,
        "linear": linear,
        "linear in chunks": lambda: linear(chunk_bytes=70),
        "frozen head": frozen,
        "sequence-level loss": lambda: loss(config),
        "token-level loss": lambda: loss(rk.PolicyLossConfig.ppo()),
    }
    counts = {}
    for name, call in calls.items():
        result, counts[f"{name}, forward"] = collectives(call)
        wanted = x["logits"] if name == "logits" else x["hidden"]
        _, counts[f"{name}, backward"] = collectives(lambda: torch.autograd.grad(result.sum(), wanted))  # noqa: B023
    return counts


def test_collectives_are_few():
    gather, reduce, nothing = {"gather": 1}, {"sum": 1}, {}
    for counts in on_ranks(2, count_on_a_rank, False):
        assert counts["logits, forward"] == counts["linear, forward"] == counts["linear in chunks, forward"] == gather
        assert counts["logits, backward"] == nothing
        assert counts["linear, backward"] == reduce  # of d loss / d hidden
        assert counts["sequence-level loss, forward"] == gather
        assert counts["sequence-level loss, backward"] == reduce
        for name in ("frozen head", "token-level loss"):  # whose gradients are made in the forward
            assert counts[f"{name}, forward"] == {"gather": 1, "sum": 1}
            assert counts[f"{name}, backward"] == nothing


def test_collectives_of_shared_hidden_states():
    """These are gathered where logits are made of them, and all gradients of them go back in one."""
    for counts in on_ranks(2, count_on_a_rank, True):
        for name in ("linear", "linear in chunks", "sequence-level loss"):
            assert counts[f"{name}, forward"] == {"gather": 2}
            assert counts[f"{name}, backward"] == {"gather": 1, "share of the sum": 1}
        for name in ("frozen head", "token-level loss"):
            assert counts[f"{name}, forward"] == {"gather": 2, "share of the sum": 1}
            assert counts[f"{name}, backward"] == {}


def saved_on_a_rank(rank: int, world: int) -> list[Tensor]:
    p = shareable(problem(world))
    x = inputs(p, rank, world, sharing=True)
    shard = rk.VocabShard.of(SIZES[world][rank], dist.group.WORLD, vocab_size=V, sequence_parallel=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach()), lambda t: t):
        for weight in (x["weight"], x["weight"].detach()):
            rk.linear_token_logprobs(x["hidden"], weight, p["ids"], mask=p["mask"], process_group=shard)
            rk.fused_linear_policy_loss(x["hidden"], weight, p["ids"], p["old"], p["advantages"], mask=p["mask"], process_group=shard)
    return saved


def test_a_share_is_all_that_is_kept():
    for saved in on_ranks(2, saved_on_a_rank):
        widths = [t.numel() for t in saved if t.dim() and t.shape[-1] == H]
        assert len(widths) > 4
        assert max(widths) <= 12 * H  # of 12 rows of the head; 18 tokens have hidden states of twice 9


# ---- errors ---------------------------------------------------------------------------------------------------------------------------------


def fail_on_a_rank(rank: int, world: int) -> dict[str, str]:
    """What each bad set-up says on this rank."""
    p = problem(world)
    x = inputs(p, rank, world)
    world_group = dist.group.WORLD
    other_ids = p["ids"] if rank else p["ids"].roll(1, 1)
    sharing = [rk.VocabShard(world_group, 12 * rank, 12, V, sequence_parallel=s) for s in (True, False)]
    attempts = {
        "sizes differ": lambda: rk.token_logprobs(x["logits"][..., : 12 - rank], p["ids"].clamp(max=9), process_group=world_group),
        "gap": lambda: rk.token_logprobs(x["logits"], p["ids"], mask=p["mask"], process_group=rk.VocabShard(world_group, 13 * rank, 12, V)),
        "not all": lambda: rk.token_logprobs(x["logits"], p["ids"], mask=p["mask"], process_group=rk.VocabShard(world_group, 12 * rank, 12, 40)),
        "other ids": lambda: rk.token_logprobs(x["logits"], other_ids, process_group=world_group),
        "other tokens": lambda: rk.token_logprobs(x["logits"][: 3 - rank], p["ids"][: 3 - rank], process_group=world_group),
        "other vocabulary": lambda: rk.VocabShard.of(12, world_group, vocab_size=V + rank),
        "too few": lambda: rk.VocabShard.of(12, world_group, vocab_size=25),
        "another shard": lambda: rk.token_logprobs(x["logits"], p["ids"], process_group=rk.VocabShard(world_group, 12 * rank, 11, V)),
        "id": lambda: rk.token_logprobs(x["logits"], p["ids"] + 15, process_group=world_group),
        "sharing differs": lambda: rk.VocabShard.of(12, world_group, sequence_parallel=rank == 0),
        "one shares": lambda: rk.linear_token_logprobs(x["hidden"], x["weight"], p["ids"], mask=p["mask"], process_group=sharing[rank]),
        "unequal shares": lambda: rk.linear_token_logprobs(
            x["hidden"].split((2, 1))[rank], x["weight"], p["ids"], mask=p["mask"], process_group=sharing[0]
        ),
        "ids of a share": lambda: rk.linear_token_logprobs(x["hidden"], x["weight"], p["ids"], mask=p["mask"], process_group=sharing[0]),
        "number of rows": lambda: rk.linear_token_logprobs(
            x["hidden"], x["weight"], p["ids"], rows=torch.arange(4 + rank), process_group=world_group
        ),
        "other rows": lambda: rk.linear_token_logprobs(
            x["hidden"], x["weight"], p["ids"], rows=torch.tensor([3, 1, 2]).roll(rank), process_group=world_group
        ),
        "rows of one": lambda: rk.linear_token_logprobs(
            x["hidden"], x["weight"], p["ids"], rows=torch.arange(4) if rank else None, process_group=world_group
        ),
        "other chunks": lambda: rk.linear_token_logprobs(
            x["hidden"], x["weight"].detach(), p["ids"], chunk_bytes=384 * (1 + rank), process_group=world_group
        ),
        "no group": lambda: rk.token_logprobs(x["logits"], p["ids"], process_group="world"),
        "not a member": lambda: rk.token_logprobs(x["logits"], p["ids"], process_group=dist.GroupMember.NON_GROUP_MEMBER),
    }
    said = errors_of(attempts)
    unchecked = rk.token_logprobs(x["logits"], p["ids"].masked_fill(p["ids"] < 0, V + 40), process_group=world_group, validate=False)
    assert bool(unchecked[1, 5].isnan())  # beyond every shard: never a plausible number
    return said


def test_bad_set_ups_are_errors_on_every_rank():
    said = on_ranks(2, fail_on_a_rank)
    expected = {
        "sizes differ": "differ in vocabulary: \\[24, 22\\]",
        "gap": "rank 1 begins at 13, but those before it end at 12",
        "not all": "end at 24, before its 40 tokens do",
        "other ids": "differ in ids or mask",
        "other tokens": "differ in number of tokens: \\[18, 12\\]",
        "other vocabulary": "vocab_size must be the same on all ranks, got \\[23, 24\\]",
        "too few": "vocab_size is 25, but the ranks hold \\[12, 12\\]",
        "another shard": "VocabShard is of 11 tokens, but the tensor has 12",
        "id": "outside the vocabulary \\[0, 24\\)",
        "sharing differs": "sequence_parallel must be the same on all ranks, got \\[True, False\\]",
        "one shares": "differ in number of shares of hidden: \\[2, 1\\]",
        "unequal shares": "differ in first dimension of hidden: \\[2, 1\\]",
        "ids of a share": "ids must have shape \\(6, 6\\), got \\(3, 6\\)",
        "number of rows": "differ in number of rows: \\[4, 5\\]",
        "other rows": "differ in rows",
        "rows of one": "differ in number of rows: \\[-1, 4\\]",
        "other chunks": "differ in rows of a chunk",
        "no group": "process_group must be a torch.distributed.ProcessGroup or a rlkern.VocabShard, got str",
        "not a member": "process_group must be",
    }
    assert_said_on_every_rank(said, expected)


def fail_on_one_rank(rank: int, world: int) -> dict[str, str]:
    """What set-ups say that are bad on the last rank alone; they would end well on the others, which wait for it."""
    p = problem(world)
    x, ids = inputs(p, rank, world), p["ids"].clamp(min=0)
    group, bad = dist.group.WORLD, rank == world - 1
    part = rk.VocabShard(group, 12 * rank, 11 if bad else 12, V)
    keep = rk.KeptTokens(torch.arange(19), ids.flatten())

    def linear(**options: Any) -> Tensor:
        given = {"hidden": x["hidden"], "weight": x["weight"], "ids": ids, "process_group": group, **options}
        return rk.linear_token_logprobs(**given)

    attempts = {
        "another shard": lambda: rk.token_logprobs(x["logits"], ids, process_group=part),
        "no logits": lambda: rk.token_logprobs(None if bad else x["logits"], ids, process_group=group),
        "float ids": lambda: rk.token_logprobs(x["logits"], ids.float() if bad else ids, process_group=group),
        "no ids": lambda: rk.fused_policy_loss(x["logits"], None if bad else ids, p["old"], p["advantages"], process_group=group),
        "mask": lambda: rk.token_logprobs(x["logits"], ids, mask=p["mask"][:, : 5 if bad else 6], process_group=group),
        "width": lambda: linear(weight=x["weight"][:, : 7 if bad else 8]),
        "head's shard": lambda: linear(process_group=part),
        "float ids, linear": lambda: linear(ids=ids.float() if bad else ids),
        "bias": lambda: linear(bias=x["bias"][: 11 if bad else 12]),
        "temperature": lambda: linear(temperature=0 if bad else 1),
        "rows": lambda: linear(rows=torch.tensor([0, 18 if bad else 17])),
        "keep": lambda: linear(keep=keep._replace(offsets=keep.offsets + 1) if bad else keep),
        "loss": lambda: rk.fused_linear_policy_loss(
            x["hidden"], x["weight"][:, : 7 if bad else 8], ids, p["old"], p["advantages"], process_group=group
        ),
        "own loss": lambda: rk.fused_linear_loss(x["hidden"], x["weight"], ids[: 2 if bad else 3], lambda lp, h: -lp, process_group=group),
    }
    return errors_of(attempts)


def test_what_is_bad_on_one_rank_is_an_error_on_all():
    expected = {
        "another shard": "VocabShard is of 11 tokens, but the tensor has 12",
        "no logits": "logits must be a torch.Tensor, got NoneType",
        "float ids": "ids must have a dtype of",
        "no ids": "ids must be a torch.Tensor, got NoneType",
        "mask": "mask must have shape \\(3, 6\\), got \\(3, 5\\)",
        "width": "weight must have shape \\[V, 8\\]",
        "head's shard": "VocabShard is of 11 tokens, but the tensor has 12",
        "float ids, linear": "ids must have a dtype of",
        "bias": "bias must have shape",
        "temperature": "temperature must be a number > 0",
        "rows": "rows must be different positions in \\[0, 18\\)",
        "keep": "keep.offsets must rise from 0",
        "loss": "weight must have shape \\[V, 8\\]",
        "own loss": "differ in number of tokens: \\[18, 12\\]",
    }
    assert_said_on_one_rank(on_ranks(2, fail_on_one_rank), expected)


# ---- DTensor --------------------------------------------------------------------------------------------------------------------------------


def dtensors_on_a_rank(rank: int, world: int) -> dict[str, list[Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    p = problem(world)
    x = inputs(p, None, world)
    mesh = init_device_mesh("cpu", (world,))
    divided = {"hidden": distribute_tensor(torch.nan_to_num(x["hidden"].detach()), mesh, [Replicate()])}
    divided |= {name: distribute_tensor(x[name].detach(), mesh, [Shard(0)]) for name in ("weight", "bias")}
    divided["logits"] = distribute_tensor(torch.nan_to_num(x["logits"].detach()), mesh, [Shard(-1)])
    divided = {name: t.requires_grad_() for name, t in divided.items()}
    whole = {name: torch.nan_to_num(t.detach()).requires_grad_() for name, t in x.items()}
    with pytest.raises(ValueError, match="process_group must be None, the group of the mesh"):
        rk.token_logprobs(divided["logits"], p["ids"], process_group=dist.new_group())
    with pytest.raises(ValueError, match=r"where each has its own \(FSDP\), pass rlkern.gather_parameter\(bias\)"):
        rk.linear_token_logprobs(whole["hidden"], divided["weight"], p["ids"], bias=divided["bias"])
    wrong = distribute_tensor(x["weight"].detach(), mesh, [Shard(1)])
    with pytest.raises(ValueError, match="divided along dimension 0"):
        rk.linear_token_logprobs(divided["hidden"], wrong, p["ids"])
    along_time = distribute_tensor(whole["hidden"].detach(), mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"divided along dimension 0 .*Shard\(dim=1\),?\)\. Transpose or pack them"):
        rk.linear_token_logprobs(along_time, divided["weight"], p["ids"])
    plain = {**divided, "hidden": whole["hidden"].detach().requires_grad_()}
    cases = {"logits": (False, divided, None), "linear": (True, divided, None), "linear, by a group": (True, plain, mesh.get_group())}
    shared = distribute_tensor(whole["hidden"].detach(), mesh, [Shard(0)])
    if world == 2:
        with pytest.raises(ValueError, match="hidden is a DTensor of 3 in the first dimension, which 2 ranks cannot share equally: pad it"):
            rk.linear_token_logprobs(shared, divided["weight"], p["ids"])
    else:
        cases["shared hidden states"] = True, {**divided, "hidden": shared.requires_grad_()}, None
        part = shared.to_local().detach().requires_grad_()
        shard = rk.VocabShard.of(divided["weight"].to_local().shape[0], mesh.get_group(), sequence_parallel=True)
        cases["shared hidden states, plain"] = True, {**divided, "hidden": part}, shard
    found = {}
    for name, (linear, given, group) in cases.items():
        mine, exact = loss_of(p, given, PRESETS["grpo"], linear=linear, process_group=group), loss_of(p, whole, PRESETS["grpo"], linear=linear)
        if name == "shared hidden states, plain":
            exact[3] = exact[3].chunk(world)[rank]
        found[name] = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in mine], exact
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_dtensors_say_how_they_are_divided(world):
    for found in on_ranks(world, dtensors_on_a_rank):
        for mine, exact in found.values():
            for a, b in zip(mine, exact, strict=True):
                assert_accurate(a, b, eps=5e-6)  # two sums in float32, of terms of about 1, in another order


def gathered_on_a_rank(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x = torch.arange(21.0).view(7, 3)
    up = torch.randn(world, 7, 3, generator=torch.Generator().manual_seed(0))
    meshes = {"fsdp": (init_device_mesh("cpu", (world,)), [Shard(0)])}
    if world == 4:
        meshes["hsdp"] = init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)]
    for mesh, placements in meshes.values():
        divided = distribute_tensor(x, mesh, placements).requires_grad_()
        whole = rk.gather_parameter(divided.to(torch.float64))
        assert torch.equal(whole, x.double())
        (whole * up[rank]).sum().backward()
        assert divided.grad is not None
        assert divided.grad.placements == tuple(placements)
        mean = up.double().mean(0)
        assert_accurate(divided.grad.full_tensor(), mean, eps=8 * rounding(torch.float32, mean))
    assert rk.gather_parameter(x) is x


@pytest.mark.parametrize("world", [2, 4])
def test_a_gathered_parameter_gets_the_mean_gradient_of_all_ranks(world):
    on_ranks(world, gathered_on_a_rank)


# ---- advantages -----------------------------------------------------------------------------------------------------------------------------


def trajectories() -> dict[str, Any]:
    """[5, 24] in float64: a sequence that is nowhere valid, one that is on some ranks alone, flags everywhere."""
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(5, 24, generator=g) > 0.3
    mask[1], mask[2, 6:20] = False, False
    shape = {"generator": g, "dtype": torch.float64}
    return {
        "rewards": torch.randn(5, 24, **shape).masked_fill(~mask, nan),
        "values": torch.randn(5, 24, **shape).masked_fill(~mask, nan),
        "mask": mask,
        "terminated": torch.rand(5, 24, generator=g) > 0.95,
        "truncated": torch.rand(5, 24, generator=g) > 0.95,
        "last_values": torch.randn(5, **shape),
        "gamma": torch.rand(5, **shape),
    }


def gae_on_a_rank(rank: int, world: int, backend: str) -> list[Tensor]:
    x = trajectories()
    sizes = [24 // world + (1 if i == 0 else 0) for i in range(world)]
    sizes[-1] = 24 - sum(sizes[:-1])
    mine = {name: t.split(sizes, 1)[rank] if t.dim() == 2 else t for name, t in x.items()}
    options = {"lam": 0.9, "time_group": dist.group.WORLD, "backend": backend}
    full = rk.gae(**mine, **options)
    white, _ = rk.gae(**mine, whitened=True, **options)
    plain = rk.gae(torch.nan_to_num(mine["rewards"]), torch.nan_to_num(mine["values"]), gamma=1.0, **options)
    return [*full, white, *plain]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_gae_over_a_sequence_that_ranks_share(world, backend):
    x = trajectories()
    whole = [*rk.gae(**x, lam=0.9), rk.gae(**x, lam=0.9, whitened=True)[0]]
    whole += rk.gae(torch.nan_to_num(x["rewards"]), torch.nan_to_num(x["values"]), gamma=1.0, lam=0.9)
    for exact, parts in zip(whole, zip(*on_ranks(world, gae_on_a_rank, backend), strict=True), strict=True):
        assert_accurate(torch.cat(parts, 1), exact, eps=1e-10)


def groups_on_a_rank(rank: int, world: int) -> list[Tensor]:
    rewards, ids, lengths = grouped()
    rows = slice(0, 5) if rank == 0 else slice(5, None)
    options = {"process_group": dist.group.WORLD, "validate": False}
    by_id = [rk.group_advantages(rewards[rows], group_ids=ids[rows], scale=scale, **options) for scale in ("group", "batch", "none")]
    weighted = rk.group_advantages(rewards[rows], group_ids=ids[rows], baseline="length-weighted", lengths=lengths[rows], **options)
    return [*by_id, weighted]


def grouped() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(12, generator=g)
    rewards[3] = nan
    return rewards, torch.tensor([4, 4, 1, 1, 7, 7, 4, 1, 1, 7, 4, 9]), torch.randint(1, 9, (12,), generator=g)


def test_groups_that_ranks_share():
    rewards, ids, lengths = grouped()
    whole = [rk.group_advantages(rewards, group_ids=ids, scale=scale, validate=False) for scale in ("group", "batch", "none")]
    whole.append(rk.group_advantages(rewards, group_ids=ids, baseline="length-weighted", lengths=lengths, validate=False))
    for exact, parts in zip(whole, zip(*on_ranks(2, groups_on_a_rank), strict=True), strict=True):
        assert torch.equal(torch.cat(parts), exact)


def test_errors_of_shared_sequences():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"time_group must be a torch\.distributed\.ProcessGroup, got str"):
        rk.gae(x, x, gamma=1.0, lam=1.0, time_group="world")
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup, got int"):
        rk.group_advantages(x[0], group_size=3, process_group=3)
