"""Simulated scores, and what tests of candidates decide on them."""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from benchmarks.results import tidy
from optax_ev3 import evidence as ev
from optax_ev3._src.base import statistics

ALPHA = 0.05
KINDS = ("0/1", "bounded", "heavy-tailed")
IN_RANGE = ("0/1", "bounded")
SCORE = "score"

# Scores.


def draw(kind: str, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Scores ``[C, N]`` of candidates that are equally good and have much in common."""
    common, own, more, differs = jax.random.split(key, 4)
    if kind == "0/1":
        # Two candidates differ where either was drawn anew and it shows: on 6%.
        anew = 1 - math.sqrt(1 - 0.06 / 0.32)
        right = jax.random.bernoulli(common, 0.8, (1, shape[1]))
        other = jax.random.bernoulli(own, 0.8, shape)
        scores = jnp.where(jax.random.bernoulli(differs, anew, shape), other, right)
        return scores.astype(jnp.float32)
    shared = jax.random.normal(common, (1, shape[1]))
    noise = jax.random.normal(own, shape)
    if kind == "bounded":
        return jax.nn.sigmoid(1 + 2 * shared + 0.7 * noise)
    # Chi-squared with 3 degrees of freedom, of which an exponential makes 2.
    squares = jax.random.normal(more, shape) ** 2
    squares += 2 * jax.random.exponential(differs, shape)
    return shared + 0.3 * noise / jnp.sqrt(squares / 3)


def draw_better(key: jax.Array, examples: int) -> jax.Array:
    """Scores ``[2, N]``, 0 or 1: the first is better by 0.01, on 6% they differ."""
    first, second = jax.random.split(key)
    reference = jax.random.bernoulli(first, 0.8, (examples,))
    changes = jnp.where(reference, 0.025 / 0.8, 0.035 / 0.2)
    changed = jax.random.bernoulli(second, changes)
    return jnp.stack([reference ^ changed, reference]).astype(jnp.float32)


def gather(kind: str, scores: jax.Array) -> ev.Evidence:
    names = frozenset([SCORE] if kind == "0/1" else [])
    count = scores.shape[0]
    valid, is_ascent = jnp.ones([count], bool), jnp.zeros([count], bool)
    return ev.gather({SCORE: scores}, valid, is_ascent, binary=names)


# Methods.


class Method(NamedTuple):
    """How to declare candidates better.

    Attributes:
      bound: Name of the bound, or "max-t", which is a correction besides.
      correction: For K candidates, or None.
      kinds: The scores that it takes.
      promises: Whether it claims to be wrong with 5% at most, at least approximately.
    """

    bound: str
    correction: str | None = "bonferroni"
    kinds: tuple[str, ...] = KINDS
    promises: bool = True


METHODS = {
    "paired z, uncorrected": Method("paired z", None, promises=False),
    "paired t, Bonferroni": Method("paired t"),
    "paired t, max-t": Method("max-t", None),
    "McNemar, Bonferroni": Method("McNemar", kinds=("0/1",)),
    "betting, Bonferroni": Method("betting", kinds=IN_RANGE),
}


def paired_z(evidence: ev.Evidence, objective: str, reference: int) -> jax.Array:
    """P values of the paired z test, as it is usually written."""
    gain, stderr, _ = ev.compare(evidence, objective, reference)
    return norm.sf(gain / jnp.where(stderr > 0, stderr, 1))


def p_values() -> dict[str, Callable[..., jax.Array]]:
    """The bounds by name, as ``fn(evidence, objective, reference) -> [C]``."""
    bounds = {
        "paired t": ev.paired_t(),
        "McNemar": ev.mcnemar(),
        "betting": ev.betting(0, 1),
    }
    return {"paired z": paired_z} | {k: v.p_value for k, v in bounds.items()}


def corrected(p: jax.Array, correction: str | None, tested: jax.Array) -> jax.Array:
    if correction is None:
        return jnp.where(tested, p, 1)
    return ev.bonferroni(p, tested)


def simulate(
    one: Callable[[jax.Array], Any], scores: int, settings: Any, case: str
) -> Any:
    """What ``one(key)`` finds in all simulations, stacked, in NumPy.

    As many run at once as their ``scores`` fit into memory. Each case has keys of its
    own, so that chance does not strike all alike.
    """
    at_once = max(1, min(settings.simulations, settings.at_once // scores))
    chunks = math.ceil(settings.simulations / at_once)
    key = jax.random.key(zlib.crc32(case.encode()))
    keys = jax.random.split(key, (chunks, at_once))
    found = jax.jit(lambda keys: jax.lax.map(jax.vmap(one), keys))(keys)
    return jax.tree.map(
        lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[: settings.simulations], found
    )


# False: candidates that are no better, one round.


def false_rates(kind, examples, settings):
    """How often each method declares any of the first K candidates better."""
    names = [name for name, method in METHODS.items() if kind in method.kinds]
    most = max(settings.candidates)
    reference = most
    fns = p_values()

    def one(key):
        found = gather(kind, draw(kind, key, (most + 1, examples)))
        p = {
            name: fns[name](found, SCORE, reference)
            for name in {METHODS[name].bound for name in names} - {"max-t"}
        }

        def declares(name, count):
            method, tested = METHODS[name], jnp.arange(most + 1) < count
            if method.bound == "max-t":
                settled = ev.max_t(found, SCORE, reference, tested, settings.resamples)
            else:
                settled = corrected(p[method.bound], method.correction, tested)
            return (settled <= ALPHA).any()

        return {
            name: jnp.stack([declares(name, count) for count in settings.candidates])
            for name in names
        }

    scores = (most + 1) * examples
    declared = simulate(one, scores, settings, f"{kind} {examples}")
    rates = [declared[name].mean(0) for name in names]
    axes = {"test": names, "K": settings.candidates}
    return tidy({"rate": rates}, **axes).assign(scores=kind, N=examples)


# Anytime: a candidate that is no better, looked at after each round.


def pooled_z():
    """The paired z test on all examples so far, as if nobody had looked before."""

    def add(state, evidence, number):
        del number
        found = ev.differences(evidence, SCORE, 1)
        d = found.values[0]
        parts = jnp.stack([found.n, d.sum(), (d**2).sum()])
        n, total, squares = state = state + parts
        variance = (squares - total**2 / n) / (n - 1)
        z = total / jnp.sqrt(jnp.where(variance > 0, n * variance, 1))
        return state, norm.sf(z) <= ALPHA

    return jnp.zeros([3]), add


def each_round(bound: ev.Bound, level_of: Callable[[Any], Any]):
    """A test of each round alone, at a level that depends on its number."""

    def add(state, evidence, number):
        p = bound.p_value(evidence, SCORE, 1)[0]
        return state, p <= level_of(number)

    return jnp.zeros([]), add


def mixture_of_rounds():
    """The trial of the default rule: z values of rounds, in a normal mixture."""
    rho = statistics.best_rho(30)

    def add(state, evidence, number):
        total = state + ev.compare(evidence, SCORE, 1).z[0]
        log_e = statistics.mixture_log_e(total, number, rho)
        return total, log_e >= math.log(1 / ALPHA)

    return jnp.zeros([]), add


LOOKS = {
    "pooled z after each round": (pooled_z, False),
    "paired t, each round at 5%": (
        lambda: each_round(ev.paired_t(), lambda number: ALPHA),
        False,
    ),
    "paired t, 5% spent": (
        lambda: each_round(ev.paired_t(), lambda number: ev.spend(ALPHA, number)),
        True,
    ),
    "normal mixture of rounds": (mixture_of_rounds, True),
}


def anytime_rates(kind, settings):
    """How often each way has declared it better by the end of each round."""
    shape = (2, settings.round_examples)
    ways = {name: make() for name, (make, _) in LOOKS.items()}

    def one(key):
        def look(states, number):
            found = gather(kind, draw(kind, jax.random.fold_in(key, number), shape))
            found = {k: ways[k][1](states[k], found, number) for k in ways}
            states = {k: state for k, (state, _) in found.items()}
            return states, {k: declared for k, (_, declared) in found.items()}

        start = {name: state for name, (state, _) in ways.items()}
        numbers = jnp.arange(1, settings.rounds + 1)
        declared = jax.lax.scan(look, start, numbers)[1]
        return jax.tree.map(lambda x: jax.lax.cummax(x.astype(jnp.int8)), declared)

    # Over the rounds, too, which are cheap.
    ever = simulate(one, 40 * math.prod(shape), settings, f"anytime {kind}")
    rates = [ever[name].mean(0) for name in LOOKS]
    axes = {"test": LOOKS, "round": range(1, settings.rounds + 1)}
    return tidy({"rate": rates}, **axes).assign(scores=kind)


# Power: a candidate that is better.

POWERS = ("paired t", "McNemar", "betting")


def power_rates(settings):
    """How often each bound declares it better."""
    examples = settings.power_examples
    fns = p_values()

    def one(key):
        found = gather("0/1", draw_better(key, examples))
        return {name: fns[name](found, SCORE, 1)[0] <= ALPHA for name in POWERS}

    declared = simulate(one, 2 * examples, settings, "power")
    return tidy({"rate": [declared[name].mean() for name in POWERS]}, test=POWERS)


# Alike: one candidate of many is better, and their differences are correlated.

CORRELATIONS = (0.0, 0.5, 0.9)
GAIN = 0.17  # In standard deviations of a difference.


def alike_rates(correlation, settings):
    """How often the better one is found, by each correction for all candidates."""
    count, examples = max(settings.candidates), settings.alike_examples
    tested = jnp.arange(count + 1) < count
    fn = ev.paired_t().p_value

    def one(key):
        common, own = jax.random.split(key)
        differences = math.sqrt(correlation) * jax.random.normal(common, (1, examples))
        noise = jax.random.normal(own, (count, examples))
        differences += math.sqrt(1 - correlation) * noise
        scores = jnp.pad(differences.at[0].add(GAIN), ((0, 1), (0, 0)))
        found = gather("real", scores)
        p = {
            "paired t, Bonferroni": ev.bonferroni(fn(found, SCORE, count), tested),
            "paired t, max-t": ev.max_t(
                found, SCORE, count, tested, settings.resamples
            ),
        }
        return {name: values[0] <= ALPHA for name, values in p.items()}

    found = simulate(one, count * examples, settings, f"alike {correlation}")
    rates = [found[name].mean() for name in found]
    return tidy({"rate": rates}, test=list(found))
