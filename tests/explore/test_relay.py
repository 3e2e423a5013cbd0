"""A relay against the same by hand, and on its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_finite, assert_identical
from helpers.relay import ByHand, assess, gradient
from helpers.trajectories import data, loss, start

import optax_ev3
from optax_ev3 import explore

INNER = {
    "adam": optax.adam(0.03),
    "sgd": optax.sgd(0.05, momentum=0.9),
    "slow": optax.sgd(0.01, momentum=0.5),
}
RACING = explore.Racing(1, 2)


def relay(inner=None, length=4, racing=RACING, **kwargs):
    averages = kwargs.pop("averages", None)
    strategy = explore.relay(length, racing=racing, averages=averages)
    settings = {"assess_fn": assess, "explore": strategy}
    return optax_ev3.ev3(INNER if inner is None else inner, **{**settings, **kwargs})


@functools.lru_cache(maxsize=4)
def stepper(tx, changed=None):
    """A call with a batch; its gradients are not finite where the caller says so."""

    def step(w, state, batch, poison):
        grads = jax.tree.map(lambda g: g + poison, jax.grad(loss)(w, batch))
        updates, state = tx.update(grads, state, w)
        w = optax.apply_updates(w, updates)
        return (w if changed is None else changed(w)), state

    return jax.jit(step)


def run(tx, calls, changed=None, poisoned=(), w=None, state=None, first=0):
    """Visible parameters and states after each call."""
    w = start() if w is None else w
    state = tx.init(w) if state is None else state
    step, seen = stepper(tx, changed), []
    for call in range(first, first + calls):
        poison = jnp.float32(jnp.nan if call in poisoned else 0.0)
        w, state = step(w, state, data(call), poison)
        seen.append((w, state))
    return seen


def ends(state):
    """Parameters and inner states of all branches."""
    found = state.explore
    return [
        (found.branches.ends[name], found.explorers[name].opt_state)
        for name in found.branches.ends
    ]


def check(seen, hand, tolerance=2e-4):
    """All that happened is what happens by hand."""
    best = []
    for w, state in seen:
        assert_close(w, hand.call(), tolerance, tolerance)
        best.append((optax_ev3.best_params(state), hand.best))
    for one, other in best[:: len(best) // 20 + 1] + best[-1:]:
        assert_close(one, other, tolerance, tolerance)
    state = seen[-1][1]
    past = optax_ev3.history(state)
    count = len(past["length"])
    assert past["length"].tolist() == hand.lengths[-count:]
    own = np.array(hand.owners)
    for number, mean in zip(past["round"], past["mean"], strict=True):
        # Of each kind of candidate, only that of the explorer at work.
        kinds = mean[:-2].reshape(3, -1)
        at_work = np.arange(kinds.shape[1]) == own[number]
        assert np.isnan(kinds[:, ~at_work]).all()
        np.testing.assert_allclose(
            [*kinds[:, at_work][:, 0], mean[-2]], hand.means[number], 1e-3, 1e-4
        )
    for (w, inner), (means, one) in zip(
        ends(state),
        zip(state.explore.branches.means.values(), hand.branches, strict=True),
        strict=True,
    ):
        if one is not hand.branches[hand.who]:
            assert_close(w, one.w, tolerance, tolerance)
        assert_close(inner, one.state, 10 * tolerance, 10 * tolerance)
        assert_close(means, ((), one.branch), tolerance, tolerance)
    turn = hand.branches[hand.who].turn
    assert_close(state.explore.branches.turn_means, (turn, ()), tolerance, tolerance)


@pytest.mark.parametrize("racing", [None, RACING], ids=["alone", "race"])
def test_equals_the_relay_by_hand(racing):
    hand = ByHand(INNER.values(), 4, racing)
    check(run(relay(racing=racing), 120), hand)
    if racing is None:
        # After the first turns the leader is the optimizer alone.
        first = 3 * (1 + 2) + 2 * 4
        assert set(hand.owners[len(hand.owners) - (120 - first) // 4 :]) == {
            hand.plain.leader
        }
    else:
        assert len(set(hand.owners[9:])) > 1
        assert hand.joined == 1


def test_batches_that_are_not_finite_end_a_turn_and_no_branch():
    """Twice in the middle of turns, and at the start of some, once three in a row."""
    poisoned = (0, 20, 50, 51, 52, 90)
    hand = ByHand(INNER.values(), 6, RACING, poisoned=poisoned)
    seen = run(relay(length=6), 120, poisoned=poisoned)
    check(seen, hand)
    assert_finite(seen[-1])
    assert min(hand.lengths[9:]) == 1 and 2 in hand.lengths[9:]
    figures = optax_ev3.summary(seen[-1][1])
    skipped = [int(figures[f"ev3/skipped_steps/{name}"]) for name in INNER]
    assert sum(skipped) == len(poisoned)


def test_one_explorer_is_that_optimizer_alone():
    """At every call, with the averages and the best parameters by hand."""
    tx, w = optax.adam(0.03), start()
    inner_state, best, found, past = tx.init(w), w, [], []
    averages = [explore.trajectory_average(), explore.branch_average()]
    seen = run(
        optax_ev3.ev3(
            {"adam": tx}, assess, explore=explore.relay(10, averages=averages)
        ),
        34,
    )
    for call, (visible, state) in enumerate(seen):
        updates, inner_state = tx.update(gradient(w, data(call)), inner_state, w)
        w = optax.apply_updates(w, updates)
        found.append(w)
        assert_close(visible, w)
        assert_close(state.explore.explorers["adam"].opt_state, inner_state)
        if call % 5 == 4:
            # Of five steps, one enters the averages: here of ten, the last of a half.
            turn, ever = found[call // 10 * 10 + 4 :: 5], found[4::5]
            expected = [mean_of(turn), mean_of(ever)]
            walked = state.explore.branches
            assert_close(walked.means["adam"], ((), expected[1]))
            if call % 10 == 4:  # At a turn's end that of the next one begins.
                assert_close(walked.turn_means, (expected[0], ()))
        if call % 10 == 9:
            past += [w, *expected]
            best = max([best, *past], key=lambda p: np.mean(assess(p)))
        assert_close(optax_ev3.best_params(state), best)
    assert optax_ev3.history(seen[-1][1])["length"].tolist() == [10] * 3


def mean_of(trees):
    return jax.tree.map(lambda *x: np.mean(x, axis=0), *trees)


def test_gradients_are_those_at_the_visible_parameters():
    """One a call, and no loss: in its turn an optimizer gets what the caller gave."""

    def spy(tx):
        """Keeps what it was told last, and how often it was asked."""

        def init(params):
            return tx.init(params), params, params, jnp.int32(0)

        def update(grads, state, params):
            updates, inner = tx.update(grads, state[0], params)
            return updates, (inner, grads, params, state[-1] + 1)

        return optax.GradientTransformation(init, update)

    tx, w = relay([spy(one) for one in INNER.values()], 2), start()
    state, update = tx.init(w), jax.jit(tx.update)
    for call in range(12):
        lead, grads = int(state.explore.branches.lead), gradient(w, data(call))
        before = [one.opt_state for one in state.explore.explorers.values()]
        updates, state = update(grads, state, w)
        after = [one.opt_state for one in state.explore.explorers.values()]
        for i in range(3):
            if i == lead:
                _, got, at, count = after[i]
                assert_identical((got, at), (grads, w))
                assert int(count) == int(before[i][-1]) + 1
            else:
                assert_identical(after[i], before[i])
        w = optax.apply_updates(w, updates)


def test_a_bad_batch_at_the_start_of_a_turn_leaves_the_best_branch_as_it_is():
    tx, w, poisoned = optax.sgd(0.02, momentum=0.9), start(), (4, 9)
    around, inner_state = relay([tx], averages=()), tx.init(w)
    seen, state, step = [], around.init(w), stepper(around)
    visible, batch = w, data(0)
    for call in range(13):
        poison = jnp.float32(jnp.nan if call in poisoned else 0)
        visible, state = step(visible, state, batch, poison)
        if call not in poisoned:
            updates, inner_state = tx.update(gradient(w, batch), inner_state, w)
            w = optax.apply_updates(w, updates)
        seen.append(mean_score(w))
        assert_close(visible, w)
        assert_close(state.explore.explorers["explorer_0"].opt_state, inner_state)
    # It was the best when its gradients came to nothing.
    assert seen[4] == max(seen[:5]) and seen[9] == max(seen[:10])
    assert optax_ev3.history(state)["length"].tolist() == [4, 1, 4, 1]


def mean_score(w):
    return float(np.mean(assess(w)))


# Harmful explorers.

HARMFUL = {
    "ascent": optax.sgd(-0.1),
    "huge": optax.sgd(1000.0),
    "nan": optax.sgd(jnp.nan),
}
USEFUL = {"adam": optax.adam(0.03), "sgd": optax.sgd(0.05)}


def scanned(tx, calls, batch=None):
    """The end; by call the visible parameters, who was at work, steps, the harmful."""
    batches = [data(call) if batch is None else batch for call in range(calls)]
    batches = jax.tree.map(lambda *x: jnp.stack(x), *batches)

    @jax.jit
    def go(w, state):
        def step(carry, batch):
            w, state = carry
            walked = state.explore.branches
            updates, state = tx.update(jax.grad(loss)(w, batch), state, w)
            w = optax.apply_updates(w, updates)
            harmful = state.explore.racing.harmful
            return (w, state), (w, walked.lead, walked.step, harmful)

        return jax.lax.scan(step, (w, state), batches)

    (w, state), seen = go(start(), tx.init(start()))
    return w, state, jax.tree.map(np.asarray, seen)


def test_harmful_explorers_do_no_lasting_harm():
    calls, length = 300, 8
    with_all = relay({**HARMFUL, **USEFUL}, length)
    w, state, (visible, lead, _, harmful) = scanned(with_all, calls)
    assert_finite(visible)
    # No turn proves that the ascent falls: it is tried again, ever more rarely.
    assert harmful[-1].tolist() == [0, 1, 1, 0, 0]
    # Once that is known they have no turn.
    assert (np.take_along_axis(harmful[:-1], lead[1:, None], 1) == 0).all()
    ascent, huge, nan, *_ = np.bincount(lead, minlength=5)
    assert ascent <= 1 + 2 + 4 + 2 * length and huge <= 1 + 2
    # What is not finite is seen at once.
    assert nan == 1
    _, other, _ = scanned(relay(USEFUL, length), calls)
    best = [np.mean(assess(optax_ev3.best_params(x))) for x in (state, other)]
    first = np.mean(assess(start()))
    assert best[1] - best[0] < 0.02 * (best[1] - first)
    assert best[1] - np.mean(assess(w)) < 0.05 * (best[1] - first)


def test_a_constant_score_leaves_the_first_one_in_the_lead():
    first, batch, calls = optax.adam(0.03), data(0), 400
    tx = relay({"adam": first, **HARMFUL}, 8, assess_fn=lambda w: jnp.zeros([]))
    w, state, (visible, lead, step, _) = scanned(tx, calls, batch)
    assert_finite(visible)
    # From where one of the others is, it takes two calls to get back to its branch.
    assert 0 < (step < 0).sum() < 10
    steps = int(((lead == 0) & (step >= 0)).sum())
    assert steps >= calls - 4 * (1 + 2 + 4 + 8) and (lead[-300:] == 0).all()
    # Its branch is the optimizer alone, so many steps later.
    alone, inner_state, values = start(), first.init(start()), []
    for _ in range(calls):
        updates, inner_state = update(first)(gradient(alone, batch), inner_state, alone)
        alone = optax.apply_updates(alone, updates)
        values.append(alone)
    assert_close(w, values[steps - 1], 1e-3, 1e-4)
    end, best, expected = (
        float(loss(x, batch)) for x in (w, optax_ev3.best_params(state), alone)
    )
    tolerance = 0.01 * float(loss(start(), batch))
    assert end < expected + tolerance and best < expected + tolerance


@functools.cache
def update(tx):
    return jax.jit(tx.update)


def test_an_explorer_that_leaves_the_finite_numbers_ends_its_turn_and_begins_anew():
    """In its third step; its branch goes on from the best parameters."""

    def breaks(updates, count, params):
        del params
        factor = jnp.where(count == 2, jnp.nan, -0.05)
        return jax.tree.map(lambda g: factor * g, updates), count + 1

    inner = {
        "breaks": optax.GradientTransformation(lambda _: jnp.int32(0), breaks),
        "sgd": optax.sgd(0.05),
    }
    seen = run(relay(inner, 5), 12)
    lead = [int(state.explore.branches.lead) for _, state in seen]
    # Who is next: turns are of one call, of two, and of four, of which the last breaks.
    assert lead == [1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    for call, skipped in [(3, 1), (8, 2)]:
        w, state = seen[call]
        assert_finite((w, state))
        branches, one = state.explore.branches, state.explore.explorers["breaks"]
        assert int(branches.age[0]) == int(one.opt_state) == 0
        assert_close(branches.ends["breaks"], optax_ev3.best_params(state))
        assert int(optax_ev3.summary(state)["ev3/skipped_steps/breaks"]) == skipped
    # It was adopted before it broke: no reason to give it up.
    assert state.explore.racing.harmful.tolist() == [0, 0]
    # Rounds without a candidate are not recorded.
    past = optax_ev3.history(seen[-1][1])
    assert past["length"].tolist() == [1, 1, 2]
    assert int(optax_ev3.summary(seen[-1][1])["ev3/skipped"]) == 2


def test_a_leader_without_gradients_loses_the_lead():
    """The square root has none below zero, where one step leads, and scores well."""

    def own(w):
        return jnp.square(w + 1) / 2

    inner = {
        "stuck": optax.sgd(1.0),
        "slow": optax_ev3.explorer(optax.sgd(0.05), own),
    }
    strategy = explore.relay(4, averages=[])
    tx = optax_ev3.ev3(inner, lambda w: -own(w), explore=strategy)

    @jax.jit
    def go(w, state):
        def step(carry, _):
            w, state = carry
            lead = state.explore.branches.lead
            updates, state = tx.update(jax.grad(jnp.sqrt)(w), state, w)
            return (optax.apply_updates(w, updates), state), (lead, w)

        return jax.lax.scan(step, (w, state), length=120)

    w = jnp.float32(0.2)
    (_, state), (lead, seen) = go(w, tx.init(w))
    assert_finite(seen)
    # It led to the best by far; from there the other one goes on.
    assert float(seen[2]) == pytest.approx(0.2 - 0.5 / 0.2**0.5)
    assert np.isnan(jax.grad(jnp.sqrt)(seen[2]))
    assert int(state.explore.racing.leader) == 1
    # At a standstill it is challenged after each turn, of which this one wastes a call.
    assert (np.asarray(lead)[60:] == 1).mean() >= 0.75
    assert float(optax_ev3.best_params(state)) == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize(("count", "calls"), [(2, 62), (3, 143), (8, 448)])
def test_how_long_first_turns_take(count, calls):
    """What the documentation says of them."""
    inner = {f"sgd {i}": optax.sgd(0.01 * (i + 1)) for i in range(count)}
    tx = optax_ev3.ev3(inner, lambda w: -jnp.square(w), explore=explore.relay())

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(w / 10, state, w)
        return (w + updates, state), state.explore.racing.cycle

    start = jnp.ones([]), tx.init(jnp.ones([]))
    cycle = jax.jit(lambda c: jax.lax.scan(step, c, length=500))(start)[1]
    # The cycles of first turns are all over from this call on.
    assert int(jnp.argmax(cycle == cycle[-1])) + 1 == calls
