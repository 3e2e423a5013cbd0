"""What the rules for several objectives are worth: a constraint, and a priority.

safety: a classifier for two groups. The minority, 10%, has other class boundaries and
  noisier labels, and only one feature hints at the group. The model in use treats both
  alike, after 100 steps with the balanced loss (`--warm 0` for none). Accuracy is to
  improve; the accuracy of the worse group may not fall by more than 0.01. Explorers:
  three losses with two rates of Adam each, branches of 10 steps, assessed on fresh
  examples. An adoption of an explorer is broken where its accuracy in the worse group,
  on a large sample that nothing else sees, is lower by more than 0.01 than that of the
  parameters that were stable when the round began. The fall is that of the final
  parameters from the best that were stable in any round.
priority: digits, a network whose one or two bottleneck units must serve two or four
  questions. An objective is the share of the entropy of the labels that is explained:
  0 for knowing just how frequent they are, 1 for certainty. One explorer for the mean
  loss, and one for each question, whose loss leans from the mean to that question:
  half the way, or with `--lean 1` all of it, so that the other questions are forgotten.
  Hypervolume: the product of the objectives of the final point, on the test set,
  against the reference point 0. Fixed weights are taken from a grid, the best of them
  chosen in hindsight, on the test set.

All rows have the same data, explorers, steps and seeds. It takes about ten minutes on
two cores.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

import optax_ev3
from benchmarks.data import load, sample
from benchmarks.models import forward, layers, log_likelihood, mlp
from benchmarks.report import show, spread, spreads
from benchmarks.results import tidy
from benchmarks.run import Cell, Suite
from optax_ev3 import adapt, explore

LENGTH = 10  # of a trajectory
# As ev3 sets its default rule for trajectories.
SINGLE = adapt.confident(clip=10.0, prior_rounds=1.0)


def rounds(tx, params, steps, seed, batch_fn, assess_fn):
    """Trains; the final parameters, and what was stable and visible in each round.

    Also whether an explorer was adopted.

    ``batch_fn(key)`` draws a training batch, ``assess_fn(key)`` what is assessed on.
    """

    def one_round(carry, number):
        params, state = carry
        key = jax.random.fold_in(jax.random.key(seed), number)
        fresh, stable = assess_fn(jax.random.fold_in(key, LENGTH)), state.stable

        def step(carry, number):
            params, state = carry
            batch = batch_fn(jax.random.fold_in(key, number))
            updates, state = tx.update(None, state, params, batch=batch, fresh=fresh)
            return (optax.apply_updates(params, updates), state), None

        start = params, state
        (params, state), _ = jax.lax.scan(step, start, jnp.arange(LENGTH))
        past = optax_ev3.summary(state)
        kept = past["ev3/adopted/current"] + past["ev3/adopted/stable"]
        return (params, state), (stable, params, kept == 0)

    start = params, tx.init(params)
    (params, _), past = jax.lax.scan(one_round, start, jnp.arange(steps // LENGTH))
    return params, past


# Safety.

TOLERANCE = 0.01
FEATURES, CLASSES, SHARE = 6, 3, 0.1
EXAMPLES = 16_384  # of an assessment, half of them of each group
LARGE = 50_000  # of the sample that tells the truth


def draw(key, size):
    """Features, labels and membership in the minority, one half of the examples."""
    keys = jax.random.split(key, 5)
    teacher = jax.random.normal(jax.random.key(0), [2, FEATURES, CLASSES])
    member = jnp.arange(size) % 2
    x = jax.random.normal(keys[0], [size, FEATURES])
    # The minority's boundaries are half its own.
    y = x @ teacher[0] + member[:, None] * (x @ teacher[1])
    noisy = jax.random.uniform(keys[1], [size]) < jnp.where(member, 0.2, 0.05)
    other = jax.random.randint(keys[2], [size], 0, CLASSES)
    hint = 2 * member - 1 + jax.random.normal(keys[3], [size])
    x = jnp.append(x, hint[:, None], axis=1)
    return x, jnp.where(noisy, other, y.argmax(1)), member


def natural(member):
    """Weights that bring both groups back to their shares."""
    return 2 * jnp.where(member, SHARE, 1 - SHARE)


def cross_entropy(params, batch):
    return -log_likelihood(forward(params, batch[0]), batch[1])


def plain(params, batch):
    return (natural(batch[2]) * cross_entropy(params, batch)).mean()


def balanced(params, batch):
    return cross_entropy(params, batch).mean()


def worst(params, batch):
    """The loss of the group with the higher one."""
    loss, member = cross_entropy(params, batch), batch[2]
    return 2 * jnp.maximum((loss * member).mean(), (loss * (1 - member)).mean())


LOSSES = {"plain": plain, "balanced": balanced, "worst": worst}


def warmed(params, seed, steps):
    """The model that is in use: trained by the balanced loss alone."""
    tx = optax.adam(1e-2)

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(jax.grad(balanced)(params, draw(key, 128)), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(seed), steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


ADAMS = optax_ev3.sweep(optax.adam, learning_rate=[1e-2, 1e-3])


def assess(params, fresh):
    """Accuracy of all, and of the minority, from the same examples."""
    x, y, member = fresh
    correct = forward(params, x).argmax(1) == y
    return {"accuracy": natural(member) * correct, "minority": 2.0 * member * correct}


SAFETY = {
    "constrained": adapt.constrained("accuracy", {"minority": TOLERANCE}, rule=SINGLE),
    "weighted, equal": adapt.weighted({"accuracy": 1, "minority": 1}, rule=SINGLE),
    # A sum to which the other adds nothing: the default rule.
    "accuracy alone": adapt.weighted({"accuracy": 1, "minority": 0}, rule=SINGLE),
}


def safety(rule, settings):
    """Final figures of each seed; how many adoptions, and how many broken."""
    large = draw(jax.random.key(1), LARGE)

    def groups(params):
        correct = (forward(params, large[0]).argmax(1) == large[1]).reshape(-1, 2)
        return correct.mean(0)

    def one(seed):
        inner = optax_ev3.product({"adam": ADAMS}, LOSSES)
        tx = optax_ev3.ev3(
            inner,
            assess,
            explore=explore.rounds(LENGTH),
            loss_fn=plain,
            adapt=rule,
            assess_mode="map",  # compiles fastest
            key=seed,
        )
        params = mlp(FEATURES + 1, 32, CLASSES)[0](jax.random.key(seed))
        params = warmed(params, seed + 20_000, settings.warm)
        params, (stable, visible, explored) = rounds(
            tx,
            params,
            settings.steps,
            seed + 10_000,
            lambda key: draw(key, 128),
            lambda key: draw(key, EXAMPLES),
        )
        before, after = (jax.lax.map(groups, p).min(1) for p in (stable, visible))
        broken = explored & (after < before - TOLERANCE)
        final = groups(params)
        accuracy = (1 - SHARE) * final[0] + SHARE * final[1]
        return {
            "accuracy": accuracy,
            "worst group": final.min(),
            "fall": before.max() - final.min(),
            "adoptions": explored.sum(),
            "broken": broken.sum(),
        }

    found = jax.jit(jax.vmap(one))(jnp.arange(settings.seeds))
    return tidy(found, seed=range(settings.seeds))


# Priority.

QUESTIONS = {
    "odd": [0, 1] * 5,
    "above 4": [0] * 5 + [1] * 5,
    "digit": list(range(10)),
    "has a loop": [1, 0, 0, 0, 0, 0, 1, 0, 1, 1],
}
# By the number of questions: units of the bottleneck, and in how many parts weights
# are dealt out, at least one to each question.
UNITS = {2: 1, 4: 2}
PARTS_OF_WEIGHT = {2: 10, 4: 7}


def questions(count):
    """By name of the first questions: the labels of digits, how many, their entropy."""
    digits = load().train[1]
    out = {}
    for name in list(QUESTIONS)[:count]:
        labels = jnp.array(QUESTIONS[name])
        share = jnp.bincount(labels[digits], length=max(QUESTIONS[name]) + 1)
        share = share / share.sum()
        out[name] = labels, len(share), -(share * jnp.log(share)).sum()
    return out


def explained(asked, params, batch):
    """By question, the share of the entropy explained: ``[n]``."""
    trunk, heads = params
    code = forward(trunk, batch[0])
    out = {}
    for name, (labels, _, entropy) in asked.items():
        w, b = heads[name]
        out[name] = 1 + log_likelihood(code @ w + b, labels[batch[1]]) / entropy
    return out


def grid(count):
    """All ways to deal out the parts: ``[ways, count]``; last, equal weights."""
    parts = PARTS_OF_WEIGHT[count]
    cuts = itertools.combinations(range(1, parts), count - 1)
    ways = [np.diff([0, *cut, parts]) / parts for cut in cuts]
    ways = [way for way in ways if len(set(way)) > 1]
    return np.array([*ways, np.full(count, 1 / count)], np.float32)


def with_weights(asked, weights):
    """The rule of a weighted sum, with weights that may be traced."""
    rule = adapt.weighted(dict.fromkeys(asked, 1.0), rule=SINGLE)

    def init(explorers):
        start = dict(zip(asked, weights, strict=True))
        return rule.init(explorers)._replace(weights=start)

    return adapt.Rule(init, rule.decide, rule.objectives)


def moving_rules(asked):
    equal = dict.fromkeys(asked, 1 / len(asked))
    ones = dict.fromkeys(asked, 1.0)
    return {
        "weighted, moving to targets": adapt.weighted(
            equal, targets=ones, rate=0.1, rule=SINGLE
        ),
    }


def priority_run(asked, make_rule, settings):
    """A function of seed and weights: the objectives of the final point ``[M]``."""
    data = load()

    def leaning(own, lean):
        def loss(params, batch):
            found = explained(asked, params, batch)
            losses = {name: -values.mean() for name, values in found.items()}
            mean = sum(losses.values()) / len(losses)
            return mean if own is None else lean * losses[own] + (1 - lean) * mean

        return loss

    def one(seed, weights):
        losses = {name: leaning(name, settings.lean) for name in asked}
        losses["mean"] = leaning(None, 0.0)
        tx = optax_ev3.ev3(
            optax_ev3.product({"adam": optax.adam(3e-3)}, losses),
            lambda params: explained(asked, params, data.held_out),
            explore=explore.rounds(LENGTH),
            loss_fn=losses["mean"],
            assess_mode="map",
            adapt=make_rule(weights),
            key=seed,
        )
        keys = jax.random.split(jax.random.key(seed), len(asked) + 1)
        units = UNITS[len(asked)]
        heads = {
            name: layers(keys[i], (units, classes))[0]
            for i, (name, (_, classes, _)) in enumerate(asked.items(), 1)
        }
        params, _ = rounds(
            tx,
            (mlp(64, 16, units)[0](keys[0]), heads),
            settings.steps,
            seed + 10_000,
            lambda key: sample(key, data.train, 32),
            lambda key: None,
        )
        found = explained(asked, params, data.test)
        return jnp.stack([found[name].mean() for name in asked])

    return one


FIXED = "fixed weights"


def fixed_weights(count, settings):
    """Objectives of all ways to deal out weights, which are found in the rows."""
    asked, ways, seeds = questions(count), grid(count), settings.seeds
    run = priority_run(asked, lambda weights: with_weights(asked, weights), settings)
    pairs = jnp.tile(jnp.arange(seeds), len(ways)), jnp.repeat(ways, seeds, axis=0)
    found = jax.jit(jax.vmap(run))(*pairs)
    names = [" ".join(f"{weight:.2f}" for weight in way) for way in ways]
    return tidy(by_question(asked, found), weights=names, seed=range(seeds))


def moving_weights(count, name, settings):
    asked, ways = questions(count), grid(count)
    rule = moving_rules(asked)[name]
    run = priority_run(asked, lambda _: rule, settings)
    seeds = jnp.arange(settings.seeds)
    found = jax.jit(jax.vmap(run, (0, None)))(seeds, ways[0])
    return tidy(by_question(asked, found), seed=range(settings.seeds))


def by_question(asked, points):
    return {name: points[:, number] for number, name in enumerate(asked)}


# The suite.


class Settings(NamedTuple):
    """How much is measured."""

    seeds: int = 20
    steps: int = 400
    objectives: tuple[int, ...] = (2, 4)  # How many.
    lean: float = 0.5  # From the mean loss to the own one.
    warm: int = 100  # Balanced steps before the rounds.


def cells(settings, tasks, results):
    del results
    if "safety" in tasks:
        for name, rule in SAFETY.items():
            yield Cell("safety", name, lambda rule=rule: safety(rule, settings))
    if "priority" in tasks:
        for count in settings.objectives:
            task = f"{count} objectives"
            yield Cell(
                task, FIXED, lambda count=count: fixed_weights(count, settings), True
            )
            for name in moving_rules(questions(count)):
                case = count, name, settings
                yield Cell(task, name, lambda case=case: moving_weights(*case))


def report(results, settings, folder):
    del folder
    seeds = f"{settings.steps} steps, {settings.seeds} seeds"
    found = results[results.task == "safety"]
    if len(found):
        shown = {"accuracy": 4, "worst group": 4, "fall": 4}
        table = spreads(found, ["method"], shown)
        sums = found.groupby(["method", "metric"]).value.sum().unstack()
        share = 100 * sums.broken / sums.adoptions.clip(lower=1)
        table.insert(0, "broken, %", share.map("{:.2f}".format))
        table.insert(1, "of", sums.adoptions.astype(int))
        table = pd.concat([table, _less(found, shown, "constrained")])
        show(table.rename_axis("rule"), f"Safety, {seeds}")
    for count in settings.objectives:
        found = results[results.task == f"{count} objectives"]
        if len(found):
            _show_priority(found, list(QUESTIONS)[:count], f"Priority, {seeds}")


def _less(found, metrics, name):
    """Paired differences of a method's figures from those of the others."""
    found = found[found.metric.isin(metrics)]
    wide = found.pivot(index="seed", columns=["metric", "method"], values="value")
    others = [k for k in dict.fromkeys(found.method) if k != name]
    if name not in set(found.method):
        return pd.DataFrame()
    return pd.DataFrame(
        {
            f"{name} less {other}": {
                metric: spread(wide[metric, name] - wide[metric, other])
                for metric in metrics
            }
            for other in others
        }
    ).T.reindex(columns=["broken, %", "of", *metrics], fill_value="")


def _show_priority(found, asked, title):
    """Hypervolumes of single points over the reference, zero."""
    points = found[found.metric.isin(asked)].fillna({"weights": ""})
    index = ["method", "weights", "seed"]
    points = points.pivot(index=index, columns="metric", values="value")[asked]
    volumes = points.clip(lower=0).prod(axis=1).rename("hypervolume")
    fixed = volumes[FIXED].groupby("weights").mean()
    equal = " ".join([f"{1 / len(asked):.2f}"] * len(asked))
    rows = {
        f"best {FIXED}: {fixed.idxmax()}": (FIXED, fixed.idxmax()),
        f"equal {FIXED}": (FIXED, equal),
        f"worst {FIXED}": (FIXED, fixed.idxmin()),
        **{k: (k, "") for k in dict.fromkeys(found.method) if k != FIXED},
    }
    best = volumes[FIXED, fixed.idxmax()]
    lines = {
        name: {
            "hypervolume": spread(volumes[key]),
            "less the best": spread(volumes[key] - best),
            **points.loc[key].mean().map("{:.3f}".format),
        }
        for name, key in rows.items()
    }
    table = pd.DataFrame.from_dict(lines, orient="index").rename_axis("rule")
    show(table, f"{title}, weights of {', '.join(asked)}")


QUICK = {"seeds": 2, "steps": 20, "warm": 10, "objectives": (2,)}
SUITE = Suite(("safety", "priority"), Settings(), QUICK, cells, report)
