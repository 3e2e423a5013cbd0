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

It takes about a quarter of an hour on two cores.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import optax_ev3
from benchmarks.data import load, sample
from benchmarks.models import log_likelihood
from benchmarks.report import show, spreads
from benchmarks.results import tidy
from benchmarks.run import Cell, Suite
from optax_ev3 import adapt, explore

INNER = {
    "adam 0.001": optax.adam(1e-3),
    "adam 0.01": optax.adam(1e-2),
    "sgd 0.1": optax.sgd(0.1),
    "momentum 0.05": optax.sgd(0.05, momentum=0.9),
}
AVERAGES = (explore.trajectory_average(), explore.branch_average())
# How rounds go; the first is the plain form of ev3, the last the recommended one.
STRATEGIES = {
    "one step": explore.one_step(),
    "25 steps": explore.branches(25),
    "25 steps, averages": explore.branches(
        25, restart=explore.never(inner_state="copy"), averages=AVERAGES
    ),
}
STATISTICS = ("loop", "held-out batch", "training batch", "own")


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

    inner, one_step = INNER, strategy == "one step"
    if statistics == "own":
        inner = {k: optax_ev3.explorer(v, merge_fn=merge) for k, v in INNER.items()}
    return optax_ev3.ev3(
        inner,
        assess_fn,
        loss_fn=None if one_step else loss_fn,
        explore=STRATEGIES[strategy],
        adapt=shadowed(adapt.confident() if one_step else adapt.greedy()),
        key=seed,
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
            batch = sample(keys[0], data.train)
            held_out = sample(keys[1], data.held_out)

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
                aux=new if statistics == "own" else None,
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
    found = {
        "error": errors[0],
        "exact": errors[1],
        "agreed": tally["agreed"] / tally["rounds"],
        "lost": tally["lost"] / tally["rounds"],
    }
    case = {"rounds": strategy, "momentum": momentum, "statistics": statistics}
    return tidy(found, seed=range(seeds)).assign(**case)


class Settings(NamedTuple):
    """How much is measured; EV3 with each momentum of the running statistics."""

    seeds: int = 10
    steps: int = 500
    momenta: tuple[float, ...] = (0.99, 0.9, 0.5)


def cells(settings, tasks, results):
    del tasks, results
    for case in itertools.product(STRATEGIES, settings.momenta, STATISTICS):
        strategy, momentum, statistics = case

        def measure(strategy=strategy, momentum=momentum, statistics=statistics):
            how = statistics, momentum, strategy
            return train(*how, settings.steps, settings.seeds)

        yield Cell("digits", f"{strategy}, momentum {momentum}, {statistics}", measure)


def report(results, settings, folder):
    del folder
    digits = {"error": 2, "exact": 2, "agreed": 1, "lost": 2}
    scale = {"error": 100, "exact": 100, "agreed": 100, "lost": 1000}
    table = spreads(results, ["rounds", "momentum", "statistics"], digits, scale)
    table.columns = ["test error, %", "by exact ones", "agreed, %", "lost, x 1000"]
    show(table, f"Digits, {settings.steps} steps, {settings.seeds} seeds", 2)
    print("Lost: in log-likelihood a decision.")


QUICK = {"seeds": 2, "steps": 25, "momenta": (0.9,)}
SUITE = Suite(("digits",), Settings(), QUICK, cells, report)
