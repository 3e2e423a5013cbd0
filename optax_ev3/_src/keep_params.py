"""Parameters that stay in the state, for loops that do not pass them."""

from typing import Any, NamedTuple

import jax
import optax

from optax_ev3._src.base import trees


class KeptParams(NamedTuple):
    """State of :func:`keep_params`.

    Attributes:
      kept_params: The parameters, as they are after the last update.
      inner_state: State of the transformation.
    """

    kept_params: Any
    inner_state: Any


def keep_params(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """For loops that call ``tx.update(grads, state)``: the state holds the parameters.

    The loop must apply the updates as they are, as by ``optax.apply_updates``, and
    change the parameters in no other way. What it passes as ``params`` all the same
    comes first.

    Args:
      tx: A transformation that needs parameters, such as :func:`optax_ev3.ev3`.

    Returns:
      A transformation that does not. Its state takes the memory of one more copy of
      the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> assess_fn = optax_ev3.held_out(lambda w, x: -((w - x) ** 2), jnp.ones(8))
      >>> tx = optax_ev3.keep_params(optax_ev3.ev3([optax.sgd(0.1)], assess_fn))
      >>> w = jnp.zeros([])
      >>> updates, state = tx.update(jnp.array(-2.0), tx.init(w))
      >>> print(f"{optax.apply_updates(w, updates):.1f}")
      0.2
    """
    inner = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> KeptParams:
        return KeptParams(jax.tree.map(trees.owned_copy, params), inner.init(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, KeptParams]:
        start: Any = state.kept_params if params is None else params
        updates, new = inner.update(updates, state.inner_state, start, **extra_args)
        moved = jax.tree.map(trees.owned_copy, optax.apply_updates(start, updates))
        return updates, KeptParams(moved, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
