"""How the methods of the quality suite are run, and what is measured when."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from benchmarks.data import stacked
from benchmarks.quality.methods import ADAMS, COUNT, EV3, METHODS, SINGLES, looked_at
from benchmarks.results import tidy
from benchmarks.training import batch_of, fit, over_seeds

DECAY = 0.99  # Of exponential averages.
# Successive halving: of how many the best go on, after which parts of all gradients
# each of them has taken. The first are the ends of grid search.
HALVING = ((8, 1 / 32), (4, 3 / 32), (2, 7 / 32), (1, 15 / 32))
SHARE = 1 / COUNT
# Parts of all gradients after which figures are taken.
MARKS = (*(part for _, part in HALVING), 1 / 16, SHARE, 1 / 4, 1 / 3, 2 / 3, 1.0)
# What is measured where EV3 has done as much work, its assessments counted.
AT_WORK = " at equal work"
WEIGHTS = ("last", "average")  # The final ones, and their exponential average.


def figures_of(task, parts, params):
    return {
        "test": task.test(params, parts.test),
        "held_out": task.held_out(params, parts.held_out),
    }


@functools.cache
def trainer(task, make, evaluated, steps, parts_of_it, seeds):
    """A function of a learning rate to figures by kind ``[seeds, marks, 2]``.

    The two are of the parameters, and of the exponential average of their course.
    """
    marks = jnp.asarray([max(1, round(steps * part)) for part in parts_of_it])

    def one(seed, parts, rate):
        tx = optax.with_extra_args_support(make(rate, steps))
        params = task.init(jax.random.key(seed))

        def step(carry, number):
            params, state, average, kept = carry
            batch = batch_of(parts.train, seed, number, task.batch)
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

    return over_seeds(one, seeds, stacked(task.parts, seeds))


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
    """A function without arguments to figures ``[seeds, marks]`` of EV3.

    Explorers may be paused, so that what a call takes is counted: rounds end until the
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
            batch = batch_of(parts.train, seed, number, task.batch)
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
            shown = method.evaluated(params, new)
            kept = keep(kept, (shown,), ended & (done <= limits))
            return params, new, number + 1, gradients, assessed, kept

        start = (
            params,
            tx.init(params),
            0,
            0,
            0,
            jax.tree.map(lambda x: jnp.stack([x[None]] * len(limits)), params),
        )
        end = jax.lax.while_loop(lambda carry: carry[3] < budget, call, start)
        _, state, calls, gradients, assessed, kept = end
        kept = jax.tree.map(lambda x: x[:, 0], kept)
        figures = jax.vmap(functools.partial(figures_of, task, parts))(kept)
        spent = {
            "calls": calls,
            "rounds": state.ev3_round,
            "work": 1 + assessed / passes / gradients,
        }
        return figures | spent

    return over_seeds(one, seeds, stacked(task.parts, seeds))


def taken(state, method):
    """Gradients that the last round took, and candidates that it scored."""
    past = state.history
    row = (past.rounds - 1) % len(past.adopted)
    took_part = past.valid[row] >= 0
    explorers = took_part[: method.explorers].sum() if method.own else 1
    return past.length[row] * explorers, took_part.sum()


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
            batch = batch_of(parts.train, seed, number, task.batch)

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

    return over_seeds(one, seeds, stacked(task.parts, seeds))()


def soup(task, steps, seeds):
    """Greedy soup (Wortsman et al., 2022) of the ends of the eight: ``[seeds]``."""

    def one(seed, parts, _):
        params = task.init(jax.random.key(seed))

        def end(tx):
            return fit(tx, task.loss, params, parts.train, seed, steps, task.batch)[0]

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

    return over_seeds(one, seeds, stacked(task.parts, seeds))()


def untrained(task, steps, seeds):
    """The initial parameters: ``[seeds]``. A run that ends worse has failed."""
    del steps

    def one(seed, parts, _):
        return figures_of(task, parts, task.init(jax.random.key(seed)))

    return over_seeds(one, seeds, stacked(task.parts, seeds))()


PROCEDURES = {
    "population-based training": population,
    "soup": soup,
    "untrained": untrained,
}


# Cells.


def cell(task, name, steps, seeds):
    """All numbers of a method, or of a procedure, on a task."""
    budget = steps * COUNT
    if name in PROCEDURES:
        found = PROCEDURES[name](task, steps, seeds)
        rows = [tidy(found, seed=seeds).assign(mark=1.0)]
    elif isinstance(METHODS[name], EV3):
        found = ev3_trainer(task, METHODS[name], budget, seeds)()
        figures, at_work = {}, {}
        for kind in ("test", "held_out"):
            figures[kind] = found[kind][:, :-1]
            at_work[f"{kind}{AT_WORK}"] = found.pop(kind)[:, -1]
        rows = [tidy(figures, seed=seeds, mark=MARKS)]
        rows += [tidy(at_work, seed=seeds), tidy(found, seed=seeds)]
    else:
        method = METHODS[name]
        marks = (1.0,) if method.horizon else MARKS
        train = trainer(task, method.make, method.evaluated, budget, marks, seeds)
        axes = {"seed": seeds, "mark": marks, "weights": WEIGHTS}
        rows = [tidy(train(x), **axes).assign(rate=x) for x in method.rates]
    return pd.concat([*rows, tidy({"gradients": budget})])
