"""Tables and a picture of the rates of the evidence suite."""

import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from benchmarks import report as common
from benchmarks.evidence.simulate import ALPHA, IN_RANGE, KINDS, LOOKS, METHODS, POWERS
from benchmarks.report import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY

# Colour, line and marker of each test.
STYLES = {
    "paired z, uncorrected": (BLACK, "--", "s"),
    "paired t, Bonferroni": (BLUE, "-", "o"),
    "paired t, max-t": (SKY, "-", "o"),
    "McNemar, Bonferroni": (GREEN, "-", "o"),
    "betting, Bonferroni": (PINK, "-", "D"),
}
COLOURS = dict(zip(POWERS, (BLUE, GREEN, PINK), strict=True))


def report(results, settings, folder):
    """Prints a table of each part, and draws them in one picture."""
    rates = with_errors(results[results.metric == "rate"], settings.simulations)
    if len(alike := rates[rates.task == "alike"]):
        show_alike(alike, settings)
    parts = {name: rates[rates.task == name] for name in DRAWN}
    parts = {name: part for name, part in parts.items() if len(part)}
    shown = {"false": show_false, "anytime": show_anytime, "power": show_power}
    for name, part in parts.items():
        shown[name](part, settings)
    if not parts:
        return
    inches = [DRAWN[name][1] for name in parts]
    figure = common.picture(10, sum(inches))
    rows = figure.subfigures(len(parts), 1, height_ratios=inches, squeeze=False)
    for name, row in zip(parts, rows[:, 0], strict=True):
        DRAWN[name][0](parts[name], settings, row)
    for axes in figure.axes:
        axes.tick_params(labelsize=10)
        axes.set_axisbelow(True)
    common.save(figure, folder / "rates.png")


def with_errors(rates, simulations):
    """Two standard errors of each rate, and whether 5% was kept where it is promised.

    A rate of 0 or 1 has those of one simulation that went otherwise.
    """
    promises = {name: method.promises for name, method in METHODS.items()}
    promises |= {name: promise for name, (_, promise) in LOOKS.items()}
    variance = (rates.value * (1 - rates.value)).clip(lower=1 / simulations)
    errors = 2 * np.sqrt(variance / simulations)
    kept = np.where(rates.value - errors <= ALPHA, "reached", "missed")
    promised = rates.test.map(promises).fillna(False).astype(bool)
    cells = [f"{x:.4f} ± {e:.4f}" for x, e in zip(rates.value, errors, strict=True)]
    return rates.assign(errors=errors, cell=cells, kept=np.where(promised, kept, "-"))


def show_false(rates, settings):
    index = ["scores", "N", "test"]
    rates = rates.astype({"N": int, "K": int})
    table = rates.pivot(index=index, columns="K", values="cell").add_prefix("K = ")
    worst = rates.groupby(index).kept.min()  # "missed" comes before "reached".
    order = rates.set_index(index).index.unique()
    title = f"Any of K equal candidates declared better, at {ALPHA:.0%} (± two errors)"
    table = table.join(worst.rename("5%")).loc[order]
    common.show(table, f"{title}; {settings.simulations:,} simulations")
    judged = rates[rates.kept != "-"]
    missed = (judged.kept == "missed").sum()
    print(f"\nMissed by {missed} of {len(judged)} that promise it.")


def show_anytime(rates, settings):
    rates = rates.astype({"round": int})
    last = settings.rounds
    looks = sorted({1, max(1, last // 10), last // 2})
    index = ["scores", "test"]
    curves = rates.pivot(index=index, columns="round", values="value")
    ends = rates[rates["round"] == last].set_index(index)
    table = curves[looks].add_prefix("round ").join(ends[["cell", "kept"]])
    table = table.rename(columns={"cell": f"round {last}", "kept": "5%"})
    title = f"Ever declared better at {ALPHA:.0%} though no better, {last} rounds of"
    title = f"{title} {settings.round_examples} examples"
    common.show(table.loc[ends.index], title, 4)


def show_alike(rates, settings):
    table = rates.pivot(index="method", columns="test", values="cell")
    count, examples = max(settings.candidates), settings.alike_examples
    title = f"The better one of {count} found at {ALPHA:.0%}, {examples} examples"
    common.show(table.loc[rates.method.unique()], title)


def show_power(rates, settings):
    title = f"Declared better at {ALPHA:.0%}, one-sided, when better by 0.01; "
    title += f"{settings.power_examples:,} examples, 0 or 1, of which 6% differ"
    common.show(rates.set_index("test")[["cell"]], title)


def draw_false(rates, settings, figure):
    examples = min(settings.examples)
    panels = figure.subplots(1, len(KINDS), sharey=True)
    lines = {}
    for axes, kind in zip(panels, KINDS, strict=True):
        here = rates[(rates.scores == kind) & (rates.N == examples)]
        for name, one in here.groupby("test", sort=False):
            colour, style, marker = STYLES[name]
            (lines[name],) = axes.plot(
                one.K,
                one.value,
                color=colour,
                linestyle=style,
                marker=marker,
                markersize=5,
                # Hollow ones can be told apart where they are all at zero.
                fillstyle="none" if marker in "sD" else "full",
                lw=1.6,
                clip_on=False,
            )
        level(axes)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(settings.candidates))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("Candidates K")
        axes.set_title(f"{kind[0].upper()}{kind[1:]} scores", fontsize=11)
    panels[0].set_ylabel("Any declared better")
    figure.suptitle(
        f"False: K candidates that are no better, {examples} examples", fontsize=13
    )
    handles = {name: lines[name] for name in STYLES if name in lines}
    legend(figure, handles.values(), handles, 4)


def legend(figure, handles, labels, columns):
    figure.legend(
        list(handles),
        list(labels),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9.5,
    )


def level(axes):
    """Shares from 0, where small ones are told apart, and the line at 5%."""
    axes.set_yscale("function", functions=(lambda y: np.sqrt(abs(y)), np.square))
    axes.yaxis.set_major_locator(FixedLocator([0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 1]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#DDDDDD", lw=0.8)
    axes.axhline(ALPHA, color="#BBBBBB", lw=5, alpha=0.5, zorder=0)


def draw_anytime(rates, settings, figure):
    panels = figure.subplots(1, len(IN_RANGE), sharey=True)
    colours = dict(zip(LOOKS, (BLACK, GREY, BLUE, ORANGE), strict=True))
    for axes, kind in zip(panels, IN_RANGE, strict=True):
        for name, one in rates[rates.scores == kind].groupby("test", sort=False):
            style = "-" if LOOKS[name][1] else "--"
            (line,) = axes.plot(
                one["round"], one.value, style, color=colours[name], lw=2
            )
            line.set(label=name, clip_on=False)
        level(axes)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlim(1, settings.rounds)
        axes.set_xlabel("Round")
        axes.set_title(f"{kind[0].upper()}{kind[1:]} scores", fontsize=11)
    panels[0].set_ylabel("Ever declared better")
    figure.suptitle(
        f"Anytime: no better, looked at after each round of "
        f"{settings.round_examples} examples",
        fontsize=13,
    )
    legend(figure, *panels[0].get_legend_handles_labels(), 4)


def draw_power(rates, settings, figure):
    axes = figure.subplots()
    colours = [COLOURS[name] for name in rates.test]
    axes.barh(
        rates.test,
        rates.value,
        xerr=rates.errors,
        color=colours,
        ecolor="#444444",
        height=0.7,
    )
    ends = rates.value + rates.errors
    for y, (end, rate) in enumerate(zip(ends, rates.value, strict=True)):
        axes.text(end + 0.01, y, f"{rate:.1%}", va="center", fontsize=9.5)
    axes.invert_yaxis()
    axes.set_xlim(0, max(0.7, ends.max() + 0.1))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD", lw=0.8)
    axes.set_xlabel("Declared better")
    figure.suptitle(
        f"Power: better by 0.01, {settings.power_examples:,} examples of which 6% "
        f"differ",
        fontsize=13,
    )


# How each part is drawn, and its height in inches.
DRAWN = {
    "false": (draw_false, 4.4),
    "anytime": (draw_anytime, 3.8),
    "power": (draw_power, 3.4),
}
