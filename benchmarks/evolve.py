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
where they disagree, standard errors over seeds don't show it. With `--resplit` they do,
as each seed draws its own.

It takes about half an hour on two cores.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from optax import contrib

import optax_ev3
from benchmarks.data import Parts, load, stacked, text
from benchmarks.models import cnn, dense, forward, log_likelihood, mlp
from benchmarks.report import ratio, show, spread
from benchmarks.results import tidy
from benchmarks.run import Cell, Suite
from benchmarks.training import fit, over_seeds
from optax_ev3 import explore

# EV3, the same in all tasks.
POPULATION = 8
LENGTH = 20  # of the first trajectories
EXAMPLES = 300  # of an assessment
LOW, HIGH = 1e-7, 10.0  # of the learning rate
STRATEGY = explore.branches(
    LENGTH,
    growth=1.1,
    max_length=5 * LENGTH,
    gradients="own",
    restart=explore.worse_than("start", inner_state="copy"),
    averages=[explore.trajectory_average()],
)
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
        return log_likelihood(self.logits(params, batch[0]), batch[1])

    def loss(self, params, batch):
        return -self.score(params, batch).mean()


# Tasks.


def digits(resplit):
    """The parts by the seed: always the same, or drawn anew."""
    fixed = Parts(*load())
    if not resplit:
        return lambda _: fixed
    whole = jax.tree.map(lambda *x: jnp.concatenate(x), *fixed)
    ends = np.cumsum([len(y) for _, y in fixed])

    def parts(seed):
        order = jax.random.permutation(jax.random.key(seed), ends[-1])
        rows = jnp.split(order, ends[:-1])
        return Parts(*(jax.tree.map(lambda x, r=r: x[r], whole) for r in rows))

    return parts


def digits_mlp(resplit):
    return Task(*mlp(64, 128, 128, 10), digits(resplit), 1000, 128, 6)


def digits_cnn(resplit):
    return Task(*cnn(), digits(resplit), 500, 128, 6)


CONTEXT, WIDTH, HIDDEN = 16, 8, 128
SIZES = 50_000, 5_000, 10_000  # characters to train on, held-out, to test on


def characters(resplit):
    del resplit
    codes, count = text(sum(SIZES))
    parts = []
    for part in np.split(codes, np.cumsum(SIZES)[:-1]):
        windows = np.lib.stride_tricks.sliding_window_view(part, CONTEXT + 1)
        parts.append((jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, -1])))
    parts = Parts(*parts)

    def init(key):
        keys = jax.random.split(key, 3)
        embedding = jax.random.normal(keys[0], [count, WIDTH])
        hidden = dense(keys[1], CONTEXT * WIDTH, HIDDEN)
        return embedding, hidden, dense(keys[2], HIDDEN, count)

    def logits(params, x):
        embedding, *layers = params
        return forward(layers, embedding[x].reshape(len(x), -1))

    return Task(init, logits, lambda _: parts, 1500, 64, 6)


TASKS = {
    "digits MLP": digits_mlp,
    "digits CNN": digits_cnn,
    "characters": characters,
}


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
            explore=STRATEGY,
        )

    def evaluated(params, state):
        return {"visible": params, "stable": optax_ev3.stable_params(state)}

    return Method(make, evaluated, watched=True)


def trainer(task, method, steps, seeds):
    """A function of the learning rate, for ``method.make``.

    It returns losses ``[seeds]`` by parameters and part, infinite where they overflow,
    and the final states where they are of interest.
    """

    def one(seed, parts, rate):
        tx = method.make(rate, steps, seed)
        params = task.init(jax.random.key(seed))
        params, state = fit(tx, task.loss, params, parts.train, seed, steps, task.batch)
        losses = {
            (name, part): jnp.nan_to_num(
                task.loss(found, getattr(parts, part)), nan=jnp.inf
            )
            for name, found in method.evaluated(params, state).items()
            for part in ("test", "held_out")
        }
        return losses, state if method.watched else ()

    return over_seeds(one, range(seeds), stacked(task.parts, range(seeds)))


# Cells.


def at(task, method, steps, seeds):
    """A function of a place in the grid to the losses there, which remembers them."""
    run = trainer(task, method, steps, seeds)
    return functools.cache(lambda place: run(10 ** (place / 3))[0])


def losses_of(losses, seeds, **columns):
    """Rows of losses of the visible parameters."""
    found = {part: losses["visible", part] for part in ("test", "held_out")}
    return tidy(found, seed=range(seeds)).assign(**columns)


def everywhere(task, steps, seeds):
    """Adam at all learning rates of the grid."""
    losses = at(task, CONSTANT, steps, seeds)
    rows = [losses_of(losses(x), seeds, place=x, steps=steps) for x in GRID]
    return pd.concat(rows)


def searched(task, method, steps, seeds, place, part):
    """From a place to one whose neighbours are both worse; all that were tried."""
    losses, tried = at(task, method, steps, seeds), set()

    def best(places):
        tried.update(places)
        return min(places, key=lambda x: losses(x)["visible", part].mean())

    # Far apart at first: test losses may have several valleys.
    place = best([place + shift for shift in (-4, -2, 0, 2)])
    while (new := best((place, place - 1, place + 1))) != place:
        place = new
    rows = [losses_of(losses(x), seeds, place=x, steps=steps) for x in sorted(tried)]
    return pd.concat(rows)


def untuned(task, method, steps, seeds):
    losses, _ = trainer(task, method, steps, seeds)(1.0)
    return losses_of(losses, seeds, steps=steps)


PARTS = {"the start": 0.0, "a fifth": 0.2, "half": 0.5, "the end": 1.0}


def evolved(task, start, steps, seeds):
    """EV3, and Adam with the learning rates that it found."""
    losses, states = trainer(task, evolution(task, start), steps, seeds)(0.0)
    rates, schedules = [], []
    for seed in range(seeds):
        state = jax.tree.map(lambda x, seed=seed: x[seed], states)
        past = optax_ev3.history(state)["hyperparams/adam/learning_rate"]
        rows = [round(part * (len(past) - 1)) for part in PARTS.values()]
        rates.append(np.median(past, axis=1)[rows])  # Over the population.
        found = optax_ev3.found_schedule(state, "learning_rate")
        schedules.append(np.asarray(found(jnp.arange(steps))))

    def replay(rates, _, seed):
        return optax.adam(lambda count: rates[seed, count])

    again, _ = trainer(task, Method(replay), steps, seeds)(np.array(schedules))
    more = {"stable": losses["stable", "test"], "replayed": again["visible", "test"]}
    rates = tidy({"learning rate": rates}, seed=range(seeds), when=PARTS)
    more = tidy(more, seed=range(seeds))
    return pd.concat([losses_of(losses, seeds), more, rates]).assign(steps=steps)


class Settings(NamedTuple):
    """How much is measured; steps and seeds are each task's own where they are 0."""

    seeds: int = 0
    steps: int = 0
    resplit: bool = False  # Whether the digits are cut anew for each seed.


LONGER = f", {POPULATION} times the steps"


def cells(settings, tasks, results):
    for name in tasks:
        yield from _cells_of(name, TASKS[name](settings.resplit), settings, results)


def _cells_of(name, task, settings, results):
    sizes = settings.steps or task.steps, settings.seeds or task.seeds
    yield Cell(name, "constant", lambda: everywhere(task, *sizes), needed=True)
    best = place_of(results.frame, name, "constant", "test")
    for way, factor in {"/ 100": 1 / AWAY, "x 100": AWAY}.items():
        start = min(max(10 ** (best / 3) * factor, LOW), HIGH)
        title = f"evolve from best {way}"
        yield Cell(name, title, lambda start=start: evolved(task, start, *sizes))
    yield from _others(name, task, sizes, results, best, "")
    yield from _others(name, task, sizes, results, best, LONGER)


def _others(name, task, sizes, results, best, longer):
    """Methods without EV3; searches begin at the best place that is known."""
    steps, seeds = sizes
    steps *= POPULATION if longer else 1
    for other, method in {"constant": CONSTANT, **TUNED}.items():
        if other == "constant" and not longer:
            continue
        part = "test" if other == "constant" else "held_out"
        place = place_of(results.frame, name, other, part)
        case = method, steps, seeds, best if place is None else place, part
        yield Cell(name, other + longer, lambda case=case: searched(task, *case))
    for other, method in FREE.items():
        case = method, steps, seeds
        yield Cell(name, other + longer, lambda case=case: untuned(task, *case))


def place_of(frame, task, method, part):
    """The place in the grid with the least mean loss, None where there is none."""
    found = frame[(frame.task == task) & (frame.method == method)]
    found = found[found.metric == part]
    if not len(found):
        return None
    return int(found.groupby("place").value.mean().idxmin())


# The report.


def report(results, settings, folder):
    del settings, folder
    for task, found in results.groupby("task", sort=False):
        rows, best = {}, None
        for name, steps, one in _rows(task, found):
            test = _values(one, "test")
            best = test if best is None else best
            stable = _values(one, "stable")
            rows[name] = [
                str(steps),
                spread(test),
                ratio(test, best),
                spread(stable) if len(stable) else "",
            ]
        columns = ["steps", "test loss", "to the best", "stable"]
        table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
        show(table.rename_axis("method"), task)
        rates = found[found.metric == "learning rate"]
        if len(rates):
            groups = rates.groupby(["method", "when"], sort=False).value
            cells = groups.agg(
                lambda x: f"{x.median():.1e} ({x.min():.0e}, {x.max():.0e})"
            )
            show(cells.unstack(sort=False), "Learning rate: median (range)")
    print("To the best: ratio to the loss of the best constant rate for as many steps")
    print("as EV3, with the standard error of paired runs.")


def _values(rows, metric):
    return rows[rows.metric == metric].sort_values("seed").value.to_numpy()


def _rows(task, found):
    """Name, steps and results of each row, at the place that was chosen."""
    for method, one in found.groupby("method", sort=False):
        steps = int(one.steps.dropna().iloc[0])
        ways = {"": "held_out"}
        if method == "constant":
            ways = {"": "test", ", by held-out loss": "held_out"}
        elif method.startswith("constant"):
            ways = {"": "test"}
        if one.place.isna().all():
            yield method, steps, one
        else:
            for how, part in ways.items():
                place = place_of(found, task, method, part)
                name = f"{method}{how} {10 ** (place / 3):.2g}"
                yield name, steps, one[one.place == place]
        again = one[one.metric == "replayed"]
        if len(again):
            yield (
                f"{method}: its schedule, without EV3",
                steps,
                again.assign(metric="test"),
            )


QUICK = {"seeds": 2, "steps": 40}
SUITE = Suite(tuple(TASKS), Settings(), QUICK, cells, report, spread=True)
