"""Calls outside of jit: the same numbers, and nothing that is compiled again."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import (
    assert_close,
    assert_same_types,
    explorers,
    loss,
    says,
    score,
    stepper,
    transformation,
    weights,
)

import optax_ev3
from optax_ev3 import adapt, evidence, explore
from optax_ev3._src.base import control

OWN = [optax_ev3.explorer(tx, loss) for tx in explorers().values()]
SWEEP = optax_ev3.sweep(optax.adam, learning_rate=[0.1, 0.2])
RACE = {"explore": explore.branches(2, racing=explore.Racing(1, 3))}
SETTINGS = {
    "one step": {},
    "one step, a sweep": {"inner": [SWEEP], "assess_mode": "map"},
    "assessed in chunks": {"assess_fn": optax_ev3.in_chunks(score, 2, ["batch"])},
    "own gradients, a race": {"loss_fn": loss, **RACE},
    "own losses, a race": {"inner": OWN, **RACE},
    "shared gradients": {"explore": explore.rounds(2, gradients="shared")},
    "new": {"explore": explore.rounds(1, restart_state="new")},
    "relay": {"explore": explore.relay(2)},
    "a sweep, own losses, a race": {"inner": [optax_ev3.explorer(SWEEP, loss)], **RACE},
    "recommended": {
        "inner": OWN,
        "explore": explore.branches(
            2,
            restart=explore.never(inner_state="copy"),
            averages=[explore.trajectory_average(), explore.branch_average()],
            racing=explore.Racing(1, 3),
        ),
        "rule": "greedy",
    },
}
START = {"w": jnp.array([0.25, -0.5, 2.0]), "b": jnp.zeros([2, 2])}


def compiled():
    """How many programs there are in memory."""
    return len(jax.devices()[0].client.live_executables())


@pytest.mark.parametrize("setting", SETTINGS)
def test_eager_calls_compile_nothing_anew_and_agree_with_jit(setting):
    step = stepper(transformation(**SETTINGS[setting]))
    jitted = jax.jit(step)
    eager = traced = START, transformation(**SETTINGS[setting]).init(START)
    for _ in range(5):
        eager, traced = step(*eager, weights()), jitted(*traced, weights())
        assert_close(eager, traced, rtol=1e-4, atol=1e-5)
        assert_same_types(eager, traced)
    before, calls = compiled(), 10
    for _ in range(calls):
        eager = step(*eager, weights())
    # Rarely a call is the first that goes some way.
    assert compiled() - before < calls


def test_errors_come_in_the_first_call():
    def matrix(params, batch):
        return jnp.ones([2, 2]) * batch.sum()

    tx = transformation(assess_fn=matrix, explore=explore.rounds(3))
    with says(ValueError, "scores of shape [n]"):
        stepper(tx)(START, tx.init(START), weights())


def test_control_flow_is_that_of_lax():
    def everything(x, flag, number):
        flow = (
            control.cond(flag, lambda x: x + 1, lambda x: x - 1, x),
            control.switch(number, [lambda: x, lambda: 2 * x]),
            control.while_loop(lambda c: c.sum() < 50, lambda c: 2 * c + 1, x),
            control.fori_loop(1, 4, lambda i, c: c * i, x),
            control.each_row(lambda row: {"sum": row.sum()}, x),
        )
        by_device = control.platform_dependent(
            x, cpu=lambda x: x + 5, default=lambda x: x
        )
        return flow, by_device

    x = jnp.arange(6.0).reshape(3, 2)
    for flag, number in ((True, 0), (False, 1)):
        args = x, jnp.asarray(flag), jnp.int32(number)
        found = everything(*args)
        assert_close(found, jax.jit(everything)(*args))
        assert_close(found[1], x + 5)


def test_loops_in_a_program_stay_loops():
    def loop(x):
        return control.fori_loop(0, 40, lambda _, c: jnp.sin(c), x)

    assert str(jax.make_jaxpr(loop)(1.0)).count("sin") == 1


def test_rules_that_search_compile_nothing_anew():
    bound = evidence.betting(-100.0, 100.0)  # Whose lower bound is a bisection.
    rule = adapt.constrained("a", {"b": 1.0}, bound=bound)

    def both(params, batch):
        return {"a": score(params, batch), "b": -score(params, batch)}

    tx = transformation(rule=rule, assess_fn=both)
    step, carry = stepper(tx), (START, tx.init(START))
    for _ in range(4):
        carry = step(*carry, weights())
    before = compiled()
    for _ in range(8):
        carry = step(*carry, weights())
    assert compiled() - before < 8
