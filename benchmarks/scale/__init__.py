"""What EV3 costs as models and the number of explorers grow, over plain Adam.

programs: jaxpr equations of the jitted training step, leaves of the state, seconds to
  trace, lower and compile it, and its memory by the compiler's own analysis.
dispatch: time of a call until it returns, on a model of very few numbers.
collectives: bytes that devices exchange in a call; parameters spread over eight.
training: tokens a second and peak memory of GPT-2's smallest size on an accelerator, by
  AdamW and by EV3. It needs a GPU, and is left out where there is none (--gpu runs it
  all the same): `python -m benchmarks scale --task training` takes at most 10 minutes.

The model is a decoder-only transformer in plain JAX, whose layers are scanned (stacked
leaves, `lax.scan`) or unrolled (twelve leaves each). Explorers are alike (Adams at
different learning rates) or unlike (other optimizers). Every cell has a process of its
own, in which Adam is measured beside EV3; tracing, lowering and compiling are given up
after --limit seconds each, and the table says so. `--only "relay.*24 unrolled"` selects
cells; tables.md in the folder of results has all tables.
"""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any, NamedTuple

import pandas as pd

import optax_ev3
from benchmarks.run import Cell, Suite

TASKS = ("programs", "dispatch", "collectives", "training")
ROOT = pathlib.Path(__file__).parents[2]


class Settings(NamedTuple):
    """What is measured, and how often."""

    layers: tuple[int, ...] = (12, 24)  # of programs
    called_layers: tuple[int, ...] = (12,)  # of dispatch and collectives
    loops: tuple[str, ...] = ("scanned", "unrolled")
    alike: tuple[int, ...] = (2, 4, 8)
    unlike: tuple[int, ...] = (4,)
    width: int = 64
    heads: int = 4
    vocabulary: int = 256
    sequence: int = 32
    batch: int = 2
    limit: float = 300.0  # seconds to trace, to lower and to compile, each
    compilations: int = 3  # as long as they began within the next number of seconds
    compile_seconds: float = 20.0
    repeats: int = 30
    calls: int = 20  # in a repeat
    platform: str = "cpu"  # of programs and dispatch
    devices: int = 8  # of collectives
    profiled: int = 27  # calls: a round of branches has 25
    gpu: bool = False
    trained: tuple[int, ...] = (12, 768, 12, 50304)  # layers, width, heads, vocabulary
    trained_batch: int = 8
    trained_sequence: int = 512
    parameters: str = "float32"  # their dtype in training, where layers use bfloat16
    rounds: int = 16  # of 25 calls, if they begin within the next number of seconds
    train_seconds: float = 90.0
    train_limit: float = 140.0  # seconds of a process


QUICK = {
    "layers": (2,),
    "called_layers": (2,),
    "loops": ("scanned",),
    "alike": (2,),
    "unlike": (),
    "width": 8,
    "heads": 2,
    "vocabulary": 16,
    "sequence": 4,
    "compilations": 1,
    "repeats": 3,
    "calls": 3,
    "profiled": 3,
    "trained": (1, 8, 2, 16),
    "trained_batch": 2,
    "trained_sequence": 4,
    "rounds": 2,
}


def cells(settings, tasks, results):
    del results
    for task in tasks:
        if task == "training":
            yield from _training(settings)
            continue
        layers = settings.layers if task == "programs" else settings.called_layers
        for count, loop in itertools.product(layers, settings.loops):
            for case in _cases(settings):
                labels = {"layers": count, "loop": loop, **case}
                yield _cell(task, labels, _spec(task, settings), _env(task, settings))


def _cases(settings):
    kinds = [
        *((count, "alike") for count in settings.alike),
        *((count, "unlike") for count in settings.unlike),
    ]
    for strategy in ("one step", "branches", "relay"):
        for count, kind in kinds:
            yield {"strategy": strategy, "explorers": count, "kind": kind}
    yield {"strategy": "portfolio", "explorers": 8, "kind": "its own"}


def _training(settings):
    if not (settings.gpu or _default_platform() == "gpu"):
        print("No GPU: the task training is left out.", file=sys.stderr)
        return
    names = "layers", "width", "heads", "vocabulary"
    spec = {
        **dict(zip(names, settings.trained, strict=True)),
        "batch": settings.trained_batch,
        "sequence": settings.trained_sequence,
        "parameters": settings.parameters,
        "rounds": settings.rounds,
        "enough": settings.train_seconds,
        "limit": settings.train_limit,
    }
    for strategy, count, kind in (
        ("adamw", 1, "alone"),
        ("relay", 4, "alike"),
        ("branches", 2, "alike"),
        ("portfolio", 8, "its own"),
    ):
        labels = {
            "layers": spec["layers"],
            "loop": "scanned",
            "strategy": strategy,
            "explorers": count,
            "kind": kind,
        }
        yield _cell("training", labels, spec, _env("training", settings))


def _cell(task, labels, spec, env):
    spec = {**spec, **labels, "scanned": labels["loop"] == "scanned", "measure": task}
    method = "{strategy}, {explorers} {kind}, {layers} {loop}".format(**labels)
    return Cell(task, method, lambda: measured(spec, env).assign(**labels))


def _spec(task, settings) -> dict[str, Any]:
    names = "width", "heads", "vocabulary", "sequence", "batch", "limit"
    return {
        **{name: getattr(settings, name) for name in names},
        "repeats": settings.compilations if task == "programs" else settings.repeats,
        "calls": settings.calls,
        "devices": settings.devices,
        "profiled": settings.profiled,
        "enough": settings.compile_seconds,
    }


def _env(task, settings) -> dict[str, str]:
    """Of a process: which devices it has, and the package that is measured here."""
    source = pathlib.Path(optax_ev3.__file__).parents[1]
    paths = dict.fromkeys([str(source), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    flags = [env.get("XLA_FLAGS", "")]
    if task != "training":
        env["JAX_PLATFORMS"] = settings.platform
    if task in ("dispatch", "collectives"):
        # Machine code that is not optimized is made sooner, and plays no part in these.
        flags.append("--xla_backend_optimization_level=0")
        flags.append("--xla_cpu_use_fusion_emitters=false")
    if task == "collectives":
        env["JAX_PLATFORMS"] = "cpu"
        flags.append(f"--xla_force_host_platform_device_count={settings.devices}")
        # Devices wait for each other in threads, of which there are as many as cores.
        env["NPROC"] = str(8 * settings.devices)
    return {**env, "XLA_FLAGS": " ".join(flags).strip()}


def _default_platform() -> str:
    """Asked of another process: in this one JAX would take the GPU's memory."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip()


def measured(spec: dict[str, Any], env: dict[str, str]) -> pd.DataFrame:
    """What a process says, until it is done or over the limit, which is a row, too."""
    command = [sys.executable, "-m", "benchmarks.scale.measures", json.dumps(spec)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    rows = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    if done.returncode == -signal.SIGALRM:
        rows.append({"metric": "over_seconds", "value": spec["limit"]})
    elif done.returncode and "RESOURCE_EXHAUSTED" in done.stderr:
        rows.append({"metric": "out_of_memory", "value": 1})
    elif done.returncode:
        raise RuntimeError(f"{command}:\n{done.stderr[-4000:]}")
    columns = ["program", "repeat", "machine", "metric", "value"]
    return pd.DataFrame(rows).reindex(columns=columns)


def report(results, settings, folder):
    from benchmarks.scale import tables  # Not in every process.

    text = tables.markdown(results, settings)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    print(text)


SUITE = Suite(TASKS, Settings(), QUICK, cells, report)
