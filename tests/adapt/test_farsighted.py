"""The rule that looks further than one step: against NumPy, and what it promises."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ev3
from optax_ev3 import adapt
from optax_ev3._src.base import evidence
from optax_ev3._src.base.decision import enforce_validity

KEY = jax.random.key(0)
ADAM, SGD = 0, 1


def gather(values, finite=None, is_ascent=(False, False)):
    values = jnp.asarray(values, jnp.float32)
    finite = jnp.ones([len(values)], bool) if finite is None else jnp.asarray(finite)
    flags = jnp.asarray([*is_ascent, False, False])
    return evidence.gather({"score": values}, finite, flags)


class Run:
    """Rounds of two explorers, with the gains over current and stable that are told."""

    def __init__(self, **kwargs):
        self.rule = adapt.farsighted(**kwargs)
        self.decide = jax.jit(self.rule.decide)
        self.state = self.rule.init(2)
        self.rounds = 0

    def __call__(self, gains, current=0.0, spread=0.05, **kwargs):
        """One round; current is better than stable by ``current``."""
        rng = np.random.default_rng(self.rounds)
        self.rounds += 1
        values = rng.normal(size=200) + spread * rng.normal(size=(4, 200))
        values[3] = values[2] - current
        values[:2] += np.asarray(gains)[:, None] + current
        self.values = np.float32(values)
        seen = gather(values, **kwargs)
        found, self.state = self.decide(seen, self.state, KEY)
        return int(enforce_validity(found, seen)[0].adopted)


def test_credit_is_the_mean_gain_after_the_burn_in():
    run, gains, leaders = Run(length=8, burn_in=0.25), [], []
    for number in range(17):
        adopted = run([0.02 - 0.001 * number, 0.01])
        leaders.append(adopted)
        gains.append((run.values[adopted] - run.values[2]).mean())
    # In its first stretch each; the calls that count are the last six of eight.
    first, second = leaders[0], leaders[8]
    assert {first, second} == {ADAM, SGD}
    assert leaders[:16] == [first] * 8 + [second] * 8
    progress = run.state.progress
    assert progress[first] == pytest.approx(np.mean(gains[2:8]), rel=1e-3)
    assert progress[second] == pytest.approx(np.mean(gains[10:16]), rel=1e-3)
    assert leaders[16] == np.argmax(progress)


def test_one_with_half_the_progress_is_retried_when_that_has_halved():
    """Progress falls as 1 / t: retries come after twice as many calls each time."""
    run, led = Run(length=4, burn_in=0.5), []
    for number in range(800):
        rate = 1 / (number + 10)
        led.append(run([rate, rate / 2], spread=1e-4))
    starts = np.flatnonzero(np.diff(np.array(led) == SGD, prepend=False) > 0)
    starts = [t for t in starts if led[t] == SGD]
    assert 4 <= len(starts) <= 8
    ratios = np.diff(np.add(starts[1:], 10)) / np.add(starts[1:-1], 10)
    assert (abs(ratios - 1) < 0.35).all()  # Stretches are of 4 calls.
    assert (abs(ratios[2:] - 1) < 0.1).all()


def test_an_explorer_shown_to_be_harmful_loses_its_stretch_and_is_paused_for_longer():
    """It changes all scores beyond recognition; stretches are of one call."""
    run, paused = Run(length=1, burn_in=0.0), []
    for _ in range(40):
        rng = np.random.default_rng(run.rounds)
        values = np.stack([rng.normal(size=200)] * 4)
        values[ADAM] = rng.permutation(values[ADAM])
        seen = gather(values)
        found, run.state = run.decide(seen, run.state, KEY)
        run.rounds += 1
        assert int(found.adopted) != ADAM
        paused.append(int(run.state.pause[ADAM]))
    assert int(run.state.cuts[ADAM]) == 1  # It is not eligible, so it leads no more.
    run = Run(length=3)
    losses = []
    for _ in range(60):
        adopted = run([0.5, 0.001], spread=0.01)  # By far the most progress,
        while adopted == ADAM:
            adopted = run([-0.5, 0.001], spread=0.01)  # and then a collapse.
            losses.append(run.rounds)
            assert adopted == SGD
    assert int(run.state.cuts[ADAM]) == len(losses)
    gaps = np.diff(losses)
    assert len(losses) >= 2
    assert (gaps[1:] >= 1.5 * gaps[:-1]).all()


def test_a_first_gain_over_a_score_without_spread_is_no_leap():
    """As F1 does where nothing is found yet; stable found some, by chance."""
    run = Run(length=50)
    leader = run([0.0, 0.0])
    for _ in range(20):
        rng = np.random.default_rng(run.rounds)
        run.rounds += 1
        values = np.zeros([4, 200])
        values[leader] = rng.random(200) < 0.1
        values[3] = 0.01 * rng.normal(size=200)
        found, run.state = run.decide(gather(values), run.state, KEY)
        assert int(found.adopted) == leader
    assert int(run.state.cuts[leader]) == 0


def test_momentum_may_ascend_at_times():
    run = Run(length=100)
    leader = [run([0.0, 0.0]) for _ in range(10)][-1]
    for number in range(50):
        flags = [False, False]
        flags[leader] = number % 3 == 0
        assert run([0.0, 0.0], is_ascent=flags) == leader
    flags[leader] = True
    assert [run([0.0, 0.0], is_ascent=flags) for _ in range(20)][-1] == 1 - leader


def test_goes_back_at_the_end_of_a_stretch_and_then_waits_longer():
    run, back = Run(length=3), []
    for number in range(70):
        # Worse than stable by a little, consistently: no harm, but no good.
        if run([0.0, 0.0], current=-0.02, spread=0.001) == 3:
            back.append(number)
    assert back == [3, 15, 63]


def test_never_goes_back_where_stable_is_not_better():
    run = Run(length=3)
    assert all(run([0.0, 0.0], current=0.0) < 2 for _ in range(50))


def test_losses_of_one_step_that_may_be_noise_end_nothing():
    """A hot optimizer: every other step loses, significantly, within the noise."""
    run = Run(length=40)
    leader = run([0.0, 0.0], spread=0.001)
    for number in range(39):
        gains = np.zeros(2)
        gains[leader] = 0.05 * (-1) ** number
        gains[1 - leader] = 0.01
        assert run(gains, spread=0.001) == leader


@pytest.mark.parametrize("explorers", [1, 4])
def test_false_proof_over_many_rounds(explorers):
    """Nothing is ever better: at most 5 % of runs replace stable in 300 rounds."""
    runs, rule = 400, adapt.farsighted(length=5)

    def run(key):
        def one(state, key):
            values = jax.random.normal(key, [explorers + 2, 24])
            none = jnp.zeros([explorers + 2], bool)
            seen = evidence.gather({"score": values}, ~none, none)
            decision, state = rule.decide(seen, state, key)
            return state, decision.significant

        keys = jax.random.split(key, 300)
        return jax.lax.scan(one, rule.init(explorers), keys)[1].any()

    found = jax.jit(jax.vmap(run))(jax.random.split(KEY, runs))
    assert float(found.mean()) < 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)


def test_forgets_explorers_that_are_others_from_now_on():
    run = Run(length=2)
    for _ in range(9):
        run([0.02, 0.01])
    assert (run.state.progress < 1).all()
    state = run.rule.forget(run.state, jnp.array([False, True]))
    assert list(state.progress < 1) == [True, False]
    assert state.leaps[1] == state.ascents[1] == 0
    assert state.ascents[0] == run.state.ascents[0] < 0


@pytest.mark.parametrize("length", [0, -1])
def test_length_out_of_range(length):
    with pytest.raises(ValueError, match="length must be at least 1"):
        adapt.farsighted(length)


def test_length_is_no_integer():
    with pytest.raises(TypeError, match="length must be an integer"):
        adapt.farsighted(2.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("burn_in", [-0.1, 1.0, math.nan])
def test_burn_in_out_of_range(burn_in):
    with pytest.raises(ValueError, match="burn_in must be at least 0 and below 1"):
        adapt.farsighted(burn_in=burn_in)


# A problem where one step misleads: a stiff direction whose noise a small step damps at
# once, and a flat one along which only Adam gets anywhere.

CURVATURE = np.array([20.0, 0.002])
INNER = {"adam": optax.adam(0.02), "sgd": optax.sgd(0.05)}
HARMFUL = {
    "uphill": optax.sgd(-0.05),
    "sgd 1000": optax.sgd(1000.0),
    "nan": optax.sgd(math.nan),
}


def score(w, noise):
    apart = jnp.square(w[None] + 0.1 * noise)
    return -(CURVATURE[None] * apart).sum(-1)


def final(tx, key=KEY, steps=600, split=None):
    """The loss at the end, the adopted candidates, and whether all was finite."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, key):
        w, state = carry
        train, held_out = jax.random.split(key)
        grads = 2 * CURVATURE * (w + jax.random.normal(train, [2]))
        noise = jax.random.normal(held_out, [64, 2])
        updates, state = tx.update(grads, state, w, noise=noise)
        w = optax.apply_updates(w, updates)
        return (w, state), (jnp.isfinite(w).all(), w)

    w = jnp.array([1.0, 8.0])
    carry, keys = (w, tx.init(w)), jax.random.split(key, steps)
    parts = [keys] if split is None else [keys[:split], keys[split:]]
    seen = []
    for part in parts:
        carry, (finite, path) = jax.lax.scan(step, carry, part)
        seen.append((finite, path))
    finite = jnp.concatenate([f for f, _ in seen])
    path = jnp.concatenate([p for _, p in seen])
    return (CURVATURE * carry[0] ** 2).sum(), finite.all(), path


def losses(make, seeds=8):
    found = jax.jit(jax.vmap(lambda key: final(make(), key)[:2]))
    loss, finite = found(jax.random.split(KEY, seeds))
    assert bool(finite.all())
    return np.asarray(loss)


def ev3(inner, rule=None):
    return lambda: optax_ev3.ev3(inner, score, adapt=rule)


def flat(make, seeds=8):
    """How far the flat direction is from its optimum at the end, mean over seeds."""
    found = jax.jit(jax.vmap(lambda key: final(make(), key)[2][-1]))
    return float(abs(found(jax.random.split(KEY, seeds))[:, 1]).mean())


def test_finds_the_one_that_is_better_in_the_end():
    way = {name: 8 - flat(lambda tx=tx: tx) for name, tx in INNER.items()}
    assert way["sgd"] < 0.2 * way["adam"]
    assert 8 - flat(ev3(INNER)) > 0.85 * way["adam"]
    # A rule that looks at single steps is misled by this problem.
    assert 8 - flat(ev3(INNER, adapt.confident())) < 0.7 * way["adam"]


def test_harmful_explorers_change_little():
    without, with_harmful = losses(ev3(INNER)), losses(ev3({**INNER, **HARMFUL}))
    assert np.log(with_harmful).mean() < np.log(without).mean() + np.log(1.05)


def test_runs_are_the_same_bit_for_bit_also_restored():
    one = jax.jit(lambda: final(ev3(INNER)(), steps=100)[2])()
    again = jax.jit(lambda: final(ev3(INNER)(), steps=100, split=37)[2])()
    np.testing.assert_array_equal(one, again)


def test_vmap_is_a_loop():
    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(lambda k: final(ev3(INNER)(), k, 60)[2]))(keys)
    for key, path in zip(keys, together, strict=True):
        alone = jax.jit(lambda k: final(ev3(INNER)(), k, 60)[2])(key)
        np.testing.assert_allclose(alone, path, rtol=2e-3, atol=1e-4)


def test_is_the_default_of_one_step_rounds_alone():
    def state_of(**kwargs):
        tx = optax_ev3.ev3(INNER, lambda w: -(w**2), loss_fn=jnp.square, **kwargs)
        return type(tx.init(jnp.ones([])).rule_state).__name__

    explore = optax_ev3.explore
    assert state_of() == "FarsightedState"
    assert state_of(explore=explore.rounds(5)) == "ConfidentState"
    group = optax_ev3.evolve(
        optax.sgd, {"learning_rate": optax_ev3.log_uniform(0.01, 0.1, 0.05)}
    )
    tx = optax_ev3.ev3({"sgd": group}, lambda w: -(w**2))
    assert type(tx.init(jnp.ones([])).rule_state).__name__ == "ConfidentState"
