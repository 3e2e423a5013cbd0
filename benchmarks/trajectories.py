"""What trajectories are worth: digits, eight explorers, against the best one alone.

Scikit-learn's digits, MLP 64-128-128-10, batches of 128. The explorers are four rates
of Adam, three of SGD and SGD with momentum; each is run alone, too, on the same seeds,
parameters and batches, and the best is chosen in hindsight, by its mean on the test
set. EV3 sees 300 held-out examples, 128 fresh draws in each assessment. All rows of one
table take the same number of steps of each branch.

Run it with `python benchmarks/trajectories.py`; it takes about half an hour on two
cores. `--filter REGEX` runs the rows whose names match.
"""

import json
import pathlib
import re
import sys

import numpy as np
import optax
from absl import app, flags, logging

import optax_ev3
from optax_ev3 import adapt, combine

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from _digits import EIGHT, correct, load, log_likelihood, loss, train

SEEDS = flags.DEFINE_integer("seeds", 10, "Runs of each method.", lower_bound=2)
STEPS = flags.DEFINE_multi_integer("steps", [300, 1000], "Training steps.")
FILTER = flags.DEFINE_string("filter", "", "Only EV3 rows that match.")
JSON = flags.DEFINE_string("json", None, "Where to write the figures, too.")

AVERAGES = [combine.trajectory_average()]


def variants():
    """Settings of EV3 by name."""
    own = {"loss_fn": loss, "gradients": "own"}
    shared = {"gradients": "shared"}
    yield "one step", {}
    for length in (10, 20, 50):
        for name, kwargs in {"own": own, "shared": shared}.items():
            yield f"{name} {length}", {**kwargs, "trajectory_length": length}
    own_20 = {**own, "trajectory_length": 20}
    for restart in ("significant", "never"):
        yield f"own 20, restart {restart}", {**own_20, "restart": restart}
    for policy in ("new", "copy"):
        yield f"own 20, inner states {policy}", {**own_20, "restart_state": policy}
    yield "own 20, averages", {**own_20, "combine": AVERAGES}
    never = {**own_20, "restart": "never"}
    yield "own 20, restart never, averages", {**never, "combine": AVERAGES}
    grows = {"trajectory_growth": 1.5, "max_trajectory_length": 80}
    yield "own 10, growing to 80", {**own, "trajectory_length": 10, **grows}
    # A coarse score, full of ties, and what the first place in the list is worth.
    coarse = {**own_20, "metric_fn": correct}
    yield "own 20, by accuracy", coarse
    back = dict(reversed(EIGHT.items()))
    yield "own 20, by accuracy, listed backwards", {**coarse, "inner": back}
    yield "own 20, by accuracy, greedy", {**coarse, "adapt": adapt.greedy()}
    paper = adapt.lower_bound()
    yield "own 20, by accuracy, the paper's rule", {**coarse, "adapt": paper}
    yield "own 20, greedy", {**own_20, "adapt": adapt.greedy()}
    yield "own 20, the paper's rule", {**own_20, "adapt": paper}
    hostile = {**EIGHT, "sgd 1000": optax.sgd(1000.0), "uphill": optax.sgd(-0.1)}
    yield "own 20, two hostile ones more", {**own_20, "inner": hostile}


def cells(accuracy, nll):
    """Means with their standard errors, as text."""
    out = []
    for values in (accuracy, nll):
        error = values.std(ddof=1) / np.sqrt(len(values))
        out.append(f"{values.mean():.4f} ± {error:.4f}")
    return out


def run(steps, seeds, pattern):
    """Rows of one table: name, test accuracies, test NLLs."""
    singles = {}
    for name, tx in EIGHT.items():
        accuracy, nll, _ = train(lambda _, tx=tx: tx, steps, seeds)
        singles[name] = accuracy, nll
        yield f"{name} alone", accuracy, nll
    for what, index, best in (("accuracy", 0, max), ("NLL", 1, min)):
        name = best(singles, key=lambda name: singles[name][index].mean())
        yield f"best {what} in hindsight: {name}", *singles[name]
    for name, kwargs in variants():
        if re.search(pattern, name):
            kwargs = {"inner": EIGHT, **kwargs}
            metric_fn = kwargs.pop("metric_fn", log_likelihood)
            kwargs["assess_fn"] = optax_ev3.held_out(metric_fn, load().held_out, 128)

            def make_tx(seed, kwargs=kwargs):
                return optax_ev3.ev3(key=seed, **kwargs)

            accuracy, nll, _ = train(make_tx, steps, seeds)
            yield f"EV3, {name}", accuracy, nll


def main(_):
    logging.set_verbosity(logging.WARNING)
    figures = {}
    for steps in STEPS.value:
        print(f"\n{steps} steps, mean ± standard error over {SEEDS.value} seeds")
        print(f"{'method':46}{'test accuracy':>18}{'test NLL':>18}")
        for name, accuracy, nll in run(steps, SEEDS.value, FILTER.value):
            one, two = cells(accuracy, nll)
            print(f"{name:46}{one:>18}{two:>18}", flush=True)
            row = {"accuracy": accuracy.tolist(), "nll": nll.tolist()}
            figures[f"{steps} steps, {name}"] = row
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    app.run(main)
