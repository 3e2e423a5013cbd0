"""Combine: candidates made from the explorers' trajectories at no gradient cost."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import control, trees


class TrajectoryAverage(NamedTuple):
    """Of every explorer, the average of its parameters over the trajectory."""

    def name(self, explorer: str) -> str:
        """The candidate's."""
        return f"average/{explorer}"

    def weight(self, step: jax.Array, age: jax.Array) -> jax.Array:
        """What the newest parameters weigh in a step of the trajectory."""
        return 1 / (step + 1)


class BranchAverage(NamedTuple):
    """Of every explorer, an exponential average of its parameters over all steps.

    Attributes:
      decay: What the past weighs at most, between 0 and 1.
    """

    decay: float

    def name(self, explorer: str) -> str:
        """The candidate's."""
        return f"branch_average/{explorer}"

    def weight(self, step: jax.Array, age: jax.Array) -> jax.Array:
        """What the newest parameters weigh, by the steps of the branch before."""
        return jnp.maximum(1 / (age + 1), 1 - self.decay)


class ExponentialAverage(NamedTuple):
    """An exponential average of the visible parameters over all calls.

    Attributes:
      decay: What the past weighs, between 0 and 1.
    """

    decay: float


class GreedySoup(NamedTuple):
    """The average of the best ends of a round.

    Attributes:
      size: The most that are averaged.
    """

    size: int


Average = TrajectoryAverage | BranchAverage  # One for each explorer.
Combination = Average | ExponentialAverage | GreedySoup


def trajectory_average() -> TrajectoryAverage:
    """Candidates: of every explorer, the mean of its parameters after each step.

    Returns:
      For the ``combine`` argument of :func:`optax_ev3.ev3`. The candidates are called
      average/NAME; where one is adopted, explorer NAME leads the next trajectory.

    Examples:
      >>> from optax_ev3 import combine
      >>> combine.trajectory_average()
      TrajectoryAverage()

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
      Generalization <https://arxiv.org/abs/1803.05407>`_, 2018.
    """
    return TrajectoryAverage()


def branch_average(decay: float = 0.99) -> BranchAverage:
    r"""Candidates: of every explorer, an exponential average over its rounds.

    Where branches go on from where they were, an average over more than a round says
    better how good a large learning rate is: it lacks the noise of its last steps, for
    which a smaller rate that comes later would look better at once. In step t of a
    branch, counted from 0 where it started or restarted from other parameters, the past
    weighs :math:`\min(\text{decay}, t / (t + 1))`: a plain mean at first.

    Args:
      decay: What the past weighs at last.

    Returns:
      For the ``combine`` argument of :func:`optax_ev3.ev3`. The candidates are called
      branch_average/NAME; where one is adopted, explorer NAME leads the next
      trajectory.

    Raises:
      ValueError: If ``decay`` is not between 0 and 1.

    Examples:
      >>> from optax_ev3 import combine
      >>> combine.branch_average(0.98)
      BranchAverage(decay=0.98)

    References:
      Morales-Brotons et al., `Exponential Moving Average of Weights in Deep Learning
      <https://arxiv.org/abs/2411.18704>`_, 2024.
    """
    return BranchAverage(_decay(decay))


def exponential_average(decay: float = 0.98) -> ExponentialAverage:
    r"""Candidate: an exponential average of the visible parameters.

    In call t, counted from 0, the past weighs :math:`\min(\text{decay},
    (1 + t) / (10 + t))`, so that the first parameters are soon forgotten.

    Args:
      decay: What the past weighs at last.

    Returns:
      For the ``combine`` argument of :func:`optax_ev3.ev3`; the candidate is called
      exponential_average.

    Raises:
      ValueError: If ``decay`` is not between 0 and 1.

    Examples:
      >>> from optax_ev3 import combine
      >>> combine.exponential_average(0.99)
      ExponentialAverage(decay=0.99)

    References:
      Polyak and Juditsky, `Acceleration of Stochastic Approximation by Averaging
      <https://doi.org/10.1137/0330046>`_, 1992.
    """
    return ExponentialAverage(_decay(decay))


def _decay(decay):
    if not 0 < decay < 1:
        raise ValueError(f"decay must be between 0 and 1, got {decay}.")
    return float(decay)


def greedy_soup(size: int = 4) -> GreedySoup:
    """Candidate: the average of the best ends, as long as the score rises.

    The explorers' ends, and their averages where those are candidates as well, are
    taken from the best mean score to the worst; each is added to the average if the
    mean score of the average on the round's examples does not fall. Each one that is
    tried costs an assessment.

    Args:
      size: How many are tried at most, the best one included.

    Returns:
      For the ``combine`` argument of :func:`optax_ev3.ev3`; the candidate is called
      greedy_soup.

    Raises:
      ValueError: If ``size`` is below 2.

    Examples:
      >>> from optax_ev3 import combine
      >>> combine.greedy_soup(3)
      GreedySoup(size=3)

    References:
      Wortsman et al., `Model soups <https://arxiv.org/abs/2203.05482>`_, 2022,
      recipe 1.
    """
    if size < 2:
        raise ValueError(f"size must be at least 2, got {size}.")
    return GreedySoup(int(size))


def check(combinations: Any, explorers: int) -> tuple[Combination, ...]:
    """The ``combine`` argument as a tuple; raises on what makes no sense."""
    if isinstance(combinations, Combination) or not isinstance(combinations, Sequence):
        raise TypeError(
            f"combine must be a sequence, such as [combine.trajectory_average()], got "
            f"{combinations!r}."
        )
    kinds = [type(one) for one in combinations]
    for one in combinations:
        if not isinstance(one, Combination):
            raise TypeError(
                f"combine must hold what the functions of optax_ev3.combine return, "
                f"got {one!r}."
            )
        if kinds.count(type(one)) > 1:
            raise ValueError(f"combine holds more than one {type(one).__name__}.")
        ends = explorers * (1 + sum(isinstance(x, Average) for x in combinations))
        if isinstance(one, GreedySoup) and one.size > ends:
            raise ValueError(
                f"greedy_soup(size={one.size}) asks for more ends than the {ends} that "
                f"there are."
            )
    return tuple(combinations)


def names(combinations: Sequence[Combination], explorers: Sequence[str]) -> list[str]:
    """Names of the combined candidates, in their order."""
    averages, others, soups = [], [], []
    for one in combinations:
        if isinstance(one, Average):
            averages += map(one.name, explorers)
        elif isinstance(one, ExponentialAverage):
            others.append("exponential_average")
        else:
            soups.append("greedy_soup")
    return [*averages, *others, *soups]


def wide(tree: Any) -> Any:
    """The tree in float32 or wider, to add many small changes."""

    def widen(leaf):
        leaf = jnp.asarray(leaf)
        if not trees.is_inexact(leaf):
            return leaf
        return leaf.astype(trees.wide_dtype(leaf))

    return jax.tree.map(widen, tree)


def move(mean: Any, new: Any, weight: Any) -> Any:
    """``mean`` moved towards ``new`` by the weight; what is no float becomes new.

    So do numbers that overflow on the way, which would stay infinite for ever.
    """

    def one(m, n):
        if not trees.is_inexact(m):
            return n
        n = n.astype(m.dtype)
        moved = m + jnp.asarray(weight, m.dtype) * (n - m)
        return jnp.where(jnp.isfinite(moved), moved, n)

    return jax.tree.map(one, mean, new)


def exponential_weight(decay: float, calls: jax.Array) -> jax.Array:
    """What the newest parameters weigh in this call."""
    t = calls.astype(jnp.float32)
    return 1 - jnp.minimum(decay, (1 + t) / (10 + t))


def like(tree: Any, params: optax.Params) -> Any:
    """The tree with the dtypes of params."""
    return jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), tree, params)


def soup(size: int, ends: Any, means: jax.Array, score: Any) -> tuple[Any, jax.Array]:
    """The greedy soup of M ends.

    Args:
      size: How many are tried.
      ends: The tree of the end with a given index.
      means: ``[M]``, their mean scores, -inf where not valid.
      score: Maps parameters to their mean score.

    Returns:
      The soup, and ``[]`` bool whether any end was valid.
    """
    order = jnp.argsort(-means)
    best = ends(order[0])

    def add(number, carry):
        mix, count, best_score = carry
        new = move(mix, ends(order[number]), 1 / (count + 1))
        new_score = score(like(new, best))
        better = (new_score >= best_score) & jnp.isfinite(means[order[number]])
        mix = jax.tree.map(lambda n, m: jnp.where(better, n, m), new, mix)
        best_score = jnp.where(better, new_score, best_score)
        return mix, count + better.astype(count.dtype), best_score

    start = wide(best), jnp.ones([], jnp.int32), means[order[0]]
    mix, _, _ = control.fori_loop(1, size, add, start)
    return like(mix, best), jnp.isfinite(means[order[0]])
