"""Trees of arrays: what the state may hold, and choices between trees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def where(condition: Any, new: Any, old: Any) -> Any:
    """Leafwise ``new`` where the condition holds, with the dtypes of ``old``."""
    return jax.tree.map(
        lambda n, o: jnp.where(condition, jnp.asarray(n, o.dtype), o), new, old
    )


def own(leaf: Any) -> jax.Array:
    """An array of our own, not weakly typed; placeholders become zeros."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros(leaf.shape, leaf.dtype)
    leaf = raw(leaf)
    return jnp.array(leaf, dtype=jnp.result_type(leaf))


# Typed PRNG keys are kept as raw data: flax.serialization cannot save the others.


def is_key(leaf: Any) -> bool:
    """Whether ``leaf`` is an array of typed PRNG keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def raw(leaf: Any) -> Any:
    """The raw data of typed keys, anything else as it is."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def key_impls(init: Callable[..., Any], *args: Any) -> list[Any]:
    """For each leaf of ``init(*args)`` its PRNG implementation, None if no key."""
    impls = []

    def trace(*args):
        leaves = jax.tree.leaves(init(*args))
        impls.extend(jax.random.key_impl(x) if is_key(x) else None for x in leaves)

    jax.eval_shape(trace, *args)
    return impls


def unpack(packed: Any, impls: list[Any]) -> Any:
    """The tree with typed keys where ``impls`` names their implementations."""
    leaves, structure = jax.tree.flatten(packed)
    unpacked = [
        leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)
        for leaf, impl in zip(leaves, impls, strict=True)
    ]
    return jax.tree.unflatten(structure, unpacked)
