"""What the bounds promise, what they keep, and what they can see, by simulation.

false: how often any of K candidates that are as good as the reference is declared
  better at 5%, on N examples. Scores: 0/1, where 80% are right and two candidates
  differ on 6% of the examples; bounded, in [0, 1]; heavy-tailed, with noise of
  Student's t, 3 degrees of freedom.
anytime: how often one such candidate is ever declared better, if one looks after each
  of 100 rounds of 64 new examples.
alike: how often the better one of K candidates is found by each correction, where
  their differences from the reference are correlated, on 256 examples. It is better
  by 0.17 standard deviations.
power: how often a candidate that is better by 0.01 is declared better, on 2,000
  examples, 0 or 1, of which two candidates differ on 6%.

"Reached" means that the rate is at most 5%, or above it by no more than two standard
errors of the simulation; it is said of those methods alone that promise it. It takes
about a quarter of an hour on two cores.
"""

import itertools
from typing import NamedTuple

from benchmarks.evidence import report, simulate
from benchmarks.run import Cell, Suite


class Settings(NamedTuple):
    """How much is simulated."""

    simulations: int = 10_000
    examples: tuple[int, ...] = (64, 256, 2048)
    candidates: tuple[int, ...] = (2, 4, 8, 16)
    rounds: int = 100
    round_examples: int = 64
    power_examples: int = 2000
    alike_examples: int = 256
    resamples: int = 199
    at_once: int = 4_000_000  # Scores in memory.


QUICK = {
    "simulations": 40,
    "examples": (16, 48),
    "candidates": (2, 4),
    "rounds": 6,
    "round_examples": 16,
    "power_examples": 100,
    "alike_examples": 16,
    "resamples": 19,
    "at_once": 2000,
}


def cells(settings, tasks, results):
    del results
    if "false" in tasks:
        for kind, examples in itertools.product(simulate.KINDS, settings.examples):
            yield Cell(
                "false",
                f"{kind}, {examples} examples",
                lambda case=(kind, examples): simulate.false_rates(*case, settings),
            )
    if "anytime" in tasks:
        for kind in simulate.IN_RANGE:
            yield Cell(
                "anytime", kind, lambda k=kind: simulate.anytime_rates(k, settings)
            )
    if "alike" in tasks:
        for correlation in simulate.CORRELATIONS:
            yield Cell(
                "alike",
                f"correlation {correlation:g}",
                lambda c=correlation: simulate.alike_rates(c, settings),
            )
    if "power" in tasks:
        yield Cell("power", "better by 0.01", lambda: simulate.power_rates(settings))


SUITE = Suite(
    ("false", "anytime", "alike", "power"), Settings(), QUICK, cells, report.report
)
