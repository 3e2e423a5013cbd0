"""Racing: which explorers are paused.

Dimensions: ``W`` rounds of the window, ``C`` candidates.
"""

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import checks, evidence, select
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.base.states import RoundInfo, put_row

_FALLS = 2.0  # standard errors


@dataclasses.dataclass(frozen=True)
class Racing:
    """Explorers that do not win are paused, and cost nothing.

    An explorer is paused while it was in at least ``patience`` of the last ``window``
    rounds and adopted in none of them. A group that evolves races as one.
    The inner state of a paused explorer waits: its step count, and a schedule that
    follows it, do not advance. Exceptions:

    - Explorers that catch up go on: those that lost, from their first to their last
      round in the window, at least half of what they were behind the best.
    - Before the window is full, all have twice as many rounds.
    - Two rounds are enough where the explorer's own score falls, by two standard
      errors; one is enough where it is not finite.
    - A paused explorer that returns begins from the adopted parameters, and is paused
      again after one round if it is not adopted. One that was adopted in fewer than one
      of ``window`` rounds so far is retried after 1, 2, 4, ... windows.

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
      ...     loss_fn=lambda w: w**2,
      ...     explore=explore.branches(racing=explore.Racing(patience=2, window=8)),
      ... )
    """

    patience: int = 2
    window: int = 8

    def __post_init__(self) -> None:
        patience = checks.integer(self.patience, "patience", 1)
        window = checks.integer(self.window, "window", 2)
        if patience >= window:
            raise ValueError(
                f"patience must be below window, {window}, got {patience}."
            )
        object.__setattr__(self, "patience", patience)
        object.__setattr__(self, "window", window)


class RacingState(NamedTuple):
    """What a race knows of the last rounds: ring buffers.

    Attributes:
      rounds: ``[]`` int32, rounds recorded.
      adopted: ``[W]`` int32.
      mean: ``[W, C]`` float32.
      stderr: ``[W, C]`` float32.
      valid: ``[W, C]`` int32, 1 where update and scores were finite, 0 where not, and
        -1 where the candidate was paused.
      adoptions: ``[C]`` int32, over all rounds.
      lost: ``[]`` int32, 1 where nothing was valid in the last round.
      since: ``[]`` int32, rounds since the stable parameters were last replaced.
    """

    rounds: jax.Array
    adopted: jax.Array
    mean: jax.Array
    stderr: jax.Array
    valid: jax.Array
    adoptions: jax.Array
    lost: jax.Array
    since: jax.Array


def init(window: int, candidates: int) -> RacingState:
    """Nothing yet, for W = ``window`` and C = ``candidates``."""
    return RacingState(
        rounds=jnp.zeros([], jnp.int32),
        adopted=jnp.zeros([window], jnp.int32),
        mean=jnp.zeros([window, candidates], jnp.float32),
        stderr=jnp.zeros([window, candidates], jnp.float32),
        valid=jnp.zeros([window, candidates], jnp.int32),
        adoptions=jnp.zeros([candidates], jnp.int32),
        lost=jnp.zeros([], jnp.int32),
        since=jnp.zeros([], jnp.int32),
    )


def append(past: RacingState, info: RoundInfo) -> RacingState:
    """With one more round; one in which nothing was valid is not recorded."""
    valid = info.evidence.valid
    mean, stderr = evidence.estimate(info.evidence, info.objective)
    rounds = jnp.asarray(optax.safe_increment(past.rounds))
    adopted = info.decision.adopted

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return put_row(old, past.rounds, new)

    recorded = RacingState(
        rounds=rounds,
        adopted=put(past.adopted, adopted),
        mean=put(past.mean, jnp.where(valid, mean, 0)),
        stderr=put(past.stderr, jnp.where(valid, stderr, 0)),
        valid=put(past.valid, info.validity),
        # Together as many as rounds, which are counted up to the greatest int32.
        adoptions=past.adoptions.at[adopted].add(rounds - past.rounds),
        lost=past.lost,
        since=jnp.asarray(info.since),
    )
    chosen = select.where(info.explored, recorded, past)
    return chosen._replace(lost=1 - info.explored.astype(jnp.int32))


def paused(
    past: RacingState, layout: Layout, race: Racing, as_one: Collection[str] = ()
) -> dict[str, jax.Array]:
    """Which explorers are paused in the round to come: by name ``[]`` or ``[G]`` bool.

    See :class:`Racing`. Where that leaves nobody, all take part, as after a round in
    which nothing was valid.

    Args:
      past: What the race knows.
      layout: Where the explorers are among the candidates.
      race: How they race.
      as_one: The names of those whose members race as one.
    """
    scores = jnp.where(past.valid > 0, past.mean, -jnp.inf)
    best = scores[:, : layout.proposals].max(axis=1)

    def loses(own: jax.Array) -> jax.Array:
        return _loses(past, scores, best, own, race)

    flags = {}
    for name, single in layout.single.items():
        own = jnp.asarray(layout.all_rows(name))
        if not single and name not in as_one:
            flags[name] = jax.vmap(loses)(own.reshape(layout.kinds, -1).T)
        else:
            flags[name] = loses(own)
    all_lose = jnp.stack([flag.all() for flag in flags.values()]).all()
    races = ~all_lose & (past.lost == 0)
    return {name: flag & races for name, flag in flags.items()}


def _loses(
    past: RacingState, scores: jax.Array, best: jax.Array, own: jax.Array, race: Racing
) -> jax.Array:
    """Whether the explorer with these candidates has not won for long enough."""
    length = past.adopted.shape[0]
    known = jnp.arange(length) < past.rounds
    latest = (past.rounds - 1) % length
    took = (past.valid[:, own] >= 0).any(axis=1) & known
    won = jnp.isin(past.adopted, own) & known
    count = took.sum()
    course = _course(past, scores, best, took, own)
    # Before the window is full, all have twice as many rounds.
    full = past.rounds >= length
    enough = (count >= race.patience) & ~course.catches_up
    enough &= full | (count >= 2 * race.patience)
    enough |= course.falls & (count >= 2)
    enough |= course.came_back & (count == 1)
    enough |= course.lost & (count >= 1)
    # Less often than in one of W rounds; a product would overflow.
    seldom = past.adoptions[own].sum() <= (past.rounds - 1) // length
    enough |= seldom & ~took[latest] & ~_is_time(past)
    return enough & ~won.any()


def _is_time(past: RacingState) -> jax.Array:
    """Whether those come back that were seldom adopted."""
    stretch = past.rounds // past.adopted.shape[0]
    return (stretch & (stretch - 1)) == 0  # None yet, or a power of two.


class _Course(NamedTuple):
    """What became of an explorer, by its first and last round in the record.

    Attributes:
      catches_up: Whether it is at most half as far behind the best as it was.
      falls: Whether its own score fell.
      came_back: Whether it was paused before the first one.
      lost: Whether it was not finite then.
    """

    catches_up: jax.Array
    falls: jax.Array
    came_back: jax.Array
    lost: jax.Array


def _course(
    past: RacingState,
    scores: jax.Array,
    best: jax.Array,
    took: jax.Array,
    own: jax.Array,
) -> _Course:
    """Of the explorer with these candidates, from the rounds in which it took part."""
    length = past.adopted.shape[0]
    age = (past.rounds - 1 - jnp.arange(length)) % length
    first = jnp.argmax(jnp.where(took, age, -1))
    last = jnp.argmin(jnp.where(took, age, length))

    def at(row: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Its score, how far that is behind the best, and its standard error."""
        candidate = own[jnp.argmax(scores[row, own])]
        score = scores[row, candidate]
        mean, stderr = past.mean[row, candidate], past.stderr[row, candidate]
        return score, jnp.where(jnp.isinf(score), jnp.inf, best[row] - mean), stderr

    before, behind, error = at(first)
    now, still_behind, new_error = at(last)
    return _Course(
        catches_up=still_behind <= behind / 2,
        falls=before > now + _FALLS * jnp.hypot(error, new_error),
        came_back=age[first] < jnp.minimum(past.rounds, length) - 1,
        lost=~jnp.isfinite(now),
    )
