"""Operators that take records, and their registration with PyTorch: opaque to ``torch.compile``, which asks a fake kernel for shapes and dtypes.

A record is a NamedTuple of tensors and options. An operator's schema lists them field by field, made from the annotations of its body; in Python the
records are passed whole, on the way in and on the way out.

Registered by ``torch.library.Library``, since ``torch.library.custom_op`` imports the whole compiler at an operator's first call, compiled or not
(900 modules, 170 MB, more than a second), and takes longer over every call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

_NAMESPACE = __name__.partition(".")[0]  # the package's own name, so that a renamed copy of it can live beside it
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "SymInt",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
}
R = TypeVar("R", bound=tuple[Any, ...])


# ---- records --------------------------------------------------------------------------------------------------------------------------------


def fields_of(record: Any) -> dict[str, Any] | None:
    """Names and types of a record's fields; None for what is no record."""
    if not (isinstance(record, type) and issubclass(record, tuple) and hasattr(record, "_fields")) or hasattr(record, "from_text"):
        return None
    hints = get_type_hints(record)
    return {name: hints[name] for name in record._fields}


def at(record: R, index: slice | Tensor | None) -> R:
    """The record of some rows: its tensors indexed, but for empty ones, which stand for no result. None: all rows."""
    if index is None:
        return record
    return type(record)._make(x[index] if isinstance(x, Tensor) and x.numel() else x for x in record)  # type: ignore[attr-defined]


def flat(records: Iterable[Any]) -> list[Any]:
    """The fields of records, one after the other; what is no record is itself."""
    return [x for record in records for x in (record if hasattr(record, "_fields") else (record,))]


def split(values: Sequence[Any], *records: type | None) -> list[Any]:
    """Records of these types from their flat fields (None: what is no record), and the values after them: undoes :func:`flat`."""
    found, start = [], 0
    for record in records:
        if record is None:
            found.append(values[start])
            start += 1
        else:
            stop = start + len(record._fields)  # type: ignore[attr-defined]
            found.append(record._make(values[start:stop]))  # type: ignore[attr-defined]
            start = stop
    return [*found, *values[start:]]


def save(ctx: Any, *records: Any) -> None:
    """Keep records for the backward of an autograd function, which gets them by :func:`saved`."""
    values = flat(records)
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in values))
    ctx.options = [None if isinstance(x, Tensor) else x for x in values]


def saved(ctx: Any, *records: type | None) -> list[Any]:
    """What :func:`save` kept, given the types of its records; the values after them as they were."""
    return split([option if tensor is None else tensor for tensor, option in zip(ctx.saved_tensors, ctx.options, strict=True)], *records)


# ---- operators ------------------------------------------------------------------------------------------------------------------------------


def _as_text(x: Any) -> str:
    return "" if x is None else x.text


class Operator:
    """A registered operator. Called with the parameters of its body, records among them; ``overload`` is PyTorch's own object."""

    def __init__(self, name: str, body: Callable[..., Any], mutates: tuple[str, ...]) -> None:
        hints = get_type_hints(body)
        result = hints.pop("return")
        self.records = [None if fields_of(hint) is None else hint for hint in hints.values()]
        self.result = None if fields_of(result) is None else result
        self.readers: dict[int, Callable[[str], Any]] = {}  # of the arguments that travel as text
        arguments: list[str] = []
        for parameter, hint in hints.items():
            fields = fields_of(hint)
            for field, kind in {parameter: hint}.items() if fields is None else {f"{parameter}_{k}": t for k, t in fields.items()}.items():
                schema = _SCHEMA_TYPES.get(kind)
                if schema is None:  # an option that can be written as text
                    (written,) = [t for t in get_args(kind) or (kind,) if t is not type(None)]
                    self.readers[len(arguments)], schema = written.from_text, "str"
                arguments.append(f"{'Tensor(' + field + '!)' if field in mutates else schema} {field}")
        results = 0 if result is type(None) else 1 if self.result is None else len(self.result._fields)
        self.written = [i for i, argument in enumerate(arguments) if "!" in argument]
        _LIBRARY.define(f"{name}({', '.join(arguments)}) -> ({', '.join(['Tensor'] * results)})", tags=(torch.Tag.pt2_compliant_tag,))
        self.overload = getattr(getattr(torch.ops, _NAMESPACE), name).default

    def __call__(self, *values: Any) -> Any:
        out = self.overload(*self.arguments(*values))
        return out if self.result is None else self.result._make(out)

    def arguments(self, *values: Any) -> list[Any]:
        """As the overload takes them."""
        arguments = flat(values)
        for i in self.readers:
            arguments[i] = _as_text(arguments[i])
        return arguments

    def values(self, arguments: Sequence[Any]) -> list[Any]:
        """As the body takes them."""
        arguments = list(arguments)
        for i, read in self.readers.items():
            arguments[i] = read(arguments[i])
        return split(arguments, *self.records)

    def run(self, body: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """``body`` on flat arguments, its result flat as well."""
        out = body(*self.values(arguments))
        return out if self.result is None else tuple(out)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Register the decorated function as the operator ``rlkern::<name>`` and give that; ``mutates`` names the tensors that it writes to."""

    def register(body: Callable[..., Any]) -> Operator:
        op = Operator(name, body, mutates)
        apart = functools.cache(
            lambda: torch.compiler.disable(body)
        )  # where the compiler is at work it is not to look inside; making it imports that

        def kernel(*arguments: Any) -> Any:
            for i in op.written:
                if not arguments[i].is_inference():
                    increment_version(arguments[i])
            with torch._C._AutoDispatchBelowAutograd():  # which has nothing to do in here
                return op.run(apart() if "torch._dynamo" in sys.modules else body, arguments)

        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        if not op.overload._schema.returns:
            fake_of(op)(lambda *values: None)
        return op

    return register


def fake_of(op: Operator) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the fake kernel of an operator."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(op.overload.name(), lambda *arguments: op.run(fake, arguments), lib=_LIBRARY)
        return fake

    return register
