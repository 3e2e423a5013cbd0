"""EV3's presets against optimizers that are tuned, searched for, or run as documented.

Eleven tasks, see `tasks`. Everybody gets the same parts of the data, initial
parameters and order of batches, by seed, and as many gradients as EV3's eight explorers
in the task's number of steps. EV3 has one setting for all tasks; its assessments count
as work, in forward passes of single examples, a gradient as three. What others choose
by held-out scores is not counted. All methods stop early by the same held-out data.
Three accountings, see `accountings`: tuning on the clock, no tuning, and tuning for
free.

EV3 portfolio, EV3 relay: the preset with a loss, and without one, told the end.
... end unknown: the same where they are not told.
... Adam begins: in three rounds of forty it trains alone, before the others join.
AdamW + cosine and others: one optimizer, at the rate of its documentation, or tuned
  over five rates.
grid search, successive halving: of EV3's eight explorers.
random search, TPE, hyperband, BOHB, population-based training, PB2, soup: see
  `searches`.
wall-clock: how long a unit of EV3's work takes, over one of AdamW.

`--quick` runs three tasks with two seeds and few methods, in some minutes.
"""

import functools
import itertools
from typing import NamedTuple

from benchmarks.quality import report
from benchmarks.quality.accountings import GRID, GROUPS, cell
from benchmarks.quality.methods import BASELINE, MAIN
from benchmarks.quality.tasks import TASKS, made
from benchmarks.run import Cell, Suite


class Settings(NamedTuple):
    """How much is measured; steps are each task's own where they are 0."""

    seeds: int = 6
    first_seed: int = 0
    steps: int = 0
    few: bool = False  # Whether only some tasks and methods are measured.


FEW_TASKS = ("digits MLP", "outliers", "distillation")
FEW_METHODS = (*MAIN, BASELINE, "schedule-free AdamW", GRID)


def cells(settings, tasks, results):
    del results
    groups = GROUPS
    if settings.few:
        tasks = [name for name in tasks if name in FEW_TASKS]
        groups = [(name,) for name in FEW_METHODS]
    makes = {name: functools.partial(made, name) for name in tasks}
    yield from cells_of(groups, makes, settings)


def cells_of(groups, makes, settings, **kwargs):
    """Cells of methods, task by task within a group.

    Args:
      groups: Of names of methods.
      makes: From names of tasks to functions that make them, each used once.
      settings: With seeds, first_seed and steps.
      **kwargs: Of `accountings.cell`.
    """
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    makes = {name: functools.cache(make) for name, make in makes.items()}
    for group, name in itertools.product(groups, makes):
        for method in group:

            def measure(make=makes[name], method=method):
                steps = settings.steps or make().steps
                return cell(make(), method, steps, seeds, **kwargs)

            yield Cell(name, method, measure)


def shown(results, settings, folder):
    del settings
    report.shown(results, folder)


SUITE = Suite(
    tuple(TASKS), Settings(), {"seeds": 2, "few": True}, cells, shown, spread=True
)
