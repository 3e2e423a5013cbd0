"""Metrics of all examples together, such as F-measures: no means of scores.

Dimensions: ``C`` candidates, ``N`` examples on all devices, ``B`` resamples.
"""

import dataclasses
import functools
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_ev3._src.base import callbacks, checks, control, statistics, trees
from optax_ev3._src.base.evidence import Resampled

# How many bytes of a traceback from the host all devices are told.
_TOLD = 2048


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["outputs"],
    meta_fields=["metric_fn", "samples", "on_host", "lower_is_better"],
)
@dataclasses.dataclass(frozen=True)
class AggregateMetric:
    """What an ``assess_fn`` returns where its metric is no mean over examples.

    The metric is computed on all examples, and on B bootstrap samples of them, the
    same for all candidates; their spread is its standard error. Examples of all
    devices are put together first.

    Attributes:
      metric_fn: ``metric_fn(outputs, weights)`` -> ``[]``, with the examples weighted
        by ``[N]`` float32: ones, or bootstrap counts. See :mod:`optax_ev3.metrics` for
        some.
      outputs: Tree of arrays ``[n, ...]``, such as predictions and labels. Candidates
        whose outputs hold a NaN are not adopted.
      samples: B; 0 for a value that counts as exact.
      on_host: Whether the metric is plain Python, called with NumPy arrays.
      lower_is_better: Whether the metric is an error, which EV3 negates; otherwise
        higher is better.

    Examples:
      >>> import jax.numpy as jnp, optax_ev3
      >>> from optax_ev3 import metrics
      >>> def assess_fn(w, x, y):
      ...     return metrics.AggregateMetric(metrics.roc_auc, (x @ w, y))
    """

    metric_fn: Callable[[Any, Any], Any]
    outputs: Any
    samples: int = 200
    on_host: bool = False
    lower_is_better: bool = False


def host_metric(
    predict_fn: Callable[..., Any], metric_fn: Callable[..., Any], samples: int = 0
) -> Callable[..., Any]:
    """An ``assess_fn`` whose metric is Python or NumPy, not JAX.

    Predictions are made on the device, for all candidates; then one call to the host
    (``jax.pure_callback``) computes the metric of each. That works under ``jit`` and
    ``scan``, and makes the device wait. What the metric raises ends the step, its
    message included; it is not asked about predictions that hold a NaN. Where the step
    runs on several devices, the metric is computed for the first of them, whose process
    calls it, and all get its values; what it raises is raised in all processes.

    Args:
      predict_fn: ``predict_fn(params, **named)`` -> tree of arrays ``[n, ...]``, all
        that the metric needs: predictions, labels.
      metric_fn: ``metric_fn(outputs)`` -> real number, higher is better (for an error
        see :func:`optax_ev3.minimize`); ``outputs`` are NumPy arrays of its own, which
        it may change. With ``samples``, ``metric_fn(outputs, weights)`` with
        ``weights`` ``[n]`` float32.
      samples: Bootstrap samples on which the metric is computed as well, so that its
        spread is known; 0 for none. The metric is called ``samples + 1`` times for
        each candidate.

    Returns:
      A function for the ``assess_fn`` argument of :func:`optax_ev3.ev3`.

    Raises:
      TypeError: If an argument is not callable as said.
      ValueError: If ``samples`` is 1 or negative.

    Examples:
      >>> import jax.numpy as jnp, numpy as np, optax, optax_ev3
      >>> def median_error(outputs):
      ...     predicted, wanted = outputs
      ...     return -np.median(np.abs(predicted - wanted))
      >>> x = jnp.linspace(-1.0, 1.0, 64)
      >>> assess_fn = optax_ev3.host_metric(lambda w: (w * x, 3 * x), median_error)
      >>> tx = optax_ev3.ev3([optax.sgd(0.1)], assess_fn)
      >>> w = jnp.zeros([])
      >>> updates, state = tx.update(jnp.array(-2.0), tx.init(w), w)
      >>> print(f"{optax.apply_updates(w, updates):.1f}")
      0.2
    """
    callbacks.check_callback(predict_fn, "predict_fn")
    if not callable(metric_fn):
        raise TypeError(f"metric_fn must be callable, got {metric_fn!r}.")
    _check_samples(samples)
    given = ["outputs", "weights"] if samples else ["outputs"]
    if not checks.takes(metric_fn, len(given)):
        raise TypeError(
            f"metric_fn must be callable as metric_fn({', '.join(given)}), which "
            f"samples={samples} asks for; its signature is "
            f"{callbacks.shown(metric_fn)}."
        )

    @functools.wraps(predict_fn)  # The signature says which arguments it is given.
    def assess_fn(*args: Any, **kwargs: Any) -> AggregateMetric:
        return AggregateMetric(
            metric_fn, predict_fn(*args, **kwargs), samples, on_host=True
        )

    return assess_fn


def check(what: str, metric: AggregateMetric) -> None:
    """Raises unless the metric can be computed; its outputs are shapes and dtypes."""
    if not callable(metric.metric_fn):
        raise TypeError(
            f"the metric_fn of {what} must be callable, got {metric.metric_fn!r}."
        )
    _check_samples(metric.samples)
    leaves = jax.tree.leaves(metric.outputs)
    shapes = [leaf.shape for leaf in leaves]
    if (
        not leaves
        or any(len(s) == 0 for s in shapes)
        or len({s[0] for s in shapes}) > 1
    ):
        raise ValueError(
            f"the outputs of {what} must be arrays with one leading size, the number "
            f"of examples, got shapes {shapes}."
        )
    if shapes[0][0] == 0:
        raise ValueError(f"the outputs of {what} hold no example: shapes {shapes}.")
    if metric.on_host:
        return
    weights = jax.ShapeDtypeStruct((shapes[0][0],), jnp.float32)
    value = jax.eval_shape(metric.metric_fn, metric.outputs, weights)
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", type(value))
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"the metric of {what} must return a real scalar, got shape {shape} of "
            f"{dtype}."
        )


def compute(
    metric: AggregateMetric, outputs: Any, key: jax.Array, axis_name: Any
) -> jax.Array | Resampled:
    """The metric of all candidates.

    Args:
      metric: What to compute; its outputs are not used.
      outputs: Those of all candidates, ``[C, n, ...]``.
      key: PRNG key of the bootstrap samples, the same on all devices.
      axis_name: Mapped axis over which the examples are spread, or None.

    Returns:
      ``[C]`` float32, higher is better, with ``[C, B]`` resamples if there are any;
      NaN for candidates whose outputs hold a NaN, whatever the metric makes of it.
    """
    if axis_name is not None:
        outputs = jax.tree.map(lambda x: trees.unite(x, axis_name, 1), outputs)
    n = jax.tree.leaves(outputs)[0].shape[1]
    weights = jnp.ones([1, n], jnp.float32)
    if metric.samples:
        counts = statistics.bootstrap_counts(key, metric.samples, n)
        weights = jnp.concatenate([weights, counts])
    if metric.on_host:
        values = _from_host(metric, outputs, weights, axis_name)
    else:

        def each_sample(mine: Any) -> jax.Array:
            return jax.vmap(lambda w: metric.metric_fn(mine, w))(weights)

        values = control.each_row(each_sample, outputs).astype(jnp.float32)
        values = jnp.where(jax.vmap(_broken)(outputs)[:, None], jnp.nan, values)
    if metric.lower_is_better:
        values = -values
    if not metric.samples:
        return values[:, 0]
    return Resampled(values[:, 0], values[:, 1:])


def _from_host(
    metric: AggregateMetric, outputs: Any, weights: jax.Array, axis_name: Any
) -> jax.Array:
    """``[C, 1 + B]`` float32 from one call to the host, the same on all devices."""
    shape = len(jax.tree.leaves(outputs)[0]), len(weights)
    values = jax.ShapeDtypeStruct(shape, jnp.float32)
    # A callback that raises on one device leaves the others waiting for its results,
    # until the program is aborted or for ever. So all are told, and raise the same.
    tells = control.is_traced(outputs) and jax.device_count() > 1
    text = jax.ShapeDtypeStruct((_TOLD if tells else 0,), jnp.uint8)

    def on_host(outputs: Any, weights: Any) -> tuple[np.ndarray, np.ndarray]:
        told = np.zeros(text.shape, np.uint8)
        try:
            return _on_host(metric, outputs, weights, shape), told
        except Exception:
            if not tells:
                raise
            last = traceback.format_exc().encode()[-_TOLD:]
            told[: len(last)] = np.frombuffer(last, np.uint8)
            return np.full(shape, np.nan, np.float32), told

    def call() -> Any:
        return jax.pure_callback(
            on_host, (values, text), outputs, weights, vmap_method="sequential"
        )

    if axis_name is None:
        found, told = call()
    else:
        found, told = _on_first_device(call, (values, text), axis_name)
    if tells:
        # Every device runs this one, on what it has of the arguments. The result of the
        # call is on the first device only, what is computed of it on all. A scalar
        # cannot be spread: a device may see a part of the text, but not miss the error.
        failed = (told != 0).any()
        told = jnp.where(failed, told, 0)
        jax.debug.callback(_raise, failed, told, partitioned=True)
    return found


def _on_first_device(call: Callable[[], Any], kinds: Any, axis_name: Any) -> Any:
    """What ``call`` returns on the first device of the mapped axis, on all of them."""
    place = lax.axis_index(axis_name)

    def first() -> Any:
        # It varies over devices, as the zeros do: shard_map wants both marked so.
        return jax.tree.map(lambda x: x + (0 * place).astype(x.dtype), call())

    def others() -> Any:
        return jax.tree.map(lambda x: jnp.full(x.shape, 0 * place, x.dtype), kinds)

    return lax.psum(control.cond(place == 0, first, others), axis_name)


def _raise(failed: Any, told: Any) -> None:
    """Raises what a metric on the host has raised, maybe in another process."""
    if failed:
        text = bytes(np.asarray(told, np.uint8)).strip(b"\0").decode(errors="replace")
        raise RuntimeError(f"a metric of host_metric failed.\n{text}")


def _on_host(
    metric: AggregateMetric, outputs: Any, weights: Any, shape: tuple[int, int]
) -> np.ndarray:
    """What a metric on the host returns: by candidate, and by row of weights."""
    outputs, weights = jax.tree.map(np.asarray, (outputs, weights))
    values = np.empty(shape, np.float32)
    for row in range(shape[0]):
        mine = jax.tree.map(lambda x, row=row: x[row], outputs)
        if _broken(mine, np):  # Many metrics raise, which would end the training.
            values[row] = np.nan
            continue
        for column in range(shape[1]):
            given = (mine, weights[column]) if metric.samples else (mine,)
            # Copies of its own: a metric may sort them in place.
            value = metric.metric_fn(*jax.tree.map(np.array, given))
            values[row, column] = _number(value, metric.metric_fn)
    return values


def _number(value: Any, metric_fn: Callable[..., Any]) -> float:
    """What a metric on the host returned, as a float."""
    try:
        array = np.asarray(value)
        if array.ndim == 0 and checks.is_array(array) and not np.iscomplexobj(array):
            return float(array)
    except ValueError:  # A list of lists of different lengths.
        pass
    shape = f" of shape {np.shape(value)}" if hasattr(value, "shape") else ""
    raise TypeError(
        f"the metric_fn {getattr(metric_fn, '__name__', metric_fn)!r} of host_metric "
        f"must return a real number, got {type(value).__name__}{shape}: {value!r}."
    )


def _broken(outputs: Any, xp: Any = jnp) -> Any:
    """Whether outputs hold a NaN."""
    leaves = jax.tree.leaves(outputs)
    real = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    return xp.stack([xp.zeros([], bool), *(xp.isnan(x).any() for x in real)]).any()


def _check_samples(samples: Any) -> None:
    if checks.integer(samples, "samples") == 1 or samples < 0:
        raise ValueError(
            f"samples must be 0, for none, or at least 2, for a spread; got {samples}."
        )
