"""Registration of our operators with PyTorch: opaque to ``torch.compile``, which asks a fake kernel for shapes and dtypes.

By ``torch.library.Library``, since ``torch.library.custom_op`` imports the whole compiler at an operator's first call, compiled or not (900 modules,
170 MB, more than a second), and takes longer over every call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version

_NAMESPACE = __name__.partition(".")[0]  # the package's own name, so that a renamed copy of it can live beside it
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as the operator ``rlkern::<name>`` and give that; ``mutates`` names the arguments that it writes to."""

    def register(body: Callable[..., Any]) -> Any:
        _LIBRARY.define(name + torch.library.infer_schema(body, mutates_args=mutates), tags=(torch.Tag.pt2_compliant_tag,))
        overload = getattr(getattr(torch.ops, _NAMESPACE), name).default
        parameters = [argument.name for argument in overload._schema.arguments]
        written = [parameters.index(argument) for argument in mutates]
        apart = functools.cache(
            lambda: torch.compiler.disable(body)
        )  # where the compiler is at work it is not to look inside; making it imports that

        def kernel(*args: Any) -> Any:
            for i in written:
                if not args[i].is_inference():
                    increment_version(args[i])
            return (apart() if "torch._dynamo" in sys.modules else body)(*args)

        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        if not overload._schema.returns:
            fake_of(overload)(lambda *args: None)
        return overload

    return register


def fake_of(overload: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the fake kernel of an operator."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(overload.name(), fake, lib=_LIBRARY)
        return fake

    return register
