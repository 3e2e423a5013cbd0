"""Steps that come to nothing are counted, by explorer: against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ev3
from optax_ev3 import adapt, explore

# By call, whether the caller's gradients and loss are finite, and those of "apart".
FINITE = np.array([1, 0, 1, 1, 0, 0, 1, 1, 1, 0], bool)
APART = np.array([0, 0, 1, 1, 1, 0, 0, 1, 1, 1], bool)

STRATEGIES = {
    "one_step": {},
    "own": {"explore": explore.rounds(2, gradients="own")},
    "shared": {"explore": explore.rounds(2, gradients="shared")},
    "never": {"explore": explore.branches(2)},
    "behind": {
        "explore": explore.branches(
            3, restart=explore.worse_than("start", inner_state="new")
        ),
    },
}


def loss(w, finite):
    return jnp.square(w).sum() * jnp.where(finite, 1, jnp.nan)


def apart_loss(w, apart):
    return jnp.square(w).sum() * jnp.where(apart, 1, jnp.nan)


def score(w):
    return -jnp.square(w).sum()


def counts(tx, flags, w=1.0):
    """``ev3/skipped_steps`` of all explorers after each call: ``[T, K]``."""

    @jax.jit
    def step(w, state, finite, apart):
        grads = jax.grad(loss)(w, finite)
        updates, state = tx.update(grads, state, w, finite=finite, apart=apart)
        return optax.apply_updates(w, updates), state, optax_ev3.summary(state)

    w, found = jnp.float32(w), []
    state = tx.init(w)
    names = optax_ev3.history(state)["candidates"][:-2]
    for finite, apart in flags:
        w, state, figures = step(w, state, finite, apart)
        found.append([int(figures[f"ev3/skipped_steps/{name}"]) for name in names])
        assert np.isfinite(w)
    return names.tolist(), np.array(found)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_counts_by_hand(strategy):
    inner = {
        "plain": optax.sgd(0.01),
        "apart": optax_ev3.explorer(optax.sgd(0.01), apart_loss),
        # The second member leaves the finite numbers in every step.
        "sweep": optax_ev3.sweep(optax.sgd, learning_rate=[0.01, 3e38]),
    }
    settings = {"adapt": adapt.greedy(), "loss_fn": loss, **STRATEGIES[strategy]}
    tx = optax_ev3.ev3(inner, score, **settings)
    names, found = counts(tx, zip(FINITE, APART, strict=True))
    order = sorted(
        range(4), key=lambda i: ["plain", "apart", "sweep"].index(names[i][:5])
    )
    found = found[:, order]  # Those of one loss stand together, where they are stacked.
    missed = np.stack([~FINITE, ~APART, ~FINITE, np.ones_like(FINITE)], axis=1)
    np.testing.assert_array_equal(found, np.cumsum(missed, axis=0))


@pytest.mark.parametrize("length", [1, 2])
def test_paused_explorers_skip_nothing(length):
    """After two rounds that it does not win, it waits."""
    inner = {
        "plain": optax.sgd(0.01),
        "apart": optax_ev3.explorer(optax.sgd(0.01), apart_loss),
    }
    tx = optax_ev3.ev3(
        inner,
        score,
        loss_fn=loss,
        adapt=adapt.greedy(),
        explore=explore.branches(length, racing=explore.Racing(1, 4)),
    )
    _, found = counts(tx, [(True, False)] * 5 * length)
    steps = np.minimum(np.arange(1, 5 * length + 1), 2 * length)
    np.testing.assert_array_equal(found, np.stack([0 * steps, steps], axis=1))


@pytest.mark.parametrize("length", [1, 5])
def test_a_trajectory_that_takes_no_step_is_seen(length):
    """The square root, whose gradients are not finite below zero."""
    tx = optax_ev3.ev3(
        {"large": optax.sgd(1.0), "small": optax.sgd(0.1)},
        lambda w: -jnp.square(w + 1),
        loss_fn=jnp.sqrt,
        explore=explore.rounds(length),
        adapt=adapt.greedy(),
    )

    @jax.jit
    def step(w, state):
        updates, state = tx.update(jax.grad(jnp.sqrt)(w), state, w)
        return optax.apply_updates(w, updates), state

    w = jnp.float32(0.2)
    state = tx.init(w)
    for _ in range(40):
        w, state = step(w, state)
    assert not np.isfinite(jnp.sqrt(w))
    figures = optax_ev3.summary(state)
    # The first round is the last in which there are gradients.
    for name in ("large", "small"):
        assert int(figures[f"ev3/skipped_steps/{name}"]) >= 40 - 2 * length
