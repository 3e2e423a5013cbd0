"""Parameter trees of every kind, in every strategy, rule and combination."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import always, assert_close, assert_same_types

import optax_ev3
from optax_ev3 import adapt, combine, evidence


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
    "one step, race": {"race": 1},
    "own": {"loss_fn": loss, "trajectory_length": 2},
    "shared": {"trajectory_length": 2, "restart_state": "new"},
    "turns": {"trajectory_length": 2, "gradients": "turns"},
    "never": {
        "loss_fn": loss,
        "trajectory_length": 2,
        "restart": "never",
        "race": 1,
        "combine": [combine.branch_average(), combine.exponential_average()],
    },
    "significant": {
        "trajectory_length": 2,
        "restart": "significant",
        "restart_state": "copy",
        "combine": [combine.trajectory_average(), combine.greedy_soup(2)],
    },
    "behind": {
        "trajectory_length": 2,
        "restart": "behind",
        "restart_state": "new",
        "race": 1,
    },
    "sweep": {"inner": _sweep()},
    "sweep, copy": {
        "inner": _sweep() | two(),
        "trajectory_length": 2,
        "restart_state": "copy",
        "combine": [combine.trajectory_average()],
    },
    "evolve": {"inner": _evolving()},
    "evolve, own": {
        "inner": _evolving(),
        "loss_fn": loss,
        "trajectory_length": 2,
        "restart": "behind",
    },
}


def _two_objectives(params, x):
    return {"a": score(params, x), "b": -jnp.abs(params(x))}


def _several(rule):
    return {"adapt": rule, "assess_fn": _two_objectives}


RULES = {
    "greedy": {"adapt": adapt.greedy()},
    "lower_bound": {"adapt": adapt.lower_bound()},
    "choose_and_confirm": {"adapt": adapt.choose_and_confirm()},
    "constrained": _several(adapt.constrained("a", {"b": 1.0})),
    "weighted": _several(adapt.weighted({"a": 1.0, "b": 0.5})),
    "lexicographic": _several(adapt.lexicographic({"a": 0.0, "b": 0.0})),
    "lexicase": _several(adapt.lexicase(["a", "b"])),
    "pareto": _several(adapt.pareto({"a": 0.0, "b": 0.0})),
    "ladder": {"guard": evidence.ladder()},
    "thresholdout": {
        "assess_fn": lambda w, x: {"score": score(w, x), "train": score(w, 2 * x)},
        "guard": evidence.thresholdout(budget=10),
    },
    "vmap": {"assess_mode": "vmap"},
    "map": {"assess_mode": "map"},
    "chunks": {"assess_fn": optax_ev3.in_chunks(score, 4, ["x"])},
    "held out": {
        "assess_fn": optax_ev3.held_out(lambda w, x: score(w, x), X, batch_size=4)
    },
}
SETTINGS = {**STRATEGIES, **RULES}


def transformation(**kwargs):
    return optax_ev3.ev3(**{"inner": two(), "assess_fn": score, **kwargs})


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
@pytest.mark.parametrize("setting", ["one step", "own", "shared"])
def test_one_explorer_trains_callable_trees_like_optax(setting, tree):
    inner, w = optax.adam(0.1), CALLABLE[tree]()
    kwargs = {**STRATEGIES[setting], "inner": [inner], "adapt": always(0)}
    kwargs.pop("restart_state", None)
    tx = transformation(**kwargs)
    step, plain = jax.jit(stepper(tx)), optax.with_extra_args_support(inner)
    plain_step = jax.jit(stepper(plain))
    state, expected, plain_state = tx.init(w), w, inner.init(w)
    for _ in range(5):
        w, state = step(w, state)
        expected, plain_state = plain_step(expected, plain_state)
        assert_close(w, expected)
    assert float(loss(w, X)) < float(loss(CALLABLE[tree](), X))
    assert step._cache_size() == 1


def test_stable_parameters_replace_callable_ones():
    # The one decision that makes an update of the stable tree, in one-step rounds.
    tx = transformation(inner=[optax.sgd(0.0)], adapt=always(2))
    w = layer()
    good = Model(jnp.array([2.0, 1.0]), jnp.ones([]))
    state = tx.init(w)._replace(stable=good)
    w, _ = jax.jit(stepper(tx))(w, state)
    assert_close(w, good)
    np.testing.assert_array_equal(w(X), good(X))
