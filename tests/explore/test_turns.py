"""Turns of a relay against the same in plain Python, written from what is documented.

Numbers are eighths, so that sums of them are exact; what is left to rounding, a
comparison with a share of all progress, is not compared where both sides are near.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_finite, assert_same_types, says, x64
from helpers.turns import NearTieError, Plain, doubled
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_ev3._src.explore import turns
from optax_ev3.explore import Racing

TURNS = 100


CONFIGS = [
    (1, 3, Racing(1, 2)),
    (2, 1, Racing(1, 2)),
    (2, 25, None),
    (3, 4, Racing(1, 2)),
    (4, 25, Racing(2, 3)),
    (5, 30, Racing(1, 4)),
    (7, 10, None),
    (8, 2, Racing(3, 4)),
]


@functools.cache
def program(count, length, racing):
    """Many turns at once: who has each of them, and what is known after it."""

    def turn(carry, outcome):
        known, who, quality, broken = carry
        outcome = outcome._replace(
            gain=outcome.gain + quality[who],
            finite=outcome.finite & ~broken[who],
            adopted=outcome.adopted & outcome.finite & ~broken[who],
        )
        following = turns.advance(known, who, outcome, length, racing)
        carry = following.turns, following.lead, quality, broken
        return carry, (who, outcome, following)

    @jax.jit
    def run(outcomes, quality, broken):
        carry = turns.init(count, racing), jnp.int32(0), quality, broken
        return jax.lax.scan(turn, carry, outcomes)[1]

    return run


def some_outcomes(pattern):
    """A short pattern, again and again."""
    columns = [
        list(itertools.islice(itertools.cycle(column), TURNS))
        for column in zip(*pattern, strict=True)
    ]
    gain, stderr, moved, adopted, finite = columns
    return turns.Outcome(
        *(jnp.asarray(x, jnp.float32) / 8 for x in (gain, stderr, moved)),
        jnp.asarray(adopted, bool),
        jnp.asarray(finite, bool),
    )


eighths = st.integers(-12, 12)
one_turn = st.tuples(
    eighths,
    st.sampled_from([0, 0, 1, 4]),
    st.sampled_from([0, 0, 0, 1, 3, 8, -1]),
    st.booleans(),
    st.sampled_from([True] * 7 + [False]),
)


@st.composite
def cases(draw, count):
    pattern = draw(st.lists(one_turn, min_size=1, max_size=12))
    quality = draw(st.lists(eighths, min_size=count, max_size=count))
    broken = draw(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=count))
    broken = [*broken, *[0] * count][:count]
    return (
        some_outcomes(pattern),
        jnp.asarray(quality, jnp.float32) / 8,
        jnp.asarray(broken, bool),
    )


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: f"{c[0]}-{c[1]}-{'race' if c[2] else 'alone'}"
)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_equal_those_in_plain_python(config, data):
    case = data.draw(cases(config[0]))
    who, outcomes, following = jax.tree.map(np.asarray, program(*config)(*case))
    plain, expected = Plain(*config), 0
    for turn in range(TURNS):
        assert who[turn] == expected
        try:
            outcome = (x[turn].item() for x in outcomes)
            expected, calls, joins = plain.after(expected, *outcome)
        except NearTieError:
            break
        known = jax.tree.map(lambda x, turn=turn: x[turn], following.turns)
        assert set(np.flatnonzero(known.harmful)) == plain.harmful
        assert (following.lead[turn], following.length[turn]) == (expected, calls)
        assert following.joins[turn] == joins
        np.testing.assert_array_equal(known.level, plain.level)
        if plain.cycle == len(plain.stages):
            assert known.leader == plain.leader
    check_invariants(config, following)


def check_invariants(config, following):
    """What holds whatever the outcomes are."""
    count, length, racing = config
    known, lead = following.turns, following.lead
    # Who is harmful is never next, and somebody is not.
    harmful = known.harmful > 0
    assert not harmful[np.arange(TURNS), lead].any()
    assert not harmful.all(axis=1).any()
    assert ((lead >= 0) & (lead < count)).all()
    # Exactly one leads, and whoever is next leads or challenges.
    later = known.cycle == len(turns.lengths(length, count))
    is_challenger = (lead == known.challenger) & (lead != known.leader)
    assert (is_challenger | (lead == known.leader))[later].all()
    assert (following.length[later] == length).all()
    if racing is None or count == 1:
        assert (lead == known.leader)[later].all() and not following.joins.any()
    else:
        ratio = known.gap[1:] / known.gap[:-1]
        assert np.isin(ratio, [1, 2]).all()
        assert not following.joins[~later].any()


@pytest.mark.parametrize("count", range(1, 9))
def test_lengths_of_the_first_turns(count):
    for length in range(1, 31):
        found = turns.lengths(length, count)
        first = turns.first_length(length, count)
        if count == 1:
            assert (found, first) == ([], length)
            continue
        halvings = math.ceil(math.log2(count))
        expected = doubled(length) + [length, 2 * length][: halvings - 1]
        assert (found, first) == (expected, 1)
        # A harmful explorer is visible for less than a turn twice over.
        assert sum(doubled(length)) < max(2 * length, 2)


def outcome(gain, stderr=0.0, moved=0.0, adopted=False, finite=True):
    return turns.Outcome(
        jnp.float32(gain),
        jnp.float32(stderr),
        jnp.float32(moved),
        jnp.asarray(adopted),
        jnp.asarray(finite),
    )


@functools.cache
def advance(length, racing):
    return jax.jit(lambda *args: turns.advance(*args, length, racing))


def play(count, length, racing, outcomes, of=None):
    """Who is next after each outcome; of whom they are, by explorer, if a function."""
    known, who, seen = turns.init(count, racing), jnp.int32(0), []
    for turn in range(outcomes if of else len(outcomes)):
        result = of(int(who)) if of else outcomes[turn]
        following = advance(length, racing)(known, who, result)
        known, who = following.turns, following.lead
        seen.append((int(who), int(following.length), bool(following.joins)))
    return seen, known


def test_by_hand():
    """Two explorers, of which the second is better, and the first is tried again."""

    def of(who):
        return outcome([0.5, 1.0][who], moved=1.0 if who else 0.0, adopted=who == 1)

    seen, _ = play(2, 4, Racing(1, 2), 26, of)
    # The first turn of 1 call is over: 1, then both for 2 calls, then the better one.
    assert [one[:2] for one in seen[:3]] == [(1, 1), (0, 2), (1, 2)]
    assert all(calls == 4 for _, calls, _ in seen[3:])
    # After two turns of the leader the first challenge: the challenger comes nearer, by
    # more than half, and then no more. Further ones come after 4, 8, ... turns, from
    # where the leader is, and end after a turn of each.
    leaders = [one[0] for one in seen[3:]]
    assert leaders == [1, 1, 0, 1, 0, 1, *[1] * 4, 0, 1, *[1] * 8, 0, 1, 1]
    assert [i for i, one in enumerate(seen) if one[2]] == [3 + 10, 3 + 20]


def test_the_worst_cases_leave_the_state_finite():
    values = [3e38, -3e38, jnp.inf, -jnp.inf, jnp.nan, 1.0, -1e30, 0.0]
    with np.errstate(all="ignore"):
        cases = [
            outcome(gain, stderr, moved, adopted)
            for gain, stderr, moved, adopted in itertools.product(
                values, [0.0, 3e38, jnp.nan], values, [True, False]
            )
        ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    first = turns.init(3, Racing(1, 2))

    @jax.jit
    def run(outcomes):
        def turn(carry, outcome):
            following = turns.advance(*carry, outcome, 2, Racing(1, 2))
            return following[:2], following

        return jax.lax.scan(turn, (first, jnp.int32(0)), outcomes)[1]

    following = run(stacked)
    assert_finite(following)
    assert ((following.lead >= 0) & (following.lead < 3)).all()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("racing", [None, Racing(1, 2)])
def test_dtypes_stay(racing, count, wide):
    with x64(wide):
        first = turns.init(count, racing)
        result = turns.Outcome(
            *[jnp.asarray(1.0)] * 3, jnp.asarray(True), jnp.asarray(True)
        )

        def step(known, who):
            return turns.advance(known, who, result, 5, racing)

        following = jax.eval_shape(step, first, jnp.int32(0))
        assert_same_types(following.turns, first)
        assert following.lead.dtype == following.length.dtype == jnp.int32
        assert following.joins.dtype == bool
        dtypes = {x.dtype for x in jax.tree.leaves(first)}
        assert dtypes == {np.dtype("int32"), np.dtype("float32")}


def test_who_is_not_finite_gets_no_other_turn_but_where_all_are():
    seen, known = play(3, 8, Racing(1, 2), 40, lambda who: outcome(1.0, finite=who < 1))
    assert {who for who, *_ in seen[2:]} == {0}
    assert known.harmful.tolist() == [0, 1, 1]
    seen, known = play(3, 8, None, 12, lambda who: outcome(1.0, finite=False))
    assert {who for who, *_ in seen} == {0, 1, 2}


@pytest.mark.parametrize(
    ("gains", "stderr", "best", "harmful"),
    [
        ([-2.9, -5.8], 1.0, 0.0, 0),
        ([-3.1, -6.2], 1.0, 0.0, 1),
        ([-3.1, -6.2, -9.3], 1.0, 0.0, 1),
        # Two in a row: not with one between them that is no fall.
        ([-3.1, -3.1, -6.2], 1.0, 0.0, 0),
        # An exact score falls where it undoes all progress.
        ([-3.9, -7.8], 0.0, 4.0, 0),
        ([-8.1, -12.2], 0.0, 4.0, 1),
    ],
)
def test_two_falls_in_a_row_are_harmful(gains, stderr, best, harmful):
    known = turns.init(2, None)._replace(best=jnp.float32(best))
    for gain in gains:
        result = outcome(gain, stderr)
        known = advance(4, None)(known, jnp.int32(1), result).turns
    assert known.harmful.tolist() == [0, harmful]


def test_who_was_adopted_once_is_never_harmful():
    def of(who):
        return outcome(-9.0, 0.5, adopted=True)

    _, known = play(2, 4, Racing(1, 2), 20, of)
    assert known.harmful.tolist() == [0, 0]


def test_with_ties_the_first_leads_and_stays():
    """As with a constant score, which adopts whoever had a turn."""
    tie = outcome(0.0, adopted=True)
    for racing in (None, Racing(1, 2)):
        for count in (2, 5):
            stages = len(turns.lengths(8, count))
            seen, known = play(count, 8, racing, 60, lambda _: tie)
            assert int(known.leader) == 0 and int(known.cycle) == stages
            last = [who for who, *_ in seen[count * stages :]]
            assert set(last) == {0}


def test_a_leader_that_is_harmful_gives_way():
    """None is adopted: of the explorers that fall, the one that falls less leads."""
    known = turns.init(2, None)._replace(cycle=jnp.int32(1), leader=jnp.int32(0))
    worse = outcome(-5.0, 0.1, finite=False)
    following = advance(1, None)(known, jnp.int32(0), worse)
    assert int(following.lead) == int(following.turns.leader) == 1


def test_a_standstill_is_challenged_at_once():
    def of(who):
        if who == 0:
            return outcome(0.0, moved=0.0)
        return outcome(-1.0)

    known = turns.init(2, Racing(1, 8))._replace(
        cycle=jnp.int32(1), best=jnp.float32(10.0), level=jnp.float32([10.0, 8.0])
    )
    who, seen = jnp.int32(0), []
    for _ in range(6):
        following = advance(1, Racing(1, 8))(known, who, of(int(who)))
        known, who = following.turns, following.lead
        seen.append(int(who))
    assert seen == [0, 1, 0, 0, 1, 0]
    assert int(known.gap) == 8  # Such challenges make others no rarer.


def test_racing_says_what_it_takes():
    with says(ValueError, "patience", "window"):
        Racing(2, 2)
