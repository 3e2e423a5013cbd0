"""Digits, an MLP and the loop that benchmarks share: many seeds in one program."""

import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import _data

load = _data.load

# Optimizers that work, and learning rates that span two orders.
EIGHT = {
    **{f"adam {rate:g}": optax.adam(rate) for rate in (1e-4, 3e-4, 1e-3, 3e-3)},
    **{f"sgd {rate:g}": optax.sgd(rate) for rate in (0.01, 0.1, 0.5)},
    "momentum 0.05": optax.sgd(0.05, momentum=0.9),
}


def init(key):
    he = jax.nn.initializers.he_normal()
    shapes = list(itertools.pairwise((64, 128, 128, 10)))
    keys = jax.random.split(key, len(shapes))
    return [(he(k, s), jnp.zeros(s[1])) for k, s in zip(keys, shapes, strict=True)]


def logits(params, x):
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


def log_likelihood(params, batch):
    x, y = batch
    return -optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def correct(params, batch):
    x, y = batch
    return logits(params, x).argmax(-1) == y


METRICS = {"log-likelihood": log_likelihood, "accuracy": correct}


def loss(params, batch):
    return -log_likelihood(params, batch).mean()


def train(make_tx, steps, seeds):
    """Test accuracy and NLL ``[seeds]`` after training, and the final states."""
    data = load()

    def one(seed):
        tx = optax.with_extra_args_support(make_tx(seed))
        params = init(jax.random.key(seed))

        def step(carry, number):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(seed), number)
            batch = _data.sample(key, data.train)
            grads = jax.grad(loss)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None

        start = (params, tx.init(params))
        (params, state), _ = jax.lax.scan(step, start, jnp.arange(steps))
        nll = -log_likelihood(params, data.test).mean()
        return correct(params, data.test).mean(), nll, state

    accuracy, nll, state = jax.jit(jax.vmap(one))(jnp.arange(seeds))
    return np.asarray(accuracy), np.asarray(nll), state
