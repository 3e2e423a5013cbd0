"""What trajectories are worth: digits, eight explorers, against the best one alone.

Scikit-learn's digits, MLP 64-128-128-10, batches of 128. The explorers are four rates
of Adam, three of SGD and SGD with momentum; each is run alone, too, on the same seeds,
parameters and batches, and the best is chosen in hindsight, by its mean on the test
set. EV3 sees 300 held-out examples, 128 fresh draws in each assessment. All rows of one
table take the same number of steps of each branch.

It takes about half an hour on two cores.
"""

import functools
from typing import NamedTuple

import optax
import pandas as pd

import optax_ev3
from benchmarks.data import load
from benchmarks.report import show, spreads
from benchmarks.results import tidy
from benchmarks.run import Cell, Suite
from benchmarks.training import EIGHT, correct, log_likelihood, loss, train
from optax_ev3 import adapt, explore


class Settings(NamedTuple):
    """How much is measured."""

    seeds: int = 10
    steps: tuple[int, ...] = (300, 1000)


def own(strategy):
    """Each explorer with gradients of its own."""
    return {"loss_fn": loss, "explore": strategy}


def variants():
    """Settings of EV3 by name."""
    confident = {"adapt": adapt.confident()}
    yield "one step", confident
    for length in (10, 20, 50):
        yield f"own {length}", own(explore.rounds(length))
        yield f"shared {length}", {"explore": explore.rounds(length)}
    restarts = {
        "significant": explore.worse_than("adopted"),
        "never": explore.never(),
    }
    for name, restart in restarts.items():
        strategy = explore.branches(20, restart=restart)
        yield f"own 20, restart {name}", {**own(strategy), **confident}
    for policy in ("new", "copy"):
        strategy = explore.rounds(20, restart_state=policy)
        yield f"own 20, inner states {policy}", own(strategy)
    averages = [explore.trajectory_average()]
    yield "own 20, averages", own(explore.rounds(20, averages=averages))
    never = explore.branches(20, averages=averages)
    yield "own 20, restart never, averages", {**own(never), **confident}
    grows = explore.rounds(10, growth=1.5, max_length=80)
    yield "own 10, growing to 80", own(grows)
    own_20 = own(explore.rounds(20))
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


def transformation(seed, inner=EIGHT, metric_fn=log_likelihood, **kwargs):
    assess_fn = optax_ev3.held_out(metric_fn, load().held_out, 128)
    return optax_ev3.ev3(inner, assess_fn, key=seed, **kwargs)


def cells(settings, tasks, results):
    del tasks, results
    methods = {
        f"{name} alone": lambda seed, tx=tx: tx for name, tx in EIGHT.items()
    } | {
        f"EV3, {name}": functools.partial(transformation, **kwargs)
        for name, kwargs in variants()
    }
    for steps in settings.steps:
        for name, make_tx in methods.items():

            def measure(make_tx=make_tx, steps=steps):
                found, _ = train(make_tx, steps, settings.seeds)
                return tidy(found, seed=range(settings.seeds))

            yield Cell(f"{steps} steps", name, measure, name.endswith("alone"))


def report(results, settings, folder):
    del folder
    for task, found in results.groupby("task", sort=False):
        table = spreads(found, ["method"], {"accuracy": 4, "nll": 4})
        alone = found[found.method.isin([f"{name} alone" for name in EIGHT])]
        means = alone.groupby(["method", "metric"]).value.mean().unstack()
        best = {
            "best accuracy in hindsight": means.accuracy.idxmax(),
            "best NLL in hindsight": means.nll.idxmin(),
        }
        more = table.loc[list(best.values())].set_axis(
            [f"{what}: {name}" for what, name in best.items()]
        )
        table = pd.concat([table, more]).rename_axis("method")
        show(table, f"Digits, {task}, {settings.seeds} seeds")


QUICK = {"seeds": 2, "steps": (12,)}
SUITE = Suite(("digits",), Settings(), QUICK, cells, report)
