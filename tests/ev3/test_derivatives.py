"""Derivatives through updates, as for rates or weights of examples that are learnt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import always

import optax_ev3
from optax_ev3 import adapt, explore

X = jnp.linspace(-1.0, 1.0, 8)


def score(w, x):
    return -jnp.square(w["a"] * x - 3 * x)


def loss(w, x):
    return -score(w, x).mean()


def weighted_loss(w, weights):
    return -(weights * score(w, X)).mean()


def train(tx, weights, extra_args, steps=3):
    """The loss after some steps; the gradients weigh the examples."""
    w = {"a": jnp.zeros([])}
    state = tx.init(w)
    for _ in range(steps):
        grads = jax.grad(weighted_loss)(w, weights)
        updates, state = tx.update(grads, state, w, **extra_args)
        w = optax.apply_updates(w, updates)
    return loss(w, X)


def momentum(rate):
    return optax.sgd(rate, momentum=0.5)


def plain(rate, weights):
    return train(momentum(rate), weights, {})


def ev3(rate, weights, *, assess_fn=score, **kwargs):
    """The first explorer wins every round against one that hardly moves."""
    inner = {"a": momentum(rate), "b": momentum(1e-4 * rate)}
    tx = optax_ev3.ev3(inner, assess_fn, **kwargs)
    return train(tx, weights, {"x": X})


ONE_STEP = {
    "always": {"adapt": always(0)},
    "greedy": {"adapt": adapt.greedy()},
    "lower_bound": {"adapt": adapt.lower_bound()},
    "map": {"adapt": adapt.greedy(), "assess_mode": "map"},
    "vmap": {"adapt": adapt.greedy(), "assess_mode": "vmap"},
    "host": {
        "adapt": adapt.greedy(),
        "assess_fn": optax_ev3.host_metric(
            lambda w, x: w["a"] * x, lambda outputs: -float(np.abs(outputs[-1] - 3))
        ),
    },
    "chunks": {
        "adapt": adapt.greedy(),
        "assess_fn": optax_ev3.in_chunks(score, 2, ["x"]),
    },
}


@pytest.mark.parametrize("setting", ONE_STEP)
def test_reverse_mode_is_that_of_the_explorer_that_wins(setting):
    weights = jnp.linspace(0.5, 1.5, X.size)
    fn = functools.partial(ev3, **ONE_STEP[setting])
    found = jax.jit(jax.grad(fn, argnums=(0, 1)))(0.3, weights)
    expected = jax.grad(plain, argnums=(0, 1))(0.3, weights)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("rule", [adapt.greedy, adapt.lower_bound])
def test_reverse_mode_of_the_stable_parameters(rule):
    """They are replaced in each round; the oracle is finite differences."""

    def stable(rate):
        tx = optax_ev3.ev3([momentum(rate)], score, adapt=rule())
        w = {"a": jnp.zeros([])}
        state = tx.init(w)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(w, X), state, w, x=X)
            w = optax.apply_updates(w, updates)
        return optax_ev3.stable_params(state)["a"]

    step = 1e-2
    slope = (stable(0.3 + step) - stable(0.3 - step)) / (2 * step)
    assert abs(slope) > 0.1
    np.testing.assert_allclose(jax.grad(stable)(0.3), slope, rtol=1e-2)


def test_integers_and_keys_among_the_parameters():
    def run(rate):
        w = {"a": jnp.zeros([]), "count": jnp.int32(3), "key": jax.random.key(1)}
        parts = {"rate": optax.sgd(rate), "fixed": optax.set_to_zero()}
        labels = {"a": "rate", "count": "fixed", "key": "fixed"}
        tx = optax_ev3.ev3(
            [optax.partition(parts, labels)], score, adapt=adapt.greedy()
        )
        state = tx.init(w)
        for _ in range(2):
            grads = {**w, "a": jax.grad(lambda a, w=w: loss({**w, "a": a}, X))(w["a"])}
            updates, state = tx.update(grads, state, w, x=X)
            w = {**w, "a": w["a"] + updates["a"]}
        return loss(w, X) + 0 * optax_ev3.stable_params(state)["a"]

    def by_hand(rate):
        a = 0.0
        for _ in range(2):
            a -= rate * jax.grad(lambda a: loss({"a": a}, X))(a)
        return loss({"a": a}, X)

    np.testing.assert_allclose(jax.grad(run)(0.3), jax.grad(by_hand)(0.3), rtol=1e-5)


TRAJECTORIES = {
    "own": {"explore": explore.rounds(3), "loss_fn": loss},
    "shared": {"explore": explore.rounds(3, gradients="shared")},
    "never": {"explore": explore.branches(3), "loss_fn": loss},
}


@pytest.mark.parametrize("setting", TRAJECTORIES)
def test_forward_mode_within_trajectories(setting):
    weights = jnp.ones_like(X)

    def fn(rate):
        return ev3(rate, weights, adapt=adapt.greedy(), **TRAJECTORIES[setting])

    found = jax.jvp(fn, (0.3,), (1.0,))[1]
    expected = jax.grad(plain)(0.3, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_forward_mode_within_a_relay():
    """Of one explorer: with two, a part of the calls is the other one's."""
    weights = jnp.ones_like(X)

    def fn(rate):
        tx = optax_ev3.ev3([momentum(rate)], score, explore=explore.relay(3))
        return train(tx, weights, {"x": X})

    found = jax.jit(lambda rate: jax.jvp(fn, (rate,), (1.0,))[1])(0.3)
    expected = jax.grad(plain)(0.3, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
