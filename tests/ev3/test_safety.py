"""The safety guarantee: what is not finite is never adopted nor promoted."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import STRATEGIES, assert_finite, assert_identical, says

import optax_ev3
from optax_ev3 import adapt, evidence, explore


def averages_of(strategy):
    """Which averages are candidates."""
    return STRATEGIES[strategy].get("explore", explore.one_step()).averages


def where(strategy, w, state):
    """What a round has led to: in a relay it is another one's turn by then."""
    return optax_ev3.best_params(state) if strategy == "relay" else w


every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def loss(w):
    return jnp.square(w) / 2


def score(w, broken=jnp.inf):
    """Not a number above 5, and for the parameters ``broken``."""
    return jnp.where((w > 5) | (w == broken), jnp.nan, -jnp.square(w))


def infinite():
    return optax.stateless(lambda updates, _: jnp.full_like(updates, jnp.inf))


def inner():
    return {"good": optax.sgd(0.25), "far": optax.sgd(-10.0), "inf": infinite()}


class Script(NamedTuple):
    """What the rule decides from its second round on."""

    round: jax.Array
    adopted: jax.Array
    significant: jax.Array
    promoted: jax.Array


def second(adopted=0, significant=True, promoted=None):
    """A rule that adopts the first explorer, then what its memory says."""

    def init(explorers):
        del explorers
        numbers = (0, adopted, significant, adopted if promoted is None else promoted)
        return Script(*map(jnp.asarray, numbers))

    def decide(evidence, memory, key):
        del evidence, key
        first = memory.round == 0
        decision = adapt.Decision(
            jnp.where(first, 0, memory.adopted),
            ~first & memory.significant,
            None if promoted is None else jnp.where(first, 0, memory.promoted),
        )
        return decision, memory._replace(round=memory.round + 1)

    return adapt.Rule(init, decide)


@functools.cache
def program(strategy, promotes):
    rule = second(promoted=0 if promotes else None)
    kwargs = STRATEGIES[strategy]
    tx = optax_ev3.ev3(inner(), score, loss_fn=loss, adapt=rule, **kwargs)

    @jax.jit
    def step(w, state, broken):
        updates, state = tx.update(jax.grad(loss)(w), state, w, broken=broken)
        return optax.apply_updates(w, updates), state

    return tx, step


def run_rounds(strategy, script, broken=jnp.inf):
    """Parameters before and after each of two rounds, and the last state.

    In the second one the parameters ``broken`` have no score.
    """
    tx, step = program(strategy, "promoted" in script)
    w = jnp.ones([])
    state, seen = tx.init(w), [float(w)]
    given = {k: jnp.asarray(v) for k, v in script.items()}
    state = state._replace(rule_state=state.rule_state._replace(**given))
    # In a relay each of the three has a turn at first, but no harmful one later.
    for number, end in enumerate([3, 4] if strategy == "relay" else [1, 2]):
        while int(state.ev3_round) < end:
            w, state = step(w, state, broken if number else jnp.inf)
        seen.append(float(where(strategy, w, state)))
    return seen, state


BAD = {"nan_score": 1, "inf_update": 2, "negative": -1, "beyond": None, "far": 10**6}


def bad_index(kind, strategy):
    """The index; None for the number of candidates."""
    if BAD[kind] is not None:
        return BAD[kind]
    averages = len(averages_of(strategy))
    return 3 * (1 + averages) + 2


@every_strategy
@pytest.mark.parametrize("kind", BAD)
def test_bad_decisions_are_overruled(strategy, kind):
    script = {"adopted": bad_index(kind, strategy)}
    (start, before, after), state = run_rounds(strategy, script)
    assert before < start
    assert after == before  # Stays at current.
    assert float(optax_ev3.stable_params(state)) == start
    figures = optax_ev3.summary(state)
    assert int(figures["ev3/overruled"]) == 1
    assert int(figures["ev3/significant"]) == 0
    assert int(figures["ev3/adopted/current"]) == 1
    assert int(state.rule_state.round) == 2  # What the rule remembers is its own.
    total = sum(float(v) for k, v in figures.items() if k.startswith("ev3/share/"))
    assert total == 1


@every_strategy
@pytest.mark.parametrize("kind", BAD)
def test_overruled_where_current_is_broken_goes_back_to_stable(strategy, kind):
    script = {"adopted": bad_index(kind, strategy)}
    (_, before, _), _ = run_rounds(strategy, script)
    (start, _, after), state = run_rounds(strategy, script, broken=before)
    assert after == start
    assert float(optax_ev3.stable_params(state)) == start
    assert int(optax_ev3.summary(state)["ev3/overruled"]) == 1


@every_strategy
@pytest.mark.parametrize("kind", BAD)
def test_bad_candidates_are_not_promoted(strategy, kind):
    script = {"promoted": bad_index(kind, strategy)}
    (start, before, after), state = run_rounds(strategy, script)
    assert after < before  # The adopted one was good.
    assert float(optax_ev3.stable_params(state)) == start
    assert int(optax_ev3.summary(state)["ev3/overruled"]) == 1
    assert int(optax_ev3.summary(state)["ev3/significant"]) == 0
    assert int(state.history.since) == 2


@every_strategy
def test_what_is_bad_but_not_promoted_does_no_harm(strategy):
    script = {"promoted": -1, "significant": False}
    (_, before, after), state = run_rounds(strategy, script)
    assert after < before
    assert int(optax_ev3.summary(state)["ev3/overruled"]) == 0


@every_strategy
def test_good_decisions_are_kept(strategy):
    (_, before, after), state = run_rounds(strategy, {})
    assert after < before
    assert float(optax_ev3.stable_params(state)) == after
    assert int(optax_ev3.summary(state)["ev3/overruled"]) == 0


@every_strategy
def test_adopting_a_broken_current_is_overruled(strategy):
    current = bad_index("beyond", strategy) - 2
    script = {"adopted": current}
    (_, before, _), _ = run_rounds(strategy, script)
    (start, _, after), state = run_rounds(strategy, script, broken=before)
    assert after == start
    assert int(optax_ev3.summary(state)["ev3/overruled"]) == 1


def test_a_guard_makes_nothing_valid():
    def release(seen, memory, key):
        del key
        figures = {"score": jnp.arange(5.0)}
        return evidence.Evidence(figures, jnp.ones([5], bool), seen.is_ascent), memory

    guard = adapt.Guard(lambda: (), release, lambda memory, *_: memory)
    tx = optax_ev3.ev3(inner(), score, adapt=adapt.guarded(second(1), guard))
    w = jnp.ones([])
    _, state = tx.update(w, tx.init(w), w)
    updates, state = tx.update(w, state, w)
    assert float(updates) == 0
    assert float(optax_ev3.stable_params(state)) == 1


@pytest.mark.parametrize("kind", ["in_chunks", "constrained"])
def test_rules_within_are_overruled(kind):
    bad = second(-1, promoted=1)
    if kind == "in_chunks":
        rule, assess_fn = (
            bad,
            optax_ev3.in_chunks(lambda w, chunk: score(w) * jnp.ones([4]), 2),
        )
    else:
        rule = adapt.constrained("score", {"other": 1.0}, rule=bad)

        def assess_fn(w):
            return {"score": score(w), "other": jnp.zeros([])}

    tx = optax_ev3.ev3(inner(), assess_fn, adapt=rule)
    w = jnp.ones([])
    state = tx.init(w)
    _, state = tx.update(w, state, w)
    updates, state = tx.update(w, state, w)
    assert np.isfinite(float(updates))
    assert float(optax_ev3.stable_params(state)) == 1


def test_constraints_hold_for_what_a_rule_promotes():
    """Explorer 0 is finite, and breaks the constraint."""
    bad = adapt.Rule(
        lambda explorers: (),
        lambda seen, memory, key: (
            adapt.Decision(jnp.int32(1), jnp.asarray(True), jnp.int32(0)),
            memory,
        ),
    )
    tx = optax_ev3.ev3(
        [optax.sgd(0.5), optax.sgd(0.25)],
        lambda w: {"score": -(w**2), "other": w},
        adapt=adapt.constrained("score", {"other": 0.3}, rule=bad),
    )
    w = jnp.ones([])
    updates, state = tx.update(w, tx.init(w), w)
    assert float(updates) == -0.25
    assert float(optax_ev3.stable_params(state)) == 1
    assert float(state.rule_state.fallen["other"]) == 0


@pytest.mark.parametrize(
    ("decision", "parts"),
    [
        ((jnp.zeros([1], jnp.int32), True), ["adopted", "integer", "(1,)"]),
        ((jnp.zeros([]), True), ["adopted", "integer", "float32"]),
        ((0, jnp.zeros([2], bool)), ["significant", "[]", "(2,)"]),
        ((0, True, 0.5), ["promoted", "integer", "float32"]),
    ],
)
def test_decisions_of_the_wrong_kind(decision, parts):
    rule = adapt.Rule(lambda explorers: (), lambda *_: (adapt.Decision(*decision), ()))
    tx = optax_ev3.ev3(inner(), score, adapt=rule)
    w = jnp.ones([])
    with says(TypeError, *parts):
        tx.update(w, tx.init(w), w)


# Candidates, not only updates.

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
# Each strategy with two dtypes in turn.
strategies_and_dtypes = pytest.mark.parametrize(
    "strategy, dtype",
    [
        pytest.param(name, dtype, id=f"{name}-{dtype.__name__}")
        for i, name in enumerate(STRATEGIES)
        for dtype in (DTYPES[i % 3], DTYPES[(i + 1) % 3])
    ],
)


def share(dtype, part):
    """A part of the largest number."""
    return jnp.asarray(part * float(jnp.finfo(dtype).max), dtype)


def adds(*parts):
    """An optimizer that adds these parts of the largest number, one in each call."""

    def update(updates, count, params):
        del params
        steps = jax.tree.map(
            lambda g: jnp.stack([share(g.dtype, part) for part in parts]), updates
        )
        chosen = jax.tree.map(lambda s: s[jnp.minimum(count, len(parts) - 1)], steps)
        return chosen, count + 1

    return optax.GradientTransformation(lambda _: jnp.zeros([], jnp.int32), update)


def signs(w):
    """Boolean scores, which are finite whatever the parameters are."""
    return jnp.stack([w["w"] > 0, w["w"] < 0])


def train(tx, w, rounds):
    """Parameters and states after every round, and all updates."""
    zeros = jax.tree.map(jnp.zeros_like, w)
    step = jax.jit(lambda w, state: tx.update(zeros, state, w))
    state = tx.init(w)
    seen, updates = [(w, state)], []
    while len(seen) <= rounds:
        update, new = step(w, state)
        updates.append(update)
        w = optax.apply_updates(w, update)
        if int(new.ev3_round) > int(state.ev3_round):
            seen.append((w, new))
        state = new
    return seen, updates


@strategies_and_dtypes
def test_parameters_that_overflow_are_not_adopted(strategy, dtype):
    tx = optax_ev3.ev3(
        {"over": adds(0.8), "still": adds(0.0)},
        signs,
        loss_fn=lambda w: 0.0 * w["w"],
        adapt=adapt.Rule(
            lambda explorers: (),
            lambda *_: (adapt.Decision(jnp.int32(0), jnp.asarray(True)), ()),
        ),
        **STRATEGIES[strategy],
    )
    w = {"w": share(dtype, 0.8)}
    seen, updates = train(tx, w, 2)
    assert_finite(updates)
    for params, state in seen:
        assert_identical(params, w)
        assert_identical(optax_ev3.stable_params(state), w)
    state = seen[-1][1]
    # In a relay the rule has nothing to decide while only the one that overflows is up.
    overruled = 1 if strategy == "relay" else 2
    assert int(optax_ev3.summary(state)["ev3/overruled"]) == overruled
    np.testing.assert_equal(optax_ev3.history(state)["mean"][-1][:2], [np.nan, 0.5])


def test_inner_state_of_an_explorer_that_overflows_is_held():
    tx = optax_ev3.ev3([adds(0.8), adds(0.0)], signs)
    seen, _ = train(tx, {"w": share(jnp.float32, 0.8)}, 3)
    counts = [int(x.opt_state) for x in seen[-1][1].explore.explorers.values()]
    assert counts == [0, 3]


def test_member_of_a_sweep_that_overflows_is_invalid_alone():
    sweep = optax_ev3.sweep(
        lambda rate: optax.chain(optax.scale(-1.0), optax.scale(rate)),
        rate=[0.5, 1.5],
    )
    tx = optax_ev3.ev3({"sweep": sweep}, signs)
    w = {"w": share(jnp.float32, 0.9)}
    grads = {"w": share(jnp.float32, -0.15)}
    _, state = jax.jit(tx.update)(grads, tx.init(w), w)
    assert np.asarray(state.history.valid[0]).tolist() == [1, 0, 1, 1]


@every_dtype
@pytest.mark.parametrize("index", range(1, 3))
def test_averages_do_not_overflow(index, dtype):
    averages = [
        explore.trajectory_average(),
        explore.branch_average(),
    ]
    tx = optax_ev3.ev3(
        [adds(0.0, -0.9, -0.9)],
        signs,
        explore=explore.rounds(3, averages=averages),
        adapt=adapt.Rule(
            lambda explorers: (),
            lambda *_: (adapt.Decision(jnp.int32(index), jnp.asarray(True)), ()),
        ),
    )
    w = {"w": share(dtype, 0.9)}
    ((_, _), (params, state)), updates = train(tx, w, 1)
    assert_finite((updates, params, optax_ev3.stable_params(state)))
    assert int(optax_ev3.summary(state)["ev3/overruled"]) == 0


@strategies_and_dtypes
def test_updates_over_the_whole_range_are_finite(strategy, dtype):
    """From 0.8 back to the stable parameters at -0.8 of the largest number."""
    stable = 2 + len(averages_of(strategy))
    length = 2 if STRATEGIES[strategy] else 1

    def decide(evidence, memory, key):
        del evidence, key
        adopted = jnp.where(memory < 2, 0, stable)
        return adapt.Decision(adopted, jnp.asarray(False)), memory + 1

    tx = optax_ev3.ev3(
        [adds(*[0.8 / length] * (2 * length), 0.0)],
        signs,
        loss_fn=lambda w: 0.0 * w["w"],
        adapt=adapt.Rule(lambda explorers: jnp.zeros([], jnp.int32), decide),
        **STRATEGIES[strategy],
    )
    seen, updates = train(tx, {"w": share(dtype, -0.8)}, 3)
    assert_finite((updates, seen))
    assert int(optax_ev3.summary(seen[-1][1])["ev3/overruled"]) == 0
    before, after = (where(strategy, *one)["w"] for one in seen[2:])
    assert before > 0 > after
