"""Tables and plots of benchmarks/quality.py, from its cells."""

import json
import pathlib
import urllib.parse
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy import stats

Cells = dict[str, dict[str, Any]]  # By task and method.
EV3 = "EV3"
UNTRAINED = "untrained"
TABLES = ("gradients", "work")
HINDSIGHT = "best single in hindsight"


class Kinds(NamedTuple):
    """Which methods are what.

    Attributes:
      singles: The explorers alone.
      others: Other methods of one run.
      halving: Of how many the best go on, and the part of all gradients that each has
        taken by then.
      share: The part of all gradients that one explorer takes.
      variants: EV3 in other settings.
    """

    singles: tuple[str, ...]
    others: tuple[str, ...]
    halving: tuple[tuple[int, float], ...]
    share: float
    variants: tuple[str, ...] = ()


def path_of(folder: pathlib.Path, task: str, name: str) -> pathlib.Path:
    """The file of a cell; any name can be read back from it."""
    task, name = (urllib.parse.quote(text, safe=" ,'") for text in (task, name))
    return folder / task / f"{name}.json"


def load(folder: pathlib.Path) -> Cells:
    found: Cells = {}
    for path in sorted(folder.glob("*/*.json")):
        task, name = map(urllib.parse.unquote, (path.parent.name, path.stem))
        found.setdefault(task, {})[name] = json.loads(path.read_text())
    return found


def rows(cells: dict[str, Any], kinds: Kinds, table: str) -> dict[str, np.ndarray]:
    """The figures ``[seeds]`` of each row of a task, lower is better.

    Args:
      cells: By method.
      kinds: Which methods are what.
      table: "gradients", at equal ones, or "work", where EV3's assessments count.
    """
    mark = 1.0 if table == "gradients" else table
    found = {
        name: _at(cell["runs"][0], mark)["test"][0]
        for name, cell in cells.items()
        if name.startswith(EV3)
    }
    if all(name in cells for name in kinds.singles):
        found |= _of_singles({name: cells[name] for name in kinds.singles}, kinds)
    for name in kinds.others:
        if name in cells:
            ends = [_at(run, 1.0) for run in cells[name]["runs"]]
            found[name] = _chosen([{k: x[0] for k, x in end.items()} for end in ends])
    for name in ("population-based training", "soup"):
        if name in cells:
            found[name] = np.array(cells[name]["runs"][0]["test"], float)
    if UNTRAINED in cells:
        found = no_worse(found, np.array(cells[UNTRAINED]["runs"][0]["test"]))
    return found


def no_worse(found: dict[str, np.ndarray], start: np.ndarray) -> dict[str, np.ndarray]:
    """With what ended worse than it began, or overflowed, as if it had not begun.

    One exploded run would say all there is to be said about a mean, for any method.
    """
    return {
        name: np.where(values < start, values, start) for name, values in found.items()
    }


def _at(run, mark):
    """Figures ``[kinds, seeds]`` of a run at a mark, NaN for the worst."""
    place = run["marks"].index(mark)
    worst = {"test": np.inf, "held_out": -np.inf}
    return {
        kind: np.nan_to_num(
            np.array(run[kind][place], float), nan=x, posinf=x, neginf=x
        )
        for kind, x in worst.items()
    }


def _chosen(ends):
    """The test figures of what has the best held-out score, for each seed."""
    test, held_out = (np.array([end[k] for end in ends]) for k in ("test", "held_out"))
    best = held_out.argmax(0)
    return test[best, np.arange(len(best))]


def _of_singles(cells, kinds):
    """Rows of the explorers alone, and of what is made of their runs."""
    found, ends, shares = {}, [], []
    for name, cell in cells.items():
        run = cell["runs"][0]
        for place, title in enumerate((name, f"{name}, averaged")):
            for mark, into in ((1.0, ends), (kinds.share, shares)):
                into.append({kind: x[place] for kind, x in _at(run, mark).items()})
            found[title] = ends[-1]["test"]
    return {
        HINDSIGHT: min(found.values(), key=np.mean),
        "all eight in full, by held-out": _chosen(ends),
        "grid search": _chosen(shares),
        "successive halving": _halved(list(cells.values()), kinds.halving),
        **found,
    }


def _halved(cells, halving):
    seeds = len(cells[0]["runs"][0]["test"][0][0])
    result = np.zeros(seeds)
    for seed in range(seeds):
        left = range(len(cells))
        for count, mark in halving:
            ends = [_at(cells[i]["runs"][0], mark) for i in left]
            scores = [end["held_out"][0][seed] for end in ends]
            if count == 1:
                result[seed] = ends[0]["test"][0][seed]
            order = np.argsort(scores)[::-1][: max(count // 2, 1)]
            left = [left[i] for i in order]
    return result


# Tables.


def compare(found: dict[str, np.ndarray], name: str) -> tuple[float, float]:
    """The ratio of EV3's mean figure to another's, and a paired p value.

    The p value is signed: negative where EV3 is better.
    """
    ours, theirs = found[EV3], found[name]
    ratio = ours.mean() / theirs.mean() if theirs.mean() else np.nan
    if (ours == theirs).all():
        return ratio, 1.0
    test = stats.ttest_rel(ours, theirs)
    # Not zero, which has no sign to compare.
    return ratio, float(np.copysign(max(test.pvalue, 1e-300), test.statistic))


def holm(p_values: list[float]) -> list[float]:
    """Corrected for as many tests, signs kept."""
    order = np.argsort(np.abs(p_values))
    corrected, highest = list(p_values), 0.0
    for rank, place in enumerate(order):
        p = min(1.0, abs(p_values[place]) * (len(order) - rank))
        highest = max(highest, p)
        corrected[place] = float(np.copysign(highest, p_values[place]))
    return corrected


def _tables(cells, kinds, table):
    """The rows of each task that EV3 has a cell of."""
    return {task: rows(one, kinds, table) for task, one in cells.items() if EV3 in one}


def show(cells: Cells, kinds: Kinds) -> None:
    for table in TABLES:
        found = _tables(cells, kinds, table)
        print(f"\nAt equal {table}: test figure, mean ± standard error; ratio of EV3's")
        for task, one in found.items():
            _show_task(task, one)
        _show_summary(found, kinds)


def _show_task(task, found):
    print(f"\n{task}, {len(found[EV3])} seeds")
    for name in sorted(found, key=lambda name: found[name].mean()):
        values = found[name]
        error = values.std(ddof=1) / np.sqrt(len(values))
        ratio, p = compare(found, name)
        print(
            f"  {name:36}{values.mean():9.4f} ± {error:.4f}"
            + ("" if name == EV3 else f"{ratio:9.3f}   p {abs(p):.3f}")
        )


def _show_summary(found, kinds):
    """Wins and losses of EV3 over tasks, and mean ranks among methods of one run."""
    names = dict.fromkeys(name for one in found.values() for name in one if name != EV3)
    print(f"\n{'EV3 against':38}{'better':>8}{'level':>8}{'worse':>8}{'ratio':>8}")
    for name in names:
        both = [one for one in found.values() if name in one]
        ratios, p_values = zip(*(compare(one, name) for one in both), strict=True)
        p_values = holm(list(p_values))
        better = sum(-0.05 < p < 0 for p in p_values)
        worse = sum(0 <= p < 0.05 for p in p_values)
        level = len(both) - better - worse
        mean = np.exp(np.nanmean(np.log(np.maximum(ratios, 1e-9))))
        print(f"{name:38}{better:8}{level:8}{worse:8}{mean:8.3f}")
    ranked = [EV3, *kinds.others]
    complete = [one for one in found.values() if all(name in one for name in ranked)]
    if complete:
        figures = np.array([[one[name] for name in ranked] for one in complete])
        for title, compared in (
            ("mean rank", figures.mean(2, keepdims=True)),
            ("mean rank, seed by seed", figures),
        ):
            ranks = stats.rankdata(compared, axis=1).mean((0, 2))
            shown = sorted(zip(ranks, ranked, strict=True))
            listed = ", ".join(f"{name} {rank:.1f}" for rank, name in shown)
            print(f"{title}: {listed}")
    print("better, worse: at 5%, paired t tests, Holm's correction over tasks")


def verdicts(cells: Cells, kinds: Kinds) -> None:
    """How EV3 does against what was asked of it."""
    at_gradients, at_work = (_tables(cells, kinds, table) for table in TABLES)
    complete = {k: v for k, v in at_gradients.items() if HINDSIGHT in v}
    print("\nWhat was asked")
    if complete:
        level = [k for k, v in complete.items() if _within(v[EV3], v[HINDSIGHT])]
        better = _significant(complete, HINDSIGHT)[0]
        print(
            f"Equal gradients, {HINDSIGHT}: within one standard error of it or better "
            f"on {len(level)} of {len(complete)} tasks, significantly better on "
            f"{len(better)}: {', '.join(better) or 'none'}."
        )
        better, worse = _significant(at_work, "grid search")
        print(
            f"Equal work, grid search: significantly better on {len(better)} of "
            f"{len(complete)} tasks ({', '.join(better) or 'none'}), worse on "
            f"{len(worse)} ({', '.join(worse) or 'none'})."
        )
    for name in kinds.variants:
        ratios = {
            task: one[name].mean() / one[EV3].mean()
            for task, one in at_gradients.items()
            if name in one
        }
        if ratios:
            low, high = (f(ratios, key=ratios.__getitem__) for f in (min, max))
            mean = np.exp(np.mean(np.log(list(ratios.values()))))
            near = sum(ratio <= 1.01 for ratio in ratios.values())
            print(
                f"Equal gradients, {name} over EV3: {mean:.3f} (geometric mean of "
                f"{len(ratios)} tasks; {ratios[low]:.3f} on {low} to "
                f"{ratios[high]:.3f} on {high}; at most 1.01 on {near})."
            )


def _within(ours, theirs):
    """No worse, within one standard error of the paired difference."""
    gap = ours - theirs
    return gap.mean() <= gap.std(ddof=1) / np.sqrt(len(gap))


def _significant(found, name):
    """On which tasks EV3 is better, and worse, at 5% with Holm's correction."""
    tasks = [task for task, one in found.items() if name in one]
    p_values = holm([compare(found[task], name)[1] for task in tasks])
    return (
        [t for t, p in zip(tasks, p_values, strict=True) if -0.05 < p < 0],
        [t for t, p in zip(tasks, p_values, strict=True) if 0 <= p < 0.05],
    )


def write_table(cells: Cells, kinds: Kinds, path: pathlib.Path) -> None:
    """The main rows as a table of Markdown, at equal gradients and at equal work."""
    names = [EV3, HINDSIGHT, "grid search", "successive halving", *kinds.others]
    names += ["population-based training", "soup"]
    lines = []
    for table in TABLES:
        found = _tables(cells, kinds, table)
        shown = [n for n in names if any(n in one for one in found.values())]
        lines += [f"At equal {table}:", "", f"| task | {' | '.join(shown)} |"]
        lines.append("|---" * (len(shown) + 1) + "|")
        for task, one in found.items():
            best = min(one[n].mean() for n in shown if n in one)
            row = [_cell(one[n], best) if n in one else "" for n in shown]
            lines.append(f"| {task} | {' | '.join(row)} |")
        lines.append("")
    path.write_text("\n".join(lines))
    print(f"Table: {path}")


def _cell(values, best):
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
    text = f"{mean:.3g} ± {error:.2g}"
    return f"**{text}**" if mean == best else text


# Plots.


def draw(cells: Cells, kinds: Kinds, folder: pathlib.Path) -> None:
    found = _tables(cells, kinds, "work")
    _draw_profile(found, kinds, folder / "profile.png")
    _draw_course(cells, kinds, folder / "course.png")


def _draw_profile(found, kinds, path):
    """Share of tasks on which a method is within a factor of the best one."""
    names = [EV3, "grid search", "successive halving", *kinds.others]
    names += ["population-based training"]
    names = [n for n in names if all(n in one for one in found.values())]
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    means = np.array([[one[name].mean() for one in found.values()] for name in names])
    factors = means / means.min(0)
    for name, row in zip(names, factors, strict=True):
        x = np.sort(row)
        y = np.arange(1, len(x) + 1) / len(x)
        main = name == EV3
        axes.step(
            [1, *x, 10],
            [0, *y, 1],
            where="post",
            label=name,
            color="black" if main else None,
            lw=2.5 if main else 1.5,
        )
    axes.set(xscale="log", xlim=(1, 3), ylim=(0, 1.02))
    axes.set_xticks([1, 1.25, 1.5, 2, 3], ["1", "1.25", "1.5", "2", "3"])
    axes.minorticks_off()
    axes.set_xlabel("Test figure over that of the best of these methods")
    axes.set_ylabel("Share of tasks")
    axes.set_title("Performance profile, equal work", loc="left")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    print(f"Picture: {path}")


def _draw_course(cells, kinds, path):
    """Figures over gradients: EV3, and the best single by its end."""
    tasks = {
        k: v
        for k, v in cells.items()
        if EV3 in v and all(n in v for n in kinds.singles)
    }
    if not tasks:
        return
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(3 * columns, 2.4 * lines), dpi=150, layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    for axes, (task, one) in zip(panels, tasks.items(), strict=False):
        courses = {name: _course(one[name]) for name in (*kinds.singles, EV3)}
        best = min(kinds.singles, key=lambda name: courses[name][1][-1])
        for name, colour in {best: "#E69F00", EV3: "black"}.items():
            axes.plot(*courses[name], color=colour, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        # Where the scale spans decades, only these have room for labels.
        steps = (1.0, 2.0, 5.0) if high / low < 50 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(task, loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=7)
        axes.tick_params(labelsize=7, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("Gradients, those of all explorers counted")
    figure.supylabel("Test figure")
    figure.savefig(path)
    print(f"Picture: {path}")


def _course(cell):
    """Gradients, and mean test figures after as many."""
    run = cell["runs"][0]
    marks = sorted(mark for mark in run["marks"] if mark != "work")
    means = [np.mean(_at(run, mark)["test"][0]) for mark in marks]
    return np.array(marks) * cell["budget"], means
