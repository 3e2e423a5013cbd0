"""What a suite has measured: one tidy CSV, to which whole cells are added.

A row is one number: the task, the method, what else tells it apart (such as a seed),
the metric, and the value. A cell is all rows of a method on a task.
"""

import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

DIGITS = "%.6g"


def tidy(values: Mapping[str, Any], **axes: Iterable[Any]) -> pd.DataFrame:
    """A row for each number of arrays, by metric, with labels along their axes."""
    labels = list(itertools.product(*axes.values()))
    return pd.concat(
        [
            pd.DataFrame(labels, columns=list(axes)).assign(
                metric=metric, value=np.ravel(array)
            )
            for metric, array in values.items()
        ]
    )


class Results:
    """The results of a suite in a folder.

    Args:
      folder: Where ``results.csv`` is, or will be.
    """

    def __init__(self, folder: pathlib.Path):
        self.path = folder / "results.csv"
        self.frame = pd.DataFrame(columns=["task", "method", "metric", "value"])
        if self.path.exists():
            self.frame = pd.read_csv(
                self.path,
                keep_default_na=False,
                na_values=[""],
                # Columns of numbers and words: older pandas warns of types by parts.
                low_memory=False,
                # Not every release of pandas reads numbers to their last digit.
                converters={"value": lambda text: float(text or "nan")},
                dtype={"task": str, "method": str, "metric": str},
            )

    def __contains__(self, cell: tuple[str, str]) -> bool:
        task, method = cell
        return ((self.frame.task == task) & (self.frame.method == method)).any()

    def add(self, task: str, method: str, rows: pd.DataFrame) -> None:
        """Adds a cell: all of it is in the file afterwards, or nothing."""
        rows = rows.assign(task=task, method=method)
        text = rows.to_csv(index=False, float_format=DIGITS)
        tables = [_as_text(io.StringIO(text))]
        if self.path.exists():
            tables.insert(0, _as_text(self.path))
        whole = pd.concat(tables).fillna("")
        first, last = ["task", "method"], ["metric", "value"]
        middle = [name for name in whole if name not in first + last]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        whole[first + middle + last].to_csv(part, index=False, lineterminator="\n")
        os.replace(part, self.path)
        self.frame = Results(self.path.parent).frame


def _as_text(file: Any) -> pd.DataFrame:
    """Numbers stay as they are written."""
    return pd.read_csv(file, dtype=str, keep_default_na=False)


class OtherSettings(ValueError):
    """A folder holds results of other settings."""


def claim(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Notes in a folder which settings its results are of.

    Raises:
      OtherSettings: They are of others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1) + "\n")
    found = json.loads(path.read_text())
    differ = sorted(k for k in found | settings if found.get(k) != settings.get(k))
    if differ:
        raise OtherSettings(
            f"{folder} holds results with another value of {', '.join(differ)}: "
            f"choose another --folder, or remove it."
        )
