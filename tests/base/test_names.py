"""Names of candidates and summaries are such as metric loggers take."""

import posixpath
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ev3
from optax_ev3 import adapt, explore

# MLflow's own check of a metric's name, and what tensorboardX replaces.
MLFLOW = re.compile(r"^[/\w.\- ]*$")
TENSORBOARD_X = re.compile(r"[^-/\w\.]")

SGD = optax.sgd(0.1)


def loss(w):
    return (w**2).sum()


def l1(w):
    return jnp.abs(w).sum()


def every_kind():
    ranges = {"learning_rate": optax_ev3.log_uniform(1e-3, 1.0)}
    inner = [
        SGD,
        optax_ev3.explorer(SGD, name="my own.2"),
        optax_ev3.sweep(optax.sgd, learning_rate=[1e-5, 0.1, 1e20], momentum=[0.0]),
        optax_ev3.explorer(
            optax_ev3.evolve(optax.adam, ranges, population=2), name="group"
        ),
        *optax_ev3.product({"one": SGD, "two": optax.adam(0.1)}, [loss, l1]),
        *optax_ev3.product([SGD], [lambda w: (w**2).sum()]),
    ]
    return optax_ev3.ev3(
        inner,
        lambda w: {"good": -w, "bad": w},
        adapt=adapt.constrained("good", {"bad": 1.0}),
        explore=explore.rounds(
            2,
            averages=[
                explore.trajectory_average(),
                explore.branch_average(),
            ],
        ),
        loss_fn=loss,
    )


def test_loggers_take_the_names_of_every_kind():
    state = every_kind().init(jnp.ones([2]))
    names = list(optax_ev3.summary(state))
    explorers = [
        "explorer_0",
        "my own.2",
        "sgd/learning_rate_1e-05/momentum_0",
        "sgd/learning_rate_0.1/momentum_0",
        "sgd/learning_rate_1e20/momentum_0",
        "group/0",
        "group/1",
        "one/loss",
        "two/loss",
        "one/l1",
        "two/l1",
        "explorer_0/loss_0",
    ]
    assert optax_ev3.history(state)["candidates"].tolist() == [
        *explorers,
        *(f"average/{name}" for name in explorers),
        *(f"branch_average/{name}" for name in explorers),
        "current",
        "stable",
    ]
    assert "ev3/hyperparams/group/learning_rate" in names
    assert "ev3/objective/bad/average/group/1" in names
    for name in names:
        assert MLFLOW.match(name) and posixpath.normpath(name) == name
        assert "my own" in name or not TENSORBOARD_X.search(name)


@pytest.mark.parametrize(
    "name", ["a(b)", "a=1", "a[0]", "a,b", "", "/a", "a//b", "a/.."]
)
def test_other_names_are_refused(name):
    message = f"letters, digits, '_', '-', '.' and spaces.*got .*{re.escape(name)}"
    makers = [
        lambda: optax_ev3.ev3({name: SGD}, loss),
        lambda: optax_ev3.ev3(optax_ev3.product({"a": SGD}, {name: loss}), loss),
        lambda: optax_ev3.ev3([SGD], loss, adapt=adapt.weighted({name: 1.0})),
    ]
    for make in makers:
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("name", ["größe", "a b", "a/b", "1", "-", "a.b", "..a"])
def test_names_that_are_taken(name):
    state = optax_ev3.ev3({name: SGD}, loss).init(jnp.ones([2]))
    assert optax_ev3.history(state)["candidates"][0] == name


@pytest.mark.parametrize("length", [1, 2])
def test_the_adopted_one_is_told_by_name(length):
    inner = {"bad": optax.sgd(-0.1), "good": SGD}
    tx = optax_ev3.ev3(
        inner, lambda w: -loss(w), adapt=adapt.greedy(), explore=explore.rounds(length)
    )
    w = jnp.ones([2])
    state = tx.init(w)
    update = jax.jit(tx.update)

    def adopted():
        found = jax.jit(optax_ev3.summary)(state).items()
        return [
            k.removeprefix("ev3/adopted/") for k, v in found if "adopted/" in k and v
        ]

    assert adopted() == []
    for _ in range(length):
        _, state = update(2 * w, state, w)
    assert adopted() == ["good"]
    assert np.isfinite(optax_ev3.summary(state)["ev3/adopted_score"])
