"""Several kinds of explorers in one room: each as it is alone, and as by hand."""

import functools
import io
from typing import NamedTuple

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

ADAMS = {f"adam_{rate}": optax.adam(rate) for rate in (0.001, 0.01, 0.03)}
# Two stacks, and two of kinds of their own, one of which stands between them.
MANY = {
    **ADAMS,
    "plain": optax.sgd(0.05),
    **{f"sgd_{rate}": optax.sgd(rate, momentum=0.9) for rate in (0.002, 0.01, 0.04)},
    "rmsprop": optax.rmsprop(0.01),
}
RACING = explore.Racing(1, 2)


class Case(NamedTuple):
    """Explorers, calls in a turn, calls, those that are poisoned, and what happens."""

    inner: dict
    length: int
    calls: int
    poisoned: tuple = ()
    joined: int = 0
    begun_anew: int = 0


CASES = {
    "many": Case(MANY, 3, 160),
    "poisoned": Case(MANY, 3, 160, (0, 17, 40, 41, 93, 94, 130), begun_anew=1),
    # An explorer goes on from where the leader is, which is of the other kind.
    "joins a stack": Case({**ADAMS, "plain": MANY["plain"]}, 2, 85, joined=1),
    "of a stack joins": Case({**ADAMS, "sgd": MANY["sgd_0.04"]}, 2, 85, joined=1),
}


@functools.cache
def transformation(name):
    strategy = explore.relay(CASES[name].length, racing=RACING)
    return optax_ev3.ev3(CASES[name].inner, assess, explore=strategy)


@functools.cache
def stepper(name):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(w, state, batch, poison):
        grads = jax.tree.map(lambda g: g + poison, jax.grad(loss)(w, batch))
        updates, state = transformation(name).update(grads, state, w)
        return optax.apply_updates(w, updates), state

    return step


def run(name, w, state, calls):
    """Each call's parameters, who was at work before it, and the state."""
    for call in calls:
        lead = int(state.explore.branches.lead)
        poison = jnp.float32(jnp.nan if call in CASES[name].poisoned else 0)
        w, state = stepper(name)(w, state, data(call), poison)
        yield jax.tree.map(np.asarray, w), lead, state


def begun(name):
    return start(), transformation(name).init(start())


@pytest.mark.parametrize("name", CASES)
def test_all_kinds_are_as_by_hand(name):
    """Parameters in each call; at last inner states, ends and averages of all."""
    case = CASES[name]
    hand = ByHand(case.inner.values(), case.length, RACING, poisoned=case.poisoned)
    leads = []
    for w, lead, last in run(name, *begun(name), range(case.calls)):
        assert lead == hand.who
        assert_close(w, hand.call(), 5e-4, 5e-4)
        leads.append(lead)
        state = last
    assert any("and 2 more" in key for key in state.explore.explorers)
    assert set(leads) == set(range(len(case.inner)))
    assert (hand.joined, hand.begun_anew) == (case.joined, case.begun_anew)
    assert_close(optax_ev3.best_params(state), hand.best, 5e-4, 5e-4)
    past = optax_ev3.history(state)
    assert past["length"].tolist() == hand.lengths[-len(past["length"]) :]
    for key, one in zip(case.inner, hand.branches, strict=True):
        opt_state, end, means = parts_of(state, key)
        assert_close(opt_state, one.state, 5e-3, 5e-3)
        assert_close(end, one.w, 5e-4, 5e-4)
        assert_close(means, ((), one.branch), 5e-4, 5e-4)
    turn = hand.branches[hand.who].turn
    assert_close(state.explore.branches.turn_means, (turn, ()), 5e-4, 5e-4)


def test_saved_in_a_turn_of_each_kind_and_restored():
    """Through files of arrays, bit for bit."""
    whole = [found[:2] for found in run("many", *begun("many"), range(30))]
    structure = jax.tree.structure(begun("many"))
    # In the first turns of 2 calls, between the two: Adam, SGD, momentum, RMSProp.
    for call in (11, 15, 19, 23):
        carry = begun("many")
        for w, _, state in run("many", *carry, range(call)):
            carry = w, state
        file = io.BytesIO()
        np.savez(file, *map(np.asarray, jax.tree.leaves(carry)))
        file.seek(0)
        leaves = [jnp.asarray(leaf) for leaf in np.load(file).values()]
        restored = jax.tree.unflatten(structure, leaves)
        found = [x[:2] for x in run("many", *restored, range(call, 30))]
        assert_identical(found, whole[call:])


def test_the_room_is_there_once_and_only_for_stacks():
    copy = 16 * 4  # Bytes of the parameters.
    told = optax_ev3.memory(transformation("many"), start())
    # End and its average; two moments of Adam and one of momentum; a count.
    assert told["at work"] == (2 + 2 + 1) * copy + 4
    # Of all explorers an average that lasts, and one over the turn.
    assert told["averages"] == (len(MANY) + 1) * copy
    single = {name: MANY[name] for name in ("adam_0.01", "plain", "rmsprop")}
    tx = optax_ev3.ev3(single, assess, explore=explore.relay(3))
    assert optax_ev3.memory(tx, start())["at work"] == 0
    assert tx.init(start()).explore.branches.at_work == ()
