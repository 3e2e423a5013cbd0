"""A small regression, and trajectories on it: within ``ev3``, and alone."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from helpers import traced
from optax_ev3._src.base.states import place_index


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


@functools.lru_cache(maxsize=16)
def _traced_stepper(tx, loss_fn):
    def step(w, state, batch, held):
        grads = jax.grad(loss_fn)(w, batch)
        updates, state = tx.update(grads, state, w, batch=batch, held=held)
        return optax.apply_updates(w, updates), state

    return traced(step)


def stepper(tx, loss_fn):
    """Compiled once for all runs of a transformation, restored ones among them."""
    return _traced_stepper(tx, loss_fn)[0]


def run(tx, calls, w=None, loss_fn=loss, first=0, state=None):
    """Visible parameters after each call, the states, and the last ones."""
    w = start() if w is None else w
    state = tx.init(w) if state is None else state
    step, traces = _traced_stepper(tx, loss_fn)
    dtype = w["w"].dtype
    seen = []
    for call in range(first, first + calls):
        w, state = step(w, state, data(call, dtype), data(1000 + call, dtype))
        seen.append((w, state))
    assert len(traces) == 1
    return seen


@functools.lru_cache(maxsize=16)
def _stepper_alone(tx):
    @jax.jit
    def step(w, state, batch):
        updates, state = tx.update(jax.grad(loss)(w, batch), state, w)
        return optax.apply_updates(w, updates), state

    return step


def alone(tx, calls, w, first=0, state=None):
    """An optimizer on the same batches."""
    state = tx.init(w) if state is None else state
    step = _stepper_alone(tx)
    for call in range(first, first + calls):
        w, state = step(w, state, data(call, w["w"].dtype))
    return w, state


def end_of(state, name):
    """Where the branch of an explorer is, whether it is stacked or alone."""
    return parts_of(state, name)[1]


def parts_of(state, name):
    """The inner state of an explorer, where its branch is, and its averages."""
    walked = state.explore.branches
    for key, one in state.explore.explorers.items():
        places = {k: place_index(place) for k, place in one.positions.items()}
        if name not in places:
            continue
        parts = one.opt_state, walked.ends[key], walked.means[key]
        if key != name:
            row = places[name] - min(places.values())
            parts = jax.tree.map(operator.itemgetter(row), parts)
        room = walked.at_work
        if room != () and int(walked.lead) == places[name]:
            parts = room.opt_states.get(key, parts[0]), room.end, room.means
        return parts
    raise KeyError(name)
