"""Data that come with packages, cut into parts for training, held-out and test."""

import functools
from pydoc_data import topics
from typing import Any

import jax
import numpy as np
from _data import Parts, load, sample
from sklearn import datasets

__all__ = [
    "Parts",
    "cut",
    "digits",
    "load",
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
