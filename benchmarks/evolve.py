"""What evolution is worth: learning rates that start 100 times too small or too large.

Three tasks, each cut into examples for training, held-out ones, which EV3 assesses on,
and a test set, which only the figures below come from:

digits MLP: scikit-learn's digits, 64-128-128-10.
digits CNN: the same images, two convolutions of 3x3 (8, 16 channels) and a dense layer.
characters: the next character after 16, from the text of Python's own help pages
  (which differs a little between releases of Python): embedding, one hidden layer.

Losses are cross-entropies in nats per example. The reference is Adam with the best
constant learning rate of a grid of 13, a third of a decade apart, chosen in hindsight,
by its mean on the test set, which favours it; beside it the one with the least
held-out loss, as anyone may choose it. Evolution starts at the best rate divided and
multiplied by 100. The others:

constant: Adam, again the best on the test set.
cosine: AdamW with cosine decay to 0.
schedule-free: `schedule_free_adamw`, evaluated at `schedule_free_eval_params`.
prodigy, mechanize(adamw): as documented, at learning rate 1: constant, and decaying as
  the documentation advises, linearly and by a cosine.

Rates of the first three are searched for around the reference, at first every second
one of the grid, and beyond it, until both neighbours are worse, those of cosine and
schedule-free by their mean held-out losses. Each is trained for as many steps as EV3,
and for as many gradients: times the size of the population, as every member takes its
own. (Forward passes of assessments are not counted.) All rows of a task have the same
seeds, initial parameters and order of training batches. "Its schedule, without EV3" is
Adam with the rates that evolution found.

One split of the digits for all seeds is one draw of 300 held-out and 450 test images:
where they disagree, standard errors over seeds don't show it. With --resplit they do,
as each seed draws its own.

Run it with `python benchmarks/evolve.py`; it takes about half an hour on two cores.
`--task digits\\ CNN` runs one task, `--filter REGEX` the rows whose names match.
"""

import functools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable
from pydoc_data import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from optax import contrib

import optax_ev3
from optax_ev3 import combine

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import _digits

sys.path.append(str(pathlib.Path(__file__).parents[1]))
from benchmarks.data import Parts
from benchmarks.models import cnn, dense

SEEDS = flags.DEFINE_integer("seeds", None, "Runs of each row.", lower_bound=2)
STEPS = flags.DEFINE_integer("steps", None, "Training steps.", lower_bound=20)
RESPLIT = flags.DEFINE_bool("resplit", False, "Cut the digits anew for each seed.")
FILTER = flags.DEFINE_string("filter", "", "Only rows that match, and the reference.")
JSON = flags.DEFINE_string("json", None, "Where to write the figures, too.")

# EV3, the same in all tasks.
POPULATION = 8
LENGTH = 20  # of the first trajectories
EXAMPLES = 300  # of an assessment
LOW, HIGH = 1e-7, 10.0  # of the learning rate
SETTING = {
    "trajectory_length": LENGTH,
    "trajectory_growth": 1.1,
    "max_trajectory_length": 5 * LENGTH,
    "gradients": "own",
    "restart": "behind",
    "restart_state": "copy",
    "combine": [combine.trajectory_average()],
}
AWAY = 100.0  # where evolution starts, in best rates

# Learning rates are 10 to the power of a third of these numbers.
GRID = range(-12, 1)  # 1e-4 to 1


class Task(NamedTuple):
    """A model, its data by the seed, and how long it is trained."""

    init: Callable[..., Any]
    logits: Callable[..., Any]
    parts: Callable[..., Parts]
    steps: int
    batch: int
    seeds: int

    def score(self, params, batch):
        """Log-likelihood of each example."""
        logits = self.logits(params, batch[0])
        return -optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])

    def loss(self, params, batch):
        return -self.score(params, batch).mean()


# Tasks.


def digits():
    """The parts by the seed: always the same, or with --resplit drawn anew."""
    fixed = Parts(*_digits.load())
    if not RESPLIT.value:
        return lambda _: fixed
    whole = jax.tree.map(lambda *x: jnp.concatenate(x), *fixed)
    ends = np.cumsum([len(y) for _, y in fixed])

    def parts(seed):
        order = jax.random.permutation(jax.random.key(seed), ends[-1])
        rows = jnp.split(order, ends[:-1])
        return Parts(*(jax.tree.map(lambda x, r=r: x[r], whole) for r in rows))

    return parts


def digits_mlp():
    return Task(_digits.init, _digits.logits, digits(), 1000, 128, 6)


def digits_cnn():
    return Task(*cnn(), digits(), 500, 128, 6)


CONTEXT, WIDTH, HIDDEN = 16, 8, 128
SIZES = 50_000, 5_000, 10_000  # characters to train on, held-out, to test on


@functools.cache
def text():
    """Contexts ``[n, 16]`` and the character that follows, by number, three times."""
    pages = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    paragraphs = pages.split("\n\n")
    # Pages differ in kind: all parts get some of each.
    order = np.random.default_rng(0).permutation(len(paragraphs))
    mixed = "\n\n".join(paragraphs[i] for i in order)[: sum(SIZES)]
    letters = sorted(set(mixed))
    numbers = {letter: number for number, letter in enumerate(letters)}
    codes = np.array([numbers[letter] for letter in mixed], np.int32)
    parts = []
    for part in np.split(codes, np.cumsum(SIZES)[:-1]):
        windows = np.lib.stride_tricks.sliding_window_view(part, CONTEXT + 1)
        parts.append((jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, -1])))
    return Parts(*parts), len(letters)


def characters():
    parts, count = text()

    def init(key):
        keys = jax.random.split(key, 3)
        embedding = jax.random.normal(keys[0], [count, WIDTH])
        hidden = dense(keys[1], CONTEXT * WIDTH, HIDDEN)
        return embedding, hidden, dense(keys[2], HIDDEN, count)

    def logits(params, x):
        embedding, (w1, b1), (w2, b2) = params
        x = embedding[x].reshape(len(x), -1)
        return jax.nn.relu(x @ w1 + b1) @ w2 + b2

    return Task(init, logits, lambda _: parts, 1500, 64, 6)


TASKS = {
    "digits MLP": digits_mlp,
    "digits CNN": digits_cnn,
    "characters": characters,
}
TASK = flags.DEFINE_multi_enum("task", list(TASKS), list(TASKS), "Which; all.")


# Methods.


class Method(NamedTuple):
    """How an optimizer is made, and which parameters are evaluated.

    Attributes:
      make: From a learning rate, the number of steps and the seed.
      evaluated: From the final parameters and the final state, trees by name.
      watched: Whether the final state is of interest.
    """

    make: Callable[..., Any]
    evaluated: Callable[..., Any] = lambda params, state: {"visible": params}
    watched: bool = False


def cosine_adamw(rate, steps, _):
    return optax.adamw(optax.cosine_decay_schedule(rate, steps))


def schedule_free(rate, *_):
    return contrib.schedule_free_adamw(rate)


CONSTANT = Method(lambda rate, *_: optax.adam(rate))
TUNED = {
    "cosine": Method(cosine_adamw),
    "schedule-free": Method(
        schedule_free,
        lambda params, state: {
            "visible": contrib.schedule_free_eval_params(state, params)
        },
    ),
}
# The learning rate is 1.
FREE = {
    "prodigy": Method(lambda rate, *_: contrib.prodigy(rate)),
    "prodigy, linear": Method(
        lambda rate, steps, _: contrib.prodigy(optax.linear_schedule(rate, 0.0, steps))
    ),
    "mechanize(adamw)": Method(lambda rate, *_: contrib.mechanize(optax.adamw(rate))),
    "mechanize(adamw), cosine": Method(
        lambda *args: contrib.mechanize(cosine_adamw(*args))
    ),
}


def evolution(task, start):
    """EV3 from a learning rate."""
    space = {"learning_rate": optax_ev3.log_uniform(LOW, HIGH, start)}
    adams = optax_ev3.evolve(optax.adam, space, POPULATION)

    def make(_, steps, seed):
        return optax_ev3.ev3(
            {"adam": adams},
            optax_ev3.held_out(task.score, task.parts(seed).held_out, EXAMPLES),
            loss_fn=task.loss,
            history_length=steps // LENGTH + 1,
            key=seed,
            **SETTING,
        )

    def evaluated(params, state):
        return {"visible": params, "stable": optax_ev3.stable_params(state)}

    return Method(make, evaluated, watched=True)


def trainer(task, method, steps, seeds):
    """A function of the learning rate, for ``method.make``.

    It returns losses ``[seeds]`` by parameters and part, infinite where they overflow,
    and the final states where they are of interest.
    """

    def one(seed, rate):
        tx = optax.with_extra_args_support(method.make(rate, steps, seed))
        params, parts = task.init(jax.random.key(seed)), task.parts(seed)

        def step(carry, number):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(seed), number)
            batch = _digits._data.sample(key, parts.train, task.batch)
            grads = jax.grad(task.loss)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None

        start = params, tx.init(params)
        (params, state), _ = jax.lax.scan(step, start, jnp.arange(steps))
        losses = {
            (name, part): jnp.nan_to_num(
                task.loss(found, getattr(parts, part)), nan=jnp.inf
            )
            for name, found in method.evaluated(params, state).items()
            for part in ("test", "held_out")
        }
        return losses, state if method.watched else ()

    devices = math.gcd(seeds, jax.local_device_count())
    mapped = jax.pmap(
        lambda numbers, rate: jax.lax.map(lambda seed: one(seed, rate), numbers),
        in_axes=(0, None),
        devices=jax.local_devices()[:devices],
    )

    def run(rate):
        numbers = jnp.arange(seeds).reshape(devices, -1)
        found = mapped(numbers, jnp.asarray(rate, jnp.float32))
        return jax.tree.map(lambda x: np.asarray(x).reshape(seeds, *x.shape[2:]), found)

    return run


# Rows.


class Row(NamedTuple):
    """One row of the table; losses are ``[seeds]``."""

    name: str
    steps: int
    test: np.ndarray
    stable: np.ndarray | None = None
    learning_rates: np.ndarray | None = None


def rate_of(place):
    return 10 ** (place / 3)


class Runs:
    """Runs of a method by the place of the learning rate in the grid."""

    def __init__(self, task, method, steps, seeds):
        self.run = trainer(task, method, steps, seeds)
        self.steps = steps
        self.losses = {}

    def mean(self, place, part):
        if place not in self.losses:
            self.losses[place], _ = self.run(rate_of(place))
        return self.losses[place]["visible", part].mean()

    def best(self, places, part):
        return min(places, key=lambda place: self.mean(place, part))

    def search(self, place, part):
        """From a place to one whose neighbours are both worse."""
        # Far apart at first: test losses may have several valleys.
        place = self.best([place + shift for shift in (-4, -2, 0, 2)], part)
        while (new := self.best((place, place - 1, place + 1), part)) != place:
            place = new
        return place

    def row(self, name, place):
        name = f"{name} {rate_of(place):.2g}"
        return Row(name, self.steps, self.losses[place]["visible", "test"])


def evolved(task, start, steps, seeds, name):
    """The row of EV3, and the schedules that it found ``[seeds, steps]``."""
    losses, states = trainer(task, evolution(task, start), steps, seeds)(0.0)
    rates, schedules = [], []
    for seed in range(seeds):
        state = jax.tree.map(lambda x, seed=seed: x[seed], states)
        past = optax_ev3.history(state)
        rates.append(_at_parts(past["hyperparams/adam/learning_rate"]))
        found = optax_ev3.found_schedule(state, "learning_rate")
        schedules.append(np.asarray(found(jnp.arange(steps))))
    test, stable = (losses[name, "test"] for name in ("visible", "stable"))
    return Row(name, steps, test, stable, np.array(rates)), np.array(schedules)


PARTS = {"the start": 0.0, "a fifth": 0.2, "half": 0.5, "the end": 1.0}


def _at_parts(rates):
    """Median over the population at parts of the run."""
    rows = [round(part * (len(rates) - 1)) for part in PARTS.values()]
    return np.median(rates, axis=1)[rows]


def replayed(task, schedules, steps, name):
    """Adam with the schedule of each seed."""

    def make(rates, _, seed):
        return optax.adam(lambda count: rates[seed, count])

    losses, _ = trainer(task, Method(make), steps, len(schedules))(schedules)
    return Row(name, steps, losses["visible", "test"])


def rows(task, steps, seeds):
    """All rows of a task, the reference first."""
    constant = Runs(task, CONSTANT, steps, seeds)
    best = constant.best(GRID, "test")
    yield constant.row("constant", best)
    yield constant.row("constant, by held-out loss", constant.best(GRID, "held_out"))
    for name, factor in {"/ 100": 1 / AWAY, "x 100": AWAY}.items():
        name = f"evolve from best {name}"
        if wanted(name):
            start = min(max(rate_of(best) * factor, LOW), HIGH)
            row, schedules = evolved(task, start, steps, seeds, name)
            yield row
            yield replayed(task, schedules, steps, "  its schedule, without EV3")
    places = {"constant": best, **dict.fromkeys(TUNED, best)}
    yield from others(task, steps, seeds, TUNED, places)
    tuned = {"constant": CONSTANT, **TUNED}
    yield from others(task, steps * POPULATION, seeds, tuned, places)


def others(task, steps, seeds, tuned, places):
    """Rows without EV3; searches begin where ``places`` says, and note the best."""
    for name, method in tuned.items():
        if wanted(name):
            runs = Runs(task, method, steps, seeds)
            part = "test" if name == "constant" else "held_out"
            places[name] = runs.search(places[name], part)
            yield runs.row(name, places[name])
    for name, method in FREE.items():
        if wanted(name):
            losses, _ = trainer(task, method, steps, seeds)(1.0)
            yield Row(name, steps, losses["visible", "test"])


def wanted(name):
    return re.search(FILTER.value, name)


def spread(values):
    error = values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.4f} ± {error:.4f}"


def ratio(values, reference):
    """Of the means, with the standard error of the paired runs."""
    found = values.mean() / reference.mean()
    error = (values - found * reference).std(ddof=1) / np.sqrt(len(values))
    return f"{found:.3f} ± {error / reference.mean():.3f}"


def show(row, best):
    stable = "" if row.stable is None else spread(row.stable)
    cells = f"{spread(row.test):>20}{ratio(row.test, best.test):>18}{stable:>20}"
    print(f"{row.name:34}{row.steps:6}{cells}", flush=True)


def show_rates(found):
    print(
        f"\n{'learning rate: median (range)':34}" + "".join(f"{p:>26}" for p in PARTS)
    )
    for row in found:
        cells = (
            f"{np.median(x):.1e} ({x.min():.0e}, {x.max():.0e})"
            for x in row.learning_rates.T
        )
        print(f"{row.name:34}" + "".join(f"{cell:>26}" for cell in cells))


def table(name):
    task = TASKS[name]()
    steps, seeds = STEPS.value or task.steps, SEEDS.value or task.seeds
    print(f"\n{name}: {steps} steps of {task.batch}, {seeds} seeds")
    title = f"{'test loss':>20}{'to the best':>18}{'stable':>20}"
    print(f"{'method':34}{'steps':>6}{title}")
    found = []
    for row in rows(task, steps, seeds):
        found.append(row)
        show(row, found[0])
    if evolving := [row for row in found if row.learning_rates is not None]:
        show_rates(evolving)
    return [
        {k: v.tolist() if hasattr(v, "tolist") else v for k, v in row._asdict().items()}
        for row in found
    ]


def main(_):
    logging.set_verbosity(logging.WARNING)
    # Seeds are dealt out to the cores.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    print("Test loss: mean ± standard error. To the best: ratio to that of the best")
    print("constant rate for as many steps as EV3 ± standard error of paired runs.")
    figures = {name: table(name) for name in TASK.value}
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    app.run(main)
