"""The page of the quality suite, its tables and its pictures, from tidy results."""

import pathlib

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.quality import comparisons, plots
from benchmarks.quality.accountings import CLOCK, FREE, UNTUNED, WALL_CLOCK
from benchmarks.quality.methods import BASELINE, EV3S, MAIN, PORTFOLIO

COLUMNS = 6  # Of a table by task: as many as a page is wide.
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
    WALL_CLOCK: "Seconds on a CPU core, over those of AdamW with cosine decay, which "
    "trains in turns with EV3 in one process: medians of six repeats of 200 calls, "
    "geometric means over tasks. A unit of work is a gradient, or as many forward "
    "passes. The portfolio is told an end after 600 gradients, so that its rounds are "
    "shorter here, and fixed costs higher, than in the runs above.",
}


def rivals(figures: pd.DataFrame, ours: str) -> pd.DataFrame:
    """One EV3 and all others: its other versions would take the ranks beside it.

    And without the methods that some task lacks.
    """
    others = [name for name in figures if name in EV3S and name != ours]
    return comparisons.complete(figures.drop(columns=others))


def times(results: pd.DataFrame, ours: str) -> pd.DataFrame:
    """The work to the figure of the baseline."""
    return comparisons.times(rivals(comparisons.courses(results), ours), BASELINE)


def summary(results: pd.DataFrame, accounting: str, ours: str) -> pd.DataFrame:
    """A row for each method, the best mean rank first."""
    figures = rivals(comparisons.ends(results, accounting), ours)
    limits = comparisons.rank_intervals(figures)
    failed = comparisons.failures(figures)
    rank = comparisons.mean_ranks(figures)
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
    return table.loc[rank.index]


def with_times(table: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """And the work to the target."""
    reached = np.isfinite(found).groupby("task").mean().mean()
    over = comparisons.times_over(found, BASELINE)
    return table.assign(
        **{
            "work to the target": over.reindex(table.index),
            "reached": 100 * reached.reindex(table.index),
        }
    )


def settings(results: pd.DataFrame) -> pd.DataFrame:
    """A row for each of EV3's settings, ranked with the rivals, without the others."""
    measured = comparisons.complete(comparisons.ends(results, CLOCK))
    rows = [
        with_times(summary(results, CLOCK, name), times(results, name)).loc[[name]]
        for name in EV3S
        if name in measured
    ]
    return pd.concat(rows)


def wall_clock(results: pd.DataFrame) -> pd.DataFrame:
    """Seconds for a unit of work over the baseline's, a row for each of EV3's settings.

    Medians of the repeats, over tasks; and, with the work, seconds to the target.
    """
    kept = results[
        (results.method == WALL_CLOCK) & results.metric.str.endswith("ratio")
    ]
    names = kept.metric.str.removesuffix(": ratio")
    ratios = kept.assign(name=names).pivot(index="task", columns="name", values="value")
    rows = {}
    for name in ratios:
        one = ratios[name]
        work = comparisons.times_over(times(results, name).loc[one.index], BASELINE)
        typical = stats.gmean(one)
        rows[name] = {
            "seconds of a unit of work": typical,
            "the least": f"{one.min():.2f} ({one.idxmin()})",
            "the most": f"{one.max():.2f} ({one.idxmax()})",
            "seconds to the target": typical * work[name],
        }
    return pd.DataFrame.from_dict(rows, orient="index")


# As Markdown.


def markdown(table: pd.DataFrame) -> str:
    """A table; EV3's rows are bold."""
    percent = [x for x in table if x.endswith("worse") or x == "reached"]
    table = table.copy()
    for name in table:
        if table[name].dtype.kind == "f":
            form = "{:.0f}%" if name in percent else "{:.2f}"
            table[name] = [form.format(x) for x in table[name]]
    lines = [
        f"| method | {' | '.join(table)} |",
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
    order = comparisons.mean_ranks(figures)
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


def page(results: pd.DataFrame, folder: pathlib.Path) -> str:
    """All of it; pictures are drawn into the folder."""
    clock = rivals(comparisons.ends(results, CLOCK), PORTFOLIO)
    found = times(results, PORTFOLIO)
    plots.times_to_target(found, folder / "profile.png")
    limits = comparisons.rank_intervals(clock)
    plots.mean_ranks(comparisons.mean_ranks(clock), limits, folder / "ranks.png")
    plots.by_task(comparisons.courses(results), folder / "course.png")
    parts = [
        "![How much work each method takes to the figure of AdamW with cosine decay at "
        "its documented rate.](profile.png)",
        f"## {TITLES[CLOCK]}\n\n{ABOUT[CLOCK]}",
        markdown(with_times(summary(results, CLOCK, PORTFOLIO), found)),
        "![Mean ranks and their intervals.](ranks.png)",
    ]
    if clock.index.unique("task").size > 1:
        differ, others = comparisons.different(clock, PORTFOLIO), len(clock.columns) - 1
        parts.append(
            f"By Nemenyi's test over the means of tasks (5%, corrected for all pairs), "
            f"{PORTFOLIO} differs from {differ} of {others} methods."
        )
    parts.append("### EV3's settings\n\nEach in the place of the portfolio.")
    parts.append(markdown(settings(results)))
    if WALL_CLOCK in set(results.method):
        parts += [f"### Wall-clock time\n\n{ABOUT[WALL_CLOCK]}"]
        parts.append(markdown(wall_clock(results)))
    measured = [x for x in TITLES if x in set(results.accounting)]
    for accounting in measured[1:]:
        parts.append(f"## {TITLES[accounting]}\n\n{ABOUT[accounting]}")
        parts.append(markdown(summary(results, accounting, PORTFOLIO)))
    parts.append("## Task by task\n\n![Test figures over work.](course.png)")
    best = comparisons.best_single(results)
    for accounting in measured:
        figures = comparisons.ends(results, accounting)
        if accounting == CLOCK and len(best):
            figures = figures.join(best)
        parts += [f"### {TITLES[accounting]}", by_task(figures)]
    return "\n\n".join(parts) + "\n"


# What was asked of EV3.


def verdicts(results: pd.DataFrame, ours: str) -> list[str]:
    """How EV3 does, a sentence each."""
    everything = comparisons.ends(results, CLOCK)
    clock = rivals(everything, ours)
    repetitions = comparisons.bootstrap(comparisons.ranks(clock), comparisons.means)
    order = comparisons.mean_ranks(clock)
    other = next(name for name in order.index if name != ours)
    gap = (repetitions[other] - repetitions[ours]).quantile([0.025, 0.975])
    lines = [
        f"{ours}: mean rank {order[ours]:.2f}, next {other} {order[other]:.2f}; the "
        f"gap is {order[other] - order[ours]:.2f} ({gap.iloc[0]:.2f} to "
        f"{gap.iloc[1]:.2f}).",
    ]
    over = comparisons.times_over(times(results, ours), BASELINE)
    lines.append(f"Work to the figure of {BASELINE}: {over[ours]:.2f} times its own.")
    best = comparisons.best_single(results)
    if len(best):
        worse = comparisons.behind(clock[ours].reindex(best.index), best)
        lines.append(
            f"Behind the best single in hindsight by more than a standard error on "
            f"{len(worse)} of {best.index.unique('task').size} tasks: "
            f"{', '.join(worse) or 'none'}."
        )
    means = everything.groupby("task").mean()
    for name in EV3S:
        if name in means and name not in (ours, PORTFOLIO):
            ratios = (means[name] / means[PORTFOLIO]).dropna()
            lines.append(
                f"{name} over {PORTFOLIO}: {stats.gmean(ratios):.3f} "
                f"({ratios.min():.2f} on {ratios.idxmin()} to {ratios.max():.2f} on "
                f"{ratios.idxmax()}; {len(ratios)} tasks)."
            )
    return lines


def shown(results: pd.DataFrame, folder: pathlib.Path) -> None:
    """Prints the table on the clock and what was asked, and writes the page."""
    # A run that was interrupted may have tasks with some methods alone.
    needed = {BASELINE, PORTFOLIO}
    has_both = results.groupby("task").method.transform(lambda x: needed <= set(x))
    results = results[has_both]
    if results.empty:
        print(f"There is no report without {PORTFOLIO} and {BASELINE} on a task.")
        return
    for ours in MAIN:
        if ours in set(results.method):
            print(f"\n{summary(results, CLOCK, ours).to_string()}\n")
            print("\n".join(verdicts(results, ours)))
    print(f"\n{settings(results).to_string()}\n")
    path = folder / "report.md"
    path.write_text(page(results, folder))
    print(f"Page: {path}")
