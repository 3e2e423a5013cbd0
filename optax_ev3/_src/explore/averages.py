"""Averages of the explorers' parameters: more candidates at no gradient cost."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import sharding, trees


@dataclasses.dataclass(frozen=True)
class TrajectoryAverage:
    """Of every explorer, the average of its parameters over the trajectory.

    Attributes:
      dtype: In which it is kept, see :func:`trajectory_average`.
    """

    dtype: Any = None

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
      dtype: In which it is kept, see :func:`trajectory_average`.
    """

    decay: float
    dtype: Any = None

    prefix: ClassVar[str] = "branch_average"
    lasts: ClassVar[bool] = True

    def weight(self, step: jax.Array, age: jax.Array, every: int) -> jax.Array:
        """What the newest parameters weigh, see :class:`TrajectoryAverage`."""
        del step
        return jnp.maximum(1 / (age // every + 1), 1 - self.decay**every)


Average = TrajectoryAverage | BranchAverage


def trajectory_average(dtype: Any = None) -> TrajectoryAverage:
    """Candidates: of every explorer, the mean of its parameters after each step.

    Args:
      dtype: ``jnp.bfloat16`` to keep it in half the memory. Its numbers are then
        rounded up or down at random, so that changes that are too small for bfloat16
        add up all the same. None: float32, or what the parameters have if that is
        wider.

    Returns:
      For the ``averages`` of :func:`optax_ev3.explore.rounds` and
      :func:`optax_ev3.explore.branches`. The candidates are called average/NAME;
      where one is adopted, explorer NAME leads the next round.

    Raises:
      ValueError: If ``dtype`` is another one.

    Examples:
      >>> from optax_ev3 import explore
      >>> explore.trajectory_average()
      TrajectoryAverage(dtype=None)

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
      Generalization <https://arxiv.org/abs/1803.05407>`_, 2018; Gupta et al., `Deep
      Learning with Limited Numerical Precision <https://arxiv.org/abs/1502.02551>`_,
      2015 (rounding at random).
    """
    return TrajectoryAverage(_checked_dtype(dtype))


def branch_average(decay: float = 0.99, dtype: Any = None) -> BranchAverage:
    r"""Candidates: of every explorer, an exponential average over its rounds.

    Where branches go on from where they were, an average over more than a round says
    better how good a large learning rate is: it lacks the noise of its last steps, for
    which a smaller rate that comes later would look better at once. In step t of a
    branch, counted from 0 where it started or restarted from other parameters, the past
    weighs :math:`\min(\text{decay}, t / (t + 1))`: a plain mean at first.

    Args:
      decay: What the past weighs at last.
      dtype: See :func:`trajectory_average`.

    Returns:
      For the ``averages`` of :func:`optax_ev3.explore.rounds` and
      :func:`optax_ev3.explore.branches`. The candidates are called
      branch_average/NAME; where one is adopted, explorer NAME leads the next round.

    Raises:
      ValueError: If ``decay`` is not between 0 and 1, or ``dtype`` another one.

    Examples:
      >>> from optax_ev3 import explore
      >>> explore.branch_average(0.98)
      BranchAverage(decay=0.98, dtype=None)

    References:
      Morales-Brotons et al., `Exponential Moving Average of Weights in Deep Learning
      <https://arxiv.org/abs/2411.18704>`_, 2024.
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay must be between 0 and 1, got {decay}.")
    return BranchAverage(float(decay), _checked_dtype(dtype))


def _checked_dtype(dtype: Any) -> Any:
    if dtype is None or jnp.dtype(dtype) == jnp.bfloat16:
        return None if dtype is None else jnp.dtype(dtype)
    raise ValueError(f"dtype must be None or bfloat16, got {dtype!r}.")


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


def begun(kind: Average, params: optax.Params) -> Any:
    """An average that begins with these parameters.

    It is kept in float32 or wider, to add many small changes, or as its kind says.
    """

    def begin(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if not trees.is_inexact(leaf):
            return leaf
        is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        is_wide = kind.dtype is None or is_complex
        return leaf.astype(trees.wide_dtype(leaf) if is_wide else kind.dtype)

    return jax.tree.map(begin, params)


def move(mean: Any, new: Any, weight: Any, age: jax.Array) -> Any:
    """``mean`` moved towards ``new`` by the weight; what is no float becomes new.

    So do numbers that overflow on the way, which would stay infinite for ever.

    Args:
      mean: The average.
      new: Parameters.
      weight: Theirs.
      age: ``[]`` int32, steps of the branch before; seeds the rounding.
    """
    means, structure = jax.tree.flatten(mean)

    def change(number: int, m: jax.Array, n: jax.Array) -> jax.Array:
        if not trees.is_inexact(m):
            return n
        wide = trees.wide_dtype(m)
        moved = m.astype(wide) + jnp.asarray(weight, wide) * (
            n.astype(wide) - m.astype(wide)
        )
        if m.dtype != wide:
            moved = _rounded(moved, age, number)
        return jnp.where(jnp.isfinite(moved), moved, n.astype(m.dtype))

    pairs = zip(means, structure.flatten_up_to(new), strict=True)
    return structure.unflatten(
        [change(number, m, n) for number, (m, n) in enumerate(pairs)]
    )


def _rounded(x: jax.Array, *seeds: Any) -> jax.Array:
    """Float32 in bfloat16, rounded up or down at random, so that the mean is x.

    A bfloat16 is the upper half of a float32: a random number is added to the lower
    half, and what it carries over is kept.
    """
    key = jax.random.key(0, impl="threefry2x32")
    for seed in seeds:
        key = jax.random.fold_in(key, seed)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + sharding.alike(noise, x)
    upper = jax.lax.bitwise_and(bits, jnp.uint32(0xFFFF0000))
    return jax.lax.bitcast_convert_type(upper, jnp.float32).astype(jnp.bfloat16)


def like(tree: Any, params: optax.Params) -> Any:
    """The tree with the dtypes of params."""
    return jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), tree, params)
