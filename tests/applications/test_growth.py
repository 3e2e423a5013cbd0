"""Growth: against NumPy by hand, in training, and bad input."""

import contextlib
import functools
import inspect
import itertools
import logging

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from helpers import (
    always,
    assert_close,
    assert_finite,
    assert_identical,
    assert_same_types,
    lenient,
    meshes,
    says,
    traced,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from optax import contrib

import optax_ev3
from optax_ev3 import adapt, explore
from optax_ev3.growth import Growth, grow, transplant

# optax warns of changes to come in some of its own defaults.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning:optax"
)

DRAWN = np.random.default_rng(0)
X = DRAWN.normal(size=(32, 3)).astype(np.float32)
Y = (X**2 @ DRAWN.normal(size=(3, 2)) + X[:, :2]).astype(np.float32)
TRAIN, HELD = (X[:16], Y[:16]), (X[16:], Y[16:])


# A multilayer perceptron without Flax.


def network(widths, seed=0):
    """Kernels and biases, by the names that Flax would give them."""
    key = jax.random.key(seed)
    sizes = [3, *widths, 2]
    params = {}
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        name = "head" if i == len(widths) else f"hidden_{i + 1}"
        key, *keys = jax.random.split(key, 3)
        kernel = jax.random.normal(keys[0], [n, m]) * (2 / n) ** 0.5
        params[name] = {"kernel": kernel, "bias": jax.random.normal(keys[1], [m]) / 8}
    return params


def apply(params, x=X):
    for i in range(1, len(params)):
        layer = params[f"hidden_{i}"]
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


def score(params, batch):
    x, y = batch
    return -jnp.square(apply(params, x) - y).mean(axis=1)


def loss(params, batch=TRAIN):
    return -score(params, batch).mean()


def stepper(tx):
    """``step(params, state) -> params, state``; plain optimizers take no batch."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, batch=HELD)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, params, steps=3, state=None):
    state = tx.init(params) if state is None else state
    step = jax.jit(stepper(tx))
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def ev3(inner=None, **kwargs):
    inner = inner or {"adam": optax.adam(0.02), "sgd": optax.sgd(0.05, momentum=0.9)}
    return optax_ev3.ev3(inner, score, **kwargs)


# Oracles.


def name_of(path):
    return "/".join(str(getattr(k, "key", getattr(k, "name", None))) for k in path)


def flat(tree):
    """Arrays by path, those of sequences by their numbers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def by_hand(old, fresh, kept, inputs):
    """One entry after the other: an old one, zero, or a fresh one."""
    out = np.array(fresh)
    where = [list(places) for places in kept]
    for index in np.ndindex(*fresh.shape):
        known = [at in places for at, places in zip(index, where, strict=True)]
        if all(known):
            source = tuple(p.index(at) for at, p in zip(index, where, strict=True))
            out[index] = old[source]
        elif inputs and all(
            known[axis] for axis in range(len(index)) if axis not in inputs
        ):
            out[index] = 0
    return out


def corner(old, into):
    """``into`` with the old entries first."""
    out = np.array(into)
    out[tuple(slice(size) for size in old.shape)] = old
    return out


def assert_corners(state, before, into):
    """Every array holds the old one first and, behind it, what ``into`` has."""
    state, before, into = map(flat, (state, before, into))
    assert state.keys() == into.keys()
    for path, array in state.items():
        if path.endswith(".history.since"):
            assert array == 0, path
            continue
        expected = corner(before[path], into[path]) if path in before else into[path]
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected, err_msg=path)


def apart(one, other):
    """The largest difference over the largest value."""
    one, other = (np.asarray(x, np.float64) for x in (one, other))
    return np.abs(one - other).max() / np.abs(one).max()


# Where the old entries go.


@st.composite
def _placements(draw):
    old = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    new = [size + draw(st.integers(0, 3)) for size in old]
    where = {
        axis: sorted(
            draw(st.lists(st.integers(0, n - 1), min_size=o, max_size=o, unique=True))
        )
        for axis, (o, n) in enumerate(zip(old, new, strict=True))
        if draw(st.booleans())
    }
    axes = st.lists(st.integers(0, len(old) - 1), unique=True)
    return old, new, where, draw(st.none() | axes), draw(st.booleans())


@settings(max_examples=25, deadline=None)
@given(_placements())
def test_transplant_equals_numpy(placement):
    old_shape, new_shape, where, inputs, is_kernel = placement
    old = np.arange(1, 1 + np.prod(old_shape), dtype=np.float32).reshape(old_shape)
    fresh = -np.arange(1, 1 + np.prod(new_shape), dtype=np.float32).reshape(new_shape)
    name = "kernel" if is_kernel else "weight"
    how = Growth(
        positions={f"*{name}": where},
        inputs={} if inputs is None else {"layer/*": inputs},
    )
    got = transplant({"layer": {name: old}}, {"layer": {name: fresh}}, how)
    if inputs is None:
        inputs = range(len(old_shape) - 1) if is_kernel else ()
    kept = [where.get(axis, range(size)) for axis, size in enumerate(old_shape)]
    expected = by_hand(old, fresh, kept, set(inputs))
    np.testing.assert_array_equal(got["layer"][name], expected)


def _numpy_mlp(params, x):
    for i in range(1, len(params)):
        layer = params[f"hidden_{i}"]
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.lists(st.integers(0, 5), min_size=3, max_size=3),
    st.booleans(),
    st.integers(0, 99),
)
def test_random_mlps_keep_their_function(widths, more, deepen, seed):
    def draw(widths):
        rng = np.random.default_rng(seed)
        sizes = [3, *widths, 2]
        names = [f"hidden_{i}" for i in range(1, len(widths) + 1)] + ["head"]
        return {
            name: {"kernel": rng.normal(size=(n, m)), "bias": rng.normal(size=m)}
            for name, (n, m) in zip(names, itertools.pairwise(sizes), strict=True)
        }

    wider = [w + m for w, m in zip(widths, more, strict=False)]
    how = Growth()
    if deepen:
        wider = [*widths, widths[-1]]
        how = Growth(identity=[f"hidden_{len(wider)}"])
    old = draw(widths)
    new = jax.tree.map(np.float64, transplant(old, draw(wider), how))
    assert apart(_numpy_mlp(old, X), _numpy_mlp(new, X)) < 1e-5


def test_rename_follows_what_moved():
    old = {"Dense_0": np.full(2, 1.0), "Dense_1": np.full(2, 2.0)}
    fresh = {f"Dense_{i}": np.full(3, 9.0) for i in range(3)}
    new = transplant(old, fresh, Growth(rename={"Dense_2": "Dense_1"}))
    np.testing.assert_array_equal(new["Dense_0"], [1, 1, 9])
    np.testing.assert_array_equal(new["Dense_1"], [9, 9, 9])
    np.testing.assert_array_equal(new["Dense_2"], [2, 2, 9])
    swapped = transplant(
        old, old, Growth(rename={"Dense_0": "Dense_1", "Dense_1": "Dense_0"})
    )
    np.testing.assert_array_equal(swapped["Dense_0"], [2, 2])
    np.testing.assert_array_equal(swapped["Dense_1"], [1, 1])


def test_rename_of_parts_of_paths():
    old = {"net": {"in": {"w": np.ones(2)}, "inner": {"w": np.full(2, 5.0)}}}
    fresh = {"net": {"first": {"w": np.zeros(2)}, "inner": {"w": np.zeros(2)}}}
    new = transplant(old, fresh, Growth(rename={"net/first": "net/in"}))
    np.testing.assert_array_equal(new["net"]["first"]["w"], [1, 1])
    np.testing.assert_array_equal(new["net"]["inner"]["w"], [5, 5])


def test_larger_windows_of_a_convolution():
    old = {"kernel": np.ones([3, 3, 2, 2], np.float32)}
    fresh = {"kernel": np.full([5, 5, 2, 3], 7, np.float32)}
    middle = Growth(positions={"kernel": {0: [1, 2, 3], 1: [1, 2, 3]}})
    new = np.asarray(transplant(old, fresh, middle)["kernel"])
    expected = np.zeros([5, 5, 2, 3])
    expected[1:4, 1:4] = 1
    expected[..., 2] = 7
    np.testing.assert_array_equal(new, expected)


def test_takes_the_dtypes_of_the_large_model():
    old = {"same": np.ones(2, np.float32), "wider": np.ones(2, np.float32)}
    fresh = {
        "same": jnp.zeros(2, jnp.bfloat16),
        "wider": jnp.zeros(3, jnp.bfloat16),
        "new": jnp.zeros(3, jnp.bfloat16),
    }
    assert_same_types(transplant(old, fresh), fresh)
    weak = {"same": jnp.full(2, 1.0), "wider": np.ones(2)}
    assert_same_types(transplant(weak, jax.tree.map(lambda x: x, fresh)), fresh)


def test_more_classes():
    old = network((4, 4))
    fresh = network((4, 4), 1)
    fresh["head"] = {"kernel": jnp.full([4, 3], 7.0), "bias": jnp.full([3], 8.0)}
    new = transplant(old, fresh)
    np.testing.assert_array_equal(apply(new)[:, :2], apply(old))
    np.testing.assert_array_equal(new["head"]["kernel"][:, 2], np.full(4, 7))


# What is taken along.


def _by_layer(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "b" if "head" in name_of(path) else "a", params
    )


def _two():
    return {"adam": optax.adam(0.02), "sgd": optax.sgd(0.05, momentum=0.9)}


def _long(strategy=None, **kwargs):
    strategy = strategy or explore.rounds(5)
    return ev3(loss_fn=loss, adapt=always(0), explore=strategy, **kwargs)


def quick(inner=None, **kwargs):
    """With a rule that compiles quickly."""
    return ev3(inner, adapt=always(0), **kwargs)


TRANSFORMATIONS = {
    "adamw": lambda: optax.adamw(0.02),
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
    "ev3": ev3,
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), ev3()),
    "sweep": lambda: quick(
        [optax_ev3.sweep(optax.adam, learning_rate=[0.01, 0.02, 0.03])]
    ),
    "evolve": lambda: quick(
        {
            "group": optax_ev3.evolve(
                optax.adam, {"learning_rate": optax_ev3.log_uniform(1e-3, 0.1)}, 3
            )
        }
    ),
    "partition": lambda: quick(
        [
            optax.partition(
                {"a": optax.adam(0.02), "b": optax.sgd(0.05, momentum=0.9)}, _by_layer
            )
        ]
    ),
    "masked": lambda: quick(
        [
            optax.chain(
                optax.masked(
                    optax.trace(0.9), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
                ),
                optax.scale(-0.02),
            )
        ]
    ),
    "schedule_free": lambda: quick([contrib.schedule_free_adamw(0.02)]),
    "lbfgs": lambda: quick([optax.lbfgs(memory_size=2)], loss_fn=loss),
    "noise": lambda: quick([optax.chain(optax.ema(0.9), optax.sgd(0.02))], key=3),
    "trajectory": lambda: _long(
        explore.rounds(
            3, averages=[explore.trajectory_average(), explore.branch_average(0.9)]
        )
    ),
    "never": lambda: _long(explore.branches(3, racing=explore.Racing(2))),
    "relay": lambda: quick(_two(), explore=explore.relay(2)),
    "relay of a stack": lambda: quick(
        {f"adam_{rate}": optax.adam(rate) for rate in (0.01, 0.02, 0.03)},
        explore=explore.relay(2),
    ),
    "guard": lambda: ev3(adapt=adapt.guarded(adapt.confident(), adapt.ladder())),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.02), 2),
}


def larger(kind="both", seed=1):
    """Fresh parameters, and how those of ``network((4, 4))`` lie in them."""
    if kind == "wider":
        return network((6, 7), seed), Growth()
    widths = (4, 4, 4) if kind == "deeper" else (6, 7, 7)
    return network(widths, seed), Growth(identity=["hidden_3"])


def filled(tree, seed=0):
    """Random numbers in the place of all numbers."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            return jnp.asarray(rng.integers(1, 9, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.uniform(0.1, 1, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, tree)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_everything_is_taken_along(name):
    tx, params = TRANSFORMATIONS[name](), network((4, 4))
    state = filled(jax.eval_shape(tx.init, params))
    fresh, how = larger()
    grown = grow(tx, state, params, fresh, how, check=(apply, apply))
    into = tx.init(grown.params)
    assert_same_types(grown.state, into)
    assert_corners(grown.state, state, into)


_QUICK = ["adamw", "ev3", "trajectory"]
# Programs much like others: that their states are taken along is enough.
_ALIKE = {"momentum", "partition", "masked", "noise"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in TRANSFORMATIONS
        if name not in _ALIKE
    ],
)
def test_training_goes_on(name):
    tx = TRANSFORMATIONS[name]()
    params, state = train(tx, network((4, 4)))
    fresh, how = larger()
    grown = grow(tx, state, params, fresh, how, check=(apply, apply))
    assert apart(apply(params), apply(grown.params)) < 1e-5
    old = jax.tree.map(np.array, (params, state, fresh))
    before = np.array(grown.params["hidden_2"]["kernel"])
    # No call after the first compiles, and all buffers can be donated.
    step, traces = traced(stepper(tx), donate_argnums=(0, 1))
    new, after = step(*grown)
    for _ in range(3):
        new, after = step(new, after)
    assert len(traces) == 1
    assert_same_types((new, after), (fresh, tx.init(new)))
    assert_finite((new, after))
    assert not np.array_equal(new["hidden_2"]["kernel"], before)
    # What was there before growth is still there.
    assert_identical(jax.tree.map(np.array, (params, state, fresh)), old)


def test_factored_moments_begin_anew():
    tx = ev3([optax.adafactor(0.01, min_dim_size_to_factor=4, momentum=0.9)])
    params = network((4, 4))
    state = filled(jax.eval_shape(tx.init, params))
    params, grown = grow(tx, state, params, network((4, 6), 1))
    into = tx.init(params)
    old, new, init = (
        s.explore.explorers["explorer_0"].opt_state for s in (state, grown, into)
    )
    old, new, init = map(flat, (old, new, init))
    for path, array in new.items():
        same = old[path].shape == array.shape
        anew = "kernel" in path and (".v_row" in path or ".v_col" in path)
        if same or (anew and not same):
            expected = old[path] if same else init[path]
        else:
            expected = corner(old[path], init[path])
        np.testing.assert_array_equal(array, expected, err_msg=path)
    changed = [path for path in new if old[path].shape != new[path].shape]
    assert any(".v_col" in path for path in changed)


def test_history_is_the_same_and_progress_counts_anew():
    tx = ev3(history_length=16)
    params = network((4, 4))
    state = filled(jax.eval_shape(tx.init, params))
    assert optax_ev3.should_grow(state, 1)
    state = state._replace(history=state.history._replace(rounds=jnp.int32(20)))
    grown = grow(tx, state, params, *larger()).state
    assert not optax_ev3.should_grow(grown, 1)
    assert not optax_ev3.stalled(grown, 8)
    before, after = optax_ev3.history(state), optax_ev3.history(grown)
    assert flat(before).keys() == flat(after).keys()
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert_identical(optax_ev3.summary(grown), optax_ev3.summary(state))
    assert_identical(grown.rule_state, state.rule_state)


def test_goes_on_in_the_middle_of_a_round():
    tx = _long(history_length=4)
    params, state = train(tx, network((4, 4)), 7)
    assert (int(state.ev3_round), int(state.explore.branches.step)) == (1, 2)
    params, state = grow(tx, state, params, *larger("wider"))
    assert int(state.explore.branches.step) == 2
    step = jax.jit(stepper(tx))
    rounds = []
    for _ in range(8):
        params, state = step(params, state)
        rounds.append(int(state.ev3_round))
    assert rounds == [1, 1, 2, 2, 2, 2, 2, 3]


def test_goes_on_as_if_nothing_had_happened():
    """With nothing new but idle units, training is as it would have been."""
    tx = ev3({"sgd": optax.sgd(0.05, momentum=0.9)})
    small, state = train(tx, network((4, 4)), 3)
    fresh = jax.tree.map(jnp.zeros_like, network((6, 7)))
    large, grown = grow(tx, state, small, fresh)
    small, state = train(tx, small, 5, state)
    large, grown = train(tx, large, 5, grown)
    assert apart(apply(small), apply(large)) < 1e-5
    assert apart(*(optax_ev3.history(s)["mean"] for s in (state, grown))) < 1e-5


def test_winner_and_stable_keep_their_scores():
    tx = ev3(adapt=adapt.lower_bound())
    params, state = train(tx, network((4, 4)), 10)
    for kind in ("wider", "deeper"):
        fresh, how = larger(kind)
        new, grown = grow(tx, state, params, fresh, how)
        assert apart(score(params, HELD), score(new, HELD)) < 1e-5
        stable = optax_ev3.stable_params(state), optax_ev3.stable_params(grown)
        assert apart(*(score(p, HELD) for p in stable)) < 1e-5


def test_repeated_growth():
    tx, params = optax.adam(0.02), network((4,))
    params, state = train(tx, params)
    steps = [
        ((4, 4), Growth(identity=["hidden_2"])),
        ((8, 8), Growth()),
        ((8, 8, 8), Growth(identity=["hidden_3"])),
    ]
    for seed, (widths, how) in enumerate(steps):
        fresh = network(widths, seed)
        new, state = grow(tx, state, params, fresh, how, check=(apply, apply))
        assert apart(apply(params), apply(new)) < 1e-5
        params, state = train(tx, new, 3, state)
    assert_finite((params, state))


@pytest.mark.parametrize("kind", ["wider", "deeper", "both"])
def test_new_units_learn(kind):
    params = network((4, 4), seed=8)
    fresh, how = larger(kind)
    new = transplant(params, fresh, how)
    # So many examples that any two units are active together.
    x = np.random.default_rng(1).normal(size=[1000, 3]).astype(np.float32)
    batch = x, x[:, :2] ** 2
    grads = jax.grad(loss)(new, batch)
    new = jax.tree.map(lambda p, g: p - 1e-3 * g, new, grads)
    old, count = flat(params), 0
    for path, grad in flat(jax.grad(loss)(new, batch)).items():
        is_new = np.ones(grad.shape, bool)
        if path in old:
            is_new[tuple(map(slice, old[path].shape))] = False
        count += is_new.sum()
        assert (grad[is_new] != 0).all(), path
    assert count > 15


def test_explorers_named_like_parameters():
    def init(width):
        make = functools.partial(jnp.full, fill_value=0.5)
        return {
            "adam": {"w": make([width])},
            "w": make([2, width]),
            "stable": make([width]),
            "mu": {"adam": make([1]), "w": make([width])},
        }

    def score(params):
        return -sum(jnp.square(x - 1).sum() for x in jax.tree.leaves(params))[None]

    tx = optax_ev3.ev3({"adam": optax.adam(0.1), "w": optax.adam(0.2)}, score)
    params = init(3)
    state = filled(jax.eval_shape(tx.init, params))
    new, grown = grow(tx, state, params, init(5))
    assert_corners(grown, state, tx.init(new))


def test_typed_keys_go_on():
    names = inspect.signature(optax.add_noise).parameters
    key = {"key": jax.random.key(3)} if "key" in names else {"seed": 3}
    tx = optax.chain(optax.add_noise(0.1, 0.5, **key), optax.sgd(0.1, momentum=0.9))
    params, state = train(tx, network((4, 4)))
    grown = grow(tx, state, params, *larger())
    old, new = (s[0].rng_key for s in (state, grown.state))
    if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        old, new = map(jax.random.key_data, (old, new))
    np.testing.assert_array_equal(old, new)
    assert_finite(train(tx, grown.params, 1, grown.state)[0])


def test_a_new_array_named_like_an_explorer():
    def score(params):
        return -sum(jnp.square(x - 1).sum() for x in jax.tree.leaves(params))[None]

    group = optax_ev3.evolve(
        optax.sgd, {"learning_rate": optax_ev3.log_uniform(1e-3, 0.1)}, 3
    )
    tx = optax_ev3.ev3({"w": group}, score)
    params = {"b": jnp.zeros([2])}
    state = filled(jax.eval_shape(tx.init, params))
    fresh = {"b": jnp.zeros([2]), "w": jnp.zeros([3]), "learning_rate": jnp.ones([3])}
    new, grown = grow(tx, state, params, fresh)
    assert_corners(grown, state, tx.init(new))


def test_one_array_as_parameters():
    def score(w):
        return -jnp.square(w - 1).sum()[None]

    tx = optax_ev3.ev3([optax.adam(0.1)], score)
    w = jnp.array([0.5, 0.25])
    state = filled(jax.eval_shape(tx.init, w))
    new, grown = grow(tx, state, w, jnp.full([3], 7.0))
    np.testing.assert_array_equal(new, [*np.asarray(w), 7])
    assert_corners(grown, state, tx.init(new))


def test_from_numpy_and_back():
    """Restored checkpoints are NumPy arrays, and what has grown can be saved."""
    tx = _long()
    params, state = jax.tree.map(np.asarray, train(tx, network((4, 4)), 7))
    grown = grow(tx, state, params, *larger("wider"))
    saved = flax.serialization.to_bytes(tuple(grown))
    restored = flax.serialization.from_bytes(tuple(grown), saved)
    restored = jax.tree.map(jnp.asarray, restored)
    assert_identical(restored, tuple(grown))
    step = jax.jit(stepper(tx))
    ends = [tuple(grown), restored]
    for _ in range(6):
        ends = [step(*end) for end in ends]
    assert_identical(*ends)


def test_log(caplog):
    tx = optax.adam(0.1)
    params = network((4, 4))
    with caplog.at_level(logging.INFO, "optax_ev3"):
        grow(tx, tx.init(params), params, *larger("deeper"), check=(apply, apply))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("optax_ev3", logging.INFO)
    small = 3 * 4 + 4 + 4 * 4 + 4 + 4 * 2 + 2
    assert record.message == (
        f"grew from {small} to {small + 20} numbers: of 8 arrays 2 are new and 0 "
        f"larger; change of the outputs: 0.0e+00, relative"
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, "optax_ev3"):
        grow(tx, tx.init(params), params, *larger("wider"))
    assert "0 are new and 5 larger" in caplog.text and "not checked" in caplog.text


# Models of one's own.


class Transformer(linen.Module):
    """A small transformer without LayerNorm around what grows."""

    heads: int = 2
    hidden: int = 8
    blocks: int = 1

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(6, name="in")(x)
        x = x + linen.Embed(4, 6, name="positions")(jnp.arange(4))
        for i in range(self.blocks):
            x = x + linen.MultiHeadDotProductAttention(
                self.heads, qkv_features=3 * self.heads, name=f"attention_{i}"
            )(linen.LayerNorm(name=f"norm_{i}_1")(x))
            y = linen.LayerNorm(name=f"norm_{i}_2")(x)
            y = linen.gelu(linen.Dense(self.hidden, name=f"up_{i}")(y))
            x = x + linen.Dense(6, name=f"down_{i}")(y)
        return linen.Dense(2, name="head")(x.mean(axis=1))


HEADS = {
    "*out/kernel": (0, 1),
    "*query/kernel": (0,),
    "*key/kernel": (0,),
    "*value/kernel": (0,),
}


class Convolutions(linen.Module):
    """A plain stack that is flattened before the last layer."""

    filters: int = 3
    layers: int = 1

    @linen.compact
    def __call__(self, x):
        for i in range(self.layers):
            x = linen.relu(linen.Conv(self.filters, (3, 3), name=f"conv_{i}")(x))
        return linen.Dense(2, name="head")(x.reshape([x.shape[0], -1]))


def _flattened(old, new, area):
    """Where the channels of every pixel go."""
    return [pixel * new + channel for pixel in range(area) for channel in range(old)]


TEXT, IMAGES = (32, 4, 5), (32, 4, 4, 2)
MODELS = {
    "wider": (TEXT, Transformer(), Transformer(hidden=12), Growth()),
    "more heads": (TEXT, Transformer(), Transformer(heads=4), Growth(inputs=HEADS)),
    "one more block": (
        TEXT,
        Transformer(),
        Transformer(blocks=2),
        Growth(zero=["*_1/out/*", "*down_1/*"]),
    ),
    "flattened": (
        IMAGES,
        Convolutions(),
        Convolutions(filters=5),
        Growth(positions={"*head/kernel": {0: _flattened(3, 5, 16)}}),
    ),
    "identity": (
        IMAGES,
        Convolutions(),
        Convolutions(layers=2),
        Growth(identity=["*conv_1"]),
    ),
}


def _fit(model, data, params, state, steps):
    x, y = data

    def loss(params):
        return jnp.square(model.apply(params, x) - y).mean()

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = optax.adam(0.01).update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    for _ in range(steps):
        params, state, grads = step(params, state)
    return params, state, grads


@functools.cache
def _fitted(shape, model):
    """Data of this shape, and a model after three steps on them."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    y = jnp.asarray(np.random.default_rng(2).normal(size=[32, 2]), jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)
    state = optax.adam(0.01).init(params)
    return (x, y), *_fit(model, (x, y), params, state, 3)[:2]


@pytest.mark.parametrize("name", MODELS)
def test_models_of_ones_own(name):
    shape, small, large, how = MODELS[name]
    tx = optax.adam(0.01)
    with lenient():
        data, params, state = _fitted(shape, small)
        fresh = jax.jit(large.init)(jax.random.key(1), data[0])
        check = [jax.jit(lambda p, m=m: m.apply(p, data[0])) for m in (small, large)]
        grown = grow(tx, state, params, fresh, how, check=check)
        assert apart(check[0](params), check[1](grown.params)) < 1e-5
        new, _, grads = _fit(large, data, *grown, 2)
    assert_finite(new)
    old, total = flat(params), 0
    for path, grad in flat(grads).items():
        if path in old and old[path].shape == grad.shape:
            continue
        if "key" in path and "bias" in path:
            continue  # The softmax does not see it: its gradient is noise.
        total += grad.size
        assert (grad != 0).mean() > 0.99, path
    assert total > 50
    # Adam's moments, by hand.
    before, after = (flat(s[0].mu) for s in (state, grown.state))
    for path, array in after.items():
        old = before.get(path, np.zeros([0] * array.ndim))
        kept = [*map(range, old.shape)]
        if name == "flattened" and "head" in path and array.ndim == 2:
            kept[0] = _flattened(3, 5, 16)
        expected = by_hand(old, np.zeros(array.shape, np.float32), kept, ())
        np.testing.assert_array_equal(array, expected, err_msg=path)


# Bad input.


def _tree(**arrays):
    """Arrays of ones by name, ``__`` for ``/``, of these shapes."""
    tree = {}
    for name, shape in arrays.items():
        *where, last = name.split("__")
        node = tree
        for part in where:
            node = node.setdefault(part, {})
        node[last] = np.ones(shape, np.float32)
    return tree


_ONE = _tree(a__kernel=(2, 3), a__bias=(3,))
_TWO = _tree(a__kernel=(2, 3), a__bias=(3,), b__kernel=(3, 3), b__bias=(3,))
_WIDE = _tree(a__kernel=(2, 5), a__bias=(5,))

# By name: the old arrays, the new ones, how, and what the error says.
DOES_NOT_FIT = {
    "smaller": (_WIDE, _ONE, {}, ["(5,)", "a/bias", "(3,)", "none of them shorter"]),
    "other rank": (
        _tree(w=(2, 3)),
        _tree(w=(6,)),
        {},
        ["shape (2, 3) into w", "(6,)", "as many axes"],
    ),
    "narrower head": (
        _tree(head__kernel=(4, 10)),
        _tree(head__kernel=(8, 9)),
        {},
        ["(4, 10)", "head/kernel", "(8, 9)"],
    ),
    "lost": (_TWO, _ONE, {}, ["lose b/", "rename"]),
    "lost many": (
        _tree(a=(1,), b=(1,), c=(1,), d=(1,), e=(1,)),
        _tree(a=(1,)),
        {},
        ["lose b, c, d and 1 more"],
    ),
    "rename from nowhere": (
        _ONE,
        _TWO,
        {"rename": {"c": "a"}},
        ["rename has 'c'", "large model"],
    ),
    "rename to nowhere": (
        _ONE,
        _TWO,
        {"rename": {"b": "c"}},
        ["rename has 'c'", "small model"],
    ),
    "rename half a name": (
        _tree(hidden=(1,)),
        _tree(hidden=(1,)),
        {"rename": {"hid": "hidden"}},
        ["rename has 'hid'"],
    ),
    "rename two to one": (
        _tree(a=(1,)),
        _tree(b=(1,), c=(1,)),
        {"rename": {"b": "a", "c": "a"}},
        ["a of the small model", "both b and c"],
    ),
    "rename loses": (
        _tree(a=(1,), b=(1,)),
        _tree(a=(1,), b=(1,)),
        {"rename": {"a": "b"}},
        ["lose a"],
    ),
    **{
        f"nothing matches {name}": (
            _ONE,
            _TWO,
            {name: value},
            ["no array of the large model matches 'c", "a/bias, a/kernel, b/bias and"],
        )
        for name, value in {
            "identity": ["c"],
            "zero": ["c"],
            "inputs": {"c": (0,)},
            "positions": {"c": {0: [0]}},
        }.items()
    },
    "identity of other sizes": (
        _ONE,
        _tree(a__kernel=(2, 3), a__bias=(3,), b__kernel=(3, 4), b__bias=(4,)),
        {"identity": ["b"]},
        ["b/kernel cannot start as the identity", "(3, 4)"],
    ),
    "identity of old": (
        _ONE,
        _TWO,
        {"identity": ["a"]},
        ["a/bias is to start as identity, but it is not new"],
    ),
    "zero of old": (
        _ONE,
        _TWO,
        {"zero": ["*kernel"]},
        ["a/kernel is to start as zero, but it is not new"],
    ),
    "no such axis of inputs": (
        _ONE,
        _WIDE,
        {"inputs": {"*kernel": (2,)}},
        ["inputs: a/kernel has 2 axes, there is no axis 2"],
    ),
    "no such axis of positions": (
        _ONE,
        _WIDE,
        {"positions": {"*kernel": {-3: [0]}}},
        ["positions: a/kernel has 2 axes, there is no axis -3"],
    ),
    "too few positions": (
        _ONE,
        _WIDE,
        {"positions": {"*kernel": {1: [0, 1]}}},
        ["along axis 1 of a/kernel", "3 integers from 0 to 4", "[0 1]"],
    ),
    "positions that don't increase": (
        _ONE,
        _WIDE,
        {"positions": {"*kernel": {1: [0, 2, 2]}}},
        ["along axis 1 of a/kernel must increase, got [0 2 2]"],
    ),
    "unsorted positions": (
        _ONE,
        _WIDE,
        {"positions": {"*kernel": {1: [0, 4, 2]}}},
        ["must increase, got [0 4 2]"],
    ),
    "positions out of range": (
        _ONE,
        _WIDE,
        {"positions": {"*kernel": {-1: [0, 1, 5]}}},
        ["3 integers from 0 to 4", "[0 1 5]"],
    ),
    "negative positions": (
        _ONE,
        _WIDE,
        {"positions": {"*kernel": {-1: [-1, 1, 2]}}},
        ["3 integers from 0 to 4", "[-1  1  2]"],
    ),
    "fractional positions": (
        _ONE,
        _WIDE,
        {"positions": {"*kernel": {1: [0.0, 1.0, 2.0]}}},
        ["3 integers from 0 to 4"],
    ),
    "positions of what is new": (
        _ONE,
        _TWO,
        {"positions": {"b/kernel": {1: [0, 1, 2]}}},
        ["positions: the small model has nothing that becomes b/kernel"],
    ),
}


@pytest.mark.parametrize("name", DOES_NOT_FIT)
def test_what_does_not_fit(name):
    old, fresh, how, parts = DOES_NOT_FIT[name]
    with says(ValueError, *parts):
        transplant(old, fresh, Growth(**how))
    tx = optax.adam(0.1)
    state = filled(jax.eval_shape(tx.init, old))
    before = jax.tree.map(np.array, (state, old, fresh))
    with says(ValueError, *parts):
        grow(tx, state, old, fresh, Growth(**how))
    assert_identical(jax.tree.map(np.array, (state, old, fresh)), before)


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ({"rename": ["a"]}, ["rename must be a mapping", "list"]),
        ({"rename": {"a": 1}}, ["rename", "1"]),
        ({"inputs": (0,)}, ["inputs must be a mapping", "tuple"]),
        ({"inputs": {"a": 0}}, ["inputs", "'a'", "0"]),
        ({"inputs": {"a": "0"}}, ["inputs", "'a'", "'0'"]),
        ({"positions": [0]}, ["positions must be a mapping", "list"]),
        ({"positions": {"a": [0]}}, ["positions", "'a'", "[0]"]),
        ({"identity": "a"}, ["identity must be a list of patterns", "'a'"]),
        ({"identity": [1]}, ["identity must be a list of patterns", "[1]"]),
        ({"zero": "a"}, ["zero must be a list of patterns", "'a'"]),
        ({"zero": 1}, ["zero must be a list of patterns", "1"]),
    ],
)
def test_growth_of_wrong_kinds(how, parts):
    with says(TypeError, *parts):
        Growth(**how)


def test_axes_are_integers():
    with says(TypeError, "an axis in inputs", "'0'"):
        transplant(_ONE, _WIDE, Growth(inputs={"*": ["0"]}))
    with says(TypeError, "an axis in positions", "0.5"):
        transplant(_ONE, _WIDE, Growth(positions={"*kernel": {0.5: [0]}}))


def test_growth_is_no_mapping():
    tx, old = optax.sgd(0.1), {"a": jnp.ones(2)}
    with says(TypeError, "growth must be a Growth, got dict"):
        grow(tx, tx.init(old), old, old, {"a": "a"})
    with says(TypeError, "growth must be a Growth, got str"):
        transplant(old, old, "a")


_OTHERS = {
    "names": (lambda: ev3({"adam": optax.adam(0.1), "rms": optax.rmsprop(0.1)})),
    "fewer": lambda: ev3({"adam": optax.adam(0.1)}),
    "more": lambda: ev3({**_two(), "more": optax.sgd(0.1)}),
    "optimizers": lambda: ev3({"adam": optax.sgd(0.1), "sgd": optax.sgd(0.1)}),
    "without momentum": lambda: ev3({**_two(), "sgd": optax.sgd(0.05)}),
    "history_length": lambda: ev3(history_length=8),
    "rule": lambda: ev3(adapt=adapt.greedy()),
    "trajectories": lambda: _long(),
    "no ev3": lambda: optax.adam(0.1),
    "chain": lambda: optax.chain(ev3(), optax.identity()),
}


@pytest.mark.parametrize("name", _OTHERS)
def test_other_transformations(name):
    tx, params = ev3(), network((4, 4))
    state = filled(jax.eval_shape(tx.init, params))
    with says(ValueError, "the same explorers and settings", "expected"):
        grow(_OTHERS[name](), state, params, *larger())


def test_outputs_to_check():
    tx, params = optax.sgd(0.1), network((4, 4))
    state, fresh = tx.init(params), network((4, 4, 4), 1)
    how = Growth(identity=["hidden_3"])
    for check in (apply, (apply,), (apply, apply, apply), (apply, None), "ab"):
        with says(TypeError, "check must be two functions"):
            grow(tx, state, params, fresh, how, check=check)
    other = {
        "shapes": lambda p: apply(p)[:5],
        "structure": lambda p: {"logits": apply(p)},
    }
    for large in other.values():
        with says(ValueError, "same structure and shapes", "(32, 2)"):
            grow(tx, state, params, fresh, how, check=(apply, large))

    def wrong(params):
        raise TypeError("of the function itself")

    with says(TypeError, "of the function itself"):
        grow(tx, state, params, fresh, how, check=(apply, wrong))


def test_outputs_that_change():
    tx, params = optax.sgd(0.1), network((4, 4))
    state, fresh = tx.init(params), network((4, 4, 4), 1)
    with says(ValueError, "would change the outputs by", "tolerance 1.0e-05"):
        grow(tx, state, params, fresh, check=(apply, apply))
    grow(tx, state, params, fresh, check=(apply, apply), tolerance=100.0)
    how = Growth(identity=["hidden_3"])

    def off(by):
        return lambda p: apply(p) + by * jnp.abs(apply(p)).max()

    grow(tx, state, params, fresh, how, check=(apply, off(5e-6)))
    with says(ValueError, "would change the outputs by 2.0e-05"):
        grow(tx, state, params, fresh, how, check=(apply, off(2e-5)))
    for bad in (jnp.nan, jnp.inf):
        with says(ValueError, "would change the outputs"):
            grow(tx, state, params, fresh, how, check=(apply, off(bad)))
        with says(ValueError, "would change the outputs"):
            grow(tx, state, params, fresh, how, check=(off(bad), apply))
    # Where all outputs are zero, the difference itself counts.
    nothing = lambda p: 0 * apply(p)
    grow(tx, state, params, fresh, how, check=(nothing, nothing))
    with says(ValueError, "would change the outputs"):
        grow(tx, state, params, fresh, how, check=(nothing, apply))


# In training.


@pytest.mark.slow
def test_digits_with_growth():
    from sklearn import datasets

    digits = datasets.load_digits()
    x = jnp.asarray(digits.data / 16, jnp.float32)
    y = jnp.asarray(digits.target)
    order = np.random.default_rng(0).permutation(len(x))
    parts = np.split(order, [300, 600, 1000])[:3]
    parts = [(x[part], y[part]) for part in parts]

    def init(widths, seed):
        rng = np.random.default_rng(seed)
        sizes = [64, *widths, 10]
        names = [f"hidden_{i}" for i in range(1, len(widths) + 1)] + ["head"]
        return {
            name: {
                "kernel": jnp.asarray(
                    rng.normal(size=(n, m)) * (2 / n) ** 0.5, jnp.float32
                ),
                "bias": jnp.zeros(m),
            }
            for name, (n, m) in zip(names, itertools.pairwise(sizes), strict=True)
        }

    def nll(params, batch):
        logits = apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])

    tx = optax_ev3.ev3(
        {"adam": optax.adam(3e-3), "sgd": optax.sgd(0.1)},
        lambda params, batch: -nll(params, batch),
        explore=explore.rounds(5),
        adapt=adapt.lower_bound(),
    )

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: nll(p, parts[0]).mean())(params)
        updates, state = tx.update(grads, state, params, batch=parts[1])
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=50)[0])
    widths, grown, tests = (4,), 0, []
    params = init(widths, 0)
    state = tx.init(params)
    for _ in range(40):
        params, state = run((params, state))
        if not optax_ev3.should_grow(state, 3):
            continue
        tests.append(float(nll(params, parts[2]).mean()))
        if grown == 2:
            break
        if grown == 0:
            widths, how = (16,), Growth()
        else:
            widths, how = (16, 16), Growth(identity=["hidden_2"])
        check = [lambda p: apply(p, parts[2][0])] * 2
        grown += 1
        params, state = grow(tx, state, params, init(widths, grown), how, check=check)
        assert not optax_ev3.should_grow(state, 1)
    assert grown == 2
    assert tests[1] < 0.8 * tests[0]


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("chained", [False, True])
def test_only_the_counter_of_ev3_begins_anew(length, chained):
    """Parameters, and so moments and branches, may be called as it is."""
    tx = optax_ev3.ev3(
        [optax.adam(0.1)],
        lambda p: -(p["record"]["since"] ** 2),
        explore=explore.rounds(length),
        adapt=optax_ev3.adapt.greedy(),
    )
    tx = optax.chain(optax.clip(1.0), tx) if chained else tx
    params = {"record": {"since": jnp.ones([2])}}
    state = tx.init(params)
    grads = jax.tree.map(lambda x: -x, params)
    for _ in range(4):  # Uphill: without progress.
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert (optax.tree.get(state, "mu")["record"]["since"] != 0).all()
    fresh = {"record": {"since": jnp.zeros([3])}}
    grown = grow(tx, state, params, fresh)
    before, after = (x[1] if chained else x for x in (state, grown.state))
    assert (int(before.history.since) > 0, int(after.history.since)) == (True, 0)
    moments = [optax.tree.get(x, "mu")["record"]["since"] for x in (before, after)]
    np.testing.assert_array_equal(moments[1][:2], moments[0])


def _wider(width):
    draw = np.random.default_rng(width)
    shapes = {"w1": (6, width), "b": (width,), "w2": (width, 3)}
    return {k: np.float32(0.4 * draw.normal(size=v)) for k, v in shapes.items()}


@functools.cache
def _grown_on(kind):
    """Trained, grown and trained on; on a mesh of eight devices, or on one."""
    specs, mesh = meshes.MESHES["8"], None
    if kind is not None:
        mesh = meshes.mesh_of(specs["axes"], kind)

    def put(tree, specs):
        if mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return meshes.spread(tree, mesh, specs)

    tx = optax_ev3.ev3(
        {"sgd": meshes.SWEEPS["sgd"], "adam": optax.adam(0.05)},
        lambda params, held: meshes.likelihoods(params, held),
        loss_fn=meshes.loss_fn,
        explore=explore.branches(2, averages=meshes.AVERAGES),
    )

    @jax.jit
    def step(params, state, batch, held):
        grads = jax.grad(meshes.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, held=held)
        return optax.apply_updates(params, updates), state

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        params = put(_wider(16), specs)
        state = tx.init(params)
        if mesh is not None:
            state = jax.device_put(state, optax_ev3.state_shardings(tx, params))
        for i in range(12):
            if i == 6:
                larger = put(_wider(32), specs)
                params, state = grow(tx, state, params, larger)
            data = [put(meshes.data(seed), ["data"]) for seed in (i, 100 + i)]
            params, state = step(params, state, *data)
            if i == 6 and mesh is not None:
                expected = optax_ev3.state_shardings(tx, larger)
                moment = state.explore.branches.means["sgd"][0]["w1"]
                wanted = expected.explore.branches.means["sgd"][0]["w1"]
                assert moment.sharding.is_equivalent_to(wanted, moment.ndim)
    return params, optax_ev3.history(state)["adopted"]


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="this release has no explicit sharding"
)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_model_that_is_spread_over_devices_grows(kind):
    """Decisions are those on one device, and arrays stay spread as they are."""
    (params, adopted), (expected, theirs) = _grown_on(kind), _grown_on(None)
    assert params["w1"].shape == (6, 32)
    np.testing.assert_array_equal(adopted, theirs)
    assert_close(params, expected, 1e-4, 1e-5)
