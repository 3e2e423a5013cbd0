"""Several kinds of explorers in one room: each as it is alone, and as by hand."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_identical
from helpers.relay import ByHand, assess
from helpers.trajectories import data, loss, parts_of, start

import optax_ev3
from optax_ev3 import explore

# Two stacks, and two of kinds of their own, one of which stands between them.
INNER = {
    **{f"adam_{rate}": optax.adam(rate) for rate in (0.002, 0.01, 0.03)},
    "plain": optax.sgd(0.05),
    **{f"sgd_{rate}": optax.sgd(rate, momentum=0.9) for rate in (0.002, 0.01, 0.04)},
    "rmsprop": optax.rmsprop(0.01),
}
RACING = explore.Racing(1, 2)
FIRST = 8 * (1 + 2) + 4 * 3 + 2 * 6  # Calls in the first turns: of all, four, two.


@functools.cache
def transformation():
    strategy = explore.relay(3, racing=RACING)
    return optax_ev3.ev3(INNER, assess, explore=strategy)


@functools.cache
def stepper():
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(w, state, batch, poison):
        grads = jax.tree.map(lambda g: g + poison, jax.grad(loss)(w, batch))
        updates, state = transformation().update(grads, state, w)
        return optax.apply_updates(w, updates), state

    return step


def run(w, state, calls, poisoned=()):
    """Each call's parameters, and who was at work before it."""
    for call in calls:
        lead = int(state.explore.branches.lead)
        poison = jnp.float32(jnp.nan if call in poisoned else 0)
        w, state = stepper()(w, state, data(call), poison)
        yield jax.tree.map(np.asarray, w), lead, state


def begun():
    return start(), transformation().init(start())


@pytest.mark.parametrize("poisoned", [(), (0, 17, 40, 41, 93, 94, 130)])
def test_all_kinds_are_as_by_hand(poisoned):
    """Parameters in each call; at last inner states, ends and averages of all."""
    hand = ByHand(INNER.values(), 3, RACING, poisoned=poisoned)
    leads = []
    for w, lead, last in run(*begun(), range(160), poisoned):
        assert lead == hand.who
        assert_close(w, hand.call(), 5e-4, 5e-4)
        leads.append(lead)
        state = last
    stacks = {"adam_0.002 and 2 more", "sgd_0.002 and 2 more"}
    assert set(state.explore.explorers) == {*stacks, "plain", "rmsprop"}
    assert set(leads[:FIRST]) == set(range(8))
    later = np.array(leads[FIRST:])
    assert (later[1:] != later[:-1]).sum() > 5
    assert_close(optax_ev3.best_params(state), hand.best, 5e-4, 5e-4)
    past = optax_ev3.history(state)
    assert past["length"].tolist() == hand.lengths[-len(past["length"]) :]
    for name, one in zip(INNER, hand.branches, strict=True):
        opt_state, end, means = parts_of(state, name)
        assert_close(opt_state, one.state, 5e-3, 5e-3)
        assert_close(end, one.w, 5e-4, 5e-4)
        assert_close(means, (one.turn, one.branch), 5e-4, 5e-4)


def test_saved_in_a_turn_of_each_kind_and_restored():
    """Through files of arrays, bit for bit."""
    whole = [(w, lead) for w, lead, _ in run(*begun(), range(30))]
    structure = jax.tree.structure(begun())
    # In the first turns of 2 calls, between the two: Adam, SGD, momentum, RMSProp.
    for call in (11, 15, 19, 23):
        carry = begun()
        for w, _, state in run(*carry, range(call)):
            carry = w, state
        file = io.BytesIO()
        np.savez(file, *map(np.asarray, jax.tree.leaves(carry)))
        file.seek(0)
        leaves = [jnp.asarray(leaf) for leaf in np.load(file).values()]
        restored = jax.tree.unflatten(structure, leaves)
        found = [(w, lead) for w, lead, _ in run(*restored, range(call, 30))]
        assert_identical(found, whole[call:])


def test_the_room_is_there_once_and_only_for_stacks():
    copy = 16 * 4  # Bytes of the parameters.
    told = optax_ev3.memory(transformation(), start())
    # End and two averages; two moments of Adam and one of momentum; a count.
    assert told["at work"] == (3 + 2 + 1) * copy + 4
    single = {name: INNER[name] for name in ("adam_0.01", "plain", "rmsprop")}
    tx = optax_ev3.ev3(single, assess, explore=explore.relay(3))
    assert optax_ev3.memory(tx, start())["at work"] == 0
    assert tx.init(start()).explore.branches.at_work == ()
