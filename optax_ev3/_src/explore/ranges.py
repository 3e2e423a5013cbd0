"""Ranges of hyperparameters, and places in them from 0 to 1.

Dimensions: ``G`` members of a group.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_ev3._src.base import checks

# The most of a step, as a share of the range.
MOST = 0.25
# By factors: how far members of the first round are apart, and the most of a step. Both
# in powers of 10, since what does harm does not depend on the range.
_APART, _FARTHEST = 0.75, 0.5


class Range(NamedTuple):
    """Where a hyperparameter may lie, and how it moves.

    Attributes:
      low: The least value.
      high: The greatest.
      start: Where the search begins, or None for all over the range.
      logarithmic: Whether it moves by factors, and not by differences.
    """

    low: float
    high: float
    start: float | None
    logarithmic: bool

    def place(self, value: Any, xp: Any = jnp) -> Any:
        """Where a value lies between ``low``, 0, and ``high``, 1.

        ``xp`` is NumPy or jax.numpy, as elsewhere in this class.
        """
        if self.logarithmic:
            # No quotient: it may overflow.
            return (xp.log(value) - math.log(self.low)) / self._factors
        return (value - self.low) / (self.high - self.low)

    @property
    def most(self) -> float:
        """The greatest spread of a step, as a share of the range."""
        return min(MOST, self._decades(_FARTHEST)) if self.logarithmic else MOST

    @property
    def _factors(self) -> float:
        return math.log(self.high) - math.log(self.low)

    def _decades(self, count: float) -> float:
        return count * math.log(10) / self._factors

    def first(self, size: int) -> np.ndarray:
        """Where the members begin, as places ``[size]``."""
        quantiles = (np.arange(size) + 0.5) / size
        if self.start is None:
            return quantiles
        start = self.place(self.start, np)
        if not self.logarithmic:
            return reflected(start + 2 * MOST * (quantiles - 0.5), np)
        # From the start downwards: rates that are too large lower the loss at first,
        # and do lasting harm; those that are too small only lose time. Where there is
        # little room below, a part of the range.
        span = min(self._decades(_APART) * (size - 1), max(start, MOST))
        return max(start - span, 0) + np.linspace(0, span, size)

    def value(self, place: Any, xp: Any = jnp) -> Any:
        """The value at a place, brought into the bounds: float32."""
        if self.logarithmic:
            found = xp.exp(math.log(self.low) + place * self._factors)
        else:
            found = self.low + place * (self.high - self.low)
        return xp.clip(found, self.low, self.high).astype(np.float32)


def log_uniform(low: float, high: float, start: float | None = None) -> Range:
    """A range of positive numbers that is searched by factors, as for learning rates.

    Args:
      low: The least value, above 0.
      high: The greatest.
      start: Where the search begins; default: all over the range.

    Returns:
      A range, for :func:`optax_ev3.evolve`.

    Raises:
      TypeError: If a bound is no number.
      ValueError: If the bounds are the wrong way round or not above 0, or ``start`` is
        not between them.

    Examples:
      >>> import optax_ev3
      >>> rate = optax_ev3.log_uniform(1e-6, 1.0, start=1e-3)
    """
    return _range(low, high, start, True)


def uniform(low: float, high: float, start: float | None = None) -> Range:
    """A range that is searched by differences, as for momentum.

    Args:
      low: The least value.
      high: The greatest.
      start: Where the search begins; default: all over the range.

    Returns:
      A range, for :func:`optax_ev3.evolve`.

    Raises:
      TypeError: If a bound is no number.
      ValueError: If the bounds are the wrong way round, or ``start`` is not between
        them.

    Examples:
      >>> import optax_ev3
      >>> momentum = optax_ev3.uniform(0.0, 0.99, start=0.9)
    """
    return _range(low, high, start, False)


def _range(low: Any, high: Any, start: Any, logarithmic: bool):
    low, high = checks.real(low, "low"), checks.real(high, "high")
    most = float(np.finfo(np.float32).max)
    if not (-most <= low < high <= most and np.float32(low) < np.float32(high)):
        raise ValueError(
            f"low must be below high, both finite in float32, got {low} and {high}."
        )
    if logarithmic and low < np.finfo(np.float32).tiny:
        raise ValueError(
            f"low must be above 0 in a logarithmic range, a normal float32, got {low}."
        )
    if start is not None:
        start = checks.real(start, "start")
        if not low <= start <= high:
            raise ValueError(f"start must be from {low} to {high}, got {start}.")
    return Range(low, high, start, logarithmic)


def reflected(places: Any, xp: Any = jnp) -> Any:
    """Places, reflected at the bounds, which else would collect what lies beyond."""
    return 1 - xp.abs(1 - xp.abs(places))
