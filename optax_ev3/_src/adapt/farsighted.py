"""The default rule of one-step rounds: explorers lead in turns, credited by progress.

Dimensions: ``K`` proposals.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_ev3._src.adapt import tallies
from optax_ev3._src.adapt.confident import AT_ONCE
from optax_ev3._src.adapt.rules import first_of
from optax_ev3._src.base import checks, statistics
from optax_ev3._src.base.decision import Decision, Rule, fallback
from optax_ev3._src.base.evidence import (
    Comparison,
    Evidence,
    compare,
    estimate,
    single_objective,
)

# Chosen on the quality suite, on other seeds than its tables show.
_FADING = 0.9  # what an earlier round's step weighs, a round later: 10 in all
_WORSE = 2.0  # z at which a stretch has failed at its end
_PATIENCE = 4  # a stretch that failed is followed by one so many times as long
_LONGEST = 2**20  # calls of a stretch
_UNTRIED = 3e38  # progress of an explorer that has not led yet
_PAUSES = 16  # a pause is no longer than 2 to this power


class Stretch(NamedTuple):
    """The calls in which one explorer leads.

    Attributes:
      leader: ``[]`` int32, which explorer.
      length: ``[]`` int32, calls in all.
      left: ``[]`` int32, calls that are left.
      gain: ``[]`` float32, sum of the gains after the burn-in.
      calls: ``[]`` float32, calls after the burn-in so far.
    """

    leader: jax.Array
    length: jax.Array
    left: jax.Array
    gain: jax.Array
    calls: jax.Array


class FarsightedState(NamedTuple):
    """State of :func:`farsighted`.

    Attributes:
      stretch: The present one.
      progress: ``[K]`` float32, gain in score per call, after the burn-in of each
        explorer's last stretch that was not cut short; huge before the first one.
      pause: ``[K]`` int32, stretches for which an explorer is passed over.
      cuts: ``[K]`` int32, how many stretches of an explorer were cut short.
      ascents: ``[K]`` float32, faded mean of 1 for an ascent, and -1 for none.
      leaps: ``[K]`` float32, the same for steps that change the scores beyond
        recognition, in calls where they change them at all.
      stable: The trial of ``current`` against ``stable``.
      trials: ``[]`` int32, how often that trial began, since stable was replaced.
      noise: ``[]`` root mean square of the steps in score, old ones fading; used with
        exact values only.
    """

    stretch: Stretch
    progress: jax.Array
    pause: jax.Array
    cuts: jax.Array
    ascents: jax.Array
    leaps: jax.Array
    stable: tallies.Trial
    trials: jax.Array
    noise: jax.Array


def farsighted(
    length: int = 20, *, burn_in: float = 0.5, confidence: float = 0.95
) -> Rule:
    r"""The default of one-step rounds: explorers lead in turns, credited by progress.

    What gains most in one step is not what gains most in the end: a smaller step mostly
    gains at once where a larger one has led, as a learning rate that falls does, and
    gets on slowly from there. So each explorer in turn *leads* for a stretch of calls,
    in which its proposals are adopted, and gets credit for the later part of it.

    1. *Credit.* The gain of a call is the mean difference between the leader's proposal
       and ``current``, on the same examples. After the burn-in, the first part of a
       stretch, the progress of the leader is the mean gain per call,

       .. math:: p = \frac{1}{|C|} \sum_{t \in C} \frac{1}{N} \sum_{i=1}^N
                 (s_{\text{leader}, t, i} - s_{\text{current}, t, i}).

    2. *Who leads next.* The explorer with the highest progress in its last stretch. One
       that has not led yet comes first, of several the one that changes the scores
       least in this call: a wild one may break what nothing mends. As progress slows
       down in the course of training, an earlier measurement is out of date on the
       optimistic side: so every explorer is retried, one with half the progress of the
       leader when that has halved.
    3. *Harm.* A stretch is cut short where the leader is not valid; where it mostly
       ascends its own loss; where it changes the scores beyond recognition in one step,
       by a paired standard error above the one of the score itself; where one
       step loses more than the scores' own standard error explains; and where it has
       led to parameters that are worse than ``stable`` by a z below -4, and good at
       quite other examples, while another one is free to lead: then ``stable`` is
       adopted. The explorer is passed over for
       2, 4, 8, ... stretches. Gains in single steps excuse nothing.
    4. *Back to stable.* Where a stretch ends with ``current`` worse than ``stable``, by
       a z below -2, ``stable`` is adopted, and stretches are four times as long from
       then on: what leads through worse parameters to better ones needs time, and what
       does not costs ever less.
    5. *Stable* is replaced as by :func:`confident`, at the same levels. The trial of
       ``current`` begins anew after a stretch that leaves it behind, each at its own
       level (:func:`optax_ev3.evidence.spend`).

    Explorers are not all tried at once: the visible parameters may be those of one
    that is being tried, for a stretch. Where parameters are evaluated in the middle of
    training, :func:`optax_ev3.stable_params` are the ones known to be good.

    Args:
      length: Calls in a stretch, until one ends worse than ``stable``.
      burn_in: The share of a stretch that gets no credit.
      confidence: Of each comparison, one-sided, before the correction.

    Returns:
      A rule that takes one objective.

    Raises:
      TypeError: If ``length`` is no integer.
      ValueError: If ``length`` is below 1, ``burn_in`` is not at least 0 and below 1,
        or ``confidence`` is not between 0.5 and 1.

    Examples:
      >>> import optax, optax_ev3
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -(w**2),
      ...     adapt=optax_ev3.adapt.farsighted(length=50),
      ... )

    References:
      Ding et al., `EV3: Ever Evolving Evaluator
      <https://arxiv.org/abs/2310.18893>`_, 2023 (adapting by updates and the history of
      progress); Wu et al., `Understanding short-horizon bias in stochastic
      meta-optimization <https://arxiv.org/abs/1803.02021>`_, 2018.
    """
    length = checks.integer(length, "length", 1)
    alpha = checks.error_rate(confidence)
    if not 0 <= burn_in < 1:
        raise ValueError(f"burn_in must be at least 0 and below 1, got {burn_in}.")

    def init(proposals: int) -> FarsightedState:
        return _init(proposals, length)

    def decide(
        evidence: Evidence, state: FarsightedState, key: jax.Array
    ) -> tuple[Decision, FarsightedState]:
        del key
        objective = single_objective(evidence)
        to_current, to_stable = (
            compare(evidence, objective, reference, state.noise)
            for reference in (evidence.current, evidence.stable)
        )
        own = estimate(evidence, objective).stderr[evidence.proposals :]
        state, eligible = _eligible(evidence, state, to_current, own, alpha)
        z = to_stable.z[evidence.current]
        is_worse = z < -_WORSE
        is_far = to_stable.stderr[evidence.current] > own[1]
        # Where it happens to all in turn, it is not the explorer's fault.
        others = (eligible & (state.pause == 0)).at[state.stretch.leader].set(False)
        is_harm = (z < -AT_ONCE) & is_far & others.any()
        change = (jnp.abs(to_current.gain) + to_current.stderr)[: evidence.proposals]
        state, failed = _next_stretch(state, eligible, change, is_harm, is_worse)
        leader = state.stretch.leader
        chosen = jnp.where(eligible[leader], leader, fallback(evidence))
        adopted = jnp.where(is_harm | failed, evidence.stable, chosen)
        trial = tallies.one_more(state.stable, z)
        level = statistics.spend(alpha / 2, state.trials)
        better = tallies.log_e(trial) >= -jnp.log(level)
        decision, trial = tallies.settle(
            evidence, trial, to_stable, adopted, better, alpha
        )
        step = tallies.step_size(evidence, to_current.gain, adopted)
        return decision, state._replace(
            stretch=_one_more(state.stretch, to_current.gain[leader], burn_in),
            stable=trial,
            trials=jnp.where(decision.significant, 1, state.trials),
            noise=tallies.root_mean_square(state.noise, step),
        )

    return Rule(init, decide, forget=_forget)


def _init(proposals: int, length: int) -> FarsightedState:
    def count(value: int, *shape: int) -> jax.Array:
        return jnp.full(shape, value, jnp.int32)

    nothing = jnp.zeros([], jnp.float32)
    return FarsightedState(
        # The first call begins a stretch.
        stretch=Stretch(count(0), count(length), count(0), nothing, nothing),
        progress=jnp.full([proposals], _UNTRIED, jnp.float32),
        pause=count(0, proposals),
        cuts=count(0, proposals),
        ascents=jnp.zeros([proposals], jnp.float32),
        leaps=jnp.zeros([proposals], jnp.float32),
        stable=tallies.no_trial(),
        trials=count(1),
        noise=nothing,
    )


def _forget(state: FarsightedState, fresh: jax.Array) -> FarsightedState:
    """Nothing is known of explorers that are others from now on."""
    return state._replace(
        progress=jnp.where(fresh, _UNTRIED, state.progress),
        pause=jnp.where(fresh, 0, state.pause),
        cuts=jnp.where(fresh, 0, state.cuts),
        ascents=jnp.where(fresh, 0, state.ascents),
        leaps=jnp.where(fresh, 0, state.leaps),
    )


# Who may lead.


def _eligible(
    evidence: Evidence,
    state: FarsightedState,
    to_current: Comparison,
    own: jax.Array,
    alpha: float,
) -> tuple[FarsightedState, jax.Array]:
    """The state with this round's steps, and who may be adopted, ``[K]`` bool.

    Args:
      evidence: The scores of the round.
      state: Before the round.
      to_current: The proposals against ``current``, in this round.
      own: ``[2]``, the standard errors of the scores of current and stable alone.
      alpha: The level of a proof, before the correction.
    """
    proposals = evidence.proposals
    valid, is_ascent = evidence.valid[:proposals], evidence.is_ascent[:proposals]
    # Momentum ascends at times.
    ascents = _fade(state.ascents, is_ascent)
    descends = tallies.narrow(valid, ~is_ascent | (ascents <= 0))
    # Where all change the scores that much, the one that does so least may pass.
    change, gain = to_current.stderr[:proposals], to_current.gain[:proposals]
    least = jnp.min(change, where=descends, initial=jnp.inf)
    # Where the score of current has no spread, as F1 where nothing is found, there is
    # no measure: the first gain of a good explorer is as large as any.
    is_leap = (own[0] > 0) & (change > jnp.maximum(own[0], least))
    # One that leads nowhere may do so where all scores are alike, which shows nothing.
    is_shown = (own[0] > 0) & (change > 0)
    leaps = jnp.where(is_shown, _fade(state.leaps, is_leap), state.leaps)
    steady = tallies.narrow(tallies.narrow(descends, ~is_leap), leaps <= 0)
    critical = statistics.z_value(alpha / proposals)
    # Exact values have no error of their own.
    error = own.max()
    allowed = critical * jnp.where(error > 0, error, state.noise)
    held = steady & (gain >= -allowed)
    # Nobody took over from a leader that was cut short: all lose, so one moves on.
    is_stuck = (state.pause[state.stretch.leader] > 0) & ~held.any()
    eligible = jnp.where(is_stuck, steady, held)
    return state._replace(ascents=ascents, leaps=leaps), eligible


def _fade(past: jax.Array, flags: jax.Array) -> jax.Array:
    """A faded mean of 1 where the flag is set, else of -1, with one more round."""
    return _FADING * past + (1 - _FADING) * jnp.where(flags, 1.0, -1.0)


# Stretches.


def _next_stretch(
    state: FarsightedState,
    eligible: jax.Array,
    change: jax.Array,
    is_harm: jax.Array,
    is_worse: jax.Array,
) -> tuple[FarsightedState, jax.Array]:
    """The state with a new stretch where one is over, and whether that one failed.

    Args:
      state: With this round.
      eligible: ``[K]`` bool, who may be adopted.
      change: ``[K]``, how much the proposals change the scores, in this round.
      is_harm: ``[]`` bool, whether ``current`` is far from ``stable`` and worse.
      is_worse: ``[]`` bool, whether it is worse.
    """
    past = state.stretch
    cut = ~eligible[past.leader] | is_harm
    ended = (past.left <= 0) & ~cut
    led = past.calls > 0  # Not so before the first call.
    over, failed = cut | ended, (past.left <= 0) & is_worse & led
    cuts = state.cuts.at[past.leader].add(cut)
    pause = jnp.where(over, jnp.maximum(state.pause - 1, 0), state.pause)
    longer = 2 ** jnp.minimum(cuts[past.leader], _PAUSES)
    pause = pause.at[past.leader].set(jnp.where(cut, longer, pause[past.leader]))
    measured = state.progress.at[past.leader].set(
        past.gain / jnp.maximum(past.calls, 1)
    )
    progress = jnp.where(ended & led, measured, state.progress)
    leader = jnp.where(
        over, _lead(progress, pause, eligible, change, past.leader), past.leader
    )
    length = jnp.where(
        failed, jnp.minimum(_PATIENCE * past.length, _LONGEST), past.length
    )
    new = Stretch(
        leader.astype(jnp.int32),
        length.astype(jnp.int32),
        jnp.where(over, length, past.left).astype(jnp.int32),
        jnp.where(over, 0, past.gain),
        jnp.where(over, 0, past.calls),
    )
    behind = over & (state.stable.total < 0)
    trial = state.stable._replace(
        total=jnp.where(behind, 0, state.stable.total),
        weight=jnp.where(behind, 0, state.stable.weight),
    )
    trials = state.trials + behind
    return state._replace(
        stretch=new,
        progress=progress,
        pause=pause,
        cuts=cuts,
        stable=trial,
        trials=trials,
    ), failed


def _lead(
    progress: jax.Array,
    pause: jax.Array,
    eligible: jax.Array,
    change: jax.Array,
    otherwise: jax.Array,
) -> jax.Array:
    """Who leads next: the most progress, then the least change in this round."""
    free = tallies.narrow(eligible, pause == 0)
    best = jnp.max(progress, where=free, initial=-jnp.inf)
    return first_of(free & (progress == best), -change, otherwise)


def _one_more(stretch: Stretch, gain: jax.Array, burn_in: float) -> Stretch:
    """The stretch with one more call."""
    counts = stretch.left <= jnp.ceil((1 - burn_in) * stretch.length)
    return stretch._replace(
        left=stretch.left - 1,
        gain=stretch.gain + jnp.where(counts, gain, 0).astype(stretch.gain.dtype),
        calls=stretch.calls + counts,
    )
