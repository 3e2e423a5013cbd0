"""Evidence: what the scores of one round say, and how surely. No policy.

Dimensions: ``C`` candidates, ``N`` examples on all devices, ``B`` resamples.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_ev3._src.base import statistics, trees

# The place of a candidate: a Python or traced integer.
Index = int | jax.Array


class Estimate(NamedTuple):
    """Mean score of every candidate, taken alone.

    Attributes:
      mean: ``[C]``.
      stderr: ``[C]``, standard deviation (ddof 1) over ``sqrt(N)``; zero for exact
        values.

    Examples:
      >>> from optax_ev3 import evidence
      >>> evidence.Estimate(mean=0.5, stderr=0.1).stderr
      0.1
    """

    mean: jax.Array
    stderr: jax.Array


class Comparison(NamedTuple):
    """Every candidate against one reference, on the same examples.

    Attributes:
      gain: ``[C]``, mean of candidate minus reference.
      stderr: ``[C]``, standard error of that mean; zero for exact values.
      z: ``[C]``, the evidence as a z value: where candidate and reference are equally
        good, it is approximately N(0, 1).

    Examples:
      >>> from optax_ev3 import evidence
      >>> evidence.Comparison(gain=0.2, stderr=0.1, z=1.9).z
      1.9
    """

    gain: jax.Array
    stderr: jax.Array
    z: jax.Array


class Resampled(NamedTuple):
    """An aggregate metric, and how it varies where the examples are drawn again.

    Attributes:
      value: ``[C]``, on the examples as they are.
      resamples: ``[C, B]``, on B bootstrap samples, the same for all candidates.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import evidence
      >>> f1 = evidence.Resampled(jnp.array([0.8]), jnp.array([[0.9, 0.7]]))
    """

    value: jax.Array
    resamples: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "scores",
        "valid",
        "is_ascent",
        "resamples",
        "example_mask",
        "past",
        "credit",
    ],
    meta_fields=["binary", "one_step"],
)
@dataclasses.dataclass(frozen=True)
class Evidence:
    """The scores of all candidates of a round, on the same examples.

    Attributes:
      scores: For each objective ``[C, N]``, or ``[C]`` where it is one value; float32
        or wider, higher is better. Rows of invalid candidates are zero.
      valid: ``[C]`` bool, false where the update or a score is not finite, or scores
        are too large to be added up.
      is_ascent: ``[C]`` bool, true where the update raises the explorer's loss to first
        order.
      resamples: For objectives that are an aggregate metric of all examples ``[C, B]``:
        its values on B bootstrap samples. Other single values are exact.
      binary: Names of the objectives whose scores are known to be 0 or 1, static.
      example_mask: ``[N]`` bool, the examples that were looked at; None for all. The
        scores of the others are zero.
      past: The record of past rounds, or None: ring buffers, see
        :func:`optax_ev3.history` for what they hold.
      credit: ``[K]``, see :func:`optax_ev3.credit`; None where nothing is known.
      one_step: Whether all rounds have one step, which says little, static.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import evidence
      >>> told = evidence.gather({"fit": jnp.tri(3)}, jnp.ones(3) > 0, jnp.ones(3) < 0)
      >>> told.candidates, told.proposals, told.current, told.stable
      (3, 1, 1, 2)
    """

    scores: Mapping[str, jax.Array]
    valid: jax.Array
    is_ascent: jax.Array
    resamples: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    binary: frozenset[str] = frozenset()
    example_mask: jax.Array | None = None
    past: Any = None
    credit: jax.Array | None = None
    one_step: bool = True

    @property
    def candidates(self) -> int:
        """C, how many candidates there are."""
        return self.valid.shape[0]

    @property
    def proposals(self) -> int:
        """How many candidates were proposed; they come before ``current``."""
        return self.candidates - 2

    @property
    def current(self) -> int:
        """The place of the parameters with which the round began."""
        return self.candidates - 2

    @property
    def stable(self) -> int:
        """The place of the best parameters known to be good."""
        return self.candidates - 1

    @property
    def explored(self) -> jax.Array:
        """Whether any proposal is valid: ``[]`` bool."""
        return self.valid[: self.proposals].any()


def gather(
    scores: Mapping[str, jax.Array | Resampled],
    finite: jax.Array,
    is_ascent: jax.Array,
    axis_name: Any = None,
    binary: frozenset[str] = frozenset(),
    example_mask: jax.Array | None = None,
) -> Evidence:
    """Collects scores into evidence, and says which candidates are valid.

    Args:
      scores: For each objective ``[C, n]``, ``[C]``, or an aggregate metric with its
        resamples.
      finite: ``[C]`` bool, whether each candidate's update is finite.
      is_ascent: ``[C]`` bool, see :class:`Evidence`.
      axis_name: Mapped axis over whose D devices examples are spread, so that N = nD,
        or None. All devices get the same evidence: the scores of all, in their order.
        A candidate is valid where it is so on all.
      binary: See :class:`Evidence`.
      example_mask: ``[n]`` bool, see :class:`Evidence`. What the others scored is
        ignored.

    Returns:
      The evidence of the round.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import evidence
      >>> scores = {"score": jnp.array([[2.0, jnp.nan], [1.0, 1.0], [0.0, 0.0]])}
      >>> told = evidence.gather(scores, jnp.ones(3, bool), jnp.zeros(3, bool))
      >>> print(told.valid)
      [False  True  True]
    """
    resamples = {k: v.resamples for k, v in scores.items() if isinstance(v, Resampled)}
    plain = {k: v.value if isinstance(v, Resampled) else v for k, v in scores.items()}
    if example_mask is not None:
        plain = {
            name: jnp.where(example_mask[None], values, 0)
            if values.ndim == 2
            else values
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

    def clean(values: jax.Array) -> jax.Array:
        mask = valid.reshape((-1,) + (1,) * (values.ndim - 1))
        values = jnp.where(mask, values, 0)
        if axis_name is None:
            return values
        if values.ndim == 1:
            return lax.pmean(values, axis_name)
        return trees.unite(values, axis_name, axis=1)

    plain = {name: clean(values) for name, values in plain.items()}
    # Aggregate metrics are of all examples, and the same on all devices.
    resamples = {k: jnp.where(valid[:, None], v, 0) for k, v in resamples.items()}
    if example_mask is not None and axis_name is not None:
        example_mask = trees.unite(example_mask, axis_name, axis=0)
    return Evidence(plain, valid, is_ascent, resamples, frozenset(binary), example_mask)


def estimate(evidence: Evidence, objective: str) -> Estimate:
    """Mean and standard error of every candidate alone.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import evidence
      >>> told = evidence.gather({"fit": jnp.tri(3)}, jnp.ones(3) > 0, jnp.ones(3) < 0)
      >>> print(evidence.estimate(told, "fit").mean)
      [0.33 0.67 1.  ]
    """
    values = evidence.scores[objective]
    if values.ndim == 1:
        spread = jnp.zeros_like(values)
        if objective in evidence.resamples:
            spread = statistics.deviation(evidence.resamples[objective])
        return Estimate(values, spread)
    return Estimate(*statistics.mean_and_stderr(values, evidence.example_mask)[:2])


class Differences(NamedTuple):
    """Every candidate minus one reference, example by example.

    Attributes:
      values: ``[C, N]``; zero for examples that were not looked at, and where the
        candidate or the reference is not valid.
      mask: ``[1, N]``, 1 for examples that were looked at, else 0.
      n: ``[]``, how many those are.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import evidence
      >>> print(evidence.Differences(jnp.eye(2), jnp.ones([1, 2]), jnp.array(2.0)).mean)
      [0.5 0.5]
    """

    values: jax.Array
    mask: jax.Array
    n: jax.Array

    @property
    def mean(self) -> jax.Array:
        """Mean difference ``[C]``, zero where no example was looked at."""
        return self.values.sum(axis=1) / jnp.maximum(self.n, 1)


def differences(evidence: Evidence, objective: str, reference: Index) -> Differences:
    """Scores of every candidate minus those of one, ties within rounding made exact.

    Args:
      evidence: The scores of the round, one for each example.
      objective: Which objective to compare.
      reference: Index of the reference, a Python or traced integer.

    Raises:
      ValueError: If the objective is a single value.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import evidence
      >>> told = evidence.gather({"fit": jnp.tri(3)}, jnp.ones(3) > 0, jnp.ones(3) < 0)
      >>> print(evidence.differences(told, "fit", told.current).values[0])
      [ 0. -1.  0.]
    """
    values = each_example(evidence, objective)
    other = jnp.expand_dims(values[reference], 0)
    both = evidence.valid & evidence.valid[reference]
    difference = statistics.paired_difference(values, other)
    mask, n = statistics.mask_and_count(values, evidence.example_mask)
    return Differences(jnp.where(both[:, None], difference, 0) * mask, mask, n)


def compare(
    evidence: Evidence,
    objective: str,
    reference: Index,
    noise: jax.Array | float = 0.0,
) -> Comparison:
    r"""Paired comparison of every candidate with one of them.

    With :math:`D_i` the difference on example i, :math:`t = \bar D / (s / \sqrt N)`,
    made a z value by Wallace's transformation

    .. math:: z = \frac{8\nu + 1}{8\nu + 3} \sqrt{\nu \ln(1 + t^2/\nu)},
              \qquad \nu = N - 1,

    which errs by less than 0.03 for :math:`\nu \ge 4` and :math:`|z| \le 3`, on the
    cautious side in the tails. Evidence is never stronger than that of N coins
    that all fall alike, :math:`p = 2^{-N}`, so that a few examples with equal
    differences are not taken for certainty; and differences on an example within 8
    units of rounding are ties, so that candidates which are the same but for the order
    of operations are not told apart.

    Aggregate metrics are compared by the spread :math:`s^*` of their differences over
    the bootstrap samples, :math:`z = D / s^*`, and the same limit for B coins. Exact
    values are compared with ``noise``, :math:`z = D / noise`; without noise any
    difference is certain.

    Args:
      evidence: The scores of the round.
      objective: Which objective to compare.
      reference: Index of the reference, a Python or traced integer.
      noise: ``[]``, standard deviation of the differences between exact values.

    Returns:
      Gains, standard errors and z values, all ``[C]``; zero where the candidate or
      the reference is not valid.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import evidence
      >>> told = evidence.gather({"fit": jnp.tri(3)}, jnp.ones(3) > 0, jnp.ones(3) < 0)
      >>> print(evidence.compare(told, "fit", told.current).gain)
      [-0.33  0.    0.33]

    References:
      Wallace, `Bounds on normal approximations to Student's and the chi-square
      distributions <https://doi.org/10.1214/aoms/1177706083>`_, 1959.
    """
    values = evidence.scores[objective]
    if values.ndim == 2:
        paired = differences(evidence, objective, reference)
        mean, stderr, n = statistics.mean_and_stderr(
            paired.values, evidence.example_mask
        )
        return Comparison(mean, stderr, statistics.t_to_z(mean, stderr, n))
    both = evidence.valid & evidence.valid[reference]
    gain = jnp.where(both, values - values[reference], 0)
    if objective in evidence.resamples:
        samples = evidence.resamples[objective]
        spread = samples - jnp.expand_dims(samples[reference], 0)
        stderr = jnp.where(both, statistics.deviation(spread), 0)
        limit = statistics.max_z(samples.shape[1])
        z = gain / jnp.maximum(stderr, jnp.abs(gain) / limit)
    else:
        stderr = jnp.zeros_like(gain)
        z = gain / jnp.maximum(jnp.abs(gain) / statistics.CERTAIN, noise)
    return Comparison(gain, stderr, jnp.where(gain == 0, 0, z))


def take(evidence: Evidence, rows: slice) -> Evidence:
    """The evidence of some of the examples.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import evidence
      >>> told = evidence.gather({"fit": jnp.tri(3)}, jnp.ones(3) > 0, jnp.ones(3) < 0)
      >>> print(evidence.take(told, slice(None, 2)).scores["fit"].shape)
      (3, 2)
    """
    scores = {k: v[:, rows] if v.ndim == 2 else v for k, v in evidence.scores.items()}
    mask = evidence.example_mask
    mask = None if mask is None else mask[rows]
    return dataclasses.replace(evidence, scores=scores, example_mask=mask)


def examples(evidence: Evidence) -> jax.Array:
    """How many examples have scores of their own: ``[]`` int32."""
    sizes = [v.shape[1] for v in evidence.scores.values() if v.ndim == 2]
    if evidence.example_mask is not None:
        return evidence.example_mask.sum(dtype=jnp.int32)
    return jnp.asarray(max(sizes, default=0), jnp.int32)


def count(evidence: Evidence, objective: str) -> jax.Array:
    """How many examples, or resamples, stand behind the scores: ``[]`` float.

    Exact values count as any number.
    """
    values = evidence.scores[objective]
    if values.ndim == 2:
        return statistics.mask_and_count(values, evidence.example_mask)[1]
    if objective in evidence.resamples:
        return jnp.asarray(evidence.resamples[objective].shape[1], values.dtype)
    return jnp.asarray(statistics.MANY, values.dtype)


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

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import evidence
      >>> told = evidence.gather({"fit": jnp.tri(3)}, jnp.ones(3) > 0, jnp.ones(3) < 0)
      >>> print(evidence.single_objective(told))
      fit
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
      ValueError: If it is a single value.
    """
    values = evidence.scores[objective]
    if values.ndim == 1:
        raise ValueError(
            f"{who} needs a score for each example, objective {objective!r} is a "
            f"single value."
        )
    return values
