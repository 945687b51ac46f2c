"""Kernels with known faults, for the tests of bench.compile: one loads in narrow pieces, one spills, one does not compile."""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr, tl.sum(total, 0))


@triton.jit
def narrow_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at * n, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr, tl.sum(total, 0))


@triton.jit
def identity(x):
    return x


@triton.jit
def options_kernel(x_ptr, o, TERM: tl.constexpr):
    tl.store(x_ptr, TERM(tl.load(x_ptr)) * o[0] + o[1])


@triton.jit
def broken_kernel(x_ptr, n, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.zeros([2 * BLOCK], tl.float32))


def _launch(kernel: Any, *, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
    kernel[(1,)](torch.empty(65536, dtype=dtype), torch.empty(1), 65536, **options)


LAUNCHES = {
    "wide bf16": lambda: _launch(sum_kernel, BLOCK=2048),
    "wide fp32": lambda: _launch(sum_kernel, dtype=torch.float32, BLOCK=2048),
    "the same again": lambda: _launch(sum_kernel, BLOCK=2048),
    "narrow": lambda: _launch(narrow_kernel, BLOCK=2048),
    "spills": lambda: _launch(sum_kernel, BLOCK=8192, num_warps=1),
    "options": lambda: options_kernel[(1,)](torch.empty(1), (1.0, 2.0), TERM=identity),
    "broken": lambda: broken_kernel[(1,)](torch.empty(8), 8, BLOCK=8),
}
