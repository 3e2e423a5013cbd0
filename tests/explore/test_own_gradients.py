"""Where explorers take their own gradients, those of the caller are not needed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest
from helpers import assert_close, assert_identical, compiled, says

import optax_ev3
from optax_ev3 import adapt, explore

AVERAGES = [explore.trajectory_average(), explore.branch_average()]
STRATEGIES = {
    "one step": {},
    "own": {"explore": explore.rounds(3)},
    "shared": {"explore": explore.rounds(3, gradients="shared")},
    # The greedy rule would stay where it is.
    "significant": {
        "explore": explore.branches(3, restart=explore.worse_than("adopted")),
        "adapt": adapt.confident(),
    },
    "behind": {
        "explore": explore.branches(
            3, restart=explore.worse_than("start", inner_state="new")
        ),
        "adapt": adapt.confident(),
    },
    "recommended": {
        "explore": explore.branches(
            3,
            restart=explore.never(inner_state="copy"),
            racing=explore.Racing(1, 4),
            averages=AVERAGES,
        ),
        "adapt": adapt.greedy(),
    },
    "relay": {"explore": explore.relay(3)},
}


def loss(w, batch):
    return jnp.square(jnp.tanh(batch @ w["a"]) @ w["b"] - 1.0).mean()


def score(w, held):
    return -jnp.square(jnp.tanh(held @ w["a"]) @ w["b"] - 1.0)


def with_aux(w, batch):
    return loss(w, batch), {"mean": batch.mean()}


def merge(w, aux):
    return {**w, "b": w["b"] + 0.01 * aux["mean"]}


def start():
    rng = np.random.default_rng(0)
    return {"a": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "b": jnp.ones(3)}


def batches(seed, count=12):
    drawn = np.random.default_rng(seed).normal(size=(count, 8, 4))
    return jnp.asarray(drawn, jnp.float32)


RATE = {"learning_rate": optax_ev3.log_uniform(1e-3, 1.0, start=0.1)}
EXPLORERS = {
    "single": {"adam": optax.adam(0.1), "sgd": optax.sgd(0.3)},
    "sweep": {"adam": optax_ev3.sweep(optax.adam, learning_rate=[0.1, 0.01])},
    "group": {"sgd": optax_ev3.evolve(optax.sgd, RATE, population=2)},
    "line search": {"lbfgs": optax.lbfgs(), "sgd": optax.sgd(0.3)},
}


def make(inner, strategy, **kwargs):
    """With a rule that compiles quickly."""
    kwargs = {"adapt": adapt.greedy(), **STRATEGIES[strategy], **kwargs}
    return optax_ev3.ev3(inner, score, **kwargs)


def own(explorers, loss_fn=loss, merge_fn=None):
    return {
        name: optax_ev3.explorer(tx, loss_fn, merge_fn=merge_fn)
        for name, tx in explorers.items()
    }


def train(tx, gradients):
    """Parameters and the state after some calls with ``gradients(params, batch)``."""

    def step(w, state, batch, held):
        grads = gradients(w, batch)
        updates, state = tx.update(grads, state, w, batch=batch, held=held)
        return optax.apply_updates(w, updates), state

    w = start()
    state = tx.init(w)
    step = compiled(step, w, state, batches(1)[0], batches(2)[0])
    for batch, held in zip(batches(1), batches(2), strict=True):
        w, state = step(w, state, batch, held)
    assert optax.tree.norm(optax.tree.sub(w, start())) > 1e-3
    return w, state


def nothing(w, batch):
    return None


def poison(w, batch):
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), w)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("one step", "group"),
        ("own", "sweep"),
        ("recommended", "line search"),
    ],
)
def test_losses_of_their_own_need_no_gradient_of_the_caller(strategy, kind):
    tx = make(own(EXPLORERS[kind]), strategy)
    assert_identical(train(tx, nothing), train(tx, poison))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_none(strategy):
    explorers = own(EXPLORERS["single"], with_aux, merge)
    tx = make(explorers, strategy)
    assert_identical(train(tx, nothing), train(tx, poison))


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [("own", "sweep"), ("significant", "single"), ("recommended", "single")],
)
def test_without_the_callers_gradient_the_lead_branch_takes_its_own(strategy, kind):
    tx = make(EXPLORERS[kind], strategy, loss_fn=loss)
    assert_close(train(tx, nothing), train(tx, jax.grad(loss)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["own", "recommended"])
def test_none_takes_the_own_auxiliary_outputs_too(strategy):
    inner = {
        name: optax_ev3.explorer(tx, merge_fn=merge)
        for name, tx in EXPLORERS["single"].items()
    }
    tx = make(inner, strategy, loss_fn=with_aux)

    def update(grads, state, w, **extra):
        # Auxiliary outputs that belong to no gradient are not used.
        return tx.update(grads, state, w, aux={"mean": jnp.float32(9.0)}, **extra)

    told = optax.GradientTransformationExtraArgs(tx.init, update)
    assert_identical(train(told, nothing), train(tx, nothing))


def test_an_optimizer_around_takes_none():
    tx = make(own(EXPLORERS["single"]), "own")
    around = optax.chain(optax.clip(1e9), tx, optax.scale(1.0))
    assert_identical(train(around, nothing)[0], train(tx, nothing)[0])


@pytest.mark.parametrize(
    ("inner", "kwargs", "name"),
    [
        ({"adam": optax.adam(0.1)}, {}, "adam"),
        ({"adam": optax.adam(0.1)}, {"loss_fn": loss}, "adam"),
        ({"adam": optax.adam(0.1)}, {"explore": explore.rounds(2)}, "adam"),
        (
            {"adam": optax.adam(0.1)},
            {"explore": explore.relay(2), "loss_fn": loss},
            "adam",
        ),
        ({**own({"sgd": optax.sgd(0.1)}), "adam": optax.adam(0.1)}, {}, "adam"),
        (EXPLORERS["sweep"], {}, "adam"),
        (EXPLORERS["group"], {"explore": explore.rounds(2)}, "sgd"),
    ],
)
def test_who_needs_the_callers_gradient_says_so(inner, kwargs, name):
    tx = optax_ev3.ev3(inner, score, **kwargs)
    w = start()
    expected = says(ValueError, repr(name), "gradient", "None", "explorer(tx, loss_fn)")
    with expected:
        tx.update(None, tx.init(w), w, batch=batches(1)[0], held=batches(2)[0])


def costly(w, batch):
    """A loss whose gradient takes far more than a step."""
    for _ in range(20):
        batch = jnp.tanh(batch @ jnp.outer(w["a"][:, 0], w["b"][:1] * batch[0]))
    return batch.mean()


def flops(tx, gradients, loop=False):
    """What the compiler counts for one call, or for the body of a loop around it."""
    batch, held = batches(1)[0], batches(2)[0]

    def step(_, carry):
        w, state = carry
        grads = gradients(w, batch)
        updates, state = tx.update(grads, state, w, batch=batch, held=held)
        return optax.apply_updates(w, updates), state

    def steps(*carry):
        return jax.lax.fori_loop(0, 2, step, carry) if loop else step(0, carry)

    return compiled(steps, start(), tx.init(start())).cost_analysis()["flops"]


@pytest.mark.parametrize("strategy", ["one step", "shared", "recommended"])
def test_the_compiler_removes_a_gradient_that_nothing_uses(strategy):
    loop = strategy in ("one step", "recommended")
    tx = make(own(EXPLORERS["single"]), strategy)
    assert flops(tx, jax.grad(costly), loop) == flops(tx, nothing, loop)


@pytest.mark.parametrize("loop", [False, True])
def test_the_compiler_keeps_a_gradient_that_is_used(loop):
    tx = make(EXPLORERS["single"], "one step")
    used, cheap = flops(tx, jax.grad(costly), loop), flops(tx, jax.grad(loss), loop)
    assert used > cheap + 1000
