"""Credit, racing, and when training gets nowhere: against Python, and in training."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_identical, says
from scipy import stats

import optax_ev3
from optax_ev3 import adapt, explore
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.explore import racing

X = jnp.linspace(-1.0, 1.0, 16)


def score(w):
    return -jnp.square(w * X - 3 * X)


def scripted(script, significant=None):
    """A rule that adopts what the script says."""
    script = jnp.asarray(script)
    significant = jnp.zeros(script.shape, bool) if significant is None else significant

    def decide(evidence, memory, key):
        flag = jnp.asarray(significant)[memory]
        return adapt.Decision(script[memory], flag), memory + 1

    return adapt.Rule(lambda explorers: jnp.int32(0), decide)


def run(tx, calls, w=0.0, seed=0, **extra):
    """The states after every call."""
    w = jnp.float32(w)
    state, update = tx.init(w), jax.jit(tx.update)
    states = []
    for _ in range(calls):
        grads = jax.grad(lambda w: -score(w).mean())(w)
        updates, state = update(grads, state, w, **extra)
        w = optax.apply_updates(w, updates)
        states.append(state)
    return states


def run_down(tx, calls):
    """The states after every call, for a score that is the parameter itself."""
    w = jnp.zeros([])
    state, update = tx.init(w), jax.jit(tx.update)
    states = []
    for _ in range(calls):
        updates, state = update(-jnp.ones([]), state, w)
        w = optax.apply_updates(w, updates)
        states.append(state)
    return states


THREE = {"a": optax.sgd(0.1), "b": optax.sgd(-0.1), "nan": optax.sgd(jnp.nan)}


class TestCredit:
    @staticmethod
    @functools.cache
    def past():
        return optax_ev3.history(run(optax_ev3.ev3(THREE, score), 8)[-1])

    @pytest.mark.parametrize("length", [3, 64])
    def test_equals_python(self, length):
        tx = optax_ev3.ev3(THREE, score, history_length=length)
        state = run(tx, 8)[-1]
        past = self.past()
        totals, weights = collections.Counter(), collections.Counter()
        for age, mean in enumerate(past["mean"][::-1, :3]):
            ahead = (mean - np.nanmean(mean)) / np.nanstd(mean)
            for name, value in zip(THREE, ahead, strict=True):
                value = -3 if np.isnan(value) else value
                totals[name] += 0.9**age * value
                weights[name] += 0.9**age
        found = optax_ev3.credit(state)
        assert set(found) == set(THREE)
        for name, value in found.items():
            assert float(value) == pytest.approx(totals[name] / weights[name], abs=1e-3)

    def test_nothing_is_known_at_the_start(self):
        tx = optax_ev3.ev3(THREE, score)
        found = optax_ev3.credit(tx.init(jnp.zeros([])))
        assert {float(value) for value in found.values()} == {0.0}

    def test_ties_within_rounding_say_nothing(self):
        tx = optax_ev3.ev3(
            [optax.sgd(0.0), optax.sgd(1e-8)], lambda w: -(1.0 + w), key=1
        )
        state = tx.init(jnp.ones([]))
        for _ in range(3):
            _, state = tx.update(jnp.float32(20.0), state, jnp.ones([]))
        values = [float(x) for x in optax_ev3.credit(state).values()]
        assert values[0] != values[1]  # They do differ.
        np.testing.assert_allclose(values, 0, atol=1e-6)

    def test_huge_scores(self):
        tx = optax_ev3.ev3(THREE, lambda w: 1e30 * score(w))
        found = optax_ev3.credit(run(tx, 3)[-1])
        assert float(found["a"]) == pytest.approx(1.0, rel=1e-3)

    def test_members_of_a_group_share_theirs(self):
        space = {"learning_rate": optax_ev3.log_uniform(1e-3, 1.0)}
        group = optax_ev3.evolve(optax.sgd, space, 11)
        tx = optax_ev3.ev3({"a": optax.sgd(-0.1), "group": group}, score)
        found = optax_ev3.credit(run(tx, 3)[-1])
        assert len({float(found[f"group/{i}"]) for i in range(11)}) == 1
        assert found["a"] < 0 < found["group/10"]

    @pytest.mark.parametrize("rule", [adapt.greedy(), adapt.choose_and_confirm()])
    def test_ties_go_to_credit(self, rule):
        """A metric that tells apart in the first rounds, and then says nothing."""

        def assess(w, blind):
            return jnp.where(blind, 0.0, score(w))

        inner = {"worse": optax.sgd(0.01), "better": optax.sgd(0.1)}
        tx = optax_ev3.ev3(inner, assess, adapt=rule)
        for worse_first in (False, True):
            names = list(inner)[:: 1 if worse_first else -1]
            tx = optax_ev3.ev3({k: inner[k] for k in names}, assess, adapt=rule)
            w = jnp.zeros([])
            state, update = tx.init(w), jax.jit(tx.update)
            for call in range(8):
                grads = jax.grad(lambda w: -score(w).mean())(w)
                updates, state = update(grads, state, w, blind=call >= 3)
                w = optax.apply_updates(w, updates)
            past = optax_ev3.history(state)
            chosen = past["candidates"][past["adopted"]]
            assert chosen.tolist() == ["better"] * 8

    def test_rules_of_ones_own_read_the_past(self):
        """The explorer that was adopted least often in the history."""

        def decide(evidence, memory, key):
            past = evidence.past
            known = jnp.arange(past.adopted.shape[0]) < past.rounds
            counts = jnp.stack([((past.adopted == i) & known).sum() for i in range(2)])
            adopted = jnp.argmin(counts).astype(jnp.int32)
            return adapt.Decision(adopted, jnp.asarray(False)), memory

        rule = adapt.Rule(lambda explorers: (), decide)
        inner = [optax.sgd(0.1), optax.sgd(0.2)]
        tx = optax_ev3.ev3(inner, score, adapt=rule)
        past = optax_ev3.history(run(tx, 7)[-1])
        assert past["adopted"].tolist() == [0, 1, 0, 1, 0, 1, 0]


class TestRace:
    @pytest.mark.parametrize("errors", [0.0, 0.3])
    def test_who_rests_where_branches_go_on_apart(self, errors):
        """Against the definition, for scores by lot."""
        rng = np.random.default_rng(5)
        rested, kinds = set(), collections.Counter()

        members = {name: [name] for name in "abc"}
        layout = Layout(members, dict.fromkeys(members, True))

        @jax.jit
        def resting(past):
            paused = racing.paused(past, layout, explore.Racing(2, 6))
            return jnp.stack(list(paused.values()))

        for _ in range(1000):
            kept, rounds = 6, int(rng.integers(1, 50))
            mean = np.cumsum(rng.normal(0.3, 1, [kept, 5]), axis=0)
            valid = rng.choice([-1, 0, 1], [kept, 5], p=[0.2, 0.1, 0.7])
            valid[:, 0] = valid[:, 3:] = 1  # One of the explorers always takes part.
            valid[:, 2] = np.where(rng.random(kept) < 0.8, -1, valid[:, 2])
            adopted = rng.integers(0, 5, kept)
            adoptions = rng.integers(0, 9, 5)  # Over all rounds.
            past = racing.init(kept, 5)._replace(
                rounds=jnp.int32(rounds),
                mean=jnp.asarray(mean, jnp.float32),
                stderr=jnp.full([kept, 5], errors),
                valid=jnp.asarray(valid),
                adopted=jnp.asarray(adopted),
                adoptions=jnp.asarray(adoptions, jnp.int32),
            )
            found = resting(past)
            expected = []
            last = range(max(rounds - kept, 0), rounds)
            for one in range(3):
                rows = [n % kept for n in last if valid[n % kept, one] >= 0]
                if one in adopted[: min(rounds, kept)]:
                    expected.append(False)
                    continue
                rests = (rounds - 1) % kept not in rows
                seldom = adoptions[one] / rounds < 1 / kept
                if rests and seldom and rounds // kept not in (0, 1, 2, 4, 8):
                    kinds["waits"] += 1
                    expected.append(True)
                    continue
                if not rows:
                    expected.append(False)
                    continue
                if len(rows) == 1 or valid[rows[-1], one] == 0:
                    lost = valid[rows[-1], one] == 0
                    back = rows[0] != last[0] % kept
                    expected.append(lost or back)
                    kinds["lost" if lost else "back"] += expected[-1]
                    continue
                scores = np.where(valid > 0, mean, -np.inf)[:, :3]
                ends = [(scores[n, one], scores[n].max()) for n in (rows[0], rows[-1])]
                (before, best), (now, new_best) = ends
                falls = before - now > 2 * errors * 2**0.5
                gains = new_best - now <= (best - before) / 2
                enough = 4 if rounds < kept else 2
                expected.append(falls or (len(rows) >= enough and not gains))
                kinds[falls, gains] += 1
                kinds["young"] += 2 <= len(rows) < enough and not (falls or gains)
            expected = [False] * 3 if all(expected) else expected
            assert found.tolist() == expected
            rested.add(tuple(expected))
        assert len(rested) > 4 and len(kinds) == 8 and min(kinds.values()) > 4

    def test_who_rests_comes_back_from_the_adopted_parameters(self):
        """Branches of constant speed: the slow one is found where the fast one was."""
        tx = optax_ev3.ev3(
            {"fast": optax.sgd(0.1), "slow": optax.sgd(0.01)},
            lambda w: w + 0 * X,
            loss_fn=lambda w: -w,
            explore=explore.branches(
                2,
                racing=explore.Racing(2, 8),
                averages=[explore.trajectory_average(), explore.branch_average()],
            ),
            adapt=adapt.greedy(),
        )
        mean = optax_ev3.history(run_down(tx, 26)[-1])["mean"][-8:]
        took = ~np.isnan(mean[:, 1])
        # The last eight of thirteen rounds: one near the end, after more of rest.
        np.testing.assert_array_equal(took, [False] * 6 + [True, False])
        start = mean[5, 0]  # The fast one's, when the other came back.
        np.testing.assert_allclose(mean[6, 1], start + 0.02, 1e-5)
        # Its averages, of the round and of the branch, begin there as well.
        np.testing.assert_allclose(mean[6, [3, 5]], start + 0.015, 1e-5)

    @pytest.mark.parametrize("length", [1, 2])
    def test_its_cost_goes_away(self, length):
        """Losses and assessments are counted as they are run."""
        runs = collections.Counter()

        def loss(name):
            def fn(w):
                jax.debug.callback(lambda _: runs.update([name]), w)
                return -score(w).mean()

            return fn

        def assess(w):
            jax.debug.callback(lambda _: runs.update(["assess"]), w)
            return score(w)

        inner = [
            optax_ev3.explorer(optax.sgd(0.1), loss("good"), name="good"),
            optax_ev3.explorer(optax.sgd(-0.1), loss("bad"), name="bad"),
        ]
        tx = optax_ev3.ev3(
            inner,
            assess,
            adapt=adapt.greedy(),
            explore=explore.branches(length, racing=explore.Racing(2, 8)),
        )
        states = run(tx, 8 * length)
        jax.effects_barrier()
        past = optax_ev3.history(states[-1])
        # Twice as many rounds as patience, before the window is full.
        assert np.isnan(past["mean"][:, 1]).tolist() == [False] * 4 + [True] * 4
        # A loss is also offered to optimizers as a value: it runs more than once.
        assert runs["good"] >= 8 * length and runs["bad"] * 8 == runs["good"] * 4
        assert runs["assess"] == 8 * 4 - 4
        assert past["adopted"].tolist() == [0] * 8

    def test_who_was_slow_may_win_a_later_stage(self):
        """The default rule holds nothing against explorers for having rested."""

        def moves(early, late):
            def update(updates, state, params=None, *, stage):
                rate = jnp.where(stage == 0, early, late)
                return jax.tree.map(lambda u: rate + 0 * u, updates), state

            return optax.GradientTransformationExtraArgs(lambda p: (), update)

        def assess(w, noise):
            return w + noise * (1 + 0.1 * jnp.cos(w))

        inner = {"early": moves(1.0, 0.1), "late": moves(0.5, 1.0)}
        strategy = explore.branches(
            1, restart=explore.worse_than("start"), racing=explore.Racing(4, 16)
        )
        tx = optax_ev3.ev3(inner, assess, explore=strategy, key=1)
        noise = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
        stage = (np.arange(200) >= 60).astype(np.int32)

        def body(carry, given):
            w, state = carry
            down = -jnp.ones([])  # The score rises with w.
            updates, state = tx.update(down, state, w, noise=given[0], stage=given[1])
            last = state.history.adopted[(state.history.rounds - 1) % 16]
            return (w + updates, state), last

        start = jnp.zeros([]), tx.init(jnp.zeros([]))
        scan = jax.jit(lambda c, xs: jax.lax.scan(body, c, xs))
        adopted = np.asarray(scan(start, (noise, stage))[1])
        assert (adopted[:60] == 0).mean() > 0.8
        assert (adopted[-50:] == 1).mean() > 0.8

    def test_all_are_called_where_the_others_fail(self):
        def update(updates, state, params=None):
            return -0.1 * updates * jnp.where(params < 2, 1.0, jnp.nan), state

        fails = optax.GradientTransformation(lambda p: (), update)
        inner = {"fails": fails, "slow": optax.sgd(0.05)}
        tx = optax_ev3.ev3(
            inner, score, explore=explore.branches(1, racing=explore.Racing(3))
        )
        past = optax_ev3.history(run(tx, 40)[-1])
        assert (past["adopted"][-10:] == 1).all()

    @pytest.mark.parametrize("length", [1, 2])
    def test_under_shard_map(self, length):
        if not hasattr(jax, "shard_map"):
            pytest.skip("of JAX 0.7")
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("i",))
        spec = jax.sharding.PartitionSpec
        inner = {"good": optax.sgd(0.1), "bad": optax.sgd(-0.1)}
        kwargs = {
            "adapt": adapt.greedy(),
            "explore": explore.branches(length, racing=explore.Racing(2)),
        }

        def assess(w, x):
            return -jnp.square(w * x - 3 * x)

        many = optax_ev3.ev3(inner, assess, axis_name="i", **kwargs)
        one = optax_ev3.ev3(inner, assess, **kwargs)

        def step(w, state, x):
            return many.update(w - 3, state, w, x=x)

        step = jax.shard_map(
            step, mesh=mesh, in_specs=(spec(), spec(), spec("i")), out_specs=spec()
        )
        step, alone = jax.jit(step), jax.jit(one.update)
        w, state, other = (
            jnp.zeros([]),
            many.init(jnp.zeros([])),
            one.init(jnp.zeros([])),
        )
        for _ in range(6 * length):
            updates, state = step(w, state, X)
            expected, other = alone(w - 3, other, w, x=X)
            assert float(updates) == pytest.approx(float(expected), rel=1e-5)
            w = w + updates
        assert (
            np.isnan(optax_ev3.history(state)["mean"][:, 1]).tolist()
            == [False] * 4 + [True] * 2
        )

    @pytest.mark.parametrize("mode", ["unroll", "vmap", "map"])
    def test_nothing_changes_where_all_win(self, mode):
        kwargs = {"adapt": scripted([0, 1] * 6), "assess_mode": mode}
        inner = [optax.sgd(0.1), optax.adam(0.1)]
        plain, raced = (
            run(optax_ev3.ev3(inner, score, explore=one, **kwargs), 12)[-1]
            for one in (
                explore.branches(1),
                explore.branches(1, racing=explore.Racing(2)),
            )
        )
        # Another program rounds otherwise.
        raced = raced._replace(explore=raced.explore._replace(racing=()))
        assert_close(plain, raced, 1e-3, 1e-4)

    def test_averages_win_for_their_branch(self):
        tx = optax_ev3.ev3(
            [optax.sgd(0.1), optax.sgd(-0.1)],
            score,
            adapt=scripted([2] * 8),
            explore=explore.branches(
                2, averages=[explore.trajectory_average()], racing=explore.Racing(2)
            ),
        )
        mean = optax_ev3.history(run(tx, 16)[-1])["mean"]
        assert not np.isnan(mean[:, [0, 2]]).any()
        assert np.isnan(mean[4:, [1, 3]]).all()

    @pytest.mark.parametrize(
        ("race", "error", "parts"),
        [
            (3, TypeError, ["racing", "explore.Racing(patience=3)", "int"]),
            ("a", TypeError, ["racing", "explore.Racing", "'a'"]),
        ],
    )
    def test_bad_input(self, race, error, parts):
        with says(error, *parts):
            explore.branches(racing=race)

    @pytest.mark.parametrize(
        ("arguments", "error", "parts"),
        [
            ((0,), ValueError, ["patience", "1", "0"]),
            ((8,), ValueError, ["patience", "window, 8", "8"]),
            ((1, 1), ValueError, ["window", "2", "1"]),
            ((2.0,), TypeError, ["patience", "2.0"]),
            ((2, True), TypeError, ["window", "True"]),
        ],
    )
    def test_racing_is_checked(self, arguments, error, parts):
        with says(error, *parts):
            explore.Racing(*arguments)


def tied(w, batch):
    """Scores that often tie."""
    return jnp.round(-jnp.square(w - batch))


# Where the past plays a part in training.
REMEMBERING = {
    "ties": {"assess_fn": tied},
    "apart": {"explore": explore.branches(2, racing=explore.Racing(2, 6))},
    "averages": {
        "explore": explore.branches(
            2,
            racing=explore.Racing(1, 5),
            averages=[optax_ev3.explore.branch_average()],
        ),
        "assess_fn": tied,
    },
    "evolve": {
        "explore": explore.branches(
            1, restart=explore.worse_than("start"), racing=explore.Racing(3, 6)
        ),
        "inner": {
            "group": optax_ev3.evolve(
                optax.sgd, {"learning_rate": optax_ev3.log_uniform(1e-3, 1.0)}, 3
            ),
            "sgd": optax.sgd(0.05),
            "slow": optax.sgd(1e-3),
        },
        "assess_fn": tied,
    },
}


@pytest.mark.parametrize("name", REMEMBERING)
def test_training_does_not_depend_on_the_length_of_the_history(name):
    def trained(history_length):
        kwargs = {
            "inner": [optax.sgd(0.3), optax.sgd(0.01), optax.sgd(-0.1)],
            "assess_fn": lambda w, batch: -jnp.square(w - batch),
            "adapt": adapt.greedy(),
            **REMEMBERING[name],
        }
        tx = optax_ev3.ev3(
            loss_fn=lambda w, batch: jnp.square(w - batch).mean(),
            history_length=history_length,
            **kwargs,
        )

        def step(carry, batch):
            w, state = carry
            grads = 2 * (w - batch.mean())
            updates, state = tx.update(grads, state, w, batch=batch)
            return (w + updates, state), (w, state.history.adoptions)

        rng = np.random.default_rng(3)
        batches = jnp.asarray(rng.normal(2, 1, [60, 4]), jnp.float32)
        w = jnp.zeros([])
        (w, state), path = jax.lax.scan(step, (w, tx.init(w)), batches)
        return path, state._replace(history=state.history.credit), state.history

    *expected, full = jax.jit(trained, static_argnums=0)(64)
    assert name == "race" or (full.adoptions > 0).sum() > 1
    assert name == "ties" or (full.valid < 0).any()  # Some were paused.
    # Shorter than most windows, and once longer.
    *found, _ = jax.jit(trained, static_argnums=0)(8 if name == "apart" else 4)
    assert_identical(found, expected)


_stalled = jax.jit(optax_ev3.stalled, static_argnums=1)


class TestStalled:
    def states(self, scores, significant=()):
        """A state in which these scores were adopted, round by round."""
        flags = np.zeros(len(scores), bool)
        flags[list(significant)] = True

        def assess(w, value):
            return value + 0 * w

        tx = optax_ev3.ev3(
            [optax.sgd(0.0)],
            assess,
            adapt=scripted([0] * len(scores), jnp.asarray(flags)),
            history_length=16,
        )
        w = jnp.zeros([])
        state, update = tx.init(w), jax.jit(tx.update)
        for value in scores:
            _, state = update(w, state, w, value=jnp.float32(value))
        return state

    def test_should_grow_counts_rounds_without_improvement(self):
        state = self.states(np.zeros(12), significant=[4])
        for rounds in range(1, 20):
            assert bool(optax_ev3.should_grow(state, rounds)) == (rounds <= 7)
        assert bool(jax.jit(lambda s: optax_ev3.should_grow(s, 7))(state))

    @pytest.mark.parametrize("slope", [-0.1, 0.0, 0.05, 0.1, 0.2])
    def test_slope_is_the_t_test_of_scipy(self, slope):
        rng = np.random.default_rng(1)
        values = slope * np.arange(20) + rng.normal(size=20)
        state = self.states(values)
        for rounds in (8, 10, 16):
            test = stats.linregress(
                np.arange(rounds), values[-rounds:], alternative="greater"
            )
            assert abs(test.pvalue - 0.05) > 2e-3
            assert bool(_stalled(state, rounds)) == (test.pvalue > 0.05)

    def test_not_before_enough_rounds_or_after_an_improvement(self):
        assert not optax_ev3.stalled(self.states(np.zeros(7)), 8)
        assert optax_ev3.stalled(self.states(np.zeros(8)), 8)
        assert not optax_ev3.stalled(self.states(np.zeros(12), significant=[5]), 8)

    def test_huge_scores(self):
        assert not optax_ev3.stalled(self.states(1e30 * np.arange(8.0)), 8)
        assert optax_ev3.stalled(self.states(-1e30 * np.arange(8.0)), 8)

    def test_bad_input(self):
        state = self.states([0.0])
        with says(ValueError, "rounds", "7"):
            optax_ev3.stalled(state, 7)
        with says(ValueError, "17 rounds", "history_length", "16"):
            optax_ev3.stalled(state, 17)
        with says(ValueError, "8 rounds", "0.999"):
            optax_ev3.stalled(state, 8, confidence=0.999)
        with says(ValueError, "confidence", "0.2"):
            optax_ev3.stalled(state, 8, confidence=0.2)
        with says(ValueError, "rounds", "0"):
            optax_ev3.should_grow(state, 0)
        with says(TypeError, "rounds", "1.5"):
            optax_ev3.should_grow(state, 1.5)


MOST = np.iinfo(np.int32).max


@pytest.mark.parametrize("rounds", [MOST - 3, MOST - 2, MOST - 1])
def test_adoptions_are_counted_to_the_end(rounds):
    tx = optax_ev3.ev3(
        {"good": optax.sgd(0.1)}, lambda w: -(w**2), adapt=adapt.greedy()
    )
    w = jnp.float32(1)
    state = tx.init(w)
    counts = jnp.array([rounds, 0, 0], jnp.int32)
    past = state.history._replace(rounds=counts[0], adoptions=counts)
    state = state._replace(history=past)
    update = jax.jit(tx.update)
    for call in range(1, 5):
        _, state = update(w, state, w)
        expected = min(rounds + call, MOST)
        assert state.history.adoptions.tolist() == [expected, 0, 0]
        assert float(optax_ev3.summary(state)["ev3/share/good"]) == 1


@pytest.mark.parametrize("length", [8, 64, 256])
@pytest.mark.parametrize("rounds", [10**6, 3 * 2**29 + 1, MOST])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_who_is_seldom_adopted_after_many_rounds(length, rounds, more):
    """Python's integers have no end."""
    own, adopted = 1, rounds // length + more
    seldom = adopted * length < rounds
    past = racing.init(length, 4)
    past = past._replace(
        rounds=jnp.asarray(rounds, jnp.int32),
        adoptions=jnp.array([rounds - adopted, adopted, 0, 0], jnp.int32),
        valid=past.valid.at[:].set(1).at[:, own].set(-1),
        mean=past.mean + 1,
    )
    stretch = rounds // length
    assert stretch & (stretch - 1)  # It is not the time to come back.
    layout = Layout({"a": ["a"], "b": ["b"]}, {"a": True, "b": True})
    paused = racing.paused(past, layout, explore.Racing(2, length))
    assert [bool(flag) for flag in paused.values()] == [False, seldom]
