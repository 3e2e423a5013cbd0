"""What steps with convolutions cost, in a race and without."""

import functools
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_ev3
from benchmarks.overhead.programs import Problem, conv_problem
from benchmarks.overhead.timing import compile_step, race, ratio_row
from optax_ev3 import adapt as rules
from optax_ev3 import explore


def measure_convolutions(settings: Any):
    """Rounds with and without a race; who is paused is the same in all repeats."""
    batch, channels, depth = settings.convolved
    settings = settings._replace(batch=batch, channels=(channels,) * depth)
    problem = conv_problem(settings, stride=1)
    runners = {"adam": rounds_runner(problem, optax.adam(1e-3), settings, 1)}
    paused = {"adam": 0.0}
    racing = explore.Racing(patience=2, window=8)
    contests = {
        "no race": {},
        "none paused": {"racing": racing, "adapt": wins_in_turn(2)},
        "one paused": {"racing": racing, "adapt": wins_in_turn(1)},
    }
    for name, how in convolution_strategies(problem, settings).items():
        if not re.search(settings.strategies, name):
            continue
        for label, more in contests.items():
            kwargs = {**how, **more}
            strategy, racing = kwargs.pop("strategy"), kwargs.pop("racing", None)
            if racing and name not in RACES:
                continue
            strategy = strategy(racing=racing) if racing else strategy()
            tx = optax_ev3.ev3(assess_fn=problem.score_fn, explore=strategy, **kwargs)
            length = 1 if name == "one step" else settings.trajectory
            run = rounds_runner(problem, tx, settings, 5 * length)
            runners[f"{name}, {label}"] = run
            rounds = math.ceil(settings.trajectory / length)
            means = optax_ev3.history(run()[1])["mean"][-rounds:, :2]
            paused[f"{name}, {label}"] = float(np.isnan(means).sum(axis=1).mean())
    seconds = race(runners, settings._replace(sample_seconds=0.0), time.process_time)
    rows = []
    for name in runners:
        row = ratio_row(seconds[name] / settings.trajectory, seconds["adam"])
        for key in ("ratio", "ratio_25", "ratio_75"):
            row[key] *= settings.trajectory
        rows.append({"program": name, "paused": paused[name], **row})
    return rows


RACES = ("branches", "recommended")  # Rounds from the same parameters do not.


def convolution_strategies(problem: Problem, settings: Any) -> dict[str, Any]:
    """By name, the arguments of EV3 with two Adams, and what makes its strategy."""
    adams = [optax.adam(1e-3), optax.adam(1e-6)]  # The second never catches up.
    own = [optax_ev3.explorer(tx, problem.loss_fn) for tx in adams]
    rounds = functools.partial(explore.rounds, settings.trajectory)
    branches = functools.partial(explore.branches, settings.trajectory)
    recommended = functools.partial(
        branches,
        restart=explore.never(inner_state="copy"),
        averages=[explore.trajectory_average(), explore.branch_average()],
    )
    return {
        "one step": {
            "inner": adams,
            "strategy": explore.one_step,
            "adapt": rules.confident(),
        },
        "shared gradients": {"inner": adams, "strategy": rounds},
        "own gradients": {
            "inner": adams,
            "strategy": rounds,
            "loss_fn": problem.loss_fn,
        },
        "losses of their own": {"inner": own, "strategy": rounds},
        "branches": {"inner": own, "strategy": branches},
        "recommended": {
            "inner": own,
            "strategy": recommended,
            "adapt": rules.greedy(),
        },
    }


def wins_in_turn(count: int) -> rules.Rule:
    """A rule that adopts the first explorers, one after the other."""

    def decide(evidence, rounds, key):
        del evidence, key
        return rules.Decision(rounds % count, jnp.asarray(False)), rounds + 1

    return rules.Rule(lambda explorers: jnp.zeros([], jnp.int32), decide)


def rounds_runner(problem: Problem, tx, settings: Any, warm: int):
    """Runs the same steps again and again, those after the first ``warm`` ones."""
    takes_extra = isinstance(tx, optax.GradientTransformationExtraArgs)

    def step(params, state, batch):
        grads = jax.grad(problem.loss_fn)(params, batch)
        extra = {"batch": batch} if takes_extra else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    batches = problem.batches
    args = problem.params, tx.init(problem.params), batches[0]
    call = compile_step(step, (), *args).call
    carry = args[:2]
    for i in range(warm):
        carry = call(*carry, batches[i % len(batches)])

    def run():
        now = carry
        for i in range(settings.trajectory):
            now = call(*now, batches[i % len(batches)])
        return now

    return run
