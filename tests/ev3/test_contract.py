"""What every rule must keep to, in every context in which optax is used."""

import copy
import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    RULES,
    TREES,
    always,
    assert_close,
    assert_finite,
    assert_identical,
    assert_same_types,
    distance,
    explorers,
    gradient,
    loss,
    says,
    score,
    stepper,
    traced,
    transformation,
    types,
    weights,
    x64,
)
from jax import lax

import optax_ev3
from optax_ev3 import adapt, explore

P = jax.sharding.PartitionSpec
every_rule = pytest.mark.parametrize("rule", RULES)
# With and without a memory: what else differs does not change whether a program runs.
both_kinds = pytest.mark.parametrize("rule", ["greedy", "confident"])


def params():
    return {"w": jnp.array([0.25, -0.5, 2.0]), "b": jnp.zeros([2, 2])}


def run(tx, steps=4, step=None):
    """Parameters and state after some steps, each on a batch of its own."""
    w = params()
    state = tx.init(w)
    step = step or jax.jit(stepper(tx))
    for seed in range(steps):
        w, state = step(w, state, weights(seed=seed))
    return w, state


@functools.cache
def plain_step(rule):
    """The step that others are compared with, compiled once."""
    return jax.jit(stepper(transformation(rule)))


@functools.cache
def plain_run(rule):
    return run(transformation(rule), step=plain_step(rule))


# Types.


@every_rule
@pytest.mark.parametrize("tree", TREES)
def test_types_never_change(rule, tree):
    with x64(tree == "float64"):
        w, batch = TREES[tree](), weights()
        tx = transformation(rule)
        state = tx.init(w)
        updates, new_state = jax.eval_shape(tx.update, w, state, w, batch=batch)
        assert_same_types(new_state, state)
        assert not any("weak" in leaf for leaf in jax.tree.leaves(types(state)))
        assert_same_types(updates, w)


@pytest.mark.parametrize("tree", TREES)
def test_trains_parameters_of_every_kind(tree):
    with x64(tree == "float64"):
        w, batch = TREES[tree](), weights()
        tx = transformation("greedy")
        state = tx.init(w)
        step, traces = traced(stepper(tx))
        start = distance(w)
        for _ in range(5):
            old = state
            w, state = step(w, state, batch)
            assert_same_types(state, old)
        assert_same_types(w, TREES[tree]())
        assert_finite((w, state))
        assert distance(w) < 0.8 * start
        assert len(traces) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@every_rule
def test_state_passes_through_cond(rule, dtype):
    with x64(dtype == "float64"):
        w, batch = TREES[dtype](), weights()
        tx = transformation(rule)

        def maybe(flag, w, state):
            step = functools.partial(stepper(tx), batch=batch)
            return lax.cond(flag, step, lambda w, state: (w, state), w, state)

        state = tx.init(w)
        expected = types((w, state))
        out = jax.eval_shape(maybe, True, w, state)
        assert types(out) == expected


@both_kinds
def test_cond_takes_either_branch(rule):
    tx, w = transformation(rule), params()
    state = tx.init(w)

    @jax.jit
    def maybe(flag, w, state):
        step = functools.partial(stepper(tx), batch=weights())
        return lax.cond(flag, step, lambda w, state: (w, state), w, state)

    assert_identical(maybe(False, w, state), (w, state))
    assert_close(maybe(True, w, state), plain_step(rule)(w, state, weights()))


def test_weakly_typed_parameters():
    w = jnp.asarray(3.0)  # Weakly typed in some releases.
    tx = transformation("greedy")
    state = tx.init(w)
    _, new_state = jax.eval_shape(tx.update, w, state, w, batch=weights())
    assert_same_types(new_state, state)


@pytest.mark.parametrize("tree", ["float32", "mixed", "none", "nested"])
def test_init_takes_shapes_alone(tree):
    w = TREES[tree]()
    shapes = jax.eval_shape(lambda x: x, w)
    tx = transformation()
    assert_same_types(tx.init(shapes), tx.init(w))
    assert_same_types(jax.eval_shape(tx.init, w), tx.init(w))


# Contexts.


@both_kinds
def test_second_call_does_not_compile(rule):
    traces = []

    def counting(w, batch):
        traces.append(1)
        return score(w, batch)

    tx = transformation(rule, assess_fn=counting)
    step, steps = traced(stepper(tx))
    w = params()
    w, state = step(w, tx.init(w), weights())
    first = len(traces)
    assert first > 0
    for seed in range(3):
        w, state = step(w, state, weights(seed=seed))
    assert len(traces) == first
    assert len(steps) == 1


@both_kinds
def test_scan_equals_a_loop(rule):
    tx = transformation(rule)
    w, state = plain_run(rule)
    batches = jnp.stack([weights(seed=seed) for seed in range(4)])

    @jax.jit
    def scanned(w):
        def body(carry, batch):
            return stepper(tx)(*carry, batch), None

        return lax.scan(body, (w, tx.init(w)), batches)[0]

    assert_close(scanned(params()), (w, state))


@both_kinds
def test_eager_and_jit_agree(rule):
    tx = transformation(rule)
    w, state = plain_run(rule)
    eager = stepper(tx)(w, state, weights())
    assert_close(eager, plain_step(rule)(w, state, weights()))


def test_same_seed_gives_the_same_bits():
    rule = "confident"
    assert_identical(run(transformation(rule, key=jax.random.key(0))), plain_run(rule))
    keys = [transformation(rule, key=seed).init(params()).ev3_key for seed in (0, 1)]
    assert (np.asarray(keys[0]) != np.asarray(keys[1])).any()


@both_kinds
def test_vmap_over_seeds_equals_separate_runs(rule):
    def train(seed):
        tx = transformation(rule, key=seed, assess_fn=_noisy_score)
        w = params()
        return lax.fori_loop(
            0, 3, lambda i, c: stepper(tx)(*c, weights()), (w, tx.init(w))
        )

    seeds = jnp.arange(2)
    together = jax.jit(jax.vmap(train))(seeds)
    separate = jax.jit(train)
    for seed in range(2):
        alone = separate(seeds[seed])
        assert_close(jax.tree.map(lambda x, i=seed: x[i], together), alone)
    noise = together[1].history.mean[:, 0]
    assert len(np.unique(noise, axis=0)) == 2  # The seeds did differ.


def _noisy_score(w, batch, key):
    return score(w, batch) + jax.random.normal(key, batch.shape)


@both_kinds
def test_buffers_can_be_donated(rule):
    key = jax.random.key(0)
    tx = transformation(rule, key=key)
    expected = plain_run(rule)
    kept = params()
    w = jax.tree.map(jnp.copy, kept)
    state = tx.init(w)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((w, state))]
    assert len(set(pointers)) == len(pointers)
    assert jax.random.key_data(key).unsafe_buffer_pointer() not in pointers
    step = jax.jit(stepper(tx), donate_argnums=(0, 1))
    for seed in range(4):
        w, state = step(w, state, weights(seed=seed))
    assert_close((w, state), expected)
    # Nothing that belongs to the caller or to the transformation was given away.
    assert_identical(kept, params())
    assert_identical(tx.init(kept), transformation(rule).init(kept))


def test_buffers_of_a_rule_that_uses_an_array_twice_can_be_donated():
    def init(proposals):
        nothing = jnp.zeros([proposals])
        return nothing, nothing

    def decide(evidence, state, key):
        del key
        return adapt.Decision(jnp.int32(0), jnp.asarray(False)), state

    for rule in (adapt.Rule(init, decide), adapt.farsighted(), adapt.confident()):
        tx = optax_ev3.ev3([optax.sgd(0.1), optax.sgd(0.2)], score, adapt=rule)
        leaves = jax.tree.leaves(tx.init(params()))
        pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
        assert len(pointers) == len(leaves)


@every_rule
@pytest.mark.parametrize("mode", ["unroll", "vmap", "map"])
def test_no_host_callback(rule, mode):
    tx, w = transformation(rule, assess_mode=mode), params()
    jaxpr = jax.make_jaxpr(stepper(tx))(w, tx.init(w), weights())
    assert "callback" not in str(jaxpr)


@pytest.mark.parametrize("rule, mode", [("greedy", "vmap"), ("confident", "map")])
def test_modes_agree(rule, mode):
    assert_close(run(transformation(rule, assess_mode=mode)), plain_run(rule))


def test_candidates_in_their_documented_order():
    # Twelve explorers: names sorted as strings are not in the order of the list.
    rates = [0.1 + 0.01 * i for i in range(12)]
    tx = optax_ev3.ev3([optax.sgd(r) for r in rates], score, adapt=always(10))
    w, batch = {"w": jnp.array([3.0])}, jnp.ones([4])
    state = tx.init(w)
    updates, state = jax.jit(tx.update)({"w": jnp.array([1.0])}, state, w, batch=batch)
    np.testing.assert_allclose(updates["w"], [-0.2], rtol=1e-6)
    past = optax_ev3.history(state)
    names = [f"explorer_{i}" for i in range(12)] + ["current", "stable"]
    assert past["candidates"].tolist() == names
    expected = [-((3 - r - 1) ** 2) for r in rates] + [-4.0, -4.0]
    np.testing.assert_allclose(past["mean"][0], expected, rtol=1e-5)
    assert float(optax_ev3.summary(state)["ev3/share/explorer_10"]) == 1.0
    # And again from a state whose dictionary was sorted by a transformation.
    _, state = jax.jit(tx.update)({"w": jnp.array([1.0])}, state, w, batch=batch)
    np.testing.assert_allclose(optax_ev3.history(state)["mean"][1], expected, rtol=1e-5)


@pytest.mark.parametrize("index, expected", [(0, 0.5), (1, 0.0), (2, -1.0)])
def test_update_makes_the_adopted_candidate_visible(index, expected):
    tx = transformation(always(index), inner=[optax.sgd(0.25)])
    w = jnp.array([4.0])
    state = tx.init(w)._replace(stable=jnp.array([3.0]))
    updates, state = tx.update(jnp.array([-2.0]), state, w, batch=weights())
    np.testing.assert_allclose(updates, [expected], rtol=1e-6)
    np.testing.assert_array_equal(state.stable, [3.0])


# optax's own tools.


@every_rule
def test_tree_map_params_reaches_what_is_like_params(rule):
    tx, w = transformation(rule), params()
    state = tx.init(w)
    marked = optax.tree.map_params(
        tx, lambda x: "params", state, transform_non_params=lambda x: "other"
    )
    like_params = {"b": "params", "w": "params"}
    assert marked.stable == like_params
    adam = marked.explore.explorers["adam"].opt_state[0]
    assert adam.mu == adam.nu == like_params
    assert (adam.count, marked.ev3_round, marked.ev3_key) == ("other",) * 3
    assert set(jax.tree.leaves((marked.history, marked.rule_state))) == {"other"}


def test_tree_get_finds_our_fields():
    rule = "greedy"
    tx = optax.chain(optax.clip(1.0), transformation(rule))
    inner = {"a": optax.adam(0.1), "b": optax.adam(0.2)}
    for one in (tx, transformation(rule, inner=inner)):
        w, state = run(one, steps=3)
        assert int(optax.tree.get(state, "ev3_round")) == 3
        assert optax.tree.get(state, "ev3_key").shape == (2,)
        new = optax.tree.set(state, ev3_round=jnp.int32(9))
        assert int(optax.tree.get(new, "ev3_round")) == 9
    del w


def _inject(rule):
    made = optax.inject_hyperparams(
        optax_ev3.ev3,
        static_args=(
            "assess_fn",
            "loss_fn",
            "history_length",
        ),
    )
    return made(inner=explorers(), assess_fn=score, adapt=RULES[rule]())


WRAPPERS = {
    "chain": lambda rule: optax.chain(optax.identity(), transformation(rule)),
    "chain_after": lambda rule: optax.chain(transformation(rule), optax.scale(1.0)),
    "named_chain": lambda rule: optax.named_chain(
        ("first", optax.identity()), ("ev3", transformation(rule))
    ),
    "MultiSteps": lambda rule: optax.MultiSteps(
        transformation(rule), 1
    ).gradient_transformation(),
    "inject_hyperparams": _inject,
    "apply_if_finite": lambda rule: optax.apply_if_finite(transformation(rule), 3),
    "conditionally_transform": lambda rule: optax.conditionally_transform(
        transformation(rule), lambda step, **_: step >= 0, forward_extra_args=True
    ),
    "with_extra_args_support": lambda rule: optax.with_extra_args_support(
        transformation(rule)
    ),
    "flatten": lambda rule: optax.flatten(transformation(rule)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_trains_like_alone(wrapper):
    expected, plain = plain_run("greedy")
    w, state = run(WRAPPERS[wrapper]("greedy"))
    # Sums run in another order over a flat vector.
    assert_close(w, expected, rtol=1e-4, atol=1e-5)
    adopted = optax_ev3.history(state)["adopted"]
    assert adopted.tolist() == optax_ev3.history(plain)["adopted"].tolist()
    assert int(optax_ev3.summary(state)["ev3/round"]) == 4


@every_rule
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_keeps_types(wrapper, rule):
    tx, w = WRAPPERS[wrapper](rule), params()
    state = tx.init(w)
    _, new_state = jax.eval_shape(tx.update, w, state, w, batch=weights())
    # Wrappers of older releases change weak types of counters of their own.
    assert_same_types(_find(new_state), _find(state))
    shapes = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert shapes(new_state) == shapes(state)


def _find(state):
    def is_ours(x):
        return isinstance(x, optax_ev3.EV3State)

    (found,) = filter(is_ours, jax.tree.leaves(state, is_leaf=is_ours))
    return found


def test_multi_steps_calls_once_in_k_steps():
    tx = optax.MultiSteps(transformation("greedy"), 3).gradient_transformation()
    w = start = params()
    state = tx.init(w)
    step = jax.jit(stepper(tx))
    for call in range(1, 7):
        old = w
        w, state = step(w, state, weights())
        moved = not np.array_equal(w["w"], old["w"])
        assert moved == (call % 3 == 0)
    assert distance(w) < distance(start)


def test_apply_if_finite_around():
    tx, w = optax.apply_if_finite(transformation("greedy"), 5), params()
    state = tx.init(w)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), w)
    updates, new = jax.jit(tx.update)(nan, state, w, batch=weights())
    assert_identical(updates, jax.tree.map(jnp.zeros_like, w))
    assert_identical(new.inner_state, state.inner_state)


def test_conditionally_transform_holds_the_state():
    tx = optax.conditionally_transform(
        transformation("greedy"),
        lambda step, **_: step % 2 == 0,
        forward_extra_args=True,
    )
    _, state = run(tx, steps=4)
    assert int(optax_ev3.summary(state)["ev3/round"]) == 2


def test_injected_key_and_history():
    tx = _inject("greedy")
    w = params()
    state = tx.init(w)
    assert_identical(
        state.inner_state.ev3_key, transformation("greedy").init(w).ev3_key
    )
    assert state.inner_state.history.adopted.shape == (64,)


HOLES = {
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {"ev3": tx, "sgd": optax.sgd(0.1)}, {"w": "ev3", "b": "sgd"}
    ),
}


@pytest.mark.parametrize("wrapper", HOLES)
def test_wrappers_that_leave_holes_say_what_to_do(wrapper):
    tx, w = HOLES[wrapper](transformation()), params()
    with pytest.raises(ValueError, match=r"inside ev3.*not around it"):
        state = tx.init(w)
        tx.update(w, state, w, batch=weights())


@pytest.mark.parametrize("wrapper", HOLES)
def test_the_same_wrappers_inside(wrapper):
    inner = HOLES[wrapper](optax.sgd(0.25))
    tx, w = transformation(always(0), inner=[inner]), params()
    grads = jax.tree.map(jnp.ones_like, w)
    updates, _ = tx.update(grads, tx.init(w), w, batch=weights())
    np.testing.assert_allclose(updates["w"], [-0.25] * 3)
    other = 1.0 if wrapper == "masked" else -0.1
    np.testing.assert_allclose(updates["b"], np.full([2, 2], other), rtol=1e-6)


def test_params_are_needed():
    tx, w = transformation(), params()
    with pytest.raises(ValueError, match="params"):
        tx.update(w, tx.init(w), batch=weights())


def test_unknown_extra_arguments_are_ignored():
    tx, w = transformation("greedy"), params()
    state = tx.init(w)
    plain = tx.update(w, state, w, batch=weights())
    more = tx.update(w, state, w, batch=weights(), value=1.0, nobody="asks", fn=loss)
    assert_identical(more, plain)


# What libraries do to a transformation.


def test_functions_of_a_transformation_are_plain():
    tx = transformation("greedy")
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert list(inspect.signature(tx.init).parameters) == ["params"]
    names = inspect.signature(tx.update).parameters
    assert list(names) == ["updates", "state", "params", "extra_args"]
    assert names["extra_args"].kind == inspect.Parameter.VAR_KEYWORD
    other = transformation("greedy")
    for one in (tx.init, tx.update):
        assert one == one and hash(one) == hash(one)
    assert tx == tx and tx != other and len({tx, other, tx}) == 2


@pytest.mark.parametrize("how", ["deepcopy", "cloudpickle"])
def test_copies_train_alike(how):
    tx = transformation("greedy")
    if how == "deepcopy":
        copied = copy.deepcopy(tx)
    else:
        cloudpickle = pytest.importorskip("cloudpickle")
        copied = pickle.loads(cloudpickle.dumps(tx))
    assert_identical(run(copied), plain_run("greedy"))


def test_libraries_that_take_closures_apart():
    """Optimistix rebuilds them as pytrees that are called by ``*args, **kwargs``."""
    optimistix = pytest.importorskip("optimistix")

    def loss(w, args=None):
        return jnp.square(w - 3).sum()

    def assess_fn(w, *, round, key):  # Names that are read at the time of an update.
        return -jnp.square(w - 3) + 0 * (round + jax.random.uniform(key))

    data = jnp.full([8], 3.0)
    # A rule that adopts the highest mean: rounding, which differs between programs,
    # does not change what it decides.
    rule = RULES["greedy"]()
    held_out = functools.partial(optax_ev3.held_out, lambda w, x: -jnp.square(w - x))
    for length, fn in (
        (1, assess_fn),
        (3, assess_fn),
        (1, held_out(data, 4)),
        (3, optax_ev3.in_chunks(held_out(data), 2)),
    ):
        tx = optax_ev3.ev3(
            explorers(),
            fn,
            loss_fn=lambda w: loss(w),
            adapt=rule,
            explore=explore.rounds(length),
        )
        solver = optimistix.OptaxMinimiser(tx, rtol=0.0, atol=0.0)
        start = jnp.zeros([])
        found = optimistix.minimise(loss, solver, start, max_steps=12, throw=False)

        def body(carry, _, tx=tx):
            w, state = carry
            value, grads = jax.value_and_grad(loss)(w)
            extras = {"value": value, "grad": grads, "value_fn": loss}
            updates, state = tx.update(grads, state, w, **extras)
            return (optax.apply_updates(w, updates), state), None

        by_hand = jax.jit(
            lambda w, tx=tx: jax.lax.scan(body, (w, tx.init(w)), None, 12)
        )
        (expected, _), _ = by_hand(start)
        assert_close(found.value, expected, rtol=1e-5)
        assert float(expected) > 1


@pytest.mark.parametrize("length", [1, 3])
def test_keep_params(length):
    """A loop that passes none trains as the one that does."""
    tx = transformation("greedy", explore=explore.rounds(length))
    kept = optax_ev3.keep_params(tx)

    @jax.jit
    def step(w, state, batch):
        updates, state = kept.update(gradient(w, batch), state, batch=batch)
        return optax.apply_updates(w, updates), state

    w = params()
    state = kept.init(w)
    for seed in range(4):
        before = types(state)
        w, state = step(w, state, weights(seed=seed))
        assert types(state) == before
    expected, plain = run(tx, steps=4)
    assert_close((w, state.inner_state), (expected, plain))
    assert_identical(state.kept_params, w)
    assert_identical(optax_ev3.summary(state), optax_ev3.summary(state.inner_state))
    # Those that are passed come first.
    moved = jax.tree.map(lambda x: x + 1, w)
    grads = gradient(moved, weights())
    found = kept.update(grads, state, moved, batch=weights())
    wanted = tx.update(grads, state.inner_state, moved, batch=weights())
    assert_identical((found[0], found[1].inner_state), wanted)
    assert_close(found[1].kept_params, optax.apply_updates(moved, wanted[0]))


def test_kept_params_may_be_donated():
    tx = optax_ev3.keep_params(transformation("greedy"))
    w = params()
    state = tx.init(w)

    def step(w, state):
        updates, state = tx.update(gradient(w, weights()), state, batch=weights())
        return optax.apply_updates(w, updates), state

    jax.block_until_ready(jax.jit(step, donate_argnums=(0, 1))(w, state))


@pytest.mark.parametrize("reset_state", [False, True])
def test_lookahead_around_us_trains_as_around_the_optimizer_alone(reset_state):
    batch = weights()
    ours = transformation(
        always(0), inner=[optax.adam(0.1)], assess_fn=lambda w: score(w, batch)
    )
    pairs = [optax.LookaheadParams.init_synced(params())] * 2
    wrapped = [
        optax.lookahead(tx, 2, 0.5, reset_state) for tx in (ours, optax.adam(0.1))
    ]
    states = [tx.init(pair) for tx, pair in zip(wrapped, pairs, strict=True)]
    updates = [jax.jit(tx.update) for tx in wrapped]
    for _ in range(4):
        for i, update in enumerate(updates):
            grads = gradient(pairs[i].fast, batch)
            step, states[i] = update(grads, states[i], pairs[i])
            pairs[i] = optax.apply_updates(pairs[i], step)
        assert_close(pairs[0], pairs[1])


def test_lookahead_passes_no_extra_arguments_on():
    tx = optax.lookahead(transformation(), 2, 0.5)
    pair = optax.LookaheadParams.init_synced(params())
    with says(TypeError, "'batch'", "optax.lookahead", "held_out"):
        tx.update(params(), tx.init(pair), pair)
