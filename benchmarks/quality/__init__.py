"""One run of EV3 against the best optimizer in hindsight, sweeps, and other methods.

Eleven tasks, see `tasks`. EV3 has one setting for all of them and eight explorers: five
rates of Adam, two of SGD with momentum, and RMSProp. Everybody gets the same parts of
the data, initial parameters and order of batches, by seed; what may be chosen is chosen
by the mean score of all held-out examples, save where it says "in hindsight"; where
they are many, EV3 draws some of them in each round. The rows:

single: each of the eight alone, and the exponential average (0.99) of its weights.
grid search: all eight; of these and their averages the best, for each seed.
successive halving: all eight, then the better half of them, and so on, each stage with
  a quarter of all gradients.
population-based training: eight of Adam, whose rates are copied and moved.
soup: greedy average of the eight ends.
cosine, reduce_on_plateau, schedule-free, mechanize, prodigy: AdamW (Adam for
  reduce_on_plateau), at five rates where they need one, the best for each seed; the
  gradients of that search are not counted.

At equal gradients all methods take as many as eight explorers in the task's number of
steps; grid search, halving, soup and populations share them out. Explorers of EV3 that
are paused take none, so that the others take more steps. At equal work EV3 ends
earlier: its assessments count as well, in forward passes of single examples, a gradient
as three. What others choose by held-out scores is not counted. A run that ends worse
than its
initial parameters counts as these, for every method alike.

`--quick` runs three tasks with three seeds and few methods, in some minutes.
"""

import functools
from typing import NamedTuple

from benchmarks.quality import report
from benchmarks.quality.methods import METHODS, OTHERS, SINGLES
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.training import HALVING, PROCEDURES, SHARE, cell
from benchmarks.run import Cell, Suite


class Settings(NamedTuple):
    """How much is measured; steps are each task's own where they are 0."""

    seeds: int = 10
    first_seed: int = 0
    steps: int = 0
    few: bool = False  # Whether only some tasks and methods are measured.


FEW_TASKS = ("digits MLP", "outliers", "distillation")
FEW_METHODS = ("EV3", "untrained", *SINGLES, *OTHERS)


def cells(settings, tasks, results):
    del results
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    names = FEW_METHODS if settings.few else (*METHODS, *PROCEDURES)
    for name in FEW_TASKS if settings.few else tasks:
        task = functools.cache(lambda name=name: TASKS[name]()._replace(name=name))
        for method in names:

            def measure(task=task, method=method):
                return cell(task(), method, settings.steps or task().steps, seeds)

            yield Cell(name, method, measure)


def shown(results, settings, folder):
    del settings
    variants = [name for name in dict.fromkeys(results.method) if name != report.EV3]
    variants = tuple(name for name in variants if name.startswith(report.EV3))
    kinds = report.Kinds(tuple(SINGLES), tuple(OTHERS), HALVING, SHARE, variants)
    found = report.tables(results, kinds)
    report.show_all(found, kinds)
    report.verdicts(found, kinds)
    report.write_table(found, kinds, folder / "table.md")
    report.draw_profile(found["work"], kinds, folder / "profile.png")
    report.draw_course(results, kinds, folder / "course.png")


SUITE = Suite(
    tuple(TASKS), Settings(), {"seeds": 3, "few": True}, cells, shown, spread=True
)
