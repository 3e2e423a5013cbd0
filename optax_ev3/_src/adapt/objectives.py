"""Adapt: rules for several objectives.

Dimensions: ``K`` explorers, ``C`` = K + 2 candidates, in the order explorers,
``current``, ``stable``; ``M`` objectives, ``N`` examples.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ev3._src.adapt.bounds import Bound, checked_bound
from optax_ev3._src.adapt.rules import (
    Decision,
    Rule,
    confident,
    first_of,
    overrule,
    untied,
)
from optax_ev3._src.base import control
from optax_ev3._src.base.checks import error_rate, real
from optax_ev3._src.base.evidence import Evidence, compare, estimate, single_objective


class ConstrainedMemory(NamedTuple):
    """What :func:`constrained` remembers.

    Attributes:
      inner: What the rule for the main objective remembers.
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
    _checked_names([maximize], "maximize")
    limits = _checked_numbers(tolerances, "tolerances")
    if maximize in limits:
        raise ValueError(f"{maximize!r} is to be maximized, and has a tolerance.")
    alpha = error_rate(confidence)
    bound = checked_bound(bound)
    rule = _single(rule)

    def init(explorers):
        fallen = {name: jnp.zeros([], jnp.float32) for name in limits}
        return ConstrainedMemory(rule.init(explorers), fallen)

    def decide(evidence, memory, key):
        stable = evidence.valid.shape[0] - 1
        kept = jnp.ones([stable + 1], bool)
        for name, limit in limits.items():
            lower = bound.lower(evidence, name, stable, alpha / stable)
            kept &= lower >= memory.fallen[name] - limit
        # Stable parameters whose scores are not finite have nothing to lose.
        kept |= ~evidence.valid[stable]
        kept = kept.at[stable].set(True)
        seen = _only(evidence, maximize, evidence.valid & kept)
        decision, inner = rule.decide(seen, memory.inner, key)
        decision, _ = overrule(decision, seen.valid, stable)

        def fall(name):
            gain = compare(evidence, name, stable).gain[decision.promoted]
            fallen = jnp.maximum(memory.fallen[name] - gain, 0)
            fallen = jnp.where(decision.significant, fallen, memory.fallen[name])
            return fallen.astype(jnp.float32)

        return decision, ConstrainedMemory(inner, {name: fall(name) for name in limits})

    return Rule(init, decide, (maximize, *limits), _forgetting(rule))


class WeightedMemory(NamedTuple):
    """What :func:`weighted` remembers.

    Attributes:
      inner: What the rule for the weighted sum remembers.
      weights: By name, ``[]`` float32.
      start: By name, ``[]`` float32: the score of ``current`` in the first round.
      progress: By name, ``[]`` float32: what was gained lately, as z values a round.
      rounds: ``[]`` int32.
    """

    inner: Any
    weights: dict[str, jax.Array]
    start: dict[str, jax.Array]
    progress: dict[str, jax.Array]
    rounds: jax.Array


_LATELY = 0.9  # what progress of an earlier round weighs, a round later
_FLOOR = 0.05  # share of its first weight that no objective falls below


def weighted(
    weights: Mapping[str, float],
    *,
    targets: Mapping[str, float] | None = None,
    rate: float = 0.0,
    rule: Rule | None = None,
) -> Rule:
    r"""Adds the objectives up, with weights that may move to what lags behind.

    With ``rate`` 0 the weights stay. Else they move, by this rate a round, to what is
    proportional to

    - with targets, the first weight times what is left of the way to the target,
      :math:`\text{clip}((t_j - m_j) / (t_j - m_{j, 0}), 0, 1)`, by the score
      :math:`m_j` of ``current``;
    - without, the first weight times :math:`e^{-p_j}`, where :math:`p_j` is the mean z
      value of what was adopted lately against ``current``: what has not improved gets
      more.

    Their sum stays, and no weight falls below a twentieth of its first value. Fixed
    weights are a strong baseline: compare with them.

    Args:
      weights: By name of each objective, in 1 / units of its score; not negative, not
        all zero. The first one is the main objective in ``summary`` and ``history``.
      targets: By name, for all of them; the score that is enough.
      rate: From 0 to 1.
      rule: For the weighted sum; default :func:`optax_ev3.adapt.confident`.

    Returns:
      A rule for these objectives. Their scores are single figures, or one for each of
      the same examples, or both.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If there is no weight, one is negative, or all are zero; if targets
        are not those of the objectives, or without a rate; if the rate is not between
        0 and 1; at trace time, if figures with resamples are mixed with others.

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
    first = _checked_numbers(weights, "weights")
    total = sum(first.values())
    if total == 0:
        raise ValueError(f"weights must not all be zero, got {dict(weights)}.")
    goals = _checked_targets(targets, first, rate)
    rule = _single(rule)

    def init(explorers):
        def each(values):
            return {k: jnp.asarray(v, jnp.float32) for k, v in values.items()}

        zeros = dict.fromkeys(first, 0.0)
        rounds = jnp.zeros([], jnp.int32)
        return WeightedMemory(
            rule.init(explorers), each(first), each(zeros), each(zeros), rounds
        )

    def decide(evidence, memory, key):
        current = evidence.valid.shape[0] - 2
        seen = _sum(evidence, memory.weights)
        decision, inner = rule.decide(seen, memory.inner, key)
        means = {k: estimate(evidence, k).mean[current] for k in first}
        start = {
            k: jnp.where(memory.rounds == 0, means[k], memory.start[k]) for k in first
        }
        progress = {
            k: _LATELY * memory.progress[k]
            + (1 - _LATELY) * compare(evidence, k, current).z[decision.adopted]
            for k in first
        }
        if goals:
            way = {k: goals[k] - start[k] for k in first}
            left = {
                k: jnp.clip(
                    (goals[k] - means[k]) / jnp.where(way[k] > 0, way[k], 1), 0, 1
                )
                for k in first
            }
        else:
            left = {k: jnp.exp(-progress[k]) for k in first}
        wanted = {k: first[k] * jnp.maximum(left[k], _FLOOR) for k in first}
        scale = total / sum(wanted.values())
        moved = {
            k: memory.weights[k] + rate * (scale * wanted[k] - memory.weights[k])
            for k in first
        }
        moved, start, progress = jax.tree.map(
            lambda x: x.astype(jnp.float32), (moved, start, progress)
        )
        rounds = memory.rounds + 1
        decision = decision._replace(
            priorities=jnp.stack([memory.weights[k] for k in first])
        )
        return decision, WeightedMemory(inner, moved, start, progress, rounds)

    return Rule(init, decide, tuple(first), _forgetting(rule))


def lexicographic(
    tolerances: Mapping[str, float],
    *,
    confidence: float = 0.95,
    bound: Bound | None = None,
) -> Rule:
    r"""Takes the objectives one after the other, the most important one first.

    Of all candidates those remain that are not shown to be worse than the best one by
    more than :math:`\epsilon_1` in objective 1, of these those that are not in
    objective 2, and so on. Of what is left the explorer with most credit
    (:func:`optax_ev3.credit`) is adopted, else ``current``, else ``stable``. Stable
    is replaced by what is adopted where it is shown to be better in one objective and,
    in all more important ones, to lose less than their tolerances; such losses may add
    up over replacements.

    Args:
      tolerances: By name, in the order of priority: differences that do not count, in
        units of the score.
      confidence: Of each test, one-sided, corrected for the K + 1 candidates and, where
        stable is replaced, for the M objectives.
      bound: The test, see :mod:`optax_ev3.evidence`; default
        :func:`optax_ev3.evidence.standard`.

    Returns:
      A rule for these objectives.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If there is no tolerance or one is negative, or ``confidence`` is not
        between 0.5 and 1.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> from optax_ev3 import adapt
      >>> tx = optax_ev3.ev3(
      ...     [optax.sgd(0.1), optax.sgd(0.5)],
      ...     lambda w: {"fit": -((w - 1) ** 2), "small": -jnp.abs(w)},
      ...     adapt=adapt.lexicographic({"fit": 0.7, "small": 0.0}),
      ... )
      >>> w = jnp.zeros([])
      >>> updates, state = tx.update(2 * (w - 1), tx.init(w), w)  # 0.2 or 1.0
      >>> print(updates)
      0.2
    """
    limits = _checked_numbers(tolerances, "tolerances")
    alpha = error_rate(confidence)
    bound = checked_bound(bound)

    def decide(evidence, memory, key):
        stable = evidence.valid.shape[0] - 1
        left = evidence.valid
        for name, limit in limits.items():
            mean = estimate(evidence, name).mean
            best = jnp.argmax(jnp.where(left, mean, -jnp.inf))
            ahead = _ahead(evidence, name, best, bound, alpha / stable)
            left &= ahead <= limit
        adopted = untied(evidence, left, key)
        level = alpha / stable / len(limits)
        proven, safe = jnp.zeros([stable + 1], bool), evidence.valid
        for name, limit in limits.items():
            lower = bound.lower(evidence, name, stable, level)
            proven |= safe & (lower > 0)
            safe &= lower >= -limit
        return Decision(adopted, proven[adopted]), memory

    return Rule(lambda explorers: (), decide, tuple(limits))


def lexicase(
    objectives: Sequence[str] = (),
    *,
    epsilon: float | None = None,
    confidence: float = 0.95,
    bound: Bound | None = None,
) -> Rule:
    r"""Lets candidates pass one case after the other, in an order drawn by lot.

    A case is one example by one objective, or an objective that is a single figure. Of
    all candidates those remain that come within :math:`\epsilon` of the best one on the
    first case, of these those that do so on the second, until one is left, or no case.
    Specialists get their turn, which do well on cases where others fail, however low
    their mean is. Ties go to explorers before ``current``, to ``current`` before
    ``stable``, and among explorers to the one with most credit
    (:func:`optax_ev3.credit`), or by lot.

    Stable is replaced by what is adopted where that is shown to have a higher mean by
    every objective.

    Args:
      objectives: Names of the objectives; none for a single one of any name.
      epsilon: In units of the score; default: for each case the median absolute
        deviation of the candidates' scores from their median.
      confidence: Of the tests by which stable is replaced, one-sided, corrected for the
        K + 1 candidates.
      bound: The test, see :mod:`optax_ev3.evidence`; default
        :func:`optax_ev3.evidence.standard`.

    Returns:
      A rule for these objectives.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If ``epsilon`` is negative, or ``confidence`` is not between 0.5 and
        1.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> from optax_ev3 import adapt
      >>> tx = optax_ev3.ev3(
      ...     [optax.sgd(0.1), optax.sgd(0.5)],
      ...     lambda w: -jnp.abs(w - jnp.array([0.5, 1.0, 2.0])),
      ...     adapt=adapt.lexicase(),
      ... )

    References:
      La Cava et al., `A probabilistic and multi-objective analysis of lexicase
      selection and epsilon-lexicase selection <https://arxiv.org/abs/1709.05394>`_,
      2019.
    """
    names = _checked_names(objectives, "objectives")
    if epsilon is not None:
        epsilon = _checked_number(epsilon, "epsilon")
    alpha = error_rate(confidence)
    bound = checked_bound(bound)

    def decide(evidence, memory, key):
        taken = names or (single_objective(evidence),)
        stable = evidence.valid.shape[0] - 1
        lot, order = jax.random.split(key)
        left = _pass_cases(evidence, taken, epsilon, order)
        adopted = untied(evidence, left, lot)
        better = jnp.ones([stable + 1], bool)
        for name in taken:
            better &= bound.p_value(evidence, name, stable) < alpha / stable
        return Decision(adopted, better[adopted]), memory

    return Rule(lambda explorers: (), decide, names)


def pareto(
    tolerances: Mapping[str, float],
    *,
    confidence: float = 0.95,
    bound: Bound | None = None,
) -> Rule:
    r"""Moves along the front: no objective is more important than another.

    An explorer is out where it is shown to lose more than a tolerance against
    ``current`` by some objective, and not shown to gain by any. Of the others the one
    is adopted with the highest sum of paired z values against ``current``, the
    objectives weighted by lot in every round, uniformly. Where all are out, ``current``
    stays; where both ``current`` and the chosen one are shown to lose so much against
    ``stable``, and not to gain, ``stable`` becomes visible.

    Stable is replaced by what is adopted where that is shown to gain by one objective,
    and to lose less than its tolerance by any. Losses below the tolerances may add up
    over replacements: what must not fall is for :func:`constrained`.

    Args:
      tolerances: By name of each objective, the loss that is borne, in units of the
        score. The first one is the main objective in ``summary`` and ``history``.
      confidence: Of each test, one-sided, corrected for the K + 1 candidates, and for
        the M objectives where a gain by any of them is enough.
      bound: The test, see :mod:`optax_ev3.evidence`; default
        :func:`optax_ev3.evidence.standard`.

    Returns:
      A rule for these objectives.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If there is no tolerance or one is negative, or ``confidence`` is not
        between 0.5 and 1.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> from optax_ev3 import adapt
      >>> tx = optax_ev3.ev3(
      ...     [optax.sgd(0.1), optax.sgd(0.5)],
      ...     lambda w: {"fit": -((w - 1) ** 2), "small": -jnp.abs(w)},
      ...     adapt=adapt.pareto({"fit": 0.0, "small": 2.0}),
      ... )
    """
    limits = _checked_numbers(tolerances, "tolerances")
    alpha = error_rate(confidence)
    bound = checked_bound(bound)

    def shown(evidence, reference, level):
        """Which candidates are shown to gain, to hold, and to lose: ``[C]`` each."""
        gains = jnp.zeros_like(evidence.valid)
        holds, loses = evidence.valid & evidence.valid[reference], gains
        for name, limit in limits.items():
            lower = bound.lower(evidence, name, reference, level)
            more = bound.lower(evidence, name, reference, level / len(limits))
            gains |= more > 0
            holds &= lower >= -limit
            loses |= _ahead(evidence, name, reference, bound, level) > limit
        return gains, holds, loses

    def decide(evidence, memory, key):
        stable = evidence.valid.shape[0] - 1
        current = stable - 1
        level = alpha / stable
        gains, _, loses = shown(evidence, current, level)
        left = evidence.valid & ~(loses & ~gains)
        weights = jax.random.exponential(key, [len(limits)])
        z = jnp.stack([compare(evidence, name, current).z for name in limits])
        merit = weights @ z[:, :current]
        chosen = first_of(left[:current], merit, current)
        gains, holds, loses = shown(evidence, stable, level)
        back = loses & ~gains
        adopted = jnp.where(back[current] & back[chosen], stable, chosen)
        decision = Decision(adopted, (gains & holds)[adopted], priorities=weights)
        return decision, memory

    return Rule(lambda explorers: (), decide, tuple(limits))


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


def _sum(evidence: Evidence, weights: Mapping[str, jax.Array]) -> Evidence:
    """The evidence of the weighted sum of all objectives."""
    resampled = [name for name in weights if name in evidence.resamples]
    others = [name for name in weights if name not in resampled]
    if resampled and any(evidence.scores[name].ndim == 2 for name in others):
        raise ValueError(
            f"adapt.weighted cannot add figures with resamples, {resampled}, to scores "
            f"of examples, {others}. Return figures without resamples, samples=0."
        )

    def total(values):
        columns = max(x.ndim for x in values.values())
        return sum(
            weights[name] * (x if x.ndim == columns else x[:, None])
            for name, x in values.items()
        )

    scores = total({name: evidence.scores[name] for name in weights})
    resamples = {}
    if resampled:
        parts = {name: evidence.scores[name] for name in others}
        parts |= {name: evidence.resamples[name] for name in resampled}
        resamples[_SUM] = total(parts)
    return dataclasses.replace(
        evidence, scores={_SUM: scores}, resamples=resamples, binary=frozenset()
    )


_SUM = "weighted sum"


def _ahead(evidence, objective, reference, bound, level):
    """Lower bounds ``[C]`` of how far the reference is ahead of every candidate."""

    def against(other):
        return bound.lower(evidence, objective, other, level)[reference]

    return jax.vmap(against)(jnp.arange(evidence.valid.shape[0]))


def _pass_cases(evidence, names, epsilon, key):
    """Which candidates pass all cases in an order by lot: ``[C]`` bool."""
    columns = [
        x if x.ndim == 2 else x[:, None] for x in (evidence.scores[k] for k in names)
    ]
    seen = [
        jnp.ones(x.shape[1], bool)
        if x.shape[1] == 1 or evidence.seen is None
        else evidence.seen
        for x in columns
    ]
    cases, seen = jnp.concatenate(columns, axis=1), jnp.concatenate(seen)
    slack = jnp.full(cases.shape[1], 0.0 if epsilon is None else epsilon)
    if epsilon is None:
        known = jnp.where(evidence.valid[:, None], cases, jnp.nan)
        middle = jnp.nanmedian(known, axis=0)
        slack = jnp.nan_to_num(jnp.nanmedian(jnp.abs(known - middle[None]), axis=0))
    order = jax.random.permutation(key, cases.shape[1])

    def one(carry):
        number, left = carry
        case = order[number]
        values = cases[:, case]
        best = jnp.max(values, where=left, initial=-jnp.inf)
        passed = left & (values >= best - slack[case])
        return number + 1, jnp.where(seen[case], passed, left)

    def goes_on(carry):
        number, left = carry
        return (number < cases.shape[1]) & (left.sum() > 1)

    return control.while_loop(goes_on, one, (0, evidence.valid))[1]


def _forgetting(rule: Rule) -> Callable[[Any, jax.Array], Any] | None:
    """How a memory forgets that holds the one of ``rule`` as ``inner``."""
    forget = rule.forget
    if forget is None:
        return None
    return lambda memory, fresh: memory._replace(inner=forget(memory.inner, fresh))


def _single(rule: Rule | None) -> Rule:
    """A rule for one objective, the default one if none is given."""
    if rule is None:
        return confident()
    if not isinstance(rule, Rule):
        raise TypeError(
            f"rule must be a rule, such as optax_ev3.adapt.greedy(), got {rule!r} of "
            f"type {type(rule).__name__}."
        )
    if rule.objectives:
        raise ValueError(
            f"rule must be one for a single objective, got one for "
            f"{list(rule.objectives)}."
        )
    return rule


def _checked_names(names: Sequence[str], what: str) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} must be names of objectives, got {names!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"{what} must differ, got {list(names)}.")
    return tuple(names)


def _checked_number(value: Any, what: str) -> float:
    """A finite float of at least 0."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{what} must be a number, got {value!r}.")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{what} must be at least 0 and finite, got {value}.")
    return float(value)


def _checked_numbers(numbers: Mapping[str, float], what: str) -> dict[str, float]:
    if not isinstance(numbers, Mapping):
        raise TypeError(f"{what} must be a mapping from objectives, got {numbers!r}.")
    if not numbers:
        raise ValueError(f"{what} must name at least one objective, got none.")
    _checked_names(tuple(numbers), what)
    return {k: _checked_number(v, f"{what}[{k!r}]") for k, v in numbers.items()}


def _checked_targets(targets, weights, rate):
    if not 0 <= real(rate, "rate") <= 1:
        raise ValueError(f"rate must be between 0 and 1, got {rate}.")
    if targets is None:
        return {}
    if not isinstance(targets, Mapping):
        raise TypeError(f"targets must be a mapping from objectives, got {targets!r}.")
    if set(targets) != set(weights):
        raise ValueError(
            f"targets must be of the objectives {list(weights)}, got {list(targets)}."
        )
    if rate == 0:
        raise ValueError("targets need a rate above 0: without, weights do not move.")
    goals = {k: real(v, f"targets[{k!r}]") for k, v in targets.items()}
    for name, value in goals.items():
        if not math.isfinite(value):
            raise ValueError(f"targets[{name!r}] must be finite, got {value}.")
    return goals
