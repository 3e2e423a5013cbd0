"""A history, checked and taken apart for a picture.

Dimensions: ``R`` rounds, ``C`` candidates, ``K`` members of a group whose
hyperparameters evolve, ``E`` explorers.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_ev3._src.base.states import EV3State
from optax_ev3._src.history import report

Z = 1.96  # Standard errors each way where the history has no bounds: 95%.


class Scores(NamedTuple):
    """Scores by one objective: ``[R, C]`` float, and whether they bring bounds."""

    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    bounded: bool


class Past(NamedTuple):
    """A checked history.

    Attributes:
      x: ``[R]``, where the rounds are on the x axis, and ``unit``, what it counts.
      names: ``[C]`` names of the candidates.
      adopted: ``[R]`` int, and ``replaced``, ``[R]`` bool: whether stable was.
      scores: By name of the objective, the one of the first panel first.
      priorities: By name of the objective, ``[R]``; empty where there are none.
      hyperparams: By name, GROUP/NAME, ``[R, K]``.
    """

    x: np.ndarray
    unit: str
    names: list[str]
    adopted: np.ndarray
    replaced: np.ndarray
    scores: dict[str, Scores]
    priorities: dict[str, np.ndarray]
    hyperparams: dict[str, np.ndarray]


def _as_mapping(given: Any) -> Mapping[str, Any]:
    """The history, of whichever kind was given."""
    if isinstance(given, Mapping) and "candidates" in given:
        return given
    try:
        return report.history(given)
    except ValueError as error:
        is_state = lambda node: isinstance(node, EV3State)
        if any(map(is_state, jax.tree.leaves(given, is_leaf=is_state))):
            raise
        raise TypeError(
            "expected a state of ev3, or what optax_ev3.history returns, got "
            f"{type(given).__name__}."
        ) from error


class Work(NamedTuple):
    """Who took part in which rounds, and who was adopted.

    Attributes:
      edges: ``[R + 1]``, where rounds begin and end on the x axis.
      unit: What the x axis counts.
      names: ``[E + 2]``, the explorers, ``current`` and ``stable``: rows.
      took: ``[R, E]`` bool, whether an explorer took part.
      finite: ``[R, E]`` bool, whether one that took part had a finite score, or one of
        its averages had.
      adopted: ``[R]`` int, the row of the explorer that was adopted, or of which an
        average was.
      averaged: ``[R]`` bool, whether it was an average.
      gradients: ``[E]`` int, how many each explorer used: in a round as many as it has
        calls of ``update``, and where it took no part none.
    """

    edges: np.ndarray
    unit: str
    names: list[str]
    took: np.ndarray
    finite: np.ndarray
    adopted: np.ndarray
    averaged: np.ndarray
    gradients: np.ndarray


class _Rounds(NamedTuple):
    """What every picture shows of the rounds, checked.

    Attributes:
      names: ``[C]`` names of the candidates.
      adopted: ``[R]`` int.
      length: ``[R]``, and ``x``, where the rounds end on the x axis.
      unit: What that counts.
      single: Whether every round has one call.
    """

    names: list[str]
    adopted: np.ndarray
    length: np.ndarray
    x: np.ndarray
    unit: str
    single: bool


def _rounds(past: Mapping[str, Any], needed: tuple[str, ...]) -> _Rounds:
    """What pictures have in common; raises where something is missing or misfits."""
    needed = ("round", "adopted", "length", *needed)
    missing = [name for name in needed if name not in past]
    if missing:
        raise ValueError(f"the history lacks {', '.join(missing)}.")
    names = [str(name) for name in np.asarray(past["candidates"])]
    rounds, count = np.size(past["round"]), len(names)
    if not rounds:
        raise ValueError("there is nothing to draw: no round has ended yet.")
    one = functools.partial(_array, past, shape=(rounds,))
    adopted = one("adopted").astype(int)
    if not ((adopted >= 0) & (adopted < count)).all():
        raise ValueError(f"adopted must be from 0 to {count - 1}, got {adopted}.")
    number, length = one("round"), one("length")
    first = int(number[0])
    since = f", since round {first}" * (first > 0)
    single = bool((length == 1).all())
    return _Rounds(
        names=names,
        adopted=adopted,
        length=length,
        x=number if single else np.cumsum(length),
        unit="Round" if single else "Calls of update" + since,
        single=single,
    )


def read(state_or_history: Any, objective: str | None) -> Past:
    """Checks a history, and takes it apart."""
    past = _as_mapping(state_or_history)
    known = _rounds(past, ("significant", "mean", "stderr"))
    rounds, count = len(known.x), len(known.names)
    objectives = _objectives(past)
    shown = _first(list(objectives), objective)
    table = functools.partial(_scores, past, shape=(rounds, count))
    return Past(
        x=known.x,
        unit=known.unit,
        names=known.names,
        adopted=known.adopted,
        replaced=_array(past, "significant", (rounds,)) > 0,
        scores={name: table(objectives[name]) for name in shown},
        priorities=_priorities(past, list(objectives), rounds),
        hyperparams={
            key.split("/", 1)[1]: _array(past, key, (rounds, None))
            for key in past
            if key.startswith("hyperparams/")
        },
    )


def read_work(state_or_history: Any) -> Work:
    """Checks a history, and counts what each explorer did."""
    past = _as_mapping(state_or_history)
    known = _rounds(past, ("explorer", "paused", "mean"))
    rounds, count = len(known.x), len(known.names)
    explorer = _array(past, "explorer", (count,)).astype(int)
    shape = (rounds, count)
    took = ~(_array(past, "paused", shape) > 0)
    finite = took & np.isfinite(_array(past, "mean", shape))
    # Averages take part with their explorers, whose places are before those of all.
    explorers = int(explorer.max()) + 1
    of = [explorer == i for i in range(explorers)]
    took = np.stack([took[:, own].any(1) for own in of], 1)
    others = np.arange(count) - (count - 2)
    rows = np.where(explorer >= 0, explorer, explorers + others)
    adopted = rows[known.adopted]
    start = known.x[0] - known.length[0]
    # Where each round has one call, its number stands in the middle.
    edges = np.append(start, known.x) + known.single / 2
    return Work(
        edges=edges,
        unit=known.unit,
        names=[*known.names[:explorers], *known.names[-2:]],
        took=took,
        finite=np.stack([finite[:, own].any(1) for own in of], 1),
        adopted=adopted,
        averaged=(adopted < explorers) & (known.adopted >= explorers),
        gradients=(took.T @ known.length).astype(int),
    )


def _array(
    past: Mapping[str, Any], name: str, shape: tuple[int | None, ...]
) -> np.ndarray:
    """An entry as float, NaN where not finite; None stands for any size."""
    values = np.asarray(past[name]).astype(float)
    fits = len(values.shape) == len(shape) and all(
        size in (None, found) for size, found in zip(shape, values.shape, strict=True)
    )
    if not fits:
        wanted = str(shape).replace("None", "any")
        raise ValueError(f"{name} must have shape {wanted}, got {values.shape}.")
    return np.where(np.isfinite(values), values, np.nan)


def _objectives(past: Mapping[str, Any]) -> dict[str, str]:
    """By name of the objective, the main one first: how its entries' names end."""
    names = [str(name) for name in np.asarray(past.get("objectives", []))]
    others = names[1:] or [k.split("/", 1)[1] for k in past if k.startswith("mean/")]
    main = names[0] if names else "main objective" if others else "score"
    return {main: "", **{name: f"/{name}" for name in others}}


def _first(names: list[str], objective: str | None) -> list[str]:
    """The names of the objectives, with this one before the others."""
    if objective is None:
        return names
    if not isinstance(objective, str):
        raise TypeError(f"objective must be a name, got {objective!r}.")
    if objective not in names:
        raise ValueError(f"objective must be one of {names}, got {objective!r}.")
    return [objective, *(name for name in names if name != objective)]


def _scores(past: Mapping[str, Any], ending: str, shape: tuple[int, int]) -> Scores:
    """The scores by one objective, whose entries' names end like this."""
    mean = _array(past, "mean" + ending, shape)
    if "lower" + ending in past and "upper" + ending in past:
        bounds = (_array(past, end + ending, shape) for end in ("lower", "upper"))
        return Scores(mean, *bounds, bounded=True)
    error = Z * _array(past, "stderr" + ending, shape)
    return Scores(mean, mean - error, mean + error, bounded=False)


def _priorities(
    past: Mapping[str, Any], names: list[str], rounds: int
) -> dict[str, np.ndarray]:
    """By name of the objective, ``[R]``; empty where the rule gave none."""
    if "priorities" not in past or len(names) < 2:
        return {}
    values = _array(past, "priorities", (rounds, len(names)))
    if np.isnan(values).all():
        return {}
    return dict(zip(names, values.T, strict=True))
