"""Adapt: rules that turn the evidence of a round into a decision. No statistics.

Dimensions: ``K`` explorers, ``C`` = K + 2 candidates, in the order explorers,
``current``, ``stable``.
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ev3._src.evidence import Evidence, compare, estimate, single_objective


class Decision(NamedTuple):
    """What a rule decides.

    Attributes:
      adopted: ``[]`` int32, index of the candidate that becomes visible.
      significant: ``[]`` bool, whether it becomes stable, too.
    """

    adopted: jax.Array
    significant: jax.Array


class Rule(NamedTuple):
    """A rule, in the manner of ``optax.GradientTransformation``.

    Attributes:
      init: Maps the number of explorers K to what the rule remembers, a tree of
        arrays.
      decide: Maps ``(evidence, memory, key)`` to ``(Decision, memory)``; pure, with
        the same shapes and dtypes of memory. It must never adopt an invalid
        candidate, save ``current`` where nothing is valid.
    """

    init: Callable[[int], Any]
    decide: Callable[[Evidence, Any, jax.Array], tuple[Decision, Any]]


def greedy(confidence: float = 0.95) -> Rule:
    """Adopts the candidate with the highest mean score.

    Ties go to explorers before ``current``, to ``current`` before ``stable``, and
    among explorers by lot. Stable parameters are replaced where the adopted ones are
    better by a paired test on the round's examples.

    Args:
      confidence: Of that test, one-sided, corrected for K explorers (Bonferroni).

    Returns:
      A rule that takes one objective.

    Raises:
      ValueError: If ``confidence`` is not between 0.5 and 1.

    Examples:
      >>> import optax, optax_ev3
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -(w**2),
      ...     adapt=optax_ev3.adapt.greedy(),
      ... )
    """
    alpha = _alpha(confidence)

    def decide(evidence, memory, key):
        objective = single_objective(evidence)
        explorers = evidence.valid.shape[0] - 2
        mean = estimate(evidence, objective).mean
        best = jnp.max(mean, where=evidence.valid, initial=-jnp.inf)
        order = jnp.concatenate(
            [jax.random.uniform(key, [explorers]), jnp.array([-1.0, -2.0])]
        )
        adopted = _first(evidence.valid & (mean == best), order, explorers)
        to_stable = compare(evidence, objective, explorers + 1)
        significant = to_stable.z[adopted] > _critical(alpha / explorers)
        return Decision(adopted, significant), memory

    return Rule(lambda explorers: (), decide)


def lower_bound(select_alpha: float = 0.5, decide_alpha: float = 1.96) -> Rule:
    r"""The paper's rule, exactly: unpaired normal bounds, first choose, then decide.

    With means :math:`m` and standard errors :math:`e` (ddof 1) of the candidates:
    the explorer with the highest :math:`m - \alpha_s e` is chosen; of chosen,
    ``current`` and ``stable``, in this order, the one with the highest
    :math:`m - \alpha_d e` is adopted; where its lower bound exceeds the upper bound
    :math:`m + \alpha_d e` of ``stable``, it becomes stable. Exact ties go to the
    first, as in the paper.

    Args:
      select_alpha: :math:`\alpha_s`, in standard errors, at least 0.
      decide_alpha: :math:`\alpha_d`, in standard errors, at least 0.

    Returns:
      A rule that takes one objective, of at least two examples or of exact figures.

    Raises:
      ValueError: If an alpha is negative; at trace time, if there is one example.

    Examples:
      >>> import optax, optax_ev3
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -(w**2),
      ...     adapt=optax_ev3.adapt.lower_bound(select_alpha=0.5, decide_alpha=1.96),
      ... )

    References:
      Ding et al., `EV3: Ever Evolving Evaluator
      <https://arxiv.org/abs/2310.18893>`_, 2023.
    """
    for name, value in {
        "select_alpha": select_alpha,
        "decide_alpha": decide_alpha,
    }.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}.")

    def decide(evidence, memory, key):
        del key
        objective = single_objective(evidence)
        if evidence.scores[objective].shape[1:] == (1,) and evidence.axis_name is None:
            raise ValueError(
                "adapt.lower_bound needs the scores of at least 2 examples for a "
                "standard error, assess_fn returned shape (1,)."
            )
        current = evidence.valid.shape[0] - 2
        mean, stderr = estimate(evidence, objective)

        def bound(alpha):
            return jnp.where(evidence.valid, mean - alpha * stderr, -jnp.inf)

        chosen = jnp.argmax(bound(select_alpha)[:current])
        finalists = jnp.stack([chosen, current, current + 1])
        lower = bound(decide_alpha)
        adopted = finalists[jnp.argmax(lower[finalists])].astype(jnp.int32)
        adopted = jnp.where(evidence.valid.any(), adopted, current)
        upper = mean[current + 1] + decide_alpha * stderr[current + 1]
        significant = evidence.valid[current + 1] & (lower[adopted] > upper)
        return Decision(adopted, significant), memory

    return Rule(lambda explorers: (), decide)


def confident(confidence=0.95):
    import sys
    sys.path.insert(0, "/tmp/exp")
    from rules4 import rule4
    return rule4()


def _alpha(confidence: float) -> float:
    if not 0.5 < confidence < 1:
        raise ValueError(
            f"confidence must be above 0.5 and below 1, got {confidence}."
        )
    return 1 - confidence


def _critical(alpha: float) -> float:
    """The z value that noise exceeds with probability ``alpha``."""
    return NormalDist().inv_cdf(1 - alpha)


def _first(mask: jax.Array, order: jax.Array, otherwise: int) -> jax.Array:
    """Index of the highest ``order`` within ``mask``, int32."""
    best = jnp.argmax(jnp.where(mask, order, -jnp.inf)).astype(jnp.int32)
    return jnp.where(mask.any(), best, otherwise)
