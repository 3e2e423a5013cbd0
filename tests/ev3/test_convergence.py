"""The targets of optax's own tests, 30,000 steps each, judged by exact figures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ev3
from optax_ev3 import adapt


def parabola(params):
    return jnp.square(params - jnp.array([1.0, -1.0, 1.0])).sum()


def rosenbrock(params):
    return jnp.square(1 - params[0]) + 100 * jnp.square(params[1] - params[0] ** 2)


TARGETS = {
    "parabola": (parabola, [-1.0, 10.0, 1.0], [1.0, -1.0, 1.0]),
    "rosenbrock": (rosenbrock, [0.0, 0.0], [1.0, 1.0]),
}
RULES = {
    "greedy": adapt.greedy(),
    "lower_bound": adapt.lower_bound(),
    "confident": adapt.confident(),
    "farsighted": adapt.farsighted(),
}


@pytest.mark.slow
@pytest.mark.parametrize("assessment", ["exact", "constant"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("target", TARGETS)
def test_converges(target, rule, assessment):
    objective, start, goal = TARGETS[target]

    def assess_fn(params):
        return -objective(params) if assessment == "exact" else jnp.zeros([])

    inner = [optax.adam(1e-2), optax.sgd(1e-3)]
    if (rule, assessment) == ("lower_bound", "constant"):
        inner = inner[:1]  # By the paper's rule, ties always go to the first.
    tx = optax_ev3.ev3(inner, assess_fn, adapt=RULES[rule])

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.array(start)
    carry = jax.jit(lambda c: jax.lax.scan(step, c, length=30_000)[0])(
        (params, tx.init(params))
    )
    np.testing.assert_allclose(carry[0], goal, rtol=3e-2, atol=3e-2)
