"""The page of the quality suite, its tables and its pictures, from tidy results."""

import pathlib

import numpy as np
import pandas as pd

from benchmarks.quality import comparisons, plots
from benchmarks.quality.accountings import CLOCK, FREE, UNTUNED
from benchmarks.quality.methods import EV3S, MAIN, PORTFOLIO

COLUMNS = 6  # Of a table by task: as many as a page is wide.
TARGET = "AdamW + cosine"  # At its documented default: what others are to reach.
VARIANTS = tuple(name for name in EV3S if name not in MAIN)
TITLES = {
    CLOCK: "Tuning on the clock",
    UNTUNED: "No tuning: every method as it is documented",
    FREE: "Tuning for free: the best of five rates for each seed",
}
ABOUT = {
    CLOCK: "All that a method tries comes out of one budget of gradients; EV3's "
    "assessments count, those of the others do not. Times worse: than the mean of the "
    "best method on the task, in percent of all runs. Work to the target: until the "
    "final figure of AdamW with cosine decay as documented is first reached, over the "
    "same of AdamW itself; a run that does not reach it counts two budgets.",
    UNTUNED: "One run of each with the learning rate of its documentation.",
    FREE: "Five runs of each rival, each with the whole budget; EV3 has one.",
}


def rivals(figures: pd.DataFrame, ours: str = PORTFOLIO) -> pd.DataFrame:
    """One EV3 and all others: its other versions would take the ranks beside it."""
    return figures.drop(columns=[x for x in figures if x in EV3S and x != ours])


def summary(results: pd.DataFrame, accounting: str, ours: str) -> pd.DataFrame:
    """A row for each method, the best mean rank first."""
    figures = comparisons.complete(rivals(comparisons.ends(results, accounting), ours))
    ranks = comparisons.ranks(figures)
    limits = comparisons.interval(comparisons.bootstrap(ranks, comparisons.means))
    failed = comparisons.failures(figures)
    rank = ranks.groupby("task").mean().mean()
    table = pd.DataFrame(
        {
            "mean rank (95% interval)": [
                f"{rank[x]:.1f} ({limits.low[x]:.1f} to {limits.high[x]:.1f})"
                for x in figures
            ],
            "error over the best's": comparisons.typical_ratios(figures),
            **{f"{x} times worse": 100 * failed[x] for x in failed},
        },
        index=figures.columns,
    )
    return table.loc[rank.sort_values(kind="stable").index]


def with_times(table: pd.DataFrame, results: pd.DataFrame, ours: str) -> pd.DataFrame:
    """And the work to the target."""
    course = comparisons.complete(rivals(comparisons.courses(results), ours))
    times = comparisons.times(course, TARGET)
    reached = np.isfinite(times).groupby("task").mean().mean()
    over = comparisons.times_over(times, TARGET)
    return table.assign(
        **{
            "work to the target": over.reindex(table.index),
            "reached": 100 * reached.reindex(table.index),
        }
    )


# As Markdown.


def markdown(table: pd.DataFrame, first: str = "method") -> str:
    """A table; EV3's rows are bold."""
    percent = [x for x in table if x.endswith("worse") or x == "reached"]
    table = table.copy()
    for name in table:
        if table[name].dtype.kind == "f":
            form = "{:.0f}%" if name in percent else "{:.2f}"
            table[name] = [form.format(x) for x in table[name]]
    lines = [
        f"| {first} | {' | '.join(table)} |",
        "|---" * (len(table.columns) + 1) + "|",
    ]
    for name, row in table.iterrows():
        cells = [str(name), *row]
        if str(name) in EV3S:
            cells = [f"**{cell.strip('*')}**" if cell else "" for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_task(figures: pd.DataFrame) -> str:
    """Means and standard errors, a column for each task; best mean ranks first."""
    order = comparisons.ranks(figures).groupby("task").mean().mean().sort_values()
    groups = figures[order.index].groupby("task", sort=False)
    means, errors = groups.mean().T, groups.sem().T
    shown = pd.DataFrame(
        {
            task: [
                _cell(means[task][x], errors[task][x], means[task].min())
                for x in order.index
            ]
            for task in means
        },
        index=order.index,
    )
    parts = [shown.iloc[:, i : i + COLUMNS] for i in range(0, len(means.T), COLUMNS)]
    return "\n\n".join(markdown(part) for part in parts)


def _cell(mean, error, best):
    if not np.isfinite(mean):
        return ""
    text = f"{mean:.3g} ± {error:.1g}"
    return f"**{text}**" if mean == best else text


def page(results: pd.DataFrame, folder: pathlib.Path, ours: str = PORTFOLIO) -> str:
    """All of it; pictures are drawn into the folder."""
    clock = summary(results, CLOCK, ours)
    ranks = comparisons.ranks(
        comparisons.complete(rivals(comparisons.ends(results, CLOCK), ours))
    )
    course = comparisons.complete(rivals(comparisons.courses(results), ours))
    plots.times_to_target(comparisons.times(course, TARGET), folder / "profile.png")
    plots.critical_differences(ranks, folder / "ranks.png")
    plots.by_task(comparisons.courses(results), folder / "course.png")
    parts = [
        "![How much work each method takes to the figure of AdamW with cosine decay at "
        "its documented rate.](profile.png)",
        f"## {TITLES[CLOCK]}\n\n{ABOUT[CLOCK]}",
        markdown(with_times(clock, results, ours)),
        "![Mean ranks; methods under one bar do not differ significantly.](ranks.png)",
    ]
    measured = [x for x in TITLES if x in set(results.accounting)]
    for accounting in measured[1:]:
        parts.append(f"## {TITLES[accounting]}\n\n{ABOUT[accounting]}")
        parts.append(markdown(summary(results, accounting, ours)))
    parts.append("## Task by task\n\n![Test figures over work.](course.png)")
    for accounting in measured:
        figures = comparisons.ends(results, accounting)
        best = comparisons.best_single(results)
        if accounting == CLOCK and len(best):
            figures = figures.join(best)
        parts += [f"### {TITLES[accounting]}", by_task(figures)]
    return "\n\n".join(parts) + "\n"


# What was asked of EV3.


def verdicts(results: pd.DataFrame, ours: str) -> list[str]:
    """How EV3 does, a sentence each."""
    clock = comparisons.complete(rivals(comparisons.ends(results, CLOCK), ours))
    ranks = comparisons.ranks(clock)
    repetitions = comparisons.bootstrap(ranks, comparisons.means)
    order = ranks.groupby("task").mean().mean().sort_values()
    other = next(name for name in order.index if name != ours)
    gap = (repetitions[other] - repetitions[ours]).quantile([0.025, 0.975])
    lines = [
        f"{ours}: mean rank {order[ours]:.2f}, next {other} {order[other]:.2f}; the "
        f"gap is {order[other] - order[ours]:.2f} ({gap.iloc[0]:.2f} to "
        f"{gap.iloc[1]:.2f}).",
    ]
    course = comparisons.complete(rivals(comparisons.courses(results), ours))
    over = comparisons.times_over(comparisons.times(course, TARGET), TARGET)
    lines.append(f"Work to the figure of {TARGET}: {over[ours]:.2f} times its own.")
    best = comparisons.best_single(results)
    worse = comparisons.behind(clock[ours].reindex(best.index), best)
    lines.append(
        f"Behind the best single in hindsight by more than a standard error on "
        f"{len(worse)} of {best.index.unique('task').size} tasks: "
        f"{', '.join(worse) or 'none'}."
    )
    everything = comparisons.ends(results, CLOCK)
    for name in VARIANTS:
        if name in everything and everything[name].notna().any():
            means = everything.groupby("task").mean()
            ratios = (means[name] / means[PORTFOLIO]).dropna()
            lines.append(
                f"{name} over {PORTFOLIO}: {np.exp(np.log(ratios).mean()):.3f} "
                f"({ratios.min():.2f} on {ratios.idxmin()} to {ratios.max():.2f} on "
                f"{ratios.idxmax()}; {len(ratios)} tasks)."
            )
    return lines


def shown(results: pd.DataFrame, folder: pathlib.Path) -> None:
    """Prints the table on the clock and what was asked, and writes the page."""
    if not {TARGET, PORTFOLIO} <= set(results.method):
        print(f"There is no report without {PORTFOLIO} and {TARGET}.")
        return
    for ours in MAIN:
        if ours in set(results.method):
            print(f"\n{summary(results, CLOCK, ours).to_string()}\n")
            print("\n".join(verdicts(results, ours)))
    path = folder / "report.md"
    path.write_text(page(results, folder))
    print(f"Page: {path}")
