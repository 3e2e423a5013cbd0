"""Stable parameters are exact, where an update that leads back to them is rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ev3
from optax_ev3 import adapt, explore

STRATEGIES = {
    "one_step": {},
    "own": {"explore": explore.rounds(2, gradients="own")},
    "shared": {"explore": explore.rounds(2, gradients="shared")},
    "never": {"explore": explore.branches(2)},
    "race": {"explore": explore.branches(1, racing=explore.Racing(1, 4))},
    "relay": {"explore": explore.relay(2)},
}
# Each round has candidates of both explorers, and goes where the rule says.
BOTH = [name for name in STRATEGIES if name != "relay"]
STABLE = 3  # The candidate, behind two explorers and current.


def loss(w):
    return jnp.square(w.astype(jnp.float32)).sum()


def scripted(*script, promotes=True):
    """A rule that adopts what the script says, and promotes the first one at most."""
    adopted = jnp.asarray([*script, *[2] * 20])

    def decide(evidence, memory, key):
        del evidence, key
        return adapt.Decision(adopted[memory], (memory == 0) & promotes), memory + 1

    return adapt.Rule(lambda explorers: jnp.int32(0), decide)


def transformation(strategy, rule):
    return optax_ev3.ev3(
        [optax.sgd(0.01), optax.sgd(0.02)],
        lambda w: -loss(w),
        adapt=rule,
        **{"loss_fn": loss, **STRATEGIES[strategy]},
    )


def round_of(tx, strategy):
    calls = {"one_step": 1, "race": 1}.get(strategy, 2)

    @jax.jit
    def step(w, state):
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return optax.apply_updates(w, updates), state

    def go(w, state):
        for _ in range(calls):
            w, state = step(w, state)
        return w, state

    return go


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("strategy", BOTH)
def test_stable_parameters_are_those_adopted_bit_for_bit(strategy, dtype):
    tx = transformation(strategy, scripted(1, 0, 0))
    go = round_of(tx, strategy)
    w = jnp.asarray(np.random.default_rng(0).normal(size=64), dtype)
    w, state = go(w, tx.init(w))
    promoted = np.asarray(w).tobytes()
    for _ in range(2):
        w, state = go(w, state)
        stable = optax_ev3.stable_params(state)
        assert stable.dtype == dtype and np.asarray(stable).tobytes() == promoted
    assert np.asarray(w).tobytes() != promoted


@pytest.mark.parametrize("strategy", BOTH)
@pytest.mark.parametrize(
    "dtype, stable, away, reached",
    [(jnp.float32, 0.1, 1e10, 0), (jnp.bfloat16, 0.01, 3, 0.015625)],
)
def test_the_way_back_is_rounded(strategy, dtype, stable, away, reached):
    tx = transformation(strategy, scripted(STABLE, promotes=False))
    start = jnp.full([2], stable, dtype)
    state = tx.init(start)
    # The caller went elsewhere, and a rule says: back.
    w, state = round_of(tx, strategy)(jnp.full([2], away, dtype), state)
    np.testing.assert_array_equal(w.astype(jnp.float32), reached)
    found = optax_ev3.stable_params(state)
    assert np.asarray(found).tobytes() == np.asarray(start).tobytes()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_from_parameters_that_are_not_finite_one_goes_on_from_stable(strategy):
    tx = transformation(strategy, adapt.greedy())
    go = round_of(tx, strategy)
    w, state = go(jnp.ones([2]), tx.init(jnp.ones([2])))
    w, state = go(jnp.full([2], jnp.nan), state)
    assert np.isnan(w).all()
    stable = optax_ev3.stable_params(state)
    assert np.isfinite(stable).all()
    before = float(loss(stable))
    for _ in range(2):
        stable, state = go(stable, state)
    assert float(loss(stable)) < before
