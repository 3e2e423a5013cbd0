"""The default rule where explorers restart: evidence adds up over rounds.

Dimensions: ``K`` proposals.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_ev3._src.adapt import tallies
from optax_ev3._src.adapt.rules import first_of
from optax_ev3._src.base import statistics
from optax_ev3._src.base.checks import error_rate
from optax_ev3._src.base.decision import Decision, Rule, fallback
from optax_ev3._src.base.evidence import (
    Comparison,
    Evidence,
    compare,
    estimate,
    single_objective,
)

# Chosen on digits with the tables of `python -m benchmarks rules`.
ONE_STEP = 1.5, 10.0  # the most that a round says, and rounds' worth of doubt
_LONGER = 10.0, 1.0  # the same for rounds of several steps
AT_ONCE = 4.0  # z at which one round is enough to go back to stable
_BACK = 1e4  # going back undoes much: its level is divided by this


class ConfidentState(NamedTuple):
    """State of :func:`confident`.

    Attributes:
      current: ``[K]`` tally of each proposal against ``current``.
      pairs: ``[K, K]`` tally of each proposal against each other.
      stable: The trial of ``current`` against ``stable``.
      noise: ``[]`` root mean square of the steps in score, old ones fading; used with
        exact values only.
    """

    current: tallies.Tally
    pairs: tallies.Tally
    stable: tallies.Trial
    noise: jax.Array


def confident(
    confidence: float = 0.95,
    *,
    clip: float | None = None,
    prior_rounds: float | None = None,
) -> Rule:
    r"""The default: moves on unless shown to be worse, falls back when shown to be.

    All comparisons are paired, on the examples of the round, as z values
    (:func:`optax_ev3.evidence.compare`), at level :math:`(1 -
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
       add up to a normal mixture (Howard et al., with V the number of rounds),
       evidence that holds at any time. If it shows them to be
       worse, or if the explorer chosen is worse by a z below -4 in this round,
       ``stable`` is adopted.
    4. *Stable* is replaced by the parameters on trial where they are shown to be
       better; and by what is adopted where this one round shows it to be better, at
       level :math:`(1 - \text{confidence}) / (2 K + 2)`, spent over rounds
       (:func:`optax_ev3.evidence.spend`).

    For as long as one set of stable parameters stands, it is replaced by others that
    are never better with probability at most 1 - confidence, over all rounds
    together: half of it on trial, half at once (nominal: it holds as far as the z
    values of single rounds are standard normal; measured in the benchmarks ``rules``
    and ``evidence``). What is promised concerns the data that rounds
    draw their examples from: where that is a small held-out set, used for many
    rounds, see :func:`optax_ev3.adapt.guarded`.

    Exact values (``assess_fn`` -> ``[]``) have no standard error; the root mean
    square step in score over past rounds stands in for it. Until there was a step,
    any difference counts.

    Args:
      confidence: Of each comparison, one-sided, before the correction.
      clip: The most that one round says, as a z value; default by the length of
        rounds.
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
      <https://doi.org/10.1093/biomet/25.3-4.285>`_, 1933; Howard et al.,
      `Time-uniform, nonparametric, nonasymptotic confidence sequences
      <https://arxiv.org/abs/1810.08240>`_, 2021, equation 3.6.
    """
    alpha = error_rate(confidence)
    for name, value in {"clip": clip, "prior_rounds": prior_rounds}.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite, got {value}.")

    def decide(
        evidence: Evidence, state: ConfidentState, key: jax.Array
    ) -> tuple[Decision, ConfidentState]:
        default_clip, default_doubt = ONE_STEP if evidence.one_step else _LONGER
        most = default_clip if clip is None else clip
        doubt = default_doubt if prior_rounds is None else prior_rounds
        objective = single_objective(evidence)

        def against(reference: int | jax.Array) -> Comparison:
            return compare(evidence, objective, reference, state.noise)

        to_current, to_stable = against(evidence.current), against(evidence.stable)
        pairs = tallies.add(state.pairs, _pairwise(evidence, against), most)
        current = tallies.add(
            state.current, tallies.of_proposals(evidence, to_current.z), most
        )
        eligible = _eligible(
            evidence,
            to_current,
            estimate(evidence, objective).stderr[evidence.current],
            tallies.z_of(current, doubt),
            statistics.z_value(alpha / evidence.proposals),
        )
        chosen = _choose(evidence, eligible, tallies.z_of(pairs, doubt), key)
        decision, trial = _settle(evidence, state.stable, to_stable, chosen, alpha)
        step = tallies.step_size(evidence, to_current.gain, decision.adopted)
        noise = tallies.root_mean_square(state.noise, step)
        return decision, ConfidentState(current, pairs, trial, noise)

    return Rule(_init, decide, forget=_forget)


def _init(proposals: int) -> ConfidentState:
    return ConfidentState(
        current=tallies.no_tally(proposals),
        pairs=tallies.no_tally(proposals, proposals),
        stable=tallies.no_trial(),
        noise=jnp.zeros([], jnp.float32),
    )


def _forget(state: ConfidentState, fresh: jax.Array) -> ConfidentState:
    """Nothing is known of explorers that are others from now on."""
    either = fresh[:, None] | fresh[None, :]

    return state._replace(
        current=tallies.cleared(state.current, fresh),
        pairs=tallies.cleared(state.pairs, either),
    )


# Who is adopted.


def _pairwise(
    evidence: Evidence, against: Callable[[jax.Array], Comparison]
) -> jax.Array:
    """The z values of each proposal against each other, ``[K, K]``."""
    proposals = evidence.proposals
    valid, certain = evidence.valid[:proposals], statistics.CERTAIN
    z = jax.vmap(lambda other: against(other).z[:proposals])(jnp.arange(proposals))
    # What is not valid loses to all that is.
    z = jnp.where(valid[None, :], z.T, jnp.where(valid[:, None], certain, 0))
    return jnp.where(valid[:, None] | ~valid[None, :], z, -certain)


def _eligible(
    evidence: Evidence,
    to_current: Comparison,
    alone: jax.Array,
    z: jax.Array,
    critical: jax.Array,
) -> jax.Array:
    """Who may be adopted, ``[K]`` bool.

    Weak evidence gives way before the need of proof does: it comes last.

    Args:
      evidence: The scores of the round.
      to_current: The proposals against ``current``, in this round.
      alone: ``[]``, the standard error of the score of ``current``.
      z: ``[K]``, what all rounds say of the proposals against ``current``.
      critical: ``[]``, the z value that is proof.
    """
    proposals = evidence.proposals
    valid, proven = evidence.valid[:proposals], z > critical
    ascends = evidence.is_ascent[:proposals] & ~proven
    # Where all change the scores that much, the one that does so least may pass.
    leap = to_current.stderr[:proposals]
    least = jnp.min(leap, where=tallies.narrow(valid, ~ascends), initial=jnp.inf)
    leaps = (leap > jnp.maximum(alone, least)) & ~proven
    eligible = tallies.narrow(tallies.narrow(valid, ~ascends), ~leaps)
    eligible &= to_current.z[:proposals] >= -critical
    return tallies.narrow(eligible, z >= -critical)


def _choose(
    evidence: Evidence, eligible: jax.Array, z_pairs: jax.Array, key: jax.Array
) -> jax.Array:
    """One of the eligible, by their mean z against each other and Thompson's noise."""
    merit = jnp.mean(z_pairs, axis=1, where=eligible[None, :])
    merit += jax.random.normal(key, merit.shape)
    return first_of(eligible, merit, fallback(evidence))


def _settle(
    evidence: Evidence,
    trial: tallies.Trial,
    to_stable: Comparison,
    chosen: jax.Array,
    alpha: float,
) -> tuple[Decision, tallies.Trial]:
    """What the trial of ``current`` and this round say of ``stable``."""
    trial = tallies.one_more(trial, to_stable.z[evidence.current])
    better = tallies.log_e(trial) >= math.log(2 / alpha)
    harm = tallies.log_e(trial._replace(total=-trial.total))
    back = (harm >= math.log(_BACK / alpha)) | (to_stable.z[chosen] < -AT_ONCE)
    adopted = jnp.where(back, evidence.stable, chosen)
    return tallies.settle(evidence, trial, to_stable, adopted, better, alpha)
