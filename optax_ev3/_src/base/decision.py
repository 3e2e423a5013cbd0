"""Decisions: what rules, guards and bounds take and give. No policy.

Dimensions: ``C`` candidates, ``K`` = C - 2 proposals, ``M`` objectives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ev3._src.base.evidence import Evidence, Index


class Decision(NamedTuple):
    """What a rule decides.

    Attributes:
      adopted: ``[]`` int32, index of the candidate that becomes visible.
      significant: ``[]`` bool, whether stable parameters are replaced.
      promoted: ``[]`` int32, index of the candidate that then becomes stable; None for
        the adopted one.
      priorities: ``[M]``, what each objective weighed, in the order of
        ``Rule.objectives``; None where they were not weighed. For the history.
      evidence: What may be told of the scores, in history and summary; None for all.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import adapt
      >>> stay = adapt.Decision(adopted=jnp.int32(2), significant=jnp.asarray(False))
    """

    adopted: jax.Array
    significant: jax.Array
    promoted: jax.Array | None = None
    priorities: jax.Array | None = None
    evidence: Evidence | None = None


class Rule(NamedTuple):
    """A rule, in the manner of ``optax.GradientTransformation``.

    Attributes:
      init: Maps the number of proposals K to the state of the rule, a tree of arrays.
      decide: Maps ``(evidence, rule_state, key)`` to ``(Decision, rule_state)``; pure,
        with the same shapes and dtypes of the state. Candidates that are not valid, or
        do not exist, are neither adopted nor promoted, whatever it decides: ``current``
        stays, or ``stable`` is adopted if only that is valid.
      objectives: Names of the objectives that it takes, the main one first; none for
        a single one of any name.
      forget: Maps ``(rule_state, fresh)`` to the state without what it knows of
        explorers that are others from now on, ``[K]`` bool; None where the state holds
        nothing of single explorers. For :func:`optax_ev3.evolve`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> from optax_ev3 import adapt
      >>> def decide(evidence, rule_state, key):
      ...     first_if_valid = jnp.where(evidence.valid[0], 0, evidence.current)
      ...     return adapt.Decision(first_if_valid, jnp.asarray(False)), rule_state
      >>> rule = adapt.Rule(init=lambda proposals: (), decide=decide)
      >>> tx = optax_ev3.ev3([optax.sgd(0.1)], lambda w: -(w**2), adapt=rule)
    """

    init: Callable[[int], Any]
    decide: Callable[[Evidence, Any, jax.Array], tuple[Decision, Any]]
    objectives: tuple[str, ...] = ()
    forget: Callable[[Any, jax.Array], Any] | None = None


class Guard(NamedTuple):
    """Stands between the scores and a rule, which sees what the guard releases.

    Attributes:
      init: Returns the state of the guard, a tree of arrays.
      release: Maps ``(evidence, guard_state, key)`` to the evidence that the rule gets,
        with an exact score ``[C]`` for each candidate, and the state.
      settle: Maps ``(guard_state, released, replaced, promoted)`` to the state after
        the decision on the evidence released: ``[]`` bool, whether stable was replaced,
        and ``[]`` int32, by which candidate.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import adapt, evidence as ev
      >>> def release(evidence, guard_state, key):  # means, in steps of 0.1
      ...     name = ev.single_objective(evidence)
      ...     rounded = jnp.round(ev.estimate(evidence, name).mean, 1)
      ...     released = ev.gather({name: rounded}, evidence.valid, evidence.is_ascent)
      ...     return released, guard_state
      >>> guard = adapt.Guard(
      ...     lambda: (), release, lambda guard_state, *decided: guard_state
      ... )
      >>> rule = adapt.guarded(adapt.greedy(), guard)
    """

    init: Callable[[], Any]
    release: Callable[[Evidence, Any, jax.Array], tuple[Evidence, Any]]
    settle: Callable[[Any, Evidence, jax.Array, jax.Array], Any]


class Bound(NamedTuple):
    """How surely every candidate is better than a reference, on the same examples.

    Attributes:
      p_value: Maps ``(evidence, objective, reference)`` to ``[C]``: where a candidate
        is no better, its value is below a with probability a at most. It is 1 where
        the candidate or the reference is not valid.
      lower: Maps ``(evidence, objective, reference, alpha)`` to ``[C]``: the gain in
        mean score exceeds this, save with probability alpha. It is -inf where nothing
        can be said.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import adapt, evidence
      >>> def p_value(told, objective, reference):  # says nothing, ever
      ...     return jnp.ones(told.candidates)
      >>> def lower(told, objective, reference, alpha):
      ...     return jnp.full(told.candidates, -jnp.inf)
      >>> rule = adapt.greedy(bound=evidence.Bound(p_value, lower))
    """

    p_value: Callable[[Evidence, str, Index], jax.Array]
    lower: Callable[[Evidence, str, Index, float | jax.Array], jax.Array]


# Validity.


def fallback(evidence: Evidence) -> jax.Array:
    """Where to go without a valid proposal: ``stable`` if only that is valid."""
    current, stable = evidence.current, evidence.stable
    only_stable = ~evidence.valid[current] & evidence.valid[stable]
    return jnp.where(only_stable, stable, current).astype(jnp.int32)


def enforce_validity(
    decision: Decision, evidence: Evidence, otherwise: Index | None = None
) -> tuple[Decision, jax.Array]:
    """The decision, without candidates that are not valid or do not exist.

    Args:
      decision: That of a rule.
      evidence: What it rests on; only valid candidates may be adopted or promoted.
      otherwise: ``[]``, the candidate that is adopted instead; default
        :func:`fallback`.

    Returns:
      The decision, with a promoted candidate, and ``[]`` bool, whether it differs from
      what was decided.

    Raises:
      TypeError: If the decision is not made of scalars of the right kind.
    """
    if otherwise is None:
        otherwise = fallback(evidence)
    significant = jnp.asarray(decision.significant)
    if significant.ndim or significant.dtype != bool:
        raise TypeError(
            f"a rule must return significant as a bool of shape [], got shape "
            f"{significant.shape} of {significant.dtype}."
        )
    adopted, exists = _index(decision.adopted, evidence, "adopted")
    may_adopt = exists & (evidence.valid[adopted] | (adopted == otherwise))
    promoted = adopted
    if decision.promoted is not None:
        promoted, exists = _index(decision.promoted, evidence, "promoted")
    may_promote = exists & evidence.valid[promoted]
    allowed = decision._replace(
        adopted=jnp.where(may_adopt, adopted, otherwise).astype(jnp.int32),
        significant=significant & may_promote,
        promoted=promoted,
    )
    return allowed, ~may_adopt | (significant & ~may_promote)


def _index(
    value: jax.Array, evidence: Evidence, name: str
) -> tuple[jax.Array, jax.Array]:
    """The index of a candidate, 0 if there is none, and whether it exists."""
    index = jnp.asarray(value)
    if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            f"a rule must return {name} as an integer of shape [], the index of a "
            f"candidate, got shape {index.shape} of {index.dtype}."
        )
    exists = (index >= 0) & (index < evidence.candidates)
    return jnp.where(exists, index, 0).astype(jnp.int32), exists
