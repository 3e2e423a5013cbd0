"""Sweeps, products, losses with auxiliary outputs, and combined candidates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import always, assert_close, assert_identical, says
from helpers.trajectories import alone, data, loss, run, score, start

import optax_ev3
from optax_ev3 import adapt, explore

RATES = [0.001, 0.01, 0.1]


def candidates(state):
    return optax_ev3.history(state)["candidates"].tolist()


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("own", [True, False])
def test_sweep_equals_explorers_one_by_one(length, own, apart):
    kwargs = {
        "explore": explore.rounds(length),
        "loss_fn": loss if own else None,
        "adapt": adapt.lower_bound(),
    }
    swept = {
        "sgd": optax.sgd(0.1),
        "adam": optax_ev3.sweep(optax.adam, learning_rate=RATES),
    }
    single = {"sgd": optax.sgd(0.1)} | {
        f"adam/learning_rate_{rate}": optax.adam(rate) for rate in RATES
    }
    w, state = run(optax_ev3.ev3(swept, score, **kwargs), 12)[-1]
    expected, other = run(optax_ev3.ev3(single, score, **kwargs), 12)[-1]
    assert candidates(state) == candidates(other)
    assert candidates(state)[1] == "adam/learning_rate_0.001"
    assert_close(w, expected, 1e-4, 1e-5)
    # z values multiply rounding by how large scores are, compared with their spread.
    assert_close(state.history.z, other.history.z, 1e-3, 1e-3)
    records = [x.history._replace(z=()) for x in (state, other)]
    assert_close(*records, 1e-4, 1e-5)
    assert_close(optax_ev3.summary(state), optax_ev3.summary(other), 1e-4, 1e-5)
    for i, rate in enumerate(RATES):
        mine = jax.tree.map(
            lambda x, i=i: x[i], state.explore.explorers["adam"].opt_state
        )
        theirs = other.explore.explorers[f"adam/learning_rate_{rate}"].opt_state
        assert_close(mine, theirs, 1e-4, 1e-5)


def test_sweep_runs_over_all_combinations():
    one = optax_ev3.sweep(optax.sgd, learning_rate=[0.1, 0.2], momentum=[0.5, 0.9])
    assert one.members("sgd") == [
        "sgd/learning_rate_0.1/momentum_0.5",
        "sgd/learning_rate_0.1/momentum_0.9",
        "sgd/learning_rate_0.2/momentum_0.5",
        "sgd/learning_rate_0.2/momentum_0.9",
    ]


def test_sweep_with_a_loss_and_a_name_of_its_own():
    def other(params, batch):
        return 10 * loss(params, batch)

    swept = optax_ev3.sweep(optax.sgd, learning_rate=[0.01])
    inner = [optax_ev3.explorer(swept, other, "ten"), optax.sgd(0.1)]
    tx = optax_ev3.ev3(inner, score, explore=explore.rounds(3), adapt=always(0))
    w, state = run(tx, 3)[-1]
    assert candidates(state)[0] == "ten/learning_rate_0.01"
    assert_close(w, alone(optax.sgd(0.1), 3, start())[0], 1e-4, 1e-5)


def test_product_is_every_loss_with_every_optimizer():
    def robust(params, batch):
        x, y = batch
        return jnp.abs(jnp.tanh(x @ params["w"]) @ params["v"] - y).mean()

    optimizers = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.01)}
    grid = optax_ev3.product(optimizers, {"l2": loss, "l1": robust})
    names = ["sgd/l2", "adam/l2", "sgd/l1", "adam/l1"]
    assert [one.name for one in grid] == names
    tx = optax_ev3.ev3(grid, score, explore=explore.branches(2))
    w = start()
    _, state = run(tx, 2, w)[-1]
    for name, fn in [("sgd/l2", loss), ("sgd/l1", robust)]:
        expected = w
        for call in range(2):
            grads = jax.grad(fn)(expected, data(call))
            expected = jax.tree.map(lambda p, g: p - 0.1 * g, expected, grads)
        assert_close(state.explore.branches.ends[name], expected, 1e-4, 1e-5)


def test_names_of_losses_in_a_product():
    named = optax_ev3.product([optax.sgd(0.1)], [loss])
    assert [one.name for one in named] == ["explorer_0/loss"]
    lambdas = optax_ev3.product({"s": optax.sgd(0.1)}, [lambda w: w, lambda w: w])
    assert [one.name for one in lambdas] == ["s/loss_0", "s/loss_1"]


# Auxiliary outputs: a running mean of the inputs, kept in the tree of parameters.


def with_mean():
    return {**start(), "mean": jnp.zeros([3])}


def loss_aux(params, batch):
    weights = {k: params[k] for k in ("w", "v")}
    mean = 0.9 * params["mean"] + 0.1 * batch[0].mean(0)
    return loss(weights, batch), jax.lax.stop_gradient(mean)


def merge(params, aux):
    return {**params, "mean": aux}


def score_only(params, held):
    return score({k: params[k] for k in ("w", "v")}, held)


# Rounds of one step take the caller's gradients, and aux with them.
@pytest.mark.parametrize("length, gives_aux", [(1, True), (3, True), (3, False)])
def test_auxiliary_outputs_are_merged(length, gives_aux):
    inner = {
        "lead": optax_ev3.explorer(optax.sgd(0.1), merge_fn=merge),
        "own": optax_ev3.explorer(optax.adam(0.01), loss_aux, merge_fn=merge),
    }
    tx = optax_ev3.ev3(
        inner,
        score_only,
        loss_fn=loss_aux,
        explore=explore.rounds(length),
        adapt=always(0),
    )
    w = with_mean()
    state = tx.init(w)
    expected = np.zeros(3)
    for call in range(4):
        batch = data(call)
        (_, aux), grads = jax.value_and_grad(loss_aux, has_aux=True)(w, batch)
        extras = {"aux": aux} if gives_aux else {}
        updates, state = tx.update(
            grads, state, w, batch=batch, held=data(1000 + call), **extras
        )
        w = optax.apply_updates(w, updates)
        expected = 0.9 * expected + 0.1 * np.asarray(batch[0]).mean(0)
        np.testing.assert_allclose(w["mean"], expected, rtol=1e-5, atol=1e-6)
    weights, _ = alone(optax.sgd(0.1), 4, start())
    assert_close({k: w[k] for k in weights}, weights, 1e-4, 1e-5)


@pytest.mark.parametrize(
    "loss_fn, merge_fn, kind, message",
    [
        (loss_aux, None, TypeError, "no merge_fn"),
        (loss, merge, TypeError, r"must return \(scalar, aux\)"),
        (loss_aux, lambda p, aux: p["w"], ValueError, "merge_fn must return"),
        (lambda p, batch: p["v"], None, TypeError, r"real scalar, got shape \(4,\)"),
    ],
)
@pytest.mark.parametrize("length", [1, 2])
def test_losses_that_do_not_fit(loss_fn, merge_fn, kind, message, length):
    w = with_mean()
    one = optax_ev3.explorer(optax.sgd(0.1), loss_fn, merge_fn=merge_fn)
    tx = optax_ev3.ev3([one], score_only, explore=explore.rounds(length))
    with pytest.raises(kind, match=message):
        jax.eval_shape(tx.update, w, tx.init(w), w, batch=data(0), held=data(1))


def test_merge_needs_what_the_callers_loss_computed():
    w = with_mean()
    one = optax_ev3.explorer(optax.sgd(0.1), merge_fn=merge)
    tx = optax_ev3.ev3([one], score_only)
    with pytest.raises(TypeError, match=r"aux=\.\.\."):
        jax.eval_shape(tx.update, w, tx.init(w), w, held=data(1))


@pytest.mark.parametrize("held", [False, True])
def test_what_a_loss_computed_on_the_side_is_not_lost(held):
    """Without a merge_fn statistics would stay at their start."""
    w = with_mean()

    def update(assess_fn, one, **extra):
        tx = optax_ev3.ev3([one], assess_fn)
        return jax.eval_shape(tx.update, w, tx.init(w), w, **extra)

    def assessed(metric_fn):
        return optax_ev3.held_out(metric_fn, data(1)) if held else metric_fn

    def names_it(params, held, aux=0.0):
        return score_only(params, held) + aux

    given = {"aux": jnp.float32(1.0), **({} if held else {"held": data(1)})}
    sgd = optax.sgd(0.1)
    with says(TypeError, "aux=", "merge_fn", "optax_ev3.explorer(tx, merge_fn=...)"):
        update(assessed(score_only), sgd, **given)
    update(assessed(score_only), sgd, **given | {"aux": None})
    update(assessed(names_it), sgd, **given)
    adds = optax.GradientTransformationExtraArgs(
        sgd.init, lambda u, state, params=None, *, aux=0.0: (u, state)
    )
    update(assessed(score_only), adds, **given)
    update(assessed(score_only), optax_ev3.explorer(sgd, merge_fn=merge), **given)


def test_losses_get_a_key_of_the_call_the_same_for_all():
    def noisy(params, batch, key):
        return loss(params, batch) + jax.random.normal(key) * params["v"].sum()

    inner = {"a": optax.sgd(0.1), "b": optax.sgd(0.1)}
    made = {k: optax_ev3.explorer(one, noisy) for k, one in inner.items()}
    tx = optax_ev3.ev3(made, score, explore=explore.rounds(4))
    seen = run(tx, 3)
    for _, state in seen:
        ends = state.explore.branches.ends
        assert_close(ends["a"], ends["b"], 1e-5, 1e-6)
    means = [float(s.explore.branches.ends["a"]["v"].mean()) for _, s in seen]
    steps = np.diff([0.3, *means])
    plain = [
        float(s.explore.branches.ends["a"]["v"].mean())
        for _, s in run(
            optax_ev3.ev3(
                {"a": optax_ev3.explorer(optax.sgd(0.1), loss)},
                score,
                explore=explore.rounds(4),
            ),
            3,
        )
    ]
    noise = steps - np.diff([0.3, *plain])
    assert np.abs(np.diff(noise)).min() > 1e-3  # Another one in each call.


# Combined candidates.


def test_trajectory_average_is_the_mean_of_the_parameters_after_each_step():
    tx = optax_ev3.ev3(
        {"a": optax.adam(0.05), "b": optax.sgd(0.2)},
        score,
        loss_fn=loss,
        explore=explore.rounds(5, averages=[explore.trajectory_average()]),
        adapt=always(3),
    )
    visible, state = run(tx, 5)[-1]
    path = [alone(optax.sgd(0.2), n, start())[0] for n in range(1, 6)]
    mean = jax.tree.map(lambda *x: np.mean(np.stack(x), 0), *path)
    assert_close(visible, mean, 1e-4, 1e-5)
    names = ["a", "b", "average/a", "average/b", "current", "stable"]
    assert candidates(state) == names
    assert int(state.explore.branches.lead) == 1  # The explorer whose average it is.


def branch_mean(path, decay):
    """The exponential average of a branch, by hand."""
    mean = jax.tree.map(np.zeros_like, path[0])
    for t, w in enumerate(path):
        past = min(decay, t / (t + 1))
        mean = jax.tree.map(lambda m, p, past=past: past * m + (1 - past) * p, mean, w)
    return mean


@pytest.mark.parametrize("gradients", ["own", "shared"])
@pytest.mark.usefixtures("apart")
def test_branch_average_goes_on_over_rounds(gradients):
    tx = optax_ev3.ev3(
        {
            "a": optax.sgd(0.05),
            "b": optax_ev3.sweep(optax.sgd, learning_rate=[0.1, 0.2]),
        },
        score,
        loss_fn=loss,
        explore=explore.branches(
            3,
            gradients=gradients,
            averages=[explore.branch_average(0.8), explore.trajectory_average()],
        ),
        adapt=always(0),
    )
    names = ["a", "b/learning_rate_0.1", "b/learning_rate_0.2"]
    seen = [state for _, state in run(tx, 11)]
    state = seen[-1]
    for name in ("a", "b"):
        path = [s.explore.branches.ends[name] for s in seen]
        means = state.explore.branches.means[name]
        assert_close(means[0], branch_mean(path, 0.8), 1e-4, 1e-5)
        # Of the last, unfinished round: the two stand in the order in which they came.
        assert_close(means[1], branch_mean(path[9:], 0.99), 1e-4, 1e-5)
    assert state.explore.branches.age.tolist() == [11] * 3
    wanted = [f"{kind}/{n}" for kind in ("branch_average", "average") for n in names]
    assert candidates(state) == [*names, *wanted, "current", "stable"]


@pytest.mark.parametrize("adopted", [0, 2], ids=["end", "average"])
def test_branch_average_begins_anew_where_a_branch_does(adopted):
    """All restart from the first one's end, or from its average."""
    tx = optax_ev3.ev3(
        {"a": optax.sgd(0.05), "b": optax.sgd(0.2)},
        score,
        loss_fn=loss,
        explore=explore.rounds(3, averages=[explore.branch_average(0.8)]),
        adapt=always(adopted),
    )
    seen = run(tx, 5)
    paths = {k: [s.explore.branches.ends[k] for _, s in seen] for k in ("a", "b")}
    end = alone(optax.sgd(0.05), 3, start())[0]
    first_mean = branch_mean(
        [alone(optax.sgd(0.05), n, start())[0] for n in (1, 2, 3)], 0.8
    )
    assert_close(seen[2][0], first_mean if adopted else end, 1e-4, 1e-5)
    # The call that ends a round returns the branches as they begin the next one.
    first = 0 if adopted == 0 else 3
    found = seen[-1][1].explore.branches.means
    assert_close(found["a"][0], branch_mean(paths["a"][first:], 0.8), 1e-4, 1e-5)
    assert_close(found["b"][0], branch_mean(paths["b"][3:], 0.8), 1e-4, 1e-5)


def test_branch_average_of_a_branch_that_broke_begins_anew():
    def breaks():
        def update(updates, state, params=None):
            bad = jnp.where(state == 3, jnp.inf, 1.0)
            return jax.tree.map(lambda u: -0.1 * u * bad, updates), state + 1

        return optax.GradientTransformation(lambda p: jnp.int32(0), update)

    tx = optax_ev3.ev3(
        {"a": optax.sgd(0.05), "b": breaks()},
        score,
        loss_fn=loss,
        explore=explore.branches(3, averages=[explore.branch_average(0.8)]),
        adapt=always(0),
    )
    seen = run(tx, 7)
    path = [s.explore.branches.ends["b"] for _, s in seen]
    assert seen[3][1].explore.branches.age.tolist() == [4, 0]
    found = seen[6][1].explore.branches.means["b"][0]  # Before it breaks again.
    assert_close(found, branch_mean(path[4:7], 0.8), 1e-4, 1e-5)


def test_branches_go_on_from_an_adopted_average_with_their_own_states():
    tx = optax_ev3.ev3(
        {"a": optax.adam(0.05), "b": optax.sgd(0.2)},
        score,
        loss_fn=loss,
        explore=explore.rounds(3, averages=[explore.trajectory_average()]),
        adapt=always(2),
    )
    visible, state = run(tx, 3)[-1]
    for end in state.explore.branches.ends.values():
        assert_identical(end, visible)
    assert_close(
        state.explore.explorers["a"].opt_state,
        alone(optax.adam(0.05), 3, start())[1],
        1e-4,
    )


def test_average_that_stays_visible_while_runs_go_on():
    tx = optax_ev3.ev3(
        {"a": optax.adam(0.05), "b": optax.sgd(0.2)},
        score,
        loss_fn=loss,
        explore=explore.branches(3, averages=[explore.trajectory_average()]),
        adapt=always(3),
    )
    seen = run(tx, 5)
    assert_identical(seen[3][0], seen[2][0])
    assert_identical(seen[4][0], seen[2][0])
    for name, one in {"a": optax.adam(0.05), "b": optax.sgd(0.2)}.items():
        end, _ = alone(one, 5, start())
        assert_close(seen[4][1].explore.branches.ends[name], end, 1e-4, 1e-5)
