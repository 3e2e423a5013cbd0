"""Explorers spread over a mesh axis: the same decisions, each device with its own."""

import functools

import jax
import numpy as np
import optax
import pytest
from helpers import assert_close
from helpers.meshes import data, likelihoods, loss_fn, mesh_of, spread, start
from optax import contrib

import optax_ev3
from optax_ev3 import explore

pytestmark = pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="this release has no explicit sharding"
)

ADAMS = {f"adam_{rate:g}": optax.adam(rate) for rate in (0.3, 0.1, 0.03, 0.001)}
UNLIKE = {
    "adam": optax.adam(0.03),
    "yogi": optax.yogi(0.03),
    "sgd": optax.sgd(0.3),
    "momentum": optax.sgd(0.1, momentum=0.9),
}


def l1(params):
    return sum(abs(leaf).sum() for leaf in jax.tree.leaves(params))


OWN = optax_ev3.sweep(optax.sgd, learning_rate=[0.01, 0.1, 0.3, float("inf")])
EVOLVING = optax_ev3.evolve(
    optax.adam, {"learning_rate": optax_ev3.log_uniform(0.001, 0.3)}, 4
)
AVERAGES = [explore.trajectory_average(), explore.branch_average()]
RACE = explore.Racing(1, 2)
CASES = {
    "one step": (ADAMS, explore.one_step()),
    "own": (ADAMS, explore.branches(2)),
    "unlike": (UNLIKE, explore.branches(2, averages=AVERAGES, racing=RACE)),
    # Its matrices cannot be multiplied where explicit types spread them.
    "muon": (
        {**UNLIKE, "adam": contrib.muon(0.03, consistent_rms=0.2)},
        explore.branches(2),
    ),
    "unlike one step": (UNLIKE, explore.one_step()),
    "others": (
        {**ADAMS, "other": optax_ev3.explorer(optax.sgd(0.1), l1)},
        explore.branches(2),
    ),
    "shared": (ADAMS, explore.rounds(2, gradients="shared", restart_state="new")),
    "race": (
        ADAMS,
        explore.branches(
            2, averages=AVERAGES, racing=RACE, restart=explore.never("copy")
        ),
    ),
    "halving": (
        UNLIKE,
        explore.branches(
            2, averages=AVERAGES, racing=explore.SuccessiveHalving(1, 2, warmup=1)
        ),
    ),
    "sweep": ({"s": optax_ev3.explorer(OWN, loss_fn)}, explore.branches(2)),
    "evolve": (
        {"e": EVOLVING},
        explore.branches(2, restart=explore.worse_than("start")),
    ),
}
# Axes, and how the parameters are spread over them.
SETTINGS = {
    "4": {"axes": {"pop": 4}, "w1": (), "b": (), "w2": ()},
    "2x4": {
        "axes": {"pop": 2, "data": 4},
        "w1": (None, "data"),
        "b": ("data",),
        "w2": ("data", None),
    },
}


def step_of(tx, **kwargs):
    @functools.partial(jax.jit, **kwargs)
    def step(params, state, batch, held):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, held=held)
        return optax.apply_updates(params, updates), state

    return step


def made(case, axis=None):
    inner, strategy = CASES[case]
    return optax_ev3.ev3(
        inner,
        lambda params, held: likelihoods(params, held),
        loss_fn=loss_fn,
        explore=strategy,
        explorer_axis=axis,
    )


@functools.cache
def on_one_device(case):
    tx = made(case)
    params, state, step = start(), tx.init(start()), step_of(tx)
    for i in range(12):
        params, state = step(params, state, data(i), data(100 + i))
    return params, state


def spread_out(case, setting, kind):
    """The transformation, its step, and with what it begins."""
    settings = SETTINGS[setting]
    tx, mesh = made(case, "pop"), mesh_of(settings["axes"], kind)
    params = spread(start(), mesh, settings)
    shardings = optax_ev3.state_shardings(tx, params, explorer_axis="pop")
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    wanted = jax.tree.map(lambda leaf: leaf.sharding, params), shardings
    step = step_of(tx, out_shardings=wanted)
    examples = ["data"] if "data" in settings["axes"] else []
    return mesh, step, params, state, lambda i: spread(data(i), mesh, examples)


# With types that say how arrays are spread, and without.
TESTED = [(case, "4", "Explicit") for case in CASES]
TESTED += [(case, "2x4", "Auto") for case in ("one step", "race", "sweep", "unlike")]
TESTED += [("race", "2x4", "Explicit"), ("unlike", "2x4", "Explicit")]


@pytest.mark.parametrize(("case", "setting", "kind"), TESTED)
def test_decisions_are_those_of_one_device(case, setting, kind):
    mesh, step, params, state, batch = spread_out(case, setting, kind)
    first = state
    with jax.set_mesh(mesh):
        for i in range(12):
            params, state = step(params, state, batch(i), batch(100 + i))
    expected, alone = on_one_device(case)
    assert_close(params, expected, 1e-4, 1e-5)
    past, theirs = optax_ev3.history(state), optax_ev3.history(alone)
    np.testing.assert_array_equal(past["adopted"], theirs["adopted"])
    # Each device still has its own members, and no others.
    moments = 0
    for leaf, before in zip(*map(jax.tree.leaves, (state, first)), strict=True):
        assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)
        if leaf.sharding.spec and leaf.sharding.spec[0] == "pop":
            moments += 1
            (count,) = {part.data.shape[0] for part in leaf.addressable_shards}
            assert count == leaf.shape[0] // mesh.shape["pop"]
    assert moments >= 3


def test_each_device_has_the_work_of_its_own():
    """One of four explorers a device, and in each call one copy is moved."""
    mesh, step, params, state, batch = spread_out("shared", "4", "Auto")
    with jax.set_mesh(mesh):
        program = step.lower(params, state, batch(0), batch(1)).compile()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    arguments = program.memory_analysis().argument_size_in_bytes
    # Parameters, start and stable; of one explorer two moments and its branch.
    assert arguments < 1.2 * 6 * sum(sizes) + 12_000
    text = program.as_text()
    assert "all-reduce" in text
    # Of what all have, at most some flags and scores.
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert not any("f32[4,6,16]" in line for line in gathers)


def test_errors():
    with pytest.raises(TypeError, match="explorer_axis must be the name"):
        optax_ev3.ev3(ADAMS, likelihoods, explorer_axis=0)
    own = {"adam": optax.adam(0.1), "sgd": optax_ev3.explorer(optax.sgd(0.1), l1)}
    with pytest.raises(ValueError, match="there are no two of them among adam, sgd"):
        optax_ev3.ev3(own, likelihoods, explorer_axis="pop")
    with pytest.raises(ValueError, match=r"take turns: take explore\.branches"):
        optax_ev3.ev3(ADAMS, likelihoods, explore=explore.relay(), explorer_axis="pop")
    tx = made("own", "pop")
    three = mesh_of({"pop": 1, "data": 8}, "Auto")
    params = spread(start(), three, [])
    with pytest.raises(ValueError, match="no axis 'explorers', over which"):
        optax_ev3.state_shardings(tx, params, explorer_axis="explorers")
    eight = spread(start(), mesh_of({"pop": 8}, "Auto"), [])
    message = "4 explorers, adam_0.3, .*do not divide over the 8 devices"
    with pytest.raises(ValueError, match=message):
        optax_ev3.state_shardings(tx, eight, explorer_axis="pop")
    both = {"w1": (None, "pop"), "b": (), "w2": ()}
    spread_twice = spread(start(), mesh_of({"pop": 4}, "Auto"), both)
    with pytest.raises(ValueError, match="must not be spread over the axis"):
        optax_ev3.state_shardings(tx, spread_twice, explorer_axis="pop")
    state = tx.init(start())
    with (
        jax.set_mesh(mesh_of({"pop": 8}, "Auto")),
        pytest.raises(ValueError, match=message),
    ):
        step_of(tx)(start(), state, data(0), data(1))
    with (
        jax.set_mesh(mesh_of({"i": 8}, "Auto")),
        pytest.raises(ValueError, match="no axis 'pop'"),
    ):
        step_of(tx)(start(), state, data(0), data(1))
