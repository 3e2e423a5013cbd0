"""Choices between trees, of which some are stacked.

An explorer's tree is alone, or those of a sweep are stacked along a leading axis. The
two differ here, in ``Layout`` and in ``Explorer.each``, nowhere else.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_ev3._src.base import control, sharding, trees, xla


class Lazy(NamedTuple):
    """A tree that is made where it is needed.

    A type of its own: many trees of parameters are callable themselves.

    Attributes:
      make: A function without arguments that returns the tree.
    """

    make: Callable[[], Any]


class Stacked(NamedTuple):
    """One tree, or several of one structure with their leaves stacked.

    Attributes:
      tree: The tree, or a :class:`Lazy` one; with a leading axis where there are
        several.
      size: How many there are, None for a single tree that is not stacked.
      paused: ``[]`` bool, or ``[size]``, whether nobody needs to look at it; None for
        no.
      make: What a candidate is made of its tree, when it is looked at.
      axis: The mesh axis over which the leading axis is spread; None for none.
    """

    tree: Any
    size: int | None = None
    paused: Any = None
    make: Callable[[Any], Any] = lambda tree: tree
    axis: str | None = None


def count(stack: Stacked) -> int:
    """How many trees a stack holds."""
    return 1 if stack.size is None else stack.size


def row(stack: Stacked, index: Any) -> Any:
    """One tree of a stack."""
    if stack.size is None:
        return stack.tree
    if stack.axis is None:
        return jax.tree.map(lambda leaf: leaf[index], stack.tree)
    # A sum over devices moves one tree; to look one up, all would be gathered.
    flags = jnp.arange(stack.size) == index
    nothing = jax.tree.map(jnp.zeros_like, stack.tree)
    alone = where_rows(flags, stack.tree, nothing)

    def add(leaf: jax.Array) -> jax.Array:
        return leaf.any(axis=0) if leaf.dtype == bool else leaf.sum(0, leaf.dtype)

    return jax.tree.map(add, alone)


def pick(
    index: Any, stacks: Sequence[Stacked], then: Callable[[Any], Any] = lambda x: x
) -> Any:
    """The tree with this index, counted over all stacks.

    On CPUs the others are not read, nor made; on GPUs, whose host would wait for the
    index, all are.

    Args:
      index: ``[]`` int32.
      stacks: All trees.
      then: What is wanted of the tree. On CPUs it reads the tree where it is, and
        nothing is copied.
    """
    which, branches = _places(index, stacks)

    def choose_all(number: jax.Array):
        return then(control.chosen(number, [take() for take in branches]))

    def choose_one(number: jax.Array):
        return control.switch(
            number, [lambda take=take: then(take()) for take in branches]
        )

    return control.platform_dependent(which, cpu=choose_one, default=choose_all)


def look_up(index: Any, stacks: Sequence[Stacked]) -> Any:
    """The candidate with this index, counted over all stacks; no other is read."""
    which, branches = _places(index, stacks)

    def made(stack: Stacked, take: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: stack.make(take())

    pairs = zip(stacks, branches, strict=True)
    return control.switch(which, [made(stack, take) for stack, take in pairs])


def _places(
    index: Any, stacks: Sequence[Stacked]
) -> tuple[jax.Array, list[Callable[[], Any]]]:
    """In which stack the tree with this index is, and how to take it from each."""
    sizes = [count(stack) for stack in stacks]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    which = jnp.asarray([i for i, size in enumerate(sizes) for _ in range(size)])

    def take(stack: Stacked, first: int):
        tree = stack.tree.make() if isinstance(stack.tree, Lazy) else stack.tree
        return sharding.on_device(row(stack._replace(tree=tree), index - first))

    return which[index], [
        functools.partial(take, stack, first)
        for stack, first in zip(stacks, firsts, strict=True)
    ]


def apply_if(condition: Any, fn: Callable[[Any], Any], tree: Any) -> Any:
    """``fn(tree)`` where the condition holds, else ``tree``, which stays in place.

    ``lax.cond`` would copy the whole tree in either case; a loop carries it.
    """
    if not control.is_traced(condition):
        return fn(tree) if condition else tree
    if control.is_at_once():
        return where(condition, fn(tree), tree)

    def body(carry: Any):
        return jnp.zeros_like(carry[0]), xla.row_major(fn(xla.row_major(carry[1])))

    carry = (jnp.asarray(condition), tree)
    return lax.while_loop(lambda carry: carry[0], body, carry)[1]


def apply_if_with_jvp(
    condition: Any, fn: Callable[[Any, Any], Any], tree: Any, operands: Any
) -> Any:
    """Like :func:`apply_if`, for ``fn(tree, operands)``, and with derivatives.

    A loop has none in reverse mode. ``fn`` must take all that depends on traced arrays
    as operands.
    """

    @jax.custom_jvp
    def apply(condition: Any, tree: Any, operands: Any):
        return apply_if(condition, lambda tree: fn(tree, operands), tree)

    @apply.defjvp
    def _(primals: Any, tangents: Any):
        condition, *arguments = primals
        _, *changes = tangents

        def of_fn():
            return jax.jvp(fn, arguments, changes)[1]

        def of_tree():
            return changes[0]

        # What has no derivatives does not go through the conditional.
        def inexact(changes: Any):
            return [x for x in jax.tree.leaves(changes) if x.dtype != jax.dtypes.float0]

        found = iter(
            lax.cond(condition, lambda: inexact(of_fn()), lambda: inexact(of_tree()))
        )
        change = jax.tree.map(
            lambda x: x if x.dtype == jax.dtypes.float0 else next(found), of_tree()
        )
        return apply(*primals), change

    return apply(jnp.asarray(condition), tree, operands)


def select_or_apply(condition: Any, fn: Callable[[Any], Any], tree: Any) -> Any:
    """``fn(tree)`` where the condition holds, else ``tree``.

    On CPUs like :func:`apply_if`. On GPUs both are computed, so that the host need not
    wait for the condition: for a cheap ``fn``, or conditions that nearly always hold.
    """
    return control.platform_dependent(
        condition,
        tree,
        cpu=lambda condition, tree: apply_if(condition, fn, tree),
        default=lambda condition, tree: where(condition, fn(tree), tree),
    )


def computed_after(earlier: Any, leaf: jax.Array) -> jax.Array:
    """The leaf, which is not known on GPUs before ``earlier`` is.

    They would compute both at once otherwise, and need the memory for both.
    """
    return control.platform_dependent(
        earlier,
        leaf,
        cpu=lambda _, leaf: leaf,
        default=lambda earlier, leaf: lax.optimization_barrier((earlier, leaf))[1],
    )


def where(condition: Any, new: Any, old: Any) -> Any:
    """Leafwise ``new`` where the condition holds, with the dtypes of ``old``."""
    return jax.tree.map(
        lambda n, o: jnp.where(condition, jnp.asarray(n, o.dtype), o), new, old
    )


def spread(tree: Any, size: int | None) -> Any:
    """The tree, or as many copies of it stacked; None for a single one."""
    if size is None:
        return tree
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x))), tree)
    return trees.unlike_params(copies)


def where_rows(mask: jax.Array, new: Any, old: Any) -> Any:
    """Leafwise ``new`` where the mask holds, which runs over leading axes."""
    if not mask.ndim:
        return where(mask, new, old)

    def choose(flag: jax.Array, n: Any, o: Any) -> jax.Array:
        return jnp.where(flag, jnp.asarray(n, o.dtype), o)

    # Under vmap, flags are spread over devices like what they choose from.
    for _ in range(mask.ndim):
        choose = jax.vmap(choose)

    def each(n: Any, o: Any) -> jax.Array:
        return choose(*sharding.leading_alike(mask, n, o))

    return jax.tree.map(each, new, old)


def replace_rows(mask: jax.Array, new: Any, old: Any) -> Any:
    """:func:`where_rows` of a mask that holds somewhere: a single tree is all new."""
    if mask.ndim:
        return where_rows(mask, new, old)
    return jax.tree.map(lambda n, o: jnp.asarray(n, o.dtype), new, old)
