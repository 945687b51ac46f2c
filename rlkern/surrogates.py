"""Which surrogates there are: the built-in ones, in one table, and users' own.

An operator takes its configuration as text, so a surrogate is known by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ._backend import HAS_TRITON


class Surrogate(NamedTuple):
    """A built-in surrogate by the names of its functions, which ``kernels/policy.py`` and ``ops/torch_backend/terms.py`` both have."""

    term: str
    edges: str = "no_edges"
    summand: str = ""  # of one that is reduced over the sequence by ``reduction`` (see tokens.policy_kernel): the result is the term's log_r
    reduction: str = ""
    center: float = 0.0  # the number that clip_low and clip_high are distances from


# By the name in a configuration, and its dppo_form where there are two.
TABLE = {
    "clip": Surrogate("clip", "clip_edges", center=1.0),
    "cispo": Surrogate("cispo", "ratio_edges", center=1.0),
    "sapo": Surrogate("sapo"),
    "gmpo": Surrogate("gmpo", "log_ratio_edges", "gmpo_summand", "kept-mean"),
    "vespo": Surrogate("vespo", "no_edges", "vespo_summand", "weighted-sum"),
    "dppo_tv/ratio": Surrogate("dppo_tv_ratio", "dppo_tv_edges"),
    "dppo_tv/score": Surrogate("dppo_tv_score", "dppo_tv_edges"),
    "dppo_kl/ratio": Surrogate("dppo_kl_ratio", "dppo_kl_edges"),
    "dppo_kl/score": Surrogate("dppo_kl_score", "dppo_kl_edges"),
    "reinforce": Surrogate("reinforce"),
}
SURROGATES = tuple(dict.fromkeys(name.partition("/")[0] for name in TABLE))
_USERS = Surrogate("")


def parts_of(name: str, form: str) -> Surrogate:
    """The entry of the table; of a user's surrogate, which has none, one without edges or reduction."""
    return TABLE.get(name) or TABLE.get(f"{name}/{form}") or _USERS


class OwnSurrogate(NamedTuple):
    """A user's token-level surrogate: its forms for the two backends, None where not given."""

    name: str
    triton: Any = None
    torch: Callable[..., Tensor] | None = None

    def on(self, backend: str) -> Any:
        """The form that runs on ``backend``; ValueError where there is none."""
        form = self.triton if backend == "triton" else self.torch
        if form is None:
            kind = "@triton.jit" if backend == "triton" else "PyTorch"
            raise ValueError(
                f"surrogate {self.name!r} has no {kind} form, which backend={backend!r} needs; "
                f"give it one by rlkern.register_surrogate({self.name!r}, {backend}=...), or choose the other backend"
            )
        return form


_own: dict[str, OwnSurrogate] = {}


def register_surrogate(name: str, *, triton: Any = None, torch: Callable[..., Tensor] | None = None) -> str:
    """Make a loss of your own known as ``surrogate=name`` to :class:`rlkern.PolicyLossConfig`, and so to the policy loss at every depth.

    It is a term of one token, elementwise in log-prob, behaviour log-prob, log-ratio at the configured level, and advantage. Importance weights,
    masks, KL, entropy and aggregation are as for the built-in surrogates; there are no clip fractions. ``o`` has the numbers of the configuration by
    name: ``low`` = -clip_low and ``high`` = clip_high, ``ratio_cap``, ``dual_clip`` (each infinite where None), ``tau_pos``, ``tau_neg``,
    ``vespo_k_pos``, ``vespo_lambda_pos``, ``vespo_k_neg`` and ``vespo_lambda_neg``. A term may use any of them as it likes.

    Args:
        name: not that of a built-in surrogate. If a configuration is sent to another process, register there too.
        triton: a ``@triton.jit`` function ``(lp, old, log_r, A, o) -> (loss, d loss / d lp, d loss / d log_r)`` of blocks or scalars of float32 or
            float64; inlined into the kernels, as the built-in terms are.
        torch: a function ``(lp, old, log_r, A, o) -> loss`` of tensors of any one shape; autograd differentiates it in ``lp`` and ``log_r``.

    Returns:
        ``name``. A form that is missing may be registered later; it is needed once a loss runs on its backend.

    Raises:
        TypeError: for an argument that is no such function. ValueError: neither form is given, or the name is a built-in's or has another function.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if name in SURROGATES:
        raise ValueError(f"surrogate {name!r} is built in; choose another name")
    if triton is None and torch is None:
        raise ValueError(f"surrogate {name!r} needs a function: triton=, torch= or both")
    if triton is not None:
        if not is_jit_function(triton):
            raise TypeError(f"triton must be a @triton.jit function, got {type(triton).__name__}")
        _check_takes_a_token("triton", triton.fn)
    if torch is not None:
        if not callable(torch) or is_jit_function(torch):
            raise TypeError(f"torch must be a function of tensors, got {type(torch).__name__}")
        _check_takes_a_token("torch", torch)
    known = _own.get(name, OwnSurrogate(name))
    for kind, given, registered in (("triton", triton, known.triton), ("torch", torch, known.torch)):
        if given is not None and registered is not None and given is not registered:
            raise ValueError(f"surrogate {name!r} has another {kind} function already, {registered!r}; register {given!r} under another name")
    _own[name] = OwnSurrogate(name, triton or known.triton, torch or known.torch)
    return name


def name_of(surrogate: Any) -> str:
    """The name of what ``PolicyLossConfig(surrogate=...)`` was given; a ``@triton.jit`` function that has none gets its qualified name."""
    if isinstance(surrogate, str):
        names = (*SURROGATES, *_own)
        if surrogate not in names:
            raise ValueError(
                f"surrogate must be one of {', '.join(map(repr, names))}, or a name given to rlkern.register_surrogate; got {surrogate!r}"
            )
        return surrogate
    if not is_jit_function(surrogate):
        raise TypeError(
            f"surrogate must be a name or a @triton.jit function, got {type(surrogate).__name__}; "
            "a function of PyTorch gets a name by rlkern.register_surrogate(name, torch=...)"
        )
    for own in _own.values():
        if own.triton is surrogate:
            return own.name
    return register_surrogate(f"{surrogate.fn.__module__}.{surrogate.fn.__qualname__}", triton=surrogate)


def own_surrogate(name: str) -> OwnSurrogate | None:
    """The user's surrogate of this name; None for a built-in one."""
    return _own.get(name)


def check_backend(name: str, backend: str) -> None:
    """Check that the surrogate can run on ``backend``: a user's own may lack the form for it."""
    own = own_surrogate(name)
    if own is not None:
        own.on(backend)


def is_jit_function(x: Any) -> bool:
    """Whether ``x`` is what ``@triton.jit`` makes, compiled or interpreted."""
    if not HAS_TRITON:
        return False
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    return isinstance(x, (JITFunction, InterpretedFunction))


def _check_takes_a_token(name: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind(*range(5))
    except TypeError as e:
        raise TypeError(f"{name} must be a function of (lp, old, log_r, A, o), got one of {inspect.signature(function)}") from e
