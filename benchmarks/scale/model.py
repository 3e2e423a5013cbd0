"""A decoder-only transformer in plain JAX, shaped like GPT-2."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Shape(NamedTuple):
    """What a model looks like.

    Attributes:
      layers: How many; each has twelve leaves.
      scanned: Whether the leaves of all layers are stacked, and `lax.scan` runs them.
      width: Of the residual stream.
      heads: Of the attention.
      vocabulary: Different tokens.
      sequence: Tokens of an example that are predicted.
      compute: The dtype that layers compute in; parameters are cast to it.
    """

    layers: int
    scanned: bool
    width: int
    heads: int
    vocabulary: int
    sequence: int
    compute: str = "float32"


def init(shape: Shape, key: jax.Array, dtype: str = "float32") -> Any:
    """Parameters: 148 leaves for 12 layers one by one, 16 for stacked ones."""
    width = shape.width
    kernels = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }

    def dense(key, *sizes):
        return (0.02 * jax.random.normal(key, sizes)).astype(dtype)

    def norm():
        return {"scale": jnp.ones(width, dtype), "bias": jnp.zeros(width, dtype)}

    def layer(key):
        keys = dict(zip(kernels, jax.random.split(key, len(kernels)), strict=True))
        return {
            "norm_1": norm(),
            "norm_2": norm(),
            **{
                name: {"w": dense(keys[name], *sizes), "b": jnp.zeros(sizes[1], dtype)}
                for name, sizes in kernels.items()
            },
        }

    keys = jax.random.split(key, shape.layers + 2)
    return {
        "embedding": dense(keys[0], shape.vocabulary, width),
        "positions": dense(keys[1], shape.sequence, width),
        "layers": jax.vmap(layer)(keys[2:])
        if shape.scanned
        else [layer(one) for one in keys[2:]],
        "norm": norm(),
    }


def log_likelihood(
    shape: Shape, params: Any, tokens: jax.Array, whole: Callable[[Any], Any]
) -> jax.Array:
    """Mean log-likelihood of the tokens of each sequence: [batch].

    Args:
      shape: Of the model.
      params: From `init`.
      tokens: [batch, sequence + 1].
      whole: What the parameters of a layer go through before they are used, such as
        being gathered from all devices.
    """
    cast = whole_and_cast(shape, whole)
    embedding = cast(params["embedding"])
    x = embedding[tokens[:, :-1]] + cast(params["positions"])[None]

    def body(x, layer):
        return block(shape, cast(layer), x), None

    if shape.scanned:
        x, _ = lax.scan(body, x, params["layers"])
    else:
        for layer in params["layers"]:
            x, _ = body(x, layer)
    logits = (normed(cast(params["norm"]), x) @ embedding.T).astype(jnp.float32)
    taken = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return (taken - jax.nn.logsumexp(logits, axis=-1)).mean(axis=-1)


def whole_and_cast(shape: Shape, whole: Callable[[Any], Any]):
    return lambda tree: jax.tree.map(lambda w: w.astype(shape.compute), whole(tree))


def normed(layer, x):
    y = x.astype(jnp.float32)
    y = (y - y.mean(-1, keepdims=True)) * lax.rsqrt(y.var(-1, keepdims=True) + 1e-5)
    return y.astype(x.dtype) * layer["scale"] + layer["bias"]


def block(shape: Shape, layer, x):
    batch, length, width = x.shape
    y = normed(layer["norm_1"], x) @ layer["qkv"]["w"] + layer["qkv"]["b"]
    q, k, v = jnp.moveaxis(y.reshape(batch, length, 3, shape.heads, -1), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32)
    scores = scores * (width / shape.heads) ** -0.5
    seen = jnp.tril(jnp.ones([length, length], bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30)).astype(x.dtype)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
    x = x + y @ layer["out"]["w"] + layer["out"]["b"]
    y = jax.nn.gelu(normed(layer["norm_2"], x) @ layer["up"]["w"] + layer["up"]["b"])
    return x + y @ layer["down"]["w"] + layer["down"]["b"]
