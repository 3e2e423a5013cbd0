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


def current_mesh() -> Any:
    """The mesh that is set where this is traced, or None."""
    if not hasattr(jax.sharding, "get_abstract_mesh"):
        return None  # JAX before 0.7.
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


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


def alike(tree: Any, like: Any) -> Any:
    """The tree spread as another one is."""

    def spread(leaf: Any, other: Any) -> Any:
        if spec(leaf) == spec(other):
            return leaf
        return jax.sharding.reshard(leaf, jax.typeof(other).sharding)

    return jax.tree.map(spread, tree, like)


def _memory(leaf: Any) -> Any:
    """The memory that an array is known to be in when it is traced, or None."""
    if not hasattr(jax, "memory"):
        return None  # JAX before 0.8 does not tell.
    return jax.typeof(leaf).memory_space


def on_device(tree: Any) -> Any:
    """The tree, of which what is kept in host memory is brought to the device."""

    def bring(leaf: Any) -> Any:
        is_here = _memory(leaf) is None or _memory(leaf) == jax.memory.Space.Device
        return leaf if is_here else jax.device_put(leaf, jax.memory.Space.Device)

    return jax.tree.map(bring, tree)


def as_kept(new: Any, old: Any) -> Any:
    """The new tree in the memory in which the old one is kept."""

    def keep(n: Any, o: Any) -> Any:
        return n if _memory(n) == _memory(o) else jax.device_put(n, _memory(o))

    return jax.tree.map(keep, new, old)


def check_axis(axis: str, size: int, mesh: Any, what: str) -> None:
    """Raises unless so many things divide over an axis of the mesh."""
    if axis not in mesh.axis_names:
        raise ValueError(
            f"the mesh has no axis {axis!r}, over which explorers are to be spread; "
            f"its axes are {mesh.axis_names}."
        )
    if size % mesh.shape[axis]:
        raise ValueError(
            f"{size} explorers, {what}, do not divide over the {mesh.shape[axis]} "
            f"devices of the mesh axis {axis!r}."
        )


def _along(axis: Any, tree: Any, mesh: Any) -> Any:
    """The tree with the leading axis of all leaves spread over an axis of the mesh."""

    def spread(leaf: jax.Array) -> jax.Array:
        _, *rest = spec(leaf) or [None] * leaf.ndim
        target = NamedSharding(mesh, PartitionSpec(axis, *rest))
        return jax.sharding.reshard(leaf, target)

    return jax.tree.map(spread, tree)


def leading_alike(*trees: Any) -> tuple[Any, ...]:
    """The trees with their leading axes spread like that of the first that is."""
    for leaf in jax.tree.leaves(trees):
        found = spec(leaf)
        if found is not None and found[0] is not None:
            return _along(found[0], trees, jax.typeof(leaf).sharding.mesh)
    return trees


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
