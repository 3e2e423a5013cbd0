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


def resting(past: Any, members: Sequence[Sequence[int]], race: int) -> jax.Array:
    """Which explorers rest in the round to come: ``[E]`` bool.

    One rests that took part in at least ``race`` of the rounds that the record holds
    and was adopted in none of them. So, until it wins one, it takes part in at most
    ``race`` of any H rounds. Where that leaves nobody, all take part.

    Args:
      past: The record of past rounds.
      members: For each of E explorers, which candidates are its own.
      race: Rounds that are enough.
    """
    known = jnp.arange(past.adopted.shape[0]) < past.rounds
    rests = []
    for own in members:
        took = (past.valid[:, jnp.asarray(own)] >= 0).any(axis=1) & known
        won = jnp.isin(past.adopted, jnp.asarray(own)) & known
        rests.append((took.sum() >= race) & ~won.any())
    found = jnp.stack(rests)
    return found & ~found.all()
