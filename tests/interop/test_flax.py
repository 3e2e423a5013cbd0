"""Flax's own loops: Linen's TrainState, with and without extras, and nnx.Optimizer."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state
from helpers import always, assert_close, assert_same_types, lenient

import optax_ev3
import optax_ev3.flax
from optax_ev3 import adapt, explore

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

X = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
Y = X @ np.array([[1.0], [-2.0], [0.5]], np.float32) + 0.3
TRAIN, HELD = (X[:16], Y[:16]), (X[16:], Y[16:])


def inner():
    return {"adam": optax.adam(0.05), "sgd": optax.sgd(0.2)}


@pytest.fixture(autouse=True)
def _flax_promotes_ranks():
    with lenient():
        yield


def model():
    dense = linen.Dense(1)
    return dense, dense.init(jax.random.key(0), X[:1])["params"]


def score(apply, params, batch):
    x, y = batch
    return -jnp.square(apply({"params": params}, x) - y).mean(axis=1)


def gradient(apply, params):
    return jax.grad(lambda p: -score(apply, p, TRAIN).mean())(params)


def test_train_state_unchanged():
    dense, params = model()
    assess_fn = optax_ev3.held_out(functools.partial(score, dense.apply), HELD, 8)
    tx = optax_ev3.ev3(inner(), assess_fn)
    state = train_state.TrainState.create(apply_fn=dense.apply, params=params, tx=tx)

    def step(state):
        return state.apply_gradients(grads=gradient(state.apply_fn, state.params))

    run = jax.jit(step)
    first = run(state)
    # By hand, with optax alone.
    grads = gradient(dense.apply, params)
    updates, opt_state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_close(first.params, optax.apply_updates(params, updates))
    assert_close(first.opt_state, opt_state)
    assert_same_types(first.opt_state, state.opt_state)
    assert int(first.step) == 1
    for _ in range(60):
        first = run(first)
    error = -float(score(dense.apply, first.params, HELD).mean())
    start = -float(score(dense.apply, params, HELD).mean())
    assert error < 0.05 * start
    assert int(optax_ev3.summary(first)["ev3/round"]) == 61


def _extras_state(tx=None):
    dense, params = model()

    def assess_fn(params, batch):
        return score(dense.apply, params, batch)

    tx = tx or optax_ev3.ev3(inner(), assess_fn, adapt=always(0))
    create = optax_ev3.flax.TrainState.create
    return dense, create(apply_fn=dense.apply, params=params, tx=tx)


def test_our_train_state_forwards_extras():
    dense, state = _extras_state()

    @jax.jit
    def step(state, batch):
        grads = gradient(state.apply_fn, state.params)
        return state.apply_gradients(grads=grads, batch=batch)

    new = step(state, HELD)
    grads = gradient(dense.apply, state.params)
    updates, opt_state = state.tx.update(
        grads, state.opt_state, state.params, batch=HELD
    )
    assert_close(new.params, optax.apply_updates(state.params, updates))
    assert_close(new.opt_state, opt_state)
    assert int(new.step) == 1
    assert new.tx is state.tx and new.apply_fn is state.apply_fn
    assert jax.tree.structure(new) == jax.tree.structure(state)
    step(step(new, HELD), HELD)
    assert step._cache_size() <= 2  # Flax's step starts as a Python number.


def test_our_train_state_needs_no_gradient_that_nothing_uses():
    dense, params = model()

    def loss(params, train):
        return -score(dense.apply, params, train).mean()

    tx = optax_ev3.ev3(
        {name: optax_ev3.explorer(one, loss) for name, one in inner().items()},
        lambda params, held: score(dense.apply, params, held),
    )
    state = optax_ev3.flax.TrainState.create(apply_fn=dense.apply, params=params, tx=tx)
    given, none = (
        state.apply_gradients(grads=grads, train=TRAIN, held=HELD)
        for grads in (gradient(dense.apply, params), None)
    )
    assert_close(none.params, given.params, rtol=0, atol=0)
    assert int(none.step) == 1 and none.tx is tx


def test_our_train_state_replaces_fields():
    dense, state = _extras_state()
    grads = gradient(dense.apply, state.params)
    new = state.apply_gradients(grads=grads, batch=HELD, apply_fn=None)
    assert new.apply_fn is None and new.tx is state.tx
    other = optax.sgd(0.1)
    new = state.apply_gradients(grads=grads, batch=HELD, tx=other)
    assert new.tx is other
    # The step itself was made by the optimizer that was there.
    expected = state.apply_gradients(grads=grads, batch=HELD)
    assert_close(new.params, expected.params)


def test_subclasses_have_fields_of_their_own():
    class WithStatistics(optax_ev3.flax.TrainState):
        statistics: dict

    dense, params = model()

    def assess_fn(params, batch, **others):
        assert not others  # The field is no argument of the optimizer.
        return score(dense.apply, params, batch)

    tx = optax_ev3.ev3([optax.sgd(0.1)], assess_fn, adapt=always(0))
    state = WithStatistics.create(
        apply_fn=dense.apply, params=params, tx=tx, statistics={"mean": 0.0}
    )
    new = state.apply_gradients(
        grads=gradient(dense.apply, params), batch=HELD, statistics={"mean": 1.0}
    )
    assert isinstance(new, WithStatistics)
    assert new.statistics == {"mean": 1.0}


def test_missing_extras_say_which():
    dense, state = _extras_state()
    with pytest.raises(TypeError, match=r"assess_fn.*'batch'"):
        state.apply_gradients(grads=gradient(dense.apply, state.params))


def test_our_train_state_with_a_plain_optimizer():
    dense, state = _extras_state(optax.sgd(0.1))
    grads = gradient(dense.apply, state.params)
    new = state.apply_gradients(grads=grads)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    assert_close(new.params, expected)


@pytest.mark.parametrize("extras", [False, True], ids=["held_out", "extras"])
def test_nnx_optimizer(extras):
    network = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    graph = nnx.graphdef(network)

    def metric(params, batch):
        x, y = batch
        return -jnp.square(nnx.merge(graph, params)(x) - y).mean(axis=1)

    assess_fn = metric if extras else optax_ev3.held_out(metric, HELD, 8)
    tx = optax_ev3.ev3(inner(), assess_fn)
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)

    def loss(network):
        return jnp.square(network(TRAIN[0]) - TRAIN[1]).mean()

    @nnx.jit
    def step(network, optimizer, batch):
        value, grads = nnx.value_and_grad(loss)(network)
        kwargs = {"batch": batch} if extras else {}
        optimizer.update(network, grads, **kwargs)
        return value

    losses = [float(step(network, optimizer, HELD)) for _ in range(60)]
    assert losses[-1] < 0.05 * losses[0]
    state = nnx.to_pure_dict(nnx.state(optimizer))
    assert int(state["step"]) == 60


class Net(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.first(x))


def net_loss(net):
    return jnp.square(net(TRAIN[0]) - TRAIN[1]).mean()


def net_score(params):
    net = nnx.merge(nnx.graphdef(Net()), params)
    return -jnp.square(net(HELD[0]) - HELD[1]).mean(axis=1)


def parts():
    """An optimizer for each layer: the states of both have holes."""

    def labels(params):
        def label(path, leaf):
            del leaf
            return "adam" if "first" in jax.tree_util.keystr(path) else "sgd"

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition({"adam": optax.adam(0.05), "sgd": optax.sgd(0.05)}, labels)


STRATEGIES = {
    "one_step": {},
    "own": {"explore": explore.rounds(2, gradients="own")},
    "shared": {"explore": explore.rounds(2, gradients="shared")},
    "never": {"explore": explore.branches(2)},
    "race": {"explore": explore.branches(1, racing=explore.Racing(1, 4))},
    "relay": {"explore": explore.relay(2, averages=[])},
}


def net_tx(strategy, inner, **kwargs):
    return optax_ev3.ev3(
        inner,
        net_score,
        loss_fn=lambda params: net_loss(nnx.merge(nnx.graphdef(Net()), params)),
        **{"adapt": always(0), **STRATEGIES[strategy], **kwargs},
    )


def train(tx, steps):
    net = Net()
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        optimizer.update(net, nnx.grad(net_loss)(net))

    for _ in range(steps):
        step(net, optimizer)
    return net, optimizer, step


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nnx_with_a_partition_inside(strategy):
    """The optimizer with holes, always adopted, trains as it does alone."""
    if flax.__version__ < "0.12":
        pytest.skip("nnx.Optimizer takes no optax.partition before Flax 0.12")
    steps = 6
    net, optimizer, _ = train(net_tx(strategy, [parts()]), steps)
    alone, *_ = train(parts(), steps)
    values = nnx.to_pure_dict(nnx.state(net)), nnx.to_pure_dict(nnx.state(alone))
    assert_close(*values, rtol=1e-4)
    # What is to be read in its state, eager and under jit.
    for read in (optax_ev3.summary, nnx.jit(optax_ev3.summary)):
        assert int(read(optimizer.opt_state)["ev3/calls"]) == steps
    past = optax_ev3.history(optimizer.opt_state)
    assert past["candidates"].tolist() == ["explorer_0", "current", "stable"]
    assert float(optax_ev3.credit(optimizer.opt_state)["explorer_0"]) == 0
    assert not optax_ev3.should_grow(optimizer.opt_state, 99)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nnx_stable_params_go_back_into_the_model(strategy):
    inner = [optax.adam(0.05), optax.sgd(0.05)]
    tx = net_tx(strategy, inner, adapt=adapt.greedy())
    net, optimizer, step = train(tx, 4)
    stable = optax_ev3.stable_params(optimizer.opt_state)
    pure = jax.tree.map(np.asarray, nnx.to_pure_dict(stable))
    step(net, optimizer)
    # What was read does not change with the optimizer.
    assert_close(nnx.to_pure_dict(stable), pure, rtol=0, atol=0)
    other = Net(seed=1)
    nnx.update(other, stable)
    assert isinstance(other.first.kernel, nnx.Param)
    assert_close(nnx.to_pure_dict(nnx.state(other, nnx.Param)), pure, rtol=0, atol=0)
    assert_close(net_score(nnx.to_pure_dict(stable)), net_score(pure))
    # The optimizer goes on from them.
    nnx.update(net, stable)
    step(net, optimizer)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("wrt", [nnx.Param, nnx.PathContains("first")])
def test_stable_params_are_variables_where_params_are(strategy, wrt):
    net = Net()
    _, params, rest = nnx.split(net, wrt, ...)

    def total(params):
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(params))

    kwargs = {"loss_fn": total, "adapt": adapt.greedy(), **STRATEGIES[strategy]}
    tx = optax_ev3.ev3([optax.adam(0.05)], lambda p: -total(p), **kwargs)

    @jax.jit
    def step(state, params):
        updates, state = tx.update(jax.grad(total)(params), state, params)
        return updates, state, optax.apply_updates(params, updates)

    state = tx.init(params)
    for _ in range(3):
        _, state, params = step(state, params)
    stable = optax_ev3.stable_params(state)
    assert_same_types(stable, nnx.state(net, wrt))
    assert jax.tree.structure(nnx.filter_state(stable, wrt)) == jax.tree.structure(
        params
    )
    # Back to where it was: as parameters of the next call, and in the model.
    updates, state, _ = step(state, stable)
    assert_same_types(updates, stable)
    nnx.update(net, stable)
    assert_close(nnx.state(net, wrt), stable, rtol=0, atol=0)
    assert_close(nnx.state(net, nnx.Not(wrt)), rest, rtol=0, atol=0)
