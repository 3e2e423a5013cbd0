"""Small drawings for the gallery, made when the documentation is built.

They show what an example is about, and no results: those come from `benchmarks/`.
"""

import pathlib

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

# Grey and colours that are seen on white and on black.
_GREY, _BLUE, _ORANGE, _GREEN = "#888888", "#3b82c4", "#e08a1e", "#2a9d78"
_COLOURS = [_BLUE, _ORANGE, _GREEN]


def draw(folder):
    """Writes all drawings into a folder, as NAME.svg."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "optax_ev3"}):
        for name, fill in _DRAWINGS.items():
            figure = Figure(figsize=(3.2, 1.5))
            axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
            axes.set(xlim=(0, 32), ylim=(0, 15))
            axes.axis("off")
            fill(axes)
            metadata = {"Date": None}
            path = folder / f"{name}.svg"
            figure.savefig(path, transparent=True, metadata=metadata)


def _arrow(axes, start, end, color=_GREY, width=1.5):
    style = {"arrowstyle": "-|>", "color": color, "lw": width, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def _box(axes, x, y, width, height, text="", color=_GREY):
    style = {"boxstyle": "round,pad=0,rounding_size=0.6", "fill": False}
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, edgecolor=color, lw=1.4, **style)
    )
    middle = x + width / 2, y + height / 2
    axes.text(*middle, text, ha="center", va="center", color=color, fontsize=8)


def _fan(axes, x=5, y=7.5, size=1.0):
    """Proposals from one point, the adopted one thick."""
    ends = [(11, 4.5), (13, 0.5), (9, -4)]
    for (dx, dy), color, width in zip(ends, _COLOURS, (1.5, 3.2, 1.5), strict=True):
        _arrow(axes, (x, y), (x + size * dx, y + size * dy), color, width)
    axes.plot(x, y, "o", color=_GREY, ms=7)


def _plain_jax(axes):
    _fan(axes, 9)


def _linen_train_state(axes):
    _box(axes, 5, 1.5, 22, 12)
    axes.text(16, 2.8, "TrainState", ha="center", color=_GREY, fontsize=8)
    _fan(axes, 8, 8.5, 0.9)


def _linen_extra_args(axes):
    _box(axes, 2, 9, 9, 4, "train", _GREY)
    _box(axes, 2, 2, 9, 4, "held out", _GREEN)
    _box(axes, 21, 5, 9, 5, "TrainState", _BLUE)
    _arrow(axes, (11.5, 11), (20.5, 8.5))
    _arrow(axes, (11.5, 4), (20.5, 6.5), _GREEN, 3)


def _nnx_optimizer(axes):
    for y, text, color in [(10.5, "graph", _GREY), (6, "params", _BLUE)]:
        _box(axes, 2, y, 9, 3.2, text, color)
        _arrow(axes, (11.5, y + 1.6), (19.5, 7.6), color)
    _box(axes, 2, 1.5, 9, 3.2, "rest", _GREY)
    _arrow(axes, (11.5, 3.1), (19.5, 7.2))
    _box(axes, 20, 5, 10, 5, "model", _GREEN)


def _relay(axes):
    turns = [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2), (0, 3), (1, 3)]
    turns += [(1, 5), (2, 3), (1, 6)]
    x = 1.5
    for who, length in turns:
        color = _COLOURS[who]
        axes.barh(12 - 4.5 * who, length - 0.15, left=x, height=2.4, color=color)
        x += length
    axes.plot([1.5, x], [0.8, 0.8], color=_GREY, lw=1)


def _f1_score(axes):
    precision, recall = np.meshgrid(np.linspace(0.02, 1, 80), np.linspace(0.02, 1, 80))
    f1 = 2 * precision * recall / (precision + recall)
    axes.contour(
        9 + 14 * recall, 1 + 13 * precision, f1, levels=7, colors=_BLUE, linewidths=1.4
    )
    axes.plot([9, 9, 23], [14, 1, 1], color=_GREY, lw=1)


def _bell(x, mean, width):
    return np.exp(-0.5 * ((x - mean) / width) ** 2)


def _linen_batchnorm(axes):
    x = np.linspace(1, 31, 300)
    for mean, width, color in [(5.5, 1.2, _BLUE), (10, 2.4, _ORANGE)]:
        axes.plot(x, 2 + 10 * _bell(x, mean, width), color=color, lw=1.8)
    _arrow(axes, (16.5, 6), (20, 6))
    axes.plot(x, 2 + 10 * _bell(x, 25.5, 1.6), color=_GREEN, lw=2.6)
    axes.plot([1, 31], [2, 2], color=_GREY, lw=1)


def _nnx_batchnorm(axes):
    for x, color in zip((2, 12, 22), _COLOURS, strict=True):
        _box(axes, x, 7, 8, 5.5, "params", color)
        _box(axes, x, 2.5, 8, 3.5, "statistics", color)


def _explorers_over_devices(axes):
    for i in range(8):
        x, y = 3 + 7 * (i % 4), 8.2 - 6.2 * (i // 4)
        _box(axes, x, y, 5.5, 4.8, f"rate {i + 1}", _COLOURS[i % 3])


def _two_processes(axes):
    for x, color, name in [(2, _BLUE, "process 0"), (18, _ORANGE, "process 1")]:
        _box(axes, x, 1.5, 12, 12, color=color)
        axes.text(x + 6, 2.6, name, ha="center", color=color, fontsize=8)
        for y in (5, 9.5):
            _box(axes, x + 2, y, 8, 3, "device", _GREY)
    axes.plot([12, 20], [6.5, 6.5], color=_GREY, lw=1.4)
    axes.plot([12, 20], [11, 11], color=_GREY, lw=1.4)


def _demo(axes):
    for row in range(8):
        y, own = 13 - 1.7 * row, row < 3
        color = _COLOURS[row] if own else _GREY
        axes.barh(y, 20, left=10, height=1.0, color=color, alpha=1 if own else 0.5)
        axes.text(
            9.2, y, "ev3" if own else "alone", ha="right", va="center", fontsize=6
        )
        axes.texts[-1].set_color(color)


_DRAWINGS = {
    "plain_jax": _plain_jax,
    "linen_train_state": _linen_train_state,
    "linen_extra_args": _linen_extra_args,
    "nnx_optimizer": _nnx_optimizer,
    "relay": _relay,
    "f1_score": _f1_score,
    "linen_batchnorm": _linen_batchnorm,
    "nnx_batchnorm": _nnx_batchnorm,
    "explorers_over_devices": _explorers_over_devices,
    "two_processes": _two_processes,
    "demo": _demo,
}
