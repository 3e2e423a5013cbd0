"""Statistics, tables and pictures that suites share."""

import gc
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats
from statsmodels.stats.multitest import multipletests

# Okabe and Ito's colours, told apart by the colour-blind, too.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, PINK, GREY = "#0072B2", "#CC79A7", "#888888"


def spread(values, digits: int = 4, scale: float = 1.0) -> str:
    """Mean and standard error."""
    values = scale * np.asarray(values, float)
    return f"{values.mean():.{digits}f} ± {stats.sem(values):.{digits}f}"


def ratio(values, reference, digits: int = 3) -> str:
    """Of the means, with the standard error of the paired values."""
    found = np.mean(values) / np.mean(reference)
    error = stats.sem(np.subtract(values, found * np.asarray(reference)))
    return f"{found:.{digits}f} ± {error / np.mean(reference):.{digits}f}"


def paired(ours, theirs) -> float:
    """P value of a paired t test, signed: negative where ours are lower."""
    if np.array_equal(ours, theirs):
        return 1.0
    test = stats.ttest_rel(ours, theirs)
    # Not zero, which has no sign to compare.
    return float(np.copysign(max(test.pvalue, 1e-300), test.statistic))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Corrected for as many tests, signs kept."""
    gc.freeze()  # It collects garbage at every call, which takes half a second.
    corrected = multipletests(np.abs(p_values), method="holm")[1]
    gc.unfreeze()
    return np.copysign(corrected, p_values)


def show(frame: pd.DataFrame, title: str = "", digits: int = 3) -> None:
    """Prints a table; names in its index are on the left."""
    if title:
        print(f"\n{title}\n")
    texts = []
    if not isinstance(frame.index, pd.RangeIndex):
        texts = [name for name in frame.index.names if name]
        frame = frame.reset_index()
    for name in texts:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            width = max(map(len, [name, *frame[name]]))
            frame[name] = frame[name].str.ljust(width)
            frame = frame.rename(columns={name: name.ljust(width)})
    print(frame.to_string(index=False, float_format=f"%.{digits}f"), flush=True)


def spreads(
    frame: pd.DataFrame,
    rows: Sequence[str],
    digits: Mapping[str, int],
    scale: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Means and standard errors of metrics over what else there is, in their order."""
    scale = scale or {}
    groups = frame.groupby([*rows, "metric"], sort=False).value
    cells = {
        key: spread(values, digits[key[-1]], scale.get(key[-1], 1.0))
        for key, values in groups
        if key[-1] in digits
    }
    index = pd.MultiIndex.from_tuples(cells, names=[*rows, "metric"])
    wide = pd.Series(cells.values(), index).unstack("metric", sort=False)
    return wide.fillna("")[[metric for metric in digits if metric in wide]]


def picture(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save(figure: Figure, path: pathlib.Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    print(f"Picture: {path}")
