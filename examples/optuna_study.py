"""An Optuna study beside EV3: optimizers tuned, or explored, for as many gradients.

The study tunes the kind of an optimizer and its learning rate: each trial trains from
the start, TPE suggests, and trials that lag behind are pruned. EV3 trains once, by the
portfolio, which moves its gradients to the explorers that win. Both have the same data,
the same initial parameters and the same budget, and both choose by the held-out score.

What is counted: a gradient of a batch of 128 examples is 1. A forward pass costs a
third of a gradient of the same examples, so assessing parameters on the 300 held-out
examples costs 0.78. Neither method may spend more than the budget on both together.

Run it with `python examples/optuna_study.py --plot=work.png`; it takes about a minute.
For a first look, `--gradients=800 --seeds=2`.
"""

import functools
from itertools import pairwise
from typing import NamedTuple

import _data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
from absl import app, flags, logging
from optax import contrib

import optax_ev3
from optax_ev3 import plot

GRADIENTS = flags.DEFINE_integer(
    "gradients", 4000, "What a method may spend on a seed.", lower_bound=400
)
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each method.", lower_bound=2)
PLOT = flags.DEFINE_string("plot", None, "Where to draw EV3's work to, a PNG file.")

SIZES = (64, 128, 128, 10)
BATCH_SIZE = 128
BLOCK = 25  # Steps in one compiled call: a round of the portfolio.
# Of the study. The bounds of rates are the same for all kinds.
TRIALS = 8  # A trial that is not pruned takes this part of the budget.
KINDS = {
    "adam": optax.adam,
    "muon": functools.partial(contrib.muon, consistent_rms=0.2),
    "momentum": functools.partial(optax.sgd, momentum=0.9),
}
RATES = (1e-4, 1e-1)


def init(key):
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(SIZES) - 1)
    return [
        {"w": he(key, shape), "b": jnp.zeros(shape[1])}
        for key, shape in zip(keys, pairwise(SIZES), strict=True)
    ]


def logits(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def log_likelihood(params, held_out):
    """Scores, one for each example, higher is better: what both methods choose by."""
    x, y = held_out
    return -optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def loss(params, batch):
    return -log_likelihood(params, batch).mean()


class Result(NamedTuple):
    """What a method has reached and spent on one seed."""

    params: list
    gradients: int
    assessed: float  # Assessments, in gradients.
    about: str
    state: optax_ev3.EV3State | None = None


@functools.partial(jax.jit, static_argnums=0)
def train_block(make, rate, params, state, key, first_step, data):
    """Some steps of any optimizer; another learning rate does not compile it again."""
    tx = optax.with_extra_args_support(make(rate))

    def step(i, carry):
        params, state = carry
        batch = _data.sample(jax.random.fold_in(key, i), data.train, BATCH_SIZE)
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(
            grads, state, params, batch=batch, held_out=data.held_out
        )
        return optax.apply_updates(params, updates), state

    last_step = first_step + BLOCK
    return jax.lax.fori_loop(first_step, last_step, step, (params, state))


@jax.jit
def held_out_score(params, data):
    return log_likelihood(params, data.held_out).mean()


@jax.jit
def on_test(params, data):
    x, y = data.test
    return loss(params, data.test), (logits(params, x).argmax(-1) == y).mean()


def assessments(count, data):
    """What so many of them cost, in gradients."""
    return count * len(data.held_out[1]) / (3 * BATCH_SIZE)


def study(seed, budget):
    """A study by TPE, which ends where the next block would not be paid for."""
    data, key = _data.load(seed), jax.random.key(seed)
    start, price = init(key), assessments(1, data)
    length = max(budget // TRIALS // BLOCK, 1)  # Of a trial that is not pruned.
    every = max(length // 5, 1)  # Blocks between two reports to Optuna.
    gradients, assessed = 0, 0.0
    best, score, about = start, -np.inf, ""

    def objective(trial):
        nonlocal gradients, assessed, best, score, about
        kind = trial.suggest_categorical("kind", list(KINDS))
        rate = trial.suggest_float("rate", *RATES, log=True)
        make, params, reached = KINDS[kind], start, -np.inf
        state = make(0.0).init(params)
        for block in range(length):
            step = block * BLOCK
            params, state = train_block(make, rate, params, state, key, step, data)
            gradients += BLOCK
            is_over = gradients + assessed + BLOCK + 2 * price > budget
            if not is_over and (block + 1) % every and block + 1 < length:
                continue
            reached = float(held_out_score(params, data))
            assessed += price
            if reached > score:
                best, score, about = params, reached, f"{kind} {rate:.1g}"
            trial.report(reached, block)
            if is_over:
                trial.study.stop()
                break
            if trial.should_prune():
                raise optuna.TrialPruned
        return reached

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(n_startup_trials=4, seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
    )
    found.optimize(objective)
    pruned = len(found.get_trials(states=[optuna.trial.TrialState.PRUNED]))
    about = f"{about}, the best of {len(found.trials)} trials ({pruned} pruned)"
    return Result(best, gradients, assessed, about)


PORTFOLIO = optax_ev3.portfolio(log_likelihood, loss, history_length=1000)


def portfolio(rate):
    del rate  # There is none to choose.
    return PORTFOLIO


def ev3(seed, budget):
    """One training, which ends where the next round would not be paid for."""
    data, key = _data.load(seed), jax.random.key(seed)
    params = init(key)
    state = PORTFOLIO.init(params)
    gradients, assessed, step = 0, 0.0, 0
    while True:
        trained = train_block(portfolio, 0.0, params, state, key, step, data)
        past = optax_ev3.history(trained[1])
        took = ~past["paused"][-1]
        is_explorer = past["explorer"] == np.arange(len(took))
        paid = BLOCK * int(took[is_explorer].sum()), assessments(took.sum(), data)
        if gradients + assessed + sum(paid) > budget:
            break
        params, state = trained
        gradients, assessed, step = (
            gradients + paid[0],
            assessed + paid[1],
            step + BLOCK,
        )
    past = optax_ev3.history(state)
    steps = past["length"] @ ~past["paused"][:, is_explorer]
    most = past["candidates"][steps.argmax()]
    about = f"{step // BLOCK} rounds, most gradients to {most} ({steps.max()})"
    return Result(optax_ev3.best_params(state), gradients, assessed, about, state)


METHODS = {"Optuna, TPE with pruning": study, "EV3, portfolio": ev3}


def print_table(rows, budget):
    print(
        f"\nScikit-learn's digits, MLP 64-128-128-10; at most {budget} gradients for a "
        f"seed, assessments\ncounted. Mean ± standard error over {SEEDS.value} seeds.\n"
        f"\n{'method':26}{'test accuracy':>17}{'test NLL':>17}{'gradients':>11}"
        f"{'assessments':>13}"
    )
    for name, numbers in rows.items():
        numbers = np.array(numbers)
        mean = numbers.mean(0)
        error = numbers.std(0, ddof=1) / np.sqrt(len(numbers))
        print(
            f"{name:26}{mean[0]:>9.4f} ± {error[0]:.4f}{mean[1]:>9.4f} ± {error[1]:.4f}"
            f"{mean[2]:>11.0f}{mean[3]:>13.0f}"
        )
    print(
        "\nOptuna: for what changes shapes or data, such as the width of a layer. EV3: "
        "for what an\noptimizer can change while it trains. Both: a study of "
        "architectures, whose trials train by EV3."
    )


def main(_):
    logging.set_verbosity(logging.WARNING)
    budget, rows = GRADIENTS.value, {}
    for name, method in METHODS.items():
        rows[name] = []
        for seed in range(SEEDS.value):
            result = method(seed, budget)
            nll, accuracy = map(float, on_test(result.params, _data.load(seed)))
            spent = result.gradients, result.assessed
            rows[name].append((accuracy, nll, *spent))
            print(f"{name}, seed {seed}: test accuracy {accuracy:.4f}; {result.about}")
            if PLOT.value and result.state is not None and seed == 0:
                plot.work(result.state).savefig(PLOT.value, dpi=100)
    print_table(rows, budget)
    if PLOT.value:
        print(f"drew {PLOT.value}")


if __name__ == "__main__":
    app.run(main)
