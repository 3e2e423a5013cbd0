"""Assessment on arrays that stay on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import always
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

import optax_ev3
from optax_ev3 import explore, held_out
from optax_ev3._src.assess.held_out import _split

SIZE, BATCH = 10, 4


def label(params, batch):
    """Scores that say which examples were drawn."""
    return params * 0 + batch


def _data():
    return jnp.arange(SIZE, dtype=jnp.float32)


def drawn(rounds, assess_fn=None, key=0, calls=1):
    """``[rounds, candidates, BATCH]``: what each candidate was scored on."""
    if assess_fn is None:
        assess_fn = held_out(label, _data(), BATCH)
    offered = {"key": jax.random.key(0), "round": 0, "run_key": jax.random.key(0)}
    width = jax.eval_shape(functools.partial(assess_fn, **offered), 0.0).shape
    rule = remembering(lambda candidates: (candidates, *width), lambda scores: scores)
    tx = optax_ev3.ev3(
        [optax.sgd(1.0)], assess_fn, adapt=rule, key=key, explore=explore.rounds(calls)
    )
    return np.asarray(run(tx, rounds * calls)[calls - 1 :: calls])


def remembering(shape, seen):
    """A rule that keeps the parameters, and remembers something of the scores."""

    def decide(evidence, memory, key):
        (scores,) = evidence.scores.values()
        decision = optax_ev3.adapt.Decision(jnp.int32(1), jnp.asarray(False))
        return decision, seen(scores)

    return optax_ev3.adapt.Rule(lambda k: jnp.zeros(shape(k + 2)), decide)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(tx, calls):
    """What the rule remembers after each call."""
    w = jnp.float32(2.0)

    def body(state, _):
        state = tx.update(jnp.float32(1.0), state, w)[1]
        return state, state.rule_state

    return lax.scan(body, tx.init(w), length=calls)[1]


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
    assert abs(float(state.history.mean[0, 0]) - 101) < 4
    with pytest.raises(TypeError, match=r"metric_fn.*'scale'"):
        tx.update(w, tx.init(w), w)


def test_each_device_draws_its_own():
    assess_fn = held_out(label, _data(), BATCH)

    def decide(evidence, memory, key):
        (scores,) = evidence.scores.values()
        rows = jnp.moveaxis(scores.reshape(3, 8, BATCH), 1, 0)
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
    found = np.asarray(out.rule_state)[0]
    assert found.shape == (8, 3, BATCH)
    np.testing.assert_array_equal(found, found[:, :1].repeat(3, axis=1))
    assert len(np.unique(found[:, 0], axis=0)) >= 7
    # The record has the mean over all of them.
    np.testing.assert_allclose(
        out.history.mean[0, 0], found.mean(axis=(0, 2)), rtol=1e-5
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


@pytest.mark.parametrize("name", ["batch", "examples"])
def test_the_callers_batch_is_for_others(name):
    """The metric gets the data by position, whatever it calls them."""

    def by_name(params, batch, scale=1.0):
        return params * 0 + batch * scale

    def any_names(params, examples, **kwargs):
        assert "examples" not in kwargs
        return params * 0 + examples * kwargs["scale"]

    for metric in (by_name, any_names):
        assess_fn = held_out(metric, _data())
        tx = optax_ev3.ev3([optax.sgd(1.0)], assess_fn, adapt=always(1))
        w = jnp.float32(2.0)
        extras = {name: jnp.full([3], 100.0), "scale": 2.0}
        _, state = tx.update(w, tx.init(w), w, **extras)
        np.testing.assert_allclose(state.history.mean[0], 2 * _data().mean())


# Shuffled epochs.


def walk(size, batch_size):
    return held_out(label, jnp.arange(size, dtype=jnp.float32), batch_size, True)


@functools.cache
def walked(size, batch_size, rounds, key=0):
    """``[rounds, batch_size]`` int, the same for all candidates."""
    found = drawn(rounds, walk(size, batch_size), key)
    np.testing.assert_array_equal(found, found[:, :1].repeat(3, axis=1))
    return found[:, 0].astype(int)


SHAPES = [(10, 4), (12, 4), (10, 10), (7, 5), (9, 1), (1, 1), (40, 39)]


@pytest.mark.parametrize(("size", "batch_size"), SHAPES)
def test_shuffled_examples_are_used_equally_often(size, batch_size):
    found = walked(size, batch_size, 60)
    for rounds in range(1, 61):
        counts = np.bincount(found[:rounds].ravel(), minlength=size)
        assert counts.max() - counts.min() <= 1
    whole = found.size // size
    epochs = found.ravel()[: whole * size].reshape(whole, size)
    np.testing.assert_array_equal(
        np.sort(epochs, axis=1), np.tile(np.arange(size), (whole, 1))
    )
    if size >= 10:
        assert len(np.unique(epochs, axis=0)) == whole
        # Sets of examples are new in each epoch, not their order alone.
        assert len({tuple(sorted(row)) for row in found}) > 1 or batch_size == size


def test_shuffled_orders_are_uniform():
    epochs = walked(3, 1, 3 * 3000).reshape(3000, 3)
    # Chi-square of the six orders, 5 degrees of freedom: 25.7 with probability 0.0001.
    _, counts = np.unique(epochs, axis=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 25.7
    # And an epoch says nothing about the next one; 0.0086 is one sigma.
    same = (epochs[1:, 0] == epochs[:-1, 0]).mean()
    assert abs(same - 1 / 3) < 0.034


def test_shuffled_rounds_follow_the_seed():
    assert (walked(40, 8, 20, key=1) != walked(40, 8, 20)).any()


@given(st.integers(0, 2**31 - 1), st.integers(1, 2**26), st.data())
@example(2**31 - 1, 2**26, None)
@settings(deadline=None)
def test_split_is_exact(count, size, data):
    step = size - 1 if data is None else data.draw(st.integers(1, size))
    found = _split(jnp.int32(count), step, size)
    assert [int(x) for x in found] == list(divmod(count * step, size))


def test_shuffled_rounds_of_a_long_run():
    x = jnp.arange(10.0)
    assess_fn = held_out(label, x, 4, shuffle=True)
    key = jax.random.key(0)

    def rows(round):
        return assess_fn(0.0, key=key, round=round, run_key=key)

    start = 2**31 - 6  # 4 * (2**31 - 6) = 10 * 858993456 + 8.
    found = np.concatenate([rows(start + i) for i in range(6)])
    assert sorted(found[2:12]) == sorted(found[12:22]) == list(range(10))
    np.testing.assert_array_equal(found[:4], jax.jit(rows)(jnp.int32(start)))


def test_shuffled_trajectories_walk_by_rounds():
    found = drawn(6, walk(12, 4), calls=3)
    np.testing.assert_array_equal(found[:, 0], walked(12, 4, 60)[:6])


@pytest.mark.parametrize(("size", "batch_size"), [(24, 3), (25, 3), (16, 2)])
def test_devices_take_turns_in_one_walk(size, batch_size):
    rule = remembering(lambda _: [8 * batch_size], lambda scores: scores[1])
    assess_fn = walk(size, batch_size)
    tx = optax_ev3.ev3([optax.sgd(1.0)], assess_fn, adapt=rule, axis_name="i")
    mapped = jax.vmap(lambda _: run(tx, 12), axis_name="i")
    found = np.asarray(mapped(jnp.arange(8)))
    alone = walked(size, 8 * batch_size, 12)
    np.testing.assert_array_equal(found, jnp.broadcast_to(alone, found.shape))


def test_shuffled_on_a_mesh():
    if not hasattr(jax, "shard_map"):
        pytest.skip("this JAX has no jax.shard_map")
    tx = optax_ev3.ev3([optax.sgd(1.0)], walk(24, 2), axis_name="i")
    w = jnp.float32(2.0)

    def update(state):
        return tx.update(w, state, w)[1]

    mesh = jax.make_mesh((8,), ("i",))
    mapped = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=P(), out_specs=P()))
    state = tx.init(w)
    for _ in range(3):
        state = mapped(state)
    # Three batches of 16 are two epochs of 24.
    alone = walked(24, 16, 12)[:3].mean(axis=1)
    np.testing.assert_allclose(state.history.mean[:3, 1], alone, rtol=1e-6)


def test_shuffled_runs_side_by_side():
    def run(key):
        tx = optax_ev3.ev3([optax.sgd(1.0)], walk(10, 4), key=key)
        w = jnp.float32(2.0)

        def body(state, _):
            return tx.update(w, state, w)[1], None

        return lax.scan(body, tx.init(w), length=5)[0].history.mean[:5, 1]

    found = jax.jit(jax.vmap(run))(jnp.arange(3))
    for key in range(3):
        alone = walked(10, 4, 60, key)[:5].mean(axis=1)
        np.testing.assert_allclose(found[key], alone, rtol=1e-6)


def test_shuffled_metrics_get_named_arguments():
    def metric(params, batch, round, scale):
        return params * 0 + batch * 0 + scale * (1 + round)

    assess_fn = held_out(metric, _data(), BATCH, shuffle=True)
    tx = optax_ev3.ev3([optax.sgd(1.0)], assess_fn, adapt=always(0))
    w = jnp.float32(2.0)
    state = tx.init(w)
    for _ in range(2):
        _, state = tx.update(w, state, w, scale=5.0)
    np.testing.assert_array_equal(state.history.mean[:2, 0], [5, 10])


# Data that the caller passes.

WAYS = {
    "all": {},
    "batches": {"batch_size": BATCH},
    "epochs": {"batch_size": BATCH, "shuffle": True},
}


def _past(assess_fn, rounds=6, **extras):
    tx = optax_ev3.ev3([optax.sgd(1.0)], assess_fn, adapt=always(0))
    w = jnp.float32(2.0)
    update, state = jax.jit(tx.update), tx.init(w)
    for _ in range(rounds):
        _, state = update(w, state, w, **extras)
    return np.asarray(state.history.mean[:rounds])


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_data_given_by_name_are_drawn_like_those_held(way, chunked):
    wrap = (lambda fn: optax_ev3.in_chunks(fn, 2)) if chunked else (lambda fn: fn)
    held = _past(wrap(held_out(label, _data(), **WAYS[way])))
    named = wrap(held_out(label, "examples", **WAYS[way]))
    found = _past(named, examples=_data(), batch=jnp.ones(3))
    np.testing.assert_array_equal(found, held)
    # Those of the call count, not those of another one.
    np.testing.assert_allclose(_past(named, examples=10 * _data()), 10 * held)


@pytest.mark.parametrize("name", ["batch", "other"])
def test_a_metric_may_call_its_batch_as_the_caller_calls_the_data(name):
    def metric(params, batch, scale):
        return params * 0 + batch * scale

    found = _past(held_out(metric, name), 1, scale=3.0, **{name: _data()})
    np.testing.assert_allclose(found, 3 * np.arange(SIZE).mean())


@pytest.mark.parametrize("name", ["key", "round", "chunks", "not a name", ""])
def test_names_that_no_data_can_have(name):
    with pytest.raises(ValueError, match="the name of an argument of update") as told:
        held_out(label, name)
    assert repr(name) in str(told.value)


@pytest.mark.parametrize(
    ("extras", "kwargs", "kind", "said"),
    [
        ({"other": 1.0}, {}, TypeError, "held=....* given: ..other"),
        ({"held": 1.0}, {}, ValueError, "held must hold arrays whose first axis"),
        (
            {"held": [np.ones(3), np.ones(4)]},
            {},
            ValueError,
            "arrays of held .*leading",
        ),
        (
            {"held": np.ones(3)},
            {"batch_size": 4},
            ValueError,
            "between 1 and the 3 examples of held, got 4",
        ),
    ],
)
def test_mistakes_in_data_given_by_name(extras, kwargs, kind, said):
    tx = optax_ev3.ev3([optax.sgd(1.0)], held_out(label, "held", **kwargs))
    w = jnp.float32(2.0)
    with pytest.raises(kind, match=said):
        tx.update(w, tx.init(w), w, **extras)


# Mistakes.


def test_shuffling_needs_a_batch_size():
    with pytest.raises(ValueError, match="shuffle needs a batch_size"):
        held_out(label, _data(), shuffle=True)


def test_shuffling_needs_the_round():
    inner = held_out(label, _data(), BATCH, shuffle=True)
    tx = optax_ev3.ev3([optax.sgd(1.0)], lambda params, key: inner(params, key=key))
    w = jnp.float32(2.0)
    with pytest.raises(TypeError, match="the round and the run_key"):
        tx.update(w, tx.init(w), w)


def test_devices_may_not_shuffle_more_than_all_data():
    assess_fn = held_out(label, _data(), BATCH, shuffle=True)
    tx = optax_ev3.ev3([optax.sgd(1.0)], assess_fn, axis_name="i")
    w = jnp.float32(2.0)
    update = jax.vmap(lambda _: tx.update(w, tx.init(w), w)[1], axis_name="i")
    with pytest.raises(ValueError, match=r"3 devices.* batches of 4.* the 10 examples"):
        update(jnp.arange(3))


def test_shuffling_has_a_limit():
    data = jnp.zeros([2**26 + 1], bool)
    with pytest.raises(ValueError, match=r"at most 67108864 examples, .* 67108865"):
        held_out(label, data, BATCH, shuffle=True)
    held_out(label, data, BATCH)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (np.array(["a", "b"]), ["dtype <U1"]),
        ({"x": _data(), "text": np.array(["a", "bc"])}, ["dtype <U2", "['text']"]),
        ((_data(), "label"), ["str", "data[1]"]),
        (np.array([{}, {}]), ["dtype object"]),
        (np.array(["2020", "2021"], "M8[Y]"), ["dtype datetime64[Y]"]),
        (np.zeros(2, "i4,f4"), ["dtype [('f0'"]),
    ],
)
def test_data_must_be_numbers(data, parts):
    with pytest.raises(TypeError, match="must hold arrays of numbers") as told:
        held_out(label, data, 1)
    assert all(part in str(told.value) for part in parts), told.value
