"""Inner updates that may be computed twice, and those that may not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import STRATEGIES, always
from jax.experimental import io_callback

import optax_ev3
from optax_ev3._src.base.memory_bound import is_memory_bound


def light(tx):
    params = {"w": jnp.ones([3, 4]), "b": jnp.ones([4])}
    state = tx.init(params)
    return is_memory_bound(lambda grads: tx.update(grads, state, params), params)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(optax.cosine_decay_schedule(1e-3, 100)),
        optax.sgd(0.1, momentum=0.9),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adafactor(0.1)),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    ],
)
def test_passes_over_memory(tx):
    assert light(tx)


def orthogonalized(grads, params):
    del params
    return jax.tree.map(lambda g: g if g.ndim < 2 else g @ (g.T @ g), grads)


@pytest.mark.parametrize(
    "tx", [optax.stateless(orthogonalized), optax.apply_if_finite(optax.adam(0.1), 3)]
)
def test_more_than_passes_over_memory(tx):
    assert not light(tx)


def test_looks_inside_of_calls():
    inner = jax.jit(lambda x: x @ x)
    assert not is_memory_bound(lambda x: jax.jit(inner)(x) + 1, jnp.ones([2, 2]))
    assert is_memory_bound(lambda x: jax.jit(jnp.sin)(x) + 1, jnp.ones([2, 2]))


def test_loops_over_scalars_do_not_count():
    def fn(x):
        return x * jax.lax.fori_loop(0, 3, lambda i, y: y + i, jnp.float32(1))

    assert is_memory_bound(fn, jnp.ones([2, 2]))


def test_what_is_not_needed_does_not_count():
    def fn(x):
        unused = jnp.sin(x @ x)
        del unused
        return x + 1

    assert is_memory_bound(fn, jnp.ones([2, 2]))
    assert not is_memory_bound(lambda x: fn(x) + jnp.sin(x @ x), jnp.ones([2, 2]))


# Callbacks of inner optimizers.


def counted(kind, seen):
    """An optimizer that calls back in each update, and keeps a state."""

    def call(count):
        seen.append(int(count))
        return np.int32(count)

    def update(updates, count, params=None):
        del params
        if kind == "debug":
            jax.debug.callback(call, count)
        elif kind == "print":
            jax.debug.print("{x}", x=count)
        else:
            shape = jax.ShapeDtypeStruct((), jnp.int32)
            count = io_callback(call, shape, count)
        return jax.tree.map(lambda g: -0.1 * g, updates), count + 1

    return optax.GradientTransformation(lambda _: jnp.zeros([], jnp.int32), update)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["debug", "print", "io"])
def test_callbacks_run_once_a_step(kind, strategy, capfd):
    seen = []
    tx = optax_ev3.ev3(
        {"counted": counted(kind, seen), "sgd": optax.sgd(1e-3)},
        lambda w: -(w**2).sum(),
        loss_fn=lambda w: (w**2).sum(),
        adapt=always(0),
        **STRATEGIES[strategy],
    )
    w = jnp.ones([3])
    state = tx.init(w)
    step = jax.jit(tx.update)
    length = 2 if STRATEGIES[strategy] else 1
    while int(state.ev3_calls) < length + 2 * (strategy == "relay"):
        updates, state = step(2 * w, state, w)
        w = optax.apply_updates(w, updates)
    jax.effects_barrier()
    if kind == "print":
        seen = [int(line) for line in capfd.readouterr().out.split()]
    # In a relay it has the first of the two first turns, and then one of two calls.
    assert sorted(seen) == list(range(length + (strategy == "relay")))
