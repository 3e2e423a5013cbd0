"""A learning rate that nobody chose: it evolves from one that is far too small.

Four members of a group train at rates of their own. One that is shown to be worse
starts again from the best one, at a rate drawn around the better ones. Training stops
early where the history shows that it gets nowhere. Then the schedule that was found
trains a model by itself, without EV3.

Run it with `python examples/learning_rate.py --plot=history.png`; it takes seconds.
"""

from itertools import pairwise

import _data
import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging

import optax_ev3
from optax_ev3 import explore, plot

STEPS = flags.DEFINE_integer("steps", 1000, "Training steps at most.", lower_bound=1)
START = flags.DEFINE_float("start", 1e-5, "Learning rate at the start.", 1e-7, 10.0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters and the batches.")
PLOT = flags.DEFINE_string("plot", None, "Where to draw the history to, a PNG file.")

SIZES = (64, 128, 128, 10)


def init(key):
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(SIZES) - 1)
    return [
        {"w": he(key, shape), "b": jnp.zeros(shape[1])}
        for key, shape in zip(keys, pairwise(SIZES), strict=True)
    ]


def logits(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def log_likelihood(params, batch):
    """Scores, one for each example, higher is better: what EV3 assesses."""
    x, y = batch
    return -optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def loss(params, batch):
    return -log_likelihood(params, batch).mean()


def accuracy(params, data):
    x, y = data
    return float((logits(params, x).argmax(-1) == y).mean())


def evolving(data, start: float, seed: int):
    rate = optax_ev3.log_uniform(1e-7, 10.0, start)
    return optax_ev3.ev3(
        {"adam": optax_ev3.evolve(optax.adam, {"learning_rate": rate}, population=4)},
        optax_ev3.held_out(log_likelihood, data.held_out),
        loss_fn=loss,
        explore=explore.branches(
            10,
            growth=1.1,
            max_length=100,
            restart=explore.worse_than("adopted", inner_state="copy"),
            averages=[explore.trajectory_average()],
        ),
        history_length=200,
        key=seed,
    )


def train(tx, data, steps: int, seed: int, stop=lambda state: False):
    """Parameters and state after so many steps, or when it is time to stop."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, key):
        batch = _data.sample(key, data.train)
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = init(init_key)
    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, jax.random.fold_in(data_key, i))
        if stop(state):
            print(f"Training gets nowhere: stopped after {i + 1} steps")
            break
    return params, state


def main(_):
    logging.set_verbosity(logging.WARNING)
    data, start, seed = _data.load(), START.value, SEED.value
    alone, _ = train(optax.adam(start), data, STEPS.value, seed)
    print(f"Adam at {start:g} alone: test accuracy {accuracy(alone, data.test):.4f}")
    tx = evolving(data, start, seed)
    stalled = jax.jit(lambda state: optax_ev3.stalled(state, rounds=16))
    _, state = train(tx, data, STEPS.value, seed, stalled)
    best = optax_ev3.best_params(state)
    print(f"Evolved from there: test accuracy {accuracy(best, data.test):.4f}")
    schedule = optax_ev3.found_schedule(state, "learning_rate")
    calls = int(optax_ev3.summary(state)["ev3/calls"])
    for count in range(0, calls, max(1, calls // 8)):
        print(f"  learning rate at step {count:4}: {float(schedule(count)):.2g}")
    again, _ = train(optax.adam(schedule), data, calls, seed)
    print(f"That schedule alone: test accuracy {accuracy(again, data.test):.4f}")
    if PLOT.value:
        plot.history(state).savefig(PLOT.value, dpi=100)
        print(f"drew {PLOT.value}")


if __name__ == "__main__":
    app.run(main)
