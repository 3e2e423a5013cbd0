"""Metrics that are no mean of one score for each example.

Each is a pure function ``metric(outputs, weights)`` -> ``[]`` float32, the higher the
better. Weights say how often each example counts: ones, or how often a bootstrap
sample drew it. What does not depend on them, such as sorting, is done once under
``jax.vmap`` over the weights alone.

Dimensions: ``n`` examples.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_ev3._src.base import checks

Metric = Callable[[Any, Any], jax.Array]


def f1(outputs: Any, weights: Any, *, positive: int = 1) -> jax.Array:
    r"""F1 score of one class, the harmonic mean of its precision and recall.

    .. math:: F_1 = \frac{2\,\mathrm{TP}}{2\,\mathrm{TP} + \mathrm{FP} + \mathrm{FN}}

    Args:
      outputs: (predictions, labels), both ``[n]`` integer or boolean.
      weights: ``[n]``, not negative.
      positive: The label of the class.

    Returns:
      ``[]`` float32 from 0 to 1; 0 where the class is neither predicted nor present.

    Raises:
      TypeError: If an argument is of the wrong kind, such as predictions that are
        probabilities.
      ValueError: If shapes are not as above.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import metrics
      >>> predictions, labels = jnp.array([1, 1, 0, 0]), jnp.array([1, 0, 1, 0])
      >>> print(metrics.f1((predictions, labels), jnp.ones([4])))
      0.5
      >>> print(metrics.f1((predictions, labels), jnp.array([2, 1, 1, 5])))
      0.6666667
    """
    predictions, labels = _pair(outputs, "(predictions [n], labels [n])")
    predictions, labels = _classes(predictions, "predictions"), _classes(labels)
    weights = _weights(weights, predictions=predictions, labels=labels)
    positive = checks.integer(positive, "positive")
    return _f1(predictions == positive, labels == positive, weights)


def macro_f1(classes: int) -> Metric:
    """Mean of the F1 scores of all classes, see :func:`f1`.

    Args:
      classes: How many; the labels are 0 to ``classes - 1``. Others belong to none of
        them: a wrong prediction counts all the same.

    Returns:
      ``metric(outputs, weights)``, whose ``outputs`` are (predictions, labels), both
      ``[n]`` integer or boolean. It takes memory for ``n * classes`` numbers.

    Raises:
      TypeError: If ``classes`` is no integer; at trace time as :func:`f1`.
      ValueError: If ``classes`` is below 2; at trace time as :func:`f1`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import metrics
      >>> predictions, labels = jnp.array([0, 1, 1, 2]), jnp.array([0, 1, 2, 1])
      >>> print(metrics.macro_f1(3)((predictions, labels), jnp.ones([4])))
      0.5
    """
    checks.integer(classes, "classes", 2)
    names = np.arange(classes, dtype=np.int32)[None]

    def metric(outputs: Any, weights: Any) -> jax.Array:
        predictions, labels = _pair(outputs, "(predictions [n], labels [n])")
        predictions, labels = _classes(predictions, "predictions"), _classes(labels)
        weights = _weights(weights, predictions=predictions, labels=labels)
        return _f1(
            predictions[:, None] == names, labels[:, None] == names, weights
        ).mean()

    return metric


def roc_auc(outputs: Any, weights: Any) -> jax.Array:
    """Area under the ROC curve.

    The weight of the pairs of a positive and a negative example in which the positive
    one has the higher score, as a part of all such pairs; equal scores count half.

    Args:
      outputs: (scores, labels): ``[n]`` real, and ``[n]`` integer or boolean, 1 for
        positive examples and 0 for negative ones.
      weights: ``[n]``, not negative.

    Returns:
      ``[]`` float32 from 0 to 1; 0.5, which says nothing, where one of the classes has
      no weight; NaN where any score is NaN.

    Raises:
      TypeError: If an argument is of the wrong kind, such as labels that are floats.
      ValueError: If shapes are not as above.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import metrics
      >>> scores, labels = jnp.array([0.1, 0.4, 0.4, 0.8]), jnp.array([0, 0, 1, 1])
      >>> print(metrics.roc_auc((scores, labels), jnp.ones([4])))
      0.875
    """
    scores, labels = _pair(outputs, "(scores [n], labels [n])")
    scores, labels = _real(scores, "scores", 1), _classes(labels)
    weights = _weights(weights, scores=scores, labels=labels)
    order = jnp.argsort(scores)
    ranked = scores[order]
    first = jnp.searchsorted(ranked, ranked, side="left")
    after = jnp.searchsorted(ranked, ranked, side="right")
    weights, positive = weights[order], (labels == 1)[order]
    negatives = jnp.cumsum(jnp.where(positive, 0, weights))
    below = jnp.concatenate([jnp.zeros([1], jnp.float32), negatives])
    beaten = (below[first] + below[after]) / 2
    positives = jnp.where(positive, weights, 0)
    # Divided one after the other: the number of pairs may be beyond all floats.
    part = (positives * _divide(beaten, below[-1])).sum()
    both = (below[-1] > 0) & (positives.sum() > 0)
    area = jnp.where(both, _divide(part, positives.sum()), 0.5)
    return jnp.where(jnp.isnan(ranked[-1]), jnp.nan, area)


def expected_calibration_error(bins: int = 15) -> Metric:
    r"""Minus the expected calibration error of the predicted classes.

    Examples are put into bins of equal width by their confidence, the probability of
    the class that is predicted; with :math:`W_b` the weight of bin b, (0, 1/B] the
    first,

    .. math:: -\mathrm{ECE}
              = -\sum_b \frac{W_b}{W} |\mathrm{accuracy}_b - \mathrm{confidence}_b|.

    The error of few examples is too large on average, and more so with many bins:
    compare it on samples of the same size.

    Args:
      bins: How many.

    Returns:
      ``metric(outputs, weights)``, whose ``outputs`` are (probabilities, labels):
      ``[n, classes]`` real, and ``[n]`` integer or boolean. It is 0 where there is no
      weight, and NaN where any probability is NaN.

    Raises:
      TypeError: If ``bins`` is no integer; at trace time, if an argument is of the
        wrong kind.
      ValueError: If ``bins`` is below 1; at trace time, if shapes are not as above.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import metrics
      >>> probabilities = jnp.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
      >>> labels = jnp.array([0, 0, 1, 0])
      >>> metric = metrics.expected_calibration_error(bins=10)
      >>> print(f"{metric((probabilities, labels), jnp.ones([4])):.2f}")
      -0.20

    References:
      Guo et al., `On Calibration of Modern Neural Networks
      <https://arxiv.org/abs/1706.04599>`_, 2017.
    """
    checks.integer(bins, "bins", 1)
    edges = np.linspace(0, 1, bins + 1, dtype=np.float32)
    # Rounding may bring a probability a little above 1.
    edges[0], edges[-1] = -np.inf, np.inf

    def metric(outputs: Any, weights: Any) -> jax.Array:
        probabilities, labels = _pair(
            outputs, "(probabilities [n, classes], labels [n])"
        )
        probabilities = _real(probabilities, "probabilities", 2)
        labels = _classes(labels)
        weights = _weights(weights, probabilities=probabilities, labels=labels)
        confidence = probabilities.max(axis=1).astype(jnp.float32)
        surplus = (probabilities.argmax(axis=1) == labels) - confidence
        above = confidence[:, None] > edges[None]
        inside = above[:, :-1] & ~above[:, 1:]
        surplus = jnp.where(inside, surplus[:, None], 0)
        error = jnp.abs(_total(weights, surplus)).sum()
        error = _divide(error, weights.sum())
        return jnp.where(jnp.isnan(confidence).any(), jnp.nan, -error)

    return metric


def _f1(predicted: jax.Array, present: jax.Array, weights: jax.Array) -> jax.Array:
    """F1 of the columns of ``[n, ...]`` bool: is it predicted, is it present?"""
    hits = _total(weights, predicted & present)
    either = _total(
        weights, predicted.astype(jnp.float32) + present.astype(jnp.float32)
    )
    return _divide(2 * hits, either)


def _total(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Weighted sum over the examples; exact for counts, also where GPUs would round."""
    return jnp.dot(weights, values.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def _divide(part: jax.Array, whole: jax.Array) -> jax.Array:
    """The quotient; 0 where the whole is not positive."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


def _pair(outputs: Any, form: str) -> Any:
    if not isinstance(outputs, tuple | list):
        raise TypeError(f"outputs must be {form}, got {type(outputs).__name__}.")
    if len(outputs) != 2:
        raise ValueError(f"outputs must be {form}, got {len(outputs)} things.")
    return outputs


def _classes(values: Any, what: str = "labels") -> jax.Array:
    """``[n]``, int32 at the least, so that any label can be compared with them."""
    values = jnp.asarray(values)
    if not (jnp.issubdtype(values.dtype, jnp.integer) or values.dtype == jnp.bool_):
        raise TypeError(
            f"{what} must be classes, integer or boolean, got dtype {values.dtype}."
        )
    if values.ndim != 1:
        raise ValueError(f"{what} must have shape [n], got shape {values.shape}.")
    return values if values.dtype.itemsize >= 4 else values.astype(jnp.int32)


def _real(values: Any, what: str, ndim: int) -> jax.Array:
    values = jnp.asarray(values)
    _check_real(values, what)
    if values.ndim != ndim or values.shape[1:] == (1,):
        form = "[n]" if ndim == 1 else "[n, classes], at least two classes"
        raise ValueError(f"{what} must have shape {form}, got shape {values.shape}.")
    return values


def _weights(weights: Any, **arrays: jax.Array) -> jax.Array:
    """``[n]`` float32; raises unless all arrays hold the same n examples."""
    weights = jnp.asarray(weights)
    _check_real(weights, "weights")
    if weights.ndim != 1:
        raise ValueError(f"weights must have shape [n], got shape {weights.shape}.")
    sizes = {name: x.shape[0] for name, x in arrays.items()}
    sizes["weights"] = weights.shape[0]
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(f"expected n examples, at least 1, everywhere, got {sizes}.")
    return weights.astype(jnp.float32)


def _check_real(values: jax.Array, what: str) -> None:
    number = jnp.issubdtype(values.dtype, jnp.number) or values.dtype == jnp.bool_
    if not number or jnp.iscomplexobj(values):
        raise TypeError(f"{what} must be real numbers, got dtype {values.dtype}.")
