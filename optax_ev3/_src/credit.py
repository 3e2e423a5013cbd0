"""Credit: how good each explorer has been lately, and which ones may rest.

Dimensions: ``H`` rounds kept, ``C`` candidates, ``K`` explorers and combined candidates
(all but ``current`` and ``stable``).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_LATELY = 0.9  # what an earlier round weighs, a round later: 10 rounds in all
_LOST = -3.0  # what a round counts for in which a candidate was not finite
_FALLS = 2.0  # standard errors


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
    state = past.valid[:, :-2]
    finite = state > 0
    mean = jnp.where(finite, past.mean[:, :-2], 0)
    count = finite.sum(axis=1, keepdims=True, dtype=mean.dtype)
    count = jnp.maximum(count, 1)
    # Brought to at most one first: huge scores do not overflow.
    scale = jnp.abs(mean).max(axis=1, keepdims=True)
    mean = mean / jnp.where(scale > 0, scale, 1)
    centre = jnp.where(finite, mean, 0).sum(axis=1, keepdims=True) / count
    ahead = jnp.where(finite, mean - centre, 0)
    spread = jnp.sqrt(jnp.square(ahead).sum(axis=1, keepdims=True) / count)
    ahead = jnp.where(finite, ahead / jnp.where(spread > 0, spread, 1), _LOST)
    weights = jnp.where(state >= 0, weight[:, None], 0)
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
    round has halved, at least, from the first of their rounds to the last; and in the
    first H - 1 rounds of all, twice as many are enough. Two are for those whose own
    score falls, by more than two standard errors; one is for those who are not finite,
    and for those who come back: they begin at the best parameters, and what a smaller
    rate gains there, it gains at once. Those that were adopted in fewer than one of H
    rounds so far come back ever more rarely: by rounds H, 2 H, 4 H, and so on.

    Args:
      past: The record of past rounds.
      members: For each of E explorers, which candidates are its own.
      race: Rounds that are enough.
      apart: Whether branches go on from where they were.
    """
    length = past.adopted.shape[0]
    known = jnp.arange(length) < past.rounds
    latest = (past.rounds - 1) % length
    young = past.rounds < length
    rests = []
    for own in map(jnp.asarray, members):
        took = (past.valid[:, own] >= 0).any(axis=1) & known
        won = jnp.isin(past.adopted, own) & known
        count = took.sum()
        enough = count >= race
        if apart:
            course = _course(past, own, took)
            enough &= ~course.catches_up & (~young | (count >= 2 * race))
            enough |= course.falls & (count >= 2)
            enough |= course.came_back & (count == 1)
            enough |= course.lost & (count >= 1)
            # Less often than in one of H rounds; a product would overflow.
            seldom = past.adoptions[own].sum() <= (past.rounds - 1) // length
            enough |= seldom & ~took[latest] & ~_is_time(past)
        rests.append(enough & ~won.any())
    found = jnp.stack(rests)
    return found & ~found.all()


def _is_time(past):
    """Whether those come back that were seldom adopted."""
    stretch = past.rounds // past.adopted.shape[0]
    return (stretch & (stretch - 1)) == 0  # None yet, or a power of two.


class _Course(NamedTuple):
    """What became of an explorer, by its first and last round in the record.

    Attributes:
      catches_up: Whether it is at most half as far behind the best as it was.
      falls: Whether its own score fell.
      came_back: Whether it rested before the first one.
      lost: Whether it was not finite then.
    """

    catches_up: jax.Array
    falls: jax.Array
    came_back: jax.Array
    lost: jax.Array


def _course(past, own, took):
    """Of the explorer with these candidates, from the rounds in which it took part."""
    length = past.adopted.shape[0]
    age = (past.rounds - 1 - jnp.arange(length)) % length
    first = jnp.argmax(jnp.where(took, age, -1))
    last = jnp.argmin(jnp.where(took, age, length))
    scores = jnp.where(past.valid > 0, past.mean, -jnp.inf)
    best = scores[:, :-2].max(axis=1)

    def seen(row):
        at = own[jnp.argmax(scores[row, own])]
        score = scores[row, at]
        behind = jnp.where(jnp.isinf(score), jnp.inf, best[row] - past.mean[row, at])
        return score, behind, past.stderr[row, at]

    before, behind, error = seen(first)
    now, still_behind, new_error = seen(last)
    return _Course(
        catches_up=still_behind <= behind / 2,
        falls=before > now + _FALLS * jnp.hypot(error, new_error),
        came_back=age[first] < jnp.minimum(past.rounds, length) - 1,
        lost=~jnp.isfinite(now),
    )
