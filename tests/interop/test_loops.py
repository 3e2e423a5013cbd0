"""Training loops of others: ev3 takes the place of the optimizer in each.

Every loop runs on a tiny problem, in rounds of one step and in trajectories. With one
explorer that is always adopted it must train as the explorer does alone; with two, one
of them harmful, it must learn. Loops that own the loss and pass no keywords assess
by closures and by `held_out`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from helpers import always, assert_close, lenient, x64

import optax_ev3
import optax_ev3.flax
from optax_ev3 import explore

pytestmark = [
    pytest.mark.loops,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

STEPS = 40
RATE = 0.05
HARMFUL = {"adam": optax.adam(RATE), "ascent": optax.sgd(-0.05)}
TRAJECTORIES = {"explore": explore.branches(5)}
# Arguments of ev3, and whether it gets the loss.
SETTINGS = {
    "one_step": ({}, False),
    "shared": (TRAJECTORIES, False),
    "own": (TRAJECTORIES, True),
}

DRAWN = np.random.default_rng(0)
X = DRAWN.normal(size=(48, 3)).astype(np.float32)
Y = X @ np.array([1.0, -2.0, 0.5], np.float32) + 0.3
PAIRS = DRAWN.normal(size=(64, 2)).astype(np.float32)
TRAIN, HELD = (X[:32], Y[:32]), (X[32:], Y[32:])


@pytest.fixture(autouse=True)
def _foreign_code_promotes_ranks():
    with lenient():
        yield


@dataclasses.dataclass
class Trained:
    """What a loop did.

    Attributes:
      before: Loss at the start, on data that no gradient saw.
      after: The same at the end.
      params: At the end.
      state: Anything that holds the optimizer's state; None where the loop hides it.
    """

    before: Any
    after: Any
    params: Any
    state: Any = None


# Makes an optimizer from what assesses, from a loss, and from what is to be put around
# every inner optimizer, if anything.
Make = Callable[..., optax.GradientTransformationExtraArgs]
LOOPS: dict[str, Callable[[Make], Trained]] = {}


def loop(fn):
    """Registers a loop by its name."""
    LOOPS[fn.__name__] = fn
    return fn


def errors(predict, params, batch):
    """Squared errors ``[n]`` of the shared regression problem."""
    x, y = batch
    return jnp.square(predict(params, x).reshape(y.shape) - y)


def regression(predict):
    """Score of any batch, loss of the training batch and held-out loss of a model."""

    def score(params, batch):
        return -errors(predict, params, batch)

    def loss(params):
        return errors(predict, params, TRAIN).mean()

    return score, loss, lambda params: errors(predict, params, HELD).mean()


# Libraries that own the loop.


@loop
def numpyro_svi(make):
    numpyro = pytest.importorskip("numpyro")
    from numpyro import distributions as dist
    from numpyro.infer import SVI, Trace_ELBO

    def model(x):
        mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        loc = numpyro.param("loc", 0.0)
        scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
        numpyro.sample("mean", dist.Normal(loc, scale))

    data = Y + 2.0

    def loss(params, key):
        return svi.loss.loss(key, svi.constrain_fn(params), model, guide, data)

    def score(params, key):
        keys = jax.random.split(key, 8)
        return -jax.vmap(functools.partial(loss, params))(keys)

    tx = make(score, loss)
    svi = SVI(model, guide, numpyro.optim.optax_to_numpyro(tx), Trace_ELBO())
    run = svi.run(jax.random.key(0), STEPS * 2, data, progress_bar=False)
    _, (params, state) = run.state.optim_state
    return Trained(run.losses[0], run.losses[-8:].mean(), params, state)


@loop
def flowjax_fit_to_data(make):
    pytest.importorskip("flowjax")
    import equinox as eqx
    import paramax
    from flowjax import bijections, distributions
    from flowjax.train import fit_to_data

    start = distributions.Transformed(
        distributions.Normal(jnp.zeros(2)), bijections.Affine(jnp.zeros(2), jnp.ones(2))
    )
    data = jnp.asarray(3.0 + 0.5 * PAIRS)
    _, static = eqx.partition(
        start,
        eqx.is_inexact_array,
        is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
    )

    def log_prob(params, x):
        return paramax.unwrap(eqx.combine(params, static)).log_prob(x)

    def loss(params):
        return -log_prob(params, data).mean()

    trained, _ = fit_to_data(
        jax.random.key(0),
        start,
        data,
        optimizer=make(optax_ev3.held_out(log_prob, data), loss),
        max_epochs=STEPS,
        max_patience=STEPS,
        batch_size=len(data),
        return_best=False,
        show_progress=False,
    )
    params = eqx.filter(trained, eqx.is_inexact_array)
    return Trained(-start.log_prob(data).mean(), loss(params), params)


@loop
def optimistix_minimise(make):
    optx = pytest.importorskip("optimistix")

    def loss(p, args=None):
        return jnp.square(p["a"] - 3.0).sum() + jnp.square(p["b"] + 1.0)

    start = {"a": jnp.zeros(2), "b": jnp.zeros([])}
    tx = make(lambda p: -loss(p), loss)
    solver = optx.OptaxMinimiser(tx, rtol=1e-8, atol=1e-8)
    found = optx.minimise(loss, solver, start, max_steps=STEPS * 2, throw=False)
    return Trained(loss(start), loss(found.value), found.value, found.state.opt_state)


@loop
def gpjax_fit(make):
    gpx = pytest.importorskip("gpjax")
    import equinox as eqx

    def objective(model, data):
        return -gpx.objectives.conjugate_mll(model, data)

    def loss(params):
        return objective(eqx.combine(params, static), data)

    with x64():  # As GPJax asks for.
        x = jnp.linspace(0.0, 3.0, 16)[:, None]
        data = gpx.Dataset(X=x, y=jnp.sin(3 * x))
        prior = gpx.gps.Prior(
            mean_function=gpx.mean_functions.Zero(), kernel=gpx.kernels.RBF()
        )
        start = prior * gpx.likelihoods.Gaussian()
        static = eqx.filter(start, eqx.is_array, inverse=True)
        trained, history = gpx.fit(
            model=start,
            objective=objective,
            train_data=data,
            optim=make(lambda params: -loss(params), loss),
            num_iters=STEPS,
            verbose=False,
        )
        params = eqx.filter(trained, eqx.is_array)
        return Trained(float(history[0]), float(loss(params)), params)


@loop
def jaxopt_optax_solver(make):
    jaxopt = pytest.importorskip("jaxopt")
    score, loss, held_out_loss = regression(_linear)
    solver = jaxopt.OptaxSolver(
        lambda params, batch: errors(_linear, params, batch).mean(),
        make(optax_ev3.held_out(score, HELD, 8), loss),
        maxiter=STEPS * 2,
        tol=0.0,
    )
    start = {"w": jnp.zeros(3), "b": jnp.zeros([])}
    params, state = solver.run(start, TRAIN)
    before, after = map(held_out_loss, (start, params))
    return Trained(before, after, params, state.internal_state)


def _linear(params, x):
    return x @ params["w"] + params["b"]


@loop
def blackjax_meanfield_vi(make):
    blackjax = pytest.importorskip("blackjax")
    from blackjax.vi import meanfield_vi

    def logdensity(x):
        return -2.0 * jnp.square(x - 1.5).sum()

    def gains(params, key):
        """Log density over that of the approximation, of 16 draws from it."""
        draws = meanfield_vi._sample(key, *params, 16)
        own = meanfield_vi.generate_meanfield_logdensity(*params)
        return jax.vmap(logdensity)(draws) - jax.vmap(own)(draws)

    def loss(params, key):
        return -gains(params, key).mean()

    algorithm = blackjax.meanfield_vi(logdensity, make(gains, loss), num_samples=8)
    state = start = algorithm.init(jnp.zeros(2))
    step = jax.jit(algorithm.step)
    for key in jax.random.split(jax.random.key(0), STEPS):
        state, _ = step(key, state)
    before, after = (loss((s.mu, s.rho), jax.random.key(1)) for s in (start, state))
    return Trained(before, after, (state.mu, state.rho), state.opt_state)


@loop
def blackjax_svgd(make):
    blackjax = pytest.importorskip("blackjax")

    def logdensity(x):
        return -2.0 * jnp.square(x - 1.5).sum()

    def score(particles):
        return jax.vmap(logdensity)(particles)

    # Particles repel each other: no loss has the direction as its gradient.
    tx = make(score, lambda particles: -score(particles).mean())
    algorithm = blackjax.svgd(jax.grad(logdensity), tx)
    state = algorithm.init(jax.random.normal(jax.random.key(0), [6, 2]))
    before = -score(state.particles).mean()
    step = jax.jit(algorithm.step)
    for _ in range(STEPS):
        state = step(state)
    particles = state.particles
    return Trained(before, -score(particles).mean(), particles, state.opt_state)


@loop
def penzai_stateful_trainer(make):
    pytest.importorskip("penzai")
    from penzai import pz
    from penzai.toolshed import basic_training

    model = pz.nn.Affine.from_config(
        "affine", jax.random.key(0), input_axes={"in": 3}, output_axes={"out": 1}
    )
    stateless, _ = pz.unbind_params(model)

    def predict(model, x):
        named = pz.nx.wrap(x).tag("batch", "in")
        return model(named).untag("batch", "out").unwrap()

    score, loss, held_out_loss = regression(
        lambda params, x: predict(pz.bind_variables(stateless, params), x)
    )

    def loss_fn(*, model, state, rng, x, y):
        del rng
        return jnp.square(predict(model, x)[:, 0] - y).mean(), state, ()

    trainer = basic_training.StatefulTrainer.build(
        jax.random.key(0), model, make(optax_ev3.held_out(score, HELD), loss), loss_fn
    )

    def params():
        return pz.freeze_params(pz.unbind_params(model)[1])

    before = held_out_loss(params())
    for _ in range(STEPS):
        trainer.step(x=TRAIN[0], y=TRAIN[1])
    after, opt_state = held_out_loss(params()), trainer.state.value.opt_state
    return Trained(before, after, params(), opt_state)


# Loops of one's own in other frameworks: held-out batches, and what a model needs
# beside its parameters, are keywords. No layer before a BatchNorm has a bias: its
# gradient would be nothing but rounding errors, which Adam makes large.


@loop
def equinox_filter(make):
    """As in Equinox's documentation: the whole model goes through the step."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, "scalar", 8, 1, key=jax.random.key(0))
    static = eqx.filter(model, eqx.is_array, inverse=True)
    score, loss, held_out_loss = regression(
        lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    )
    tx = make(score, loss)
    state = tx.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state, batch):
        grads = eqx.filter_grad(lambda m: errors(_each, m, TRAIN).mean())(model)
        params = eqx.filter(model, eqx.is_array)
        updates, state = tx.update(grads, state, params, batch=batch)
        return eqx.apply_updates(model, updates), state

    before = held_out_loss(model)
    for _ in range(STEPS):
        model, state = step(model, state, HELD)
    params = eqx.filter(model, eqx.is_array)
    return Trained(before, held_out_loss(params), params, state)


def _each(model, x):
    return jax.vmap(model)(x)


@loop
def equinox_partition(make):
    """The parameters alone go through `jax.jit`; they are callable like the model."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, "scalar", 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    score, loss, held_out_loss = regression(
        lambda params, x: _each(eqx.combine(params, static), x)
    )
    tx = make(score, loss)
    return _plain_loop(tx, params, loss, held_out_loss)


def _plain_loop(tx, params, loss, held_out_loss):
    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params), state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    before, state = held_out_loss(params), tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, HELD)
    return Trained(before, held_out_loss(params), params, state)


@loop
def equinox_batchnorm(make):
    """Running statistics in an `eqx.nn.State`, apart from the model."""
    eqx = pytest.importorskip("equinox")

    class Normed(eqx.Module):
        first: Any
        norm: Any
        last: Any

        def __init__(self, key):
            keys = jax.random.split(key)
            self.first = eqx.nn.Linear(3, 8, use_bias=False, key=keys[0])
            self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch")
            self.last = eqx.nn.Linear(8, "scalar", key=keys[1])

        def __call__(self, x, state):
            x, state = self.norm(self.first(x), state)
            return self.last(jax.nn.relu(x)), state

    model, statistics = eqx.nn.make_with_state(Normed)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(model, x, statistics):
        batched = jax.vmap(
            model, in_axes=(0, None), out_axes=(0, None), axis_name="batch"
        )
        return batched(x, statistics)

    def score(params, batch, statistics):
        model = eqx.nn.inference_mode(eqx.combine(params, static))
        return -errors(lambda m, x: apply(m, x, statistics)[0], model, batch)

    def loss_of(params, statistics):
        y, statistics = apply(eqx.combine(params, static), TRAIN[0], statistics)
        return jnp.square(y - TRAIN[1]).mean(), statistics

    tx = make(score, lambda params, statistics: loss_of(params, statistics)[0])

    @jax.jit
    def step(params, state, statistics, batch):
        grads, new = jax.grad(loss_of, has_aux=True)(params, statistics)
        updates, state = tx.update(
            grads, state, params, batch=batch, statistics=statistics
        )
        return optax.apply_updates(params, updates), state, new

    before, state = -score(params, HELD, statistics).mean(), tx.init(params)
    for _ in range(STEPS):
        params, state, statistics = step(params, state, statistics, HELD)
    return Trained(before, -score(params, HELD, statistics).mean(), params, state)


@loop
def haiku_transform_with_state(make):
    hk = pytest.importorskip("haiku")

    @hk.without_apply_rng
    @hk.transform_with_state
    def model(x, is_training):
        x = hk.Linear(8, with_bias=False)(x)
        x = hk.BatchNorm(True, True, decay_rate=0.5)(x, is_training)
        return hk.Linear(1)(jax.nn.relu(x))[:, 0]

    params, statistics = model.init(jax.random.key(0), X, True)

    def score(params, batch, statistics):
        return -errors(
            lambda p, x: model.apply(p, statistics, x, False)[0], params, batch
        )

    def loss_of(params, statistics):
        y, statistics = model.apply(params, statistics, TRAIN[0], True)
        return jnp.square(y - TRAIN[1]).mean(), statistics

    tx = make(score, lambda params, statistics: loss_of(params, statistics)[0])

    @jax.jit
    def step(params, state, statistics, batch):
        grads, new = jax.grad(loss_of, has_aux=True)(params, statistics)
        updates, state = tx.update(grads, state, params, batch=batch, statistics=new)
        return optax.apply_updates(params, updates), state, new

    before, state = -score(params, HELD, statistics).mean(), tx.init(params)
    for _ in range(STEPS):
        params, state, statistics = step(params, state, statistics, HELD)
    return Trained(before, -score(params, HELD, statistics).mean(), params, state)


@loop
def linen_batch_stats(make):
    """BatchNorm outside of the parameters: a field of the TrainState."""

    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.Dense(8, use_bias=False)(x)
            x = linen.BatchNorm(use_running_average=not train, momentum=0.5)(x)
            return linen.Dense(1)(linen.relu(x))[:, 0]

    class TrainState(optax_ev3.flax.TrainState):
        batch_stats: Any

    model = Normed()

    def score(params, batch, statistics):
        variables = {"params": params, "batch_stats": statistics}
        return -errors(lambda v, x: model.apply(v, x, False), variables, batch)

    def loss_of(params, statistics):
        variables = {"params": params, "batch_stats": statistics}
        y, new = model.apply(variables, TRAIN[0], True, mutable=["batch_stats"])
        return jnp.square(y - TRAIN[1]).mean(), new["batch_stats"]

    variables = model.init(jax.random.key(0), X, False)
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=make(score, lambda params, statistics: loss_of(params, statistics)[0]),
        batch_stats=variables["batch_stats"],
    )

    @jax.jit
    def step(state, batch):
        grads, new = jax.grad(loss_of, has_aux=True)(state.params, state.batch_stats)
        # The name of a field sets the field, any other reaches the optimizer.
        return state.apply_gradients(
            grads=grads, batch=batch, batch_stats=new, statistics=new
        )

    def held_out_loss(state):
        return -score(state.params, HELD, state.batch_stats).mean()

    before = held_out_loss(state)
    for _ in range(STEPS):
        state = step(state, HELD)
    return Trained(before, held_out_loss(state), state.params, state)


def _nnx_loop(make, each=lambda tx: tx, around=lambda tx: tx):
    """`nnx.Optimizer`, with wrappers of every inner optimizer and of their whole."""
    model = nnx.Sequential(
        nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 1, rngs=nnx.Rngs(1))
    )
    graph, start = nnx.split(model, nnx.Param)
    score, loss, held_out_loss = regression(
        lambda params, x: nnx.merge(graph, params)(x)
    )
    tx = around(make(score, loss, each))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        grads = nnx.grad(lambda m: errors(lambda m, x: m(x), m, TRAIN).mean())(model)
        optimizer.update(model, grads, batch=batch)

    before = held_out_loss(start)
    for _ in range(STEPS):
        step(model, optimizer, HELD)
    params = nnx.state(model, nnx.Param)
    return Trained(
        before, held_out_loss(params), nnx.to_pure_dict(params), optimizer.opt_state
    )


@loop
def nnx_optimizer(make):
    return _nnx_loop(make)


@loop
def nnx_partition(make):
    """Inside ev3, where some parameters are frozen: holes in NNX's variables."""
    if flax.__version__ < "0.12":
        pytest.skip("nnx.Optimizer takes no optax.partition before Flax 0.12")

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if "bias" in str(path) else "trained", params
        )

    def each(tx):
        return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)

    return _nnx_loop(make, each)


@loop
def nnx_multi_steps(make):
    """Around ev3: two gradients make a step."""
    return _nnx_loop(make, around=lambda tx: optax.MultiSteps(tx, 2))


@functools.cache
def _alone(name):
    """The loop with a plain optimizer of optax."""
    return LOOPS[name](_plain)


def _plain(score, loss, each=lambda tx: tx):
    del score, loss
    return optax.with_extra_args_support(each(optax.adam(RATE)))


def _maker(inner, setting, **kwargs):
    arguments, own = SETTINGS[setting]

    def make(score, loss, each=lambda tx: tx):
        return optax_ev3.ev3(
            {name: each(tx) for name, tx in inner.items()},
            score,
            loss_fn=loss if own else None,
            **arguments,
            **kwargs,
        )

    return make


@pytest.mark.parametrize("setting", ["one_step", "own"])
@pytest.mark.parametrize("name", LOOPS)
def test_one_explorer_that_is_always_adopted_is_plain_optax(name, setting):
    make = _maker({"adam": optax.adam(RATE)}, setting, adapt=always(0))
    trained, expected = LOOPS[name](make), _alone(name)
    # Two models may differ in functions that are part of their structure.
    found, wanted = (jax.tree.leaves(x.params) for x in (trained, expected))
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOOPS)
def test_learns_beside_a_harmful_explorer(name):
    trained = LOOPS[name](_maker(HARMFUL, "shared"))
    alone = _alone(name)
    gain, expected = trained.before - trained.after, alone.before - alone.after
    assert expected > 0 and gain > 0.5 * expected
    if trained.state is not None:
        shown = optax_ev3.summary(trained.state)
        assert shown["ev3/round"] > 0 and shown["ev3/skipped"] == 0
        assert shown["ev3/share/adam"] > shown["ev3/share/ascent"]
