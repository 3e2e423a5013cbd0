"""Distillation against NumPy, and students that learn under ``ev3``."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import always, assert_finite, says, x64
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from sklearn.datasets import load_digits

import optax_ev3
from optax_ev3 import distillation

OPTIONS = [
    {"reverse": reverse, "standardize": standardize}
    for reverse, standardize in itertools.product([False, True], repeat=2)
]


def draw(*shape, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(size=shape) * scale


def oracle(z, t, temperature=1.0, *, reverse=False, power=2, standardize=False):
    """The loss by its definition, in float64."""
    z, t = np.asarray(z, np.float64), np.asarray(t, np.float64)
    if standardize:
        z, t = ((x - x.mean(-1, keepdims=True)) / x.std(-1)[..., None] for x in (z, t))
    p, q = (special.softmax(x / temperature, axis=-1) for x in (z, t))
    if reverse:
        p, q = q, p
    return special.rel_entr(q, p).sum(-1) * temperature**power


def cross_entropy(z, labels):
    rows = special.log_softmax(np.asarray(z, np.float64), axis=-1)
    return -np.take_along_axis(rows, np.asarray(labels)[..., None], -1)[..., 0]


# The loss.


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("temperature, power", [(1, 2), (0.5, 1), (4.0, 2), (3.0, 0)])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4)])
def test_definition(options, temperature, power, shape):
    z, t = (draw(*shape, seed=seed).astype(np.float32) for seed in (0, 1))
    options = {**options, "power": power}
    actual = distillation.soft_target_loss(z, t, temperature, **options)
    assert (actual.dtype, actual.shape) == (jnp.float32, shape[:-1])
    np.testing.assert_allclose(
        actual, oracle(z, t, temperature, **options), rtol=1e-5, atol=1e-5
    )


def test_two_classes_by_hand():
    # The teacher is undecided, the student's odds are e to 1.
    z, t = jnp.array([1.0, 0.0]), jnp.array([5.0, 5.0])
    p = np.e / (1 + np.e)
    forward = -np.log(2) - (np.log(p) + np.log(1 - p)) / 2
    reverse = np.log(2) + p * np.log(p) + (1 - p) * np.log(1 - p)
    loss = distillation.soft_target_loss
    np.testing.assert_allclose(loss(z, t), forward, rtol=1e-5)
    np.testing.assert_allclose(loss(z, t, reverse=True), reverse, rtol=1e-5)
    # Odds of e**2 softened by 2, and standardized logits of 1 and -1 likewise.
    for scale, standardize in [(2.0, False), (7.0, True)]:
        actual = loss(scale * z, t, 2.0, power=1, standardize=standardize)
        np.testing.assert_allclose(actual, 2 * forward, rtol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_at_high_temperatures_gradients_match_logits(reverse):
    # Hinton et al., equation 4: of centred logits, the gradient times T**2 nears this.
    with x64():
        z, t = (x - x.mean() for x in (draw(5), draw(5, seed=1)))
        gradient = jax.grad(distillation.soft_target_loss)
        actual = gradient(z, t, 1e4, reverse=reverse)
        np.testing.assert_allclose(actual, (z - t) / 5, rtol=1e-2)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_gradients_are_those_of_the_definition(options, temperature):
    z, t = draw(4), draw(4, seed=1)
    steps = 1e-6 * np.eye(4)
    ahead, behind = (
        np.array([oracle(z + sign * s, t, temperature, **options) for s in steps])
        for sign in (1, -1)
    )
    with x64():
        loss = distillation.soft_target_loss
        actual = jax.grad(loss)(z, t, temperature, **options)
        to_teacher = jax.grad(loss, argnums=1)(z, t, temperature, **options)
    np.testing.assert_allclose(actual, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-7)
    assert not np.asarray(to_teacher).any()


EXTREMES = [
    [1e4, -1e4, 0.0],
    [-1e4, 1e4, 0.0],
    [0.1, 0.1, 0.1],
    [1e4, 1e4, 1e4],
    [0.0, 0.0, 0.0],
    [0.0, 0.0, 1e-30],
    [0.3, 0.3, np.nextafter(np.float32(0.3), np.float32(1))],
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_extreme_logits(options, dtype):
    pairs = np.array(list(itertools.product(EXTREMES, repeat=2)))
    z, t = jnp.asarray(pairs[:, 0], dtype), jnp.asarray(pairs[:, 1], dtype)

    @jax.jit
    def gradient(temperature):
        def total(z):
            losses = distillation.soft_target_loss(z, t, temperature, **options)
            return losses.sum(), losses

        return jax.grad(total, has_aux=True)(z)

    for temperature in (0.1, 1.0, 20.0):
        slopes, losses = gradient(temperature)
        assert losses.dtype == jnp.float32 and slopes.dtype == dtype
        assert_finite([slopes, losses])


def test_extreme_logits_by_hand():
    z, t = jnp.array([1e4, -1e4]), jnp.array([-1e4, 1e4])
    for reverse in (False, True):
        actual = distillation.soft_target_loss(z, t, 4.0, reverse=reverse)
        np.testing.assert_allclose(actual, 16 * 2e4 / 4)


@pytest.mark.parametrize("level", [0.0, 0.1, 1e4, -3e30])
def test_equal_logits_are_standardized_to_uniform_probabilities(level):
    # Seven times 0.1 has a mean that is not 0.1.
    z, t = jnp.full([7], level), jnp.asarray(draw(7), jnp.float32)
    expected = oracle(np.zeros(7), (t - t.mean()) / np.std(t))
    for scale in (1e-30, 1.0, 1e30):
        actual = distillation.soft_target_loss(z, scale * t, standardize=True)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "dtypes, expected",
    [
        (("float16", "float16"), "float32"),
        (("bfloat16", "float16"), "float32"),
        (("float32", "int8"), "float32"),
        (("float64", "float64"), "float64"),
        (("float32", "float32"), "float32"),
    ],
)
@pytest.mark.parametrize("options", OPTIONS)
def test_dtypes(dtypes, expected, options):
    with x64():
        z, t = (jnp.asarray(draw(3, 4, seed=i), d) for i, d in enumerate(dtypes))
        actual = distillation.soft_target_loss(z, t, 2, **options)
        assert actual.dtype == expected
        wide = (np.asarray(x.astype(jnp.float64)) for x in (z, t))
        tolerance = 1e-12 if expected == "float64" else 1e-5
        np.testing.assert_allclose(
            actual, oracle(*wide, 2, **options), rtol=tolerance, atol=tolerance
        )


def test_traced_temperatures():
    z, t = draw(6, 4), draw(6, 4, seed=1)
    temperatures = np.array([0.5, 1.0, 3.0], np.float32)
    actual = jax.vmap(distillation.soft_target_loss, (None, None, 0))(
        z, t, jnp.asarray(temperatures)
    )
    expected = [oracle(z, t, temperature) for temperature in temperatures]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# One size: each is compiled anew.
LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3)
WHOLE = st.lists(st.integers(-20, 20), min_size=3, max_size=3)
PROPERTIES = settings(max_examples=50, deadline=None, derandomize=True)
COMPILED = jax.jit(
    distillation.soft_target_loss, static_argnames=["reverse", "power", "standardize"]
)


def compiled(z, t, *args, **kwargs):
    return float(COMPILED(np.float32(z), np.float32(t), *args, **kwargs))


@PROPERTIES
@given(LOGITS, LOGITS, st.floats(0.5, 20), st.sampled_from(OPTIONS))
def test_never_negative(z, t, temperature, options):
    assert compiled(z, t, temperature, power=0, **options) >= -1e-5
    assert compiled(z, z, temperature, power=0, **options) == 0


@PROPERTIES
@given(LOGITS, LOGITS, st.booleans())
def test_zero_only_for_the_same_distribution(z, t, reverse):
    # Pinsker's inequality.
    apart = np.abs(special.softmax(z) - special.softmax(t)).sum()
    assert compiled(z, t, reverse=reverse) >= apart**2 / 2 - 1e-5


@PROPERTIES
@given(LOGITS, LOGITS, st.integers(-50, 50), st.integers(-50, 50), st.booleans())
def test_shifts_change_nothing(z, t, first, second, reverse):
    before = compiled(z, t, 2.0, reverse=reverse)
    after = compiled(np.add(z, first), np.add(t, second), 2.0, reverse=reverse)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-3)


@PROPERTIES
@given(WHOLE, st.sampled_from([0.01, 0.3, 1, 7, 100]), st.integers(-5, 5))
def test_standardized_logits_have_no_place_and_no_scale(z, scale, shift):
    z, t = np.array(z), draw(3)
    before = compiled(z, t, standardize=True)
    after = compiled(scale * (z + shift), t / scale - shift, standardize=True)
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4)


# Losses of a student and a teacher.

X, T = draw(6, 4).astype(np.float32), draw(6, 3, seed=1).astype(np.float32)
Y = np.array([0, 1, 2, 2, 1, 0])
W = draw(4, 3, seed=2, scale=1.0).astype(np.float32)


def student(w, x):
    return x @ w


def student_aux(w, x):
    return x @ w, x.mean()


def teacher(t):
    return t


@pytest.mark.parametrize("hard", [0, 0.25, 1])
@pytest.mark.parametrize("make", [student, student_aux])
def test_mean_over_the_examples(hard, make):
    options = {"temperature": 3, "reverse": True, "power": 1, "standardize": True}
    loss = distillation.loss(make, teacher, hard=hard, **options)
    soft = oracle(X @ W, T, **options).mean() if hard < 1 else 0
    expected = (1 - hard) * soft + hard * cross_entropy(X @ W, Y).mean()
    extra = {"x": X} | ({"t": T} if hard < 1 else {}) | ({"labels": Y} if hard else {})
    value = jax.jit(loss)(W, **extra)
    if make is student_aux:
        value, aux = value
        np.testing.assert_allclose(aux, X.mean(), rtol=1e-5)
    assert (value.shape, value.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_sequences():
    z, t, y = draw(2, 5, 3), draw(2, 5, 3, seed=1), Y.repeat(2)[:10].reshape(2, 5)
    loss = distillation.loss(lambda w, x: w * x, teacher, hard=0.5)
    expected = oracle(z, t).mean() / 2 + cross_entropy(z, y).mean() / 2
    actual = loss(1.0, x=z, t=t, labels=y)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_half_precision_students_have_losses_of_full_precision():
    loss = distillation.loss(student, teacher, hard=0.5)
    w, x = W.astype(np.float16), X.astype(np.float16)
    expected = oracle(x @ w, T).mean() / 2 + cross_entropy(x @ w, Y).mean() / 2
    actual = loss(w, x=x, t=T, labels=Y)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-3)


SIGNATURES = {
    "(params, /, *, x, t)": (student, teacher, {}),
    "(params, /, *, x, t, labels)": (student, teacher, {"hard": 0.5}),
    "(params, /, *, x, t, y)": (student, teacher, {"hard": 0.5, "labels": "y"}),
    "(params, /, *, x, labels)": (student, teacher, {"hard": 1}),
    "(params, /, *, x)": (student, lambda x: x, {}),
    "(params, /, *, x, key)": (lambda w, x, key: x, lambda key, x: x, {}),
    "(params, /, *, x, train=True)": (lambda w, x, train=True: x, lambda x: x, {}),
    "(params, /, *, x, train)": (lambda w, x, train=True: x, lambda train: 0, {}),
    "(params, /, *, train, x)": (lambda w, train, x: x, lambda train=0: 0, {}),
    "(params, /, *, x, **rest)": (lambda w, x: x, lambda *args, **rest: 0, {}),
    "(params, /, *, x, teacher_x)": (
        student,
        distillation.archived(lambda v, teacher_x: teacher_x @ v, W),
        {},
    ),
    "(params, /, *, x, index)": (student, distillation.stored(T), {}),
}


@pytest.mark.parametrize("expected", SIGNATURES)
def test_signature_is_what_student_and_teacher_name(expected):
    make, teach, options = SIGNATURES[expected]
    signature = inspect.signature(distillation.loss(make, teach, **options))
    assert str(signature) == expected


def test_everybody_gets_what_they_name():
    given = {}

    def make(w, x, train=True, scale=1.0):
        given["student"] = (train, scale)
        return scale * x @ w

    def teach(t, train=False, **rest):
        given["teacher"] = (train, sorted(rest))
        return t

    loss = distillation.loss(make, teach, hard=0.5)
    loss(W, x=X, t=T, labels=Y, other=1)
    # Defaults are their own.
    assert given["student"] == (True, 1.0)
    assert given["teacher"] == (False, ["labels", "other", "x"])
    loss(W, x=X, t=T, labels=Y, train=3, scale=2.0)
    assert given["student"] == (3, 2.0)
    assert given["teacher"] == (3, ["labels", "scale", "x"])


@pytest.mark.parametrize(
    "options, name",
    [
        ({}, "soft_T1"),
        ({"temperature": 2, "reverse": True}, "soft_T2_reverse"),
        ({"temperature": 0.5, "power": 0, "hard": 0.1}, "soft_T0.5_power0_hard0.1"),
        ({"standardize": True}, "soft_T1_standardized"),
        ({"hard": 1, "temperature": 3}, "hard"),
    ],
)
def test_name(options, name):
    loss = distillation.loss(student, teacher, **options)
    assert loss.__name__ == name
    grid = optax_ev3.product({"sgd": optax.sgd(0.1)}, [loss])
    assert grid[0].name == f"sgd/{name}"


# Teachers.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int16"])
@pytest.mark.parametrize("index_dtype", ["int8", "int32", "uint32"])
def test_stored(dtype, index_dtype):
    logits = jnp.asarray(draw(300, 3), dtype)
    index = jnp.array([[0, 100], [7, 7]], index_dtype)
    rows = jax.jit(distillation.stored(logits, size=300))(index)
    assert rows.dtype == ("float32" if dtype == "int16" else dtype)
    np.testing.assert_array_equal(rows, np.asarray(logits)[[[0, 100], [7, 7]]])


@pytest.mark.parametrize("options", OPTIONS)
def test_stored_logits_that_are_not_there_are_nan(options):
    teach = distillation.stored(draw(300, 3))
    index = jnp.array([[0, 299], [0, -1], [-300, 1], [300, 2], [3, 10**9]])
    missing = [[0, 0], [0, 1], [1, 0], [1, 0], [0, 1]]
    rows = np.asarray(teach(index))
    np.testing.assert_array_equal(np.isnan(rows).all(-1), missing)
    np.testing.assert_array_equal(np.isnan(rows).any(-1), missing)
    loss = distillation.loss(lambda w, x: w * x, teach, hard=0.5, **options)

    @jax.jit
    @jax.vmap
    def slope(index):
        return jax.grad(loss)(1.0, x=draw(2, 3), index=index, labels=Y[:2])

    np.testing.assert_array_equal(np.isnan(slope(index)), np.any(missing, axis=1))


@pytest.mark.parametrize("make", [student, student_aux])
def test_archived(make):
    teach = distillation.archived(make, W)
    np.testing.assert_array_equal(teach(x=X), X @ W)
    loss = distillation.loss(lambda w, x: x @ w, teach)
    slope = jax.grad(loss)(jnp.asarray(W), x=X)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: distillation.stored(draw(6, 3, seed=seed)),
        lambda seed: distillation.archived(student, draw(4, 3, seed=seed)),
    ],
    ids=["stored", "archived"],
)
def test_teachers_are_arguments_of_jitted_functions(make):
    given, traced = {"x": X, "index": jnp.arange(6)}, []

    def slope(teacher, w):
        traced.append(None)
        loss = distillation.loss(student, teacher)
        wanted = inspect.signature(loss).parameters
        return jax.grad(loss)(w, **{k: given[k] for k in wanted if k in given})

    jitted = jax.jit(slope)
    found = np.array([jitted(make(seed), W) for seed in range(3)])
    assert len(traced) == 1
    np.testing.assert_allclose(found, [slope(make(s), W) for s in range(3)], atol=1e-6)
    assert np.ptp(found, axis=0).min() > 1e-3


# Errors.


def soft(*args, **kwargs):
    return lambda: distillation.soft_target_loss(*args, **kwargs)


def mixed(*args, call=None, **kwargs):
    def run():
        loss = distillation.loss(*args, **kwargs)
        offered = {"x": X, "t": T, "labels": Y, **(call or {})}
        extra = {
            k: offered[k] for k in inspect.signature(loss).parameters if k in offered
        }
        jax.eval_shape(lambda w: loss(w, **extra), W)

    return run


ERRORS = {
    "other classes": (
        mixed(student, teacher, hard=0.5, call={"t": T[:, :2]}),
        (ValueError, "one shape", "(6, 3)", "(6, 2)"),
    ),
    "other batch": (
        mixed(student, teacher, hard=0.5, call={"t": T[:1]}),
        (ValueError, "one shape", "(6, 3)", "(1, 3)"),
    ),
    "one class": (
        soft(X[:, :1], X[:, :1]),
        (ValueError, "student's logits", "two classes", "(6, 1)"),
    ),
    "no classes": (soft(1.0, 1.0), (ValueError, "[..., classes]", "()")),
    "complex": (soft(X, 1j * X), (TypeError, "teacher's logits", "real", "complex")),
    "teacher with aux": (
        mixed(student, lambda t: (t, 0), hard=0.5),
        (TypeError, "teacher's logits", "one array", "tuple of 2"),
    ),
    "student with more": (
        mixed(lambda w, x: (x, 1, 2), teacher, hard=0.5),
        (TypeError, "(logits, aux)", "3 values"),
    ),
    "temperature 0": (soft(X, X, 0), (ValueError, "temperature", "above 0", "0.0")),
    "temperature inf": (
        mixed(student, teacher, temperature=np.inf),
        (ValueError, "temperature", "finite", "inf"),
    ),
    "temperature nan": (soft(X, X, np.nan), (ValueError, "temperature", "nan")),
    "temperature a string": (soft(X, X, "warm"), (TypeError, "temperature", "'warm'")),
    "temperatures": (
        lambda: jax.jit(distillation.soft_target_loss)(X, X, np.ones(3)),
        (ValueError, "temperature must be a scalar", "(3,)"),
    ),
    "power 3": (soft(X, X, power=3), (ValueError, "power must be 0, 1 or 2", "3")),
    "power 0.5": (
        mixed(student, teacher, power=0.5),
        (TypeError, "power must be an integer", "0.5"),
    ),
    "hard": (mixed(student, teacher, hard=1.1), (ValueError, "from 0 to 1", "1.1")),
    "hard nan": (mixed(student, teacher, hard=np.nan), (ValueError, "hard", "nan")),
    "hard a string": (mixed(student, teacher, hard="yes"), (TypeError, "hard", "yes")),
    "labels' dtype": (
        mixed(student, teacher, hard=1, call={"labels": Y * 1.0}),
        (TypeError, "labels must be integer", "float"),
    ),
    "labels' shape": (
        mixed(student, teacher, hard=0.1, call={"labels": Y[:3]}),
        (ValueError, "labels", "(6,)", "(3,)"),
    ),
    "labels as a column": (
        mixed(student, teacher, hard=0.1, call={"labels": Y[:, None]}),
        (ValueError, "labels", "(6,)", "(6, 1)"),
    ),
    "one-hot labels": (
        mixed(student, teacher, hard=0.1, call={"labels": np.eye(3, dtype=int)[Y]}),
        (ValueError, "labels", "(6,)", "(6, 3)"),
    ),
    "student no function": (mixed(W, teacher), (TypeError, "student", "callable")),
    "student of nothing": (
        mixed(lambda: X, teacher),
        (TypeError, "student", "first positional"),
    ),
    "teacher no function": (mixed(student, T), (TypeError, "teacher", "callable")),
    "archived no function": (
        lambda: distillation.archived(W, student),
        (TypeError, "student", "callable"),
    ),
    "teacher of params": (
        mixed(student, lambda params, x: x),
        (ValueError, "'params'", "archived(student, params)"),
    ),
    "labels called params": (
        mixed(student, teacher, hard=0.5, labels="params"),
        (ValueError, "'params'"),
    ),
    "missing argument": (
        lambda: distillation.loss(student, teacher)(W, x=X),
        (TypeError, "missing", "'t'"),
    ),
    "unknown argument": (
        lambda: distillation.loss(student, teacher)(W, x=X, t=T, y=Y),
        (TypeError, "unexpected", "'y'"),
    ),
    "archived, missing argument": (
        lambda: distillation.archived(student, W)(),
        (TypeError, "archived student", "'x'"),
    ),
    "stored, vector": (
        lambda: distillation.stored(T[0]),
        (ValueError, "[N, classes]", "(3,)"),
    ),
    "stored, nan": (
        lambda: distillation.stored(np.where(np.arange(6)[:, None] > 3, np.nan, T)),
        (ValueError, "finite", "2 examples", "example 4"),
    ),
    "stored, complex": (
        lambda: distillation.stored(1j * T),
        (TypeError, "logits", "real", "complex"),
    ),
    "stored, size": (
        lambda: distillation.stored(T, size=60),
        (ValueError, "6 examples", "data of 60"),
    ),
    "stored, size no integer": (
        lambda: distillation.stored(T, size=6.0),
        (TypeError, "size", "6.0"),
    ),
    "index": (
        lambda: jax.eval_shape(distillation.stored(T), np.array([1.0])),
        (TypeError, "index must be integer", "float"),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    run, message = ERRORS[case]
    with says(*message):
        run()


# Under ev3.


def digits():
    x, y = load_digits(return_X_y=True)
    return jnp.asarray(x / 16, jnp.float32), jnp.asarray(y, jnp.int32)


def linear(params, x):
    return x @ params["w"] + params["b"][None]


def two_layers(params, x):
    return linear(params[1], jax.nn.relu(linear(params[0], x)))


def layer(key, inputs, outputs):
    w = jax.random.normal(key, [inputs, outputs]) / np.sqrt(inputs)
    return {"w": w, "b": jnp.zeros([outputs])}


def likelihood(params, held_x, held_y):
    return -optax.softmax_cross_entropy_with_integer_labels(
        linear(params, held_x), held_y
    )


@jax.jit
def trained_teacher(x, y):
    keys = jax.random.split(jax.random.key(0))
    params = [layer(keys[0], 64, 32), layer(keys[1], 32, 10)]
    tx = optax.adam(0.01)
    fit = distillation.loss(two_layers, lambda: None, hard=1)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(fit)(params, x=x, labels=y), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=60)[0][0]


@pytest.mark.parametrize("names", [["big"], ["big", "archive", "hard"]])
def test_students_learn_from_a_grid_of_teachers(names):
    x, y = digits()
    held_x, held_y, test_x, test_y = x[:300], y[:300], x[300:700], y[300:700]
    x, y = x[700:], y[700:]
    teach = trained_teacher(x, y)
    start = layer(jax.random.key(1), 64, 10)
    teachers = {
        "big": distillation.stored(two_layers(teach, x), size=len(x)),
        "archive": distillation.archived(linear, start),
    }
    losses = {k: distillation.loss(linear, v) for k, v in teachers.items()}
    losses["hard"] = distillation.loss(linear, lambda: None, hard=1)
    losses = {name: losses[name] for name in names}
    optimizers = {"adam": optax.adam(0.01), "sgd": optax.sgd(0.1)}
    grid = optax_ev3.product(optimizers, losses)
    assert [e.name for e in grid[1::2]] == [f"sgd/{name}" for name in names]
    tx = optax_ev3.ev3(grid, likelihood)

    @jax.jit
    def train(params, key):
        def step(carry, key):
            params, state = carry
            index = jax.random.randint(key, [64], 0, len(x))
            batch = {"x": x[index], "labels": y[index], "index": index}
            updates, state = tx.update(
                params, state, params, held_x=held_x, held_y=held_y, **batch
            )
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, 240)  # Each of six leads for 20.
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0]

    def accuracy(logits):
        return float((logits.argmax(-1) == test_y).mean())

    params, _ = train(start, jax.random.key(2))
    assert accuracy(linear(start, test_x)) < 0.3
    assert accuracy(two_layers(teach, test_x)) > 0.85
    assert accuracy(linear(params, test_x)) > 0.8


def test_auxiliary_outputs_of_all_losses_are_merged():
    def make(params, x, train=True):
        return x @ params["w"], {"mean": x.mean(0)} if train else {}

    start = {"w": jnp.asarray(W), "mean": jnp.zeros([4])}
    teachers = [teacher, distillation.archived(make, start)]
    losses = [distillation.loss(make, t, hard=0.5) for t in teachers]
    extras = [{"x": X, "labels": Y, "t": T}, {"x": X, "labels": Y}]
    grid = optax_ev3.product([optax.sgd(0.1)], losses)
    assert [e.name for e in grid] == ["explorer_0/loss_0", "explorer_0/loss_1"]
    inner = [optax_ev3.explorer(e, merge_fn=lambda p, aux: {**p, **aux}) for e in grid]
    for chosen, (loss, extra) in enumerate(zip(losses, extras, strict=True)):
        tx = optax_ev3.ev3(inner, lambda p: -p["w"].sum(), adapt=always(chosen))
        update = jax.jit(tx.update)
        updates, _ = update(start, tx.init(start), start, x=X, t=T, labels=Y)
        new = optax.apply_updates(start, updates)
        np.testing.assert_allclose(new["mean"], X.mean(0), rtol=1e-5)
        slope, _ = jax.grad(loss, has_aux=True)(start, **extra)
        np.testing.assert_allclose(new["w"], W - 0.1 * slope["w"], rtol=1e-5)


def test_an_update_from_logits_that_are_not_there_is_never_adopted():
    loss = distillation.loss(student, distillation.stored(T))
    grid = optax_ev3.product([optax.sgd(0.1)], [loss])
    tx = optax_ev3.ev3(grid, lambda w: -w.sum(), adapt=always(0))
    w, update = jnp.asarray(W), jax.jit(tx.update)
    for first, moves in [(2, True), (6, False), (-1, False)]:
        index = jnp.arange(6).at[0].set(first)
        updates, _ = update(w, tx.init(w), w, x=X, index=index)
        assert_finite(updates)
        assert updates.any() == moves


def test_temperatures_evolve():
    def loss(w, x, t, temperature):
        return distillation.soft_target_loss(x @ w, t, temperature, power=0).mean()

    ranges = {
        "learning_rate": optax_ev3.log_uniform(0.01, 0.1),
        "temperature": optax_ev3.log_uniform(0.5, 4.0),
    }
    group = optax_ev3.explorer(optax_ev3.evolve(optax.sgd, ranges), loss)
    tx = optax_ev3.ev3([group], lambda w: -w.sum(), adapt=always(2))
    w = jnp.asarray(W)
    updates, state = jax.jit(tx.update)(w, tx.init(w), w, x=X, t=T)
    past = optax_ev3.history(state)
    rate, temperature = (past[f"hyperparams/sgd/{name}"][-1, 2] for name in ranges)
    slope = jax.grad(loss)(w, X, T, float(temperature))
    np.testing.assert_allclose(updates, -rate * slope, rtol=1e-4, atol=1e-6)


def test_students_and_teachers_get_one_key():
    def make(w, x, key):
        return x @ w + jax.random.normal(key, [6, 3])

    # With the same noise, the student is its own teacher.
    loss = distillation.loss(make, distillation.archived(make, W))
    tx = optax_ev3.ev3(
        optax_ev3.product([optax.sgd(1.0)], [loss]), lambda w: w.sum(), adapt=always(0)
    )
    w = jnp.asarray(W)
    updates, _ = jax.jit(tx.update)(w, tx.init(w), w, x=X)
    np.testing.assert_allclose(updates, 0, atol=1e-6)
