"""The benchmarks run, and compare like with like."""

import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ev3

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "overhead.py"
# Compiled without optimization: these runs show that scripts work, not how fast.
QUICKLY = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false",
}


def run(*args, cwd=None, fails=False):
    """What a Python process prints, which ends well unless it ``fails``."""
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        env=QUICKLY,
        cwd=cwd,
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout + done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def overhead():
    # Its flags can be defined only once in a process.
    if "optax_ev3_overhead" not in sys.modules:
        spec = importlib.util.spec_from_file_location("optax_ev3_overhead", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return sys.modules["optax_ev3_overhead"]


def never_finite():
    return optax.GradientTransformation(
        lambda params: optax.TraceState(jax.tree.map(jnp.zeros_like, params)),
        lambda updates, state, params=None: (
            jax.tree.map(lambda u: u * jnp.nan, updates),
            optax.TraceState(jax.tree.map(jnp.ones_like, state.trace)),
        ),
    )


@pytest.mark.slow
def test_quick_run_prints_tables_and_writes_all_figures(tmp_path):
    path = tmp_path / "figures.json"
    out = run(SCRIPT, "--quick", "--json", path)
    for title in (
        "One step",
        "Nothing to assess",
        "Milliseconds a round",
        "A step of a trajectory",
        "Sweeps",
        "CPU time of a step with convolutions",
    ):
        assert title in out
    figures = json.loads(path.read_text())
    assert {"platform", "cpus", "jax", "device"} <= set(figures["machine"])
    rows = {
        part: {tuple(row[key] for key in keys): row for row in figures[part]}
        for part, keys in {
            "steps": ("model", "explorers", "program"),
            "updates": ("model", "explorers", "program"),
            "rounds": ("program", "loop"),
        }.items()
    }
    models = ("mlp", "conv")
    modes = ("unroll", "vmap", "map", "by hand", "by hand, tuned")
    assert set(rows["steps"]) == {(m, 2, p) for m in models for p in modes}
    assert set(rows["updates"]) == {
        (m, 2, p) for m in models for p in ("ev3", "safe by hand", "updates alone")
    }
    assert set(rows["rounds"]) == {
        (p, loop)
        for p in ("ev3", "ev3, host_metric, NumPy, 20 resamples", "adam")
        for loop in ("python", "scan")
    }
    for part in rows.values():
        for row in part.values():
            numbers = [value for value in row.values() if isinstance(value, float)]
            assert all(math.isfinite(value) and value > 0 for value in numbers), row
            assert row["ratio_25"] <= row["ratio"] <= row["ratio_75"]
    for key, row in rows["steps"].items():
        assert row["compile_seconds"] > 0 and row["peak_mib"] > 0
        assert row["ratio"] == 1 or key[2] != "by hand"


def test_unknown_part_is_an_error():
    done = run(SCRIPT, "--part", "nonsense", fails=True)
    assert "nonsense" in done


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_step_by_hand_does_the_work_of_ev3(overhead, model, tuned):
    settings = overhead.QUICK._replace(batch=64)
    build = {"mlp": overhead.mlp_problem, "conv": overhead.conv_problem}[model]
    problem = build(settings)
    inner = [*overhead.inner_optimizers(3), never_finite()]
    adapt = optax_ev3.adapt.greedy()
    ev3_step, ev3_state = overhead.ev3_step(problem, inner, adapt=adapt)
    hand_step, hand_state = overhead.by_hand_step(problem, inner, tuned)
    ev3_step, hand_step = jax.jit(ev3_step), jax.jit(hand_step)
    ev3_params = hand_params = problem.params
    batches = problem.batches
    for train, held_out in zip(batches[:6], batches[6:12], strict=True):
        ev3_params, ev3_state = ev3_step(ev3_params, ev3_state, train, held_out)
        hand_params, hand_state = hand_step(hand_params, hand_state, train, held_out)
        chex.assert_trees_all_close(ev3_params, hand_params, rtol=1e-4, atol=1e-6)
    opt_states = [one.opt_state for one in ev3_state.explorers.values()]
    chex.assert_trees_all_close(opt_states, hand_state[0], rtol=1e-4, atol=1e-6)
    # The hostile explorer was seen, held and never adopted.
    assert not np.any(jax.tree.leaves(hand_state[0][-1])[0])
    past = optax_ev3.history(ev3_state)
    assert len(past["adopted"]) == 6 and 3 not in past["adopted"]
    assert np.isnan(past["mean"][:, 3]).all()
    # The work was real: somebody moved the parameters.
    moved = jax.tree.leaves(
        jax.tree.map(lambda a, b: jnp.abs(a - b).max(), hand_params, problem.params)
    )
    assert max(moved) > 1e-3


def test_both_update_programs_advance_the_same_states(overhead):
    problem = overhead.mlp_problem(overhead.QUICK)
    inner = overhead.inner_optimizers(3)
    grads = jax.grad(problem.loss_fn)(problem.params, problem.batches[0])
    ev3_step, ev3_state = overhead.ev3_updates(problem, inner)
    plain_step, plain_states = overhead.plain_updates(problem, inner)
    for _ in range(3):
        ev3_state, update = jax.jit(ev3_step)(ev3_state, grads, problem.params)
        plain_states, updates = jax.jit(plain_step)(plain_states, grads, problem.params)
    opt_states = [one.opt_state for one in ev3_state.explorers.values()]
    chex.assert_trees_all_close(opt_states, plain_states, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(update, updates[0])


def test_ratios_are_taken_within_a_repeat(overhead):
    # The machine slows down tenfold from the first repeat to the last.
    reference = np.linspace(1.0, 10.0, 31)
    row = overhead.ratio_row(1.05 * reference, reference)
    assert row["ratio"] == pytest.approx(1.05)
    assert row["ratio_25"] == row["ratio_75"] == pytest.approx(1.05)


def test_runners_take_turns(overhead):
    calls = []
    runners = {name: lambda name=name: calls.append(name) for name in "abc"}
    settings = overhead.QUICK._replace(repeats=6)
    seconds = overhead.race(runners, settings)
    assert set(seconds) == set("abc")
    assert all(values.shape == (6,) for values in seconds.values())
    assert calls.count("a") == calls.count("b") == calls.count("c")


@pytest.mark.slow
def test_benchmark_of_trajectories_runs(tmp_path):
    path = tmp_path / "figures.json"
    script = SCRIPT.with_name("trajectories.py")
    args = ["--seeds=2", "--steps=12", "--filter=^shared 10$", f"--json={path}"]
    run(script, *args)
    rows = json.loads(path.read_text())
    for method in ("momentum 0.05 alone", "EV3, shared 10"):
        accuracy = np.array(rows[f"12 steps, {method}"]["accuracy"])
        assert accuracy.shape == (2,)
        assert ((0 <= accuracy) & (accuracy <= 1)).all()


EVIDENCE = SCRIPT.with_name("evidence.py")


@pytest.mark.slow
def test_benchmark_of_evidence_runs(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    args = ["--quick", f"--json={tmp_path / 'x.json'}", f"--plot={tmp_path / 'x.png'}"]
    out = run(EVIDENCE, *args)
    for title in ("Any of K equal", "Ever declared better", "when better by 0.01"):
        assert title in out
    assert image.imread(tmp_path / "x.png").std() > 0.01
    figures = json.loads((tmp_path / "x.json").read_text())
    kinds = {"0/1", "bounded", "heavy-tailed"}
    assert {row["scores"] for row in figures["false"]} == kinds
    assert {row["scores"] for row in figures["anytime"]} == kinds - {"heavy-tailed"}
    for row in figures["false"] + figures["anytime"] + figures["power"]:
        assert 0 <= row["rate"] <= 1 and row["errors"] > 0
    rates = {
        (row["scores"], row["N"], row["K"], row["method"]): row["rate"]
        for row in figures["false"]
    }
    for (kind, n, k, method), rate in rates.items():
        # More candidates are more chances.
        if "uncorrected" in method and k == 4:
            assert rate >= rates[kind, n, 2, method]
    for row in figures["anytime"]:
        assert (np.diff(row["curve"]) >= 0).all()
        assert row["curve"][-1] == pytest.approx(row["rate"])


def test_simulated_scores_are_what_the_benchmark_says():
    code = """if True:
        import json, jax, evidence
        keys = jax.random.split(jax.random.key(0), 50)
        cases = {kind: lambda key, kind=kind: evidence.draw(kind, key, (3, 4000))
            for kind in evidence.KINDS}
        cases["better"] = lambda key: evidence.draw_better(key, 4000)
        found = {}
        for name, fn in cases.items():
            x = jax.jit(jax.vmap(fn))(keys)
            d = x[:, 0] - x[:, 1]
            found[name] = [float(v) for v in (
                x.min(), x.max(), x[:, 1].mean(), d.mean(), d.std(), (d != 0).mean(),
                ((d / d.std()) ** 4).mean(),
            )]
        print(json.dumps(found))
    """
    out = run("-c", code, cwd=EVIDENCE.parent)
    found = json.loads(out)
    for name, (low, high, mean, gain, spread, differ, fourth) in found.items():
        true_gain = 0.01 if name == "better" else 0
        assert abs(gain - true_gain) < 4 * spread / np.sqrt(50 * 4000)
        if name in ("0/1", "better"):
            assert (low, high) == (0, 1)
            assert mean == pytest.approx(0.8, abs=0.01)
            assert differ == pytest.approx(0.06, abs=0.003)
        elif name == "bounded":
            assert 0 <= low < 0.1 and 0.9 < high <= 1 and differ > 0.99
        else:
            assert differ > 0.99 and fourth > 10


@pytest.mark.slow
def test_benchmark_of_the_assessment_runs():
    pytest.importorskip("sklearn")
    rows = ("greedy, ladder()", "two explorers, in_chunks(8)", "trajectories of 20")
    pattern = "|".join(f"^{re.escape(row)}$" for row in rows)
    script = SCRIPT.with_name("assessment.py")
    out = run(script, "--quick", f"--rows={pattern}")
    for row in ("gone back", "best held-out F1", *rows):
        assert row in out
    assert "ladder(confidence=None)" not in out


@pytest.mark.slow
def test_benchmark_of_objectives_runs(tmp_path):
    pytest.importorskip("sklearn")
    path = tmp_path / "figures.json"
    args = ["--seeds=2", "--steps=20", "--warm=10", "--objectives=2", f"--json={path}"]
    script = SCRIPT.with_name("objectives.py")
    out = run(script, *args, "--rows=^(constrained|weighted, moving to targets)$")
    assert "hypervolume" in out and "accuracy alone" not in out
    figures = json.loads(path.read_text())
    row = figures["safety"]["constrained"]
    # Two rounds in each of two runs.
    assert np.less_equal(row["adoptions"], 2).all()
    assert np.less_equal(row["broken"], row["adoptions"]).all()
    assert np.shape(row["worst group"]) == (2,)
    assert np.less_equal(row["worst group"], row["accuracy"]).all()
    points = figures["priority"]["2 objectives"]
    assert set(points) > {"weighted, moving to targets", "best fixed weights"}
    assert all(np.shape(values) == (2, 2) for values in points.values())
    volumes = {k: np.prod(np.maximum(v, 0), 1).mean() for k, v in points.items()}
    assert volumes["best fixed weights"] >= volumes["equal fixed weights"]


EVOLVE = SCRIPT.with_name("evolve.py")


@pytest.mark.slow
def test_benchmark_of_evolution_runs(tmp_path):
    pytest.importorskip("sklearn")
    path = tmp_path / "figures.json"
    args = ["--seeds=2", "--steps=40", "--task=digits CNN", f"--json={path}"]
    out = run(EVOLVE, *args, "--filter=^evolve from best x|^constant")
    assert "schedule-free" not in out and "a fifth" in out
    (figures,) = json.loads(path.read_text()).values()
    rows = {(row["name"], row["steps"]): row for row in figures}
    assert len(rows) == 5 and {steps for _, steps in rows} == {40, 320}
    assert all(np.shape(row["test"]) == (2,) for row in figures)
    best = float(figures[0]["name"].removeprefix("constant "))
    rates = np.array(rows["evolve from best x 100", 40]["learning_rates"])
    assert rates.shape == (2, 4)
    # Eight members, 10^0.75 apart, the largest at the start: the median lies between
    # the fourth and the fifth.
    middle = min(100 * best, 10.0) * (10**-2.25 + 10**-3) / 2
    np.testing.assert_allclose(rates[:, 0], middle, rtol=0.05)


def test_convolution_of_the_benchmarks_is_one():
    pytest.importorskip("sklearn")
    code = """if True:
        import jax, _tasks
        x = jax.random.normal(jax.random.key(0), [2, 8, 8, 3])
        w = jax.random.normal(jax.random.key(1), [27, 5])
        for stride in (1, 2):
            ours = _tasks.patches(x, stride) @ w
            other = jax.lax.conv_general_dilated(
                x, w.reshape(3, 3, 3, 5), (stride, stride), [(1, 1)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            print(ours.shape == other.shape and abs(ours - other).max() < 1e-4)
    """
    assert run("-c", code, cwd=EVOLVE.parent).split() == ["True", "True"]


@pytest.mark.slow
def test_benchmark_of_distillation_runs(tmp_path):
    pytest.importorskip("sklearn")
    path = tmp_path / "figures.json"
    args = ["--part=preservation", "--seeds=2", f"--json={path}"]
    out = run(SCRIPT.with_name("distillation.py"), *args)
    assert "NNX, ResNet widened" in out
    found = json.loads(path.read_text())["preservation"]
    assert len(found) == 10
    apart = np.array(list(found.values()))
    assert apart.shape == (10, 2) and 0 < apart.max() < 1e-5


@pytest.mark.slow
def test_benchmark_of_batchnorm_runs(tmp_path):
    path = tmp_path / "figures.json"
    out = run(SCRIPT.with_name("batchnorm.py"), "--quick", "--json", path)
    rows = json.loads(path.read_text())
    assert [(row["rounds"], row["statistics"]) for row in rows] == [
        (rounds, statistics)
        for rounds in ("one step", "25 steps")
        for statistics in ("loop", "own")
    ]
    for row in rows:
        assert f"{row['rounds']:20}      0.9  {row['statistics']}" in out
        # Of ten classes; a decision agrees or does not.
        assert 0 < np.mean(row["exact"]) < 0.9
        assert all(0 <= agreed <= 1 for agreed in row["agreed"])
    # In the only round of 25 steps no branch but the first is scored by its own.
    one_round = [row["agreed"] for row in rows[2:]]
    assert set(np.ravel(one_round)) <= {0.0, 1.0}
