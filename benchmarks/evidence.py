"""What the bounds promise, what they keep, and what they can see, by simulation.

    python benchmarks/evidence.py [--quick] [--simulations 10000] [--part NAME ...]
        [--json PATH] [--plot PATH]

false: how often any of K candidates that are as good as the reference is declared
  better at 5%, on N examples. Scores: 0/1, where 80% are right and two candidates
  differ on 6% of the examples; bounded, in [0, 1]; heavy-tailed, with noise of
  Student's t, 3 degrees of freedom.
anytime: how often one such candidate is ever declared better, if one looks after each
  of 100 rounds of 64 new examples.
power: how often a candidate that is better by 0.01 is declared better, on 2,000
  examples, 0 or 1, of which two candidates differ on 6%.

"Reached" means that the rate is at most 5%, or above it by no more than two standard
errors of the simulation; it is said of those methods alone that promise it. It takes
about a quarter of an hour on two cores.
"""

import json
import math
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.scipy.stats import norm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from optax_ev3 import evidence as ev
from optax_ev3._src.base import statistics

ALPHA = 0.05
KINDS = ("0/1", "bounded", "heavy-tailed")
IN_RANGE = ("0/1", "bounded")
SCORE = "score"

_QUICK = flags.DEFINE_bool("quick", False, "Few and small simulations: a test.")
_SIMULATIONS = flags.DEFINE_integer("simulations", 10_000, "Of each case.", 2)
_JSON = flags.DEFINE_string("json", None, "Write all figures to this file.")
_PLOT = flags.DEFINE_string("plot", None, "Draw them to this file.")


class Settings(NamedTuple):
    simulations: int = 10_000
    examples: tuple[int, ...] = (64, 256, 2048)
    candidates: tuple[int, ...] = (2, 4, 8, 16)
    rounds: int = 100
    round_examples: int = 64
    power_examples: int = 2000
    resamples: int = 199
    at_once: int = 4_000_000  # scores in memory


QUICK = Settings(
    simulations=40,
    examples=(16, 48),
    candidates=(2, 4),
    rounds=6,
    round_examples=16,
    power_examples=100,
    resamples=19,
    at_once=2000,
)


# Scores.


def draw(kind: str, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Scores ``[C, N]`` of candidates that are equally good and have much in common."""
    common, own, more, differs = jax.random.split(key, 4)
    if kind == "0/1":
        # Two candidates differ where either was drawn anew and it shows: on 6%.
        anew = 1 - math.sqrt(1 - 0.06 / 0.32)
        right = jax.random.bernoulli(common, 0.8, (1, shape[1]))
        other = jax.random.bernoulli(own, 0.8, shape)
        scores = jnp.where(jax.random.bernoulli(differs, anew, shape), other, right)
        return scores.astype(jnp.float32)
    shared = jax.random.normal(common, (1, shape[1]))
    noise = jax.random.normal(own, shape)
    if kind == "bounded":
        return jax.nn.sigmoid(1 + 2 * shared + 0.7 * noise)
    # Chi-squared with 3 degrees of freedom, of which an exponential makes 2.
    squares = jax.random.normal(more, shape) ** 2
    squares += 2 * jax.random.exponential(differs, shape)
    return shared + 0.3 * noise / jnp.sqrt(squares / 3)


def draw_better(key: jax.Array, examples: int) -> jax.Array:
    """Scores ``[2, N]``, 0 or 1: the first is better by 0.01, on 6% they differ."""
    first, second = jax.random.split(key)
    reference = jax.random.bernoulli(first, 0.8, (examples,))
    changes = jnp.where(reference, 0.025 / 0.8, 0.035 / 0.2)
    changed = jax.random.bernoulli(second, changes)
    return jnp.stack([reference ^ changed, reference]).astype(jnp.float32)


def gather(kind: str, scores: jax.Array) -> ev.Evidence:
    names = frozenset([SCORE] if kind == "0/1" else [])
    count = scores.shape[0]
    valid, is_ascent = jnp.ones([count], bool), jnp.zeros([count], bool)
    return ev.gather({SCORE: scores}, valid, is_ascent, binary=names)


# Methods.


class Method(NamedTuple):
    """How to declare candidates better.

    Attributes:
      bound: Name of the bound, or "max-t", which is a correction besides.
      correction: For K candidates, or None.
      kinds: The scores that it takes.
      promises: Whether it claims to be wrong with 5% at most, at least approximately.
    """

    bound: str
    correction: str | None = "bonferroni"
    kinds: tuple[str, ...] = KINDS
    promises: bool = True


METHODS = {
    "paired z, uncorrected": Method("paired z", None, promises=False),
    "paired t, Bonferroni": Method("paired t"),
    "paired t, max-t": Method("max-t", None),
    "McNemar, Bonferroni": Method("McNemar", kinds=("0/1",)),
    "betting, Bonferroni": Method("betting", kinds=IN_RANGE),
}


def paired_z(evidence: ev.Evidence, objective: str, reference: int) -> jax.Array:
    """P values of the paired z test, as it is usually written."""
    gain, stderr, _ = ev.compare(evidence, objective, reference)
    return norm.sf(gain / jnp.where(stderr > 0, stderr, 1))


def p_values() -> dict[str, Callable[..., jax.Array]]:
    """The bounds by name, as ``fn(evidence, objective, reference) -> [C]``."""
    bounds = {
        "paired t": ev.paired_t(),
        "McNemar": ev.mcnemar(),
        "betting": ev.betting(0, 1),
    }
    return {"paired z": paired_z} | {k: v.p_value for k, v in bounds.items()}


def corrected(p: jax.Array, correction: str | None, tested: jax.Array) -> jax.Array:
    if correction is None:
        return jnp.where(tested, p, 1)
    return ev.bonferroni(p, tested)


def simulate(
    one: Callable[[jax.Array], Any], scores: int, settings: Settings, case: str
) -> Any:
    """What ``one(key)`` finds in all simulations, stacked, in NumPy.

    As many run at once as their ``scores`` fit into memory. Each case has keys of its
    own, so that chance does not strike all alike.
    """
    at_once = max(1, min(settings.simulations, settings.at_once // scores))
    chunks = math.ceil(settings.simulations / at_once)
    key = jax.random.key(zlib.crc32(case.encode()))
    keys = jax.random.split(key, (chunks, at_once))
    found = jax.jit(lambda keys: jax.lax.map(jax.vmap(one), keys))(keys)
    return jax.tree.map(
        lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[: settings.simulations], found
    )


def rate_row(declared: np.ndarray, promises: bool) -> dict[str, Any]:
    """The share of simulations, two standard errors, and whether 5% was kept."""
    rate, count = float(declared.mean()), len(declared)
    errors = 2 * math.sqrt(max(rate * (1 - rate), 1 / count) / count)
    kept = "reached" if rate - errors <= ALPHA else "missed"
    return {"rate": rate, "errors": errors, "5%": kept if promises else "-"}


# False: candidates that are no better, one round.


def measure_false(settings: Settings) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        names = [name for name, method in METHODS.items() if kind in method.kinds]
        for examples in settings.examples:
            declared = _declared(kind, names, examples, settings)
            for name in names:
                for i, count in enumerate(settings.candidates):
                    row = rate_row(declared[name][:, i], METHODS[name].promises)
                    case = {"scores": kind, "N": examples, "method": name, "K": count}
                    rows.append(case | row)
    return rows


def _declared(kind, names, examples, settings):
    """Whether each method declares any of the first K candidates better."""
    most = max(settings.candidates)
    reference = most
    fns = p_values()

    def one(key):
        found = gather(kind, draw(kind, key, (most + 1, examples)))
        p = {
            name: fns[name](found, SCORE, reference)
            for name in {METHODS[name].bound for name in names} - {"max-t"}
        }

        def declares(name, count):
            method, tested = METHODS[name], jnp.arange(most + 1) < count
            if method.bound == "max-t":
                settled = ev.max_t(found, SCORE, reference, tested, settings.resamples)
            else:
                settled = corrected(p[method.bound], method.correction, tested)
            return (settled <= ALPHA).any()

        return {
            name: jnp.stack([declares(name, count) for count in settings.candidates])
            for name in names
        }

    return simulate(one, (most + 1) * examples, settings, f"{kind} {examples}")


def print_false(rows: Sequence[dict[str, Any]], settings: Settings) -> None:
    print(
        f"Any of K equal candidates declared better, at {ALPHA:.0%} (± two errors).\n"
    )
    counts = settings.candidates
    heads = "".join(f"{f'K = {count}':>17}" for count in counts)
    print(f"{'scores':14}{'N':>5}  {'method':28}{heads}  5%")
    for first in range(0, len(rows), len(counts)):
        cells = rows[first : first + len(counts)]
        case = cells[0]
        rates = "".join(f"{cell(row):>17}" for row in cells)
        kept = {row["5%"] for row in cells}
        verdict = "missed" if "missed" in kept else kept.pop()
        line = f"{case['scores']:14}{case['N']:5}  {case['method']:28}{rates}"
        print(f"{line}  {verdict}", flush=True)
    judged = [row for row in rows if row["5%"] != "-"]
    missed = sum(row["5%"] == "missed" for row in judged)
    print(f"\nMissed by {missed} of {len(judged)} that promise it.")


def cell(row: dict[str, Any]) -> str:
    return f"{row['rate']:.4f} ± {row['errors']:.4f}"


# Okabe and Ito's colours, told apart by the colour-blind, too.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, PINK, GREY = "#0072B2", "#CC79A7", "#888888"
STYLES = {
    "paired z, uncorrected": (BLACK, "--", "s"),
    "paired t, Bonferroni": (BLUE, "-", "o"),
    "paired t, max-t": (SKY, "-", "o"),
    "McNemar, Bonferroni": (GREEN, "-", "o"),
    "betting, Bonferroni": (PINK, "-", "D"),
}


def draw_false(rows: Sequence[dict[str, Any]], settings: Settings, figure: Any) -> None:
    examples = min(settings.examples)
    panels = figure.subplots(1, len(KINDS), sharey=True)
    lines = {}
    for axes, kind in zip(panels, KINDS, strict=True):
        for name, (colour, style, marker) in STYLES.items():
            rates = [
                row["rate"]
                for row in rows
                if (row["scores"], row["N"], row["method"]) == (kind, examples, name)
            ]
            if rates:
                (lines[name],) = axes.plot(
                    settings.candidates,
                    rates,
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
    figure.legend(
        [lines[name] for name in lines],
        list(lines),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9.5,
    )


def level(axes: Any) -> None:
    """Shares from 0, where small ones are told apart, and the line at 5%."""
    axes.set_yscale("function", functions=(lambda y: np.sqrt(abs(y)), np.square))
    axes.yaxis.set_major_locator(FixedLocator([0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 1]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#DDDDDD", lw=0.8)
    axes.axhline(ALPHA, color="#BBBBBB", lw=5, alpha=0.5, zorder=0)


# Anytime: a candidate that is no better, looked at after each round.


def pooled_z():
    """The paired z test on all examples so far, as if nobody had looked before."""

    def add(state, evidence, number):
        del number
        found = ev.differences(evidence, SCORE, 1)
        d = found.values[0]
        parts = jnp.stack([found.n, d.sum(), (d**2).sum()])
        n, total, squares = state = state + parts
        variance = (squares - total**2 / n) / (n - 1)
        z = total / jnp.sqrt(jnp.where(variance > 0, n * variance, 1))
        return state, norm.sf(z) <= ALPHA

    return jnp.zeros([3]), add


def each_round(bound: ev.Bound, level_of: Callable[[Any], Any]):
    """A test of each round alone, at a level that depends on its number."""

    def add(state, evidence, number):
        p = bound.p_value(evidence, SCORE, 1)[0]
        return state, p <= level_of(number)

    return jnp.zeros([]), add


def mixture_of_rounds():
    """The trial of the default rule: z values of rounds, in a normal mixture."""
    rho = statistics.best_rho(30)

    def add(state, evidence, number):
        total = state + ev.compare(evidence, SCORE, 1).z[0]
        log_e = statistics.mixture_log_e(total, number, rho)
        return total, log_e >= math.log(1 / ALPHA)

    return jnp.zeros([]), add


LOOKS = {
    "pooled z after each round": (pooled_z, False),
    "paired t, each round at 5%": (
        lambda: each_round(ev.paired_t(), lambda number: ALPHA),
        False,
    ),
    "paired t, 5% spent": (
        lambda: each_round(ev.paired_t(), lambda number: ev.spend(ALPHA, number)),
        True,
    ),
    "normal mixture of rounds": (mixture_of_rounds, True),
}


def measure_anytime(settings: Settings) -> list[dict[str, Any]]:
    rows = []
    shape = (2, settings.round_examples)
    for kind in IN_RANGE:

        def one(key, kind=kind):
            ways = {name: make() for name, (make, _) in LOOKS.items()}

            def look(states, number):
                found = gather(kind, draw(kind, jax.random.fold_in(key, number), shape))
                found = {k: ways[k][1](states[k], found, number) for k in ways}
                return {k: v[0] for k, v in found.items()}, {
                    k: v[1] for k, v in found.items()
                }

            start = {name: way[0] for name, way in ways.items()}
            numbers = jnp.arange(1, settings.rounds + 1)
            declared = jax.lax.scan(look, start, numbers)[1]
            return jax.tree.map(lambda x: jax.lax.cummax(x.astype(jnp.int8)), declared)

        # Over the rounds, too, which are cheap.
        ever = simulate(one, 40 * math.prod(shape), settings, f"anytime {kind}")
        for name, (_, promises) in LOOKS.items():
            row = rate_row(ever[name][:, -1], promises)
            curve = ever[name].mean(0).tolist()
            rows.append({"scores": kind, "method": name} | row | {"curve": curve})
    return rows


def print_anytime(rows: Sequence[dict[str, Any]], settings: Settings) -> None:
    print(
        f"Ever declared better at {ALPHA:.0%} though no better, {settings.rounds} "
        f"rounds of {settings.round_examples} examples.\n"
    )
    looks = sorted({1, max(1, settings.rounds // 10), settings.rounds // 2})
    heads = "".join(f"{f'round {look}':>10}" for look in looks)
    end = f"round {settings.rounds}"
    print(f"{'scores':14}{'method':28}{heads}{end:>17}  5%")
    for row in rows:
        cells = "".join(f"{row['curve'][look - 1]:10.4f}" for look in looks)
        line = f"{row['scores']:14}{row['method']:28}{cells}{cell(row):>17}"
        print(f"{line}  {row['5%']}", flush=True)


def draw_anytime(
    rows: Sequence[dict[str, Any]], settings: Settings, figure: Any
) -> None:
    panels = figure.subplots(1, len(IN_RANGE), sharey=True)
    colours = dict(zip(LOOKS, (BLACK, GREY, BLUE, ORANGE), strict=True))
    for axes, kind in zip(panels, IN_RANGE, strict=True):
        for row in rows:
            if row["scores"] == kind:
                name = row["method"]
                style = "-" if LOOKS[name][1] else "--"
                x = np.arange(1, settings.rounds + 1)
                (line,) = axes.plot(x, row["curve"], style, color=colours[name], lw=2)
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
    handles = panels[0].get_legend_handles_labels()
    figure.legend(
        *handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9.5
    )


# Power: a candidate that is better.

POWERS = {
    "paired t": BLUE,
    "McNemar": GREEN,
    "betting": PINK,
}


def measure_power(settings: Settings) -> list[dict[str, Any]]:
    examples = settings.power_examples
    fns = p_values()

    def one(key):
        found = gather("0/1", draw_better(key, examples))
        return {name: fns[name](found, SCORE, 1)[0] <= ALPHA for name in POWERS}

    declared = simulate(one, 2 * examples, settings, "power")
    rows = []
    for name in POWERS:
        row = rate_row(declared[name], False)
        rows.append({"method": name, "rate": row["rate"], "errors": row["errors"]})
    return rows


def print_power(rows: Sequence[dict[str, Any]], settings: Settings) -> None:
    print(
        f"Declared better at {ALPHA:.0%}, one-sided, when better by 0.01; "
        f"{settings.power_examples:,} examples, 0 or 1, of which 6% differ.\n"
    )
    print(f"{'method':28}{'power':>17}")
    for row in rows:
        print(f"{row['method']:28}{cell(row):>17}", flush=True)


def draw_power(rows: Sequence[dict[str, Any]], settings: Settings, figure: Any) -> None:
    axes = figure.subplots()
    names = [row["method"] for row in rows]
    rates, errors = (np.array([row[k] for row in rows]) for k in ("rate", "errors"))
    colours = [POWERS[name] for name in names]
    axes.barh(names, rates, xerr=errors, color=colours, ecolor="#444444", height=0.7)
    for y, (rate, error) in enumerate(zip(rates, errors, strict=True)):
        axes.text(rate + error + 0.01, y, f"{rate:.1%}", va="center", fontsize=9.5)
    axes.invert_yaxis()
    axes.set_xlim(0, max(0.7, (rates + errors).max() + 0.1))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD", lw=0.8)
    axes.set_xlabel("Declared better")
    figure.suptitle(
        f"Power: better by 0.01, {settings.power_examples:,} examples of which 6% "
        f"differ",
        fontsize=13,
    )


# All parts.


class Part(NamedTuple):
    """One question of the benchmark.

    Attributes:
      measure: Maps settings to rows.
      show: Prints ``(rows, settings)`` as a table.
      draw: Draws ``(rows, settings, figure)``.
      inches: Height of the picture.
    """

    measure: Callable[[Settings], list[dict[str, Any]]]
    show: Callable[[Sequence[dict[str, Any]], Settings], None]
    draw: Callable[[Sequence[dict[str, Any]], Settings, Any], None]
    inches: float


PARTS = {
    "false": Part(measure_false, print_false, draw_false, 4.4),
    "anytime": Part(measure_anytime, print_anytime, draw_anytime, 3.8),
    "power": Part(measure_power, print_power, draw_power, 3.4),
}
_PARTS = flags.DEFINE_multi_enum("part", list(PARTS), list(PARTS), "Which; all.")


def plot(figures: dict[str, Any], settings: Settings, path: str) -> None:
    """One picture, a row for each part."""
    parts = [part for part in PARTS if part in figures]
    inches = [PARTS[part].inches for part in parts]
    picture = Figure(figsize=(10, sum(inches)), dpi=150, layout="constrained")
    rows = picture.subfigures(len(parts), 1, height_ratios=inches, squeeze=False)
    for part, row in zip(parts, rows[:, 0], strict=True):
        PARTS[part].draw(figures[part], settings, row)
    for axes in picture.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=10)
        axes.set_axisbelow(True)
    picture.savefig(path)


def main(_):
    settings = QUICK if _QUICK.value else Settings(simulations=_SIMULATIONS.value)
    figures: dict[str, Any] = {"settings": settings._asdict()}
    for name in [name for name in PARTS if name in _PARTS.value]:
        figures[name] = PARTS[name].measure(settings)
        print(f"\n{name}, {settings.simulations:,} simulations.")
        PARTS[name].show(figures[name], settings)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(figures, indent=1))
    if _PLOT.value:
        plot(figures, settings, _PLOT.value)


if __name__ == "__main__":
    app.run(main)
