"""Adapt: the weighted sum of several objectives.

Dimensions: ``M`` objectives, ``N`` examples.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ev3._src.adapt.arguments import (
    checked_numbers,
    decide_within,
    forgetting,
    single_rule,
)
from optax_ev3._src.base.checks import real
from optax_ev3._src.base.decision import Decision, Rule
from optax_ev3._src.base.evidence import Evidence, estimate

_FLOOR = 0.05  # share of its first weight that no objective falls below
_SUM = "weighted sum"  # the name of the only objective that the rule within sees


class WeightedState(NamedTuple):
    """State of :func:`weighted`.

    Attributes:
      inner: State of the rule for the weighted sum.
      weights: By name, ``[]`` float32.
      start: By name, ``[]`` float32: the score of ``current`` in the first round.
      rounds: ``[]`` int32.
    """

    inner: Any
    weights: dict[str, jax.Array]
    start: dict[str, jax.Array]
    rounds: jax.Array


def weighted(
    weights: Mapping[str, float],
    *,
    targets: Mapping[str, float] | None = None,
    rate: float | None = None,
    rule: Rule | None = None,
) -> Rule:
    r"""Adds the objectives up, with weights that may move to what is far from a target.

    Without targets the weights stay. With targets they move, by ``rate`` a round, to
    what is proportional to the first weight times what is left of the way to the
    target, :math:`\text{clip}((t_j - m_j) / (t_j - m_{j, 0}), 0, 1)`, by the score
    :math:`m_j` of ``current``. Their sum stays, and no weight falls below a twentieth
    of its first value. Fixed weights are a strong baseline: compare with them.

    Args:
      weights: By name of each objective, in 1 / units of its score; not negative, not
        all zero. The first one is the main objective in ``summary`` and ``history``.
      targets: By name, for all of them; the score that is enough.
      rate: Above 0 and at most 1, for weights that move to targets; default 0.1.
      rule: For the weighted sum; default :func:`optax_ev3.adapt.confident`.

    Returns:
      A rule for these objectives. Their scores are single values, or one for each of
      the same examples, or both.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If there is no weight, one is negative, or all are zero; if targets
        are not those of the objectives; if there is a rate without targets, or it is
        not above 0 and at most 1; at trace time, if aggregate metrics with resamples
        are mixed with scores of examples.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> from optax_ev3 import adapt
      >>> tx = optax_ev3.ev3(
      ...     [optax.sgd(0.1), optax.sgd(0.5)],
      ...     lambda w: {"fit": -((w - 1) ** 2), "small": -jnp.abs(w)},
      ...     adapt=adapt.weighted({"fit": 1.0, "small": 0.5}),
      ... )

    References:
      Kurin et al., `In defense of the unitary scalarization for deep multi-task
      learning <https://arxiv.org/abs/2201.04122>`_, 2022.
    """
    first = checked_numbers(weights, "weights")
    if sum(first.values()) == 0:
        raise ValueError(f"weights must not all be zero, got {dict(weights)}.")
    goals = _checked_targets(targets, first)
    rate = _checked_rate(rate, targets)
    inner = single_rule(rule)

    def init(proposals: int) -> WeightedState:
        def each(values: Mapping[str, float]) -> dict[str, jax.Array]:
            return {k: jnp.asarray(v, jnp.float32) for k, v in values.items()}

        zeros = dict.fromkeys(first, 0.0)
        rounds = jnp.zeros([], jnp.int32)
        return WeightedState(inner.init(proposals), each(first), each(zeros), rounds)

    def decide(
        evidence: Evidence, state: WeightedState, key: jax.Array
    ) -> tuple[Decision, WeightedState]:
        total = _sum(evidence, state.weights)
        decision, inner_state = decide_within(inner, total, state.inner, key)
        weights = jnp.stack([state.weights[k] for k in first])
        decision = decision._replace(priorities=weights)
        means = {k: estimate(evidence, k).mean[evidence.current] for k in first}
        start = {
            k: jnp.where(state.rounds == 0, means[k], state.start[k]).astype(
                jnp.float32
            )
            for k in first
        }
        moved = state.weights
        if goals:
            moved = _moved(state.weights, first, _left(goals, start, means), rate)
        return decision, WeightedState(inner_state, moved, start, state.rounds + 1)

    return Rule(init, decide, tuple(first), forgetting(inner))


def _left(
    goals: Mapping[str, float],
    start: Mapping[str, jax.Array],
    means: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """What is left of the way from the start to each goal, from 0 to 1."""
    way = {k: goals[k] - start[k] for k in goals}
    return {
        k: jnp.clip((goals[k] - means[k]) / jnp.where(way[k] > 0, way[k], 1), 0, 1)
        for k in goals
    }


def _moved(
    weights: Mapping[str, jax.Array],
    first: Mapping[str, float],
    left: Mapping[str, jax.Array],
    rate: float,
) -> dict[str, jax.Array]:
    """The weights, moved to what is far from its goal; their sum stays."""
    wanted = {k: first[k] * jnp.maximum(left[k], _FLOOR) for k in first}
    scale = sum(first.values()) / sum(wanted.values())
    return {
        k: (weights[k] + rate * (scale * wanted[k] - weights[k])).astype(jnp.float32)
        for k in first
    }


def _sum(evidence: Evidence, weights: Mapping[str, jax.Array]) -> Evidence:
    """The evidence of the weighted sum of all objectives."""
    resampled = [name for name in weights if name in evidence.resamples]
    others = [name for name in weights if name not in resampled]
    if resampled and any(evidence.scores[name].ndim == 2 for name in others):
        raise ValueError(
            f"adapt.weighted cannot add aggregate metrics with resamples, {resampled}, "
            f"to scores of examples, {others}. Take no resamples, samples=0."
        )

    def total(values: Mapping[str, jax.Array]) -> jax.Array:
        columns = max(x.ndim for x in values.values())
        terms = [
            weights[name] * (x if x.ndim == columns else x[:, None])
            for name, x in values.items()
        ]
        return functools.reduce(operator.add, terms)

    scores = total({name: evidence.scores[name] for name in weights})
    resamples = {}
    if resampled:
        parts = {name: evidence.scores[name] for name in others}
        parts |= {name: evidence.resamples[name] for name in resampled}
        resamples[_SUM] = total(parts)
    return dataclasses.replace(
        evidence, scores={_SUM: scores}, resamples=resamples, binary=frozenset()
    )


def _checked_targets(
    targets: Mapping[str, float] | None, weights: Mapping[str, float]
) -> dict[str, float]:
    """The targets, nothing without; raises unless they are those of the weights."""
    if targets is None:
        return {}
    if not isinstance(targets, Mapping):
        raise TypeError(f"targets must be a mapping from objectives, got {targets!r}.")
    if set(targets) != set(weights):
        raise ValueError(
            f"targets must be of the objectives {list(weights)}, got {list(targets)}."
        )
    goals = {k: real(v, f"targets[{k!r}]") for k, v in targets.items()}
    for name, value in goals.items():
        if not math.isfinite(value):
            raise ValueError(f"targets[{name!r}] must be finite, got {value}.")
    return goals


def _checked_rate(rate: float | None, targets: Mapping[str, float] | None) -> float:
    """How fast weights move; raises for a rate without targets."""
    if rate is None:
        return 0.1
    if not 0 < real(rate, "rate") <= 1:
        raise ValueError(f"rate must be above 0 and at most 1, got {rate}.")
    if targets is None:
        raise ValueError("a rate needs targets: without, weights do not move.")
    return rate
