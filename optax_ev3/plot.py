"""For matplotlib: pictures of a run.

Dimensions: ``R`` rounds, ``C`` candidates, ``M`` objectives, ``K`` members of a group
whose hyperparameters evolve, ``E`` explorers.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
except ImportError as _error:
    raise ImportError(
        'optax_ev3.plot needs matplotlib: pip install "optax_ev3[plot]"'
    ) from _error

from optax_ev3._src.applications import plot_data, plot_style, plot_work
from optax_ev3._src.applications.plot_style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    RED,
    short,
)
from optax_ev3._src.history import schedule

__all__ = ["history", "work"]

_CYCLE = [BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9"]
_DASHES = ["-", "--", ":", "-."]

_DECADE = 10.0  # What spans more is drawn on a logarithmic scale.
_MANY = 30  # With more candidates, rows of those never adopted are left out.


class _Panel(NamedTuple):
    """One panel: its height in inches, and what draws it."""

    height: float
    draw: Callable[[Axes], None]


def history(
    state_or_history: Any,
    *,
    axes: Mapping[str, Axes] | None = None,
    objective: str | None = None,
) -> Figure:
    """Draws the last rounds: scores, choices, priorities, evolved hyperparameters.

    The panels, from top to bottom, for R rounds and C candidates:

    - ``score``: mean score of what was adopted in each round, with its bounds (1.96
      standard errors each way where the history has none), and that of the stable
      parameters it was compared with; rounds that replaced these are marked below.
      The scale is logarithmic where all means are negative, as log-likelihoods are,
      and span more than a decade;
    - ``adopted``: the candidate adopted in each round, one row each, and its share of
      the R rounds; where C > 30, only rows of those that ever were;
    - ``priorities``: what the rule gave each of several objectives, where it has any;
    - ``score/OTHER``: as ``score``, by each of the other objectives;
    - ``hyperparams/GROUP/NAME``: a hyperparameter that evolves: every member of the
      group as a point, those adopted joined by a line; logarithmic where all are
      positive and span more than a decade.

    The x axis counts rounds, from 0, if each had one step, else the calls of ``update``
    up to the round's end, from the first of the rounds drawn.

    Args:
      state_or_history: A state as for :func:`optax_ev3.history`, or the dictionary that
        it returns.
      axes: Axes to draw in, by the names of the panels above; others are not drawn.
        Default: all panels, in a new figure.
      objective: Name of the objective whose scores are in the first panel, in their
        own units; default: the main one.

    Returns:
      The figure, or the one that ``axes`` are in. A new one is unknown to ``pyplot``,
      so there is nothing to close; ``figure.savefig(path)`` writes it, and a notebook
      shows it after ``%matplotlib inline``.

    Raises:
      TypeError: If an argument is of the wrong kind, or the state is traced.
      ValueError: If no round has ended, if a name is unknown, if the history lacks
        something or its shapes don't fit; for states, as :func:`optax_ev3.history`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3, optax_ev3.plot
      >>> tx = optax_ev3.ev3([optax.sgd(0.1), optax.sgd(0.3)], lambda w: -(w**2))
      >>> w = jnp.array(2.0)
      >>> _, state = tx.update(2 * w, tx.init(w), w)
      >>> figure = optax_ev3.plot.history(state)
      >>> print(*(axes.get_title("left") for axes in figure.axes), sep="; ")
      Score; Adopted
    """
    past = plot_data.read(state_or_history, objective)
    panels = _panels(past)
    own = axes is None
    chosen = _new_axes(panels) if own else plot_style.checked_axes(axes, panels)
    explained = set()
    for name, place in chosen.items():
        panels[name].draw(place)
        plot_style.tidy(place)
        labels = set(place.get_legend_handles_labels()[1])
        if not labels <= explained:
            plot_style.explain(place)
        explained |= labels if own else set()
    for place in list(chosen.values())[-1:] if own else chosen.values():
        place.set_xlabel(past.unit, fontsize=9)
    return next(iter(chosen.values())).figure.figure


def work(state_or_history: Any, *, axes: Mapping[str, Axes] | None = None) -> Figure:
    """Draws who took part in the last rounds, who was adopted, and what was paid.

    The panels, for R rounds and E explorers:

    - ``work``: one row for each explorer, and one for ``current`` and ``stable``, which
      stand for what was there before: the rounds in which it took part, and those in
      which it, or an average of it, was adopted. A round is as wide as it has calls of
      ``update``; in a relay it is a turn, and belongs to the explorer at work;
    - ``share``: what each explorer used of all gradients, and how often it, or an
      average of it, was adopted, as shares of the R rounds;
    - ``active``: how many explorers took part in each round.

    In each call of ``update`` an explorer that takes part uses one gradient, and one
    that is paused none. It is a gradient of its own, or the caller's: in a relay that
    is one a call; in one-step rounds, and with ``gradients="shared"``, all explorers
    use the same one. Rounds in which nothing was valid are not in the history.

    Args:
      state_or_history: As for :func:`history`.
      axes: As for :func:`history`, by the names of the panels above.

    Returns:
      The figure, see :func:`history`.

    Raises:
      TypeError: If an argument is of the wrong kind, or the state is traced.
      ValueError: If no round has ended, if a name is unknown, if the history lacks
        something or its shapes don't fit; for states, as :func:`optax_ev3.history`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3, optax_ev3.plot
      >>> tx = optax_ev3.ev3([optax.sgd(0.1), optax.sgd(0.3)], lambda w: -(w**2))
      >>> w = jnp.array(2.0)
      >>> _, state = tx.update(2 * w, tx.init(w), w)
      >>> figure = optax_ev3.plot.work(state)
      >>> print(*(axes.get_title("left") for axes in figure.axes), sep="; ")
      Explorers; Share of; Explorers at work;
    """
    done = plot_data.read_work(state_or_history)
    if axes is None:
        return plot_work.in_new_figure(done)
    return plot_work.in_axes(done, plot_style.checked_axes(axes, plot_work.PANELS))


# Where the panels are.


def _panels(past: plot_data.Past) -> dict[str, _Panel]:
    """All panels by their names, from top to bottom."""
    main, *others = past.scores
    title = "Score" if main == "score" else f"Score: {short(main)}"
    rows = _rows(past)
    panels = {
        "score": _Panel(2.3, functools.partial(_draw_scores, past, main, title)),
        "adopted": _Panel(0.6 + 0.17 * len(rows), functools.partial(_draw_rows, past)),
    }
    if past.priorities:
        panels["priorities"] = _Panel(1.6, functools.partial(_draw_priorities, past))
    for name in others:
        draw = functools.partial(_draw_scores, past, name, f"Score: {short(name)}")
        panels[f"score/{name}"] = _Panel(1.6, draw)
    for name in past.hyperparams:
        draw = functools.partial(_draw_hyperparam, past, name)
        panels[f"hyperparams/{name}"] = _Panel(1.6, draw)
    return panels


def _new_axes(panels: Mapping[str, _Panel]) -> dict[str, Axes]:
    """Axes of a new figure, one below the other."""
    heights = [panel.height for panel in panels.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.4), layout="constrained")
    places = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, height_ratios=heights
    )
    return dict(zip(panels, places[:, 0], strict=True))


# What they show.


def _draw_scores(past: plot_data.Past, name: str, title: str, axes: Axes) -> None:
    """Scores of what was adopted, and of stable, by one objective."""
    scores, x, size = past.scores[name], past.x, _marker_size(past)
    row = np.arange(len(x))
    mean, lower, upper = (values[row, past.adopted] for values in scores[:3])
    stable = scores.mean[:, -1]
    line = functools.partial(axes.plot, lw=_line_width(past), ms=size - 1)
    line(x, mean, "o-", color=BLUE, zorder=3, label="adopted")
    if (upper > lower).any():
        label = "its bounds" if scores.bounded else f"± {plot_data.Z} standard errors"
        axes.fill_between(x, lower, upper, color=BLUE, alpha=0.2, lw=0, label=label)
    line(x, stable, "s--", color=ORANGE, zorder=2, label="stable")
    if past.replaced.any():
        # At the bottom, where any number of them hides nothing.
        axes.plot(
            x[past.replaced],
            np.full(past.replaced.sum(), 0.03),
            "|",
            color=RED,
            ms=8,
            transform=axes.get_xaxis_transform(),
            label="stable replaced",
        )
        axes.margins(y=0.1)
    sizes = -np.concatenate([mean, stable])
    if _spans_decades(sizes):
        _scale_negative(axes, np.nanmin(sizes), np.nanmax(sizes))
    axes.grid(axis="y", color=PALE, lw=0.6)
    axes.set_title(title, loc="left", fontsize=10)


def _scale_negative(axes: Axes, smallest: float, largest: float) -> None:
    """Logarithmic below the negative of ``smallest``, linear above it, for bounds."""
    axes.set_yscale("symlog", linthresh=smallest, linscale=0.3)
    exponents = np.arange(np.floor(np.log10(smallest)), np.log10(largest) + 1)
    steps = [1, 2, 5] if largest < _DECADE**3 * smallest else [1]
    ticks = np.outer(_DECADE**exponents, steps).ravel()
    axes.yaxis.set_major_locator(FixedLocator([0, *-ticks[ticks >= smallest]]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: FuncFormatter.fix_minus(f"{y:g}"))
    )


def _rows(past: plot_data.Past) -> list[int]:
    """Indices of the candidates that have a row."""
    count = len(past.names)
    if count <= _MANY:
        return list(range(count))
    return sorted(set(past.adopted.tolist()))


def _draw_rows(past: plot_data.Past, axes: Axes) -> None:
    """Which candidate was adopted, one row each, and how often."""
    rows, count = _rows(past), len(past.names)
    colours = [BLUE] * (count - 2) + [GREY, ORANGE]
    shares = []
    for row, index in enumerate(rows):
        chosen = past.adopted == index
        x = past.x[chosen]
        y = np.full(len(x), row)
        axes.plot(x, y, "o", color=colours[index], ms=_marker_size(past))
        shares.append(f"{chosen.mean():.0%}")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), plot_style.labels([past.names[i] for i in rows]))
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(rows)), shares)
    right.tick_params(length=0, labelsize=8)
    right.spines["right"].set_visible(False)
    axes.grid(axis="y", color=PALE, lw=0.6)
    left_out = count - len(rows)
    more = f" ({left_out} others never)" if left_out else ""
    axes.set_title(f"Adopted{more}", loc="left", fontsize=10)
    axes.set_title("Share of rounds", loc="right", fontsize=8)


def _draw_priorities(past: plot_data.Past, axes: Axes) -> None:
    """What the rule gave each objective."""
    for i, (name, values) in enumerate(past.priorities.items()):
        axes.plot(
            past.x,
            values,
            color=_CYCLE[i % len(_CYCLE)],
            ls=_DASHES[i % len(_DASHES)],
            lw=_line_width(past),
            marker="o",
            ms=_marker_size(past) - 1,
            label=short(name, 24),
        )
    axes.grid(axis="y", color=PALE, lw=0.6)
    axes.set_title("Priorities of the objectives", loc="left", fontsize=10)


def _draw_hyperparam(past: plot_data.Past, name: str, axes: Axes) -> None:
    """One hyperparameter of all members, and of the one adopted."""
    values = past.hyperparams[name]
    # There may be more of "/", in both names.
    ends = [i for i, char in enumerate(name) if char == "/"]
    group = next((name[:i] for i in ends if f"{name[:i]}/0" in past.names), name)
    size = _marker_size(past)
    axes.plot(
        np.repeat(past.x, values.shape[1]),
        values.ravel(),
        "o",
        color=GREY,
        alpha=0.35,
        markeredgewidth=0,
        ms=size - 1,
        label="all members",
    )
    member = schedule.winners(past.names, past.adopted, group)
    at = np.flatnonzero((member >= 0) & (member < values.shape[1]))
    chosen = values[at, member[at]]
    width = _line_width(past)
    axes.plot(past.x[at], chosen, "o-", color=BLUE, lw=width, ms=size, label="adopted")
    if _spans_decades(values):
        axes.set_yscale("log")
    axes.grid(axis="y", color=PALE, lw=0.6)
    axes.set_title(short(name, 60), loc="left", fontsize=10)


def _marker_size(past: plot_data.Past) -> float:
    """In points: smaller where there are many rounds."""
    return float(np.clip(300 / len(past.x), 2, 5))


def _line_width(past: plot_data.Past) -> float:
    """In points: thinner where there are many rounds."""
    return float(np.clip(200 / len(past.x), 0.7, 1.4))


def _spans_decades(values: np.ndarray) -> bool:
    """Whether what is finite is positive, and spans more than a decade."""
    finite = values[np.isfinite(values)]
    return finite.size > 0 and 0 < _DECADE * finite.min() < finite.max()
