"""The quality suite: its tasks, its loop, and what its report makes of results."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

import optax_ev3

pytest.importorskip("sklearn")
pytest.importorskip("statsmodels")
from benchmarks import run
from benchmarks.data import sample
from benchmarks.quality import methods, report, tasks, training
from benchmarks.results import Results, tidy

NAMES = [
    "digits MLP",
    "digits CNN",
    "noisy labels",
    "imbalanced",
    "outliers",
    "breast cancer",
    "wine",
    "transformer",
    "distillation",
    "auto-encoder",
    "physics",
]


def test_all_tasks_are_tested():
    assert list(tasks.TASKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_tasks_can_be_learned(name, monkeypatch):
    monkeypatch.setattr(tasks, "TEACHER_STEPS", 5)
    task = tasks.TASKS[name]()
    one, other = (jax.tree.map(jnp.asarray, task.parts(seed)) for seed in (0, 1))
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, other)
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    assert all((a != b).any() for a, b in pairs)
    params = task.init(jax.random.key(0))
    # A short step against the gradient lowers the loss on the same examples.
    batch = jax.tree.map(lambda x: x[: task.batch], one.train)
    value, grads = jax.jit(jax.value_and_grad(task.loss))(params, batch)
    size = optax.tree.norm(grads)
    assert size > 0
    lower = jax.tree.map(lambda p, g: p - 1e-3 / size * g, params, grads)
    assert task.loss(lower, batch) < value
    for figure in (task.test(params, one.test), task.held_out(params, one.held_out)):
        assert figure.shape == () and jnp.isfinite(figure)


@pytest.mark.parametrize("name", ["digits MLP", "outliers", "wine", "physics"])
def test_parts_have_no_example_in_common(name):
    parts = tasks.TASKS[name]().parts(3)
    rows = [
        {x.tobytes() for x in np.atleast_2d(jax.tree.leaves(part)[0].T).T}
        for part in parts
    ]
    first = [len(jax.tree.leaves(part)[0]) for part in parts]
    # Nothing is lost by the comparison but examples that are there twice.
    assert sum(map(len, rows)) > 0.95 * sum(first)
    shared = [a & b for a, b in [rows[:2], rows[1:], rows[::2]]]
    assert max(map(len, shared)) < 0.02 * sum(first)


def test_labels_are_noisy_in_the_training_part_alone():
    clean, noisy = (tasks.TASKS[n]().parts(5) for n in ("digits MLP", "noisy labels"))
    share = (clean.train[1] != noisy.train[1]).mean()
    assert share == pytest.approx(0.27, abs=0.05)  # A tenth is drawn right.
    for one, other in zip(clean[1:], noisy[1:], strict=True):
        np.testing.assert_array_equal(one[1], other[1])


def test_the_solution_of_the_physics_task_is_its_minimum():
    # Central differences of the sine in the same equation.
    t, h = np.linspace(0.1, 0.9, 9), 1e-4
    u = lambda t: np.sin(tasks.WAVES * t)
    second = (u(t + h) - 2 * u(t) + u(t - h)) / h**2
    np.testing.assert_allclose(second + tasks.WAVES**2 * u(t), 0, atol=1e-3)


# The report.


PARTS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1 / 8, 1.0)


def cell(method, test, held_out, marks=PARTS, **more):
    """Rows of figures ``[marks, weights, seeds]`` in a run of 32 gradients."""
    weights, seeds = np.shape(test)[1:]
    figures = {"test": test, "held_out": held_out}
    axes = {"weights": ["last", "average"][:weights], "seed": range(seeds)}
    rows = [tidy(figures, mark=marks, **axes), tidy({"gradients": 32})]
    return pd.concat(rows).assign(task="wine", method=method, **more)


@pytest.fixture
def test():
    """Figures of eight explorers ``[8, marks, weights, seeds]``, all different."""
    return np.random.default_rng(0).uniform(size=[8, 6, 2, 2])


OURS = np.random.default_rng(1).uniform(size=[2, 2])  # At gradients and work, by seed.


@pytest.fixture
def results(test):
    """Held-out scores are what the test says."""
    found = [cell(f"single {i}", test[i], -test[i], rate=0.1) for i in range(8)]
    ours = tidy({"test": OURS[:1], "held_out": -OURS[:1]}, mark=[1.0], seed=range(2))
    at_work = {"test at equal work": OURS[1], "held_out at equal work": -OURS[1]}
    ours = pd.concat([ours, tidy(at_work, seed=range(2)), tidy({"gradients": 32})])
    return pd.concat([*found, ours.assign(task="wine", method="EV3")])


HALVING = ((8, 1 / 32), (4, 3 / 32), (2, 7 / 32), (1, 15 / 32))
SINGLES = tuple(f"single {number}" for number in range(8))
KINDS = report.Kinds(SINGLES, ("cosine",), HALVING, 1 / 8)


def test_grid_search_and_hindsight(results, test):
    rows = report.rows(results, KINDS, "gradients")
    ends = test[:, 5].reshape(16, 2)  # And averages.
    np.testing.assert_array_equal(rows[report.HINDSIGHT], ends[ends.mean(1).argmin()])
    np.testing.assert_array_equal(rows["all eight in full, by held-out"], ends.min(0))
    shares = test[:, 4].reshape(16, 2)  # At 4 of 32 steps.
    np.testing.assert_array_equal(rows["grid search"], shares.min(0))
    np.testing.assert_array_equal(rows["single 3, averaged"], test[3, 5, 1])
    np.testing.assert_array_equal(rows["EV3"], OURS[0])
    # At equal work others are what they were, EV3 ends earlier.
    at_work = report.rows(results, KINDS, "work")
    np.testing.assert_array_equal(at_work["EV3"], OURS[1])
    np.testing.assert_array_equal(at_work["grid search"], rows["grid search"])


def test_successive_halving(results, test):
    expected = []
    for seed in range(2):
        left = list(range(8))
        for mark, keep in enumerate((4, 2, 1)):
            left = sorted(left, key=lambda i, m=mark, s=seed: test[i, m, 0, s])[:keep]
        expected.append(test[left[0], 3, 0, seed])
    rows = report.rows(results, KINDS, "gradients")
    np.testing.assert_array_equal(rows["successive halving"], expected)


def test_rates_are_chosen_by_held_out_scores_for_each_seed(results):
    pairs = [([1, 2], [5, 6]), ([3, 4], [7, 5]), ([0, 0], [np.nan, 4])]
    runs = [
        cell("cosine", [[test, [9, 9]]], [[score, [0, 0]]], [1.0], rate=rate)
        for rate, (test, score) in enumerate(pairs)
    ]
    rows = report.rows(pd.concat([results, *runs]), KINDS, "gradients")
    np.testing.assert_array_equal(rows["cosine"], [3, 2])


def test_what_ends_worse_than_it_began_counts_as_its_start(results):
    found = pd.DataFrame({"a": [1, np.inf], "b": [4, 2]})
    found = report.no_worse(found, pd.Series([2.0, 3.0]))
    np.testing.assert_array_equal(found["a"], [1, 3])
    np.testing.assert_array_equal(found["b"], [2, 2])
    start = {"test": [[0.0, 0.5]], "held_out": [[0.0, 0.0]]}
    start = tidy(start, mark=[1.0], seed=range(2))
    start = start.assign(task="wine", method=report.UNTRAINED)
    rows = report.rows(pd.concat([results, start]), KINDS, "gradients")
    assert (rows.loc[0] == 0).all() and (rows.loc[1] <= 0.5).all()


def test_what_was_asked_is_told(capsys):
    """Four seeds, two tasks: on one EV3 is clearly better, on the other not by much."""
    better = pd.Series([1.0, 1.1, 0.9, 1.0])
    level = pd.Series([2.0, 2.2, 2.4, 2.6])
    found = {
        "a": {
            report.EV3: better,
            report.HINDSIGHT: np.add(better, [1.0, 1.01, 0.99, 1.0]),
            "grid search": np.subtract(better, [0.5, 0.51, 0.49, 0.5]),
            "EV3, other": 1.1 * better,
        },
        "b": {
            report.EV3: level,
            report.HINDSIGHT: np.add(level, [0.3, -0.3, 0.3, -0.4]),
            "grid search": level[::-1].to_numpy(),
            "EV3, other": 0.9 * level,
        },
    }
    found = {task: pd.DataFrame(one) for task, one in found.items()}
    kinds = KINDS._replace(variants=("EV3, other",))
    report.verdicts(dict.fromkeys(report.TABLES, found), kinds)
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "or better on 2 of 2 tasks, significantly better on 1: a.",
        "significantly better on 0 of 2 tasks (none), worse on 1 (a).",
        # The root of 1.1 times 0.9.
        "0.995 (geometric mean of 2 tasks; 0.900 on b to 1.100 on a; at most 1.01 on "
        "1).",
    ):
        assert part in out


def test_table_of_markdown(results, tmp_path):
    found = report.tables(results, KINDS)
    report.write_table(found, KINDS, tmp_path / "table.md")
    lines = (tmp_path / "table.md").read_text().splitlines()
    head, row = (
        [x.strip("* ") for x in line.split("|")[1:-1]] for line in (lines[2], lines[4])
    )
    rows = report.rows(results, KINDS, "gradients")
    for name, text in list(zip(head, row, strict=True))[1:]:
        mean, error = (float(x) for x in text.split("±"))
        assert mean == pytest.approx(rows[name].mean(), rel=5e-3)
        assert error == pytest.approx(abs(np.diff(rows[name])[0]) / 2, rel=5e-2)
    assert "grid search" in head and lines[4].count("**") == 2


def test_tables_and_plots(results, tmp_path, capsys):
    found = report.tables(results, KINDS)
    report.show_all(found, KINDS)
    out = capsys.readouterr().out
    for row in ("At equal work", "wine, 2 seeds", "grid search", "EV3 against"):
        assert row in out
    report.draw_profile(found["work"], KINDS, tmp_path / "profile.png")
    report.draw_course(results, KINDS, tmp_path / "course.png")
    image = pytest.importorskip("matplotlib.image").imread(tmp_path / "course.png")
    orange = np.array([0xE6, 0x9F, 0x00]) / 255  # The line of the best single method.
    assert (abs(image[..., :3] - orange) < 0.02).all(-1).sum() > 50


# Runs.


def test_all_that_can_be_measured_has_been():
    names = [*methods.METHODS, *training.PROCEDURES]
    assert len(names) == len(set(names)) > 30
    kept = Results(run.FOLDER / "quality").frame
    assert set(kept.task) == set(NAMES)
    for _, one in kept.groupby("task"):
        assert set(one.method) >= set(names)
    # Of most methods two figures, at some marks, in ten runs each.
    assert len(kept) > 100_000 and set(kept.seed.dropna()) == set(range(10))


def few(monkeypatch, **kwargs):
    """EV3 with two explorers, which compiles faster."""
    inner = {"adam": optax.adam(1e-2), "sgd": optax.sgd(0.1)}
    found = methods.ev3(inner=inner, **kwargs)
    monkeypatch.setitem(methods.METHODS, "EV3", found)
    return found


@pytest.mark.slow
def test_the_suite_runs_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    few(monkeypatch, explore=methods.branches(averages=()))
    pattern = "^(EV3|adam .*|momentum .*|rmsprop .*|cosine|untrained|population.*)$"
    args = ["quality", "--seeds=2", "--steps=8", "--task=wine", f"--only={pattern}"]
    args += [f"--folder={tmp_path}"]
    assert run.main(args) == 0
    out, err = capsys.readouterr()
    for row in ("grid search", "successive halving", "population", "cosine"):
        assert row in out
    assert "wine, EV3: " in err and err.count("\n") == 1 + 8 + 3
    path = tmp_path / "results.csv"
    whole = path.read_text()
    rows = whole.splitlines(keepends=True)
    path.write_text("".join(row for row in rows if not row.startswith("wine,cosine,")))
    assert run.main(args) == 0
    again, err = capsys.readouterr()
    assert err.startswith("wine, cosine: ") and err.count("\n") == 1
    assert again == out
    # But for the time that it took.
    kept, found = (
        sorted(row for row in text if ",seconds," not in row)
        for text in (rows, path.read_text().splitlines(keepends=True))
    )
    assert kept == found


@pytest.mark.slow
def test_what_explorers_take_is_counted(monkeypatch):
    monkeypatch.setattr(methods, "LENGTH", 5)  # So that 40 of the 50 are drawn.
    task, budget = tasks.TASKS["wine"](), 400
    explore = methods.branches(5, averages=())
    method = few(monkeypatch, explore=explore)
    found = training.ev3_trainer(task, method, budget, range(2))()
    parts = jax.tree.map(jnp.asarray, task.parts(1))
    tx, params = method.make(task, parts.held_out, 1), task.init(jax.random.key(1))

    @jax.jit
    def step(params, state, number):
        key = jax.random.fold_in(jax.random.key(1), number)
        batch = sample(key, parts.train, task.batch)
        updates, state = tx.update(None, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    tested = jax.jit(task.test)
    state, calls, gradients, assessed, within = tx.init(params), 0, 0, 0, {}
    while gradients < budget:
        params, state = step(params, state, calls)
        calls += 1
        if calls % 5:
            continue
        past = optax_ev3.history(state)
        took = ~np.isnan(past["mean"][-1])
        gradients += 5 * took[:2].sum()
        assert past["examples"][-1] == 40
        assessed += 40 * took.sum()
        work = gradients + assessed / (3 * task.batch)
        test = float(tested(params, parts.test))
        within |= {1.0: test} if gradients <= budget else {}
        within |= {"work": test} if work <= budget else {}
    assert gradients < 2 * calls  # One was paused.
    assert found["calls"][1] == calls and found["rounds"][1] == calls // 5
    np.testing.assert_allclose(found["work"][1], work / gradients, 1e-5)
    marks = [*training.MARKS, "work"]
    for mark, test in within.items():
        np.testing.assert_allclose(found["test"][1, marks.index(mark)], test, 1e-3)
    assert within[1.0] != within["work"]
