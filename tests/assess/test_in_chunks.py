"""Assessment in chunks: how much is looked at, and that nothing else changes."""

import functools
import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_same_types

import optax_ev3
from optax_ev3 import explore, metrics

X = jnp.asarray(np.random.default_rng(0).normal(3.0, 1.0, 64), jnp.float32)
FAR = {"good": optax.sgd(0.1), "bad": optax.sgd(-0.1)}


def score(w, x):
    return -((w - x) ** 2)


def step(tx, state, w, **kwargs):
    return jax.jit(tx.update)(2 * (w - X.mean()), state, w, x=X, **kwargs)


def looked_at(tx, w=0.0):
    w = jnp.asarray(w, jnp.float32)
    _, state = step(tx, tx.init(w), w)
    return int(optax_ev3.summary(state)["ev3/examples"])


def in_chunks(assess_fn=score, chunks=8, **kwargs):
    return optax_ev3.in_chunks(assess_fn, chunks, slice_args=["x"], **kwargs)


def test_an_easy_decision_costs_one_chunk():
    assert looked_at(optax_ev3.ev3(FAR, in_chunks())) == 8
    assert looked_at(optax_ev3.ev3(FAR, score)) == 64


def paired_z(values):
    """By how many standard errors a mean is above zero, in standard normal units."""
    n = len(values)
    t = values.mean() / (values.std(ddof=1) / np.sqrt(n))
    z = math.sqrt((n - 1) * math.log1p(t * t / (n - 1)))
    return math.copysign(z * (8 * n - 7) / (8 * n - 5), t)


def chunks_by_hand(scores, chunks, confidence):
    """How many chunks ``[C, n]`` scores take by the published criterion."""
    alpha = (1 - confidence) / (len(scores) - 1) / chunks
    critical = NormalDist().inv_cdf(1 - alpha)
    for count in range(1, chunks + 1):
        f = count / chunks
        part = scores[:, : count * scores.shape[1] // chunks]
        best = part[part.mean(1).argmax()]
        leads = [paired_z(best - row) for row in part if (row != best).any()]
        if min(leads) >= critical * (math.sqrt(1 - f) - math.sqrt(f)):
            break
    return count


@functools.cache
def by_column(chunks, **kwargs):
    """Two explorers whose scores are the columns of ``[n, 3]`` noise; compiled once."""
    tx = optax_ev3.ev3(
        {"a": optax.sgd(1.0), "b": optax.sgd(2.0)},
        in_chunks(lambda w, x: x[:, w.astype(int)], chunks, **kwargs),
    )
    return tx, jax.jit(tx.update)


def choose_by_column(noise, chunks=8, **kwargs):
    """How many examples are looked at."""
    tx, update = by_column(chunks, **kwargs)
    w = jnp.zeros([])
    _, state = update(-jnp.ones([]), tx.init(w), w, x=noise)
    return int(optax_ev3.summary(state)["ev3/examples"])


@pytest.mark.parametrize("confidence", [0.6, 0.95, 0.999])
@pytest.mark.parametrize("seed", range(4))
def test_it_stops_where_the_criterion_says(seed, confidence):
    noise = np.random.default_rng(seed).normal(size=(64, 3)).astype(np.float32)
    noise[:, 1] += 0.4
    # The current and the stable parameters are the same.
    count = chunks_by_hand(noise.T[[1, 2, 0, 0]], 8, confidence)
    assert choose_by_column(noise, confidence=confidence) == 8 * count


@pytest.mark.parametrize("chunks", [2, 3, 16])
def test_no_decision_takes_more_than_half_of_the_examples(chunks):
    taken = []
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(size=(48, 3)).astype(np.float32)
        taken.append(choose_by_column(noise, chunks))
    assert max(taken) <= 48 // chunks * math.ceil(chunks / 2)


def test_all_examples_would_seldom_prove_it_wrong():
    """Equal candidates: how often all examples call one better than the chosen one."""
    chunks, n, alpha = 8, 64, 0.2
    critical = NormalDist().inv_cdf(1 - alpha / 3 / chunks)
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        scores = rng.normal(size=(4, n))
        part = scores[:, : chunks_by_hand(scores, chunks, 1 - alpha) * n // chunks]
        best = part.mean(1).argmax()
        others = np.delete(scores, best, 0)
        wrong += any(paired_z(row - scores[best]) > critical for row in others)
    assert wrong / 400 <= alpha


@pytest.mark.parametrize("mode", ["unroll", "vmap", "map"])
def test_evidence_is_that_of_the_examples_looked_at(mode):
    tx = optax_ev3.ev3(FAR, in_chunks(), assess_mode=mode)
    w = jnp.zeros([])
    _, state = step(tx, tx.init(w), w)
    past = optax_ev3.history(state)
    seen = np.asarray(X)[: past["examples"][0]]
    gain = 0.2 * (X.mean())
    for column, params in enumerate([gain, -gain, 0, 0]):
        scores = -((params - seen) ** 2)
        np.testing.assert_allclose(past["mean"][0, column], scores.mean(), rtol=1e-5)
        error = scores.std(ddof=1) / np.sqrt(len(seen))
        np.testing.assert_allclose(past["stderr"][0, column], error, rtol=1e-4)


def test_candidates_that_are_not_finite_do_not_keep_it_busy():
    inner = {**FAR, "nan": optax.scale(float("nan"))}
    tx = optax_ev3.ev3(inner, in_chunks())
    assert looked_at(tx) == 8
    w = jnp.zeros([])
    _, state = step(tx, tx.init(w), w)
    assert np.isnan(optax_ev3.history(state)["mean"][0, 2])


@pytest.mark.parametrize("kwargs", [{"batch_size": 32}, {}, {"shuffle": True}])
def test_held_out_is_cut_by_itself(kwargs):
    if kwargs.get("shuffle"):
        kwargs = {"batch_size": 32, "shuffle": True}
    inner = optax_ev3.held_out(score, X, **kwargs)
    tx = optax_ev3.ev3(FAR, optax_ev3.in_chunks(inner, 4))
    w = jnp.zeros([])
    _, state = jax.jit(tx.update)(2 * (w - X.mean()), tx.init(w), w)
    size = kwargs.get("batch_size", 64)
    assert int(optax_ev3.summary(state)["ev3/examples"]) == size // 4


def test_in_trajectories_scan_and_vmap():
    tx = optax_ev3.ev3(
        {"s": optax_ev3.sweep(optax.sgd, learning_rate=[0.01, 0.1]), **FAR},
        in_chunks(),
        explore=explore.rounds(2, averages=[explore.trajectory_average()]),
    )

    def train(w):
        def body(carry, _):
            w, state = carry
            updates, state = tx.update(2 * (w - X.mean()), state, w, x=X)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(body, (w, tx.init(w)), None, 12)[0]

    start = jnp.array([0.0, 1.0])
    many = jax.jit(jax.vmap(train))(start)
    for i in range(2):
        one = jax.jit(train)(start[i])
        picked = jax.tree.map(lambda x, i=i: x[i], many)
        assert_same_types(picked, one)
        assert_close(picked[0], one[0], 1e-5)
        assert abs(one[0] - X.mean()) < 0.5


def test_devices_stop_together():
    tx = optax_ev3.ev3(FAR, in_chunks(chunks=4), axis_name="i")
    whole = optax_ev3.ev3(FAR, in_chunks(chunks=4))
    w = jnp.zeros([])

    def update(x):
        return tx.update(2 * (w - X.mean()), tx.init(w), w, x=x)

    mapped = jax.jit(jax.vmap(update, axis_name="i"))
    updates, state = mapped(X.reshape(4, 16))
    examples = state.history.examples[:, 0]
    assert (examples == examples[0]).all() and examples[0] % 16 == 0
    alone, _ = step(whole, whole.init(w), w)
    assert_close(updates, jnp.broadcast_to(alone, [4]))


def test_an_argument_named_twice_is_cut_once():
    tx = optax_ev3.ev3(FAR, optax_ev3.in_chunks(score, 8, ["x", "x"]))
    assert looked_at(tx) == looked_at(optax_ev3.ev3(FAR, in_chunks()))


def each(w, x, chunk, chunks):
    """Scores that say which chunk they are of."""
    return w * 0 + x * 0 + 10 * chunks + chunk


def test_the_number_of_a_chunk_is_never_the_callers():
    tx = optax_ev3.ev3(FAR, in_chunks(each, 8))
    w = jnp.zeros([])
    _, state = step(tx, tx.init(w), w, chunk=3, chunks=100)
    past = optax_ev3.history(state)
    looked = past["examples"][0] // 8
    expected = 80 + np.arange(looked).mean()
    np.testing.assert_allclose(past["mean"][0], expected, rtol=1e-6)
    # A function that is not in chunks may have arguments of these names.
    free = optax_ev3.ev3(FAR, each)
    _, state = step(free, free.init(w), w, chunk=3, chunks=100)
    np.testing.assert_allclose(optax_ev3.history(state)["mean"][0], 1003.0)


def test_the_callers_chunk_is_for_the_metric_of_held_out():
    def metric(w, batch, chunk):
        return w * 0 + batch * 0 + chunk

    tx = optax_ev3.ev3(FAR, optax_ev3.held_out(metric, X))
    w = jnp.zeros([])
    _, state = jax.jit(tx.update)(w, tx.init(w), w, chunk=3)
    past = optax_ev3.history(state)
    assert past["examples"][0] == 64
    np.testing.assert_allclose(past["mean"][0], 3.0)


def test_bad_input():
    for kwargs, error, text in (
        ({"chunks": 1}, ValueError, "chunks must be at least 2, got 1"),
        ({"chunks": 2.5}, TypeError, "chunks must be an integer"),
        ({"confidence": 1.0}, ValueError, "confidence must be above 0.5"),
        ({"assess_fn": 3}, TypeError, "assess_fn must be callable"),
        (
            {"assess_fn": lambda w, y: w - y},
            ValueError,
            r"slice_args names \['x'\], which assess_fn does not take",
        ),
        (
            {"assess_fn": functools.partial(score, x=X)},
            ValueError,
            r"slice_args names \['x'\].*partial has bound is not cut",
        ),
    ):
        with pytest.raises(error, match=text):
            in_chunks(**kwargs)
    with pytest.raises(TypeError, match="sequence of names, such as \\['batch'\\]"):
        optax_ev3.in_chunks(score, 8, "batch")
    for same in (score, lambda w, key: w, lambda w, **kwargs: w):
        with pytest.raises(ValueError, match="every chunk would be the same examples"):
            optax_ev3.in_chunks(same, 8)
    for missing in (score, lambda w, x=X: score(w, x)):
        tx = optax_ev3.ev3(FAR, in_chunks(missing))
        with pytest.raises(TypeError, match="to cut 'x', which update was not given"):
            tx.update(jnp.zeros([]), tx.init(jnp.zeros([])), jnp.zeros([]), y=X)
    with pytest.raises(ValueError, match=r"x of shape \(64,\) cannot be cut into 7"):
        looked_at(optax_ev3.ev3(FAR, in_chunks(chunks=7)))
    with pytest.raises(ValueError, match="needs a score for each example"):
        looked_at(optax_ev3.ev3(FAR, in_chunks(lambda w, x: score(w, x).mean())))

    def aggregate(w, x):
        return metrics.AggregateMetric(
            lambda out, weights: out[0].mean(), (score(w, x),)
        )

    with pytest.raises(ValueError, match="needs a score for each example"):
        looked_at(optax_ev3.ev3(FAR, in_chunks(aggregate)))
