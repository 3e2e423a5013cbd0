"""Decisions over many devices are those of one, with an axis name or sharded arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    RULES,
    assert_close,
    assert_identical,
    assert_same_types,
    explorers,
    gradient,
    loss,
    score,
    transformation,
    weights,
)
from helpers.meshes import mesh_of
from jax import lax

import optax_ev3
from optax_ev3 import adapt, explore, metrics

P = jax.sharding.PartitionSpec


def params():
    return {"w": jnp.array([0.25, -0.5, 2.0]), "b": jnp.zeros([2, 2])}


def _mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:8]), ("i",))


def _shard_map(fn, in_specs, out_specs):
    if hasattr(jax, "shard_map"):
        return jax.shard_map(fn, mesh=_mesh(), in_specs=in_specs, out_specs=out_specs)
    from jax.experimental.shard_map import shard_map

    return shard_map(
        fn, mesh=_mesh(), in_specs=in_specs, out_specs=out_specs, check_rep=False
    )


def _exact_score(w, batch):
    return score(w, batch).mean()


def _mapped_step(tx):
    def step(w, state, batch):
        # Of the mean over all devices, whether or not jax.grad sums over them.
        grads = jax.grad(lambda w: lax.pmean(loss(w, batch), "i"))(w)
        grads = lax.pmean(grads, "i")
        updates, state = tx.update(grads, state, w, batch=batch)
        return updates, state

    return step


def _alone_step(tx):
    def step(w, state, batch):
        return tx.update(gradient(w, batch), state, w, batch=batch)

    return step


def run_alone(tx, steps):
    """The step on one device, and its updates and states."""
    w, step, seen = params(), jax.jit(_alone_step(tx)), []
    state = tx.init(w)
    for seed in range(steps):
        updates, state = step(w, state, weights(32, seed))
        w = optax.apply_updates(w, updates)
        seen.append((updates, state))
    return step, seen


MANY_EXPLORERS = {
    "shared": explorers,
    "own_loss": lambda: [
        optax.sgd(0.01),
        optax_ev3.explorer(optax.sgd(0.2), loss_fn=loss),
    ],
    "evolving": lambda: [
        optax.sgd(0.01),
        optax_ev3.evolve(
            optax.sgd, {"learning_rate": optax_ev3.log_uniform(1e-3, 1.0)}
        ),
    ],
    "polyak": lambda: [optax.polyak_sgd(0.2), optax.sgd(0.01)],
    "backtracking": lambda: [
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
        optax.sgd(0.01),
    ],
    "zoom": lambda: [optax.lbfgs(), optax.sgd(0.01)],
    "sam": lambda: [
        optax.contrib.sam(
            optax.sgd(0.2),
            optax.chain(optax.contrib.normalize(), optax.sgd(0.1)),
            opaque_mode=True,
        ),
        optax.sgd(0.01),
    ],
}


@pytest.mark.parametrize(
    "how, rule, scores, inner",
    [
        ("shard_map", "greedy", score, "own_loss"),
        ("shard_map", "lower_bound", score, "shared"),
        ("shard_map", "confident", score, "shared"),
        ("shard_map", "confident", score, "evolving"),
        ("shard_map", "confident", _exact_score, "polyak"),
        ("shard_map", "greedy", score, "backtracking"),
        ("pmap", "confident", score, "shared"),
        ("pmap", "greedy", score, "own_loss"),
        pytest.param("shard_map", "greedy", score, "zoom", marks=pytest.mark.slow),
        pytest.param("shard_map", "greedy", score, "sam", marks=pytest.mark.slow),
        pytest.param("pmap", "greedy", score, "backtracking", marks=pytest.mark.slow),
    ],
)
def test_many_devices_decide_like_one(how, rule, scores, inner):
    many = transformation(rule, axis_name="i", **_many(scores, inner))
    w_many = params()
    state_many = many.init(w_many)
    if how == "shard_map":
        specs = (P(), P(), P("i")), (P(), P())
        mapped = jax.jit(_shard_map(_mapped_step(many), *specs))
    else:
        mapped = jax.pmap(_mapped_step(many), "i", in_axes=(None, None, 0))
    for seed, (updates, state) in enumerate(_decided_alone(rule, scores, inner)):
        batch = weights(32, seed)
        if how == "pmap":
            batch = batch.reshape(8, 4)
        updates_many, state_many = mapped(w_many, state_many, batch)
        if how == "pmap":
            all_devices = updates_many, state_many
            updates_many, state_many = jax.tree.map(lambda x: x[0], all_devices)
            again = jax.tree.map(lambda x: x[7], all_devices)
            assert_identical(again, (updates_many, state_many))
        assert_close(updates_many, updates, rtol=1e-4, atol=1e-5)
        assert_close(state_many.history, state.history, rtol=1e-4, atol=1e-5)
        assert_same_types(state_many, state)
        w_many = optax.apply_updates(w_many, updates_many)


def _many(scores, inner):
    return {"inner": MANY_EXPLORERS[inner](), "assess_fn": scores, "loss_fn": loss}


@functools.cache
def _decided_alone(rule, scores, inner):
    return run_alone(transformation(rule, **_many(scores, inner)), 2)[1]


@pytest.mark.parametrize("gradients", ["own", "shared"])
def test_many_devices_walk_like_one(gradients):
    kwargs = {
        "loss_fn": loss,
        "explore": explore.rounds(
            2, gradients=gradients, averages=[optax_ev3.explore.trajectory_average()]
        ),
    }
    one = transformation("greedy", **kwargs)
    many = transformation("greedy", axis_name="i", **kwargs)
    w_many = params()
    state_many = many.init(w_many)
    specs = (P(), P(), P("i")), (P(), P())
    mapped = jax.jit(_shard_map(_mapped_step(many), *specs))
    for seed, (updates, state) in enumerate(run_alone(one, 5)[1]):
        updates_many, state_many = mapped(w_many, state_many, weights(32, seed))
        assert_close(updates_many, updates, rtol=1e-4, atol=1e-5)
        assert_close(state_many.history, state.history, rtol=1e-4, atol=1e-5)
        w_many = optax.apply_updates(w_many, updates_many)


def _mean(outputs, weights):
    return (outputs * weights).sum() / weights.sum()


def _figure(w, batch):
    return metrics.AggregateMetric(_mean, score(w, batch), samples=8)


def _in_chunks():
    return {
        "assess_fn": optax_ev3.in_chunks(score, 4, ["batch"]),
        "rule": "greedy",  # Chunks of other examples, but the same winner.
    }


ASSESSMENTS = {
    "scores": dict,
    "figure": lambda: {"assess_fn": _figure},
    "host": lambda: {"assess_fn": optax_ev3.host_metric(score, _mean, samples=8)},
    "chunks": _in_chunks,
    "ladder": lambda: {"rule": adapt.guarded(adapt.greedy(), adapt.ladder())},
    "parts": lambda: {"rule": adapt.choose_and_confirm()},
}


@pytest.mark.parametrize(
    "how, assessment",
    [
        *(("sharded arrays", name) for name in ASSESSMENTS),
        *(("shard_map", name) for name in ("host", "chunks", "ladder", "parts")),
    ],
)
def test_every_assessment_decides_like_on_one(how, assessment):
    alone, seen = _assessed_alone(assessment)
    many = transformation(
        axis_name="i" if how == "shard_map" else None, **ASSESSMENTS[assessment]()
    )
    if how == "shard_map":
        specs = (P(), P(), P("i")), (P(), P())
        step = jax.jit(_shard_map(_mapped_step(many), *specs))
    else:
        step = alone
    w_many = params()
    state_many = many.init(w_many)
    spread = jax.sharding.NamedSharding(_mesh(), P("i"))
    for seed, (updates, state) in enumerate(seen):
        batch = jax.device_put(weights(32, seed), spread)
        updates_many, state_many = step(w_many, state_many, batch)
        assert_close(updates_many, updates, rtol=1e-4, atol=1e-5)
        if (how, assessment) != ("shard_map", "chunks"):
            assert_close(state_many.history, state.history, rtol=1e-4, atol=1e-5)
        w_many = optax.apply_updates(w_many, updates_many)


@functools.cache
def _assessed_alone(assessment):
    return run_alone(transformation(**ASSESSMENTS[assessment]()), 3)


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="this release has no explicit sharding"
)
@pytest.mark.parametrize("rule", RULES)
def test_explicit_sharding_is_kept(rule):
    mesh = mesh_of({"x": 8}, "Explicit")
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, P(None, "x"))
        w = jax.device_put(jnp.zeros((2, 8, 4), jnp.float16), sharding)
        tx = optax_ev3.ev3(
            [optax.adam(1.0), optax.sgd(1.0)],
            lambda w: -(w**2).sum(),
            adapt=RULES[rule](),
        )
        state = tx.init(w)
        typeof = functools.partial(jax.tree.map, jax.typeof)
        jitted, jitted_state = jax.jit(tx.update)(w, state, w)
        assert typeof(jitted) == typeof(w)
        assert typeof(jitted_state) == typeof(state)
        assert typeof(jax.jit(tx.init)(w)) == typeof(state)
        assert typeof(state.stable) == typeof(w)
        if rule == "lower_bound":  # The quickest one without compilation.
            updates, new_state = tx.update(w, state, w)
            assert typeof(updates) == typeof(w)
            assert typeof(new_state) == typeof(state)


@pytest.mark.parametrize("axis_name", [None, "i", "m"])
@pytest.mark.parametrize("axis", ["i", "m"])
def test_parameters_may_not_vary_over_devices(axis, axis_name):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("i", "m"))
    tx = transformation(axis_name=axis_name)

    def update(w, b, batch):
        w = {"w": w, "b": b}
        return tx.update(w, tx.init(w), w, batch=batch)[0]

    specs = {"in_specs": (P(), P(axis), P()), "out_specs": {"w": P(), "b": P(axis)}}
    if hasattr(jax, "shard_map"):
        mapped = jax.shard_map(update, mesh=mesh, **specs)
    else:
        from jax.experimental.shard_map import shard_map

        mapped = shard_map(update, mesh=mesh, **specs)
    with pytest.raises(ValueError, match="same on all devices") as told:
        jax.eval_shape(mapped, jnp.ones(3), jnp.ones([8, 2]), weights(32))
    assert f"params['b'] vary over ['{axis}']" in str(told.value)
    assert "NamedSharding" in str(told.value)
