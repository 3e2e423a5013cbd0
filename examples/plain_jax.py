"""EV3 in a training loop of plain JAX.

The optimizer is one line. The only other change to the loop is that `tx.update` is
given a batch of held-out examples, under the names that `assess_fn` asks for.

Run it with `python examples/plain_jax.py`; it takes seconds.
"""

from itertools import pairwise

import _data
import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging

import optax_ev3

STEPS = flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters and the batches.")

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


def log_likelihood(params, x, y):
    """Scores, one for each example, higher is better: what EV3 assesses."""
    return -optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def loss(params, x, y):
    return -log_likelihood(params, x, y).mean()


def accuracy(params, data):
    x, y = data
    return float((logits(params, x).argmax(-1) == y).mean())


def train(steps: int, seed: int) -> float:
    """Trains a classifier and returns its accuracy on the test set."""
    data = _data.load()
    tx = optax_ev3.ev3(
        inner={"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)},
        assess_fn=log_likelihood,
        key=seed,
    )

    @jax.jit
    def step(params, state, key):
        train_key, held_out_key = jax.random.split(key)
        x, y = _data.sample(train_key, data.train)
        grads = jax.grad(loss)(params, x, y)
        x, y = _data.sample(held_out_key, data.held_out)
        updates, state = tx.update(grads, state, params, x=x, y=y)
        return optax.apply_updates(params, updates), state

    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = init(init_key)
    state = tx.init(params)
    print(f"Before training: test accuracy {accuracy(params, data.test):.4f}")
    for i in range(steps):
        params, state = step(params, state, jax.random.fold_in(data_key, i))
    after = accuracy(optax_ev3.best_params(state), data.test)
    print(f"After {steps} steps: test accuracy {after:.4f}")
    for name, value in jax.jit(optax_ev3.summary)(state).items():
        print(f"  {name:18} {value:8.3f}")
    return after


def main(_):
    logging.set_verbosity(logging.WARNING)
    train(STEPS.value, SEED.value)


if __name__ == "__main__":
    app.run(main)
