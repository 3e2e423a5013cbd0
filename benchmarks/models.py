"""Small networks as pairs of functions: a key to parameters, and these to outputs."""

import itertools

import jax
import jax.numpy as jnp
import optax


def dense(key, rows, columns):
    he = jax.nn.initializers.he_normal()
    return he(key, (rows, columns)), jnp.zeros(columns)


def layers(key, *shapes):
    """Parameters of dense layers."""
    keys = jax.random.split(key, len(shapes))
    return [dense(k, *shape) for k, shape in zip(keys, shapes, strict=True)]


def forward(params, x):
    """ReLU between dense layers."""
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


def mlp(*widths):
    """Init and outputs of ReLU layers."""
    return lambda key: layers(key, *itertools.pairwise(widths)), forward


def patches(x, stride=1):
    """All 3x3 neighbourhoods of images ``[n, h, w, c]``, the edges padded.

    Convolutions are written as products: those in loops of XLA are slow on CPUs.
    """
    _, h, w, _ = x.shape
    x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    shifts = [(i, j) for i in range(3) for j in range(3)]
    parts = [x[:, i : i + h : stride, j : j + w : stride] for i, j in shifts]
    return jnp.concatenate(parts, axis=-1)


def cnn():
    """Two convolutions of 3x3, 8 and 16 channels, and a dense layer."""

    def outputs(params, x):
        (w1, b1), (w2, b2), (w3, b3) = params
        x = jax.nn.relu(patches(x.reshape(-1, 8, 8, 1)) @ w1 + b1)
        x = jax.nn.relu(patches(x, 2) @ w2 + b2)
        return x.reshape(len(x), -1) @ w3 + b3

    return lambda key: layers(key, (9, 8), (72, 16), (256, 10)), outputs


def norm(x, scale):
    """Root-mean-square normalization of the last axis."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def affine(x, layer):
    return x @ layer[0] + layer[1]


def transformed(h, layer, heads):
    """A causal block of a transformer on ``[n, t, c]``, normalized before each part."""
    parts = affine(norm(h, layer["scales"][0]), layer["attend"])
    shape = (*parts.shape[:-1], heads, -1)
    q, k, v = (one.reshape(shape) for one in jnp.split(parts, 3, -1))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    h += affine(mixed.reshape(h.shape), layer["mix"])
    inner = jax.nn.gelu(affine(norm(h, layer["scales"][1]), layer["up"]))
    return h + affine(inner, layer["down"])


def log_likelihood(logits, labels):
    """Of each example."""
    return -optax.softmax_cross_entropy_with_integer_labels(logits, labels)
