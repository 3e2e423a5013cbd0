"""BatchNorm: with which statistics should candidates be scored?

Scikit-learn's digits, an MLP 64-128-128-10 with BatchNorm before each activation,
batches of 128; four explorers, assessed by log-likelihood on 128 fresh draws of 300
held-out examples. The statistics by which a candidate is scored are

- loop: the running statistics that the training loop keeps outside of the parameters,
  those of the visible branch;
- held-out batch: those of the held-out batch itself;
- training batch: those of a training batch, computed anew for each candidate;
- own: running statistics that are part of the parameters, by `merge_fn`.

Beside each decision stands the one that the rule would have made with exact statistics,
those of the whole training set for every candidate: how often they agree, and what the
difference costs, in log-likelihood with exact statistics. The test error is given
as the loop would evaluate its model, with the statistics that it has at the end, and
with exact ones.

    python benchmarks/batchnorm.py [--quick] [--seeds 10] [--steps 500] [--json PATH]

It takes about a quarter of an hour on two cores.
"""

import dataclasses
import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax import linen as nn

import optax_ev3
from optax_ev3 import adapt, combine

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from _digits import load

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import _data

QUICK = flags.DEFINE_bool("quick", False, "Few and short runs: a test.")
SEEDS = flags.DEFINE_integer("seeds", 10, "Runs of each row.", lower_bound=2)
STEPS = flags.DEFINE_integer("steps", 500, "Training steps.", lower_bound=25)
JSON = flags.DEFINE_string("json", None, "Where to write the figures, too.")

INNER = {
    "adam 0.001": optax.adam(1e-3),
    "adam 0.01": optax.adam(1e-2),
    "sgd 0.1": optax.sgd(0.1),
    "momentum 0.05": optax.sgd(0.05, momentum=0.9),
}
AVERAGES = (combine.trajectory_average(), combine.branch_average())
# How rounds go; the first is the plain form of ev3, the last the recommended one.
STRATEGIES = {
    "one step": {},
    "25 steps": {"trajectory_length": 25, "restart": "never", "adapt": adapt.greedy()},
    "25 steps, averages": {
        "trajectory_length": 25,
        "restart": "never",
        "restart_state": "copy",
        "adapt": adapt.greedy(),
        "combine": AVERAGES,
    },
}
STATISTICS = ("loop", "held-out batch", "training batch", "own")
MOMENTA = (0.99, 0.9, 0.5)


class MLP(nn.Module):
    """Two hidden layers; BatchNorm keeps ``momentum`` of its running statistics."""

    momentum: float

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.Dense(128, kernel_init=nn.initializers.he_normal())(x)
            norm = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)
            x = nn.relu(norm(x))
        return nn.Dense(10)(x)


def log_likelihood(logits, labels):
    return -optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def train_loss(momentum, variables, batch):
    """Cross-entropy in training mode, and the new running statistics."""
    x, y = batch
    logits, new = MLP(momentum).apply(variables, x, True, mutable=["batch_stats"])
    return -log_likelihood(logits, y).mean(), new["batch_stats"]


def recomputed(params, x):
    """The statistics of these examples: running ones that keep nothing."""
    nothing = MLP(0.0).init(jax.random.key(0), x[:1], False)["batch_stats"]
    variables = {"params": params, "batch_stats": nothing}
    return MLP(0.0).apply(variables, x, True, mutable=["batch_stats"])[1]["batch_stats"]


def evaluate(params, statistics, batch):
    """Log-likelihoods of a batch with given statistics, and which are right."""
    x, y = batch
    logits = MLP(0.0).apply({"params": params, "batch_stats": statistics}, x, False)
    return log_likelihood(logits, y), logits.argmax(-1) == y


def shadowed(rule):
    """The rule on the scores "used", which counts what "exact" would have changed."""

    def alone(evidence, name):
        return dataclasses.replace(
            evidence, scores={name: evidence.scores[name]}, resamples={}
        )

    def init(explorers):
        zeros = {k: jnp.zeros([]) for k in ("rounds", "agreed", "lost")}
        return rule.init(explorers), zeros

    def decide(evidence, memory, key):
        remembered, tally = memory
        decision, new = rule.decide(alone(evidence, "used"), remembered, key)
        better, _ = rule.decide(alone(evidence, "exact"), remembered, key)
        exact = evidence.scores["exact"].mean(1)
        lost = exact[better.adopted] - exact[decision.adopted]
        agreed = better.adopted == decision.adopted
        tally = {
            "rounds": tally["rounds"] + 1,
            "agreed": tally["agreed"] + agreed,
            "lost": tally["lost"] + lost,
        }
        return decision, (new, tally)

    return adapt.Rule(init, decide, objectives=("used", "exact"))


def make_tx(statistics, momentum, strategy, data, seed):
    """EV3 whose candidates are scored with the statistics of this kind."""

    def assess_fn(params, batch, held_out, running):
        if statistics == "own":
            params, running = params["params"], params["batch_stats"]
        elif statistics != "loop":
            x, _ = batch if statistics == "training batch" else held_out
            running = recomputed(params, x)
        exact = recomputed(params, data.train[0])
        return {
            "used": evaluate(params, running, held_out)[0],
            "exact": evaluate(params, exact, held_out)[0],
        }

    def merge(variables, running):
        return {**variables, "batch_stats": running}

    def loss_fn(params, batch, running):
        if statistics == "own":
            return train_loss(momentum, params, batch)
        variables = {"params": params, "batch_stats": running}
        return train_loss(momentum, variables, batch)[0]

    kwargs = dict(STRATEGIES[strategy])
    rule = shadowed(kwargs.pop("adapt", adapt.confident()))
    inner = INNER
    if statistics == "own":
        inner = {k: optax_ev3.explorer(v, merge_fn=merge) for k, v in INNER.items()}
    loss_fn = loss_fn if kwargs else None
    return optax_ev3.ev3(
        inner, assess_fn, loss_fn=loss_fn, adapt=rule, key=seed, **kwargs
    )


def train(statistics, momentum, strategy, steps, seeds):
    """For each seed the test errors and what was counted."""
    data = load()

    def one(seed):
        tx = make_tx(statistics, momentum, strategy, data, seed)
        variables = MLP(momentum).init(jax.random.key(seed), data.train[0][:1], False)
        running = variables["batch_stats"]
        params = variables if statistics == "own" else variables["params"]

        def step(carry, number):
            params, running, state = carry
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
            batch = _data.sample(keys[0], data.train)
            held_out = _data.sample(keys[1], data.held_out)

            def loss(params):
                variables = {"params": params, "batch_stats": running}
                if statistics == "own":
                    variables = params
                return train_loss(momentum, variables, batch)

            grads, new = jax.grad(loss, has_aux=True)(params)
            updates, state = tx.update(
                grads,
                state,
                params,
                batch=batch,
                held_out=held_out,
                running=new,
                aux=new,
            )
            return (optax.apply_updates(params, updates), new, state), None

        start = params, running, tx.init(params)
        (params, running, state), _ = jax.lax.scan(step, start, jnp.arange(steps))
        if statistics == "own":
            params, running = params["params"], params["batch_stats"]
        exact = recomputed(params, data.train[0])
        errors = [
            1 - evaluate(params, found, data.test)[1].mean()
            for found in (running, exact)
        ]
        return errors, state.rule_state[1]

    errors, tally = jax.jit(lambda: jax.lax.map(one, jnp.arange(seeds)))()
    tally = {k: np.asarray(v) for k, v in tally.items()}
    return {
        "error": np.asarray(errors[0]),
        "exact": np.asarray(errors[1]),
        "agreed": tally["agreed"] / tally["rounds"],
        "lost": tally["lost"] / tally["rounds"],
    }


def cell(values, digits, scale=1.0):
    error = values.std(ddof=1) / np.sqrt(len(values))
    return f"{scale * values.mean():.{digits}f} ± {scale * error:.{digits}f}"


def main(_):
    logging.set_verbosity(logging.WARNING)
    steps, seeds = STEPS.value, SEEDS.value
    rows = itertools.product(STRATEGIES, MOMENTA, STATISTICS)
    if QUICK.value:
        steps, seeds = 25, 2
        rows = itertools.product(("one step", "25 steps"), (0.9,), ("loop", "own"))
    figures = []
    print(f"Digits, {steps} steps, mean ± standard error over {seeds} seeds.")
    print(
        "Errors in percent of the test set; lost: in log-likelihood a decision, x 1000."
    )
    print(
        f"{'rounds':20}{'momentum':>9}  {'statistics':16}{'test error':>14}"
        f"{'by exact ones':>15}{'agreed, %':>13}{'lost':>16}"
    )
    for strategy, momentum, statistics in rows:
        found = train(statistics, momentum, strategy, steps, seeds)
        print(
            f"{strategy:20}{momentum:9}  {statistics:16}"
            f"{cell(found['error'], 2, 100):>14}"
            f"{cell(found['exact'], 2, 100):>15}{cell(found['agreed'], 1, 100):>13}"
            f"{cell(found['lost'], 2, 1000):>16}",
            flush=True,
        )
        row = {k: v.tolist() for k, v in found.items()}
        figures.append(
            {"rounds": strategy, "momentum": momentum, "statistics": statistics, **row}
        )
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    app.run(main)
