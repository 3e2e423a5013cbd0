"""Knowledge distillation with students that grow: the application of the EV3 paper.

A teacher is trained, or its logits are read. A student begins small, learns from it by
several losses at once, which are EV3's explorers, and grows when it stops improving,
without losing anything. Beside it:

single pass: one such student.
multi pass: further ones, for which the former final students are teachers as well.
no decide: rounds adopt the best explorer, whatever it is worth.
fixed: students of each size from the start, by AdamW with as many gradient steps as
  EV3 had taken when that size was done, all explorers counted; with a constant learning
  rate, and with one that falls along a cosine.

By default on scikit-learn's digits, in some minutes. For CIFAR put the official archive
for Python, such as cifar-100-python.tar.gz, into a folder as it is:

    python examples/distillation.py
    python examples/distillation.py --setting=cifar100 --data=FOLDER

Everything is kept in `--folder`: checkpoints, metrics as JSON lines, results, plots.
Where the command was interrupted, the same command goes on.
"""

import io
import itertools
import json
import logging
import pathlib
from typing import Any

import _checkpoint
import _distillation as experiment
import numpy as np
from _distillation import SETTINGS, TEACHER, Loss, Pass, Setting
from absl import app, flags
from absl import logging as absl_logging
from matplotlib.figure import Figure
from tqdm import tqdm

SETTING = flags.DEFINE_enum("setting", "digits", list(SETTINGS), "Data and sizes.")
DATA = flags.DEFINE_string("data", ".", "Where the archive of CIFAR is.")
FOLDER = flags.DEFINE_string("folder", "distillation", "Where everything is kept.")
SEEDS = flags.DEFINE_integer("seeds", 3, "How many runs of everything.", lower_bound=1)
METHODS = flags.DEFINE_multi_enum(
    "method",
    ["single pass", "multi pass", "no decide", "fixed"],
    ["single pass", "multi pass", "no decide", "fixed"],
    "Which; the others include the single pass.",
)
LOGITS = flags.DEFINE_string(
    "teacher_logits",
    None,
    "A file of NumPy with the teacher's logits [50000, classes] of CIFAR's training "
    "part, in the order of the archive. Without it, a teacher is trained.",
)
EVERY_SIZE = flags.DEFINE_bool(
    "every_size", True, "Whether students go on growing where it brings nothing."
)
SAVE = flags.DEFINE_float("save_seconds", 60, "How often a checkpoint is saved.")
OTHERS = flags.DEFINE_string(
    "override", "{}", "Other values of the setting, as a JSON object."
)


def configured() -> Setting:
    """The setting, with what `--override` says.

    Raises:
      ValueError: There is no such field, or a size list is not rising.
    """
    setting = SETTINGS[SETTING.value]
    others = json.loads(OTHERS.value)
    unknown = others.keys() - set(Setting._fields)
    if unknown:
        raise ValueError(
            f"--override: a setting has {', '.join(Setting._fields)}; got "
            f"{', '.join(sorted(unknown))}."
        )
    if "losses" in others:
        others["losses"] = [Loss(**loss) for loss in others["losses"]]
    others = {k: tuple(v) if isinstance(v, list) else v for k, v in others.items()}
    setting = setting._replace(**others)
    sizes = setting.sizes
    if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"sizes must rise from at least 1, got {list(sizes)}.")
    return setting


def claim(folder: pathlib.Path, about: dict) -> None:
    """Notes in a folder what it is for.

    Raises:
      ValueError: It is for something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, about = folder / "setting.json", json.loads(json.dumps(about))
    if not path.exists():
        _checkpoint.write(path, json.dumps(about, indent=1).encode())
    found = json.loads(path.read_text())
    if found != about:
        differ = sorted(k for k in found | about if found.get(k) != about.get(k))
        raise ValueError(
            f"{folder} holds runs of another setting ({', '.join(differ)} differ): "
            f"choose another --folder, or remove it."
        )


# Runs.


class Run:
    """Everything of one seed."""

    def __init__(self, setting: Setting, seed: int, folder: pathlib.Path):
        self.setting, self.seed = setting, seed
        self.folder = folder / f"seed_{seed}"
        self.data = experiment.load(setting, DATA.value, seed)

    def results(self, methods: list[str]) -> dict[str, Any]:
        """By method, the figures of each size."""
        setting, (teacher, found) = self.setting, self._teacher()
        teachers = {TEACHER: teacher}
        single = self._grown("single pass", teachers)
        found["single pass"] = single.course.stages
        found["final of single pass"] = self._final(single)
        if "no decide" in methods:
            undecided = self._grown("no decide", teachers, decide=False)
            found["no decide"] = undecided.course.stages
        if "multi pass" in methods:
            last = single
            for number in range(2, setting.passes + 1):
                archived = experiment.final_student(
                    self.setting, self.data, last.folder
                )
                teachers |= {
                    f"student_{number - 1}": experiment.teacher_from(
                        self.setting, *archived, self.data
                    )
                }
                last = self._grown(f"pass {number}", teachers, shift=number - 1)
            found["multi pass"] = last.course.stages
            found["final of multi pass"] = self._final(last)
        if "fixed" in methods:
            found |= self._fixed(teacher, single.course.stages)
        return found

    def _folder(self, name):
        return _checkpoint.Folder(self.folder / name.replace(" ", "_"), SAVE.value)

    def _bar(self, name, total=None):
        title = f"seed {self.seed}, {name}"
        return tqdm(total=total, desc=f"{title:28}", unit="step")

    def _teacher(self):
        """The teacher, and its own figures where it is a network of ours."""
        setting = self.setting
        if LOGITS.value:
            logits = np.load(LOGITS.value)
            return experiment.teacher_from_logits(setting, logits, self.data), {}
        model = experiment.ResNet(
            (setting.teacher_size,) * 3, setting.classes, setting.teacher_filters
        )
        with self._bar(TEACHER, setting.teacher_steps) as bar:
            variables, _ = experiment.train_fixed(
                setting,
                model,
                self.data,
                experiment.nobody,
                self._folder(TEACHER),
                loss=Loss(hard=1.0),
                rate=setting.teacher_rate,
                steps=setting.teacher_steps,
                falls=True,
                seed=self.seed + 1_000_000,
                progress=bar.update,
            )
        teacher = experiment.teacher_from(setting, model, variables, self.data)
        found = experiment.figures(model, variables, self.data, "test")
        return teacher, {"teacher": found}

    def _grown(self, name, teachers, *, decide=True, shift=0):
        one = Pass(
            self.setting,
            self.data,
            teachers,
            self.seed + 1000 * shift,
            self._folder(name),
            decide=decide,
            every_size=EVERY_SIZE.value,
        )
        with self._bar(name) as bar:
            one.run(bar.update)
        return one

    def _final(self, one):
        model, variables = experiment.final_student(self.setting, self.data, one.folder)
        found = experiment.figures(model, variables, self.data, "test")
        return {"layers": experiment.layers(model), **found}

    def _fixed(self, teacher, stages):
        """Each size for as long as EV3 had taken by its end, and as the whole pass."""
        setting, whole = self.setting, stages[-1]["gradients"]
        kinds = {"fixed": False, "fixed, falling rate": True}
        found = {name: [] for name in (*kinds, "fixed, whole pass")}
        for size, stage in zip(setting.sizes, stages, strict=False):
            model, steps = experiment.student(setting, size), stage["gradients"]
            for kind, falls in kinds.items():
                name = f"{kind} {experiment.layers(model)}"
                total = steps if falls else whole
                with self._bar(name, total) as bar:
                    _, marked = experiment.train_fixed(
                        setting,
                        model,
                        self.data,
                        teacher,
                        self._folder(name),
                        loss=setting.losses[0],
                        rate=setting.rates[0],
                        steps=total,
                        falls=falls,
                        seed=self.seed,
                        marks=(steps, total),
                        progress=bar.update,
                    )
                found[kind].append(marked[0])
                if not falls:
                    found["fixed, whole pass"].append(marked[-1])
        return found


# What is shown.

GROWING = ("single pass", "multi pass", "no decide")
TITLES = {
    "single pass": "EV3, single pass",
    "multi pass": "EV3, multi pass",
    "no decide": "EV3, no decide",
    "fixed": "fixed, constant",
    "fixed, falling rate": "fixed, falling",
    "fixed, whole pass": "fixed, longest",
}
# Okabe and Ito's colours, told apart by the colour-blind, too.
COLOURS = {
    "single pass": "#0072B2",
    "multi pass": "#009E73",
    "no decide": "#CC79A7",
    "fixed": "#E69F00",
    "fixed, falling rate": "#D55E00",
    "fixed, whole pass": "#999999",
}


def accuracies(results: list[dict], method: str) -> list[np.ndarray]:
    """On the test set, by size; not every seed has got to every size."""
    key = "test/stable/accuracy" if method in GROWING else "accuracy"
    if method == "no decide":  # There, what is visible is the student.
        key = "test/visible/accuracy"
    columns = itertools.zip_longest(*(one.get(method, []) for one in results))
    return [np.array([x[key] for x in column if x]) for column in columns]


def spread(values: np.ndarray, places: int = 4) -> str:
    """Mean and standard error."""
    mean, error = mean_and_error(values)
    return f"{mean:.{places}f} ± {error:.{places}f}"


def mean_and_error(values):
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return np.mean(values), error


def show(setting: Setting, results: list[dict]) -> None:
    """The final tables."""
    methods = [name for name in TITLES if any(name in one for one in results)]
    stages = [one["single pass"] for one in results]
    print(
        f"\nTest accuracy on {setting.data}, {len(results)} seeds: mean ± standard error"
    )
    if teachers := [one["teacher"]["accuracy"] for one in results if "teacher" in one]:
        print(f"teacher: {spread(np.array(teachers))}")
    columns = {name: accuracies(results, name) for name in methods}
    titles = "".join(f"{TITLES[name]:>19}" for name in methods)
    print(f"{'student':11}{'numbers':>9}{'gradients':>11}{titles}")
    for number, size in enumerate(setting.sizes):
        reached = [x[number] for x in stages if len(x) > number]
        if not reached:
            break
        gradients = np.mean([x["gradients"] for x in reached])
        cells = "".join(
            f"{spread(x[number]) if len(x) > number else '':>19}"
            for x in columns.values()
        )
        name = f"ResNet-{6 * size + 2}"
        print(f"{name:11}{reached[0]['numbers']:9,}{gradients:11,.0f}{cells}")
    for name in ("single pass", "multi pass"):
        if found := [x for one in results if (x := one.get(f"final of {name}"))]:
            sizes = ", ".join(str(x["layers"]) for x in found)
            accuracy = spread(np.array([x["accuracy"] for x in found]))
            print(f"final student of {name}: {accuracy}, layers: {sizes}")
    print(
        "Gradients: all that EV3's single pass has taken when a size is done, as many\n"
        "as fixed students of that size take; those called longest take as many as\n"
        "the whole pass. EV3: stable parameters, of no decide the visible ones."
    )


def draw_sizes(setting: Setting, results: list[dict], path: pathlib.Path) -> None:
    """Accuracy over size."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    methods = [name for name in TITLES if any(name in one for one in results)]
    for number, name in enumerate(methods):
        found = [mean_and_error(x) for x in accuracies(results, name)]
        means, errors = np.transpose(found)
        # Beside each other, so that the spreads can be seen.
        x = np.arange(len(means)) + 0.06 * (number - (len(methods) - 1) / 2)
        axes.errorbar(
            x,
            means,
            errors,
            color=COLOURS[name],
            marker="o" if name in GROWING else "s",
            ls="-" if name in GROWING else "--",
            capsize=3,
            label=TITLES[name],
        )
    if teachers := [one["teacher"]["accuracy"] for one in results if "teacher" in one]:
        axes.axhline(np.mean(teachers), color="black", lw=1, ls=":", label="teacher")
    names = [f"ResNet-{6 * size + 2}" for size in setting.sizes]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("Test accuracy")
    axes.set_title(
        f"Students of {setting.data}: accuracy over size "
        f"({len(results)} seeds, ± standard error)",
        loc="left",
    )
    axes.grid(axis="y", color="#DDDDDD", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def draw_course(setting: Setting, folder: pathlib.Path, path: pathlib.Path) -> None:
    """One single pass: the held-out score, and where the student grew."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    gradients = np.array([line["gradients"] for line in lines])
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for kind, colour in {"visible": "#56B4E9", "stable": "#0072B2"}.items():
        nll = np.array([line[f"held_out/{kind}/nll"] for line in lines])
        axes.plot(gradients, nll, color=colour, lw=1.6, label=kind)
        if kind == "stable":
            replaced = np.array([line["ev3/significant"] for line in lines]) > 0
            axes.plot(
                gradients[replaced],
                nll[replaced],
                "o",
                color=colour,
                ms=4,
                label="stable replaced",
            )
    axes.set_yscale("log")
    sizes = [line["layers"] for line in lines]
    for i, (before, after) in enumerate(itertools.pairwise([None, *sizes])):
        if before != after:
            at = gradients[i - 1] if i else 0
            axes.axvline(at, color="#999999", lw=1, ls="--" if i else "")
            axes.annotate(
                f"ResNet-{after}",
                (at, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -4),
                textcoords="offset points",
                va="top",
                color="#555555",
            )
    axes.set_xlim(0, gradients[-1])
    axes.set_xlabel("Gradient steps, all explorers together")
    axes.set_ylabel("Held-out negative log-likelihood")
    axes.set_title(f"A student of {setting.data} that grows", loc="left")
    axes.grid(axis="y", color="#DDDDDD", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.92))
    _save(figure, path)


def _save(figure, path):
    content = io.BytesIO()
    figure.savefig(content, format="png")
    _checkpoint.write(path, content.getvalue())
    print(f"Picture: {path}")


def main(_):
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("optax_ev3").setLevel(logging.INFO)
    setting, folder = configured(), pathlib.Path(FOLDER.value)
    # Whether students go on growing changes what their checkpoints mean.
    claim(folder, setting._asdict() | {"every_size": EVERY_SIZE.value})
    results = []
    for seed in range(SEEDS.value):
        results.append(Run(setting, seed, folder).results(METHODS.value))
        _checkpoint.write(
            folder / "results.json", json.dumps(results, indent=1).encode()
        )
    show(setting, results)
    draw_sizes(setting, results, folder / "accuracy.png")
    draw_course(setting, folder / "seed_0" / "single_pass", folder / "course.png")


if __name__ == "__main__":
    app.run(main)
