"""Guards against NumPy, and what they are for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_same_types, score, stepper, weights
from scipy import stats

import optax_ev3
from optax_ev3 import adapt, explore
from optax_ev3._src.base import evidence

KEY = jax.random.key(0)
N = 50


def gather(values, finite=None, **others):
    values = {"score": values, **others}
    values = {k: jnp.asarray(v, jnp.float32) for k, v in values.items()}
    count = len(values["score"])
    finite = jnp.ones([count], bool) if finite is None else jnp.asarray(finite)
    return evidence.gather(values, finite, jnp.zeros([count], bool))


def released(guard, memory, values, key=KEY, **kwargs):
    seen, memory = guard.release(gather(values, **kwargs), memory, key)
    assert not seen.resamples and not seen.binary
    (figures,) = seen.scores.values()
    assert figures.shape == seen.valid.shape
    return np.asarray(figures), seen, memory


def settled(guard, memory, seen, promoted=None):
    replaced = jnp.asarray(promoted is not None)
    return guard.settle(memory, seen, replaced, jnp.int32(promoted or 0))


# The ladder.

THRESHOLDS = {
    "over all rounds": {"confidence": 0.9},
    "parameter-free": {"confidence": None},
    "a step": {"step": 0.125},
}


class Ladder:
    """The same in float64, with a normal quantile of SciPy."""

    def __init__(self, confidence=0.95, step=None):
        self.confidence, self.step = confidence, step
        self.rounds, self.best = 0, None

    def release(self, values):
        self.rounds += 1
        mean = values.mean(1)
        difference = values - values[-1]
        error = difference.std(axis=1, ddof=1) / np.sqrt(values.shape[1])
        limit = error
        unit = error / np.sqrt(values.shape[1])
        if self.step:
            limit = unit = np.full(len(values), self.step)
        elif self.confidence:
            level = (1 - self.confidence) * 6 / (np.pi * self.rounds) ** 2
            limit = error * stats.norm.isf(level / (2 * (len(values) - 1)))
        if self.best is None:
            self.best = mean[-1]
            if self.step:
                self.best = np.round(mean[-1] / self.step) * self.step
        told = np.full(len(values), self.best)
        for row, gain in enumerate(difference.mean(1)):
            if abs(gain) > limit[row]:
                rounded = np.round(mean[row] / unit[row]) * unit[row]
                if gain > 0:
                    told[row] = max(rounded, self.best + unit[row])
                else:
                    told[row] = min(rounded, self.best - unit[row])
        return told


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("kind", THRESHOLDS)
def test_ladder_is_numpys(kind, scale):
    kwargs = dict(THRESHOLDS[kind])
    if "step" in kwargs:
        kwargs["step"] *= scale
    guard, oracle = adapt.ladder(**kwargs), Ladder(**kwargs)
    memory = guard.init()
    rng = np.random.default_rng(0)
    better = worse = 0
    for number in range(12):
        gains = np.append(rng.normal(0, 0.6, 3), 0.0)
        values = rng.normal(size=N) + gains[:, None] + rng.normal(0, 0.7, (4, N))
        values = (scale * values).astype(np.float32).astype(np.float64)
        found, seen, memory = released(guard, memory, values)
        expected = oracle.release(values)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6 * scale)
        better += (found > found[-1]).sum()
        worse += (found < found[-1]).sum()
        if number % 3 == 2:
            memory = settled(guard, memory, seen, 1)
            oracle.best = expected[1]
        else:
            memory = settled(guard, memory, seen)
    assert better > 2 and worse > 2
    assert int(memory.rounds) == 12


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_ladder_tells_nothing_within_the_threshold(kind):
    guard = adapt.ladder(**THRESHOLDS[kind])
    rng = np.random.default_rng(1)
    memory = guard.init()
    for _ in range(5):
        shared = rng.normal(size=N)
        own = rng.normal(size=(4, N))
        own -= own.mean(1, keepdims=True)
        own += 0.3 * own.std(axis=1, keepdims=True) / np.sqrt(N) * [[1], [-1], [0], [0]]
        found, seen, memory = released(guard, memory, shared + 0.2 * own)
        assert (found == found[-1]).all()
        assert found[-1] == memory.best
        memory = settled(guard, memory, seen)


def test_ladders_score_of_stable_moves_when_it_is_replaced_only():
    guard = adapt.ladder(step=0.5)
    rng = np.random.default_rng(2)
    memory = guard.init()
    before = None
    for promoted in (None, 0, None, 1, None):
        shift = np.array([[2], [-2], [0], [0]])
        values = rng.normal(size=(4, N)) + shift + rng.normal()
        found, seen, memory = released(guard, memory, values)
        assert before is None or found[-1] == before
        memory = settled(guard, memory, seen, promoted)
        before = found[-1] if promoted is None else found[promoted]
        assert float(memory.best) == before


def test_ladder_tells_gains_far_below_one_in_n():
    """Scores have any unit, and candidates may be much alike."""
    rng = np.random.default_rng(3)
    shared = rng.normal(size=N)
    shift = np.array([[3], [-3], [0]])
    values = 1e-3 * (shared + 1e-3 * (rng.normal(size=(3, N)) + shift))
    values[2] = 1e-3 * shared
    found, _, _ = released(adapt.ladder(), adapt.ladder().init(), values)
    assert found[0] > found[2] > found[1]


def test_ladder_of_what_is_not_valid():
    guard = adapt.ladder()
    rng = np.random.default_rng(4)
    values = rng.normal(size=(4, N)) * 0.1 - 5
    values[3] = np.nan
    found, seen, memory = released(guard, guard.init(), values)
    assert int(memory.rounds) == 0
    memory = settled(guard, memory, seen)
    values[3] = values[2]
    values[0] += 1
    values[1] = np.inf
    found, seen, memory = released(guard, memory, values)
    np.testing.assert_allclose(found[2:], values[3].mean(), rtol=1e-5)
    assert found[0] > found[3]
    np.testing.assert_array_equal(seen.valid, [True, False, True, True])


def test_ladder_seldom_tells_of_noise():
    guard = adapt.ladder(0.9)
    scores = np.random.default_rng(5).normal(size=(400, 20, 4, 32))

    def run(scores):
        def one(memory, values):
            seen, memory = guard.release(gather(values), memory, KEY)
            return memory, (seen.scores["score"] != seen.scores["score"][-1]).any()

        return jax.lax.scan(one, guard.init(), scores)[1].any()

    share = float(jax.jit(jax.vmap(run))(jnp.asarray(scores, jnp.float32)).mean())
    # Somewhat beyond nominal: normal quantiles for 32 examples.
    assert share < 0.1 + 0.06


# Thresholdout.


# Through ev3.


def both(params, batch):
    return {"train": score(params, batch) + 0.01, "test": score(params, batch[::-1])}


GUARDS = {
    "ladder": (adapt.ladder(), score),
    "parameter-free": (adapt.ladder(None), score),
    "step": (adapt.ladder(step=0.25), score),
}
RULES = {"greedy": adapt.greedy, "confident": adapt.confident}


def make(name, rule="greedy", **kwargs):
    guard, assess_fn = GUARDS[name]
    inner = {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}
    rule = adapt.guarded(RULES[rule](), guard)
    return optax_ev3.ev3(inner, assess_fn, **{"adapt": rule, **kwargs})


def start():
    return {"w": jnp.array([0.25, -0.5, 2.0])}


def run(tx, rounds, wrap=jax.jit):
    w = start()
    state = tx.init(w)
    step = wrap(stepper(tx))
    for _ in range(rounds):
        w, state = step(w, state, weights())
    return w, state


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", GUARDS)
def test_state_keeps_its_types(name, rule):
    tx = make(name, rule)
    w, state = run(tx, 2)
    assert_same_types(state, tx.init(w))
    assert_same_types(jax.eval_shape(tx.init, w), state)


@pytest.mark.parametrize("name", GUARDS)
def test_improves_all_the_same(name):
    w, state = run(make(name), 30)
    assert float(-score(w, weights()).mean()) < 0.5
    assert optax_ev3.history(state)["significant"].any()


@pytest.mark.parametrize("name", GUARDS)
def test_without_jit(name):
    assert_close(run(make(name), 3, lambda fn: fn), run(make(name), 3), rtol=1e-4)


def test_history_and_summary_hold_what_is_released():
    tx = make("step")
    _w, state = run(tx, 6)
    past = optax_ev3.history(state)
    np.testing.assert_array_equal(past["stderr"], 0)
    np.testing.assert_array_equal(past["mean"] % 0.25, 0)
    found = optax_ev3.summary(state)
    names = past["candidates"]
    for name, value in zip(names, past["mean"][-1], strict=True):
        assert float(found[f"ev3/score/{name}"]) == value
    # That of stable is what was told of the candidate that took its place.
    for number in range(1, 6):
        before = past["mean"][number - 1]
        index = past["adopted"][number - 1]
        stable = before[index] if past["significant"][number - 1] else before[-1]
        assert past["mean"][number, -1] == stable
    assert past["significant"].any()


RESTARTS = {
    "always": explore.rounds(2),
    "adopted": explore.branches(2, restart=explore.worse_than("adopted")),
    "start": explore.branches(2, restart=explore.worse_than("start")),
    "never": explore.branches(2),
}


@pytest.mark.parametrize("restart", RESTARTS)
@pytest.mark.parametrize("name", GUARDS)
def test_types_with_trajectories(name, restart):
    tx = make(name, "confident", explore=RESTARTS[restart])
    w = start()
    state = tx.init(w)
    _, new = jax.eval_shape(tx.update, w, state, w, batch=weights())
    assert_same_types(new, state)


@pytest.mark.parametrize(
    "name, restart", [*zip(GUARDS, RESTARTS, strict=False), ("ladder", "never")]
)
def test_with_trajectories(name, restart):
    tx = make(name, "confident", explore=RESTARTS[restart])
    w, state = run(tx, 6)
    assert_same_types(state, tx.init(w))
    assert len(optax_ev3.history(state)["round"]) == 3


def test_restarts_go_by_what_is_released():
    """A guard that tells nothing leaves every branch where it is."""
    inner = [optax.sgd(0.1), optax.sgd(-0.1)]
    strategy = explore.branches(1, restart=explore.worse_than("adopted"))
    deaf = adapt.guarded(adapt.greedy(), adapt.ladder(step=1e6))
    ends = {}
    for name, rule in {"none": adapt.greedy(), "deaf": deaf}.items():
        tx = optax_ev3.ev3(inner, score, explore=strategy, adapt=rule, key=1)
        _, state = run(tx, 1)
        ends[name] = [np.asarray(x["w"]) for x in state.explore.branches.ends.values()]
    assert (ends["none"][0] == ends["none"][1]).all()
    assert (ends["deaf"][0] != ends["deaf"][1]).any()


@pytest.mark.parametrize("with_guard", [False, True])
def test_over_devices(with_guard):
    """All devices are told the same."""
    rule = adapt.greedy()
    if with_guard:
        rule = adapt.guarded(rule, adapt.ladder())
    tx = make("ladder", adapt=rule, axis_name="i")
    one = make("ladder", adapt=rule)
    w = start()
    batch = weights(32)

    def update(tx, batch):
        return tx.update({"w": w["w"] - 1}, tx.init(w), w, batch=batch)

    mapped = jax.vmap(lambda b: update(tx, b), axis_name="i")
    parts = jax.jit(mapped)(batch.reshape(8, 4))
    whole = jax.jit(lambda b: update(one, b))(batch)
    for device in (0, 7):
        mine = jax.tree.map(lambda x, d=device: x[d], parts)
        assert_close(mine, whole, rtol=1e-4, atol=1e-5)


# What guards are for.


def gap(rule, runs=12, rounds=200, examples=100):
    """Told less true accuracy, where labels are coins: nothing can be learnt of them.

    Explorers are random steps; a candidate's predictions on an example are right with
    its sign, so that its accuracy on new data is 1/2 whatever it does.
    """
    x = np.random.default_rng(0).normal(size=(examples, 30)).astype(np.float32)

    def random_step(seed):
        def update(updates, state, params=None):
            key, new = jax.random.split(jax.random.wrap_key_data(state))
            step = 0.5 * jax.random.normal(key, params.shape)
            return step, jax.random.key_data(new)

        first = jax.random.key_data(jax.random.key(seed))
        return optax.GradientTransformation(lambda params: first, update)

    def one(labels):
        tx = optax_ev3.ev3(
            [random_step(1), random_step(2), random_step(3)],
            lambda w: ((jnp.asarray(x) @ w > 0) == labels).astype(jnp.float32),
            adapt=rule,
            assess_mode="vmap",
        )
        w = jnp.ones([30])

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(w, state, w)
            return (optax.apply_updates(w, updates), state), None

        (w, state), _ = jax.lax.scan(step, (w, tx.init(w)), length=rounds)
        stable = optax_ev3.stable_params(state)
        return ((x @ stable > 0) == labels).mean() - 0.5

    labels = np.random.default_rng(1).integers(0, 2, (runs, examples)).astype(bool)
    return float(jax.jit(jax.vmap(one))(labels).mean())


def test_less_is_learnt_by_heart():
    free = gap(adapt.greedy())
    guarded = gap(adapt.guarded(adapt.greedy(), adapt.ladder()))
    assert free > 0.1
    assert guarded < 0.5 * free


# Mistakes.


def guarded(assess_fn, guard):
    rule = adapt.guarded(adapt.greedy(), guard)
    return optax_ev3.ev3([optax.sgd(0.1)], assess_fn, adapt=rule)


BAD = {
    "certain": (lambda: adapt.ladder(1.0), "confidence must be above 0.5", "1.0"),
    "a coin": (lambda: adapt.ladder(0.5), "below 1, or None", "0.5"),
    "in percent": (lambda: adapt.ladder(95), "below 1, or None", "95"),
    "no step": (lambda: adapt.ladder(step=0), "step must be above 0", "0"),
    "step back": (lambda: adapt.ladder(step=-0.1), "step must be above 0", "-0.1"),
    "figures": (
        lambda: run(guarded(exact, adapt.ladder()), 1),
        "ladder needs a score for each example",
        "single value",
    ),
    "two objectives": (
        lambda: run(guarded(both, adapt.ladder()), 1),
        "takes one objective",
        "train",
    ),
}


def exact(params, batch):
    return score(params, batch).mean()


@pytest.mark.parametrize("case", BAD)
def test_mistakes(case):
    make_it, *parts = BAD[case]
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts))):
        make_it()


@pytest.mark.parametrize("guard", [adapt.ladder, 0.1, "ladder"])
def test_guard_must_be_one(guard):
    with pytest.raises(TypeError, match="takes a guard second"):
        adapt.guarded(adapt.greedy(), guard)


def test_a_guarded_rule_must_be_one_of_a_single_objective():
    with pytest.raises(TypeError, match="takes a rule first"):
        adapt.guarded(adapt.greedy, adapt.ladder())
    several = adapt.weighted({"a": 0.1, "b": 0.1})
    with pytest.raises(ValueError, match=r"one objective, the rule takes \['a', 'b'\]"):
        adapt.guarded(several, adapt.ladder())


WITHIN = {
    "constrained": lambda rule: adapt.constrained("test", {"train": 9.0}, rule=rule),
    "weighted": lambda rule: adapt.weighted({"test": 1.0, "train": 1.0}, rule=rule),
}


@pytest.mark.parametrize("within", WITHIN)
def test_a_guarded_rule_stands_within_no_other(within):
    rule = WITHIN[within](adapt.guarded(adapt.greedy(), adapt.ladder()))
    tx = optax_ev3.ev3([optax.sgd(0.1)], both, adapt=rule)
    with pytest.raises(ValueError, match=r"guarded cannot stand within a rule for sev"):
        run(tx, 1)


def test_guards_within_guards_are_told_what_the_outer_ones_release():
    twice = adapt.guarded(adapt.guarded(adapt.greedy(), adapt.ladder()), adapt.ladder())
    with pytest.raises(ValueError, match="ladder needs a score for each example"):
        run(optax_ev3.ev3([optax.sgd(0.1)], score, adapt=twice), 1)

    def release(seen, state, key):
        del key
        values = {"score": jnp.round(seen.scores["score"])}
        return evidence.Evidence(values, seen.valid, seen.is_ascent), state

    rounding = adapt.Guard(lambda: (), release, lambda state, *_: state)
    inner = adapt.guarded(adapt.greedy(), rounding)
    rule = adapt.guarded(inner, adapt.ladder(step=0.25))
    _, state = run(optax_ev3.ev3([optax.sgd(0.1)], score, adapt=rule), 3)
    past = optax_ev3.history(state)["mean"]
    np.testing.assert_array_equal(past, np.round(past))
    assert past.any()
