"""A relay within other code: loops, wrappers, devices, assessments; and its errors."""

import functools
import pickle

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from helpers import (
    TREES,
    assert_close,
    assert_finite,
    assert_identical,
    assert_same_types,
    lenient,
    says,
    traced,
    transformation,
    x64,
)
from helpers.meshes import mesh_of
from helpers.relay import ByHand, assess, gradient
from helpers.trajectories import data, end_of, loss, score, start
from jax.sharding import PartitionSpec

import optax_ev3
from optax_ev3 import adapt, explore, metrics
from optax_ev3._src.assess.stage import spread

RACING = explore.Racing(1, 2)
LENGTH = 4


def inner():
    return {"adam": optax.adam(0.03), "sgd": optax.sgd(0.05, momentum=0.9)}


def relay(given=None, length=LENGTH, *, assess_fn=assess, **kwargs):
    settings = {k: kwargs.pop(k) for k in ("racing", "schedule") if k in kwargs}
    strategy = explore.relay(length, **settings)
    given = inner() if given is None else given
    return optax_ev3.ev3(given, assess_fn, explore=strategy, **kwargs)


def plain_step(tx, changed=lambda w: w):
    def step(w, state, batch):
        updates, state = tx.update(jax.grad(loss)(w, batch), state, w)
        return changed(optax.apply_updates(w, updates)), state

    return step


def run(tx, calls, changed=lambda w: w, step=None, w=None, state=None, first=0):
    """Visible parameters and states after each call."""
    w = start() if w is None else w
    state = tx.init(w) if state is None else state
    step = jax.jit(plain_step(tx, changed)) if step is None else step
    seen = []
    for call in range(first, first + calls):
        w, state = step(w, state, data(call))
        seen.append((w, state))
    return seen


CALLS = 22


@functools.cache
def reference():
    """What all ways to run it must agree with, and the program."""
    tx = relay()
    step, traces = traced(plain_step(tx))
    seen = run(tx, CALLS, step=step)
    assert len(traces) == 1
    return tx, step, seen


# What the caller does to the parameters.


def decayed_into_a_ball(w):
    norm = optax.tree.norm(w)
    return jax.tree.map(lambda x: 0.98 * x * jnp.minimum(1, 1.2 / norm), w)


def test_parameters_that_the_caller_changes_are_where_branches_go_on():
    hand = ByHand(inner().values(), LENGTH, RACING, changed=decayed_into_a_ball)
    for w, state in run(relay(), 60, decayed_into_a_ball):
        assert_close(w, hand.call(), 3e-4, 3e-4)
        assert_close(optax_ev3.best_params(state), hand.best, 3e-4, 3e-4)
    assert len(set(hand.owners[6:])) > 1


# Ways to run it.


def by_scan(tx, w, state, batches):
    def one(carry, batch):
        carry = plain_step(tx)(*carry, batch)
        return carry, carry

    batches = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    seen = jax.jit(lambda *carry: jax.lax.scan(one, carry, batches)[1])(w, state)
    return [jax.tree.map(lambda x, i=i: x[i], seen) for i in range(CALLS)]


def by_vmap(tx, w, state, batches):
    """Two runs at once, the other one from elsewhere."""
    other = jax.tree.map(lambda x: -x, w)
    w, state = (
        jax.tree.map(lambda x, y: jnp.stack([x, y]), *pair)
        for pair in [(w, other), (state, tx.init(other))]
    )
    step, seen = jax.jit(jax.vmap(plain_step(tx), (0, 0, None))), []
    for batch in batches:
        w, state = step(w, state, batch)
        seen.append(jax.tree.map(lambda x: x[0], (w, state)))
    return seen


def ahead_of_time(tx, w, state, batches):
    lowered = jax.jit(plain_step(tx), donate_argnums=(0, 1)).lower(w, state, batches[0])
    step, seen = lowered.compile(), []
    w = jax.tree.map(jnp.copy, w)
    for batch in batches:
        w, state = step(w, state, batch)  # What was given away is not used again.
        seen.append(jax.tree.map(jnp.copy, (w, state)))
    return seen


def over_devices(tx, w, state, batches):
    """Gradients and held-out examples spread over eight."""
    del tx
    mesh, spec = jax.sharding.Mesh(np.array(jax.devices()[:8]), "i"), PartitionSpec
    tx = relay(assess_fn=score, axis_name="i")

    def step(w, state, batch, held):
        grads = jax.grad(lambda w: jax.lax.pmean(loss(w, batch), "i"))(w)
        grads = jax.lax.pmean(grads, "i")
        updates, state = tx.update(grads, state, w, held=held)
        return optax.apply_updates(w, updates), state

    specs = {"in_specs": (spec(), spec(), spec("i"), spec("i"))}
    step = jax.jit(jax.shard_map(step, mesh=mesh, out_specs=spec(), **specs))
    seen = []
    for batch in batches:
        w, state = step(w, state, batch, data(999))
        seen.append((w, state))
    return seen


@pytest.mark.parametrize("way", [by_scan, by_vmap, ahead_of_time, over_devices])
def test_all_ways_to_run_it_agree(way):
    if way is over_devices and not hasattr(jax, "shard_map"):
        pytest.skip("this release has jax.shard_map elsewhere")
    tx, _, expected = reference()
    seen = way(tx, start(), tx.init(start()), [data(call) for call in range(CALLS)])
    for (w, state), (other, other_state) in zip(seen, expected, strict=True):
        assert_close(w, other, 1e-4, 1e-5)
        assert_same_types(state, other_state)
    state, other = seen[-1][1], expected[-1][1]
    assert_close(optax_ev3.best_params(state), optax_ev3.best_params(other), 1e-3, 1e-4)
    assert int(state.ev3_round) == int(other.ev3_round)


def test_states_have_one_type_and_runs_the_same_bits():
    tx, step, seen = reference()
    state = tx.init(start())
    for now in (seen[0], seen[-1]):
        assert_same_types(now, (start(), state))
    assert_same_types(jax.jit(tx.init)(start()), state)
    assert_identical(run(tx, CALLS, step=step)[-1], seen[-1])


@pytest.mark.parametrize(
    ("tree", "wide"),
    [("float16", False), ("float32", True), ("float64", True), ("mixed", False)]
    + [(tree, False) for tree in ("none", "zero_size", "scalar", "nested")],
)
def test_states_of_any_parameters_have_one_type(tree, wide):
    with x64(wide):
        w = TREES[tree]()
        tx = transformation("greedy", explore=explore.relay(2))
        state = tx.init(w)
        new = jax.eval_shape(helpers.stepper(tx), w, state, helpers.weights())
        assert_same_types(new, (w, state))


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="this release has no explicit sharding"
)
def test_explicit_sharding_is_kept():
    mesh = mesh_of({"x": 8}, "Explicit")
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "x"))
        w = jax.device_put(jnp.zeros((2, 8), jnp.float16), sharding)
        tx = relay(assess_fn=lambda w: -(w**2).sum())
        state = tx.init(w)
        typeof = functools.partial(jax.tree.map, jax.typeof)
        assert typeof(jax.jit(tx.update)(w, state, w)) == typeof((w, state))


@pytest.mark.parametrize("call", [4, 8, 11])
def test_restored_in_the_middle_of_a_turn_it_goes_on_bit_for_bit(call):
    tx, step, seen = reference()
    assert int(seen[call][1].explore.branches.step) > 0
    w, state = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, seen[call])))
    rest = run(tx, CALLS - call - 1, step=step, w=w, state=state, first=call + 1)
    assert_identical(
        jax.tree.map(jnp.asarray, rest[-1]), jax.tree.map(jnp.asarray, seen[-1])
    )
    best = optax_ev3.best_params(state)
    assert_identical(
        jax.tree.map(np.asarray, best),
        jax.tree.map(np.asarray, optax_ev3.best_params(seen[call][1])),
    )


def test_branches_stay_where_the_parameters_are():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), "x")
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    w = {"w": jax.device_put(start()["w"], spread), "v": start()["v"]}
    w["v"] = jax.device_put(w["v"], whole)
    tx, step, expected = reference()
    seen = run(tx, 9, step=step, w=w, state=jax.jit(tx.init)(w))
    assert_close(seen[-1][0], expected[8][0], 1e-4, 1e-5)
    state = seen[-1][1]
    branches = state.explore.branches
    for tree in (branches.start, *branches.ends.values(), seen[-1][0], state.stable):
        assert tree["w"].sharding.is_equivalent_to(spread, 2)


# Wrappers and loops.


def test_multi_steps_around_it(k=3):
    """Its calls are those of every k-th gradient, with the mean of k."""
    tx, _, _ = reference()
    seen = run(optax.MultiSteps(tx, k), 10 * k)
    hand, state = start(), tx.init(start())
    update = jax.jit(tx.update)
    for call in range(10):
        grads = [gradient(hand, data(k * call + i)) for i in range(k)]
        mean = jax.tree.map(lambda *g: np.mean(g, axis=0), *grads)
        updates, state = update(mean, state, hand)
        hand = optax.apply_updates(hand, updates)
        assert_close(seen[k * call + k - 1][0], hand, 1e-4, 1e-5)
    best = optax_ev3.best_params(seen[-1][1])
    assert_close(best, optax_ev3.best_params(state), 1e-3, 1e-4)


def test_loops_that_do_not_pass_parameters():
    tx, _, expected = reference()
    kept = optax_ev3.keep_params(tx)
    state, w = kept.init(start()), start()
    update = jax.jit(kept.update)
    for call in range(8):
        updates, state = update(gradient(w, data(call)), state)
        w = optax.apply_updates(w, updates)
        assert_close(w, expected[call][0], 1e-4, 1e-5)
    best = optax_ev3.best_params(expected[7][1])
    assert_close(optax_ev3.best_params(state), best, 1e-4, 1e-5)


def test_train_state_and_chains_unchanged():
    tx, _, expected = reference()
    chained = optax.chain(optax.clip(1e9), tx)
    with lenient():
        state = train_state.TrainState.create(apply_fn=None, params=start(), tx=chained)

        @jax.jit
        def step(state, batch):
            return state.apply_gradients(grads=jax.grad(loss)(state.params, batch))

        for call in range(8):
            state = step(state, data(call))
            w, other = expected[call]
            assert_close(state.params, w, 1e-4, 1e-5)
            best = optax_ev3.best_params(state)
            assert_close(best, optax_ev3.best_params(other), 1e-4, 1e-5)


# Explorers.


def test_a_sweep_equals_its_members_one_by_one(apart):
    rates = [0.02, 0.05, float("nan")]  # One of them harmful: it is so alone.
    swept = {
        "adam": optax.adam(0.02),
        "sgd": optax_ev3.sweep(optax.sgd, learning_rate=rates),
    }
    single = {
        "adam": optax.adam(0.02),
        **{f"sgd/learning_rate_{rate}": optax.sgd(rate) for rate in rates},
    }
    (w, state), (other, expected) = (run(relay(x), 60)[-1] for x in (swept, single))
    assert_close(w, other, 1e-4, 1e-5)
    assert state.explore.racing.harmful.tolist() == [0, 0, 0, 1]
    past, theirs = map(optax_ev3.history, (state, expected))
    assert past["candidates"].tolist() == theirs["candidates"].tolist()
    np.testing.assert_array_equal(past["adopted"], theirs["adopted"])
    np.testing.assert_allclose(past["mean"], theirs["mean"], 1e-3, 1e-4)
    for name in state.explore.explorers["sgd"].positions:
        assert_close(end_of(state, name), end_of(expected, name), 1e-4, 1e-5)


def test_losses_and_auxiliary_outputs_of_their_own():
    """Gradients of the caller go to one, a loss of its own to the other; by hand."""

    def other(params):
        return 0.5 * jnp.square(params["w"] - 3).sum() + params["mean"].sum(), 7.0

    def merge(params, aux):
        return {**params, "mean": 0.5 * params["mean"] + aux}

    given = {
        "caller": optax_ev3.explorer(optax.sgd(0.1), merge_fn=merge),
        "own": optax_ev3.explorer(optax.sgd(0.2), other, merge_fn=merge),
    }
    tx = relay(given, 3, assess_fn=lambda p: -jnp.square(p["w"] - 3), racing=None)
    w = {"w": jnp.zeros([2]), "mean": jnp.zeros([])}
    state, update = tx.init(w), jax.jit(tx.update)
    branches = {"caller": (0.0, 0.0), "own": (0.0, 0.0)}
    # Turns of 1 and 2 calls, then those of the better one, which is not the first.
    for name in ["caller", "own", *["caller"] * 2, *["own"] * 2, *["own"] * 3]:
        at, mean = branches[name]
        assert_close(w, {"w": jnp.full([2], at), "mean": jnp.float32(mean)})
        grads = {"w": jnp.full([2], -1.0), "mean": jnp.zeros([])}
        updates, state = update(grads, state, w, aux=jnp.float32(2.0))
        w = optax.apply_updates(w, updates)
        if name == "caller":
            branches[name] = at + 0.1, 0.5 * mean + 2.0
        else:
            branches[name] = at + 0.2 * (3 - at), 0.5 * (mean - 0.2) + 7.0
    assert int(state.explore.racing.leader) == 1


def test_members_that_evolve_are_not_for_a_relay():
    space = {"learning_rate": optax_ev3.log_uniform(1e-3, 1.0)}
    group = optax_ev3.evolve(optax.sgd, space, population=2)
    with says(ValueError, "explore.relay", "explore.branches", "'group'", "sweep"):
        relay({"adam": optax.adam(0.1), "group": group})


@pytest.mark.parametrize(
    ("error", "kwargs", "parts"),
    [
        (TypeError, {"racing": 3}, ["racing", "explore.Racing", "3", "int"]),
        (ValueError, {"length": 0}, ["length", "0"]),
        (TypeError, {"length": 2.5}, ["length", "2.5"]),
        (TypeError, {"length": True}, ["length"]),
        (TypeError, {"averages": explore.branch_average()}, ["averages", "sequence"]),
        (TypeError, {"averages": ["mean"]}, ["averages", "'mean'"]),
        (ValueError, {"averages": [explore.branch_average()] * 2}, ["more than once"]),
        (TypeError, {"schedule": 0.1}, ["schedule", "linear_schedule", "0.1"]),
    ],
)
def test_arguments_that_make_no_sense(error, kwargs, parts):
    with says(error, *parts):
        explore.relay(**kwargs)


def test_the_schedule_of_branches_is_checked_too():
    with says(TypeError, "schedule", "linear_schedule", "[1]"):
        explore.branches(2, schedule=[1])


# Assessments and rules.


@pytest.mark.parametrize("count", [2, 6])
def test_only_those_who_took_part_are_assessed(count):
    """The explorer, two averages, current and stable, whoever else there is."""
    times = []

    def counted(w):
        jax.debug.callback(lambda: times.append(1))
        return -jnp.square(w)

    tx = relay([optax.sgd(0.1)] * count, assess_fn=counted)
    w = jnp.ones([])
    jax.jit(tx.update)(w, tx.init(w), w)
    jax.effects_barrier()
    assert len(times) == 5


def test_scores_of_some_candidates_take_their_places():
    found = spread({"a": jnp.arange(6.0).reshape(2, 3)}, jnp.asarray([3, 1]), 5)
    expected = np.zeros([5, 3])
    expected[3], expected[1] = [0, 1, 2], [3, 4, 5]
    np.testing.assert_array_equal(found["a"], expected)


def aggregate(w):
    x, y = data(999)
    predicted = jnp.tanh(x @ w["w"]) @ w["v"]

    def mean(outputs, weights):
        return -((outputs[0] - outputs[1]) ** 2 * weights).sum() / weights.sum()

    return metrics.AggregateMetric(mean, (predicted, y), samples=16)


def mapping(w):
    return {"main": assess(w), "norm": -jnp.full([16], optax.tree.norm(w))}


def chunk(w, x, y):
    return score(w, (x, y))


ASSESSMENTS = {
    "aggregate": {"assess_fn": aggregate},
    "mean": {"assess_fn": lambda w: assess(w).mean()},
    "map": {"assess_mode": "map"},
    "vmap": {"assess_mode": "vmap"},
}


@pytest.mark.parametrize("kind", ASSESSMENTS)
def test_assessments_agree(kind):
    """The same means, and so the same decisions as long as no error counts."""
    calls = 2 * (1 + 2) + 3 * LENGTH
    tx = relay(racing=None, **ASSESSMENTS[kind])
    w, state = run(tx, calls)[-1]
    expected_w, expected = run_alone(calls)
    assert_close(w, expected_w, 1e-4, 1e-5)
    past, theirs = map(optax_ev3.history, (state, expected))
    np.testing.assert_array_equal(past["adopted"], theirs["adopted"])
    # But for the stable parameters, which are replaced where an error is small.
    np.testing.assert_allclose(past["mean"][:, :-1], theirs["mean"][:, :-1], 1e-4, 1e-5)
    best = map(optax_ev3.best_params, (state, expected))
    assert_close(*best, 1e-4, 1e-5)


@functools.cache
def run_alone(calls):
    return run(relay(racing=None), calls)[-1]


RULES = {
    "guarded": adapt.guarded(adapt.greedy(), adapt.ladder()),
    "constrained": adapt.constrained("main", {"norm": 0.5}),
}


@pytest.mark.parametrize("kind", RULES)
def test_rules_and_mappings_of_scores(kind):
    def by_name(w):
        found = mapping(w)
        return found if kind == "constrained" else {"main": found["main"]}

    state = run(relay(assess_fn=by_name, adapt=RULES[kind]), 30)[-1][1]
    past = optax_ev3.history(state)
    assert_finite(state)
    if kind == "constrained":
        at_work = ~np.isnan(past["mean"])
        assert (np.isfinite(past["mean/norm"]) == at_work).all()
    assert mean_score(optax_ev3.best_params(state)) > mean_score(start())
    assert len(set(past["adopted"].tolist())) > 1


def mean_score(w):
    return float(np.mean(assess(w)))


def test_chunks_are_looked_at_as_far_as_needed():
    x, y = data(999)
    assess_fn = optax_ev3.in_chunks(chunk, 4, ["x", "y"])
    tx = relay(assess_fn=assess_fn)
    w, step = start(), jax.jit(tx.update)
    state = tx.init(w)
    for call in range(20):
        grads = gradient(w, data(call))
        updates, state = step(grads, state, w, x=x, y=y)
        w = optax.apply_updates(w, updates)
    past = optax_ev3.history(state)
    assert set(past["examples"].tolist()) <= {4, 8, 12, 16}
    assert mean_score(optax_ev3.best_params(state)) > mean_score(start())


# A schedule of all updates.


FACTOR = optax.linear_schedule(1.0, 0.1, 20, 5)


def by_calls(call):
    """The schedule in plain Python."""
    return 1.0 - 0.9 * min(max(call - 5, 0), 20) / 20


def test_a_schedule_scales_the_updates_of_a_relay():
    hand = ByHand(inner().values(), LENGTH, RACING, factor=by_calls)
    for w, state in run(relay(schedule=FACTOR), 40):
        assert_close(w, hand.call(), 3e-4, 3e-4)
        assert_close(optax_ev3.best_params(state), hand.best, 3e-4, 3e-4)


def test_a_schedule_scales_the_updates_of_branches():
    strategy = explore.branches(3, gradients="own", schedule=FACTOR)

    def of_batch(params, batch):
        return loss(params, batch)

    tx = optax_ev3.ev3(inner(), assess, loss_fn=of_batch, explore=strategy)
    w, state = start(), tx.init(start())

    @jax.jit
    def step(w, state, batch):
        updates, state = tx.update(jax.grad(loss)(w, batch), state, w, batch=batch)
        return optax.apply_updates(w, updates), state

    for call in range(30):
        w, state = step(w, state, data(call))
    for name, one in inner().items():
        hand, inner_state = start(), one.init(start())
        for call in range(30):
            updates, inner_state = updater(name)(
                gradient(hand, data(call)), inner_state, hand
            )
            scaled = optax.tree.scale(by_calls(call), updates)
            hand = optax.apply_updates(hand, scaled)
        assert_close(state.explore.branches.ends[name], hand, 2e-4, 2e-4)


@functools.cache
def updater(name):
    return jax.jit(inner()[name].update)


# What is told of it.


def test_history_and_summary_say_who_had_a_turn():
    _, _, seen = reference()
    state = seen[-1][1]
    names = ["adam", "sgd", "average/adam", "average/sgd"]
    names += ["branch_average/adam", "branch_average/sgd", "current", "stable"]
    past, figures = optax_ev3.history(state), optax_ev3.summary(state)
    assert past["candidates"].tolist() == names
    # Turns of 1, 2 calls of each, then of four; the last round is that of one of them.
    assert past["length"].tolist() == [1, 1, 2, 2, *[4] * 4]
    raw = state.history.valid[: len(past["length"])]
    owner = [0, 1, 0, 1]
    for row, who in zip(raw, owner, strict=False):
        expected = np.full(8, -1)
        expected[[who, 2 + who, 4 + who, 6, 7]] = 1
        np.testing.assert_array_equal(row, expected)
    at_work = np.flatnonzero(raw[-1][:2] == 1).item()
    for name, valid in zip(names, raw[-1], strict=True):
        assert int(figures[f"ev3/valid/{name}"]) == (valid == 1)
    assert int(figures[f"ev3/valid/{names[1 - at_work]}"]) == 0
    assert int(figures["ev3/calls"]) == CALLS and int(figures["ev3/round"]) == 8
    assert_finite(figures)


# The best parameters, whatever the strategy.

BEST = {
    "one_step": {},
    "rounds": {"explore": explore.rounds(3, averages=[explore.trajectory_average()])},
    "branches": {"explore": explore.branches(3)},
    "relay": {"explore": explore.relay(3)},
}


@pytest.mark.parametrize("strategy", BEST)
def test_best_params(strategy):
    tx = optax_ev3.ev3(inner(), assess, adapt=adapt.greedy(), **BEST[strategy])
    around = optax.chain(optax.clip(1e9), tx)
    assert_identical(optax_ev3.best_params(around.init(start())), start())
    seen = run(around, 24)
    best = [optax_ev3.best_params(state) for _, state in seen]
    values = [mean_score(w) for w in best]
    if strategy == "one_step":
        for one, (_, state) in zip(best, seen, strict=True):
            assert_identical(one, optax_ev3.stable_params(state))
        return
    # With a rule that takes the best, and the same examples: none was better.
    assert (np.diff(values) >= -1e-6).all()
    past = optax_ev3.history(seen[-1][1])
    np.testing.assert_allclose(values[-1], np.nanmax(past["mean"]), 1e-5, 1e-6)
    # In the middle of a round it stays, and jit changes nothing.
    if strategy != "relay":
        assert_identical(best[-2], best[-3])
        assert_close(best[-1], seen[-1][0], 1e-5, 1e-6)
    state = jax.tree.map(np.asarray, seen[-1][1])
    assert_close(jax.jit(optax_ev3.best_params)(state), best[-1], 0, 0)


def test_best_params_are_the_stable_ones_where_those_have_the_higher_score():
    """A rule that adopts what is worse, and never promotes."""

    def decide(evidence, memory, key):
        del evidence, key
        return adapt.Decision(jnp.int32(0), jnp.asarray(False)), memory

    rule = adapt.Rule(lambda explorers: (), decide)
    for strategy in (explore.rounds(2), explore.branches(2), explore.relay(2)):
        tx = optax_ev3.ev3(
            [optax.sgd(-0.1)], lambda w: -jnp.square(w), adapt=rule, explore=strategy
        )
        w = jnp.ones([])
        state, update = tx.init(w), jax.jit(tx.update)
        for _ in range(4):
            updates, state = update(2 * w, state, w)
            w = optax.apply_updates(w, updates)
        assert float(w) > 1
        assert float(optax_ev3.best_params(state)) == 1
        assert float(optax_ev3.stable_params(state)) == 1


def test_best_params_need_a_state_of_ours():
    with pytest.raises(ValueError, match="state"):
        optax_ev3.best_params(optax.adam(0.1).init(start()))
