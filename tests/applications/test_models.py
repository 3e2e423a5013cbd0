"""Models that grow: against NumPy, Linen against NNX, in training, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx
from helpers import assert_finite, lenient, says

import optax_ev3
import optax_ev3.flax
from optax_ev3 import explore
from optax_ev3.growth import Growth, grow
from optax_ev3.models import linen, nnx

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DRAWN = np.random.default_rng(0)
X = DRAWN.normal(size=(24, 8, 8, 2)).astype(np.float32)
Y = DRAWN.integers(0, 3, 24)


@pytest.fixture(autouse=True)
def _flax_promotes_ranks():
    with lenient():
        yield


def flat(tree):
    """Arrays by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        "/".join(str(k.key) for k in path): np.asarray(leaf) for path, leaf in leaves
    }


def variables_of(model):
    """Those of an NNX model in the form of Linen."""
    kinds = {"params": flax_nnx.Param, "batch_stats": flax_nnx.BatchStat}
    return {
        k: flax_nnx.to_pure_dict(flax_nnx.state(model, v)) for k, v in kinds.items()
    }


def apart(one, other):
    """The largest difference over the largest value."""
    one, other = (np.asarray(x, np.float64) for x in (one, other))
    return np.abs(one - other).max() / np.abs(one).max()


def nll(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(Y))


# The networks themselves.


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(1, 83_892), (2, 181_108), (4, 375_540), (8, 764_404)],
)
def test_numbers_of_parameters(blocks, expected):
    x = jnp.ones([1, 32, 32, 3])
    one = linen.ResNet((blocks,) * 3, 100)
    shapes = jax.eval_shape(one.init, jax.random.key(0), x)
    assert count(shapes["params"]) == expected
    other = flax_nnx.eval_shape(
        lambda: nnx.ResNet(3, (blocks,) * 3, 100, rngs=flax_nnx.Rngs(0))
    )
    assert count(flax_nnx.state(other, flax_nnx.Param)) == expected


def _convolve(x, kernel, stride):
    """A convolution with zeros around, one output after the other."""
    n, height, width, _ = x.shape
    size = kernel.shape[0]
    out = np.zeros([n, -(-height // stride), -(-width // stride), kernel.shape[-1]])
    before = [
        max((o - 1) * stride + size - i, 0) // 2
        for i, o in zip((height, width), out.shape[1:3], strict=True)
    ]
    for i, j, a, b in np.ndindex(*out.shape[1:3], size, size):
        y, z = i * stride + a - before[0], j * stride + b - before[1]
        if 0 <= y < height and 0 <= z < width:
            out[:, i, j] += x[:, y, z] @ kernel[a, b]
    return out


def _resnet(variables, x, blocks, train):
    """Logits by NumPy, and the batch's statistics by name of the BatchNorm."""
    params, statistics = variables["params"], variables["batch_stats"]
    seen = {}

    def norm(x, *names):
        p, s = params, statistics
        for name in names:
            p, s = p[name], s[name]
        mean, var = s["mean"], s["var"]
        if train:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            seen["/".join(names)] = mean, var
        return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]

    def relu(x):
        return np.maximum(x, 0)

    x = relu(norm(_convolve(x, params["conv"]["kernel"], 1), "norm"))
    for stage, size in enumerate(blocks, 1):
        for block in range(1, size + 1):
            name = f"stage_{stage}_block_{block}"
            p, stride = params[name], 2 if block == 1 and stage > 1 else 1
            y = _convolve(x, p["conv_1"]["kernel"], stride)
            y = relu(norm(y, name, "norm_1"))
            y = norm(_convolve(y, p["conv_2"]["kernel"], 1), name, "norm_2")
            if stride == 2:
                x = _convolve(x, p["projection"]["kernel"], 2)
                x = norm(x, name, "norm_projection")
            x = relu(x + y)
    x = x.mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"], seen


def _random(tree, seed=0):
    """Positive numbers for scales and variances, any others else."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "train"])
def test_resnets_equal_numpy_and_each_other(train):
    blocks, x = (1, 2), X[:3, :5, :4]
    one = linen.ResNet(blocks, 3, filters=2)
    variables = _random(jax.eval_shape(one.init, jax.random.key(0), x))
    expected, seen = _resnet(variables, x, blocks, train)
    got, moved = one.apply(variables, x, train, mutable="batch_stats")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)

    other = nnx.ResNet(2, blocks, 3, filters=2, rngs=flax_nnx.Rngs(0))
    both = variables_of(other)
    assert {k: v.shape for k, v in flat(both).items()} == {
        k: v.shape for k, v in flat(variables).items()
    }
    flax_nnx.update(other, variables["params"])
    flax_nnx.update(other, variables["batch_stats"])
    other.train() if train else other.eval()
    np.testing.assert_allclose(other(x), got, rtol=1e-4, atol=1e-5)

    after = flat(moved["batch_stats"])
    for path, array in flat(variables_of(other)["batch_stats"]).items():
        np.testing.assert_allclose(array, after[path], rtol=1e-4, atol=1e-5)
        old = flat(variables["batch_stats"])[path]
        name, _, kind = path.rpartition("/")
        if train:
            new = seen[name][kind == "var"]
            np.testing.assert_allclose(
                array, 0.9 * old + 0.1 * new, rtol=1e-3, atol=1e-4
            )
        else:
            np.testing.assert_array_equal(array, old)


def test_mlps_equal_numpy_and_each_other():
    x = X[:, :2, :2]
    one = linen.MLP((5, 4), 3)
    variables = _random(jax.eval_shape(one.init, jax.random.key(0), x))
    p, expected = variables["params"], x.reshape(24, 8)
    for name in ("hidden_1", "hidden_2"):
        expected = np.maximum(expected @ p[name]["kernel"] + p[name]["bias"], 0)
    expected = expected @ p["head"]["kernel"] + p["head"]["bias"]
    other = nnx.MLP(8, (5, 4), 3, rngs=flax_nnx.Rngs(0))
    assert flat(variables_of(other)["params"]).keys() == flat(p).keys()
    flax_nnx.update(other, p)
    np.testing.assert_allclose(one.apply(variables, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other(x), expected, rtol=1e-4, atol=1e-5)


# Growth.

SMALL_X = X[:, :2, :2]
LINEN = {"mlp": linen.MLP((5,), 3), "resnet": linen.ResNet((1, 1), 3, filters=2)}
KINDS = {
    "mlp deeper": ("mlp", ["deepen"]),
    "mlp wider": ("mlp", ["widen"]),
    "mlp all": ("mlp", ["deepen", "widen", "deepen"]),
    "resnet stage": ("resnet", [("deepen", {"stage": 1})]),
    "resnet deeper": ("resnet", [("deepen", {"count": 2})]),
    "resnet wider": ("resnet", ["widen"]),
    "resnet all": ("resnet", [("deepen", {"stage": 2}), "widen", "deepen"]),
}


def grown(model, step, **kwargs):
    name, args = (step, {}) if isinstance(step, str) else step
    return getattr(model, name)(**args, **kwargs)


def _trained(name):
    """What BatchNorm and Adam have after some training, by random numbers."""
    model = LINEN[name]
    x = SMALL_X if name == "mlp" else X
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return model, x, _random(shapes)


@functools.cache
def _initial(model, shape, seed):
    return jax.jit(model.init)(jax.random.key(seed), jnp.ones(shape))


def _run(model, variables, x, train):
    return model.apply(variables, x, train, mutable="batch_stats")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_growth_keeps_the_function(kind):
    name, steps = KINDS[kind]
    model, x, variables = _trained(name)
    tx = optax.sgd(0.1, momentum=0.9)
    state = tx.init(variables)
    before = [_run(model, variables, x, train) for train in (False, True)]
    for seed, step in enumerate(steps):
        model, how = grown(model, step)
        fresh = _initial(model, x.shape, seed)
        variables, state = grow(tx, state, variables, fresh, how)
    after = [_run(model, variables, x, train) for train in (False, True)]
    for one, other in zip(before, after, strict=True):
        assert apart(one, other) < 1e-5
    assert jax.tree.structure(state[0].trace) == jax.tree.structure(variables)


def _nnx_of(name, variables):
    rngs = flax_nnx.Rngs(0)
    if name == "mlp":
        model = nnx.MLP(8, (5,), 3, rngs=rngs)
    else:
        model = nnx.ResNet(2, (1, 1), 3, filters=2, rngs=rngs)
    for tree in variables.values():
        flax_nnx.update(model, tree)
    return model


def _outputs(model, x):
    """In inference and in training, whose statistics are not kept."""
    out = []
    for train in (False, True):
        graph, state = flax_nnx.split(model)
        one = flax_nnx.merge(graph, jax.tree.map(jnp.array, state))
        one.train() if train else one.eval()
        out.append(np.asarray(one(x)))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_growth_keeps_the_function_of_nnx(kind):
    name, steps = KINDS[kind]
    _, x, variables = _trained(name)
    model = _nnx_of(name, variables)
    tx = optax.sgd(0.1, momentum=0.9)
    optimizer = flax_nnx.Optimizer(model, tx, wrt=flax_nnx.Param)
    before = _outputs(model, x)
    for seed, step in enumerate(steps):
        larger, how = grown(model, step, rngs=flax_nnx.Rngs(seed))
        optimizer = optax_ev3.flax.grow_nnx(model, optimizer, larger, tx, how)
        model = larger
    for one, other in zip(before, _outputs(model, x), strict=True):
        assert apart(one, other) < 1e-5


_NEW = {
    "mlp deeper": ("mlp", "deepen"),
    "mlp wider": ("mlp", "widen"),
    "resnet deeper": ("resnet", "deepen"),
    "resnet wider": ("resnet", "widen"),
}


@pytest.mark.parametrize("kind", _NEW)
def test_what_is_new_learns(kind):
    name, step = _NEW[kind]
    model = LINEN[name]
    x = SMALL_X if name == "mlp" else X
    old = dict(_initial(model, x.shape, 1))
    larger, how = grown(model, step)
    new = optax_ev3.growth.transplant(old, _initial(larger, x.shape, 2), how)

    @jax.jit
    def gradient(params):
        def loss(params):
            return nll(_run(larger, {**new, "params": params}, x, True)).mean()

        return jax.grad(loss)(params)

    params = new["params"]
    params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient(params))
    before, total, moved = flat(old["params"]), 0, 0
    for path, grad in flat(gradient(params)).items():
        is_new = np.ones(grad.shape, bool)
        if path in before:
            is_new[tuple(map(slice, before[path].shape))] = False
        if not is_new.any():
            continue
        assert (grad[is_new] != 0).any(), path
        total += is_new.sum()
        moved += (grad[is_new] != 0).sum()
    # All, but for units that are never active, or never together.
    assert moved >= 0.9 * total > 20


def _state_of(optimizer):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(flax_nnx.state(optimizer))
    }


def test_nnx_takes_everything_along():
    """The state of ev3, whose rounds without progress count anew."""
    tx = optax_ev3.ev3(
        {"adam": optax.adam(0.01), "sgd": optax.sgd(0.1, momentum=0.9)},
        lambda params: jnp.zeros([]),
        explore=explore.rounds(3),
    )
    model = nnx.ResNet(2, (1,), 3, filters=2, rngs=flax_nnx.Rngs(0))
    optimizer = flax_nnx.Optimizer(model, tx, wrt=flax_nnx.Param)
    rng = np.random.default_rng(0)

    def draw(leaf):
        kind = rng.integers(1, 9, leaf.shape) if leaf.dtype.kind in "iu" else None
        kind = rng.uniform(0.1, 1, leaf.shape) if kind is None else kind
        return jnp.asarray(kind, leaf.dtype)

    flax_nnx.update(optimizer, jax.tree.map(draw, flax_nnx.state(optimizer)))
    before = _state_of(optimizer)
    larger, how = model.widen(rngs=flax_nnx.Rngs(1))
    new = optax_ev3.flax.grow_nnx(model, optimizer, larger, tx, how)
    into = _state_of(flax_nnx.Optimizer(larger, tx, wrt=flax_nnx.Param))
    after = _state_of(new)
    assert after.keys() == before.keys() == into.keys()
    for path, array in after.items():
        expected = np.array(into[path])
        expected[tuple(map(slice, before[path].shape))] = before[path]
        if "'since'" in path:
            expected = 0
        np.testing.assert_array_equal(array, expected, err_msg=path)
    # Statistics of BatchNorm belong to the model.
    old, grew = (flat(variables_of(m)["batch_stats"]) for m in (model, larger))
    for path, array in grew.items():
        np.testing.assert_array_equal(array[: len(old[path])], old[path])


class Dropping(flax_nnx.Module):
    """With a PRNG key among its variables."""

    def __init__(self, width, seed):
        rngs = flax_nnx.Rngs(seed)
        self.hidden = flax_nnx.Linear(8, width, rngs=rngs)
        self.dropout = flax_nnx.Dropout(0.5, rngs=rngs)
        self.head = flax_nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(flax_nnx.relu(self.hidden(x))))


def test_nnx_trains_on():
    tx = optax_ev3.ev3(
        {"adam": optax.adam(0.01), "sgd": optax.sgd(0.1)}, lambda params: jnp.ones([])
    )
    x = jnp.asarray(SMALL_X.reshape(24, 8))

    @flax_nnx.jit
    def step(model, optimizer):
        value, grads = flax_nnx.value_and_grad(lambda m: nll(m(x)).mean())(model)
        optimizer.update(model, grads)
        return value

    model, larger = Dropping(4, 0), Dropping(7, 1)
    optimizer = flax_nnx.Optimizer(model, tx, wrt=flax_nnx.Param)
    for _ in range(2):
        step(model, optimizer)
    new = optax_ev3.flax.grow_nnx(model, optimizer, larger, tx)
    for one in (model, larger):
        one.eval()
    assert apart(model(x), larger(x)) < 1e-5
    for one in (model, larger):
        one.train()
    # Its random numbers go on as well.
    assert larger.dropout.rngs.count[...] == model.dropout.rngs.count[...] == 2
    for _ in range(2):
        assert np.isfinite(step(larger, new))


def test_nnx_changes_nothing_that_does_not_fit():
    tx = optax_ev3.ev3([optax.adam(0.1)], lambda params: jnp.zeros([]))
    model = nnx.MLP(8, (4,), 3, rngs=flax_nnx.Rngs(0))
    optimizer = flax_nnx.Optimizer(model, tx, wrt=flax_nnx.Param)
    larger, how = model.widen(rngs=flax_nnx.Rngs(1))

    def everything():
        return [
            np.array(leaf)
            for one in (model, optimizer, larger)
            for leaf in jax.tree.leaves(flax_nnx.state(one))
        ]

    before = everything()
    other = optax_ev3.ev3({"other": optax.adam(0.1)}, lambda params: jnp.zeros([]))
    with says(ValueError, "the same explorers and settings"):
        optax_ev3.flax.grow_nnx(model, optimizer, larger, other, how)
    with says(ValueError, "matches 'hidden_9/*'"):
        how = Growth(identity=["hidden_9"])
        optax_ev3.flax.grow_nnx(model, optimizer, larger, tx, how)
    with says(ValueError, "growth cannot put", "none of them shorter"):
        optax_ev3.flax.grow_nnx(larger, optimizer, model, tx)
    for one, other in zip(before, everything(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_resnets_train_and_grow():
    """With BatchNorm's statistics among the parameters, as Linen has them."""

    def merge(variables, aux):
        return {**variables, "batch_stats": aux}

    def make(model):
        def loss(variables):
            logits, new = model.apply(
                variables, jnp.asarray(X), True, mutable="batch_stats"
            )
            return nll(logits).mean(), new["batch_stats"]

        return optax_ev3.ev3(
            {"adam": optax_ev3.explorer(optax.adam(0.01), loss, merge_fn=merge)},
            lambda variables: -nll(model.apply(variables, jnp.asarray(X))),
            explore=explore.rounds(2),
        )

    def run(model, variables, state, steps):
        tx = make(model)
        state = tx.init(variables) if state is None else state

        @jax.jit
        def step(variables, state):
            nothing = jax.tree.map(jnp.zeros_like, variables)
            updates, state = tx.update(nothing, state, variables)
            return optax.apply_updates(variables, updates), state

        for _ in range(steps):
            variables, state = step(variables, state)
        return variables, state

    model = linen.ResNet((1, 1), 3, filters=2)
    variables, state = run(model, _initial(model, X.shape, 0), None, 5)
    larger, how = model.deepen()
    small, large = (jax.jit(lambda v, m=m: m.apply(v, X)) for m in (model, larger))
    start = nll(small(variables)).mean()
    new, state = grow(
        make(larger),
        state,
        variables,
        _initial(larger, X.shape, 1),
        how,
        check=(small, large),
    )
    new, state = run(larger, new, state, 20)
    assert_finite((new, state))
    assert nll(large(new)).mean() < start


# Bad input.


def _models():
    rngs = flax_nnx.Rngs(0)
    return {
        "linen": (LINEN["mlp"], LINEN["resnet"], {}),
        "nnx": (
            nnx.MLP(8, (5,), 3, rngs=rngs),
            nnx.ResNet(2, (1, 1), 3, filters=2, rngs=rngs),
            {"rngs": rngs},
        ),
    }


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_growth_of_models_checks_its_arguments(library):
    mlp, resnet, kwargs = _models()[library]
    for stage in (0, 3, -1):
        with says(ValueError, f"stage must be from 1 to 2, got {stage}"):
            resnet.deepen(stage=stage, **kwargs)
    for bad in (1.0, "1", True):
        with says(TypeError, "stage must be an integer", repr(bad)):
            resnet.deepen(stage=bad, **kwargs)
    for bad in (0, -1):
        with says(ValueError, f"count must be at least 1, got {bad}"):
            resnet.deepen(count=bad, **kwargs)
    with says(TypeError, "count must be an integer, got 1.5"):
        resnet.deepen(count=1.5, **kwargs)
    for model in (mlp, resnet):
        for bad in (1, 0, -2):
            with says(ValueError, f"factor must be at least 2, got {bad}"):
                model.widen(bad, **kwargs)
        with says(TypeError, "factor must be an integer, got 1.5"):
            model.widen(1.5, **kwargs)


def test_an_mlp_without_hidden_layers():
    rngs = flax_nnx.Rngs(0)
    models = {
        "linen": (linen.MLP((), 3), {}),
        "nnx": (nnx.MLP(8, (), 3, rngs=rngs), {"rngs": rngs}),
    }
    for model, kwargs in models.values():
        for change in (model.deepen, model.widen):
            with says(ValueError, "an MLP without hidden layers cannot grow"):
                change(**kwargs)
