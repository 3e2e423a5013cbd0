"""Assessment on held-out arrays that stay on the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_ev3._src import named


def held_out(
    metric_fn: Callable[..., Any], data: Any, batch_size: int | None = None
) -> Callable[..., Any]:
    """An ``assess_fn`` that needs no argument: it draws its batches itself.

    For loops whose call of ``update`` cannot be changed, such as
    ``flax.training.train_state.TrainState.apply_gradients``.

    Every round draws examples independently, with replacement, so that the mean
    score of a batch estimates the mean over ``data`` without bias and its standard
    error is the textbook one. All candidates of a round see the same batch. Under
    ``axis_name`` every device draws examples of its own.

    Args:
      metric_fn: ``metric_fn(params, batch, **named)`` -> scores, see ``assess_fn``
        in :func:`optax_ev3.ev3`. ``batch`` has the structure of ``data``; further
        parameters are named arguments, as everywhere.
      data: Tree of arrays with the same leading size. They become constants of the
        compiled step.
      batch_size: Examples drawn each round; None for all of ``data`` each round,
        which makes selection greedier.

    Returns:
      A function for the ``assess_fn`` argument of :func:`optax_ev3.ev3`.

    Raises:
      TypeError: If ``metric_fn`` is not callable with ``(params, batch)``, or
        ``batch_size`` is no integer.
      ValueError: If ``data`` is empty or of unequal leading sizes, or ``batch_size``
        is not between 1 and the number of examples.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> x = jnp.linspace(-1.0, 1.0, 64)
      >>> def score(w, batch):
      ...     x, y = batch
      ...     return -((w * x - y) ** 2)
      >>> assess_fn = optax_ev3.held_out(score, (x, 3 * x), batch_size=16)
      >>> tx = optax_ev3.ev3([optax.sgd(0.1)], assess_fn)
      >>> w = jnp.zeros([])
      >>> updates, state = tx.update(jnp.array(-2.0), tx.init(w), w)
      >>> print(f"{optax.apply_updates(w, updates):.1f}")
      0.2
    """
    named.check_callback(metric_fn, "metric_fn")
    data = jax.tree.map(jnp.asarray, data)
    size = _leading_size(data)
    if batch_size is not None and (
        isinstance(batch_size, bool) or not hasattr(batch_size, "__index__")
    ):
        raise TypeError(f"batch_size must be an integer or None, got {batch_size!r}.")
    if batch_size is not None and not 1 <= batch_size <= size:
        raise ValueError(
            f"batch_size must be between 1 and the {size} examples of data, got "
            f"{batch_size}."
        )
    if len(named.parameters_after(metric_fn, 1)) == len(
        named.parameters_after(metric_fn, 2)
    ):
        raise TypeError(
            "metric_fn must take (params, batch), where batch has the structure of "
            "data, as its first two positional arguments."
        )

    def assess_fn(params, *, key, **extra_args):
        draw_key, metric_key = jax.random.split(key)
        batch = data
        if batch_size is not None:
            rows = jax.random.randint(draw_key, (batch_size,), 0, size)
            batch = jax.tree.map(lambda array: array[rows], data)
        offered = {"key": metric_key}
        bound = named.bind(metric_fn, "metric_fn", extra_args, offered, positional=2)
        return bound(params, batch)

    return assess_fn


def _leading_size(data: Any) -> int:
    leaves = jax.tree.leaves(data)
    shapes = [leaf.shape for leaf in leaves]
    if not leaves or any(len(shape) == 0 for shape in shapes):
        raise ValueError(
            "data must hold arrays whose first axis runs over the examples, got "
            f"shapes {shapes}."
        )
    sizes = {shape[0] for shape in shapes}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            "the arrays of data must have one leading size, at least 1, got shapes "
            f"{shapes}."
        )
    return sizes.pop()
