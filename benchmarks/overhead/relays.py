"""What a call costs in a relay, over a plain step of the same optimizer."""

import time
from typing import Any

import numpy as np
import optax

import optax_ev3
from benchmarks.overhead.programs import Problem, plain_step
from benchmarks.overhead.timing import compile_step, race, ratio_row, step_runner
from optax_ev3 import explore

LENGTH = 25


def measure_relays(name: str, problem: Problem, settings: Any):
    """Whole turns of Adams, after the first ones, their assessments included."""
    programs = {"adam": optax.adam(1e-3)}
    kinds = [("relay", explore.relay(LENGTH), count) for count in settings.relays]
    for kind, strategy, count in [*kinds, ("one step", explore.one_step(), 2)]:
        rates = np.geomspace(1e-3, 1e-4, count)
        programs[f"{kind} of {count}"] = optax_ev3.ev3(
            [optax.adam(float(rate)) for rate in rates],
            lambda params, held_out: problem.score_fn(params, held_out),
            explore=strategy,
        )
    runners, compiled = {}, {}
    batch = problem.batches[0]
    for label, tx in programs.items():
        step, state = plain_step(problem, tx, "held_out")
        found = compile_step(step, (0, 1), problem.params, state, batch, batch)
        compiled[label] = found
        run = step_runner(found.call, problem, state)
        for _ in range(settings.relay_first):
            run()

        def turn(run=run):
            for _ in range(LENGTH):
                out = run()
            return out

        runners[label] = turn
    seconds = race(runners, settings._replace(sample_seconds=0.0), time.process_time)
    return [
        {
            "model": name,
            "program": label,
            **ratio_row(seconds[label], seconds["adam"]),
            "compile_seconds": compiled[label].seconds,
            "peak_mib": compiled[label].peak_bytes / 2**20,
        }
        for label in programs
    ]
