"""Tables and plots of the quality suite, from its results."""

import pathlib
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy import stats

from benchmarks.report import BLACK, ORANGE, holm, paired, picture, save, show, spread

EV3 = "EV3"
UNTRAINED = "untrained"
TABLES = {"gradients": "", "work": " at equal work"}  # With what metrics end.
HINDSIGHT = "best single in hindsight"
Rows = dict[str, pd.DataFrame]  # By task, a column for each row of its table.


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


# Rows of tables: from all numbers of a task to a figure for each seed and row.


def rows(one: pd.DataFrame, kinds: Kinds, table: str) -> pd.DataFrame:
    """The figures of a task, a column for each row of its table, lower is better.

    Args:
      one: All results of a task.
      kinds: Which methods are what.
      table: "gradients", at equal ones, or "work", where EV3's assessments count.
    """
    methods = list(dict.fromkeys(one.method))
    ours = one[one.method.str.startswith(EV3) & (one.metric == "test" + TABLES[table])]
    ours = ours[ours.mark.isin([1.0]) | ours.mark.isna()]
    found = dict(_wide(ours, ["method"], np.inf))
    if set(kinds.singles) <= set(methods):
        found |= _of_singles(one, kinds)
    for name in kinds.others:
        if name in methods:
            last = one[(one.method == name) & (one.weights == "last")]
            found[name] = _chosen(*_ends(last, 1.0, ["rate"]))
    for name in ("population-based training", "soup"):
        if name in methods:
            found[name] = _ends(one[one.method == name], 1.0, ["method"])[0][name]
    found = pd.DataFrame(found)
    if UNTRAINED in methods:
        start = _ends(one[one.method == UNTRAINED], 1.0, ["method"])[0][UNTRAINED]
        found = no_worse(found, start)
    return found


def no_worse(found: pd.DataFrame, start: pd.Series) -> pd.DataFrame:
    """With what ended worse than it began, or overflowed, as if it had not begun.

    One exploded run would say all there is to be said about a mean, for any method.
    """
    return found.where(found.lt(start, axis=0), start, axis=0)


def _wide(one, columns, worst):
    """A row for each seed; what is not finite is the worst."""
    wide = one.pivot(index="seed", columns=columns, values="value")
    return wide.where(np.isfinite(wide), worst)


def _ends(one, mark, columns):
    """Test figures and held-out scores at a mark, a row for each seed."""
    here = one[one.mark == mark]
    worst = {"test": np.inf, "held_out": -np.inf}
    return [_wide(here[here.metric == k], columns, x) for k, x in worst.items()]


def _chosen(test, held_out):
    """The test figures of what has the best held-out score, for each seed."""
    best = held_out[test.columns].to_numpy().argmax(1)
    return pd.Series(test.to_numpy()[np.arange(len(test)), best], test.index)


def _of_singles(one, kinds):
    """Rows of the explorers alone, and of what is made of their runs."""
    one = one[one.method.isin(kinds.singles)]
    both = pd.MultiIndex.from_product([kinds.singles, ["last", "average"]])
    both.names = ["method", "weights"]
    ends, shares = (
        [wide[both] for wide in _ends(one, mark, both.names)]
        for mark in (1.0, kinds.share)
    )
    titles = [f"{k}, averaged" if kind == "average" else k for k, kind in both]
    alone = ends[0].set_axis(titles, axis=1)
    return {
        HINDSIGHT: alone[alone.mean().idxmin()],
        "all eight in full, by held-out": _chosen(*ends),
        "grid search": _chosen(*shares),
        "successive halving": _halved(one[one.weights == "last"], kinds),
        **alone,
    }


def _halved(last, kinds):
    """Of all explorers the better half goes on, by the scores so far."""
    names, result = np.array(kinds.singles), {}
    marks = {x: _ends(last, x, ["method"]) for _, x in kinds.halving}
    for seed in sorted(set(last.seed)):
        left = names
        for count, mark in kinds.halving:
            test, held_out = (wide.loc[seed, left] for wide in marks[mark])
            order = np.argsort(held_out.to_numpy())[::-1]
            if count == 1:
                result[seed] = test.iloc[0]
            left = left[order[: max(count // 2, 1)]]
    return pd.Series(result)


# Tables.


def compare(found: pd.DataFrame, name: str) -> tuple[float, float]:
    """The ratio of EV3's mean figure to another's, and a paired p value.

    The p value is signed: negative where EV3 is better.
    """
    ours, theirs = found[EV3], found[name]
    ratio = ours.mean() / theirs.mean() if theirs.mean() else np.nan
    return ratio, paired(ours, theirs)


def tables(results: pd.DataFrame, kinds: Kinds) -> dict[str, Rows]:
    """By table and task that EV3 has been run on, its rows."""
    tasks = [(k, one) for k, one in results.groupby("task") if EV3 in set(one.method)]
    return {table: {k: rows(one, kinds, table) for k, one in tasks} for table in TABLES}


def show_all(found: dict[str, Rows], kinds: Kinds) -> None:
    for table, tasks in found.items():
        print(f"\nAt equal {table}: test figure, mean ± standard error; ratio of EV3's")
        for task, one in tasks.items():
            _show_task(task, one)
        _show_summary(tasks, kinds)


def _show_task(task, found):
    lines = []
    for name in found.mean().sort_values(kind="stable").index:
        ratio, p = compare(found, name)
        versus = ("", "") if name == EV3 else (f"{ratio:.3f}", f"{abs(p):.3f}")
        lines.append([spread(found[name]), *versus])
    order = found.mean().sort_values(kind="stable").index.rename("method")
    shown = pd.DataFrame(lines, order, ["figure", "ratio", "p"])
    show(shown, f"{task}, {len(found)} seeds")


def _show_summary(found, kinds):
    """Wins and losses of EV3 over tasks, and mean ranks among methods of one run."""
    lines = {}
    for name in dict.fromkeys(name for one in found.values() for name in one):
        both = [one for one in found.values() if name in one and name != EV3]
        if both:
            ratios, p_values = np.transpose([compare(one, name) for one in both])
            better, worse = _significant(p_values)
            mean = np.exp(np.nanmean(np.log(np.maximum(ratios, 1e-9))))
            level = len(both) - better.sum() - worse.sum()
            lines[name] = [better.sum(), level, worse.sum(), mean]
    columns = ["better", "level", "worse", "ratio"]
    shown = pd.DataFrame.from_dict(lines, orient="index", columns=columns)
    show(shown.rename_axis("EV3 against"))
    for ours in (EV3, *kinds.variants):
        _show_ranks(found, [ours, *kinds.others])
    print("better, worse: at 5%, paired t tests, Holm's correction over tasks")


def _show_ranks(found, ranked):
    complete = [one[ranked] for one in found.values() if set(ranked) <= set(one)]
    if complete:
        means = pd.concat([one.mean().to_frame().T for one in complete])
        for title, compared in (
            ("mean rank", means),
            ("mean rank, seed by seed", pd.concat(complete)),
        ):
            ranks = compared.rank(axis=1).mean().sort_values()
            listed = ", ".join(f"{name} {rank:.1f}" for name, rank in ranks.items())
            print(f"{title}: {listed}")


def _significant(p_values):
    """Where EV3 is better, and worse, at 5% with Holm's correction."""
    p_values = holm(p_values)
    significant = np.abs(p_values) < 0.05
    return significant & (p_values < 0), significant & (p_values > 0)


def verdicts(found: dict[str, Rows], kinds: Kinds) -> None:
    """How EV3 does against what was asked of it."""
    at_gradients, at_work = (found[table] for table in TABLES)
    complete = {k: v for k, v in at_gradients.items() if HINDSIGHT in v}
    print("\nWhat was asked")
    if complete:
        level = [k for k, v in complete.items() if _within(v[EV3], v[HINDSIGHT])]
        better = _tasks(complete, HINDSIGHT)[0]
        print(
            f"Equal gradients, {HINDSIGHT}: within one standard error of it or better "
            f"on {len(level)} of {len(complete)} tasks, significantly better on "
            f"{len(better)}: {', '.join(better) or 'none'}."
        )
        better, worse = _tasks(at_work, "grid search")
        print(
            f"Equal work, grid search: significantly better on {len(better)} of "
            f"{len(complete)} tasks ({', '.join(better) or 'none'}), worse on "
            f"{len(worse)} ({', '.join(worse) or 'none'})."
        )
    for name in kinds.variants:
        ratios = pd.Series(
            {
                task: one[name].mean() / one[EV3].mean()
                for task, one in at_gradients.items()
                if name in one
            }
        )
        if len(ratios):
            print(
                f"Equal gradients, {name} over EV3: {stats.gmean(ratios):.3f} "
                f"(geometric mean of {len(ratios)} tasks; {ratios.min():.3f} on "
                f"{ratios.idxmin()} to {ratios.max():.3f} on {ratios.idxmax()}; at "
                f"most 1.01 on {(ratios <= 1.01).sum()})."
            )


def _within(ours, theirs):
    """No worse, within one standard error of the paired difference."""
    gap = ours - theirs
    return gap.mean() <= stats.sem(gap)


def _tasks(found, name):
    """On which tasks EV3 is significantly better, and worse."""
    tasks = np.array([task for task, one in found.items() if name in one])
    p_values = [compare(found[task], name)[1] for task in tasks]
    return [list(tasks[which]) for which in _significant(p_values)]


def write_table(found: dict[str, Rows], kinds: Kinds, path: pathlib.Path) -> None:
    """The main rows as a table of Markdown, at equal gradients and at equal work."""
    names = [EV3, HINDSIGHT, "grid search", "successive halving", *kinds.others]
    names += ["population-based training", "soup"]
    lines = []
    for table, tasks in found.items():
        shown = [n for n in names if any(n in one for one in tasks.values())]
        lines += [f"At equal {table}:", "", f"| task | {' | '.join(shown)} |"]
        lines.append("|---" * (len(shown) + 1) + "|")
        for task, one in tasks.items():
            best = one[one.columns.intersection(shown)].mean().min()
            row = [_cell(one[n], best) if n in one else "" for n in shown]
            lines.append(f"| {task} | {' | '.join(row)} |")
        lines.append("")
    path.write_text("\n".join(lines))
    print(f"Table: {path}")


def _cell(values, best):
    text = f"{values.mean():.3g} ± {stats.sem(values):.2g}"
    return f"**{text}**" if values.mean() == best else text


# Plots.


def draw_profile(found, kinds, path):
    """Share of tasks on which a method is within a factor of the best one."""
    names = [EV3, "grid search", "successive halving", *kinds.others]
    names += ["population-based training"]
    names = [n for n in names if all(n in one for one in found.values())]
    means = pd.DataFrame({task: one[names].mean() for task, one in found.items()})
    factors = means / means.min()
    figure = picture(8, 5)
    axes = figure.subplots()
    for name, row in factors.iterrows():
        x = np.sort(row)
        y = np.arange(1, len(x) + 1) / len(x)
        main = name == EV3
        axes.step(
            [1, *x, 10],
            [0, *y, 1],
            where="post",
            label=name,
            color=BLACK if main else None,
            lw=2.5 if main else 1.5,
        )
    axes.set(xscale="log", xlim=(1, 3), ylim=(0, 1.02))
    axes.set_xticks([1, 1.25, 1.5, 2, 3], ["1", "1.25", "1.5", "2", "3"])
    axes.minorticks_off()
    axes.set_xlabel("Test figure over that of the best of these methods")
    axes.set_ylabel("Share of tasks")
    axes.set_title("Performance profile, equal work", loc="left")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def draw_course(results, kinds, path):
    """Figures over gradients: EV3, and the best single by its end."""
    tasks = {
        task: one
        for task, one in results.groupby("task", sort=True)
        if {EV3, *kinds.singles} <= set(one.method)
    }
    if not tasks:
        return
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = picture(3 * columns, 2.4 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    for axes, (task, one) in zip(panels, tasks.items(), strict=False):
        courses = _courses(one)
        best = courses[list(kinds.singles)].iloc[-1].idxmin()
        for name, colour in {best: ORANGE, EV3: BLACK}.items():
            course = courses[name].dropna()
            axes.plot(course.index, course, color=colour, label=name)
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
    figure.supxlabel("Gradients, those of all explorers counted")
    figure.supylabel("Test figure")
    save(figure, path)


def _courses(one):
    """Mean test figures of each method, by gradients."""
    budget = one[one.metric == "gradients"].value.iloc[0]
    test = one[(one.metric == "test") & one.mark.notna() & (one.weights != "average")]
    values = test.value.where(np.isfinite(test.value), np.inf)
    means = values.groupby([test.mark * budget, test.method]).mean()
    return means.unstack()
