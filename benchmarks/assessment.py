"""What the assessment is worth in training: four questions.

drift: the visible parameters get better, or worse, by a tenth of a round's standard
  error in each of 300 rounds of 64 examples, or stay as good as the stable ones. How
  often are these replaced, or gone back to, by the default rule?
reuse: labels by lot and 500 features, as in Dwork et al. (arXiv 1506.02629): nothing
  can be learnt. 1,000 rounds on one and the same held-out set of 500. What does EV3
  report of the stable parameters, more than they are worth on new data?
chunks: digits, assessed on 128 held-out examples at once or in chunks: rounds of one
  step, of 20 steps, and the portfolio with 30% of the training labels random. How many
  examples does that take, and what does it cost?
f1: digits, the eights against all others (10%), three losses with Adam as explorers,
  assessed by F1. Each loss alone; of the three the one with the best held-out loss, or
  F1; and EV3.

It takes about ten minutes on two cores.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from sklearn import datasets

import optax_ev3
from benchmarks import models, training
from benchmarks.data import load, stacked
from benchmarks.report import show, spread, spreads
from benchmarks.results import tidy
from benchmarks.run import Cell, Suite
from optax_ev3 import adapt, evidence, explore, metrics

# Drift.


def drift(change, settings):
    """The round of each run in which either happens first, infinite for never."""
    keys = jax.random.split(jax.random.key(0), settings.runs)
    run = functools.partial(_drifting, change=change, rounds=settings.rounds)
    replaced, back = map(np.asarray, jax.jit(jax.vmap(run))(keys))
    first = {
        name: np.where(happened.any(1), happened.argmax(1) + 1, np.inf)
        for name, happened in {"replaced": replaced, "gone back": back}.items()
    }
    return tidy(first, seed=range(settings.runs))


def _drifting(key, change, rounds, explorers=2, examples=64):
    """Whether stable was replaced by better ones, or gone back to, in each round."""
    rule = adapt.confident()
    step = change * np.sqrt(2 / examples)

    def one(carry, key):
        visible, stable, memory = carry
        own, rule_key = jax.random.split(key)
        quality = jnp.append(jnp.full([explorers], visible + step), visible)
        quality = jnp.append(quality, stable)[:, None]
        scores = jax.random.normal(own, [explorers + 2, examples]) + quality
        # The same parameters have the same scores.
        scores = scores.at[-1].set(jnp.where(visible == stable, scores[-2], scores[-1]))
        flags_ = jnp.ones([explorers + 2], bool), jnp.zeros([explorers + 2], bool)
        seen = evidence.gather({"score": scores}, *flags_)
        decision, memory = rule.decide(seen, memory, rule_key)
        visible = quality[decision.adopted, 0]
        stable = jnp.where(decision.significant, quality[decision.promoted, 0], stable)
        back = decision.adopted == explorers + 1
        return (visible, stable, memory), (decision.significant, back)

    start = jnp.float32(1e-9), jnp.float32(0), rule.init(explorers)
    return jax.lax.scan(one, start, jax.random.split(key, rounds))[1]


# A held-out set that is used again and again.

GREEDY = adapt.greedy()
GUARDS = {
    "adapt.confident()": adapt.confident(),
    "adapt.greedy()": GREEDY,
    "greedy, ladder()": adapt.guarded(GREEDY, adapt.ladder()),
    "greedy, ladder(confidence=None)": adapt.guarded(
        GREEDY, adapt.ladder(confidence=None)
    ),
    "greedy, ladder(step=0.05)": adapt.guarded(GREEDY, adapt.ladder(step=0.05)),
}
FEATURES = 500


def wandering(scale: float, seed: int) -> optax.GradientTransformation:
    """Steps by lot, whatever the gradient is."""

    def update(updates, key, params=None):
        del params
        key, now = jax.random.split(jax.random.wrap_key_data(key))
        new = jax.tree.map(lambda u: scale * jax.random.normal(now, u.shape), updates)
        return new, jax.random.key_data(key)

    return optax.GradientTransformation(
        lambda _: jax.random.key_data(jax.random.key(seed)), update
    )


def reuse(name, settings):
    run = functools.partial(_reusing, rule=GUARDS[name], rounds=settings.reuses)
    reported, fresh = jax.jit(jax.vmap(run))(jnp.arange(settings.seeds))
    found = {"reported": reported, "new data": fresh}
    found["reported - new data"] = reported - fresh
    return tidy(found, seed=range(settings.seeds))


def _reusing(seed, rule, rounds):
    """Accuracy of the stable parameters as reported, and on new data."""
    keys = jax.random.split(jax.random.key(seed), 5)

    def data(key, n):
        x, y = jax.random.split(key)
        return jax.random.normal(x, [n, FEATURES]), jax.random.bernoulli(y, 0.5, [n])

    held_out, new, train = data(keys[0], 500), data(keys[1], 20_000), data(keys[2], 500)

    def right(w, batch):
        return (batch[0] @ w > 0) == batch[1]

    def loss(w, batch):
        return optax.sigmoid_binary_cross_entropy(batch[0] @ w, batch[1]).mean()

    inner = {"near": wandering(0.1, 1), "far": wandering(0.3, 2), "sgd": optax.sgd(0.1)}
    tx = optax_ev3.ev3(inner, lambda w: right(w, held_out), adapt=rule, key=seed)

    def step(carry, number):
        w, state = carry
        rows = jax.random.randint(jax.random.fold_in(keys[4], number), [64], 0, 500)
        grads = jax.grad(loss)(w, (train[0][rows], train[1][rows]))
        updates, state = tx.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jax.random.normal(keys[3], [FEATURES])
    (w, state), _ = jax.lax.scan(step, (w, tx.init(w)), jnp.arange(rounds))
    reported = optax_ev3.summary(state)["ev3/score/stable"]
    return reported, right(optax_ev3.stable_params(state), new).mean()


# Chunks.


def _portfolio(assess_fn, **kwargs):
    return optax_ev3.portfolio(assess_fn, training.loss, **kwargs)


_confident_two = functools.partial(optax_ev3.ev3, training.TWO, adapt=adapt.confident())

OWN = {"loss_fn": training.loss, "explore": explore.rounds(20)}
# How it is made, and which share of the training labels is random.
CHUNKED = {
    "two explorers": (_confident_two, 0.0),
    "eight, trajectories of 20": (
        functools.partial(optax_ev3.ev3, training.EIGHT, **OWN),
        0.0,
    ),
    "portfolio, random labels": (_portfolio, 0.3),
}
WAYS = {
    "at once": (128, None),
    "in_chunks(8)": (128, 8),
    "a third at once": (43, None),
}


def chunks(task, way, settings):
    make, noise = CHUNKED[task]
    batch, count = WAYS[way]
    held_out = load().held_out
    assess_fn = optax_ev3.held_out(training.log_likelihood, held_out, batch)
    if count:
        assess_fn = optax_ev3.in_chunks(assess_fn, count)

    def make_tx(seed):
        return make(assess_fn, key=seed, history_length=300)

    found, states = training.train(make_tx, settings.steps, settings.seeds, noise)
    seeds = range(settings.seeds)
    past = [optax_ev3.history(jax.tree.map(lambda x, i=i: x[i], states)) for i in seeds]
    found["examples"] = [one["examples"].mean() / 128 for one in past]
    return tidy(found, seed=seeds)


# A metric without a gradient.


def weighted_loss(logits, labels, weight=1.0, gamma=0.0):
    """Cross-entropy; with positives weighted, or focal (Lin et al., 2017)."""
    loss = optax.sigmoid_binary_cross_entropy(logits, labels)
    if gamma:
        loss *= (1 - jnp.exp(-loss)) ** gamma
    return (jnp.where(labels == 1, weight, 1) * loss).mean()


LOSSES = {
    "cross-entropy": {},
    "weighted 9": {"weight": 9.0},
    "focal 2": {"gamma": 2.0},
}
EV3S = {
    "trajectories of 20": explore.rounds(20),
    "trajectories of 50": explore.rounds(50),
    "trajectories of 50, never restart, averages": explore.branches(
        50, averages=[explore.trajectory_average()]
    ),
}


def logits(params, x):
    return models.forward(params, x)[:, 0]


def loss_named(name):
    def loss(params, batch):
        return weighted_loss(logits(params, batch[0]), batch[1], **LOSSES[name])

    return loss


def outputs(params, data):
    return (logits(params, data[0]) > 0).astype(jnp.int32), data[1]


def split(seed):
    """Training, held-out and test examples, the eights as positives."""
    images, digits = datasets.load_digits(return_X_y=True)
    x, y = (images / 16 - 0.3).astype(np.float32), (digits == 8).astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(x))
    return [(x[i], y[i]) for i in np.split(order, [300, 900])]


def f1(settings, name=None, strategy=None):
    """Of one loss alone, or of EV3 with all of them."""
    seeds = range(settings.f1_seeds)
    runs = jax.vmap(_f1_run(settings.f1_steps, name, strategy))
    names = ("test F1", "held-out loss", "held-out F1")
    found = runs(jnp.arange(len(seeds)), *stacked(split, seeds))
    return tidy(dict(zip(names, found, strict=True)), seed=seeds)


def _f1_run(steps, name, strategy):
    """Test F1, held-out cross-entropy and held-out F1 of a seed and its data."""
    caller = loss_named(name or "cross-entropy")

    def one(seed, train, held_out, test):
        if name is None:
            inner = {
                k: optax_ev3.explorer(optax.adam(3e-3), loss_fn=loss_named(k))
                for k in LOSSES
            }

            def assess_fn(params):
                return metrics.AggregateMetric(metrics.f1, outputs(params, held_out))

            tx = optax_ev3.ev3(
                inner, assess_fn, explore=strategy, adapt=adapt.confident(), key=seed
            )
        else:
            tx = optax.adam(3e-3)
        first, second = jax.random.split(jax.random.key(seed))
        params = [models.dense(first, 64, 32), models.dense(second, 32, 1)]
        params, _ = training.fit(tx, caller, params, train, seed, steps, 64)

        def score(part):
            return metrics.f1(outputs(params, part), jnp.ones(len(part[1])))

        return (
            score(test),
            loss_named("cross-entropy")(params, held_out),
            score(held_out),
        )

    return one


# The suite.


class Settings(NamedTuple):
    """How much is measured."""

    runs: int = 1000
    rounds: int = 300
    seeds: int = 10
    reuses: int = 1000
    steps: int = 300
    f1_seeds: int = 20
    f1_steps: int = 600


DRIFTS = (-0.1, 0.0, 0.1)


def cells(settings, tasks, results):
    del results
    if "drift" in tasks:
        for change in DRIFTS:
            yield Cell("drift", f"{change}", lambda x=change: drift(x, settings))
    if "reuse" in tasks:
        for name in GUARDS:
            yield Cell("reuse", name, lambda name=name: reuse(name, settings))
    if "chunks" in tasks:
        for case in itertools.product(CHUNKED, WAYS):
            yield Cell(
                "chunks", ", ".join(case), lambda case=case: chunks(*case, settings)
            )
    if "f1" in tasks:
        for name in LOSSES:
            yield Cell("f1", f"{name} alone", lambda x=name: f1(settings, x), True)
        for name, way in EV3S.items():
            yield Cell("f1", f"EV3, {name}", lambda x=way: f1(settings, strategy=x))


def report(results, settings, folder):
    del folder
    shown = {
        "reuse": ("reported - new data", "reported", "new data"),
        "chunks": ("accuracy", "nll"),
        "f1": ("test F1",),
    }
    digits = {"reuse": 3, "chunks": 4, "f1": 4}
    tables = {}
    for task, names in shown.items():
        found = results[results.task == task]
        if len(found):
            table = spreads(found, ["method"], dict.fromkeys(names, digits[task]))
            tables[task] = table
    if "chunks" in tables:
        found = results[(results.task == "chunks") & (results.metric == "examples")]
        shares = found.groupby("method").value.mean().map("{:.0%}".format)
        tables["chunks"].insert(0, "examples", shares)
    if "f1" in tables:
        tables["f1"] = pd.concat([tables["f1"], _chosen(results)])
    if len(found := results[results.task == "drift"]):
        tables = {"drift": _drifts(found)} | tables
    for task, table in tables.items():
        show(table.rename_axis("method"), task)


def _drifts(found):
    """The share of runs in which it happens, and the median round."""
    first = found[found.metric != "seconds"].groupby(["method", "metric"], sort=False)
    share = first.value.agg(lambda x: f"{np.isfinite(x).mean():.3f}").unstack()
    rounds = first.value.median().map("{:.0f}".format).unstack()
    table = share.join(rounds.add_suffix(", by round"))
    return table.rename(index=lambda change: f"drift {change}")


def _chosen(results):
    """Of the losses alone, the one that is best on the held-out part of each seed."""
    alone = [f"{name} alone" for name in LOSSES]
    found = results[(results.task == "f1") & results.method.isin(alone)]
    found = found[found.seed.notna()]
    wide = found.pivot(index="seed", columns=["metric", "method"], values="value")
    best = {
        "loss": wide["held-out loss"][alone].to_numpy().argmin(1),
        "F1": wide["held-out F1"][alone].to_numpy().argmax(1),
    }
    test = wide["test F1"][alone].to_numpy()
    rows = {
        f"the one of the three with the best held-out {name}": spread(
            test[np.arange(len(test)), which]
        )
        for name, which in best.items()
    }
    return pd.DataFrame({"test F1": rows})


QUICK = dict(zip(Settings._fields, (8, 10, 2, 10, 6, 2, 10), strict=True))
SUITE = Suite(("drift", "reuse", "chunks", "f1"), Settings(), QUICK, cells, report)
