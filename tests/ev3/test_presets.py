"""Presets are what they say: which explorers, which strategy, and how rates fall."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_identical

import optax_ev3
from optax_ev3 import adapt, explore

STEPS = 50
TWO = {"fast": optax.sgd(0.1), "slow": optax.sgd(0.01)}


def loss(w):
    return w.sum()


def score(w):
    return -w.sum()


def run(tx, calls, w=0.0):
    """Parameters and states, the first ones included; every gradient is 1."""
    w = jnp.full([2], w)
    step = jax.jit(lambda w, state: tx.update(jnp.ones(2), state, w))
    seen = [(w, tx.init(w))]
    for _ in range(calls):
        w, state = seen[-1]
        updates, state = step(w, state)
        seen.append((optax.apply_updates(w, updates), state))
    return seen


@pytest.mark.parametrize("loss_fn", [None, loss], ids=["relay", "branches"])
def test_rates_fall_to_zero_in_the_last_fifth(loss_fn):
    inner = {"sgd": TWO["fast"]}
    tx = optax_ev3.portfolio(score, loss_fn, inner=inner, total_steps=STEPS)
    path = np.array([w for w, _ in run(tx, STEPS + 5)])
    call = np.arange(STEPS + 5)
    factor = np.clip((STEPS - call) / (STEPS / 5), 0, 1)
    expected = -0.1 * factor[:, None] * np.ones(2)
    np.testing.assert_allclose(np.diff(path, axis=0), expected, atol=2e-6)


@pytest.mark.parametrize("loss_fn", [None, loss], ids=["relay", "branches"])
@pytest.mark.parametrize("total_steps", [1, 3])
def test_an_end_before_that_of_the_first_turns(loss_fn, total_steps):
    tx = optax_ev3.portfolio(score, loss_fn, inner=TWO, total_steps=total_steps)
    seen = run(tx, 12)
    ended, last = seen[total_steps][1], seen[-1][1]
    ends, before = (one.explore.branches.ends for one in (last, ended))
    if loss_fn is not None:
        # Those that are paused go with the best; nobody else moves.
        best = optax_ev3.best_params(last)
        assert_close(best, optax_ev3.best_params(ended), rtol=0, atol=1e-7)
        ends = jax.tree.map(
            lambda end, old: jnp.where(jnp.abs(end - best) <= 1e-7, old, end),
            ends,
            before,
        )
    # But for the rounding of the way from one branch to another.
    assert_close(ends, before, rtol=0, atol=1e-7)
    assert np.isfinite([w for w, _ in seen]).all()
    assert float(optax_ev3.best_params(last).max()) <= 0


@pytest.mark.parametrize(
    ("total_steps", "length", "rounds"), [(30, 1, 30), (40, 1, 40), (350, 9, 38)]
)
def test_rounds_and_work_where_the_end_is_known(total_steps, length, rounds):
    tx = optax_ev3.portfolio(
        score, loss, total_steps=total_steps, history_length=total_steps
    )
    past = optax_ev3.history(run(tx, total_steps)[-1][1])
    assert past["length"].tolist() == [length] * rounds
    took_part = ~np.isnan(past["mean"][:, :8])
    # Every round before the last calls brings an exact score further.
    expected = explore.SuccessiveHalving().at_work(8, len(took_part))
    assert took_part.sum(1).tolist() == expected


def test_rates_are_zero_after_the_last_whole_round():
    """Of nine calls each: after the 342nd of 350 calls."""
    inner = {"sgd": TWO["fast"]}
    tx = optax_ev3.portfolio(score, loss, inner=inner, total_steps=350)
    moved = np.diff([w[0] for w, _ in run(tx, 350)])
    assert (moved[:341] < 0).all() and (moved[342:] == 0).all()


def test_evolving_groups_race_where_the_end_is_known():
    space = {"learning_rate": optax_ev3.log_uniform(0.01, 0.3)}
    inner = {**TWO, "group": optax_ev3.evolve(optax.adam, space, 3)}
    for explorers in (inner, list(inner.values())):
        tx = optax_ev3.portfolio(score, loss, inner=explorers, total_steps=60)
        seen = run(tx, 65)
        assert int(seen[60][1].ev3_round) == 2  # Of 25 calls each.
        # Their rates, too, fall to zero: at the end of the last whole round.
        moved = [float(abs(seen[i + 1][0] - seen[i][0]).max()) for i in (30, 51)]
        assert moved[0] > 0 and moved[1] == 0


def test_explorers_by_name_and_those_alike_together():
    state = optax_ev3.portfolio(score).init(jnp.zeros(2))
    stacks = {
        "adam_0.0003 and 3 more": [f"adam_{x}" for x in (0.0003, 0.001, 0.003, 0.01)],
        "muon_0.001 and 2 more": ["muon_0.001", "muon_0.003", "muon_0.01"],
    }
    for name, members in stacks.items():
        assert set(state.explore.explorers[name].positions) == set(members)
    assert set(state.explore.explorers) == {*stacks, "momentum_0.1"}
    # With a loss it is in the program once, for all of them.
    (own,) = (
        optax_ev3.portfolio(score, loss).init(jnp.zeros(2)).explore.explorers.items()
    )
    assert own[0] == "adam_0.0003 and 7 more"
    assert set(own[1].positions) == {*itertools.chain(*stacks.values()), "momentum_0.1"}


def test_arguments_replace_what_is_chosen():
    chosen = {"explore": explore.one_step(), "adapt": adapt.greedy(), "key": 3}
    ours = run(optax_ev3.portfolio(score, inner=TWO, **chosen), 4)
    assert_identical(ours, run(optax_ev3.ev3(TWO, score, **chosen), 4))


def test_something_around_every_optimizer():
    def wrap(tx):
        return optax.chain(optax.clip(0.1), tx)

    by_hand = {name: wrap(tx) for name, tx in TWO.items()}
    ours = run(optax_ev3.portfolio(score, loss, inner=TWO, wrap=wrap), 9)
    assert_identical(ours, run(optax_ev3.portfolio(score, loss, inner=by_hand), 9))
    by_place = optax_ev3.portfolio(score, inner=list(TWO.values()), wrap=wrap)
    assert set(by_place.init(jnp.zeros(2)).explore.explorers) == {
        "explorer_0",
        "explorer_1",
    }


def test_statistics_of_all_eight():
    """A model with BatchNorm: the loss returns what a merge puts in place."""

    def with_mean(params):
        return loss(params["w"]), params["mean"] + 1

    def merge(params, mean):
        return {**params, "mean": mean}

    tx = optax_ev3.portfolio(
        lambda params: score(params["w"]),
        with_mean,
        wrap=lambda tx: optax_ev3.explorer(tx, merge_fn=merge),
    )
    params = {"w": jnp.zeros([2, 2]), "mean": jnp.zeros([])}
    state = tx.init(params)
    assert any("and 7 more" in name for name in state.explore.explorers)  # A stack.
    step = jax.jit(lambda params, state: tx.update(None, state, params))
    for _ in range(25):  # The first round. The further down, the better: no average.
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert int(state.ev3_round) == 1
    assert float(optax_ev3.best_params(state)["mean"]) == 25


def test_the_papers_rounds_and_rule():
    def scores(w):
        return score(w) * jnp.ones(4)

    paper = optax_ev3.paper(TWO, scores, loss_fn=loss, length=3)
    by_hand = functools.partial(optax_ev3.ev3, TWO, scores, loss_fn=loss)
    by_hand = by_hand(explore=explore.rounds(3), adapt=adapt.lower_bound())
    seen = run(paper, 7)
    assert_identical(seen, run(by_hand, 7))
    # The leader's three steps, twice, from where a round began.
    assert int(seen[-1][1].ev3_round) == 2 and float(seen[-1][0][0]) < -0.5


def test_errors():
    with pytest.raises(ValueError, match="a schedule of its own"):
        optax_ev3.portfolio(score, total_steps=9, explore=explore.relay())
    with pytest.raises(ValueError, match="total_steps"):
        optax_ev3.portfolio(score, total_steps=0)
    for inner in (optax.sgd(0.1), optax_ev3.explorer(optax.sgd(0.1)), 3):
        with pytest.raises(TypeError, match="inner must be a sequence or a mapping"):
            optax_ev3.portfolio(score, inner=inner, wrap=lambda tx: tx)
    with pytest.raises(TypeError, match="wrap must be a function"):
        optax_ev3.portfolio(score, wrap=optax.clip(1.0))
    with pytest.raises(TypeError, match="total_steps"):
        optax_ev3.portfolio(score, total_steps=2.5)
