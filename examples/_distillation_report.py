"""What `distillation.py` shows: a table, accuracy over size, the course of a run."""

import io
import itertools
import json
import pathlib

import _checkpoint
import numpy as np
from _distillation import Setting
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

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
    key = "test/visible/accuracy" if method in GROWING else "accuracy"
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
    seeds = f"mean ± standard error of {len(results)} seeds"
    print(f"\nTest accuracy on {setting.data}: {seeds}")
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
        "the whole pass."
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
    axes.margins(y=0.12)  # Room for the names of sizes.
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(FuncFormatter(lambda nll, _: f"{nll:g}"))
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
