"""What the rules for several objectives are worth: a constraint, and a priority.

    python benchmarks/objectives.py [--part safety] [--part priority]

safety: a classifier for two groups. The minority, 10%, has other class boundaries and
  noisier labels, and only one feature hints at the group. The model in use treats both
  alike, after 100 steps with the balanced loss (--warm 0 for none). Accuracy is to
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
  half the way, or with --lean 1 all of it, so that the other questions are forgotten.
  Hypervolume: the product of the objectives of the final point, on the test set,
  against the reference point 0. Fixed weights are taken from a grid, the best of them
  chosen in hindsight, on the test set.

All rows have the same data, explorers, steps and seeds. It takes about ten minutes on
two cores.
"""

import itertools
import json
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

import optax_ev3
from optax_ev3 import adapt

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from _digits import _data, load

SEEDS = flags.DEFINE_integer("seeds", 20, "Runs of each method.", lower_bound=2)
STEPS = flags.DEFINE_integer("steps", 400, "Training steps.", lower_bound=10)
ROWS = flags.DEFINE_string("rows", "", "Only rules that match.")
OBJECTIVES = flags.DEFINE_multi_integer("objectives", [2, 4], "How many: 2, 4 or both.")
LEAN = flags.DEFINE_float("lean", 0.5, "From the mean loss to the own one.", 0, 1)
WARM = flags.DEFINE_integer("warm", 100, "Balanced steps before the rounds.", 0)
JSON = flags.DEFINE_string("json", None, "Where to write the figures, too.")

LENGTH = 10  # of a trajectory
# As ev3 sets its default rule for trajectories.
SINGLE = adapt.confident(clip=10.0, prior_rounds=1.0)


def spread(values):
    values = np.asarray(values, float)
    error = values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.4f} ± {error:.4f}"


def wanted(rows):
    return {name: row for name, row in rows.items() if re.search(ROWS.value, name)}


def dense(key, sizes):
    """Parameters of a network."""
    he = jax.nn.initializers.he_normal()
    shapes = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    return [(he(k, s), jnp.zeros(s[1])) for k, s in zip(keys, shapes, strict=True)]


def forward(params, x):
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


def rounds(tx, params, steps, seed, batch_fn, assess_fn):
    """Trains; the final parameters, and of each round what was stable and adopted.

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
        adopted = state.record.adopted[number % state.record.adopted.shape[0]]
        return (params, state), (stable, params, adopted)

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
    logits = forward(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])


def plain(params, batch):
    return (natural(batch[2]) * cross_entropy(params, batch)).mean()


def balanced(params, batch):
    return cross_entropy(params, batch).mean()


def worst(params, batch):
    """The loss of the group with the higher one."""
    loss, member = cross_entropy(params, batch), batch[2]
    return 2 * jnp.maximum((loss * member).mean(), (loss * (1 - member)).mean())


LOSSES = {"plain": plain, "balanced": balanced, "worst": worst}


def warmed(params, seed):
    """The model that is in use: trained by the balanced loss alone."""
    tx = optax.adam(1e-2)

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(jax.grad(balanced)(params, draw(key, 128)), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(seed), WARM.value)
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


def safety_runs(rule, steps, seeds):
    """By name ``[seeds]``: final figures; how many adoptions, and how many broken."""
    large = draw(jax.random.key(1), LARGE)

    def groups(params):
        correct = (forward(params, large[0]).argmax(1) == large[1]).reshape(-1, 2)
        return correct.mean(0)

    def one(seed):
        inner = optax_ev3.product({"adam": ADAMS}, LOSSES)
        tx = optax_ev3.ev3(
            inner,
            assess,
            trajectory_length=LENGTH,
            loss_fn=plain,
            adapt=rule,
            assess_mode="map",  # compiles fastest
            key=seed,
        )
        params = dense(jax.random.key(seed), (FEATURES + 1, 32, CLASSES))
        params = warmed(params, seed + 20_000)
        params, (stable, visible, adopted) = rounds(
            tx,
            params,
            steps,
            seed + 10_000,
            lambda key: draw(key, 128),
            lambda key: draw(key, EXAMPLES),
        )
        before, after = (jax.lax.map(groups, p).min(1) for p in (stable, visible))
        explored = adopted < 2 * len(LOSSES)
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

    found = jax.jit(jax.vmap(one))(jnp.arange(seeds))
    return {name: np.asarray(values) for name, values in found.items()}


def safety(steps, seeds):
    shown = ("accuracy", "worst group", "fall")
    title = "".join(f"{name:>18}" for name in shown)
    print(f"{'rule':32}{'broken':>8}{'of':>6}{title}")
    found = {}
    for name, rule in wanted(SAFETY).items():
        row = found[name] = safety_runs(rule, steps, seeds)
        count = row["adoptions"].sum()
        share = row["broken"].sum() / max(count, 1)
        cells = "".join(f"{spread(row[what]):>18}" for what in shown)
        print(f"{name:32}{share:8.2%}{count:6}{cells}", flush=True)
    for name in [name for name in found if name != "constrained"]:
        less = [found["constrained"][what] - found[name][what] for what in shown]
        cells = "".join(f"{spread(values):>18}" for values in less)
        print(f"{'constrained less ' + name:46}{cells}")
    return jax.tree.map(np.ndarray.tolist, found)


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
        loss = optax.softmax_cross_entropy_with_integer_labels(
            code @ w + b, labels[batch[1]]
        )
        out[name] = 1 - loss / entropy
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


def priority_run(asked, make_rule, steps):
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
        losses = {name: leaning(name, LEAN.value) for name in asked}
        losses["mean"] = leaning(None, 0.0)
        tx = optax_ev3.ev3(
            optax_ev3.product({"adam": optax.adam(3e-3)}, losses),
            lambda params: explained(asked, params, data.held_out),
            trajectory_length=LENGTH,
            loss_fn=losses["mean"],
            assess_mode="map",
            adapt=make_rule(weights),
            key=seed,
        )
        keys = jax.random.split(jax.random.key(seed), len(asked) + 1)
        units = UNITS[len(asked)]
        heads = {
            name: dense(keys[i], (units, classes))[0]
            for i, (name, (_, classes, _)) in enumerate(asked.items(), 1)
        }
        params, _ = rounds(
            tx,
            (dense(keys[0], (64, 16, units)), heads),
            steps,
            seed + 10_000,
            lambda key: _data.sample(key, data.train, 32),
            lambda key: None,
        )
        found = explained(asked, params, data.test)
        return jnp.stack([found[name].mean() for name in asked])

    return one


def volume(points):
    """Hypervolume of each single point ``[..., M]`` over the reference, zero."""
    return np.prod(np.maximum(points, 0), axis=-1)


def priority(steps, seeds):
    return {
        f"{count} objectives": _priority(questions(count), steps, seeds)
        for count in OBJECTIVES.value
    }


def _priority(asked, steps, seeds):
    numbers, ways = jnp.arange(seeds), grid(len(asked))
    run = priority_run(asked, lambda weights: with_weights(asked, weights), steps)
    pairs = jnp.tile(numbers, len(ways)), jnp.repeat(ways, seeds, axis=0)
    fixed = np.asarray(jax.jit(jax.vmap(run))(*pairs))
    fixed = fixed.reshape(len(ways), seeds, len(asked))
    best = volume(fixed).mean(1).argmax()
    rows = {
        "best fixed weights": fixed[best],
        "equal fixed weights": fixed[-1],
        "worst fixed weights": fixed[volume(fixed).mean(1).argmin()],
    }
    shares = ", ".join(f"{k} {w:.2f}" for k, w in zip(asked, ways[best], strict=True))
    print(f"\nBest of {len(ways)} fixed weights: {shares}")
    title = "".join(f"{name:>12}" for name in asked)
    print(f"{'rule':30}{'hypervolume':>18}{'less the best':>18}{title}")
    for name, rule in wanted(moving_rules(asked)).items():
        run = priority_run(asked, lambda _, rule=rule: rule, steps)
        rows[name] = np.asarray(jax.jit(jax.vmap(run, (0, None)))(numbers, ways[0]))
    figures = {}
    for name, points in rows.items():
        less = volume(points) - volume(fixed[best])
        cells = f"{spread(volume(points)):>18}{spread(less):>18}"
        means = "".join(f"{value:12.3f}" for value in points.mean(0))
        print(f"{name:30}{cells}{means}", flush=True)
        figures[name] = points.tolist()
    return figures


PARTS: dict[str, Any] = {"safety": safety, "priority": priority}
_PARTS = flags.DEFINE_multi_enum("part", list(PARTS), list(PARTS), "Which; all.")


def main(_):
    logging.set_verbosity(logging.WARNING)
    figures = {}
    print(f"{STEPS.value} steps, mean ± standard error over {SEEDS.value} seeds")
    for name in _PARTS.value:
        print(f"\n{name}\n")
        figures[name] = PARTS[name](STEPS.value, SEEDS.value)
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    app.run(main)
