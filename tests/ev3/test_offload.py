"""What waits is kept in the memory of the host, and decisions are the same."""

import sys

import jax
import numpy as np
import optax
import pytest
from helpers import assert_close
from helpers.meshes import data, likelihoods, loss_fn, mesh_of, spread, start

import optax_ev3
from optax_ev3 import explore

pytestmark = pytest.mark.skipif(
    not hasattr(jax, "memory"), reason="this release has no types of memory"
)

RATES = {"learning_rate": [0.001, 0.03, 0.1, float("inf")]}
INNER = {
    "adam": optax_ev3.sweep(optax.adam, **RATES),
    "sgd": optax.sgd(0.3, momentum=0.9),
}
KINDS = {
    **INNER,
    **{f"momentum_{rate}": optax.sgd(rate, momentum=0.9) for rate in (0.1, 0.01)},
    "rmsprop": optax.rmsprop(0.01),
}
AVERAGES = [explore.trajectory_average(), explore.branch_average()]
STRATEGIES = {
    "one step": explore.one_step(),
    "branches": explore.branches(2, averages=AVERAGES, racing=explore.Racing(1, 2)),
    "relay": explore.relay(2),
}
MATRIX = {"w1": (None, "data"), "b": ("data",), "w2": ("data", None)}


def transformation(strategy, assess_fn=likelihoods):
    inner = KINDS if strategy == "relay" else INNER
    return optax_ev3.ev3(
        inner, assess_fn, loss_fn=loss_fn, explore=STRATEGIES[strategy]
    )


def trained(strategy, mesh, offload, calls=40):
    """Parameters, state and sharding after some calls."""
    assess_fn = optax_ev3.held_out(likelihoods, spread(data(99), mesh, []))
    tx = transformation(strategy, assess_fn)
    params = spread(start(), mesh, MATRIX if mesh.size > 1 else [])
    shardings = optax_ev3.state_shardings(tx, params, offload=offload)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    wanted = jax.tree.map(lambda leaf: leaf.sharding, params), shardings

    def step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, out_shardings=wanted, donate_argnums=(0, 1))
    for i in range(calls):
        params, state = step(params, state, spread(data(i), mesh, []))
    return params, state, shardings


@pytest.mark.parametrize(
    ("strategy", "devices"),
    [("one step", 1), ("branches", 1), ("relay", 8)],
)
def test_decisions_are_the_same(strategy, devices):
    mesh = mesh_of({"data": 8}, "Auto")
    if devices == 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    params, state, shardings = trained(strategy, mesh, True)
    expected, other, _ = trained(strategy, mesh, False)
    assert_close(params, expected, 1e-5, 1e-6)
    past, theirs = map(optax_ev3.history, (state, other))
    assert len(set(theirs["adopted"])) > 1
    np.testing.assert_array_equal(past["adopted"], theirs["adopted"])
    assert_close(optax_ev3.best_params(state), optax_ev3.best_params(other), 1e-5, 1e-6)
    for leaf, sharding in zip(*map(jax.tree.leaves, (state, shardings)), strict=True):
        assert leaf.sharding.memory_kind == sharding.memory_kind
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.stable)}
    assert kinds == {"pinned_host"}


def test_a_relay_has_one_explorer_on_the_device():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    params, state, _ = trained("relay", mesh, True, calls=2)
    copy = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    on = {"device": 0, "pinned_host": 0}
    for leaf in jax.tree.leaves(state):
        on[leaf.sharding.memory_kind] += leaf.nbytes
    # A branch and two averages; of inner states Adam's, and one moment of each other.
    records = sum(leaf.nbytes for leaf in jax.tree.leaves(state.history)) + 1000
    assert 7 * copy <= on["device"] <= 7 * copy + records
    # Four Adams and three momenta that wait, each with an average, branch and average
    # of RMSProp, the best parameters, and the stable ones.
    assert on["pinned_host"] - 4 * 4 == (4 * 4 + 3 * 3 + 2 + 2) * copy


def test_the_preset_for_a_billion_parameters():
    """In bfloat16, with averages in float32."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape = jax.ShapeDtypeStruct([1000, 10**6], jax.numpy.bfloat16, sharding=everywhere)
    tx = optax_ev3.portfolio(lambda w: -(w**2).sum())
    told = optax_ev3.memory(tx, shape, offload=True)
    # Parameters and branch; two averages; moments: two of Adam, one of two others.
    expected = 2 + 2 + 2 * 4 + 2 * (2 + 1 + 1)
    assert expected * 10**9 <= told["device"] <= expected * 10**9 + 10**6
    # Of all eight branch, average; of stacks moments; the best, and the stable ones.
    expected = 8 * (2 + 4) + 2 * (4 * 2 + 3) + 2 + 2
    assert expected * 10**9 <= told["host"] <= expected * 10**9 + 10**6


def test_no_memory_of_the_host(monkeypatch):
    ours = sys.modules[optax_ev3.state_shardings.__module__]
    monkeypatch.setattr(ours, "_HOST", "none_such")
    mesh = mesh_of({"data": 8}, "Auto")
    tx = optax_ev3.ev3(INNER, likelihoods)
    with pytest.raises(ValueError, match=r"memory of kind 'none_such'.* has "):
        optax_ev3.state_shardings(tx, spread(start(), mesh, []), offload=True)


def test_memory_is_told_before():
    """What is told is what the arrays then take, on one device and spread."""
    for mesh in (mesh_of({"data": 8}, "Auto"), None):
        for strategy, offload in [("one step", False), ("relay", True)]:
            if mesh is None:
                mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
            params, state, _ = trained(strategy, mesh, offload, calls=1)
            tx = transformation(strategy)
            told = optax_ev3.memory(tx, params, offload=offload)
            taken = {"device": 0, "pinned_host": 0}
            for leaf in jax.tree.leaves((params, state)):
                part = leaf.addressable_shards[0].data
                taken[leaf.sharding.memory_kind] += part.nbytes
            assert told["device"] == taken["device"]
            assert told["host"] == taken["pinned_host"]
            parts = [size for name, size in told.items() if name != "host"]
            assert sum(parts) == 2 * told["device"]
            own = sum(
                x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params)
            )
            assert told["params"] == own
            if strategy == "relay":
                # Branch and average, Adam and a momentum; and a count.
                assert told["at work"] == (2 + 2 + 1) * own + 4
                assert told["averages"] == own  # That over the turn.
                assert (told["stable"], told["start"]) == (0, 0)
    with pytest.raises(TypeError, match="need parameters with a"):
        optax_ev3.memory(tx, start(), offload=True)
