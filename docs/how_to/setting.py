"""A small problem that the pages of this section go on from."""

import jax
import jax.numpy as jnp
import optax

import optax_ev3

x = jax.random.normal(jax.random.key(0), [1024, 4])
y = x[:, 0] * x[:, 1] > 0
train, held_out = (x[:512], y[:512]), (x[512:], y[512:])


def init(key):
    return {"hidden": jax.random.normal(key, [4, 32]), "out": jnp.zeros(32)}


def logits(params, x):
    return jax.nn.relu(x @ params["hidden"]) @ params["out"]


def score(params, batch):
    """The log-likelihood of each example: what EV3 assesses, higher is better."""
    x, y = batch
    return -optax.sigmoid_binary_cross_entropy(logits(params, x), y)


def loss(params, batch):
    return -score(params, batch).mean()


inner = {"adam": optax.adam(1e-2), "sgd": optax.sgd(0.5)}
