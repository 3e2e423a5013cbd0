"""``optax.tree.map_params``: what is like the parameters, and what is stacked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ev3
from optax_ev3 import explore

PARAMS = {"w": jnp.ones([3, 4]), "b": jnp.ones([4])}
STRATEGIES = {
    "one_step": {},
    "own": {"explore": explore.rounds(2)},
    "shared": {"explore": explore.rounds(2, gradients="shared")},
    "never": {"explore": explore.branches(1, racing=explore.Racing(1, 4))},
    "averages": {
        "explore": explore.rounds(
            2,
            averages=[
                explore.trajectory_average(),
                explore.branch_average(),
            ],
        ),
    },
    "relay": {"explore": explore.relay(2)},
}


def frozen(tx):
    return optax.masked(tx, {"w": True, "b": False})


def transformation(strategy):
    space = {"learning_rate": optax_ev3.log_uniform(1e-3, 1.0)}
    inner = {
        "adam": optax.adam(0.1),
        "masked": frozen(optax.adam(0.1)),
        "sweep": optax_ev3.sweep(optax.adam, learning_rate=[0.1, 0.2]),
        "masks": optax_ev3.sweep(
            lambda learning_rate: frozen(optax.adam(learning_rate)),
            learning_rate=[0.1, 0.2],
        ),
        "group": optax_ev3.evolve(optax.adam, space, population=2),
    }
    if strategy == "relay":  # There no group evolves.
        del inner["group"]
    settings = {"loss_fn": lambda p: p["b"].sum(), **STRATEGIES[strategy]}
    return optax_ev3.ev3(inner, lambda p: -p["b"].sum(), **settings)


def like_params(tx, state, names):
    """The paths of leaves that are like the parameter that they are mapped with."""

    def is_hole(node):
        return isinstance(node, optax.MaskedNode)

    marked = optax.tree.map_params(
        tx,
        lambda leaf, name: leaf if is_hole(leaf) else name,
        state,
        names,
        is_leaf=is_hole,
        transform_non_params=lambda tree: jax.tree.map(lambda _: "", tree),
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    return {
        jax.tree_util.keystr(path): name
        for path, name in jax.tree_util.tree_leaves_with_path(marked)
        if name
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_like_the_parameters(strategy):
    tx = transformation(strategy)
    state = tx.init(PARAMS)
    found = like_params(tx, state, {"w": "w", "b": "b"})
    leaves = jax.tree_util.tree_leaves_with_path(state)
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
    for path, name in found.items():
        assert shapes[path] == PARAMS[name].shape, path
        assert path.endswith(f"['{name}']")
    # All are found that have the shape of a matrix: moments, branches, averages.
    expected = {path for path, shape in shapes.items() if shape == (3, 4)}
    assert {path for path, name in found.items() if name == "w"} == expected
    trees = ["stable['w']", "'adam'].opt_state[0].mu['w']"]
    if strategy != "one_step":
        trees += ["explore.branches.start['w']", "ends['adam']['w']"]
    if strategy == "averages":
        trees += ["means['adam'][0]['w']", "means['adam'][1]['w']"]
    if strategy == "relay":
        trees += ["turn_means[0]['w']", "means['adam'][1]['w']"]
    for tree in trees:
        assert any(path.endswith(tree) for path in expected), tree
    # What a relay has at work is of one member.
    waiting = [p for p in shapes if "at_work" not in p]
    stacked = [p for p in waiting if "sweep'" in p or "masks'" in p or "group'" in p]
    assert any(shapes[p] == (2, 3, 4) for p in stacked) and not {*stacked} & {*found}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_state_itself_is_the_same(strategy):
    """Nothing stands in the place of stacked trees but where optax asks."""
    tx = transformation(strategy)
    state = tx.init(PARAMS)
    _, after = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    moment = state.explore.explorers["sweep"].opt_state[0].mu
    assert {k: v.shape for k, v in moment.items()} == {"w": (2, 3, 4), "b": (2, 4)}
    np.testing.assert_array_equal(moment["w"], 0)
    # No placeholder is an empty tree, nor the other way round.
    sweep = optax_ev3.sweep(optax.adam, learning_rate=[0.1, 0.2])
    empty = optax_ev3.ev3([sweep], lambda p: 0.0, explore=explore.rounds(2)).init({})
    assert jax.tree.leaves(empty.explore.explorers["adam"].opt_state[0].mu) == []
