"""Which functions cost no more than a few passes over memory, and can run twice."""

from collections.abc import Callable
from typing import Any

import jax

# Primitives that compute numbers one by one, reduce them, or move none.
_NAMES = """
    abs add add_any and argmax argmin atan2 bitcast_convert_type broadcast_in_dim
    cbrt ceil clamp complex conj convert_element_type copy cos cosh div eq erf
    erf_inv exp exp2 expm1 floor ge gt imag integer_pow iota is_finite le log log1p
    logistic lt max min mul ne neg nextafter not or pow real reduce_and reduce_max
    reduce_min reduce_or reduce_precision reduce_sum rem reshape round rsqrt
    select_n sign sin sinh sqrt square squeeze stop_gradient sub tan tanh transpose
    xor
"""
_LIGHT = frozenset(_NAMES.split())
_CALLS = frozenset(["jit", "pjit", "custom_jvp_call"])


def is_memory_bound(fn: Callable[..., Any], *args: Any) -> bool:
    """Whether ``fn`` has no products of matrices, loops, random numbers, or the like.

    What has effects, such as callbacks, runs once only.

    Args:
      fn: A function of trees of arrays that JAX can trace.
      args: Arguments with the shapes of interest.

    Returns:
      True where computing ``fn`` again is a few more passes over its arguments.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return not jaxpr.effects and _is_light(jaxpr)


def _is_light(jaxpr: Any) -> bool:
    for equation in _needed(jaxpr):
        name = equation.primitive.name
        variables = (*equation.invars, *equation.outvars)
        if name in _CALLS:
            inner = next(p for p in equation.params.values() if hasattr(p, "jaxpr"))
            if not _is_light(inner.jaxpr):
                return False
        elif name not in _LIGHT and any(v.aval.shape for v in variables):
            return False
    return True


def _needed(jaxpr: Any) -> list[Any]:
    """The equations that outputs need: a compiler drops the others."""
    live = set(map(id, jaxpr.outvars))
    needed = []
    for equation in reversed(jaxpr.eqns):
        if live.intersection(map(id, equation.outvars)):
            live.update(map(id, equation.invars))
            needed.append(equation)
    return needed
