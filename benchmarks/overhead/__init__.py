"""What EV3 costs beyond the sum of its parts.

steps: one jitted EV3 step over a step written by hand that does the same work and
  nothing more, as one would write it (ratio) and tuned for memory traffic (over_tuned);
  compile seconds and the compiler's peak memory of all.
updates: the assessments taken away, K inner updates with all of EV3's bookkeeping over
  the K updates alone; beside them the least that safety costs, written by hand: check
  the updates, hold the states, select one update, keep stable.
rounds: milliseconds a round in a small setting, beside one Adam step; assessed by
  log-likelihoods, and by macro F1 on the device and on the host (NumPy, scikit-learn).
trajectories: a training step with trajectories of 20, averaged over whole rounds, over
  what its parts cost (K jitted training steps one by one, or one gradient and K
  updates, and a 20th of K + 2 assessments), and over one Adam step.
sweeps: compile seconds and the compiler's peak memory of a sweep over 64 learning
  rates, over those of 2.
bookkeeping: a whole round on a model of one parameter, whose scores are given, over a
  step of the MLP: 16 explorers, 4 objectives with weights that move, a history of 256.
relays: CPU time of a call in a relay of Adams, averaged over whole turns of 25 after
  the first ones, over that of a step of one Adam; 256 held-out examples. Beside them
  that of one-step rounds of two.
convolutions: CPU time of a step of two Adams on three convolutions, averaged over a
  round, over that of a step of one Adam: every strategy, without a race, in a race in
  which no explorer is paused, and with one of the two paused ("paused": how many were).
imports: CPU time of a process that imports the package, over that of one that imports
  optax.

Programs that are compared run in turn within every repeat, in changing order, and each
ratio is taken within a repeat: load from outside hits both sides of it alike. Tables
give the median over the repeats, and the quartiles.
"""

import itertools
import os
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax
import pandas as pd

import optax_ev3
from benchmarks.overhead import convolutions, imports, relays, rounds, steps
from benchmarks.overhead.programs import BY_HAND, TUNED, conv_problem, mlp_problem
from benchmarks.report import show
from benchmarks.run import Cell, Suite

TARGETS = {"steps": 1.05, "updates": 1.25}
TITLES = {
    "steps": "One step, over the same work written by hand",
    "updates": "Nothing to assess, over the K updates alone",
    "rounds": "Milliseconds a round, digits, 2 optimizers, over a step of Adam",
    "trajectories": "A step of a trajectory, MLP, over its parts",
    "sweeps": "Sweeps of Adam over learning rates, MLP",
    "bookkeeping": "Evidence, rule and history alone, over a step that needs them",
    "relays": "CPU time of a call in a relay of Adams, over a step of one",
    "convolutions": "CPU time of a step with convolutions, two Adams, over one Adam's",
    "imports": "CPU time of `import optax_ev3`, over that of `import optax`",
}
LABELS = ["model", "explorers", "program", "loop", "trajectory"]


class Settings(NamedTuple):
    """What is measured, and how often."""

    repeats: int = 40
    sample_seconds: float = 0.06
    explorers: tuple[int, ...] = (2, 4, 8)
    batch: int = 256
    mlp: tuple[int, ...] = (784, 784, 512, 10)
    image: tuple[int, int, int] = (16, 16, 3)
    channels: tuple[int, ...] = (16, 32, 64)
    rounds: int = 100
    macro_f1: str = ""  # which of these assessments, as a pattern
    trajectory: int = 20
    swept: tuple[int, int] = (2, 64)
    booked: tuple[int, int, int] = (16, 4, 256)  # explorers, objectives, history
    relays: tuple[int, ...] = (1, 2, 8)
    relay_first: int = 500  # calls before the first one that is timed: 448 for eight
    convolved: tuple[int, int, int] = (50, 8, 3)  # batch, channels, convolutions
    strategies: str = ""  # which of them with convolutions, as a pattern


QUICK = {
    "repeats": 3,
    "sample_seconds": 0.0,
    "explorers": (2,),
    "batch": 16,
    "mlp": (16, 16, 10),
    "image": (4, 4, 1),
    "channels": (4,),
    "rounds": 5,
    "macro_f1": "20 resamples",
    "trajectory": 3,
    "swept": (2, 4),
    "booked": (2, 2, 8),
    "relays": (2,),
    "relay_first": 5,
    "convolved": (4, 2, 1),
    "strategies": "^recommended",
}


def cells(settings, tasks, results):
    del results
    mlp, conv = mlp_problem(settings), conv_problem(settings)
    print(pd.Series(machine()).to_string())
    by_model = {"steps": steps.measure_steps, "updates": steps.measure_updates}
    for part, fn in by_model.items():
        cases = itertools.product(
            {"mlp": mlp, "conv": conv}.items(), settings.explorers
        )
        for (name, problem), count in cases:
            case = name, problem, count
            yield from _cell(tasks, part, f"{name}, {count}", fn, *case, settings)
    yield from _cell(tasks, "rounds", "digits", rounds.measure_rounds, settings)
    for count in settings.explorers[:2]:
        fn = rounds.measure_trajectories
        yield from _cell(tasks, "trajectories", f"{count}", fn, mlp, count, settings)
    yield from _cell(tasks, "sweeps", "mlp", steps.measure_sweeps, mlp, settings)
    fn = steps.measure_bookkeeping
    yield from _cell(tasks, "bookkeeping", "mlp", fn, mlp, settings)
    for name, problem in {"mlp": mlp, "conv": conv}.items():
        fn = relays.measure_relays
        yield from _cell(tasks, "relays", name, fn, name, problem, settings)
    fn = convolutions.measure_convolutions
    yield from _cell(tasks, "convolutions", "two Adams", fn, settings)
    yield from _cell(tasks, "imports", "processes", imports.measure_imports, settings)


def _cell(tasks, task, method, fn, *args):
    if task in tasks:
        yield Cell(task, method, lambda: tidied(fn(*args)))


def tidied(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows with labels and many numbers as rows with one number each."""
    frame = pd.DataFrame(rows)
    labels = [name for name in LABELS if name in frame]
    return frame.melt(id_vars=labels, var_name="metric")


def machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "optax_ev3": optax_ev3.__version__,
        "device": jax.devices()[0].device_kind,
    }


def report(results, settings, folder):
    del settings, folder
    for part, title in TITLES.items():
        found = results[(results.task == part) & (results.metric != "seconds")]
        if len(found):
            labels = [k for k in LABELS if k in found and found[k].notna().any()]
            numbers = {k: int for k in ("explorers", "trajectory") if k in labels}
            found = found.astype(numbers)
            table = found.pivot(index=labels, columns="metric", values="value")
            table = table.loc[found.set_index(labels).index.unique()]
            show(table[list(dict.fromkeys(found.metric))], title)
            if part in TARGETS:
                print(f"\n{verdict(table.ratio, TARGETS[part])}")


def verdict(ratios: pd.Series, target: float) -> str:
    """The best program of each model and number of explorers, against the target."""
    others = (BY_HAND, TUNED, "safe by hand", "updates alone")
    ours = ratios[~ratios.index.get_level_values("program").isin(others)]
    best = ours.groupby(["model", "explorers"]).min()
    return (
        f"Best mode: {best.median():.3f} in the middle, {best.max():.3f} at the worst; "
        f"target at most {target}: {'reached' if best.max() <= target else 'missed'}."
    )


SUITE = Suite(tuple(TITLES), Settings(), QUICK, cells, report)
