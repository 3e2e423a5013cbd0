"""Assessment on held-out arrays that stay on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import keystr, tree_map_with_path

from optax_ev3._src.assess.chunks import part
from optax_ev3._src.base import callbacks, checks, control, sharding

# More examples could not be walked through in 32-bit numbers, see _split.
_MOST_SHUFFLED = 2**26


def held_out(
    metric_fn: Callable[..., Any],
    data: Any,
    batch_size: int | None = None,
    shuffle: bool = False,
) -> Callable[..., Any]:
    """An ``assess_fn`` that needs no argument: it draws its batches itself.

    For loops whose call of ``update`` cannot be changed, such as
    ``flax.training.train_state.TrainState.apply_gradients``.

    Every round draws examples independently, with replacement, so that the mean
    score of a batch estimates the mean over ``data`` without bias and its standard
    error is the textbook one. All candidates of a round see the same batch. Under
    ``axis_name`` every device draws examples of its own.

    With ``shuffle`` rounds walk through ``data`` in epochs, each in a new random order
    without replacement: after any number of rounds, how often two examples were used
    differs by at most one. Where ``batch_size`` does not divide the number of examples,
    a batch takes the last ones of an epoch and the first ones of the next, and may hold
    an example twice. Under ``axis_name`` the devices, which must all have the same
    ``data``, take turns in one walk: their batches of a round have no example in
    common, unless an epoch ends in it. The mean score is unbiased, too; standard
    errors, which take the examples for independent draws, are slightly larger than the
    true errors of estimating the mean over ``data``. Each round sorts as many random
    numbers as there are examples. The walk follows ``round`` and ``run_key``, see
    ``assess_fn`` in :func:`optax_ev3.ev3`; as everywhere, those that the caller passes
    to ``update`` come first.

    Args:
      metric_fn: ``metric_fn(params, batch, **named)`` -> scores, higher is better, see
        ``assess_fn`` in :func:`optax_ev3.ev3`. ``batch`` has the structure of ``data``,
        whatever the caller calls by this name; further parameters are named arguments,
        as everywhere.
      data: Tree of arrays with the same leading size. They become constants of the
        compiled step.
      batch_size: Examples drawn each round, on each device; None for all of ``data``
        each round, which makes selection greedier.
      shuffle: Whether every example is used equally often.

    Returns:
      A function for the ``assess_fn`` argument of :func:`optax_ev3.ev3`.

    Raises:
      TypeError: If ``metric_fn`` is not callable with ``(params, batch)``, ``data``
        holds something else than numbers, or ``batch_size`` is no integer.
      ValueError: If ``data`` is empty or of unequal leading sizes, ``batch_size``
        is not between 1 and the number of examples, or ``shuffle`` has no
        ``batch_size`` or more than 2**26 examples; at trace time, if the shuffled
        batches of all devices are more than ``data``.

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
    callbacks.check_callback(metric_fn, "metric_fn")
    data = tree_map_with_path(_numbers, data)
    size = _leading_size(data)
    draw = _Draw(size, _checked_size(batch_size, size, shuffle), shuffle)
    try:
        callbacks.signature(metric_fn).bind_partial("params", "batch")
    except TypeError as error:
        raise TypeError(
            "metric_fn must take (params, batch), where batch has the structure of "
            "data, as its first two positional arguments; its signature is "
            f"{callbacks.shown(metric_fn)}."
        ) from error

    def assess_fn(
        params: Any,
        *,
        key: jax.Array,
        round: Any = None,
        run_key: jax.Array | None = None,
        axis_name: Any = None,
        chunk: Any = None,
        chunks: Any = None,
        **extra_args: Any,
    ) -> Any:
        which = None
        if chunk is not None and chunks is not None:
            which = chunk, chunks
        else:  # The caller's, for the metric: in_chunks supplies both.
            theirs = {"chunk": chunk, "chunks": chunks}
            extra_args |= {k: v for k, v in theirs.items() if v is not None}
        draw_key, metric_key = jax.random.split(key)
        rows = draw.rows(draw_key, round, run_key, axis_name, which is not None)
        if which is not None:
            rows = part(rows, *which, "the batch of held_out")
            metric_key = jax.random.fold_in(metric_key, which[0])
        batch = data
        if rows is not None:
            batch = jax.tree.map(lambda array: sharding.take(array, rows), data)
        offered = {
            "key": metric_key,
            "round": round,
            "run_key": run_key,
            "axis_name": axis_name,
        }
        bound = callbacks.bind(
            metric_fn, "metric_fn", extra_args, offered, positional=2
        )
        return bound(params, batch)

    vars(assess_fn)["ev3_metric_fn"] = metric_fn
    return assess_fn


class _Draw(NamedTuple):
    """How a round chooses its examples.

    Attributes:
      size: How many examples there are.
      batch_size: How many are drawn, on each device; None for all.
      shuffle: Whether rounds walk through all of them.
    """

    size: int
    batch_size: int | None
    shuffle: bool

    def rows(
        self, key: jax.Array, round: Any, run_key: Any, axis_name: Any, in_chunks: bool
    ) -> jax.Array | None:
        """Rows of the data, ``[batch_size]`` int32; None for all in their order."""
        if self.batch_size is None:
            # In random order: what comes first must be like the rest.
            return jax.random.permutation(key, self.size) if in_chunks else None
        if self.shuffle:
            return _walk(run_key, round, self.batch_size, self.size, axis_name)
        return jax.random.randint(key, (self.batch_size,), 0, self.size)


def _walk(
    key: jax.Array | None, round: Any, batch_size: int, size: int, axis_name: Any
) -> jax.Array:
    """Rows of this device's batch of a round: ``[batch_size]`` int32.

    The walk goes through one random order of the data after the other; the devices'
    batches of a round come one after the other.
    """
    if key is None or round is None:
        raise TypeError(
            "with shuffle=True this assess_fn needs the round and the run_key that ev3 "
            "supplies: a function around it must take both, and pass them on."
        )
    devices, device = 1, 0
    if axis_name is not None:
        devices, device = lax.psum(1, axis_name), lax.axis_index(axis_name)
    if devices * batch_size > size:
        raise ValueError(
            f"{devices} devices with shuffled batches of {batch_size} need more than "
            f"the {size} examples of data."
        )
    epoch, start = _split(round, devices * batch_size, size)
    start += device * batch_size
    epoch, start = epoch + start // size, start % size

    def order(epoch: Any) -> jax.Array:
        # Ties among 32 random bits are too few to matter, and so is their order.
        return jnp.argsort(jax.random.bits(jax.random.fold_in(key, epoch), [size]))

    def within() -> jax.Array:
        return lax.dynamic_slice(order(epoch), [start], [batch_size])

    def across() -> jax.Array:
        both = jnp.concatenate([order(epoch), order(epoch + 1)])
        return lax.dynamic_slice(both, [start], [batch_size])

    return control.cond(start + batch_size > size, across, within)


def _split(count: Any, step: int, size: int) -> tuple[jax.Array, jax.Array]:
    """``divmod(count * step, size)`` where the product may be beyond 32 bits.

    Args:
      count: ``[]`` int32, not negative.
      step: Python integer of at most ``size``.
      size: Python integer of at most 2**26: the sum of 31 remainders is an int32.
    """
    parts = [divmod(step << bit, size) for bit in range(31)]
    whole, rest = np.array(parts, np.int32).T
    bits = (jnp.asarray(count, jnp.int32) >> np.arange(31, dtype=np.int32)) & 1
    total = (bits * rest).sum(dtype=jnp.int32)
    return (bits * whole).sum(dtype=jnp.int32) + total // size, total % size


def _numbers(path: tuple[Any, ...], leaf: Any) -> jax.Array:
    try:
        return jnp.asarray(leaf)
    except TypeError as error:
        raise TypeError(
            f"data must hold arrays of numbers, got {_kind(leaf)} at data"
            f"{keystr(path)}: bring text and categories into numbers first."
        ) from error


def _kind(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return type(leaf).__name__ if dtype is None else f"dtype {dtype}"


def _checked_size(batch_size: Any, size: int, shuffle: bool) -> int | None:
    if batch_size is None:
        if shuffle:
            raise ValueError(
                "shuffle needs a batch_size: without one every round uses all of data."
            )
        return None
    batch_size = checks.integer(batch_size, "batch_size", expected="an integer or None")
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"batch_size must be between 1 and the {size} examples of data, got "
            f"{batch_size}."
        )
    if shuffle and size > _MOST_SHUFFLED:
        raise ValueError(
            f"shuffle takes at most {_MOST_SHUFFLED} examples, data has {size}."
        )
    return batch_size


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
