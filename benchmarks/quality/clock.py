"""How long a unit of work takes: EV3 over AdamW with cosine decay, in one run.

Work is counted in gradients; EV3 holds several copies and looks at all of them, which
no gradient counts. Each program runs the same number of calls, compiled before, in
turns with the others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.overhead.timing import race, ratio_row
from benchmarks.quality.methods import BASELINE, EV3S, MAIN, RIVALS, looked_at
from benchmarks.quality.training import applied, taken, value_and_grad
from benchmarks.results import tidy
from benchmarks.training import batch_of

CALLS = 200


class Settings(NamedTuple):
    """How long is measured."""

    repeats: int = 6
    sample_seconds: float = 0.5


def seconds(task, settings=None):
    """Seconds for a unit of work, by method: a number for each repeat."""
    settings = settings or Settings()
    parts = jax.tree.map(jnp.asarray, task.parts(0))
    work, runners = {}, {}
    for name in (BASELINE, *MAIN):
        run = jax.jit(_program(task, parts, name))
        work[name] = float(run())  # Compiles, too.
        runners[name] = run
    found = race(runners, settings)
    return {name: found[name] / work[name] for name in found}


def _program(task, parts, name):
    """A function without arguments that trains, and returns the work that it did."""
    if name in EV3S:
        method = EV3S[name]
        # A training that is longer than what is measured of it.
        budget = 3 * CALLS
        tx = method.make(task, parts.held_out, 0, budget)
        length = method.length(task, parts.held_out, budget)
        # Of a candidate, in gradients.
        unit = looked_at(task, parts.held_out, length) / (3 * task.batch)
    else:
        method, rival = None, RIVALS[name]
        tx = optax.with_extra_args_support(rival.make(rival.default, CALLS))

    def step(carry, number):
        params, state, work = carry
        batch = batch_of(parts.train, 0, number, task.batch)
        _, grads, aux = value_and_grad(task, params, batch)
        updates, new = tx.update(grads, state, params, batch=batch, aux=aux)
        if method is None:
            return (applied(task, params, updates, aux), new, work + 1.0), None
        params = optax.apply_updates(params, updates)  # Explorers have merged.
        took, candidates = taken(new, method)
        ended = new.ev3_round > state.ev3_round
        work += jnp.where(ended, took + candidates * unit, 0)
        return (params, new, work), None

    def run():
        params = task.init(jax.random.key(0))
        start = params, tx.init(params), 0.0
        (params, _, work), _ = jax.lax.scan(step, start, jnp.arange(CALLS))
        # So that nothing is left out that training needs.
        return work + 0.0 * optax.tree.sum(params)

    return run


def cell(task):
    """Quartiles of EV3's seconds for a unit of work over those of the baseline."""
    found = seconds(task)
    rows = {}
    for name in MAIN:
        row = ratio_row(found[name], found[BASELINE])
        rows |= {
            f"{name}: {key}": row[key] for key in ("ratio_25", "ratio", "ratio_75")
        }
    return tidy(rows)
