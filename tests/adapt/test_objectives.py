"""Rules for several objectives: against NumPy, in training, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same_types, says
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import optax_ev3
from optax_ev3 import adapt, explore, metrics
from optax_ev3._src.base import evidence

KEY = jax.random.key(0)
COUNT = 5  # Candidates: three explorers, current, stable.
CURRENT, STABLE = 3, 4


def gather(scores, finite=None):
    scores = {k: jnp.asarray(v, jnp.float32) for k, v in scores.items()}
    finite = jnp.ones([COUNT], bool) if finite is None else jnp.asarray(finite)
    return evidence.gather(scores, finite, jnp.zeros([COUNT], bool))


@functools.cache
def _jitted(rule):
    return jax.jit(rule.decide)


def decide(rule, scores, rule_state=None, key=KEY, finite=None):
    rule_state = rule.init(COUNT - 2) if rule_state is None else rule_state
    decision, rule_state = _jitted(rule)(gather(scores, finite), rule_state, key)
    promoted = decision.adopted if decision.promoted is None else decision.promoted
    return int(decision.adopted), bool(decision.significant), int(promoted), rule_state


def choices(rule, scores, count=300, finite=None):
    """How often each candidate is adopted over ``count`` keys."""
    seen, rule_state = gather(scores, finite), rule.init(COUNT - 2)
    keys = jax.random.split(KEY, count)
    adopted = jax.jit(jax.vmap(lambda k: rule.decide(seen, rule_state, k)[0].adopted))(
        keys
    )
    return np.bincount(np.asarray(adopted), minlength=COUNT)


def draws(gains, spread=0.1, examples=100, seed=0):
    """Scores ``[C, N]`` around gains ``[C]``, with a part shared by all."""
    rng = np.random.default_rng(seed)
    own = spread * rng.normal(size=(COUNT, examples))
    return rng.normal(size=examples) + own + np.asarray(gains)[:, None]


def lower_t(scores, reference, alpha):
    """Lower bounds ``[C]`` of the gain over the reference, by SciPy's t quantile."""
    d = scores - scores[reference]
    n = d.shape[1]
    error = d.std(axis=1, ddof=1) / np.sqrt(n)
    return d.mean(1) - stats.t.ppf(1 - alpha, n - 1) * error


class TestConstrained:
    rule = adapt.constrained("main", {"other": 0.05}, rule=adapt.greedy())

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 10**6))
    def test_equals_numpy(self, seed):
        rng = np.random.default_rng(seed)
        main = draws(rng.normal(0, 0.05, COUNT), seed=seed)
        other = draws(rng.normal(0, 0.05, COUNT), seed=seed + 1)
        kept = lower_t(other, STABLE, 0.05 / (COUNT - 1)) + 0.05
        if (np.abs(kept[:STABLE]) < 1e-3).any():
            return  # Too close for float32 and the approximation to the quantile.
        allowed = np.append(kept[:STABLE] >= 0, True)
        expected = np.argmax(np.where(allowed, main.mean(1), -np.inf))
        scores = {"main": main, "other": other}
        assert decide(self.rule, scores)[0] == expected

    def test_a_better_one_that_breaks_the_constraint_is_passed_over(self):
        main = draws([9, 1, 0, 0, 0])
        other = draws([-1, 0, 0, 0, 0], spread=0.01, seed=1)
        for rule in (self.rule, adapt.constrained("main", {"other": 0.05})):
            found = decide(rule, {"main": main, "other": other})
            assert found[:3] == (1, True, 1)

    def test_back_to_stable_where_nothing_is_proven(self):
        scores = {"main": draws([9, 9, 9, 9, 0])}
        scores["other"] = draws(np.zeros(5), spread=5.0, seed=1)
        for rule in (self.rule, adapt.constrained("main", {"other": 0.05})):
            assert decide(rule, scores)[:2] == (STABLE, False)

    def test_small_losses_do_not_add_up(self):
        """Each replacement loses half of the tolerance: the third is not allowed."""
        rule_state, adopted = None, []
        for seed in range(4):
            scores = {
                "main": draws([9, 0, 0, 0, 0], seed=seed),
                "other": draws([-0.02, 0, 0, 0, 0], spread=1e-4, seed=seed + 9),
            }
            *found, rule_state = decide(self.rule, scores, rule_state)
            adopted.append(found[0])
            assert 0 <= float(rule_state.fallen["other"]) < 0.05
        assert adopted[:2] == [0, 0] and 0 not in adopted[2:]
        # What rises again may fall again.
        rise = {"main": draws([9, 0, 0, 0, 0]), "other": draws([1, 0, 0, 0, 0])}
        *found, rule_state = decide(self.rule, rise, rule_state)
        assert found == [0, True, 0] and float(rule_state.fallen["other"]) == 0

    def test_equal_candidates_seldom_break_a_tight_constraint(self):
        """Worse by the tolerance: adopted in 5% of the rounds at most."""
        rng = np.random.default_rng(3)
        gains = np.array([-0.05, -0.05, -0.05, 0, 0])[:, None]
        other = rng.normal(0, 0.3, (2000, COUNT, 100)) + gains
        main = np.broadcast_to(np.array([9.0, 8, 7, 0, 0])[:, None], (COUNT, 100))

        def one(other, key):
            seen = gather({"main": main, "other": other})
            rule_state = self.rule.init(COUNT - 2)
            return self.rule.decide(seen, rule_state, key)[0].adopted

        keys = jax.random.split(KEY, 2000)
        adopted = jax.jit(jax.vmap(one))(jnp.float32(other), keys)
        share = float((adopted < CURRENT).mean())
        assert 0.02 < share < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)

    def test_stable_ones_that_are_not_finite_have_nothing_to_lose(self):
        scores = {
            k: draws([1, 0, 0, 0, 0], seed=i) for i, k in enumerate(["main", "other"])
        }
        finite = [True, True, True, False, False]
        assert decide(self.rule, scores, finite=finite)[0] == 0

    def test_figures(self):
        scores = {"main": [1.0, 3, 2, 0, 0], "other": [0.0, -0.06, -0.04, 0, 0]}
        assert decide(self.rule, scores)[:2] == (2, True)


class TestWeighted:
    def test_is_the_rule_of_the_sum(self):
        for seed in range(5):
            a, b = (draws(np.zeros(5), seed=s) for s in (seed, seed + 50))
            rule = adapt.weighted({"a": 1.0, "b": 3.0}, rule=adapt.greedy())
            found = decide(rule, {"a": a, "b": b})
            assert found[0] == np.argmax(a.mean(1) + 3 * b.mean(1))

    def test_figures_beside_examples(self):
        rule = adapt.weighted({"a": 1.0, "b": 1.0}, rule=adapt.greedy())
        scores = {"a": draws([0, 0, 0.5, 0, 0]), "b": [2.0, 0, 0, 0, 0]}
        assert decide(rule, scores)[:2] == (0, True)

    def test_fixed_weights_stay(self):
        rule = adapt.weighted({"a": 1.0, "b": 3.0})
        rule_state = None
        for seed in range(3):
            scores = {k: draws(np.zeros(5), seed=seed) for k in "ab"}
            rule_state = decide(rule, scores, rule_state)[3]
        assert {k: float(v) for k, v in rule_state.weights.items()} == {"a": 1, "b": 3}

    def test_weights_move_to_what_is_far_from_its_target(self):
        rule = adapt.weighted(
            {"a": 1.0, "b": 1.0}, targets={"a": 1.0, "b": 1.0}, rate=0.5
        )
        rule_state, expected = None, 1.0
        for score in (0.0, 0.75, 0.75):
            scores = {"a": np.full(5, score), "b": np.zeros(5)}
            rule_state = decide(rule, scores, rule_state)[3]
            left = 1 - score
            expected += 0.5 * (2 * left / (left + 1) - expected)
            assert float(rule_state.weights["a"]) == pytest.approx(expected, rel=1e-5)
            assert float(sum(rule_state.weights.values())) == pytest.approx(2)
        # One that is reached keeps a twentieth.
        for _ in range(30):
            scores = {"a": np.full(5, 2.0), "b": np.zeros(5)}
            rule_state = decide(rule, scores, rule_state)[3]
        assert float(rule_state.weights["a"]) == pytest.approx(
            2 * 0.05 / 1.05, rel=1e-3
        )

    def test_the_higher_weight_decides(self):
        a, b = np.float32([1, 0, 0, 0, 0]), np.float32([0, 1, 0, 0, 0])
        for weight, adopted in {0.5: 0, 2.0: 1}.items():
            rule = adapt.weighted({"a": 1.0, "b": weight}, rule=adapt.greedy())
            assert decide(rule, {"a": a, "b": b})[0] == adopted


# In training.

RULES = {
    "constrained": adapt.constrained("fit", {"small": 0.5}),
    "weighted": adapt.weighted(
        {"fit": 1.0, "small": 0.1}, targets={"fit": 0.0, "small": 0.0}
    ),
}
X = jnp.linspace(-1.0, 1.0, 32)


def assess(w):
    return {"fit": -jnp.square(w * X - 3 * X), "small": -0.01 * jnp.abs(w) + 0 * X}


def loss(w):
    return -assess(w)["fit"].mean()


def make(rule, **kwargs):
    inner = {"slow": optax.sgd(0.1), "fast": optax.sgd(1.0), "back": optax.sgd(-0.1)}
    return optax_ev3.ev3(inner, assess, adapt=rule, **kwargs)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_trains(name, length):
    kwargs = {}
    if length > 1:
        restart = explore.worse_than("adopted")
        strategy = explore.branches(length, restart=restart)
        kwargs = {"loss_fn": loss, "explore": strategy}
    tx = make(RULES[name], **kwargs)
    w = jnp.zeros([])
    start = tx.init(w)

    def body(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    w, state = jax.jit(lambda c: jax.lax.scan(body, c, length=30)[0])((w, start))
    assert_same_types(state, start)
    assert abs(float(w) - 3) < 0.5
    past, last = optax_ev3.history(state), optax_ev3.summary(state)
    assert past["mean/small"].shape == past["mean"].shape == (30 // length, 5)
    assert float(last["ev3/objective/small/stable"]) == past["mean/small"][-1, -1]


def test_the_record_holds_the_means_of_every_objective():
    tx = make(adapt.weighted({"fit": 1.0, "small": 1.0}))
    w = jnp.array(1.0)
    _, state = jax.jit(tx.update)(jnp.array(-1.0), tx.init(w), w)
    past = optax_ev3.history(state)
    candidates = [1.1, 2.0, 0.9, 1.0, 1.0]
    for name, key in {"fit": "", "small": "/small"}.items():
        rows = np.stack([assess(c)[name] for c in candidates])
        np.testing.assert_allclose(past["mean" + key][0], rows.mean(1), rtol=1e-5)
        error = rows.std(1, ddof=1) / np.sqrt(32)
        np.testing.assert_allclose(past["stderr" + key][0], error, rtol=1e-4, atol=1e-8)


def test_the_history_holds_priorities():
    """The weights that a round was decided by, in the order in which they are named."""
    rule = adapt.weighted(
        {"small": 1.0, "fit": 3.0}, targets={"small": 1.0, "fit": 0.0}, rate=0.5
    )
    tx = make(rule)
    w = jnp.zeros([])
    state, weights = tx.init(w), []
    update = jax.jit(tx.update)
    for _ in range(5):
        weights.append([float(state.rule_state.weights[k]) for k in ("small", "fit")])
        updates, state = update(jax.grad(loss)(w), state, w)
        w = optax.apply_updates(w, updates)
    past = optax_ev3.history(state)
    assert past["objectives"].tolist() == ["small", "fit"]
    np.testing.assert_allclose(past["priorities"], weights, rtol=1e-6)
    # In the first round all of the way is left to all targets.
    assert len(np.unique(past["priorities"][:, 0])) == 4
    tx = make(RULES["constrained"])
    _, state = jax.jit(tx.update)(w, tx.init(w), w)
    assert np.isnan(optax_ev3.history(state)["priorities"]).all()


def test_priorities_of_another_number_than_objectives():
    def decide(evidence, rule_state, key):
        one = jnp.ones([1])
        return adapt.Decision(jnp.int32(0), jnp.asarray(False), None, one), rule_state

    tx = make(adapt.Rule(lambda explorers: (), decide, ("fit", "small")))
    w = jnp.zeros([])
    with says(ValueError, "priority", "['fit', 'small']", "(1,)"):
        tx.update(w, tx.init(w), w)


# Bad input.

BAD = {
    "no tolerance": (lambda: adapt.constrained("a", {}), (ValueError, "tolerances")),
    "tolerance of the main one": (
        lambda: adapt.constrained("a", {"a": 0.1}),
        (ValueError, "'a'", "maximized"),
    ),
    "negative tolerance": (
        lambda: adapt.constrained("b", {"a": -0.1}),
        (ValueError, "tolerances['a']", "-0.1"),
    ),
    "tolerance no number": (
        lambda: adapt.constrained("b", {"a": "much"}),
        (TypeError, "tolerances['a']", "'much'"),
    ),
    "tolerances no mapping": (
        lambda: adapt.constrained("b", 0.1),
        (TypeError, "tolerances must be a mapping", "0.1"),
    ),
    "an objective named by a number": (
        lambda: adapt.constrained(1, {"a": 0.1}),
        (TypeError, "maximize", "1"),
    ),
    "weights all zero": (
        lambda: adapt.weighted({"a": 0.0, "b": 0}),
        (ValueError, "all be zero", "'b': 0"),
    ),
    "negative weight": (
        lambda: adapt.weighted({"a": -1.0}),
        (ValueError, "weights['a']", "-1.0"),
    ),
    "rate": (
        lambda: adapt.weighted({"a": 1.0}, targets={"a": 1.0}, rate=2.0),
        (ValueError, "rate", "2.0"),
    ),
    "no rate": (
        lambda: adapt.weighted({"a": 1.0}, targets={"a": 1.0}, rate=0.0),
        (ValueError, "rate must be above 0", "0.0"),
    ),
    "a rate without targets": (
        lambda: adapt.weighted({"a": 1.0}, rate=0.1),
        (ValueError, "rate needs targets"),
    ),
    "targets of others": (
        lambda: adapt.weighted({"a": 1.0}, targets={"b": 1.0}, rate=0.1),
        (ValueError, "targets", "['a']", "['b']"),
    ),
    "a target that is not finite": (
        lambda: adapt.weighted({"a": 1.0}, targets={"a": np.inf}, rate=0.1),
        (ValueError, "targets['a']", "inf"),
    ),
    "a target that is no number": (
        lambda: adapt.weighted({"a": 1.0}, targets={"a": "x"}, rate=0.1),
        (TypeError, "targets['a']", "'x'"),
    ),
    "targets no mapping": (
        lambda: adapt.weighted({"a": 1.0}, targets=[1.0], rate=0.1),
        (TypeError, "targets must be a mapping", "[1.0]"),
    ),
    "rate no number": (
        lambda: adapt.weighted({"a": 1.0}, rate="x"),
        (TypeError, "rate", "'x'"),
    ),
    "confidence": (
        lambda: adapt.constrained("b", {"a": 0.0}, confidence=0.1),
        (ValueError, "confidence", "0.1"),
    ),
    "rule of several": (
        lambda: adapt.constrained("b", {"c": 1.0}, rule=adapt.weighted({"a": 1.0})),
        (ValueError, "single objective", "['a']"),
    ),
    "no rule": (
        lambda: adapt.weighted({"a": 1.0}, rule=3),
        (TypeError, "rule must be a rule", "3"),
    ),
    "no bound": (
        lambda: adapt.constrained("b", {"a": 0.0}, bound="t"),
        (TypeError, "bound", "'t'"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    make, (error, *parts) = BAD[case]
    with says(error, *parts):
        make()


@pytest.mark.parametrize("name", RULES)
def test_objectives_that_are_not_those_of_the_rule(name):
    for scores in ({"fit": X}, {"fit": X, "small": X, "more": X}, X):
        tx = optax_ev3.ev3([optax.sgd(0.1)], lambda w, s=scores: s, adapt=RULES[name])
        w = jnp.zeros([])
        with says(ValueError, "takes the objectives", "'small'"):
            tx.update(w, tx.init(w), w)


def test_weighted_sums_of_resampled_figures():
    def mixed(w):
        area = metrics.AggregateMetric(metrics.roc_auc, (w * X, X > 0), 8)
        return {"area": area, "fit": assess(w)["fit"]}

    rule = adapt.weighted({"area": 1.0, "fit": 1.0})
    w = jnp.zeros([])
    tx = optax_ev3.ev3([optax.sgd(0.1)], mixed, adapt=rule)
    with says(ValueError, "resamples", "['area']", "['fit']", "samples=0"):
        tx.update(w, tx.init(w), w)

    def both(w):
        return {**mixed(w), "fit": assess(w)["fit"].mean()}

    tx = optax_ev3.ev3([optax.sgd(0.1)], both, adapt=rule)
    updates, _ = jax.jit(tx.update)(w - 1, tx.init(w), w)
    assert float(updates) == pytest.approx(0.1)
