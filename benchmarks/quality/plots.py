"""Pictures of the quality suite."""

import itertools

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.quality.comparisons import TUNED
from benchmarks.quality.methods import BASELINE, MAIN
from benchmarks.report import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, picture, save

COLOURS = (ORANGE, SKY, GREEN, BLUE, PINK)
SHOWN = 6  # Lines in a colour of their own; the others are grey.
MARKS = np.linspace(0, 1, 101)


def times_to_target(times, path):
    """The share of runs that have reached the target after so much work."""
    reached = {
        name: [(times[name] <= mark).groupby("task").mean().mean() for mark in MARKS]
        for name in times
    }
    order = sorted(times, key=lambda name: -np.mean(reached[name]))
    figure = picture(8, 4.5)
    axes = figure.subplots()
    colours = itertools.cycle(COLOURS)
    for place, name in enumerate(order):
        is_ours = name in MAIN
        colour = BLACK if is_ours else next(colours) if place < SHOWN else GREY
        axes.step(
            MARKS,
            reached[name],
            where="post",
            color=colour,
            lw=2.5 if is_ours else 1.5 if place < SHOWN else 0.8,
            label=name,
            zorder=3 if is_ours else 2,
        )
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("Work done, of the budget")
    axes.set_ylabel("Runs that have reached the target")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save(figure, path)


def mean_ranks(means, limits, path):
    """Of each method, the best on top, with an interval (`comparisons.interval`)."""
    figure = picture(7, 0.24 * len(means) + 0.8)
    axes = figure.subplots()
    for place, (name, mean) in enumerate(means.items()):
        is_ours = name in MAIN
        colour = BLACK if is_ours else GREY
        axes.plot(
            limits.loc[name], [place, place], color=colour, lw=2 if is_ours else 1
        )
        axes.plot(mean, place, "o", color=colour, ms=6 if is_ours else 4)
    axes.set_yticks(range(len(means)), means.index, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="x", color=GREY, alpha=0.25, lw=0.6)
    axes.set_xlabel("Mean rank, with 95% intervals; 1 is the best")
    save(figure, path)


def by_task(course, path):
    """Geometric means over seeds, of EV3 and of the others at their defaults."""
    tasks = course.index.unique("task")
    names = [x for x in (*MAIN, BASELINE, BASELINE + TUNED) if x in course]
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = picture(2.8 * columns, 2.3 * lines + 0.5)
    figure.subplots(lines, columns)
    for axes in figure.axes[len(tasks) :]:
        axes.set_visible(False)
    for axes, task in zip(figure.axes, tasks, strict=False):
        logs = np.log(course.loc[task][names].clip(lower=1e-12))
        found = np.exp(logs.groupby("mark").mean())
        for name, colour in zip(names, (BLACK, BLUE, ORANGE, GREEN), strict=False):
            axes.plot(found.index, found[name], color=colour, label=name, lw=1.3)
        axes.set(xscale="log", yscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        if high < 25 * low:  # Powers of ten alone would tell too little.
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 6, 8)))
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_title(task, loc="left", fontsize=10)
        axes.tick_params(labelsize=7, which="both")
    lines = figure.axes[0].get_lines()
    figure.legend(handles=lines, loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel("Work, of the budget", fontsize=10)
    figure.supylabel("Test figure", fontsize=10)
    save(figure, path)
