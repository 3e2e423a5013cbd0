"""Callbacks get just the named arguments that their signatures ask for."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import always
from jax import lax

import optax_ev3


def scores_of(assess_fn, extras, **kwargs):
    """Mean scores of explorer (w = 1), current (w = 2) and stable (w = 2)."""
    tx = optax_ev3.ev3([optax.sgd(1.0)], assess_fn, adapt=always(0), **kwargs)
    w = jnp.array(2.0)
    _, state = tx.update(jnp.array(1.0), tx.init(w), w, **extras)
    return np.asarray(state.history.mean[0])


def positional_shift(fn):
    """A decorator that adds 10."""

    @functools.wraps(fn)
    def shifted(*args, **kwargs):
        return fn(*args, **kwargs) + 10

    return shifted


class Callable:
    """An object that can be called."""

    def __init__(self, shift):
        self.shift = shift

    def __call__(self, params, x):
        return params * x + self.shift

    def method(self, params, *, x):
        return params * x - self.shift

    @staticmethod
    def static(params, x):
        return params * x

    @classmethod
    def of_class(cls, params, x=9.0):
        return params * x

    with_y = functools.partialmethod(method, x=2.0)

    @functools.partial(jax.jit, static_argnums=0)
    def jitted(self, params, x):
        return params * x + self.shift

    @positional_shift
    def decorated(self, params, x):
        return params * x + self.shift


class Later:
    """Its call is written elsewhere."""

    __call__ = staticmethod(lambda params, x: params * x)


def positional(params, x, y=0.0):
    return params * x + y


def keyword_only(params, *, x, y=0.0):
    return params * x + y


def everything(params, **kwargs):
    return params * kwargs["x"] + kwargs.get("y", 0.0) + 100.0 * ("z" in kwargs)


def some_and_everything(params, y=0.0, **kwargs):
    assert "y" not in kwargs
    return params * kwargs["x"] + y


def varargs(params, *rest, x):
    assert not rest
    return params * x


def positional_only(params, /, x):
    return params * x


def two_by_position(params, x, y=0.0, /):
    return params * x + y


def middle_by_position(params, x=2.0, y=0.0, /, *, z=0.0):
    return params * x + y + z


def by_position_and_any(params, x, /, **kwargs):
    return params * x + kwargs.get("y", 0.0) + 100.0 * ("x" in kwargs)


def any_name(weights_of_the_model, x):
    return weights_of_the_model * x


X = {"x": 3.0}
XY = {"x": 3.0, "y": 5.0}
XYZ = {"x": 3.0, "y": 5.0, "z": 7.0}
CASES = {
    "positional": (positional, XYZ, [8, 11, 11]),
    "default": (positional, X, [3, 6, 6]),
    "keyword_only": (keyword_only, XYZ, [8, 11, 11]),
    "keyword_only default": (keyword_only, X, [3, 6, 6]),
    "kwargs": (everything, XY, [8, 11, 11]),
    "kwargs get all": (everything, XYZ, [108, 111, 111]),
    "names and kwargs": (some_and_everything, XYZ, [8, 11, 11]),
    "varargs": (varargs, XYZ, [3, 6, 6]),
    "positional_only": (positional_only, XYZ, [3, 6, 6]),
    "two by position": (two_by_position, XYZ, [8, 11, 11]),
    "default by position": (two_by_position, X, [3, 6, 6]),
    "default before one by position": (middle_by_position, {"y": 5.0}, [7, 9, 9]),
    "by position and by name": (middle_by_position, XYZ, [15, 18, 18]),
    "only by name": (middle_by_position, {"z": 7.0}, [9, 11, 11]),
    "by position and kwargs": (by_position_and_any, XYZ, [8, 11, 11]),
    "jit, by position": (jax.jit(two_by_position), XYZ, [8, 11, 11]),
    "static method object": (staticmethod(positional), XYZ, [8, 11, 11]),
    "static method by position": (staticmethod(two_by_position), XYZ, [8, 11, 11]),
    "partial method": (Callable(1.0).with_y, {}, [1, 3, 3]),
    "jitted method": (Callable(1.0).jitted, XYZ, [4, 7, 7]),
    "decorated method": (Callable(1.0).decorated, XYZ, [14, 17, 17]),
    "decorated": (positional_shift(positional), XYZ, [18, 21, 21]),
    "static call": (Later(), XYZ, [3, 6, 6]),
    "any name of params": (any_name, XYZ, [3, 6, 6]),
    "lambda": (lambda p, x: p * x, XYZ, [3, 6, 6]),
    "object": (Callable(1.0), XYZ, [4, 7, 7]),
    "method": (Callable(1.0).method, XYZ, [2, 5, 5]),
    "static method": (Callable.static, XYZ, [3, 6, 6]),
    "class method": (Callable.of_class, XYZ, [3, 6, 6]),
    "class method's default": (Callable.of_class, {}, [9, 18, 18]),
    "jit": (jax.jit(positional), XYZ, [8, 11, 11]),
    "jit, keyword only": (jax.jit(keyword_only), XYZ, [8, 11, 11]),
    "partial by name": (functools.partial(positional, x=2.0), {}, [2, 4, 4]),
    "partial stays bound": (functools.partial(positional, x=2.0), X, [2, 4, 4]),
    "partial by position": (
        functools.partial(lambda a, params, x: a + params * x, 1.0),
        X,
        [4, 7, 7],
    ),
    "tree_util.Partial": (jax.tree_util.Partial(positional, y=5.0), X, [8, 11, 11]),
    "checkpointed": (jax.checkpoint(positional), XYZ, [8, 11, 11]),
    "wrapped": (
        functools.wraps(positional)(lambda p, **kw: positional(p, **kw)),
        X,
        [3, 6, 6],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gets_what_it_names(case):
    fn, extras, expected = CASES[case]
    np.testing.assert_allclose(scores_of(fn, extras), expected)


MISSING = {
    "positional": positional,
    "keyword_only": keyword_only,
    "varargs": varargs,
    "object": Callable(1.0),
    "method": Callable(1.0).method,
    "jit": jax.jit(positional),
    "partial": functools.partial(positional, y=1.0),
    "by position": two_by_position,
    "static method": staticmethod(two_by_position),
    "decorated": positional_shift(positional),
}


@pytest.mark.parametrize("case", MISSING)
def test_missing_names_callback_parameter_and_what_was_given(case):
    with pytest.raises(TypeError, match=r"assess_fn.*'x'.*x=\.\.\..*\['u', 'y'\]"):
        scores_of(MISSING[case], {"y": 1.0, "u": 2.0})


def test_by_position_in_every_role():
    def loss(params, x, /):
        return params * x

    def metric(params, batch, x, /):
        return params * 0 + batch * 0 + x

    found = scores_of(optax_ev3.held_out(metric, jnp.ones(4)), {"x": 3.0})
    np.testing.assert_allclose(found, 3.0)
    chunks = optax_ev3.in_chunks(lambda p, x, /: p * 0 + x, 2, ["x"])
    np.testing.assert_allclose(scores_of(chunks, {"x": jnp.full([4], 3.0)}), 3.0)
    host = optax_ev3.host_metric(lambda p, x, /: jnp.full([4], x), np.mean)
    np.testing.assert_allclose(scores_of(host, {"x": 3.0}), 3.0)
    distilled = optax_ev3.distillation.loss(
        lambda p, x, /: jnp.stack([p * x, p * 0]), lambda x, /: jnp.stack([x, 0 * x])
    )
    assert float(distilled(2.0, x=jnp.array(3.0))) > 0
    np.testing.assert_allclose(distilled(1.0, x=jnp.array(3.0)), 0, atol=1e-6)
    own = optax_ev3.explorer(optax.sgd(0.5), loss)
    tx = optax_ev3.ev3([own], lambda p: p, adapt=always(0))
    w = jnp.array(2.0)
    updates, _ = tx.update(w, tx.init(w), w, x=3.0)
    np.testing.assert_allclose(updates, -1.5)


def test_a_class_method_object_is_no_function():
    with pytest.raises(TypeError, match=r"assess_fn must be callable.*classmethod"):
        optax_ev3.ev3([optax.sgd(1.0)], classmethod(lambda cls, p: p))


def test_missing_with_nothing_given():
    with pytest.raises(TypeError, match=r"assess_fn.*'x'.*given: none"):
        scores_of(positional, {})


def test_missing_from_the_loss():
    with pytest.raises(TypeError, match=r"loss_fn takes a parameter 'x'.*\['y'\]"):
        scores_of(lambda p: p, {"y": 1.0}, loss_fn=lambda p, x: p * x)


def test_each_callback_gets_its_own():
    seen = {}

    def remember(role, value):
        seen[role] = value
        return value

    tx = optax_ev3.ev3(
        {
            "own": optax_ev3.explorer(
                optax.sgd(0.5), lambda p, a: p * remember("explorer", a)
            ),
            "shared": optax.polyak_sgd(max_learning_rate=10.0),
        },
        lambda p, c: p * remember("assess", c),
        loss_fn=lambda p, b: p * remember("loss", b),
        adapt=always(0),
    )
    w = jnp.array(2.0)
    updates, _ = tx.update(jnp.array(1.0), tx.init(w), w, a=3.0, b=5.0, c=7.0)
    assert seen == {"explorer": 3.0, "loss": 5.0, "assess": 7.0}
    np.testing.assert_allclose(updates, -1.5)


def test_inner_optimizer_gets_what_it_names():
    def update(updates, state, params=None, *, boost, other=1.0):
        return -boost * other * updates, state

    tx = optax.GradientTransformationExtraArgs(lambda p: (), update)
    ours = optax_ev3.ev3({"a": tx}, lambda p: p, adapt=always(0))
    w = jnp.array(2.0)
    updates, _ = ours.update(jnp.array(1.0), ours.init(w), w, boost=4.0, rest=1.0)
    np.testing.assert_allclose(updates, -4.0)
    with pytest.raises(TypeError, match=r"'a' cannot be updated.*boost"):
        ours.update(jnp.array(1.0), ours.init(w), w, rest=1.0)


# The key of the round.


def noise(params, key):
    return params + jax.random.normal(key, [5])


def means(assess_fn, rounds=3, key=0, **extras):
    tx = optax_ev3.ev3([optax.sgd(1.0)], assess_fn, adapt=always(1), key=key)
    w = jnp.array(2.0)
    state, found = tx.init(w), []
    for _ in range(rounds):
        _, state = tx.update(jnp.array(1.0), state, w, **extras)
        found.append(np.asarray(state.history.mean[int(state.ev3_round) - 1]))
    return np.array(found)


@pytest.mark.parametrize("assess_fn", [noise, jax.jit(noise)], ids=["def", "jit"])
def test_key_is_the_same_for_all_candidates_and_new_each_round(assess_fn):
    found = means(assess_fn)
    # The explorer stands one below the others; they see the same noise.
    np.testing.assert_allclose(found[:, 1] - found[:, 0], 1.0, atol=1e-5)
    np.testing.assert_array_equal(found[:, 1], found[:, 2])
    assert len(set(found[:, 1])) == 3


def test_key_follows_the_seed():
    np.testing.assert_array_equal(means(noise, key=4), means(noise, key=4))
    assert (means(noise, key=4) != means(noise, key=5)).all()


def test_key_may_have_a_default_and_a_caller():
    def optional(params, key=None):
        return noise(params, jax.random.key(1) if key is None else key)

    np.testing.assert_array_equal(means(optional), means(noise))
    fixed = means(noise, key=0, rounds=2)
    given = _with_key(jax.random.key(9))
    assert given[0] == given[1] != fixed[0, 1]


def _with_key(key):
    tx = optax_ev3.ev3([optax.sgd(1.0)], noise, adapt=always(1))
    w = jnp.array(2.0)
    state = tx.init(w)
    for _ in range(2):
        _, state = tx.update(jnp.array(1.0), state, w, key=key)
    return np.asarray(state.history.mean[:2, 1])


def test_key_is_not_forced_on_kwargs():
    def assess_fn(params, **kwargs):
        assert set(kwargs) == {"x"}
        return params * kwargs["x"]

    scores_of(assess_fn, {"x": 3.0})


# What else is offered to the assessment.


def test_round_counts_the_rounds_that_have_ended():
    found = means(lambda params, round: params * 0 + round, rounds=4)
    np.testing.assert_array_equal(found, np.arange(4)[:, None].repeat(3, axis=1))


def test_run_key_is_the_same_in_all_rounds():
    found = means(lambda params, run_key: noise(params, run_key))
    assert len(np.unique(found[:, 1])) == 1
    assert found[0, 1] != means(lambda w, run_key: noise(w, run_key), key=1)[0, 1]


def test_run_key_is_no_key_of_a_round():
    of_run = means(lambda params, run_key: noise(params, run_key), rounds=1)[0, 1]
    assert of_run not in means(noise, rounds=5)[:, 1]


def test_axis_name_is_offered_and_others_stay_as_they_were():
    def assess_fn(params, axis_name="default", scale=1.0):
        assert axis_name == "devices"
        return params * scale + lax.axis_index(axis_name)

    tx = optax_ev3.ev3([optax.sgd(1.0)], assess_fn, axis_name="devices")
    w = jnp.array(2.0)
    update = jax.vmap(lambda w: tx.update(w, tx.init(w), w)[1], axis_name="devices")
    state = update(jnp.stack([w, w]))
    np.testing.assert_allclose(state.history.mean[:, 0, 1], 2.5)

    def without(params, axis_name="default"):
        assert axis_name is None
        return params

    scores_of(without, {})


def test_the_caller_comes_before_what_is_offered():
    found = means(lambda params, round: params * 0 + round, round=7.0)
    np.testing.assert_array_equal(found, np.full((3, 3), 7.0))


# What a partial has bound stays so, whoever else supplies the name.

BOUND, CALLERS = 5.0, 3.0


def bind(fn):
    return functools.partial(fn, batch=BOUND)


class Fixed:
    """Methods in which partialmethod has bound the batch."""

    def full(self, params, batch):
        return params * batch

    method = functools.partialmethod(full, batch=BOUND)
    __call__ = functools.partialmethod(full, batch=BOUND)

    @staticmethod
    def any_names(params, **kwargs):
        return params * kwargs["batch"]


def full(params, batch):
    return params * batch


BINDINGS = {
    "partial": bind(full),
    "bound twice": functools.partial(functools.partial(full, batch=1.0), batch=BOUND),
    "partial of a jitted one": bind(jax.jit(full)),
    "a jitted partial": jax.jit(bind(full)),
    "a partial around a jitted partial": functools.partial(jax.jit(bind(full))),
    "tree_util.Partial": jax.tree_util.Partial(full, batch=BOUND),
    "looks like the whole": functools.update_wrapper(bind(full), full),
    "wrapped": functools.wraps(bind(full))(lambda p, **kw: bind(full)(p, **kw)),
    "one of **kwargs": bind(Fixed.any_names),
    "partial method": Fixed().method,
    "method partial": bind(Fixed().full),
    "object": Fixed(),
    "static method": staticmethod(bind(full)),
}


@pytest.mark.parametrize("case", BINDINGS)
def test_bound_is_bound(case):
    np.testing.assert_allclose(
        scores_of(BINDINGS[case], {"batch": CALLERS}), [BOUND, 2 * BOUND, 2 * BOUND]
    )


def _by_loss(**kwargs):
    """-(the batch that the loss is given), times w = 2 for ``value``."""

    def tell(updates, state, params=None, *, value):
        del params
        return updates * 0 - value, state

    tx = optax.GradientTransformationExtraArgs(lambda p: (), tell)
    own = kwargs.pop("own", None)
    inner = {"a": optax_ev3.explorer(tx, own)}
    ours = optax_ev3.ev3(inner, lambda p: p, adapt=always(0), **kwargs)
    w = jnp.array(2.0)
    return ours.update(w, ours.init(w), w, batch=CALLERS)[0] / -2


def _by_update():
    def update(updates, state, params=None, *, batch, **extra_args):
        assert "batch" not in extra_args
        return updates * 0 - batch, state

    def other(updates, state, params=None, *, batch):
        return update(updates, state, params, batch=batch)

    found = []
    for fn in (bind(update), bind(other)):
        tx = optax.GradientTransformationExtraArgs(lambda p: (), fn)
        ours = optax_ev3.ev3([tx], lambda p: p, adapt=always(0))
        w = jnp.array(2.0)
        found.append(-ours.update(w, ours.init(w), w, batch=CALLERS)[0])
    return np.array(found)


def _by_held_out():
    def metric(params, rows, batch):
        return params * 0 + rows * 0 + batch

    assess_fn = optax_ev3.held_out(bind(metric), jnp.ones(4))
    return scores_of(assess_fn, {"batch": CALLERS})


def _by_host_metric():
    assess_fn = optax_ev3.host_metric(
        bind(lambda p, batch: jnp.full([4], batch)), lambda outputs: outputs.mean()
    )
    return scores_of(assess_fn, {"batch": CALLERS})


def _by_chunks():
    def each(params, batch, x):
        return params * 0 + x * 0 + batch

    assess_fn = optax_ev3.in_chunks(bind(each), 2, slice_args=["x"])
    return scores_of(assess_fn, {"batch": CALLERS, "x": jnp.ones(4)})


def _by_distillation():
    def teacher(batch):
        return jnp.array([[batch, 0.0]])

    def student(params, batch):
        return jnp.stack([params * batch, params * 0])[None]

    loss = optax_ev3.distillation.loss(bind(student), bind(teacher))
    assert "batch" not in inspect.signature(loss).parameters
    expected = optax_ev3.distillation.loss(student, teacher)
    np.testing.assert_allclose(loss(2.0), expected(2.0, batch=BOUND))
    return [BOUND]


ROLES = {
    "loss_fn": lambda: _by_loss(loss_fn=bind(full)),
    "loss of an explorer": lambda: _by_loss(own=bind(full)),
    "inner optimizer": _by_update,
    "held_out": _by_held_out,
    "host_metric": _by_host_metric,
    "in_chunks": _by_chunks,
    "distillation": _by_distillation,
}


@pytest.mark.parametrize("role", ROLES)
def test_bound_is_bound_in_every_role(role):
    found = np.asarray(ROLES[role]())
    np.testing.assert_allclose(found, np.full_like(found, BOUND))


def test_factories_cannot_explore_what_is_bound():
    bound = functools.partial(optax.sgd, learning_rate=0.1)
    with pytest.raises(TypeError, match=r"a free argument 'learning_rate'.*'momentum'"):
        optax_ev3.sweep(bound, learning_rate=[0.1, 0.2])
    space = {"learning_rate": optax_ev3.log_uniform(1e-3, 1.0)}
    with pytest.raises(ValueError, match=r"nobody takes .*'learning_rate'.*not free"):
        optax_ev3.ev3([optax_ev3.evolve(bound, space)], lambda p: p)
    free = functools.partial(optax.sgd, momentum=0.9)
    assert optax_ev3.sweep(free, learning_rate=[0.1, 0.2]).size == 2


def test_evolved_numbers_are_those_of_the_member():
    """The caller's argument of the same name is for others."""
    rates = []

    def loss(params, rate):
        rates.append(rate)
        return params * rate

    space = {"rate": optax_ev3.uniform(1.0, 2.0)}
    group = optax_ev3.evolve(lambda: optax.sgd(1.0), space, population=2)
    tx = optax_ev3.ev3([optax_ev3.explorer(group, loss)], lambda p: p, adapt=always(0))
    w = jnp.array(2.0)
    state = tx.init(w)
    first = state.explore.explorers["explorer_0"].evolution.hyperparams["rate"][0]
    updates, _ = tx.update(w, state, w, rate=100.0)
    np.testing.assert_allclose(updates, -first, rtol=1e-6)
    assert len(rates) > 0


def test_a_loss_with_kwargs_has_no_evolved_numbers():
    """It is given what the caller passes, so the group would evolve for nothing."""
    space = {"rate": optax_ev3.uniform(1.0, 2.0)}
    group = optax_ev3.evolve(lambda: optax.sgd(1.0), space)
    mine = optax_ev3.explorer(group, lambda params, **kwargs: params)
    with pytest.raises(ValueError, match="nobody takes the hyperparameter 'rate'"):
        optax_ev3.ev3([mine], lambda p: p)
