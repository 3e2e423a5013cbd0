"""Adapt: rules that turn the evidence of a round into a decision. No statistics.

Dimensions: ``K`` explorers, ``C`` = K + 2 candidates, in the order explorers,
``current``, ``stable``.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from optax_ev3._src.adapt.bounds import (
    CORRECTIONS,
    Bound,
    best_rho,
    checked_bound,
    corrected,
    mixture_log_e,
    spend,
    z_value,
)
from optax_ev3._src.base.checks import error_rate
from optax_ev3._src.base.evidence import (
    CERTAIN,
    Evidence,
    compare,
    estimate,
    single_objective,
    take,
)


class Decision(NamedTuple):
    """What a rule decides.

    Attributes:
      adopted: ``[]`` int32, index of the candidate that becomes visible.
      significant: ``[]`` bool, whether stable parameters are replaced.
      promoted: ``[]`` int32, index of the candidate that then becomes stable; None for
        the adopted one.
      priorities: ``[M]``, what each objective weighed, in the order of
        ``Rule.objectives``; None where they were not weighed. For the history.
    """

    adopted: jax.Array
    significant: jax.Array
    promoted: jax.Array | None = None
    priorities: jax.Array | None = None


class Rule(NamedTuple):
    """A rule, in the manner of ``optax.GradientTransformation``.

    Attributes:
      init: Maps the number of explorers K to what the rule remembers, a tree of
        arrays.
      decide: Maps ``(evidence, memory, key)`` to ``(Decision, memory)``; pure, with
        the same shapes and dtypes of memory. Candidates that are not valid, or do
        not exist, are neither adopted nor promoted, whatever it decides: ``current``
        stays, or ``stable`` is adopted if only that is valid.
      objectives: Names of the objectives that it takes, the main one first; none for
        a single one of any name.
      forget: Maps ``(memory, fresh)`` to memory without what it knows of explorers
        that are others from now on, ``[K]`` bool; None where nothing is remembered of
        single explorers. For :func:`optax_ev3.evolve`.
    """

    init: Callable[[int], Any]
    decide: Callable[[Evidence, Any, jax.Array], tuple[Decision, Any]]
    objectives: tuple[str, ...] = ()
    forget: Callable[[Any, jax.Array], Any] | None = None


def greedy(
    confidence: float = 0.95,
    bound: Bound | None = None,
    correction: str | None = "bonferroni",
) -> Rule:
    """Adopts the candidate with the highest mean score.

    Ties go to explorers before ``current``, to ``current`` before ``stable``, and
    among explorers to the one with most credit (:func:`optax_ev3.credit`), or by lot.
    Stable parameters are replaced where the adopted ones are
    shown to be better by the round's examples.

    Args:
      confidence: Of that test, one-sided, corrected for the K + 1 candidates that may
        become stable.
      bound: The test, see :mod:`optax_ev3.evidence`; default
        :func:`optax_ev3.evidence.standard`.
      correction: ``"bonferroni"``, ``"holm"``, ``"max_t"`` or None.

    Returns:
      A rule that takes one objective.

    Raises:
      ValueError: If ``confidence`` is not between 0.5 and 1, or there is no such
        correction.
      TypeError: If ``bound`` is none.

    Examples:
      >>> import optax, optax_ev3
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -(w**2),
      ...     adapt=optax_ev3.adapt.greedy(),
      ... )
    """
    alpha = error_rate(confidence)
    bound = checked_bound(bound)
    if correction not in CORRECTIONS:
        raise ValueError(
            f"correction must be one of {CORRECTIONS}, got {correction!r}."
        )

    def decide(evidence, memory, key):
        objective = single_objective(evidence)
        explorers = evidence.valid.shape[0] - 2
        mean = estimate(evidence, objective).mean
        best = jnp.max(mean, where=evidence.valid, initial=-jnp.inf)
        adopted = untied(evidence, evidence.valid & (mean == best), key)
        tested = jnp.arange(explorers + 2) <= explorers
        p = corrected(bound, correction, evidence, objective, explorers + 1, tested)
        return Decision(adopted, p[adopted] < alpha), memory

    return Rule(lambda explorers: (), decide)


def lower_bound(select_alpha: float = 0.5, decide_alpha: float = 1.96) -> Rule:
    r"""The paper's rule, exactly: unpaired normal bounds, first choose, then decide.

    With means :math:`m` and standard errors :math:`e` (ddof 1) of the candidates:
    the explorer with the highest :math:`m - \alpha_s e` is chosen; of chosen,
    ``current`` and ``stable``, in this order, the one with the highest
    :math:`m - \alpha_d e` is adopted; where its lower bound exceeds the upper bound
    :math:`m + \alpha_d e` of ``stable``, it becomes stable. Exact ties go to the
    first, as in the paper.

    Args:
      select_alpha: :math:`\alpha_s`, in standard errors, at least 0.
      decide_alpha: :math:`\alpha_d`, in standard errors, at least 0.

    Returns:
      A rule that takes one objective, of at least two examples or of exact figures.

    Raises:
      ValueError: If an alpha is negative; at trace time, if there is one example.

    Examples:
      >>> import optax, optax_ev3
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -(w**2),
      ...     adapt=optax_ev3.adapt.lower_bound(select_alpha=0.5, decide_alpha=1.96),
      ... )

    References:
      Ding et al., `EV3: Ever Evolving Evaluator
      <https://arxiv.org/abs/2310.18893>`_, 2023.
    """
    for name, value in {
        "select_alpha": select_alpha,
        "decide_alpha": decide_alpha,
    }.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}.")

    def decide(evidence, memory, key):
        del key
        objective = single_objective(evidence)
        if evidence.scores[objective].shape[1:] == (1,):
            raise ValueError(
                "adapt.lower_bound needs the scores of at least 2 examples for a "
                "standard error, assess_fn returned shape (1,)."
            )
        current = evidence.valid.shape[0] - 2
        mean, stderr = estimate(evidence, objective)

        def bound(alpha):
            return jnp.where(evidence.valid, mean - alpha * stderr, -jnp.inf)

        chosen = jnp.argmax(bound(select_alpha)[:current])
        finalists = jnp.stack([chosen, current, current + 1])
        lower = bound(decide_alpha)
        adopted = finalists[jnp.argmax(lower[finalists])].astype(jnp.int32)
        adopted = jnp.where(evidence.valid.any(), adopted, current)
        upper = mean[current + 1] + decide_alpha * stderr[current + 1]
        significant = evidence.valid[current + 1] & (lower[adopted] > upper)
        return Decision(adopted, significant), memory

    return Rule(lambda explorers: (), decide)


def choose_and_confirm(
    confidence: float = 0.95, fraction: float = 0.5, bound: Bound | None = None
) -> Rule:
    """Chooses on one part of the examples, and tests the chosen on the other.

    The paper's optimize and decide. Choosing favours the lucky; on examples that had
    no part in it there is one comparison, and nothing to correct for. The explorer with
    the highest mean on the first part, ties by credit, is adopted unless the second
    part shows it to be worse than ``current`` or ``stable``; then that one is, and of
    both the one with the higher mean on the second part. What was chosen becomes stable
    where the second part shows it to be better.

    Args:
      confidence: Of each test, one-sided; a promise for each round of fresh examples.
      fraction: Share of the examples that the choice is made on: the first ones. For
        two batches of their own, ``assess_fn`` returns the scores of both, one after
        the other.
      bound: The test, see :mod:`optax_ev3.evidence`; default
        :func:`optax_ev3.evidence.standard`.

    Returns:
      A rule that takes one objective, of at least two examples.

    Raises:
      ValueError: If ``confidence`` is not between 0.5 and 1, ``fraction`` not between 0
        and 1; at trace time, if a part has no example.
      TypeError: If ``bound`` is none.

    Examples:
      >>> import optax, optax_ev3
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w, batch: -((w - batch) ** 2),
      ...     adapt=optax_ev3.adapt.choose_and_confirm(fraction=0.3),
      ... )
    """
    alpha = error_rate(confidence)
    bound = checked_bound(bound)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}.")

    def decide(evidence, memory, key):
        objective = single_objective(evidence)
        shape = evidence.scores[objective].shape
        first = round(fraction * shape[-1])
        if len(shape) == 1 or not 0 < first < shape[1]:
            raise ValueError(
                f"adapt.choose_and_confirm(fraction={fraction}) needs scores of "
                f"examples that can be split, assess_fn returned shape {shape[1:]}."
            )
        explorers = evidence.valid.shape[0] - 2
        choose = take(evidence, slice(None, first))
        confirm = take(evidence, slice(first, None))
        mean = estimate(choose, objective).mean[:explorers]
        valid = evidence.valid[:explorers]
        best = jnp.max(mean, where=valid, initial=-jnp.inf)
        none = jnp.zeros([2], bool)
        chosen = untied(evidence, jnp.append(valid & (mean == best), none), key)
        better = bound.p_value(confirm, objective, explorers + 1)[chosen] < alpha
        beaten = bound.p_value(confirm, objective, chosen) < alpha
        rivals = jnp.where(beaten, estimate(confirm, objective).mean, -jnp.inf)
        rivals = rivals[explorers:]
        back = rivals[1] >= rivals[0]
        adopted = jnp.where(back, explorers + 1, explorers)
        adopted = jnp.where(beaten[explorers:].any(), adopted, chosen)
        adopted = jnp.where(evidence.valid[adopted], adopted, fallback(evidence))
        return Decision(adopted, better & (adopted == chosen)), memory

    return Rule(lambda explorers: (), decide)


# Of the default rule, chosen on digits with the tables of benchmarks/rules.py.
_ONE_STEP = 1.5, 10.0  # the most that a round says, and rounds' worth of doubt
_LONGER = 10.0, 1.0  # the same for rounds of several steps
_MEMORY = 0.95  # what an earlier round weighs, a round later: 20 rounds in all
_AT_ONCE = 4.0  # z at which one round is enough to go back to stable
_MOST = 10.0  # the most that one round says of current against stable, as z
_BACK = 1e4  # going back undoes much: its level is divided by this
_ROUNDS = 30  # rounds for which the evidence between these two is tightest


class Tally(NamedTuple):
    """Evidence that adds up over rounds, old rounds fading (Stouffer's method).

    Attributes:
      total: Faded sum of z values, each cut at the same size either way.
      weight: Faded sum of the squared weights of the rounds that said anything.
    """

    total: jax.Array
    weight: jax.Array


class Trial(NamedTuple):
    """``current`` against ``stable``, since either was last replaced by the other.

    Attributes:
      total: ``[]``, sum of z values.
      weight: ``[]``, rounds that said anything.
      rounds: ``[]``, all rounds since ``stable`` was replaced.
    """

    total: jax.Array
    weight: jax.Array
    rounds: jax.Array


class ConfidentMemory(NamedTuple):
    """What :func:`confident` remembers.

    Attributes:
      current: ``[K]`` tally of each explorer against ``current``.
      pairs: ``[K, K]`` tally of each explorer against each other.
      stable: The trial of ``current`` against ``stable``.
      noise: ``[]`` root mean square of the steps in score, old ones fading; used with
        exact figures only.
    """

    current: Tally
    pairs: Tally
    stable: Trial
    noise: jax.Array


def confident(
    confidence: float = 0.95,
    *,
    clip: float | None = None,
    prior_rounds: float | None = None,
) -> Rule:
    r"""The default: moves on unless shown to be worse, falls back when shown to be.

    All comparisons are paired, on the examples of the round, in standard normal
    units (:func:`optax_ev3.evidence.compare`), at level :math:`(1 -
    \text{confidence}) / K`, one-sided (Bonferroni over the K explorers). Evidence
    against an explorer comes from this round alone, or adds up over rounds
    (Stouffer's sum of z values over the root of the sum of squared weights, old
    rounds fading by 0.95, each cut to ``clip``, with ``prior_rounds`` rounds' worth of
    doubt added). Rounds of one step say little each, and short-sighted things: there
    the defaults are patient, ``clip=1.5, prior_rounds=10``. In trajectories they are
    ``clip=10, prior_rounds=1``.

    1. *Who may be adopted.* An explorer shown by this round to be worse than
       ``current`` may not. Among the others those are passed over, as long as any
       remain, that past rounds together show to be worse than ``current``; and those
       that need proof, an accumulated gain, and lack it: an update that goes uphill
       on the very loss it is to lower, and one that changes the scores beyond
       recognition, with a paired standard error above the one of the score itself.
       If every explorer is shown to be worse, ``current`` stays.
    2. *Who is adopted.* Of these, the one with the highest mean accumulated z against
       the others, plus standard normal noise (Thompson sampling): equal explorers
       share the rounds, and clearly better ones get them.
    3. *Back to stable.* The parameters with which each round begins are tried against
       the stable ones, since either were last replaced by the other: their z values
       add up to a normal mixture (:func:`optax_ev3.evidence.normal_mixture`, with V
       the number of rounds), evidence that holds at any time. If it shows them to be
       worse, or if the explorer chosen is worse by a z below -4 in this round,
       ``stable`` is adopted.
    4. *Stable* is replaced by the parameters on trial where they are shown to be
       better; and by what is adopted where this one round shows it to be better, at
       level :math:`(1 - \text{confidence}) / (2 K + 2)`, spent over rounds
       (:func:`optax_ev3.evidence.spend`).

    For as long as one set of stable parameters stands, it is replaced by others that
    are never better with probability at most 1 - confidence, over all rounds
    together: half of it on trial, half at once (nominal: it holds as far as the z
    values of single rounds are standard normal; measured in ``benchmarks/rules.py``
    and ``benchmarks/evidence.py``). What is promised concerns the data that rounds
    draw their examples from: where that is a small held-out set, used for many
    rounds, see ``guard`` of :func:`optax_ev3.ev3`.

    Exact figures (``assess_fn`` -> ``[]``) have no standard error; the root mean
    square step in score over past rounds stands in for it. Until there was a step,
    any difference counts.

    Args:
      confidence: Of each comparison, one-sided, before the correction.
      clip: The most that one round says, in standard normal units; default by the
        length of rounds.
      prior_rounds: Rounds' worth of doubt, before any evidence; default by the length
        of rounds.

    Returns:
      A rule that takes one objective.

    Raises:
      ValueError: If ``confidence`` is not between 0.5 and 1, or if ``clip`` or
        ``prior_rounds`` is not above 0.

    Examples:
      >>> import optax, optax_ev3
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -(w**2),
      ...     adapt=optax_ev3.adapt.confident(confidence=0.99),
      ... )

    References:
      Stouffer et al., The American Soldier, 1949 (sum of z values); Thompson, `On the
      likelihood that one unknown probability exceeds another
      <https://doi.org/10.1093/biomet/25.3-4.285>`_, 1933.
    """
    alpha = error_rate(confidence)
    for name, value in {"clip": clip, "prior_rounds": prior_rounds}.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite, got {value}.")

    def init(explorers: int) -> ConfidentMemory:
        def tally(*shape):
            return Tally(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

        return ConfidentMemory(
            current=tally(explorers),
            pairs=tally(explorers, explorers),
            stable=Trial(*(jnp.zeros([], jnp.float32) for _ in Trial._fields)),
            noise=jnp.zeros([], jnp.float32),
        )

    def decide(evidence, memory, key):
        objective = single_objective(evidence)
        explorers = evidence.valid.shape[0] - 2
        critical = z_value(alpha / explorers)
        most, doubt = _ONE_STEP if evidence.one_step else _LONGER
        most = most if clip is None else clip
        doubt = doubt if prior_rounds is None else prior_rounds

        def add(tally, z):
            return _add(tally, z, most)

        def z_of(tally):
            return tally.total / jnp.sqrt(tally.weight + doubt)

        def against(reference):
            return compare(evidence, objective, reference, memory.noise)

        to_current, to_stable = against(explorers), against(explorers + 1)
        valid = evidence.valid[:explorers]
        z = jax.vmap(lambda other: against(other).z[:explorers])(jnp.arange(explorers))
        # What is not valid loses to all that is.
        z = jnp.where(valid[None, :], z.T, jnp.where(valid[:, None], CERTAIN, 0))
        z = jnp.where(valid[:, None] | ~valid[None, :], z, -CERTAIN)
        pairs = add(memory.pairs, z)
        current = add(
            memory.current, jnp.where(valid, to_current.z[:explorers], -CERTAIN)
        )

        # Weak evidence gives way before the need of proof does: it comes last.
        alone = estimate(evidence, objective).stderr[explorers]
        proven = z_of(current) > critical
        is_ascent = evidence.is_ascent[:explorers] & ~proven
        # Where all change the scores that much, the one that does so least may pass.
        leap = to_current.stderr[:explorers]
        least = jnp.min(leap, where=_narrow(valid, ~is_ascent), initial=jnp.inf)
        leaps = (leap > jnp.maximum(alone, least)) & ~proven
        eligible = _narrow(_narrow(valid, ~is_ascent), ~leaps)
        eligible &= to_current.z[:explorers] >= -critical
        eligible = _narrow(eligible, z_of(current) >= -critical)
        merit = jnp.mean(z_of(pairs), axis=1, where=eligible[None, :])
        merit += jax.random.normal(key, merit.shape)
        chosen = first_of(eligible, merit, explorers)

        trial = _tried(memory.stable, to_stable.z[explorers])
        better, worse = _verdict(trial, alpha / 2, alpha / _BACK)
        back = worse | (to_stable.z[chosen] < -_AT_ONCE)
        adopted = jnp.where(back, explorers + 1, chosen)
        adopted = jnp.where(evidence.valid[adopted], adopted, fallback(evidence))
        # Choosing favours the lucky: what was chosen has to be better by more.
        level = spend(alpha / 2, trial.rounds) / (explorers + 1)
        p = norm.sf(to_stable.z[adopted])
        at_once = evidence.valid[adopted] & (p < level)
        replaced = at_once | better
        parted = ~replaced & (adopted != explorers + 1)
        step = _step(to_current.gain, adopted, valid)
        promoted = jnp.where(at_once, adopted, explorers)
        return Decision(adopted, replaced, promoted), ConfidentMemory(
            current=current,
            pairs=pairs,
            stable=Trial(
                jnp.where(parted, trial.total, 0),
                jnp.where(parted, trial.weight, 0),
                jnp.where(replaced, 0, trial.rounds),
            ),
            noise=_root_mean_square(memory.noise, step),
        )

    return Rule(init, decide, forget=_forget)


def _forget(memory: ConfidentMemory, fresh: jax.Array) -> ConfidentMemory:
    """Nothing is known of explorers that are others from now on."""
    either = fresh[:, None] | fresh[None, :]
    return memory._replace(
        current=jax.tree.map(lambda x: jnp.where(fresh, 0, x), memory.current),
        pairs=jax.tree.map(lambda x: jnp.where(either, 0, x), memory.pairs),
    )


def _tried(trial: Trial, z: jax.Array) -> Trial:
    """The trial with one more round; one that ties says nothing."""
    z = jnp.clip(z, -_MOST, _MOST).astype(jnp.float32)
    return Trial(
        trial.total + z, trial.weight + (z != 0).astype(z.dtype), trial.rounds + 1
    )


def _verdict(trial: Trial, gain: float, harm: float) -> tuple[jax.Array, jax.Array]:
    """Whether ``current`` is shown to be better, or worse, each at its own level."""
    rho = best_rho(_ROUNDS)
    better = mixture_log_e(trial.total, trial.weight, rho) >= math.log(1 / gain)
    worse = mixture_log_e(-trial.total, trial.weight, rho) >= math.log(1 / harm)
    return better, worse


def _add(tally: Tally, z: jax.Array, clip: float) -> Tally:
    """The tally with one more round; a round that ties says nothing."""
    z = jnp.clip(z, -clip, clip).astype(jnp.float32)
    return Tally(
        total=_MEMORY * tally.total + z,
        weight=_MEMORY**2 * tally.weight + (z != 0).astype(z.dtype),
    )


def _narrow(mask: jax.Array, condition: jax.Array) -> jax.Array:
    """``mask`` where the condition holds as well, unless that leaves nobody."""
    narrower = mask & condition
    return jnp.where(narrower.any(), narrower, mask)


def fallback(evidence: Evidence) -> jax.Array:
    """Where to go without a valid proposal: ``stable`` if only that is valid."""
    current, stable = evidence.valid.shape[0] - 2, evidence.valid.shape[0] - 1
    only_stable = ~evidence.valid[current] & evidence.valid[stable]
    return jnp.where(only_stable, stable, current).astype(jnp.int32)


def overrule(
    decision: Decision, valid: jax.Array, otherwise: Any
) -> tuple[Decision, jax.Array]:
    """The decision, without candidates that are not valid or do not exist.

    Args:
      decision: That of a rule.
      valid: ``[C]`` bool, which candidates may be adopted or promoted.
      otherwise: ``[]``, the candidate that is adopted instead.

    Returns:
      The decision, complete but for priorities, and ``[]`` bool, whether it differs
      from what was decided.

    Raises:
      TypeError: If the decision is not made of scalars of the right kind.
    """

    def check(value, name):
        index = jnp.asarray(value)
        if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
            raise TypeError(
                f"a rule must return {name} as an integer of shape [], the index of a "
                f"candidate, got shape {index.shape} of {index.dtype}."
            )
        exists = (index >= 0) & (index < valid.shape[0])
        index = jnp.where(exists, index, 0).astype(jnp.int32)
        return index, exists

    significant = jnp.asarray(decision.significant)
    if significant.ndim or significant.dtype != bool:
        raise TypeError(
            f"a rule must return significant as a bool of shape [], got shape "
            f"{significant.shape} of {significant.dtype}."
        )
    adopted, exists = check(decision.adopted, "adopted")
    may_adopt = exists & (valid[adopted] | (adopted == otherwise))
    promoted = adopted
    if decision.promoted is not None:
        promoted, exists = check(decision.promoted, "promoted")
    may_promote = exists & valid[promoted]
    allowed = Decision(
        jnp.where(may_adopt, adopted, otherwise).astype(jnp.int32),
        significant & may_promote,
        promoted,
        decision.priorities,
    )
    return allowed, ~may_adopt | (significant & ~may_promote)


def _root_mean_square(past: jax.Array, step: jax.Array) -> jax.Array:
    """One more step in a fading root mean square, without overflow."""
    scale = jnp.maximum(past, jnp.abs(step))
    scale = jnp.where(scale > 0, scale, 1)
    past, step = past / scale, step / scale
    return scale * jnp.sqrt(_MEMORY * past**2 + (1 - _MEMORY) * step**2)


def _step(gain: jax.Array, adopted: jax.Array, valid: jax.Array) -> jax.Array:
    """Size of this round's step in score: of the smallest one if none was taken.

    If standing still did not count, exact figures would find every step too bad for
    ever.
    """
    sizes = jnp.where(valid, jnp.abs(gain[: valid.shape[0]]), jnp.inf)
    smallest = jnp.where(valid.any(), sizes.min(), 0)
    taken = adopted < valid.shape[0]
    return jnp.where(taken, gain[adopted], smallest).astype(jnp.float32)


def untied(evidence: Evidence, mask: jax.Array, key: jax.Array) -> jax.Array:
    """One of the mask: an explorer by credit, else ``current``, else ``stable``."""
    explorers = mask.shape[0] - 2
    # Equal credit is decided by lot.
    order = 1e-4 * jax.random.uniform(key, [explorers])
    if evidence.credit is not None:
        order += evidence.credit
    last = jnp.array([-1e3, -2e3], order.dtype)
    return first_of(mask, jnp.append(order, last), explorers)


def first_of(mask: jax.Array, order: jax.Array, otherwise: int) -> jax.Array:
    """Index of the highest ``order`` within ``mask``, int32."""
    best = jnp.argmax(jnp.where(mask, order, -jnp.inf)).astype(jnp.int32)
    return jnp.where(mask.any(), best, otherwise)
