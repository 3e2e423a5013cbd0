"""Assess: the scores of all candidates of a round."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_ev3._src.assess import chunks, scores
from optax_ev3._src.assess.scores import MODES, Scores
from optax_ev3._src.base import callbacks, select

__all__ = ["MODES", "AssessFn", "Scores", "check", "score", "spread"]

AssessFn = Callable[..., Any] | chunks.InChunks


def check(assess_fn: AssessFn, loss_fns: Iterable[Callable[..., Any] | None]) -> None:
    """Raises unless ``assess_fn`` can assess, and is none of the losses."""
    metric_fn = innermost(assess_fn)
    callbacks.check_callback(metric_fn, "assess_fn")
    if any(loss is not None and callbacks.same(metric_fn, loss) for loss in loss_fns):
        raise ValueError(
            "the same function assesses and is a loss. Of scores higher is better: "
            "pass optax_ev3.minimize(loss) as assess_fn, or to held_out."
        )


def innermost(assess_fn: AssessFn) -> Callable[..., Any]:
    """What assesses, without the chunks and the draws around it."""
    if isinstance(assess_fn, chunks.InChunks):
        assess_fn = assess_fn.assess_fn
    return getattr(assess_fn, "ev3_metric_fn", assess_fn)  # Of held_out.


def score(
    assess_fn: AssessFn,
    candidates: Sequence[select.Stacked],
    valid: jax.Array,
    *,
    mode: str,
    key: jax.Array,
    extra_args: Mapping[str, Any],
    offered: Mapping[str, Any],
    axis_name: Any = None,
) -> Scores:
    """Scores of all candidates, on all examples or on as many chunks as it takes.

    Args:
      assess_fn: The user's, see :func:`optax_ev3.ev3`.
      candidates: C trees of parameters, some of them stacked.
      valid: ``[C]`` bool, which of them can be adopted: the others do not matter for
        how many chunks it takes.
      mode: One of :data:`MODES`.
      key: PRNG key of resamples, the same on all devices.
      extra_args: What the caller gave to ``update``.
      offered: What ``assess_fn`` may name, and the caller did not give.
      axis_name: Mapped axis over which examples are spread, or None.

    Returns:
      The scores.
    """
    offered = {**offered, "axis_name": axis_name}

    def score_all(bound: Callable[[Any], Any]) -> Scores:
        return scores.score(bound, candidates, mode, key, axis_name)

    if not isinstance(assess_fn, chunks.InChunks):
        return score_all(callbacks.bind(assess_fn, "assess_fn", extra_args, offered))

    def score_chunk(chunk: Any) -> Scores:
        return score_all(chunks.bind(assess_fn, extra_args, offered, chunk))

    return chunks.score(assess_fn, score_chunk, valid, axis_name)


def spread(values: Any, rows: jax.Array | None, count: int) -> Any:
    """Scores of some candidates among those of all: zeros for the others.

    Args:
      values: Arrays with a leading axis over the candidates scored.
      rows: int32, which these are; None for all.
      count: C, how many candidates there are.
    """
    if rows is None:
        return values
    return jax.tree.map(
        lambda x: jnp.zeros([count, *x.shape[1:]], x.dtype).at[rows].set(x), values
    )
