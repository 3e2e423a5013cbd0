"""Unlike explorers of one loss in one stack: the same as apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import STRATEGIES, assert_close, assert_identical, trajectories
from helpers.trajectories import loss, score, start
from optax import contrib

import optax_ev3
from optax_ev3 import explore
from optax_ev3._src.explore import alike, unlike
from optax_ev3._src.explore import explorers as members

KINDS = {
    "adam": optax.adam(0.03),
    "adam_slow": optax.adam(0.003),
    "broken": optax.adam(float("inf")),
    "muon": contrib.muon(0.03, consistent_rms=0.2),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "decay": optax.adamw(optax.cosine_decay_schedule(0.03, 40)),
    "lion": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.003)),
}
# All that have gradients of their own.
OWN = ("own", "new", "never", "behind")


def stacks(inner, axis=None):
    """The names of those that are one."""
    found = alike.stacked(members.collect(inner), axis, by_loss=True)
    return [one.members(name) for name, one in found.items() if one.size]


@pytest.mark.parametrize("strategy", [*OWN, "copy"])
def test_the_same_as_apart(strategy, assert_same_as_apart):
    copy = {"explore": explore.rounds(2, restart_state="copy")}
    settings = {**STRATEGIES, "copy": copy}[strategy]
    assert_same_as_apart(KINDS, settings, "adam and 6 more", leaders=3)


def test_states_are_those_of_the_optimizers_alone():
    tx = optax_ev3.ev3(KINDS, score, loss_fn=loss, explore=explore.branches(5))
    _, state = trajectories.run(tx, 20)[-1]
    (one,) = state.explore.explorers.values()
    ends = state.explore.branches.ends["adam and 6 more"]
    for row, (name, inner) in enumerate(KINDS.items()):
        if name == "broken":
            continue
        end, expected = trajectories.alone(inner, 20, start())
        assert_close(jax.tree.map(lambda x, i=row: x[i], ends), end, 1e-4, 1e-5)
        # Every number of its state is somewhere in the packed one.
        packed = jax.tree.map(lambda x, i=row: x[i], one.opt_state)
        found = np.sort(np.concatenate([x.ravel() for x in jax.tree.leaves(packed)]))
        for leaf in jax.tree.leaves(expected):
            places = np.abs(found[:, None] - np.ravel(leaf)).min(axis=0)
            assert (places <= 1e-5 + 1e-4 * np.abs(np.ravel(leaf))).all(), name


def test_what_is_joined():
    def other(params, batch):
        return loss(params, batch)

    own = {f"own_{k}": optax_ev3.explorer(tx, other) for k, tx in KINDS.items()}
    # One loss, one stack.
    assert stacks({**KINDS, **own}) == [list(KINDS), list(own)]
    # States of unlike size would take much more room than they need.
    few = {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1), "sign": optax.sign_sgd(0.1)}
    assert stacks(few) == []
    assert stacks(few, "pop") == [list(few)]
    # Two make no smaller program.
    two = {"adam": optax.adam(0.1), "yogi": optax.yogi(0.1)}
    assert stacks(two) == []
    assert stacks(two, "pop") == [list(two)]
    sweep = optax_ev3.sweep(optax.yogi, learning_rate=[0.1, 0.2])
    swept = {"adam": optax.adam(0.1), "sweep": sweep}
    assert stacks(swept) == [["adam", *sweep.members("sweep")]]


def _needs_a_structure():
    def update(updates, state, params=None):
        del params
        return {"w": -updates["w"], "v": -updates["v"]}, state

    return optax.GradientTransformation(lambda params: params, update)


def _named_extra_argument():
    def update(updates, state, params=None, *, batch):
        del params, batch
        return updates, state

    init = lambda params: jax.tree.map(jnp.zeros_like, params)
    return optax.GradientTransformationExtraArgs(init, update)


def _grows():
    def update(updates, state, params=None):
        del params
        return updates, jax.tree.map(lambda x: x + 0.5, state)

    init = lambda params: jax.tree.map(lambda p: jnp.zeros(p.shape, int), params)
    return optax.GradientTransformation(init, update)


SPACE = {"learning_rate": optax_ev3.log_uniform(0.01, 1.0)}
LEFT_ALONE = {
    "line search": optax.lbfgs(),
    "structure": _needs_a_structure(),
    "named": _named_extra_argument(),
    "grows": _grows(),
    "evolves": optax_ev3.evolve(optax.adam, SPACE, population=4),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_alone(name):
    one = members.explorer(LEFT_ALONE[name])
    assert not unlike.can_be_joined(one)
    joined = [[*KINDS] if name != "evolves" else ["adam", "adam_slow", "broken"]]
    by_hand = [group for group in stacks({**KINDS, "x": one}) if "x/0" not in group]
    assert by_hand == joined


def test_low_precision_keeps_its_types():
    """Moments of one optimizer in float32 share room with those of others."""
    inner = {
        "wide": optax.adam(0.03, mu_dtype=jnp.float32),
        "adam": optax.adam(0.03),
        "muon": contrib.muon(0.03, consistent_rms=0.2),
    }
    tx = optax_ev3.ev3(inner, score, loss_fn=loss, explore=explore.branches(4))
    _, state = trajectories.run(tx, 8, start(jnp.bfloat16))[-1]
    ends = state.explore.branches.ends["wide and 2 more"]
    for row, one in enumerate(inner.values()):
        alone = trajectories.alone(one, 8, start(jnp.bfloat16))[0]
        end = jax.tree.map(lambda x, i=row: x[i], ends)
        assert {str(x.dtype) for x in jax.tree.leaves(end)} == {"bfloat16"}
        assert_close(*jax.tree.map(lambda x: x.astype(float), (end, alone)), 0.05, 0.01)
    packed = state.explore.explorers["wide and 2 more"].opt_state.like_params
    found = [{str(x.dtype) for x in jax.tree.leaves(tree)} for tree in packed]
    assert found[:2] == [{"float32"}, {"bfloat16"}]


def _counter():
    """An integer for each parameter, which the room of floats would round."""

    def init(params):
        return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int32), params)

    def update(updates, state, params=None):
        del params
        state = jax.tree.map(lambda n: n + 100_001, state)
        return jax.tree.map(lambda u: -0.01 * u, updates), state

    return optax.GradientTransformation(init, update)


def test_integers_are_not_rounded(monkeypatch):
    monkeypatch.setattr(unlike, "_MOST_ROOM", 100)
    inner = {"count": _counter(), "adam": optax.adam(0.1), "yogi": optax.yogi(0.1)}
    tx = optax_ev3.ev3(inner, score, loss_fn=loss, explore=explore.branches(4))
    _, state = trajectories.run(tx, 6, start(jnp.bfloat16))[-1]
    packed = state.explore.explorers["count and 2 more"].opt_state
    counts = [x[0] for x in packed.others if x.dtype == jnp.int32 and x.ndim > 1]
    assert sorted(x.size for x in counts) == [4, 12]
    assert all((x == 600_006).all() for x in counts)


def _by_names(params):
    return {k: "t" if k == "w" else "z" for k in params}


LOOK_INTO_PARAMETERS = {
    "labels": lambda: optax.partition(
        {"t": optax.adam(0.03), "z": optax.set_to_zero()}, _by_names
    ),
    "leaves": lambda: optax.GradientTransformation(
        lambda params: tuple(jnp.zeros_like(x) for x in jax.tree.leaves(params)),
        lambda updates, state, params=None: (updates, state),
    ),
    "first": lambda: optax.GradientTransformation(
        lambda params: jnp.zeros([100], jax.tree.leaves(params)[0].dtype),
        lambda updates, state, params=None: (updates, state),
    ),
}


@pytest.mark.parametrize("name", LOOK_INTO_PARAMETERS)
def test_optimizers_that_look_into_the_parameters(name, request, monkeypatch):
    monkeypatch.setattr(unlike, "_MOST_ROOM", 100)
    inner = {
        "odd": LOOK_INTO_PARAMETERS[name](),
        **{k: KINDS[k] for k in ("adam", "muon", "momentum")},
    }
    if name == "labels":  # Of one structure on other parameters, and not on these.
        other = lambda params: {k: "z" if k == "w" else "t" for k in params}
        kinds = {"t": optax.adam(0.03), "z": optax.set_to_zero()}
        inner["other"] = optax.partition(kinds, other)

    def run():
        tx = optax_ev3.ev3(
            inner,
            score,
            loss_fn=loss,
            explore=explore.rounds(2, restart_state="copy"),
        )
        params, state = trajectories.run(tx, 40)[-1]
        return params, optax_ev3.history(state)["adopted"]

    (params, found), stacked = run(), stacks(inner)
    assert any("odd" in names for names in stacked)
    request.getfixturevalue("apart")
    expected, others = run()
    assert_close(params, expected, 1e-4, 1e-5)
    assert_identical(found, others)


def test_the_odd_one_stays_out():
    inner = {
        "many": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        **{k: KINDS[k] for k in ("adam", "muon", "momentum")},
        "huge": optax.contrib.dadapt_adamw(1.0),
    }
    (found,) = stacks(inner)
    assert set(found) >= {"adam", "muon", "momentum"} and len(found) < 5


def test_parameters_that_are_not_all_numbers():
    params = {
        "w": jnp.ones([3, 4]),
        "n": jnp.arange(3),
        "flag": jnp.asarray(True),
        "none": None,
    }

    def of_w(params):
        return (params["w"] ** 2).sum()

    tx = optax_ev3.ev3(
        {k: KINDS[k] for k in ("adam", "adam_slow", "momentum")},
        lambda params: -of_w(params),
        loss_fn=of_w,
        explore=explore.branches(2),
    )
    state = tx.init(params)
    step = jax.jit(lambda p, s: tx.update(None, s, p))
    for _ in range(6):
        updates, state = step(params, state)
        params = {**params, "w": params["w"] + updates["w"]}
    assert float(of_w(params)) < 12
    assert_identical(optax_ev3.best_params(state)["n"], jnp.arange(3))


def test_the_loss_is_traced_once_for_all():
    def count(inner):
        traces = []

        def seen(params, batch):
            traces.append(params)
            return loss(params, batch)

        tx = optax_ev3.ev3(inner, score, loss_fn=seen, explore=explore.branches(2))
        data = trajectories.data(0)
        state = tx.init(start())
        step = lambda s: tx.update(None, s, start(), batch=data, held=data)
        jax.eval_shape(step, state)
        return len(traces)

    adams = {f"adam_{rate}": optax.adam(rate) for rate in (0.1, 0.2, 0.3)}
    assert count(KINDS) == count(adams)


def test_errors_name_the_explorer():
    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: u[:1], updates), state

    wrong = optax.GradientTransformation(optax.sgd(0.1, momentum=0.9).init, update)
    tx = optax_ev3.ev3(
        {**KINDS, "wrong": wrong}, score, loss_fn=loss, explore=explore.branches(2)
    )
    data = trajectories.data(0)
    with pytest.raises(
        ValueError, match=r"^explorer 'wrong' returned updates of shapes"
    ):
        tx.update(None, tx.init(start()), start(), batch=data, held=data)
