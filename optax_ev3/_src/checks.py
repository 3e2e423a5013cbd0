"""Checks of numbers that users give."""

import operator
from typing import Any


def integer(value: Any, name: str, least: int | None = None) -> int:
    """A Python integer, no bool, of at least ``least``."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"{name} must be an integer, got {value!r} of type {type(value).__name__}."
        ) from error
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number


def error_rate(confidence: Any) -> float:
    """What a confidence leaves: 1 - confidence."""
    try:
        confidence = float(confidence)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"confidence must be a number, got {confidence!r} of type "
            f"{type(confidence).__name__}."
        ) from error
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence must be above 0.5 and below 1, got {confidence}.")
    return 1 - confidence
