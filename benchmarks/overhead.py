"""What EV3 costs beyond the sum of its parts.

    python benchmarks/overhead.py [--quick] [--json PATH] [--part NAME ...]

steps: one jitted EV3 step over a step written by hand that does the same work and
  nothing more, as one would write it (ratio) and tuned for memory traffic (over_tuned);
  compile seconds and the compiler's peak memory of all.
updates: the assessments taken away, K inner updates with all of EV3's bookkeeping over
  the K updates alone; beside them the least that safety costs, written by hand: check
  the updates, hold the states, select one update, keep stable.
rounds: milliseconds a round in a small setting, beside one Adam step; assessed by
  log-likelihoods, and by macro F1 on the device and on the host (NumPy, scikit-learn).
trajectories: a training step with trajectories of 20, averaged over whole rounds, over
  what its parts cost (K jitted training steps one by one, or one gradient and K
  updates, and a 20th of K + 2 assessments), and over one Adam step.
sweeps: compile seconds and the compiler's peak memory of a sweep over 64 learning
  rates, over those of 2.
bookkeeping: a whole round on a model of one parameter, whose scores are given, over a
  step of the MLP: 16 explorers, 4 objectives with weights that move, a history of 256.
convolutions: CPU time of a step of two Adams on three convolutions, averaged over a
  round, over that of a step of one Adam: every strategy, without a race, in a race in
  which no explorer is paused, and with one of the two paused ("paused": how many were).

Programs that are compared run in turn within every repeat, in changing order, and each
ratio is taken within a repeat: load from outside hits both sides of it alike. Tables
give the median over the repeats, and the quartiles.
"""

import functools
import itertools
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax import lax

import optax_ev3
from optax_ev3 import adapt as rules
from optax_ev3 import combine, explore, metrics

PARTS = (
    "steps",
    "updates",
    "rounds",
    "trajectories",
    "sweeps",
    "bookkeeping",
    "convolutions",
)
MODES = ("unroll", "vmap", "map")
BY_HAND, TUNED = "by hand", "by hand, tuned"
TARGETS = {"steps": 1.05, "updates": 1.25}

_QUICK = flags.DEFINE_bool("quick", False, "Tiny models and few repeats: a test.")
_REPEATS = flags.DEFINE_integer("repeats", 40, "Repeats of each measurement.", 2)
_PARTS = flags.DEFINE_multi_enum("part", list(PARTS), list(PARTS), "Which; all.")
_JSON = flags.DEFINE_string("json", None, "Write all figures to this file.")


class Settings(NamedTuple):
    repeats: int = 40
    sample_seconds: float = 0.06
    explorers: tuple[int, ...] = (2, 4, 8)
    batch: int = 256
    mlp: tuple[int, ...] = (784, 784, 512, 10)
    image: tuple[int, int, int] = (16, 16, 3)
    channels: tuple[int, ...] = (16, 32, 64)
    rounds: int = 100
    macro_f1: str = ""  # which of these assessments, as a pattern
    trajectory: int = 20
    swept: tuple[int, int] = (2, 64)
    booked: tuple[int, int, int] = (16, 4, 256)  # explorers, objectives, history
    convolved: tuple[int, int, int] = (50, 8, 3)  # batch, channels, convolutions
    strategies: str = ""  # which of them with convolutions, as a pattern


QUICK = Settings(
    repeats=3,
    sample_seconds=0.0,
    explorers=(2,),
    batch=16,
    mlp=(16, 16, 10),
    image=(4, 4, 1),
    channels=(4,),
    rounds=5,
    macro_f1="20 resamples",
    trajectory=3,
    swept=(2, 4),
    booked=(2, 2, 8),
    convolved=(4, 2, 1),
    strategies="^recommended",
)


# Models and data.


class Problem(NamedTuple):
    """A model, as parameters and a score for each example, and batches of data."""

    params: Any
    score_fn: Callable[[Any, Any], jax.Array]
    batches: list[Any]

    def loss_fn(self, params, batch):
        return -self.score_fn(params, batch).mean()


def mlp_problem(settings: Settings) -> Problem:
    return Problem(
        mlp_params(settings.mlp),
        lambda params, batch: log_likelihood(mlp(params, batch[0]), batch[1]),
        noisy_batches((settings.mlp[0],), settings.batch),
    )


def conv_problem(settings: Settings, stride: int = 2) -> Problem:
    rng = np.random.default_rng(0)
    sizes = [settings.image[2], *settings.channels]
    kernels = [
        jnp.asarray(rng.normal(0, (2 / (9 * a)) ** 0.5, (3, 3, a, b)), jnp.float32)
        for a, b in itertools.pairwise(sizes)
    ]
    side = math.ceil(settings.image[0] / stride ** len(kernels))
    params = {"conv": kernels, "dense": mlp_params((side * side * sizes[-1], 10))}

    def logits(params, x):
        for kernel in params["conv"]:
            x = lax.conv_general_dilated(
                x,
                kernel,
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x)
        return mlp(params["dense"], x.reshape(x.shape[0], -1))

    return Problem(
        params,
        lambda params, batch: log_likelihood(logits(params, batch[0]), batch[1]),
        noisy_batches(settings.image, settings.batch),
    )


def mlp_params(sizes: Sequence[int]) -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(0)
    return [
        {
            "w": jnp.asarray(rng.normal(0, (2 / a) ** 0.5, (a, b)), jnp.float32),
            "b": jnp.zeros([b], jnp.float32),
        }
        for a, b in itertools.pairwise(sizes)
    ]


def mlp(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    return x @ params[-1]["w"] + params[-1]["b"][None]


def log_likelihood(logits, labels):
    return -optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def noisy_batches(shape: tuple[int, ...], size: int, count: int = 16) -> list[Any]:
    """A linear teacher with noise: losses fall, and stay away from zero."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(count, size, *shape)).astype(np.float32)
    flat = x.reshape(count, size, -1)
    clean = flat @ rng.normal(size=(flat.shape[-1], 10)) / flat.shape[-1] ** 0.5
    y = np.argmax(clean + rng.gumbel(size=clean.shape), axis=-1)
    return [(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(x, y, strict=True)]


def inner_optimizers(count: int) -> list[optax.GradientTransformation]:
    """Adams, SGDs with momentum and RMSProps, each with a rate of its own."""
    kinds = (
        optax.adam(1e-3),
        optax.sgd(0.03, momentum=0.9),
        optax.adam(3e-4),
        optax.rmsprop(1e-3),
        optax.sgd(0.01, momentum=0.9, nesterov=True),
        optax.adam(2e-3),
        optax.rmsprop(3e-4),
        optax.sgd(0.003, momentum=0.9),
    )
    return list(kinds[:count])


# The programs. A step maps (params, state, train batch, held-out batch) to (params,
# state), and makes use of the buffers of the first two.


def ev3_step(problem: Problem, inner, mode: str = "unroll", adapt=None, assess_fn=None):
    """The step with EV3, and its first state."""
    tx = optax_ev3.ev3(
        inner,
        assess_fn or (lambda params, held_out: problem.score_fn(params, held_out)),
        adapt=adapt,
        assess_mode=mode,
    )

    def step(params, state, train, held_out):
        grads = jax.grad(problem.loss_fn)(params, train)
        updates, state = tx.update(grads, state, params, held_out=held_out)
        return optax.apply_updates(params, updates), state

    return step, tx.init(problem.params)


def by_hand_step(problem: Problem, inner, tuned: bool = False):
    """The same work and nothing more: no rule, no record, no checks of arguments.

    Tuned, a new inner state is not kept while its update is checked but computed again,
    rows are checked by their maximum, and a switch selects the update.
    """

    def step(params, state, train, held_out):
        opt_states, stable = state
        grads = jax.grad(problem.loss_fn)(params, train)
        updates, held, finite = [], [], []
        for tx, old in zip(inner, opt_states, strict=True):
            update, new = tx.update(grads, old, params)
            ok = (finite_rows if tuned else all_finite)(update)
            if tuned:
                zeros = jax.tree.map(jnp.zeros_like, grads)
                new = tx.update(where(ok, grads, zeros), old, params)[1]
            updates.append(update)
            held.append(where(ok, new, old))
            finite.append(ok)
        candidates = [optax.apply_updates(params, update) for update in updates]
        candidates += [params, stable]
        means = jnp.stack([problem.score_fn(c, held_out).mean() for c in candidates])
        finite = jnp.stack([*finite, True, True]) & jnp.isfinite(means)
        means = jnp.where(finite, means, -jnp.inf)
        best = jnp.argmax(means)
        stay = jax.tree.map(jnp.zeros_like, params)
        back = jax.tree.map(jnp.subtract, stable, params)
        moves = [*updates, stay, back]
        if tuned:
            update = lax.switch(best, [lambda move=move: move for move in moves])
        else:
            update = jax.tree.map(lambda *leaves: lax.select_n(best, *leaves), *moves)
        params = optax.apply_updates(params, update)
        stable = where(means[best] > means[-1], params, stable)
        return params, (held, stable)

    stable = jax.tree.map(jnp.copy, problem.params)
    return step, ([tx.init(problem.params) for tx in inner], stable)


def ev3_updates(problem: Problem, inner):
    """EV3 with nothing to assess: (state, grads, params) -> (update, state)."""
    size = len(problem.batches[0][1])
    tx = optax_ev3.ev3(inner, lambda params: jnp.zeros([size]))

    def step(state, grads, params):
        update, state = tx.update(grads, state, params)
        return state, update

    return step, tx.init(problem.params)


def safe_updates(problem: Problem, inner):
    """The inner updates, checked and held, one selected: what safety costs by hand."""

    def step(state, grads, params):
        opt_states, stable, calls = state
        zeros = jax.tree.map(jnp.zeros_like, grads)
        updates, held = [], []
        finite = [True, True]
        for number, (tx, old) in enumerate(zip(inner, opt_states, strict=True)):
            update, _ = tx.update(grads, old, params)
            ok = finite_rows(update)
            new = tx.update(where(ok, grads, zeros), old, params)[1]
            updates.append(update)
            held.append(where(ok, new, old))
            finite.insert(number, ok)
        back = functools.partial(jax.tree.map, jnp.subtract, stable, params)
        stay = functools.partial(jax.tree.map, jnp.zeros_like, params)
        moves = [*(lambda move=move: move for move in updates), stay, back]
        best = jnp.argmax(jnp.roll(jnp.stack(finite), calls))
        update = lax.switch(best, moves)
        stable = where(calls % 16 == 0, optax.apply_updates(params, update), stable)
        return (held, stable, calls + 1), update

    stable = jax.tree.map(jnp.copy, problem.params)
    states = [tx.init(problem.params) for tx in inner]
    return step, (states, stable, jnp.zeros([], jnp.int32))


def plain_updates(problem: Problem, inner):
    """The inner updates alone, with the same arguments."""

    def step(states, grads, params):
        pairs = [
            tx.update(grads, state, params)
            for tx, state in zip(inner, states, strict=True)
        ]
        return [state for _, state in pairs], [update for update, _ in pairs]

    return step, [tx.init(problem.params) for tx in inner]


def all_finite(tree):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def finite_rows(tree):
    rows = [jnp.abs(leaf).max(axis=-1) for leaf in jax.tree.leaves(tree)]
    return all_finite(rows)


def where(condition, new, old):
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


# Measuring.


class Compiled(NamedTuple):
    call: Callable[..., Any]
    seconds: float
    peak_bytes: int


def compile_step(step, donated: tuple[int, ...], *args) -> Compiled:
    """Compiles, with the seconds that tracing and compiling took."""
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=donated).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    peak = (
        memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        + memory.argument_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return Compiled(compiled, seconds, peak)


def race(
    runners: dict[str, Callable[[], Any]],
    settings: Settings,
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


def measure_steps(name: str, problem: Problem, count: int, settings: Settings):
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


def measure_updates(name: str, problem: Problem, count: int, settings: Settings):
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


def measure_rounds(settings: Settings):
    """Digits, two optimizers, one step a round, batches of 128, MLP 64-128-128-10."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    x = jnp.asarray(images / 16.0, jnp.float32)
    y = jnp.asarray(labels, jnp.int32)
    rows = np.random.default_rng(0).integers(len(x), size=(2, settings.rounds, 128))
    train, held_out = ((x[index], y[index]) for index in rows)
    problem = Problem(
        mlp_params((64, 128, 128, 10)),
        lambda params, batch: log_likelihood(mlp(params, batch[0]), batch[1]),
        [],
    )
    adam = optax.adam(1e-3)

    def adam_step(params, state, train, held_out):
        del held_out
        grads = jax.grad(problem.loss_fn)(params, train)
        updates, state = adam.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    inner = [adam, optax.sgd(0.1)]
    programs = {
        "ev3": ev3_step(problem, inner),
        **{
            f"ev3, {name}": ev3_step(problem, inner, assess_fn=assess_fn)
            for name, assess_fn in macro_f1_assessments().items()
            if re.search(settings.macro_f1, name)
        },
        "adam": (adam_step, adam.init(problem.params)),
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
    from sklearn.metrics import f1_score

    def outputs(params, held_out):
        x, labels = held_out
        return mlp(params, x).argmax(-1).astype(jnp.int32), labels

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


def measure_trajectories(problem: Problem, count: int, settings: Settings):
    """Rounds of many calls; every runner makes as many training steps of a branch."""
    inner = inner_optimizers(count)
    length = settings.trajectory
    batch = problem.batches[0]

    def training_step(tx):
        def step(params, state, train, held_out):
            del held_out
            grads = jax.grad(problem.loss_fn)(params, train)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step, tx.init(problem.params)

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
            trajectory_length=length,
            gradients=gradients,
        )

        def step(params, state, train, held_out):
            grads = jax.grad(problem.loss_fn)(params, train)
            updates, state = tx.update(
                grads, state, params, train=train, held_out=held_out
            )
            return optax.apply_updates(params, updates), state

        return step, tx.init(problem.params)

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
        "adam": steps_runner(*training_step(optax.adam(1e-3)), problem.params),
        "ev3 shared": steps_runner(*trajectory_step("shared"), problem.params),
        "ev3 own": steps_runner(*trajectory_step("own"), problem.params),
        "shared by hand": steps_runner(*shared_step(), many),
        "assessments": lambda: [assess(p, batch) for p in [*many, *many[:2]]],
    }
    for number, tx in enumerate(inner):
        runners[f"alone {number}"] = steps_runner(*training_step(tx), problem.params)
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


def measure_sweeps(problem: Problem, settings: Settings):
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
        trajectory_length=length,
    )

    def step(params, state, train, held_out):
        grads = jax.grad(problem.loss_fn)(params, train)
        updates, state = tx.update(grads, state, params, held_out=held_out)
        return optax.apply_updates(params, updates), state

    return step, tx.init(problem.params)


def measure_bookkeeping(problem: Problem, settings: Settings):
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

    def step(params, state, train, held_out):
        grads = jax.grad(problem.loss_fn)(params, train)
        updates, state = whole.update(grads, state, params, held_out=held_out)
        return optax.apply_updates(params, updates), state

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


def measure_convolutions(settings: Settings):
    """Rounds with and without a race; who is paused is the same in all repeats."""
    batch, channels, depth = settings.convolved
    settings = settings._replace(batch=batch, channels=(channels,) * depth)
    problem = conv_problem(settings, stride=1)
    runners = {"adam": rounds_runner(problem, optax.adam(1e-3), settings, 1)}
    paused = {"adam": 0.0}
    contests = {
        "no race": {},
        "none paused": {"race": explore.Racing(2, 8), "adapt": wins_in_turn(2)},
        "one paused": {"race": explore.Racing(2, 8), "adapt": wins_in_turn(1)},
    }
    for name, kwargs in convolution_strategies(problem, settings).items():
        if not re.search(settings.strategies, name):
            continue
        for label, more in contests.items():
            if more and kwargs.get("gradients") == "turns":
                continue  # Each branch has its calls.
            tx = optax_ev3.ev3(assess_fn=problem.score_fn, **{**kwargs, **more})
            warm = 5 * kwargs.get("trajectory_length", 1)
            run = rounds_runner(problem, tx, settings, warm)
            runners[f"{name}, {label}"] = run
            rounds = math.ceil(settings.trajectory / (warm // 5))
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


def convolution_strategies(problem: Problem, settings: Settings) -> dict[str, Any]:
    """By name, the arguments of EV3 with two Adams."""
    adams = [optax.adam(1e-3), optax.adam(1e-6)]  # The second never catches up.
    own = [optax_ev3.explorer(tx, problem.loss_fn) for tx in adams]
    branches = {"trajectory_length": settings.trajectory}
    return {
        "one step": {"inner": adams},
        "shared gradients": {"inner": adams, **branches},
        "turns": {"inner": adams, **branches, "gradients": "turns"},
        "own gradients": {"inner": adams, **branches, "loss_fn": problem.loss_fn},
        "losses of their own": {"inner": own, **branches},
        "recommended": {
            "inner": own,
            **branches,
            "restart": "never",
            "restart_state": "copy",
            "combine": [combine.trajectory_average(), combine.branch_average()],
            "adapt": rules.greedy(),
        },
    }


def wins_in_turn(count: int) -> rules.Rule:
    """A rule that adopts the first explorers, one after the other."""

    def decide(evidence, rounds, key):
        del evidence, key
        return rules.Decision(rounds % count, jnp.asarray(False)), rounds + 1

    return rules.Rule(lambda explorers: jnp.zeros([], jnp.int32), decide)


def rounds_runner(problem: Problem, tx, settings: Settings, warm: int):
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


def machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "optax_ev3": optax_ev3.__version__,
        "device": jax.devices()[0].device_kind,
    }


def print_table(rows: Sequence[dict[str, Any]], title: str = "") -> None:
    """Rows with the same keys, under their keys."""
    cells = [list(rows[0])] + [
        [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if title:
        print(f"\n{title}\n")
    for line in cells:
        pairs = zip(line, widths, strict=True)
        print("  ".join(cell.rjust(width) for cell, width in pairs), flush=True)


def measure(settings: Settings, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Runs the benchmark, prints its tables, and returns all figures."""
    figures: dict[str, Any] = {"machine": machine(), "settings": settings._asdict()}
    print_table([figures["machine"]])
    problems = {"mlp": mlp_problem(settings), "conv": conv_problem(settings)}
    for name, problem in problems.items():
        size = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
        print(f"{name}: {size:,} parameters, batches of {settings.batch}")
    for part, fn, title in (
        ("steps", measure_steps, "One step, over the same work written by hand"),
        ("updates", measure_updates, "Nothing to assess, over the K updates alone"),
    ):
        if part in parts:
            rows = []
            for name, problem in problems.items():
                for count in settings.explorers:
                    rows += fn(name, problem, count, settings)
            print_table(rows, title)
            print(f"\n{verdict(rows, TARGETS[part])}")
            figures[part] = rows
    if "rounds" in parts:
        figures["rounds"] = measure_rounds(settings)
        title = "Milliseconds a round, digits, 2 optimizers, over a step of Adam"
        print_table(figures["rounds"], title)
    if "trajectories" in parts:
        rows = []
        for count in settings.explorers[:2]:
            rows += measure_trajectories(problems["mlp"], count, settings)
        figures["trajectories"] = rows
        length = settings.trajectory
        print_table(rows, f"A step of a trajectory of {length}, MLP, over its parts")
    if "sweeps" in parts:
        figures["sweeps"] = measure_sweeps(problems["mlp"], settings)
        print_table(figures["sweeps"], "Sweeps of Adam over learning rates, MLP")
    if "bookkeeping" in parts:
        rows = measure_bookkeeping(problems["mlp"], settings)
        figures["bookkeeping"] = rows
        print_table(
            rows, "{} explorers, {} objectives, {} rounds".format(*settings.booked)
        )
    if "convolutions" in parts:
        figures["convolutions"] = measure_convolutions(settings)
        title = "CPU time of a step with convolutions, two Adams, over a step of Adam"
        print_table(figures["convolutions"], title)
    return figures


def verdict(rows: Sequence[dict[str, Any]], target: float) -> str:
    """The best program of each row group, against the target."""
    best: dict[Any, float] = {}
    for row in rows:
        if row["program"] not in (BY_HAND, TUNED, "safe by hand", "updates alone"):
            group = row["model"], row["explorers"]
            best[group] = min(row["ratio"], best.get(group, math.inf))
    worst = max(best.values())
    middle = statistics.median(best.values())
    return (
        f"Best mode: {middle:.3f} in the middle, {worst:.3f} at the worst; "
        f"target at most {target}: {'reached' if worst <= target else 'missed'}."
    )


def main(_):
    settings = QUICK if _QUICK.value else Settings(repeats=_REPEATS.value)
    figures = measure(settings, _PARTS.value)
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
        print(f"\nwrote {_JSON.value}")


if __name__ == "__main__":
    app.run(main)
