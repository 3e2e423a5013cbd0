"""Evidence: what the scores of one round say, and how surely. No policy.

Dimensions: ``C`` candidates, ``N`` examples on all devices, ``B`` resamples.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_ev3._src.base import trees

# What one exact comparison counts for, in standard normal units: beyond any
# critical value in use, and finite, so that sums and products of it are too.
CERTAIN = 30.0

# z values of n coins that all fall alike, p = 2^-n, up to certainty. A table, since
# in float32 the normal quantile of such a p is lost.
_COINS = np.asarray(
    [0.0, *(min(-NormalDist().inv_cdf(0.5**n), CERTAIN) for n in range(1, 661))],
    np.float32,
)


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


class Resampled(NamedTuple):
    """A figure, and how it varies where the examples are drawn again.

    Attributes:
      figure: ``[C]``, on the examples as they are.
      resamples: ``[C, B]``, on B bootstrap samples, the same for all candidates.
    """

    figure: jax.Array
    resamples: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "scores",
        "valid",
        "is_ascent",
        "resamples",
        "seen",
        "past",
        "credit",
    ],
    meta_fields=["binary", "one_step"],
)
@dataclasses.dataclass(frozen=True)
class Evidence:
    """The scores of all candidates of a round, seen on the same examples.

    Attributes:
      scores: For each objective ``[C, N]``, or ``[C]`` where it is one figure; float32
        or wider, higher is better. Rows of invalid candidates are zero.
      valid: ``[C]`` bool, false where the update or a score is not finite, or scores
        are too large to be added up.
      is_ascent: ``[C]`` bool, true where the update raises the explorer's loss to first
        order.
      resamples: For objectives that are a figure of all examples together ``[C, B]``:
        that figure on B bootstrap samples. Other figures are exact.
      binary: Names of the objectives whose scores are known to be 0 or 1, static.
      seen: ``[N]`` bool, the examples that were looked at; None for all. The scores of
        the others are zero.
      past: The record of past rounds, or None: ring buffers, see
        :func:`optax_ev3.history` for what they hold.
      credit: ``[K]``, see :func:`optax_ev3.credit`; None where nothing is known.
      one_step: Whether all rounds have one step, which says little, static.
    """

    scores: Mapping[str, jax.Array]
    valid: jax.Array
    is_ascent: jax.Array
    resamples: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    binary: frozenset[str] = frozenset()
    seen: jax.Array | None = None
    past: Any = None
    credit: jax.Array | None = None
    one_step: bool = True


def gather(
    scores: Mapping[str, jax.Array | Resampled],
    finite: jax.Array,
    is_ascent: jax.Array,
    axis_name: Any = None,
    binary: frozenset[str] = frozenset(),
    seen: jax.Array | None = None,
) -> Evidence:
    """Collects scores into evidence, and says which candidates are valid.

    Args:
      scores: For each objective ``[C, n]``, ``[C]``, or a figure with its resamples.
      finite: ``[C]`` bool, whether each candidate's update is finite.
      is_ascent: ``[C]`` bool, see :class:`Evidence`.
      axis_name: Mapped axis over whose D devices examples are spread, so that N = nD,
        or None. All devices get the same evidence: the scores of all, in their order.
        A candidate is valid where it is so on all.
      binary: See :class:`Evidence`.
      seen: ``[n]`` bool, see :class:`Evidence`. What the others scored is ignored.

    Returns:
      The evidence of the round.
    """
    resamples = {k: v.resamples for k, v in scores.items() if isinstance(v, Resampled)}
    plain = {k: v.figure if isinstance(v, Resampled) else v for k, v in scores.items()}
    if seen is not None:
        plain = {
            name: jnp.where(seen[None], values, 0) if values.ndim == 2 else values
            for name, values in plain.items()
        }
    devices = 1 if axis_name is None else lax.psum(1, axis_name)
    valid = finite
    for values in [*plain.values(), *resamples.values()]:
        sizes = jnp.abs(values.reshape(values.shape[0], -1)).sum(axis=1)
        # Then sums of differences between two candidates are finite, too.
        valid &= jnp.isfinite(2 * devices * sizes)
    if axis_name is not None:
        valid = lax.psum((~valid).astype(jnp.int32), axis_name) == 0

    def clean(values):
        mask = valid.reshape((-1,) + (1,) * (values.ndim - 1))
        values = jnp.where(mask, values, 0)
        if axis_name is None:
            return values
        if values.ndim == 1:
            return lax.pmean(values, axis_name)
        return trees.unite(values, axis_name, axis=1)

    plain = {name: clean(values) for name, values in plain.items()}
    # Figures of all examples together are the same on all devices.
    resamples = {k: jnp.where(valid[:, None], v, 0) for k, v in resamples.items()}
    if seen is not None and axis_name is not None:
        seen = trees.unite(seen, axis_name, axis=0)
    return Evidence(plain, valid, is_ascent, resamples, frozenset(binary), seen)


def estimate(evidence: Evidence, objective: str) -> Estimate:
    """Mean and standard error of every candidate alone."""
    values = evidence.scores[objective]
    if values.ndim == 1:
        spread = jnp.zeros_like(values)
        if objective in evidence.resamples:
            spread = deviation(evidence.resamples[objective])
        return Estimate(values, spread)
    return Estimate(*_mean_and_stderr(values, evidence.seen)[:2])


class Differences(NamedTuple):
    """Every candidate less one reference, example by example.

    Attributes:
      values: ``[C, N]``; zero for examples that were not looked at, and where the
        candidate or the reference is not valid.
      seen: ``[1, N]``, 1 for examples that were looked at, else 0.
      n: ``[]``, how many those are.
    """

    values: jax.Array
    seen: jax.Array
    n: jax.Array


def differences(evidence: Evidence, objective: str, reference: Any) -> Differences:
    """Scores of every candidate less those of one, ties within rounding made exact.

    Args:
      evidence: The scores of the round, one for each example.
      objective: Which objective to compare.
      reference: Index of the reference, a Python or traced integer.

    Raises:
      ValueError: If the objective is a single figure.
    """
    values = each_example(evidence, objective)
    other = jnp.expand_dims(values[reference], 0)
    both = evidence.valid & evidence.valid[reference]
    difference = jnp.where(both[:, None], less(values, other), 0)
    seen, n = _seen(values, evidence.seen)
    return Differences(difference * seen, seen, n)


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

    Figures of all examples together are compared by the spread :math:`s^*` of their
    differences over the bootstrap samples, :math:`z = D / s^*`, and the same limit for
    B coins. Exact figures are compared with ``noise``, :math:`z = D / noise`; without
    noise any difference is certain.

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
    if values.ndim == 2:
        found = differences(evidence, objective, reference)
        mean, stderr, n = _mean_and_stderr(found.values, evidence.seen)
        return Comparison(mean, stderr, normal_units(mean, stderr, n))
    both = evidence.valid & evidence.valid[reference]
    gain = jnp.where(both, values - values[reference], 0)
    if objective in evidence.resamples:
        samples = evidence.resamples[objective]
        spread = samples - jnp.expand_dims(samples[reference], 0)
        stderr = jnp.where(both, deviation(spread), 0)
        cap = coins(samples.shape[1])
        z = gain / jnp.maximum(stderr, jnp.abs(gain) / cap)
    else:
        stderr = jnp.zeros_like(gain)
        z = gain / jnp.maximum(jnp.abs(gain) / CERTAIN, noise)
    return Comparison(gain, stderr, jnp.where(gain == 0, 0, z))


def take(evidence: Evidence, rows: slice) -> Evidence:
    """The evidence of some of the examples."""
    scores = {k: v[:, rows] if v.ndim == 2 else v for k, v in evidence.scores.items()}
    seen = None if evidence.seen is None else evidence.seen[rows]
    return dataclasses.replace(evidence, scores=scores, seen=seen)


def examples(evidence: Evidence) -> jax.Array:
    """How many examples have scores of their own: ``[]`` int32."""
    sizes = [v.shape[1] for v in evidence.scores.values() if v.ndim == 2]
    if evidence.seen is not None:
        return evidence.seen.sum(dtype=jnp.int32)
    return jnp.asarray(max(sizes, default=0), jnp.int32)


def count(evidence: Evidence, objective: str) -> jax.Array:
    """How many examples, or resamples, stand behind the scores: ``[]`` float.

    Exact figures count as any number.
    """
    values = evidence.scores[objective]
    if values.ndim == 2:
        return _seen(values, evidence.seen)[1]
    if objective in evidence.resamples:
        return jnp.asarray(evidence.resamples[objective].shape[1], values.dtype)
    return jnp.asarray(len(_COINS), values.dtype)


def main_objective(evidence: Evidence, names: Sequence[str] = ()) -> str:
    """The first of the names, else that of the only objective.

    Raises:
      ValueError: If the objectives are not those named, or, without names, several.
    """
    if not names:
        return single_objective(evidence)
    if set(names) != set(evidence.scores):
        raise ValueError(
            f"this rule takes the objectives {list(names)}, assess_fn returned "
            f"{sorted(evidence.scores)}."
        )
    return names[0]


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


def each_example(evidence: Evidence, objective: str, who: str = "this") -> jax.Array:
    """Scores ``[C, N]`` of one objective.

    Raises:
      ValueError: If it is a single figure.
    """
    values = evidence.scores[objective]
    if values.ndim == 1:
        raise ValueError(
            f"{who} needs a score for each example, objective {objective!r} is a "
            f"single figure."
        )
    return values


def less(one: jax.Array, other: jax.Array) -> jax.Array:
    """One less the other, zero where that is within 8 units of rounding."""
    difference = one - other
    largest = jnp.maximum(jnp.abs(one), jnp.abs(other))
    rounding = 8 * jnp.finfo(one.dtype).eps * largest
    return jnp.where(jnp.abs(difference) > rounding, difference, 0)


def deviation(values: jax.Array) -> jax.Array:
    """Standard deviation (ddof 1) along the second axis, zero for one value."""
    _, stderr, n = _mean_and_stderr(values, None)
    return stderr * jnp.sqrt(n)


def _seen(values: jax.Array, seen: jax.Array | None):
    """Which of the N examples were looked at, 1 or 0, and how many."""
    n = values.shape[-1]
    if seen is None:
        return jnp.ones([1, n], values.dtype), jnp.asarray(n, values.dtype)
    return seen.astype(values.dtype)[None], seen.sum().astype(values.dtype)


def _mean_and_stderr(values: jax.Array, seen: jax.Array | None):
    """Over the examples of ``[C, N]``: ``[C]``, ``[C]``, and their number ``[]``.

    Zero and zero where no example was looked at.
    """
    weight, n = _seen(values, seen)
    mean = values.sum(axis=1) / jnp.maximum(n, 1)
    centred = (values - mean[:, None]) * weight
    # Brought to at most one before they are squared: huge scores do not overflow.
    scale = jnp.abs(centred).max(axis=1)
    scale = jnp.where(scale > 0, scale, 1)
    squares = jnp.square(centred / scale[:, None]).sum(axis=1)
    variance = squares / jnp.maximum(n - 1, 1)
    return mean, scale * jnp.sqrt(variance / jnp.maximum(n, 1)), n


def normal_units(mean: jax.Array, stderr: jax.Array, n: Any) -> jax.Array:
    """The z value of a mean with its standard error, n examples; zero if n is 1."""
    freedom = jnp.maximum(n - 1, 1)
    # t beyond this is past the cap; dividing by its inverse times the mean at the
    # least keeps t finite where all differences are equal.
    floor = jnp.abs(mean) * 1e-6
    t = mean / jnp.where(mean == 0, 1, jnp.maximum(stderr, floor))
    z = jnp.sqrt(freedom * jnp.log1p(t * t / freedom))
    z = z * ((8 * freedom + 1) / (8 * freedom + 3))
    return jnp.where(n < 2, 0, jnp.sign(mean) * jnp.minimum(z, coins(n)))


def coins(n: Any) -> jax.Array:
    """The z value of n coins that all fall alike."""
    return jnp.asarray(_COINS)[jnp.clip(jnp.asarray(n, jnp.int32), 0, len(_COINS) - 1)]
