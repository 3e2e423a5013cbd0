"""The examples and the demo, run as a user runs them, on a small budget."""

import re
import statistics

import pytest
from helpers.examples import run

# Each in ten classes has about a tenth of the test set: a constant gets 0.1.
LEARNED = 0.75


def test_an_example_is_a_script(tmp_path):
    done = run("plain_jax.py", "--steps=2", "--seed=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"test accuracy ([\d.]+)", done.stdout)) == 2


@pytest.mark.parametrize(
    "name",
    ["plain_jax.py", "linen_train_state.py", "linen_extra_args.py", "nnx_optimizer.py"],
)
def test_example_learns(name, call):
    out = call(name, "--steps=60", "--seed=1")
    before, after = map(float, re.findall(r"test accuracy ([\d.]+)", out))
    assert before < 0.3
    assert after > LEARNED
    shown = dict(line.split() for line in out.splitlines() if "ev3/" in line)
    assert float(shown["ev3/round"]) == 60
    assert float(shown["ev3/skipped"]) == 0
    assert float(shown["ev3/share/adam"]) + float(shown["ev3/share/sgd"]) > 0.5


def test_example_of_two_processes_learns(tmp_path):
    done = run("two_processes.py", "--steps=40", "--seed=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 processes, 4 devices" in done.stdout
    before, after = map(float, re.findall(r"test accuracy ([\d.]+)", done.stdout))
    assert before < 0.3
    assert after > LEARNED
    shown = dict(line.split() for line in done.stdout.splitlines() if "ev3/" in line)
    assert (float(shown["ev3/calls"]), float(shown["ev3/examples"])) == (40, 128)


def test_example_of_a_relay_learns_and_goes_on(call):
    first = call("relay.py", "--steps=100", "--seed=1", "--folder=run")
    again = call("relay.py", "--steps=200", "--seed=1", "--folder=run")
    assert "Goes on from step 100." in again
    start, reached = re.findall(r"test accuracy ([\d.]+)", first)
    restored, end = re.findall(r"test accuracy ([\d.]+)", again)
    assert restored == reached  # The best parameters are part of the state.
    assert float(start) < 0.3 and float(end) > LEARNED


def test_example_over_devices_learns(call):
    out = call("explorers_over_devices.py", "--steps=75", "--seed=1")
    before, after = map(float, re.findall(r"test accuracy ([\d.]+)", out))
    assert before < 0.3
    assert after > LEARNED
    total, own = map(float, re.findall(r"([\d.]+) MB", out))
    assert own < total / 4


def test_example_of_a_metric_learns(call):
    out = call("f1_score.py", "--steps=100", "--seed=1")
    before, after = map(float, re.findall(r"test F1 ([\d.]+)", out))
    assert before < 0.4 and after > 0.6
    shown = dict(line.split() for line in out.splitlines() if "ev3/" in line)
    assert (float(shown["ev3/calls"]), float(shown["ev3/round"])) == (100, 2)
    assert "ev3/score/average/adam/focal" in shown


def test_example_of_a_learning_rate_finds_one(call, tmp_path):
    args = ["--steps=150", "--seed=1", "--plot=history.png"]
    out = call("learning_rate.py", *args)
    alone, evolved, again = map(float, re.findall(r"accuracy ([\d.]+)", out))
    assert alone < 0.4 and evolved > 0.9 and again > 0.9
    rates = [float(x) for x in re.findall(r"step +\d+: (\S+)", out)]
    assert max(rates) > 1e-3  # From 1e-5, where it started.
    assert (tmp_path / "history.png").stat().st_size > 10_000


@pytest.mark.slow
def test_example_of_a_study_spends_no_more_than_the_budget(call, tmp_path):
    pytest.importorskip("optuna")
    args = ["--gradients=800", "--seeds=2", "--plot=work.png"]
    out = call("optuna_study.py", *args)
    single = re.findall(r"^(\w+), .*seed \d: test accuracy ([\d.]+); (.*)$", out, re.M)
    assert [name for name, _, _ in single] == ["Optuna"] * 2 + ["EV3"] * 2
    row = r"^(\w+), .*?([\d.]+) ± [\d.]+ +([\d.]+) ± [\d.]+ +(\d+) +(\d+)$"
    table = re.findall(row, out, re.M)
    assert [name for name, *_ in table] == ["Optuna", "EV3"]
    for name, accuracy, _, gradients, assessed in table:
        reached = [float(x) for other, x, _ in single if other == name]
        assert float(accuracy) == pytest.approx(statistics.mean(reached), abs=1e-4)
        assert float(accuracy) > LEARNED
        # Steps of 25, of up to eight explorers, which are assessed with their averages.
        assert 800 - 8 * 25 - 26 < int(gradients) + int(assessed) <= 800
    trials, pruned = re.search(
        r"of (\d+) trials \((\d+) pruned\)", single[0][2]
    ).groups()
    assert int(trials) >= 8 > 0 <= int(pruned)
    assert (tmp_path / "work.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "candidate"),
    [("linen_batchnorm.py", "average/adam/noisy"), ("nnx_batchnorm.py", "sgd")],
)
def test_example_with_trajectories_learns(name, candidate, call):
    out = call(name, "--steps=60", "--seed=1")
    before, after = map(float, re.findall(r"test accuracy ([\d.]+)", out))
    assert before < 0.3
    assert after > LEARNED
    shown = dict(line.split() for line in out.splitlines() if "ev3/" in line)
    assert (float(shown["ev3/calls"]), float(shown["ev3/round"])) == (60, 3)
    assert f"ev3/score/{candidate}" in shown


@pytest.mark.slow
def test_demo_draws_and_succeeds(tmp_path):
    args = ["--seeds=2", "--gradients=800", f"--min_accuracy={LEARNED}"]
    done = run("demo.py", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    number = r"([\d.]+)%? ± [\d.]+%? +"
    row = rf"^(\w.+?) +{number}{number}{number}(\d+) +[\d.]+$"
    table = re.findall(row, done.stdout, re.M)
    names, nlls, errors, stopped, gradients = zip(*table, strict=True)
    assert names[:3] == ("EV3, portfolio", "EV3, relay", "EV3, one step")
    assert len(names) == 8 and all(name.endswith(" alone") for name in names[3:])
    ours, relay, _, *alone = map(float, nlls)
    assert max(ours, relay) < statistics.median(alone)
    assert all(float(error) < 100 * (1.1 - LEARNED) for error in errors)
    # Nobody takes more gradients than the others, but for the rest of a round.
    assert gradients[1:] == ("800",) * 7 and 800 - 5 * 25 < int(gradients[0]) <= 800
    # What the sentence says is what the table shows.
    for figures in (nlls, stopped):
        ours, _, _, *alone = map(float, figures)
        best = names[3:][alone.index(min(alone))].removesuffix(" alone")
        said = rf"{ours:.3f}, lower than that of (\d) of.+?{best}: {min(alone):.3f}"
        beaten = int(re.search(said, " ".join(done.stdout.split()))[1])
        # The table is rounded.
        few, many = (sum(ours + d < one for one in alone) for d in (5e-4, -5e-4))
        assert few <= beaten <= many
    assert "1600/1600" in done.stderr  # The progress bar got to its end.

    image = pytest.importorskip("matplotlib.image").imread(tmp_path / "demo.png")
    assert min(image.shape[:2]) > 500
    # Lines, bars and text in colours, not an empty page.
    assert len({tuple(pixel) for row in image[::9, ::9] for pixel in row}) > 10
    assert 0.05 < (image[..., :3] < 0.9).any(-1).mean() < 0.9


@pytest.mark.slow
def test_demo_fails_and_says_why(tmp_path):
    plot = "--plot=missing/it.png"
    args = ["--seeds=2", "--gradients=200", "--min_accuracy=0.999", plot]
    done = run("demo.py", *args, cwd=tmp_path)
    assert done.returncode == 1
    assert "The demo failed: EV3 reached a test accuracy of 0." in done.stderr
    assert "the picture could not be written" in done.stderr
