"""What runs elsewhere than on CPUs: the same numbers, with fewer pauses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_identical

import optax_ev3
from optax_ev3 import adapt, explore
from optax_ev3._src.base import control, finite, xla
from optax_ev3._src.explore import alike

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
Y = jnp.tanh(X @ jnp.array([1.0, -2.0, 0.5]))


def start():
    return {"w": 0.5 * jnp.ones([3, 4]), "v": jnp.linspace(-0.3, 0.3, 4)}


def score(params, batch):
    return -((jnp.tanh(X @ params["w"]) @ params["v"] - Y * batch) ** 2)


def loss(params, batch):
    return -score(params, batch).mean()


INNER = {
    "adam": optax.adam(0.03),
    "wild": optax.sgd(1e20),
    "swept": optax_ev3.sweep(optax.sgd, learning_rate=[0.01, 0.3]),
}
RULES = {"adam": optax.adam(0.03), "wild": optax.sgd(1e20), "sgd": optax.sgd(0.3)}
OWN = {name: optax_ev3.explorer(tx, loss) for name, tx in RULES.items()}
PLANS = {
    "one step": {},
    "own": {
        "explore": explore.branches(3, restart=explore.never(inner_state="copy")),
    },
    "own losses": {"inner": OWN, "explore": explore.rounds(3)},
    "shared": {"explore": explore.rounds(3, gradients="shared")},
    "averages": {
        "explore": explore.branches(
            3,
            restart=explore.worse_than("adopted"),
            averages=[
                explore.trajectory_average(),
                explore.branch_average(0.7),
            ],
        ),
        "adapt": adapt.greedy(),
    },
    "race": {
        "explore": explore.branches(2, racing=explore.Racing(2, 12)),
        "adapt": adapt.greedy(),
    },
    "relay": {"explore": explore.relay(3)},
}


@pytest.fixture
def elsewhere(monkeypatch):
    """Traces what is meant for other platforms; it runs on CPUs, too."""

    def on():
        def choose(*args, default, cuda=None, **others):
            del others
            return (cuda or default)(*args)

        monkeypatch.setattr(control, "platform_dependent", choose)

    return on


def made(inner=INNER, **plan):
    def assess(params, batch):
        # Finite numbers only, so that nothing but the branches is not.
        return score(params, jnp.nan_to_num(batch, nan=1.0))

    return optax_ev3.ev3(inner, assess, loss_fn=loss, key=1, **plan)


def stepper(tx):
    def step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def run(plan, calls=24):
    """With a gradient now and then that is not finite."""
    tx = made(**plan)
    step, params = stepper(tx), start()
    state, seen = tx.init(params), []
    for call in range(calls):
        batch = jnp.nan if call % 10 == 4 else 1 + 0.1 * np.sin(call)
        params, state = step(params, state, jnp.float32(batch))
        seen.append(params)
    return seen, state


def assert_close_to_largest(actual, expected, rtol, atol):
    """As close, where ``atol`` is a part of the largest number of a leaf."""
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert_close(one, other, rtol, atol * max(1, np.abs(other).max()))


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_as_on_cpus(plan, elsewhere):
    seen, state = run(PLANS[plan])
    elsewhere()
    found, other = run(PLANS[plan])
    assert_close(found, seen, 1e-5, 1e-6)
    one, two = map(optax_ev3.history, (state, other))
    np.testing.assert_array_equal(one["adopted"], two["adopted"])
    races = plan == "race"  # One explorer wins it, and the others rest.
    assert len(set(one["adopted"].tolist())) > 1 or races
    assert_identical(state.history.valid, other.history.valid)
    valid = np.asarray(state.history.valid)[: len(one["adopted"])]
    if plan == "relay":  # Each turn is of one of them: the others are paused.
        assert (valid == -1).any(axis=1).all()
    else:
        assert (valid == 0).any() and (valid == -1).any() == races
    if state.explore.branches != ():
        assert_close(
            other.explore.branches.ends, state.explore.branches.ends, 1e-5, 1e-6
        )


def unlike(count):
    """Explorers that are not stacked."""
    padding = [optax.identity() for _ in range(count)]
    return {str(i): optax.chain(optax.adam(0.1), *padding[:i]) for i in range(count)}


def pauses(explorers, platform):
    """Loops and branches of a step: the host of a GPU waits for each."""
    optimizers = unlike(explorers)
    tx = made({k: optax_ev3.explorer(x, loss) for k, x in optimizers.items()})
    params = start()
    traced = stepper(tx).trace(params, tx.init(params), jnp.float32(1))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.while") + text.count("stablehlo.case")


@pytest.mark.usefixtures("for_all_platforms")
def test_there_are_fewer_pauses_on_gpus():
    """None to see whether an update is finite, and none to pick the adopted one."""
    fewer, more = ({k: pauses(n, k) for k in ("cpu", "cuda")} for n in (3, 4))
    assert fewer["cuda"] < fewer["cpu"]
    assert more["cuda"] - fewer["cuda"] < more["cpu"] - fewer["cpu"]


@pytest.mark.usefixtures("for_all_platforms")
def test_steps_of_trajectories_pause_once_on_gpus(monkeypatch):
    """At the end, for a round's end and for branches that are not finite."""
    monkeypatch.setattr(alike, "_LEAST", 1000)  # A stack is stepped in a loop.

    def loops(explorers, platform):
        optimizers = unlike(explorers)
        tx, params = made(optimizers, explore=explore.rounds(3)), start()
        traced = stepper(tx).trace(params, tx.init(params), jnp.float32(1))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.while")

    one, other = ([loops(n, platform) for n in (3, 4)] for platform in ("cuda", "cpu"))
    assert one[0] == one[1] and other[0] < other[1]


@pytest.mark.usefixtures("for_all_platforms")
def test_layouts_are_held_with_one_gpu(monkeypatch):
    """Those of kernels of convolutions; with several devices it would gather them."""

    def held(platform, devices):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        tree = {"kernel": jnp.ones([3, 3, 2, 4]), "bias": jnp.ones([4])}
        traced = jax.jit(lambda x: xla.row_major(x)).trace(tree)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    count = {
        case: held(*case).count("@LayoutConstraint")
        for case in [("cuda", 1), ("cuda", 2), ("cpu", 1), ("tpu", 1)]
    }
    newer = jax.__version_info__ >= (0, 10)
    assert count == {c: int(newer and c == ("cuda", 1)) for c in count}


@pytest.mark.usefixtures("for_all_platforms")
def test_small_leaves_are_put_together_with_one_gpu(monkeypatch):
    """With several devices that would gather them, however they are spread."""

    def concatenated(platform, devices):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        tree = [jnp.ones([n]) for n in range(3, 7)]
        traced = jax.jit(lambda x: finite.finite(x)).trace(tree)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return "concatenate" in text and "18xi1" in text

    cases = [("cuda", 1), ("cuda", 2), ("cpu", 1)]
    assert [concatenated(*case) for case in cases] == [True, False, False]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("size", [None, 3])
def test_finite(size, devices, elsewhere, monkeypatch):
    """Small leaves, large ones, and sums that overflow."""
    elsewhere()
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    shape = [] if size is None else [size]
    tree = {
        "small": jnp.ones([*shape, 5]),
        "large": jnp.full([*shape, 300, 300], 1e38),
        "single": jnp.ones(shape, jnp.complex64),
        "integers": jnp.ones([*shape, 2], jnp.int32),
        "nothing": jnp.ones([*shape, 0]),
    }
    assert np.all(finite.finite(tree, size=size))
    for name, wrong in itertools.product(
        ["small", "large", "single"], [np.nan, np.inf]
    ):
        rows = tree[name].reshape(size or 1, -1)
        leaf = rows.at[-1, -1].set(wrong).reshape(tree[name].shape)
        found = finite.finite(tree | {name: leaf}, size=size)
        expected = [True, True, False] if size else False
        np.testing.assert_array_equal(found, expected)
