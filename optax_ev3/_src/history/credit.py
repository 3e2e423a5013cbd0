"""Credit: how good each explorer has been lately.

Dimensions: ``C`` candidates, ``K`` explorers and combined candidates (all but
``current`` and ``stable``).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from optax_ev3._src.base.states import Credit

_LATELY = 0.9  # what an earlier round weighs, a round later: 10 rounds in all
_LOST = -3.0  # what a round counts for in which a candidate was not finite


def nothing(candidates: int) -> Credit:
    """The sums before the first round, for K = ``candidates``."""
    return Credit(*(jnp.zeros([candidates], jnp.float32) for _ in Credit._fields))


def add(past: Credit, valid: jax.Array, mean: jax.Array) -> Credit:
    """The sums with one more round.

    Within a round, scores are brought to mean zero and variance one over the candidates
    that were finite; rounds fade by 0.9.

    Args:
      past: The sums before.
      valid: ``[C]``, 1 where update and scores were finite, 0 where not, and -1 where
        the candidate was paused.
      mean: ``[C]``, mean scores.
    """
    state = valid[: past.ahead.shape[0]]
    finite = state > 0
    mean = jnp.where(finite, mean[: state.shape[0]].astype(jnp.float32), 0)
    count = jnp.maximum(finite.sum(dtype=mean.dtype), 1)
    # Brought to at most one first: huge scores do not overflow.
    scale = jnp.abs(mean).max()
    mean = mean / jnp.where(scale > 0, scale, 1)
    ahead = jnp.where(finite, mean - mean.sum() / count, 0)
    spread = jnp.sqrt(jnp.square(ahead).sum() / count)
    apart = spread > 8 * jnp.finfo(spread.dtype).eps  # Else a tie within rounding.
    ahead = jnp.where(finite, ahead / jnp.where(apart, spread, 1), _LOST)
    took = state >= 0
    return Credit(
        _LATELY * past.ahead + jnp.where(took, ahead, 0),
        _LATELY * past.weight + jnp.where(took, 1.0, 0),
    )


def estimate(past: Credit, groups: Sequence[jax.Array] = ()) -> jax.Array:
    """How far each candidate was ahead of the others in late rounds: ``[K]`` float32.

    Args:
      past: The sums over past rounds.
      groups: Places of groups whose members change: they share their credit.

    Returns:
      In standard deviations; zero for what never took part.
    """
    total = past.ahead / jnp.maximum(past.weight, 1e-6)
    for group in groups:
        total = total.at[group].set(total[group].mean())
    return total
