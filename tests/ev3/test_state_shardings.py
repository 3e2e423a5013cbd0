"""States are spread like the parameters, on any mesh, for any optimizer."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.meshes import (
    COPY,
    EVOLVING,
    MESHES,
    PAIR,
    RACE,
    SWEEPS,
    data,
    likelihoods,
    loss_fn,
    mesh_of,
    spread,
    start,
)
from jax.sharding import NamedSharding, PartitionSpec

import optax_ev3
from optax_ev3 import explore

SETTINGS = MESHES["4x2"]
STRATEGIES = {
    "one step": (SWEEPS, explore.one_step()),
    "race": (SWEEPS, RACE),
    "copies": (EVOLVING, COPY),
    "relay": ({"s": SWEEPS["sgd"], **PAIR}, explore.relay(2)),
}


def check(state, shardings):
    """All leaves are spread as was said."""
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    for leaf, sharding in zip(*map(jax.tree.leaves, (state, shardings)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="this release has no explicit sharding"
)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_states_stay_as_they_are_spread(strategy, kind):
    inner, explore = STRATEGIES[strategy]
    mesh = mesh_of(SETTINGS["axes"], kind)
    with jax.set_mesh(mesh):
        params, held = start(), spread(data(99), mesh, ["data"])
        params = spread(params, mesh, SETTINGS)
        assess_fn = optax_ev3.held_out(likelihoods, held)
        tx = optax_ev3.ev3(inner, assess_fn, loss_fn=loss_fn, explore=explore)
        shardings = optax_ev3.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        check(state, shardings)

        wanted = jax.tree.map(lambda leaf: leaf.sharding, params)

        @functools.partial(jax.jit, out_shardings=(wanted, shardings))
        def step(params, state, batch):
            grads = jax.grad(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return optax.apply_updates(params, updates), state

        for call in range(5):
            batch = spread(data(call), mesh, ["data"])
            params, state = step(params, state, batch)
        check(params, wanted)
        check(state, shardings)
    # By hand: what mirrors the parameters, and members along an axis of their own.
    for name, explorer in inner.items():
        is_many = getattr(explorer, "size", None) is not None
        own = shardings.explore.explorers[name].opt_state
        if shardings.explore.branches:
            own = own, shardings.explore.branches.ends[name]
        check_specs(own, (None,) if is_many else ())
    check_specs(shardings.stable, ())
    assert shardings.ev3_round.spec == PartitionSpec()


def check_specs(shardings, members):
    """Of what is called like a parameter."""
    count = 0
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
        spec = SETTINGS.get(getattr(path[-1], "key", None))
        if spec is not None:
            assert sharding.spec == PartitionSpec(*members, *spec)
            count += 1
    assert count or not jax.tree.leaves(shardings)


def test_any_optimizer():
    mesh = mesh_of(SETTINGS["axes"], "Auto")
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        spread(start(), mesh, SETTINGS),
    )
    adam = optax_ev3.state_shardings(optax.adam(0.1), params)[0]
    assert adam.count == NamedSharding(mesh, PartitionSpec())
    for moments in (adam.mu, adam.nu):
        assert moments == {name: leaf.sharding for name, leaf in params.items()}


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="this release has no explicit sharding"
)
def test_shapes_before_there_are_parameters():
    mesh = mesh_of(SETTINGS["axes"], "Explicit")
    with jax.set_mesh(mesh):
        params = spread(start(), mesh, SETTINGS)
        shapes = jax.eval_shape(lambda params: params, params)
        tx = optax.adam(0.1)
        shardings = optax_ev3.state_shardings(tx, shapes)
        concrete = optax_ev3.state_shardings(tx, params)
        check(jax.jit(tx.init, out_shardings=shardings)(params), concrete)
        check(tx.init(params), concrete)


def test_boxes_of_flax():
    """What is stacked has one axis more than the box knows."""
    mesh = mesh_of({"data": 8}, "Auto")
    spread_out = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "data"))
    model, x = nn.Dense(16, kernel_init=spread_out), jnp.ones([4, 6])
    params = model.init(jax.random.key(0), x)["params"]
    params = jax.device_put(params, nn.get_sharding(params, mesh))

    def scores(params):
        return -(model.apply({"params": params}, x) ** 2).mean(-1)

    tx = optax_ev3.ev3({"s": SWEEPS["sgd"], "adam": optax.adam(0.1)}, scores)
    shardings = optax_ev3.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    check(state, shardings)
    moment = state.explore.explorers["adam"].opt_state[0].mu["kernel"]
    assert moment.value.sharding.spec == PartitionSpec(None, "data")
    assert state.stable["kernel"].names == (None, "data")
    tx = optax_ev3.ev3([optax.adam(rate) for rate in (0.1, 0.2, 0.3)], scores)
    shardings = optax_ev3.state_shardings(tx, params)
    moment = shardings.explore.explorers["explorer_0 and 2 more"].opt_state[0].mu
    assert moment["kernel"].value.spec == PartitionSpec(None, None, "data")


def arrays(**leaves):
    return {name: jnp.asarray(leaf) for name, leaf in leaves.items()}


def test_errors():
    tx = optax.adam(0.1)
    with pytest.raises(TypeError, match=r"NamedSharding, got None at params\['w'\]"):
        optax_ev3.state_shardings(tx, {"w": np.zeros(3)})
    with pytest.raises(TypeError, match="got SingleDeviceSharding"):
        optax_ev3.state_shardings(tx, arrays(w=np.zeros(3)))
    with pytest.raises(ValueError, match="one mesh, got none"):
        optax_ev3.state_shardings(tx, {})
    one = spread(np.zeros(8), mesh_of({"data": 8}, "Auto"), ["data"])
    two = spread(np.zeros(8), mesh_of({"i": 8}, "Auto"), ["i"])
    with pytest.raises(ValueError, match=r"one mesh, got \[Mesh"):
        optax_ev3.state_shardings(tx, {"w": one, "x": two})


def collectives(program):
    """The kind of each collective operation, and what it belongs to."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in program.splitlines():
        match = re.search(rf" ({kinds})(?:-start)?\(", line)
        if match is not None:
            name = re.search(r'op_name="([^"]*)"', line)
            yield match[1], name[1] if name else ""


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="this release has no explicit sharding"
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_users_functions_move_parameters(strategy):
    inner, explore = STRATEGIES[strategy]
    mesh = mesh_of(SETTINGS["axes"], "Auto")
    named = jax.named_scope("users")
    score, loss = named(likelihoods), named(loss_fn)

    def users_loss(params, batch):
        return loss(params, batch)

    inner = {
        name: one._replace(loss_fn=users_loss)
        if getattr(one, "loss_fn", None) is not None
        else one
        for name, one in inner.items()
    }
    tx = optax_ev3.ev3(
        inner,
        lambda params, held: score(params, held),
        loss_fn=users_loss,
        explore=explore,
    )
    params, batch = spread(start(), mesh, SETTINGS), spread(data(0), mesh, ["data"])
    shardings = optax_ev3.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)

    def step(params, state, batch):
        grads = jax.grad(users_loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, held=batch)
        return optax.apply_updates(params, updates), state

    wanted = jax.tree.map(lambda leaf: leaf.sharding, params), shardings
    lowered = jax.jit(step, out_shardings=wanted).lower(params, state, batch)
    moved = set(collectives(lowered.compile().as_text()))
    assert any("users" in name for _, name in moved)
    for kind, name in moved:
        # Ours are sums and maxima: of all numbers in a tree, and of scores.
        is_ours = kind == "all-reduce" and "/reduce_" in name
        assert is_ours or "users" in name, (kind, name)
