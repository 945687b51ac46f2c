"""Nothing that is counted got worse than bench/baseline.json says: bytes moved, launches, memory. What compilers make is in tests/test_compile.py."""

import pytest
import torch
import triton

from bench import guard

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted in Triton's interpreter, memory by the CPU's allocator")


@pytest.fixture(scope="module")
def now() -> dict:
    torch.use_deterministic_algorithms(False)  # which fills memory, and so takes some
    return guard.moved()


def test_kernels_move_no_more_bytes_in_no_more_launches(now):
    assert guard.worse(now["moved"], guard.read()["moved"]) == [], f"if this is meant: {guard.RENEW}"


def test_calls_need_no_more_memory(now):
    baseline = guard.read()
    if baseline["versions"]["torch"] != guard.base(torch.__version__):
        pytest.skip(f"the baseline is of torch {baseline['versions']['torch']}, this is {torch.__version__}: its own functions may need more or less")
    assert guard.worse(now["memory"], baseline["memory"]) == [], f"if this is meant: {guard.RENEW}"


def test_says_by_how_much():
    before = {"moved": {"a call": {"a_kernel": {"bytes loaded": 1000, "launches": 1}}}}
    assert guard.worse(before, before) == []
    now = {"moved": {"a call": {"a_kernel": {"bytes loaded": 1020, "launches": 2}}}}
    assert guard.worse(now, before) == [
        "moved, a call, a_kernel, bytes loaded: 1,020, was 1,000, +2.0%",
        "moved, a call, a_kernel, launches: 2, was 1, +100.0%",
    ]
    assert guard.worse(before, now) == []


def test_says_what_the_baseline_does_not_know():
    (line,) = guard.worse({"a call": {"a_kernel": {"launches": 1}}}, {})
    assert line == f"a call, a_kernel, launches: 1, and the baseline knows nothing of it; {guard.RENEW}"


def test_narrower_loads_are_worse():
    wide, narrow = ({"sm_90": {guard.LOADS: bits}} for bits in (128, 32))
    assert guard.worse(wide, narrow) == []
    assert guard.worse(narrow, wide) == [f"sm_90, {guard.LOADS}: 32, was 128, -75.0%"]


def test_worst_variant_of_a_launch_counts():
    variants = [
        {"target": "sm_90", "launch": "a", "kernel": "k", "spilled": 0, "registers": r, "loop_load_bits": w}
        for r, w in ((30, [128]), (40, [64, 128]))
    ]
    assert guard.compiled(variants) == {"sm_90": {"a": {"k": {"registers": 40, "bytes spilled": 0, guard.LOADS: 64}}}}


def test_baseline_names_the_compiler(capsys):
    versions = guard.read()["versions"]
    assert set(versions) == {"torch", "triton"}
    assert triton.__version__.split(".")[0] == versions["triton"].split(".")[0]
