"""The recursions over time, both backends against the float64 reference, by identities, and by hand."""

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rlkern as rk
from bench.traffic import traffic
from rlkern import reference
from rlkern.ops import scan as ops
from rlkern.ops.torch_backend import scan as scan_on_torch
from rlkern.ops.triton_backend import scan as launcher
from rlkern.ops.triton_backend.scan import TileConfig

from .judge import assert_accurate, error, opcheck

nan = math.nan


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 2 rows x 16 steps, so that short rows need several: the interpreter walks every lane of a tile."""
    monkeypatch.setattr(TileConfig, "of", classmethod(lambda cls, length, heavy: cls(rows=2, lanes=4, warps=1)))


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def some(*shape: int, p: float = 0.2) -> Tensor:
    return torch.rand(shape) < p


def to(x: Any, *args: Any) -> Any:
    return x.to(*args) if isinstance(x, Tensor) else x


def in_dtype(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in options.items()}


B, T = 3, 33


def boundaries() -> dict[str, dict[str, Any]]:
    torch.manual_seed(1)
    mask = some(B, T, p=0.6)
    mask[0, :9] = mask[0, -5:] = mask[2] = False  # padded on both sides; nothing valid
    flags = {"terminated": some(B, T), "truncated": some(B, T)}
    flags["truncated"][1, -1] = True
    last, final = {"last_values": numbers(B)}, {"next_values": numbers(B, T)}
    return {
        "none": {},
        "last_values": last,
        "terminated": {"terminated": flags["terminated"], **last},
        "truncated": {"truncated": flags["truncated"], **last},
        "next_values": {**flags, **final, **last},
        "rates": {"gamma": torch.rand(B, dtype=torch.float64), "lam": torch.rand(B, dtype=torch.float64)},
        "skip": {"mask": mask},
        "skip, all": {"mask": mask, **flags, **final, **last},
        "skip, truncated": {"mask": mask, "truncated": flags["truncated"], **last},
        "decay": {"mask": mask, "masked": "decay"},
        "decay, all": {"mask": mask, "masked": "decay", **flags, **final, **last},
        "decay, truncated": {"mask": mask, "masked": "decay", "truncated": flags["truncated"]},
    }


BOUNDARIES = boundaries()


# ---- against the reference ------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", BOUNDARIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gae(case, dtype, backend, device):
    options = in_dtype({"gamma": 0.97, "lam": 0.9, **BOUNDARIES[case]}, dtype)
    r, v = numbers(B, T, dtype=dtype), numbers(B, T, dtype=dtype)
    exact = reference.gae(r.double(), v.double(), **in_dtype(options, torch.float64))
    peer = reference.gae(r, v, **options)
    results = rk.gae(r.to(device), v.to(device), backend=backend, **{k: to(x, device) for k, x in options.items()})
    for ours, theirs, truth in zip(results, peer, exact, strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_accurate(ours, truth, theirs, eps=1e-13 if dtype == torch.float64 else 1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", BOUNDARIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_vtrace(case, dtype, backend, device):
    options = in_dtype({"gamma": 0.97, "lam": 0.9, "rho_clip": 1.2, "c_clip": 0.9, **BOUNDARIES[case]}, dtype)
    inputs = [numbers(B, T, dtype=dtype) for _ in range(4)]
    exact = reference.vtrace(*(x.double() for x in inputs), **in_dtype(options, torch.float64))
    peer = reference.vtrace(*inputs, **options)
    results = rk.vtrace(*(x.to(device) for x in inputs), backend=backend, **{k: to(x, device) for k, x in options.items()})
    for ours, theirs, truth in zip(results, peer, exact, strict=True):
        assert_accurate(ours, truth, theirs, eps=1e-13 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 31, 64, 1000, 8192])
def test_lengths(length, backend, device):
    r, v = numbers(2, 1, length, dtype=torch.float32)
    exact, peer = (reference.gae(r.to(dtype), v.to(dtype), gamma=1.0, lam=1.0) for dtype in (torch.float64, torch.float32))
    for ours, theirs, truth in zip(rk.gae(r.to(device), v.to(device), gamma=1.0, lam=1.0, backend=backend), peer, exact, strict=True):
        assert_accurate(ours, truth, theirs, eps=1e-6 * max(1.0, float(truth.abs().max())))


def test_long_rows_on_the_cpu():
    r, v = numbers(2, 2, 131072, dtype=torch.float32)
    total = r.double().flip(1).cumsum(1).flip(1)
    advantages, returns = rk.gae(r, v, gamma=1.0, lam=1.0, backend="torch")
    scale = float(total.abs().max())
    assert_accurate(returns, total, eps=2e-6 * scale)  # 16 units in the last place, of sums of 100,000 terms
    assert_accurate(advantages, total - v.double(), eps=2e-6 * scale)


@pytest.fixture
def many_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that a few rows leave idle, and tiles of 4 steps."""
    monkeypatch.setattr(TileConfig, "of", classmethod(lambda cls, length, heavy: cls(rows=1, lanes=1, warps=1)))
    monkeypatch.setattr(launcher, "multiprocessors", lambda x: 132)


def assert_split(launches: int, options: dict[str, Any], r: Tensor, v: Tensor, device: torch.device) -> None:
    exact = reference.gae(r, v, gamma=0.97, lam=0.9, **options)
    options = {k: to(x, device) for k, x in options.items()}
    with contextlib.nullcontext() if torch.cuda.is_available() else traffic() as moved:
        results = rk.gae(r.to(device), v.to(device), gamma=0.97, lam=0.9, backend="triton", **options)
    for ours, truth in zip(results, exact, strict=True):
        assert_accurate(ours, truth, eps=1e-13)
    assert moved is None or moved.launches == launches


@pytest.mark.usefixtures("many_multiprocessors")
@pytest.mark.parametrize("case", ["skip, all", "decay, all"])
def test_few_long_rows_are_split(case, device):
    """Two launches in place of one: summaries of the tiles, then each tile from those that follow it."""
    assert_split(2, BOUNDARIES[case], *numbers(2, B, T), device)


@pytest.mark.usefixtures("many_multiprocessors")
def test_few_long_sequences_are_split(device):
    assert_split(2, {"cu_seqlens": torch.tensor([0, 64, 64])}, *numbers(2, 64), device)


@pytest.mark.usefixtures("many_multiprocessors")
def test_rows_of_two_numbers_are_not_split(device):
    assert_split(1, BOUNDARIES["skip, truncated"], *numbers(2, B, T), device)


# ---- identities -----------------------------------------------------------------------------------------------------------------------------


def test_gae_is_the_explicit_sum(backend, device):
    r, v = numbers(2, 2, 20).to(device)
    gamma, lam = 0.9, 0.8
    v_next = torch.cat([v[:, 1:], torch.zeros(2, 1, device=device)], 1)
    delta = r + gamma * v_next - v
    explicit = torch.stack([sum((gamma * lam) ** k * delta[:, t + k] for k in range(20 - t)) for t in range(20)], 1)
    assert_accurate(rk.gae(r, v, gamma=gamma, lam=lam, backend=backend)[0], explicit, eps=1e-13)


@pytest.mark.usefixtures("small_tiles")
def test_lam_one_is_returns_minus_values(backend, device):
    r, v = numbers(2, 2, 33).to(device)
    options = {"gamma": 0.9, "mask": some(2, 33, p=0.7).to(device), "backend": backend}
    advantages, returns = rk.gae(r, v, lam=1.0, **options)
    discounted = rk.discounted_returns(r, **options)
    assert_accurate(returns, discounted, eps=1e-13)
    assert_accurate(advantages, torch.where(options["mask"], discounted - v, 0.0), eps=1e-13)


@pytest.mark.usefixtures("small_tiles")
def test_lam_zero_is_the_td_error(backend, device):
    r, v = numbers(2, 2, 33).to(device)
    advantages, _ = rk.gae(r, v, gamma=0.9, lam=0.0, backend=backend)
    assert_accurate(advantages, r + 0.9 * torch.cat([v[:, 1:], torch.zeros(2, 1, device=device)], 1) - v, eps=1e-14)


@pytest.mark.usefixtures("small_tiles")
def test_td_lambda_is_the_returns_of_gae(backend, device):
    r, v = numbers(2, B, T).to(device)
    options = {k: to(x, device) for k, x in BOUNDARIES["skip, all"].items()}
    returns = rk.gae(r, v, gamma=0.9, lam=0.8, backend=backend, **options)[1]
    assert torch.equal(rk.td_lambda(r, v, gamma=0.9, lam=0.8, backend=backend, **options), returns)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", BOUNDARIES)
def test_vtrace_at_ratio_one_is_gae(case, backend, device):
    options = {"gamma": 0.97, "lam": 0.9, **{k: to(x, device) for k, x in BOUNDARIES[case].items()}}
    r, v, lp = numbers(3, B, T).to(device)
    for ours, theirs in zip(rk.vtrace(r, v, lp, lp, backend=backend, **options), rk.gae(r, v, backend=backend, **options), strict=True):
        assert_accurate(ours, theirs, eps=1e-12)


def compacted(x: Any, keep: Tensor) -> Any:
    return x[..., keep] if isinstance(x, Tensor) and x.dim() and x.shape[-1] == len(keep) else x


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_skip_is_the_compacted_sequence(dtype, backend, device):
    """Flags and all; bitwise on the torch backend, to rounding where the lanes of a tile fall differently."""
    length = 300 if backend == "torch" else 40  # several chunks, or several tiles
    keep = some(length, p=0.6)
    keep[0] = keep[-1] = False
    names = ("next_values", "terminated", "truncated")
    options = dict(zip(names, (numbers(length, dtype=dtype), some(length), some(length)), strict=True))
    options |= {"last_values": numbers(dtype=dtype), "gamma": 0.97, "lam": 0.9}
    r, v = numbers(2, length, dtype=dtype)
    for chosen in (options, {"gamma": 1.0, "lam": 0.95}):
        chosen = {k: to(x, device) for k, x in chosen.items()}
        whole = rk.gae(r.to(device), v.to(device), mask=keep.to(device), backend=backend, **chosen)
        alone = rk.gae(r[keep].to(device), v[keep].to(device), backend=backend, **{k: compacted(x, keep) for k, x in chosen.items()})
        for a, b in zip(whole, alone, strict=True):
            assert error(a[keep], b) <= (0 if backend == "torch" else 1e-13 if dtype == torch.float64 else 2e-6)
            assert not a[~keep].any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("masked", ["skip", "decay"])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_packed_is_padded(masked, integers, backend, device):
    lengths = [5, 0, 1, 23, 17]
    cu_seqlens = torch.tensor([0, *lengths], dtype=integers).cumsum(0, dtype=integers).to(device)
    tokens = sum(lengths)
    r, v, final = numbers(3, tokens).to(device)
    each = {"mask": some(tokens, p=0.7), "terminated": some(tokens), "truncated": some(tokens), "next_values": final}
    rows = {"last_values": numbers(5), "gamma": torch.rand(5).double(), "lam": torch.rand(5).double()}
    each, rows = ({k: x.to(device) for k, x in d.items()} for d in (each, rows))
    packed = rk.gae(r, v, masked=masked, cu_seqlens=cu_seqlens, backend=backend, **each, **rows)
    for i, n in enumerate(lengths):
        piece = slice(int(cu_seqlens[i]), int(cu_seqlens[i]) + n)
        options = {k: x[piece] for k, x in each.items()} | {k: x[i] for k, x in rows.items()}
        for a, b in zip(packed, rk.gae(r[piece], v[piece], masked=masked, backend=backend, **options), strict=True):
            assert_accurate(a[piece], b, eps=1e-13)


@pytest.mark.usefixtures("small_tiles")
def test_packed_vtrace_is_the_reference(backend, device):
    cu_seqlens = torch.tensor([0, 30, 30, 49])
    inputs = numbers(4, 49)
    exact = reference.vtrace(*inputs, gamma=0.9, cu_seqlens=cu_seqlens)
    for ours, truth in zip(rk.vtrace(*inputs.to(device), gamma=0.9, cu_seqlens=cu_seqlens.to(device), backend=backend), exact, strict=True):
        assert_accurate(ours, truth, eps=1e-13)


@pytest.mark.usefixtures("small_tiles")
def test_nothing_passes_a_boundary(backend, device):
    """Not even NaN: from one packed sequence to another, or through the end of an episode."""
    r, v = numbers(2, 40).to(device)
    r[30] = nan
    cu_seqlens = torch.tensor([0, 25, 40], device=device)
    advantages, returns = rk.gae(r, v, gamma=0.9, lam=0.8, cu_seqlens=cu_seqlens, backend=backend)
    assert advantages[25:31].isnan().all()
    assert not advantages[:25].isnan().any()
    assert not advantages[31:].isnan().any()
    terminated = torch.zeros(40, device=device)
    terminated[24] = 1
    ended = rk.gae(r, v, gamma=0.9, lam=0.8, terminated=terminated, backend=backend)
    assert error(ended[0], advantages) < 1e-13
    assert error(ended[1], returns) < 1e-13


# ---- by hand --------------------------------------------------------------------------------------------------------------------------------


def test_truncation_bootstraps(backend, device):
    """gamma = 0.5, lam = 1, one reward of 1 a step, V = 2, 4, 6, 8; V of the observation after step 1 is 10, beyond the end 3."""
    r, v = torch.ones(1, 4, device=device), torch.tensor([[2.0, 4.0, 6.0, 8.0]], device=device)
    at_1 = torch.tensor([[0, 1, 0, 0]], device=device)
    options = {"gamma": 0.5, "lam": 1.0, "last_values": torch.tensor([3.0], device=device), "backend": backend}
    tail = [2.25, 2.5]  # 1 + 0.5 * 2.5; 1 + 0.5 * 3
    cases = {
        (None, None): [1 + 0.5 * 2.125, 2.125, *tail],  # 1 + 0.5 * 2.25
        ("terminated", None): [1.5, 1.0, *tail],
        ("truncated", None): [3.0, 4.0, *tail],  # 1 + 0.5 * V_2
        ("truncated", 10.0): [4.0, 6.0, *tail],
        ("both", 10.0): [1.5, 1.0, *tail],
    }
    for (flag, final), returns in cases.items():
        flags = {} if flag is None else dict.fromkeys(("terminated", "truncated") if flag == "both" else (flag,), at_1)
        if final is not None:
            flags["next_values"] = torch.tensor([[nan, final, nan, nan]], device=device)  # read where truncated, nowhere else
        advantages, ours = rk.gae(r, v, **options, **flags)
        assert ours.tolist() == [returns], (flag, final)
        assert advantages.tolist() == [[a - b for a, b in zip(returns, [2.0, 4.0, 6.0, 8.0], strict=True)]]


def test_masked_steps(backend, device):
    """V = 1, 2, 4 with a masked step before the last, gamma = lam = 0.5: skipped, or a step of r = V = 0."""
    r = torch.tensor([1.0, 1.0, nan, 1.0], device=device)
    v = torch.tensor([1.0, 2.0, nan, 4.0], device=device)
    mask = torch.tensor([2.0, 1.0, 0.0, 1.0], device=device)  # any number that is not 0 counts
    skip, decay = (rk.gae(r, v, gamma=0.5, lam=0.5, mask=mask, masked=how, backend=backend)[0].tolist() for how in ("skip", "decay"))
    assert skip == [1.0 + 0.25 * 0.25, 1 + 0.5 * 4 - 2 + 0.25 * -3, 0.0, -3.0]
    through = 0.5 * 4 + 0.25 * -3  # the masked step's own
    assert decay == [1 + 1 - 1 + 0.25 * (1 - 2 + 0.25 * through), 1 - 2 + 0.25 * through, 0.0, -3.0]


def test_vtrace_by_hand(backend, device):
    """Two steps, ratios 4 and 1/2, clips 2 and 1, gamma = 1."""
    r, v = torch.tensor([1.0, 2.0], device=device), torch.tensor([3.0, 5.0], device=device)
    lp, old = torch.tensor([4.0, 0.5], device=device).log(), torch.zeros(2, device=device)
    advantages, targets = rk.vtrace(r, v, lp, old, gamma=1.0, rho_clip=2.0, c_clip=1.0, backend=backend)
    last = 5 + 0.5 * (2 - 5)
    assert_accurate(targets, torch.tensor([3 + 2 * (1 + 5 - 3) + 1 * (last - 5), last]), eps=1e-6)
    assert_accurate(advantages, torch.tensor([2 * (1 + last - 3), 0.5 * (2 - 5)]), eps=1e-6)


def test_discounted_returns(backend, device):
    r = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, nan, 4.0, 8.0]], device=device)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]], device=device)
    ended = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0]], device=device)
    assert rk.discounted_returns(r, gamma=0.5, mask=mask, backend=backend).tolist() == [[4.0, 6.0, 8.0, 8.0], [5.0, 0.0, 8.0, 8.0]]
    assert rk.discounted_returns(r, gamma=0.5, mask=mask, masked="decay", backend=backend)[1].tolist() == [3.0, 0.0, 8.0, 8.0]
    assert rk.discounted_returns(r, gamma=0.5, mask=mask, terminated=ended, backend=backend).tolist() == [[2.0, 2.0, 8.0, 8.0], [5.0, 0.0, 8.0, 8.0]]
    packed = rk.discounted_returns(r[0], gamma=1.0, cu_seqlens=torch.tensor([0, 3, 4], device=device), backend=backend)
    assert packed.tolist() == [7.0, 6.0, 4.0, 8.0]


# ---- promises -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("masked", ["skip", "decay"])
def test_masked_steps_are_not_read(masked, backend, device):
    clean = dict(zip(("rewards", "values", "logprobs", "old_logprobs", "next_values"), numbers(5, B, T).to(device), strict=True))
    flags = {"terminated": some(B, T).to(device).double(), "truncated": some(B, T).to(device).double()}
    mask = BOUNDARIES["skip"]["mask"].to(device)
    dirty = {k: x.masked_fill(~mask, nan) for k, x in (clean | flags).items()}  # a flag of NaN would count as set
    results = [
        rk.vtrace(**inputs, gamma=0.9, lam=0.8, mask=mask, masked=masked, backend=backend)
        for inputs in ({k: x.masked_fill(~mask, 0) for k, x in (clean | flags).items()}, dirty)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert not a[~mask].any()


@pytest.mark.usefixtures("small_tiles")
def test_layouts(backend, device):
    """Any rank, and strides as they come; inputs stay as they are."""
    r, v, mask = numbers(2, 3, 18).to(device), numbers(2, 3, 18).to(device), some(2, 3, 18, p=0.7).to(device)
    last = numbers(2, 3).to(device)
    flat = rk.gae(r.view(6, 18), v.view(6, 18), gamma=0.9, lam=0.8, mask=mask.view(6, 18), last_values=last.view(6), backend=backend)
    wide = torch.cat([v, v], -1)
    layouts = [
        (r, v, mask, last),
        (r, wide[..., :18], torch.cat([~mask, mask], -1)[..., 18:], last),
        (r.mT.contiguous().mT, v.transpose(0, 1).contiguous().transpose(0, 1), mask.mT.contiguous().mT, last.T.contiguous().T),
    ]
    for r_, v_, mask_, last_ in layouts:
        for a, b in zip(rk.gae(r_, v_, gamma=0.9, lam=0.8, mask=mask_, last_values=last_, backend=backend), flat, strict=True):
            assert torch.equal(a.view(6, 18), b)
    assert torch.equal(wide, torch.cat([v, v], -1))
    one = rk.gae(r[0, 0], v[0, 0], gamma=0.9, lam=0.8, mask=mask[0, 0], last_values=last[0, 0], backend=backend)
    assert error(one[0], flat[0][0]) < 1e-14


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 4)])
def test_empty(shape, backend, device):
    x = torch.empty(shape, device=device)
    for result in (*rk.gae(x, x, gamma=0.9, lam=0.9, backend=backend), rk.discounted_returns(x, gamma=0.9, backend=backend)):
        assert result.shape == shape
    if len(shape) == 1:
        cu_seqlens = torch.zeros(3, dtype=torch.int32, device=device)
        assert rk.gae(x, x, gamma=0.9, lam=0.9, cu_seqlens=cu_seqlens, backend=backend)[0].shape == (0,)


def test_dtypes_mix(backend, device):
    r, v = numbers(1, 6).to(device), numbers(1, 6).to(device)
    half = v.bfloat16()
    assert rk.gae(r.float(), half, gamma=0.9, lam=0.9, backend=backend)[0].dtype == torch.float32
    mixed = rk.gae(r.float(), v, gamma=0.9, lam=0.9, backend=backend)[0]
    assert mixed.dtype == torch.float64
    assert_accurate(mixed, reference.gae(r.float(), v, gamma=0.9, lam=0.9)[0], eps=1e-14)


def test_results_are_data(backend, device):
    r, v = torch.randn(2, 1, 6, device=device, requires_grad=True)
    gamma = torch.tensor([0.9], device=device, requires_grad=True)
    lp = torch.zeros(1, 6, device=device, requires_grad=True)
    for result in (*rk.gae(r, v, gamma=gamma, lam=0.9, backend=backend), *rk.vtrace(r, v, lp, lp, gamma=gamma, backend=backend)):
        assert not result.requires_grad


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ["none", "skip, all", "decay, all", "rates"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_whitened_is_whiten_of_the_advantages(case, dtype, backend, device):
    options = {k: to(x, device) for k, x in in_dtype({"gamma": 0.97, "lam": 0.9, **BOUNDARIES[case]}, dtype).items()}
    r, v = 100 + numbers(B, T, dtype=dtype).to(device), numbers(B, T, dtype=dtype).to(device)
    advantages, returns = rk.gae(r, v, backend=backend, **options)
    white, same = rk.gae(r, v, whitened=True, backend=backend, **options)
    assert torch.equal(same, returns)
    assert_accurate(white, reference.whiten(advantages.double(), options.get("mask")), eps=1e-10 if dtype == torch.float64 else 2e-6)


def test_whitening_packed_tokens_and_few_long_rows(backend, device, monkeypatch):
    r, v = numbers(1, 5000, dtype=torch.float32).to(device), numbers(1, 5000, dtype=torch.float32).to(device)
    monkeypatch.setattr(launcher, "multiprocessors", lambda x: 10**6)  # split in two launches on any device
    white, _ = rk.gae(r, v, gamma=0.9, lam=0.9, whitened=True, backend=backend)
    assert_accurate(white, reference.whiten(rk.gae(r, v, gamma=0.9, lam=0.9, backend="torch")[0].double()), eps=4e-6)
    cu = torch.tensor([0, 7, 7, 60], device=device)
    mask = some(60).to(device)
    options = {"gamma": 0.9, "lam": 0.9, "cu_seqlens": cu, "mask": mask, "backend": backend}
    white, _ = rk.gae(r[0, :60], v[0, :60], whitened=True, **options)
    assert_accurate(white, reference.whiten(rk.gae(r[0, :60], v[0, :60], **options)[0].double(), mask), eps=4e-6)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1, 1)])
def test_whitening_next_to_nothing(shape, backend, device):
    x = torch.ones(shape, device=device)
    white, _ = rk.gae(x, x, gamma=0.9, lam=0.9, whitened=True, backend=backend)
    assert white.shape == shape
    assert not white.any()


@pytest.mark.usefixtures("small_tiles")
def test_opcheck(backend, device):
    r, v, lp, old, final = (numbers(2, 9, dtype=torch.float32).to(device) for _ in range(5))
    flags = [some(2, 9).to(device) for _ in range(3)]
    rates, none = ops.Numbers(0.9, 0.8, 1.0, 1.0), ops.Sequences(None, None, None, None)
    everything, nothing = ops.ScanOptions(False, True, True), ops.ScanOptions(False, False, False)
    opcheck(ops.lambda_returns, ops.Steps(r, v, lp, old, flags[0], final, *flags[1:]), none, rates, everything, True, backend)
    opcheck(ops.lambda_returns, ops.Steps(r, *(None,) * 7), none, rates, nothing, True, backend)
    cu_seqlens = torch.tensor([0, 4, 9], device=device)
    last = numbers(2, dtype=torch.float32).to(device)
    sequences = ops.Sequences(last, cu_seqlens, last, last)
    opcheck(ops.lambda_returns, ops.Steps(r[0], v[0], *(None,) * 6), sequences, rates, everything, True, backend)
    opcheck(ops.normalise, r, flags[0], torch.tensor([18.0, 1.0, 20.0], dtype=torch.float64, device=device), 1e-8, backend)


@pytest.mark.usefixtures("small_tiles")
def test_compile(backend, device):
    r, v = numbers(2, 12, dtype=torch.float32).to(device)
    mask, cu_seqlens = some(12, p=0.7).to(device), torch.tensor([0, 5, 12], device=device)

    def together(r: Tensor, v: Tensor, mask: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
        advantages, returns = rk.gae(r, v, gamma=0.9, lam=0.8, mask=mask, cu_seqlens=cu_seqlens, backend=backend)
        discounted = rk.discounted_returns(r, gamma=0.9, cu_seqlens=cu_seqlens, backend=backend)
        return [advantages, returns, discounted, *rk.vtrace(r, v, v, v, gamma=0.9, cu_seqlens=cu_seqlens, backend=backend)]

    compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(r, v, mask, cu_seqlens), together(r, v, mask, cu_seqlens), strict=True):
        assert torch.equal(a, b)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rewards": ({"rewards": [1.0]}, TypeError, "rewards must be a torch.Tensor, got list"),
    "integers": ({"rewards": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "rewards must have a dtype of .*; got torch.int64"),
    "scalar": ({"rewards": torch.tensor(1.0)}, ValueError, "rewards must have at least 1 dimension"),
    "values": ({"values": torch.ones(2, 5)}, ValueError, r"values must have shape \(2, 4\), got \(2, 5\)"),
    "no values": ({"values": None}, TypeError, "values must be a torch.Tensor, got NoneType"),
    "mask": ({"mask": torch.ones(4)}, ValueError, r"mask must have shape \(2, 4\), got \(4,\)"),
    "masked": ({"masked": "drop"}, ValueError, "masked must be one of 'skip', 'decay'; got 'drop'"),
    "gamma": ({"gamma": 1.5}, ValueError, "gamma must be a number >= 0 and <= 1, got 1.5"),
    "lam": ({"lam": "1"}, TypeError, "lam must be a number, got str"),
    "gammas": ({"gamma": torch.ones(4)}, ValueError, r"gamma must have shape \(2,\), got \(4,\)"),
    "last_values": ({"last_values": torch.ones(2, 1)}, ValueError, r"last_values must have shape \(2,\), got \(2, 1\)"),
    "next_values": ({"next_values": torch.ones(2, 3)}, ValueError, r"next_values must have shape \(2, 4\)"),
    "truncated": ({"truncated": True}, TypeError, "truncated must be a torch.Tensor, got bool"),
    "padded and packed": ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, r"rewards must have shape \[tokens\] with cu_seqlens, got \(2, 4\)"),
    "backend": ({"backend": "cuda"}, ValueError, "'cuda' is not a backend"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    changes, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        rk.gae(**{"rewards": torch.ones(2, 4), "values": torch.ones(2, 4), "gamma": 0.9, "lam": 0.9} | changes)


def test_errors_of_packed_and_of_vtrace(device):
    x = torch.ones(5, device=device)
    for ends, message in (([0, 3], "rise from 0 to the number of tokens, 5"), ([0, 4, 2, 5], "rise from 0"), ([[0, 5]], r"shape \[sequences \+ 1\]")):
        with pytest.raises(ValueError, match=message):
            rk.gae(x, x, gamma=1.0, lam=1.0, cu_seqlens=torch.tensor(ends, device=device), validate=True)
    with pytest.raises(ValueError, match=r"last_values must have shape \(1,\), got \(5,\)"):
        rk.gae(x, x, gamma=1.0, lam=1.0, last_values=x, cu_seqlens=torch.tensor([0, 5], device=device))
    with pytest.raises(ValueError, match="rho_clip must be a number > 0, got 0"):
        rk.vtrace(x, x, x, x, gamma=1.0, rho_clip=0)
    with pytest.raises(TypeError, match=r"old_logprobs must be a torch\.Tensor, got NoneType"):
        rk.vtrace(x, x, x, None, gamma=1.0)  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("masked", ["skip", "decay"])
@pytest.mark.parametrize("function", ["gae", "td_lambda", "vtrace"])
def test_next_values_bootstrap_the_end(function, masked, backend, device):
    """Without last_values, V beyond the end is next_values at the last valid step; other entries are not read."""
    r, v, following = (numbers(4, 9).to(device) for _ in range(3))
    mask = some(4, 9).to(device)
    mask[1, -3:], mask[2], mask[3, -1] = 0, 0, 1
    position = torch.where(mask != 0, torch.arange(9, device=device), -1).amax(1)
    last = torch.where(position >= 0, following.gather(1, position.clamp(min=0)[:, None])[:, 0], 0.0)
    read = torch.zeros_like(mask, dtype=torch.bool).scatter_(1, position.clamp(min=0)[:, None], True) & (mask != 0)
    policies = [numbers(4, 9).to(device) for _ in range(2)] if function == "vtrace" else []
    options = {"gamma": 0.9, "lam": 0.8, "mask": mask, "masked": masked, "backend": backend}
    mine = getattr(rk, function)(r, v, *policies, next_values=following.masked_fill(~read, torch.nan), **options)
    exact = getattr(rk, function)(r, v, *policies, last_values=last, **options)
    specified = getattr(reference, function)(r, v, *policies, next_values=following, **{k: x for k, x in options.items() if k != "backend"})
    together = zip(*((x if isinstance(x, tuple) else (x,)) for x in (mine, exact, specified)), strict=True)
    for a, b, c in together:
        assert torch.equal(a, b)
        assert_accurate(a, c, eps=1e-12)
    cu = torch.arange(5, device=device) * 9
    packed = getattr(rk, function)(
        r.flatten(),
        v.flatten(),
        *(x.flatten() for x in policies),
        next_values=following.flatten(),
        cu_seqlens=cu,
        **options | {"mask": mask.flatten()},
    )
    for a, b in zip(packed if isinstance(packed, tuple) else (packed,), exact if isinstance(exact, tuple) else (exact,), strict=True):
        assert_accurate(a.view(4, 9), b, eps=1e-12)


def test_next_values_of_empty_sequences(backend, device):
    r, v, following = (numbers(5).to(device) for _ in range(3))
    cu = torch.tensor([0, 0, 2, 2, 5, 5], device=device)
    found = rk.gae(r, v, gamma=0.9, lam=0.8, next_values=following, cu_seqlens=cu, backend=backend)
    last = torch.stack([following.new_zeros(()), following[1], following.new_zeros(()), following[4], following.new_zeros(())])
    assert torch.equal(found[0], rk.gae(r, v, gamma=0.9, lam=0.8, last_values=last, cu_seqlens=cu, backend=backend)[0])


@pytest.mark.parametrize("lam", [0.95, 1.0])
def test_no_nan_passes_an_end_of_an_episode(lam, backend, device):
    """Also through the chunks in which a long row is scanned: the end lies in the middle of one."""
    time = 5 * scan_on_torch.CHUNK
    end = 2 * scan_on_torch.CHUNK + 7
    rewards, values = torch.randn(2, 1, time, dtype=torch.float64).to(device)
    clean = rewards.clone()
    rewards[0, -1] = torch.nan
    terminated = torch.zeros(1, time, device=device)
    terminated[0, end] = 1
    advantages, _ = rk.gae(rewards, values, gamma=0.99, lam=lam, terminated=terminated, backend=backend)
    exact, _ = reference.gae(clean, values, gamma=0.99, lam=lam, terminated=terminated)
    assert_accurate(advantages[0, : end + 1], exact[0, : end + 1], eps=1e-9)
    assert bool(advantages[0, end + 1 :].isnan().all())
