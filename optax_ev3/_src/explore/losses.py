"""Losses of explorers as functions of the parameters alone, and their gradients."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_ev3._src.base import callbacks, checks, trees, xla
from optax_ev3._src.explore.calls import Call, gradients_for
from optax_ev3._src.explore.explorers import Explorer


class Loss(NamedTuple):
    """An explorer's loss as functions of the parameters alone.

    Attributes:
      value: params -> ``[]``.
      gradient: params -> gradients, and what else the loss returns (None if nothing).
    """

    value: Callable[[optax.Params], jax.Array]
    gradient: Callable[[optax.Params], tuple[optax.Updates, Any]]


def loss_of(
    explorer: Explorer, name: str, call: Call, hyperparams: Mapping[str, jax.Array]
) -> Loss | None:
    """The explorer's loss, or None where it has none.

    A loss that names hyperparameters of an evolving group gets them.
    """
    fn, role = call.loss_fn, "loss_fn"
    if explorer.loss_fn is not None:
        fn, role = explorer.loss_fn, f"loss_fn of explorer {name!r}"
    if fn is None:
        return None
    numbers = hyperparams if explorer.space and explorer.loss_fn is not None else {}
    offered = {"key": call.key}
    bound = callbacks.bind(fn, role, call.extra_args, offered, fixed=numbers)

    def with_aux(params: optax.Params):
        value, aux = bound(_averaging(params, call.axis_name)), None
        if explorer.merge_fn is not None:
            if not (isinstance(value, tuple) and len(value) == 2):
                raise TypeError(
                    f"{role} must return (scalar, aux), since explorer {name!r} has a "
                    f"merge_fn; got {type(value).__name__}."
                )
            value, aux = value
        elif isinstance(value, tuple):
            raise TypeError(
                f"{role} returned {len(value)} values, and explorer {name!r} has no "
                f"merge_fn that says what becomes of auxiliary outputs."
            )
        if not checks.is_array(value):
            raise TypeError(
                f"{role} must return a real scalar, got {type(value).__name__}: "
                f"{value!r}."
            )
        shape, dtype = jnp.shape(value), jnp.result_type(value)
        if shape != () or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{role} must return a real scalar, got shape {shape} of {dtype}."
            )
        if call.axis_name is not None:
            value, aux = lax.pmean((value, aux), call.axis_name)
        return value, aux

    @xla.quick_convolutions
    def gradient(params: optax.Params):
        grads, aux = jax.grad(with_aux, has_aux=True, allow_int=True)(params)
        # Complex gradients point uphill after conjugation, optax's convention.
        return jax.tree.map(jnp.conj, gradients_for(params, grads)), aux

    return Loss(lambda params: with_aux(params)[0], gradient)


def _averaging(params: optax.Params, axis_name: Any):
    """``params``, whose gradients are averaged over the axis.

    Line searches differentiate the loss themselves. Without this their slopes would
    differ between devices, and so would the number of their steps.
    """
    if axis_name is None:
        return params

    @jax.custom_vjp
    def identity(leaves: Any):
        return leaves

    identity.defvjp(
        lambda leaves: (leaves, None), lambda _, grads: (lax.pmean(grads, axis_name),)
    )
    leaves, structure = jax.tree.flatten(params)
    inexact = [i for i, leaf in enumerate(leaves) if trees.is_inexact(leaf)]
    averaging = identity([leaves[i] for i in inexact])
    for i, leaf in zip(inexact, averaging, strict=True):
        leaves[i] = leaf
    return structure.unflatten(leaves)
