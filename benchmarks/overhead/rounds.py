"""What rounds cost: of one step, and of trajectories."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from sklearn.metrics import f1_score

import optax_ev3
from benchmarks import data, models
from benchmarks.overhead.programs import (
    Problem,
    ev3_step,
    inner_optimizers,
    log_likelihood,
    plain_step,
)
from benchmarks.overhead.timing import compile_step, race, ratio_row
from optax_ev3 import explore, metrics


def measure_rounds(settings: Any):
    """Digits, two optimizers, one step a round, batches of 128, MLP 64-128-128-10."""
    x, y = map(jnp.asarray, data.digits())
    rows = np.random.default_rng(0).integers(len(x), size=(2, settings.rounds, 128))
    train, held_out = ((x[index], y[index]) for index in rows)
    problem = Problem(
        models.mlp(64, 128, 128, 10)[0](jax.random.key(0)),
        log_likelihood,
        [],
    )
    adam = optax.adam(1e-3)
    inner = [adam, optax.sgd(0.1)]
    programs = {
        "ev3": ev3_step(problem, inner),
        **{
            f"ev3, {name}": ev3_step(problem, inner, assess_fn=assess_fn)
            for name, assess_fn in macro_f1_assessments().items()
            if re.search(settings.macro_f1, name)
        },
        "adam": plain_step(problem, adam),
    }
    batches = [
        jax.tree.map(lambda array, i=i: array[i], (train, held_out))
        for i in range(settings.rounds)
    ]
    runners = {}
    for label, (step, state) in programs.items():
        jitted = jax.jit(step)

        def from_python(jitted=jitted, state=state):
            carry = problem.params, state
            for batch in batches:
                carry = jitted(*carry, *batch)
            return carry

        def in_scan(carry, step=step):
            return lax.scan(
                lambda c, batch: (step(*c, *batch), None), carry, (train, held_out)
            )[0]

        scanned = jax.jit(in_scan)
        runners[label, "python"] = from_python
        runners[label, "scan"] = lambda scanned=scanned, state=state: scanned(
            (problem.params, state)
        )
    seconds = race(runners, settings)
    return [
        {
            "program": label,
            "loop": loop,
            **{
                key: value / (settings.rounds if key == "milliseconds" else 1)
                for key, value in ratio_row(
                    seconds[label, loop], seconds["adam", loop]
                ).items()
            },
        }
        for label, loop in runners
    ]


def macro_f1_assessments() -> dict[str, Callable[..., Any]]:
    """The same metric, computed on the device and on the host."""

    def outputs(params, held_out):
        x, labels = held_out
        return models.forward(params, x).argmax(-1).astype(jnp.int32), labels

    def figure(samples):
        return lambda params, held_out: metrics.AggregateMetric(
            metrics.macro_f1(10), outputs(params, held_out), samples
        )

    def in_numpy(outputs, weights=None):
        predictions, labels = outputs
        if weights is None:
            weights = np.ones(len(labels))
        right, predicted, wanted = (
            np.bincount(classes, counted, minlength=10)
            for classes, counted in (
                (labels, weights * (predictions == labels)),
                (predictions, weights),
                (labels, weights),
            )
        )
        return (2 * right / np.maximum(predicted + wanted, 1)).mean()

    def in_sklearn(outputs):
        return f1_score(outputs[1], outputs[0], average="macro", zero_division=0.0)

    return {
        "macro F1": figure(0),
        "macro F1, 200 resamples": figure(200),
        "host_metric, NumPy": optax_ev3.host_metric(outputs, in_numpy),
        "host_metric, NumPy, 20 resamples": optax_ev3.host_metric(
            outputs, in_numpy, samples=20
        ),
        "host_metric, scikit-learn": optax_ev3.host_metric(outputs, in_sklearn),
    }


def measure_trajectories(problem: Problem, count: int, settings: Any):
    """Rounds of many calls; every runner makes as many training steps of a branch."""
    inner = inner_optimizers(count)
    length = settings.trajectory
    batch = problem.batches[0]

    def shared_step():
        def step(params, states, train, held_out):
            del held_out
            grads = jax.grad(problem.loss_fn)(params[0], train)
            pairs = [
                tx.update(grads, state, end)
                for tx, state, end in zip(inner, states, params, strict=True)
            ]
            ends = [
                optax.apply_updates(end, update)
                for end, (update, _) in zip(params, pairs, strict=True)
            ]
            return ends, [state for _, state in pairs]

        states = [tx.init(problem.params) for tx in inner]
        return step, states

    def trajectory_step(gradients):
        tx = optax_ev3.ev3(
            inner,
            lambda params, held_out: problem.score_fn(params, held_out),
            loss_fn=lambda params, train: problem.loss_fn(params, train),
            explore=explore.rounds(length, gradients=gradients),
        )
        return plain_step(problem, tx, "train", "held_out")

    def steps_runner(step, state, params):
        call = compile_step(step, (0, 1), params, state, batch, batch).call
        carry = [(jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, state))]

        def run():
            for i in range(length):
                data = problem.batches[i % len(problem.batches)]
                carry[0] = call(*carry[0], data, data)
            return carry[0]

        return run

    many = [problem.params] * count
    assess = jax.jit(lambda params, held_out: problem.score_fn(params, held_out).mean())
    runners = {
        "adam": steps_runner(*plain_step(problem, optax.adam(1e-3)), problem.params),
        "ev3 shared": steps_runner(*trajectory_step("shared"), problem.params),
        "ev3 own": steps_runner(*trajectory_step("own"), problem.params),
        "shared by hand": steps_runner(*shared_step(), many),
        "assessments": lambda: [assess(p, batch) for p in [*many, *many[:2]]],
    }
    for number, tx in enumerate(inner):
        step = plain_step(problem, tx)
        runners[f"alone {number}"] = steps_runner(*step, problem.params)
    seconds = race(runners, settings)
    alone = sum(seconds[f"alone {number}"] for number in range(count))
    parts = {
        "ev3 shared": seconds["shared by hand"] + seconds["assessments"],
        "ev3 own": alone + seconds["assessments"],
    }
    return [
        {
            "program": name,
            "explorers": count,
            "milliseconds": 1e3 * float(np.median(seconds[name])) / length,
            "over_parts": float(np.median(seconds[name] / whole)),
            "over_adam": float(np.median(seconds[name] / seconds["adam"])),
        }
        for name, whole in parts.items()
    ]
