"""Assess: the user's scores of all candidates, on the same data."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_ev3._src import figures, trees

MODES = ("unroll", "vmap", "map")

# The name of the objective where assess_fn returns no mapping.
SCORE = "score"

_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.UnexpectedTracerError,
)


class Scores(NamedTuple):
    """Scores of all candidates.

    Attributes:
      values: For each objective ``[C, n]``, ``[C]``, or a figure with its resamples;
        float32 or wider.
      binary: The objectives whose scores are known to be 0 or 1.
    """

    values: dict[str, Any]
    binary: frozenset[str]


def score(
    assess: Callable[[optax.Params], Any],
    candidates: Sequence[trees.Batch],
    mode: str,
    key: jax.Array,
    axis_name: Any = None,
) -> Scores:
    """Scores of all candidates.

    Args:
      assess: Maps parameters to scores: ``[n]``, ``[]``, a figure of all examples, or
        a mapping from the names of objectives to such values.
      candidates: C trees of parameters, some of them stacked.
      mode: ``"unroll"`` calls ``assess`` once for each single tree, and in a loop for
        those that are stacked; ``"vmap"`` once on stacked parameters, ``"map"`` in a
        compiled loop.
      key: PRNG key of resamples, the same on all devices.
      axis_name: Mapped axis over which examples are spread, or None: figures are
        computed on the examples of all devices.

    Returns:
      The scores.

    Raises:
      TypeError, ValueError: Before anything is computed, if ``assess`` cannot be
        traced or does not return scores.
    """
    try:
        single = next(batch.tree for batch in candidates if batch.size is None)
        found = {}

        def trace(params):
            output = assess(params)
            found.update(_objectives(output))
            return figures.outputs_of(found)

        shapes = jax.eval_shape(trace, single)
        kinds = {
            k: dataclasses.replace(v, outputs=shapes[k])
            if figures.is_figure(v)
            else shapes[k]
            for k, v in found.items()
        }
        _check_scores(kinds)
        values = _score(assess, candidates, mode)
    except _NOT_TRACEABLE as error:
        raise TypeError(
            "assess_fn cannot be traced by JAX: it must be a pure function of arrays, "
            "written in jax.numpy, that reads nothing traced elsewhere. For a metric "
            "in Python or NumPy there is optax_ev3.host_metric. JAX said: "
            f"{str(error).splitlines()[0]}"
        ) from error
    for name, kind in kinds.items():
        if figures.is_figure(kind):
            values[name] = figures.compute(kind, values[name], key, axis_name)
    binary = {
        k for k, v in kinds.items() if not figures.is_figure(v) and v.dtype == bool
    }
    return Scores(values, frozenset(binary))


def _score(assess, candidates, mode):
    def one(candidate):
        return _as_scores(assess(candidate))

    if mode == "unroll":
        each = [
            jax.tree.map(lambda x: x[None], one(batch.tree))
            if batch.size is None
            else lax.map(one, batch.tree)
            for batch in candidates
        ]
        return jax.tree.map(lambda *values: jnp.concatenate(values), *each)
    stacks = [
        batch.tree if batch.size else jax.tree.map(lambda x: x[None], batch.tree)
        for batch in candidates
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)
    return jax.vmap(one)(stacked) if mode == "vmap" else lax.map(one, stacked)


def _objectives(output: Any) -> dict[str, Any]:
    """A mapping from names to what the objectives are."""
    return dict(output) if isinstance(output, Mapping) else {SCORE: output}


def _as_scores(output: Any) -> dict[str, Any]:
    """Float arrays, float32 at the least, and the outputs that figures are made of."""
    wide = {}
    for name, value in _objectives(output).items():
        if figures.is_figure(value):
            wide[name] = jax.tree.map(jnp.asarray, value.outputs)
        else:
            array = jnp.asarray(value)
            wide[name] = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return wide


def _check_scores(objectives: Mapping[str, Any]) -> None:
    """Raises unless these shapes and dtypes are what ``assess_fn`` may return."""
    if not objectives:
        raise ValueError("assess_fn returned a mapping without any objective.")
    sizes = {}
    for name, value in objectives.items():
        what = "assess_fn" if objectives.keys() == {SCORE} else f"objective {name!r}"
        if not isinstance(name, str):
            raise TypeError(f"objectives must be named by strings, got {name!r}.")
        if figures.is_figure(value):
            figures.check(what, value)
            continue
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            raise TypeError(
                f"{what} must return an array of scores, got {type(value).__name__}: "
                f"{value!r}."
            )
        _check_array(what, value)
        if value.ndim == 1:
            sizes[name] = value.shape[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"all objectives must score the same examples, got leading sizes {sizes}."
        )


def _check_array(what: str, value: Any) -> None:
    if value.ndim > 1:
        raise ValueError(
            f"{what} must return scores of shape [n], one for each example, or [], a "
            f"single figure; got shape {value.shape}."
        )
    if value.ndim == 1 and value.shape[0] == 0:
        raise ValueError(
            f"{what} returned scores of shape (0,): the assessment batch is empty."
        )
    real = jnp.issubdtype(value.dtype, jnp.floating)
    if not (real or value.dtype == jnp.bool_):
        raise TypeError(
            f"{what} must return real or boolean scores, whose mean is to be as high "
            f"as possible; got dtype {value.dtype}. Where a mean of these numbers does "
            f"make sense, convert them: scores.astype(jnp.float32)."
        )
