"""Trees of arrays: what leaves may be, and how updates are added to them."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import keystr

# Parameters may be other things than inexact numbers. What an update of them is, and
# how it is added, follows optax.apply_updates, ``(p + u).astype(p.dtype)``: integers
# wrap around, and booleans need the numbers -1, 0 and 1 to be set and cleared. Nothing
# can be added to a typed PRNG key: it stays what the caller gave.


def is_inexact(leaf: Any) -> bool:
    """Whether ``leaf`` holds real or complex numbers, which have gradients."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def total(numbers: Iterable[jax.Array]) -> jax.Array:
    """The sum of scalars of any precision: ``[]``, float32 or wider."""
    with jax.numpy_dtype_promotion("standard"):
        return sum(numbers, jnp.zeros([], jnp.float32))


def wide_dtype(leaf: Any) -> Any:
    """The dtype of a leaf, or float32 where that is wider."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(leaf.dtype, jnp.float32)


def rank(dtype: Any) -> int:
    """Of booleans 0, of integers 1, of real numbers 2, of complex ones 3; else -1."""
    kinds = jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating
    return next((i for i, x in enumerate(kinds) if jnp.issubdtype(dtype, x)), -1)


def shapes(tree: Any) -> list[tuple[int, ...]]:
    """The shapes of all leaves."""
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def types(tree: Any) -> Any:
    """Structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]


def difference(expected: Any, actual: Any, path: Any = ()) -> str | None:
    """Where two trees first differ in structure, and how; None where they don't."""
    (one, one_node), (other, other_node) = map(_one_level, (expected, actual))
    if one_node != other_node:
        return f"at {keystr(path) or 'the top'} {_kind(actual)} instead of " + _kind(
            expected
        )
    if jax.tree_util.treedef_is_leaf(one_node):
        return None
    pairs = zip(one, other, strict=True)
    found = (difference(x, y, (*path, *at)) for (at, x), (_, y) in pairs)
    return next((where for where in found if where), None)


def _one_level(tree: Any):
    return jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is not tree
    )


def _kind(node: Any):
    """The type of a node, and what it holds."""
    children, structure = _one_level(node)
    if jax.tree_util.treedef_is_leaf(structure):
        return "an array" if hasattr(node, "shape") else f"a {type(node).__name__}"
    held = ", ".join(keystr(path) for path, _ in children)
    return f"a {type(node).__name__} with {held or 'nothing'}"


def _update_dtype(leaf: Any):
    return jnp.int8 if is_key(leaf) or leaf.dtype == bool else leaf.dtype


def minus(target: Any, params: Any) -> Any:
    """The update that leads from ``params`` to the target."""

    def one(t: Any, p: Any):
        if is_key(p):
            return jnp.zeros(p.shape, jnp.int8)
        dtype = _update_dtype(p)
        return t.astype(dtype) - p.astype(dtype)

    return jax.tree.map(one, target, params)


def plus(params: Any, update: Any) -> Any:
    """The parameters after an update, with their dtypes."""

    def one(p: Any, u: Any):
        if is_key(p):
            return p
        dtype = _update_dtype(p)
        return (p.astype(dtype) + u.astype(dtype)).astype(p.dtype)

    return jax.tree.map(one, params, update)


def no_update(params: Any) -> Any:
    """Zeros with the sharding of the tree, also in a branch of ``lax.switch``."""
    return jax.tree.map(
        lambda x: ((x != x) & (x == x)).astype(_update_dtype(x)), params
    )


def as_array(leaf: Any) -> jax.Array:
    """An array, not weakly typed; placeholders become zeros with their sharding."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    return jnp.asarray(leaf, jnp.result_type(leaf))


def owned_copy(leaf: Any) -> jax.Array:
    """The array in a buffer of its own."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return as_array(leaf)
    if is_key(leaf):
        data = owned_copy(raw(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jnp.array(leaf, dtype=jnp.result_type(leaf))


def unite(leaf: jax.Array, axis_name: Any, axis: int = 0) -> jax.Array:
    """The parts of all devices, put together along ``axis`` in the devices' order.

    A sum over the devices, unlike ``lax.all_gather``, is known to be the same on all.
    """
    size, place = lax.psum(1, axis_name), lax.axis_index(axis_name)
    whole = jnp.zeros(
        [n * size if i == axis else n for i, n in enumerate(leaf.shape)],
        jnp.int32 if leaf.dtype == bool else leaf.dtype,
    )
    part = leaf.astype(whole.dtype)
    whole = lax.dynamic_update_slice_in_dim(whole, part, place * leaf.shape[axis], axis)
    return lax.psum(whole, axis_name).astype(leaf.dtype)


@functools.cache
def placeholder() -> Any:
    """What ``optax.tree.map_params`` initializes with, in the place of parameters."""
    given: list[Any] = []
    optax.tree.map_params(lambda params: given.append(params) or (), lambda x: x, ())
    return given[0]


def is_placeholder(node: Any) -> bool:
    """Whether it stands for all that is like the parameters."""
    return isinstance(node, type(placeholder()))


def unlike_params(tree: Any) -> Any:
    """The tree, in which nothing counts as like the parameters any more.

    So it is where copies are stacked: a sharding of one parameter does not fit them.
    ``optax.tree.map_params`` takes a leaf for something else, with all below it.
    """

    def one(node: Any):
        return jnp.zeros([]) if is_placeholder(node) else node

    return jax.tree.map(one, tree, is_leaf=is_placeholder)


# Typed PRNG keys of inner states are kept as raw data: flax.serialization cannot save
# the others.


def is_key(leaf: Any) -> bool:
    """Whether ``leaf`` is an array of typed PRNG keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def raw(leaf: Any) -> Any:
    """The raw data of typed keys, anything else as it is."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def key_impls(init: Callable[..., Any], *args: Any) -> list[Any]:
    """For each leaf of ``init(*args)`` its PRNG implementation, None if no key."""
    impls = []

    def trace(*args: Any):
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
