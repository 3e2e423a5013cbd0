"""FSDP on meshes with explicit axes: decisions are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_same_types
from helpers.meshes import (
    COPY,
    EVOLVING,
    MESHES,
    ONE,
    PAIR,
    RACE,
    SHARED,
    SWEEPS,
    data,
    likelihoods,
    loss_fn,
    mesh_of,
    outputs,
    spread,
    start,
)

import optax_ev3
from optax_ev3 import adapt, evidence, explore, metrics
from optax_ev3._src.base import sharding

pytestmark = pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="this release has no explicit sharding"
)

CALLS = 7


def of_call(params, held):
    return likelihoods(params, held)


def f1(params, held):
    x, y = held
    return metrics.AggregateMetric(metrics.f1, (outputs(params, x)[:, 0] > 0, y == 0))


def hits(params, held):
    x, y = held
    return outputs(params, x).argmax(-1) == y


def two(params, held):
    return {"likelihood": likelihoods(params, held), "accuracy": hits(params, held)}


def rate(hits):
    return float(np.asarray(hits).mean())


def drawn(**settings):
    return lambda held: optax_ev3.held_out(likelihoods, held, **settings)


def always(assess_fn):
    return lambda held: assess_fn


# By name: mesh, explorers, strategy, how it is assessed, and other arguments.
CASES = {
    "one step": ("8", PAIR, ONE, always(of_call), {}),
    "one step, sweeps": ("8", SWEEPS, ONE, drawn(batch_size=16), {}),
    "one step, evolving": ("4x2", EVOLVING, ONE, always(of_call), {}),
    "rounds": ("8", SWEEPS, SHARED, drawn(batch_size=12, shuffle=True), {}),
    "race": ("8", SWEEPS, RACE, always(of_call), {}),
    "race, metric": ("4x2", PAIR, RACE, always(f1), {}),
    "race, chunks": (
        "8",
        PAIR,
        RACE,
        always(optax_ev3.in_chunks(of_call, 4, slice_args=("held",))),
        {"adapt": adapt.lower_bound()},
    ),
    "race, two objectives": (
        "8",
        PAIR,
        RACE,
        always(two),
        {"adapt": adapt.constrained("likelihood", {"accuracy": 0.05})},
    ),
    "one step, betting": (
        "8",
        PAIR,
        ONE,
        always(hits),
        {"adapt": adapt.greedy(bound=evidence.betting(0.0, 1.0))},
    ),
    "relay, on the host": (
        "8",
        PAIR,
        explore.relay(2),
        always(optax_ev3.host_metric(hits, rate)),
        {},
    ),
    "copies, evolving": ("8", EVOLVING, COPY, drawn(), {"assess_mode": "vmap"}),
    "relay": ("8", PAIR, explore.relay(2), always(of_call), {}),
    "relay, sweeps": (
        "4x2",
        {"s": SWEEPS["sgd"], "adam": SWEEPS["adam"]},
        explore.relay(2),
        drawn(batch_size=16),
        {"assess_mode": "map"},
    ),
}


def trained(case, put, share):
    """Parameters and states after each call."""
    _, inner, strategy, assess, settings = CASES[case]
    held = share(data(99))
    tx = optax_ev3.ev3(
        inner, assess(held), loss_fn=loss_fn, explore=strategy, **settings
    )

    @jax.jit
    def step(params, state, batch, held):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, held=held)
        return optax.apply_updates(params, updates), state

    params = put(start())
    seen = [(params, jax.jit(tx.init)(params))]
    assert_same_types(seen[0][1], tx.init(params))
    for call in range(CALLS):
        seen.append(step(*seen[-1], share(data(call)), held))
    return seen


@pytest.mark.parametrize("case", CASES)
def test_decisions_are_those_of_one_device(case):
    settings = MESHES[CASES[case][0]]
    mesh = mesh_of(settings["axes"], "Explicit")
    alone = trained(case, functools.partial(jax.tree.map, jnp.asarray), lambda x: x)
    with jax.set_mesh(mesh):
        many = trained(
            case,
            lambda params: spread(params, mesh, settings),
            lambda batch: spread(batch, mesh, ["data"]),
        )
        typeof = functools.partial(jax.tree.map, jax.typeof)
        assert typeof(many[-1]) == typeof(many[0])
    for (params, _), (other, _) in zip(many, alone, strict=True):
        assert_close(params, other, rtol=1e-3, atol=1e-4)
    one, other = many[-1][1].history, alone[-1][1].history
    np.testing.assert_array_equal(one.adopted, other.adopted)
    np.testing.assert_array_equal(one.valid, other.valid)
    # What mirrors the parameters is spread like them, members one after another.
    stable = many[-1][1].stable
    for name, leaf in stable.items():
        assert leaf.sharding.is_equivalent_to(many[0][0][name].sharding, leaf.ndim)


def test_rows_of_arrays_that_are_spread():
    mesh = mesh_of({"a": 4, "b": 2}, "Explicit")
    array = np.arange(48.0, dtype=np.float32).reshape(16, 3)
    rows = jnp.asarray([3, 1, 15, 2, 2, 9, 0, 4])
    with jax.set_mesh(mesh):
        for spec in (("a", None), (("a", "b"), None), (None, None)):
            leaf = spread(array, mesh, spec)
            for count, is_spread in ((8, spec[0] is not None), (6, False)):
                found = jax.jit(sharding.take)(leaf, rows[:count])
                np.testing.assert_array_equal(found, array[rows[:count]])
                assert (sharding.spec(found) is not None) == is_spread
            found = jax.jit(lambda x, i: sharding.rows_from(x, i, 8))(leaf, 5)
            np.testing.assert_array_equal(found, array[5:13])
            assert sharding.is_explicit([leaf]) == (spec[0] is not None)
            np.testing.assert_array_equal(sharding.replicated(leaf), array)
