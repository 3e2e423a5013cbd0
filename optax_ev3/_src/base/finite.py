"""Whether trees are finite."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_ev3._src.base import control, sharding, trees, xla


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

    def add(leaves: Any):
        sums = [x.sum(dtype=trees.wide_dtype(x)) for x in leaves]
        return trees.total(jnp.real(x) + jnp.imag(x) for x in sums)

    def check(leaves: Any):
        return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()

    def by_sum(leaves: Any):
        found = sharding.replicated(jnp.asarray(each(add)(leaves)))
        # Sums are quick, and finite only if all their terms are; but they may overflow.
        return control.cond(
            jnp.isfinite(found).all(),
            lambda: jnp.ones(found.shape, bool),
            lambda: sharding.replicated(each(check)(leaves)),
        )

    def at_once(leaves: Any):
        flags = xla.joined([jnp.isfinite(x) for x in leaves])
        return jnp.stack([x.all() for x in flags]).all()

    return control.platform_dependent(
        leaves,
        cpu=by_sum,
        default=lambda leaves: sharding.replicated(each(at_once)(leaves)),
    )


def finite_after(params: Any, update: Any, known: Any = None) -> jax.Array:
    """Whether all parameters are finite after an update: ``[]`` bool.

    Args:
      params: Where the update starts.
      update: The update.
      known: ``[]``, a sum to which twice every number of both contributes, if there is
        one already: where twice each of two numbers is finite, so is their sum.
    """
    pairs = zip(*map(jax.tree.leaves, (params, update)), strict=True)
    pairs = [pair for pair in pairs if trees.is_inexact(pair[0])]
    if not pairs:
        return jnp.asarray(True)

    def flags(pairs: Any):
        # Compared in wide numbers: a compiler may leave out rounding in between.
        return [_fits(_wide(p) + _wide(u), p.dtype) for p, u in pairs]

    def check(pairs: Any):
        return jnp.stack([x.all() for x in flags(pairs)]).all()

    def by_sum(pairs: Any):
        return control.cond(
            jnp.isfinite(known), lambda: jnp.asarray(True), lambda: check(pairs)
        )

    def at_once(pairs: Any):
        return jnp.stack([x.all() for x in xla.joined(flags(pairs))]).all()

    on_cpu = check if known is None else by_sum
    return control.platform_dependent(pairs, cpu=on_cpu, default=at_once)


def doubled(tree: Any) -> Any:
    """Twice the numbers, float32 or wider; not finite where the dtype cannot hold them.

    Where the wide one has the same range, that takes no comparison.
    """

    def one(leaf: Any):
        if not trees.is_inexact(leaf):
            return leaf
        wide = 2 * _wide(leaf)
        limit = jnp.finfo(leaf.dtype).max
        if 2 * float(limit) > float(jnp.finfo(wide.dtype).max):
            return wide
        return jnp.where(_fits(wide, leaf.dtype), wide, jnp.inf)

    return jax.tree.map(one, tree)


def _fits(leaf: Any, dtype: Any):
    """Which numbers a dtype can hold."""
    if jnp.iscomplexobj(leaf):
        return _fits(jnp.real(leaf), dtype) & _fits(jnp.imag(leaf), dtype)
    return jnp.abs(leaf) <= float(jnp.finfo(dtype).max)


def clip_to_finite(leaf: jax.Array) -> jax.Array:
    """The leaf, infinite numbers made the largest ones; NaN stays."""
    if not trees.is_inexact(leaf):
        return leaf
    if jnp.iscomplexobj(leaf):
        return lax.complex(
            clip_to_finite(jnp.real(leaf)), clip_to_finite(jnp.imag(leaf))
        )
    limits = jnp.finfo(leaf.dtype)
    return jnp.clip(leaf, limits.min, limits.max)


def towards(target: Any, params: Any) -> Any:
    """The update that leads to the target, as far as one update can."""
    return jax.tree.map(clip_to_finite, trees.minus(target, params))


def _wide(leaf: Any):
    return leaf.astype(trees.wide_dtype(leaf))
