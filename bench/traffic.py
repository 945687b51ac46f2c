"""How many bytes each kernel loads and stores, counted in Triton's interpreter, so with no GPU.

    with traffic() as moved:
        rk.token_logprobs(logits, ids, backend="triton")
    moved["logprobs_kernel"].loaded, moved["logprobs_kernel"].stored, moved["logprobs_kernel"].launches
    moved.of(logits).loaded / (logits.numel() * logits.element_size())       # how often the logits were read

Only lanes whose mask is true count, each with the size of its element; lanes of one access that share an address count once, as they do on a GPU.
Caches do not exist here: an element loaded twice counts twice, also where a GPU would find it in L2. An atomic counts as a load and a store.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
from torch import Tensor, UntypedStorage
from triton.runtime import interpreter


@dataclass
class Moved:
    """Bytes loaded and stored, and the number of launches that moved them."""

    loaded: int = 0
    stored: int = 0
    launches: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


def _storages(arguments: Any) -> Iterator[UntypedStorage]:
    """Of the tensors among a kernel's arguments, and in the tuples among them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument.untyped_storage()
        elif isinstance(argument, tuple):
            yield from _storages(argument)


@dataclass(frozen=True)
class _Access:
    launch: int
    stored: bool
    first: int  # addresses
    last: int
    size: int


class Traffic(Mapping[str, Moved]):
    """What was moved, by the name of the kernel."""

    def __init__(self) -> None:
        self._launches: list[str] = []
        self._accesses: list[_Access] = []
        # Kept alive, so that an address means one tensor only; not the tensors, since autograd copies a gradient that something else holds.
        self._memory: list[UntypedStorage] = []

    def _begin(self, kernel: str, arguments: Any) -> None:
        self._launches.append(kernel)
        self._memory.extend(_storages(arguments))

    def _count(self, pointers: Any, mask: Any, *, loaded: bool = False, stored: bool = False) -> None:
        element = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape).astype(bool)]
        if addresses.size == 0:
            return
        first, last = int(addresses.min()), int(addresses.max()) + element
        elements = addresses.size
        if last - first != elements * element:  # neither one by one nor side by side: lanes may share an address
            elements = np.unique(addresses).size
        for store in [False] * loaded + [True] * stored:
            self._accesses.append(_Access(len(self._launches) - 1, store, first, last, elements * element))

    def _sum(self, accesses: list[_Access]) -> Moved:
        return Moved(
            loaded=sum(a.size for a in accesses if not a.stored),
            stored=sum(a.size for a in accesses if a.stored),
            launches=len({a.launch for a in accesses}),
        )

    def __getitem__(self, kernel: str) -> Moved:
        if kernel not in self._launches:
            raise KeyError(f"{kernel} was not launched; launched were {sorted(set(self._launches))}")
        moved = self._sum([a for a in self._accesses if self._launches[a.launch] == kernel])
        return Moved(moved.loaded, moved.stored, self._launches.count(kernel))

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(self._launches))

    def __len__(self) -> int:
        return len(set(self._launches))

    def of(self, tensor: Tensor) -> Moved:
        """What was moved from and to this tensor's memory, by all kernels."""
        first = tensor.data_ptr()
        last = first + (sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.element_size()
        return self._sum([a for a in self._accesses if first <= a.first and a.last <= last])

    @property
    def loaded(self) -> int:
        return self._sum(self._accesses).loaded

    @property
    def stored(self) -> int:
        return self._sum(self._accesses).stored

    @property
    def total(self) -> int:
        return self.loaded + self.stored

    @property
    def launches(self) -> int:
        return len(self._launches)


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count every load and store of the kernels launched inside."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported")
    moved = Traffic()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    @functools.wraps(launch)
    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        moved._begin(self.fn.__name__, (*args, *kwargs.values()))
        return launch(self, *args, **kwargs)

    # Unmasked accesses and block pointers reach memory through the masked pair too. A mask is a handle or a plain array; both have .data.
    @functools.wraps(load)
    def counted_load(self: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        moved._count(pointers, np.asarray(mask.data), loaded=True)
        return load(self, pointers, mask, *args, **kwargs)

    @functools.wraps(store)
    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        moved._count(pointers, np.asarray(mask.data), stored=True)
        return store(self, pointers, value, mask, *args, **kwargs)

    @functools.wraps(rmw)
    def counted_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        moved._count(pointers, np.asarray(mask.data), loaded=True, stored=True)
        return rmw(self, op, pointers, value, mask, *args, **kwargs)

    @functools.wraps(cas)
    def counted_cas(self: Any, pointers: Any, *args: Any, **kwargs: Any) -> Any:
        moved._count(pointers, np.ones(np.shape(pointers.data), dtype=bool), loaded=True, stored=True)
        return cas(self, pointers, *args, **kwargs)

    executor.__call__ = counted_launch
    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_atomic_rmw, builder.create_atomic_cas = counted_rmw, counted_cas
    try:
        yield moved
    finally:
        executor.__call__ = launch
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw, builder.create_atomic_cas = rmw, cas
