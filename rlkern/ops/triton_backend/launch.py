"""What every kernel is compiled with."""

from __future__ import annotations

from typing import Any


def compiled(warps: int) -> dict[str, Any]:
    """Options of a launch. A product and a sum are one instruction, as the kernels' figures and errors have them; from 3.10 on Triton does that only
    where it is asked for."""
    return {"num_warps": warps, "enable_fp_fusion": True}
