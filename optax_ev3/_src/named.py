"""Named arguments: hand each callback just the extra arguments it asks for."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)


def parameters_after(fn: Callable[..., Any], count: int) -> list[inspect.Parameter]:
    """Parameters of ``fn`` beyond its first ``count`` positional ones."""
    found = list(inspect.signature(fn).parameters.values())
    skipped = 0
    while found and skipped < count and found[0].kind in _POSITIONAL:
        if found[0].kind == inspect.Parameter.VAR_POSITIONAL:
            break
        found.pop(0)
        skipped += 1
    return found


def accepted(fn: Callable[..., Any], count: int) -> tuple[set[str], bool]:
    """Names that ``fn`` takes after ``count`` positional ones; does it take any?"""
    parameters = parameters_after(fn, count)
    names = {p.name for p in parameters if p.kind in _BY_NAME}
    takes_any = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)
    return names, takes_any


def check_callback(fn: Any, role: str) -> None:
    """Raises ``TypeError`` unless ``fn`` can be called as ``fn(params, **named)``."""
    if not callable(fn):
        raise TypeError(
            f"{role} must be callable as {role}(params, **named), got {fn!r} of type "
            f"{type(fn).__name__}."
        )
    try:
        found = list(inspect.signature(fn).parameters.values())
    except ValueError as error:
        raise TypeError(
            f"{role} has no signature that can be read ({error}): wrap it in a "
            f"function, such as lambda params: ..."
        ) from error
    if not found or found[0].kind not in _POSITIONAL:
        raise TypeError(
            f"{role} must take the parameters as its first positional argument; its "
            f"signature is {inspect.signature(fn)}."
        )


def bind(
    fn: Callable[..., Any],
    role: str,
    extra_args: Mapping[str, Any],
    offered: Mapping[str, Any] | None = None,
    positional: int = 1,
) -> Callable[..., Any]:
    """Closes ``fn(params, **named)`` over the named arguments that it takes.

    Args:
      fn: The callback.
      role: How error messages call it.
      extra_args: The caller's extra arguments: all of them go to a callback that
        takes ``**kwargs``, otherwise those it names.
      offered: Arguments that only a callback which names them gets; the caller's
        come first.
      positional: How many arguments come by position, one for ``params`` alone.

    Returns:
      A function of the positional arguments alone.

    Raises:
      TypeError: If a parameter without default is supplied by nobody.
    """
    offered = dict(offered or {})
    named, kwargs = {}, False
    for parameter in parameters_after(fn, positional):
        name = parameter.name
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            kwargs = True
        elif parameter.kind == inspect.Parameter.VAR_POSITIONAL:
            continue
        elif parameter.kind in _BY_NAME and name in extra_args:
            named[name] = extra_args[name]
        elif parameter.kind in _BY_NAME and name in offered:
            named[name] = offered[name]
        elif parameter.default is inspect.Parameter.empty:
            raise TypeError(
                f"{role} takes a parameter {name!r} that nothing supplies: pass it to "
                f"update as a keyword, tx.update(grads, state, params, {name}=...), "
                f"or give it a default. Extra arguments given: "
                f"{sorted(extra_args) or 'none'}."
            )
    if kwargs:
        named = {**extra_args, **named}
    return lambda *args: fn(*args, **named)
