"""Arguments of the transformation: checked, and brought to the form we use."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ev3._src.base import checks, trees
from optax_ev3._src.explore import averages as combine
from optax_ev3._src.explore import racing, trajectory

# Trajectories without a bound on their growth stop growing here, in calls.
_LONGEST = 2**24
_STATIC = "Inside optax.inject_hyperparams, list it among the static_args."


def plan(
    length: Any,
    growth: Any,
    longest: Any,
    gradients: Any,
    restart: Any,
    restart_state: Any,
    averages: tuple[combine.Average, ...],
    needs_loss: bool,
) -> trajectory.Plan:
    """Checks the arguments of ``ev3`` that say how trajectories go on.

    ``needs_loss`` says whether branches of their own gradients would need a loss_fn
    that is not there.
    """
    length = static_int(length, "trajectory_length")
    growth = static_float(growth, "trajectory_growth")
    if longest is not None:
        longest = static_int(longest, "max_trajectory_length")
        if longest < length:
            raise ValueError(
                f"max_trajectory_length must be at least trajectory_length, {length}, "
                f"got {longest}."
            )
    chosen = {
        "gradients": (gradients, trajectory.GRADIENTS),
        "restart": (restart, trajectory.RESTARTS),
        "restart_state": (restart_state, trajectory.RESTART_STATES),
    }
    for name, (value, choices) in chosen.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
    if gradients == "own" and needs_loss:
        raise ValueError(
            'gradients="own" needs a loss_fn: branches differentiate it at their own '
            "parameters."
        )
    if gradients == "turns" and restart != "always":
        raise ValueError(
            f'gradients="turns" lets all branches start from the same place, which '
            f'needs restart="always", got {restart!r}.'
        )
    return trajectory.Plan(
        length=length,
        growth=growth,
        longest=_LONGEST if longest is None else longest,
        gradients=gradients,
        restart=restart,
        restart_state=restart_state,
        averages=averages,
    )


def check_race(race: Any, plan: trajectory.Plan) -> None:
    """Raises unless ``race`` is one that goes with the plan, or None."""
    if race is None:
        return
    if not isinstance(race, racing.Racing):
        patience = race if isinstance(race, int) else 2
        raise TypeError(
            f"race must be None or optax_ev3.explore.Racing(patience={patience}), got "
            f"{race!r} of type {type(race).__name__}."
        )
    if plan.gradients == "turns":
        raise ValueError(
            'race cannot be used with gradients="turns", where each branch has its '
            "calls."
        )


def typed_key(key: Any) -> jax.Array:
    """A typed PRNG key from a seed, a typed or a raw key."""
    if trees.is_key(key):
        return key
    if jnp.ndim(key) == 1:
        return jax.random.wrap_key_data(key)
    return jax.random.key(key)


def check_key(key: Any) -> Any:
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


def _check_key_data(data):
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


def static_float(value: Any, name: str) -> float:
    """A finite Python float of at least 1."""
    try:
        number = checks.real(value, name, "a Python float")
    except TypeError as error:
        raise TypeError(f"{error} {_STATIC}") from error
    if not 1 <= number < float("inf"):
        raise ValueError(f"{name} must be at least 1 and finite, got {number}.")
    return number


def static_int(value: Any, name: str) -> int:
    """A Python integer of at least 1."""
    try:
        return checks.integer(value, name, 1, "a Python integer")
    except TypeError as error:
        raise TypeError(f"{error} {_STATIC}") from error
