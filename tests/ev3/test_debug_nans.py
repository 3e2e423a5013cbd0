"""With ``jax_debug_nans``, the first thing that a person turns on, all goes on."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import RULES, assert_finite, transformation, weights

import optax_ev3
from optax_ev3 import adapt, explore

STRATEGIES = {
    "one_step": {},
    "own": {"explore": explore.rounds(2, gradients="own")},
    "shared": {"explore": explore.rounds(2, gradients="shared")},
    "never": {
        "explore": explore.branches(2, restart=explore.never(inner_state="copy")),
    },
    "behind": {
        "explore": explore.branches(
            2, restart=explore.worse_than("start", inner_state="new")
        ),
    },
    "race": {"explore": explore.branches(1, racing=explore.Racing(1, 4))},
    "averages": {
        "explore": explore.rounds(
            2,
            averages=[
                explore.trajectory_average(),
                explore.branch_average(),
            ],
        ),
    },
    "relay": {"explore": explore.relay(2)},
    "guard": {"rule": adapt.guarded(adapt.greedy(), adapt.ladder())},
}


@contextlib.contextmanager
def debugging(infs=False):
    with jax.debug_nans(True), jax.debug_infs(infs):
        yield


def loss(w, batch):
    return (jnp.square(w["w"] - 1) * batch.mean()).sum()


def score(w, batch):
    return -jnp.square(w["w"] - 1).sum() * batch


def explorers(strategy):
    rate = {"learning_rate": [0.01, 0.1]}
    space = {"learning_rate": optax_ev3.log_uniform(1e-3, 0.1, 0.05)}
    found = {"adam": optax.adam(0.1), "sweep": optax_ev3.sweep(optax.sgd, **rate)}
    if strategy != "relay":  # There no group evolves.
        found["group"] = optax_ev3.evolve(optax.sgd, space, population=2)
    return found


def run(tx, jitted, steps=5, read=optax_ev3.summary):
    """Summaries before the first call, and after each, all made within the step."""

    def step(w, state, batch):
        grads = jax.grad(loss)(w, batch)
        updates, state = tx.update(grads, state, w, batch=batch)
        return optax.apply_updates(w, updates), state, read(state)

    w = {"w": jnp.array([0.25, -0.5])}
    state = tx.init(w)
    found, step = [read(state)], jax.jit(step) if jitted else step
    for seed in range(steps):
        w, state, figures = step(w, state, weights(seed=seed))
        found.append(figures)
    return found, state


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whole_steps(strategy):
    kwargs = {"loss_fn": loss, "assess_fn": score, "rule": "greedy"}
    kwargs |= STRATEGIES[strategy]
    tx = transformation(inner=explorers(strategy), **kwargs)
    with debugging(infs=True):
        found, state = run(tx, jitted=True)
        optax_ev3.credit(state)
        jax.jit(optax_ev3.should_grow, static_argnums=1)(state, 2)
    for figures in found:
        assert_finite(figures)
    assert np.isfinite(optax_ev3.history(state)["mean"]).any()


@pytest.mark.parametrize("strategy", ["one_step", "averages"])
def test_eager_steps(strategy):
    """Every operation is looked at, not only what a program returns."""
    kwargs = {"loss_fn": loss, "assess_fn": score, **STRATEGIES[strategy]}
    with debugging():
        tx = transformation("confident", **kwargs)
        found, _ = run(tx, jitted=False, steps=3)
    assert_finite(found)


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, length):
    with debugging(infs=True):
        tx = transformation(rule, assess_fn=score, explore=explore.rounds(length))
        assert_finite(run(tx, jitted=True)[0])


@pytest.mark.parametrize(
    "rule",
    [
        adapt.constrained("a", {"b": 0.1}),
        adapt.weighted({"a": 1.0, "b": 0.5}),
    ],
    ids=["constrained", "weighted"],
)
def test_rules_of_several_objectives(rule):
    def both(w, batch):
        return {"a": score(w, batch), "b": -jnp.square(batch)}

    with debugging(infs=True):
        tx = transformation(rule, assess_fn=both)
        found, _ = run(tx, jitted=True)
    assert_finite(found)
    assert "ev3/objective/b/adam" in found[0]
