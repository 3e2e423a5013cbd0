"""Evidence: what the scores of one round say, and how surely. No policy.

Dimensions: ``C`` candidates, ``N`` examples.
"""

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# What one exact comparison counts for, in standard normal units: beyond any
# critical value in use, and finite, so that sums and products of it are too.
CERTAIN = 30.0


class Estimate(NamedTuple):
    """Mean score of every candidate, taken alone.

    Attributes:
      mean: ``[C]``.
      stderr: ``[C]``, standard deviation (ddof 1) over ``sqrt(N)``; zero for exact
        figures.
    """

    mean: jax.Array
    stderr: jax.Array


class Comparison(NamedTuple):
    """Every candidate against one reference, on the same examples.

    Attributes:
      gain: ``[C]``, mean of candidate minus reference.
      stderr: ``[C]``, standard error of that mean; zero for exact figures.
      z: ``[C]``, the evidence in standard normal units: where candidate and
        reference are equally good, ``z`` is approximately N(0, 1).
    """

    gain: jax.Array
    stderr: jax.Array
    z: jax.Array


class Evidence(NamedTuple):
    """The scores of all candidates of a round, seen on the same examples.

    Attributes:
      scores: For each objective ``[C, N]``, or ``[C]`` where its figures are exact;
        float32 or wider, higher is better. Rows of invalid candidates are zero.
      valid: ``[C]`` bool, false where the update or a score is not finite.
      uphill: ``[C]`` bool, true where the update raises the explorer's loss to first
        order.
      axis_name: Mapped axis over which the examples are spread, or None.
    """

    scores: Mapping[str, jax.Array]
    valid: jax.Array
    uphill: jax.Array
    axis_name: Any = None


def gather(
    scores: Mapping[str, jax.Array],
    finite: jax.Array,
    uphill: jax.Array,
    axis_name: Any = None,
) -> Evidence:
    """Collects scores into evidence, and says which candidates are valid.

    Args:
      scores: For each objective ``[C, N]`` or ``[C]``.
      finite: ``[C]`` bool, whether each candidate's update is finite.
      uphill: ``[C]`` bool, see :class:`Evidence`.
      axis_name: Mapped axis over which the examples are spread, or None. A
        candidate is valid where it is so on all devices.

    Returns:
      The evidence of the round.
    """
    valid = finite
    for values in scores.values():
        valid &= jnp.isfinite(values.reshape(values.shape[0], -1)).all(axis=1)
    if axis_name is not None:
        valid = lax.psum((~valid).astype(jnp.int32), axis_name) == 0
    clean = {}
    for name, values in scores.items():
        mask = valid.reshape((-1,) + (1,) * (values.ndim - 1))
        clean[name] = jnp.where(mask, values, 0)
        if values.ndim == 1 and axis_name is not None:
            clean[name] = lax.pmean(clean[name], axis_name)
    return Evidence(clean, valid, uphill, axis_name)


def estimate(evidence: Evidence, objective: str) -> Estimate:
    """Mean and standard error of every candidate alone."""
    values = evidence.scores[objective]
    if values.ndim == 1:
        return Estimate(values, jnp.zeros_like(values))
    return Estimate(*_mean_and_stderr(values, evidence.axis_name)[:2])


def compare(
    evidence: Evidence, objective: str, reference: Any, noise: Any = 0.0
) -> Comparison:
    r"""Paired comparison of every candidate with one of them.

    With :math:`D_i` the difference on example i, :math:`t = \bar D / (s / \sqrt N)`,
    brought to standard normal units by Wallace's transformation

    .. math:: z = \frac{8\nu + 1}{8\nu + 3} \sqrt{\nu \ln(1 + t^2/\nu)},
              \qquad \nu = N - 1,

    which errs by less than 0.03 for :math:`\nu \ge 4` and :math:`|z| \le 3`, on the
    cautious side in the tails. Evidence is never stronger than that of N coins
    that all fall alike, :math:`p = 2^{-N}`, so that a few examples with equal
    differences are not taken for certainty; and differences on an example within 8
    units of rounding are ties, so that candidates which are the same but for the order
    of operations are not told apart.

    Exact figures are compared with ``noise``, :math:`z = D / noise`; without noise any
    difference is certain.

    Args:
      evidence: The scores of the round.
      objective: Which objective to compare.
      reference: Index of the reference, a Python or traced integer.
      noise: ``[]``, standard deviation of the differences between exact figures.

    Returns:
      Gains, standard errors and z values, all ``[C]``; zero where the candidate or
      the reference is not valid.

    References:
      Wallace, `Bounds on normal approximations to Student's and the chi-square
      distributions <https://doi.org/10.1214/aoms/1177706083>`_, 1959.
    """
    values = evidence.scores[objective]
    both = evidence.valid & evidence.valid[reference]
    other = jnp.expand_dims(values[reference], 0)
    difference = values - other
    if values.ndim == 1:
        gain = jnp.where(both, difference, 0)
        z = gain / jnp.maximum(jnp.abs(gain) / CERTAIN, noise)
        return Comparison(gain, jnp.zeros_like(gain), jnp.where(gain == 0, 0, z))
    largest = jnp.maximum(jnp.abs(values), jnp.abs(other))
    rounding = 8 * jnp.finfo(values.dtype).eps * largest
    differs = both[:, None] & (jnp.abs(difference) > rounding)
    difference = jnp.where(differs, difference, 0)
    mean, stderr, n = _mean_and_stderr(difference, evidence.axis_name)
    return Comparison(mean, stderr, _normal_units(mean, stderr, n))


def single_objective(evidence: Evidence) -> str:
    """Name of the only objective.

    Raises:
      ValueError: If there are several.
    """
    if len(evidence.scores) > 1:
        raise ValueError(
            f"this rule takes one objective, assess_fn returned "
            f"{len(evidence.scores)}: {sorted(evidence.scores)}. Return one of them, "
            f"or combine them into one score."
        )
    return next(iter(evidence.scores))


def _mean_and_stderr(values: jax.Array, axis_name: Any):
    """Over the last axis of ``[C, N]`` and ``axis_name``: ``[C]``, ``[C]``, N."""
    n = values.shape[1]
    total = values.sum(axis=1)
    if axis_name is not None:
        n = n * lax.psum(1, axis_name)
        total = lax.psum(total, axis_name)
    mean = total / n
    centred = values - mean[:, None]
    # Brought to at most one before they are squared: huge scores do not overflow.
    scale = jnp.abs(centred).max(axis=1)
    if axis_name is not None:
        scale = lax.pmax(scale, axis_name)
    scale = jnp.where(scale > 0, scale, 1)
    squares = jnp.square(centred / scale[:, None]).sum(axis=1)
    if axis_name is not None:
        squares = lax.psum(squares, axis_name)
    return mean, scale * jnp.sqrt(squares / max(n - 1, 1) / n), n


def _normal_units(mean: jax.Array, stderr: jax.Array, n: int) -> jax.Array:
    """The z value of a mean with its standard error, n examples; zero if n is 1."""
    if n < 2:
        return jnp.zeros_like(mean)
    freedom = n - 1.0
    cap = min(-NormalDist().inv_cdf(0.5 ** min(n, 1000)), CERTAIN)
    # t beyond this is past the cap; dividing by its inverse times the mean at the
    # least keeps t finite where all differences are equal.
    floor = jnp.abs(mean) * 1e-6
    t = mean / jnp.where(mean == 0, 1, jnp.maximum(stderr, floor))
    z = jnp.sqrt(freedom * jnp.log1p(t * t / freedom))
    z = z * ((8 * freedom + 1) / (8 * freedom + 3))
    return jnp.sign(mean) * jnp.minimum(z, cap)
