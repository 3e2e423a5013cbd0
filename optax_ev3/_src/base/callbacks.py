"""Callbacks: each gets the extra arguments that its signature names."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_ONE_BY_POSITION = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)
_POSITIONAL = (*_ONE_BY_POSITION, inspect.Parameter.VAR_POSITIONAL)


class Free(NamedTuple):
    """The parameters of a function that are not bound yet.

    Attributes:
      parameters: Those that are free, in their order.
      filled: Names of the others: given by position, or bound by a partial.
    """

    parameters: list[inspect.Parameter]
    filled: frozenset[str]

    @property
    def names(self) -> set[str]:
        """Names of the parameters that :func:`bind` fills one by one."""
        kinds = (*_BY_NAME, inspect.Parameter.POSITIONAL_ONLY)
        return {p.name for p in self.parameters if p.kind in kinds}

    @property
    def takes_any(self) -> bool:
        """Whether there is a ``**kwargs``."""
        return any(p.kind == inspect.Parameter.VAR_KEYWORD for p in self.parameters)

    def takes(self, name: str) -> bool:
        """Whether an argument of this name can be given by keyword."""
        by_name = {p.name for p in self.parameters if p.kind in _BY_NAME}
        return name in by_name or (self.takes_any and name not in self.filled)


def free(fn: Callable[..., Any], count: int) -> Free:
    """The free parameters of ``fn`` after its first ``count`` positional ones."""
    found = list(signature(fn).parameters.values())
    filled = set(_bound(fn))
    while found and count and found[0].kind in _ONE_BY_POSITION:
        first, count = found.pop(0), count - 1
        if first.kind in _BY_NAME:
            filled.add(first.name)
    return Free([p for p in found if p.name not in filled], frozenset(filled))


def signature(fn: Callable[..., Any]) -> inspect.Signature:
    """As :func:`inspect.signature`, for objects with a static ``__call__`` too."""
    call = inspect.getattr_static(type(fn), "__call__", None)
    if isinstance(call, staticmethod | classmethod):
        # Python would take away the first parameter, as that of the object.
        return inspect.signature(type(fn).__call__)
    return inspect.signature(fn)


def _bound(fn: Any) -> frozenset[str]:
    """Names that partials have bound in ``fn``, however they are wrapped.

    Its signature cannot tell them from parameters with a default.
    """
    names = set()
    while fn is not None:
        if isinstance(fn, functools.partial | functools.partialmethod):
            names |= fn.keywords.keys()
        elif "__signature__" in getattr(fn, "__dict__", {}):
            break  # Its signature is explicit.
        fn = _inside(fn)
    return frozenset(names)


def _inside(fn: Any) -> Any:
    """The function that a callable wraps, as :mod:`inspect` follows it, or None."""
    if isinstance(fn, functools.partial | functools.partialmethod):
        return fn.func
    if isinstance(fn, types.MethodType):
        return fn.__func__
    for name in ("__partialmethod__", "_partialmethod"):  # Of Python 3.13, and before.
        inside = getattr(fn, name, None)
        if isinstance(inside, functools.partialmethod):
            return inside
    called = getattr(fn, "__wrapped__", type(fn).__call__)
    # Functions written in C end the search: their own call is such a descriptor, too.
    return None if isinstance(called, types.WrapperDescriptorType) else called


def same(fn: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two callables are the same; each access makes a new bound method."""
    return fn is other or (isinstance(fn, types.MethodType) and fn == other)


def shown(fn: Callable[..., Any]) -> str:
    """The signature for messages: without defaults, which may be arrays."""
    empty = inspect.Parameter.empty
    found = signature(fn).parameters.values()
    return str(
        inspect.Signature([p.replace(default=empty, annotation=empty) for p in found])
    )


class Opaque:
    """A function whose closure other libraries do not rebuild.

    Optimistix rebuilds the closures of an optimizer as pytrees. Callbacks in them would
    then be called as ``(*args, **kwargs)``, and their signatures would name nothing.
    """

    def __init__(self, fn: Callable[..., Any]):
        self._fn = fn
        functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fn(*args, **kwargs)


def check_callback(fn: Any, role: str) -> None:
    """Raises ``TypeError`` unless ``fn`` can be called as ``fn(params, **named)``."""
    if not callable(fn):
        raise TypeError(
            f"{role} must be callable as {role}(params, **named), got {fn!r} of type "
            f"{type(fn).__name__}."
        )
    try:
        found = list(signature(fn).parameters.values())
    except ValueError as error:
        raise TypeError(
            f"{role} has no signature that can be read ({error}): wrap it in a "
            f"function, such as lambda params: ..."
        ) from error
    if not found or found[0].kind not in _POSITIONAL:
        raise TypeError(
            f"{role} must take the parameters as its first positional argument; its "
            f"signature is {shown(fn)}."
        )


def bind(
    fn: Callable[..., Any],
    role: str,
    extra_args: Mapping[str, Any],
    offered: Mapping[str, Any] | None = None,
    positional: int = 1,
    fixed: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Closes ``fn(params, **named)`` over the named arguments that it takes.

    What a partial has bound in ``fn`` stays so, whoever supplies that name.

    Args:
      fn: The callback.
      role: How error messages call it.
      extra_args: The caller's extra arguments: all of them go to a callback that
        takes ``**kwargs``, otherwise those it names.
      offered: Arguments that only a callback which names them gets; the caller's
        come first.
      positional: How many arguments come by position, one for ``params`` alone.
      fixed: The same as ``offered``, but these come before the caller's.

    Returns:
      A function of the positional arguments alone.

    Raises:
      TypeError: If a parameter without default is supplied by nobody.
    """
    left = free(fn, positional)
    supplied = {**(offered or {}), **extra_args, **(fixed or {})}
    more, unsaid, keywords = [], [], {}
    for parameter in left.parameters:
        name, given = parameter.name, parameter.name in supplied
        if parameter.kind == inspect.Parameter.POSITIONAL_ONLY and given:
            # Those before it that nobody supplies have to be said as well.
            more += [*unsaid, supplied[name]]
            unsaid = []
        elif parameter.kind in _BY_NAME and given:
            keywords[name] = supplied[name]
        elif parameter.kind not in (*_BY_NAME, inspect.Parameter.POSITIONAL_ONLY):
            continue
        elif parameter.default is inspect.Parameter.empty:
            given = sorted(extra_args) or (
                "none. Wrappers such as optax.lookahead pass none on: let the function "
                "hold its data there, as optax_ev3.held_out does"
            )
            raise TypeError(
                f"{role} takes a parameter {name!r} that nothing supplies: pass it to "
                f"update as a keyword, tx.update(grads, state, params, {name}=...), "
                f"or give it a default. Extra arguments given: {given}."
            )
        elif parameter.kind == inspect.Parameter.POSITIONAL_ONLY:
            unsaid.append(parameter.default)
    if left.takes_any:
        said = left.filled | {p.name for p in left.parameters if p.kind not in _BY_NAME}
        keywords = {k: v for k, v in extra_args.items() if k not in said} | keywords
    return lambda *args: fn(*args, *more, **keywords)
