"""The quality suite: its tasks, its loop, and what its report makes of results."""

import dataclasses

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
from benchmarks.quality import (
    accountings,
    comparisons,
    methods,
    report,
    tasks,
    training,
)
from benchmarks.results import Results
from optax_ev3 import explore
from optax_ev3._src import presets

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


# Runs.


def test_figures_are_those_of_the_run_and_of_its_average():
    """Against a loop by hand: the initial parameters, and two of the marks."""
    task, steps, seeds = tasks.made("wine"), 40, range(2)
    make = lambda rate, steps: optax.sgd(rate)
    found = training.trainer(task, make, methods.visible, steps, seeds)(0.1)
    assert found.shape == (2, 1 + len(training.MARKS), 2, 2)
    parts = jax.tree.map(jnp.asarray, task.parts(1))
    params = average = task.init(jax.random.key(1))
    kept = {0: (params, average)}
    for number in range(steps):
        key = jax.random.fold_in(jax.random.key(1), number)
        grads = jax.grad(task.loss)(params, sample(key, parts.train, task.batch))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        decay = min(0.99, (1 + number) / (10 + number))
        average = jax.tree.map(
            lambda a, p, d=decay: d * a + (1 - d) * p, average, params
        )
        kept[number + 1] = params, average
    for part, step in ((0, 0), (0.25, 10), (1.0, 40)):
        mark = 1 + training.MARKS.index(part) if part else 0
        for kind, params in enumerate(kept[step]):
            expected = (
                task.test(params, parts.test),
                task.held_out(params, parts.held_out),
            )
            np.testing.assert_allclose(found[1, mark, kind], expected, 2e-3)


def without_statistics(params, state):
    """What an optimizer that averages weights would have of statistics: nothing."""
    return {**params, "calls": jnp.zeros([])}


@pytest.mark.parametrize("evaluated", [methods.visible, without_statistics])
def test_running_statistics_are_merged(evaluated):
    """A loss that counts its calls on the side."""

    def loss(params, batch):
        return (params["w"] * batch).mean() ** 2, params["calls"] + 1

    task = tasks.Task(
        parts=lambda seed: tasks.Parts(*np.float32(np.ones([3, 8]))),
        init=lambda key: {"w": jnp.ones([]), "calls": jnp.zeros([])},
        loss=loss,
        score=lambda params, part: -params["calls"] * part,
        test=lambda params, part: params["calls"],
        figure="calls",
        steps=20,
        batch=4,
        merge=lambda params, calls: {**params, "calls": calls},
    )
    make = lambda rate, steps: optax.sgd(rate)
    found = training.trainer(task, make, evaluated, 20, range(1))(0.1)
    expected = [0, *(max(1, round(20 * mark)) for mark in training.MARKS)]
    np.testing.assert_array_equal(found[0, :, 0, 0], expected)


def test_the_incumbent_is_the_best_so_far_by_held_out_scores():
    test = [[5.0, 4, 3, 2, 1]]
    held_out = [[0.0, 2, np.nan, 1, 3]]
    found = training.incumbents(np.stack([test, held_out], -1))
    np.testing.assert_array_equal(found[..., 0], [[5, 4, 4, 4, 1]])
    np.testing.assert_array_equal(found[..., 1], [[0, 2, 2, 2, 3]])


def test_runs_side_by_side_are_pooled_by_held_out_scores():
    runs = np.array([[[[1.0, 5], [2, 5]]], [[[3, 4], [4, 6]]], [[[0, np.nan], [0, 5]]]])
    np.testing.assert_array_equal(training.pooled(runs), [[[1, 5], [4, 6]]])


def test_successive_halving(monkeypatch):
    """The better half by scores at each stage; scores say the contrary of figures."""
    rng, marks = np.random.default_rng(0), training.MARKS
    score = rng.normal(size=[8, 2, 1 + len(marks)])
    monkeypatch.setattr(
        accountings,
        "_eight",
        lambda task, steps, seeds: np.stack([-score, score], -1)[..., None, :],
    )
    found = accountings._halved(None, 64, range(2))
    found = found[found.metric == "test"].pivot(index="seed", columns="mark")
    best = np.maximum.accumulate(score, axis=2)[..., 1:]
    for seed in range(2):
        left, course = list(range(8)), {}
        for stage, part in enumerate((1 / 32, 3 / 32, 7 / 32, 15 / 32), start=1):
            here = best[:, seed, marks.index(part)]
            left.sort(key=lambda i, here=here: -here[i])
            course[stage / 4] = -here[left[0]]
            left = left[: len(left) // 2]
        for mark, expected in course.items():
            assert found["value"][mark][seed] == pytest.approx(expected)
        # Before the first stage ends it is what a grid search has.
        assert found["value"][0.125][seed] == pytest.approx(
            -best[:, seed, marks.index(0.125)].max()
        )


@pytest.mark.slow
def test_what_explorers_take_is_counted(monkeypatch):
    monkeypatch.setattr(methods, "LENGTH", 5)  # So that 40 of the 50 are drawn.
    task, budget = tasks.made("wine"), 400
    method = methods.portfolio(
        {"adam": optax.adam(1e-2), "sgd": optax.sgd(0.1)},
        explore=optax_ev3.explore.branches(
            5, restart=optax_ev3.explore.never(), racing=optax_ev3.explore.Racing(2, 8)
        ),
    )
    found, spent = training.ev3_trainer(task, method, budget, range(2))()
    parts = jax.tree.map(jnp.asarray, task.parts(1))
    tx = method.make(task, parts.held_out, 1, budget)
    params = task.init(jax.random.key(1))

    @jax.jit
    def step(params, state, number):
        key = jax.random.fold_in(jax.random.key(1), number)
        batch = sample(key, parts.train, task.batch)
        updates, state = tx.update(None, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    tested = jax.jit(task.test)
    marks = np.array([*training.MARKS, 1.0])
    state, calls, gradients, assessed = tx.init(params), 0, 0, 0
    within = np.full(len(marks), tested(params, parts.test))
    while gradients <= budget:
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
        done = np.array([*[work] * len(training.MARKS), gradients])
        within[done <= marks * budget] = tested(
            optax_ev3.best_params(state), parts.test
        )
        # Later marks are overwritten by later rounds.
    assert gradients < 2 * calls  # One was paused.
    assert spent["calls"][1] == calls and spent["rounds"][1] == calls // 5
    np.testing.assert_allclose(spent["work"][1], work / gradients, 1e-5)
    np.testing.assert_allclose(found[1, 1:, 0], within, 1e-3)
    assert within[-1] != within[-2]


def test_searches_are_of_the_eight_of_the_preset():
    preset = presets._eight()
    ours = {
        k.replace(" ", "_"): methods.KINDS[a](b) for k, (a, b) in methods.EIGHT.items()
    }
    assert list(ours) == list(preset)
    params = jax.random.normal(jax.random.key(0), [3, 2])
    for name, tx in preset.items():
        paths = []
        for one in (tx, ours[name]):
            state, path = one.init(params), []
            for _ in range(2):
                updates, state = one.update(2 * params, state, params)
                path.append(updates)
            paths.append(path)
        np.testing.assert_array_equal(*paths)


def test_the_plan_with_another_race_is_else_that_of_the_preset():
    length, race = 7, explore.SuccessiveHalving()
    ours = methods.planned(length, race)
    preset = presets._branches(presets._eight(), methods.ROUNDS * length)
    fields = {field.name for field in dataclasses.fields(preset)} - {"schedule"}
    assert all(getattr(ours, name) == getattr(preset, name) for name in fields)
    steps = np.arange(300)
    np.testing.assert_array_equal(ours.schedule(steps), preset.schedule(steps))


@pytest.mark.parametrize("name", ["wine", "digits MLP", "physics"])
def test_what_is_told_of_the_end_fits_the_budget(name):
    """As long as there is progress: it takes as many gradients, but for a round."""
    task = tasks.made(name)
    held_out, budget = task.parts(0).held_out, 8 * task.steps

    def work(length):
        """Forty rounds, and the candidates of each round."""
        passes = methods.looked_at(task, held_out, length) / (3 * task.batch)
        numbers = np.array([8, 8, 4, 2, *[1] * 36])
        return (length * numbers + passes * (3 * numbers + 2)).sum()

    length = methods.EV3S[methods.PORTFOLIO].length(task, held_out, budget)
    assert work(length) <= budget < work(length + 1)
    unknown = methods.EV3S["EV3 portfolio, end unknown"]
    assert unknown.length(task, held_out, budget) == 25


# Comparisons.


def test_courses_tell_tuned_from_untuned():
    def rows(method, accounting, value):
        values = {"test": [[value, value / 2]], "held_out": [[0.0, 0.0]]}
        values = {k: np.array(v) for k, v in values.items()}
        curve = accountings._curve(values, accounting, [0], [0.5, 1.0])
        return curve.assign(task="wine", method=method)

    results = pd.concat(
        [
            rows("EV3 portfolio", "clock", 1.0),
            rows("a", "untuned", 2.0),
            rows("a", "clock", 4.0),
            rows("b", "untuned", np.inf),
        ]
    )
    found = comparisons.ends(results, "clock").loc["wine", 0]
    assert dict(found) == {"EV3 portfolio": 0.5, "a": 1, "a, tuned": 2, "b": np.inf}
    untuned = comparisons.ends(results, "untuned").loc["wine", 0]
    assert dict(untuned) == {"EV3 portfolio": 0.5, "a": 1, "b": np.inf}
    course = comparisons.courses(results)
    assert course.loc["wine", 0, 0.5]["a, tuned"] == 4


def table(**methods):
    """Figures of two tasks with two seeds."""
    index = pd.MultiIndex.from_product([["x", "y"], [0, 1]], names=["task", "seed"])
    return pd.DataFrame(methods, index)


def test_ranks_ratios_and_failures():
    figures = table(a=[1.0, 3, 8, 8], b=[2.0, 2, 4, 4], c=[30.0, 1, 4, 6])
    np.testing.assert_array_equal(
        comparisons.ranks(figures), [[1, 2, 3], [3, 2, 1], [3, 1.5, 1.5], [3, 1, 2]]
    )
    # Best means: 2 on both a and b of x; 4 of b on y.
    np.testing.assert_allclose(
        comparisons.typical_ratios(figures),
        [np.sqrt(1 * 2), 1, np.sqrt(15.5 / 2 * 5 / 4)],
    )
    failed = comparisons.failures(figures)
    np.testing.assert_allclose(failed["1.5"], [0.75, 0, 0.5])
    np.testing.assert_allclose(failed["2"], [0.5, 0, 0.25])
    np.testing.assert_allclose(failed["10"], [0, 0, 0.25])


def test_the_bootstrap_has_the_spread_of_a_mean_of_tasks():
    """Seeds alike within a task: the variance is that of drawing tasks."""
    rng = np.random.default_rng(0)
    by_task = rng.normal(size=12)
    index = pd.MultiIndex.from_product([range(12), range(3)], names=["task", "seed"])
    values = pd.DataFrame({"a": np.repeat(by_task, 3), "b": 1.0}, index)
    found = comparisons.bootstrap(values, comparisons.means)
    assert found["a"].std() == pytest.approx(by_task.std() / np.sqrt(12), rel=0.1)
    assert (found["b"] == 1).all()
    limits = comparisons.interval(found)
    half = 1.96 * by_task.std() / np.sqrt(12)
    np.testing.assert_allclose(
        limits.loc["a"], [by_task.mean() - half, by_task.mean() + half], atol=0.1
    )


def test_time_to_target():
    index = pd.MultiIndex.from_product(
        [["x", "y"], [0], [0.25, 0.5, 1.0]], names=["task", "seed", "mark"]
    )
    course = pd.DataFrame(
        {"ref": [3.0, 2, 1, 9, 5, 5], "fast": [1.0, 0, 2, 4, 4, 4], "slow": [9.0] * 6},
        index,
    )
    times = comparisons.times(course, "ref")
    np.testing.assert_array_equal(times["ref"], [1, 0.5])
    np.testing.assert_array_equal(times["fast"], [0.25, 0.25])
    np.testing.assert_array_equal(times["slow"], [np.inf, np.inf])
    np.testing.assert_allclose(
        comparisons.times_over(times, "ref"), [1, np.sqrt(0.25 * 0.5), np.sqrt(2 * 4)]
    )


def test_seconds_to_the_target_are_work_times_seconds_of_a_unit():
    curves = {
        ("AdamW + cosine", "untuned"): [3.0, 1.0],
        ("EV3 portfolio", "clock"): [1.0, 0.5],
        ("EV3 relay", "clock"): [2.0, 1.5],
    }
    rows = [
        (task, method, 0, mark, accounting, "test", value)
        for task in ("x", "y")
        for (method, accounting), curve in curves.items()
        for mark, value in zip([0.25, 1.0], curve, strict=True)
    ]
    ratios = {("x", "portfolio"): 2.0, ("y", "portfolio"): 0.5, ("x", "relay"): 1.5}
    for (task, kind), ratio in {**ratios, ("y", "relay"): 6.0}.items():
        for key, value in {"ratio": ratio, "ratio_25": 0.0, "ratio_75": 99.0}.items():
            metric = f"EV3 {kind}: {key}"
            rows.append((task, "wall-clock", np.nan, np.nan, np.nan, metric, value))
    names = ["task", "method", "seed", "mark", "accounting", "metric", "value"]
    found = report.wall_clock(pd.DataFrame(rows, columns=names))
    assert list(found.index) == ["EV3 portfolio", "EV3 relay"]
    np.testing.assert_allclose(found["seconds of a unit of work"], [1.0, 3.0])
    # The portfolio takes a quarter of the baseline's work, the relay two budgets.
    np.testing.assert_allclose(found["seconds to the target"], [0.25, 6.0])
    assert list(found["the least"]) == ["0.50 (y)", "1.50 (x)"]
    assert list(found["the most"]) == ["2.00 (x)", "6.00 (y)"]


def test_behind_by_a_standard_error():
    ours = table(a=[1.0, 1.2, 1.0, 3.0])["a"]
    theirs = table(a=[0.5, 0.8, 1.0, 1.0])["a"]
    # x: 0.45 behind, standard error 0.05; y: 1 behind, standard error 1.
    assert comparisons.behind(ours, theirs) == ["x"]


# The whole.


needs_stored = pytest.mark.skipif(
    not (run.FOLDER / "quality" / "results.csv").exists(),
    reason="a source distribution has no stored results",
)


@needs_stored
def test_the_stored_page_is_made_of_stored_results(tmp_path):
    results = Results(run.FOLDER / "quality").frame
    measured = [name for group in accountings.GROUPS for name in group]
    others = {*methods.EV3S, accountings.WALL_CLOCK} - {*methods.MAIN}
    needed = set(measured) - others
    for task in NAMES:
        assert set(results.method[results.task == task]) >= needed
    page = report.page(results, tmp_path)
    assert page == (run.FOLDER / "quality" / "report.md").read_text()


@needs_stored
def test_the_stored_page_of_tasks_of_real_size(tmp_path, capsys):
    report.shown(Results(run.FOLDER / "large").frame, tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert page == (run.FOLDER / "large" / "report.md").read_text()


@needs_stored
def test_tasks_of_an_interrupted_run_are_left_out(tmp_path, capsys):
    """Those that lack EV3 or the baseline, with which all are compared."""
    results = Results(run.FOLDER / "quality").frame
    kept = results[results.method.isin([methods.PORTFOLIO, methods.BASELINE])]
    without = kept[(kept.task != "wine") | (kept.method == methods.PORTFOLIO)]
    report.shown(without[without.task.isin(["wine", "outliers"])], tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "outliers" in page and "wine" not in page and "Nemenyi" not in page
    capsys.readouterr()
    report.shown(without[without.task == "wine"], tmp_path)
    assert "no report without EV3 portfolio" in capsys.readouterr().out


@pytest.mark.slow
def test_the_suite_runs_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    pattern = r"^(EV3 relay|EV3 portfolio|AdamW.*|grid.*|succ.*|explorers.*|COCOB)$"
    args = ["quality", "--seeds=2", "--steps=8", "--task=wine", f"--only={pattern}"]
    args += [f"--folder={tmp_path}"]
    assert run.main(args) == 0
    out, err = capsys.readouterr()
    assert "wine, EV3 relay: " in err and err.count("\n") == 7
    assert "EV3 portfolio: mean rank " in out
    page = (tmp_path / "report.md").read_text()
    for row in (
        "Tuning on the clock",
        "grid search",
        "AdamW + cosine, tuned",
        "hindsight",
    ):
        assert row in page
    for name in ("profile.png", "ranks.png", "course.png"):
        assert f"]({name})" in page and (tmp_path / name).stat().st_size > 10_000
    path = tmp_path / "results.csv"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(x for x in rows if not x.startswith("wine,COCOB,")))
    assert run.main(args) == 0
    again, err = capsys.readouterr()
    assert err.startswith("wine, COCOB: ") and err.count("\n") == 1
    assert again == out
    # But for the time that it took.
    kept, found = (
        sorted(row for row in text if ",seconds," not in row)
        for text in (rows, path.read_text().splitlines(keepends=True))
    )
    assert kept == found
