"""The suite `quality` on tasks of real size, a run of which takes minutes.

A character transformer, a ResNet with BatchNorm, a recurrent network on MNIST-1D, and
embeddings on records of flights, see `quality.large`. EV3's presets against AdamW with
cosine decay and schedule-free AdamW, as documented and tuned on the clock, and a grid
search of EV3's eight explorers. Tuning for free is left out: it takes five runs more.

`--size gpu` makes every model larger, and its runs longer.
"""

import functools
from typing import NamedTuple

from benchmarks.quality import FEW_METHODS, cells_of, report
from benchmarks.quality.large import LARGE
from benchmarks.quality.methods import BEGINS, UNTOLD
from benchmarks.run import Suite


class Settings(NamedTuple):
    """How much is measured; steps are each task's own where they are 0."""

    seeds: int = 4
    first_seed: int = 0
    steps: int = 0
    size: str = "cpu"  # Or "gpu".


def cells(settings, tasks, results):
    del results
    makes = {name: functools.partial(made, name, settings.size) for name in tasks}
    groups = [(name,) for name in (*FEW_METHODS, *UNTOLD, BEGINS)]
    yield from cells_of(groups, makes, settings, is_free_measured=False)


def made(name, size):
    return LARGE[name](size)._replace(name=name)


def shown(results, settings, folder):
    del settings
    report.shown(results, folder)


SUITE = Suite(
    tuple(LARGE), Settings(), {"seeds": 2, "steps": 20}, cells, shown, spread=True
)
