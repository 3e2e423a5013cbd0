"""What the parts of EV3's preset are worth: the same without one of them.

The reference is the strategy and the rule of `optax_ev3.portfolio` with a loss,
evaluated at its visible parameters. Its explorers are eight of an earlier preset: five
rates of Adam, two of SGD with momentum, and RMSProp. Every other method differs from it
in what its name says. Tasks and budgets are those of the suite `quality`, at equal
gradients and at equal work.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import optax
import pandas as pd
from scipy import stats

import optax_ev3
from benchmarks.quality.methods import (
    COUNT,
    EV3,
    GRID,
    HARMFUL,
    LENGTH,
    assessed,
    explorer,
    loss_of,
    momentum,
    visible,
)
from benchmarks.quality.tasks import TASKS, made
from benchmarks.quality.training import ev3_trainer
from benchmarks.report import show
from benchmarks.results import tidy
from benchmarks.run import Cell, Suite
from optax_ev3 import adapt, explore

AVERAGES = (explore.trajectory_average(), explore.branch_average())
OPTIMIZERS = {
    **{f"adam {rate:g}": optax.adam(rate) for rate in GRID},
    **{f"momentum {rate:g}": momentum(rate) for rate in (0.01, 0.1)},
    "rmsprop 0.001": optax.rmsprop(1e-3),
}
SIGNIFICANT = explore.worse_than("adopted", inner_state="copy")


def branches(length=LENGTH, **kwargs):
    """The preset's strategy, but for what is given."""
    defaults = {
        "restart": explore.never(inner_state="copy"),
        "averages": AVERAGES,
        "racing": explore.Racing(patience=2, window=8),
    }
    return explore.branches(length, **{**defaults, **kwargs})


REFERENCE = "EV3"
VARIANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "three harmful explorers more": {"inner": {**OPTIMIZERS, **HARMFUL}},
    "nobody is paused": {"explore": branches(racing=None)},
    "restart significant": {"explore": branches(restart=SIGNIFICANT)},
    "restart always, nobody is paused, confident": {
        "explore": explore.rounds(LENGTH, averages=AVERAGES),
        "adapt": None,
    },
    "confident": {"adapt": adapt.confident()},
    "the paper's rule": {"adapt": adapt.lower_bound()},
    "no averages": {"explore": branches(averages=())},
    "no branch averages": {"explore": branches(averages=AVERAGES[:1])},
    "length 50": {"explore": branches(50)},
    "length 10 growing to 80": {"explore": branches(10, growth=1.5, max_length=80)},
    "shared gradients": {
        "explore": explore.rounds(10, gradients="shared", averages=AVERAGES),
        "own": False,
    },
    "one step": {"explore": None, "adapt": adapt.confident(), "own": False},
}


def ev3(inner=None, own=True, **kwargs):
    """The composition, but for what is given."""
    kwargs = {"explore": branches(), "adapt": adapt.greedy(), **kwargs}
    inner = inner or OPTIMIZERS

    def make(task, held_out, seed, budget):
        del budget
        return optax_ev3.ev3(
            {name: explorer(task, tx) if own else tx for name, tx in inner.items()},
            assessed(task, held_out),
            loss_fn=loss_of(task),
            key=seed,
            **kwargs,
        )

    return EV3(make, len(inner), own, evaluated=visible)


METHODS = {name: ev3(**kwargs) for name, kwargs in VARIANTS.items()}


class Settings(NamedTuple):
    """How much is measured; steps are each task's own where they are 0."""

    seeds: int = 10
    first_seed: int = 0
    steps: int = 0


def cells(settings, tasks, results):
    del results
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    for name in tasks:
        task = functools.cache(functools.partial(made, name))
        for method in METHODS:

            def measure(task=task, method=method):
                return cell(task(), method, settings.steps or task().steps, seeds)

            yield Cell(name, method, measure)


def cell(task, method, steps, seeds):
    """Last test figures, at equal gradients and where as much work was done.

    A run that ends worse than its initial parameters counts as these: one that diverged
    would say all there is to be said about a mean.
    """
    figures, spent = ev3_trainer(task, METHODS[method], steps * COUNT, seeds)()
    start, test = figures[:, 0, 0], figures[..., 0]
    by_work, by_gradients = (np.fmin(test[:, row], start) for row in (-2, -1))
    test = {"test": by_gradients, "test at equal work": by_work}
    return tidy({**test, **spent}, seed=seeds)


def ratios(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean figures over the reference's, a row for each task."""
    kept = results[results.metric == metric]
    means = kept.pivot_table(index="task", columns="method", values="value", sort=False)
    return means.div(means[REFERENCE], axis=0)


def shown(results, settings, folder):
    del settings, folder
    for metric in ("test", "test at equal work"):
        found = ratios(results, metric)
        show(found.T, f"{metric}: over that of {REFERENCE}")
        show(
            pd.DataFrame(
                {
                    "geometric mean": stats.gmean(found),
                    "least": found.min(),
                    "greatest": found.max(),
                }
            ).rename_axis("method"),
            "over all tasks",
        )


SUITE = Suite(
    tuple(TASKS), Settings(), {"seeds": 2, "steps": 50}, cells, shown, spread=True
)
