"""Bytes moved by each kernel, counted in the interpreter and held to the floor: a second pass over the logits by accident fails here."""

import pytest
import torch
import triton
import triton.language as tl

from bench.traffic import traffic

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted in Triton's interpreter, which does not run on a GPU machine")


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def _count_kernel(x_ptr, sum_ptr, flag_ptr):
    tl.atomic_add(sum_ptr, tl.load(x_ptr + tl.program_id(0)))
    tl.atomic_cas(flag_ptr, 0, 1)


def test_counts_unmasked_lanes_by_element_size():
    x, y = torch.arange(100, dtype=torch.bfloat16), torch.empty(100, dtype=torch.float32)
    with traffic() as moved:
        _copy_kernel[(2,)](x, y, 100, BLOCK=64)
    assert torch.equal(x.float(), y)
    assert list(moved) == ["_copy_kernel"]
    copied = moved["_copy_kernel"]
    assert (copied.loaded, copied.stored, copied.launches, copied.total) == (200, 400, 1, 600)
    assert (moved.of(x).loaded, moved.of(x).stored, moved.of(y).loaded, moved.of(y).stored) == (200, 0, 0, 400)
    assert (moved.of(x[:64]).loaded, moved.of(x[64:]).loaded) == (128, 72)
    assert (moved.loaded, moved.stored, moved.total, moved.launches) == (200, 400, 600, 1)


def test_counts_atomics_and_launches():
    x, total, flag = torch.ones(3), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    with traffic() as moved:
        _count_kernel[(3,)](x, total, flag)
        _count_kernel[(3,)](x, total, flag)
    assert total.item() == 6
    assert (moved["_count_kernel"].loaded, moved["_count_kernel"].stored, moved["_count_kernel"].launches) == (6 * 12, 6 * 8, 2)
    with pytest.raises(KeyError, match="_copy_kernel was not launched"):
        moved["_copy_kernel"]


def test_stops_counting_afterwards():
    x, y = torch.zeros(4), torch.empty(4)
    with traffic() as moved:
        pass
    _copy_kernel[(1,)](x, y, 4, BLOCK=4)
    assert len(moved) == 0
    assert moved.total == 0
