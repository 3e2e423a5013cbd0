"""What the rules are worth: accuracy on digits, and how often noise counts as proof.

Two tables:

1. Scikit-learn's digits, MLP 64-128-128-10, batches of 128, one-step rounds assessed on
   128 fresh draws of 300 held-out examples, by log-likelihood or by accuracy (a coarse
   score full of ties). Sets of explorers: two good ones; the same with three hostile
   ones; eight with rates that span two orders. Beside them each explorer alone, on the
   same seeds, parameters and batches.
2. Simulated rounds in which all candidates are equally good: how often a rule replaces
   the stable parameters all the same.

Run it with `python benchmarks/rules.py`; it takes about ten minutes on two cores.
"""

import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

import optax_ev3
from optax_ev3 import adapt
from optax_ev3._src.base import evidence

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from _digits import EIGHT, METRICS, load, train

SEEDS = flags.DEFINE_integer("seeds", 10, "Runs of each method.", lower_bound=2)
STEPS = flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 10_000, "Simulated rounds.", lower_bound=100)
ONLY = flags.DEFINE_multi_string("rule", None, "Only this rule; may be repeated.")
JSON = flags.DEFINE_string("json", None, "Where to write the figures, too.")

TWO = {"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)}
HOSTILE = TWO | {
    "sgd 1e3": optax.sgd(1e3),
    "nan": optax.scale(float("nan")),
    "uphill sgd": optax.sgd(-0.1),
}
SETS = {"two": TWO, "two + 3 hostile": HOSTILE, "eight": EIGHT}
RULES = {
    "confident": adapt.confident(),
    "greedy": adapt.greedy(),
    "lower_bound": adapt.lower_bound(),
}


def digits(rules, steps, seeds):
    """One row a method: name, test accuracies, test NLLs, shares of adoption."""
    alone = {**EIGHT, "adam": TWO["adam"], "sgd": TWO["sgd"]}
    for name in [n for n in alone if n not in ("adam 0.001", "sgd 0.1")]:
        tx = alone[name]
        accuracy, nll, _ = train(lambda _, tx=tx: tx, steps, seeds)
        yield f"{name} alone", accuracy, nll, ""
    held_out = load().held_out
    for metric, (rule, made), (label, inner) in itertools.product(
        METRICS, rules.items(), SETS.items()
    ):
        assess_fn = optax_ev3.held_out(METRICS[metric], held_out, 128)

        def make_tx(seed, inner=inner, assess_fn=assess_fn, made=made):
            return optax_ev3.ev3(inner, assess_fn, adapt=made, key=seed)

        accuracy, nll, state = train(make_tx, steps, seeds)
        adopted = np.asarray(state.record.adoptions).mean(0) / steps
        shares = " ".join(f"{100 * share:.0f}" for share in adopted)
        yield f"{rule}, {metric}, {label}", accuracy, nll, shares


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


def false_proof(rules, rounds):
    """One row for each rule, kind of score, K and N: share of false replacements."""
    for (rule, made), kind, explorers, examples in itertools.product(
        rules.items(), ("0/1", "normal", "heavy-tailed"), (2, 8), (64, 256)
    ):

        def one(key, made=made, kind=kind, explorers=explorers, examples=examples):
            draw_key, rule_key = jax.random.split(key)
            candidates = explorers + 2
            scores = {"score": _draws(kind, draw_key, (candidates, examples))}
            flags_ = jnp.ones([candidates], bool), jnp.zeros([candidates], bool)
            seen = evidence.gather(scores, *flags_)
            decision, _ = made.decide(seen, made.init(explorers), rule_key)
            return decision.significant

        keys = jax.random.split(jax.random.key(0), rounds)
        share = jax.jit(lambda keys, one=one: jax.lax.map(one, keys, batch_size=500))
        yield rule, kind, explorers, examples, float(share(keys).mean())


def main(_):
    logging.set_verbosity(logging.WARNING)
    steps, seeds = STEPS.value, SEEDS.value
    rules = {name: RULES[name] for name in ONLY.value or RULES}
    figures = {"digits": [], "false_proof": []}
    print(f"Digits, {steps} steps, mean ± standard error over {seeds} seeds.")
    print("Adopted: percent of rounds; the explorers in order, then current, stable.")
    print(f"{'method':46}{'test accuracy':>16}{'test NLL':>17}  adopted")
    for name, accuracy, nll, shares in digits(rules, steps, seeds):
        cells = []
        for values in (accuracy, nll):
            error = values.std(ddof=1) / np.sqrt(seeds)
            cells.append(f"{values.mean():.4f} ± {error:.4f}")
        print(f"{name:46}{cells[0]:>16}{cells[1]:>17}  {shares}", flush=True)
        row = {"method": name, "accuracy": accuracy.tolist(), "nll": nll.tolist()}
        figures["digits"].append(row)
    print(
        f"\nStable replaced though all are equally good, {ROUNDS.value:,} rounds each."
    )
    print(f"{'rule':13}{'scores':14}{'K':>3}{'N':>6}{'share':>9}")
    for rule, kind, explorers, examples, share in false_proof(rules, ROUNDS.value):
        print(f"{rule:13}{kind:14}{explorers:3}{examples:6}{share:9.4f}", flush=True)
        figures["false_proof"].append([rule, kind, explorers, examples, share])
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    app.run(main)
