"""The code that the pages of the documentation show runs, and does what they say."""

import ast
import collections
import contextlib
import importlib.util
import io
import pathlib
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lenient

import optax_ev3
from optax_ev3 import evidence

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Blocks that show a part of a loop, or what is no code of this package, are not run.
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SETTING = DOCS / "how_to/setting.py"

# Other packages warn of their own deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def is_installed(block):
    """Whether all packages that a block imports are there."""
    found = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    roots = {name.partition(".")[0] for name in found}
    return all(importlib.util.find_spec(root) for root in roots)


def run(page):
    """Runs the blocks of a page one after the other, from the setting on.

    A tab whose package is missing is left out: those of some are in `make test` only.
    """
    names = {"__name__": page}
    exec(compile(SETTING.read_text(), str(SETTING), "exec"), names)
    with lenient():
        for block in BLOCK.findall((DOCS / page).read_text()):
            if is_installed(block):
                exec(compile(block, page, "exec"), names)
    return names


def numbers(out, label):
    """The numbers printed behind a label."""
    return [float(x) for x in re.findall(rf"^{label} (-?[\d.e-]+)", out, re.MULTILINE)]


@pytest.mark.parametrize(
    ("page", "least"),
    [
        ("how_to/loop.md", 3),
        ("how_to/batchnorm.md", 1),
        ("adapting.md", 1),
        ("extending/rule.md", 1),
    ],
)
def test_what_pages_train_learns(page, least, capsys):
    pytest.importorskip("flax")
    run(page)
    reached = numbers(capsys.readouterr().out, "log-likelihood")
    assert len(reached) >= least
    assert all(-0.6 < value < 0 for value in reached)  # -0.69 knows nothing.


@pytest.mark.slow
def test_libraries_that_own_the_loop(capsys):
    run("how_to/libraries.md")
    out = capsys.readouterr().out
    (kept, *_) = numbers(out, "log-likelihood")[::-1]
    assert kept > -0.6  # The last tab needs no other package.
    assert all(distance < 0.1 for distance in numbers(out, "distance"))
    assert all(abs(loc - 2) < 0.5 for loc in numbers(out, "loc"))


@pytest.mark.slow
def test_metrics_without_a_gradient(capsys):
    names = run("how_to/metric.md")
    out = capsys.readouterr().out
    assert numbers(out, "F1")[0] > 0.7 and "±" in out
    assert 0.8 < numbers(out, "balanced accuracy")[0] <= 1
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 15)).astype(np.float32)
    counts = rng.poisson(1, 15)
    counts[0] += 1 - counts.sum() % 2  # An odd number of examples has one median.
    for weights in (np.ones(15, int), counts):
        found = names["median_error"]((x, y), np.float32(weights))
        expected = -np.median(np.repeat(np.abs(x - y), weights))
        assert float(found) == pytest.approx(expected, rel=1e-6)


def test_objectives(capsys):
    run("how_to/objectives.md")
    assert numbers(capsys.readouterr().out, "accuracy of the worse class")[0] > 0.6


def test_data_are_those_of_whom_the_page_says(capsys):
    run("assessment.md")
    out = capsys.readouterr().out
    assert 64 <= int(re.search(r"(\d+) examples of 512", out)[1]) <= 512


@pytest.mark.slow
def test_checkpoints_go_on(capsys):
    pytest.importorskip("orbax.checkpoint")
    names = run("how_to/checkpoints.md")
    assert "goes on after step 40" in capsys.readouterr().out
    assert optax_ev3.summary(names["state"])["ev3/calls"] == 100


@pytest.fixture(scope="module")
def logging():
    """What the page on logging leaves behind, with what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        names = run("how_to/logging.md")
    return names | {"out": out.getvalue(), "err": err.getvalue()}


def test_logging(logging):
    assert [line["step"] for line in logging["lines"]] == [0, 10, 20]
    assert "3 lines" in logging["out"]
    names = set(logging["logged"][0])
    page = (DOCS / "how_to/logging.md").read_text()
    shown = set(re.findall(r"`(ev3/[^`]*?)(?:NAME)?`", page)) - {
        "ev3/hyperparams/GROUP/"
    }
    assert all(any(name.startswith(one) for name in names) for one in shown)


def test_a_progress_bar_says_who_leads(logging):
    pytest.importorskip("tqdm")
    found = re.findall(r"best=(\S+), leads=(\w+), round=(\d+)", logging["err"])
    best, leads, rounds = zip(*found, strict=True)
    assert set(leads) <= {"adam", "sgd", "current", "stable"}
    assert int(rounds[-1]) == 130  # After 30 rounds of before.
    assert sorted(map(float, best)) == [*map(float, best)]


def written(folder):
    """Scalars in the files of TensorBoard, by step and name."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = collections.defaultdict(dict)
    for path in sorted(pathlib.Path(folder).iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])  # And sums of these, and of these.
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                assert value.tag not in found[event.step]
                found[event.step][value.tag] = value.simple_value
    return {step: scalars for step, scalars in found.items() if scalars}


def test_tensorboard_gets_what_is_in_the_history(logging):
    pytest.importorskip("tensorboardX")
    events = written(logging["folder"])
    past = optax_ev3.history(logging["relay_state"])
    assert len(events) == len(past["round"]) > 10
    names = past["candidates"].tolist()
    missing = 0
    for row, scalars in enumerate(events.values()):
        assert scalars["ev3/round"] == row + 1
        assert np.isfinite([*scalars.values()]).all()
        scores = [scalars.get(f"ev3/score/{name}", np.nan) for name in names]
        np.testing.assert_array_equal(np.float32(scores), past["mean"][row])
        missing += int(np.isnan(scores).sum())
        [adopted] = [name for name in names if scalars[f"ev3/adopted/{name}"]]
        assert adopted == names[past["adopted"][row]]
    # One of two explorers waits in each turn, with its two averages.
    assert missing == 3 * len(events)
    # Written by the loop: every call of one-step rounds is one.
    assert list(written(logging["writer"].logdir)) == list(range(1, 11))


@pytest.mark.slow
def test_studies_and_sweeps_find_what_is_better(capsys):
    pytest.importorskip("optuna")
    names = run("how_to/tuning.md")
    out = capsys.readouterr().out
    study, swept = numbers(out, r"(?:width|best rate) \S+ log-likelihood")
    # One rate after the other, which the page says is the same.
    alone = [names["trained"](rate) for rate in names["rates"]]
    scores = [names["score"](one, names["held_out"]).mean() for one in alone]
    assert swept == pytest.approx(float(max(scores)), rel=1e-3)
    assert study == pytest.approx(names["study"].best_value, rel=1e-3) and study > -0.4
    # Two hidden units do not learn what a product is.
    assert names["study"].best_params["width"] > 2
    grads = jax.tree.map(jnp.zeros_like, alone[0])
    state = names["tx"].init(alone[0])
    names["tx"].update(grads, state, alone[0], batch=names["train"])


def test_a_run_that_gets_nowhere_is_stopped(capsys):
    run("how_to/stopping.md")
    assert 8 < numbers(capsys.readouterr().out, "stopped after")[0] < 400


@pytest.mark.slow
def test_several_devices(capsys):
    names = run("how_to/devices.md")
    assert "(None, 'data')" in capsys.readouterr().out
    moments = jax.tree.leaves(names["state"].stable)
    assert all(np.isfinite(leaf).all() for leaf in moments)


@pytest.mark.skipif(not hasattr(jax, "memory"), reason="no memory of the host")
def test_memory(capsys):
    run("how_to/memory.md")
    out = capsys.readouterr().out
    device, host = re.search(r"device ([\d,]+), host ([\d,]+) bytes", out).groups()
    device, host = (int(size.replace(",", "")) for size in (device, host))
    assert device > 0 and host > 0


def test_a_model_grows(capsys):
    pytest.importorskip("flax")
    names = run("growing.md")
    assert names["model"].features[0] > 1
    assert optax_ev3.summary(names["state"])["ev3/calls"] == 300


@pytest.mark.slow
def test_growth_of_ones_own_model_goes_on_learning():
    names = run("extending/growth.md")
    assert names["after"] > names["before"] - 1e-3
    assert len(names["params"]["blocks"]) == 2
    assert names["params"]["blocks"][0]["up"].shape == (8, 16)


def test_a_bound_of_ones_own_keeps_its_promise():
    names = run("extending/bound.md")
    rng = np.random.default_rng(0)
    bound, wrong, low = names["hoeffding"](0.0, 1.0), 0, 0
    for _ in range(200):
        # Three candidates that are equally good, and one that is better by 0.3.
        scores = rng.uniform(0, 0.7, size=(4, 64)).astype(np.float32)
        scores[1] += 0.3
        told = evidence.gather({"score": scores}, np.ones(4, bool), np.zeros(4, bool))
        p = bound.p_value(told, "score", 3)
        wrong += int(p[0] < 0.05)
        low += int(bound.lower(told, "score", 3, 0.05)[1] > 0.3)
    assert wrong <= 10 and low <= 10
    # Known numbers: a mean gain of 0.3 on 64 examples, differences within 2.
    scores = np.full((3, 64), 0.2, np.float32)
    scores[0] = 0.5
    told = evidence.gather({"score": scores}, np.ones(3, bool), np.zeros(3, bool))
    expected = np.exp(-2 * 64 * (0.3 / 2) ** 2)
    assert float(bound.p_value(told, "score", 2)[0]) == pytest.approx(expected, 1e-4)


def test_a_rule_of_ones_own_waits_for_a_second_round():
    rule = run("extending/rule.md")["twice"]()
    scores = np.zeros((4, 8), np.float32)
    scores[1] = np.linspace(1, 2, 8)  # One proposal is ahead of all.
    told = evidence.gather({"score": scores}, np.ones(4, bool), np.zeros(4, bool))
    state, key = rule.init(2), jax.random.key(0)
    adopted = []
    for _ in range(3):
        decision, state = rule.decide(told, state, key)
        adopted.append(int(decision.adopted))
    assert adopted == [told.current, 1, 1]
    state = rule.forget(state, jnp.array([False, True]))
    assert int(rule.decide(told, state, key)[0].adopted) == told.current


def test_explorers_and_presets_of_ones_own(capsys):
    names = run("extending/strategy.md")
    assert 0 < numbers(capsys.readouterr().out, "share of random steps")[0] < 1
    explorers = names["tx"].init(names["params"]).explore.explorers
    members = [name for one in explorers.values() for name in one.positions]
    assert sorted(members) == ["times_0.3", "times_1", "times_3"]


def test_which_test():
    assert run("algorithm/evidence.md")["tx"]


def test_no_page_is_long():
    for path in DOCS.rglob("*.md"):
        if "_build" not in path.parts and path.name != "changelog.md":
            assert len(path.read_text().splitlines()) <= 250, path
