"""What the assessment is worth in training: four questions.

    python benchmarks/assessment.py [--quick] [--part NAME ...]

drift: the visible parameters get better, or worse, by a tenth of a round's standard
  error in each of 300 rounds of 64 examples, or stay as good as the stable ones. How
  often are these replaced, or gone back to, by the default rule?
reuse: labels by lot and 500 features, as in Dwork et al. (arXiv 1506.02629): nothing
  can be learnt. 1,000 rounds on one and the same held-out set of 500. What does EV3
  report of the stable parameters, more than they are worth on new data?
chunks: digits, rounds of one step, assessed on 128 held-out examples at once or in
  chunks. How many examples does that take, and what does it cost?
f1: digits, the eights against all others (10%), three losses with Adam as explorers,
  assessed by F1. Each loss alone; of the three the one with the best held-out loss, or
  F1; and EV3.

It takes about ten minutes on two cores.
"""

import functools
import pathlib
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from sklearn import datasets

import optax_ev3
from optax_ev3 import adapt, combine, evidence, metrics

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import _digits

_ROWS = flags.DEFINE_string("rows", "", "Only rows of EV3 that match.")
_QUICK = flags.DEFINE_bool("quick", False, "Few and short runs: a test.")


class Settings(NamedTuple):
    runs: int = 1000
    rounds: int = 300
    seeds: int = 10
    reuses: int = 1000
    steps: int = 300
    f1_seeds: int = 20
    f1_steps: int = 600


QUICK = Settings(8, 10, 2, 10, 6, 2, 10)


def wanted(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in rows.items() if re.search(_ROWS.value, name)}


def spread(values: np.ndarray, digits: int = 4) -> str:
    error = values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


# Drift.


def drift(settings: Settings) -> None:
    print(
        f"{'drift':>8}{'replaced':>10}{'by round':>10}{'gone back':>11}{'by round':>10}"
    )
    keys = jax.random.split(jax.random.key(0), settings.runs)
    for change in (-0.1, 0.0, 0.1):
        run = functools.partial(_drifting, change=change, rounds=settings.rounds)
        cells = ""
        for happened in map(np.asarray, jax.jit(jax.vmap(run))(keys)):
            first = np.where(happened.any(1), happened.argmax(1) + 1, np.inf)
            cells += f"{happened.any(1).mean():10.3f}{np.median(first):10.0f} "
        print(f"{change:8}{cells}", flush=True)


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

GUARDS = {
    "adapt.confident()": {},
    "adapt.greedy()": {"adapt": adapt.greedy()},
    "greedy, ladder()": {"adapt": adapt.greedy(), "guard": evidence.ladder()},
    "greedy, ladder(confidence=None)": {
        "adapt": adapt.greedy(),
        "guard": evidence.ladder(confidence=None),
    },
    "greedy, ladder(step=0.05)": {
        "adapt": adapt.greedy(),
        "guard": evidence.ladder(step=0.05),
    },
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


def reuse(settings: Settings) -> None:
    print(f"{'guard':34}{'reported - new data':>22}{'reported':>18}{'new data':>18}")
    for name, kwargs in wanted(GUARDS).items():
        run = functools.partial(_reusing, kwargs=kwargs, rounds=settings.reuses)
        found = jax.jit(jax.vmap(run))(jnp.arange(settings.seeds))
        reported, fresh = map(np.asarray, found)
        cells = spread(reported - fresh, 3), spread(reported, 3), spread(fresh, 3)
        print(f"{name:34}{cells[0]:>22}{cells[1]:>18}{cells[2]:>18}", flush=True)


def _reusing(seed, kwargs, rounds):
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
    tx = optax_ev3.ev3(inner, lambda w: right(w, held_out), key=seed, **kwargs)

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


def chunks(settings: Settings) -> None:
    two = {"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)}
    own = {"loss_fn": _digits.loss, "trajectory_length": 20}
    tasks = {
        "two explorers": (two, {}),
        "eight, trajectories of 20": (_digits.EIGHT, own),
    }
    ways = {
        "at once": {},
        "in_chunks(8)": {"chunks": 8},
    }
    rows = {
        f"{task}, {way}": (*tasks[task], ways[way]) for task in tasks for way in ways
    }
    print(f"{'method':54}{'examples':>9}{'accuracy':>18}{'NLL':>18}")
    whole = optax_ev3.held_out(_digits.log_likelihood, _digits.load().held_out, 128)
    for name, (inner, kwargs, way) in wanted(rows).items():
        assess_fn = optax_ev3.in_chunks(whole, **way) if way else whole

        def make_tx(seed, inner=inner, assess_fn=assess_fn, kwargs=kwargs):
            return optax_ev3.ev3(
                inner, assess_fn, key=seed, history_length=300, **kwargs
            )

        found = _digits.train(make_tx, settings.steps, settings.seeds)
        record = found[2].record
        share = record.examples.sum() / record.rounds.sum() / 128
        cells = f"{share:9.0%}{spread(found[0]):>18}{spread(found[1]):>18}"
        print(f"{name:54}{cells}", flush=True)


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
AVERAGES = [combine.trajectory_average()]
EV3S = {
    "trajectories of 20": {"trajectory_length": 20},
    "trajectories of 50": {"trajectory_length": 50},
    "trajectories of 50, never restart, averages": {
        "trajectory_length": 50,
        "restart": "never",
        "combine": AVERAGES,
    },
}


def logits(params, x):
    return (jax.nn.relu(x @ params[0] + params[1]) @ params[2] + params[3])[:, 0]


def loss_named(name):
    def loss(params, batch):
        return weighted_loss(logits(params, batch[0]), batch[1], **LOSSES[name])

    return loss


def outputs(params, data):
    return (logits(params, data[0]) > 0).astype(jnp.int32), data[1]


def f1(settings: Settings) -> None:
    images, digits = datasets.load_digits(return_X_y=True)
    x, y = (images / 16 - 0.3).astype(np.float32), (digits == 8).astype(np.int32)
    parts = []
    for seed in range(settings.f1_seeds):
        order = np.random.default_rng(seed).permutation(len(x))
        parts.append([(x[i], y[i]) for i in np.split(order, [300, 900])])
    data = jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)
    alone = {}
    print(f"{'method':52}{'test F1':>18}")
    for name in LOSSES:
        alone[name] = _f1_runs(settings, data, name)
        print(f"{name + ' alone':52}{spread(alone[name][0]):>18}", flush=True)
    test, loss, score = (np.stack([v[i] for v in alone.values()]) for i in range(3))
    runs = np.arange(settings.f1_seeds)
    for name, best in {"loss": loss.argmin(0), "F1": score.argmax(0)}.items():
        what = f"the one of the three with the best held-out {name}"
        print(f"{what:52}{spread(test[best, runs]):>18}")
    for name, kwargs in wanted(EV3S).items():
        found = _f1_runs(settings, data, None, kwargs)[0]
        print(f"{'EV3, ' + name:52}{spread(found):>18}", flush=True)


def _f1_runs(settings, data, name=None, kwargs=None):
    """Test F1, held-out cross-entropy and held-out F1 of every seed."""
    caller = loss_named(name or "cross-entropy")

    def one(seed, train, held_out, test):
        if name is None:
            inner = {
                k: optax_ev3.explorer(optax.adam(3e-3), loss_fn=loss_named(k))
                for k in LOSSES
            }

            def assess_fn(params):
                return metrics.AggregateMetric(metrics.f1, outputs(params, held_out))

            tx = optax_ev3.ev3(inner, assess_fn, key=seed, **kwargs)
        else:
            tx = optax.with_extra_args_support(optax.adam(3e-3))

        def step(carry, number):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(seed), number)
            rows = jax.random.randint(key, [64], 0, len(train[1]))
            batch = train[0][rows], train[1][rows]
            grads = jax.grad(caller)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None

        first, second = jax.random.split(jax.random.key(seed))
        he = jax.nn.initializers.he_normal()
        params = [he(first, (64, 32)), jnp.zeros(32)]
        params += [he(second, (32, 1)), jnp.zeros(1)]
        carry = params, tx.init(params)
        params = jax.lax.scan(step, carry, jnp.arange(settings.f1_steps))[0][0]

        def score(part):
            return metrics.f1(outputs(params, part), jnp.ones(len(part[1])))

        return (
            score(test),
            loss_named("cross-entropy")(params, held_out),
            score(held_out),
        )

    runs = jax.vmap(one)(jnp.arange(settings.f1_seeds), *data)
    return [np.asarray(values) for values in runs]


PARTS: dict[str, Any] = {"drift": drift, "reuse": reuse, "chunks": chunks, "f1": f1}
_PARTS = flags.DEFINE_multi_enum("part", list(PARTS), list(PARTS), "Which; all.")


def main(_):
    settings = QUICK if _QUICK.value else Settings()
    for name in _PARTS.value:
        print(f"\n{name}\n")
        PARTS[name](settings)


if __name__ == "__main__":
    app.run(main)
