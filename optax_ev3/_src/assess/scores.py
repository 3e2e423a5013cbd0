"""Scores: what ``assess_fn`` returns for all candidates, on the same data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_ev3._src.assess import aggregate
from optax_ev3._src.base import checks, control, select, sharding, trees, xla

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
      values: For each objective ``[C, n]``, ``[C]``, or a value with its resamples;
        float32 or wider.
      binary: The objectives whose scores are known to be 0 or 1.
      example_mask: ``[n]`` bool, the examples that were looked at; None for all.
    """

    values: dict[str, Any]
    binary: frozenset[str]
    example_mask: jax.Array | None = None


def score(
    assess: Callable[[optax.Params], Any],
    candidates: Sequence[select.Stacked],
    mode: str,
    key: jax.Array,
    axis_name: Any = None,
) -> Scores:
    """Scores of all candidates.

    Args:
      assess: Maps parameters to scores: ``[n]``, ``[]``, an aggregate metric, or
        a mapping from the names of objectives to such values.
      candidates: C trees of parameters, some of them stacked.
      mode: ``"unroll"`` calls ``assess`` once for each single tree, and in a loop for
        those that are stacked; ``"vmap"`` once on stacked parameters, ``"map"`` in one
        loop over all.
      key: PRNG key of resamples, the same on all devices.
      axis_name: Mapped axis over which examples are spread, or None: aggregate
        metrics are computed on the examples of all devices.

    Returns:
      The scores.

    Raises:
      TypeError, ValueError: Before anything is computed, if ``assess`` cannot be
        traced or does not return scores.
    """
    # No gradient is taken through scores, even where updates are differentiated.
    candidates = [
        batch._replace(tree=lax.stop_gradient(batch.tree)) for batch in candidates
    ]
    try:
        alone = next(x.make(x.tree) for x in candidates if x.size is None)
        single = sharding.on_device(alone)
        kinds = _kinds(lambda params: _objectives(assess(params)), single)
        _check_scores(kinds)
        values = _score(assess, candidates, mode, axis_name)
    except _NOT_TRACEABLE as error:
        raise TypeError(
            "assess_fn cannot be traced by JAX: it must be a pure function of arrays, "
            "written in jax.numpy, that reads nothing traced elsewhere. For a metric "
            "in Python or NumPy there is optax_ev3.host_metric. JAX said: "
            f"{str(error).splitlines()[0]}"
        ) from error
    binary = set()
    for name, kind in kinds.items():
        if isinstance(kind, aggregate.AggregateMetric):
            values[name] = aggregate.compute(kind, values[name], key, axis_name)
        elif kind.dtype == bool:
            binary.add(name)
    return Scores(values, frozenset(binary))


def _kinds(objectives: Callable[[Any], Any], params: Any) -> Any:
    """What ``objectives`` returns, as ``jax.eval_shape``; raises if no program may."""
    if jax.process_count() == 1 or not control.is_traced(params):
        return jax.eval_shape(objectives, params)
    jaxpr, kinds = jax.make_jaxpr(objectives, return_shape=True)(params)
    for const in jaxpr.consts:
        known = isinstance(const, jax.Array) and not control.is_traced(const)
        if known and not const.is_fully_addressable:
            raise ValueError(
                f"assess_fn closes over an array, {const.dtype}{list(const.shape)}, "
                f"that is spread over several processes: no program may hold it. Let "
                f"assess_fn name an argument, and pass the array there: "
                f"tx.update(grads, state, params, NAME=array)."
            )
    return kinds


def _score(
    assess: Callable[[Any], Any],
    candidates: Sequence[select.Stacked],
    mode: str,
    axis_name: Any,
) -> dict[str, Any]:
    """By objective the scores of all candidates, or their outputs, stacked."""

    @xla.quick_convolutions
    def one(candidate: Any) -> dict[str, Any]:
        return sharding.replicated(lax.stop_gradient(_as_scores(assess(candidate))))

    if mode == "map":
        return _score_in_a_loop(one, candidates, axis_name)
    if mode == "unroll":
        each = [_score_batch(one, batch, axis_name) for batch in candidates]
        return jax.tree.map(lambda *values: jnp.concatenate(values), *each)
    stacks = [
        jax.vmap(batch.make)(batch.tree)
        if batch.size
        else jax.tree.map(lambda x: x[None], batch.make(batch.tree))
        for batch in candidates
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)
    return jax.vmap(one)(stacked)


def _score_batch(
    one: Callable[[Any], dict[str, Any]], batch: select.Stacked, axis_name: Any
) -> dict[str, Any]:
    """Scores of the trees of a batch, stacked; zeros for those that are paused."""

    def score(row: Any) -> dict[str, Any]:
        tree, paused = row

        def of_tree() -> dict[str, Any]:
            return one(batch.make(sharding.on_device(tree)))

        return _unless_paused(paused, of_tree, axis_name)

    if batch.size is None:
        found = score((batch.tree, batch.paused))
        return jax.tree.map(lambda x: x[None], found)
    paused = batch.paused
    if paused is not None:
        paused = jnp.broadcast_to(paused, [batch.size])
    if batch.axis is None:
        return control.each_row(score, (batch.tree, paused))
    with control.members_at_once():
        rows = sharding.leading_alike(batch.tree, paused)
        found = jax.vmap(score, spmd_axis_name=batch.axis)(rows)
    return sharding.replicated(found)


def _score_in_a_loop(
    one: Callable[[Any], dict[str, Any]],
    candidates: Sequence[select.Stacked],
    axis_name: Any,
) -> dict[str, Any]:
    """Scores of all trees by one program, whatever their number.

    Those that are spread over a mesh axis are scored where they are.
    """
    here = [batch for batch in candidates if batch.axis is None]
    flags = [
        jnp.broadcast_to(False if batch.paused is None else batch.paused, [count])
        for batch in here
        for count in [select.count(batch)]
    ]
    can_pause = any(batch.paused is not None for batch in here)
    paused = jnp.concatenate(flags) if can_pause else None

    def score(row: Any) -> dict[str, Any]:
        index, paused = row

        def of_index() -> dict[str, Any]:
            return one(select.look_up(index, here))

        return _unless_paused(paused, of_index, axis_name)

    count = sum(map(select.count, here))
    found = control.each_row(score, (jnp.arange(count), paused))
    each, first = [], 0
    for batch in candidates:
        if batch.axis is not None:
            each.append(_score_batch(one, batch, axis_name))
            continue
        rows = slice(first, first + select.count(batch))
        each.append(jax.tree.map(lambda x, rows=rows: x[rows], found))
        first = rows.stop
    return jax.tree.map(lambda *values: jnp.concatenate(values), *each)


def _unless_paused(
    paused: Any, score: Callable[[], dict[str, Any]], axis_name: Any
) -> dict[str, Any]:
    """Scores, or zeros; None for one who cannot be paused."""
    if paused is None:
        return score()
    # Scores vary over devices: shard_map needs zeros to be marked so, too.
    nothing = 0 if axis_name is None else 0 * lax.axis_index(axis_name)

    def of_its_own() -> dict[str, Any]:
        return jax.tree.map(lambda x: x + jnp.asarray(nothing, x.dtype), score())

    kinds = jax.eval_shape(of_its_own)
    zeros = jax.tree.map(lambda x: jnp.full(x.shape, nothing, x.dtype), kinds)
    return control.cond(paused, lambda: zeros, of_its_own)


def _objectives(output: Any) -> dict[str, Any]:
    """A mapping from names to what the objectives are: aggregate metrics, or arrays."""
    objectives = dict(output) if isinstance(output, Mapping) else {SCORE: output}
    for name, value in objectives.items():
        if not isinstance(name, str):
            raise TypeError(f"objectives must be named by strings, got {name!r}.")
        if not (isinstance(value, aggregate.AggregateMetric) or checks.is_array(value)):
            dtype = getattr(value, "dtype", None)
            raise TypeError(
                f"{_what(name, objectives)} must return an array of scores, got "
                f"{type(value).__name__}{f' of dtype {dtype}' if dtype else ''}: "
                f"{value!r}."
            )
    return objectives


def _what(name: str, objectives: Mapping[str, Any]) -> str:
    """The name of an objective in messages."""
    return "assess_fn" if objectives.keys() == {SCORE} else f"objective {name!r}"


def _as_scores(output: Any) -> dict[str, Any]:
    """Float arrays, float32 at the least, and the outputs of aggregate metrics."""
    wide = {}
    for name, value in _objectives(output).items():
        if isinstance(value, aggregate.AggregateMetric):
            wide[name] = jax.tree.map(jnp.asarray, value.outputs)
        else:
            array = jnp.asarray(value)
            wide[name] = array.astype(trees.wide_dtype(array))
    return wide


def _check_scores(objectives: Mapping[str, Any]) -> None:
    """Raises unless these shapes and dtypes are what ``assess_fn`` may return."""
    if not objectives:
        raise ValueError("assess_fn returned a mapping without any objective.")
    sizes = {}
    for name, value in objectives.items():
        what = _what(name, objectives)
        if isinstance(value, aggregate.AggregateMetric):
            aggregate.check(what, value)
            continue
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
            f"single value; got shape {value.shape}."
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
