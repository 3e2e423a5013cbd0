"""Adapt: rules that turn the evidence of a round into a decision. No statistics.

Dimensions: ``K`` proposals, ``C`` = K + 2 candidates, in the order proposals,
``current``, ``stable``.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ev3._src.adapt.bounds import checked_bound
from optax_ev3._src.adapt.corrections import CORRECTIONS, corrected
from optax_ev3._src.base.checks import error_rate
from optax_ev3._src.base.decision import Bound, Decision, Rule
from optax_ev3._src.base.evidence import Evidence, estimate, single_objective, take


def greedy(
    confidence: float = 0.95,
    bound: Bound | None = None,
    correction: str = "bonferroni",
) -> Rule:
    """Adopts the candidate with the highest mean score.

    Ties go to explorers before ``current``, to ``current`` before ``stable``, and
    among explorers to the one with most credit (:func:`optax_ev3.credit`), or by lot.
    Stable parameters are replaced where the adopted ones are
    shown to be better by the round's examples.

    Args:
      confidence: Of that test, one-sided, corrected for the K + 1 candidates that may
        become stable.
      bound: The test, see :mod:`optax_ev3.evidence`; default
        :func:`optax_ev3.evidence.standard`.
      correction: ``"bonferroni"``, or ``"max_t"``, which is a test of its own
        (:func:`optax_ev3.evidence.max_t`).

    Returns:
      A rule that takes one objective.

    Raises:
      ValueError: If ``confidence`` is not between 0.5 and 1, there is no such
        correction, or ``"max_t"`` is given a bound.
      TypeError: If ``bound`` is none.

    Examples:
      >>> import optax, optax_ev3
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -(w**2),
      ...     adapt=optax_ev3.adapt.greedy(),
      ... )
    """
    alpha = error_rate(confidence)
    if correction not in CORRECTIONS:
        raise ValueError(
            f"correction must be one of {CORRECTIONS}, got {correction!r}."
        )
    if correction == "max_t" and bound is not None:
        raise ValueError(
            "correction='max_t' is a test of its own, by the bootstrap: give it no "
            f"bound, or correction='bonferroni'; got the bound {bound!r}."
        )
    test = checked_bound(bound)

    def decide(
        evidence: Evidence, rule_state: Any, key: jax.Array
    ) -> tuple[Decision, Any]:
        objective, stable = single_objective(evidence), evidence.stable
        mean = estimate(evidence, objective).mean
        best = jnp.max(mean, where=evidence.valid, initial=-jnp.inf)
        adopted = untied(evidence, evidence.valid & (mean == best), key)
        tested = jnp.arange(evidence.candidates) < stable
        p = corrected(test, correction, evidence, objective, stable, tested)
        return Decision(adopted, p[adopted] < alpha), rule_state

    return Rule(no_state, decide)


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
      A rule that takes one objective, of at least two examples or of exact values.

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

    def decide(
        evidence: Evidence, rule_state: Any, key: jax.Array
    ) -> tuple[Decision, Any]:
        del key
        objective = single_objective(evidence)
        if evidence.scores[objective].shape[1:] == (1,):
            raise ValueError(
                "adapt.lower_bound needs the scores of at least 2 examples for a "
                "standard error, assess_fn returned shape (1,)."
            )
        current, stable = evidence.current, evidence.stable
        mean, stderr = estimate(evidence, objective)

        def lower(alpha: float) -> jax.Array:
            return jnp.where(evidence.valid, mean - alpha * stderr, -jnp.inf)

        proposed = lower(select_alpha)[: evidence.proposals]
        chosen = first_of(evidence.valid[: evidence.proposals], proposed, current)
        finalists = jnp.stack([chosen, jnp.int32(current), jnp.int32(stable)])
        lowest = lower(decide_alpha)
        adopted = finalists[jnp.argmax(lowest[finalists])]
        upper = mean[stable] + decide_alpha * stderr[stable]
        significant = evidence.valid[stable] & (lowest[adopted] > upper)
        return Decision(adopted, significant), rule_state

    return Rule(no_state, decide)


def choose_and_confirm(
    confidence: float = 0.95, fraction: float = 0.5, bound: Bound | None = None
) -> Rule:
    """Chooses on one part of the examples, and tests the chosen on the other.

    The paper's optimize and decide. Choosing favours the lucky; on examples that had
    no part in it there is one comparison, and nothing to correct for. The explorer with
    the highest mean on the first part, ties by credit, is adopted unless the second
    part shows it to be worse than ``current`` or ``stable``; then that one is, and of
    both the one with the higher mean on the second part. What was chosen becomes stable
    where the second part shows it to be better.

    Args:
      confidence: Of each test, one-sided; a promise for each round of fresh examples.
      fraction: Share of the examples that the choice is made on: the first ones. For
        two batches of their own, ``assess_fn`` returns the scores of both, one after
        the other.
      bound: The test, see :mod:`optax_ev3.evidence`; default
        :func:`optax_ev3.evidence.standard`.

    Returns:
      A rule that takes one objective, of at least two examples.

    Raises:
      ValueError: If ``confidence`` is not between 0.5 and 1, ``fraction`` not between 0
        and 1; at trace time, if a part has no example.
      TypeError: If ``bound`` is none.

    Examples:
      >>> import optax, optax_ev3
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w, batch: -((w - batch) ** 2),
      ...     adapt=optax_ev3.adapt.choose_and_confirm(fraction=0.3),
      ... )
    """
    alpha = error_rate(confidence)
    test = checked_bound(bound)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}.")

    def decide(
        evidence: Evidence, rule_state: Any, key: jax.Array
    ) -> tuple[Decision, Any]:
        objective = single_objective(evidence)
        shape = evidence.scores[objective].shape
        first = round(fraction * shape[-1])
        if len(shape) == 1 or not 0 < first < shape[1]:
            raise ValueError(
                f"adapt.choose_and_confirm(fraction={fraction}) needs scores of "
                f"examples that can be split, assess_fn returned shape {shape[1:]}."
            )
        current, stable = evidence.current, evidence.stable
        mean = estimate(take(evidence, slice(None, first)), objective).mean
        proposed = evidence.valid & (jnp.arange(evidence.candidates) < current)
        best = jnp.max(mean, where=proposed, initial=-jnp.inf)
        chosen = untied(evidence, proposed & (mean == best), key)
        confirm = take(evidence, slice(first, None))
        better = test.p_value(confirm, objective, stable)[chosen] < alpha
        beaten = test.p_value(confirm, objective, chosen) < alpha
        rivals = jnp.where(beaten, estimate(confirm, objective).mean, -jnp.inf)
        back = jnp.where(rivals[stable] >= rivals[current], stable, current)
        adopted = jnp.where(beaten[current] | beaten[stable], back, chosen)
        return Decision(adopted, better & (adopted == chosen)), rule_state

    return Rule(no_state, decide)


# Parts.


def no_state(proposals: int) -> tuple[()]:
    """The state of a rule that remembers nothing."""
    del proposals
    return ()


def untied(evidence: Evidence, mask: jax.Array, key: jax.Array) -> jax.Array:
    """One of the mask: a proposal by credit, else ``current``, else ``stable``."""
    # Equal credit is decided by lot.
    order = 1e-4 * jax.random.uniform(key, [evidence.proposals])
    if evidence.credit is not None:
        order += evidence.credit
    last = jnp.array([-1e3, -2e3], order.dtype)
    return first_of(mask, jnp.append(order, last), evidence.current)


def first_of(
    mask: jax.Array, order: jax.Array, otherwise: int | jax.Array
) -> jax.Array:
    """Index of the highest ``order`` within ``mask``, int32."""
    best = jnp.argmax(jnp.where(mask, order, -jnp.inf)).astype(jnp.int32)
    return jnp.where(mask.any(), best, otherwise)
