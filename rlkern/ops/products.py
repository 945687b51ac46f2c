"""Products with the head: exact, added up in float32 at least, rounded once; and how many rows of logits are alive at once."""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_rows(vocabulary: int, logits_dtype: torch.dtype, operand: torch.dtype, device: torch.device, chunk_bytes: int | None) -> int:
    """Rows of logits, and of their gradient where that is of another dtype, that are alive at once.

    By default 64 MiB of them on a CPU, 2 GiB on a GPU: each chunk reads and writes the head's whole gradient once.
    """
    row = vocabulary * (logits_dtype.itemsize + (0 if operand == logits_dtype else operand.itemsize))
    if chunk_bytes is not None:
        return max(1, chunk_bytes // row)
    if device.type == "cpu":
        return min(512, max(64, (64 << 20) // row))
    return min(4096, max(512, (2 << 30) // row // 128 * 128))


# Elements of an operand that a CPU widens at once: 16 MiB of float32.
BLOCK = 4 << 20


def product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b: exact products, added up in float32 (float64 for that), and rounded to the dtype of ``out`` once."""
    beta = 1 if accumulate else 0  # with 0, what ``out`` held is not read
    if a.device.type == "cpu" and (a.dtype != b.dtype or a.dtype != out.dtype or a.dtype.itemsize < 4):
        product_of_blocks(a, b, out, accumulate)
    elif a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    else:  # tensor cores multiply 16-bit numbers exactly and add in float32: only the rounding of the result is left out
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=beta, out=out)


def product_of_blocks(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """:func:`product` where there is none of such dtypes: by float32 products, for which a block of the longest dimension is widened at a time."""
    (n, k), m = a.shape, b.shape[1]
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    total = out if out.dtype == wide else out.to(wide)
    if k >= max(n, m):
        step = max(1, BLOCK // max(n, m, 1))
        for i in range(0, k, step):
            torch.addmm(total, a[:, i : i + step].to(wide), b[i : i + step].to(wide), beta=1 if accumulate or i else 0, out=total)
    elif m >= n:
        step, a, beta = max(1, BLOCK // max(n, k)), a.to(wide), 1 if accumulate else 0
        for i in range(0, m, step):
            part = total[:, i : i + step]
            torch.addmm(part, a, b[:, i : i + step].to(wide), beta=beta, out=part)
    else:
        product_of_blocks(b.t(), a.t(), total.t(), accumulate)
    if total is not out:
        out.copy_(total)
