"""Hidden states and a head: their logits for a chunk of rows at a time, in one reused buffer, and what gathers the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .keep import restrict_into
from .products import product
from .shards import Shard

# ---- records --------------------------------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """logits = hidden @ weight.T + bias. Logits of float32 are the exact products of 16-bit operands."""

    hidden: Tensor  # [N, H], or this rank's share of the rows
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logits_dtype: torch.dtype

    @property
    def operand(self) -> torch.dtype:
        """In which hidden states and weight are multiplied."""
        return torch.promote_types(self.hidden.dtype, self.weight.dtype)

    def detach(self) -> Head:
        return Head(self.hidden.detach(), self.weight.detach(), None if self.bias is None else self.bias.detach(), self.logits_dtype)

    def needs_grad(self) -> Needs:
        """What takes gradients."""
        return Needs(*(torch.is_grad_enabled() and t is not None and t.requires_grad for t in self[:3]))


class Needs(NamedTuple):
    """Whether hidden, weight and bias take gradients."""

    hidden: bool
    weight: bool
    bias: bool


class HeadGradients(NamedTuple):
    """d loss / d (hidden, weight, bias): empty where not wanted, those of weight and bias in float32 at least."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def empty(cls, head: Head, needs: Needs) -> HeadGradients:
        """Unfilled, as :meth:`Gradients.results` gives them."""
        dtype, rows = torch.promote_types(head.operand, torch.float32), head.weight.shape[0]
        return cls(
            head.hidden.new_empty(head.hidden.shape if needs.hidden else (0,)),
            head.weight.new_empty(head.weight.shape if needs.weight else (0,), dtype=dtype),
            head.weight.new_empty(rows if needs.bias else 0, dtype=dtype),
        )


class Work(NamedTuple):
    """Which rows are computed, and how many at a time."""

    rows: Tensor | None  # the caller's choice of positions; None: all
    compact: bool  # leave out those that do not count, by counting them
    chunk: int

    def taking_part(self, live: Tensor) -> Tensor | None:
        """Positions to compute: ``rows``, of these the live ones where ``compact`` (which counts them: a synchronisation on a GPU); None for all."""
        if self.rows is not None:
            return self.rows[live[self.rows]] if self.compact else self.rows
        if not self.compact or bool(live.all()):
            return None
        return live.nonzero().squeeze(1)


class Kept(NamedTuple):
    """The tokens that each row's distribution is restricted to, as :class:`rlkern.KeptTokens` has them; None: all."""

    offsets: Tensor | None
    token_ids: Tensor | None


ALL_KEPT = Kept(None, None)


def spread(x: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """Back to all ``rows``, 0 where they did not take part."""
    return x if index is None else x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)


# ---- logits of chunks -----------------------------------------------------------------------------------------------------------------------


@dataclass
class ChunkedLogits:
    """The logits of a head for the rows in ``index`` (None: all), a chunk at a time."""

    head: Head  # given this rank's share of the hidden states, they are gathered; of a divided vocabulary, its padding takes no part
    chunk: int
    index: Tensor | None
    backend: str
    part: Shard | None
    kept: Kept = ALL_KEPT
    live: Tensor | None = None  # [N]: hidden states of other rows, which may be anything, count as 0; None: all that take part are live

    rows: int = field(init=False)
    size: int = field(init=False)
    buffer: Tensor = field(init=False)
    narrow: Tensor | None = field(init=False)  # what takes the gradient of the logits, where it is not written over them
    restricted: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        hidden, weight, bias, dtype = self.head
        if self.part is not None:
            columns = self.part.columns
            hidden, weight, bias = self.part.gather_rows(hidden), weight[:columns], None if bias is None else bias[:columns]
        if hidden.device.type != "cpu":  # where products widen a block at a time
            weight = weight.to(self.head.operand)
        self.rows = hidden.shape[0] if self.index is None else self.index.numel()
        self.size = max(1, min(self.chunk, self.rows))
        self.operand = self.head.operand
        self.head = Head(hidden, weight, bias, dtype)
        self.buffer = torch.empty(self.size, weight.shape[0], dtype=dtype, device=hidden.device)
        self.narrow = None
        self.restricted = None if self.kept.token_ids is None else torch.empty_like(self.buffer)

    def chunks(self) -> Iterator[slice]:
        """Slices of the rows that take part."""
        for start in range(0, self.rows, self.size):
            yield slice(start, min(start + self.size, self.rows))

    def where(self, rows: slice) -> slice | Tensor:
        """Which rows of ``hidden`` these are."""
        return rows if self.index is None else self.index[rows]

    def forward(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Their hidden states and their logits; the latter are overwritten by the next chunk."""
        hidden, weight, bias, _ = self.head
        h = hidden[self.where(rows)].to(self.operand)
        if self.live is not None:  # their gradient is 0, but 0 * NaN is not
            h = h.masked_fill(~self.live[self.where(rows)].unsqueeze(1), 0.0)
        logits = self.buffer[: h.shape[0]]
        if bias is not None:
            logits.copy_(bias)
        product(h, weight.t(), logits, accumulate=bias is not None)
        offsets, token_ids = self.kept
        if self.restricted is not None and offsets is not None and token_ids is not None:
            where = self.where(rows)
            where = torch.arange(rows.start, rows.stop, device=logits.device) if isinstance(where, slice) else where
            whole, logits = logits, self.restricted[: h.shape[0]]
            restrict_into(logits, whole, offsets, token_ids, where, self.backend)
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

    def __init__(self, logits: ChunkedLogits, needs: Needs) -> None:
        self.logits = logits
        self.sums: list[tuple[Any, slice | Tensor | None, Tensor]] = []  # (work, where its result goes in hidden; None: it is there, result)
        (hidden, weight, *_), dtype = logits.head, torch.promote_types(logits.operand, torch.float32)
        self.hidden = (torch.empty if logits.index is None else torch.zeros)(
            hidden.shape if needs.hidden else (0,), dtype=hidden.dtype, device=hidden.device
        )
        rows = weight.shape[0] if logits.part is None else logits.part.size
        self.whole_weight = torch.empty((rows, weight.shape[1]) if needs.weight else (0,), dtype=dtype, device=weight.device)
        self.whole_bias = torch.zeros(rows if needs.bias else 0, dtype=dtype, device=weight.device)
        self.weight, self.bias = self.whole_weight[: weight.shape[0]], self.whole_bias[: weight.shape[0]]  # without padding
        self.started = False

    def add(self, where: slice | Tensor, h: Tensor, grad_logits: Tensor) -> None:
        """Take in the rows ``where`` of hidden, given their hidden states and d loss / d logits (see :meth:`ChunkedLogits.gradient_of`)."""
        if self.hidden.numel():
            there = isinstance(where, slice) and self.hidden.dtype == self.logits.operand
            if there:
                part = self.hidden[where]
            else:
                part = torch.empty(h.shape, dtype=h.dtype, device=h.device)  # a GPU has no product of float32 operands that is rounded to 16 bits
            product(grad_logits, self.logits.head.weight, part)
            if self.logits.part is not None and self.logits.part.sp_size == 1:
                self.sums.append((self.logits.part.start_sum(part), None if there else where, part))
            elif not there:
                self.hidden[where] = part.to(self.hidden.dtype)
        if self.weight.numel():
            product(grad_logits.t(), h, self.weight, accumulate=self.started)
        if self.bias.numel():
            self.bias += grad_logits.sum(0, dtype=self.bias.dtype)
        self.started = True

    def results(self) -> HeadGradients:
        """The three, empty where not wanted; zero where nothing was added."""
        for work, where, part in self.sums:
            work.wait()
            if where is not None:
                self.hidden[where] = part.to(self.hidden.dtype)
        if not self.started:
            self.hidden.zero_()
            self.weight.zero_()
        self.whole_weight[len(self.weight) :] = 0
        if self.logits.part is not None and self.logits.part.sp_size > 1 and self.hidden.numel():
            self.hidden = self.logits.part.sum_of_my_rows(self.hidden)
        return HeadGradients(self.hidden, self.whole_weight, self.whole_bias)
