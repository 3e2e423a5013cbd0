"""Assess: the user's scores of all candidates, on the same data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_ev3._src import trees

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


def score(
    assess: Callable[[optax.Params], Any],
    candidates: Sequence[trees.Batch],
    mode: str,
) -> dict[str, jax.Array]:
    """Scores of all candidates.

    Args:
      assess: Maps parameters to scores: ``[N]``, ``[]``, or a mapping from the names
        of objectives to such arrays.
      candidates: C trees of parameters, some of them stacked.
      mode: ``"unroll"`` calls ``assess`` once for each single tree, and in a loop for
        those that are stacked; ``"vmap"`` once on stacked parameters, ``"map"`` in a
        compiled loop.

    Returns:
      For each objective ``[C, N]`` or ``[C]``, float32 or wider.

    Raises:
      TypeError, ValueError: Before anything is computed, if ``assess`` cannot be
        traced or does not return scores.
    """
    try:
        single = next(batch.tree for batch in candidates if batch.size is None)
        _check_scores(jax.eval_shape(assess, single))
        return _score(assess, candidates, mode)
    except _NOT_TRACEABLE as error:
        raise TypeError(
            "assess_fn cannot be traced by JAX: it must be a pure function of arrays, "
            "written in jax.numpy, that reads nothing traced elsewhere. Wrap a metric "
            "in Python or NumPy in jax.pure_callback. JAX said: "
            f"{str(error).splitlines()[0]}"
        ) from error


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


def _as_scores(output: Any) -> dict[str, jax.Array]:
    """A mapping of float arrays, float32 at the least, from what assess returns."""
    output = dict(output) if isinstance(output, Mapping) else {SCORE: output}
    wide = {}
    for name, value in output.items():
        value = jnp.asarray(value)
        wide[name] = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    return wide


def _check_scores(output: Any) -> None:
    """Raises unless ``output``, shapes and dtypes, is what ``assess_fn`` may return."""
    if isinstance(output, Mapping):
        if not output:
            raise ValueError("assess_fn returned a mapping without any objective.")
        objectives = dict(output)
    else:
        objectives = {SCORE: output}
    sizes = {}
    for name, value in objectives.items():
        what = "assess_fn" if objectives.keys() == {SCORE} else f"objective {name!r}"
        if not isinstance(name, str):
            raise TypeError(f"objectives must be named by strings, got {name!r}.")
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
