"""What the rules are worth: accuracy on digits, and how often noise counts as proof.

digits: scikit-learn's, MLP 64-128-128-10, batches of 128, one-step rounds assessed on
  128 fresh draws of 300 held-out examples, by log-likelihood or by accuracy (a coarse
  score full of ties). Sets of explorers: two good ones; the same with three hostile
  ones; eight with rates that span two orders. Beside them each explorer alone, on the
  same seeds, parameters and batches. "adopted": in how many percent of the rounds
  each candidate was.
noise: simulated rounds in which all candidates are equally good: how often a rule
  replaces the stable parameters all the same.

It takes about ten minutes on two cores.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_ev3
from benchmarks.data import load
from benchmarks.report import show, spreads
from benchmarks.results import tidy
from benchmarks.run import Cell, Suite
from benchmarks.training import EIGHT, TWO, correct, log_likelihood, train
from optax_ev3 import adapt
from optax_ev3._src.base import evidence

HOSTILE = TWO | {
    "sgd 1e3": optax.sgd(1e3),
    "nan": optax.scale(float("nan")),
    "uphill sgd": optax.sgd(-0.1),
}
SETS = {"two": TWO, "two + 3 hostile": HOSTILE, "eight": EIGHT}
METRICS = {"log-likelihood": log_likelihood, "accuracy": correct}
RULES = {
    "confident": adapt.confident(),
    "greedy": adapt.greedy(),
    "lower_bound": adapt.lower_bound(),
}
SCORES = ("0/1", "normal", "heavy-tailed")


class Settings(NamedTuple):
    """How much is measured."""

    seeds: int = 10
    steps: int = 300
    rounds: int = 10_000  # That are simulated.


def cells(settings, tasks, results):
    del results
    if "digits" in tasks:
        for name, tx in EIGHT.items():
            yield Cell("digits", f"{name} alone", lambda tx=tx: alone(tx, settings))
        for case in itertools.product(RULES, METRICS, SETS):
            yield Cell(
                "digits", ", ".join(case), lambda case=case: digits(*case, settings)
            )
    if "noise" in tasks:
        for case in itertools.product(RULES, SCORES, (2, 8), (64, 256)):
            yield Cell(
                "noise",
                "{}, {}, {} explorers, {} examples".format(*case),
                lambda case=case: noise(*case, settings.rounds),
            )


def alone(tx, settings):
    found, _ = train(lambda seed: tx, settings.steps, settings.seeds)
    return tidy(found, seed=range(settings.seeds))


def digits(rule, metric, label, settings):
    assess_fn = optax_ev3.held_out(METRICS[metric], load().held_out, 128)

    def make_tx(seed):
        return optax_ev3.ev3(SETS[label], assess_fn, adapt=RULES[rule], key=seed)

    found, state = train(make_tx, settings.steps, settings.seeds)
    summary = jax.vmap(optax_ev3.summary)(state)
    shares = {k: v for k, v in summary.items() if k.startswith("ev3/share/")}
    return tidy(found | shares, seed=range(settings.seeds))


def _draws(kind, key, shape):
    """Scores of equally good candidates that agree on most examples."""
    shared, own, differs = jax.random.split(key, 3)
    if kind == "0/1":
        base = jax.random.bernoulli(shared, 0.8, shape[1:])
        flips = jax.random.bernoulli(differs, 0.06, shape)
        other = jax.random.bernoulli(own, 0.8, shape)
        return jnp.where(flips, other, base).astype(jnp.float32)
    base = jax.random.normal(shared, shape[1:])
    if kind == "normal":
        return base + 0.3 * jax.random.normal(own, shape)
    return base + 0.3 * jax.random.t(own, 3.0, shape)


def noise(rule, kind, explorers, examples, rounds):
    """The share of false replacements."""
    made, candidates = RULES[rule], explorers + 2

    def one(key):
        draw_key, rule_key = jax.random.split(key)
        scores = {"score": _draws(kind, draw_key, (candidates, examples))}
        valid, is_ascent = jnp.ones(candidates, bool), jnp.zeros(candidates, bool)
        found = evidence.gather(scores, valid, is_ascent)
        decision, _ = made.decide(found, made.init(explorers), rule_key)
        return decision.significant

    keys = jax.random.split(jax.random.key(0), rounds)
    share = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(keys).mean()
    case = {"rule": rule, "scores": kind, "K": explorers, "N": examples}
    return tidy({"replaced": share}).assign(**case)


def report(results, settings, folder):
    del folder
    found = results[results.task == "digits"]
    if len(found):
        table = spreads(found, ["method"], {"accuracy": 4, "nll": 4})
        shares = found[found.metric.str.startswith("ev3/share/")]
        names = shares.metric.str.removeprefix("ev3/share/").rename("candidate")
        means = 100 * shares.groupby(["method", names], sort=False).value.mean()
        means = means[means >= 0.5].reset_index("candidate")
        texts = means.candidate + means.value.map(" {:.0f}".format)
        adopted = texts.groupby("method").agg(", ".join)
        table = table.join(adopted.rename("adopted")).fillna("")
        show(table, f"Digits, {settings.steps} steps, {settings.seeds} seeds")
    found = results[(results.task == "noise") & (results.metric == "replaced")]
    if len(found):
        table = found.astype({"K": int, "N": int}).set_index(["rule", "scores"])
        title = "Stable replaced though all are equally good: share of"
        show(table[["K", "N", "value"]], f"{title} {settings.rounds:,} rounds", 4)


QUICK = {"seeds": 2, "steps": 12, "rounds": 100}
SUITE = Suite(("digits", "noise"), Settings(), QUICK, cells, report)
