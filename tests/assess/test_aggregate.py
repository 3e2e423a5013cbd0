"""Metrics of all examples together, through ev3, against scikit-learn and NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_identical, assert_same_types, says
from sklearn.metrics import f1_score, roc_auc_score

import optax_ev3
from optax_ev3 import adapt, explore, metrics
from optax_ev3._src.assess import aggregate
from optax_ev3._src.base import evidence

P = jax.sharding.PartitionSpec
N, B = 64, 40
_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(N, 3)).astype(np.float32)
Y = (X @ [1.0, -1.0, 0.5] + _RNG.normal(size=N) > 0).astype(np.int32)
W = jnp.array([0.3, 0.2, -0.1])
GRADS = jnp.array([-1.0, 1.0, -0.5])
RATES = {"near": 0.1, "far": 0.5}


def ranks(w, x, y):
    return x @ w, y


def classes(w, x, y):
    return x @ w > 0, y


def area(outputs, weights):
    return roc_auc_score(outputs[1], outputs[0], sample_weight=weights)


def harmonic(outputs, weights):
    return f1_score(outputs[1], outputs[0], sample_weight=weights)


# What is predicted, the metric, and scikit-learn's.
CASES = {
    "roc_auc": (ranks, metrics.roc_auc, area),
    "f1": (classes, metrics.f1, harmonic),
}
every_case = pytest.mark.parametrize("case", CASES)


def on_device(case, samples=B):
    predict, metric, _ = CASES[case]
    return lambda w, x, y: metrics.AggregateMetric(metric, predict(w, x, y), samples)


def on_host(case, samples=B, seen=None):
    """The same with scikit-learn, which keeps the weights that it is called with."""
    predict, _, reference = CASES[case]

    def metric(outputs, *weights):
        if seen is not None:
            seen.append(weights)
        return reference(outputs, *(weights or [None]))

    return optax_ev3.host_metric(predict, metric, samples)


def explorers():
    return {name: optax.sgd(rate) for name, rate in RATES.items()}


def make(assess_fn, **kwargs):
    kwargs = {"inner": explorers(), "adapt": adapt.greedy(), **kwargs}
    return optax_ev3.ev3(assess_fn=assess_fn, **kwargs)


def once(tx, w=W, wrap=jax.jit, **extra):
    """The update and the state after one round."""
    extra = {"x": X, "y": Y, **extra}
    return wrap(tx.update)(GRADS, tx.init(w), w, **extra)


def past(assess_fn, **kwargs):
    """Means and standard errors of all candidates in one round."""
    found = optax_ev3.history(once(make(assess_fn, **kwargs))[1])
    return found["mean"][0], found["stderr"][0]


@functools.cache
def past_of(case, samples=B, assess=on_device):
    return past(assess(case, samples))


def candidates():
    return [W - rate * GRADS for rate in RATES.values()] + [W, W]


def spied(assess_fn, **kwargs):
    """The evidence of one round."""
    seen = []

    def decide(evidence, memory, key):
        seen.append(evidence)
        return adapt.greedy().decide(evidence, memory, key)

    rule = adapt.Rule(lambda explorers: (), decide)
    once(make(assess_fn, adapt=rule, **kwargs), wrap=lambda fn: fn)
    return seen[0]


@functools.cache
def counts(samples=B):
    """The weights of the round's resamples, as a metric on the host gets them."""
    seen = []
    jax.block_until_ready(once(make(on_host("roc_auc", samples, seen))))
    rows = [weights for (weights,) in seen]
    assert len(rows) == 4 * (samples + 1)
    return np.stack(rows).reshape(4, samples + 1, N)


# What is computed.


@every_case
def test_history_holds_the_metric_and_its_spread(case):
    predict, _, reference = CASES[case]
    mean, stderr = past_of(case)
    for row, w in enumerate(candidates()):
        outputs = jax.tree.map(np.asarray, predict(w, X, Y))
        assert mean[row] == pytest.approx(reference(outputs, np.ones(N)), abs=1e-6)
        values = [reference(outputs, weights) for weights in counts()[0, 1:]]
        assert stderr[row] == pytest.approx(np.std(values, ddof=1), rel=1e-3)


@every_case
def test_spread_is_that_of_a_bootstrap(case):
    predict, _, reference = CASES[case]
    outputs = jax.tree.map(np.asarray, predict(W, X, Y))
    rng = np.random.default_rng(1)
    rows = rng.multinomial(N, np.full(N, 1 / N), 1000)
    expected = np.std([reference(outputs, weights) for weights in rows])
    _, stderr = past_of(case, 1000)
    assert stderr[2] == pytest.approx(expected, rel=0.15)


def test_resamples_are_the_same_for_all_candidates():
    weights = counts()
    assert (weights == weights[:1]).all()
    assert (weights[:, 0] == 1).all()
    assert (weights == np.round(weights)).all()
    resamples = weights[0, 1:]
    assert resamples.mean() == pytest.approx(1, abs=0.1)
    assert resamples.var() == pytest.approx(1, abs=0.2)
    assert len(np.unique(resamples, axis=0)) == B


@every_case
def test_the_same_candidates_are_not_told_apart(case):
    inner = {"one": optax.sgd(0.1), "other": optax.sgd(0.1)}
    found = spied(on_device(case), inner=inner)
    assert found.resamples["score"].shape == (4, B)
    pair = evidence.compare(found, "score", 1)
    assert float(pair.z[0]) == float(pair.gain[0]) == float(pair.stderr[0]) == 0
    rest = evidence.compare(found, "score", 2)
    assert float(rest.z[3]) == 0
    assert float(rest.z[0]) == float(rest.z[1]) != 0


@every_case
def test_candidates_are_compared_on_the_same_resamples(case):
    predict, _, reference = CASES[case]
    found = evidence.compare(spied(on_device(case)), "score", 2)
    values = np.array(
        [
            [reference(jax.tree.map(np.asarray, predict(w, X, Y)), c) for c in row]
            for w, row in zip(candidates(), counts(), strict=True)
        ]
    )
    gain = values[:, 0] - values[2, 0]
    spread = np.std(values[:, 1:] - values[2, 1:], axis=1, ddof=1)
    np.testing.assert_allclose(found.gain, gain, atol=1e-6)
    np.testing.assert_allclose(found.stderr, spread, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.z[:2], gain[:2] / spread[:2], rtol=1e-3)


def test_every_round_has_resamples_of_its_own():
    seen = []
    tx = make(on_host("roc_auc", 2, seen))
    state = tx.init(W)
    for _ in range(2):
        _, state = tx.update(GRADS, state, W, x=X, y=Y)
    rows = np.stack([weights for (weights,) in seen]).reshape(2, 4, 3, N)
    assert (rows[0, 0, 1:] != rows[1, 0, 1:]).any()


def test_without_samples_the_metric_is_exact():
    found = spied(on_device("roc_auc", 0))
    assert not found.resamples
    mean, stderr = past_of("roc_auc", 0)
    np.testing.assert_array_equal(stderr, 0)
    np.testing.assert_allclose(mean, past_of("roc_auc")[0], rtol=1e-6)


@pytest.mark.parametrize("rule", [adapt.greedy, adapt.confident, adapt.lower_bound])
def test_a_metric_that_never_changes_proves_nothing(rule):
    def assess_fn(w, x, y):
        constant = lambda outputs, weights: jnp.float32(0.5)
        return metrics.AggregateMetric(constant, ranks(w, x, y), B)

    tx = make(assess_fn, adapt=rule())
    state = tx.init(W)
    step = jax.jit(tx.update)
    for _ in range(5):
        _, state = step(GRADS, state, W, x=X, y=Y)
    found = optax_ev3.history(state)
    assert not found["significant"].any()
    np.testing.assert_array_equal(found["mean"], 0.5)
    np.testing.assert_array_equal(found["stderr"], 0)


@pytest.mark.parametrize("samples, proof", [(2, False), (40, True)])
def test_resamples_that_agree_prove_no_more_than_as_many_coins(samples, proof):
    def assess_fn(w, x, y):
        first = lambda outputs, weights: outputs[0, 0]
        return metrics.AggregateMetric(first, jnp.broadcast_to(w, (len(x), 3)), samples)

    _, state = once(make(assess_fn))
    assert bool(optax_ev3.history(state)["significant"][0]) == proof


def test_outputs_that_are_no_number_are_never_adopted():
    """A metric may be finite all the same, or raise: it is not asked."""

    def predict(w, x, y):
        return jnp.where(w[0] > 0.5, jnp.nan, x @ w), y

    def on_device(w, x, y):
        return metrics.AggregateMetric(metrics.roc_auc, predict(w, x, y), B)

    by_sklearn = optax_ev3.host_metric(
        predict, lambda outputs: roc_auc_score(outputs[1], outputs[0])
    )
    for assess_fn in (on_device, by_sklearn):
        mean, _ = past(assess_fn)
        np.testing.assert_array_equal(np.isnan(mean), [False, True, False, False])


# Contexts.


@pytest.mark.parametrize("assess", [on_device, on_host], ids=["device", "host"])
@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_the_modes_agree(assess, mode):
    found = past(assess("roc_auc", 8), assess_mode=mode)
    assert_close(found, past_of("roc_auc", 8, assess))


@pytest.mark.parametrize("assess", [on_device, on_host], ids=["device", "host"])
def test_without_jit(assess):
    tx = make(assess("f1", 8))
    assert_close(once(tx, wrap=lambda fn: fn), once(tx))


@pytest.mark.parametrize("assess", [on_device, on_host], ids=["device", "host"])
def test_scan_equals_a_loop(assess):
    tx = make(assess("roc_auc", 8))

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(GRADS, state, w, x=X, y=Y)
        return (optax.apply_updates(w, updates), state), None

    start = carry = W, tx.init(W)
    scanned, _ = jax.jit(lambda c: jax.lax.scan(step, c, length=3))(start)
    for _ in range(3):
        carry, _ = jax.jit(step)(carry, None)
    assert_close(scanned, carry)
    assert_same_types(scanned, start)


@pytest.mark.parametrize("assess", [on_device, on_host], ids=["device", "host"])
def test_vmap_equals_each_run_alone(assess):
    tx = make(assess("roc_auc", 8))
    several = jnp.stack([W, -W, 2 * W])
    found = jax.jit(jax.vmap(lambda w: once(tx, w, wrap=lambda fn: fn)))(several)
    for row, w in enumerate(several):
        assert_close(jax.tree.map(lambda x, row=row: x[row], found), once(tx, w))


def test_in_a_mapping():
    """Beside other objectives; rules see each as if it were alone."""

    def assess_fn(w, x, y):
        return {
            "area": on_device("roc_auc")(w, x, y),
            "right": (x @ w > 0) == y,
            "harmonic": on_device("f1", 0)(w, x, y),
        }

    seen = []

    def decide(evidence, memory, key):
        seen.append(evidence)
        only = {"area": evidence.scores["area"]}
        return adapt.Decision(jnp.int32(0), jnp.asarray(bool(only))), memory

    names = ("area", "right", "harmonic")
    tx = make(assess_fn, adapt=adapt.Rule(lambda explorers: (), decide, names))
    once(tx, wrap=lambda fn: fn)
    (found,) = seen
    assert found.binary == {"right"}
    assert list(found.resamples) == ["area"]
    alone = spied(on_device("roc_auc"))
    assert_close(found.scores["area"], alone.scores["score"])
    assert_close(found.resamples["area"], alone.resamples["score"])
    assert found.scores["right"].shape == (4, N)
    exact = spied(on_device("f1", 0))
    assert_close(found.scores["harmonic"], exact.scores["score"])


def test_one_objective_by_name():
    named = past(lambda w, x, y: {"area": on_device("roc_auc")(w, x, y)})
    assert_close(named, past_of("roc_auc"))


@pytest.mark.parametrize("batch_size", [None, 32])
def test_in_held_out(batch_size):
    def metric(w, batch):
        return on_device("roc_auc")(w, *batch)

    def host(w, batch):
        return ranks(w, *batch)

    assess_fn = optax_ev3.held_out(metric, (X, Y), batch_size)
    mean, stderr = past(assess_fn)
    if batch_size is None:
        assert_close((mean, stderr), past_of("roc_auc"))
    assert (stderr > 0).all()
    both = optax_ev3.host_metric(
        optax_ev3.held_out(host, (X, Y), batch_size), area, samples=B
    )
    assert_close(past(both), (mean, stderr), rtol=1e-4)


def test_in_a_sweep():
    inner = {"all": optax_ev3.sweep(optax.sgd, learning_rate=list(RATES.values()))}
    for assess in (on_device, on_host):
        found = past(assess("roc_auc", 8), inner=inner)
        assert_close(found, past_of("roc_auc", 8, assess))


@pytest.mark.parametrize("assess", [on_device, on_host], ids=["device", "host"])
def test_many_devices_decide_like_one(assess):
    one, many = make(assess("roc_auc", 8)), make(assess("roc_auc", 8), axis_name="i")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), "i")
    step = functools.partial(_update, many)
    specs = {"mesh": mesh, "in_specs": (P("i"), P("i")), "out_specs": P()}
    if hasattr(jax, "shard_map"):
        mapped = jax.shard_map(step, **specs)
    else:
        from jax.experimental.shard_map import shard_map

        mapped = shard_map(step, check_rep=False, **specs)
    assert_close(jax.jit(mapped)(X, Y), jax.jit(functools.partial(_update, one))(X, Y))


def _update(tx, x, y):
    return tx.update(GRADS, tx.init(W), W, x=x, y=y)


def test_over_devices_equals_one_device_in_every_bit():
    """An aggregate metric takes the examples of all devices, in their order."""
    key = jax.random.key(3)
    predicted = _RNG.normal(size=(4, N)).astype(np.float32)
    labels = np.stack([Y] * 4).astype(bool)
    aggregate_metric = metrics.AggregateMetric(metrics.roc_auc, None, B)

    def split(values):
        return values.reshape(4, 8, N // 8).swapaxes(0, 1)

    def compute(*outputs, axis_name="i"):
        return aggregate.compute(aggregate_metric, outputs, key, axis_name)

    parts = jax.vmap(compute, axis_name="i")(split(predicted), split(labels))
    whole = compute(jnp.asarray(predicted), jnp.asarray(labels), axis_name=None)
    for device in range(8):
        assert_identical(jax.tree.map(lambda x, d=device: x[d], parts), whole)


# Metrics on the host.


def spread_error(outputs):
    predicted, wanted = outputs
    assert isinstance(predicted, np.ndarray)
    assert predicted.shape == wanted.shape == (N,)
    return -np.median(np.abs(predicted - wanted))


def test_host_metric_is_numpys():
    mean, stderr = past(optax_ev3.host_metric(ranks, spread_error))
    expected = [spread_error((X @ np.asarray(w), Y)) for w in candidates()]
    np.testing.assert_allclose(mean, expected, rtol=1e-5)
    np.testing.assert_array_equal(stderr, 0)


@every_case
def test_host_metric_equals_the_one_on_the_device(case):
    assert_close(past_of(case, assess=on_host), past_of(case), rtol=1e-4)


@pytest.mark.parametrize("mode", ["unroll", "vmap", "map"])
def test_one_call_to_the_host_for_all_candidates(mode, monkeypatch):
    calls, asked = [], []
    original = aggregate._on_host

    def counted(aggregate_metric, outputs, *args):
        calls.append(jax.tree.map(np.shape, outputs))
        return original(aggregate_metric, outputs, *args)

    monkeypatch.setattr(aggregate, "_on_host", counted)
    tx = make(on_host("roc_auc", 0, asked), assess_mode=mode)
    jax.block_until_ready(once(tx))
    assert calls == [((4, N), (4, N))]
    assert asked == [()] * 4


def test_trajectories_ask_at_the_end_of_a_round_only():
    asked = []
    tx = make(on_host("roc_auc", 0, asked), explore=explore.rounds(3))
    w, state = W, tx.init(W)
    step = jax.jit(tx.update)
    many = []
    for _ in range(6):
        updates, state = jax.block_until_ready(step(GRADS, state, w, x=X, y=Y))
        w = optax.apply_updates(w, updates)
        many.append(len(asked))
    assert many == [0, 0, 4, 4, 4, 8]


def test_what_a_host_metric_raises_is_told():
    def metric(outputs):
        raise RuntimeError("no such luck")

    tx = make(optax_ev3.host_metric(ranks, metric))
    for wrap in (jax.jit, lambda fn: fn):
        with pytest.raises(Exception, match="no such luck"):
            jax.block_until_ready(once(tx, wrap=wrap))


def test_named_arguments_reach_predict_fn():
    keys = []

    def predict(w, x, y, *, key, scale, shift=0.0):
        noise = jax.random.normal(key, [len(x)])
        return x @ w * scale + shift, noise, y

    def metric(outputs):
        keys.append(outputs[1])
        return float(outputs[0].sum())

    _, state = jax.block_until_ready(
        once(make(optax_ev3.host_metric(predict, metric)), scale=2.0, unused=1)
    )
    assert all((noise == keys[0]).all() for noise in keys)
    expected = [2 * (X @ np.asarray(w)).sum() for w in candidates()]
    np.testing.assert_allclose(optax_ev3.history(state)["mean"][0], expected, rtol=1e-4)
    tx = make(optax_ev3.host_metric(predict, metric))
    with pytest.raises(TypeError, match="'scale' that nothing supplies"):
        once(tx)


def test_other_trees_of_outputs():
    def predict(w, x, y):
        return {"far": x @ w, "deep": [y.astype(bool), x.astype(jnp.bfloat16)]}

    def metric(outputs, weights):
        assert outputs["deep"][0].dtype == bool
        assert outputs["deep"][1].shape == (N, 3)
        assert weights.dtype == np.float32
        return weights @ outputs["far"]

    mean, _ = past(optax_ev3.host_metric(predict, metric, 2))
    expected = [(X @ np.asarray(w)).sum() for w in candidates()]
    np.testing.assert_allclose(mean, expected, rtol=1e-4)


# Mistakes.

ONE = jnp.ones([N])


def aggregate_metric(
    metric=lambda outputs, weights: weights.sum(), outputs=ONE, samples=B
):
    return lambda w, x, y: metrics.AggregateMetric(metric, outputs, samples)


BAD_FIGURES = {
    "different sizes": (
        aggregate_metric(outputs=(ONE, ONE[1:])),
        (ValueError, "assess_fn", "one leading size", f"[({N},), ({N - 1},)]"),
    ),
    "no array": (
        aggregate_metric(outputs=()),
        (ValueError, "arrays with one leading", "[]"),
    ),
    "a scalar": (
        aggregate_metric(outputs=(ONE, 1.0)),
        (ValueError, "leading size", "()"),
    ),
    "no example": (
        aggregate_metric(outputs=ONE[:0]),
        (ValueError, "the outputs of assess_fn hold no example", "[(0,)]"),
    ),
    "a metric of each example": (
        aggregate_metric(lambda outputs, weights: outputs * weights),
        (TypeError, "the metric of assess_fn", "real scalar", f"({N},)"),
    ),
    "a metric of integers": (
        aggregate_metric(lambda outputs, weights: jnp.int32(1)),
        (TypeError, "real scalar, got shape () of int32"),
    ),
    "a metric that returns nothing": (
        aggregate_metric(lambda outputs, weights: None),
        (TypeError, "real scalar", "NoneType"),
    ),
    "no metric": (
        aggregate_metric(0.5),
        (TypeError, "metric_fn", "assess_fn", "callable", "0.5"),
    ),
    "a metric with its own mind": (
        aggregate_metric(
            lambda outputs, weights: metrics.roc_auc((outputs, ONE[1:] > 0), weights)
        ),
        (ValueError, "expected n examples, at least 1, everywhere", "'labels': 63"),
    ),
    "a metric in NumPy": (
        aggregate_metric(lambda outputs, weights: np.asarray(outputs).sum()),
        (TypeError, "cannot be traced", "host_metric"),
    ),
    "one sample": (
        aggregate_metric(samples=1),
        (ValueError, "samples", "at least 2", "1"),
    ),
    "negative samples": (aggregate_metric(samples=-3), (ValueError, "samples", "-3")),
    "samples no integer": (
        aggregate_metric(samples=2.0),
        (TypeError, "samples", "2.0"),
    ),
    "by name": (
        lambda w, x, y: {"a": ONE, "b": aggregate_metric(outputs=())(w, x, y)},
        (ValueError, "objective 'b'"),
    ),
    "shapes on the host": (
        optax_ev3.host_metric(lambda w: (ONE, ONE[1:]), spread_error),
        (ValueError, "assess_fn", "one leading size"),
    ),
}


@pytest.mark.parametrize("case", BAD_FIGURES)
def test_mistakes_in_an_aggregate_metric(case):
    assess_fn, (error, *parts) = BAD_FIGURES[case]
    with says(error, *parts):
        once(make(assess_fn))


BAD_HOST_METRICS = {
    "predict_fn": ((3, area), (TypeError, "predict_fn must be callable", "3")),
    "metric_fn": ((ranks, "f1"), (TypeError, "metric_fn must be callable", "'f1'")),
    "one sample": ((ranks, area, 1), (ValueError, "samples", "at least 2", "1")),
    "negative": ((ranks, area, -1), (ValueError, "samples", "-1")),
    "no integer": ((ranks, area, 1.5), (TypeError, "samples", "1.5")),
    "a flag": ((ranks, area, True), (TypeError, "samples", "True")),
    "no weights": (
        (ranks, spread_error, 2),
        (TypeError, "metric_fn(outputs, weights)", "samples=2", "(outputs)"),
    ),
    "two arguments": (
        (ranks, f1_score),
        (TypeError, "metric_fn(outputs)", "samples=0", "(y_true, y_pred"),
    ),
}


@pytest.mark.parametrize("case", BAD_HOST_METRICS)
def test_mistakes_in_a_host_metric(case):
    args, (error, *parts) = BAD_HOST_METRICS[case]
    with says(error, *parts):
        optax_ev3.host_metric(*args)


WRONG_NUMBERS = {
    "text": ("0.5", "str: '0.5'"),
    "nothing": (None, "NoneType: None"),
    "list": ([0.5], "list: [0.5]"),
    "ragged": ([[1.0], [1.0, 2.0]], "list"),
    "complex": (1j, "complex"),
    "array": (np.ones(3), "ndarray of shape (3,)"),
    "array of one": (np.ones(1), "ndarray of shape (1,)"),
    "array of text": (np.array("a"), "ndarray of shape ()"),
    "generator": ((i for i in range(3)), "generator"),
}


@functools.cache
def round_with(samples):
    """A function of what the metric returns: the state after a round, compiled once."""
    value = None

    def my_metric(*given):
        return value

    tx = make(optax_ev3.host_metric(ranks, my_metric, samples))
    update = jax.jit(tx.update)

    def run(returned):
        nonlocal value
        value = returned
        return jax.block_until_ready(update(GRADS, tx.init(W), W, x=X, y=Y))[1]

    return run


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("case", WRONG_NUMBERS)
def test_a_host_metric_that_is_no_number(case, samples):
    value, got = WRONG_NUMBERS[case]
    with says(Exception, "TypeError", "'my_metric' of host_metric", "real number", got):
        round_with(samples)(value)


@pytest.mark.parametrize(
    "value", [1, True, 0.25, np.float16(0.25), np.array(0.25), jnp.bfloat16(0.25)]
)
def test_numbers_of_a_host_metric(value):
    found = optax_ev3.history(round_with(0)(value))
    np.testing.assert_array_equal(found["mean"], float(value))


@pytest.mark.parametrize("samples", [0, 3])
def test_a_host_metric_may_change_its_inputs(samples):
    """It gets copies: neither other resamples nor other candidates see it."""

    def median(outputs, *weights):
        predicted, labels = outputs
        total = float((predicted * np.arange(N)).sum())
        predicted.sort()
        labels[:] = 0
        for each in weights:
            each[:] = -1
        return total

    def plain(outputs, *weights):
        return float((outputs[0] * np.arange(N)).sum())

    found = past(optax_ev3.host_metric(ranks, median, samples))
    assert_close(found, past(optax_ev3.host_metric(ranks, plain, samples)))
    expected = [(X @ np.asarray(w) * np.arange(N)).sum() for w in candidates()]
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
