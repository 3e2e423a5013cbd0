"""Checks of what users give."""

import inspect
import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

_STATIC = "Inside optax.inject_hyperparams, list it among the static_args."


def integer(
    value: Any, name: str, least: int | None = None, expected: str = "an integer"
) -> int:
    """A Python integer, no bool, of at least ``least``."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"{name} must be {expected}, got {value!r} of type {type(value).__name__}."
        ) from error
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number


def real(value: Any, name: str, expected: str = "a number") -> float:
    """A Python float."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be {expected}, got {value!r} of type {type(value).__name__}."
        ) from error


def error_rate(confidence: Any, otherwise: str = "") -> float:
    """What a confidence leaves, 1 - confidence; ``otherwise`` says what else may be."""
    confidence = real(confidence, "confidence", f"a number{otherwise}")
    if not 0.5 < confidence < 1:
        raise ValueError(
            f"confidence must be above 0.5 and below 1{otherwise}, got {confidence}."
        )
    return 1 - confidence


def is_array(value: Any) -> bool:
    """Whether JAX takes a value for an array or a number."""
    if not (hasattr(value, "dtype") or isinstance(value, numbers.Number)):
        return False
    try:
        jnp.result_type(value)
    except TypeError:
        return False
    return True


def takes(fn: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many arguments by position.

    True as well where that cannot be told, as of some functions written in C.
    """
    try:
        inspect.signature(fn).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def static_float(value: Any, name: str) -> float:
    """A finite Python float of at least 1."""
    try:
        number = real(value, name, "a Python float")
    except TypeError as error:
        raise TypeError(f"{error} {_STATIC}") from error
    if not 1 <= number < float("inf"):
        raise ValueError(f"{name} must be at least 1 and finite, got {number}.")
    return number


def static_int(value: Any, name: str) -> int:
    """A Python integer of at least 1."""
    try:
        return integer(value, name, 1, "a Python integer")
    except TypeError as error:
        raise TypeError(f"{error} {_STATIC}") from error
