"""Advantages and returns in PyTorch: a chunked reverse scan over whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scan import Numbers, ScanOptions, Sequences, Steps, result_dtype
from ..select import bits

# Steps between carries: a scan is about CHUNK + length / CHUNK vector operations for a length up to CHUNK^2, and CHUNK more beyond.
CHUNK = 64


def reverse_scan_(f: float | Tensor, x: Tensor) -> Tensor:
    """Overwrites ``x [rows, time]`` with y_t = x_t + f_t y_{t+1}, y = 0 beyond the end. ``f`` is a number or broadcasts to ``x``.

    The chunks of all rows advance together, a step at a time; what each hands to the one before it is a scan again, over the chunks.
    Chunks are counted from the end, and no product is fused with a sum, so the last n steps come out bitwise the same whatever number of steps lies
    before them. Where f is 0 nothing passes, not even a NaN.
    """
    if not isinstance(f, Tensor) and f == 0:
        return x
    rows, time = x.shape
    chunks, size = -(-time // CHUNK), min(time, CHUNK)
    by_step = _by_step(x, chunks, size)
    y = by_step.unbind()
    product = torch.empty_like(y[0])
    # What leads from each step to the next, and later to the end of its chunk; and the bits of where that is not 0: ANDed with a product they stop a
    # NaN, as multiplying by 0 would not.
    through: Tensor
    passing: Tensor | None = None
    if isinstance(f, Tensor):
        through = _by_step(f.expand(rows, time), chunks, size)
        passing = bits(through != 0, x.dtype)
        factors, passes = through.unbind(), passing.unbind()
    else:
        through = torch.pow(f, torch.arange(size, 0, -1, dtype=torch.float64, device=x.device)).to(x.dtype)[:, None]
        factors = (torch.full((), f, dtype=x.dtype, device=x.device),) * size

    for t in range(size - 2, -1, -1):
        torch.mul(y[t + 1], factors[t], out=product)
        if passing is not None:
            product.view(passing.dtype).bitwise_and_(passes[t])
        y[t].add_(product)
        if passing is not None:
            factors[t].mul_(factors[t + 1])
            passes[t].bitwise_and_(passes[t + 1])
    if chunks > 1:
        # In float64, which costs nothing here, so that the error does not grow with the number of chunks.
        across = f**size if passing is None else through[0].view(rows, chunks).double()
        heads = reverse_scan_(across, y[0].view(rows, chunks).to(torch.float64, copy=True))
        carry = torch.nn.functional.pad(heads[:, 1:], (0, 1)).to(x.dtype).view(1, -1)
        carried = torch.mul(through, carry, out=x.view(size, -1) if time % size == 0 else None)  # x is a copy by now
        if passing is not None:
            carried.view(passing.dtype).bitwise_and_(passing)
        by_step.add_(carried)
    if time % size == 0:
        x.view(-1, size).copy_(by_step.t())
    else:
        x.copy_(by_step.t().reshape(rows, -1)[:, -time:])
    return x


def _by_step(x: Tensor, chunks: int, size: int) -> Tensor:
    """``[rows, time]`` copied to ``[size, rows * chunks]``, so that a step of every chunk is contiguous; zeros before the beginning."""
    padding = chunks * size - x.shape[1]
    if padding:
        x = torch.nn.functional.pad(x, (padding, 0))
    return x.reshape(-1, size).t().clone(memory_format=torch.contiguous_format)


def _valid_last(valid: Tensor) -> Tensor:
    """Where each step of ``[rows, time]`` goes for the valid ones to lie together at the end, in their order; the others all go to the front."""
    place = valid.cumsum(1)
    return place.add_(valid.shape[1] - 1 - place[:, -1:].clone()).mul_(valid)


def lambda_returns(steps: Steps, sequences: Sequences, numbers: Numbers, options: ScanOptions, moments: Tensor) -> tuple[Tensor | None, Tensor]:
    """As the kernel, over whole tensors; packed tokens are one row, cut at the ends of its sequences.

    Where masked steps are to be skipped, the valid ones first move together to the end of their row, and get what they would on their own. What the
    others hold then lies before them, where the scan comes to it last.
    """
    rewards, values, logprobs, old_logprobs, mask, next_values, terminated, truncated = steps
    last_values, cu_seqlens, gammas, lams = sequences
    device, (rows, time), dtype = rewards.device, rewards.shape, result_dtype(steps)
    valid = None if mask is None else mask != 0
    place = None if valid is None or options.decay else _valid_last(valid)

    def load(x: Tensor, as_dtype: torch.dtype = dtype) -> Tensor:
        x = x != 0 if as_dtype == torch.bool else x.to(as_dtype)
        if place is not None:
            return torch.zeros_like(x).scatter_(1, place, x)
        return x if valid is None else x.masked_fill(~valid, 0)

    def finish(x: Tensor) -> Tensor:
        if place is not None:
            x = x.gather(1, place)
        return x if valid is None else x.masked_fill_(~valid, 0)

    ends = torch.zeros(1, time, dtype=torch.bool, device=device)
    ends[:, -1] = True
    sequence = None
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().long()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=time)
        if place is not None:
            sequence = torch.zeros_like(sequence).scatter_(0, place[0], sequence)
        ends[0, :-1] = sequence[1:] != sequence[:-1]

    def by_sequence(x: Tensor) -> Tensor:
        """One number a sequence, so that it broadcasts over ``[rows, time]``."""
        return x.to(dtype)[:, None] if sequence is None else x.to(dtype)[sequence][None]

    r = load(rewards)
    v = torch.zeros_like(r) if values is None else load(values)
    beyond = r.new_zeros(1, 1) if last_values is None else by_sequence(last_values)
    v_next = torch.cat([v[:, 1:], beyond[:, -1:].expand(rows, 1)], 1)
    cuts = []
    if sequence is not None or last_values is not None:
        cuts.append(ends)
        v_next = torch.where(ends, beyond, v_next)
    if truncated is not None:
        cuts.append(load(truncated, torch.bool))
        v_next = v_next if next_values is None else torch.where(cuts[-1], load(next_values), v_next)
    if terminated is not None:
        cuts.append(load(terminated, torch.bool))
        v_next = v_next.masked_fill(cuts[-1], 0)

    g: float | Tensor = numbers.gamma if gammas is None else by_sequence(gammas)
    f: float | Tensor = g * (numbers.lam if lams is None else by_sequence(lams))
    for cut in cuts:
        f = torch.where(cut, r.new_zeros(()), f)
    if logprobs is None or old_logprobs is None:
        y = reverse_scan_(f, v_next.mul_(g - f).add_(r))
        advantages = y - v if options.with_advantages else None
    else:
        ratio = torch.exp(load(logprobs) - load(old_logprobs))
        rho, f_c = ratio.clamp(max=numbers.rho_clip), f * ratio.clamp(max=numbers.c_clip)
        y = reverse_scan_(f_c, v + rho * (r + g * v_next - v) - f_c * v_next)
        y_next = torch.cat([y[:, 1:], y.new_zeros(rows, 1)], 1)
        for cut in cuts:
            y_next = y_next.masked_fill(cut, 0)  # f is 0 there, but 0 times NaN is not
        advantages = rho * (r + (g - f) * v_next + f * y_next - v)
    if advantages is not None:
        advantages = finish(advantages)
        if len(moments):
            wide = advantages.double()
            count = wide.new_full((), wide.numel()) if valid is None else valid.sum(dtype=torch.float64)
            moments.copy_(torch.stack([count, wide.sum(), wide.square().sum()]))
    return advantages, finish(y)


def normalise(advantages: Tensor, mask: Tensor | None, moments: Tensor, eps: float, out: Tensor) -> None:
    """Fill ``out``."""
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1)
    scale = ((squares - total * mean).clamp(min=0) / (count - 1).clamp(min=1) + eps).rsqrt()
    torch.sub(advantages, mean.to(out.dtype), out=out).mul_(scale.to(out.dtype))
    if mask is not None:
        out.masked_fill_(mask == 0, 0)
