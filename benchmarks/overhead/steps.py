"""What single steps cost: whole ones, updates alone, bookkeeping, sweeps."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_ev3
from benchmarks.overhead.programs import (
    BY_HAND,
    TUNED,
    Problem,
    by_hand_step,
    ev3_step,
    ev3_updates,
    inner_optimizers,
    plain_step,
    plain_updates,
    safe_updates,
)
from benchmarks.overhead.timing import (
    compile_step,
    race,
    ratio_row,
    step_runner,
    update_runner,
)
from optax_ev3 import explore

MODES = ("unroll", "vmap", "map")


def measure_steps(name: str, problem: Problem, count: int, settings: Any):
    inner = inner_optimizers(count)
    programs = {mode: ev3_step(problem, inner, mode) for mode in MODES}
    programs[BY_HAND] = by_hand_step(problem, inner)
    programs[TUNED] = by_hand_step(problem, inner, tuned=True)
    runners, compiled = {}, {}
    batch = problem.batches[0]
    for label, (step, state) in programs.items():
        compiled[label] = compile_step(
            step, (0, 1), problem.params, state, batch, batch
        )
        runners[label] = step_runner(compiled[label].call, problem, state)
    seconds = race(runners, settings)
    return [
        {
            "model": name,
            "explorers": count,
            "program": label,
            **ratio_row(seconds[label], seconds[BY_HAND]),
            "over_tuned": float(np.median(seconds[label] / seconds[TUNED])),
            "compile_seconds": compiled[label].seconds,
            "peak_mib": compiled[label].peak_bytes / 2**20,
        }
        for label in programs
    ]


def measure_updates(name: str, problem: Problem, count: int, settings: Any):
    inner = inner_optimizers(count)
    grads = jax.grad(problem.loss_fn)(problem.params, problem.batches[0])
    programs = {
        "ev3": ev3_updates(problem, inner),
        "safe by hand": safe_updates(problem, inner),
        "updates alone": plain_updates(problem, inner),
    }
    runners = {}
    for label, (step, state) in programs.items():
        compiled = compile_step(step, (0,), state, grads, problem.params)
        runners[label] = update_runner(compiled.call, grads, problem.params, state)
    seconds = race(runners, settings)
    return [
        {
            "model": name,
            "explorers": count,
            "program": label,
            **ratio_row(seconds[label], seconds["updates alone"]),
        }
        for label in programs
    ]


def measure_bookkeeping(problem: Problem, settings: Any):
    """Evidence, rule and history alone, over a step that needs them."""
    count, objectives, history = settings.booked
    names = [f"objective {i}" for i in range(objectives)]

    def assess_fn(params, held_out):
        # All the same function: it is computed once, and costs the step nothing more.
        return dict.fromkeys(names, problem.score_fn(params, held_out))

    def given(params, held_out):
        return dict.fromkeys(names, held_out + params)

    def transformation(assess):
        return optax_ev3.ev3(
            [optax.adam(rate) for rate in np.geomspace(1e-5, 1e-2, count)],
            assess,
            adapt=optax_ev3.adapt.weighted(
                dict.fromkeys(names, 1.0), targets=dict.fromkeys(names, 1.0)
            ),
            history_length=history,
        )

    whole, alone = transformation(assess_fn), transformation(given)

    step, _ = plain_step(problem, whole, "held_out")

    def round_alone(params, state, train, held_out):
        updates, state = alone.update(train, state, params, held_out=held_out)
        return optax.apply_updates(params, updates), state

    params, batch = problem.params, problem.batches[0]
    call = compile_step(step, (0, 1), params, whole.init(params), batch, batch).call
    scores = jax.random.normal(jax.random.key(0), [settings.batch])
    small = jnp.zeros([]), alone.init(jnp.zeros([]))
    small_call = compile_step(round_alone, (0, 1), *small, scores[0], scores).call
    carry = [small]

    def run_alone():
        carry[0] = small_call(*carry[0], scores[0], scores)
        return carry[0]

    runners = {
        "whole step": step_runner(call, problem, whole.init(params)),
        "bookkeeping": run_alone,
    }
    seconds = race(runners, settings._replace(sample_seconds=0.0))
    return [
        {"program": name, **ratio_row(seconds[name], seconds["whole step"])}
        for name in runners
    ]


def measure_sweeps(problem: Problem, settings: Any):
    """A sweep over few and over many learning rates; nothing is run."""
    rows = []
    copy = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params))
    for length in (1, settings.trajectory):
        first = None
        for count in settings.swept:
            rates = np.geomspace(1e-5, 1e-1, count).tolist()
            step, state = sweep_step(problem, rates, length)
            batch = problem.batches[0]
            compiled = compile_step(step, (0, 1), problem.params, state, batch, batch)
            first = first or (compiled, count)
            more = compiled.peak_bytes - first[0].peak_bytes
            rows.append(
                {
                    "trajectory": length,
                    "explorers": count,
                    "compile_seconds": compiled.seconds,
                    "ratio": compiled.seconds / first[0].seconds,
                    "peak_mib": compiled.peak_bytes / 2**20,
                    "copies_each": more / copy / max(1, count - first[1]),
                }
            )
    return rows


def sweep_step(problem: Problem, rates: Sequence[float], length: int):
    tx = optax_ev3.ev3(
        [optax_ev3.sweep(optax.adam, learning_rate=rates)],
        lambda params, held_out: problem.score_fn(params, held_out),
        explore=explore.rounds(length) if length > 1 else None,
    )
    return plain_step(problem, tx, "held_out")
