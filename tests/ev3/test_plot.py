"""Pictures of a run: what is drawn, against the data."""

import functools
import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ev3
from optax_ev3 import adapt

plt_figure = pytest.importorskip("matplotlib.figure")
plot = importlib.import_module("optax_ev3.plot")

R, K = 12, 3
NAMES = [*(f"adam/{k}" for k in range(K)), "sgd", "average/sgd", "current", "stable"]
C = len(NAMES)


def past(rounds=R, names=NAMES, **entries):
    """A history of one objective, accuracy-like, drawn at random."""
    rng = np.random.default_rng(0)
    shape = (rounds, len(names))
    mean = rng.uniform(0.5, 0.9, shape)
    return {
        "round": np.arange(rounds),
        "candidates": np.array(names),
        "adopted": rng.integers(0, len(names), rounds),
        "significant": np.arange(rounds) % 3 == 0,
        "length": np.ones(rounds, int),
        "examples": np.full(rounds, 64),
        "mean": mean,
        "stderr": rng.uniform(0.01, 0.05, shape),
    } | entries


def two_objectives(**entries):
    rng = np.random.default_rng(1)
    more = {f"{kind}/cost": rng.uniform(0, 1, (R, C)) for kind in ("mean", "stderr")}
    return past(objectives=np.array(["fit", "cost"]), **more) | entries


def evolved(**entries):
    rng = np.random.default_rng(2)
    rates = np.exp(rng.uniform(np.log(1e-4), np.log(1e-1), (R, K)))
    momenta = rng.uniform(0.5, 0.9, (R, K))
    named = {"hyperparams/adam/rate": rates, "hyperparams/adam/b/1": momenta}
    return past() | named | entries


def titles(figure):
    return [axes.get_title("left") for axes in figure.axes]


def line(axes, label):
    [found] = [one for one in axes.lines if one.get_label() == label]
    return found


def band(axes):
    """``[2, R]``: lower and upper edge, of a band without gaps."""
    [found] = axes.collections
    vertices = found.get_paths()[0].vertices
    xs = np.unique(vertices[:, 0])
    edges = [vertices[vertices[:, 0] == x, 1] for x in xs]
    return np.array([[y.min() for y in edges], [y.max() for y in edges]])


def save(figure, tmp_path):
    """Writes the picture, and any warning on the way is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(tmp_path / "it.png", dpi=40)
    assert (tmp_path / "it.png").stat().st_size > 1000


def test_scores_of_what_was_adopted_and_of_stable():
    data = past()
    figure = plot.history(data)
    assert isinstance(figure, plt_figure.Figure)
    assert titles(figure) == ["Score", "Adopted"]
    axes = figure.axes[0]
    rows = np.arange(R)
    mean, stderr = (data[name][rows, data["adopted"]] for name in ("mean", "stderr"))
    np.testing.assert_array_equal(line(axes, "adopted").get_xydata().T, [rows, mean])
    np.testing.assert_array_equal(line(axes, "stable").get_ydata(), data["mean"][:, -1])
    edges = [mean - 1.96 * stderr, mean + 1.96 * stderr]
    np.testing.assert_allclose(band(axes), edges)
    assert line(axes, "stable replaced").get_xdata().tolist() == [0, 3, 6, 9]
    assert axes.get_yscale() == "linear"
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == ["adopted", "± 1.96 standard errors", "stable", "stable replaced"]


def test_bounds_where_the_history_has_them():
    data = past()
    data["lower"], data["upper"] = data["mean"] - 0.3, data["mean"] + 0.1
    axes = plot.history(data).axes[0]
    mean = data["mean"][np.arange(R), data["adopted"]]
    np.testing.assert_allclose(band(axes), [mean - 0.3, mean + 0.1])
    assert "its bounds" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_without_errors_and_replacements_there_is_no_band_and_no_mark():
    data = past(stderr=np.zeros([R, C]), significant=np.zeros(R, bool))
    axes = plot.history(data).axes[0]
    assert not axes.collections
    assert [one.get_label() for one in axes.lines] == ["adopted", "stable"]


def test_negative_scores_over_decades_are_drawn_logarithmically(tmp_path):
    scores = -np.geomspace(3, 0.02, R)[:, None] * np.ones(C)
    figure = plot.history(past(mean=scores))
    assert figure.axes[0].get_yscale() == "symlog"
    np.testing.assert_array_equal(
        line(figure.axes[0], "stable").get_ydata(), scores.T[0]
    )
    save(figure, tmp_path)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert {"−0.1", "−1"} <= set(labels)
    assert plot.history(past(mean=-scores)).axes[0].get_yscale() == "linear"


def test_one_row_for_each_candidate_and_its_share():
    data = past()
    axes = plot.history(data).axes[1]
    assert [text.get_text() for text in axes.get_yticklabels()] == NAMES
    low, high = axes.get_ylim()
    assert low > high  # the first one on top
    for index, row in enumerate(axes.lines):
        rounds = np.flatnonzero(data["adopted"] == index)
        assert row.get_xdata().tolist() == rounds.tolist()
        assert row.get_ydata().tolist() == [index] * len(rounds)
    [right] = axes.child_axes
    share = np.bincount(data["adopted"], minlength=C) / R
    shown = [text.get_text() for text in right.get_yticklabels()]
    assert shown == [f"{one:.0%}" for one in share]


def test_many_candidates_with_long_names(tmp_path):
    names = [
        f"sweep(learning_rate=0.1, momentum=0.{k:02}, b={'1' * 30})" for k in range(62)
    ]
    names += ["current", "stable"]
    adopted = np.array([5, 63, 7] * 4)
    figure = plot.history(past(names=names, adopted=adopted))
    axes = figure.axes[1]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert len(labels) == len(set(labels)) == 3
    assert labels[-1] == "stable"
    assert max(map(len, labels)) <= 36
    assert axes.get_title("left") == "Adopted (61 others never)"
    assert [one.get_xdata()[0] for one in axes.lines] == [0, 2, 1]
    save(figure, tmp_path)


@pytest.mark.parametrize("length", [1, 5, "varied"])
@pytest.mark.parametrize("first", [0, 7])
def test_x_counts_rounds_or_calls(length, first):
    rounds = np.arange(R)
    lengths = rounds % 3 + 1 if length == "varied" else np.full(R, length)
    figure = plot.history(past(length=lengths, round=rounds + first))
    found = line(figure.axes[0], "adopted").get_xdata().tolist()
    label = figure.axes[-1].get_xlabel()
    if length == 1:
        assert found == (rounds + first).tolist()
        assert label == "Round"
    else:
        assert found == [sum(lengths[: i + 1]) for i in rounds]
        since = ", since round 7" if first else ""
        assert label == "Calls of update" + since
    assert figure.axes[0].get_xlabel() == ""


def test_several_objectives():
    priorities = np.random.default_rng(3).uniform(size=(R, 2))
    data = two_objectives(priorities=priorities)
    figure = plot.history(data)
    expected = ["Score: fit", "Adopted", "Priorities of the objectives", "Score: cost"]
    assert titles(figure) == expected
    for i, name in enumerate(["fit", "cost"]):
        found = line(figure.axes[2], name).get_ydata()
        np.testing.assert_array_equal(found, priorities[:, i])
    means = {name: data[key] for name, key in (("fit", "mean"), ("cost", "mean/cost"))}
    for axes, name in ((figure.axes[0], "fit"), (figure.axes[3], "cost")):
        mean = means[name][np.arange(R), data["adopted"]]
        np.testing.assert_array_equal(line(axes, "adopted").get_ydata(), mean)
    # What is explained above is not explained again.
    assert [axes.get_legend() is None for axes in figure.axes] == [
        False,
        True,
        False,
        True,
    ]
    figure = plot.history(data, objective="cost")
    assert titles(figure)[::3] == ["Score: cost", "Score: fit"]
    found = line(figure.axes[0], "stable").get_ydata()
    np.testing.assert_array_equal(found, means["cost"][:, -1])


def test_no_priorities_without_a_number():
    data = two_objectives(priorities=np.full([R, 2], np.nan))
    assert titles(plot.history(data)) == ["Score: fit", "Adopted", "Score: cost"]
    del data["objectives"], data["priorities"]
    found = titles(plot.history(data))
    assert found == ["Score: main objective", "Adopted", "Score: cost"]


def test_hyperparameters_that_evolve():
    adopted = np.array([0, 3, 2, 1, 5, 6, 1, 0, 0, 2, 4, 2])
    data = evolved(adopted=adopted)
    figure = plot.history(data)
    assert titles(figure)[2:] == ["adam/rate", "adam/b/1"]
    assert [axes.get_yscale() for axes in figure.axes[2:]] == ["log", "linear"]
    for axes, name in zip(figure.axes[2:], ("rate", "b/1"), strict=True):
        values = data[f"hyperparams/adam/{name}"]
        points = line(axes, "all members").get_xydata()
        assert points.tolist() == [[r, v] for r in range(R) for v in values[r]]
        of_members = [(r, values[r, k]) for r, k in enumerate(adopted) if k < K]
        assert line(axes, "adopted").get_xydata().tolist() == [*map(list, of_members)]


def test_axes_of_the_caller():
    figure = plt_figure.Figure()
    left, right = figure.subplots(1, 2)
    axes = {"hyperparams/adam/rate": right, "score": left}
    assert plot.history(evolved(), axes=axes) is figure
    assert titles(figure) == ["Score", "adam/rate"]
    assert [one.get_xlabel() for one in (left, right)] == ["Round"] * 2
    assert left.get_legend() and right.get_legend()
    nested = plt_figure.Figure().subfigures(1, 2)[0]
    root = plot.history(past(), axes={"adopted": nested.subplots()})
    assert root is nested.figure
    assert isinstance(root, plt_figure.Figure)


@pytest.mark.parametrize("missing", [0.3, 1.0])
def test_values_that_are_not_finite(missing, tmp_path):
    data = evolved() | two_objectives(priorities=np.ones([R, 2]))
    rng = np.random.default_rng(4)
    for name, values in data.items():
        if np.ndim(values) == 2:
            bad = rng.choice([np.nan, np.inf, -np.inf], values.shape)
            data[name] = np.where(rng.uniform(size=values.shape) < missing, bad, values)
    figure = plot.history(data)
    save(figure, tmp_path)
    drawn = line(figure.axes[0], "stable").get_ydata()
    kept = np.isfinite(data["mean"][:, -1])
    np.testing.assert_array_equal(drawn, np.where(kept, data["mean"][:, -1], np.nan))


@pytest.mark.parametrize("rounds", [1, 700])
def test_one_round_and_many(rounds, tmp_path):
    save(plot.history(past(rounds)), tmp_path)


@functools.cache
def run(rounds, two=False):
    def score(w, batch):
        fit = -jnp.square(w - batch)
        return {"fit": fit, "small": -jnp.abs(w)} if two else fit

    rule = adapt.weighted({"fit": 1.0, "small": 0.1}) if two else None
    inner = {"slow": optax.sgd(0.05), "fast": optax.sgd(0.2)}
    tx = optax_ev3.ev3(inner, score, adapt=rule)
    w = jnp.float32(3.0)
    state = tx.init(w)
    update = jax.jit(tx.update)
    for batch in np.random.default_rng(0).normal(size=(rounds, 8)).astype(np.float32):
        updates, state = update(2 * w, state, w, batch=batch)
        w = optax.apply_updates(w, updates)
    return state


@pytest.mark.parametrize("two", [False, True])
def test_a_run(two, tmp_path):
    state = run(6, two)
    figure = plot.history({"opt_state": (state, optax.EmptyState())})
    mean = optax_ev3.history(state)["mean"]
    np.testing.assert_array_equal(
        line(figure.axes[0], "stable").get_ydata(), mean[:, -1]
    )
    assert ("Score: small" in titles(figure)) == two
    assert titles(plot.history(optax_ev3.history(state))) == titles(figure)
    save(figure, tmp_path)


def test_pyplot_knows_nothing_of_it():
    pyplot = importlib.import_module("matplotlib.pyplot")
    before = pyplot.get_fignums()
    plot.history(past())
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, "expected a state of ev3, .* got int"),
        (None, TypeError, "got NoneType"),
        ({"mean": np.ones(3)}, TypeError, "got dict"),
        (past(0), ValueError, "no round has ended yet"),
        ({"candidates": NAMES}, ValueError, "lacks round, adopted"),
        (past(mean=np.ones([R, 2])), ValueError, r"mean must have shape \(12, 7\)"),
        (past(length=np.ones(3)), ValueError, r"length must have shape \(12,\)"),
        (past(adopted=np.full(R, C)), ValueError, "adopted must be from 0 to 6"),
        (
            evolved(**{"hyperparams/adam/rate": np.ones(R)}),
            ValueError,
            r"hyperparams/adam/rate must have shape \(12, any\)",
        ),
    ],
)
def test_wrong_histories(given, error, message):
    with pytest.raises(error, match=message):
        plot.history(given)


def test_wrong_states():
    with pytest.raises(ValueError, match="no round has ended yet"):
        plot.history(run(0))
    with pytest.raises(ValueError, match="found 2"):
        plot.history([run(0), run(0)])
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda state: plot.history(state) and 0)(run(0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"objective": "no"}, ValueError, r"one of \['fit', 'cost'\], got 'no'"),
        ({"objective": 1}, TypeError, "must be a name, got 1"),
        ({"axes": {}}, ValueError, r"may be for \['score', 'adopted', 'score/cost'\]"),
        ({"axes": {"scores": None}}, ValueError, r"got \['scores'\]"),
        ({"axes": [1]}, TypeError, "mapping from names of panels .* got list"),
        ({"axes": {"score": 1}}, TypeError, r"axes\['score'\] must be .* got int"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        plot.history(two_objectives(), **arguments)
