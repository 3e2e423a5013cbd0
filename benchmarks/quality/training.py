"""How methods are run on a task, and what they would hand over after how much work.

Every run is followed by its *incumbent*: of the parameters that are looked at, at
:data:`MARKS` and before the first step, those with the best score of all held-out
examples so far. So all methods stop early, by the same data, and none ends worse than
it began by more than these data can tell. EV3 hands over what it calls its best itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.data import stacked
from benchmarks.quality.methods import looked_at
from benchmarks.training import batch_of, over_seeds

DECAY = 0.99  # Of exponential averages.
# Successive halving: of how many the best go on, after which parts of all gradients
# each of them has taken.
HALVING = ((8, 1 / 32), (4, 3 / 32), (2, 7 / 32), (1, 15 / 32))
# Parts of a run after which figures are taken.
MARKS = tuple(
    sorted(
        {
            *(2.0 ** (k / 3 - 6) for k in range(12)),
            *(k / 20 for k in range(5, 21)),
            *(part for _, part in HALVING),
        }
    )
)
FIGURES = ("test", "held_out")


def figures_of(task, parts, params):
    return jnp.stack(
        [task.test(params, parts.test), task.held_out(params, parts.held_out)]
    )


def value_and_grad(task, params, batch):
    """The loss, its gradient, and what a merge needs."""
    if task.merge is None:
        return *jax.value_and_grad(task.loss)(params, batch), None
    (value, aux), grads = jax.value_and_grad(task.loss, has_aux=True)(params, batch)
    return value, grads, aux


def applied(task, params, updates, aux):
    """After a step, with new running statistics where there are any."""
    params = optax.apply_updates(params, updates)
    return params if task.merge is None else task.merge(params, aux)


def trainer(task, make, evaluated, steps, seeds):
    """A function of a learning rate to figures ``[seeds, 1 + marks, 2 kinds, 2]``.

    The first are those of the initial parameters. Kinds are the parameters, and the
    exponential average of their course; the last axis is :data:`FIGURES`.
    """
    marks = jnp.asarray([max(1, round(steps * part)) for part in MARKS])

    def one(seed, parts, rate):
        tx = optax.with_extra_args_support(make(rate, steps))
        params = task.init(jax.random.key(seed))
        both = functools.partial(_both, task, parts)

        def step(carry, number):
            params, state, average, found = carry
            batch = batch_of(parts.train, seed, number, task.batch)
            value, grads, aux = value_and_grad(task, params, batch)
            updates, state = tx.update(grads, state, params, value=value)
            params = applied(task, params, updates, aux)
            shown = evaluated(params, state)
            if task.merge is not None:
                # Of averages that an optimizer keeps, statistics are none of its parts.
                shown = task.merge(shown, aux)
            decay = jnp.minimum(DECAY, (1 + number) / (10 + number))
            average = optax.incremental_update(shown, average, 1 - decay)
            here = number + 1 == marks
            found = _put(found, here, lambda: both(shown, average))
            return (params, state, average, found), None

        start = both(params, params)
        found = jnp.zeros([len(marks), *start.shape])
        carry = params, tx.init(params), params, found
        (*_, found), _ = jax.lax.scan(step, carry, jnp.arange(steps))
        return jnp.concatenate([start[None], found])

    return over_seeds(one, seeds, stacked(task.parts, seeds))


def _both(task, parts, shown, average):
    return jnp.stack([figures_of(task, parts, params) for params in (shown, average)])


def _put(found, here, figures):
    """New figures where ``here [marks]``; they are computed where there is any."""

    def put():
        mask = here.reshape(-1, *[1] * (found.ndim - 1))
        return jnp.where(mask, figures(), found)

    return jax.lax.cond(here.any(), put, lambda: found)


def ev3_trainer(task, method, budget, seeds):
    """A function without arguments to figures of EV3 and to what they took.

    Explorers may be paused, so that what a call takes is counted: it goes on until the
    gradients of all explorers are as many as the budget. Figures ``[seeds, 1 + marks +
    1, 2]`` are those of the initial parameters, of the last round whose end lies within
    each part of the budget, assessments counted, and, as the last, of the last round
    within the budget by gradients alone.
    """
    limits = jnp.asarray([*(budget * part for part in MARKS), budget])
    passes = 3.0 * task.batch  # Of a gradient: forward passes of single examples.

    def one(seed, parts, _):
        tx = method.make(task, parts.held_out, seed, budget)
        params = task.init(jax.random.key(seed))
        length = method.length(task, parts.held_out, budget)
        examples = looked_at(task, parts.held_out, length)
        figures = functools.partial(figures_of, task, parts)

        def call(carry):
            params, state, number, gradients, assessed, shown, found = carry
            batch = batch_of(parts.train, seed, number, task.batch)
            # Not computed where nothing uses it: explorers may take their own.
            _, grads, aux = value_and_grad(task, params, batch)
            updates, new = tx.update(grads, state, params, batch=batch, aux=aux)
            params = optax.apply_updates(params, updates)  # Explorers have merged.
            ended = new.ev3_round > state.ev3_round
            took, candidates = taken(new, method)
            before = _work(gradients, assessed / passes, len(limits))
            gradients += jnp.where(ended, took, 0)
            assessed += jnp.where(ended, candidates * examples, 0)
            after = _work(gradients, assessed / passes, len(limits))
            # The round before this one was the last within these.
            crossed = (before <= limits) & (limits < after)
            found = _put(found, crossed, lambda: figures(shown))
            shown = optax.tree.where(ended, method.evaluated(params, new), shown)
            return params, new, number + 1, gradients, assessed, shown, found

        start = figures(params)
        found = jnp.broadcast_to(start, [len(limits), *start.shape])
        carry = params, tx.init(params), 0, 0, 0.0, params, found
        carry = jax.lax.while_loop(lambda carry: carry[3] <= budget, call, carry)
        _, state, calls, gradients, assessed, _, found = carry
        spent = {
            "calls": calls,
            "rounds": state.ev3_round,
            "work": 1 + assessed / passes / gradients,
        }
        return jnp.concatenate([start[None], found]), spent

    return over_seeds(one, seeds, stacked(task.parts, seeds))


def _work(gradients, assessments, count):
    """With assessments for each limit but the last."""
    return jnp.full(count, gradients + assessments).at[-1].set(gradients)


def taken(state, method):
    """Gradients that the last round took, and candidates that it scored."""
    past = state.history
    row = (past.rounds - 1) % len(past.adopted)
    took_part = past.valid[row] >= 0
    explorers = took_part[: method.explorers].sum() if method.own else 1
    return past.length[row] * explorers, took_part.sum()


# From figures to incumbents, in NumPy. Axes: seeds, marks, and FIGURES as the last.


def incumbents(figures):
    """The best so far by held-out scores ``[seeds, marks, 2]``, of the same shape."""
    scores = np.nan_to_num(figures[..., 1], nan=-np.inf)
    best = np.maximum.accumulate(scores, axis=1)
    # Where the best so far was first reached.
    is_new = np.diff(best, axis=1, prepend=-np.inf) > 0
    where = np.where(is_new, np.arange(scores.shape[1]), 0)
    where = np.maximum.accumulate(where, axis=1)
    return np.take_along_axis(figures, where[..., None], axis=1)


def pooled(runs):
    """The best of several runs side by side, at each mark, by held-out scores.

    Args:
      runs: Incumbents ``[runs, seeds, marks, 2]``.
    """
    best = np.nan_to_num(runs[..., 1], nan=-np.inf).argmax(0)
    return np.take_along_axis(runs, best[None, ..., None], axis=0)[0]
