"""Metrics against scikit-learn and NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import x64
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from optax_ev3 import metrics

CLASSES = 4
SIZES = [1, 2, 7, 30]  # Few shapes: each is compiled anew.


def ones(n):
    return jnp.ones([n])


def calibration(outputs, weights, bins):
    """Minus the calibration error, one example after the other."""
    probabilities, labels = (np.asarray(x, np.float64) for x in outputs)
    edges = np.linspace(0, 1, bins + 1, dtype=np.float32)
    accuracy, confidence = np.zeros(bins), np.zeros(bins)
    for row, label, weight in zip(probabilities, labels, weights, strict=True):
        best = int(np.argmax(row))
        at = next(b for b in range(bins) if row[best] <= edges[b + 1] or b == bins - 1)
        accuracy[at] += weight * (best == label)
        confidence[at] += weight * row[best]
    return -np.abs(accuracy - confidence).sum() / max(np.sum(weights), 1e-30)


def area(outputs, weights):
    scores, labels = outputs
    weights = np.asarray(weights, np.float64)
    if not (weights[labels == 1].any() and weights[labels == 0].any()):
        return 0.5
    return roc_auc_score(labels, scores, sample_weight=weights)


def harmonic(outputs, weights, **kwargs):
    predictions, labels = map(np.asarray, outputs)
    weights = np.asarray(weights, np.float64)
    if not weights.any():
        return 0.0  # Scikit-learn raises.
    return f1_score(labels, predictions, sample_weight=weights, **kwargs)


def macro(outputs, weights):
    labels = list(range(CLASSES))
    kwargs = {"average": "macro", "labels": labels, "zero_division": 0}
    return harmonic(outputs, weights, **kwargs)


# The metric, what it should be, and outputs for n examples.
CASES = {
    "f1": (
        metrics.f1,
        functools.partial(harmonic, zero_division=0),
        lambda rng, n: (rng.integers(0, 2, n), rng.integers(0, 2, n)),
    ),
    "macro_f1": (
        metrics.macro_f1(CLASSES),
        macro,
        lambda rng, n: (rng.integers(0, CLASSES, n), rng.integers(0, CLASSES, n)),
    ),
    "roc_auc": (
        metrics.roc_auc,
        area,
        # Rounded, so that there are ties.
        lambda rng, n: (
            rng.normal(size=n).round(1).astype(np.float32),
            rng.integers(0, 2, n),
        ),
    ),
    "calibration": (
        metrics.expected_calibration_error(10),
        functools.partial(calibration, bins=10),
        lambda rng, n: (
            rng.dirichlet(np.ones(3), n).astype(np.float32),
            rng.integers(0, 3, n),
        ),
    ),
}
all_metrics = pytest.mark.parametrize("case", CASES)


def random_weights(rng, n, kind):
    drawn = rng.exponential(size=n)
    if kind == "counts":
        drawn = rng.poisson(1, n)
    if kind == "some zero":
        drawn *= rng.integers(0, 2, n)
    return np.float32(drawn * (kind != "zero"))


@all_metrics
@given(
    n=st.sampled_from(SIZES),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["any", "counts", "some zero", "zero"]),
)
@settings(deadline=None, max_examples=60)
def test_against_other_implementations(case, n, seed, kind):
    metric, expected, outputs = CASES[case]
    rng = np.random.default_rng(seed)
    outputs, weights = outputs(rng, n), random_weights(rng, n, kind)
    found = jax.jit(metric)(outputs, weights)
    assert found.shape == () and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected(outputs, weights), atol=1e-6)


@all_metrics
@pytest.mark.parametrize("kind", ["any", "counts"])
def test_many_examples(case, kind):
    metric, expected, outputs = CASES[case]
    rng = np.random.default_rng(0)
    outputs, weights = outputs(rng, 5000), random_weights(rng, 5000, kind)
    found = metric(outputs, weights)
    np.testing.assert_allclose(found, expected(outputs, weights), atol=1e-6)


@all_metrics
def test_counts_are_repeated_examples(case):
    metric, _, outputs = CASES[case]
    rng = np.random.default_rng(1)
    outputs, counts = outputs(rng, 50), rng.poisson(1, 50)
    repeated = tuple(np.repeat(x, counts, axis=0) for x in outputs)
    found = metric(outputs, counts)
    np.testing.assert_allclose(found, metric(repeated, ones(counts.sum())), atol=1e-6)
    masked = metric(outputs, counts > 0)
    kept = tuple(x[counts > 0] for x in outputs)
    np.testing.assert_allclose(masked, metric(kept, ones(len(kept[0]))), atol=1e-6)


@all_metrics
def test_only_proportions_of_weights_count(case):
    metric, _, outputs = CASES[case]
    rng = np.random.default_rng(2)
    outputs, weights = outputs(rng, 30), random_weights(rng, 30, "any")
    expected = metric(outputs, weights)
    for scale in (1e-25, 1e30):
        np.testing.assert_allclose(
            metric(outputs, np.float32(weights * scale)), expected, atol=1e-6
        )


@all_metrics
def test_under_jit_and_vmap_equals_a_loop(case):
    metric, _, outputs = CASES[case]
    rng = np.random.default_rng(3)
    outputs = [outputs(rng, 20) for _ in range(3)]
    counts = np.float32(rng.poisson(1, (5, 20)))
    resampled = jax.vmap(metric, (None, 0))
    found = jax.jit(resampled)(outputs[0], counts)
    np.testing.assert_allclose(
        found, [metric(outputs[0], row) for row in counts], atol=1e-6
    )
    stacked = tuple(map(jnp.stack, zip(*outputs, strict=True)))
    found = jax.jit(jax.vmap(resampled, (0, None)))(stacked, counts)
    loop = [[metric(one, row) for row in counts] for one in outputs]
    np.testing.assert_allclose(found, loop, atol=1e-6)


def test_scores_are_sorted_once_for_all_weights():
    outputs, weights = (ones(20), jnp.zeros([20], int)), jnp.ones([5, 20])
    traced = str(jax.make_jaxpr(jax.vmap(metrics.roc_auc, (None, 0)))(outputs, weights))
    (sorted_,) = re.findall(r"^.* = sort\[", traced, re.MULTILINE)
    assert re.findall(r":\w+(\[.*?\])", sorted_) == ["[20]", "[20]"]


@all_metrics
def test_with_64_bit_numbers(case):
    metric, expected, outputs = CASES[case]
    rng = np.random.default_rng(4)
    outputs, weights = outputs(rng, 20), rng.exponential(size=20)
    with x64():
        found = metric(jax.tree.map(jnp.asarray, outputs), jnp.asarray(weights))
        assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected(outputs, weights), atol=1e-6)


# F1.


@pytest.mark.parametrize("positive", [0, 1, 3, np.int64(2)])
def test_f1_of_a_class(positive):
    rng = np.random.default_rng(5)
    outputs = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
    weights = random_weights(rng, 50, "any")
    found = metrics.f1(outputs, weights, positive=positive)
    expected = harmonic(outputs, weights, labels=[positive], average="macro")
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_f1_of_kinds_of_integers():
    predictions, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 1, 0, 1])
    for first in (np.bool_, np.uint8, np.int32):
        for second in (np.bool_, np.int8, np.uint32):
            outputs = predictions.astype(first), labels.astype(second)
            assert float(metrics.f1(outputs, ones(5))) == pytest.approx(2 / 3)
    small = np.array([44, 300 - 256], np.uint8)
    assert float(metrics.f1((small, small), ones(2), positive=300)) == 0
    assert float(metrics.f1((small, small), ones(2), positive=44)) == 1


def test_macro_f1_of_labels_beyond_the_classes():
    outputs = np.array([0, 1, 9, 0]), np.array([0, 7, 1, -1])
    np.testing.assert_allclose(
        metrics.macro_f1(CLASSES)(outputs, ones(4)), macro(outputs, ones(4)), atol=1e-6
    )


# ROC.


def test_area_of_ties_and_extremes():
    labels = np.array([0, 0, 1, 1])
    for scores, expected in (
        ([0, 1, 2, 3], 1),
        ([3, 2, 1, 0], 0),
        ([5, 5, 5, 5], 0.5),
        ([-np.inf, 0.0, -0.0, np.inf], 0.875),
        ([0, 1, 1, np.nan], np.nan),
        ([np.nan, 1, 1, 2], np.nan),
    ):
        for dtype in (np.float32, np.float16, jnp.bfloat16):
            found = metrics.roc_auc((np.array(scores).astype(dtype), labels), ones(4))
            np.testing.assert_array_equal(found, np.float32(expected))
    whole = np.array([2**24, 2**24 + 1, 2**24 + 2, 2**24 + 3])  # One number in float32.
    assert float(metrics.roc_auc((whole, labels), ones(4))) == 1


@pytest.mark.parametrize("label", [0, 1])
def test_area_with_one_class_says_nothing(label):
    scores, labels = np.float32([1, 2, 3, 4]), np.array([0, 1, 0, 1])
    assert float(metrics.roc_auc((scores, np.full(4, label)), ones(4))) == 0.5
    weights = np.float32(labels == label)
    assert float(metrics.roc_auc((scores, labels), weights)) == 0.5


# Calibration.


def test_confidence_on_the_edges_of_bins():
    bins = 5
    top = np.linspace(0, 1, bins + 1, dtype=np.float32)[3:]
    top = np.concatenate([top, np.nextafter(top, 2), np.nextafter(top, 0)])
    outputs = np.stack([top, 1 - top], axis=1), np.arange(len(top)) % 2
    metric = metrics.expected_calibration_error(bins)
    rng = np.random.default_rng(6)
    for _ in range(5):
        weights = random_weights(rng, len(top), "any")
        expected = calibration(outputs, weights, bins)
        np.testing.assert_allclose(metric(outputs, weights), expected, atol=1e-6)


def test_one_bin_compares_the_means():
    probabilities = np.float32([[0.5, 0.5], [0.3, 0.7], [0.9, 0.1], [0.0, 1.0]])
    outputs = probabilities, np.array([0, 0, 1, 1])
    metric = metrics.expected_calibration_error(1)
    # The first of equal probabilities is predicted: right, wrong, wrong, right.
    np.testing.assert_allclose(metric(outputs, ones(4)), -(3.1 - 2) / 4, atol=1e-6)


def test_calibration_of_nan_is_nan():
    probabilities = np.float32([[0.5, 0.5], [0.3, np.nan]])
    metric = metrics.expected_calibration_error()
    assert np.isnan(metric((probabilities, np.array([0, 1])), ones(2)))


# Mistakes.

INTS, FLOATS, ROWS = jnp.zeros([4], int), jnp.zeros([4]), jnp.full([4, 2], 0.5)
auc, ece, macro3 = (
    metrics.roc_auc,
    metrics.expected_calibration_error(),
    metrics.macro_f1(3),
)
MISTAKES = {
    "one array": (metrics.f1, INTS, ones(4), (TypeError, "(predictions [n], ")),
    "three": (auc, (FLOATS, INTS, INTS), ones(4), (ValueError, "(scores [n]", "3")),
    "none": (ece, None, ones(4), (TypeError, "(probabilities [n, classes]", "None")),
    "f1 of probabilities": (
        metrics.f1,
        (FLOATS, INTS),
        ones(4),
        (TypeError, "predictions must be classes", "float32"),
    ),
    "macro of probabilities": (
        macro3,
        (FLOATS, INTS),
        ones(4),
        (TypeError, "predictions must be classes", "float32"),
    ),
    "float labels": (
        auc,
        (FLOATS, FLOATS),
        ones(4),
        (TypeError, "labels must be classes", "float32"),
    ),
    "complex scores": (
        auc,
        (FLOATS + 1j, INTS),
        ones(4),
        (TypeError, "scores must be real", "complex64"),
    ),
    "one-hot labels": (
        ece,
        (ROWS, ROWS.astype(int)),
        ones(4),
        (ValueError, "labels must have shape [n]", "(4, 2)"),
    ),
    "two columns of scores": (
        auc,
        (ROWS, INTS),
        ones(4),
        (ValueError, "scores must have shape [n]", "(4, 2)"),
    ),
    "no classes": (
        ece,
        (FLOATS, INTS),
        ones(4),
        (ValueError, "[n, classes]", "(4,)"),
    ),
    "one class": (
        ece,
        (ROWS[:, :1], INTS),
        ones(4),
        (ValueError, "at least two", "(4, 1)"),
    ),
    "lengths": (
        macro3,
        (INTS, INTS[:3]),
        ones(4),
        (ValueError, "'predictions': 4", "'labels': 3"),
    ),
    "weights too long": (
        auc,
        (FLOATS, INTS),
        ones(5),
        (ValueError, "'scores': 4", "'weights': 5"),
    ),
    "a column of weights": (
        ece,
        (ROWS, INTS),
        jnp.ones([4, 1]),
        (ValueError, "weights must have shape [n]", "(4, 1)"),
    ),
    "complex weights": (
        metrics.f1,
        (INTS, INTS),
        ones(4) + 1j,
        (TypeError, "weights must be real", "complex64"),
    ),
    "nothing": (
        metrics.f1,
        (INTS[:0], INTS[:0]),
        ones(0),
        (ValueError, "at least 1", "'weights': 0"),
    ),
    "positive no integer": (
        functools.partial(metrics.f1, positive="yes"),
        (INTS, INTS),
        ones(4),
        (TypeError, "positive must be an integer", "'yes'"),
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_at_trace_time(case):
    metric, outputs, weights, (error, *parts) = MISTAKES[case]
    with pytest.raises(error) as told:
        jax.eval_shape(metric, outputs, weights)
    assert all(part in str(told.value) for part in parts), told.value


@pytest.mark.parametrize(
    ("make", "value", "error", "message"),
    [
        (metrics.macro_f1, 1, ValueError, "classes must be at least 2, got 1"),
        (metrics.macro_f1, 2.0, TypeError, "classes must be an integer, got 2.0"),
        (
            metrics.expected_calibration_error,
            0,
            ValueError,
            "bins must be at least 1, got 0",
        ),
        (
            metrics.expected_calibration_error,
            None,
            TypeError,
            "bins must be an integer, got None",
        ),
    ],
)
def test_mistakes_in_making_a_metric(make, value, error, message):
    with pytest.raises(error, match=message):
        make(value)
