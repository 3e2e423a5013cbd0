"""Explicit sharding: where types say how arrays are spread over devices.

On meshes with explicit axes, the default of ``jax.make_mesh``, JAX does not choose how
a result is spread where that is ambiguous. On others, and without a mesh, the functions
here do nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def spec(leaf: Any) -> PartitionSpec | None:
    """How an array is known to be spread when it is traced; None if it is not."""
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    found = getattr(sharding, "spec", None)
    return found if found is not None and any(found) else None


def is_explicit(tree: Any) -> bool:
    """Whether a leaf is known to be spread."""
    return any(spec(leaf) is not None for leaf in jax.tree.leaves(tree))


def varying(leaf: Any) -> frozenset[Any]:
    """Mapped axes of ``shard_map`` over whose devices an array is known to differ."""
    kind = jax.typeof(leaf)
    if hasattr(kind, "vma"):
        return kind.vma
    return kind.manual_axis_type.varying  # Its name since JAX 0.10.


def replicated(tree: Any) -> Any:
    """The tree on all devices: for small results."""

    def gather(leaf: Any) -> Any:
        if spec(leaf) is None:
            return leaf
        return jax.sharding.reshard(leaf, PartitionSpec(*[None] * leaf.ndim))

    return jax.tree.map(gather, tree)


def take(leaf: jax.Array, rows: jax.Array) -> jax.Array:
    """``leaf[rows]``, spread like the leaf where the rows divide, else gathered."""
    found = spec(leaf)
    if found is None:
        return leaf[rows]
    mesh = jax.typeof(leaf).sharding.mesh
    names = found[0] if isinstance(found[0], tuple) else (found[0],)
    if rows.shape[0] % math.prod(mesh.shape[name] for name in names if name):
        found = PartitionSpec(None, *found[1:])
    return leaf.at[rows].get(out_sharding=NamedSharding(mesh, found))


def rows_from(leaf: jax.Array, start: Any, count: int) -> jax.Array:
    """``count`` rows of the leaf, from ``start`` on."""
    if spec(leaf) is None:
        return jax.lax.dynamic_slice_in_dim(leaf, start, count)
    return take(leaf, start + jnp.arange(count))
