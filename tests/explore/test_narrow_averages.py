"""Averages that are kept in bfloat16."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from helpers import always, assert_close, meshes
from helpers.trajectories import loss, run, score, start
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_ev3
from optax_ev3 import explore
from optax_ev3._src.explore import averages

NARROW = [
    explore.trajectory_average(dtype=jnp.bfloat16),
    explore.branch_average(dtype="bfloat16"),
]
WIDE = [explore.trajectory_average(), explore.branch_average()]


@settings(deadline=None, max_examples=30)
@given(
    st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    st.integers(0, 2**31 - 1),
)
def test_rounding_is_to_a_neighbour_and_right_on_average(x, seed):
    count = 4096
    rounded = averages._rounded(jnp.full([count], x, jnp.float32), seed, 0)
    assert rounded.dtype == jnp.bfloat16
    found = np.asarray(rounded, np.float64)
    # Neighbours by hand: the upper half of the number, and the next one away from zero.
    upper = np.float32(x).view(np.uint32) >> 16
    both = np.array([upper, upper + 1], np.uint16).view(ml_dtypes.bfloat16)
    near, far = both.astype(np.float64)
    assert set(found) <= {near, far}
    part = (x - near) / (far - near)
    error = np.sqrt(part * (1 - part) / count)
    assert abs((found == far).mean() - part) <= 5 * error + 1e-9


def test_changes_that_bfloat16_would_lose_add_up():
    """An average that moves by a hundredth towards what is 0.4% away."""
    kind = NARROW[1]
    mean = averages.begun(kind, jnp.ones([20_000]))
    assert mean.dtype == jnp.bfloat16
    target, expected, step = jnp.full([20_000], 1.004), 1.0, jnp.bfloat16(1.0)
    for age in range(100):
        mean = averages.move(mean, target, 0.01, jnp.int32(age))
        expected += 0.01 * (1.004 - expected)
        step += jnp.bfloat16(0.01) * (jnp.bfloat16(1.004) - step)
    assert step == 1  # Rounded to the nearest, it stands still.
    assert np.mean(np.asarray(mean, np.float64)) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    "strategy",
    [explore.rounds, explore.branches, explore.relay],
    ids=lambda x: x.__name__,
)
def test_they_are_those_in_float32_but_for_rounding(strategy):
    def trained(kinds):
        tx = optax_ev3.ev3(
            {"sgd": optax.sgd(0.05), "adam": optax.adam(0.02)},
            score,
            loss_fn=None if strategy is explore.relay else loss,
            explore=strategy(6, averages=kinds),
            adapt=always(0),
        )
        memory = optax_ev3.memory(tx, start())["averages"]
        return run(tx, 11)[-1][1], memory

    (narrow, small), (wide, large) = trained(NARROW), trained(WIDE)
    assert 2 * small == large
    walked, other = narrow.explore.branches, wide.explore.branches
    found, expected = ((one.means, one.turn_means) for one in (walked, other))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    found = jax.tree.map(lambda x: x.astype(jnp.float32), found)
    # At most 6 roundings by 1 in 128 each; in fact about 1 in 300.
    assert_close(found, expected, 6 / 128, 0.02)
    # Nothing else changes: nobody looks at averages here.
    assert_close(walked.ends, other.ends)


def test_what_is_no_real_number_stays_as_it_is():
    tree = {"whole": jnp.arange(3), "complex": jnp.ones(2, jnp.complex64)}
    mean = averages.begun(NARROW[0], tree)
    assert [x.dtype for x in jax.tree.leaves(mean)] == [jnp.complex64, jnp.int32]
    moved = averages.move(mean, jax.tree.map(lambda x: x + 2, tree), 0.5, jnp.int32(0))
    np.testing.assert_allclose(moved["complex"], 2)
    np.testing.assert_array_equal(moved["whole"], [2, 3, 4])


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="this release has no explicit sharding"
)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_they_stay_spread_over_devices(kind):
    specs = meshes.MESHES["4x2"]
    mesh = meshes.mesh_of(specs["axes"], kind)
    tx = optax_ev3.ev3(
        meshes.SWEEPS,
        meshes.likelihoods,
        loss_fn=meshes.loss_fn,
        explore=explore.branches(2, averages=NARROW),
    )

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(meshes.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params = meshes.spread(meshes.start(), mesh, specs)
        shardings = optax_ev3.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        for seed in range(4):
            batch = meshes.spread(list(meshes.data(seed)), mesh, ["data"])
            params, state = step(params, state, tuple(batch))
    means = state.explore.branches.means
    for leaf, wanted in zip(
        *map(jax.tree.leaves, (means, shardings.explore.branches.means)), strict=True
    ):
        assert leaf.dtype == jnp.bfloat16
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
