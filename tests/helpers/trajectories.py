"""A small regression, and trajectories on it: within ``ev3``, and alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def data(step, dtype=jnp.float32):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(16, 3))
    y = np.tanh(x @ [1.0, -2.0, 0.5]) + 0.1 * rng.normal(size=16)
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)


def start(dtype=jnp.float32):
    w = np.random.default_rng(9).normal(size=(3, 4)) * 0.5
    return {"w": jnp.asarray(w, dtype), "v": jnp.full([4], 0.3, dtype)}


def score(params, held):
    x, y = held
    return -((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


def loss(params, batch):
    return -score(params, batch).mean()


def run(tx, calls, w=None, loss_fn=loss, first=0, state=None):
    """Visible parameters after each call, the states, and the last ones."""
    w = start() if w is None else w
    state = tx.init(w) if state is None else state

    @jax.jit
    def step(w, state, batch, held):
        grads = jax.grad(loss_fn)(w, batch)
        updates, state = tx.update(grads, state, w, batch=batch, held=held)
        return optax.apply_updates(w, updates), state

    dtype = w["w"].dtype
    seen = []
    for call in range(first, first + calls):
        w, state = step(w, state, data(call, dtype), data(1000 + call, dtype))
        seen.append((w, state))
    assert step._cache_size() == 1
    return seen


def alone(tx, calls, w, first=0, state=None):
    """An optimizer on the same batches."""
    state = tx.init(w) if state is None else state
    for call in range(first, first + calls):
        grads = jax.grad(loss)(w, data(call, w["w"].dtype))
        updates, state = tx.update(grads, state, w)
        w = optax.apply_updates(w, updates)
    return w, state
