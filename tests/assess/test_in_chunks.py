"""Assessment in chunks: how much is looked at, and that nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_same_types

import optax_ev3
from optax_ev3 import adapt, combine, metrics

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


def test_an_easy_decision_costs_a_chunk_or_two():
    assert looked_at(optax_ev3.ev3(FAR, in_chunks(patience=7))) <= 16
    assert looked_at(optax_ev3.ev3(FAR, score)) == 64


def test_a_hard_decision_looks_at_all():
    # Scores without any difference in truth, and a rule that changes its mind.
    def noise(w, x, chunk):
        key = jax.random.fold_in(jax.random.key(1), chunk)
        return jax.random.normal(jax.random.fold_in(key, (w * 1e3).astype(int)), [8])

    def fickle(evidence, memory, key):
        del key
        return adapt.Decision(evidence.seen.sum() // 8 % 2, jnp.asarray(False)), memory

    rule = adapt.Rule(lambda k: (), fickle)
    near = {"a": optax.sgd(0.01), "b": optax.sgd(0.02)}
    tx = optax_ev3.ev3(near, in_chunks(noise), adapt=rule)
    assert looked_at(tx) == 64


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_patience(patience):
    # Candidates that no example tells apart: the decision never changes.
    tx = optax_ev3.ev3(
        {"a": optax.sgd(0.1), "b": optax.sgd(0.2)},
        in_chunks(lambda w, x: x + jnp.sin(1e4 * (w + x)), patience=patience),
        adapt=adapt.Rule(
            lambda k: (),
            lambda e, m, key: (adapt.Decision(jnp.int32(0), jnp.asarray(False)), m),
        ),
    )
    assert looked_at(tx) == 8 * (patience + 1)


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
    tx = optax_ev3.ev3(inner, in_chunks(patience=7))
    assert looked_at(tx) <= 24
    w = jnp.zeros([])
    _, state = step(tx, tx.init(w), w)
    assert np.isnan(optax_ev3.history(state)["mean"][0, 2])


@pytest.mark.parametrize("kwargs", [{"batch_size": 32}, {}, {"shuffle": True}])
def test_held_out_is_cut_by_itself(kwargs):
    if kwargs.get("shuffle"):
        kwargs = {"batch_size": 32, "shuffle": True}
    inner = optax_ev3.held_out(score, X, **kwargs)
    tx = optax_ev3.ev3(FAR, optax_ev3.in_chunks(inner, 4, patience=3))
    w = jnp.zeros([])
    _, state = jax.jit(tx.update)(2 * (w - X.mean()), tx.init(w), w)
    size = kwargs.get("batch_size", 64)
    assert int(optax_ev3.summary(state)["ev3/examples"]) in (size // 4, size // 2)


def test_in_trajectories_scan_and_vmap():
    tx = optax_ev3.ev3(
        {"s": optax_ev3.sweep(optax.sgd, learning_rate=[0.01, 0.1]), **FAR},
        in_chunks(),
        trajectory_length=2,
        combine=[combine.trajectory_average()],
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

    updates, state = jax.vmap(update, axis_name="i")(X.reshape(4, 16))
    examples = state.record.examples[:, 0]
    assert (examples == examples[0]).all() and examples[0] % 16 == 0
    alone, _ = step(whole, whole.init(w), w)
    assert_close(updates, jnp.broadcast_to(alone, [4]))


def test_an_argument_named_twice_is_cut_once():
    tx = optax_ev3.ev3(FAR, optax_ev3.in_chunks(score, 8, ["x", "x"], patience=7))
    assert looked_at(tx) == looked_at(optax_ev3.ev3(FAR, in_chunks(patience=7)))


def each(w, x, chunk, chunks):
    """Scores that say which chunk they are of."""
    return w * 0 + x * 0 + 10 * chunks + chunk


def test_the_number_of_a_chunk_is_never_the_callers():
    tx = optax_ev3.ev3(FAR, in_chunks(each, 8, patience=7))
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
        ({"patience": 0}, ValueError, "patience must be at least 1"),
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

    def figure(w, x):
        return metrics.Figure(lambda out, weights: out[0].mean(), (score(w, x),))

    with pytest.raises(ValueError, match="needs a score for each example"):
        looked_at(optax_ev3.ev3(FAR, in_chunks(figure)))
    with pytest.raises(ValueError, match="cannot be used with in_chunks"):
        soup = [combine.greedy_soup(2)]
        optax_ev3.ev3(FAR, in_chunks(), trajectory_length=2, combine=soup)
