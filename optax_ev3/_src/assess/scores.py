"""Assess: the user's scores of all candidates, on the same data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_ev3._src.adapt import bounds
from optax_ev3._src.assess import aggregate as figures
from optax_ev3._src.base import callbacks as named
from optax_ev3._src.base import checks, control, evidence, trees, xla

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
      seen: ``[n]`` bool, the examples that were looked at; None for all.
    """

    values: dict[str, Any]
    binary: frozenset[str]
    seen: jax.Array | None = None


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
    # No gradient is taken through it, not even where that of an update is.
    candidates = [
        batch._replace(tree=lax.stop_gradient(batch.tree)) for batch in candidates
    ]
    try:
        single = next(batch.tree for batch in candidates if batch.size is None)
        kinds = jax.eval_shape(lambda params: _objectives(assess(params)), single)
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
        if isinstance(kind, figures.Figure):
            values[name] = figures.compute(kind, values[name], key, axis_name)
        elif kind.dtype == bool:
            binary.add(name)
    return Scores(values, frozenset(binary))


class InChunks(NamedTuple):
    """An ``assess_fn`` that looks at some examples at a time, see :func:`in_chunks`."""

    assess_fn: Callable[..., Any]
    chunks: int
    slice_args: tuple[str, ...]
    alpha: float
    patience: int


def in_chunks(
    assess_fn: Callable[..., Any],
    chunks: int,
    slice_args: Sequence[str] = (),
    confidence: float = 0.95,
    patience: int = 2,
) -> InChunks:
    """Assesses chunk after chunk of the examples, until the decision is clear.

    The candidates are scored on the first chunk, then on the next, and so on, up to
    where the explorer with the highest mean is told apart from all other candidates by
    paired tests, or where some more chunks have not changed what the rule decides, or
    to the end: an easy decision costs a fraction of a hard one. ``ev3/examples`` in
    :func:`optax_ev3.summary` says how many examples were looked at.

    Args:
      assess_fn: As for :func:`optax_ev3.ev3`, with a score for each example. What
        :func:`optax_ev3.held_out` returns is cut into chunks by itself; a function of
        one's own may name ``chunk``, ``[]`` int32, and ``chunks`` to do so: the
        caller's arguments of these names do not replace them.
      chunks: How many chunks there are, at least 2.
      slice_args: Names of arguments of ``update`` to cut: trees of arrays, whose
        leading axis runs over the examples, a multiple of ``chunks``. What a partial
        has bound in ``assess_fn`` is not among them.
      confidence: That the winner is the best, as far as the examples tell, one-sided,
        corrected for the candidates and the chunks.
      patience: How many chunks in a row that change nothing are enough, at least 1.

    Returns:
      A value for the ``assess_fn`` argument of :func:`optax_ev3.ev3`.

    Raises:
      TypeError: If ``assess_fn`` is not callable, or a number no integer; at trace
        time, if an argument to cut is missing.
      ValueError: If ``chunks`` is below 2, ``patience`` below 1, or ``confidence`` not
        between 0.5 and 1, if ``assess_fn`` does not take an argument to cut, or if
        nothing is cut; at trace time, if the examples cannot be cut evenly, or scores
        are single figures.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> def score(w, x):
      ...     return -((w - x) ** 2)
      >>> tx = optax_ev3.ev3(
      ...     [optax.sgd(0.1), optax.sgd(-0.1)],
      ...     optax_ev3.in_chunks(score, chunks=8, slice_args=["x"]),
      ... )
      >>> w, x = jnp.zeros([]), jnp.linspace(2.0, 4.0, 64)
      >>> updates, state = tx.update(jnp.array(-6.0), tx.init(w), w, x=x)
      >>> print(optax_ev3.summary(state)["ev3/examples"])
      16

    References:
      Maron and Moore, `Hoeffding races
      <https://papers.nips.cc/paper/1993/hash/02a32ad2669e6fe298e607fe7cc0e1a0-Abstract.html>`_,
      1994.
    """
    named.check_callback(assess_fn, "assess_fn")
    if isinstance(slice_args, str):
        raise TypeError(
            f"slice_args must be a sequence of names, such as [{slice_args!r}], got "
            f"the string {slice_args!r}."
        )
    slice_args = tuple(dict.fromkeys(slice_args))
    free = named.free(assess_fn, 1)
    other = [k for k in slice_args if not (k in free.names or free.takes(k))]
    if other:
        raise ValueError(
            f"slice_args names {other}, which assess_fn does not take: its signature "
            f"is {named.shown(assess_fn)}, and what functools.partial has bound is "
            f"not cut."
        )
    if not slice_args and "chunk" not in free.names:
        raise ValueError(
            "every chunk would be the same examples: name the arguments to cut, "
            'slice_args=["batch"], or let assess_fn take chunk and chunks, and choose '
            "its examples by them, as that of held_out does."
        )
    return InChunks(
        assess_fn,
        checks.integer(chunks, "chunks", 2),
        slice_args,
        checks.error_rate(confidence),
        checks.integer(patience, "patience", 1),
    )


def bind(
    assess_fn: Callable[..., Any] | InChunks,
    extra_args: Mapping[str, Any],
    offered: Mapping[str, Any],
    chunk: Any = None,
) -> Callable[[Any], Any]:
    """``assess_fn`` as a function of the parameters alone; for one chunk, if given."""
    if not isinstance(assess_fn, InChunks):
        return named.bind(assess_fn, "assess_fn", extra_args, offered)
    cut = dict(extra_args)
    for name in assess_fn.slice_args:
        if name not in cut:
            raise TypeError(
                f"in_chunks is to cut {name!r}, which update was not given: "
                f"tx.update(grads, state, params, {name}=...). Extra arguments given: "
                f"{sorted(extra_args) or 'none'}."
            )
        cut[name] = part(cut[name], chunk, assess_fn.chunks, name)
    which = {"chunk": chunk, "chunks": assess_fn.chunks}
    return named.bind(assess_fn.assess_fn, "assess_fn", cut, offered, fixed=which)


def part(tree: Any, chunk: Any, chunks: int, name: str) -> Any:
    """One of the chunks into which the leading axes of a tree are cut evenly."""

    def cut(leaf):
        shape = jnp.shape(leaf)
        if not shape or shape[0] % chunks:
            raise ValueError(
                f"{name} of shape {shape} cannot be cut into {chunks} chunks of equal "
                f"size."
            )
        size = shape[0] // chunks
        return lax.dynamic_slice_in_dim(leaf, chunk * size, size)

    return jax.tree.map(cut, tree)


def score_in_chunks(
    plan: InChunks,
    score_chunk: Callable[[Any], Scores],
    judge: Callable[[Scores], tuple[jax.Array, evidence.Evidence]],
    axis_name: Any = None,
) -> Scores:
    """Scores of chunk after chunk until the decision is clear.

    Args:
      plan: How to go on.
      score_chunk: Maps the number of a chunk to the scores of all candidates.
      judge: Maps scores to the candidate, ``[]`` int32, that they would adopt, and the
        evidence of all devices.
      axis_name: Mapped axis over which examples are spread, or None.

    Returns:
      The scores, zero for the examples that were not looked at.
    """
    binary = []

    def values_of(chunk):
        scores = score_chunk(chunk)
        binary.append(scores.binary)
        return scores.values

    shapes = jax.eval_shape(values_of, 0)
    single = [k for k, v in shapes.items() if not hasattr(v, "ndim") or v.ndim != 2]
    if single:
        raise ValueError(
            f"in_chunks needs a score for each example, these objectives are single "
            f"figures: {single}."
        )
    size = next(iter(shapes.values())).shape[1]
    n = plan.chunks * size
    # Every device has scores of its own: shard_map wants that said from the start.
    nothing = 0 if axis_name is None else 0 * lax.axis_index(axis_name)
    empty = {k: jnp.full([v.shape[0], n], nothing, v.dtype) for k, v in shapes.items()}

    def look(carry):
        chunk, values, last, unchanged, _ = carry
        new = values_of(chunk)
        values = {
            k: lax.dynamic_update_slice_in_dim(v, new[k], chunk * size, 1)
            for k, v in values.items()
        }
        scores = Scores(values, binary[0], jnp.arange(n) < (chunk + 1) * size)
        adopted, found = judge(scores)
        unchanged = jnp.where(adopted == last, unchanged + 1, 0)
        clear = _is_clear(found, plan) | (unchanged >= plan.patience)
        return chunk + 1, values, adopted, unchanged, clear

    def goes_on(carry):
        chunk, *_, clear = carry
        return (chunk < plan.chunks) & ~clear

    zero = jnp.zeros([], jnp.int32)
    start = zero, empty, zero - 1, zero, jnp.asarray(False)
    count, values, *_ = control.while_loop(goes_on, look, start)
    return Scores(values, binary[0], jnp.arange(n) < count * size)


def _is_clear(found, plan):
    """Whether the best explorer is told apart from all others, by every objective."""
    candidates = found.valid.shape[0]
    critical = bounds.z_value(plan.alpha / (candidates - 1) / plan.chunks)
    clear = jnp.asarray(True)
    for name in found.scores:
        mean = evidence.estimate(found, name).mean
        explorers = found.valid & (jnp.arange(candidates) < candidates - 2)
        best = jnp.argmax(jnp.where(explorers, mean, -jnp.inf))
        gain, stderr, z = evidence.compare(found, name, best)
        # Nothing can be learnt of what is the same.
        same = (gain == 0) & (stderr == 0)
        clear &= (same | ~found.valid | (jnp.abs(z) >= critical)).all()
    return clear


def _score(assess, candidates, mode, axis_name):
    @xla.quick_convolutions
    def one(candidate):
        return lax.stop_gradient(_as_scores(assess(candidate)))

    if mode == "unroll":
        each = [_score_batch(one, batch, axis_name) for batch in candidates]
        return jax.tree.map(lambda *values: jnp.concatenate(values), *each)
    stacks = [
        batch.tree if batch.size else jax.tree.map(lambda x: x[None], batch.tree)
        for batch in candidates
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)
    return jax.vmap(one)(stacked) if mode == "vmap" else control.each_row(one, stacked)


def _score_batch(one, batch, axis_name):
    """Scores of the trees of a batch, stacked; zeros where it rests."""
    # Every device has scores of its own: shard_map wants that said of zeros, too.
    nothing = 0 if axis_name is None else 0 * lax.axis_index(axis_name)

    def score():
        if batch.size is None:
            return jax.tree.map(lambda x: x[None], one(batch.tree))
        return control.each_row(one, batch.tree)

    if batch.rests is None:
        return score()

    def of_its_own():
        return jax.tree.map(lambda x: x + jnp.asarray(nothing, x.dtype), score())

    kinds = jax.eval_shape(score)
    zeros = jax.tree.map(lambda x: jnp.full(x.shape, nothing, x.dtype), kinds)
    return control.cond(batch.rests, lambda: zeros, of_its_own)


def _objectives(output: Any) -> dict[str, Any]:
    """A mapping from names to what the objectives are: figures, or what JAX knows."""
    objectives = dict(output) if isinstance(output, Mapping) else {SCORE: output}
    for name, value in objectives.items():
        if not isinstance(name, str):
            raise TypeError(f"objectives must be named by strings, got {name!r}.")
        if not (isinstance(value, figures.Figure) or checks.is_array(value)):
            dtype = getattr(value, "dtype", None)
            raise TypeError(
                f"{_what(name, objectives)} must return an array of scores, got "
                f"{type(value).__name__}{f' of dtype {dtype}' if dtype else ''}: "
                f"{value!r}."
            )
    return objectives


def _what(name: str, objectives: Mapping[str, Any]) -> str:
    """How messages call an objective."""
    return "assess_fn" if objectives.keys() == {SCORE} else f"objective {name!r}"


def _as_scores(output: Any) -> dict[str, Any]:
    """Float arrays, float32 at the least, and the outputs that figures are made of."""
    wide = {}
    for name, value in _objectives(output).items():
        if isinstance(value, figures.Figure):
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
        if isinstance(value, figures.Figure):
            figures.check(what, value)
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
