"""How programs are compiled, and timed in turn."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.overhead.programs import Problem


class Compiled(NamedTuple):
    call: Callable[..., Any]
    seconds: float
    peak_bytes: int


def compile_step(step, donated: tuple[int, ...], *args) -> Compiled:
    """Compiles, with the seconds that tracing and compiling took."""
    jitted = jax.jit(step, donate_argnums=donated)
    start = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    peak = (
        memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        + memory.argument_size_in_bytes
        - memory.alias_size_in_bytes
    )
    # Called as in a training loop: what is compiled ahead of time takes longer to call.
    return Compiled(jitted, seconds, peak)


def race(
    runners: dict[str, Callable[[], Any]],
    settings: Any,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Seconds a call of each runner in each repeat: all in turn, in changing order."""
    single = {}
    for name, run in runners.items():
        jax.block_until_ready(run())
        start = clock()
        jax.block_until_ready(run())
        single[name] = clock() - start
    calls = max(2, math.ceil(settings.sample_seconds / min(single.values())))
    seconds = {name: np.empty(settings.repeats) for name in runners}
    order = list(runners)
    for repeat in range(settings.repeats):
        for name in order if repeat % 2 else reversed(order):
            run = runners[name]
            start = clock()
            for _ in range(calls):
                out = run()
            jax.block_until_ready(out)
            seconds[name][repeat] = (clock() - start) / calls
        if repeat % 2:  # Both directions first, then another one leads.
            order = [*order[1:], order[0]]
    return seconds


def ratio_row(seconds: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(seconds / reference, [25, 50, 75])
    return {
        "milliseconds": 1e3 * float(np.median(seconds)),
        "ratio": float(median),
        "ratio_25": float(low),
        "ratio_75": float(high),
    }


def step_runner(call, problem: Problem, state):
    """Runs a step again and again, each time on other batches."""
    carry = [(jax.tree.map(jnp.copy, problem.params), state)]
    count = len(problem.batches)
    position = [0]

    def run():
        train = problem.batches[position[0] % count]
        held_out = problem.batches[(position[0] + count // 2) % count]
        position[0] += 1
        carry[0] = call(*carry[0], train, held_out)
        return carry[0]

    return run


def update_runner(call, grads, params, state):
    carry = [state]

    def run():
        carry[0], update = call(carry[0], grads, params)
        return carry[0], update

    return run
