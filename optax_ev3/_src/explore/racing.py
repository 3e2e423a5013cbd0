"""Racing: which explorers are paused.

Dimensions: ``W`` rounds of the window, ``C`` candidates.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ev3._src.base import checks

_FALLS = 2.0  # standard errors


@dataclasses.dataclass(frozen=True)
class Racing:
    """Explorers that do not win are paused, and cost nothing.

    An explorer is paused while it was in at least ``patience`` of the last ``window``
    rounds and adopted in none of them. So, until it wins one, it takes part in at most
    ``patience`` of any ``window`` rounds. A sweep or a group that evolves races as one.
    The inner state of a paused explorer waits: its step count, and a schedule that
    follows it, do not advance.

    Where branches go on apart (``restart`` is not ``"always"``), the rule is finer.
    Explorers that catch up go on: those that lost, from their first to their last round
    in the window, at least half of what they were behind the best. Before the window is
    full all have twice as many rounds. Two rounds are enough where the explorer's own
    score falls, by two standard errors; one is enough where it is not finite. A paused
    explorer that returns begins from the adopted parameters, and is paused again after
    one round if it is not adopted. One that was adopted in fewer than one of ``window``
    rounds so far is retried after 1, 2, 4, ... windows.

    Attributes:
      patience: Rounds without a win that are enough, at least 1.
      window: How many of the last rounds are looked at, more than ``patience``.

    Raises:
      TypeError: If one of the two is not an integer.
      ValueError: If one of the two is out of range.

    Examples:
      >>> import optax, optax_ev3
      >>> from optax_ev3 import explore
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -(w**2),
      ...     race=explore.Racing(patience=2, window=8),
      ... )
    """

    patience: int = 2
    window: int = 8

    def __post_init__(self):
        patience = checks.integer(self.patience, "patience", 1)
        window = checks.integer(self.window, "window", 2)
        if patience >= window:
            raise ValueError(
                f"patience must be below window, {window}, got {patience}."
            )
        object.__setattr__(self, "patience", patience)
        object.__setattr__(self, "window", window)


class Past(NamedTuple):
    """What a race knows of the last rounds, as in the history: a ring buffer.

    Attributes:
      rounds: ``[]`` int32, rounds recorded.
      adopted: ``[W]`` int32.
      mean: ``[W, C]`` float32.
      stderr: ``[W, C]`` float32.
      valid: ``[W, C]`` int32, 1 where update and scores were finite, 0 where not, and
        -1 where the candidate rested.
      adoptions: ``[C]`` int32, over all rounds.
    """

    rounds: jax.Array
    adopted: jax.Array
    mean: jax.Array
    stderr: jax.Array
    valid: jax.Array
    adoptions: jax.Array


def empty(window: int, candidates: int) -> Past:
    """Nothing yet, for W = ``window`` and C = ``candidates``."""
    return Past(
        rounds=jnp.zeros([], jnp.int32),
        adopted=jnp.zeros([window], jnp.int32),
        mean=jnp.zeros([window, candidates], jnp.float32),
        stderr=jnp.zeros([window, candidates], jnp.float32),
        valid=jnp.zeros([window, candidates], jnp.int32),
        adoptions=jnp.zeros([candidates], jnp.int32),
    )


def append(past: Past, record: Any) -> Past:
    """With the newest round of the record, which is longer or shorter."""
    row = past.rounds % past.adopted.shape[0]
    newest = (record.rounds - 1) % record.adopted.shape[0]
    rows = {
        name: getattr(past, name).at[row].set(getattr(record, name)[newest])
        for name in ("adopted", "mean", "stderr", "valid")
    }
    return past._replace(rounds=record.rounds, adoptions=record.adoptions, **rows)


def resting(
    past: Past, members: Sequence[Sequence[int]], race: int, apart: bool = False
) -> jax.Array:
    """Which explorers rest in the round to come: ``[E]`` bool.

    See :class:`Racing`. Where that leaves nobody, all take part.

    Args:
      past: The last rounds.
      members: For each of E explorers, which candidates are its own.
      race: The patience.
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
            # Less often than in one of W rounds; a product would overflow.
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
