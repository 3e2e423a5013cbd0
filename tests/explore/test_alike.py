"""Explorers that differ in numbers alone are stacked; everything else stays apart."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import STRATEGIES, assert_identical
from helpers.trajectories import data, loss, score, start

import optax_ev3
from optax_ev3._src.explore import alike
from optax_ev3._src.explore import explorers as members

RATES = (0.01, 0.03, 0.1, 0.0)


def stacks(inner):
    """What stands for several explorers: their names."""
    found = alike.stacked(members.collect(inner))
    return [one.members(name) for name, one in found.items() if one.size]


def optimizers(make):
    return {f"rate_{rate:g}": make(rate) for rate in RATES}


ALIKE = {
    "adam": optax.adam,
    "keyword": lambda rate: optax.adamw(1e-3, weight_decay=rate),
    "chain": lambda rate: optax.chain(optax.clip(rate), optax.sgd(0.1, momentum=0.9)),
    "schedule": lambda rate: optax.sgd(optax.cosine_decay_schedule(rate, 100)),
    "partial": lambda rate: functools.partial(optax.adam, rate)(),
    "masked": lambda rate: optax.masked(
        optax.sgd(rate), lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    ),
    "injected": lambda rate: optax.inject_hyperparams(optax.sgd)(rate),
    "the same": lambda rate: optax.sgd(0.1),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_differs_in_floats_is_stacked(name):
    inner = optimizers(ALIKE[name])
    assert stacks(inner) == [list(inner)]


def _decides_by_its_number(rate):
    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: -rate * u if rate > 0 else u, updates), state

    return optax.GradientTransformation(lambda params: (), update)


def _needs_a_structure(rate):
    def update(updates, state, params=None):
        del params
        return {"kernel": -rate * updates["kernel"]}, state

    return optax.GradientTransformation(lambda params: (), update)


class _Optimizer:
    """An optimizer that is no tuple of functions."""

    def __init__(self, rate):
        self.rate = rate

    def init(self, params):
        del params
        return ()

    def update(self, updates, state, params=None):
        del params
        return jax.tree.map(lambda u: -self.rate * u, updates), state


UNLIKE = {
    "integers": lambda rate: optax.sgd(
        optax.cosine_decay_schedule(0.1, int(1 + 100 * rate))
    ),
    "by its number": _decides_by_its_number,
    "structure": _needs_a_structure,
    "an object": _Optimizer,
    "arrays": lambda rate: optax.sgd(jnp.asarray(rate)),
    "shapes": lambda rate: optax.lbfgs(0.1, memory_size=int(1 + 100 * rate)),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_differs_in_more_is_not(name):
    assert stacks(optimizers(UNLIKE[name])) == []


def test_losses_and_order():
    def l1(params):
        return jnp.abs(params["w"]).sum()

    sgd = [optax.sgd(rate) for rate in RATES]
    inner = {
        "adam": optax.adam(0.1),
        **{f"a{i}": tx for i, tx in enumerate(sgd)},
        "other": optax.rmsprop(0.1),
        **{f"b{i}": optax_ev3.explorer(tx, l1) for i, tx in enumerate(sgd)},
        "again": optax.sgd(0.5),
    }
    assert stacks(inner) == [
        ["a0", "a1", "a2", "a3", "again"],
        ["b0", "b1", "b2", "b3"],
    ]
    # Two make no smaller program.
    assert stacks(sgd[:2]) == []
    # What is stacked by hand is left alone.
    sweep = optax_ev3.sweep(optax.sgd, learning_rate=RATES)
    assert stacks([sweep, *sgd[:2]]) == [sweep.members("sgd")]


@hypothesis.given(
    numbers=st.lists(
        st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3),
        min_size=2,
        max_size=4,
    )
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_what_is_made_of_a_template_computes_the_same(numbers):
    def make(row):
        first, (second, third) = row[0], ([row[1]], {"x": (row[2], "text")})

        shift = functools.partial(lambda a, b: a + b, second[0])

        def fn(x, scale=first, *, shift=shift):
            return scale * x + shift(third["x"][0])

        return fn, None

    objects = [make(row) for row in numbers]
    template = alike._template(objects)
    columns = list(zip(*numbers, strict=True))
    differing = [column for column in columns if len(set(column)) > 1]
    assert sorted(template.numbers) == sorted(differing)
    for i, row in enumerate(numbers):
        own = {str(place): column[i] for place, column in enumerate(template.numbers)}
        fn, nothing = template(**own)
        assert nothing is None
        assert fn(2.0) == 2.0 * row[0] + (row[1] + row[2])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_as_apart(strategy, assert_same_as_apart):
    inner = {
        **{f"adam_{rate:g}": optax.adam(rate) for rate in RATES[:3]},
        "bad": optax.adam(float("inf")),
        "sgd": optax.sgd(0.1),
        "sgd_nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    }
    # With gradients of their own, the two others are in the stack, too.
    is_shared = strategy in ("one_step", "shared", "relay")
    stack = f"adam_0.01 and {3 if is_shared else 5} more"
    assert_same_as_apart(inner, STRATEGIES[strategy], stack, leaders=2)


def test_numbers_leave_bfloat16_what_it_is():
    params = {"w": jnp.ones([3], jnp.bfloat16)}
    inner = [optax.adam(1e-2, b1=b1) for b1 in (0.8, 0.9, 0.95)]
    tx = optax_ev3.ev3(
        inner, lambda p: -(p["w"] ** 2), explore=optax_ev3.explore.branches()
    )
    state = tx.init(params)
    update, state = jax.jit(tx.update)(params, state, params)
    own = state.explore.explorers["explorer_0 and 2 more"].opt_state
    assert own[0].mu["w"].dtype == jnp.bfloat16
    alone, _ = inner[0].update(params, inner[0].init(params), params)
    assert_identical(*(optax.apply_updates(params, u) for u in (update, alone)))


def test_a_program_grows_with_kinds_and_not_with_explorers():
    def size(count):
        inner = [optax.adam(float(rate)) for rate in np.geomspace(1e-4, 1e-1, count)]
        counts = []
        for name in ("one_step", "never", "relay"):
            kwargs = STRATEGIES[name]
            tx = optax_ev3.ev3(inner, score, loss_fn=loss, **kwargs)
            state = tx.init(start())
            traced = jax.make_jaxpr(tx.update)(
                start(), state, start(), batch=data(0), held=data(1)
            )
            counts.append((len(str(traced)), len(jax.tree.leaves(state))))
        return np.array(counts)

    # But for the names of candidates, which are leaves of the state.
    assert (size(12)[:, 0] < 1.3 * size(4)[:, 0]).all()
    assert (size(12)[:, 1] < size(4)[:, 1] + 3 * 8 + 1).all()
