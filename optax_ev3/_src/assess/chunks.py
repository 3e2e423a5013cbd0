"""Chunks: assesses as many of the examples as it takes to find the best candidate.

Dimensions: ``C`` candidates, ``n`` examples on this device, ``N`` on all devices.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_ev3._src.assess.scores import Scores
from optax_ev3._src.base import callbacks, checks, control, evidence, sharding


class InChunks(NamedTuple):
    """An ``assess_fn`` that looks at some examples at a time, see :func:`in_chunks`."""

    assess_fn: Callable[..., Any]
    chunks: int
    slice_args: tuple[str, ...]
    alpha: float


def in_chunks(
    assess_fn: Callable[..., Any],
    chunks: int,
    slice_args: Sequence[str] = (),
    confidence: float = 0.95,
) -> InChunks:
    r"""Assesses chunk after chunk of the examples, until the best candidate is clear.

    The candidates are scored on the first chunk, then on the next, and so on, until no
    other candidate is likely to be significantly better than the best one so far if all
    examples are looked at. Let :math:`f` be the fraction of the examples looked at, and
    let the best candidate be ahead of another one by :math:`z` standard errors of their
    paired differences. Then on all examples, whose standard error is
    :math:`\sqrt{f}` times as large, it is ahead by at least
    :math:`(z - z_\alpha \sqrt{1 - f}) / \sqrt{f}` standard errors, with confidence
    :math:`1 - \alpha`. The other one would be significantly better if that could be
    below :math:`-z_\alpha`. So chunks end where, for each of the others,

    .. math:: z \ge z_\alpha \left(\sqrt{1 - f} - \sqrt{f}\right).

    An easy decision takes one chunk, and no decision takes more than half of the
    examples, rounded up to chunks. ``ev3/examples`` in :func:`optax_ev3.summary` says
    how many were looked at.

    The rule sees fewer examples, so it finds fewer candidates significantly better than
    the stable parameters. Examples that come in the same order in each round make all
    rounds look at the same first ones: pass them in a new order, or use
    :func:`optax_ev3.held_out`, which draws them anew.

    Args:
      assess_fn: As for :func:`optax_ev3.ev3`, with a score for each example. What
        :func:`optax_ev3.held_out` returns is cut into chunks by itself; a function of
        one's own may name ``chunk``, ``[]`` int32, and ``chunks`` to do so: the
        caller's arguments of these names do not replace them.
      chunks: How many chunks there are, at least 2.
      slice_args: Names of arguments of ``update`` to cut: trees of arrays, whose
        leading axis runs over the examples, a multiple of ``chunks``. What a partial
        has bound in ``assess_fn`` is not among them.
      confidence: 1 minus the probability :math:`\alpha`, one-sided, divided among the
        other candidates and the chunks.

    Returns:
      A value for the ``assess_fn`` argument of :func:`optax_ev3.ev3`.

    Raises:
      TypeError: If ``assess_fn`` is not callable, or a number no integer; at trace
        time, if an argument to cut is missing.
      ValueError: If ``chunks`` is below 2, or ``confidence`` not between 0.5 and 1, if
        ``assess_fn`` does not take an argument to cut, or if nothing is cut; at trace
        time, if the examples cannot be cut evenly, or an objective has no score for
        each example.

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
      8

    References:
      Lan, Simon and Halperin, `Stochastically curtailed tests in long-term clinical
      trials <https://doi.org/10.1080/07474948208836014>`_, 1982.
    """
    callbacks.check_callback(assess_fn, "assess_fn")
    if isinstance(slice_args, str):
        raise TypeError(
            f"slice_args must be a sequence of names, such as [{slice_args!r}], got "
            f"the string {slice_args!r}."
        )
    slice_args = tuple(dict.fromkeys(slice_args))
    free = callbacks.free(assess_fn, 1)
    other = [k for k in slice_args if not (k in free.names or free.takes(k))]
    if other:
        raise ValueError(
            f"slice_args names {other}, which assess_fn does not take: its signature "
            f"is {callbacks.shown(assess_fn)}, and what functools.partial has bound is "
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
    )


def bind(
    plan: InChunks,
    extra_args: Mapping[str, Any],
    offered: Mapping[str, Any],
    chunk: Any,
) -> Callable[[Any], Any]:
    """The assessment of one chunk as a function of the parameters alone."""
    cut = dict(extra_args)
    for name in plan.slice_args:
        if name not in cut:
            raise TypeError(
                f"in_chunks is to cut {name!r}, which update was not given: "
                f"tx.update(grads, state, params, {name}=...). Extra arguments given: "
                f"{sorted(extra_args) or 'none'}."
            )
        cut[name] = part(cut[name], chunk, plan.chunks, name)
    which = {"chunk": chunk, "chunks": plan.chunks}
    return callbacks.bind(plan.assess_fn, "assess_fn", cut, offered, fixed=which)


def part(tree: Any, chunk: Any, chunks: int, name: str) -> Any:
    """One of the chunks into which the leading axes of a tree are cut evenly."""

    def cut(leaf: Any) -> jax.Array:
        shape = jnp.shape(leaf)
        if not shape or shape[0] % chunks:
            raise ValueError(
                f"{name} of shape {shape} cannot be cut into {chunks} chunks of equal "
                f"size."
            )
        size = shape[0] // chunks
        return sharding.rows_from(leaf, chunk * size, size)

    return jax.tree.map(cut, tree)


def score(
    plan: InChunks,
    score_chunk: Callable[[Any], Scores],
    valid: jax.Array,
    axis_name: Any = None,
) -> Scores:
    """Scores of chunk after chunk until the best candidate is clear.

    Args:
      plan: What :func:`in_chunks` returned.
      score_chunk: Maps the number of a chunk to the scores of all candidates.
      valid: ``[C]`` bool, the candidates whose updates are finite.
      axis_name: Mapped axis over which examples are spread, or None.

    Returns:
      The scores, zero for the examples that were not looked at.
    """
    binary: list[frozenset[str]] = []

    def values_of(chunk: Any) -> dict[str, jax.Array]:
        scores = score_chunk(chunk)
        binary.append(scores.binary)
        return scores.values

    shapes = jax.eval_shape(values_of, 0)
    single = [k for k, v in shapes.items() if not hasattr(v, "ndim") or v.ndim != 2]
    if single:
        raise ValueError(
            f"in_chunks needs a score for each example, these objectives have a single "
            f"value: {single}."
        )
    size = next(iter(shapes.values())).shape[1]
    n = plan.chunks * size
    # Scores vary over devices: shard_map needs the zeros to be marked so, too.
    nothing = 0 if axis_name is None else 0 * lax.axis_index(axis_name)
    empty = {k: jnp.full([v.shape[0], n], nothing, v.dtype) for k, v in shapes.items()}

    def looked_at(chunk: Any, values: dict[str, jax.Array]) -> Scores:
        return Scores(values, binary[0], jnp.arange(n) < chunk * size)

    def look(carry: Any) -> Any:
        chunk, values, _ = carry
        new = values_of(chunk)
        values = {
            k: lax.dynamic_update_slice_in_dim(v, new[k], chunk * size, 1)
            for k, v in values.items()
        }
        scores = looked_at(chunk + 1, values)
        found = evidence.gather(
            scores.values,
            valid,
            jnp.zeros_like(valid),
            axis_name,
            example_mask=scores.example_mask,
        )
        return chunk + 1, values, _is_clear(found, (chunk + 1) / plan.chunks, plan)

    def goes_on(carry: Any) -> jax.Array:
        chunk, _, clear = carry
        return (chunk < plan.chunks) & ~clear

    start = jnp.zeros([], jnp.int32), empty, jnp.asarray(False)
    count, values, _ = control.while_loop(goes_on, look, start)
    return looked_at(count, values)


def _is_clear(found: evidence.Evidence, fraction: Any, plan: InChunks) -> jax.Array:
    """Whether all examples would show no candidate to be better than the best one."""
    others = max(found.valid.shape[0] - 1, 1)
    critical = NormalDist().inv_cdf(1 - plan.alpha / others / plan.chunks)
    margin = critical * (jnp.sqrt(1 - fraction) - jnp.sqrt(fraction))
    clear = jnp.asarray(True)
    for name in found.scores:
        mean = evidence.estimate(found, name).mean
        best = jnp.argmax(jnp.where(found.valid, mean, -jnp.inf))
        gain, stderr, z = evidence.compare(found, name, best)
        # Candidates that are the same need no decision.
        same = (gain == 0) & (stderr == 0)
        clear &= (same | ~found.valid | (-z >= margin)).all()
    return clear
