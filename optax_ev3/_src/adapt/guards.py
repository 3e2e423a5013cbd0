"""Guards: what a held-out set that is used again and again may tell a rule.

Dimensions: ``C`` candidates, ``N`` examples.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ev3._src.base import checks, statistics
from optax_ev3._src.base import evidence as ev
from optax_ev3._src.base.decision import Decision, Guard, Rule, enforce_validity
from optax_ev3._src.base.evidence import Evidence


class GuardedState(NamedTuple):
    """State of :func:`guarded`.

    Attributes:
      rule_state: State of the rule.
      guard_state: State of the guard.
    """

    rule_state: Any
    guard_state: Any


def guarded(rule: Rule, guard: Guard) -> Rule:
    """The rule, which sees what the guard releases, and nothing else.

    For a held-out set that is used again and again. What people are told, by
    :func:`optax_ev3.history` and :func:`optax_ev3.summary`, is what was released, too.

    Args:
      rule: Any rule that takes one objective.
      guard: :func:`ladder`, or one of your own.

    Returns:
      A rule, for the objectives that the guard takes.

    Raises:
      TypeError: If the rule is no rule, or the guard no guard.
      ValueError: If the rule takes several objectives: a guard releases one.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> from optax_ev3 import adapt
      >>> x = jnp.linspace(-1.0, 1.0, 64)
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -((w * x - 3 * x) ** 2),  # always the same examples
      ...     adapt=adapt.guarded(adapt.greedy(), adapt.ladder()),
      ... )
    """
    if not isinstance(rule, Rule):
        raise TypeError(
            f"guarded takes a rule first, such as adapt.greedy(), got {rule!r} of type "
            f"{type(rule).__name__}."
        )
    if not isinstance(guard, Guard):
        raise TypeError(
            f"guarded takes a guard second, such as adapt.ladder(), got {guard!r} of "
            f"type {type(guard).__name__}."
        )
    if rule.objectives:
        raise ValueError(
            f"a guard releases one objective, the rule takes {list(rule.objectives)}."
        )

    def init(proposals: int) -> GuardedState:
        return GuardedState(rule.init(proposals), guard.init())

    def decide(
        evidence: Evidence, state: GuardedState, key: jax.Array
    ) -> tuple[Decision, GuardedState]:
        release_key = jax.random.fold_in(key, 1)
        released, guard_state = guard.release(evidence, state.guard_state, release_key)
        released = dataclasses.replace(
            released,
            # A guard may hide scores and candidates; it makes none valid.
            valid=released.valid & evidence.valid,
            past=evidence.past,
            credit=evidence.credit,
            one_step=evidence.one_step,
        )
        decision, rule_state = rule.decide(released, state.rule_state, key)
        # What is done, which the guard remembers, is valid.
        allowed, _ = enforce_validity(decision, released)
        replaced = allowed.significant & released.explored
        promoted = jnp.asarray(allowed.promoted)
        guard_state = guard.settle(guard_state, released, replaced, promoted)
        told = released if decision.evidence is None else decision.evidence
        decision = decision._replace(evidence=told)
        return decision, GuardedState(rule_state, guard_state)

    def forget(state: GuardedState, fresh: jax.Array) -> GuardedState:
        if rule.forget is None:
            return state
        return state._replace(rule_state=rule.forget(state.rule_state, fresh))

    return Rule(init, decide, forget=forget)


class LadderState(NamedTuple):
    """State of :func:`ladder`.

    Attributes:
      rounds: ``[]`` int32, rounds so far in which stable had a score.
      best: ``[]`` float32, the score released of the stable parameters.
    """

    rounds: jax.Array
    best: jax.Array


def ladder(confidence: float | None = 0.95, step: float | None = None) -> Guard:
    r"""Tells what is better or worse than ``stable`` by more than a threshold, only.

    All others look like ``stable``; a rule such as :func:`optax_ev3.adapt.greedy` then
    takes one of the explorers, by what was told of them before, or by lot. So little is
    said of the held-out set that little of it can be learnt by heart, and the score
    released of ``stable``, the one that :func:`optax_ev3.summary` reports, stays near
    to what new data would give. The Ladder of Blum and Hardt, which besides tells of
    harm, so that harmful explorers are not taken for good ones.

    The threshold for a candidate with paired standard error :math:`e`:

    - by default, :math:`e` times the normal quantile at level (1 - confidence) / (2 C -
      2), spent over rounds (:func:`optax_ev3.evidence.spend`): with probability
      confidence nothing is told by chance before the first true difference;
    - ``confidence=None``: :math:`e` itself, the parameter-free Ladder;
    - ``step``: a number, in units of the score.

    Args:
      confidence: See above; not used with a step.
      step: The threshold; scores are released in multiples of it.

    Returns:
      A guard for one objective with a score for each example.

    Raises:
      ValueError: If ``confidence`` is not between 0.5 and 1, or ``step`` is not above
        0; at trace time, if scores are not one for each example.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> from optax_ev3 import adapt
      >>> x = jnp.linspace(-1.0, 1.0, 64)
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -((w * x - 3 * x) ** 2),  # always the same examples
      ...     adapt=adapt.guarded(adapt.greedy(), adapt.ladder()),
      ... )

    References:
      Blum and Hardt, `The Ladder: a reliable leaderboard for machine learning
      competitions <https://arxiv.org/abs/1502.04585>`_, 2015.
    """
    alpha = None if confidence is None else checks.error_rate(confidence, ", or None")
    if step is not None and not step > 0:
        raise ValueError(f"step must be above 0, got {step}.")

    def threshold(
        evidence: Evidence, stderr: jax.Array, rounds: jax.Array
    ) -> jax.Array:
        if step is not None:
            return jnp.full_like(stderr, step)
        if alpha is None:
            return stderr
        comparisons = 2 * (evidence.candidates - 1)
        level = statistics.spend(alpha / comparisons, rounds)
        return statistics.z_value(level) * stderr

    def init() -> LadderState:
        return LadderState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def release(
        evidence: Evidence, state: LadderState, key: jax.Array
    ) -> tuple[Evidence, LadderState]:
        del key
        objective = ev.single_objective(evidence)
        ev.each_example(evidence, objective, "ladder")
        mean = ev.estimate(evidence, objective).mean.astype(jnp.float32)
        against = ev.compare(evidence, objective, evidence.stable)
        limit = threshold(evidence, against.stderr, state.rounds + 1)
        # As 1 / N is to scores of 0 or 1, for scores of any scale.
        unit = against.stderr / jnp.sqrt(ev.count(evidence, objective))
        unit = jnp.full_like(mean, step) if step else unit.astype(jnp.float32)
        rounded = jnp.round(mean / jnp.where(unit > 0, unit, 1)) * unit
        rounded = jnp.where(unit > 0, rounded, mean)
        best = jnp.where(state.rounds == 0, rounded[evidence.stable], state.best)
        # What is told to be better does not look equal or worse for being rounded.
        better = jnp.maximum(rounded, best + unit)
        worse = jnp.minimum(rounded, best - unit)
        told = jnp.where(against.gain > 0, better, worse)
        released = jnp.where(jnp.abs(against.gain) > limit, told, best)
        # Without a score of stable there is nothing to tell, and nothing to remember.
        known = evidence.valid[evidence.stable]
        state = LadderState(
            state.rounds + known.astype(jnp.int32),
            jnp.where(known, best, state.best),
        )
        return _released(evidence, objective, released), state

    def settle(
        state: LadderState,
        released: Evidence,
        replaced: jax.Array,
        promoted: jax.Array,
    ) -> LadderState:
        (scores,) = released.scores.values()
        return state._replace(best=jnp.where(replaced, scores[promoted], state.best))

    return Guard(init, release, settle)


def _released(evidence: Evidence, objective: str, values: jax.Array) -> Evidence:
    """Evidence of exact values in the place of scores."""
    values = jnp.where(evidence.valid, values, 0).astype(jnp.float32)
    return dataclasses.replace(
        evidence,
        scores={objective: values},
        resamples={},
        binary=frozenset(),
        example_mask=None,
    )
