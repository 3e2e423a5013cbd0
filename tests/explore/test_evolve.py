"""Explorers that evolve: against NumPy, in training, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from helpers import assert_identical, assert_same_types, says
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_ev3
from optax_ev3 import adapt, evolve, explore, log_uniform, uniform
from optax_ev3._src.explore import evolve as evolution

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 16)


def score(w):
    return -jnp.square(w * X - 3 * X)


def loss(w):
    return -score(w).mean()


def sgd(start=0.01, population=4, low=1e-4, high=1.0):
    return evolve(
        optax.sgd, {"learning_rate": log_uniform(low, high, start)}, population
    )


def run(tx, calls, w=0.0):
    w = jnp.float32(w)
    start = tx.init(w)

    def body(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    (w, state), path = jax.jit(lambda c: jax.lax.scan(body, c, length=calls))(
        (w, start)
    )
    assert_same_types(state, start)
    return w, state, path


SPACE = {"rate": log_uniform(1e-4, 1.0, 1e-2), "momentum": uniform(0.0, 0.9, 0.5)}


class TestMove:
    def group(self, places, spread=0.1, path=0.5):
        """A group at places in the ranges ``[2, G]``."""
        places = np.asarray(places, np.float32)
        values = {
            name: one.value(p)
            for (name, one), p in zip(SPACE.items(), places, strict=True)
        }
        both = {name: jnp.float32(0.4) for name in SPACE}
        return evolution.Evolution(
            values,
            both,
            jax.tree.map(lambda _: jnp.float32(spread), both),
            jax.tree.map(lambda _: jnp.float32(path), both),
        )

    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(0, 10**6),
        st.lists(st.floats(-30, 0), min_size=4, max_size=4),
        st.lists(st.booleans(), min_size=4, max_size=4),
    )
    def test_equals_numpy(self, seed, z, stays):
        places = np.random.default_rng(seed).uniform(0.1, 0.9, (2, 4))
        group = self.group(places)
        new = _moved(SPACE, group, np.float32(z), np.array(stays), seed)
        weights = np.exp(np.array(z) - max(z))
        weights /= weights.sum()
        for name, own in zip(SPACE, places, strict=True):
            center = weights @ own
            step = np.clip((center - 0.4) / 0.1, -1, 1) / 0.4
            c = 0.3 * (1 - np.mean(stays))
            path = (1 - c) * 0.5 + np.sqrt(c * (2 - c)) * step
            spread = 0.1 * np.exp(c * np.clip(path**2 - 1, -1, 1))
            assert float(new.center[name]) == pytest.approx(center, abs=1e-4)
            assert float(new.path[name]) == pytest.approx(path, abs=1e-2)
            # Half a power of 10, of the four of the range, or a quarter.
            most = {"rate": 0.5 / 4, "momentum": 0.25}[name]
            assert float(new.spread[name]) == pytest.approx(min(spread, most), rel=2e-2)
            low, high = SPACE[name].low, SPACE[name].high
            values = np.asarray(new.hyperparams[name])
            assert (np.float32(low) <= values).all() and (values <= high).all()
            kept = values == np.asarray(group.hyperparams[name])
            assert (kept >= np.array(stays)).all()

    def test_draws_are_mirrored_and_of_the_spread_that_is_said(self):
        group = self.group(np.full((2, 4), 0.5), spread=0.02, path=0.0)
        stays = np.zeros(4, bool)
        places = []
        for seed in range(200):
            new = _moved(SPACE, group, np.zeros(4, np.float32), stays, seed)
            drawn = SPACE["rate"].place(new.hyperparams["rate"])
            assert float(drawn.sum()) == pytest.approx(2.0, abs=1e-3)
            places.append(np.asarray(drawn))
        # The step of the center, 0.1, widens the spread by as much as it may.
        spread = float(new.spread["rate"])
        assert spread == pytest.approx(0.02 * np.exp(0.3), rel=1e-3)
        assert np.std(places) == pytest.approx(spread, rel=0.1)

    def test_equal_merit_does_not_move_the_center(self):
        places = 0.4 + np.array([[0.1, -0.1, 0.2, -0.2]] * 2)
        new = _moved(SPACE, self.group(places), np.zeros(4, np.float32), [0] * 4)
        for center in new.center.values():
            assert float(center) == pytest.approx(0.4, abs=1e-5)

    def test_where_nobody_is_drawn_anew_nothing_is_learnt_about_the_spread(self):
        group = self.group(np.full((2, 4), 0.6))
        new = _moved(SPACE, group, np.zeros(4, np.float32), [True] * 4)
        for name in SPACE:
            assert float(new.spread[name]) == pytest.approx(0.1)
            assert float(new.path[name]) == pytest.approx(0.5)

    def test_without_a_finite_member_all_are_drawn_further_out(self):
        group = self.group(np.full((2, 4), 0.5))
        new = _moved(SPACE, group, np.full(4, -np.inf, np.float32), [True] * 4)
        for name, values in new.hyperparams.items():
            assert (values != group.hyperparams[name]).all()
            assert float(new.spread[name]) == pytest.approx(0.1 * np.exp(0.3))
            assert new.center[name] == group.center[name]

    def test_numbers_stay_in_the_range(self):
        group = self.group([[0.0, 1.0, 0.0, 1.0]] * 2, spread=0.25)
        for seed in range(50):
            new = _moved(SPACE, group, np.zeros(4, np.float32), [False] * 4, seed)
            for name, values in new.hyperparams.items():
                one = SPACE[name]
                assert (values >= np.float32(one.low)).all()
                assert (values <= np.float32(one.high)).all()


def _moved(space, group, z, stays, seed=0):
    stays = jnp.asarray(stays, bool)
    return evolution.move(space, group, jnp.asarray(z), stays, jax.random.key(seed))


def test_begins_at_the_start_and_below_or_all_over_the_range():
    below = np.array(sgd(1.0, low=1e-6).grid["learning_rate"])
    np.testing.assert_allclose(below, 10.0 ** (-0.75 * np.arange(4)[::-1]), rtol=1e-5)
    # No room for that: down to the end of the range, or from there upwards.
    below = np.array(sgd(0.01).grid["learning_rate"])
    np.testing.assert_allclose(below, np.geomspace(1e-4, 0.01, 4), rtol=1e-5)
    above = np.array(sgd(1e-4).grid["learning_rate"])
    np.testing.assert_allclose(above, np.geomspace(1e-4, 1e-3, 4), rtol=1e-5)
    space = {"learning_rate": uniform(0.0, 1.0, 0.5)}
    around = np.array(evolve(optax.sgd, space).grid["learning_rate"])
    np.testing.assert_allclose(around, 0.5 + 0.125 * np.array([-1.5, -0.5, 0.5, 1.5]))
    over = evolve(optax.sgd, {"learning_rate": log_uniform(1e-4, 1.0)}, 4)
    expected = 1e-4 ** (1 - (np.arange(4) + 0.5) / 4)
    np.testing.assert_allclose(over.grid["learning_rate"], expected, rtol=1e-5)


def test_what_the_history_says_is_what_was_tried():
    """In each round the scores are those of steps with the rates in the history."""
    tx = optax_ev3.ev3({"sgd": sgd()}, score, adapt=adapt.greedy())
    _, state, path = run(tx, 12)
    past = optax_ev3.history(state)
    rates = past["hyperparams/sgd/learning_rate"]
    assert rates.shape == (12, 4) and len(np.unique(rates)) > 12
    before = np.concatenate([[0.0], path[:-1]])
    gradient = np.asarray([jax.grad(loss)(jnp.float32(w)) for w in before])
    ends = before[:, None] - rates * gradient[:, None]
    expected = np.asarray(jax.vmap(jax.vmap(score))(jnp.asarray(ends))).mean(-1)
    np.testing.assert_allclose(past["mean"][:, :4], expected, rtol=1e-4, atol=1e-5)
    winner = past["adopted"]
    assert (winner < 4).all()
    # The winner's rate is kept.
    rows = np.arange(11)
    np.testing.assert_array_equal(
        rates[rows + 1, winner[:-1]], rates[rows, winner[:-1]]
    )


@pytest.mark.parametrize("start", [1e-4, 1.0])
@pytest.mark.parametrize(
    "kwargs", [{}, {"explore": explore.rounds(3), "loss_fn": loss}]
)
def test_finds_a_rate_that_works(start, kwargs):
    """The loss is (w - 3)^2 times 0.38: a rate of 1.3 goes there in one step."""
    group = sgd(start, low=1e-6, high=1e3)
    tx = optax_ev3.ev3({"sgd": group}, score, **kwargs)
    w, state, _ = run(tx, 90)
    assert abs(float(w) - 3) < 0.05
    assert optax_ev3.history(state)["hyperparams/sgd/learning_rate"].max() > 0.1


def test_saved_and_restored_or_donated_it_goes_on_as_before():
    tx = optax_ev3.ev3({"sgd": sgd()}, score, explore=explore.rounds(2), loss_fn=loss)
    w, state, _ = run(tx, 5)
    saved = serialization.to_bytes(state)
    restored = serialization.from_bytes(tx.init(w), saved)
    restored = jax.tree.map(jnp.asarray, restored)
    update = jax.jit(tx.update, donate_argnums=1)
    for _ in range(4):
        grads = jax.grad(loss)(w)
        _, state = jax.jit(tx.update)(grads, state, w)
        updates, restored = update(grads, restored, w)
        w = optax.apply_updates(w, updates)
        assert_identical(state, restored)


def test_made_under_jit():
    def one(key):
        w = jnp.zeros([])
        tx = optax_ev3.ev3({"sgd": sgd()}, score, key=key)
        _, state = tx.update(jax.grad(loss)(w), tx.init(w), w)
        return state.explore.explorers["sgd"].evolution.hyperparams["learning_rate"]

    found = jax.jit(jax.vmap(one))(jnp.arange(3))
    assert found.shape == (3, 4) and len(np.unique(found)) > 4


def test_summary_has_the_median():
    _, state, _ = run(optax_ev3.ev3({"sgd": sgd()}, score), 3)
    last = optax_ev3.history(state)["hyperparams/sgd/learning_rate"][-1]
    found = optax_ev3.summary(state)["ev3/hyperparams/sgd/learning_rate"]
    assert float(found) == pytest.approx(np.median(last))


def test_comes_back_from_rates_that_overflow():
    group = sgd(1e36, low=1e-3, high=1e38)
    tx = optax_ev3.ev3({"sgd": group}, score)
    w, state, _ = run(tx, 400)
    assert float(optax_ev3.summary(state)["ev3/skipped"]) > 0
    assert abs(float(w) - 3) < 0.5


def test_branches_that_go_on_keep_their_rates():
    """Nothing is significant on one example: no branch restarts, no rate moves."""
    kwargs = {
        "explore": explore.branches(2, restart=explore.worse_than("adopted")),
        "loss_fn": loss,
    }
    tx = optax_ev3.ev3({"sgd": sgd()}, lambda w: score(w)[:1], **kwargs)
    rates = optax_ev3.history(run(tx, 12)[1])["hyperparams/sgd/learning_rate"]
    assert (rates == rates[0]).all()
    tx = optax_ev3.ev3({"sgd": sgd()}, score, **kwargs)
    rates = optax_ev3.history(run(tx, 12)[1])["hyperparams/sgd/learning_rate"]
    assert (rates != rates[0]).any()


@pytest.mark.parametrize("length", [1, 2])
def test_a_loss_may_have_hyperparameters(length):
    """Only the loss knows them; the good scale is far from the start."""

    def scaled(w, scale):
        return scale * loss(w)

    group = evolve(lambda: optax.sgd(0.1), {"scale": log_uniform(1e-3, 10.0, 1e-3)})
    one = optax_ev3.explorer(group, scaled, name="scaled")
    tx = optax_ev3.ev3([one], score, explore=explore.rounds(length))
    w, state, _ = run(tx, 60)
    assert abs(float(w) - 3) < 0.3
    past = optax_ev3.history(state)["hyperparams/scaled/scale"]
    assert np.median(past[-1]) > 0.1 > 0.01 > np.median(past[0])


def test_rule_forgets_explorers_that_are_others_now():
    rule = adapt.confident()
    memory = jax.tree.map(jnp.ones_like, rule.init(3))
    fresh = jnp.array([False, True, False])
    left = rule.forget(memory, fresh)
    np.testing.assert_array_equal(left.current.total, [1, 0, 1])
    expected = [[1, 0, 1], [0, 0, 0], [1, 0, 1]]
    np.testing.assert_array_equal(left.pairs.total, expected)
    np.testing.assert_array_equal(left.pairs.weight, expected)
    assert left.stable == memory.stable and left.noise == memory.noise
    outer = adapt.weighted({"a": 1.0, "b": 1.0})
    memory = jax.tree.map(jnp.ones_like, outer.init(3))
    np.testing.assert_array_equal(
        outer.forget(memory, fresh).inner.pairs.total, expected
    )
    assert adapt.weighted({"a": 1.0}, rule=adapt.greedy()).forget is None


def test_beside_other_explorers():
    inner = {"sweep": optax_ev3.sweep(optax.sgd, learning_rate=[1e-5, 1e-4])}
    inner |= {"adam": optax.adam(1e-3), "group": sgd(population=11)}
    tx = optax_ev3.ev3(inner, score, adapt=adapt.greedy())
    w, state, _ = run(tx, 40)
    past = optax_ev3.history(state)
    assert past["candidates"][3:5].tolist() == ["group/0", "group/1"]
    assert past["candidates"][13] == "group/10"
    assert (past["adopted"][:8] >= 3).all() and abs(float(w) - 3) < 0.1


def test_two_hyperparameters():
    space = {"learning_rate": log_uniform(1e-3, 1.0, 0.01), "momentum": uniform(0, 0.9)}
    group = evolve(optax.sgd, space)
    tx = optax_ev3.ev3({"sgd": group}, score, explore=explore.rounds(4), loss_fn=loss)
    w, state, _ = run(tx, 120)
    assert abs(float(w) - 3) < 0.1
    past = optax_ev3.history(state)
    assert past["hyperparams/sgd/momentum"].shape == (30, 4)
    assert past["hyperparams/sgd/momentum"].max() <= np.float32(0.9)


class TestSchedule:
    def trained(self, length=1, **kwargs):
        tx = optax_ev3.ev3(
            {"sgd": sgd()},
            score,
            adapt=adapt.greedy(),
            explore=explore.rounds(length),
            loss_fn=loss,
            **kwargs,
        )
        return run(tx, 4 * 3)

    @pytest.mark.parametrize("length", [1, 3])
    def test_replays_the_run(self, length):
        """All that was adopted are ends: SGD by the schedule makes the same steps."""
        w, state, _ = self.trained(length)
        assert (optax_ev3.history(state)["adopted"] < 4).all()
        tx = optax.sgd(optax_ev3.found_schedule(state, "learning_rate"))
        again, opt_state = jnp.zeros([]), tx.init(jnp.zeros([]))
        for _ in range(12):
            updates, opt_state = jax.jit(tx.update)(jax.grad(loss)(again), opt_state)
            again = optax.apply_updates(again, updates)
        assert float(again) == pytest.approx(float(w), rel=1e-5)

    def test_values(self):
        _, state, _ = self.trained(3)
        past = optax_ev3.history(state)
        schedule = optax_ev3.found_schedule(state, "learning_rate", explorer="sgd")
        rates = past["hyperparams/sgd/learning_rate"]
        for count in range(15):
            row = min(count // 3, 3)
            assert schedule(count) == rates[row, past["adopted"][row]]
        counts = jnp.arange(15)
        found = jax.jit(jax.vmap(schedule))(counts)
        np.testing.assert_array_equal(found, [schedule(c) for c in range(15)])

    def test_rounds_that_stand_still_go_on_with_the_last_rate(self):
        script = jnp.array([4, 1, 5, 2])

        def decide(evidence, memory, key):
            return adapt.Decision(script[memory], jnp.asarray(False)), memory + 1

        rule = adapt.Rule(lambda explorers: jnp.int32(0), decide)
        tx = optax_ev3.ev3({"sgd": sgd()}, score, adapt=rule)
        _, state, _ = run(tx, 4)
        rates = optax_ev3.history(state)["hyperparams/sgd/learning_rate"]
        schedule = optax_ev3.found_schedule(state, "learning_rate")
        expected = [rates[1, 1], rates[1, 1], rates[1, 1], rates[3, 2]]
        assert [float(schedule(i)) for i in range(4)] == [float(x) for x in expected]

    def test_a_group_that_never_won_has_none(self):
        inner = {"good": optax.sgd(0.1), "sgd": sgd(1e-4, high=1e-3)}
        tx = optax_ev3.ev3(inner, score, adapt=adapt.greedy())
        _, state, _ = run(tx, 4)
        with says(ValueError, "'sgd'", "adopted"):
            optax_ev3.found_schedule(state, "learning_rate")

    def test_errors(self):
        _, state, _ = self.trained()
        with says(ValueError, "'momentum'", "learning_rate"):
            optax_ev3.found_schedule(state, "momentum")
        with says(ValueError, "'learning_rate'", "[]"):
            optax_ev3.found_schedule(state, "learning_rate", explorer="adam")
        _, state, _ = self.trained(history_length=5)
        with says(ValueError, "last 5 of 12", "history_length"):
            optax_ev3.found_schedule(state, "learning_rate")
        tx = optax_ev3.ev3({"sgd": sgd()}, score)
        with says(ValueError, "no round"):
            optax_ev3.found_schedule(tx.init(jnp.zeros([])), "learning_rate")


BAD = {
    "bounds the wrong way round": (
        lambda: log_uniform(1.0, 0.1),
        (ValueError, "low", "below high", "1.0", "0.1"),
    ),
    "equal bounds": (lambda: uniform(1.0, 1.0), (ValueError, "below high")),
    "infinite bound": (lambda: uniform(0.0, float("inf")), (ValueError, "finite")),
    "no bound": (lambda: uniform(0.0, float("nan")), (ValueError, "finite")),
    "bound beyond float32": (
        lambda: uniform(-1e39, 1.0),
        (ValueError, "finite in float32", "-1e+39"),
    ),
    "bound below float32": (
        lambda: log_uniform(1e-46, 1.0),
        (ValueError, "normal float32", "1e-46"),
    ),
    "logarithm of zero": (lambda: log_uniform(0, 1), (ValueError, "above 0", "0")),
    "start elsewhere": (
        lambda: uniform(0.0, 1.0, 2.0),
        (ValueError, "start", "from 0.0 to 1.0", "2.0"),
    ),
    "bound no number": (lambda: uniform("a", 1.0), (TypeError, "low", "'a'")),
    "empty space": (lambda: evolve(optax.sgd, {}), (ValueError, "space", "none")),
    "space no mapping": (
        lambda: evolve(optax.sgd, [1]),
        (TypeError, "space must be a mapping", "[1]"),
    ),
    "no range": (
        lambda: evolve(optax.sgd, {"learning_rate": 0.1}),
        (TypeError, "space['learning_rate']", "log_uniform", "0.1"),
    ),
    "one member": (lambda: sgd(population=1), (ValueError, "population", "1")),
    "no factory": (
        lambda: evolve(optax.sgd(0.1), {"rate": uniform(0, 1)}),
        (TypeError, "factory"),
    ),
    "no optimizer": (
        lambda: evolve(lambda rate: rate, {"rate": uniform(0, 1)}),
        (TypeError, "GradientTransformation"),
    ),
    "a hyperparameter for the loss of all": (
        lambda: optax_ev3.ev3(
            {"mine": evolve(lambda: optax.sgd(0.1), {"rate": uniform(0, 1)})},
            score,
            loss_fn=lambda w, rate=0.0: loss(w),
        ),
        (ValueError, "'rate'", "'mine'", "explorer(evolve(...), loss_fn)"),
    ),
    "a hyperparameter that nobody takes": (
        lambda: optax_ev3.ev3(
            {"mine": evolve(lambda: optax.sgd(0.1), {"rate": uniform(0, 1)})}, score
        ),
        (ValueError, "'rate'", "'mine'"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, (error, *parts) = BAD[case]
    with says(error, *parts):
        make()
