"""Assessment on arrays that stay on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import always
from jax import lax

import optax_ev3
from optax_ev3 import held_out

SIZE, BATCH = 10, 4


def label(params, batch):
    """Scores that say which examples were drawn."""
    return params * 0 + batch


def _data():
    return jnp.arange(SIZE, dtype=jnp.float32)


def drawn(rounds, assess_fn=None, key=0):
    """``[rounds, candidates, BATCH]``: what each candidate was scored on."""
    seen = []

    def decide(evidence, memory, key):
        (scores,) = evidence.scores.values()
        return optax_ev3.adapt.Decision(jnp.int32(1), jnp.asarray(False)), scores

    if assess_fn is None:
        assess_fn = held_out(label, _data(), BATCH)
    width = jax.eval_shape(lambda p: assess_fn(p, key=jax.random.key(0)), 0.0).shape
    rule = optax_ev3.adapt.Rule(lambda k: jnp.zeros((k + 2, *width)), decide)
    tx = optax_ev3.ev3([optax.sgd(1.0)], assess_fn, adapt=rule, key=key)

    @functools.partial(jax.jit, static_argnums=1)
    def run(w, rounds):
        def body(state, _):
            _, state = tx.update(jnp.float32(1.0), state, w)
            return state, state.memory

        return lax.scan(body, tx.init(w), length=rounds)[1]

    del seen
    return np.asarray(run(jnp.float32(2.0), rounds))


def test_all_candidates_see_the_same_fresh_batch():
    found = drawn(20)
    assert found.shape == (20, 3, BATCH)
    np.testing.assert_array_equal(found, found[:, :1].repeat(3, axis=1))
    assert len(np.unique(found[:, 0], axis=0)) > 15
    assert set(found.ravel()) <= set(range(SIZE))
    np.testing.assert_array_equal(drawn(20), found)
    assert (drawn(20, key=1) != found).any()


def test_draws_are_uniform_and_independent():
    rounds = 3000
    found = drawn(rounds)[:, 0].astype(int)
    # Chi-square, 9 degrees of freedom, exceeded with probability 0.0001 beyond 33.7;
    # draws without replacement, or of one end less, fail, too.
    expected = rounds * BATCH / SIZE
    for counts in (
        np.bincount(found.ravel(), minlength=SIZE),
        np.bincount(found[:, 0], minlength=SIZE) * BATCH,
    ):
        scale = 1 if counts.sum() == rounds * BATCH and counts[0] % BATCH else BATCH
        assert ((counts - expected) ** 2 / expected).sum() / scale < 33.7
    # With replacement: two places agree in a tenth of all rounds (0.0055 is one sigma).
    assert abs((found[:, 0] == found[:, 1]).mean() - 1 / SIZE) < 0.025
    # And a round says nothing about the next one.
    assert abs((found[1:, 0] == found[:-1, 0]).mean() - 1 / SIZE) < 0.025
    # Unbiased: the mean over all data is 4.5, one sigma of this mean is 0.026.
    assert abs(found.mean() - 4.5) < 0.11


def test_trees_of_arrays_are_drawn_together():
    data = {"x": _data(), "y": (10 * _data(), jnp.stack([_data()] * 2, axis=1))}

    def metric(params, batch):
        assert batch["x"].shape == (BATCH,) and batch["y"][1].shape == (BATCH, 2)
        apart = jnp.abs(batch["y"][0] - 10 * batch["x"])
        return params * 0 + apart + jnp.abs(batch["y"][1].sum(axis=1) - 2 * batch["x"])

    assert not drawn(5, held_out(metric, data, BATCH)).any()


def test_without_batch_size_all_data_each_round():
    found = drawn(3, held_out(label, _data()))
    np.testing.assert_array_equal(found, np.tile(np.arange(SIZE), (3, 3, 1)))


def test_whole_size_is_still_drawn():
    found = drawn(3, held_out(label, _data(), SIZE))
    assert any(len(set(row)) < SIZE for row in found[:, 0])


def test_numpy_data_and_integer_kinds_of_sizes():
    found = drawn(2, held_out(label, np.arange(SIZE, dtype=np.float32), np.int64(3)))
    assert found.shape == (2, 3, 3)


def test_named_arguments_and_a_key_of_its_own():
    def metric(params, batch, scale, key, shift=1.0):
        return params * 0 + scale + shift + jax.random.normal(key, batch.shape)

    assess_fn = held_out(metric, _data(), BATCH)
    tx = optax_ev3.ev3([optax.sgd(1.0)], assess_fn, adapt=always(0))
    w = jnp.float32(2.0)
    _, state = tx.update(w, tx.init(w), w, scale=100.0)
    assert abs(float(state.record.mean[0, 0]) - 101) < 4
    with pytest.raises(TypeError, match=r"metric_fn.*'scale'"):
        tx.update(w, tx.init(w), w)


def test_each_device_draws_its_own():
    assess_fn = held_out(label, _data(), BATCH)

    def decide(evidence, memory, key):
        (scores,) = evidence.scores.values()
        rows = lax.all_gather(scores, "i")
        return optax_ev3.adapt.Decision(jnp.int32(1), jnp.asarray(False)), rows

    rule = optax_ev3.adapt.Rule(lambda k: jnp.zeros((8, k + 2, BATCH)), decide)
    tx = optax_ev3.ev3([optax.sgd(1.0)], assess_fn, adapt=rule, axis_name="i")
    w = jnp.float32(2.0)
    state = tx.init(w)

    def update(_):
        return tx.update(w, state, w)[1]

    mapped = jax.vmap(update, axis_name="i")
    if len(jax.devices()) >= 8:
        mapped = jax.pmap(update, "i", devices=jax.devices()[:8])
    out = mapped(jnp.arange(8))
    found = np.asarray(out.memory)[0]
    assert found.shape == (8, 3, BATCH)
    np.testing.assert_array_equal(found, found[:, :1].repeat(3, axis=1))
    assert len(np.unique(found[:, 0], axis=0)) >= 7
    # The record has the mean over all of them.
    np.testing.assert_allclose(
        out.record.mean[0, 0], found.mean(axis=(0, 2)), rtol=1e-5
    )


def test_in_a_loop_without_extra_arguments():
    x = jnp.linspace(-1.0, 1.0, 32)

    def metric(w, batch):
        return -jnp.square(w * batch[0] - batch[1])

    tx = optax_ev3.ev3([optax.sgd(0.5)], held_out(metric, (x, 3 * x), 16))
    w = jnp.zeros([])
    state = tx.init(w)

    @jax.jit
    def step(w, state):
        grads = jax.grad(lambda w: -metric(w, (x, 3 * x)).mean())(w)
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    for _ in range(60):
        w, state = step(w, state)
    np.testing.assert_allclose(w, 3.0, atol=0.05)
