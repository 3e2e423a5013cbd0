"""Parameter trees of every kind, in every strategy, rule and combination."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    TREES,
    always,
    assert_close,
    assert_same_types,
    says,
    traced,
    types,
)

import optax_ev3
from optax_ev3 import adapt, evidence, explore, metrics


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["w", "b"], meta_fields=[]
)
@dataclasses.dataclass
class Model:
    """A node of one's own that can be called, as Equinox's modules."""

    w: jax.Array
    b: jax.Array

    def __call__(self, x):
        return x * self.w.sum() + self.b


@jax.tree_util.register_pytree_node_class
class Layers:
    """Another one, with a structure of its own."""

    def __init__(self, layers):
        self.layers = layers

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def tree_flatten(self):
        return self.layers, None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(list(children))

    def __eq__(self, other):
        return self.layers == other.layers


def layer():
    return Model(jnp.array([0.5, -1.0]), jnp.zeros([]))


CALLABLE = {
    "dataclass": layer,
    "class": lambda: Layers([layer(), layer()]),
}


X = jnp.linspace(-1.0, 1.0, 8)


def score(params, x):
    return -jnp.square(params(x) - 3 * x - 1)


def loss(params, x):
    return -score(params, x).mean()


def two():
    return {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}


def _sweep():
    return {"sweep": optax_ev3.sweep(optax.adam, learning_rate=[0.1, 0.2])}


def _evolving():
    rate = optax_ev3.log_uniform(1e-3, 1.0, 0.1)
    return {"group": optax_ev3.evolve(optax.sgd, {"learning_rate": rate}, 2)}


# What one-step rounds and trajectories can be, as arguments of ev3.
STRATEGIES = {
    "one step": {},
    "own": {"loss_fn": loss, "explore": explore.rounds(2)},
    "shared": {"explore": explore.rounds(2, restart_state="new")},
    "never": {
        "loss_fn": loss,
        "explore": explore.branches(
            2, racing=explore.Racing(1), averages=[explore.branch_average()]
        ),
    },
    "significant": {
        "explore": explore.branches(
            2,
            restart=explore.worse_than("adopted", inner_state="copy"),
            averages=[explore.trajectory_average()],
        ),
    },
    "behind": {
        "explore": explore.branches(
            2,
            restart=explore.worse_than("start", inner_state="new"),
            racing=explore.Racing(1),
        ),
    },
    "relay": {"explore": explore.relay(2)},
    "relay, sweep": {"inner": _sweep() | two(), "explore": explore.relay(2)},
    "sweep": {"inner": _sweep()},
    "sweep, copy": {
        "inner": _sweep() | two(),
        "explore": explore.rounds(
            2, restart_state="copy", averages=[explore.trajectory_average()]
        ),
    },
    "evolve": {"inner": _evolving()},
    "evolve, own": {
        "inner": _evolving(),
        "loss_fn": loss,
        "explore": explore.branches(2, restart=explore.worse_than("start")),
    },
}


def _two_objectives(params, x):
    return {"a": score(params, x), "b": -jnp.abs(params(x))}


def _several(rule):
    return {"adapt": rule, "assess_fn": _two_objectives}


RULES = {
    "confident": {"adapt": adapt.confident()},
    "lower_bound": {"adapt": adapt.lower_bound()},
    "choose_and_confirm": {"adapt": adapt.choose_and_confirm()},
    "constrained": _several(adapt.constrained("a", {"b": 1.0})),
    "weighted": _several(adapt.weighted({"a": 1.0, "b": 0.5})),
    "ladder": {"adapt": adapt.guarded(adapt.confident(), adapt.ladder())},
    "vmap": {"assess_mode": "vmap"},
    "map": {"assess_mode": "map"},
    "chunks": {"assess_fn": optax_ev3.in_chunks(score, 4, ["x"])},
    "held out": {
        "assess_fn": optax_ev3.held_out(lambda w, x: score(w, x), X, batch_size=4)
    },
}
SETTINGS = {**STRATEGIES, **RULES}


def transformation(**kwargs):
    kwargs = {"inner": two(), "assess_fn": score, "adapt": adapt.greedy(), **kwargs}
    return optax_ev3.ev3(**kwargs)


def stepper(tx, loss=loss, **extra_args):
    def step(w, state):
        grads = jax.grad(loss)(w, X)
        updates, state = tx.update(grads, state, w, x=X, **extra_args)
        return optax.apply_updates(w, updates), state

    return step


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_tree_that_can_be_called_is_a_tree(setting):
    for make in CALLABLE.values():
        w = make()
        tx = transformation(**SETTINGS[setting])
        state = tx.init(w)
        new_w, new_state = jax.eval_shape(stepper(tx), w, state)
        assert_same_types((new_w, new_state), (w, state))


@pytest.mark.parametrize("tree", CALLABLE)
@pytest.mark.parametrize("setting", ["one step", "own", "shared", "relay"])
def test_one_explorer_trains_callable_trees_like_optax(setting, tree):
    inner, w = optax.adam(0.1), CALLABLE[tree]()
    kwargs = {**STRATEGIES[setting], "inner": [inner], "adapt": always(0)}
    kwargs.pop("restart_state", None)
    tx = transformation(**kwargs)
    (step, traces), plain = traced(stepper(tx)), optax.with_extra_args_support(inner)
    plain_step = jax.jit(stepper(plain))
    state, expected, plain_state = tx.init(w), w, inner.init(w)
    for _ in range(5):
        w, state = step(w, state)
        expected, plain_state = plain_step(expected, plain_state)
        assert_close(w, expected)
    assert float(loss(w, X)) < float(loss(CALLABLE[tree](), X))
    assert len(traces) == 1


def test_stable_parameters_replace_callable_ones():
    # The one decision that makes an update of the stable tree, in one-step rounds.
    tx = transformation(inner=[optax.sgd(0.0)], adapt=always(2))
    w = layer()
    good = Model(jnp.array([2.0, 1.0]), jnp.ones([]))
    state = tx.init(w)._replace(stable=good)
    w, _ = jax.jit(stepper(tx))(w, state)
    assert_close(w, good)
    np.testing.assert_array_equal(w(X), good(X))


# Leaves that are not floating point: two of them frozen inside, one counted by a loss.


def mixed():
    """Parameters, of which w is trained."""
    return {
        "w": jnp.array([0.5, -1.0]),
        "count": jnp.arange(3, dtype=jnp.int32),
        "byte": jnp.array([0, 255], jnp.uint8),
        "flag": jnp.array([True, False]),
        "key": jax.random.key(3),
    }


def _predict_mixed(params, x):
    """Uses every leaf: numbers, booleans and the key."""
    shift = params["count"].sum() / 3 + params["flag"].sum() - params["byte"][0]
    noise = 1e-3 * jax.random.normal(params["key"])
    return x * params["w"][0] + params["w"][1] + shift + noise


def score_mixed(params, x):
    return -jnp.square(_predict_mixed(params, x) - 3 * x - 1)


def loss_mixed(params, x):
    return -score_mixed(params, x).mean()


def frozen(tx):
    def labels(params):
        return {k: "trained" if k == "w" else "frozen" for k in params}

    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def masked(tx):
    return optax.masked(tx, lambda params: {k: k == "w" for k in params})


def _frozen_sweep():
    return optax_ev3.sweep(
        lambda learning_rate: frozen(optax.adam(learning_rate)),
        learning_rate=[0.1, 0.2],
    )


def _frozen_setting(setting):
    """The same setting, with explorers that train w alone."""
    kwargs = dict(SETTINGS[setting])
    swap = {loss: loss_mixed, score: score_mixed}
    kwargs["inner"] = {"adam": frozen(optax.adam(0.1)), "sgd": masked(optax.sgd(0.1))}
    kwargs["assess_fn"] = score_mixed
    if "sweep" in setting or "evolve" in setting:
        kwargs["inner"]["sweep"] = _frozen_sweep()
    if "loss_fn" in kwargs:
        kwargs["loss_fn"] = swap[kwargs["loss_fn"]]
    if setting == "chunks":
        kwargs["assess_fn"] = optax_ev3.in_chunks(score_mixed, 4, ["x"])
    elif "assess_fn" in SETTINGS[setting] and setting != "held out":
        kwargs["assess_fn"] = lambda w, x: {
            name: score_mixed(w, x) for name in ["a", "b"]
        }
    return kwargs


def apply_mixed(params, updates):
    """As optax.apply_updates, which cannot add to a typed key."""
    keys = {"key": params["key"]}
    rest = {k: v for k, v in params.items() if k != "key"}
    return optax.apply_updates(rest, {k: updates[k] for k in rest}) | keys


def zeros(grads):
    """In place of float0s, which optax can't take itself."""
    return {k: g if k == "w" else jnp.zeros(jnp.shape(g)) for k, g in grads.items()}


def mixed_stepper(tx, loss=loss_mixed, form=lambda grads: grads):
    def step(w, state):
        grads = jax.grad(loss, allow_int=True)(w, X)
        updates, state = tx.update(form(grads), state, w, x=X)
        return apply_mixed(w, updates), state

    return step


@pytest.mark.parametrize("setting", SETTINGS)
def test_leaves_that_are_no_floats_pass_through(setting):
    w = mixed()
    tx = transformation(**_frozen_setting(setting))
    state = tx.init(w)
    out = jax.eval_shape(mixed_stepper(tx), w, state)
    assert_same_types(out, (w, state))
    assert not any("weak" in leaf for leaf in jax.tree.leaves(types(out)))


GIVEN = {
    "float0": lambda grads: grads,
    "zeros": zeros,
    "None": lambda grads: {k: g if k == "w" else None for k, g in grads.items()},
}


@pytest.mark.parametrize(
    "setting, given",
    [
        *((setting, "float0") for setting in ("one step", "own", "never")),
        ("shared", "zeros"),
        ("own", "None"),
    ],
)
def test_frozen_leaves_stay_and_others_train_like_optax(setting, given):
    inner, w = optax.adam(0.1), mixed()
    kwargs = {**STRATEGIES[setting], "inner": [frozen(inner)], "assess_fn": score_mixed}
    if "loss_fn" in kwargs:
        kwargs["loss_fn"] = loss_mixed
    if setting == "never":
        kwargs["explore"] = explore.branches(2)
    tx = transformation(**{**kwargs, "adapt": always(0)})
    step, traces = traced(mixed_stepper(tx, form=GIVEN[given]))
    plain = optax.with_extra_args_support(inner)
    state, expected, plain_state = tx.init(w), w["w"], inner.init(w["w"])

    @jax.jit
    def plain_step(expected, plain_state):
        grads = jax.grad(lambda x: loss_mixed({**mixed(), "w": x}, X))(expected)
        updates, plain_state = plain.update(grads, plain_state, expected)
        return optax.apply_updates(expected, updates), plain_state

    for _ in range(4):
        w, state = step(w, state)
        expected, plain_state = plain_step(expected, plain_state)
        assert_close(w["w"], expected)
        rest = {k: v for k, v in w.items() if k != "w"}
        _assert_unchanged(rest, {k: v for k, v in mixed().items() if k != "w"})
    assert len(traces) == 1
    assert_same_types(state, tx.init(w))
    stable = optax_ev3.stable_params(state)
    _assert_unchanged({**stable, "w": mixed()["w"]}, mixed())


def _assert_unchanged(actual, expected):
    assert_same_types(actual, expected)

    def raw(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(raw(one), raw(other))


@pytest.mark.parametrize("start", [True, False])
def test_booleans_integers_and_bytes_are_led_exactly_to_any_target(start):
    # Falling back to stable is an update by which optax.apply_updates gets there.
    inner = [optax.sgd(0.0)]
    lowest, highest = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    here = {
        "w": jnp.zeros([2]),
        "count": jnp.array([lowest, highest, 5], jnp.int32),
        "byte": jnp.array([0, 255, 7], jnp.uint8),
        "flag": jnp.array([start, start, True]),
    }
    there = {
        "w": jnp.ones([2]),
        "count": jnp.array([highest, lowest, 6], jnp.int32),
        "byte": jnp.array([255, 0, 9], jnp.uint8),
        "flag": jnp.array([False, True, True]),
    }
    for length in (1, 2):
        tx = optax_ev3.ev3(
            inner, lambda p: p["w"], adapt=always(2), explore=explore.rounds(length)
        )
        w, state = here, tx.init(here)._replace(stable=there)
        for _ in range(length):
            grads = jax.tree.map(jnp.zeros_like, w)
            updates, state = jax.jit(tx.update)(grads, state, w)
            w = optax.apply_updates(w, updates)
        _assert_unchanged(w, there)


# Auxiliary outputs that are counters and flags, as BatchNorm and ActNorm have them.


def _merged(params, aux):
    return {**params, **aux}


def counted(params, x):
    """A loss that returns the next counter and a flag that flips each time."""
    aux = {"count": params["count"] + 1, "flag": ~params["flag"]}
    return loss_mixed({**params, **mixed_rest()}, x), aux


def mixed_rest():
    return {k: v for k, v in mixed().items() if k != "w"}


@pytest.mark.parametrize("setting", ["one step", "own", "shared", "never"])
def test_counters_and_flags_come_from_merge_fn(setting):
    kwargs = {**STRATEGIES[setting], "assess_fn": score_mixed}
    if kwargs.pop("loss_fn", None) and setting == "never":
        kwargs["explore"] = explore.branches(2)
    one = optax_ev3.explorer(frozen(optax.sgd(0.1)), counted, merge_fn=_merged)
    tx = transformation(**{**kwargs, "inner": [one], "adapt": always(0)})
    w = mixed()
    state, (step, traces) = tx.init(w), traced(mixed_stepper(tx))
    for number in range(1, 5):
        w, state = step(w, state)
        expected = mixed()
        expected["count"] += number
        expected["flag"] = jnp.array([number % 2 == 0, number % 2 == 1])
        _assert_unchanged({**w, "w": mixed()["w"]}, expected)
    assert len(traces) == 1
    assert float(loss_mixed({**w, **mixed_rest()}, X)) < float(loss_mixed(mixed(), X))


def test_averages_take_over_what_is_no_float():
    one = optax_ev3.explorer(frozen(optax.sgd(0.1)), counted, merge_fn=_merged)
    # The second candidate is the mean over the two steps of the round.
    tx = transformation(
        inner=[one],
        assess_fn=score_mixed,
        explore=explore.rounds(2, averages=[explore.trajectory_average()]),
        adapt=always(1),
    )
    w = mixed()
    state = tx.init(w)
    path = []
    for _ in range(2):
        path.append(_after_sgd(path[-1] if path else mixed()["w"]))
        w, state = jax.jit(mixed_stepper(tx))(w, state)
    assert_close(w["w"], sum(path) / 2)
    np.testing.assert_array_equal(w["count"], mixed()["count"] + 2)


def _after_sgd(x):
    return x - 0.1 * jax.grad(lambda x: loss_mixed({**mixed(), "w": x}, X))(x)


def test_a_merged_key_is_an_error_that_says_what_to_do():
    def merge(params, aux):
        return {**params, "key": jax.random.fold_in(params["key"], 1)}

    one = optax_ev3.explorer(
        frozen(optax.sgd(0.1)), lambda w, x: (loss_mixed(w, x), {}), merge_fn=merge
    )
    tx, w = transformation(inner=[one], assess_fn=score_mixed), mixed()
    with says(ValueError, "merge_fn", "typed PRNG key", "['key']", "key_data"):
        jax.eval_shape(mixed_stepper(tx), w, tx.init(w))


@pytest.mark.parametrize("length", [1, 2])
def test_integers_that_are_not_frozen_change_as_in_optax(length):
    # optax adds floats to integers, and rounds the sum towards zero.
    inner = optax.chain(optax.add_decayed_weights(7.36), optax.scale(-0.1))
    w = {"n": jnp.array([5, -5, 100], jnp.int32), "w": jnp.ones([2])}
    tx = optax_ev3.ev3(
        [inner], lambda p: p["w"], adapt=always(0), explore=explore.rounds(length)
    )
    state, expected, plain_state = tx.init(w), w, inner.init(w)
    for _ in range(2):
        grads = jax.tree.map(jnp.zeros_like, w)
        updates, state = jax.jit(tx.update)(grads, state, w)
        plain, plain_state = inner.update(grads, plain_state, expected)
        w, expected = (
            optax.apply_updates(p, u) for p, u in ((w, updates), (expected, plain))
        )
        _assert_unchanged({"n": w["n"]}, {"n": expected["n"]})


def test_keys_among_parameters_can_be_donated_and_belong_to_the_caller():
    w = mixed()
    tx = transformation(
        inner=[frozen(optax.sgd(0.1))],
        assess_fn=score_mixed,
        loss_fn=loss_mixed,
        explore=explore.rounds(2),
    )
    state = tx.init(w)
    step = jax.jit(mixed_stepper(tx), donate_argnums=1)
    for _ in range(3):
        w, state = step(w, state)
    _assert_unchanged(w["key"], jax.random.key(3))
    grads = jax.grad(loss_mixed, allow_int=True)(w, X)
    updates, _ = jax.jit(tx.update)(grads, state, w, x=X)
    assert updates["key"].dtype == jax.dtypes.float0


@pytest.mark.parametrize("length", [1, 2])
def test_own_losses_over_an_axis_with_leaves_that_are_no_floats(length):
    inner = [optax_ev3.explorer(frozen(optax.sgd(0.1)), loss_mixed)]
    kwargs = {
        "assess_fn": score_mixed,
        "adapt": always(0),
        "explore": explore.rounds(length),
    }
    one = transformation(inner=inner, **kwargs)
    many = transformation(inner=inner, axis_name="i", **kwargs)
    grads = jax.grad(loss_mixed, allow_int=True)(mixed(), X)

    def stepper(tx):
        return lambda x: tx.update(grads, tx.init(mixed()), mixed(), x=x)[0]["w"]

    alone = jax.jit(stepper(one))(X)
    together = jax.jit(jax.vmap(stepper(many), axis_name="i"))(X.reshape(2, 4))
    assert_close(together, jnp.stack([alone] * 2))


# Shapes alone.


@pytest.mark.parametrize("setting", SETTINGS)
def test_init_takes_shapes_alone(setting):
    w = {"layer": layer(), "hole": None}
    shapes = jax.eval_shape(lambda x: x, w)
    tx = transformation(**SETTINGS[setting])
    state = tx.init(shapes)
    assert_same_types(state, jax.eval_shape(tx.init, w))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    np.testing.assert_array_equal(optax_ev3.stable_params(state)["layer"].w, [0, 0])


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("setting", ["one step", "never", "sweep, copy"])
def test_init_keeps_the_shardings_of_shapes(setting, kind):
    if kind == "Explicit" and not hasattr(jax, "set_mesh"):
        pytest.skip("this release has no explicit sharding")
    P = jax.sharding.PartitionSpec
    kinds = {"axis_types": (getattr(jax.sharding.AxisType, kind),)}
    mesh = jax.make_mesh((8,), ("x",), **kinds)
    here = jax.sharding.NamedSharding(mesh, P(None, "x"))
    shape = jax.ShapeDtypeStruct((3, 8), jnp.float32, sharding=here)
    made = jax.device_put(jnp.zeros([3, 8]), here)
    tx = transformation(**SETTINGS[setting])
    state, expected = tx.init(shape), tx.init(made)
    assert_same_types(state, expected)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
    like_params = 0
    for one, other in pairs:
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
        if one.shape == (3, 8):
            assert one.sharding.is_equivalent_to(here, 2)
            like_params += 1
    assert like_params >= 1
    assert state.stable.sharding.is_equivalent_to(here, 2)


# Promotion of dtypes.


def _mean(outputs, weights):
    return (outputs * weights).sum() / weights.sum()


BOUNDS = {
    "paired_t": evidence.paired_t(),
    "betting": evidence.betting(-200.0, 0.0),
}
JUDGED = {
    "single figure": {"assess_fn": lambda w, x: score(w, x).mean()},
    "right or wrong": {
        "assess_fn": lambda w, x: score(w, x) > -1,
        "adapt": adapt.choose_and_confirm(bound=evidence.mcnemar()),
    },
    "figure": {
        "assess_fn": lambda w, x: metrics.AggregateMetric(_mean, score(w, x), samples=8)
    },
    "host": {"assess_fn": optax_ev3.host_metric(score, _mean, samples=8)},
    "shuffled": {
        "assess_fn": optax_ev3.held_out(
            lambda w, x: score(w, x), X, batch_size=3, shuffle=True
        )
    },
    "several weights": _several(
        adapt.weighted({"a": 1.0, "b": 0.5}, targets={"a": -1.0, "b": -1.0}, rate=0.1)
    ),
    "max_t": {"adapt": adapt.greedy(correction="max_t")},
    "ladder, step": {"adapt": adapt.guarded(adapt.confident(), adapt.ladder(step=0.1))},
    "growing": {"explore": explore.rounds(2, growth=1.5)},
    **{k: {"adapt": adapt.choose_and_confirm(bound=v)} for k, v in BOUNDS.items()},
    **{
        f"constrained, {k}": _several(adapt.constrained("a", {"b": 1.0}, bound=v))
        for k, v in BOUNDS.items()
    },
}


@pytest.mark.parametrize("setting", [*SETTINGS, *JUDGED])
def test_nothing_of_ours_promotes_dtypes(setting):
    # With optimizers that promote nothing either: Adam does.
    kwargs = {"inner": {"sgd": optax.sgd(0.1), "heavy": optax.sgd(0.1, 0.9)}}
    kwargs |= {**SETTINGS, **JUDGED}[setting]
    if "sweep" in setting:
        kwargs["inner"] = {
            "sweep": optax_ev3.sweep(optax.sgd, learning_rate=[0.1, 0.2]),
            "sgd": optax.sgd(0.3),
        }
    tx, w = transformation(**kwargs), layer()
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(w)
        out = jax.eval_shape(stepper(tx), w, state)
        optax_ev3.summary(state)
    assert_same_types(out, (w, state))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64", "mixed"])
@pytest.mark.parametrize(
    "setting", ["one step", "own", "never", "significant", "relay"]
)
def test_parameters_of_any_precision_are_not_promoted(setting, dtype):
    w = TREES[dtype]()

    def loss(w, x=None):
        squares = [jnp.square(jnp.abs(leaf)).sum() for leaf in jax.tree.leaves(w)]
        return sum(square.astype(jnp.float32) for square in squares)

    kwargs = {**STRATEGIES[setting], "inner": [optax.sgd(0.1), optax.sgd(0.2, 0.9)]}
    kwargs |= {"loss_fn": loss} if "loss_fn" in kwargs else {}
    tx = transformation(assess_fn=lambda w, x: -loss(w) * x, **kwargs)
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(w)
        out = jax.eval_shape(lambda w, s: tx.update(w, s, w, x=X), w, state)
    assert_same_types(out, (w, state))


def test_corrections_promote_nothing():
    p, tested = jnp.array([0.01, 0.04, 0.5]), jnp.array([True, True, False])
    with jax.numpy_dtype_promotion("strict"):
        found = evidence.bonferroni(p, tested)
    np.testing.assert_allclose(found, [0.02, 0.08, 1.0], rtol=1e-6)


@pytest.mark.parametrize("promotion", ["standard", "strict"])
@pytest.mark.parametrize("setting", ["one step", "own", "shared", "relay"])
def test_python_and_numpy_numbers_train_eagerly(setting, promotion):
    w = {"python": 1.0, "float64": np.float64(2.0), "float32": np.float32(3.0)}

    def loss(w, x=None):
        return sum(jnp.square(leaf) for leaf in w.values())

    kwargs = {**STRATEGIES[setting], "inner": [optax.sgd(0.25)], "adapt": always(0)}
    kwargs |= {"loss_fn": loss} if "loss_fn" in kwargs else {}
    tx = optax_ev3.ev3(assess_fn=lambda w: -loss(w), **kwargs)
    with jax.numpy_dtype_promotion(promotion):
        state = tx.init(w)
        updates, state = tx.update({k: 2 * v for k, v in w.items()}, state, w)
        expected = {"python": -0.5, "float64": -1.0, "float32": -1.5}
        for name, update in updates.items():
            assert update.dtype == jnp.float32
            np.testing.assert_allclose(update, expected[name])
        assert_same_types(state, tx.init(w))
