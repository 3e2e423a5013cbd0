"""The loops that benchmarks share; optimizers; digits and an MLP."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import models
from benchmarks.data import load, sample

# Optimizers that work, and learning rates that span two orders.
EIGHT = {
    **{f"adam {rate:g}": optax.adam(rate) for rate in (1e-4, 3e-4, 1e-3, 3e-3)},
    **{f"sgd {rate:g}": optax.sgd(rate) for rate in (0.01, 0.1, 0.5)},
    "momentum 0.05": optax.sgd(0.05, momentum=0.9),
}
TWO = {"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)}


def batch_of(data, seed, number, size):
    """The batch of a step, the same for all methods."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return sample(key, data, size)


def fit(tx, loss, params, data, seed, steps, size=128):
    """Trains with any optimizer; the final parameters and its state."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, number):
        params, state = carry
        batch = batch_of(data, seed, number, size)
        # Not computed where nothing uses it: explorers may take their own.
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0]


def over_seeds(one, seeds, parts):
    """Maps a function of seed, parts and a number over seeds, dealt to the devices.

    Args:
      one: Of a seed, its parts of the data, and the number.
      seeds: Which.
      parts: Stacked.

    Returns:
      A function of the number to what ``one`` returns, stacked.
    """
    count = len(seeds)
    devices = math.gcd(count, jax.local_device_count())
    mapped = jax.pmap(
        lambda numbers, parts, value: jax.lax.map(
            lambda args: one(*args, value), (numbers, parts)
        ),
        in_axes=(0, 0, None),
        devices=jax.local_devices()[:devices],
    )

    def dealt(x):
        return np.asarray(x).reshape(devices, count // devices, *np.shape(x)[1:])

    def run(value=0.0):
        numbers, data = jax.tree.map(dealt, (np.array(seeds), parts))
        found = mapped(numbers, data, jnp.asarray(value, jnp.float32))
        return jax.tree.map(lambda x: np.asarray(x).reshape(count, *x.shape[2:]), found)

    return run


# Scikit-learn's digits, one split for all seeds, MLP 64-128-128-10.

init, logits = models.mlp(64, 128, 128, 10)


def log_likelihood(params, batch):
    return models.log_likelihood(logits(params, batch[0]), batch[1])


def correct(params, batch):
    return logits(params, batch[0]).argmax(-1) == batch[1]


def loss(params, batch):
    return -log_likelihood(params, batch).mean()


def with_random_labels(data, share, seed):
    """The data, where a share of the labels is drawn at random."""
    x, y = data
    which, label = jax.random.split(jax.random.key(seed))
    is_random = jax.random.bernoulli(which, share, y.shape)
    return x, jnp.where(is_random, jax.random.randint(label, y.shape, 0, 10), y)


def train(make_tx, steps, seeds, noise=0.0):
    """Figures on the test set by name, each ``[seeds]``, and the final states.

    ``noise`` is the share of the training labels that are random.
    """
    data = load()

    def one(seed):
        params = init(jax.random.key(seed))
        noisy = with_random_labels(data.train, noise, seed) if noise else data.train
        params, state = fit(make_tx(seed), loss, params, noisy, seed, steps)
        accuracy = correct(params, data.test).mean()
        return {"accuracy": accuracy, "nll": loss(params, data.test)}, state

    found, state = jax.jit(jax.vmap(one))(jnp.arange(seeds))
    return jax.tree.map(np.asarray, found), state
