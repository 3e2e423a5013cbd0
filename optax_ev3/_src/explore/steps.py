"""Steps: what an explorer's inner optimizer does to parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_map_with_path

from optax_ev3._src.base import control, select, sharding, trees
from optax_ev3._src.explore import inner
from optax_ev3._src.explore.calls import Call
from optax_ev3._src.explore.explorers import Explorer
from optax_ev3._src.explore.losses import Loss, loss_of


class Member(NamedTuple):
    """An explorer, or one member of a sweep, in one call.

    Attributes:
      tx: The inner optimizer.
      explorer: The explorer.
      name: Its name.
      loss: Its loss, for own gradients and for optimizers that need more than one; None
        where it has none.
      call: What the caller gave.
    """

    tx: optax.GradientTransformation
    explorer: Explorer
    name: str
    loss: Loss | None
    call: Call

    @property
    def has_own_loss(self) -> bool:
        """Whether it never takes the caller's gradients."""
        return self.explorer.loss_fn is not None

    def gradient(self, params: optax.Params) -> tuple[optax.Updates, Any]:
        """The gradient of its loss, and what that returns beside its value."""
        if self.loss is None:
            raise ValueError(f"explorer {self.name!r} has no loss.")
        return self.loss.gradient(params)

    def advance(
        self, grads: optax.Updates, aux: Any, opt_state: Any, params: optax.Params
    ) -> tuple[optax.Updates, Any]:
        """One step of the inner optimizer, as it comes.

        Args:
          grads: Gradients at ``params``, or what stands for them.
          aux: What the loss returned beside its value, None for nothing.
          opt_state: State of the inner optimizer.
          params: Where the step starts.

        Returns:
          The update, like params, and the inner state, like the one before.
        """
        update, new = inner.inner_update(
            self.tx,
            self.explorer,
            self.name,
            opt_state,
            params,
            self.loss,
            self.call.extra_args,
            self.call.own,
        )(grads)
        update = inner.like_params(update, params, self.name)
        if self.call.scale is not None:
            update = _scaled(update, self.call.scale)
        if self.explorer.merge_fn is not None:
            update = _merged(update, params, self.explorer.merge_fn, aux, self.name)
        return update, inner.like_state(new, opt_state, self.name)


def each_member(
    fn: Callable[..., Any], explorer: Explorer, name: str, call: Call, *args: Any
) -> Any:
    """``fn(member, *args)`` for an explorer; for all members of a sweep, stacked."""

    def step(tx: Any, hyperparams: Any, *args: Any) -> Any:
        loss = loss_of(explorer, name, call, hyperparams)
        return fn(Member(tx, explorer, name, loss, call), *args)

    # The gradients of a loss take memory for the activations of each member; and where
    # arrays are spread by their types, conditionals have no rule for a vector of flags.
    alone = explorer.loss_fn is not None or sharding.is_explicit((args, call.grads))
    numbers = call.hyperparams.get(name)
    return explorer.each(step, *args, hyperparams=numbers, at_once=not alone)


def member(explorer: Explorer, name: str, call: Call, row: Any) -> Member:
    """An explorer; of a sweep the member in this row."""
    tx, numbers = explorer.tx, {}
    if explorer.size is not None:
        tx, numbers = explorer.member(row, call.hyperparams.get(name))
    return Member(tx, explorer, name, loss_of(explorer, name, call, numbers), call)


def one_by_one(
    fn: Callable[[Member, Any], Any],
    explorer: Explorer,
    name: str,
    call: Call,
    own: Any,
    paused: jax.Array | None = None,
) -> Any:
    """``fn(member, own)`` for an explorer; for a sweep member after member, in place.

    It takes memory for the activations of one, and what a member skips takes no time.

    Args:
      fn: What a member does with its part of ``own``.
      explorer: The explorer.
      name: Its name.
      call: What the caller gave.
      own: What the members have, stacked.
      paused: ``[]`` bool, or ``[G]`` for a sweep, who does nothing; None for nobody.
    """

    def step(row: Any, own: Any) -> Any:
        if explorer.size is None:
            return fn(member(explorer, name, call, row), own)
        new = fn(member(explorer, name, call, row), jax.tree.map(lambda x: x[row], own))
        return jax.tree.map(lambda x, n: x.at[row].set(n), own, new)

    def step_unless_paused(row: Any, own: Any) -> Any:
        if paused is None:
            return step(row, own)
        is_paused = paused[row] if paused.ndim else paused
        return select.apply_if(~is_paused, lambda own: step(row, own), own)

    if explorer.size is None:
        return step_unless_paused(0, own)
    if explorer.axis is not None:
        return _at_once(fn, explorer, name, call, own, paused)
    return control.fori_loop(0, explorer.size, step_unless_paused, own)


def _at_once(
    fn: Callable[[Member, Any], Any],
    explorer: Explorer,
    name: str,
    call: Call,
    own: Any,
    paused: jax.Array | None,
) -> Any:
    """The same, with members on several devices: each steps its own."""

    def step(row: jax.Array, own: Any) -> Any:
        return fn(member(explorer, name, call, row), own)

    moved = explorer.at_once(step)(jnp.arange(explorer.size), own)
    if paused is None:
        return moved
    return select.where_rows(jnp.broadcast_to(~paused, [explorer.size]), moved, own)


def given_to(name: str, call: Call) -> tuple[optax.Updates, Any]:
    """The caller's gradients, which this explorer needs, and auxiliary outputs."""
    if call.grads is None:
        raise ValueError(
            f"explorer {name!r} takes the caller's gradients, got None: pass them as "
            f"tx.update(grads, state, params), or give the explorer a loss of its own, "
            f"explorer(tx, loss_fn)."
        )
    return call.grads, call.extra_args.get("aux")


def _scaled(update: optax.Updates, factor: jax.Array) -> optax.Updates:
    """The update times a factor; what is no float stays."""

    def one(u: jax.Array) -> jax.Array:
        if not trees.is_inexact(u):
            return u
        wide = u.astype(trees.wide_dtype(u))
        return (wide * jnp.asarray(factor, wide.dtype)).astype(u.dtype)

    return jax.tree.map(one, update)


def _merged(
    update: optax.Updates,
    params: optax.Params,
    merge_fn: Callable[[Any, Any], Any],
    aux: Any,
    name: str,
) -> optax.Updates:
    """The update that leads to the parameters with auxiliary outputs merged."""
    if aux is None:
        raise TypeError(
            f"explorer {name!r} has a merge_fn, but takes the caller's gradients: pass "
            f"what the caller's loss computed on the side as "
            f"tx.update(grads, state, params, aux=...)."
        )
    moved = trees.plus(params, update)
    merged = merge_fn(moved, aux)
    if jax.tree.structure(merged) != jax.tree.structure(params):
        raise ValueError(
            f"merge_fn must return parameters of structure "
            f"{jax.tree.structure(params)}, got {jax.tree.structure(merged)}."
        )

    def change(path: Any, new: Any, old: Any, u: jax.Array, p: jax.Array) -> Any:
        if new is old:
            return u
        if trees.is_key(p):
            raise ValueError(
                f"merge_fn changed the typed PRNG key at params{keystr(path)}, and no "
                f"update can be added to one: keep its raw data, jax.random.key_data, "
                f"among the parameters."
            )
        return trees.minus(jnp.asarray(new, p.dtype), p)

    return tree_map_with_path(change, merged, moved, update, params)


def slope(update: optax.Updates, grads: optax.Updates) -> jax.Array | None:
    """What an update adds to the loss, to first order; None if it cannot be told.

    Some optimizers take gradients of another form, such as one for each example.
    """
    alike = jax.tree.structure(update) == jax.tree.structure(grads)
    if not (alike and trees.shapes(update) == trees.shapes(grads)):
        return None

    def product(u: jax.Array, g: jax.Array) -> jax.Array:
        if not trees.is_inexact(u):
            return jnp.zeros([])
        wide = trees.wide_dtype(u)
        return jnp.real(jnp.conj(g.astype(wide)) * u.astype(wide)).sum()

    return trees.total(jax.tree.leaves(jax.tree.map(product, update, grads)))
