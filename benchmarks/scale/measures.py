"""What is measured in a process of its own: rows come out as they are known.

`python -m benchmarks.scale.measures JSON` prints a row as JSON on each line.
"""

import functools
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_ev3
from benchmarks.scale import collectives, model, programs
from benchmarks.scale.programs import ADAM, OURS, Case, Problem

LENGTH = 25  # Calls in a round of branches, in a turn of a relay.
Rows = Iterator[dict[str, Any]]


def main(text: str) -> None:
    spec = SimpleNamespace(**json.loads(text))
    for row in MEASURES[spec.measure](spec):
        print(json.dumps({**row, "machine": machine()}), flush=True)


def limit(seconds: float) -> None:
    """Ends the process unless called again in time, even within the compiler."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


@functools.cache
def machine() -> str:
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        name = platform.processor() or platform.machine()
        if os.path.exists("/proc/cpuinfo"):
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                lines = [line for line in file if line.startswith("model name")]
            name = lines[0].partition(":")[2].strip() if lines else name
        name = f"{os.cpu_count()} cores of {name}"
    return f"{name}, jax {jax.__version__}, optax {optax.__version__}"


def problem_of(spec, **others: Any) -> Problem:
    fields = {name: getattr(spec, name) for name in model.Shape._fields[:-1]}
    return Problem(model.Shape(**{**fields, **others}))


def both(spec, problem: Problem) -> dict[str, optax.GradientTransformation]:
    case = Case(spec.strategy, spec.explorers, spec.kind)
    return {ADAM: optax.adam(1e-3), OURS: programs.transformation(problem, case)}


def abstract(spec, problem: Problem):
    """Types of parameters and of a batch; nothing is computed."""
    params = jax.eval_shape(
        functools.partial(model.init, problem.shape), jax.random.key(0)
    )
    batch = jax.ShapeDtypeStruct([spec.batch, spec.sequence + 1], jnp.int32)
    return params, batch


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# What programs take to be made, and their memory.


def measure_programs(spec) -> Rows:
    # A first program of another size, so that what JAX loads once counts for nobody.
    small = problem_of(spec, layers=1, width=2 * spec.heads)
    list(stages(spec, small, optax.adam(1e-3)))
    problem, begun = problem_of(spec), time.perf_counter()
    for repeat in range(spec.repeats):
        for program, tx in both(spec, problem).items():
            jax.clear_caches()  # The second one would find parts that are traced.
            for metric, value in stages(spec, problem, tx):
                yield {
                    "program": program,
                    "repeat": repeat,
                    "metric": metric,
                    "value": value,
                }
        if time.perf_counter() - begun > spec.enough:
            break


def stages(spec, problem: Problem, tx) -> Iterator[tuple[str, float]]:
    """Traces, lowers and compiles a step, each within the limit."""
    params, batch = abstract(spec, problem)
    state = jax.eval_shape(tx.init, params)
    # What is not used counts, too, as it does where it is kept.
    jitted = jax.jit(
        programs.step_fn(problem, tx), donate_argnums=(0, 1), keep_unused=True
    )
    yield "state_leaves", len(jax.tree.leaves(state))
    traced, trace = timed(spec.limit, lambda: jitted.trace(params, state, batch, batch))
    yield "trace_seconds", trace
    yield "equations", equations(traced.jaxpr)
    lowered, lower = timed(spec.limit, traced.lower)
    yield "lower_seconds", lower
    compiled, compile_ = timed(spec.limit, lowered.compile)
    yield "compile_seconds", compile_
    yield "all_seconds", trace + lower + compile_
    memory, copy = compiled.memory_analysis(), bytes_of(params)
    arguments = memory.argument_size_in_bytes - 2 * bytes_of(batch)
    yield "state_copies", arguments / copy - 1
    yield "temporary_copies", memory.temp_size_in_bytes / copy
    yield "all_copies", (arguments + memory.temp_size_in_bytes) / copy


def timed(seconds: float, fn: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the seconds that it took, within a limit."""
    limit(seconds)
    begun = time.perf_counter()
    result = fn()
    taken = time.perf_counter() - begun
    limit(0)
    return result, taken


def equations(jaxpr: Any) -> int:
    """With those of inner programs, wherever they are used."""
    known: dict[int, int] = {}

    def count(jaxpr):
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if id(jaxpr) not in known:
            known[id(jaxpr)] = sum(
                1 + sum(count(inner) for inner in inner_jaxprs(equation.params))
                for equation in jaxpr.eqns
            )
        return known[id(jaxpr)]

    return count(jaxpr)


def inner_jaxprs(value: Any) -> list[Any]:
    if hasattr(value, "eqns"):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [inner for part in value for inner in inner_jaxprs(part)]


# How long Python takes to start a program.


def measure_dispatch(spec) -> Rows:
    """All in turn, in changing order; batches of calls in each repeat."""
    problem = problem_of(spec, width=2, heads=1, vocabulary=4, sequence=2)
    tokens = jnp.zeros([1, 3], jnp.int32)
    runners = {}
    for program, tx in both(spec, problem).items():
        params = model.init(problem.shape, jax.random.key(0))
        carry = params, jax.jit(tx.init)(params)
        jitted = jax.jit(programs.step_fn(problem, tx), donate_argnums=(0, 1))
        limit(spec.limit)
        carry = jax.block_until_ready(jitted(*carry, tokens, tokens))
        limit(0)
        runners[program] = runner(jitted, carry, tokens)
    for repeat in range(-1, spec.repeats):
        for program in list(runners)[:: 1 if repeat % 2 else -1]:
            pairs = [runners[program]() for _ in range(spec.calls)]
            if repeat < 0:
                continue  # To warm up.
            for metric, values in {
                "returned_seconds": [returned for returned, _ in pairs],
                "finished_seconds": [finished for _, finished in pairs],
            }.items():
                yield {
                    "program": program,
                    "repeat": repeat,
                    "metric": metric,
                    "value": statistics.median(values),
                }


def runner(jitted, carry, tokens) -> Callable[[], tuple[float, float]]:
    """Seconds until a call returns, and until its results are there."""
    call = stepper(jitted, carry, tokens)

    def run():
        begun = time.perf_counter()
        results = call()
        returned = time.perf_counter()
        jax.block_until_ready(results)
        return returned - begun, time.perf_counter() - begun

    return run


def stepper(step, carry, tokens) -> Callable[[], Any]:
    """Goes on from where the call before ended."""

    def call():
        nonlocal carry
        carry = step(*carry, tokens, tokens)
        return carry

    return call


# What devices exchange.


def measure_collectives(spec) -> Rows:
    mesh = Mesh(np.array(jax.devices()[: spec.devices]), "data")
    everywhere = NamedSharding(mesh, PartitionSpec())

    def whole(tree):
        return jax.lax.with_sharding_constraint(tree, everywhere)

    problem = problem_of(spec)._replace(whole=whole)
    params, _ = abstract(spec, problem)
    params = jax.tree.map(functools.partial(spread, mesh), params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    init = functools.partial(model.init, problem.shape)
    init = jax.jit(init, out_shardings=shardings)
    tokens = np.zeros([spec.devices, spec.sequence + 1], np.int32)
    tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    for program, tx in both(spec, problem).items():
        of_state = optax_ev3.state_shardings(tx, params)
        first = init(jax.random.key(0))
        carry = first, jax.jit(tx.init, out_shardings=of_state)(first)
        jitted = jax.jit(
            programs.step_fn(problem, tx),
            donate_argnums=(0, 1),
            out_shardings=(shardings, of_state),
        )
        limit(spec.limit)
        step = jitted.lower(*carry, tokens, tokens).compile()
        limit(0)
        call = stepper(step, carry, tokens)
        for number in range(spec.profiled if program == OURS else 1):
            size = collectives.moved(step.as_text(), call, spec.devices)
            yield {
                "program": program,
                "repeat": number,
                "metric": "moved_copies",
                "value": size / bytes_of(params),
            }


def typed(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def spread(mesh: Mesh, leaf):
    """Along the last axis that can be divided: never that of stacked layers."""
    count = mesh.size
    able = [axis for axis, length in enumerate(leaf.shape) if length % count == 0]
    spec = ["data" if axis == able[-1:][0] else None for axis in range(leaf.ndim)]
    return typed(leaf, NamedSharding(mesh, PartitionSpec(*spec)))


# Tokens a second.


def measure_training(spec) -> Rows:
    """Rounds of calls of one optimizer, and the most memory that it had in use."""
    limit(spec.limit)  # Of the whole process.
    begun = time.perf_counter()
    program = ADAM if spec.strategy == "adamw" else OURS
    for row in rounds(spec, begun):
        yield {"program": program, **row}


def rounds(spec, begun: float) -> Rows:
    shape = problem_of(spec).shape._replace(compute="bfloat16")
    problem = Problem(shape)
    case = Case(spec.strategy, spec.explorers, spec.kind)
    adamw = optax.adamw(1e-3)
    tx = adamw if spec.strategy == "adamw" else programs.transformation(problem, case)
    make = jax.jit(functools.partial(model.init, shape, dtype=spec.parameters))
    params = make(jax.random.key(0))
    state = jax.jit(tx.init)(params)
    copy = bytes_of(params)
    batches = walks(spec)
    jitted = jax.jit(programs.step_fn(problem, tx), donate_argnums=(0, 1))
    clock = time.perf_counter()
    step = jitted.lower(params, state, batches[0], batches[1]).compile()
    yield {"metric": "compile_seconds", "value": time.perf_counter() - clock}
    memory = step.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    yield {"metric": "analysed_gib", "value": used / 2**30}
    yield {"metric": "parameters_gib", "value": copy / 2**30}
    for number in range(spec.rounds):
        clock = time.perf_counter()
        for call in range(LENGTH):
            data = batches[call % len(batches)], batches[(call + 1) % len(batches)]
            params, state = step(params, state, *data)
        jax.block_until_ready(params)
        seconds = time.perf_counter() - clock
        tokens = LENGTH * spec.batch * spec.sequence / seconds
        yield {"metric": "tokens_per_second", "value": tokens, "repeat": number}
        if stats := jax.devices()[0].memory_stats():
            peak = stats["peak_bytes_in_use"] / 2**30
            yield {"metric": "peak_gib", "value": peak, "repeat": number}
        if time.perf_counter() - begun > spec.enough:
            break
    limit(0)


def walks(spec, count: int = 8) -> list[jax.Array]:
    """Batches of random walks over the vocabulary: there is something to learn."""
    rng = np.random.default_rng(0)
    sizes = count, spec.batch, spec.sequence + 1
    steps = rng.integers(-3, 4, sizes)
    steps[..., 0] = rng.integers(spec.vocabulary, size=sizes[:-1])
    tokens = np.cumsum(steps, axis=-1) % spec.vocabulary
    return [jnp.asarray(batch, jnp.int32) for batch in tokens]


MEASURES = {
    "programs": measure_programs,
    "dispatch": measure_dispatch,
    "collectives": measure_collectives,
    "training": measure_training,
}

if __name__ == "__main__":
    main(sys.argv[1])
