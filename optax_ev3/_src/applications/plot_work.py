"""The picture of who took part, who was adopted, and what was paid.

Dimensions: ``R`` rounds, ``E`` explorers.
"""

import functools
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from optax_ev3._src.applications import plot_style
from optax_ev3._src.applications.plot_data import Work
from optax_ev3._src.applications.plot_style import BLUE, GREEN, GREY, ORANGE, PALE, RED

# What an explorer did in a round, in the picture of their work; nothing where it took
# no part. Later ones win.
DEEDS = {
    "took part": "#B5D3E7",
    "took part, not finite": RED,
    "adopted": BLUE,
    "an average of it adopted": GREEN,
    "current adopted": GREY,
    "stable adopted": ORANGE,
}
_EMPTY = "#F3F3F3"

_SEPARATE = 100  # With more rounds, no lines are drawn between them.


def in_axes(done: Work, chosen: Mapping[str, Axes]) -> Figure:
    """Draws in the axes given, by the names of panels."""
    for name, place in chosen.items():
        PANELS[name](done, place)
    if "work" in chosen:
        plot_style.explain(chosen["work"])
    return next(iter(chosen.values())).figure.figure


def in_new_figure(done: Work) -> Figure:
    """Draws all panels: the rows, their shares beside them, and below the sum."""
    height = 0.5 + 0.19 * len(done.names)
    figure = Figure(figsize=(9, height + 1.6), layout="constrained")
    (rows, shares), (active, corner) = figure.subplots(
        2, 2, height_ratios=[height, 1.1], width_ratios=[5, 1]
    )
    _draw_work(done, rows)
    _draw_shares(done, shares)
    _draw_active(done, active)
    # What is said below, or on the left, is not said again.
    rows.sharex(active)
    rows.set_xlabel("")
    rows.tick_params(labelbottom=False)
    shares.tick_params(labelleft=False)
    corner.axis("off")
    explained = rows.get_legend_handles_labels()
    corner.legend(*explained, loc="upper left", fontsize=8, frameon=False)
    return figure


def _draw_work(done: Work, axes: Axes) -> None:
    """Who took part, and who was adopted: a row for each explorer, current, stable."""
    deeds, colours = _deeds(done), list(DEEDS.values())
    count, rounds = deeds.shape
    axes.pcolormesh(
        done.edges,
        np.arange(count + 1) - 0.5,
        np.ma.masked_less(deeds, 0),
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=len(colours) - 0.5,
        rasterized=True,
    )
    # Between rows, and between rounds that are wide enough.
    first, last = done.edges[0], done.edges[-1]
    axes.hlines(np.arange(count + 1) - 0.5, first, last, "white", lw=2)
    if rounds <= _SEPARATE:
        axes.vlines(done.edges, -0.5, count - 0.5, "white", lw=0.5)
    for i, (name, colour) in enumerate(DEEDS.items()):
        if (deeds == i).any():
            axes.bar(np.nan, np.nan, color=colour, label=name)
    axes.set_facecolor(_EMPTY)
    axes.set_xlim(first, last)
    axes.set_xlabel(done.unit, fontsize=9)
    axes.set_title("Explorers", loc="left", fontsize=10)
    _name_rows(done, axes)


def _name_rows(done: Work, axes: Axes) -> None:
    """What panels with a row for each explorer have in common."""
    count = len(done.names)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks(range(count), plot_style.labels(done.names))
    axes.spines[:].set_visible(False)
    axes.tick_params(labelsize=8, left=False)


def _deeds(done: Work) -> np.ndarray:
    """``[E + 2, R]`` int, by place in ``DEEDS``; -1 for nothing."""
    rounds, explorers = done.took.shape
    deeds = np.full([explorers + 2, rounds], -1)
    deeds[:explorers][done.took.T] = 0
    deeds[:explorers][(done.took & ~done.finite).T] = 1
    others = np.maximum(done.adopted - explorers, -1)
    deeds[done.adopted, np.arange(rounds)] = np.where(
        others >= 0, 4 + others, 2 + done.averaged
    )
    return deeds


def _draw_shares(done: Work, axes: Axes) -> None:
    """What each explorer used of all gradients, and in how many rounds it won."""
    count, rounds = len(done.names), len(done.adopted)
    total = max(done.gradients.sum(), 1)
    paid = np.append(done.gradients / total, [0, 0])
    won = np.bincount(done.adopted, minlength=count) / rounds
    bars = [("gradients", paid, "took part", 0.8), ("rounds", won, "adopted", 0.3)]
    for i, (title, shares, deed, height) in enumerate(bars):
        axes.barh(range(count), shares, height, color=DEEDS[deed], label=title)
        # A column of numbers beside the bars, under a title beside the panel's.
        write = functools.partial(
            axes.annotate, textcoords="offset points", ha="right", fontsize=8
        )
        x = 1.45 + 0.5 * i
        write(title, (x, 1), (0, 6), "axes fraction")
        places = axes.get_yaxis_transform()
        for row in np.flatnonzero(shares):
            write(f"{shares[row]:.0%}", (x, row), (0, 0), places, va="center")
    axes.set_xlim(0, max(paid.max(), won.max()))
    axes.set_xticks([])
    axes.set_xlabel(
        f"of {total:,} gradients used, {rounds} rounds", fontsize=8, loc="left"
    )
    axes.set_title("Share of", loc="left", fontsize=10)
    _name_rows(done, axes)


def _draw_active(done: Work, axes: Axes) -> None:
    """How many explorers took part."""
    active = done.took.sum(1)
    axes.stairs(active, done.edges, color=DEEDS["took part"], fill=True)
    axes.set_xlim(done.edges[0], done.edges[-1])
    axes.set_ylim(0, 1.1 * active.max())
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=PALE, lw=0.6)
    axes.set_xlabel(done.unit, fontsize=9)
    axes.set_title("Explorers at work", loc="left", fontsize=10)
    plot_style.tidy(axes)


PANELS = {"work": _draw_work, "share": _draw_shares, "active": _draw_active}
