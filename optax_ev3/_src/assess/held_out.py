"""Assessment on held-out arrays that stay on the device."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from optax_ev3._src.assess.chunks import part
from optax_ev3._src.base import callbacks, checks, control, sharding

# More examples could not be walked through in 32-bit numbers, see _split.
_MOST_SHUFFLED = 2**26
# What every assess_fn may name: the caller's data need another name.
_SUPPLIED = ("key", "round", "run_key", "axis_name", "chunk", "chunks")


def held_out(
    metric_fn: Callable[..., Any],
    data: Any,
    batch_size: int | None = None,
    shuffle: bool = False,
) -> Callable[..., Any]:
    """An ``assess_fn`` that needs no argument: it draws its batches itself.

    For loops whose call of ``update`` cannot be changed, such as
    ``flax.training.train_state.TrainState.apply_gradients``. Where it can, ``data`` may
    be the name of one of its keywords, by which the loop passes all the data: arrays
    that are spread over several processes can be used in no other way, and large ones
    are no constants of the program then.

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
      data: Tree of arrays with the same leading size, which become constants of the
        compiled step; or the name of the argument of ``update`` that holds such a tree,
        ``tx.update(grads, state, params, NAME=...)``. In several processes they must be
        the same in all, which call this function at the same time.
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
        ``batch_size`` or more than 2**26 examples; if ``data`` is spread over several
        processes, or differs between them; at trace time, if the shuffled batches of
        all devices are more than ``data``, and all that is known of data given by name.

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

      The same, with data that the loop passes:

      >>> assess_fn = optax_ev3.held_out(score, "held", batch_size=16)
      >>> tx = optax_ev3.ev3([optax.sgd(0.1)], assess_fn)
      >>> updates, state = tx.update(jnp.array(-2.0), tx.init(w), w, held=(x, 3 * x))
      >>> print(f"{optax.apply_updates(w, updates):.1f}")
      0.2
    """
    callbacks.check_callback(metric_fn, "metric_fn")
    source = _source(data, _checked_batch_size(batch_size, shuffle), shuffle)
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
        batch, draw = source(extra_args)
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
        if rows is not None:
            batch = jax.tree.map(lambda array: sharding.take(array, rows), batch)
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


def _source(
    data: Any, batch_size: int | None, shuffle: bool
) -> Callable[[Mapping[str, Any]], tuple[Any, _Draw]]:
    """A function of the extra arguments: all examples, and how to draw from them."""
    if isinstance(data, str):
        _check_name(data)
        return functools.partial(_passed, data, batch_size, shuffle)
    held = _drawn_from(data, "data", batch_size, shuffle)
    _check_processes(held[0])
    return lambda extra_args: held


def _passed(
    name: str, batch_size: int | None, shuffle: bool, extra_args: Mapping[str, Any]
) -> tuple[Any, _Draw]:
    """The data that the caller passes by this name."""
    if name not in extra_args:
        raise TypeError(
            f"held_out draws from {name!r}, which update was not given: "
            f"tx.update(grads, state, params, {name}=...). Extra arguments given: "
            f"{sorted(extra_args) or 'none'}."
        )
    return _drawn_from(extra_args[name], name, batch_size, shuffle)


def _drawn_from(
    data: Any, what: str, batch_size: int | None, shuffle: bool
) -> tuple[Any, _Draw]:
    """The data as arrays, and how to draw from them; raises if that is impossible."""
    data = tree_map_with_path(functools.partial(_numbers, what), data)
    size = _leading_size(data, what)
    if batch_size is not None and not 1 <= batch_size <= size:
        raise ValueError(
            f"batch_size must be between 1 and the {size} examples of {what}, got "
            f"{batch_size}."
        )
    if shuffle and size > _MOST_SHUFFLED:
        raise ValueError(
            f"shuffle takes at most {_MOST_SHUFFLED} examples, {what} has {size}."
        )
    return data, _Draw(size, batch_size, shuffle)


def _check_name(name: str) -> None:
    if not name.isidentifier() or name in _SUPPLIED:
        raise ValueError(
            f"data must be a tree of arrays, or the name of an argument of update, "
            f"other than {', '.join(_SUPPLIED)}, which are supplied; got {name!r}."
        )


def _check_processes(data: Any) -> None:
    """Raises unless the data can be a constant of the program of every process."""
    if control.is_traced(data) or jax.process_count() == 1:
        return
    checksum = hashlib.sha256()
    for path, leaf in tree_leaves_with_path(data):
        if not leaf.is_fully_addressable:
            raise ValueError(
                f"data{keystr(path)}, {leaf.dtype}{list(leaf.shape)}, is spread over "
                f"several processes: no program may hold it. Name an argument, and "
                f'pass it there: held_out(metric_fn, "held", ...), '
                f"tx.update(grads, state, params, held=data)."
            )
        checksum.update(f"{keystr(path)}{leaf.dtype}{leaf.shape}".encode())
        checksum.update(np.asarray(leaf).tobytes())
    size = jax.tree.leaves(data)[0].shape[0]
    mine = np.append(np.frombuffer(checksum.digest(), np.uint8), np.uint32(size))
    every = multihost_utils.process_allgather(mine)
    others = np.flatnonzero((every != every[:1]).any(axis=1))
    if len(others):
        raise ValueError(
            f"data must be the same in all processes, those {others.tolist()} have "
            f"other data than process 0; the numbers of examples are "
            f"{every[:, -1].tolist()}. Where each process has a part, make global "
            f"arrays of the parts (jax.make_array_from_process_local_data), name an "
            f'argument, held_out(metric_fn, "held", ...), and pass them there: '
            f"tx.update(grads, state, params, held=data)."
        )


def _numbers(what: str, path: tuple[Any, ...], leaf: Any) -> jax.Array:
    try:
        return jnp.asarray(leaf)
    except TypeError as error:
        raise TypeError(
            f"{what} must hold arrays of numbers, got {_kind(leaf)} at {what}"
            f"{keystr(path)}: bring text and categories into numbers first."
        ) from error


def _kind(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return type(leaf).__name__ if dtype is None else f"dtype {dtype}"


def _checked_batch_size(batch_size: Any, shuffle: bool) -> int | None:
    if batch_size is not None:
        return checks.integer(batch_size, "batch_size", expected="an integer or None")
    if shuffle:
        raise ValueError(
            "shuffle needs a batch_size: without one every round uses all of data."
        )
    return None


def _leading_size(data: Any, what: str) -> int:
    leaves = jax.tree.leaves(data)
    shapes = [leaf.shape for leaf in leaves]
    if not leaves or any(len(shape) == 0 for shape in shapes):
        raise ValueError(
            f"{what} must hold arrays whose first axis runs over the examples, got "
            f"shapes {shapes}."
        )
    sizes = {shape[0] for shape in shapes}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            f"the arrays of {what} must have one leading size, at least 1, got shapes "
            f"{shapes}."
        )
    return sizes.pop()
