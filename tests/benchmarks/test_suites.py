"""Every suite runs on a tiny budget, and compares like with like."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

import optax_ev3

pytest.importorskip("sklearn")
pytest.importorskip("statsmodels")
from benchmarks import (
    assessment,
    evidence,
    models,
    overhead,
    run,
    scale,
    trajectories,
)
from benchmarks.evidence import simulate
from benchmarks.overhead import programs, timing
from benchmarks.results import Results


@pytest.fixture
def suite(tmp_path, capsys):
    """Runs a suite: its results, and what it prints."""

    def quick(name, *args):
        assert run.main([name, "--quick", f"--folder={tmp_path}", *args]) == 0
        return Results(tmp_path).frame, capsys.readouterr().out

    return quick


def settings_of(**others):
    """Of a quick run of the overhead suite."""
    return overhead.Settings()._replace(**{**overhead.QUICK, **others})


@pytest.mark.slow
def test_overhead(suite):
    # Programs of convolutions do the same work as those by hand, see below.
    results, out = suite("overhead", "--repeats=2", "--only=^(?!conv)")
    for title in overhead.TITLES.values():
        assert title in out
    found = results[results.metric != "seconds"]
    labels = ["model", "explorers", "program", "loop"]
    rows = {
        part: {
            tuple(x for x in key if x == x): one.set_index("metric").value
            for key, one in found[found.task == part].groupby(labels, dropna=False)
        }
        for part in ("steps", "updates", "rounds")
    }
    modes = ("unroll", "vmap", "map", "by hand", "by hand, tuned")
    assert set(rows["steps"]) == {("mlp", 2, p) for p in modes}
    assert set(rows["updates"]) == {
        ("mlp", 2, p) for p in ("ev3", "safe by hand", "updates alone")
    }
    assert set(rows["rounds"]) == {
        (p, loop)
        for p in ("ev3", "ev3, host_metric, NumPy, 20 resamples", "adam")
        for loop in ("python", "scan")
    }
    for part in rows.values():
        for row in part.values():
            assert np.isfinite(row).all() and (row > 0).all()
            assert row.ratio_25 <= row.ratio <= row.ratio_75
    for key, row in rows["steps"].items():
        assert row.compile_seconds > 0 and row.peak_mib > 0
        assert row.ratio == 1 or key[2] != "by hand"
    paused = found[found.metric == "paused"].set_index("program").value
    assert paused["recommended, none paused"] == 0
    assert paused["recommended, one paused"] == 1


@pytest.mark.slow
def test_scale(suite, tmp_path):
    results, out = suite("scale", "--gpu", "--only=^one step|^adamw")
    assert (tmp_path / "tables.md").read_text(encoding="utf-8").strip() in out
    assert set(results.task) == set(scale.TASKS)
    values = results.set_index(["task", "program", "metric"]).value.sort_index()
    ours, adam = (
        values[values.index.get_level_values("program") == name].droplevel("program")
        for name in ("ev3", "adam")
    )
    # Two moments and a counter, for 16 leaves.
    assert adam["programs", "state_leaves"].item() == 33
    assert adam["programs", "state_copies"].item() == pytest.approx(2, abs=0.01)
    # Two optimizers, and the stable parameters.
    assert ours["programs", "state_leaves"].item() > 2 * 33 + 16
    assert ours["programs", "state_copies"].item() > 5
    assert ours["programs", "equations"].item() > adam["programs", "equations"].item()
    for part in (ours, adam):
        seconds = part.filter(like="_seconds")
        assert (seconds > 0).all()
        assert len(part["dispatch", "returned_seconds"]) == 3
    # Each parameter is gathered once, and each gradient summed; four candidates are
    # assessed more.
    assert adam["collectives", "moved_copies"].item() == pytest.approx(2, abs=0.2)
    assert (ours["collectives", "moved_copies"] > 4).all()
    assert (adam["training", "tokens_per_second"] > 0).all()
    assert "2 layers, scanned" in out and "one step, 2 alike" in out


@pytest.mark.slow
def test_one_line(suite):
    results, out = suite("one_line", "--task=wine", "--steps=20")
    test = results[results.metric == "test"]
    assert set(test.groupby("method").size()) == {4}  # Two seeds, two sets of params.
    assert np.isfinite(test.value).all() and (test.value > 0).all()
    # Alone there is one set of parameters.
    alone = test[test.method == "adam alone"].pivot(index="seed", columns="weights")
    assert (alone["value", "best"] == alone["value", "loop"]).all()
    ours = test[test.method.isin(["relay", "adam alone"]) & (test.weights == "best")]
    assert ours.groupby("method").value.mean().nunique() == 2
    assert (results[results.metric == "finite"].value == 1).all()
    assert "geometric mean" in out and "Three harmful ones more" in out


def never_finite():
    return optax.GradientTransformation(
        lambda params: optax.TraceState(jax.tree.map(jnp.zeros_like, params)),
        lambda updates, state, params=None: (
            jax.tree.map(lambda u: u * jnp.nan, updates),
            optax.TraceState(jax.tree.map(jnp.ones_like, state.trace)),
        ),
    )


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_step_by_hand_does_the_work_of_ev3(model, tuned):
    settings = settings_of(batch=64)
    build = {"mlp": programs.mlp_problem, "conv": programs.conv_problem}[model]
    problem = build(settings)
    inner = [*programs.inner_optimizers(3), never_finite()]
    adapt = optax_ev3.adapt.greedy()
    ev3_step, ev3_state = programs.ev3_step(problem, inner, adapt=adapt)
    hand_step, hand_state = programs.by_hand_step(problem, inner, tuned)
    ev3_step, hand_step = jax.jit(ev3_step), jax.jit(hand_step)
    ev3_params = hand_params = problem.params
    batches = problem.batches
    for train, held_out in zip(batches[:6], batches[6:12], strict=True):
        ev3_params, ev3_state = ev3_step(ev3_params, ev3_state, train, held_out)
        hand_params, hand_state = hand_step(hand_params, hand_state, train, held_out)
        chex.assert_trees_all_close(ev3_params, hand_params, rtol=1e-4, atol=1e-6)
    opt_states = [one.opt_state for one in ev3_state.explore.explorers.values()]
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


def test_both_update_programs_advance_the_same_states():
    problem = programs.mlp_problem(settings_of())
    inner = programs.inner_optimizers(3)
    grads = jax.grad(problem.loss_fn)(problem.params, problem.batches[0])
    ev3_step, ev3_state = programs.ev3_updates(problem, inner)
    plain_step, plain_states = programs.plain_updates(problem, inner)
    for _ in range(3):
        ev3_state, update = jax.jit(ev3_step)(ev3_state, grads, problem.params)
        plain_states, updates = jax.jit(plain_step)(plain_states, grads, problem.params)
    opt_states = [one.opt_state for one in ev3_state.explore.explorers.values()]
    chex.assert_trees_all_close(opt_states, plain_states, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(update, updates[0])


def test_ratios_are_taken_within_a_repeat():
    # The machine slows down tenfold from the first repeat to the last.
    reference = np.linspace(1.0, 10.0, 31)
    row = timing.ratio_row(1.05 * reference, reference)
    assert row["ratio"] == pytest.approx(1.05)
    assert row["ratio_25"] == row["ratio_75"] == pytest.approx(1.05)


def test_runners_take_turns():
    calls = []
    runners = {name: lambda name=name: calls.append(name) for name in "abc"}
    settings = settings_of(repeats=6)
    seconds = timing.race(runners, settings)
    assert set(seconds) == set("abc")
    assert all(values.shape == (6,) for values in seconds.values())
    assert calls.count("a") == calls.count("b") == calls.count("c")


def few():
    return {"adam 0.01": optax.adam(1e-2), "sgd 0.1": optax.sgd(0.1)}


@pytest.mark.slow
def test_trajectories(suite, monkeypatch):
    monkeypatch.setattr(trajectories, "EIGHT", few())
    results, out = suite("trajectories", "--only=^EV3, shared 10$")
    assert "best NLL in hindsight: " in out
    found = results[results.metric == "accuracy"].groupby("method").value
    assert set(found.groups) == {"adam 0.01 alone", "sgd 0.1 alone", "EV3, shared 10"}
    assert (found.count() == 2).all()
    assert results[results.metric == "accuracy"].value.between(0, 1).all()


@pytest.mark.slow
def test_rules(suite):
    pattern = "^greedy, accuracy, two$|^greedy, 0/1, 2 explorers, 64 examples$"
    results, out = suite("rules", f"--only={pattern}")
    assert "share of 100 rounds" in out
    shares = results[results.metric.str.startswith("ev3/share/")]
    np.testing.assert_allclose(shares.groupby("seed").value.sum(), [1, 1], rtol=1e-5)
    assert results[results.metric == "replaced"].value.between(0, 0.5).all()


@pytest.mark.slow
def test_evidence(suite, tmp_path):
    results, out = suite("evidence")
    titles = ("Any of K equal", "Ever declared better", "The better one of 4 found")
    for title in (*titles, "when better by 0.01"):
        assert title in out
    image = pytest.importorskip("matplotlib.image")
    assert image.imread(tmp_path / "rates.png").std() > 0.01
    rates = results[results.metric == "rate"]
    assert rates.value.between(0, 1).all()
    false, anytime = (rates[rates.task == name] for name in ("false", "anytime"))
    assert set(false.scores) == {"0/1", "bounded", "heavy-tailed"}
    assert set(anytime.scores) == {"0/1", "bounded"}
    by_count = false.pivot(index=["scores", "N", "test"], columns="K", values="value")
    # More candidates are more chances.
    naive = by_count.index.get_level_values("test").str.contains("uncorrected")
    assert (by_count[naive][4.0] >= by_count[naive][2.0]).all()
    curves = anytime.pivot(index=["scores", "test"], columns="round", values="value")
    assert (np.diff(curves) >= 0).all() and curves.shape[1] == 6


def test_errors_of_rates():
    false = {"test": ["paired t, Bonferroni"] * 3, "value": [0.2, 0.08, 0.0]}
    rates = evidence.report.with_errors(pd.DataFrame(false), 100)
    # Two standard errors of a binomial share; none of a hundred counts as one.
    expected = 2 * np.sqrt(np.array([0.16, 0.0736, 0.01]) / 100)
    np.testing.assert_allclose(rates.errors, expected)
    assert list(rates.kept) == ["missed", "reached", "reached"]


def test_simulated_scores_are_what_the_benchmark_says():
    keys = jax.random.split(jax.random.key(0), 50)
    cases = {
        kind: lambda key, kind=kind: simulate.draw(kind, key, (3, 4000))
        for kind in simulate.KINDS
    }
    cases["better"] = lambda key: simulate.draw_better(key, 4000)
    for name, fn in cases.items():
        x = np.asarray(jax.jit(jax.vmap(fn))(keys), np.float64)
        d = x[:, 0] - x[:, 1]
        true_gain = 0.01 if name == "better" else 0
        assert abs(d.mean() - true_gain) < 4 * d.std() / np.sqrt(50 * 4000)
        if name in ("0/1", "better"):
            assert (x.min(), x.max()) == (0, 1)
            assert x[:, 1].mean() == pytest.approx(0.8, abs=0.01)
            assert (d != 0).mean() == pytest.approx(0.06, abs=0.003)
        elif name == "bounded":
            assert 0 <= x.min() < 0.1 and 0.9 < x.max() <= 1 and (d != 0).mean() > 0.99
        else:
            assert (d != 0).mean() > 0.99 and ((d / d.std()) ** 4).mean() > 10


@pytest.mark.slow
def test_assessment(suite):
    rows = (
        "greedy, ladder()",
        "two explorers, in_chunks(8)",
        "EV3, trajectories of 20",
    )
    pattern = "|".join(f"^{re.escape(row)}$" for row in (*rows, "0.1"))
    results, out = suite("assessment", f"--only={pattern}")
    for row in ("gone back", "best held-out F1", *rows):
        assert row in out
    assert "ladder(confidence=None)" not in out
    assert set(results.method) == {
        *rows,
        "0.1",
        *(f"{name} alone" for name in assessment.LOSSES),
    }


@pytest.mark.slow
def test_objectives(suite):
    moving = "weighted, moving to targets"
    results, out = suite("objectives", f"--only=^(constrained|{moving})$")
    assert "hypervolume" in out and "accuracy alone" not in out
    row = results[results.method == "constrained"]
    row = row.pivot(index="metric", columns="seed", values="value")
    # Two rounds in each of two runs.
    assert (row.loc["adoptions", [0, 1]] <= 2).all()
    assert (row.loc["broken", [0, 1]] <= row.loc["adoptions", [0, 1]]).all()
    assert (row.loc["worst group", [0, 1]] <= row.loc["accuracy", [0, 1]]).all()
    points = results[(results.method == "fixed weights") & (results.metric == "odd")]
    assert len(points) == 2 * 9 and points.weights.nunique() == 9
    volumes = {
        line.split(" fixed")[0]: float(re.findall(r"-?\d\.\d{4}", line)[0])
        for line in out.splitlines()
        if "fixed weights" in line
    }
    assert volumes["best"] >= volumes["equal"] >= volumes["worst"]


@pytest.mark.slow
def test_evolution(suite):
    pattern = "^evolve from best x|^constant$"
    results, out = suite("evolve", "--task=digits CNN", f"--only={pattern}")
    assert "schedule-free" not in out and "a fifth" in out
    assert "its schedule, without EV3" in out
    constant = results[(results.method == "constant") & (results.metric == "test")]
    assert len(constant) == 13 * 2
    best = 10 ** (constant.groupby("place").value.mean().idxmin() / 3)
    rates = results[results.metric == "learning rate"]
    rates = rates.pivot(index="seed", columns="when", values="value")
    assert rates.shape == (2, 4)
    # Eight members, 10^0.75 apart, the largest at the start: the median lies between
    # the fourth and the fifth.
    middle = min(100 * best, 10.0) * (10**-2.25 + 10**-3) / 2
    np.testing.assert_allclose(rates["the start"], middle, rtol=0.05)


def test_convolution_of_the_benchmarks_is_one():
    x = jax.random.normal(jax.random.key(0), [2, 8, 8, 3])
    w = jax.random.normal(jax.random.key(1), [27, 5])
    for stride in (1, 2):
        ours = models.patches(x, stride) @ w
        other = jax.lax.conv_general_dilated(
            x,
            w.reshape(3, 3, 3, 5),
            (stride, stride),
            [(1, 1)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        np.testing.assert_allclose(ours, other, atol=1e-4)


@pytest.mark.slow
def test_distillation(suite):
    results, out = suite("distillation", "--task=preservation")
    assert "NNX, ResNet widened" in out
    apart = results[results.metric.isin(["training", "inference"])]
    assert len(apart) == 2 * 10 * 2 and 0 < apart.value.max() < 1e-5


@pytest.mark.slow
def test_batchnorm(suite):
    pattern = "^(one step|25 steps), momentum 0.9, (loop|own)$"
    results, out = suite("batchnorm", f"--only={pattern}")
    assert "by exact ones" in out
    wide = results[results.seed.notna()].pivot(
        index=["rounds", "statistics", "seed"], columns="metric", values="value"
    )
    assert len(wide) == 2 * 2 * 2
    # Of ten classes; a decision agrees or does not.
    assert wide.exact.between(0, 0.9, inclusive="neither").all()
    assert wide.agreed.between(0, 1).all()
    # In the only round of 25 steps no branch but the first is scored by its own.
    assert set(wide.loc["25 steps"].agreed) <= {0.0, 1.0}
