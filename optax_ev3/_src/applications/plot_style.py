"""What pictures of a run have in common: colours, axes, names of rows."""

from collections.abc import Collection, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, told apart by the colour-blind, too; the first ones are of
# what was adopted and of stable, and the rest, with them, of the objectives.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY, PALE = "#666666", "#DDDDDD"

_WIDTH = 32  # Characters of a name.


def checked_axes(axes: Any, panels: Collection[str]) -> dict[str, Axes]:
    """The axes given, if they are what was asked for."""
    if not isinstance(axes, Mapping):
        raise TypeError(
            "axes must be a mapping from names of panels to matplotlib's Axes, got "
            f"{type(axes).__name__}."
        )
    unknown = [name for name in axes if name not in panels]
    if unknown or not axes:
        raise ValueError(f"axes may be for {list(panels)}, got {list(axes)}.")
    for name, place in axes.items():
        if not isinstance(place, Axes):
            raise TypeError(
                f"axes[{name!r}] must be matplotlib's Axes, got {type(place).__name__}."
            )
    return dict(axes)


def tidy(axes: Axes) -> None:
    """What all panels have in common."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_axisbelow(True)


def explain(axes: Axes) -> None:
    """A legend beside the panel, where it hides nothing."""
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        fontsize=8,
        frameon=False,
    )


def short(name: str, width: int = _WIDTH) -> str:
    """The name, without its middle where it is long, and taken literally.

    More is left of the end, where the numbers of members stand.
    """
    if len(name) > width:
        head = (width - 1) // 3
        name = f"{name[:head]}…{name[head + 1 - width :]}"
    return name.replace("$", r"\$")


def labels(names: list[str]) -> list[str]:
    """The names, shortened; numbered where that makes them equal."""
    found = [short(name) for name in names]
    return [
        f"{label} #{i}" if found.count(label) > 1 else label
        for i, label in enumerate(found)
    ]
