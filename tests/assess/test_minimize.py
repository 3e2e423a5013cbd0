"""Losses and errors as assessments: the best is selected, whatever they return."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_identical, says

import optax_ev3
from optax_ev3 import adapt, metrics, minimize

X = jnp.asarray(np.random.default_rng(0).normal(3.0, 1.0, 64), jnp.float32)
INNER = {"down": optax.sgd(0.1), "up": optax.sgd(-0.1)}


def loss(w, x):
    return (w - x) ** 2


def gain(w, x):
    return -((w - x) ** 2)


def mean_of(outputs, weights):
    return (outputs * weights).sum() / weights.sum()


# A cost and the same as a score, by what they return.
PAIRS = {
    "each": (loss, gain),
    "scalar": (lambda w, x: loss(w, x).mean(), lambda w, x: gain(w, x).mean()),
    "half": (
        lambda w, x: loss(w, x).astype(jnp.bfloat16),
        lambda w, x: gain(w, x).astype(jnp.bfloat16),
    ),
    "bool": (lambda w, x: loss(w, x) > 4, lambda w, x: loss(w, x) <= 4),
    "mapping": (lambda w, x: {"a": loss(w, x)}, lambda w, x: {"a": gain(w, x)}),
    "aggregate": (
        lambda w, x: metrics.AggregateMetric(mean_of, loss(w, x), 20),
        lambda w, x: metrics.AggregateMetric(mean_of, gain(w, x), 20),
    ),
    "host": (
        optax_ev3.host_metric(loss, np.mean),
        optax_ev3.host_metric(gain, np.mean),
    ),
}


def once(assess_fn, inner=INNER, w=0.0, **kwargs):
    """The update and the state of one round, whatever the assessment takes."""
    tx = optax_ev3.ev3(inner, assess_fn, adapt=adapt.greedy(), **kwargs)
    w = jnp.asarray(w, jnp.float32)
    return jax.jit(tx.update)(2 * (w - X.mean()), tx.init(w), w, x=X)


@pytest.mark.parametrize("case", PAIRS)
def test_a_cost_is_a_score_of_the_other_sign(case):
    cost, score = PAIRS[case]
    update, state = once(minimize(cost))
    np.testing.assert_allclose(update, 0.2 * X.mean(), rtol=1e-6)
    assert_identical((update, state), once(score))
    # Without it the worst is selected: what this is for.
    assert once(cost)[0] < 0


@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_in_every_mode(mode):
    cost, score = PAIRS["aggregate"]
    found = once(minimize(cost), assess_mode=mode)
    assert_identical(found, once(score, assess_mode=mode))


AROUND = {
    "held_out of it": lambda cost: optax_ev3.held_out(cost, X, 16),
    "of held_out": lambda cost: cost,
    "in_chunks of it": lambda cost: optax_ev3.in_chunks(cost, 8, ["x"]),
    "of in_chunks": lambda cost: cost,
    "partial of it": lambda cost: functools.partial(cost, x=X + 1),
    "of a partial": lambda cost: cost,
}
INSIDE = {
    "of held_out": lambda fn: optax_ev3.held_out(fn, X, 16),
    "of in_chunks": lambda fn: optax_ev3.in_chunks(fn, 8, ["x"]),
    "of a partial": lambda fn: functools.partial(fn, x=X + 1),
}


@pytest.mark.parametrize("where", AROUND)
def test_named_arguments_and_wrappers_work(where):
    around, inside = AROUND[where], INSIDE.get(where, lambda fn: fn)
    found = once(around(minimize(inside(loss))))
    assert_identical(found, once(around(inside(gain))))


def test_twice_is_not_at_all():
    assert_identical(once(minimize(minimize(gain))), once(gain))


def test_some_of_several_objectives():
    def both(w, x):
        return {"loss": loss(w, x), "above": w > x}

    def wanted(w, x):
        return {"loss": gain(w, x), "above": w > x}

    rule = adapt.weighted({"loss": 1.0, "above": 1.0})
    w = jnp.zeros([])
    for fn in (minimize(both, names=["loss"]), wanted):
        tx = optax_ev3.ev3(INNER, fn, adapt=rule)
        _, state = jax.jit(tx.update)(2 * (w - X.mean()), tx.init(w), w, x=X)
        past = optax_ev3.history(state)
        found = [past["mean"][0], past["mean/above"][0]]
        steps = np.array([0.2, -0.2, 0, 0]) * float(X.mean())
        apart = steps[:, None] - np.asarray(X)
        np.testing.assert_allclose(found[0], -(apart**2).mean(axis=1), rtol=1e-5)
        np.testing.assert_allclose(found[1], (apart > 0).mean(axis=1), rtol=1e-5)


def test_keeps_the_signature():
    def fn(params, batch, *, key, scale=1.0):
        return params * batch * scale

    class Model:
        def loss(self, params, x):
            return loss(params, x)

    assert inspect.signature(minimize(fn)) == inspect.signature(fn)
    assert_identical(once(minimize(Model().loss)), once(gain))
    assert_identical(once(minimize(jax.jit(loss))), once(gain))


# Mistakes.


def test_one_function_is_no_score_and_loss():
    class Model:
        def loss(self, params, x):
            return loss(params, x)

    model = Model()
    own = [optax_ev3.explorer(optax.sgd(0.1), loss)]
    for inner, fn, more in (
        (INNER, loss, {"loss_fn": loss}),
        (own, loss, {}),
        (INNER, model.loss, {"loss_fn": model.loss}),
    ):
        for around in (
            lambda fn: fn,
            lambda fn: optax_ev3.held_out(fn, X),
            lambda fn: optax_ev3.in_chunks(optax_ev3.held_out(fn, X), 8),
            lambda fn: optax_ev3.in_chunks(fn, 8, ["x"]),
        ):
            with says(ValueError, "the same function", "optax_ev3.minimize(loss)"):
                optax_ev3.ev3(inner, around(fn), **more)
            optax_ev3.ev3(inner, around(minimize(fn)), **more)
            optax_ev3.ev3(inner, minimize(around(fn)), **more)


def test_bad_arguments():
    with says(TypeError, "assess_fn must be callable", "3"):
        minimize(3)
    with says(TypeError, "names must be a sequence", "['loss']"):
        minimize(loss, "loss")
    with says(ValueError, "['b', 'c']", "assess_fn returned ['a']"):
        once(minimize(PAIRS["mapping"][0], ["a", "b", "c"]))
    with says(ValueError, "['a']", "no mapping of objectives"):
        once(minimize(loss, ["a"]))
    for wrong, message in (
        (None, "NoneType"),
        ([X], "list"),
        ("low", "str"),
        (jnp.arange(3), "int32"),
        (1, "int32"),
        (1j, "complex64"),
    ):
        with says(TypeError, message):
            once(minimize(lambda w, wrong=wrong: wrong))
