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

Run it with `python benchmarks/distillation.py`; it takes over an hour on two cores,
and goes on where it was interrupted. `--part students` runs one part.
"""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax import nnx

from optax_ev3 import growth
from optax_ev3.models import linen
from optax_ev3.models import nnx as nnx_models

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import _checkpoint
import _distillation as experiment
import _distillation_report as reports

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
PARTS = ("preservation", "tuning", "students", "speed")
PART = flags.DEFINE_multi_enum("part", PARTS, PARTS, "Which; all.")
SEEDS = flags.DEFINE_integer("seeds", 10, "Runs of the students.", lower_bound=2)
FOLDER = flags.DEFINE_string(
    "folder", "benchmarks/results/distillation", "Where runs are kept."
)
JSON = flags.DEFINE_string("json", None, "Where to write the figures, too.")
OVERRIDE = flags.DEFINE_string("override", "{}", "See examples/distillation.py.")
SIZES = flags.DEFINE_list("speed_sizes", ["1", "2"], "Blocks a stage, for speed.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Of timings.", lower_bound=1)


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


def preservation():
    """The largest relative difference of outputs, by kind of growth."""
    print("\nOutputs before and after growth: largest difference over largest output")
    print(f"{'growth':36}{'training':>12}{'inference':>12}")
    found = {}
    for library, outputs in {"Linen": linen_outputs, "NNX": nnx_outputs}.items():
        for name, (kind, grow, options) in KINDS.items():
            worst = np.zeros(2)
            for seed in range(SEEDS.value):
                key = jax.random.key(seed)
                images = jax.random.normal(key, [32, 16, 16, 3])
                pairs = outputs(kind, grow, options, images, key)
                apart = [
                    float(abs(after - before).max() / abs(before).max())
                    for before, after in pairs
                ]
                worst = np.maximum(worst, apart)
            found[f"{library}, {name}"] = worst.tolist()
            print(
                f"{library + ', ' + name:32}{worst[0]:12.1e}{worst[1]:12.1e}",
                flush=True,
            )
    return found


# Students.


def students(folder):
    """Runs the experiment in as many processes as there are cores."""
    workers = min(os.cpu_count() or 1, SEEDS.value)
    parts = np.array_split(np.arange(SEEDS.value), workers)
    # Each on a core of its own.
    chosen = os.environ.get("XLA_FLAGS", "")
    alone = {"XLA_FLAGS": f"{chosen} --xla_cpu_multi_thread_eigen=false"}
    processes = []
    for number, part in enumerate(parts):
        where = folder / f"students_{number}_of_{workers}"
        command = [sys.executable, str(EXAMPLES / "distillation.py")]
        command += [f"--first_seed={part[0]}", f"--seeds={len(part)}"]
        command += [f"--folder={where}", f"--override={OVERRIDE.value}"]
        processes.append((subprocess.Popen(command, env=os.environ | alone), where))
    codes = [process.wait() for process, _ in processes]
    if any(codes):
        sys.exit("The experiment failed, see above.")
    results = []
    for _, where in processes:
        results += json.loads((where / "results.json").read_text())
    report(results, folder)
    return results


def report(results, folder):
    """The experiment's own table and plot of all seeds, and what was asked."""
    setting = experiment.configured("digits", OVERRIDE.value)
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


def tuning(folder, steps=3000):
    """Held-out and test figures of fixed students, by what may be chosen for them."""
    setting = experiment.configured("digits", OVERRIDE.value)
    # One network of a seed after the other; what was trained before is only read.
    taught = {seed: teach(setting, seed, folder) for seed in OTHER_SEEDS}
    found = []
    print(f"\nStudents of a fixed size, {steps} steps, {len(taught)} other seeds")
    print(f"{'student':10}{'rate':>8}{'':>8}{'held-out NLL':>14}{'test':>9}")
    for size, *choice in itertools.product(setting.sizes, *TUNED.values()):
        rows = [
            tuned(setting, folder, seed, size, *choice, steps, *taught[seed])
            for seed in taught
        ]
        nll, accuracy = np.mean(rows, axis=0)
        found.append([size, *choice, nll, accuracy])
        rate, falls = choice
        print(
            f"ResNet-{6 * size + 2:<3}{rate:8g}{'falls' if falls else 'stays':>8}"
            f"{nll:14.4f}{accuracy:9.4f}",
            flush=True,
        )
    return found


def teach(setting, seed, folder):
    """Data and teacher of a seed."""
    data = experiment.load(setting, "", seed)
    where = _checkpoint.Folder(folder / "tuning" / f"{seed}_teacher")
    model, variables = experiment.train_teacher(setting, data, where, seed)
    return data, experiment.teacher_from(setting, model, variables, data)


def tuned(setting, folder, seed, size, rate, falls, steps, data, teacher):
    """Held-out loss and test accuracy."""
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


def speed():
    """Seconds of a step with EV3 over those of as many plain steps, by size."""
    kinds = {"one step a call": 1}
    if experiment.steps_per_call(LENGTH) > 1:
        kinds["many steps a call"] = LENGTH - 1
    print("\nCIFAR-100's shapes: time per gradient over that of plain AdamW")
    columns = f"{'plain step':>12}{'in a round':>12}{'whole round':>13}"
    print(f"{'':18}{'student':10}{columns}")
    found = {}
    for size, (kind, steps) in itertools.product(map(int, SIZES.value), kinds.items()):
        plain, within, whole = timed(size, steps)
        ratios = within / plain, whole / plain
        found[f"{size}, {kind}"] = {
            "plain": plain.tolist(),
            **dict(zip(("within", "whole"), (x.tolist() for x in ratios), strict=True)),
        }
        once, inside, round_ = map(np.median, (plain, *ratios))
        cells = f"{once * 1e3:9.2f} ms{inside:12.2f}{round_:13.2f}"
        print(f"{kind:18}ResNet-{6 * size + 2:<3}{cells}", flush=True)
    return found


def timed(size, steps):
    """Seconds per gradient ``[repeats]``: plain, in a round, in whole rounds.

    The last step of a round assesses, the others are alike. So short rounds are timed,
    and counted as if they were long.

    Args:
      size: Blocks a stage.
      steps: In one call.
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
    return np.array([once() for _ in range(REPEATS.value)]).T


def main(_):
    logging.set_verbosity(logging.WARNING)
    folder = pathlib.Path(FOLDER.value)
    parts = {
        "preservation": preservation,
        "tuning": functools.partial(tuning, folder),
        "students": functools.partial(students, folder),
        "speed": speed,
    }
    figures = {name: parts[name]() for name in PARTS if name in PART.value}
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    app.run(main)
