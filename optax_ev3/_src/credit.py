"""Credit: how good each explorer has been lately, and which ones may rest.

Dimensions: ``H`` rounds kept, ``C`` candidates, ``K`` explorers and combined candidates
(all but ``current`` and ``stable``).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

_LATELY = 0.9  # what an earlier round weighs, a round later: 10 rounds in all
_LOST = -3.0  # what a round counts for in which a candidate was not finite


def estimate(past: Any, groups: Sequence[jax.Array] = ()) -> jax.Array:
    """How far each candidate was ahead of the others in late rounds: ``[K]`` float32.

    Within a round, scores are brought to mean zero and variance one over the candidates
    that were finite; rounds fade by 0.9.

    Args:
      past: The record of past rounds.
      groups: Places of groups whose members change: they share their credit.

    Returns:
      In standard deviations; zero for what never took part.
    """
    length = past.adopted.shape[0]
    row = jnp.arange(length)
    age = (past.rounds - 1 - row) % length
    weight = jnp.where(row < past.rounds, _LATELY ** age.astype(jnp.float32), 0)
    state, mean = past.valid[:, :-2], past.mean[:, :-2]
    finite = state > 0
    count = jnp.maximum(finite.sum(axis=1, keepdims=True), 1)
    # Brought to at most one first: huge scores do not overflow.
    scale = jnp.abs(mean).max(axis=1, keepdims=True)
    mean = mean / jnp.where(scale > 0, scale, 1)
    centre = jnp.where(finite, mean, 0).sum(axis=1, keepdims=True) / count
    ahead = jnp.where(finite, mean - centre, 0)
    spread = jnp.sqrt(jnp.square(ahead).sum(axis=1, keepdims=True) / count)
    ahead = jnp.where(finite, ahead / jnp.where(spread > 0, spread, 1), _LOST)
    weights = weight[:, None] * (state >= 0)
    total = (weights * ahead).sum(axis=0) / jnp.maximum(weights.sum(axis=0), 1e-6)
    for group in groups:
        total = total.at[group].set(total[group].mean())
    return total


def resting(
    past: Any, members: Sequence[Sequence[int]], race: int, apart: bool = False
) -> jax.Array:
    """Which explorers rest in the round to come: ``[E]`` bool.

    One rests that took part in at least ``race`` of the rounds that the record holds
    and was adopted in none of them. So, until it wins one, it takes part in at most
    ``race`` of any H rounds. Where that leaves nobody, all take part.

    Where branches go on apart, who is slow at first may be best in the end, and who is
    lost stays so. Then those go on who catch up: what they are behind the best of a
    round has halved, at least, from the first of their rounds to the last. And two
    rounds are enough for those whose own score falls, by more than two standard errors,
    or is not finite.

    Args:
      past: The record of past rounds.
      members: For each of E explorers, which candidates are its own.
      race: Rounds that are enough.
      apart: Whether branches go on from where they were.
    """
    known = jnp.arange(past.adopted.shape[0]) < past.rounds
    rests = []
    for own in map(jnp.asarray, members):
        took = (past.valid[:, own] >= 0).any(axis=1) & known
        won = jnp.isin(past.adopted, own) & known
        enough = took.sum() >= race
        if apart:
            catches_up, falls = _course(past, own, took)
            enough = (enough & ~catches_up) | ((took.sum() >= 2) & falls)
        rests.append(enough & ~won.any())
    found = jnp.stack(rests)
    return found & ~found.all()


def _course(past, own, took):
    """Whether an explorer catches up with the best, and whether it falls."""
    length = past.adopted.shape[0]
    age = (past.rounds - 1 - jnp.arange(length)) % length
    scores = jnp.where(past.valid > 0, past.mean, -jnp.inf)
    best = scores[:, :-2].max(axis=1)

    def seen(row):
        at = own[jnp.argmax(scores[row, own])]
        return scores[row, at], best[row] - scores[row, at], past.stderr[row, at]

    before, behind, error = seen(jnp.argmax(jnp.where(took, age, -1)))
    now, still_behind, new_error = seen(jnp.argmin(jnp.where(took, age, length)))
    falls = before - now > 2 * jnp.hypot(error, new_error)
    return still_behind <= behind / 2, falls | ~jnp.isfinite(now)
