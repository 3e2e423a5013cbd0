"""Evidence that adds up over rounds, and the trial of ``current`` against ``stable``.

Dimensions: ``K`` proposals.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from optax_ev3._src.base import statistics
from optax_ev3._src.base.decision import Decision
from optax_ev3._src.base.evidence import Comparison, Evidence

_FADING = 0.95  # what an earlier round weighs, a round later: 20 rounds in all
_MOST = 10.0  # the most that one round says of current against stable, as z
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


def no_tally(*shape: int) -> Tally:
    """The tally before the first round."""
    return Tally(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def no_trial() -> Trial:
    """The trial before the first round."""
    return Trial(*(jnp.zeros([], jnp.float32) for _ in Trial._fields))


def cleared(tally: Tally, mask: jax.Array) -> Tally:
    """The tally without what it says of those in the mask."""
    return Tally(*(jnp.where(mask, 0, x) for x in tally))


def of_proposals(evidence: Evidence, z: jax.Array) -> jax.Array:
    """The z values of the proposals, ``[K]``; what is not valid loses for certain."""
    proposals = evidence.proposals
    valid = evidence.valid[:proposals]
    return jnp.where(valid, z[:proposals], -statistics.CERTAIN)


def one_more(trial: Trial, z: jax.Array) -> Trial:
    """The trial with one more round; one that ties says nothing."""
    z = jnp.clip(z, -_MOST, _MOST).astype(jnp.float32)
    return Trial(
        trial.total + z, trial.weight + (z != 0).astype(z.dtype), trial.rounds + 1
    )


def log_e(trial: Trial) -> jax.Array:
    """Evidence at any time that ``current`` is better than ``stable``."""
    rho = statistics.best_rho(_ROUNDS)
    return statistics.mixture_log_e(trial.total, trial.weight, rho)


def settle(
    evidence: Evidence,
    trial: Trial,
    to_stable: Comparison,
    adopted: jax.Array,
    better: jax.Array,
    alpha: float,
) -> tuple[Decision, Trial]:
    """What becomes stable where a candidate is adopted, and what is then on trial.

    Args:
      evidence: The scores of the round.
      trial: With this round.
      to_stable: All candidates against ``stable``, in this round.
      adopted: ``[]``, which candidate is.
      better: ``[]`` bool, whether the trial has shown ``current`` to be better.
      alpha: Half of it is spent on what a single round shows.
    """
    # Choosing favours the lucky: what was chosen has to be better by more.
    level = statistics.spend(alpha / 2, trial.rounds) / (evidence.proposals + 1)
    p = norm.sf(to_stable.z[adopted])
    at_once = evidence.valid[adopted] & (p < level)
    replaced = at_once | better
    parted = ~replaced & (adopted != evidence.stable)
    promoted = jnp.where(at_once, adopted, evidence.current)
    return Decision(adopted, replaced, promoted), Trial(
        jnp.where(parted, trial.total, 0),
        jnp.where(parted, trial.weight, 0),
        jnp.where(replaced, 0, trial.rounds),
    )


def add(tally: Tally, z: jax.Array, clip: float) -> Tally:
    """The tally with one more round; a round that ties says nothing."""
    z = jnp.clip(z, -clip, clip).astype(jnp.float32)
    return Tally(
        total=_FADING * tally.total + z,
        weight=_FADING**2 * tally.weight + (z != 0).astype(z.dtype),
    )


def z_of(tally: Tally, doubt: float) -> jax.Array:
    """What all rounds together say, as z values."""
    return tally.total / jnp.sqrt(tally.weight + doubt)


def narrow(mask: jax.Array, condition: jax.Array) -> jax.Array:
    """``mask`` where the condition holds as well, unless that leaves nobody."""
    narrower = mask & condition
    return jnp.where(narrower.any(), narrower, mask)


def root_mean_square(past: jax.Array, step: jax.Array) -> jax.Array:
    """One more step in a fading root mean square, without overflow."""
    scale = jnp.maximum(past, jnp.abs(step))
    scale = jnp.where(scale > 0, scale, 1)
    past, step = past / scale, step / scale
    return scale * jnp.sqrt(_FADING * past**2 + (1 - _FADING) * step**2)


def step_size(evidence: Evidence, gain: jax.Array, adopted: jax.Array) -> jax.Array:
    """Size of this round's step in score: of the smallest one if none was taken.

    If standing still did not count, exact values would find every step too bad for
    ever.
    """
    proposals = evidence.proposals
    valid = evidence.valid[:proposals]
    sizes = jnp.where(valid, jnp.abs(gain[:proposals]), jnp.inf)
    smallest = jnp.where(valid.any(), sizes.min(), 0)
    return jnp.where(adopted < proposals, gain[adopted], smallest).astype(jnp.float32)
