"""Saved in the middle of a run and restored, training goes on bit for bit."""

import collections
import functools
import inspect
import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from helpers import (
    RULES,
    assert_finite,
    assert_identical,
    score,
    stepper,
    transformation,
    weights,
)
from helpers.programs import begin, restore, save, saved

import optax_ev3
from optax_ev3 import adapt, explore

# Orbax and its dependencies warn of their own deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:orbax"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def noisy():
    """The optimizer that keeps a PRNG key, whose argument has had two names."""
    names = inspect.signature(optax.noisy_sgd).parameters
    seed = {"key": jax.random.key(3)} if "key" in names else {"seed": 3}
    return optax.noisy_sgd(0.05, **seed)


def inner():
    return {"noisy": noisy(), "adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}


def params():
    return {"w": jnp.array([0.25, -0.5, 2.0]), "b": (jnp.zeros([2]), jnp.ones([]))}


@functools.cache
def middle_and_end(rule):
    """A step, a function that trains, and what it gives after 3 and 6 rounds."""
    tx = transformation(rule, inner=inner(), history_length=4)
    step = jax.jit(stepper(tx))

    def train(w, state, seeds):
        for seed in seeds:
            w, state = step(w, state, weights(seed=seed))
        return w, state

    middle = train(params(), tx.init(params()), range(3))
    return tx, train, middle, train(*middle, range(3, 6))


def _standard(saved, target, folder):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "standard", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "standard", target)


def _standard_abstract(saved, target, folder):
    shapes = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, target)
    return _standard(saved, shapes, folder)


def _py_tree(saved, target, folder):
    checkpointer = orbax.checkpoint.PyTreeCheckpointer()
    checkpointer.save(folder / "pytree", saved)
    args = orbax.checkpoint.checkpoint_utils.construct_restore_args(target)
    return checkpointer.restore(folder / "pytree", item=target, restore_args=args)


def _to_bytes(saved, target, folder):
    del folder
    data = flax.serialization.to_bytes(saved)
    return flax.serialization.from_bytes(target, data)


def _state_dict(saved, target, folder):
    del folder
    tree = flax.serialization.to_state_dict(saved)
    return flax.serialization.from_state_dict(target, tree)


WAYS = {
    "orbax_standard": _standard,
    "orbax_abstract": _standard_abstract,
    "orbax_pytree": _py_tree,
    "flax_bytes": _to_bytes,
    "flax_state_dict": _state_dict,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES)
def test_continued_bit_for_bit(rule, way, tmp_path):
    tx, train, middle, end = middle_and_end(rule)
    w, state = params(), tx.init(params())
    target = {"w": w, "state": state}
    restored = WAYS[way]({"w": middle[0], "state": middle[1]}, target, tmp_path)
    w, state = jax.tree.map(jnp.asarray, (restored["w"], restored["state"]))
    assert_identical((w, state), middle)
    assert_identical(train(w, state, range(3, 6)), end)


@functools.cache
def on_eight_devices():
    """A relay after three calls, spread over devices, and after six."""
    go_on, start = begin("relay")
    middle = go_on(start, range(3))
    return middle, go_on(middle, range(3, 6))


@pytest.mark.parametrize("count", [4, 1])
def test_restored_on_another_number_of_devices(count, tmp_path):
    middle, end = on_eight_devices()
    save(tmp_path, middle)
    go_on, start = begin("relay", jax.devices()[8 - count :])
    restored = restore(tmp_path, start)
    assert_identical(jax.device_get(restored), jax.device_get(middle))
    for leaf, like in zip(*map(jax.tree.leaves, (restored, start)), strict=True):
        assert leaf.sharding == like.sharding
    _, state = restored
    # The state is spread like the parameters, not only those.
    assert len(state.stable["w2"].addressable_shards[0].data) == 16 // count
    found, wanted = saved(go_on(restored, range(3, 6))), saved(end)
    for name, leaf in wanted.items():
        # Sums over devices are rounded in another order.
        close = {"rtol": 1e-4, "atol": 1e-5} if leaf.dtype.kind == "f" else {"rtol": 0}
        np.testing.assert_allclose(found[name], leaf, err_msg=name, **close)


def test_rounds_differ():
    # Otherwise a state that was not restored could go unnoticed.
    tx, _, middle, end = middle_and_end("greedy")
    start = tx.init(params())
    for one, other in ((start, middle[1]), (middle[1], end[1])):
        for get in (
            lambda s: s.ev3_round,
            lambda s: s.explore.explorers["noisy"].opt_state,
        ):
            leaves = jax.tree.leaves(get(one)), jax.tree.leaves(get(other))
            pairs = zip(*leaves, strict=True)
            assert any(not np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("rule", RULES)
def test_state_is_plain_finite_arrays(rule):
    tx, _, _, (_, state) = middle_and_end(rule)
    for one in (tx.init(params()), state):
        assert_finite(one)
        for leaf in jax.tree.leaves(one):
            assert isinstance(leaf, jax.Array)
            assert leaf.dtype.kind in "iuf"  # No bool and no typed key.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -1e25, 3e38])
def test_state_stays_finite(rule, bad):
    tx = transformation(
        rule, inner=inner(), assess_fn=lambda w, batch, s: score(w, batch) * s
    )
    w = params()
    state = tx.init(w)
    update = jax.jit(tx.update)
    nan = jnp.nan
    for grad, scale in ((nan, 1.0), (1.0, bad), (1.0, 1.0), (nan, bad)):
        grads = jax.tree.map(lambda x, g=grad: jnp.full_like(x, g), w)
        updates, state = update(grads, state, w, batch=weights(), s=jnp.float32(scale))
        w = optax.apply_updates(w, updates)
        assert_finite((updates, w, state))


def test_prng_keys_are_raw_data():
    tx = transformation("greedy", inner=[noisy()], key=jax.random.key(4))
    state = tx.init(params())
    raw = [x for x in jax.tree.leaves(state) if x.dtype == jnp.uint32]
    assert [x.shape for x in raw] == [(2,), (2,)]
    np.testing.assert_array_equal(state.ev3_key, [0, 4])


@pytest.mark.parametrize("more", [True, False])
def test_another_number_of_explorers(more):
    saved = transformation("greedy", inner=[optax.sgd(0.1)] * (2 if more else 3))
    other = transformation("greedy", inner=[optax.sgd(0.1)] * (3 if more else 2))
    w = {"w": jnp.ones([3])}
    state = saved.init(w)
    numbers = "2 explorers.*has 3" if more else "3 explorers.*has 2"
    with pytest.raises(ValueError, match=numbers):
        other.update(w, state, w, batch=weights())


def test_other_explorers():
    w = {"w": jnp.ones([3])}
    state = transformation("greedy", inner={"a": optax.sgd(0.1)}).init(w)
    other = transformation("greedy", inner={"b": optax.sgd(0.1)})
    with pytest.raises(ValueError, match=r"\['a'\].*\['b'\]"):
        other.update(w, state, w, batch=weights())


def test_another_length_of_history():
    w = {"w": jnp.ones([3])}
    state = transformation("greedy", history_length=4).init(w)
    other = transformation("greedy", history_length=5)
    with pytest.raises(
        ValueError, match=r"does not belong.*history.*int32\[4\], expected int32\[5\]"
    ):
        other.update(w, state, w, batch=weights())


def test_restored_without_its_structure():
    tx, w = transformation("greedy"), {"w": jnp.ones([3])}
    state = flax.serialization.to_state_dict(tx.init(w))
    with pytest.raises(TypeError, match=r"EV3State, got dict.*tx.init\(params\)"):
        tx.update(w, state, w, batch=weights())
    fixed = flax.serialization.from_state_dict(tx.init(w), state)
    assert isinstance(fixed, optax_ev3.EV3State)


# The fields of the state in version 0.1.
OLD = [
    "ev3_round",
    "ev3_calls",
    "ev3_key",
    "explorers",
    "combined",
    "trajectory",
    "stable",
    "memory",
    "guarded",
    "record",
    "racing",
]


def test_a_state_of_version_0_1_is_told_from_others():
    tx, w = transformation("greedy"), {"w": jnp.ones([3])}
    old = dict.fromkeys(OLD, jnp.zeros([])) | {"stable": w}
    with pytest.raises(TypeError, match=r"got dict.*version 0\.1.*stable.*tx\.init"):
        tx.update(w, old, w, batch=weights())
    with pytest.raises(TypeError, match=r"got EV3State.*version 0\.1.*stable"):
        named = collections.namedtuple("EV3State", OLD)
        tx.update(w, named(**old), w, batch=weights())
    with pytest.raises(ValueError, match="trajectory"):
        flax.serialization.from_state_dict(tx.init(w), old)


@pytest.mark.parametrize(
    "other, where",
    [
        (lambda: (ev3_of(), {"w": jnp.ones([4])}), r"\['w'\].*float32\[4\]"),
        (lambda: (ev3_of(optax.sgd(0.1)), {"w": jnp.ones([3])}), r"count.*nothing"),
        (lambda: (ev3_of(rule=adapt.greedy()), {"w": jnp.ones([3])}), "rule_state"),
        (
            lambda: (
                ev3_of(rule=adapt.farsighted(), explore=explore.rounds(2)),
                {"w": jnp.ones([3])},
            ),
            "branches",
        ),
    ],
)
def test_state_of_another_transformation_or_other_parameters(other, where):
    tx, w = ev3_of(), {"w": jnp.ones([3])}
    other_tx, other_w = other()
    state = other_tx.init(other_w)
    with pytest.raises(ValueError, match=f"does not belong.*{where}"):
        tx.update(w, state, w)


def ev3_of(inner=None, rule=None, **kwargs):
    inner = {"one": optax.adam(0.1) if inner is None else inner}
    return optax_ev3.ev3(inner, lambda p: -(p["w"] ** 2), adapt=rule, **kwargs)


# Explorers in another order: by name all fits, by place all would be confused.

STRATEGIES = {
    "one_step": {},
    "own": {"explore": explore.rounds(3)},
    "shared": {"explore": explore.rounds(3, gradients="shared")},
    "never": {"explore": explore.branches(3)},
    "race": {"explore": explore.branches(1, racing=explore.Racing(1, 4))},
    "halving": {
        "explore": explore.branches(1, racing=explore.SuccessiveHalving(1, warmup=1))
    },
    "relay": {"explore": explore.relay(3)},
}


def _pairs():
    """By kind, two transformations of the same explorers in another order."""
    sgd = {"fast": optax.sgd(0.3), "slow": optax.sgd(1e-4)}
    same = {"b": optax.sgd(0.3), "a": optax.sgd(0.3)}
    yield "explorers", sgd, {}, dict(reversed(sgd.items())), {}
    yield "alphabet", same, {}, dict(reversed(same.items())), {}

    def sweep(*rates):
        return {"sgd": optax_ev3.sweep(optax.sgd, learning_rate=rates)}

    yield "sweeps", sweep(0.3, 1e-4), {}, sweep(1e-4, 0.3), {}
    averages = [
        explore.trajectory_average(),
        explore.branch_average(),
    ]
    yield (
        "combined",
        sgd,
        {"explore": explore.rounds(3, averages=averages)},
        sgd,
        {"explore": explore.rounds(3, averages=averages[::-1])},
    )


ORDERS = {kind: rest for kind, *rest in _pairs()}
CASES = [(kind, name) for kind in ORDERS for name in STRATEGIES if kind != "combined"]
CASES = [*CASES, ("combined", "own")]


def _two_orders(kind, strategy):
    inner, more, other_inner, other_more = ORDERS[kind]
    settings = {
        "assess_fn": lambda w: -jnp.square(w["w"]),
        "loss_fn": lambda w: jnp.square(w["w"]).mean(),
        "adapt": adapt.greedy(),
        **STRATEGIES[strategy],
    }
    return (
        optax_ev3.ev3(inner, **{**settings, **more}),
        optax_ev3.ev3(other_inner, **{**settings, **other_more}),
    )


@pytest.mark.parametrize("kind, strategy", CASES)
def test_another_order_is_an_error(kind, strategy):
    one, other = _two_orders(kind, strategy)
    w = {"w": jnp.ones([3])}
    state, found = one.init(w), other.init(w)
    orders = [optax_ev3.history(x)["candidates"].tolist()[:-2] for x in (state, found)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    message = re.escape(f"order {orders[0]}, this") + ".*" + re.escape(str(orders[1]))
    for update in (other.update, jax.jit(other.update)):
        with pytest.raises(ValueError, match=message):
            update(w, state, w)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ORDERS)
def test_another_order_cannot_be_restored(kind, way, tmp_path):
    one, other = _two_orders(kind, "own")
    w = {"w": jnp.ones([3])}
    saved = {"w": w, "state": one.init(w)}
    target = {"w": w, "state": other.init(w)}
    with pytest.raises((ValueError, KeyError), match="candidate_"):
        WAYS[way](saved, target, tmp_path)
    restored = WAYS[way](saved, saved, tmp_path / "again")
    assert_identical(jax.tree.map(jnp.asarray, restored), saved)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_order_in_another_mapping_goes_on(strategy):
    """Who comes back from ``jit`` has the keys in the alphabet's order."""
    tx, _ = _two_orders("alphabet", strategy)
    w = {"w": jnp.ones([3])}
    state = jax.jit(tx.init)(w)
    assert optax_ev3.history(state)["candidates"].tolist()[:2] == ["b", "a"]
    _, state = jax.jit(tx.update)(w, state, w)
    assert optax_ev3.history(state)["candidates"].tolist()[:2] == ["b", "a"]
