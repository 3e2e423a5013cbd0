"""A relay against the same by hand, and on its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_finite, assert_identical, assert_same_types
from helpers.relay import ByHand, assess
from helpers.trajectories import data, loss, start

import optax_ev3
from optax_ev3 import explore

INNER = {
    "adam": optax.adam(0.03),
    "sgd": optax.sgd(0.05, momentum=0.9),
    "slow": optax.sgd(0.01, momentum=0.5),
}
RACING = explore.Racing(1, 2)


def relay(inner=None, length=4, racing=RACING, **kwargs):
    settings = {"assess_fn": assess, "explore": explore.relay(length, racing=racing)}
    return optax_ev3.ev3(INNER if inner is None else inner, **{**settings, **kwargs})


@functools.lru_cache(maxsize=4)
def stepper(tx, changed=None):
    """A call with a batch; its gradients are not finite where the caller says so."""

    def step(w, state, batch, poison):
        grads = jax.tree.map(lambda g: g + poison, jax.grad(loss)(w, batch))
        updates, state = tx.update(grads, state, w)
        w = optax.apply_updates(w, updates)
        return (w if changed is None else changed(w)), state

    return jax.jit(step)


def run(tx, calls, changed=None, poisoned=(), w=None, state=None, first=0):
    """Visible parameters and states after each call."""
    w = start() if w is None else w
    state = tx.init(w) if state is None else state
    step, seen = stepper(tx, changed), []
    for call in range(first, first + calls):
        poison = jnp.float32(jnp.nan if call in poisoned else 0.0)
        w, state = step(w, state, data(call), poison)
        seen.append((w, state))
    return seen


def ends(state):
    """Parameters and inner states of all branches."""
    found = state.explore
    return [
        (found.branches.ends[name], found.explorers[name].opt_state)
        for name in found.branches.ends
    ]


def check(seen, hand, tolerance=2e-4):
    """All that happened is what happens by hand."""
    best = []
    for w, state in seen:
        assert_close(w, hand.call(), tolerance, tolerance)
        best.append((optax_ev3.best_params(state), hand.best))
    for one, other in best[:: len(best) // 20 + 1] + best[-1:]:
        assert_close(one, other, tolerance, tolerance)
    state = seen[-1][1]
    past = optax_ev3.history(state)
    count = len(past["length"])
    assert past["length"].tolist() == hand.lengths[-count:]
    own = np.array(hand.owners)
    for number, mean in zip(past["round"], past["mean"], strict=True):
        # Of each kind of candidate, only that of the explorer at work.
        kinds = mean[:-2].reshape(3, -1)
        at_work = np.arange(kinds.shape[1]) == own[number]
        assert np.isnan(kinds[:, ~at_work]).all()
        np.testing.assert_allclose(
            [*kinds[:, at_work][:, 0], mean[-2]], hand.means[number], 1e-3, 1e-4
        )
    for (w, inner), (means, one) in zip(
        ends(state),
        zip(state.explore.branches.means.values(), hand.branches, strict=True),
        strict=True,
    ):
        if one is not hand.branches[hand.who]:
            assert_close(w, one.w, tolerance, tolerance)
        assert_close(inner, one.state, 10 * tolerance, 10 * tolerance)
        assert_close(means, (one.turn, one.branch), tolerance, tolerance)


@pytest.mark.parametrize("racing", [None, RACING], ids=["alone", "race"])
def test_equals_the_relay_by_hand(racing):
    hand = ByHand(INNER.values(), 4, racing)
    check(run(relay(racing=racing), 120), hand)
    if racing is None:
        # After the first turns the leader is the optimizer alone.
        first = 3 * (1 + 2) + 2 * 4
        assert set(hand.owners[len(hand.owners) - (120 - first) // 4 :]) == {
            hand.plain.leader
        }
    else:
        assert len(set(hand.owners[9:])) > 1


def test_batches_that_are_not_finite_end_a_turn_and_no_branch():
    """Twice in the middle of turns, and at the start of some, once three in a row."""
    poisoned = (0, 20, 50, 51, 52, 90)
    hand = ByHand(INNER.values(), 6, RACING, poisoned=poisoned)
    seen = run(relay(length=6), 120, poisoned=poisoned)
    check(seen, hand)
    assert_finite(seen[-1])
    assert min(hand.lengths[9:]) == 1 and 2 in hand.lengths[9:]
    figures = optax_ev3.summary(seen[-1][1])
    skipped = [int(figures[f"ev3/skipped_steps/{name}"]) for name in INNER]
    assert sum(skipped) == len(poisoned)
