"""Growth and distillation: what is kept, what is won, and what a step costs.

preservation: how far outputs are apart before and after each kind of growth of models
  that were trained for a while, relative to the largest, with running statistics and
  with a batch's own; Flax Linen and NNX.
students: the experiment of examples/distillation.py on scikit-learn's digits, split
  anew for each seed. Fixed students have the larger learning rate of EV3's explorers.
tuning: what other rates, constant or falling, give fixed students, on other seeds.
speed: a training step in the setting of the paper (CIFAR-100's shapes, random images,
  ResNet of 16 filters, batches of 128, 2 explorers, trajectories of 100, stored
  logits), over as many plain jitted steps of AdamW as there are explorers: steps
  within a round, and whole rounds with their assessments on 512 examples.

It takes over an hour on two cores, and goes on where it was interrupted.
"""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

import _checkpoint
import _distillation as experiment
import _distillation_report as reports
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import nnx

from benchmarks.report import show
from benchmarks.results import tidy
from benchmarks.run import Cell, Suite
from optax_ev3 import growth
from optax_ev3.models import linen
from optax_ev3.models import nnx as nnx_models

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"

# Preservation.

KINDS = {
    "MLP deepened": ("MLP", "deepen", {}),
    "MLP widened": ("MLP", "widen", {}),
    "ResNet, one stage deepened": ("ResNet", "deepen", {"stage": 2}),
    "ResNet, all stages deepened": ("ResNet", "deepen", {"count": 2}),
    "ResNet widened": ("ResNet", "widen", {}),
}


def shaken(tree, key):
    """As if it had been trained: nothing is zero or one, variances stay positive."""
    noise = optax.tree.random_like(key, tree)
    return jax.tree.map(lambda x, n: x * jnp.exp(0.3 * n) + 0.1 * abs(n), tree, noise)


def linen_outputs(kind, grow, options, images, key):
    """Outputs before and after growth, in training and in inference mode."""
    model = {
        "MLP": linen.MLP((32, 16), 10),
        "ResNet": linen.ResNet((1, 2, 1), 10, 8),
    }[kind]
    larger, how = getattr(model, grow)(**options)
    variables = shaken(model.init(key, images), key)
    fresh = larger.init(jax.random.fold_in(key, 1), images)
    grown = growth.transplant(variables, fresh, how)
    for train in (True, False):
        yield (
            one.apply(params, images, train=train, mutable=["batch_stats"])[0]
            for one, params in ((model, variables), (larger, grown))
        )


def nnx_outputs(kind, grow, options, images, key):
    rngs = nnx.Rngs(key)
    size = images[0].size
    model = {
        "MLP": lambda: nnx_models.MLP(size, (32, 16), 10, rngs=rngs),
        "ResNet": lambda: nnx_models.ResNet(3, (1, 2, 1), 10, 8, rngs=rngs),
    }[kind]()
    larger, how = getattr(model, grow)(**options, rngs=rngs)
    variables = shaken(nnx.state(model), key)
    grown = growth.transplant(variables, nnx.state(larger), how)
    nnx.update(model, variables)
    nnx.update(larger, grown)
    for train in (True, False):
        for one in (model, larger):
            one.train() if train else one.eval()
        yield (one(images) for one in (model, larger))


LIBRARIES = {"Linen": linen_outputs, "NNX": nnx_outputs}


def preservation(library, name, seeds):
    """The largest difference of outputs, relative to the largest, of each seed."""
    kind, grow, options = KINDS[name]
    apart = []
    for seed in range(seeds):
        key = jax.random.key(seed)
        images = jax.random.normal(key, [32, 16, 16, 3])
        pairs = LIBRARIES[library](kind, grow, options, images, key)
        apart.append(
            [
                float(abs(after - before).max() / abs(before).max())
                for before, after in pairs
            ]
        )
    found = dict(zip(("training", "inference"), np.transpose(apart), strict=True))
    return tidy(found, seed=range(seeds))


# Students.


def run_students(folder, settings):
    """Runs the experiment in as many processes as there are cores."""
    workers = min(os.cpu_count() or 1, settings.seeds)
    parts = np.array_split(np.arange(settings.seeds), workers)
    # Each on a core of its own.
    chosen = os.environ.get("XLA_FLAGS", "")
    alone = {"XLA_FLAGS": f"{chosen} --xla_cpu_multi_thread_eigen=false"}
    processes = []
    for number, part in enumerate(parts):
        where = folder / f"students_{number}_of_{workers}"
        command = [sys.executable, str(EXAMPLES / "distillation.py")]
        command += [f"--first_seed={part[0]}", f"--seeds={len(part)}"]
        command += [f"--folder={where}", f"--override={settings.override}"]
        processes.append((subprocess.Popen(command, env=os.environ | alone), where))
    codes = [process.wait() for process, _ in processes]
    if any(codes):
        sys.exit("The experiment failed, see above.")
    rows = []
    for one in (one for _, where in processes for one in stored(where)):
        stages = one["single pass"]
        held = [stage["held_out/stable/nll"] for stage in stages]
        rows.append(tidy({"held_out/stable/nll": held}, size=range(len(held))))
    return pd.concat([x.assign(seed=i) for i, x in enumerate(rows)])


def stored(where):
    """The results of each seed in a folder of the experiment."""
    path = where / "results.json"
    return json.loads(path.read_text()) if path.exists() else []


def show_students(results, folder, settings):
    """The experiment's own table and plot of all seeds, and what was asked."""
    setting = experiment.configured("digits", settings.override)
    reports.show(setting, results)
    reports.draw_sizes(setting, results, folder / "accuracy.png")
    stages = [one["single pass"] for one in results]
    falls = [
        stage["grown/stable/nll"] - stage["held_out/stable/nll"]
        for one in stages
        for stage in one[:-1]
    ]
    print(f"stable, held-out loss: rises by at most {max(falls):.1e} at a growth")
    compare("visible", "fixed", results)
    compare("visible", "fixed, falling rate", results)
    compare("stable", "fixed", results)
    needed(setting, results)


def compare(kind, method, results):
    """EV3's accuracy at each size, less that of fixed students; paired."""
    print(f"EV3's {kind} less {method}, by size: ", end="")
    cells = []
    for number in range(len(results[0][method])):
        gains = [
            one["single pass"][number][f"test/{kind}/accuracy"]
            - one[method][number]["accuracy"]
            for one in results
        ]
        cells.append(reports.spread(np.array(gains)))
    print("; ".join(cells))


def needed(setting, results):
    """The smallest fixed student within a standard error of the best."""
    for method in ("fixed", "fixed, falling rate", "fixed, whole pass"):
        values = reports.accuracies(results, method)
        means = [x.mean() for x in values]
        best = int(np.argmax(means))
        least = means[best] - values[best].std(ddof=1) / np.sqrt(len(values[best]))
        size = next(i for i, mean in enumerate(means) if mean >= least)
        layers = 6 * setting.sizes[size] + 2
        print(
            f"smallest within a standard error of the best, {method}: ResNet-{layers}"
        )
    for name in ("single pass", "multi pass"):
        layers = [one[f"final of {name}"]["layers"] for one in results]
        print(f"final students of {name}: {np.mean(layers):.1f} layers, {layers}")
    gains = [
        one["final of multi pass"]["accuracy"] - one["final of single pass"]["accuracy"]
        for one in results
    ]
    print(f"multi pass less single pass: {reports.spread(np.array(gains))}")


# Tuning.

TUNED = {"rate": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "falls": (False, True)}
OTHER_SEEDS = (1000, 1001)


@functools.cache
def teach(setting, seed, folder):
    """Data and teacher of a seed."""
    data = experiment.load(setting, "", seed)
    where = _checkpoint.Folder(folder / "tuning" / f"{seed}_teacher")
    model, variables = experiment.train_teacher(setting, data, where, seed)
    return data, experiment.teacher_from(setting, model, variables, data)


def tuned(setting, folder, size, rate, falls, steps=3000):
    """Held-out loss and test accuracy of fixed students, by what is chosen for them."""
    rows = []
    for seed in OTHER_SEEDS:
        data, teacher = teach(setting, seed, folder)
        case = setting, folder, seed, size, rate, falls, steps, data, teacher
        nll, accuracy = _tuned(*case)
        rows.append(tidy({"held-out NLL": nll, "test": accuracy}).assign(seed=seed))
    case = {"size": size, "rate": rate, "falls": falls}
    return pd.concat(rows).assign(**case)


def _tuned(setting, folder, seed, size, rate, falls, steps, data, teacher):
    name = f"{seed}_{size}_{rate:g}_{falls}"
    model = experiment.student(setting, size)
    variables, marked = experiment.train_fixed(
        setting,
        model,
        data,
        teacher,
        _checkpoint.Folder(folder / "tuning" / name),
        loss=setting.losses[0],
        rate=rate,
        steps=steps,
        falls=falls,
        seed=seed,
        marks=(steps,),
    )
    held_out = experiment.figures(model, variables, data, "held_out")
    return held_out["nll"], marked[0]["accuracy"]


# Speed.

LENGTH, ASSESSED = 100, 512  # Steps of a round, and held-out examples that it draws.
BLOCK = 5  # Steps that are timed at once.


def speed(size, steps, repeats):
    """Seconds of a plain step, and what EV3 takes over as many of them."""
    plain, within, whole = timed(size, steps, repeats)
    found = {"plain step": plain, "in a round": within / plain}
    found["whole round"] = whole / plain
    return tidy(found, repeat=range(repeats))


def timed(size, steps, repeats):
    """Seconds per gradient ``[repeats]``: plain, in a round, in whole rounds.

    The last step of a round assesses, the others are alike. So short rounds are timed,
    and counted as if they were long.

    Args:
      size: Blocks a stage.
      steps: In one call.
      repeats: How often.
    """
    block = max(BLOCK, steps)
    setting = experiment.configured("cifar100")._replace(
        losses=(experiment.Loss(), experiment.Loss(reverse=True)),
        length=block + 1,
        assessed=ASSESSED,
        augment=False,
    )
    rng = np.random.default_rng(0)
    sizes = (2000, 1000, 1000)
    parts = [
        (
            jnp.asarray(rng.integers(0, 256, [n, 32, 32, 3]), jnp.uint8),
            jnp.asarray(rng.integers(0, setting.classes, n), jnp.int32),
        )
        for n in sizes
    ]
    data = experiment.Data(*parts, np.zeros(3), np.ones(3), np.arange(sizes[0]))
    logits = rng.normal(size=[sizes[0], setting.classes])
    teacher = experiment.distillation.stored(logits.astype(np.float32))
    teachers = {experiment.TEACHER: teacher}
    model = experiment.student(setting, size)
    count = experiment.explorers(setting, teachers)
    tx = experiment.transformation(setting, model, teachers, True, 0)
    variables = experiment.init(model, 0, data)
    ours = [variables, jax.jit(tx.init)(variables)]
    plain = [
        experiment.init(model, 0, data),
        experiment.cosine_adamw(1e-3, np.inf).init(variables),
    ]

    def plain_steps(n, steps=steps):
        about = data, teacher, setting.rates[0], np.inf, 0
        for i in range(0, n, steps):
            plain[:] = experiment.fixed_steps(
                setting, model, setting.losses[0], *plain, *about, i, steps
            )
        jax.block_until_ready(plain)

    def our_steps(n, steps=steps):
        for i in range(0, n, steps):
            ours[:] = experiment.growing_steps(
                setting, model, True, *ours, data, teachers, 0, i, steps
            )
        jax.block_until_ready(ours)

    def seconds(fn, n, *args):
        begun = time.perf_counter()
        fn(n, *args)
        return time.perf_counter() - begun

    def once():
        alone = seconds(plain_steps, count * block) / (count * block)
        within = seconds(our_steps, block) / block
        end = seconds(our_steps, 1, 1)
        whole = (within * (LENGTH - 1) + end) / LENGTH
        return alone, within / count, whole / count

    once()  # Compiles.
    return np.array([once() for _ in range(repeats)]).T


# The suite.


class Settings(NamedTuple):
    """How much is measured."""

    seeds: int = 10
    override: str = "{}"  # See examples/distillation.py.
    speed_sizes: tuple[int, ...] = (1, 2)  # Blocks a stage.
    repeats: int = 5  # Of timings.


PARTS = ("preservation", "tuning", "students", "speed")


def cells(settings, tasks, results):
    folder = results.path.parent
    if "preservation" in tasks:
        for case in itertools.product(LIBRARIES, KINDS):
            yield Cell(
                "preservation",
                ", ".join(case),
                lambda case=case: preservation(*case, settings.seeds),
            )
    setting = experiment.configured("digits", settings.override)
    if "tuning" in tasks:
        for size, *choice in itertools.product(setting.sizes, *TUNED.values()):
            case = setting, folder, size, *choice
            yield Cell(
                "tuning",
                f"{size} blocks, rate {choice[0]:g}{', falls' * choice[1]}",
                lambda case=case: tuned(*case),
            )
    if "students" in tasks:
        yield Cell("students", "all", lambda: run_students(folder, settings))
    if "speed" in tasks:
        kinds = {"one step a call": 1}
        if experiment.steps_per_call(LENGTH) > 1:
            kinds["many steps a call"] = LENGTH - 1
        for size, kind in itertools.product(settings.speed_sizes, kinds):
            case = size, kinds[kind], settings.repeats
            yield Cell("speed", f"{size} blocks, {kind}", lambda x=case: speed(*x))


def report(results, settings, folder):
    found = results[results.metric != "seconds"]
    parts = {name: found[found.task == name] for name in PARTS}
    shown = {
        "preservation": ("max", "Largest difference over largest output", 9),
        "tuning": ("mean", "Students of a fixed size, 3,000 steps, other seeds", 4),
        "speed": ("median", "Seconds of a plain step; EV3's over as many of them", 4),
    }
    for name, (how, title, digits) in shown.items():
        if len(parts[name]):
            groups = parts[name].groupby(["method", "metric"], sort=False).value
            show(groups.agg(how).unstack(sort=False), title, digits)
    students = [
        one for where in sorted(folder.glob("students_*")) for one in stored(where)
    ]
    if students:
        show_students(students, folder, settings)


QUICK = {"seeds": 2, "speed_sizes": (1,), "repeats": 2}
SUITE = Suite(PARTS, Settings(), QUICK, cells, report)
