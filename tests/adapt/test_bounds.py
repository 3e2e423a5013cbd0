"""Bounds and corrections against SciPy, plain loops and simulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from optax_ev3 import evidence as public
from optax_ev3._src.adapt import corrections
from optax_ev3._src.base import evidence, statistics

RANGE = 0.0, 1.0
WIDTH = 2.0  # of the differences between two scores in that range
ALPHA = 0.05

BOUNDS = {
    "paired_t": public.paired_t(),
    "mcnemar": public.mcnemar(),
    "betting": public.betting(*RANGE),
    "standard": public.standard(),
}
COUNTED = ("mcnemar", "standard")

each = pytest.mark.parametrize("name", [name for name in BOUNDS if name != "standard"])


def gather(values, seen=None, binary=False, finite=None):
    """Evidence of one objective, from ``[C, N]`` or ``[C]`` or a figure's resamples."""
    names = frozenset(["score"] if binary else [])
    values = jax.tree.map(jnp.asarray, values)
    count = len(jax.tree.leaves(values)[0])
    finite = jnp.ones([count], bool) if finite is None else jnp.asarray(finite)
    seen = None if seen is None else jnp.asarray(seen)
    flags = finite, jnp.zeros([count], bool)
    return evidence.gather({"score": values}, *flags, binary=names, example_mask=seen)


@functools.cache
def _compiled(name, binary, mapped):
    bound = BOUNDS[name]

    def fn(scores, seen, finite, reference, alpha):
        found = gather(scores, seen, binary, finite)
        p = bound.p_value(found, "score", reference)
        return p, bound.lower(found, "score", reference, alpha)

    return jax.jit(jax.vmap(fn, (0, None, None, None, 0)) if mapped else fn)


def on_cases(name, scores, reference=2, alpha=ALPHA):
    """P values and lower bounds ``[cases, C]``, of ``[25, 3, 40]`` compiled once."""
    alpha = np.broadcast_to(np.float32(alpha), scores.shape[:2])
    fn = _compiled(name, name in COUNTED, True)
    return [np.asarray(x) for x in fn(scores, None, None, reference, alpha)]


def ask(name, scores, *, seen=None, finite=(True,) * 3, reference=2, alpha=ALPHA):
    """The same of one case, of ``[3, 60]`` compiled once."""
    seen = np.ones(scores.shape[1], bool) if seen is None else seen
    fn = _compiled(name, name in COUNTED, False)
    found = fn(scores, seen, np.array(finite), reference, alpha)
    return [np.asarray(x) for x in found]


def bounded(cases=25, candidates=3, examples=40, seed=0):
    """Scores in [0, 1] that mostly agree; the last candidate is no better."""
    rng = np.random.default_rng(seed)
    common = rng.beta(1.5, 3, [cases, 1, examples])
    own = rng.beta(1.5, 3, [cases, candidates, examples])
    gain = rng.uniform(0, 0.9, [cases, candidates, 1])
    gain[:, -1] = 0
    scores = np.where(rng.random(own.shape) < 0.4, own, common)
    return np.float32(scores + gain * (1 - scores))


def coins(cases=25, candidates=3, examples=40, seed=0):
    """The same, 0 or 1."""
    return np.float32(bounded(cases, candidates, examples, seed) > 0.4)


def differences(scores, reference=-1):
    """``[cases, C, N]`` float64, of the scores as they are rounded."""
    scores = scores.astype(np.float64)
    return scores - scores[:, [reference]]


def in_normal_units(p):
    return stats.norm.isf(np.clip(np.float64(p), 1e-12, 1 - 1e-6))


# Each bound by itself.


@pytest.mark.parametrize("examples", [8, 40])
def test_paired_t_is_scipys(examples):
    rng = np.random.default_rng(0)
    scores = np.float32(rng.gamma(2.0, size=[60, 2, examples]))
    scores[:, 0] += rng.uniform(-0.5, 1.5, [60, 1])
    p, lower = on_cases("paired_t", scores, 1)
    first, second = np.moveaxis(scores.astype(np.float64), 1, 0)
    exact = stats.ttest_rel(first, second, axis=1, alternative="greater")
    z = in_normal_units(exact.pvalue)
    # No proof beyond that of N coins, and Wallace's approximation up to there.
    z = np.minimum(z, stats.norm.isf(0.5**examples))
    close = abs(z) < 3
    assert close.sum() > 30
    np.testing.assert_allclose(in_normal_units(p[:, 0])[close], z[close], atol=0.04)
    stderr = (first - second).std(axis=1, ddof=1) / np.sqrt(examples)
    limit = exact.confidence_interval(1 - ALPHA).low
    np.testing.assert_allclose((lower[:, 0] - limit) / stderr, 0, atol=0.04)


def outcome(wins, losses, examples):
    """Scores of a candidate and a reference, 0 or 1."""
    scores = np.ones([2, examples], np.float32)
    scores[1, :wins] = 0
    scores[0, wins : wins + losses] = 0
    return scores


def by_hand(wins, losses):
    if wins == 0:
        return 1.0
    return stats.binomtest(wins, wins + losses, alternative="greater").pvalue


def test_mcnemar_is_scipys_binomial_test():
    pairs = [(wins, losses) for wins in range(11) for losses in range(11)]
    pairs += [(30, 0), (0, 30), (29, 1), (1, 29), (15, 15), (19, 11)]
    scores = np.stack([outcome(*pair, 30) for pair in pairs])
    p, lower = on_cases("mcnemar", scores, 1)
    exact = [by_hand(*pair) for pair in pairs]
    np.testing.assert_allclose(p[:, 0], exact, rtol=2e-5)
    np.testing.assert_array_equal(p[:, 1], 1)
    _, usual = on_cases("paired_t", scores, 1)
    np.testing.assert_allclose(lower, usual, rtol=1e-5, atol=1e-6)


def test_mcnemar_of_many_examples():
    pairs = [(n // 2 + k, n - n // 2 - k) for n in (900, 2100, 40_000) for k in (0, 99)]
    pairs += [(1150, 1000), (40_000, 0), (100, 39_900), (20_400, 19_600)]
    scores = np.stack([outcome(*pair, 40_000) for pair in pairs])
    bound = BOUNDS["mcnemar"]

    @jax.jit
    @jax.vmap
    def p_value(values):
        return bound.p_value(gather(values, binary=True), "score", 1)[0]

    exact = [by_hand(*pair) for pair in pairs]
    np.testing.assert_allclose(p_value(scores), exact, rtol=1e-3, atol=1e-30)


def test_bootstrap_counts_are_poisson():
    counts = np.asarray(statistics.bootstrap_counts(jax.random.key(0), 500, 400))
    assert counts.shape == (500, 400) and counts.dtype == np.float32
    for k in range(6):
        share, expected = (counts == k).mean(), stats.poisson.pmf(k, 1)
        assert abs(share - expected) < 4 * np.sqrt(expected / counts.size)
    assert counts.max() <= 10


# At any time.


def betting_by_loop(d, m=0.5):
    """Logarithm of the bettor's highest wealth, example by example."""
    count, total, squares, log, best = 0, 0.0, 0.0, 0.0, 0.0
    for one in d:
        y = one / WIDTH + 0.5
        mu = (0.5 + total) / (count + 1)
        v = (0.25 + squares) / (count + 1)
        stake = np.clip((mu - m) / (v + (mu - m) ** 2), 0, 0.5 / m)
        log += np.log(1 + stake * (y - m))
        best = max(best, log)
        count, total = count + 1, total + y
        squares += (y - (0.5 + total) / (count + 1)) ** 2
    return best


def test_betting_is_the_formula():
    for scores in (bounded(), coins()):
        expected = np.apply_along_axis(betting_by_loop, 2, differences(scores))
        assert (expected > 1).sum() > 5
        p, _ = on_cases("betting", scores)
        np.testing.assert_allclose(p, np.exp(-expected), rtol=2e-3)


def test_lower_of_betting_is_where_the_bettor_has_won_enough():
    scores = bounded(cases=10)
    _, lower = on_cases("betting", scores)
    for d, bound in zip(differences(scores)[:, 0], lower[:, 0], strict=True):
        best = betting_by_loop(d, bound / WIDTH + 0.5)
        assert best == pytest.approx(np.log(1 / ALPHA), rel=0.01)


# What holds for all.


@pytest.mark.parametrize("name", [name for name in BOUNDS if name not in COUNTED])
def test_lower_at_its_p_value_is_zero(name):
    scores = bounded()
    p, _ = on_cases(name, scores)
    _, lower = on_cases(name, scores, alpha=np.clip(p, 1e-8, 0.99))
    proven = (p > 1e-8) & (p < 0.9)
    assert proven.sum() > 15
    np.testing.assert_allclose(lower[proven], 0, atol=3e-3)
    # And one says "better" where the other does.
    for alpha in (0.01, 0.05, 0.3):
        _, lower = on_cases(name, scores, alpha=alpha)
        clear = abs(np.log(p) - np.log(alpha)) > 0.02
        np.testing.assert_array_equal((lower > 0)[clear], (p < alpha)[clear])


@each
def test_errors_are_as_rare_as_promised(name):
    runs = 2000
    rng = np.random.default_rng(2)
    common, own = rng.random([runs, 1, 40]), rng.random([runs, 3, 40])
    drawn = np.where(rng.random(own.shape) < 0.3, own, common)

    def ask_all(shares):
        scores = np.float32(drawn < np.reshape(shares, [3, 1]))
        found = [on_cases(name, part) for part in np.split(scores, runs // 25)]
        return [np.concatenate(x)[:, 0] for x in zip(*found, strict=True)]

    # No gain, and one of 0.3. Ties make the approximate ones a little bold.
    p, _ = ask_all([0.7, 0.7, 0.7])
    _, lower = ask_all([0.7, 0.7, 0.4])
    slack = 1.0 if name in ("mcnemar", "betting") else 1.3
    for alpha in (0.01, 0.05, 0.2):
        assert (p <= alpha).mean() <= slack * alpha + 3 * np.sqrt(alpha / runs)
    slack = 1.0 if name == "betting" else 1.3
    assert (lower > 0.3).mean() <= slack * ALPHA + 3 * np.sqrt(ALPHA / runs)


@each
@pytest.mark.parametrize(("reference", "alpha"), [(2, 0.05), (0, 0.2)])
def test_examples_not_looked_at_do_not_count(name, reference, alpha):
    # One case against many at once, with traced reference and level besides.
    scores = coins(seed=5)
    looked_at = np.arange(60) % 3 != 1
    masked = np.empty([3, 60], np.float32)
    masked[:, looked_at] = scores[7]
    masked[:, ~looked_at] = np.float32([[np.nan], [1e9], [-np.inf]])
    found = ask(name, masked, seen=looked_at, reference=reference, alpha=alpha)
    alone = on_cases(name, scores, reference, alpha)
    for one, other in zip(found, alone, strict=True):
        assert one.shape == (3,) and one.dtype == other.dtype == np.float32
        np.testing.assert_allclose(one, other[7], rtol=1e-4, atol=1e-6)


# Bad input.

SIXTY = np.arange(60)


@each
def test_one_example_and_none_prove_nothing(name):
    scores = np.zeros([3, 60], np.float32)
    scores[0] = 1
    for examples in (1, 0):
        p, lower = ask(name, scores, seen=SIXTY < examples)
        assert (p >= 0.4999).all() and (p <= 1).all()
        assert (lower < 0).all()
        if name != "betting":
            np.testing.assert_array_equal(lower, -np.inf)
        elif examples == 0:
            assert (lower <= -1).all()


@pytest.mark.parametrize("name", ["paired_t", "standard"])
def test_a_single_example_without_a_mask(name):
    found = gather(np.float32([[1], [0]]), binary=name in COUNTED)
    assert BOUNDS[name].p_value(found, "score", 1)[0] >= 0.4999
    assert BOUNDS[name].lower(found, "score", 1, ALPHA)[0] == -np.inf


@each
@pytest.mark.parametrize("examples", [2, 3, 9])
def test_equal_differences_are_no_certainty(name, examples):
    scores = np.zeros([3, 60], np.float32)
    scores[0] = 1
    found = ask(name, scores, seen=SIXTY < examples, alpha=0.4 * 0.5**examples)
    p, lower = (one[0] for one in found)
    least = 0.5**examples
    assert least * (1 - 1e-5) <= p <= 1
    assert lower <= 0
    if name != "betting":
        assert lower == -np.inf
        np.testing.assert_allclose(p, least, rtol=1e-4)


@each
def test_ties_prove_nothing(name):
    for value, reference in ((1.0, 2), (0.1, 0)):
        scores = np.full([3, 60], value, np.float32)
        if name in COUNTED:
            scores = np.ceil(scores)
        p, lower = ask(name, scores, reference=reference)
        assert (p >= 0.5).all() and (lower <= 0).all()


@each
def test_nan_of_one_candidate_harms_no_other(name):
    scores = coins(cases=1, examples=60, seed=7)[0]
    bad = scores.copy()
    bad[0, 3] = np.nan
    found, clean = ask(name, bad), ask(name, scores)
    for one, other, nothing in zip(found, clean, (1, -np.inf), strict=True):
        np.testing.assert_array_equal(one[1:], other[1:])
        assert one[0] == nothing


@each
def test_nothing_is_proven_of_or_by_what_is_not_valid(name):
    scores = coins(cases=1, examples=60, seed=8)[0]
    scores[0] = 1
    p, lower = ask(name, scores, finite=[True, True, False])
    np.testing.assert_array_equal(p, 1)
    np.testing.assert_array_equal(lower, -np.inf)
    p, lower = ask(name, scores, finite=[False, True, True])
    assert p[0] == 1 and lower[0] == -np.inf
    assert not np.isnan(np.concatenate([p, lower])).any()


def test_scores_too_large_to_be_added_up_are_not_valid():
    scores = np.zeros([3, 60], np.float32)
    scores[0] = np.linspace(1e30, 2e30, 60)
    for value in (3e38, -3e38, 1e37):
        scores[1] = value
        p, lower = ask("paired_t", scores)
        assert p[1] == 1 and lower[1] == -np.inf
        assert p[0] < 1e-8 and 1.2e30 < lower[0] < 1.5e30


def test_scores_too_large_to_be_added_up_over_devices():
    def valid(values):
        flags = jnp.ones([2], bool), jnp.zeros([2], bool)
        return evidence.gather({"score": values}, *flags, axis_name="i").valid

    scores = np.full([4, 2, 8], 1e37, np.float32)
    scores[:, 1] = 1e36
    found = jax.vmap(valid, axis_name="i")(scores)
    np.testing.assert_array_equal(found, [[False, True]] * 4)


def test_spread_of_large_figures():
    noise = np.random.default_rng(0).normal([[2], [1]], 0.1, [2, 50])
    figures = evidence.Resampled(np.float32([2e30, 1e30]), np.float32(noise * 1e30))
    found = gather(figures)
    np.testing.assert_allclose(
        evidence.estimate(found, "score").stderr,
        figures.resamples.astype(np.float64).std(axis=1, ddof=1),
        rtol=1e-3,
    )
    z = 1e30 / np.diff(noise * 1e30, axis=0).std(ddof=1)
    compared = evidence.compare(found, "score", 1)
    assert compared.z[0] == pytest.approx(min(z, stats.norm.isf(0.5**50)), rel=1e-3)


def test_scores_outside_the_range_prove_nothing():
    scores = bounded(cases=1, examples=60)[0]
    scores[:2] = 1
    scores[0, 7] = 1.01
    p, lower = ask("betting", scores)
    assert p[0] == 1 and lower[0] == -np.inf
    assert p[1] < 1 and np.isfinite(lower[1:]).all()
    # Where nobody looked it does no harm.
    p, lower = ask("betting", scores, seen=SIXTY % 7 > 0)
    assert p[0] < 1 and np.isfinite(lower).all()
    scores[2, 0] = -0.01  # The reference.
    p, lower = ask("betting", scores)
    np.testing.assert_array_equal(p, 1)
    np.testing.assert_array_equal(lower, -np.inf)


def test_scores_at_the_end_of_the_range_may_be_rounded():
    scores = bounded(cases=1, examples=60)[0]
    scores[:2] = 1
    scores[0, 7] += np.float32(2e-7)
    p, lower = ask("betting", scores)
    assert p[0] == pytest.approx(p[1], rel=1e-4)
    assert lower[0] == pytest.approx(lower[1], rel=1e-4)


def test_mcnemar_needs_boolean_scores():
    with pytest.raises(TypeError, match=r"boolean.*'score' are real.*paired_t"):
        BOUNDS["mcnemar"].p_value(gather(bounded(cases=1)[0]), "score", 2)


def test_figures_are_not_examples():
    figures = gather(np.float32([0.5, 0.25]))
    bound = BOUNDS["betting"]
    match = "needs a score for each example.*'score' is a single value"
    with pytest.raises(ValueError, match=match):
        bound.p_value(figures, "score", 1)
    with pytest.raises(ValueError, match=match):
        bound.lower(figures, "score", 1, ALPHA)
    with pytest.raises(ValueError, match=match):
        public.differences(figures, "score", 1)


@pytest.mark.parametrize("limits", [(1, 0), (0.5, 0.5), (0, float("nan"))])
def test_range_must_not_be_empty(limits):
    with pytest.raises(ValueError, match="betting needs low < high, got"):
        public.betting(*limits)


# Figures of all examples together.


@pytest.mark.parametrize("name", ["paired_t", "standard"])
def test_figures_with_resamples(name):
    rng = np.random.default_rng(9)
    common = rng.normal(size=[1, 400])
    resamples = np.float32(common + rng.normal([[0.3], [0.0], [0.0]], 0.2, [3, 400]))
    figures = evidence.Resampled(np.float32([0.3, 0.05, 0]), resamples)
    found = gather(figures)
    p = BOUNDS[name].p_value(found, "score", 2)
    lower = BOUNDS[name].lower(found, "score", 2, ALPHA)
    spread = (resamples - resamples[2]).astype(np.float64).std(axis=1, ddof=1)[:2]
    gain = np.array([0.3, 0.05])
    np.testing.assert_allclose(p[:2], stats.norm.sf(gain / spread), rtol=1e-3)
    np.testing.assert_allclose(
        lower[:2], gain - stats.norm.isf(ALPHA) * spread, atol=1e-4
    )
    # A few resamples are a few coins.
    few = gather(evidence.Resampled(figures.value, resamples[:, :3] * 1e-3))
    assert BOUNDS[name].p_value(few, "score", 2)[0] == pytest.approx(1 / 8)
    assert BOUNDS[name].lower(few, "score", 2, ALPHA)[0] == -np.inf


def test_exact_figures():
    found = gather(np.float32([2, 1, np.nan, 1]))
    for name in ("paired_t", "standard"):
        p = BOUNDS[name].p_value(found, "score", 3)
        np.testing.assert_allclose(p, [0, 0.5, 1, 0.5], atol=1e-20)
        lower = BOUNDS[name].lower(found, "score", 3, ALPHA)
        np.testing.assert_allclose(lower, [1, 0, -np.inf, 0])
    tested = jnp.array([True, True, True, False])
    p = public.max_t(found, "score", 3, tested)
    np.testing.assert_allclose(p, [0, 0.5, 1, 1], atol=1e-20)


def test_standard_is_mcnemar_for_boolean_scores_and_else_paired_t():
    scores = coins(cases=1, seed=11)[0]
    for binary, name in ((True, "mcnemar"), (False, "paired_t")):
        found = gather(scores, binary=binary)
        pairs = [
            BOUNDS[one].p_value(found, "score", 2)[:2] for one in ("standard", name)
        ]
        np.testing.assert_array_equal(*pairs)
    exact = BOUNDS["mcnemar"].p_value(gather(scores, binary=True), "score", 2)[:2]
    assert not np.allclose(pairs[0], exact)


# Many candidates, many rounds.


def bonferroni_by_hand(p, tested):
    return [min(1, x * sum(tested)) if t else 1 for x, t in zip(p, tested, strict=True)]


def test_bonferroni_by_hand():
    rng = np.random.default_rng(12)
    p = np.float32(rng.random([60, 6]) ** 4)
    p[:5, 1:3] = p[:5, :1]  # Ties.
    p[5, :2] = 0, 1
    tested = rng.random([60, 6]) < 0.7
    tested[10], tested[11], tested[12] = True, False, np.arange(6) == 2
    found = np.asarray(jax.jit(jax.vmap(public.bonferroni))(p, tested))
    expected = [
        bonferroni_by_hand(*row) for row in zip(p.tolist(), tested, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found >= p).all() and (found <= 1).all()
    for row, mask, original in zip(found, tested, p, strict=True):
        order = np.argsort(original[mask], kind="stable")
        assert (np.diff(row[mask][order]) >= 0).all()


def many(independent, cases=12, candidates=8, examples=300):
    """A few better than a reference that scores zero, independent or all the same."""
    rng = np.random.default_rng(13)
    own = candidates if independent else 1
    noise = rng.normal(size=[cases, own, examples])
    scores = np.zeros([cases, candidates + 1, examples])
    scores[:, :-1] = noise + rng.uniform(0.05, 0.2, [cases, own, 1])
    return np.float32(scores)


def p_max_t(scores, tested, samples):
    def fn(values):
        found = gather(values)
        last = values.shape[0] - 1
        p = BOUNDS["paired_t"].p_value(found, "score", last)
        return p, public.max_t(found, "score", last, tested, samples)

    return map(np.asarray, jax.jit(jax.vmap(fn))(scores))


def test_max_t_of_independent_candidates_is_almost_bonferroni():
    tested = jnp.arange(9) < 8
    p, found = p_max_t(many(True), tested, 2000)
    p, found = p[:, :8], found[:, :8]
    sidak = 1 - (1 - p) ** 8
    assert ((sidak > 0.01) & (sidak < 0.3)).sum() > 15
    np.testing.assert_allclose(found, sidak, atol=0.06)
    below = sidak < 0.1
    np.testing.assert_allclose(found[below], sidak[below], atol=0.025)


def test_max_t_of_equal_candidates_needs_no_correction():
    tested = jnp.arange(9) < 8
    p, found = p_max_t(many(False), tested, 2000)
    np.testing.assert_allclose(found[:, :8], p[:, :8], atol=0.03)
    np.testing.assert_array_equal(found[:, 8], 1)
    assert (found[:, :8] >= p[:, :8] - 1e-6).all()


def test_max_t_of_large_scores():
    """What is left of a large mean after subtraction would be rounding."""
    tested = jnp.arange(9) < 8
    scores = many(True)
    _, found = p_max_t(scores, tested, 500)
    _, large = p_max_t(scores + np.float32(500), tested, 500)
    np.testing.assert_allclose(large, found, atol=0.01)


def test_max_t_counts_only_candidates_that_are_tested_and_valid():
    scores = many(True, cases=1)[0]
    scores[5, 3] = np.nan
    tested = jnp.array([True, True, False, False, False, True, False, False, False])
    max_t = jax.jit(public.max_t, static_argnums=1)
    found = max_t(gather(scores), "score", 8, tested)
    alone = max_t(gather(scores[[0, 1, 8]]), "score", 2, jnp.arange(3) < 2)
    np.testing.assert_allclose(found[:2], alone[:2], atol=1e-6)
    np.testing.assert_array_equal(found[2:], 1)
    no_reference = gather(scores, finite=jnp.arange(9) != 8)
    nothing = max_t(no_reference, "score", 8, tested)
    np.testing.assert_array_equal(nothing, 1)


def test_max_t_of_figures_by_their_resamples():
    rng = np.random.default_rng(14)
    noise = np.float32(rng.normal(size=[3, 999])) * np.float32([[1], [1], [0]])
    figures = np.float32([2.0, 0.5, 0])
    found = gather(evidence.Resampled(figures, noise + figures[:, None]))
    p = public.max_t(found, "score", 2, jnp.arange(3) < 2)
    sidak = 1 - (1 - stats.norm.sf(figures[:2])) ** 2
    np.testing.assert_allclose(p[:2], sidak, atol=0.04)


@pytest.mark.parametrize("correction", corrections.CORRECTIONS)
def test_corrected_chooses_the_correction(correction):
    found = gather(bounded(cases=1, candidates=4, seed=15)[0])
    tested = jnp.array([True, True, True, False])
    bound = BOUNDS["paired_t"]
    p = bound.p_value(found, "score", 3)
    expected = {
        "bonferroni": lambda: public.bonferroni(p, tested),
        "max_t": lambda: public.max_t(found, "score", 3, tested),
    }[correction]()
    actual = public.corrected(bound, correction, found, "score", 3, tested)
    np.testing.assert_array_equal(actual, expected)
    assert actual[3] == 1


def test_spending_adds_up():
    levels = np.asarray(public.spend(ALPHA, jnp.arange(1, 100_001)), np.float64)
    assert (np.diff(levels) < 0).all()
    assert levels[0] == pytest.approx(6 * ALPHA / np.pi**2, rel=1e-5)
    assert levels.sum() == pytest.approx(ALPHA, rel=1e-4)
    assert float(jax.jit(public.spend)(ALPHA, 3)) == pytest.approx(levels[2])
