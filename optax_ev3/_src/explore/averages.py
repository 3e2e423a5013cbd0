"""Averages of the explorers' parameters: more candidates at no gradient cost."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import trees


@dataclasses.dataclass(frozen=True)
class TrajectoryAverage:
    """Of every explorer, the average of its parameters over the trajectory."""

    prefix: ClassVar[str] = "average"
    lasts: ClassVar[bool] = False  # It begins anew with every trajectory.

    def weight(self, step: jax.Array, age: jax.Array, every: int) -> jax.Array:
        """What the newest parameters weigh in a step of the trajectory.

        Args:
          step: ``[]`` int32, steps of the trajectory before.
          age: ``[]`` int32, steps of the branch before.
          every: Of so many steps, one is averaged.
        """
        del age
        return 1 / (step // every + 1)


@dataclasses.dataclass(frozen=True)
class BranchAverage:
    """Of every explorer, an exponential average of its parameters over all steps.

    Attributes:
      decay: What the past weighs at most, between 0 and 1.
    """

    decay: float

    prefix: ClassVar[str] = "branch_average"
    lasts: ClassVar[bool] = True

    def weight(self, step: jax.Array, age: jax.Array, every: int) -> jax.Array:
        """What the newest parameters weigh, see :class:`TrajectoryAverage`."""
        del step
        return jnp.maximum(1 / (age // every + 1), 1 - self.decay**every)


Average = TrajectoryAverage | BranchAverage


def trajectory_average() -> TrajectoryAverage:
    """Candidates: of every explorer, the mean of its parameters after each step.

    Returns:
      For the ``averages`` of :func:`optax_ev3.explore.rounds` and
      :func:`optax_ev3.explore.branches`. The candidates are called average/NAME;
      where one is adopted, explorer NAME leads the next round.

    Examples:
      >>> from optax_ev3 import explore
      >>> explore.trajectory_average()
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
      For the ``averages`` of :func:`optax_ev3.explore.rounds` and
      :func:`optax_ev3.explore.branches`. The candidates are called
      branch_average/NAME; where one is adopted, explorer NAME leads the next round.

    Raises:
      ValueError: If ``decay`` is not between 0 and 1.

    Examples:
      >>> from optax_ev3 import explore
      >>> explore.branch_average(0.98)
      BranchAverage(decay=0.98)

    References:
      Morales-Brotons et al., `Exponential Moving Average of Weights in Deep Learning
      <https://arxiv.org/abs/2411.18704>`_, 2024.
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay must be between 0 and 1, got {decay}.")
    return BranchAverage(float(decay))


def check(averages: Any) -> tuple[Average, ...]:
    """The ``averages`` argument as a tuple; raises on what makes no sense."""
    if isinstance(averages, Average) or not isinstance(averages, Sequence):
        raise TypeError(
            f"averages must be a sequence, such as [explore.trajectory_average()], got "
            f"{averages!r}."
        )
    for average in averages:
        if not isinstance(average, Average):
            raise TypeError(
                f"averages must hold what explore.trajectory_average() and "
                f"explore.branch_average() return, got {average!r}."
            )
    kinds = [type(average) for average in averages]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"averages holds one kind more than once: {averages!r}.")
    return tuple(averages)


def wide(tree: Any) -> Any:
    """The tree in float32 or wider, to add many small changes."""

    def widen(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if not trees.is_inexact(leaf):
            return leaf
        return leaf.astype(trees.wide_dtype(leaf))

    return jax.tree.map(widen, tree)


def move(mean: Any, new: Any, weight: Any) -> Any:
    """``mean`` moved towards ``new`` by the weight; what is no float becomes new.

    So do numbers that overflow on the way, which would stay infinite for ever.
    """

    def change(m: jax.Array, n: jax.Array) -> jax.Array:
        if not trees.is_inexact(m):
            return n
        n = n.astype(m.dtype)
        moved = m + jnp.asarray(weight, m.dtype) * (n - m)
        return jnp.where(jnp.isfinite(moved), moved, n)

    return jax.tree.map(change, mean, new)


def like(tree: Any, params: optax.Params) -> Any:
    """The tree with the dtypes of params."""
    return jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), tree, params)
