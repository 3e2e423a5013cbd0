"""The quality suite: its tasks, its loop, and what its report makes of cells."""

import functools
import importlib
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("sklearn")
BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    """By name; they import each other by their names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {k: importlib.import_module(k) for k in ("_tasks", "_quality_report")}
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(autouse=True)
def scripts_may_broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def tasks(modules):
    return modules["_tasks"]


@pytest.fixture(scope="module")
def report(modules):
    return modules["_quality_report"]


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


def test_all_tasks_are_tested(tasks):
    assert list(tasks.TASKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_tasks_can_be_learned(tasks, name):
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
def test_parts_have_no_example_in_common(tasks, name):
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


def test_labels_are_noisy_in_the_training_part_alone(tasks):
    clean, noisy = (tasks.TASKS[n]().parts(5) for n in ("digits MLP", "noisy labels"))
    share = (clean.train[1] != noisy.train[1]).mean()
    assert share == pytest.approx(0.27, abs=0.05)  # A tenth is drawn right.
    for one, other in zip(clean[1:], noisy[1:], strict=True):
        np.testing.assert_array_equal(one[1], other[1])


def test_the_solution_of_the_physics_task_is_its_minimum(tasks):
    # Central differences of the sine in the same equation.
    t, h = np.linspace(0.1, 0.9, 9), 1e-4
    u = lambda t: np.sin(tasks.WAVES * t)
    second = (u(t + h) - 2 * u(t) + u(t - h)) / h**2
    np.testing.assert_allclose(second + tasks.WAVES**2 * u(t), 0, atol=1e-3)


# The report.


PARTS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1 / 8, 1.0)


def cell(test, held_out, marks=PARTS):
    """Figures ``[marks, kinds, seeds]`` in a cell of 32 gradients."""
    run = {"marks": list(marks), "test": test, "held_out": held_out}
    return {"runs": [run], "budget": 32}


@pytest.fixture
def cells():
    """Eight explorers, two seeds; held-out scores are what the test says, or not."""
    rng = np.random.default_rng(0)
    found = {}
    for number in range(8):
        test = rng.uniform(size=[6, 2, 2])
        found[f"single {number}"] = cell(test.tolist(), (-test).tolist())
    ours = rng.uniform(size=[2, 1, 2])
    found["EV3"] = cell(ours.tolist(), (-ours).tolist(), (1.0, "work"))
    return found


@pytest.fixture
def kinds(report):
    halving = ((8, 1 / 32), (4, 3 / 32), (2, 7 / 32), (1, 15 / 32))
    names = tuple(f"single {number}" for number in range(8))
    return report.Kinds(names, ("cosine",), halving, 1 / 8)


def test_grid_search_and_hindsight(report, kinds, cells):
    rows = report.rows(cells, kinds, "gradients")
    test = np.array([cells[name]["runs"][0]["test"] for name in kinds.singles])
    ends = test[:, 5].reshape(16, 2)  # And averages.
    np.testing.assert_array_equal(rows[report.HINDSIGHT], ends[ends.mean(1).argmin()])
    np.testing.assert_array_equal(rows["all eight in full, by held-out"], ends.min(0))
    shares = test[:, 4].reshape(16, 2)  # At 4 of 32 steps.
    np.testing.assert_array_equal(rows["grid search"], shares.min(0))
    np.testing.assert_array_equal(rows["single 3, averaged"], test[3, 5, 1])
    ours = cells["EV3"]["runs"][0]["test"]
    np.testing.assert_array_equal(rows["EV3"], ours[0][0])
    # At equal work others are what they were, EV3 ends earlier.
    at_work = report.rows(cells, kinds, "work")
    np.testing.assert_array_equal(at_work["EV3"], ours[1][0])
    np.testing.assert_array_equal(at_work["grid search"], rows["grid search"])


def test_successive_halving(report, kinds, cells):
    test = np.array([cells[name]["runs"][0]["test"] for name in kinds.singles])
    expected = []
    for seed in range(2):
        left = list(range(8))
        for mark, keep in enumerate((4, 2, 1)):
            left = sorted(left, key=lambda i, m=mark, s=seed: test[i, m, 0, s])[:keep]
        expected.append(test[left[0], 3, 0, seed])
    rows = report.rows(cells, kinds, "gradients")
    np.testing.assert_array_equal(rows["successive halving"], expected)


def test_rates_are_chosen_by_held_out_scores_for_each_seed(report, kinds, cells):
    runs = [
        cell([[test, [9, 9]]], [[score, [0, 0]]], (1.0,))["runs"][0]
        for test, score in [([1, 2], [5, 6]), ([3, 4], [7, 5]), ([0, 0], [None, 4])]
    ]
    other = {"runs": runs, "budget": 32}
    rows = report.rows(cells | {"cosine": other}, kinds, "gradients")
    np.testing.assert_array_equal(rows["cosine"], [3, 2])


def test_what_ends_worse_than_it_began_counts_as_its_start(report, kinds, cells):
    start = np.array([2.0, 3.0])
    found = report.no_worse({"a": np.array([1, np.inf]), "b": np.array([4, 2])}, start)
    np.testing.assert_array_equal(found["a"], [1, 3])
    np.testing.assert_array_equal(found["b"], [2, 2])
    untrained = {"runs": [{"test": [0.0, 0.5], "held_out": [0.0, 0.0]}], "budget": 32}
    rows = report.rows(cells | {report.UNTRAINED: untrained}, kinds, "gradients")
    assert all(x[0] == 0 and x[1] <= 0.5 for x in rows.values())


def test_holm(report):
    # By hand: 0.01 * 3, then 0.02 * 2, then 0.5.
    assert report.holm([0.5, -0.01, 0.02]) == pytest.approx([0.5, -0.03, 0.04])
    assert report.holm([0.04, -0.039]) == pytest.approx([0.078, -0.078])


def test_what_was_asked_is_told(report, kinds, monkeypatch, capsys):
    """Four seeds, two tasks: on one EV3 is clearly better, on the other not by much."""
    better = np.array([1.0, 1.1, 0.9, 1.0])
    level = np.array([2.0, 2.2, 2.4, 2.6])
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
            "grid search": level[::-1],
            "EV3, other": 0.9 * level,
        },
    }
    monkeypatch.setattr(report, "_tables", lambda *args: found)
    report.verdicts({}, kinds._replace(variants=("EV3, other",)))
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "or better on 2 of 2 tasks, significantly better on 1: a.",
        "significantly better on 0 of 2 tasks (none), worse on 1 (a).",
        # The root of 1.1 times 0.9.
        "0.995 (geometric mean of 2 tasks; 0.900 on b to 1.100 on a; at most 1.01 on "
        "1).",
    ):
        assert part in out


def test_table_of_markdown(report, kinds, cells, tmp_path):
    report.write_table({"wine": cells}, kinds, tmp_path / "table.md")
    lines = (tmp_path / "table.md").read_text().splitlines()
    head, row = (
        [x.strip("* ") for x in line.split("|")[1:-1]] for line in (lines[2], lines[4])
    )
    rows = report.rows(cells, kinds, "gradients")
    for name, text in list(zip(head, row, strict=True))[1:]:
        mean, error = (float(x) for x in text.split("±"))
        assert mean == pytest.approx(rows[name].mean(), rel=5e-3)
        assert error == pytest.approx(abs(np.diff(rows[name])[0]) / 2, rel=5e-2)
    assert "grid search" in head and lines[4].count("**") == 2


def test_tables_and_plots(report, kinds, cells, tmp_path, capsys):
    report.show({"wine": cells}, kinds)
    out = capsys.readouterr().out
    for row in ("At equal work", "wine, 2 seeds", "grid search", "EV3 against"):
        assert row in out
    report.draw({"wine": cells}, kinds, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"profile.png", "course.png"}
    image = pytest.importorskip("matplotlib.image").imread(tmp_path / "course.png")
    orange = np.array([0xE6, 0x9F, 0x00]) / 255  # The line of the best single method.
    assert (abs(image[..., :3] - orange) < 0.02).all(-1).sum() > 50


def test_every_name_is_read_back_from_its_file(report, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json, quality as q\n"
            "print(json.dumps([[*q.TASKS], [*q.METHODS, *q.PROCEDURES]]))",
        ],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    tasks, names = json.loads(done.stdout.splitlines()[-1])
    assert tasks == NAMES and len(names) == len(set(names)) > 30
    kept = report.load(BENCHMARKS / "results" / "quality")
    assert set(kept) == set(tasks)
    assert all(set(cells) == set(names) for cells in kept.values())
    odd = ["a / b", "a over b", "a/b", "/", "handover", "50%", "a%2Fb", "a.b", "ä: [1]"]
    for number, name in enumerate([*names, *odd]):
        for task in ("wine", "red / white"):
            path = report.path_of(tmp_path, task, name)
            assert not path.exists()
            path.parent.mkdir(exist_ok=True)
            path.write_text(str(number))
    found = {name: number for number, name in enumerate([*names, *odd])}
    assert report.load(tmp_path) == {"wine": found, "red / white": found}


@pytest.mark.slow
def test_the_suite_runs_and_goes_on_where_it_stopped(tmp_path):
    pattern = "^(EV3|adam .*|momentum .*|rmsprop .*|cosine|soup|population.*)$"
    args = ["--seeds=2", "--steps=8", "--task=wine", f"--method={pattern}"]
    command = [sys.executable, "-P", str(BENCHMARKS / "quality.py"), *args]
    command += [f"--folder={tmp_path}"]
    run = functools.partial(
        subprocess.run, check=True, capture_output=True, text=True, encoding="utf-8"
    )
    lost = tmp_path / "wine" / "cosine.json"
    out = run(command).stdout
    for row in ("wine, EV3:", "grid search", "successive halving", "soup", "cosine"):
        assert row in out
    cells = {path: path.read_bytes() for path in lost.parent.iterdir()}
    assert len(cells) == 1 + 8 + 3
    lost.unlink()
    again = run(command).stdout
    made = re.findall(r"^wine, (.*): \d+ s$", again, re.M)
    assert made == ["cosine"]
    assert again.partition("At equal")[2] == out.partition("At equal")[2]
    for path, content in cells.items():
        assert path == lost or path.read_bytes() == content


RECOUNT = """
import jax, numpy as np, optax, optax_ev3
from optax_ev3 import explore
from absl import flags
import quality

flags.FLAGS(["quality"])
quality.LENGTH = 5  # So that 40 of the 50 held-out examples are drawn.
task, budget = quality.made("wine"), 400
method = quality.ev3(trajectory_length=5, race=explore.Racing(2, 8))
found = quality.ev3_trainer(task, method, budget, range(2))()
parts = jax.tree.map(jax.numpy.asarray, task.parts(1))
tx, params = method.make(task, parts.held_out, 1), task.init(jax.random.key(1))

@jax.jit
def step(params, state, number):
    batch = quality.draw(task, parts, 1, number)
    none = jax.tree.map(jax.numpy.zeros_like, params)
    updates, state = tx.update(none, state, params, batch=batch)
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
    gradients += 5 * took[:8].sum()
    assert past["examples"][-1] == 40
    assessed += 40 * took.sum()
    work = gradients + assessed / (3 * task.batch)
    test = float(tested(params, parts.test))
    within |= {1.0: test} if gradients <= budget else {}
    within |= {"work": test} if work <= budget else {}
assert gradients < 8 * calls  # Somebody rested.
assert found["calls"][1] == calls and found["rounds"][1] == calls // 5
np.testing.assert_allclose(found["work"][1], work / gradients, 1e-5)
marks = [*quality.MARKS, quality.WORK]
for mark, test in within.items():
    np.testing.assert_allclose(found["test"][marks.index(mark), 0, 1], test, 1e-3)
assert within[1.0] != within["work"]
"""


@pytest.mark.slow
def test_what_explorers_take_is_counted():
    done = subprocess.run(
        [sys.executable, "-c", RECOUNT],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
