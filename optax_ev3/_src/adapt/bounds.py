r"""Bounds: how surely a candidate is better than another, by several theories.

Dimensions: ``C`` candidates, ``N`` examples, ``B`` resamples. The difference of two
scores on example i is :math:`D_i`, their mean :math:`\bar D`, their standard deviation
(ddof 1) :math:`s`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy import special
from jax.scipy.stats import norm

from optax_ev3._src.base import control
from optax_ev3._src.base import evidence as ev
from optax_ev3._src.base.evidence import Evidence


class Process(NamedTuple):
    """Evidence that holds at any time, however often and for however long one looks.

    Attributes:
      init: Maps C to the state before any evidence, a tree of arrays.
      add: Maps ``(state, evidence, objective, reference)`` to the state after one more
        round of new examples.
      log_e: Maps the state to ``[C]``, logarithm of the evidence so far that a
        candidate is better than the reference. Where it is not, the evidence ever
        exceeds 1 / a with probability a at most (Ville's inequality).
    """

    init: Callable[[int], Any]
    add: Callable[[Any, Evidence, str, Any], Any]
    log_e: Callable[[Any], jax.Array]


class Bound(NamedTuple):
    """How surely every candidate is better than a reference, on the same examples.

    Attributes:
      p_value: Maps ``(evidence, objective, reference)`` to ``[C]``: where a candidate
        is no better, its value is below a with probability a at most. It is 1 where
        the candidate or the reference is not valid.
      lower: Maps ``(evidence, objective, reference, alpha)`` to ``[C]``: the gain in
        mean score exceeds this, save with probability alpha. It is -inf where nothing
        can be said.
      process: The same over many rounds, where the bound holds at any time.
    """

    p_value: Callable[[Evidence, str, Any], jax.Array]
    lower: Callable[[Evidence, str, Any, Any], jax.Array]
    process: Process | None = None


def paired_t() -> Bound:
    r"""Student's t on the differences, the default for real scores.

    :math:`\bar D - t_{1-a, N-1}\, s / \sqrt N`, by Wallace's normal approximation, see
    :func:`optax_ev3.evidence.compare`. It is exact for normal differences, and close
    for others if examples are many and tails are not too heavy. It serves figures with
    resamples as well, with their spread as the standard error.

    Returns:
      The bound.

    Examples:
      >>> from optax_ev3 import evidence
      >>> rule_bound = evidence.paired_t()
    """

    def p_value(evidence, objective, reference):
        return norm.sf(ev.compare(evidence, objective, reference).z)

    def lower(evidence, objective, reference, alpha):
        gain, stderr, _ = ev.compare(evidence, objective, reference)
        z = z_value(alpha)
        n, t = ev.count(evidence, objective), z
        if evidence.scores[objective].ndim == 2:
            freedom = jnp.maximum(n - 1, 1)
            scaled = z * (8 * freedom + 3) / (8 * freedom + 1)
            t = jnp.sqrt(freedom * jnp.expm1(scaled**2 / freedom)) * jnp.sign(z)
        return jnp.where(_enough(n, z), gain - t * stderr, -jnp.inf)

    return _valid(p_value, lower)


def unpaired_normal() -> Bound:
    r"""The paper's: :math:`m \mp z_{1-a} e` of each alone, which must not overlap.

    With means :math:`m` and standard errors :math:`e`; blind to what the candidates
    have in common, and therefore weak. Unlike in the paper, N examples are never taken
    for more than N coins that all fall alike.

    Returns:
      The bound.

    References:
      Ding et al., `EV3: Ever Evolving Evaluator
      <https://arxiv.org/abs/2310.18893>`_, 2023.
    """

    def moments(evidence, objective, reference):
        mean, stderr = ev.estimate(evidence, objective)
        return ev.less(mean, mean[reference]), stderr + stderr[reference]

    return _normal(moments)


def mcnemar(mid_p: bool = False) -> Bound:
    r"""Exact test of wins against losses, the default where scores are 0 or 1.

    With b wins and c losses, :math:`p = P(X \ge b) = I_{1/2}(b, c + 1)` for
    :math:`X \sim \text{Binomial}(b + c, 1/2)`, and 1 if b = 0. Where b + c exceeds
    2,000, the normal approximation to the root of the deviance takes its place, which
    float32 serves better and which errs by less than 0.1% where p > 0.0001. The lower
    bound of the gain is the one of :func:`paired_t`.

    Args:
      mid_p: Subtract half of :math:`P(X = b)`: closer to the nominal level, which it
        may exceed slightly.

    Returns:
      A bound for boolean scores.

    Raises:
      TypeError: At trace time, if the scores are not boolean.

    References:
      McNemar, `Note on the sampling error of the difference between correlated
      proportions or percentages <https://doi.org/10.1007/BF02295996>`_, 1947.
    """

    def p_value(evidence, objective, reference):
        if objective not in evidence.binary:
            raise TypeError(
                f"evidence.mcnemar() needs boolean scores, 0 or 1 for each example; "
                f"those of {objective!r} are real. Use evidence.paired_t()."
            )
        values = ev.differences(evidence, objective, reference).values
        wins = (values > 0).sum(axis=1).astype(values.dtype)
        losses = (values < 0).sum(axis=1).astype(values.dtype)
        p = _heads(wins, wins + losses)
        if mid_p:
            p = (p + _heads(wins + 1, wins + losses)) / 2
        return jnp.where(wins == 0, 1, p)

    return _valid(p_value, paired_t().lower)


def hoeffding(low: float, high: float) -> Bound:
    r"""For bounded scores of any distribution: :math:`R \sqrt{\ln(2/a) / (2N)}`.

    R, the width of the range of differences, is twice that of scores.

    Args:
      low: The lowest score possible.
      high: The highest.

    Returns:
      A bound. Candidates with scores outside the range prove nothing.

    Raises:
      ValueError: If ``low`` is not below ``high``.

    References:
      Maron and Moore, `Hoeffding races
      <https://papers.nips.cc/paper/1993/hash/02a32ad2669e6fe298e607fe7cc0e1a0-Abstract.html>`_,
      1994.
    """
    width = _width("hoeffding", low, high)

    def p_value(evidence, objective, reference):
        found = ev.differences(evidence, objective, reference)
        mean = _mean(found)
        p = 2 * jnp.exp(-2 * found.n * (mean / width) ** 2)
        return jnp.where(mean > 0, jnp.minimum(p, 1), 1)

    def lower(evidence, objective, reference, alpha):
        found = ev.differences(evidence, objective, reference)
        return _mean(found) - width * jnp.sqrt(jnp.log(2 / alpha) / (2 * found.n))

    return _valid(p_value, lower, (low, high))


def empirical_bernstein(low: float, high: float) -> Bound:
    r"""For bounded scores that mostly agree.

    :math:`s \sqrt{2 \ln(2/a) / N} + 7 R \ln(2/a) / (3 (N - 1))`, with R as in
    :func:`hoeffding`, which it beats where differences vary little over many examples.

    Args:
      low: The lowest score possible.
      high: The highest.

    Returns:
      A bound. Candidates with scores outside the range prove nothing.

    Raises:
      ValueError: If ``low`` is not below ``high``.

    References:
      Maurer and Pontil, `Empirical Bernstein bounds and sample variance penalization
      <https://arxiv.org/abs/0907.3740>`_, 2009.
    """
    width = _width("empirical_bernstein", low, high)

    def terms(evidence, objective, reference):
        gain, stderr, _ = ev.compare(evidence, objective, reference)
        n = ev.count(evidence, objective)
        return gain, stderr * math.sqrt(2), 7 * width / (3 * jnp.maximum(n - 1, 1)), n

    def p_value(evidence, objective, reference):
        gain, root, linear, n = terms(evidence, objective, reference)
        # Solves gain = root x + linear x^2, x^2 = ln(2/p).
        larger = root + jnp.sqrt(root**2 + 4 * linear * jnp.abs(gain))
        x = 2 * jnp.abs(gain) / jnp.where(larger > 0, larger, 1)
        p = jnp.minimum(2 * jnp.exp(-(x**2)), 1)
        return jnp.where((gain > 0) & (n >= 2), p, 1)

    def lower(evidence, objective, reference, alpha):
        gain, root, linear, n = terms(evidence, objective, reference)
        log = jnp.log(2 / alpha)
        bound = gain - root * jnp.sqrt(log) - linear * log
        return jnp.where(n >= 2, bound, -jnp.inf)

    return _valid(p_value, lower, (low, high))


def bootstrap(samples: int = 999, seed: int = 0) -> Bound:
    r"""The spread of the mean over B resamples as the standard error.

    :math:`\bar D - z_{1-a} s^*`, examples weighted by Poisson(1) counts, the same for
    all candidates. For figures of all examples together the resamples are those that
    come with them.

    Args:
      samples: B, at least 2.
      seed: Of the counts, which are the same in all rounds.

    Returns:
      The bound.

    Raises:
      ValueError: If ``samples`` is below 2.

    References:
      Efron, `Bootstrap methods: another look at the jackknife
      <https://doi.org/10.1214/aos/1176344552>`_, 1979.
    """
    if samples < 2:
        raise ValueError(f"bootstrap needs at least 2 samples, got {samples}.")

    def moments(evidence, objective, reference):
        if evidence.scores[objective].ndim == 1:
            return ev.compare(evidence, objective, reference)[:2]
        found = ev.differences(evidence, objective, reference)
        return _mean(found), ev.deviation(_deviations(found, samples, seed))

    return _normal(moments)


def normal_mixture(low: float, high: float, expected: int = 1000) -> Bound:
    r"""For bounded scores, at any time.

    :math:`\ln e = \frac12 \ln \frac{4 \rho}{V + \rho} + \frac{S^2}{2 (V + \rho)} + \ln
    \Phi\left(\frac{S}{\sqrt{V + \rho}}\right)`, with the sum of differences S and
    :math:`V = N R^2 / 4`.

    Args:
      low: The lowest score possible.
      high: The highest.
      expected: Examples, over all rounds, for which the bound is tightest; it holds
        for any number.

    Returns:
      A bound with a process. Candidates with scores outside the range prove nothing.

    Raises:
      ValueError: If ``low`` is not below ``high``, or ``expected`` is below 1.

    References:
      Howard et al., `Time-uniform, nonparametric, nonasymptotic confidence sequences
      <https://arxiv.org/abs/1810.08240>`_, 2021, equation 3.6.
    """
    width = _width("normal_mixture", low, high)
    if expected < 1:
        raise ValueError(f"expected must be at least 1 example, got {expected}.")
    variance = width**2 / 4
    rho = best_rho(expected * variance)

    def init(candidates):
        # An array each: the same one twice could not be donated.
        return {k: jnp.zeros([candidates], jnp.float32) for k in ("sum", "variance")}

    def add(state, evidence, objective, reference):
        found = ev.differences(evidence, objective, reference)
        usable = _within(evidence, objective, reference, (low, high))
        total = state["sum"] + jnp.where(usable, found.values.sum(axis=1), 0)
        used = jnp.where(usable, found.n, 0)
        return {
            "sum": total.astype(jnp.float32),
            "variance": (state["variance"] + variance * used).astype(jnp.float32),
        }

    def log_e(state):
        return mixture_log_e(state["sum"], state["variance"], rho)

    def lower(evidence, objective, reference, alpha):
        found = ev.differences(evidence, objective, reference)
        v = jnp.full(found.values.shape[:1], variance * found.n)
        goal = jnp.log(1 / jnp.asarray(alpha))

        def excess(s):
            return mixture_log_e(s, v, rho) - goal

        highest = jnp.sqrt(2 * (v + rho) * (goal + jnp.log1p(v / rho))) + 1
        s = _root(excess, jnp.zeros_like(v), highest)
        return (found.values.sum(axis=1) - s) / found.n

    process = Process(init, add, log_e)
    return _valid(_from_process(process), lower, (low, high), process)


def betting(low: float, high: float) -> Bound:
    r"""For bounded scores, at any time, by what a cautious bettor would win.

    With :math:`Y = D / R + \frac12` and the null mean :math:`m = \frac12`, the bettor
    stakes :math:`\lambda_i = \text{clip}\left(\frac{\mu - m}{v + (\mu - m)^2}, 0,
    \frac{1}{2m}\right)` by mean :math:`\mu` and variance v of what came before, and
    ends with :math:`\ln e = \max_t \sum_{i \le t} \ln(1 + \lambda_i (Y_i - m))`.

    Args:
      low: The lowest score possible.
      high: The highest.

    Returns:
      A bound with a process. Candidates with scores outside the range prove nothing.

    Raises:
      ValueError: If ``low`` is not below ``high``.

    References:
      Waudby-Smith and Ramdas, `Estimating means of bounded random variables by betting
      <https://arxiv.org/abs/2010.09686>`_, 2024.
    """
    width = _width("betting", low, high)

    def init(candidates):
        keys = ("count", "sum", "squares", "log", "best")
        return {key: jnp.zeros([candidates], jnp.float32) for key in keys}

    def add(state, evidence, objective, reference):
        found = ev.differences(evidence, objective, reference)
        usable = _within(evidence, objective, reference, (low, high))
        seen = jnp.where(usable[:, None], found.seen, 0)
        bets = found._replace(seen=seen)
        return _bet(state, bets, width, 0.5)

    def lower(evidence, objective, reference, alpha):
        found = ev.differences(evidence, objective, reference)
        empty = init(found.values.shape[0])
        goal = jnp.log(1 / jnp.asarray(alpha))

        def excess(m):
            return goal - _bet(empty, found, width, m)["best"]

        zeros = jnp.zeros(found.values.shape[0])
        return (_root(excess, zeros, zeros + 1) - 0.5) * width

    process = Process(init, add, lambda state: state["best"])
    return _valid(_from_process(process), lower, (low, high), process)


def _bet(state, found, width, m):
    """The state after bets on all examples that the mean of Y exceeds ``m``, [C]."""
    m = jnp.broadcast_to(jnp.asarray(m, jnp.float32), state["log"].shape)[:, None]
    y = jnp.clip(found.values / width + 0.5, 0, 1).astype(jnp.float32)
    seen = jnp.broadcast_to(found.seen, y.shape).astype(jnp.float32)
    first = {k: v[:, None] for k, v in state.items()}
    count = first["count"] + jnp.cumsum(seen, axis=1)
    total = first["sum"] + jnp.cumsum(y * seen, axis=1)
    mean = (0.5 + total) / (count + 1)
    squares = first["squares"] + jnp.cumsum((y - mean) ** 2 * seen, axis=1)
    variance = (0.25 + squares) / (count + 1)
    # Stakes follow from the examples before: all columns are one too late.
    prior_mean = (0.5 + first["sum"]) / (first["count"] + 1)
    prior_variance = (0.25 + first["squares"]) / (first["count"] + 1)
    mu = jnp.concatenate([prior_mean, mean[:, :-1]], axis=1) - m
    v = jnp.concatenate([prior_variance, variance[:, :-1]], axis=1)
    stake = jnp.clip(mu / (v + mu**2), 0, 0.5 / m)
    log = first["log"] + jnp.cumsum(jnp.log1p(stake * (y - m)) * seen, axis=1)
    return {
        "count": count[:, -1],
        "sum": total[:, -1],
        "squares": squares[:, -1],
        "log": log[:, -1],
        "best": jnp.maximum(state["best"], log.max(axis=1)),
    }


def mixture_log_e(total: Any, variance: Any, rho: Any) -> jax.Array:
    """Logarithm of the one-sided normal mixture, see :func:`normal_mixture`."""
    v = variance + rho
    start = 0.5 * jnp.log(4 * rho / v)
    return start + total**2 / (2 * v) + norm.logcdf(total / jnp.sqrt(v))


def best_rho(variance: float, alpha: float = 0.05) -> float:
    """The mixture's scale that is about the best where V is ``variance``."""
    log = 2 * math.log(1 / alpha)
    return variance / (log + math.log1p(log))


# Many candidates, many rounds.


def bonferroni(p: jax.Array, tested: jax.Array) -> jax.Array:
    """P values ``[C]`` times the number of those ``tested``, ``[C]`` bool."""
    return jnp.where(tested, jnp.minimum(p * tested.sum(dtype=p.dtype), 1), 1)


def holm(p: jax.Array, tested: jax.Array) -> jax.Array:
    """Holm's step-down correction of p values ``[C]``, of which some are ``tested``.

    References:
      Holm, `A simple sequentially rejective multiple test procedure
      <https://www.jstor.org/stable/4615733>`_, 1979.
    """
    order = jnp.argsort(jnp.where(tested, p, jnp.inf))
    factor = tested.sum(dtype=p.dtype) - jnp.arange(p.shape[0], dtype=p.dtype)
    steps = jnp.where(tested[order], p[order] * factor, 0)
    adjusted = jnp.minimum(lax.cummax(steps), 1)
    return jnp.where(tested, jnp.zeros_like(p).at[order].set(adjusted), 1)


def max_t(
    evidence: Evidence,
    objective: str,
    reference: Any,
    tested: jax.Array,
    samples: int = 999,
    seed: int = 0,
) -> jax.Array:
    r"""P values corrected for all candidates tested, by what they have in common.

    The share of bootstrap samples whose :math:`\max_k (\bar D^*_k - \bar D_k) / e_k`,
    over the candidates tested, reaches :math:`\bar D_k / e_k`. Less strict than
    Bonferroni where candidates are alike.

    Args:
      evidence: The scores of the round.
      objective: Which objective to compare.
      reference: Index of the reference.
      tested: ``[C]`` bool.
      samples: B; no p value is below 1 / (B + 1).
      seed: Of the bootstrap, as for :func:`bootstrap`.

    Returns:
      ``[C]``, 1 for those not tested.

    References:
      Westfall and Young, *Resampling-Based Multiple Testing*, Wiley, 1993.
    """
    gain, stderr, z = ev.compare(evidence, objective, reference)
    usable = tested & evidence.valid & evidence.valid[reference]
    if objective in evidence.resamples:
        samples_of = evidence.resamples[objective]
        spread = samples_of - jnp.expand_dims(samples_of[reference], 0)
        deviations = spread - spread.mean(axis=1, keepdims=True)
    elif evidence.scores[objective].ndim == 1:
        return jnp.where(usable, norm.sf(z), 1)
    else:
        found = ev.differences(evidence, objective, reference)
        deviations = _deviations(found, samples, seed)
    t = gain / jnp.where(stderr > 0, stderr, 1)
    t = jnp.where(stderr > 0, t, z)
    studentized = deviations / jnp.where(stderr > 0, stderr, 1)[:, None]
    largest = jnp.max(studentized, axis=0, where=usable[:, None], initial=-jnp.inf)
    reached = (largest[None] >= t[:, None]).sum(axis=1)
    p = (1 + reached) / (1 + deviations.shape[1])
    # No proof where the evidence is that of a few coins.
    return jnp.where(usable & (gain > 0), jnp.maximum(p, norm.sf(z)), 1)


CORRECTIONS = ("bonferroni", "holm", "max_t", None)


def corrected(
    bound: Bound,
    correction: str | None,
    evidence: Evidence,
    objective: str,
    reference: Any,
    tested: jax.Array,
) -> jax.Array:
    """P values ``[C]`` of a bound, corrected for the candidates tested."""
    if correction == "max_t":
        return max_t(evidence, objective, reference, tested)
    p = bound.p_value(evidence, objective, reference)
    if correction is None:
        return jnp.where(tested, p, 1)
    return {"bonferroni": bonferroni, "holm": holm}[correction](p, tested)


def spend(alpha: Any, number: Any) -> jax.Array:
    r"""The level of test number t = 1, 2, ...: :math:`6 a / (\pi^2 t^2)`, in sum a."""
    return 6 * alpha / (math.pi * jnp.asarray(number, jnp.float32)) ** 2


def standard() -> Bound:
    """The default: :func:`mcnemar` for boolean scores, else :func:`paired_t`."""
    exact, usual = mcnemar(), paired_t()

    def p_value(evidence, objective, reference):
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


def _valid(p_value, lower, limits=None, process=None):
    """A bound that says nothing of what is not valid, or outside its limits."""

    def usable(evidence, objective, reference):
        both = evidence.valid & evidence.valid[reference]
        if limits is None:
            return both
        return both & _within(evidence, objective, reference, limits)

    def safe_p(evidence, objective, reference):
        use = usable(evidence, objective, reference)
        return jnp.where(use, p_value(evidence, objective, reference), 1)

    def safe_lower(evidence, objective, reference, alpha):
        use = usable(evidence, objective, reference)
        found = lower(evidence, objective, reference, alpha)
        return jnp.where(use, found, -jnp.inf)

    return Bound(safe_p, safe_lower, process)


def _normal(moments):
    """A bound by gains and standard errors ``[C]``, as if normally distributed."""

    def p_value(evidence, objective, reference):
        gain, stderr = moments(evidence, objective, reference)
        z = gain / jnp.maximum(stderr, jnp.abs(gain) / ev.CERTAIN)
        # None stronger than that of n coins that all fall alike.
        limit = ev.coins(ev.count(evidence, objective))
        return norm.sf(jnp.where(gain == 0, 0, jnp.minimum(z, limit)))

    def lower(evidence, objective, reference, alpha):
        gain, stderr = moments(evidence, objective, reference)
        z = z_value(alpha)
        enough = _enough(ev.count(evidence, objective), z)
        return jnp.where(enough, gain - z * stderr, -jnp.inf)

    return _valid(p_value, lower)


def _within(evidence, objective, reference, limits):
    """Which candidates have, like the reference, no score outside the limits: [C]."""
    values = ev.each_example(evidence, objective)
    # A probability may be rounded to a little more than 1.
    slack = 8 * jnp.finfo(values.dtype).eps * max(map(abs, limits))
    inside = (values >= limits[0] - slack) & (values <= limits[1] + slack)
    if evidence.seen is not None:
        inside |= ~evidence.seen[None]
    inside = inside.all(axis=1) & evidence.valid
    return inside & inside[reference]


def _width(name, low, high):
    if not low < high:
        raise ValueError(f"{name} needs low < high, got low={low}, high={high}.")
    return 2.0 * (high - low)


def z_value(alpha: Any) -> jax.Array:
    """The z value that noise exceeds with probability ``alpha``."""
    return -special.ndtri(jnp.asarray(alpha, jnp.float32))


def _from_process(process):
    def p_value(evidence, objective, reference):
        state = process.init(evidence.valid.shape[0])
        state = process.add(state, evidence, objective, reference)
        return jnp.exp(-jnp.maximum(process.log_e(state), 0))

    return p_value


def _mean(found):
    """Mean difference ``[C]``, zero where no example was looked at."""
    return found.values.sum(axis=1) / jnp.maximum(found.n, 1)


def _enough(n, z):
    """Whether n coins that all fall alike could be beyond ``z``."""
    return (n >= 2) & (ev.coins(n) >= z)


def _heads(k, n):
    """Probability of at least ``k`` heads among ``n`` coins."""
    exact = special.betainc(jnp.maximum(k, 0.5), jnp.maximum(n - k, 0) + 1, 0.5)
    # With the correction for continuity, heads less tails as a share of all, x, have
    # the deviance n ((1 + x) ln(1 + x) + (1 - x) ln(1 - x)), here as a series. Beyond
    # 2,000 coins its terms left out are small unless p is zero anyhow.
    x = (2 * k - n - 1) / jnp.maximum(n, 1)
    squared = x**2
    series = 1 / 28 + squared * (1 / 45 + squared / 66)
    series = squared * (1 + squared * (1 / 6 + squared * (1 / 15 + squared * series)))
    approximate = norm.sf(jnp.sign(x) * jnp.sqrt(n * series))
    p = jnp.where(n > 2000, approximate, exact)
    return jnp.where(k <= 0, 1, jnp.where(k > n, 0, p))


def _deviations(found, samples, seed):
    """Means on bootstrap samples less the mean: ``[C, B]``."""
    weights = poisson(jax.random.key(seed), samples, found.values.shape[1])
    weights *= found.seen
    # Centred first: what is left of a mean after subtraction would be rounding.
    sums = (found.values - _mean(found)[:, None]) @ weights.T
    return sums / jnp.maximum(weights.sum(axis=1), 1)[None]


def poisson(key: jax.Array, samples: int, n: int) -> jax.Array:
    """Bootstrap counts ``[B, N]`` float32, Poisson distributed with mean 1."""
    uniform = jax.random.uniform(key, [samples, n])
    counts, mass, total = jnp.zeros([samples, n]), math.exp(-1), math.exp(-1)
    for k in range(1, 11):  # More than 10 has probability 1e-8.
        counts += (uniform >= total).astype(counts.dtype)
        mass /= k
        total += mass
    return counts


def _root(fn, low, high):
    """Where the increasing ``fn`` crosses zero between two arrays, by bisection."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        above = fn(middle) > 0
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    return control.fori_loop(0, 40, halve, (low, high))[0]
