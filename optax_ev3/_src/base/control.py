"""Conditionals and loops, which are Python's where nothing is traced.

Outside of ``jit``, JAX compiles the body of each conditional and each loop anew when it
is another function than before, and keeps the program. Ours are made in every call: an
eager call would take a second, and never give its memory back. As Python's, an eager
call is what it is in optax: one operation after the other, all of them compiled before.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import core, lax

# Whether what is traced is done for all members of a sweep at once, each with
# conditions of its own: then both sides of a conditional are computed in any case.
_AT_ONCE = contextvars.ContextVar("at_once", default=False)


@contextlib.contextmanager
def members_at_once() -> Generator[None]:
    """Conditionals in it become choices, which devices make each for its members."""
    token = _AT_ONCE.set(True)
    try:
        yield
    finally:
        _AT_ONCE.reset(token)


def is_at_once() -> bool:
    """Whether conditionals are to be choices."""
    return _AT_ONCE.get()


def is_traced(*trees: Any) -> bool:
    """Whether a leaf is not a number yet, as under ``jit`` or ``vmap``."""
    return any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves(trees))


def cond(
    condition: Any, then: Callable[..., Any], other: Callable[..., Any], *args: Any
):
    """``lax.cond``."""
    if is_traced(condition) and is_at_once():
        return jax.tree.map(
            lambda x, y: jnp.where(condition, x, y), then(*args), other(*args)
        )
    if is_traced(condition):
        return lax.cond(condition, then, other, *args)
    return then(*args) if condition else other(*args)


def switch(index: Any, branches: Sequence[Callable[[], Any]]) -> Any:
    """``lax.switch`` of an index that is in range; all branches, if at once."""
    if is_traced(index) and is_at_once():
        return chosen(index, [branch() for branch in branches])
    return lax.switch(index, branches) if is_traced(index) else branches[int(index)]()


def chosen(index: Any, trees: Sequence[Any]) -> Any:
    """The tree with this index, of several that are all there."""
    found, *others = trees
    for number, tree in enumerate(others, 1):
        found = jax.tree.map(
            lambda old, new, number=number: jnp.where(
                index == number, jnp.asarray(new, old.dtype), old
            ),
            found,
            tree,
        )
    return found


def while_loop(
    goes_on: Callable[[Any], Any], body: Callable[[Any], Any], carry: Any
) -> Any:
    """``lax.while_loop``."""
    while True:
        going = goes_on(carry)
        # The functions may hold what is traced, though what they begin with is not.
        if is_traced(carry, going):
            return lax.while_loop(goes_on, body, carry)
        if not going:
            return carry
        carry = body(carry)


def fori_loop(low: int, high: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """``lax.fori_loop``."""
    if is_traced(carry):
        return lax.fori_loop(low, high, body, carry)
    for number in range(low, high):
        carry = body(number, carry)
    return carry


def each_row(fn: Callable[[Any], Any], rows: Any) -> Any:
    """``lax.map``."""
    if is_traced(rows):
        return lax.map(fn, rows)
    return stacked(fn, rows)


def stacked(fn: Callable[..., Any], *rows: Any) -> Any:
    """What ``jax.vmap(fn)(*rows)`` returns, by one call after the other."""
    count = len(jax.tree.leaves(rows)[0])
    results = [fn(*jax.tree.map(lambda x, i=i: x[i], rows)) for i in range(count)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


@functools.cache
def _has_cpus_alone() -> bool:
    """Whether there is no accelerator for which programs could be meant."""
    from jax.extend import backend  # Brings much that nothing else needs.

    return set(backend.backends()) == {"cpu"}


def platform_dependent(
    *args: Any, default: Callable[..., Any], **variants: Callable[..., Any]
) -> Any:
    """``lax.platform_dependent``, where a program may run on several platforms.

    In a process that has CPUs alone, it is made for these. Elsewhere such a program
    computes the same, but not in the way that is quick there.
    """
    if is_traced(args) and not _has_cpus_alone():
        return lax.platform_dependent(*args, default=default, **variants)
    return variants.get(jax.default_backend(), default)(*args)
