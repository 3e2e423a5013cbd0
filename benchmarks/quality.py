"""One run of EV3 against the best optimizer in hindsight, sweeps, and other methods.

Eleven tasks, see benchmarks/_tasks.py. EV3 has one setting for all of them and eight
explorers: five rates of Adam, two of SGD with momentum, and RMSProp. Everybody gets the
same parts of the data, initial parameters and order of batches, by seed; what may be
chosen is chosen by the mean score of all held-out examples, save where it says "in
hindsight"; where they are many, EV3 draws some of them in each round. The rows:

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
rest take none, so that the others take more steps. At equal work EV3 ends earlier: its
assessments count as well, in forward passes of single examples, a gradient as three.
What others choose by held-out scores is not counted. A run that ends worse than its
initial parameters counts as these, for every method alike.

Run it with `python benchmarks/quality.py`; cells, a method on a task each, are kept as
JSON in `--folder`, and the same command goes on where it stopped. `--quick` runs three
tasks with three seeds and few methods, in some minutes. `--show` only prints, and makes
table and plots.
"""

import functools
import itertools
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from optax import contrib

import optax_ev3
from optax_ev3 import adapt, combine, explore

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import _quality_report as report
from _tasks import TASKS

SEEDS = flags.DEFINE_integer("seeds", 10, "Runs of each method.", lower_bound=2)
FIRST = flags.DEFINE_integer("first_seed", 0, "The first one.", lower_bound=0)
QUICK = flags.DEFINE_bool("quick", False, "Three tasks, three seeds, few methods.")
SHOW = flags.DEFINE_bool("show", False, "Prints and draws what there is.")
FOLDER = flags.DEFINE_string("folder", "benchmarks/results/quality", "Of the cells.")
TASK = flags.DEFINE_multi_enum("task", list(TASKS), list(TASKS), "Which; all.")
METHOD = flags.DEFINE_string("method", "", "Only methods that match.")
STEPS = flags.DEFINE_integer("steps", None, "Steps of every task.", lower_bound=8)

ADAMS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MOMENTUM = functools.partial(optax.sgd, momentum=0.9)
RULES = {
    **{f"adam {rate:g}": (optax.adam, rate) for rate in ADAMS},
    **{f"momentum {rate:g}": (MOMENTUM, rate) for rate in (0.01, 0.1)},
    "rmsprop 0.001": (optax.rmsprop, 1e-3),
}
SINGLES = {name: make(rate) for name, (make, rate) in RULES.items()}
COUNT = len(SINGLES)
DECAY = 0.99  # Of exponential averages.
# Successive halving: of how many the best go on, after which parts of all gradients
# each of them has taken. The first are the ends of grid search.
HALVING = ((8, 1 / 32), (4, 3 / 32), (2, 7 / 32), (1, 15 / 32))
SHARE = 1 / COUNT
# Parts of all gradients after which figures are taken.
MARKS = (*(part for _, part in HALVING), 1 / 16, SHARE, 1 / 4, 1 / 3, 2 / 3, 1.0)
WORK = "work"  # Where EV3 has done as much work, assessments counted.

# EV3: the first is the one that is recommended, the others are what it is made of.
LENGTH = 25
RECOMMENDED = {
    "trajectory_length": LENGTH,
    "gradients": "own",
    "restart": "never",
    "restart_state": "copy",
    "race": explore.Racing(2, 8),
    "combine": [combine.trajectory_average(), combine.branch_average()],
    "adapt": adapt.greedy(),
}
# All start each round from the adopted parameters, and nobody rests.
TOGETHER = {"restart": "always", "restart_state": "keep", "race": None}
HOSTILE = {
    "uphill": optax.sgd(-0.1),
    "sgd 1000": optax.sgd(1000.0),
    "nan": optax.sgd(math.nan),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "EV3": {},
    "EV3, three hostile explorers more": {"inner": {**SINGLES, **HOSTILE}},
    "EV3, nobody rests": {"race": None},
    "EV3, restart significant": {"restart": "significant"},
    "EV3, restart always": {"restart": "always"},
    "EV3, restart always, nobody rests, confident": {**TOGETHER, "adapt": None},
    "EV3, confident": {"adapt": None},
    "EV3, the paper's rule": {"adapt": adapt.lower_bound()},
    "EV3, no averages": {"combine": []},
    "EV3, no branch averages": {"combine": [combine.trajectory_average()]},
    "EV3, length 50": {"trajectory_length": 50},
    "EV3, length 10 growing to 80": {
        "trajectory_length": 10,
        "trajectory_growth": 1.5,
        "max_trajectory_length": 80,
    },
    "EV3, shared gradients": {
        "trajectory_length": 10,
        "gradients": "shared",
        **TOGETHER,
    },
    "EV3, one step": {
        "trajectory_length": 1,
        "combine": [],
        "gradients": None,
        "adapt": None,
        **TOGETHER,
    },
}
AWAY = {"/ 100": 0.01, "x 100": 100.0}
EVOLVING = {
    "trajectory_length": 20,
    "trajectory_growth": 1.1,
    "max_trajectory_length": 100,
    "restart": "behind",
    "race": None,
    "history_length": 64,
    "combine": [combine.trajectory_average()],
    "adapt": None,
}


def visible(params, state):
    return params


class Method(NamedTuple):
    """How an optimizer is made, and which parameters are evaluated.

    Attributes:
      make: From the learning rate and the number of steps to a transformation.
      rates: Learning rates to choose from.
      horizon: Whether it has to know the number of steps.
      evaluated: From final parameters and state.
    """

    make: Callable[..., Any]
    rates: tuple[float, ...] = (0.0,)
    horizon: bool = False
    evaluated: Callable[..., Any] = visible


class EV3(NamedTuple):
    """How EV3 is made, and what a round of it takes.

    Attributes:
      make: From the task, the held-out part and the seed to a transformation.
      explorers: How many there are.
      own: Whether each of them takes gradients of its own.
      more: Assessments of a round beside those of candidates.
    """

    make: Callable[..., Any]
    explorers: int
    own: bool
    more: int


def ev3(explorers=None, **kwargs):
    """EV3 with the recommended setting, but for what is given."""
    kwargs = {"inner": SINGLES, **RECOMMENDED, **kwargs}
    inner, own = kwargs.pop("inner"), kwargs["gradients"] == "own"

    def make(task, held_out, seed):
        def loss(params, batch):
            return task.loss(params, batch)

        def explorer(one):
            # With losses of their own they need no gradient of the caller's.
            return optax_ev3.explorer(one, loss) if own else one

        total = len(jax.tree.leaves(held_out)[0])
        count = looked_at(task, total)
        drawn = {} if count == total else {"batch_size": count, "shuffle": True}
        return optax_ev3.ev3(
            {name: explorer(one) for name, one in inner.items()},
            optax_ev3.held_out(task.score, held_out, **drawn),
            loss_fn=loss,
            key=seed,
            **kwargs,
        )

    # A soup of some size takes that many assessments, one of them of its own.
    more = sum(one.size - 1 for one in kwargs["combine"] if hasattr(one, "size"))
    return EV3(make, explorers or len(inner), own, more)


def looked_at(task, total):
    """Held-out examples of a round: at most a quarter of those that a branch trains on.

    So its three candidates, a pass each, take a quarter of its gradients' work at most.
    """
    return min(total, LENGTH * task.batch // 4)


def evolving(factor):
    """A group of eight of Adam that starts at 0.003 times a factor."""
    space = {"learning_rate": optax_ev3.log_uniform(1e-7, 10.0, 3e-3 * factor)}
    group = optax_ev3.evolve(optax.adam, space, COUNT)
    return ev3(inner={"adam": group}, explorers=COUNT, **EVOLVING)


def off(factor):
    """The recommended setting with all rates multiplied."""
    return ev3(inner={k: make(rate * factor) for k, (make, rate) in RULES.items()})


def plateau(rate, steps):
    """As documented: on means of the loss over some steps."""
    window = max(steps // 100, 1)
    return optax.chain(
        optax.adam(rate),
        contrib.reduce_on_plateau(patience=5, accumulation_size=window),
    )


@functools.cache
def alone(make):
    """The same function for the same optimizer, which then compiles once."""
    return lambda rate, steps: make(rate)


def cosine(rate, steps):
    return optax.adamw(optax.cosine_decay_schedule(rate, steps))


OTHERS = {
    "cosine": Method(cosine, rates=ADAMS, horizon=True),
    "reduce_on_plateau": Method(plateau, rates=ADAMS, horizon=True),
    "schedule-free": Method(
        lambda rate, steps: contrib.schedule_free_adamw(rate),
        rates=ADAMS,
        evaluated=lambda params, state: contrib.schedule_free_eval_params(
            state, params
        ),
    ),
    "prodigy": Method(lambda rate, steps: contrib.prodigy(1.0)),
    "prodigy, cosine": Method(
        lambda rate, steps: contrib.prodigy(optax.cosine_decay_schedule(1.0, steps)),
        horizon=True,
    ),
    "mechanize": Method(lambda rate, steps: contrib.mechanize(optax.adamw(1e-3))),
}
METHODS = {
    **{name: ev3(**kwargs) for name, kwargs in VARIANTS.items()},
    **{name: Method(alone(make), (rate,)) for name, (make, rate) in RULES.items()},
    **OTHERS,
    **{f"EV3, rates {name}": off(factor) for name, factor in AWAY.items()},
    **{
        f"EV3, evolve from {name}": evolving(factor)
        for name, factor in {"0.003": 1.0, **AWAY}.items()
    },
}
QUICK_TASKS = ("digits MLP", "outliers", "distillation")
QUICK_METHODS = "|".join(map(re.escape, ["EV3", "untrained", *SINGLES, *OTHERS]))


# Runs.


def stacked(task, seeds):
    """The parts of all seeds."""
    return jax.tree.map(lambda *x: np.stack(x), *map(task.parts, seeds))


def draw(task, parts, seed, number):
    """The batch of a step, the same for all methods."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    count = len(jax.tree.leaves(parts.train)[0])
    rows = jax.random.randint(key, [task.batch], 0, count)
    return jax.tree.map(lambda x: x[rows], parts.train)


def figures_of(task, parts, params):
    return {
        "test": task.test(params, parts.test),
        "held_out": task.held_out(params, parts.held_out),
    }


@functools.cache
def trainer(task, make, evaluated, steps, parts_of_it, seeds):
    """A function of a learning rate to figures by kind ``[marks, 2, seeds]``.

    The two are of the parameters, and of the exponential average of their course.
    """
    marks = jnp.asarray([max(1, round(steps * part)) for part in parts_of_it])

    def one(seed, parts, rate):
        tx = optax.with_extra_args_support(make(rate, steps))
        params = task.init(jax.random.key(seed))

        def step(carry, number):
            params, state, average, kept = carry
            batch = draw(task, parts, seed, number)
            value, grads = jax.value_and_grad(task.loss)(params, batch)
            updates, state = tx.update(grads, state, params, value=value)
            params = optax.apply_updates(params, updates)
            shown = evaluated(params, state)
            decay = jnp.minimum(DECAY, (1 + number) / (10 + number))
            average = optax.incremental_update(shown, average, 1 - decay)
            kept = keep(kept, (shown, average), number + 1 == marks)
            return (params, state, average, kept), None

        start = params, tx.init(params), params, blank(params, len(marks), 2)
        (*_, kept), _ = jax.lax.scan(step, start, jnp.arange(steps))
        return jax.vmap(jax.vmap(functools.partial(figures_of, task, parts)))(kept)

    return _over_seeds(one, seeds, stacked(task, seeds))


def blank(params, marks, kinds):
    return jax.tree.map(lambda x: jnp.zeros([marks, kinds, *x.shape]), params)


def keep(kept, shown, here):
    """Parameters of several kinds put where ``here [marks]`` says."""

    def put(old, *new):
        mask = here.reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(mask, jnp.stack(new), old)

    return jax.lax.cond(
        here.any(), lambda: jax.tree.map(put, kept, *shown), lambda: kept
    )


@functools.cache
def ev3_trainer(task, method, budget, seeds):
    """A function without arguments to figures ``[marks, 1, seeds]`` of EV3.

    Explorers may rest, so that what a call takes is counted: rounds end until the
    gradients of all explorers are as many as the budget, and figures are those of the
    last round that lies within each part of it; the last mark is that of equal work.
    """
    limits = jnp.asarray([*(budget * part for part in MARKS), budget])
    passes = 3.0 * task.batch  # Of a gradient: forward passes of single examples.

    def one(seed, parts, _):
        tx = method.make(task, parts.held_out, seed)
        params = task.init(jax.random.key(seed))
        examples = looked_at(task, len(jax.tree.leaves(parts.held_out)[0]))

        def call(carry):
            params, state, number, gradients, assessed, kept = carry
            batch = draw(task, parts, seed, number)
            # Not computed where nothing uses it: explorers may take their own.
            grads = jax.grad(task.loss)(params, batch)
            updates, new = tx.update(grads, state, params, batch=batch)
            params = optax.apply_updates(params, updates)
            ended = new.ev3_round > state.ev3_round
            took, candidates = taken(new, method)
            gradients += jnp.where(ended, took, 0)
            assessed += jnp.where(ended, candidates * examples, 0)
            done = (
                jnp.full(len(limits), gradients, jnp.float32)
                .at[-1]
                .add(assessed / passes)
            )
            kept = keep(kept, [params], ended & (done <= limits))
            return params, new, number + 1, gradients, assessed, kept

        start = (
            params,
            tx.init(params),
            0,
            0,
            0,
            keep(blank(params, len(limits), 1), [params], jnp.ones(len(limits), bool)),
        )
        end = jax.lax.while_loop(lambda carry: carry[3] < budget, call, start)
        _, state, calls, gradients, assessed, kept = end
        figures = jax.vmap(jax.vmap(functools.partial(figures_of, task, parts)))(kept)
        spent = {
            "calls": calls,
            "rounds": state.ev3_round,
            "work": 1 + assessed / passes / gradients,
        }
        return figures | spent

    return functools.partial(_over_seeds(one, seeds, stacked(task, seeds)), 0.0)


def taken(state, method):
    """Gradients that the last round took, and candidates that it scored."""
    record = state.record
    row = (record.rounds - 1) % len(record.adopted)
    took_part = record.valid[row] >= 0
    explorers = took_part[: method.explorers].sum() if method.own else 1
    return record.length[row] * explorers, took_part.sum() + method.more


def _over_seeds(one, seeds, parts):
    """Maps a function of seed, parts and a number over seeds, dealt to the cores."""
    count = len(seeds)
    devices = math.gcd(count, jax.local_device_count())
    mapped = jax.pmap(
        lambda numbers, parts, rate: jax.lax.map(
            lambda args: one(*args, rate), (numbers, parts)
        ),
        in_axes=(0, 0, None),
        devices=jax.local_devices()[:devices],
    )

    def dealt(x):
        return np.asarray(x).reshape(devices, count // devices, *np.shape(x)[1:])

    def run(rate):
        numbers, data = jax.tree.map(dealt, (np.array(seeds), parts))
        found = mapped(numbers, data, jnp.float32(rate))
        return jax.tree.map(
            lambda x: np.moveaxis(np.asarray(x).reshape(count, *x.shape[2:]), 0, -1),
            found,
        )

    return run


def population(task, steps, seeds, intervals=20):
    """Population-based training (Jaderberg et al., 2017): figures ``[seeds]``.

    Eight of Adam; at each interval the worst two by all held-out examples become copies
    of the best two, and their learning rates are multiplied by 0.8 or by 1.25.
    """
    interval = max(steps // intervals, 1)

    def one(seed, parts, _):
        tx = optax.scale_by_adam()

        def step(carry, number):
            params, state, rates = carry
            batch = draw(task, parts, seed, number)

            def train(params, state, rate):
                grads = jax.grad(task.loss)(params, batch)
                updates, state = tx.update(grads, state, params)
                updates = optax.tree.scale(-rate, updates)
                return optax.apply_updates(params, updates), state

            params, state = jax.vmap(train)(params, state, rates)

            def exploit():
                order = jnp.argsort(ranks(params))  # The best last.
                source = jnp.arange(COUNT).at[order[:2]].set(order[-2:])
                key = jax.random.fold_in(jax.random.key(seed), ~number)
                factors = jax.random.choice(key, jnp.array([0.8, 1.25]), [COUNT])
                moved = jnp.zeros(COUNT, bool).at[order[:2]].set(True)
                new = rates[source] * jnp.where(moved, factors, 1)
                copied = jax.tree.map(lambda x: x[source], (params, state))
                return *copied, new

            due = (number + 1) % interval == 0
            return jax.lax.cond(due, exploit, lambda: (params, state, rates)), None

        def ranks(params):
            found = jax.vmap(task.held_out, in_axes=(0, None))(params, parts.held_out)
            return jnp.nan_to_num(found, nan=-jnp.inf)

        params = task.init(jax.random.key(seed))
        params = jax.tree.map(lambda x: jnp.stack([x] * COUNT), params)
        rates = jnp.asarray(np.geomspace(ADAMS[0], ADAMS[-1], COUNT), jnp.float32)
        start = params, jax.vmap(tx.init)(params), rates
        (params, *_), _ = jax.lax.scan(step, start, jnp.arange(steps))
        best = jnp.argmax(ranks(params))
        params = jax.tree.map(lambda x: x[best], params)
        return figures_of(task, parts, params)

    return _over_seeds(one, seeds, stacked(task, seeds))(0.0)


def soup(task, steps, seeds):
    """Greedy soup (Wortsman et al., 2022) of the ends of the eight: ``[seeds]``."""

    def one(seed, parts, _):
        params = task.init(jax.random.key(seed))

        def end(tx):
            def step(carry, number):
                params, state = carry
                batch = draw(task, parts, seed, number)
                updates, state = tx.update(jax.grad(task.loss)(params, batch), state)
                return (optax.apply_updates(params, updates), state), None

            start = params, tx.init(params)
            return jax.lax.scan(step, start, jnp.arange(steps))[0][0]

        def score(params):
            found = task.held_out(params, parts.held_out)
            return jnp.nan_to_num(found, nan=-jnp.inf)

        ends = [end(tx) for tx in SINGLES.values()]
        ends = jax.tree.map(lambda *x: jnp.stack(x), *ends)
        order = jnp.argsort(-jax.vmap(score)(ends))

        def taste(carry, index):
            total, size, best = carry
            more = jax.tree.map(lambda t, x: t + x[index], total, ends)
            found = score(jax.tree.map(lambda x: x / (size + 1), more))
            keep = found >= best
            total = jax.tree.map(lambda a, b: jnp.where(keep, a, b), more, total)
            best = jnp.where(keep, found, best)
            return (total, size + keep, best), None

        start = jax.tree.map(jnp.zeros_like, params), 0.0, -jnp.inf
        (total, size, _), _ = jax.lax.scan(taste, start, order)
        params = jax.tree.map(lambda x: x / size, total)
        return figures_of(task, parts, params)

    return _over_seeds(one, seeds, stacked(task, seeds))(0.0)


def untrained(task, steps, seeds):
    """The initial parameters: ``[seeds]``. A run that ends worse has failed."""
    del steps

    def one(seed, parts, _):
        return figures_of(task, parts, task.init(jax.random.key(seed)))

    return _over_seeds(one, seeds, stacked(task, seeds))(0.0)


PROCEDURES = {
    "population-based training": population,
    "soup": soup,
    "untrained": untrained,
}


# Cells.


def cell(task, name, seeds):
    """The figures of a method, or of a procedure, on a task, as JSON."""
    steps = STEPS.value or task.steps
    budget, begun = steps * COUNT, time.perf_counter()
    if name in PROCEDURES:
        runs = [PROCEDURES[name](task, steps, seeds)]
    elif isinstance(METHODS[name], EV3):
        found = ev3_trainer(task, METHODS[name], budget, seeds)()
        runs = [{"marks": [*MARKS, WORK], **found}]
    else:
        method = METHODS[name]
        marks = (1.0,) if method.horizon else MARKS
        train = trainer(task, method.make, method.evaluated, budget, marks, seeds)
        runs = [{"rate": x, "marks": marks, **train(x)} for x in method.rates]
    runs = jax.tree.map(lambda x: rounded(np.asarray(x)), runs)
    seconds = round(time.perf_counter() - begun, 1)
    return {"runs": runs, "budget": budget, "seconds": seconds}


def rounded(x):
    """Numbers of six digits, what is none as it is; as JSON takes them."""
    if not np.issubdtype(x.dtype, np.floating):
        return x.tolist()
    return np.vectorize(lambda one: float(f"{one:.6g}"), otypes=[float])(x).tolist()


def main(_):
    logging.set_verbosity(logging.WARNING)
    # Seeds are dealt out to the cores.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    folder, count = pathlib.Path(FOLDER.value), SEEDS.value
    tasks, pattern = TASK.value, METHOD.value
    if QUICK.value:
        folder, count = folder.with_name(folder.name + "_quick"), min(count, 3)
        tasks, pattern = QUICK_TASKS, f"^({QUICK_METHODS})$"
    seeds = range(FIRST.value, FIRST.value + count)
    if not SHOW.value:
        for task, name in itertools.product(tasks, [*METHODS, *PROCEDURES]):
            if re.search(pattern, name):
                fill(folder, task, name, seeds)
    found = report.load(folder)
    ours = tuple(name for name in METHODS if name.startswith("EV3, "))
    kinds = report.Kinds(tuple(SINGLES), tuple(OTHERS), HALVING, SHARE, ours)
    report.show(found, kinds)
    report.verdicts(found, kinds)
    report.write_table(found, kinds, folder / "table.md")
    report.draw(found, kinds, folder)


@functools.cache
def made(task):
    return TASKS[task]()


def fill(folder, task, name, seeds):
    """Makes a cell, if it isn't there."""
    path = report.path_of(folder, task, name)
    if path.exists():
        return
    found = cell(made(task), name, seeds)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(path)  # A cell is whole, or not there.
    print(f"{task}, {name}: {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    app.run(main)
