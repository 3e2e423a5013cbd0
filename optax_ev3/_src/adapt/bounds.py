r"""Bounds: how surely a candidate is better than another, by several theories.

Dimensions: ``C`` candidates, ``N`` examples. The difference of two scores on example i
is :math:`D_i`, their mean :math:`\bar D`, their standard deviation (ddof 1) :math:`s`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy import special
from jax.scipy.stats import norm

from optax_ev3._src.base import control, statistics
from optax_ev3._src.base import evidence as ev
from optax_ev3._src.base.decision import Bound
from optax_ev3._src.base.evidence import Differences, Evidence, Index

Level = float | jax.Array


def paired_t() -> Bound:
    r"""Student's t on the differences, the default for real scores.

    :math:`\bar D - t_{1-a, N-1}\, s / \sqrt N`, by Wallace's normal approximation, see
    :func:`optax_ev3.evidence.compare`. It is exact for normal differences, and close
    for others if examples are many and tails are not too heavy. It serves
    aggregate metrics with resamples as well, with their spread as the standard error.

    Returns:
      The bound.

    Examples:
      >>> from optax_ev3 import evidence
      >>> rule_bound = evidence.paired_t()
    """

    def p_value(evidence: Evidence, objective: str, reference: Index) -> jax.Array:
        return norm.sf(ev.compare(evidence, objective, reference).z)

    def lower(
        evidence: Evidence, objective: str, reference: Index, alpha: Level
    ) -> jax.Array:
        gain, stderr, _ = ev.compare(evidence, objective, reference)
        z = statistics.z_value(alpha)
        n, t = ev.count(evidence, objective), z
        if evidence.scores[objective].ndim == 2:
            freedom = jnp.maximum(n - 1, 1)
            scaled = z * (8 * freedom + 3) / (8 * freedom + 1)
            t = jnp.sqrt(freedom * jnp.expm1(scaled**2 / freedom)) * jnp.sign(z)
        # So few examples could not be beyond z, even if they all agreed.
        enough = (n >= 2) & (statistics.max_z(n) >= z)
        return jnp.where(enough, gain - t * stderr, -jnp.inf)

    return _of_valid(p_value, lower)


def mcnemar() -> Bound:
    r"""Exact test of wins against losses, the default where scores are 0 or 1.

    With b wins and c losses, :math:`p = P(X \ge b) = I_{1/2}(b, c + 1)` for
    :math:`X \sim \text{Binomial}(b + c, 1/2)`, and 1 if b = 0. Where b + c exceeds
    2,000, the normal approximation to the root of the deviance takes its place, which
    float32 serves better and which errs by less than 0.1% where p > 0.0001. The lower
    bound of the gain is the one of :func:`paired_t`.

    Returns:
      A bound for boolean scores.

    Raises:
      TypeError: At trace time, if the scores are not boolean.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import evidence
      >>> right = jnp.array([[1, 1, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
      >>> told = evidence.gather(
      ...     {"right": right.astype(float)},
      ...     jnp.ones(3, bool),
      ...     jnp.zeros(3, bool),
      ...     binary=frozenset(["right"]),
      ... )
      >>> p = evidence.mcnemar().p_value(told, "right", told.current)
      >>> print(f"{p[0]:.4f}")  # four wins, one loss: 6 of 32
      0.1875

    References:
      McNemar, `Note on the sampling error of the difference between correlated
      proportions or percentages <https://doi.org/10.1007/BF02295996>`_, 1947.
    """

    def p_value(evidence: Evidence, objective: str, reference: Index) -> jax.Array:
        if objective not in evidence.binary:
            raise TypeError(
                f"evidence.mcnemar() needs boolean scores, 0 or 1 for each example; "
                f"those of {objective!r} are real. Use evidence.paired_t()."
            )
        values = ev.differences(evidence, objective, reference).values
        wins = (values > 0).sum(axis=1).astype(values.dtype)
        losses = (values < 0).sum(axis=1).astype(values.dtype)
        return jnp.where(wins == 0, 1, _at_least(wins, wins + losses))

    return _of_valid(p_value, paired_t().lower)


def betting(low: float, high: float) -> Bound:
    r"""For bounded scores of any distribution, by what a cautious bettor would win.

    With :math:`R = 2 (\text{high} - \text{low})`, :math:`Y = D / R + \frac12` and the
    null mean :math:`m = \frac12`, the bettor stakes :math:`\lambda_i =
    \text{clip}\left(\frac{\mu - m}{v + (\mu - m)^2}, 0, \frac{1}{2m}\right)` by mean
    :math:`\mu` and variance v of what came before, and ends with :math:`-\ln p = \max_t
    \sum_{i \le t} \ln(1 + \lambda_i (Y_i - m))`. Where a candidate is no better, p is
    below a with probability a at most, for any number of examples.

    Args:
      low: The lowest score possible.
      high: The highest.

    Returns:
      A bound. Candidates with scores outside the range prove nothing.

    Raises:
      ValueError: If ``low`` is not below ``high``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import evidence
      >>> scores = {"score": jnp.array([[0.9], [0.1], [0.1]]) * jnp.ones([3, 50])}
      >>> told = evidence.gather(scores, jnp.ones(3, bool), jnp.zeros(3, bool))
      >>> p = evidence.betting(0.0, 1.0).p_value(told, "score", told.current)
      >>> print(p[0] < 0.01, p[1])
      True 1.0

    References:
      Waudby-Smith and Ramdas, `Estimating means of bounded random variables by betting
      <https://arxiv.org/abs/2010.09686>`_, 2024.
    """
    if not low < high:
        raise ValueError(f"betting needs low < high, got low={low}, high={high}.")
    width = 2.0 * (high - low)

    def p_value(evidence: Evidence, objective: str, reference: Index) -> jax.Array:
        paired = ev.differences(evidence, objective, reference)
        p = jnp.exp(-_log_wealth(paired, width, 0.5))
        return jnp.where(_within(evidence, objective, reference, low, high), p, 1)

    def lower(
        evidence: Evidence, objective: str, reference: Index, alpha: Level
    ) -> jax.Array:
        paired = ev.differences(evidence, objective, reference)
        goal = jnp.log(1 / jnp.asarray(alpha))
        zeros = jnp.zeros(evidence.candidates)
        mean = _root(lambda m: goal - _log_wealth(paired, width, m), zeros, zeros + 1)
        within = _within(evidence, objective, reference, low, high)
        return jnp.where(within, (mean - 0.5) * width, -jnp.inf)

    return _of_valid(p_value, lower)


def standard() -> Bound:
    """The default: :func:`mcnemar` for boolean scores, else :func:`paired_t`.

    Returns:
      The bound.

    Examples:
      >>> from optax_ev3 import adapt, evidence
      >>> rule = adapt.greedy(bound=evidence.standard())
    """
    exact, usual = mcnemar(), paired_t()

    def p_value(evidence: Evidence, objective: str, reference: Index) -> jax.Array:
        bound = exact if objective in evidence.binary else usual
        return bound.p_value(evidence, objective, reference)

    return Bound(p_value, usual.lower)


def checked_bound(bound: Any) -> Bound:
    """The bound, or the default; raises TypeError if it is none."""
    if bound is None:
        return standard()
    if not isinstance(bound, Bound):
        raise TypeError(
            f"bound must be a bound, such as optax_ev3.evidence.paired_t(), got "
            f"{bound!r} of type {type(bound).__name__}."
        )
    return bound


# Parts.


def _of_valid(
    p_value: Callable[[Evidence, str, Index], jax.Array],
    lower: Callable[[Evidence, str, Index, Level], jax.Array],
) -> Bound:
    """A bound that says nothing of what is not valid."""

    def valid_p(evidence: Evidence, objective: str, reference: Index) -> jax.Array:
        both = evidence.valid & evidence.valid[reference]
        return jnp.where(both, p_value(evidence, objective, reference), 1)

    def valid_lower(
        evidence: Evidence, objective: str, reference: Index, alpha: Level
    ) -> jax.Array:
        both = evidence.valid & evidence.valid[reference]
        return jnp.where(both, lower(evidence, objective, reference, alpha), -jnp.inf)

    return Bound(valid_p, valid_lower)


def _within(
    evidence: Evidence, objective: str, reference: Index, low: float, high: float
) -> jax.Array:
    """Which candidates have, like the reference, no score outside the limits: [C]."""
    values = ev.each_example(evidence, objective)
    # A probability may be rounded to a little more than 1.
    slack = 8 * jnp.finfo(values.dtype).eps * max(abs(low), abs(high))
    inside = (values >= low - slack) & (values <= high + slack)
    if evidence.example_mask is not None:
        inside |= ~evidence.example_mask[None]
    inside = inside.all(axis=1) & evidence.valid
    return inside & inside[reference]


def _log_wealth(paired: Differences, width: float, m: float | jax.Array) -> jax.Array:
    """Logarithm of the most that bets on a mean of Y above ``m`` win, ``[C]``."""
    y = jnp.clip(paired.values / width + 0.5, 0, 1).astype(jnp.float32)
    m = jnp.broadcast_to(jnp.asarray(m, jnp.float32), y.shape[:1])[:, None]
    mask = jnp.broadcast_to(paired.mask, y.shape).astype(jnp.float32)
    count = jnp.cumsum(mask, axis=1)
    mean = (0.5 + jnp.cumsum(y * mask, axis=1)) / (count + 1)
    variance = (0.25 + jnp.cumsum((y - mean) ** 2 * mask, axis=1)) / (count + 1)
    # Stakes follow from the examples before: all columns are one too late.
    first = jnp.ones_like(m)
    mu = jnp.concatenate([0.5 * first, mean[:, :-1]], axis=1) - m
    v = jnp.concatenate([0.25 * first, variance[:, :-1]], axis=1)
    stake = jnp.clip(mu / (v + mu**2), 0, 0.5 / m)
    log = jnp.cumsum(jnp.log1p(stake * (y - m)) * mask, axis=1)
    return jnp.maximum(log.max(axis=1), 0)


def _root(
    fn: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array
) -> jax.Array:
    """Where the increasing ``fn`` crosses zero between two arrays, by bisection."""

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        above = fn(middle) > 0
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    return control.fori_loop(0, 40, halve, (low, high))[0]


def _at_least(k: jax.Array, n: jax.Array) -> jax.Array:
    """Probability of at least ``k`` heads among ``n`` coins."""
    exact = special.betainc(jnp.maximum(k, 0.5), jnp.maximum(n - k, 0) + 1, 0.5)
    # With the correction for continuity, heads minus tails as a share of all, x, have
    # the deviance n ((1 + x) ln(1 + x) + (1 - x) ln(1 - x)), here as a series. Beyond
    # 2,000 coins its terms left out are small unless p is zero anyhow.
    x = (2 * k - n - 1) / jnp.maximum(n, 1)
    squared = x**2
    series = 1 / 28 + squared * (1 / 45 + squared / 66)
    series = squared * (1 + squared * (1 / 6 + squared * (1 / 15 + squared * series)))
    approximate = norm.sf(jnp.sign(x) * jnp.sqrt(n * series))
    p = jnp.where(n > 2000, approximate, exact)
    return jnp.where(k <= 0, 1, jnp.where(k > n, 0, p))
