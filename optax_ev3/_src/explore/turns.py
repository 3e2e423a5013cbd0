"""Turns: which explorer of a relay is at work, and for how long.

First turns: all explorers have turns of 1, 2, 4, ... calls, one after the other, so
that a harmful one is visible for a few calls only. Then the better half goes on, each
time with turns of about twice the length, until one is left. It leads.

Then the leader has turn after turn, and now and then another one challenges it: each of
the two has a turn, and the better one leads from then on. Challenges become ever rarer,
as each of them takes a turn from the leader.

Dimensions: ``K`` explorers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_ev3._src.base import select
from optax_ev3._src.explore.racing import Racing

_WORSE = 3.0  # standard errors that show a fall
_FALLS = 2  # turns in a row in which an explorer falls that was never adopted
_STALLS = 2  # turns at a standstill in a row after which others are tried at once
_STILL = 1e-4  # the part of all progress that a turn at a standstill brings at most
_FAR = 0.05  # the part of all progress by which a challenger is far behind
_RAREST = 2**20  # turns between two challenges, at most
_HIGHEST = 1e30  # levels are cut there, so that sums of them are finite


class Turns(NamedTuple):
    """What a relay knows of its explorers.

    A level is a mean score, less that of the parameters with which all began: the sum
    of gains that were each measured on the same examples.

    Attributes:
      cycle: ``[]`` int32, cycles of first turns that have ended.
      field: ``[K]`` int32, 1 for explorers that take part in this cycle.
      leader: ``[]`` int32.
      challenger: ``[]`` int32, K for nobody.
      wait: ``[]`` int32, turns of the leader before the next challenge.
      gap: ``[]`` int32, how many there were between the last two.
      lost: ``[]`` int32, turns in a row that the challenger has lost.
      stalled: ``[]`` int32, turns in a row in which the leader stood still.
      behind: ``[]`` float32, how far it was behind the leader before its turn.
      challenges: ``[K]`` int32, of each explorer.
      level: ``[K]`` float32, that of each explorer after its last turn, or of its best
        average.
      best: ``[]`` float32, the level of the best parameters.
      adopted: ``[K]`` int32, 1 for explorers that were ever adopted.
      fell: ``[K]`` int32, turns in a row in which an explorer fell.
      harmful: ``[K]`` int32, 1 for explorers that get no turn any more.
    """

    cycle: jax.Array
    field: jax.Array
    leader: jax.Array
    challenger: jax.Array
    wait: jax.Array
    gap: jax.Array
    lost: jax.Array
    stalled: jax.Array
    behind: jax.Array
    challenges: jax.Array
    level: jax.Array
    best: jax.Array
    adopted: jax.Array
    fell: jax.Array
    harmful: jax.Array


class Outcome(NamedTuple):
    """What a turn has brought.

    Attributes:
      gain: ``[]``, of the explorer's best candidate over the best parameters before.
      stderr: ``[]``, its standard error; 0 where scores are exact.
      moved: ``[]``, the gain of what was adopted over the best parameters before.
      adopted: ``[]`` bool, whether a candidate of this explorer was adopted.
      finite: ``[]`` bool, whether any of its candidates was valid.
    """

    gain: jax.Array
    stderr: jax.Array
    moved: jax.Array
    adopted: jax.Array
    finite: jax.Array


class Next(NamedTuple):
    """Whose turn is next.

    Attributes:
      turns: What is known from now on.
      lead: ``[]`` int32, the explorer.
      length: ``[]`` int32, calls of its turn.
      joins: ``[]`` bool, whether it goes on from where the leader is, not from where it
        is itself.
    """

    turns: Turns
    lead: jax.Array
    length: jax.Array
    joins: jax.Array


def init(explorers: int, racing: Racing | None) -> Turns:
    """Before the first turn, which is that of the first explorer."""
    gap = 0 if racing is None else racing.window

    def whole(value: int) -> jax.Array:
        return jnp.asarray(value, jnp.int32)

    def each(value: int) -> jax.Array:
        return jnp.full([explorers], value, jnp.int32)

    # Buffers of their own, so that all can be donated.
    return Turns(
        cycle=whole(0),
        field=each(1),
        leader=whole(0),
        challenger=whole(explorers),
        wait=whole(gap),
        gap=whole(gap),
        lost=whole(0),
        stalled=whole(0),
        behind=jnp.zeros([], jnp.float32),
        challenges=each(0),
        level=jnp.zeros([explorers], jnp.float32),
        best=jnp.zeros([], jnp.float32),
        adopted=each(0),
        fell=each(0),
        harmful=each(0),
    )


def lengths(length: int, explorers: int) -> list[int]:
    """Of the first turns, by cycle: doubled up to ``length``; then of those left."""
    if explorers == 1:
        return []
    doubled = [2**i for i in range(max(length - 1, 1).bit_length())]
    # As many calls for all together, whether all or half of them are left.
    halvings = math.ceil(math.log2(explorers))
    return doubled + [length * 2**i for i in range(halvings - 1)]


def first_length(length: int, explorers: int) -> int:
    """Calls of the very first turn."""
    return (lengths(length, explorers) or [length])[0]


def advance(
    past: Turns,
    lead: jax.Array,
    outcome: Outcome,
    length: int,
    racing: Racing | None,
) -> Next:
    """What follows after the turn of ``lead``."""
    noted = _noted(past, lead, outcome)
    stages = lengths(length, past.level.shape[0])
    stands = abs(outcome.gain) <= _STILL * abs(past.best)
    later = _challenges(noted, lead, stands, racing)
    if not stages:
        return Next(
            later.turns, later.lead, jnp.asarray(length, jnp.int32), later.joins
        )
    first = _first_turns(noted, lead, stages)
    chosen = select.where(past.cycle < len(stages), first, later)
    calls = jnp.asarray([*stages, length], jnp.int32)
    cycle = jnp.minimum(chosen.turns.cycle, len(stages))
    return chosen._replace(length=calls[cycle])


def _noted(past: Turns, lead: jax.Array, outcome: Outcome) -> Turns:
    """With the levels after a turn, and who is harmful."""
    before = past.level[lead]
    level = _cut(past.best + outcome.gain, before)
    # An exact score has no error: a fall is one that undoes all that was reached.
    error = jnp.where(outcome.stderr > 0, _WORSE * outcome.stderr, past.best)
    fell = jnp.where(level < before - error, past.fell[lead] + 1, 0)
    fell = jnp.where(outcome.finite, fell, _FALLS)
    adopted = past.adopted.at[lead].max(outcome.adopted.astype(jnp.int32))
    is_harmful = (adopted[lead] == 0) & (fell >= _FALLS)
    harmful = past.harmful.at[lead].max(is_harmful.astype(jnp.int32))
    return past._replace(
        level=past.level.at[lead].set(jnp.where(outcome.finite, level, before)),
        best=_cut(past.best + outcome.moved, past.best),
        adopted=adopted,
        fell=past.fell.at[lead].set(fell.astype(jnp.int32)),
        # If all are, all go on.
        harmful=jnp.where(harmful.all(), 0, harmful),
    )


def _cut(level: jax.Array, otherwise: jax.Array) -> jax.Array:
    """The level within bounds; another one where it is not a number."""
    level = jnp.where(jnp.isnan(level), otherwise, level)
    return jnp.clip(level, -_HIGHEST, _HIGHEST).astype(jnp.float32)


def _first_turns(past: Turns, lead: jax.Array, stages: list[int]) -> Next:
    """The next one in the cycle; at its end the better half goes on."""
    count = past.level.shape[0]
    index = jnp.arange(count)
    able = past.harmful == 0
    field = (past.field > 0) & able
    # Where all who were left are harmful, those go on who had been left out.
    field = jnp.where(field.any(), field, able)
    left = field & (index > lead)
    ends = ~left.any()
    cycle = past.cycle + ends.astype(jnp.int32)
    halvings = math.ceil(math.log2(count))
    size = field.sum()
    keep = jnp.where(cycle > len(stages) - halvings, (size + 1) // 2, size)
    keep = jnp.where(cycle >= len(stages), 1, keep)
    order = jnp.argsort(jnp.where(field, -past.level, jnp.inf), stable=True)
    place = jnp.zeros_like(order).at[order].set(index)
    field = jnp.where(ends, field & (place < keep), field)
    lead = jnp.where(ends, jnp.argmax(field), jnp.argmax(left)).astype(jnp.int32)
    turns = past._replace(cycle=cycle, field=field.astype(jnp.int32), leader=lead)
    return _next(turns, lead)


def _challenges(
    past: Turns, lead: jax.Array, stands: jax.Array, racing: Racing | None
) -> Next:
    """The leader, or one that challenges it."""
    count = past.level.shape[0]
    able = past.harmful == 0
    heir = jnp.argmax(jnp.where(able, past.level, -jnp.inf)).astype(jnp.int32)
    if racing is None or count == 1:
        leader = jnp.where(able[past.leader], past.leader, heir)
        return _next(past._replace(leader=leader), leader)
    leads = lead == past.leader
    stalled = jnp.where(leads, jnp.where(stands, past.stalled + 1, 0), past.stalled)
    turns = past._replace(stalled=stalled.astype(jnp.int32))
    turns, goes_on = _judged(turns, leads, heir, racing)
    turns, begins, joins = _begun(turns, leads & (past.challenger == count))
    challenges = goes_on | begins
    return _next(turns, jnp.where(challenges, turns.challenger, turns.leader), joins)


def _judged(
    past: Turns, leads: jax.Array, heir: jax.Array, racing: Racing
) -> tuple[Turns, jax.Array]:
    """A challenge after a turn of the leader, or of the challenger.

    Returns:
      What is known from now on, and ``[]`` bool, whether the challenger goes on.
    """
    count = past.level.shape[0]
    able = past.harmful == 0
    challenged = past.challenger < count
    rival = jnp.minimum(past.challenger, count - 1)
    # After a turn of the leader both have had one.
    decided = challenged & leads
    behind = past.level[past.leader] - past.level[rival]
    wins = decided & ((behind < 0) | ~able[past.leader]) & able[rival]
    lost = jnp.where(decided & (behind >= past.behind / 2), past.lost + 1, 0)
    goes_on = decided & ~wins & able[rival] & (lost < racing.patience)
    over = challenged & jnp.where(leads, ~goes_on, ~able[rival])
    leader = jnp.where(wins, rival, past.leader)
    rarer = over & (past.stalled < _STALLS)
    gap = jnp.where(rarer, jnp.minimum(2 * past.gap, _RAREST), past.gap)
    waited = (leads & ~challenged).astype(jnp.int32)
    turns = past._replace(
        leader=jnp.where(able[leader], leader, heir),
        challenger=jnp.where(over, count, past.challenger).astype(jnp.int32),
        wait=jnp.where(over, gap, past.wait - waited).astype(jnp.int32),
        gap=gap,
        lost=jnp.where(over, 0, jnp.where(decided, lost, past.lost)),
        stalled=jnp.where(wins, 0, past.stalled).astype(jnp.int32),
        behind=jnp.where(decided, behind, past.behind).astype(jnp.float32),
    )
    return turns, goes_on


def _begun(past: Turns, is_time: jax.Array) -> tuple[Turns, jax.Array, jax.Array]:
    """A new challenge, by the explorer with the fewest so far; of these by the best.

    Args:
      past: What is known.
      is_time: ``[]`` bool, whether the leader had a turn without a challenge.

    Returns:
      What is known from now on, and ``[]`` bool, whether a challenge begins, and
      whether the challenger goes on from where the leader is.
    """
    count, level, leader = past.level.shape[0], past.level, past.leader
    stalls = past.stalled >= _STALLS
    able = (past.harmful == 0) & (jnp.arange(count) != leader)
    # Where no score has told any two apart, the first one is left in the lead.
    able &= (level != level[leader]).any()
    begins = is_time & ((past.wait <= 0) | stalls) & able.any()
    fewest = jnp.min(past.challenges, where=able, initial=jnp.iinfo(jnp.int32).max)
    able &= past.challenges == fewest
    new = jnp.argmax(jnp.where(able, level, -jnp.inf)).astype(jnp.int32)
    challenges = past.challenges.at[new].add(begins.astype(jnp.int32))
    is_far = level[new] < past.best - _FAR * jnp.abs(past.best)
    joins = begins & is_far & (challenges[new] > 1) & ~stalls
    behind = jnp.where(joins, 0, past.best - level[new])
    turns = past._replace(
        challenger=jnp.where(begins, new, past.challenger),
        lost=jnp.where(begins, 0, past.lost),
        behind=jnp.where(begins, behind, past.behind).astype(jnp.float32),
        challenges=challenges,
    )
    return turns, begins, joins


def _next(turns: Turns, lead: jax.Array, joins: jax.Array | bool = False) -> Next:
    return Next(
        turns, lead.astype(jnp.int32), jnp.zeros([], jnp.int32), jnp.asarray(joins)
    )
