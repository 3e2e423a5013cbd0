"""Trees of arrays: what the state may hold, and choices between trees."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.experimental import layout
from jax.tree_util import keystr

from optax_ev3._src.base import control

# Numbers in a leaf that a kernel of its own would not keep busy.
_SMALL = 2**16

# Earlier releases of JAX have no rule for constraints of layouts under jax.vmap.
_LAYOUTS_UNDER_VMAP = jax.__version_info__ >= (0, 10)


class Lazy(NamedTuple):
    """A tree that is made where it is needed.

    A type of its own: many trees of parameters are callable themselves.

    Attributes:
      make: A function without arguments that returns the tree.
    """

    make: Callable[[], Any]


class Batch(NamedTuple):
    """One tree, or several of one structure with their leaves stacked.

    Attributes:
      tree: The tree, or a :class:`Lazy` one; with a leading axis where there are
        several.
      size: How many there are, None for a single tree that is not stacked.
      rests: ``[]`` bool, whether nobody needs to look at it; None for no.
    """

    tree: Any
    size: int | None = None
    rests: Any = None


def count(batch: Batch) -> int:
    """How many trees a batch holds."""
    return 1 if batch.size is None else batch.size


def pick(index: Any, batches: Sequence[Batch]) -> Any:
    """The tree with this index, counted over all batches.

    On CPUs the others are not read, nor made; on GPUs, whose host would wait for the
    index, all are.
    """
    sizes = [count(batch) for batch in batches]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    which = jnp.asarray([i for i, size in enumerate(sizes) for _ in range(size)])

    def take(batch, first):
        tree = batch.tree.make() if isinstance(batch.tree, Lazy) else batch.tree
        if batch.size is None:
            return tree
        return jax.tree.map(lambda leaf: leaf[index - first], tree)

    branches = [
        functools.partial(take, batch, first)
        for batch, first in zip(batches, firsts, strict=True)
    ]

    def choose_all(number):
        picked, *others = [branch() for branch in branches]
        for i, tree in enumerate(others, 1):
            picked = where(number == i, tree, picked)
        return picked

    return control.platform_dependent(
        which[index],
        cpu=lambda number: control.switch(number, branches),
        default=choose_all,
    )


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


def once(condition: Any, fn: Callable[[Any], Any], tree: Any) -> Any:
    """``fn(tree)`` where the condition holds, else ``tree``, which stays in place.

    ``lax.cond`` would copy the whole tree in either case; a loop carries it.
    """
    if not control.is_traced(condition):
        return fn(tree) if condition else tree

    def body(carry):
        return jnp.zeros_like(carry[0]), row_major(fn(row_major(carry[1])))

    carry = (jnp.asarray(condition), tree)
    return lax.while_loop(lambda carry: carry[0], body, carry)[1]


def once_with(
    condition: Any, fn: Callable[[Any, Any], Any], tree: Any, operands: Any
) -> Any:
    """Like :func:`once`, for ``fn(tree, operands)``, and with derivatives.

    A loop has none in reverse mode. ``fn`` must take all that depends on traced arrays
    as operands.
    """

    @jax.custom_jvp
    def apply(condition, tree, operands):
        return once(condition, lambda tree: fn(tree, operands), tree)

    @apply.defjvp
    def _(primals, tangents):
        condition, *arguments = primals
        _, *changes = tangents

        def of_fn():
            return jax.jvp(fn, arguments, changes)[1]

        def of_tree():
            return changes[0]

        # What has no derivatives does not go through the conditional.
        def inexact(changes):
            return [x for x in jax.tree.leaves(changes) if x.dtype != jax.dtypes.float0]

        found = iter(
            lax.cond(condition, lambda: inexact(of_fn()), lambda: inexact(of_tree()))
        )
        change = jax.tree.map(
            lambda x: x if x.dtype == jax.dtypes.float0 else next(found), of_tree()
        )
        return apply(*primals), change

    return apply(jnp.asarray(condition), tree, operands)


def gate(condition: Any, fn: Callable[[Any], Any], tree: Any) -> Any:
    """``fn(tree)`` where the condition holds, else ``tree``.

    On CPUs like :func:`once`. On GPUs both are computed, so that the host need not wait
    for the condition: for a cheap ``fn``, or conditions that nearly always hold.
    """
    return control.platform_dependent(
        condition,
        tree,
        cpu=lambda condition, tree: once(condition, fn, tree),
        default=lambda condition, tree: where(condition, fn(tree), tree),
    )


def after(earlier: Any, leaf: jax.Array) -> jax.Array:
    """The leaf, which is not known on GPUs before ``earlier`` is.

    They would compute both at once otherwise, and need the memory for both.
    """
    return control.platform_dependent(
        earlier,
        leaf,
        cpu=lambda _, leaf: leaf,
        default=lambda earlier, leaf: lax.optimization_barrier((earlier, leaf))[1],
    )


def _on_one_device() -> bool:
    """Whether a program surely runs on one device: the process has no other.

    How arrays are spread is known at trace time by explicit sharding alone, and XLA
    does not know how a layout constraint, or a concatenation of arrays, is spread. So
    :func:`row_major` and :func:`_joined`, which make programs for one GPU faster, do
    nothing in processes with several devices, even if a program uses one of them. A
    program exported from a process with one device is made for one.
    """
    return jax.device_count() == 1


def row_major(tree: Any) -> Any:
    """The tree in the layout of arrays outside of programs, with one GPU.

    XLA would keep the kernels of convolutions in a layout of theirs, and copy them back
    and forth.
    """
    leaves, structure = jax.tree.flatten(tree)
    deep = [i for i, x in enumerate(leaves) if jnp.ndim(x) > 2 and not is_key(x)]
    if not (deep and _LAYOUTS_UNDER_VMAP and _on_one_device()):
        return tree

    def constrain(leaves):
        return [
            layout.with_layout_constraint(leaf, layout.Layout(tuple(range(leaf.ndim))))
            for leaf in leaves
        ]

    constrained = control.platform_dependent(
        [leaves[i] for i in deep],
        cuda=constrain,
        rocm=constrain,
        default=lambda leaves: leaves,
    )
    for i, leaf in zip(deep, constrained, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def unless(condition: Any, fn: Callable[[Any], Any], tree: Any) -> Any:
    """``fn(tree)``, or ``tree`` where the condition holds; None for never."""
    return fn(tree) if condition is None else once(~condition, fn, tree)


def where(condition: Any, new: Any, old: Any) -> Any:
    """Leafwise ``new`` where the condition holds, with the dtypes of ``old``."""
    return jax.tree.map(
        lambda n, o: jnp.where(condition, jnp.asarray(n, o.dtype), o), new, old
    )


def finite(tree: Any, size: int | None = None) -> jax.Array:
    """Whether all numbers in a tree are finite: ``[]`` bool.

    Args:
      tree: The tree.
      size: How many trees are stacked; the answer is then ``[size]``, one for each.
    """
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    each = jax.vmap if size else lambda fn: fn
    if not leaves:
        return jnp.ones(size or (), bool)

    def add(leaves):
        sums = [x.sum(dtype=wide_dtype(x)) for x in leaves]
        return total(jnp.real(x) + jnp.imag(x) for x in sums)

    def check(leaves):
        return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()

    def by_sum(leaves):
        found = jnp.asarray(each(add)(leaves))
        # Sums are quick, and finite only if all their terms are; but they may overflow.
        return control.cond(
            jnp.isfinite(found).all(),
            lambda: jnp.ones(found.shape, bool),
            lambda: each(check)(leaves),
        )

    def at_once(leaves):
        flags = _joined([jnp.isfinite(x) for x in leaves])
        return jnp.stack([x.all() for x in flags]).all()

    return control.platform_dependent(leaves, cpu=by_sum, default=each(at_once))


def finite_after(params: Any, update: Any, known: Any = None) -> jax.Array:
    """Whether all parameters are finite after an update: ``[]`` bool.

    Args:
      params: Where the update starts.
      update: The update.
      known: ``[]``, a sum to which twice every number of both contributes, if there is
        one already: where twice each of two numbers is finite, so is their sum.
    """
    pairs = zip(*map(jax.tree.leaves, (params, update)), strict=True)
    pairs = [pair for pair in pairs if is_inexact(pair[0])]
    if not pairs:
        return jnp.asarray(True)

    def flags(pairs):
        # Compared in wide numbers: a compiler may leave out rounding in between.
        return [_fits(_wide(p) + _wide(u), p.dtype) for p, u in pairs]

    def check(pairs):
        return jnp.stack([x.all() for x in flags(pairs)]).all()

    def by_sum(pairs):
        return control.cond(
            jnp.isfinite(known), lambda: jnp.asarray(True), lambda: check(pairs)
        )

    def at_once(pairs):
        return jnp.stack([x.all() for x in _joined(flags(pairs))]).all()

    on_cpu = check if known is None else by_sum
    return control.platform_dependent(pairs, cpu=on_cpu, default=at_once)


def twice(tree: Any) -> Any:
    """Twice the numbers, float32 or wider; not finite where the dtype cannot hold them.

    Where the wide one has the same range, that takes no comparison.
    """

    def one(leaf):
        if not is_inexact(leaf):
            return leaf
        wide = 2 * _wide(leaf)
        limit = jnp.finfo(leaf.dtype).max
        if 2 * float(limit) > float(jnp.finfo(wide.dtype).max):
            return wide
        return jnp.where(_fits(wide, leaf.dtype), wide, jnp.inf)

    return jax.tree.map(one, tree)


def _fits(leaf, dtype):
    """Which numbers a dtype can hold."""
    if jnp.iscomplexobj(leaf):
        return _fits(jnp.real(leaf), dtype) & _fits(jnp.imag(leaf), dtype)
    return jnp.abs(leaf) <= float(jnp.finfo(dtype).max)


def in_range(leaf: jax.Array) -> jax.Array:
    """The leaf, infinite numbers made the largest ones; NaN stays."""
    if not is_inexact(leaf):
        return leaf
    if jnp.iscomplexobj(leaf):
        return lax.complex(in_range(jnp.real(leaf)), in_range(jnp.imag(leaf)))
    limits = jnp.finfo(leaf.dtype)
    return jnp.clip(leaf, limits.min, limits.max)


def _wide(leaf):
    return leaf.astype(wide_dtype(leaf))


def _joined(leaves):
    """The leaves, of which the small ones are put into one: a kernel, not dozens."""
    if not _on_one_device():
        return leaves
    small, others = [], []
    for leaf in leaves:
        alone = leaf.size > _SMALL or _is_sharded(leaf)
        (others if alone else small).append(leaf)
    if len(small) < 2:
        return leaves
    joined = jnp.concatenate([x.ravel() for x in small])
    # Without the barrier XLA reduces them one by one all the same.
    return [*others, lax.optimization_barrier(joined)]


def _is_sharded(leaf):
    """Whether an axis is known to be spread over devices, by explicit sharding."""
    return any(axis is not None for axis in jax.typeof(leaf).sharding.spec)


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


def _one_level(tree):
    return jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is not tree
    )


def _kind(node):
    """The type of a node, and what it holds."""
    children, structure = _one_level(node)
    if jax.tree_util.treedef_is_leaf(structure):
        return "an array" if hasattr(node, "shape") else f"a {type(node).__name__}"
    held = ", ".join(keystr(path) for path, _ in children)
    return f"a {type(node).__name__} with {held or 'nothing'}"


def _update_dtype(leaf):
    return jnp.int8 if is_key(leaf) or leaf.dtype == bool else leaf.dtype


def minus(target: Any, params: Any) -> Any:
    """The update that leads from ``params`` to the target."""

    def one(t, p):
        if is_key(p):
            return jnp.zeros(p.shape, jnp.int8)
        dtype = _update_dtype(p)
        return t.astype(dtype) - p.astype(dtype)

    return jax.tree.map(one, target, params)


def plus(params: Any, update: Any) -> Any:
    """The parameters after an update, with their dtypes."""

    def one(p, u):
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


def array(leaf: Any) -> jax.Array:
    """An array, not weakly typed; placeholders become zeros with their sharding."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    return jnp.asarray(leaf, jnp.result_type(leaf))


def own(leaf: Any) -> jax.Array:
    """The array in a buffer of its own."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return array(leaf)
    if is_key(leaf):
        data = own(raw(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jnp.array(leaf, dtype=jnp.result_type(leaf))


@functools.cache
def _placeholder() -> type:
    """What ``optax.tree.map_params`` initializes with, in the place of parameters."""
    given: list[Any] = []
    optax.tree.map_params(lambda params: given.append(params) or (), lambda x: x, ())
    return type(given[0])


def unlike_params(tree: Any) -> Any:
    """The tree, in which nothing counts as like the parameters any more.

    So it is where copies are stacked: a sharding of one parameter does not fit them.
    ``optax.tree.map_params`` takes a leaf for something else, with all below it.
    """

    def is_placeholder(node):
        return isinstance(node, _placeholder())

    def one(node):
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
