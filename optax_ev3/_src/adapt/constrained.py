"""Adapt: one objective improves, and the others do not fall.

Dimensions: ``K`` proposals, ``C`` = K + 2 candidates, in the order proposals,
``current``, ``stable``; ``M`` objectives, ``N`` examples.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ev3._src.adapt.arguments import (
    checked_names,
    checked_numbers,
    decide_within,
    forgetting,
    single_rule,
)
from optax_ev3._src.adapt.bounds import checked_bound
from optax_ev3._src.base.checks import error_rate
from optax_ev3._src.base.decision import Bound, Decision, Rule, enforce_validity
from optax_ev3._src.base.evidence import Evidence, compare


class ConstrainedState(NamedTuple):
    """State of :func:`constrained`.

    Attributes:
      inner: State of the rule for the main objective.
      fallen: By name, ``[]`` float32: how far the stable parameters have fallen, by
        the estimates at each replacement, since they were highest.
    """

    inner: Any
    fallen: dict[str, jax.Array]


def constrained(
    maximize: str,
    tolerances: Mapping[str, float],
    *,
    confidence: float = 0.95,
    bound: Bound | None = None,
    rule: Rule | None = None,
) -> Rule:
    r"""Improves one objective, and lets none of the others fall: the safe choice.

    A candidate may be adopted only if, for every other objective j, it is shown to lose
    less than its tolerance against ``stable``: a lower bound of its gain, at level
    :math:`(1 - \text{confidence}) / (K + 1)`, of at least :math:`f_j - \epsilon_j`.
    There is no correction for the number of objectives, since a candidate has to pass
    them all (an intersection-union test). :math:`f_j` is what stable has already
    fallen over past replacements, so that small losses do not add up to more than the
    tolerance. Of those left, ``rule`` adopts one by the main objective; if none is,
    ``stable`` becomes visible.

    Proof takes examples: the tolerance should be some standard errors of a paired
    difference, or nothing passes, and training stands still.

    Args:
      maximize: Name of the main objective.
      tolerances: By name of the others, how much may be lost, in units of the score.
      confidence: That nothing adopted breaks a constraint, one-sided, for each round of
        fresh examples.
      bound: The test, see :mod:`optax_ev3.evidence`; default
        :func:`optax_ev3.evidence.standard`.
      rule: For the main objective; default :func:`optax_ev3.adapt.confident`.

    Returns:
      A rule for these objectives.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If there is no tolerance, one is negative or of the main objective, or
        ``confidence`` is not between 0.5 and 1.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> from optax_ev3 import adapt
      >>> tx = optax_ev3.ev3(
      ...     [optax.sgd(0.1), optax.sgd(0.5)],
      ...     lambda w: {"fit": -((w - 1) ** 2), "small": -jnp.abs(w)},
      ...     adapt=adapt.constrained("fit", {"small": 0.2}),
      ... )
      >>> w = jnp.zeros([])
      >>> updates, state = tx.update(2 * (w - 1), tx.init(w), w)  # 0.2 or 1.0
      >>> print(updates)
      0.2
    """
    checked_names([maximize], "maximize")
    limits = checked_numbers(tolerances, "tolerances")
    if maximize in limits:
        raise ValueError(f"{maximize!r} is to be maximized, and has a tolerance.")
    alpha = error_rate(confidence)
    test, inner = checked_bound(bound), single_rule(rule)

    def init(proposals: int) -> ConstrainedState:
        fallen = {name: jnp.zeros([], jnp.float32) for name in limits}
        return ConstrainedState(inner.init(proposals), fallen)

    def kept(evidence: Evidence, fallen: Mapping[str, jax.Array]) -> jax.Array:
        """Which candidates are shown to break no constraint, ``[C]`` bool."""
        stable = evidence.stable
        mask = jnp.ones([evidence.candidates], bool)
        for name, limit in limits.items():
            lower = test.lower(evidence, name, stable, alpha / stable)
            mask &= lower >= fallen[name] - limit
        # Stable parameters whose scores are not finite have nothing to lose.
        return (mask | ~evidence.valid[stable]).at[stable].set(True)

    def decide(
        evidence: Evidence, state: ConstrainedState, key: jax.Array
    ) -> tuple[Decision, ConstrainedState]:
        stable, fallen = evidence.stable, state.fallen
        valid = evidence.valid & kept(evidence, fallen)
        allowed = _only(evidence, maximize, valid)
        decision, inner_state = decide_within(inner, allowed, state.inner, key)
        # What may break a constraint is not valid here: stable takes its place.
        decision, _ = enforce_validity(decision, allowed, stable)

        def after(name: str) -> jax.Array:
            gain = compare(evidence, name, stable).gain[decision.promoted]
            fall = jnp.maximum(fallen[name] - gain, 0)
            fall = jnp.where(decision.significant, fall, fallen[name])
            return fall.astype(jnp.float32)

        fallen = {name: after(name) for name in limits}
        return decision, ConstrainedState(inner_state, fallen)

    return Rule(init, decide, (maximize, *limits), forgetting(inner))


# Parts.


def _only(evidence: Evidence, objective: str, valid: jax.Array) -> Evidence:
    """The evidence of one objective, with other candidates valid."""
    resamples = evidence.resamples
    return dataclasses.replace(
        evidence,
        scores={objective: evidence.scores[objective]},
        valid=valid,
        resamples={k: v for k, v in resamples.items() if k == objective},
        binary=evidence.binary & {objective},
    )
