"""PRNG keys of the transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_ev3._src.base import trees
from optax_ev3._src.base.states import EV3State


class Keys(NamedTuple):
    """PRNG keys; under an axis every device has its own to assess and for losses.

    Attributes:
      assess: Of this round, for the assessment.
      rule: Of this round, for the rule and what follows from its decision.
      resample: Of this round, for resamples of the examples.
      loss: Of this call, for losses.
      run: The same at all times.
    """

    assess: jax.Array
    rule: jax.Array
    resample: jax.Array
    loss: jax.Array
    run: jax.Array


def split(state: EV3State, key_impl: Any, axis_name: Any) -> Keys:
    """The keys of a call."""
    key = jax.random.wrap_key_data(state.ev3_key, impl=key_impl)
    assess_key, rule_key = jax.random.split(jax.random.fold_in(key, state.ev3_round))
    rule_key, resample_key = jax.random.split(rule_key)
    # Rounds count from the front, calls from the back: no key is used twice. No number
    # is left for the run: its key is a third one of the first round.
    loss_key = jax.random.fold_in(key, -1 - state.ev3_calls)
    run_key = jax.random.fold_in(jax.random.fold_in(key, 0), 2)
    if axis_name is not None:
        device = lax.axis_index(axis_name)
        assess_key = jax.random.fold_in(assess_key, device)
        loss_key = jax.random.fold_in(loss_key, device)
    return Keys(assess_key, rule_key, resample_key, loss_key, run_key)


def typed(key: Any) -> jax.Array:
    """A typed PRNG key from a seed, a typed or a raw key."""
    if trees.is_key(key):
        return key
    if jnp.ndim(key) == 1:
        return jax.random.wrap_key_data(key)
    return jax.random.key(key)


def check(key: Any) -> Any:
    """The PRNG implementation of ``key``, None for the default."""
    if trees.is_key(key) and key.ndim == 0:
        return jax.random.key_impl(key)
    is_integer = not isinstance(key, bool) and isinstance(key, int | jax.Array)
    is_integer = is_integer or hasattr(key, "__index__")
    if is_integer and jnp.issubdtype(jnp.result_type(key), jnp.integer):
        raw = jnp.ndim(key) == 1 and jnp.result_type(key) == jnp.uint32
        if raw:
            _check_key_data(key)
        if jnp.ndim(key) == 0 or raw:
            return None
    raise TypeError(f"key must be an integer seed or a single PRNG key, got {key!r}.")


def _check_key_data(data: Any):
    """Raises unless raw key data may be of the default implementation."""
    try:
        jax.eval_shape(jax.random.wrap_key_data, data)
    except (TypeError, ValueError) as error:
        default = jax.random.key_impl(jax.random.key(0))
        raise ValueError(
            f"key is raw data of shape {jnp.shape(data)}, and the default PRNG "
            f"implementation, {default}, has keys of another: "
            f"give a typed key, jax.random.wrap_key_data(key, impl=...)."
        ) from error
