"""From hidden states and the head to log-probs, losses and gradients, with logits for a chunk of rows at a time in one reused buffer.

What is multiplied, in units of 2 x rows x hidden x vocabulary operations:

    no gradient wanted     1   statistics only
    frozen head            2   the forward also keeps J = d logprob / d hidden [rows, hidden], the backward is a scaling of its rows
    token-level loss       3   (2 with a frozen head) the gradients are made in the forward, while the logits are there
    anything downstream    4   (3 with a frozen head) the backward makes the logits again

Rows that are masked, or have no gradient, can be left out of the products: what ``index`` holds are the rows that take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fused import PolicyRows
from .keep import restrict_into
from .logits import Rows, Statistics, check_ids, live_rows
from .operators import fake_of, operator
from .shards import Shard, my_rows

# ---- products -------------------------------------------------------------------------------------------------------------------------------


def chunk_rows(vocabulary: int, logits_dtype: torch.dtype, operand: torch.dtype, device: torch.device, chunk_bytes: int | None) -> int:
    """Rows of logits, and of their gradient where that is of another dtype, that are alive at once.

    By default 64 MiB of them on a CPU, 1 GiB on a GPU, where larger products are faster.
    """
    row = vocabulary * (logits_dtype.itemsize + (0 if operand == logits_dtype else operand.itemsize))
    if chunk_bytes is not None:
        return max(1, chunk_bytes // row)
    if device.type == "cpu":
        return min(512, max(64, (64 << 20) // row))
    return min(4096, max(512, (1 << 30) // row // 128 * 128))


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


@dataclass
class Head:
    """logits = hidden @ weight.T + bias for the rows in ``index`` (None: all), a chunk at a time.

    Logits of float32 are the exact products of 16-bit operands, and their gradient is rounded to the operands' dtype once.
    """

    hidden: Tensor  # [N, H]; given this rank's share of them, it is gathered
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logits_dtype: torch.dtype
    chunk: int
    index: Tensor | None
    offsets: Tensor | None  # with token_ids: the tokens that a row's distribution is restricted to
    token_ids: Tensor | None
    backend: str
    live: Tensor | None = None  # [N]: hidden states of other rows, which may be anything, count as 0; None: all that take part are live
    part: Shard | None = None  # of the vocabulary; its padding takes no part

    rows: int = field(init=False)
    size: int = field(init=False)
    operand: torch.dtype = field(init=False)
    buffer: Tensor = field(init=False)
    narrow: Tensor | None = field(init=False)  # what takes the gradient of the logits, where it is not written over them
    restricted: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        if self.part is not None:
            self.hidden = self.part.gather_rows(self.hidden)
        self.rows = self.hidden.shape[0] if self.index is None else self.index.numel()
        self.size = max(1, min(self.chunk, self.rows))
        self.operand = torch.promote_types(self.hidden.dtype, self.weight.dtype)
        if self.part is not None:
            columns = self.part.columns
            self.weight, self.bias = self.weight[:columns], None if self.bias is None else self.bias[:columns]
        if self.hidden.device.type != "cpu":  # where products widen a block at a time
            self.weight = self.weight.to(self.operand)
        self.buffer = torch.empty(self.size, self.weight.shape[0], dtype=self.logits_dtype, device=self.hidden.device)
        self.narrow = None
        self.restricted = None if self.token_ids is None else torch.empty_like(self.buffer)

    def chunks(self) -> Iterator[slice]:
        """Slices of the rows that take part."""
        for start in range(0, self.rows, self.size):
            yield slice(start, min(start + self.size, self.rows))

    def where(self, rows: slice) -> slice | Tensor:
        """Which rows of ``hidden`` these are."""
        return rows if self.index is None else self.index[rows]

    def forward(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Their hidden states and their logits; the latter are overwritten by the next chunk."""
        h = self.hidden[self.where(rows)].to(self.operand)
        if self.live is not None:  # their gradient is 0, but 0 * NaN is not
            h = h.masked_fill(~self.live[self.where(rows)].unsqueeze(1), 0.0)
        logits = self.buffer[: h.shape[0]]
        if self.bias is not None:
            logits.copy_(self.bias)
        product(h, self.weight.t(), logits, accumulate=self.bias is not None)
        if self.restricted is not None and self.offsets is not None and self.token_ids is not None:
            where = self.where(rows)
            where = torch.arange(rows.start, rows.stop, device=logits.device) if isinstance(where, slice) else where
            whole, logits = logits, self.restricted[: h.shape[0]]
            restrict_into(logits, whole, self.offsets, self.token_ids, where, self.backend)
        return h, logits

    def gradient_of(self, logits: Tensor) -> Tensor:
        """Where the gradient of these logits goes: in the operands' dtype, for which alone there are fast products; over the logits where that is
        theirs, or where products widen their operands anyway."""
        if logits.dtype == self.operand or (self.backend == "torch" and logits.device.type == "cpu"):
            return logits
        if self.narrow is None:
            self.narrow = torch.empty(self.buffer.shape, dtype=self.operand, device=self.buffer.device)
        return self.narrow[: logits.shape[0]]


class Gradients:
    """d loss / d hidden, weight and bias, gathered chunk by chunk; those of weight and bias in float32 at least.

    Of a head that is divided among ranks, each has its own part of the latter two; the sum over the ranks for a chunk of the first runs beside the
    products that follow. Where each has a share of the rows, that of the sum goes to it at the end.
    """

    def __init__(self, head: Head, needs_hidden: bool, needs_weight: bool, needs_bias: bool) -> None:
        self.head = head
        self.sums: list[tuple[Any, slice | Tensor | None, Tensor]] = []  # (work, where its result goes in hidden; None: it is there, result)
        hidden, weight, dtype = head.hidden, head.weight, torch.promote_types(head.operand, torch.float32)
        self.hidden = (torch.empty if head.index is None else torch.zeros)(
            hidden.shape if needs_hidden else (0,), dtype=hidden.dtype, device=hidden.device
        )
        rows = weight.shape[0] if head.part is None else head.part.size
        self.whole_weight = torch.empty((rows, weight.shape[1]) if needs_weight else (0,), dtype=dtype, device=weight.device)
        self.whole_bias = torch.zeros(rows if needs_bias else 0, dtype=dtype, device=weight.device)
        self.weight, self.bias = self.whole_weight[: weight.shape[0]], self.whole_bias[: weight.shape[0]]  # without padding
        self.started = False

    def add(self, where: slice | Tensor, h: Tensor, grad_logits: Tensor) -> None:
        """Take in the rows ``where`` of hidden, given their hidden states and d loss / d logits (see :meth:`Head.gradient_of`)."""
        if self.hidden.numel():
            there = isinstance(where, slice) and self.hidden.dtype == self.head.operand
            if there:
                part = self.hidden[where]
            else:
                part = torch.empty(h.shape, dtype=h.dtype, device=h.device)  # a GPU has no product of float32 operands that is rounded to 16 bits
            product(grad_logits, self.head.weight, part)
            if self.head.part is not None and self.head.part.sp_size == 1:
                self.sums.append((self.head.part.start_sum(part), None if there else where, part))
            elif not there:
                self.hidden[where] = part.to(self.hidden.dtype)
        if self.weight.numel():
            product(grad_logits.t(), h, self.weight, accumulate=self.started)
        if self.bias.numel():
            self.bias += grad_logits.sum(0, dtype=self.bias.dtype)
        self.started = True

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three, empty where not wanted; zero where nothing was added."""
        for work, where, part in self.sums:
            work.wait()
            if where is not None:
                self.hidden[where] = part.to(self.hidden.dtype)
        if not self.started:
            self.hidden.zero_()
            self.weight.zero_()
        self.whole_weight[len(self.weight) :] = 0
        if self.head.part is not None and self.head.part.sp_size > 1 and self.hidden.numel():
            self.hidden = self.head.part.sum_of_my_rows(self.hidden)
        return self.hidden, self.whole_weight, self.whole_bias


# ---- rows that take part --------------------------------------------------------------------------------------------------------------------


def taking_part(live: Tensor, rows: Tensor | None, compact: bool) -> Tensor | None:
    """Positions to compute: ``rows`` where the caller knows them, of these the live ones where ``compact`` (which counts them: a synchronisation on a
    GPU); None for all."""
    if rows is not None:
        return rows[live[rows]] if compact else rows
    if not compact or bool(live.all()):
        return None
    return live.nonzero().squeeze(1)


def pick(x: Tensor, index: Tensor | None) -> Tensor:
    """The rows of ``x`` that take part."""
    return x if index is None else x[index]


def pick_optional(x: Tensor | None, index: Tensor | None) -> Tensor | None:
    return None if x is None else pick(x, index)


def spread(x: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """Back to all ``rows``, 0 where they did not take part."""
    return x if index is None else x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)


def spread_all(x: Statistics, index: Tensor | None, rows: int, with_entropy: bool) -> Statistics:
    """Statistics back to all rows."""
    logprob, row_max, log2_sum = (spread(t, index, rows) for t in (x.logprob, x.row_max, x.log2_sum))
    return Statistics(logprob, spread(x.entropy, index, rows) if with_entropy else x.entropy, row_max, log2_sum)


def rows_at(
    index: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    scale: float,
    cap: float | None,
    backend: str,
    shard: Shard | None,
) -> Rows:
    """What is asked of the rows that take part."""
    rows = Rows(ids, mask, temperature, scale, cap, backend, shard)
    return rows if index is None else rows.at(index)


# ---- log-probs ------------------------------------------------------------------------------------------------------------------------------


@operator("linear_logprobs")
def linear_logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    token_ids: Tensor | None,
    scale: float,
    cap: float | None,
    logits_dtype: torch.dtype,
    chunk: int,
    with_entropy: bool,
    with_jacobian: bool,
    compact: bool,
    validate: bool,
    backend: str,
    shard: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, row maximum, log2 of the sum, J = d logprob / d hidden) of ``hidden [N, H]`` and ``ids [N]``; empty where not wanted."""
    part = Shard.from_text(shard)
    if validate:
        check_ids(ids, mask, weight.shape[0] if part is None else part.total)
    index = taking_part(live_rows(ids, mask), rows, compact)
    head = Head(hidden, weight, bias, logits_dtype, chunk, index, offsets, token_ids, backend, part=part)
    per_row = rows_at(index, ids, mask, temperature, scale, cap, backend, part)
    out = Statistics.empty(head.buffer, (head.rows,), with_entropy)
    jacobian = Gradients(head, with_jacobian, False, False)
    ones = torch.ones_like(out.logprob)
    states = []  # of a part of the vocabulary: where nothing else is made of a chunk, all go into one collective
    for at in head.chunks():
        h, logits = head.forward(at)
        here, statistics = per_row.at(at), out.at(at)
        if part is not None and not with_jacobian:
            states.append(here.states(logits, with_entropy))
            continue
        here.statistics(logits, statistics)
        if with_jacobian:
            grad_logits = head.gradient_of(logits)
            here.gradient(grad_logits, logits, ones[at], None, statistics)
            jacobian.add(head.where(at), h, grad_logits)
    if states:
        per_row.finish(torch.cat(states), out)
    return *spread_all(out, index, ids.numel(), with_entropy), jacobian.results()[0]


@fake_of(linear_logprobs_op)
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    logits_dtype, _, with_entropy, with_jacobian, *_ = args[-8:]
    statistics = Statistics.empty(torch.empty(0, dtype=logits_dtype, device=hidden.device), ids.shape, with_entropy)
    return *statistics, hidden.new_empty(hidden.shape if with_jacobian else (0,))


@operator("linear_logprobs_backward")
def linear_logprobs_backward_op(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    token_ids: Tensor | None,
    entropy: Tensor,
    row_max: Tensor,
    log2_sum: Tensor,
    scale: float,
    cap: float | None,
    logits_dtype: torch.dtype,
    chunk: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    compact: bool,
    backend: str,
    shard: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """d loss / d (hidden, weight, bias) by making the logits again; empty where not needed, those of weight and bias in float32 at least."""
    part = Shard.from_text(shard)
    live = live_rows(ids, mask) & ((grad_logprob != 0) if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0))
    index = taking_part(live, rows, compact)
    head = Head(hidden, weight, bias, logits_dtype, chunk, index, offsets, token_ids, backend, live if needs_weight and not compact else None, part)
    per_row = rows_at(index, ids, mask, temperature, scale, cap, backend, part)
    a, b = pick(grad_logprob, index), pick_optional(grad_entropy, index)
    saved = Statistics(grad_logprob, entropy, row_max, log2_sum)
    saved = saved if index is None else saved.at(index)
    gradients = Gradients(head, needs_hidden, needs_weight, needs_bias)
    for at in head.chunks():
        h, logits = head.forward(at)
        grad_logits = head.gradient_of(logits)
        per_row.at(at).gradient(grad_logits, logits, a[at], None if b is None else b[at], saved.at(at))
        gradients.add(head.where(at), h, grad_logits)
    return gradients.results()


def empty_gradients(
    hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype, needs_hidden: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Unfilled d loss / d (hidden, weight, bias), as :meth:`Gradients.results` gives them."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,), dtype=dtype),
        weight.new_empty(weight.shape[0] if needs_bias else 0, dtype=dtype),
    )


@fake_of(linear_logprobs_backward_op)
def _(grad_logprob: Tensor, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    logits_dtype, _, *needs = args[-8:-3]
    return empty_gradients(hidden, weight, logits_dtype, *needs)


class LinearLogprobs(torch.autograd.Function):
    """Differentiable in hidden, weight and bias, through log-prob and entropy. ``frozen``: J is kept, and the log-prob alone recomputes nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        temperature: Tensor | None,
        rows: Tensor | None,
        offsets: Tensor | None,
        token_ids: Tensor | None,
        scale: float,
        cap: float | None,
        logits_dtype: torch.dtype,
        chunk: int,
        with_entropy: bool,
        frozen: bool,
        compact: bool,
        validate: bool,
        backend: str,
        shard: str,
    ) -> tuple[Tensor, Tensor]:
        logprob, entropy, row_max, log2_sum, jacobian = linear_logprobs_op(
            hidden,
            weight,
            bias,
            ids,
            mask,
            temperature,
            rows,
            offsets,
            token_ids,
            scale,
            cap,
            logits_dtype,
            chunk,
            with_entropy,
            frozen,
            compact,
            validate,
            backend,
            shard,
        )
        recomputes = with_entropy or not frozen
        ctx.save_for_backward(
            *((hidden, weight, bias) if recomputes else (None,) * 3),
            ids,
            mask,
            temperature,
            rows,
            offsets,
            token_ids,
            entropy,
            row_max,
            log2_sum,
            jacobian,
        )
        ctx.frozen = frozen
        ctx.options = (scale, cap, logits_dtype, chunk)
        ctx.compact, ctx.backend, ctx.shard = compact, backend, shard
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, mask, temperature, rows, offsets, token_ids, entropy, row_max, log2_sum, jacobian = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if entropy.numel() == 0:
            grad_entropy = None
        grads: list[Tensor | None] = [None] * 19
        if ctx.frozen and grad_logprob is not None and grad_entropy is None:  # what is made again for the entropy gives both, unrounded in between
            upstream = torch.where(live_rows(ids, mask), grad_logprob, 0.0).unsqueeze(1)
            grads[0] = (my_rows(upstream, Shard.from_text(ctx.shard)) * jacobian).to(jacobian.dtype)
            grad_logprob = None
        if grad_logprob is None and grad_entropy is None:
            return tuple(grads)
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(row_max)
        dh, dw, db = linear_logprobs_backward_op(
            grad_logprob,
            grad_entropy,
            hidden,
            weight,
            bias,
            ids,
            mask,
            temperature,
            rows,
            offsets,
            token_ids,
            entropy,
            row_max,
            log2_sum,
            *ctx.options,
            *needs,
            ctx.compact,
            ctx.backend,
            ctx.shard,
        )
        if needs[0]:
            grads[0] = dh if grads[0] is None else grads[0] + dh
        if needs[1]:
            grads[1] = dw.to(ctx.dtypes[0])
        if needs[2]:
            grads[2] = db.to(ctx.dtypes[1])
        return tuple(grads)


# ---- losses whose gradients are made in the forward -----------------------------------------------------------------------------------------


def gradients_in_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    live: Tensor,
    temperature: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    token_ids: Tensor | None,
    scale: float,
    cap: float | None,
    logits_dtype: torch.dtype,
    chunk: int,
    with_entropy: bool,
    needs: tuple[bool, bool, bool],
    compact: bool,
    validate: bool,
    backend: str,
    part: Shard | None,
    slopes: Callable[[slice | Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, d loss / d hidden, weight, bias); ``slopes(rows, logprob, entropy)`` gives d loss / d (logprob, entropy) of some rows.

    ``live`` is the whole mask.
    """
    if validate:
        check_ids(ids, live, weight.shape[0] if part is None else part.total)
    index = taking_part(live, rows, compact)
    head = Head(hidden, weight, bias, logits_dtype, chunk, index, offsets, token_ids, backend, live if needs[1] and not compact else None, part)
    per_row = rows_at(index, ids, live, temperature, scale, cap, backend, part)
    out = Statistics.empty(head.buffer, (head.rows,), with_entropy)
    gradients = Gradients(head, *needs)
    if compact:  # chunks leave rows out, also where all are live
        gradients.hidden.zero_()
    for at in head.chunks():
        h, logits = head.forward(at)
        here, statistics, where = per_row.at(at), out.at(at), head.where(at)
        here.statistics(logits, statistics)
        a, b = slopes(where, statistics.logprob, statistics.entropy)
        if compact:  # rows without a gradient, clipped ones say, are left out of the products
            moving = a != 0 if b is None else (a != 0) | (b != 0)
            if not bool(moving.all()):
                chosen = moving.nonzero().squeeze(1)
                where = chosen + at.start if isinstance(where, slice) else where[chosen]
                h, logits, here, a, b = h[chosen], logits[chosen], here.at(chosen), a[chosen], pick_optional(b, chosen)
                statistics = statistics.at(chosen)
        if a.numel():
            grad_logits = head.gradient_of(logits)
            here.gradient(grad_logits, logits, a, b, statistics)
            gradients.add(where, h, grad_logits)
    logprob, entropy, _, _ = spread_all(out, index, ids.numel(), with_entropy)
    return logprob, entropy, *gradients.results()


@operator("linear_policy_gradients")
def linear_policy_gradients_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    live: Tensor,
    temperature: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    token_ids: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    sampling_logprobs: Tensor | None,
    entropy_mask: Tensor | None,
    loss_weights: Tensor,
    entropy_weights: Tensor | None,
    config: str,
    scale: float,
    cap: float | None,
    logits_dtype: torch.dtype,
    chunk: int,
    with_entropy: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    compact: bool,
    validate: bool,
    backend: str,
    shard: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, and d loss / d (hidden, weight, bias)) for  loss = sum loss_weights * per-token loss + sum entropy_weights * entropy.

    ``live`` is the whole mask; ``config`` a per-token one.
    """
    terms = PolicyRows(old_logprobs, advantages, ref_logprobs, importance_weights, sampling_logprobs, entropy_mask)

    def slopes(rows: slice | Tensor, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        a = terms.of(rows).slope(logprob, live[rows], config, backend).mul_(loss_weights[rows])
        return a, None if entropy_weights is None else entropy_weights[rows]

    options = (
        scale,
        cap,
        logits_dtype,
        chunk,
        with_entropy,
        (needs_hidden, needs_weight, needs_bias),
        compact,
        validate,
        backend,
        Shard.from_text(shard),
    )
    return gradients_in_forward(hidden, weight, bias, ids, live, temperature, rows, offsets, token_ids, *options, slopes)


@fake_of(linear_policy_gradients_op)
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    logits_dtype, _, with_entropy, *needs = args[-10:-4]
    statistics = Statistics.empty(torch.empty(0, dtype=logits_dtype, device=hidden.device), ids.shape, with_entropy)
    return statistics.logprob, statistics.entropy, *empty_gradients(hidden, weight, logits_dtype, *needs)
