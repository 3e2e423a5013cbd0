"""What a call of ``update`` gives to explorers, and what the caller gets back."""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import trees


class Call(NamedTuple):
    """What one call of ``update`` gives to all steps.

    Attributes:
      grads: The caller's gradients, or None where every explorer takes its own.
      loss_fn: The loss of explorers that have none of their own, or None.
      extra_args: The extra arguments of ``update``.
      key: PRNG key of the call, for losses that name it.
      axis_name: Mapped axis over which losses and own gradients are averaged, or None.
      hyperparams: By evolving group and name ``[G]``, the numbers of its members.
      own: Whether explorers may be elsewhere than the caller, with gradients of their
        own: they take ``value`` and the like from their losses then.
      count: ``[]`` int32, calls of ``update`` before this one.
      scale: ``[]``, factor of all updates; None for one.
    """

    grads: optax.Updates
    loss_fn: Callable[..., Any] | None
    extra_args: Mapping[str, Any]
    key: jax.Array
    axis_name: Any = None
    hyperparams: Mapping[str, Mapping[str, jax.Array]] = types.MappingProxyType({})
    own: bool = False
    count: Any = 0
    scale: Any = None


def checked_schedule(schedule: Any) -> optax.Schedule | None:
    """The schedule; raises unless it can be called."""
    if schedule is not None and not callable(schedule):
        raise TypeError(
            f"schedule must map calls of update to a factor of all updates, such as "
            f"optax.linear_schedule(1.0, 0.0, 200, 800), got {schedule!r}."
        )
    return cast(optax.Schedule | None, schedule)


def scaled(call: Call, schedule: optax.Schedule | None) -> Call:
    """The call, whose updates a schedule scales."""
    return call if schedule is None else call._replace(scale=schedule(call.count))


def gradients_for(params: optax.Params, grads: optax.Updates) -> optax.Updates:
    """Gradients that optimizers can take: arrays, zeros for leaves without gradients.

    For such leaves the caller has what ``jax.grad(..., allow_int=True)`` gives, None,
    or zeros. Gradients of another structure come back as they are.
    """

    def has_none(g: Any):
        return g is None or jnp.result_type(g) == jax.dtypes.float0

    grads = jax.tree.map(lambda g: g if has_none(g) else trees.as_array(g), grads)
    leaves, structure = jax.tree.flatten(params)
    if all(map(trees.is_inexact, leaves)):
        return grads
    try:
        given = structure.flatten_up_to(grads)
    except ValueError:
        return grads

    def one(p: Any, g: Any):
        if trees.is_key(p):
            return jnp.zeros(p.shape, jnp.int8)
        return jnp.zeros_like(p) if has_none(g) and not trees.is_inexact(p) else g

    return structure.unflatten(map(one, leaves, given))


def update_for(
    params: optax.Params, update: optax.Updates, grads: optax.Updates
) -> optax.Updates:
    """The update as the caller gets it: for typed keys what stood for their gradient.

    Nothing can be added to them; who has them among the parameters knows how to pass
    over what their gradients are.
    """
    leaves, structure = jax.tree.flatten(params)
    if not any(map(trees.is_key, leaves)):
        return update
    try:
        given = structure.flatten_up_to(grads)
    except ValueError:
        given = [None] * len(leaves)
    updates = jax.tree.leaves(update)
    return structure.unflatten(
        g if trees.is_key(p) else u
        for p, u, g in zip(leaves, updates, given, strict=True)
    )
