"""Pictures of who took part, and of what was paid: the numbers, and what is drawn."""

import functools
import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ev3
from optax_ev3 import explore
from optax_ev3._src.applications import plot_data

plt_figure = pytest.importorskip("matplotlib.figure")
plot = importlib.import_module("optax_ev3.plot")
plot_work = importlib.import_module("optax_ev3._src.applications.plot_work")

NAN = np.nan
# Four rounds of two explorers with averages: in the third b is paused, and in the last
# one a is not finite, but its average is.
HAND = {
    "round": np.array([3, 4, 5, 6]),
    "candidates": np.array(["a", "b", "average/a", "average/b", "current", "stable"]),
    "explorer": np.array([0, 1, 0, 1, -1, -1]),
    "adopted": np.array([0, 3, 4, 5]),
    "length": np.array([2, 2, 5, 1]),
    "paused": np.array([[0] * 6, [0] * 6, [0, 1, 0, 1, 0, 0], [0] * 6]) > 0,
    "mean": np.array([[1] * 6, [1] * 6, [1, NAN, 1, NAN, 1, 1], [NAN] + [1] * 5]),
}


def test_numbers_by_hand():
    done = plot_data.read_work(HAND)
    assert done.names == ["a", "b", "current", "stable"]
    assert done.edges.tolist() == [0, 2, 4, 9, 10]
    assert done.unit == "Calls of update, since round 3"
    assert done.took.tolist() == [[1, 1], [1, 1], [1, 0], [1, 1]]
    # The average of a is finite in the last round.
    assert done.finite.tolist() == [[1, 1], [1, 1], [1, 0], [1, 1]]
    assert done.adopted.tolist() == [0, 1, 2, 3]
    assert done.averaged.tolist() == [False, True, False, False]
    assert done.gradients.tolist() == [2 + 2 + 5 + 1, 2 + 2 + 1]
    mean = HAND["mean"].copy()
    mean[3, 2] = np.inf
    done = plot_data.read_work(HAND | {"mean": mean})
    assert done.finite[:, 0].tolist() == [True, True, True, False]
    assert done.took[:, 0].all()


def test_rounds_of_one_call_are_around_their_numbers():
    done = plot_data.read_work(HAND | {"length": np.ones(4)})
    assert done.edges.tolist() == [2.5, 3.5, 4.5, 5.5, 6.5]
    assert done.unit == "Round"


RATES = [0.5, 0.1, 0.02, 1e-4]


@functools.cache
def run(strategy, steps=60):
    """A state after so many calls, and how many steps each of four Adams took."""

    def score(w, batch):
        return -jnp.square(w - batch)

    tx = optax_ev3.ev3(
        [optax_ev3.sweep(optax.adam, learning_rate=RATES)],
        score,
        loss_fn=lambda w: jnp.square(w),
        explore=strategy,
    )
    w = jnp.float32(3.0)
    state = tx.init(w)
    update = jax.jit(tx.update)
    for batch in np.random.default_rng(0).normal(size=(steps, 8)).astype(np.float32):
        updates, state = update(2 * w, state, w, batch=batch)
        w = optax.apply_updates(w, updates)
    return state, optax_ev3.history(state)


STRATEGIES = {
    "one step": explore.one_step(),
    "a race": explore.branches(
        3,
        restart=explore.never(),
        averages=[explore.trajectory_average()],
        racing=explore.Racing(patience=1, window=3),
    ),
    "a relay": explore.relay(4),
}


def counts(tree):
    """What counters in it say: of all in the tree the same."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = [leaf for path, leaf in leaves if "count" in jax.tree_util.keystr(path)]
    assert all((leaf == found[0]).all() for leaf in found)
    return found[0].tolist()


@pytest.mark.parametrize("name", ["one step", "a race", "a relay"])
def test_gradients_are_as_many_as_the_optimizers_have_counted(name):
    _, past = run(STRATEGIES[name])
    calls = int(past["length"].sum())
    state, _ = run(STRATEGIES[name], calls)  # Ends with the last round.
    [sweep] = state.explore.explorers.values()
    expected = counts(sweep.opt_state)
    if name == "a relay":
        # The newest state of the one at work is apart.
        branches = state.explore.branches
        expected[int(branches.lead)] = counts(branches.at_work)
        assert sum(expected) == calls
    assert plot_data.read_work(state).gradients.tolist() == expected
    assert (len(set(expected)) == 1) == (name == "one step")


def test_turns_of_a_relay_belong_to_who_took_them():
    state, past = run(STRATEGIES["a relay"])
    done = plot_data.read_work(state)
    assert (done.took.sum(1) == 1).all()
    # First turns: of one call for each explorer, then of two.
    assert past["length"][:8].tolist() == [1] * 4 + [2] * 4
    assert done.took[:8].argmax(1).tolist() == [0, 1, 2, 3] * 2
    # What is adopted is of who took the turn, or was there before.
    own = done.adopted < 4
    assert (done.adopted == done.took.argmax(1))[own].all() and own.any()


def cells(axes):
    """``[rows, R]`` names of what is drawn; None for nothing."""
    [mesh] = [one for one in axes.collections if one.get_array() is not None]
    kinds = list(plot_work.DEEDS)
    values = mesh.get_array().filled(-1)
    return [[kinds[i] if i >= 0 else None for i in row] for row in values]


def shown(axes):
    return [text.get_text() for text in axes.get_yticklabels()]


def save(figure, tmp_path):
    """Writes the picture, and any warning on the way is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(tmp_path / "it.png", dpi=40)
    assert (tmp_path / "it.png").stat().st_size > 1000


def test_a_row_for_each_explorer(tmp_path):
    figure = plot.work(HAND)
    assert isinstance(figure, plt_figure.Figure)
    rows, shares, active, legend = figure.axes
    took = "took part"
    assert cells(rows) == [
        ["adopted", took, took, took],
        [took, "an average of it adopted", None, took],
        [None, None, "current adopted", None],
        [None, None, None, "stable adopted"],
    ]
    low, high = rows.get_ylim()
    assert low > high  # the first one on top
    assert shown(rows) == ["a", "b", "current", "stable"]
    words = [text.get_text() for text in legend.get_legend().get_texts()]
    assert words == [name for name in plot_work.DEEDS if "not finite" not in name]
    # 10 gradients of 15, 5 of them; one round each.
    widths = [[bar.get_width() for bar in one] for one in shares.containers]
    np.testing.assert_allclose(widths, [[10 / 15, 5 / 15, 0, 0], [0.25] * 4])
    texts = [text.get_text() for text in shares.texts]
    assert texts == ["gradients", "67%", "33%", "rounds", *["25%"] * 4]
    assert shares.get_xlabel() == "of 15 gradients used, 4 rounds"
    [stairs] = active.patches
    assert stairs.get_data().values.tolist() == [2, 2, 1, 2]
    assert active.get_xlabel() == "Calls of update, since round 3"
    save(figure, tmp_path)


def test_what_is_not_finite_is_marked():
    mean = np.full([4, 6], 1.0)
    mean[1, [0, 2]] = np.inf
    figure = plot.work(HAND | {"mean": mean})
    assert cells(figure.axes[0])[0][1] == "took part, not finite"


@pytest.mark.parametrize(("rounds", "explorers"), [(1, 1), (64, 8), (700, 40)])
def test_few_and_many(rounds, explorers, tmp_path):
    rng = np.random.default_rng(0)
    names = [f"adam/learning_rate_{i}e-05" for i in range(explorers)]
    shape = rounds, explorers + 2
    past = {
        "round": np.arange(rounds),
        "candidates": np.array([*names, "current", "stable"]),
        "explorer": np.array([*range(explorers), -1, -1]),
        "adopted": np.full(rounds, explorers),
        "length": np.full(rounds, 25),
        "paused": rng.uniform(size=shape) < 0.5,
        "mean": rng.normal(size=shape),
    }
    figure = plot.work(past)
    save(figure, tmp_path)
    assert shown(figure.axes[0])[:explorers] == names
    # No row covers another: text of 8 points needs 0.11 inches.
    place = figure.axes[0].get_window_extent()
    assert place.height / figure.dpi / (explorers + 2) > 0.12


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run(name, tmp_path):
    save(plot.work({"opt_state": run(STRATEGIES[name])[0]}), tmp_path)


def test_axes_of_the_caller():
    figure = plt_figure.Figure()
    left, right = figure.subplots(1, 2)
    assert plot.work(HAND, axes={"share": right, "work": left}) is figure
    assert shown(left) == shown(right) == ["a", "b", "current", "stable"]
    assert left.get_legend() and left.get_xlabel().startswith("Calls")
    with pytest.raises(ValueError, match=r"may be for \['work', 'share', 'active'\]"):
        plot.work(HAND, axes={"score": left})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, "expected a state of ev3, .* got int"),
        (HAND | {"round": np.arange(0)}, ValueError, "no round has ended yet"),
        ({"candidates": HAND["candidates"]}, ValueError, "lacks round, .*, paused"),
        (HAND | {"paused": np.ones(3)}, ValueError, r"paused must have shape \(4, 6\)"),
        (HAND | {"explorer": np.ones(3)}, ValueError, r"explorer must have shape \(6,"),
    ],
)
def test_wrong_histories(given, error, message):
    with pytest.raises(error, match=message):
        plot.work(given)


def test_wrong_states():
    before = optax_ev3.ev3([optax.sgd(0.1)], lambda w: -w).init(jnp.ones([]))
    with pytest.raises(ValueError, match="no round has ended yet"):
        plot.work(before)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda state: plot.work(state) and 0)(before)
