"""Trajectories against the optimizers alone, and against the round in plain Python."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import always, assert_close, assert_identical, assert_same_types, x64
from helpers.trajectories import (
    alone,
    data,
    end_of,
    loss,
    run,
    score,
    start,
    stepper,
)

import optax_ev3
from optax_ev3 import adapt, explore

INNER = {
    "adam": lambda: optax.adam(0.03),
    "sgd": lambda: optax.sgd(0.05, momentum=0.9),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.rmsprop(0.02)),
}


def inner():
    return {name: make() for name, make in INNER.items()}


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_branches_that_never_restart_are_independent_runs(length, wide):
    with x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        w = start(dtype)
        tx = optax_ev3.ev3(
            inner(), score, loss_fn=loss, explore=explore.branches(length)
        )
        _, state = run(tx, 40, w)[-1]
        # The first explorer leads at first.
        leaders = {0, *optax_ev3.history(state)["adopted"].tolist()}
        assert length == 40 or len(leaders) > 1  # The lead did change.
        for name in INNER:
            end, inner_state = _alone_for_40(name, wide)
            found = state.explore.explorers[name].opt_state
            tolerance = 1e-10 if wide else 1e-4
            assert_close(state.explore.branches.ends[name], end, tolerance, tolerance)
            assert_close(found, inner_state, tolerance, tolerance)


@functools.cache
def _alone_for_40(name, wide):
    with x64(wide):
        w = start(jnp.float64 if wide else jnp.float32)
        return alone(INNER[name](), 40, w)


def paper_round(opts, opt_states, w, stable, first, length):
    """The round of the paper in plain Python: propose, optimize, decide."""
    held = data(1000 + first + length - 1)
    ends, states = [], []
    for name, tx in opts.items():
        end, new = alone(tx, length, w, first, opt_states[name])
        ends.append(end)
        states.append(new)
    candidates = [*ends, w, stable]
    values = np.stack([np.asarray(score(c, held), np.float64) for c in candidates])
    mean = values.mean(1)
    stderr = values.std(1, ddof=1) / np.sqrt(values.shape[1])
    chosen = int(np.argmax((mean - 0.5 * stderr)[: len(ends)]))
    finalists = [chosen, len(ends), len(ends) + 1]
    lower = mean - 1.96 * stderr
    adopted = finalists[int(np.argmax(lower[finalists]))]
    significant = bool(lower[adopted] > mean[-1] + 1.96 * stderr[-1])
    return candidates, mean, adopted, significant, dict(zip(opts, states, strict=True))


@pytest.mark.parametrize("length", [1, 2, 7])
def test_equals_the_papers_round_in_plain_python(length):
    opts = inner()
    tx = optax_ev3.ev3(
        opts,
        score,
        loss_fn=loss,
        explore=explore.rounds(length, gradients="own", restart_state="keep"),
        adapt=adapt.lower_bound(0.5, 1.96),
    )
    rounds = 6
    seen = run(tx, rounds * length)
    past = optax_ev3.history(seen[-1][1])
    w = stable = start()
    opt_states = {name: one.init(w) for name, one in opts.items()}
    for number in range(rounds):
        candidates, mean, adopted, significant, opt_states = paper_round(
            opts, opt_states, w, stable, number * length, length
        )
        w = candidates[adopted]
        stable = w if significant else stable
        visible, state = seen[(number + 1) * length - 1]
        assert past["adopted"][number] == adopted
        assert past["significant"][number] == significant
        np.testing.assert_allclose(past["mean"][number], mean, rtol=1e-4, atol=1e-5)
        assert_close(visible, w, 1e-4, 1e-5)
        assert_close(optax_ev3.stable_params(state), stable, 1e-4, 1e-5)
    assert len(set(past["adopted"].tolist())) > 1


def test_visible_parameters_follow_the_lead_branch():
    tx = optax_ev3.ev3(
        inner(), score, loss_fn=loss, explore=explore.rounds(4), adapt=always(1)
    )
    seen = run(tx, 8)
    # The first explorer leads the first round, the adopted one the second.
    for call, name in [(1, "adam"), (2, "adam"), (5, "sgd"), (6, "sgd")]:
        visible, state = seen[call]
        assert_close(visible, state.explore.branches.ends[name], 1e-6, 1e-7)
    assert int(seen[-1][1].ev3_round) == 2
    assert int(seen[-1][1].ev3_calls) == 8


def test_shared_gradients_are_the_callers():
    tx = optax_ev3.ev3(inner(), score, explore=explore.rounds(6), adapt=always(0))
    w = start()
    _, state = run(tx, 5, w)[-1]
    ends = dict.fromkeys(INNER, w)
    states = {name: make().init(w) for name, make in INNER.items()}
    for call in range(5):
        grads = jax.grad(loss)(ends["adam"], data(call))  # At the lead branch.
        for name, make in INNER.items():
            u, states[name] = make().update(grads, states[name], ends[name])
            ends[name] = optax.apply_updates(ends[name], u)
    for name in INNER:
        assert_close(state.explore.branches.ends[name], ends[name], 1e-4, 1e-5)


def by_length(lengths):
    """Calls at which rounds end."""
    return list(itertools.accumulate(lengths))


def significant_in(rounds):
    """A rule that adopts explorer 0 and finds it significant in the given rounds."""

    def decide(evidence, memory, key):
        del evidence, key
        hit = jnp.isin(memory, jnp.asarray(rounds))
        return adapt.Decision(jnp.int32(0), hit), memory + 1

    return adapt.Rule(lambda explorers: jnp.zeros([], jnp.int32), decide)


def test_length_grows_without_improvement_and_goes_back():
    tx = optax_ev3.ev3(
        inner(),
        score,
        explore=explore.rounds(2, growth=1.6, max_length=6),
        adapt=significant_in([4]),
    )
    # 2, 3.2, 5.12, 8.192 and 13.1 rounded, at most 6, until round 4 is significant.
    lengths = [2, 3, 5, 6, 6, 2, 3]
    seen = run(tx, sum(lengths))
    past = optax_ev3.history(seen[-1][1])
    assert past["length"].tolist() == lengths
    ends = by_length(lengths)
    for call, (_, state) in enumerate(seen, start=1):
        assert int(state.ev3_round) == sum(end <= call for end in ends)


def test_a_long_round_needs_no_bound_on_its_growth():
    for strategy in (explore.rounds(2**25), explore.branches(2**25)):
        tx = optax_ev3.ev3(inner(), score, loss_fn=loss, explore=strategy)
        assert int(tx.init(start()).explore.branches.length) == 2**25


RESTARTS = {
    "always": explore.rounds(10),
    "adopted": explore.branches(10, restart=explore.worse_than("adopted")),
    "start": explore.branches(10, restart=explore.worse_than("start")),
    "never": explore.branches(10, restart=explore.never()),
}


@pytest.mark.parametrize("restart", RESTARTS)
def test_which_branches_restart(restart):
    rates = {"good": 0.05, "near": 0.0501, "slow": 0.005, "bad": -0.1}
    inner = {name: optax.sgd(rate) for name, rate in rates.items()}
    tx = optax_ev3.ev3(
        inner,
        score,
        loss_fn=loss,
        explore=RESTARTS[restart],
        adapt=always(0),
    )
    visible, state = run(tx, 10)[-1]
    end = {k: alone(tx, 10, start())[0] for k, tx in inner.items()}
    expected = {
        "always": {},
        "adopted": {"near"},
        "start": {"near", "slow"},
        "never": {"near", "slow", "bad"},
    }[restart]
    for name in inner:
        where = end[name] if name in expected else visible
        assert_close(end_of(state, name), where, 1e-5, 1e-6)
    far = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), end["near"], visible)
    assert max(jax.tree.leaves(far)) > 1e-5  # The near one can be told from the good.


@pytest.mark.parametrize("policy", ["keep", "new", "copy"])
@pytest.mark.usefixtures("apart")
def test_inner_states_of_branches_that_restart(policy):
    inner = {
        "winner": optax.adam(0.03),
        "alike": optax.adam(0.01),
        "other": optax.sgd(0.05, momentum=0.9),
        "swept": optax_ev3.sweep(optax.adam, learning_rate=[0.1, 0.2]),
    }
    tx = optax_ev3.ev3(
        inner,
        score,
        loss_fn=loss,
        explore=explore.rounds(4, restart_state=policy),
        adapt=always(0),
    )
    visible, state = run(tx, 4)[-1]
    found = {name: one.opt_state for name, one in state.explore.explorers.items()}
    winner = alone(inner["winner"], 4, start())[1]
    alike = alone(inner["alike"], 4, start())[1]
    other = alone(inner["other"], 4, start())[1]
    assert_close(found["winner"], winner, 1e-4, 1e-5)
    if policy == "keep":
        assert_close(found["alike"], alike, 1e-4, 1e-5)
        assert_close(found["other"], other, 1e-4, 1e-5)
    elif policy == "new":
        assert_close(found["alike"], inner["alike"].init(visible))
        assert_close(found["other"], inner["other"].init(visible))
        zeros = jax.tree.map(jnp.zeros_like, found["swept"])
        assert_identical(found["swept"], zeros)
    else:
        assert_identical(found["alike"], found["winner"])
        assert_close(found["other"], other, 1e-4, 1e-5)
        for member in range(2):
            one = jax.tree.map(lambda x, i=member: x[i], found["swept"])
            assert_identical(one, found["winner"])


@pytest.mark.parametrize("gradients", ["own", "shared"])
def test_branch_that_becomes_non_finite_is_out_until_its_restart(gradients):
    def poison(updates, state, params=None):
        del params
        bad = (state == 1) | (state == 6)
        return jax.tree.map(lambda u: jnp.where(bad, jnp.nan, -0.05 * u), updates), (
            state + 1
        )

    bad = optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), poison)
    both = {"good": optax.sgd(0.05), "bad": bad}
    kwargs = {"loss_fn": loss, "adapt": adapt.greedy()}
    rounds = explore.rounds(4, gradients=gradients)
    tx = optax_ev3.ev3(both, score, explore=rounds, **kwargs)
    seen = run(tx, 8)
    alive = [s.explore.branches.alive.tolist() for _, s in seen]
    assert alive[:3] == [[1, 1], [1, 0], [1, 0]]
    state = seen[2][1]
    # It was made anew where the visible parameters were when it died.
    state = seen[1][1]
    assert int(state.explore.explorers["bad"].opt_state) == 0
    assert_identical(state.explore.branches.ends["bad"], seen[0][0])
    state = seen[2][1]
    finite = [np.isfinite(x).all() for _, s in seen for x in jax.tree.leaves(s[:-1])]
    assert all(finite)
    end, _ = alone(both["good"], 3, start())
    assert_close(state.explore.branches.ends["good"], end, 1e-4, 1e-5)
    past = optax_ev3.history(seen[3][1])
    assert np.isnan(past["mean"][0, 1]) and np.isfinite(past["mean"][0, 0])
    # Alive again after the restart, from the visible parameters.
    assert alive[3] == [1, 1]
    assert_identical(seen[3][1].explore.branches.ends["bad"], seen[3][0])


def test_member_of_a_sweep_that_overflows_is_out_alone():
    def factory(rate):
        return optax.chain(optax.sgd(rate), optax.scale(100.0))

    tx = optax_ev3.ev3(
        [optax_ev3.sweep(factory, rate=[5e-4, 1e38, 1e-3])],
        score,
        loss_fn=loss,
        explore=explore.rounds(4, averages=[optax_ev3.explore.trajectory_average()]),
    )
    seen = run(tx, 4)
    _, state = seen[2]
    assert state.explore.branches.alive.tolist() == [1, 0, 1]
    for member, rate in ((0, 0.05), (2, 0.1)):
        end, _ = alone(optax.sgd(rate), 3, start())
        (ends,) = state.explore.branches.ends.values()
        found = jax.tree.map(lambda x, i=member: x[i], ends)
        assert_close(found, end, 1e-4, 1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state[:-1]))
    past = optax_ev3.history(seen[3][1])
    assert np.isfinite(past["mean"][0]).tolist() == [1, 0, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("gradients", ["own", "shared"])
def test_steps_without_finite_gradients_are_not_taken(gradients):
    tx = optax_ev3.ev3(
        {**inner(), "swept": optax_ev3.sweep(optax.adam, learning_rate=[0.1, 0.2])},
        score,
        loss_fn=loss,
        explore=explore.rounds(4, gradients=gradients),
        adapt=adapt.greedy(),
    )
    w, state = run(tx, 2)[-1]
    batch = jax.tree.map(lambda x: x.at[3].set(jnp.nan), data(2))
    same, new = stepper(tx, loss)(w, state, batch, data(1002))
    assert_identical(same, w)
    for name, one in new.explore.explorers.items():
        assert_identical(one.opt_state, state.explore.explorers[name].opt_state)
        np.testing.assert_array_equal(one.skipped, np.ones(one.skipped.shape))
    walked, before = new.explore.branches, state.explore.branches
    assert_identical(walked._replace(step=before.step), before)
    # The others of the round count, and all branches are candidates at its end.
    last = run(tx, 20, w, first=3, state=new)[-1][1]
    assert np.isfinite(optax_ev3.history(last)["mean"]).all()


def test_lead_that_becomes_non_finite_stands_still():
    def poison(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: u * jnp.nan, updates), state

    bad = optax.GradientTransformation(lambda params: (), poison)
    tx = optax_ev3.ev3(
        {"bad": bad, "good": optax.sgd(0.05)}, score, explore=explore.rounds(3)
    )
    seen = run(tx, 6)
    assert_identical(seen[1][0], start())
    past = optax_ev3.history(seen[-1][1])
    assert past["adopted"].tolist()[0] == 1


def test_saved_and_restored_in_the_middle_of_a_round():
    kwargs = {"explore": explore.rounds(5), "adapt": adapt.greedy()}
    tx = optax_ev3.ev3(inner(), score, loss_fn=loss, **kwargs)
    whole = run(tx, 13)[-1]
    w, state = run(tx, 7)[-1]
    packed = jax.tree.map(np.asarray, (w, state))
    w, state = jax.tree.map(jnp.asarray, packed)
    assert_identical(run(tx, 6, w, first=7, state=state)[-1], whole)


def test_donated_buffers():
    everything = [
        explore.trajectory_average(),
        explore.branch_average(),
    ]
    rounds = explore.rounds(2, averages=everything)
    tx = optax_ev3.ev3(inner(), score, explore=rounds, adapt=adapt.greedy())

    def step(w, state, batch):
        updates, state = tx.update(jax.grad(loss)(w, batch), state, w, held=batch)
        return optax.apply_updates(w, updates), state

    plain, donating = jax.jit(step), jax.jit(step, donate_argnums=(0, 1))
    kept, donated = ((start(), tx.init(start())) for _ in range(2))
    for call in range(5):
        kept = plain(*kept, data(call))
        donated = donating(*donated, data(call))
    assert_identical(donated, kept)


def trained(gradients, mode):
    """A function of the scale of the first parameters, and its values there."""
    swept = optax_ev3.sweep(optax.adam, learning_rate=[0.1, 0.2])
    tx = optax_ev3.ev3(
        {"clipped": INNER["clipped"](), "swept": swept},
        score,
        loss_fn=loss,
        explore=explore.rounds(
            2,
            gradients=gradients,
            averages=[
                optax_ev3.explore.trajectory_average(),
                optax_ev3.explore.branch_average(),
            ],
        ),
        adapt=adapt.greedy(),
        assess_mode=mode,
    )

    def step(carry, number):
        del number
        w, state = carry
        grads = jax.grad(loss)(w, data(0))
        updates, state = tx.update(grads, state, w, batch=data(0), held=data(1))
        return (optax.apply_updates(w, updates), state), None

    def train(scale):
        w = jax.tree.map(lambda x: x * scale, start())
        carry = w, tx.init(w)
        return jax.lax.scan(step, carry, jnp.arange(11))[0]

    return train, jnp.array([1.0, 0.5])


@pytest.mark.parametrize(
    ("gradients", "mode"),
    [("own", "unroll"), ("shared", "vmap"), ("own", "map")],
)
def test_types_are_stable_under_scan_and_vmap(gradients, mode):
    train, scales = trained(gradients, mode)
    many = jax.eval_shape(jax.vmap(train), scales)
    one = jax.eval_shape(train, scales[0])
    assert_same_types(
        jax.eval_shape(lambda x: jax.tree.map(lambda x: x[0], x), many), one
    )


def test_trains_under_scan_and_vmap():
    train, scales = trained("own", "unroll")
    many = jax.jit(jax.vmap(train))(scales)
    one = jax.jit(train)
    for i, scale in enumerate(scales):
        w, state = jax.tree.map(lambda x, i=i: x[i], many)
        expected, other = one(scale)
        assert_close(w, expected, 1e-4, 1e-5)
        assert_close(state.explore.branches, other.explore.branches, 1e-4, 1e-5)


def test_dtypes_of_parameters_are_kept():
    w = jax.tree.map(lambda x: x.astype(jnp.bfloat16), start())
    tx = optax_ev3.ev3(
        inner(),
        lambda p, held: score(p, held).astype(jnp.float32),
        loss_fn=loss,
        explore=explore.rounds(2, averages=[optax_ev3.explore.trajectory_average()]),
        adapt=adapt.greedy(),
    )
    state = tx.init(w)

    def step(w, state):
        grads = jax.grad(loss)(w, data(0, jnp.bfloat16))
        extras = {"batch": data(0, jnp.bfloat16), "held": data(1, jnp.bfloat16)}
        updates, new = tx.update(grads, state, w, **extras)
        return updates, new

    updates, new = jax.jit(step)(w, state)
    assert_same_types(updates, w)
    assert_same_types(new, state)
