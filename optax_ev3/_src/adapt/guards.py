"""Guards: what a held-out set that is used again and again may tell a rule.

Dimensions: ``C`` candidates, ``N`` examples.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ev3._src.base import checks, statistics
from optax_ev3._src.base import evidence as ev
from optax_ev3._src.base.evidence import Evidence


class Guard(NamedTuple):
    """Stands between the scores and the rule, which sees what the guard releases.

    Attributes:
      init: Maps a PRNG key to what the guard remembers, a tree of arrays.
      release: Maps ``(evidence, memory, key)`` to the evidence that the rule gets, in
        exact figures ``[C]``, and the memory.
      settle: Maps ``(memory, released, replaced, promoted)`` to the memory after the
        decision on the evidence released: ``[]`` bool, whether stable was replaced, and
        ``[]`` int32, by which candidate.
    """

    init: Callable[[jax.Array], Any]
    release: Callable[[Evidence, Any, jax.Array], tuple[Evidence, Any]]
    settle: Callable[[Any, Evidence, jax.Array, jax.Array], Any]


class LadderMemory(NamedTuple):
    """What :func:`ladder` remembers.

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
      >>> from optax_ev3 import adapt, evidence
      >>> x = jnp.linspace(-1.0, 1.0, 64)
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -((w * x - 3 * x) ** 2),  # always the same examples
      ...     adapt=adapt.greedy(),
      ...     guard=evidence.ladder(),
      ... )

    References:
      Blum and Hardt, `The Ladder: a reliable leaderboard for machine learning
      competitions <https://arxiv.org/abs/1502.04585>`_, 2015.
    """
    alpha = None if confidence is None else checks.error_rate(confidence, ", or None")
    if step is not None and not step > 0:
        raise ValueError(f"step must be above 0, got {step}.")

    def threshold(evidence, stderr, rounds):
        if step is not None:
            return jnp.full_like(stderr, step)
        if alpha is None:
            return stderr
        comparisons = 2 * (evidence.valid.shape[0] - 1)
        level = statistics.spend(alpha / comparisons, rounds)
        return statistics.z_value(level) * stderr

    def init(key):
        del key
        return LadderMemory(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def release(evidence, memory, key):
        del key
        objective = ev.single_objective(evidence)
        ev.each_example(evidence, objective, "ladder")
        mean = ev.estimate(evidence, objective).mean.astype(jnp.float32)
        against = ev.compare(evidence, objective, mean.shape[0] - 1)
        limit = threshold(evidence, against.stderr, memory.rounds + 1)
        # As 1 / N is to scores of 0 or 1, for scores of any scale.
        unit = against.stderr / jnp.sqrt(ev.count(evidence, objective))
        unit = jnp.full_like(mean, step) if step else unit.astype(jnp.float32)
        rounded = jnp.round(mean / jnp.where(unit > 0, unit, 1)) * unit
        rounded = jnp.where(unit > 0, rounded, mean)
        best = jnp.where(memory.rounds == 0, rounded[-1], memory.best)
        # What is told to be better does not look equal or worse for being rounded.
        better = jnp.maximum(rounded, best + unit)
        worse = jnp.minimum(rounded, best - unit)
        told = jnp.where(against.gain > 0, better, worse)
        released = jnp.where(jnp.abs(against.gain) > limit, told, best)
        # Without a score of stable there is nothing to tell, and nothing to remember.
        known = evidence.valid[-1]
        memory = LadderMemory(
            memory.rounds + known.astype(jnp.int32),
            jnp.where(known, best, memory.best),
        )
        return _released(evidence, objective, released), memory

    def settle(memory, released, replaced, promoted):
        (scores,) = released.scores.values()
        return memory._replace(best=jnp.where(replaced, scores[promoted], memory.best))

    return Guard(init, release, settle)


class ThresholdoutMemory(NamedTuple):
    """What :func:`thresholdout` remembers.

    Attributes:
      budget: ``[]`` int32, how many held-out scores may yet be released.
      noise: ``[]`` float32, what is added to the threshold until the next release.
    """

    budget: jax.Array
    noise: jax.Array


def thresholdout(
    train: str = "train",
    *,
    threshold: float = 0.04,
    noise: float = 0.01,
    budget: int = 1000,
) -> Guard:
    r"""Tells training scores while they agree with held-out ones, else noisy held-out.

    A candidate's held-out mean h is told as :math:`h + \xi` where :math:`|t - h| > T +
    \gamma + \eta`, with its mean t on training examples; otherwise t is. :math:`\xi,
    \gamma, \eta` are Laplace noise of scales :math:`\sigma, 2\sigma, 4\sigma`,
    :math:`\gamma` drawn anew after each release. When the budget is spent, all that is
    told is t.

    Args:
      train: Name of the objective that holds scores of training examples; the other
        one is held out.
      threshold: T, in units of the score.
      noise: :math:`\sigma`, in units of the score; the defaults are those of the
        paper's experiments.
      budget: Held-out scores that may be released.

    Returns:
      A guard for two objectives, of which rules see one.

    Raises:
      ValueError: If ``threshold`` or ``noise`` is negative, or ``budget`` below 1; at
        trace time, if there are other objectives than said.

    References:
      Dwork et al., `Generalization in adaptive data analysis and holdout reuse
      <https://arxiv.org/abs/1506.02629>`_, 2015, figure 1.
    """
    for name, value in {"threshold": threshold, "noise": noise}.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}.")
    if budget < 1:
        raise ValueError(f"budget must be at least 1 release, got {budget}.")

    def init(key):
        gamma = 2 * noise * jax.random.laplace(key, [])
        return ThresholdoutMemory(jnp.asarray(budget, jnp.int32), gamma)

    def release(evidence, memory, key):
        held_out = sorted(set(evidence.scores) - {train})
        if train not in evidence.scores or len(held_out) != 1:
            raise ValueError(
                f"thresholdout needs two objectives, {train!r} and a held-out one, "
                f"assess_fn returned {sorted(evidence.scores)}."
            )
        seen, own = (ev.estimate(evidence, k).mean for k in (train, held_out[0]))
        key, new_key = jax.random.split(key)
        eta, xi = noise * jax.random.laplace(key, [2, *seen.shape])
        far = jnp.abs(seen - own) > threshold + memory.noise + 4 * eta
        # The first ones as far as the budget goes.
        told = far & evidence.valid
        told &= jnp.cumsum(told) <= memory.budget
        released = jnp.where(told, own + xi, seen)
        gamma = 2 * noise * jax.random.laplace(new_key, [])
        memory = ThresholdoutMemory(
            memory.budget - told.sum(dtype=jnp.int32),
            jnp.where(told.any(), gamma, memory.noise),
        )
        return _released(evidence, held_out[0], released), memory

    return Guard(init, release, lambda memory, *_: memory)


def _released(evidence: Evidence, objective: str, figures: jax.Array) -> Evidence:
    """Evidence of exact figures in the place of scores."""
    figures = jnp.where(evidence.valid, figures, 0).astype(jnp.float32)
    return dataclasses.replace(
        evidence,
        scores={objective: figures},
        resamples={},
        binary=frozenset(),
        example_mask=None,
    )
