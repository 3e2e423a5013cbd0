"""Minimize: an ``assess_fn`` of which lower is better."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax.numpy as jnp

from optax_ev3._src.assess import aggregate
from optax_ev3._src.assess.chunks import InChunks
from optax_ev3._src.base import callbacks


@overload
def minimize(assess_fn: InChunks, names: Sequence[str] | None = None) -> InChunks: ...


@overload
def minimize(
    assess_fn: Callable[..., Any], names: Sequence[str] | None = None
) -> Callable[..., Any]: ...


def minimize(
    assess_fn: Callable[..., Any] | InChunks, names: Sequence[str] | None = None
) -> Callable[..., Any] | InChunks:
    """Turns a loss or an error into scores, of which higher is better.

    EV3 adopts the candidate with the *highest* score. A loss as ``assess_fn`` would
    select the worst candidate; ``minimize(loss)`` selects the best.

    Real values are negated, and so they are in :func:`optax_ev3.summary` and
    :func:`optax_ev3.history`. Booleans, such as whether an example is classified
    wrongly, are inverted.

    Args:
      assess_fn: As for :func:`optax_ev3.ev3`, where lower is better; or a metric for
        :func:`optax_ev3.held_out`; or what :func:`optax_ev3.held_out`,
        :func:`optax_ev3.host_metric` or :func:`optax_ev3.in_chunks` return.
      names: The objectives of which lower is better, where ``assess_fn`` returns a
        mapping and they are not all.

    Returns:
      A function with the same signature, or chunks of such a function.

    Raises:
      TypeError: If ``assess_fn`` is not callable, or ``names`` no sequence of strings.
      ValueError: At trace time, if there is no objective of one of the names.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> def loss(w, x):
      ...     return (w - x) ** 2
      >>> inner = {"down": optax.sgd(0.1), "up": optax.sgd(-0.1)}
      >>> tx = optax_ev3.ev3(inner, optax_ev3.minimize(loss))
      >>> w, x = jnp.zeros([]), jnp.linspace(2.0, 4.0, 64)
      >>> updates, state = tx.update(jnp.array(-6.0), tx.init(w), w, x=x)
      >>> print(f"{optax.apply_updates(w, updates):.1f}")
      0.6

      Of several objectives, some may be losses:

      >>> def assess_fn(w, x):
      ...     return {"loss": loss(w, x), "above": w > x}
      >>> assess_fn = optax_ev3.minimize(assess_fn, names=["loss"])
    """
    if isinstance(assess_fn, InChunks):
        inside = minimize(assess_fn.assess_fn, names)
        return assess_fn._replace(assess_fn=inside)
    callbacks.check_callback(assess_fn, "assess_fn")
    if isinstance(names, str):
        raise TypeError(
            f"names must be a sequence, such as [{names!r}], got {names!r}."
        )
    wanted = None if names is None else tuple(names)

    # The signature says which arguments it is given.
    @functools.wraps(assess_fn, updated=())
    def scores(*args: Any, **kwargs: Any) -> Any:
        found = assess_fn(*args, **kwargs)
        if wanted is None and not isinstance(found, Mapping):
            return _negated(found)
        objectives = found if isinstance(found, Mapping) else {}
        missing = sorted(set(wanted or ()) - objectives.keys())
        if missing:
            raise ValueError(
                f"minimize is to negate the objectives {missing}, assess_fn returned "
                f"{sorted(objectives) or 'no mapping of objectives'}."
            )
        turned = objectives.keys() if wanted is None else wanted
        return {k: _negated(v) if k in turned else v for k, v in objectives.items()}

    return scores


def _negated(value: Any) -> Any:
    """Scores of the opposite order; other values stay, and are an error later."""
    if isinstance(value, aggregate.AggregateMetric):
        return dataclasses.replace(value, lower_is_better=not value.lower_is_better)
    if not hasattr(value, "dtype") and not isinstance(value, int | float):
        return value
    array = jnp.asarray(value)
    return ~array if array.dtype == bool else -array
