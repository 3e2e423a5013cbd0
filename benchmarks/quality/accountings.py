"""What is measured of each method on a task, under which accounting.

"clock": all that a method tries comes out of one budget of gradients; searches run
their trials side by side. "untuned": the budget is that of one run with the documented
learning rate. "free": the best of several rates for each seed, each with all of the
budget to itself. "hindsight": every one of EV3's eight explorers and its average, with
all of the budget to itself, without early stopping; the report takes the best by test
figures.
"""

import functools

import numpy as np
import pandas as pd

from benchmarks.quality import clock
from benchmarks.quality.methods import (
    COUNT,
    EIGHT,
    EV3S,
    KINDS,
    MAIN,
    RIVALS,
    visible,
)
from benchmarks.quality.searches import SEARCHES
from benchmarks.quality.training import (
    FIGURES,
    HALVING,
    MARKS,
    ev3_trainer,
    incumbents,
    pooled,
    trainer,
)
from benchmarks.results import tidy

CLOCK, UNTUNED, FREE, HINDSIGHT = "clock", "untuned", "free", "hindsight"
GRID, HALVED, EXPLORERS = "grid search", "successive halving", "explorers alone"
WALL_CLOCK = "wall-clock"
# In the order in which they are measured, task by task within a group: those of the
# last but one have runs in common.
GROUPS = (
    *((name,) for name in (*MAIN, *RIVALS, *SEARCHES)),
    (GRID, HALVED, EXPLORERS),
    *((name,) for name in EV3S if name not in MAIN),
    (WALL_CLOCK,),
)


def cell(task, name, steps, seeds, is_free_measured=True):
    """All numbers of a method on a task, whose explorers have so many steps each.

    Args:
      task: What is trained.
      name: Of the method.
      steps: Gradients in all, over the number of EV3's explorers.
      seeds: Which.
      is_free_measured: Whether rivals are tuned for free, too.
    """
    budget = steps * COUNT
    if name == WALL_CLOCK:
        return clock.cell(task)
    if name in EV3S:
        rows = _ev3(task, EV3S[name], budget, seeds)
    elif name in RIVALS:
        rows = _rival(task, RIVALS[name], budget, seeds, is_free_measured)
    elif name in SEARCHES:
        rows = _curve(SEARCHES[name](task, budget, seeds, MARKS), CLOCK, seeds)
    else:
        rows = {GRID: _grid, HALVED: _halved, EXPLORERS: _explorers}[name](
            task, budget, seeds
        )
    return pd.concat([rows, tidy({"gradients": budget})])


def _curve(course, accounting, seeds, marks=MARKS):
    """Rows of figures by name, each ``[seeds, marks]``; of held-out scores the last."""
    last = {"held_out": course["held_out"][:, -1:]}
    rows = [tidy({"test": course["test"]}, seed=seeds, mark=marks)]
    rows.append(tidy(last, seed=seeds, mark=marks[-1:]))
    return pd.concat(rows).assign(accounting=accounting)


def _named(figures):
    return {name: figures[..., i] for i, name in enumerate(FIGURES)}


def _ev3(task, method, budget, seeds):
    figures, spent = ev3_trainer(task, method, budget, seeds)()
    by_work, by_gradients = figures[:, 1:-1], figures[:, -1, 0]
    rows = [_curve(_named(by_work), CLOCK, seeds)]
    rows.append(tidy({"test at equal gradients": by_gradients, **spent}, seed=seeds))
    return pd.concat(rows)


def _rival(task, rival, budget, seeds, is_free_measured):
    def runs(steps):
        train = trainer(task, rival.make, rival.evaluated, steps, seeds)
        return lambda rate: train(rate)[:, :, 0]  # Without the average.

    full, rates = runs(budget), rival.rates
    whole = rates if is_free_measured else ()
    alone = {x: full(x) for x in dict.fromkeys((rival.default, *whole))}
    untuned = incumbents(alone[rival.default])
    rows = [_curve(_named(untuned[:, 1:]), UNTUNED, seeds)]
    last = {"test of the last": alone[rival.default][:, -1, 0]}
    rows.append(tidy(last, seed=seeds).assign(accounting=UNTUNED))
    if rates:
        part = runs(budget // len(rates))
        parts = pooled(np.stack([incumbents(part(x)) for x in rates]))
        rows.append(_curve(_named(parts[:, 1:]), CLOCK, seeds))
    if whole:
        best = pooled(np.stack([incumbents(alone[x])[:, -1:] for x in rates]))
        rows.append(_curve(_named(best), FREE, seeds, [1.0]))
    return pd.concat(rows)


def constant(kind):
    """An optimizer of this kind whose rate does not fall."""
    return lambda rate, steps: KINDS[kind](rate)


@functools.lru_cache(maxsize=2)
def _eight(task, steps, seeds):
    """Figures of every explorer alone ``[8, seeds, 1 + marks, 2 kinds, 2]``."""
    trains = {k: trainer(task, constant(k), visible, steps, seeds) for k in KINDS}
    return np.stack([trains[kind](rate) for kind, rate in EIGHT.values()])


def _grid(task, budget, seeds):
    """Of the eight and their averages the best, for each seed."""
    figures = _eight(task, budget // COUNT, seeds)
    runs = np.moveaxis(figures, -2, 1).reshape(-1, *figures.shape[1:3], 2)
    best = pooled(np.stack([incumbents(run) for run in runs]))
    return _curve(_named(best[:, 1:]), CLOCK, seeds)


def _halved(task, budget, seeds):
    """Of all explorers the better half goes on, by the scores so far.

    Figures between the ends of two stages are those of the first of the two; in the
    first stage they are those of a grid search.
    """
    stages = len(HALVING)
    first = _eight(task, budget // COUNT, seeds)[..., 0, :]
    course = pooled(np.stack([incumbents(run) for run in first]))[:, 1:]
    runs = np.stack(
        [incumbents(run)[:, 1:] for run in _eight(task, budget, seeds)[..., 0, :]]
    )
    scores = np.nan_to_num(runs[..., 1], nan=-np.inf)
    for row in range(len(seeds)):
        left = np.arange(COUNT)
        for stage, (count, part) in enumerate(HALVING, start=1):
            mark = MARKS.index(part)
            left = left[np.argsort(-scores[left, row, mark], kind="stable")]
            course[row, MARKS.index(stage / stages) :] = runs[left[0], row, mark]
            left = left[: count // 2]
    return _curve(_named(course), CLOCK, seeds)


def _explorers(task, budget, seeds):
    """The last test figures of each, and of its average."""
    test = _eight(task, budget, seeds)[:, :, -1, :, 0]
    axes = {"variant": EIGHT, "seed": seeds, "weights": ["last", "average"]}
    return tidy({"test": test}, **axes).assign(accounting=HINDSIGHT)
