"""Evidence against NumPy, SciPy and simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from optax_ev3 import evidence as public
from optax_ev3._src.base import evidence, statistics


def gather(scores, finite=None, axis_name=None):
    scores = {name: jnp.asarray(values) for name, values in scores.items()}
    count = len(next(iter(scores.values())))
    finite = jnp.ones([count], bool) if finite is None else jnp.asarray(finite)
    return evidence.gather(scores, finite, jnp.zeros([count], bool), axis_name)


scores_2d = hnp.arrays(
    np.float32,
    st.sampled_from([(2, 2), (3, 5), (2, 12)]),  # Few shapes: each is compiled anew.
    elements=st.floats(-100, 100, width=32),
)


@given(scores_2d)
@settings(deadline=None, max_examples=60)
def test_estimate_is_mean_and_standard_error(values):
    found = evidence.estimate(gather({"score": values}), "score")
    wide = values.astype(np.float64)
    n = values.shape[1]
    np.testing.assert_allclose(found.mean, wide.mean(1), rtol=1e-4, atol=1e-4)
    expected = wide.std(axis=1, ddof=1) / np.sqrt(n)
    np.testing.assert_allclose(found.stderr, expected, rtol=1e-3, atol=1e-4)


@given(scores_2d, st.integers(0, 1))
@settings(deadline=None, max_examples=60)
def test_compare_is_the_paired_t_test_in_normal_units(values, reference):
    values = np.round(values, 2)
    found = evidence.compare(gather({"score": values}), "score", reference)
    difference = (values - values[reference]).astype(np.float64)
    n = values.shape[1]
    np.testing.assert_allclose(found.gain, difference.mean(1), rtol=1e-3, atol=1e-4)
    error = difference.std(axis=1, ddof=1) / np.sqrt(n)
    np.testing.assert_allclose(found.stderr, error, rtol=1e-3, atol=1e-4)
    for row in range(len(values)):
        if error[row] < 1e-3 or n < 5:
            continue
        t = difference[row].mean() / error[row]
        exact = stats.norm.isf(stats.t.sf(abs(t), n - 1)) * np.sign(t)
        coins = stats.norm.isf(0.5**n)
        if abs(exact) < min(3, coins):
            assert found.z[row] == pytest.approx(exact, abs=0.05)
            assert abs(found.z[row]) <= abs(exact) + 0.01  # Errs on the cautious side.


def test_compare_exact_figures():
    seen = gather({"score": np.float32([2.0, 1.0, 1.0, 0.5])})
    found = evidence.compare(seen, "score", 1)
    np.testing.assert_array_equal(found.gain, [1, 0, 0, -0.5])
    np.testing.assert_array_equal(found.stderr, np.zeros(4))
    np.testing.assert_allclose(found.z, np.array([1, 0, 0, -1]) * statistics.CERTAIN)
    noisy = evidence.compare(seen, "score", 1, noise=0.25)
    np.testing.assert_allclose(noisy.z, [4, 0, 0, -2])


@pytest.mark.parametrize("examples", [2, 3, 8, 100])
def test_few_equal_differences_are_no_certainty(examples):
    values = np.zeros([2, examples], np.float32)
    values[0] = 1.0
    z = evidence.compare(gather({"score": values}), "score", 1).z
    # n coins that all fall alike: p = 2 ** -n.
    assert float(z[0]) == pytest.approx(stats.norm.isf(0.5**examples), rel=1e-5)


def test_one_example_and_constant_scores_say_nothing():
    one = evidence.compare(gather({"score": np.float32([[3], [1]])}), "score", 1)
    np.testing.assert_array_equal(one.z, [0, 0])
    same = evidence.compare(gather({"score": np.ones([3, 9], np.float32)}), "score", 1)
    np.testing.assert_array_equal(same.z, np.zeros(3))


def test_huge_differences_are_seen():
    values = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    values[0] = -1e30 * (1 + np.abs(values[0]))
    found = evidence.compare(gather({"score": values}), "score", 1)
    assert np.isfinite(found.z).all()
    assert found.z[0] < -8


def test_values_that_are_not_finite_make_a_candidate_invalid_and_nothing_else():
    values = np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32)
    clean = evidence.compare(gather({"score": values}), "score", 3)
    values[0, 3], values[1, 5] = np.nan, -np.inf
    seen = gather({"score": values}, finite=[True, True, False, True])
    np.testing.assert_array_equal(seen.valid, [False, False, False, True])
    found = evidence.compare(seen, "score", 3)
    np.testing.assert_array_equal(found.z, np.zeros(4))
    one_bad = gather({"score": np.where(np.isfinite(values), values, np.nan)})
    kept = evidence.compare(one_bad, "score", 3)
    np.testing.assert_allclose(kept.z[2:], clean.z[2:], rtol=1e-6)
    assert np.isfinite(np.concatenate(list(kept))).all()


def test_any_objective_can_make_a_candidate_invalid():
    seen = gather({"a": np.float32([1, 2]), "b": np.float32([[1, 1], [np.inf, 1]])})
    np.testing.assert_array_equal(seen.valid, [True, False])


def test_over_devices_equals_one_device():
    values = np.random.default_rng(2).normal(size=(3, 32)).astype(np.float32)
    shards = jnp.moveaxis(jnp.asarray(values).reshape(3, 4, 8), 1, 0)

    def on_device(shard):
        seen = gather({"score": shard}, axis_name="i")
        return evidence.estimate(seen, "score"), evidence.compare(seen, "score", 1)

    split = jax.vmap(on_device, axis_name="i")(shards)
    seen = gather({"score": values})
    whole = evidence.estimate(seen, "score"), evidence.compare(seen, "score", 1)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, np.broadcast_to(b, a.shape), rtol=1e-4, atol=1e-5)


def test_over_devices_examples_not_looked_at_are_left_out():
    values = np.random.default_rng(5).normal(size=(3, 32)).astype(np.float32)
    looked_at = np.arange(32) % 5 < 3
    values[:, ~looked_at] = np.nan
    shards = np.moveaxis(values.reshape(3, 4, 8), 1, 0), looked_at.reshape(4, 8)

    def on_device(shard, mask):
        flags = jnp.ones([3], bool), jnp.zeros([3], bool)
        found = evidence.gather(
            {"score": shard}, *flags, axis_name="i", example_mask=mask
        )
        z = evidence.compare(found, "score", 1).z
        return found.example_mask, z, evidence.count(found, "score")

    seen, z, count = jax.vmap(on_device, axis_name="i")(*shards)
    np.testing.assert_array_equal(seen, [looked_at] * 4)
    np.testing.assert_array_equal(count, looked_at.sum())
    expected = evidence.compare(gather({"score": values[:, looked_at]}), "score", 1).z
    np.testing.assert_allclose(z, [expected] * 4, rtol=1e-4, atol=1e-5)


def test_over_devices_one_bad_score_counts_everywhere():
    values = np.zeros([4, 2, 8], np.float32)
    values[2, 0, 5] = np.nan
    valid = jax.vmap(lambda v: gather({"s": v}, axis_name="i").valid, axis_name="i")(
        jnp.asarray(values)
    )
    np.testing.assert_array_equal(valid, [[False, True]] * 4)


@pytest.mark.parametrize("examples", [16, 128])
def test_z_is_standard_normal_where_nothing_differs(examples):
    rng = np.random.default_rng(3)
    values = rng.normal(size=(4000, 2, examples)).astype(np.float32)

    def z(scores):
        return evidence.compare(gather({"score": scores}), "score", 1).z[0]

    found = np.asarray(jax.jit(jax.vmap(z))(jnp.asarray(values)))
    assert abs(found.mean()) < 3 / np.sqrt(4000)
    assert abs(found.std() - 1) < 0.05
    for alpha in (0.05, 0.01):
        share = (found > stats.norm.isf(alpha)).mean()
        assert abs(share - alpha) < 3.5 * np.sqrt(alpha / 4000)


def test_evidence_passes_through_transformations():
    scores = jnp.asarray(np.random.default_rng(4).normal(size=(3, 2, 8)))

    def kept(values):
        flags = jnp.ones([2], bool), jnp.zeros([2], bool)
        names = frozenset({"score"})
        return evidence.gather({"score": values}, *flags, binary=names)

    mapped = jax.jit(jax.vmap(kept))(scores)
    assert mapped.binary == {"score"}
    z = jax.jit(jax.vmap(lambda one: evidence.compare(one, "score", 1).z))(mapped)
    expected = evidence.compare(kept(scores[2]), "score", 1).z
    np.testing.assert_allclose(z[2], expected, rtol=1e-5)


def test_single_objective():
    assert public.single_objective(gather({"a": np.float32([1, 2])})) == "a"
    with pytest.raises(ValueError, match=r"one objective.*2: \['a', 'b'\]"):
        public.single_objective(gather({"a": np.ones(2), "b": np.ones(2)}))


def test_differences_within_rounding_are_ties():
    scores = np.random.default_rng(0).normal(size=64).astype(np.float32)
    nudged = np.nextafter(scores, np.float32(np.inf))
    same = gather({"score": jnp.stack([jnp.asarray(nudged), jnp.asarray(scores)])})
    np.testing.assert_array_equal(evidence.compare(same, "score", 1).z, 0)
    apart = gather(
        {"score": jnp.stack([jnp.asarray(scores + 1e-4), jnp.asarray(scores)])}
    )
    assert evidence.compare(apart, "score", 1).z[0] > 5
