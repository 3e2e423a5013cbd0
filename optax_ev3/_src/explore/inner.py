"""Inner optimizers: their states and updates, checked."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_map_with_path

from optax_ev3._src.base import callbacks, trees
from optax_ev3._src.explore.calls import gradients_for
from optax_ev3._src.explore.explorers import Explorer
from optax_ev3._src.explore.losses import Loss

# What optax's optimizers ask for beyond the gradient; all follow from a loss.
_FROM_LOSS = ("value", "grad", "value_fn", "grad_fn", "obj_fn")


def init_state(explorer: Explorer, params: optax.Params) -> Any:
    """The inner optimizer's state as arrays that we own, none weakly typed."""
    return explorer.each(lambda tx, _: jax.tree.map(_owned, tx.init(params)))


def member_state(explorer: Explorer, row: jax.Array, params: optax.Params) -> Any:
    """The same of one member of a sweep, in this row, or of a single explorer."""
    tx = explorer.tx if explorer.size is None else explorer.member(row)[0]
    return jax.tree.map(_owned, tx.init(params))


def first_state(explorer: Explorer, name: str, params: optax.Params) -> Any:
    """The inner state, in the dtypes that its first steps bring it to.

    Some begin with an integer to which a fraction is added. An optimizer that needs
    more than a gradient keeps the dtypes of its ``init``.
    """
    nothing = jax.tree.map(
        lambda p: jnp.zeros_like(p) if trees.is_inexact(p) else None, params
    )
    grads = gradients_for(params, nothing)

    def step(tx: optax.GradientTransformation, state: Any):
        return inner_update(tx, explorer, name, state, params, None, {})(grads)[1]

    def init(tx: optax.GradientTransformation, _):
        state = jax.tree.map(_owned, tx.init(params))
        for _ in range(2):  # From booleans to integers to floats.
            if all(map(trees.is_inexact, jax.tree.leaves(state))):
                break
            try:
                after = jax.eval_shape(functools.partial(step, tx), state)
                state = jax.tree.map(_promoted, state, after)
            except Exception:  # Whatever it is, the first step says it better.
                break
        return state

    state = explorer.each(init)
    return state if explorer.size is None else trees.unlike_params(state)


def _owned(leaf: Any):
    return trees.owned_copy(trees.raw(leaf))


def _promoted(old: Any, new: Any):
    higher = trees.rank(new.dtype) > trees.rank(old.dtype)
    return old.astype(new.dtype) if higher else old


def inner_update(
    tx: optax.GradientTransformation,
    explorer: Explorer,
    name: str,
    opt_state: Any,
    params: optax.Params,
    loss: Loss | None,
    extra_args: Mapping[str, Any],
    own: bool = False,
) -> Callable[[optax.Updates], tuple[optax.Updates, Any]]:
    """The inner optimizer as a function of gradients, given what else it can take."""
    takes = callbacks.free(tx.update, 3)
    if explorer.forms is None:  # No packed state has keys.
        opt_state = trees.unpack(opt_state, trees.key_impls(tx.init, params))

    def offer(grads: optax.Updates) -> dict[str, Any]:
        if loss is None:
            return dict(extra_args)
        gradient = loss.gradient
        supplied: dict[str, Any] = {
            "value": loss.value(params),
            "grad": grads,
            "value_fn": loss.value,
            "grad_fn": lambda p, *_: gradient(p)[0],
            "obj_fn": loss.value,
        }
        # What the caller says is of another loss, or of other parameters.
        last = explorer.loss_fn is not None or own
        both = (extra_args, supplied) if last else (supplied, extra_args)
        return {**both[0], **both[1]}

    def call(grads: optax.Updates, extras: Mapping[str, Any]) -> tuple[Any, Any]:
        updates, new_state = tx.update(grads, opt_state, params, **extras)
        return updates, jax.tree.map(trees.raw, new_state)

    def explained(grads: optax.Updates, extras: Mapping[str, Any]) -> tuple[Any, Any]:
        try:
            return call(grads, extras)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            hint = _hint(error, params, grads, extras)
            raise kind(f"explorer {name!r} cannot be updated: {error}{hint}") from error

    def step(grads: optax.Updates) -> tuple[Any, Any]:
        offered = {k: v for k, v in offer(grads).items() if takes.takes(k)}
        if explorer.forms is not None:
            return call(grads, offered)  # Each member explains its own.
        if not takes.takes_any:
            return explained(grads, offered)
        try:
            return call(grads, offered)
        except (TypeError, ValueError):
            # Line searches reject what nobody consumes, instead of ignoring it.
            wanted = {*takes.names, "value", "grad", "value_fn"}
            if "value_fn" in offered:
                wanted |= callbacks.free(offered["value_fn"], 1).names
            return explained(grads, {k: offered[k] for k in wanted & offered.keys()})

    return step


def _hint(
    error: Exception,
    params: optax.Params,
    grads: optax.Updates,
    extras: Mapping[str, Any],
) -> str:
    """What an optimizer may lack that raises this error."""
    if _misses_argument(error):
        return (
            f" Extra arguments that it was given: {sorted(extras) or 'none'}. With "
            f"ev3(..., loss_fn=...) explorers get {', '.join(_FROM_LOSS)}."
        )
    where = trees.difference(params, grads)
    if where is not None:
        return f" The gradients are not like the parameters: {where}."
    return ""


def _misses_argument(error: Exception):
    """Whether an optimizer says that it was not given what follows from a loss."""
    says = str(error)
    return any(re.search(rf"\b{name}\b", says) for name in _FROM_LOSS) and any(
        word in says for word in ("missing", "provide", "require", "need to pass")
    )


def like_params(update: optax.Updates, params: optax.Params, name: str):
    """The update with the dtypes of the parameters; raises if it does not fit them."""
    where, got, expected = trees.difference(params, update), None, None
    if where is None:
        got, expected = trees.shapes(update), trees.shapes(params)
    if got != expected or where is not None:
        what = f"shapes {got}, expected {expected}"
        if where is not None:
            what = f"another structure, {where}"
        raise ValueError(
            f"explorer {name!r} returned updates of {what}: gradients and updates must "
            f"be like the parameters."
        )

    def typed(u: Any, p: Any) -> jax.Array:
        if trees.is_inexact(p):
            return jnp.asarray(u, p.dtype)
        # What optax.apply_updates leads to, which rounds sums of integers and floats.
        moved = p if trees.is_key(p) else jnp.asarray(p + u, p.dtype)
        return trees.minus(moved, p)

    return jax.tree.map(typed, update, params)


def like_state(new: Any, old: Any, name: str):
    """The new inner state with the old one's types; raises if it does not fit it."""
    where = trees.difference(old, new)
    if where is not None:
        raise ValueError(
            f"explorer {name!r} changed the structure of its state: {where}."
        )

    def typed(path: Any, n: Any, o: Any) -> jax.Array:
        got, expected = (f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in (n, o))
        lost = trees.rank(jnp.result_type(n)) > trees.rank(o.dtype)
        if jnp.shape(n) != o.shape or lost:
            raise ValueError(
                f"explorer {name!r} changed its state at {keystr(path) or 'the top'} "
                f"from {expected} to {got}: its init must return the shapes and types "
                f"that its update does."
            )
        return jnp.asarray(n, o.dtype)

    return tree_map_with_path(typed, new, old)
