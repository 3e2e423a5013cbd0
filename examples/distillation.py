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

import itertools
import json
import logging
import pathlib
import sys
from typing import Any

import _checkpoint
import _distillation as experiment
import _distillation_report as report
import numpy as np
from _distillation import SETTINGS, TEACHER, Pass, Setting
from absl import app, flags
from absl import logging as absl_logging
from tqdm import tqdm

SETTING = flags.DEFINE_enum("setting", "digits", list(SETTINGS), "Data and sizes.")
DATA = flags.DEFINE_string("data", ".", "Where the archive of CIFAR is.")
FOLDER = flags.DEFINE_string("folder", "distillation", "Where everything is kept.")
SEEDS = flags.DEFINE_integer("seeds", 3, "How many runs of everything.", lower_bound=1)
FIRST = flags.DEFINE_integer("first_seed", 0, "The first one.", lower_bound=0)
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
CHECKSUMS = flags.DEFINE_bool(
    "checksums", True, "Whether only the official archive of CIFAR is accepted."
)
EVERY_SIZE = flags.DEFINE_bool(
    "every_size", True, "Whether students go on growing where it brings nothing."
)
SAVE = flags.DEFINE_float("save_seconds", 60, "How often a checkpoint is saved.")
OTHERS = flags.DEFINE_string(
    "override", "{}", "Other values of the setting, as a JSON object."
)


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
        self.data = experiment.load(setting, DATA.value, seed, CHECKSUMS.value)

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
                former = experiment.final_student(setting, self.data, last.folder)
                archived = experiment.teacher_from(setting, *former, self.data)
                teachers = teachers | {f"student_{number - 1}": archived}
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
        with self._bar(TEACHER, setting.teacher_steps) as bar:
            model, variables = experiment.train_teacher(
                setting, self.data, self._folder(TEACHER), self.seed, bar.update
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


class BesideBars(logging.Handler):
    """Lines that do not tear the progress bars."""

    def emit(self, record):
        tqdm.write(record.getMessage(), file=sys.stderr)


def main(_):
    absl_logging.set_verbosity(absl_logging.WARNING)
    growths = logging.getLogger("optax_ev3")
    growths.setLevel(logging.INFO)
    growths.addHandler(BesideBars())
    growths.propagate = False
    setting = experiment.configured(SETTING.value, OTHERS.value)
    folder = pathlib.Path(FOLDER.value)
    seeds = range(FIRST.value, FIRST.value + SEEDS.value)
    # Data that are not there are found out before anything is written.
    runs = (Run(setting, seed, folder) for seed in seeds)
    first = next(runs)
    chosen = {"every_size": EVERY_SIZE.value, "teacher_logits": LOGITS.value}
    claim(folder, setting._asdict() | chosen)
    results = []
    for one in itertools.chain([first], runs):
        results.append(one.results(METHODS.value))
        found = json.dumps(results, indent=1)
        _checkpoint.write(folder / "results.json", found.encode())
    report.show(setting, results)
    report.draw_sizes(setting, results, folder / "accuracy.png")
    report.draw_course(
        setting, folder / f"seed_{FIRST.value}" / "single_pass", folder / "course.png"
    )


if __name__ == "__main__":
    app.run(main)
