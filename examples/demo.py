"""EV3 against each of its inner optimizers alone, on scikit-learn's digits.

All methods train the same Flax model from the same parameters on the same batches, once
for each seed. The demo prints a table, says which candidates EV3 adopted, and draws the
held-out score over the steps. `make demo` runs it; it takes a minute or two.

By hand: `python examples/demo.py --seeds=10 --steps=300 --plot=demo.png`. It exits with
0 only if EV3 reached `--min_accuracy` on the test set and the picture was written.
"""

import functools
import sys
import time
from typing import NamedTuple

import _data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax import linen as nn
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter
from tqdm import tqdm

import optax_ev3

SEEDS = flags.DEFINE_integer("seeds", 10, "Runs of each method.", lower_bound=2)
STEPS = flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=10)
PLOT = flags.DEFINE_string("plot", "demo.png", "Where the picture goes.")
MIN_ACCURACY = flags.DEFINE_float("min_accuracy", 0.93, "EV3 must reach this mean.")

BATCH_SIZE = 128
BLOCK = 10  # Steps in one compiled call, and between two scores on all held-out data.
INNER = {"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)}
LABELS = {"adam": "Adam 0.001", "sgd": "SGD 0.1"}
MOVES = LABELS | {"current": "current (stays)", "stable": "stable (falls back)"}

# Okabe and Ito's colours, told apart by the colour-blind, too.
COLOURS = {"adam": "#0072B2", "sgd": "#E69F00", "current": "#BBBBBB"}
COLOURS |= {"stable": "#CC79A7", "ev3": "#000000"}


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(128, kernel_init=nn.initializers.he_normal())(x))
        return nn.Dense(10)(x)


def log_likelihood(params, batch):
    """Scores, one for each example, higher is better: what EV3 assesses."""
    x, y = batch
    logits = MLP().apply({"params": params}, x)
    return -optax.softmax_cross_entropy_with_integer_labels(logits, y)


def loss(params, batch):
    return -log_likelihood(params, batch).mean()


def accuracy(params, batch):
    x, y = batch
    return (MLP().apply({"params": params}, x).argmax(-1) == y).mean()


def make_ev3(seed, data, steps):
    assess_fn = optax_ev3.held_out(log_likelihood, data.held_out, BATCH_SIZE)
    return optax_ev3.ev3(INNER, assess_fn, key=seed, history_length=steps)


class Result(NamedTuple):
    """What became of one method: an array has one row for each seed."""

    scores: np.ndarray  # [seeds, blocks + 1], on all held-out data
    accuracy: np.ndarray  # [seeds], on the test set
    nll: np.ndarray  # [seeds], on the test set
    compile_seconds: float
    seconds: float
    params: optax.Params
    state: optax.OptState


@functools.partial(jax.vmap, in_axes=(0, None))
def init(seed, x):
    return MLP().init(jax.random.key(seed), x)["params"]


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def score(params, batch):
    return -loss(params, batch)


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def test(params, batch):
    return accuracy(params, batch), loss(params, batch)


def run(name, make_tx, params, data, steps):
    """Trains with ``make_tx(seed)``, all seeds at once; the same loop for every method.

    Args:
      name: Shown beside the progress bar.
      make_tx: Makes the optimizer.
      params: Where to start, stacked: one for each seed.
      data: The three sets.
      steps: A multiple of ``BLOCK``.

    Returns:
      A ``Result``.
    """

    def train_block(params, state, seed, first_step):
        tx = make_tx(seed)

        def step(carry, number):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(seed), number)
            grads = jax.grad(loss)(params, _data.sample(key, data.train, BATCH_SIZE))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        numbers = first_step + jnp.arange(BLOCK)
        return jax.lax.scan(step, (params, state), numbers)[0]

    bar = tqdm(total=steps, desc=f"{name:5} compiling", unit="step")
    scores = [np.asarray(score(params, data.held_out))]
    begun = time.perf_counter()
    seeds = jnp.arange(len(jax.tree.leaves(params)[0]))
    state = jax.jit(jax.vmap(lambda seed, p: make_tx(seed).init(p)))(seeds, params)
    train_blocks = jax.jit(jax.vmap(train_block, in_axes=(0, 0, 0, None)))
    train_blocks = train_blocks.lower(params, state, seeds, 0).compile()
    compiled = time.perf_counter()
    bar.set_description(f"{name:5} training")
    bar.reset()
    for first_step in range(0, steps, BLOCK):
        params, state = train_blocks(params, state, seeds, first_step)
        scores.append(np.asarray(score(params, data.held_out)))
        bar.update(BLOCK)
    done = time.perf_counter()
    bar.close()
    return Result(
        np.stack(scores, 1),
        *map(np.asarray, test(params, data.test)),
        compile_seconds=compiled - begun,
        seconds=done - compiled,
        params=params,
        state=state,
    )


def adoptions(state, seeds):
    """Names of the candidates, and the index of the adopted one ``[seeds, steps]``."""
    runs = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(seeds)]
    past = [optax_ev3.history(one) for one in runs]
    return list(past[0]["candidates"]), np.stack([one["adopted"] for one in past])


def mean_and_error(values):
    """Mean over seeds and its standard error."""
    return np.mean(values, 0), np.std(values, 0, ddof=1) / np.sqrt(len(values))


def print_table(results, stable, names, adopted, data, steps):
    print(
        f"\nScikit-learn's digits: {len(data.train[1])} training, "
        f"{len(data.held_out[1])} held-out, {len(data.test[1])} test examples.\n"
        f"MLP 64-128-128-10, batches of {BATCH_SIZE}. NLL: negative log-likelihood."
    )
    rule = "-" * 79
    print(rule)
    print(
        f"{'method':23}{'test accuracy':>16}{'test NLL':>16}{'steps':>7}"
        f"{'compile s':>10}{'run s':>7}"
    )
    print(rule)
    for name, one in results.items():
        title = name if name not in INNER else LABELS[name] + " alone"
        print(
            _row(title, one.accuracy, one.nll)
            + f"{steps:7}{one.compile_seconds:10.1f}{one.seconds:7.1f}"
        )
        if name not in INNER:
            print(_row("  its stable parameters", *stable))
    print(rule)
    print(
        f"Mean ± standard error over {len(adopted)} seeds, which run together. Run s:\n"
        f"without compilation, with a score on all held-out data every {BLOCK} steps."
    )
    share = [f"{n} {np.mean(adopted == i):.1%}" for i, n in enumerate(names)]
    print(f"EV3 adopted: {', '.join(share)}.")


def _row(title, accuracies, nlls):
    cells = ["{:.4f} ± {:.4f}".format(*mean_and_error(x)) for x in (accuracies, nlls)]
    return f"{title:23}{cells[0]:>16}{cells[1]:>16}"


def draw(results, names, adopted, steps, path):
    figure = Figure(figsize=(9, 7), dpi=150, layout="constrained")
    figure.get_layout_engine().set(hspace=0.06, h_pad=0.1, w_pad=0.1)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
    _draw_scores(top, results, steps)
    _draw_adoptions(bottom, names, adopted, steps)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=11)
    figure.savefig(path)


def _draw_scores(axes, results, steps):
    x = np.arange(0, steps + 1, BLOCK)
    for name, one in reversed(results.items()):
        # On a logarithmic axis of the NLL, upside down, late progress can be seen.
        mean, error = mean_and_error(-one.scores)
        is_ev3 = name not in INNER
        colour = COLOURS["ev3" if is_ev3 else name]
        label = name if is_ev3 else LABELS[name] + " alone"
        axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
        axes.plot(x, mean, color=colour, lw=2.4 if is_ev3 else 1.8, label=label)
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(
        FixedLocator([2, 1, 0.5, 0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06])
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda nll, _: f"−{nll:g}"))
    axes.grid(axis="y", color="#DDDDDD", lw=0.8)
    axes.set_ylabel("Held-out log-likelihood", fontsize=12)
    seeds = len(next(iter(results.values())).accuracy)
    axes.set_title(
        f"Held-out score while training (mean of {seeds} seeds ± standard error)",
        fontsize=13,
        loc="left",
    )
    axes.legend(reverse=True, fontsize=12, frameon=False, loc="lower right")


def _draw_adoptions(axes, names, adopted, steps):
    x = np.arange(0, steps, BLOCK)
    blocks = adopted.reshape(len(adopted), -1, BLOCK)
    bottom = np.zeros(len(x))
    for index, name in enumerate(names):
        share = (blocks == index).mean((0, 2))
        label = MOVES[name]
        axes.bar(
            x,
            share,
            BLOCK,
            bottom,
            align="edge",
            color=COLOURS[name],
            label=label,
            edgecolor="white",
            linewidth=0.4,
        )
        bottom += share
    axes.set(xlim=(0, steps), ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("Training step", fontsize=12)
    axes.set_ylabel("Share of rounds", fontsize=12)
    axes.set_title(
        f"Which candidate EV3 adopted (all seeds, in blocks of {BLOCK} steps)",
        fontsize=13,
        loc="left",
    )
    figure = axes.get_figure()
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(names),
        fontsize=12,
        frameon=False,
    )


def problems(results, min_accuracy):
    """What went wrong, in words; empty if nothing did."""
    found = []
    for name, one in results.items():
        figures = [one.scores, one.accuracy, one.nll]
        if not all(np.isfinite(values).all() for values in figures):
            found.append(f"{name} has figures that are not finite")
    reached = results["EV3"].accuracy.mean()
    if not reached >= min_accuracy:
        found.append(f"EV3 reached a test accuracy of {reached:.4f} < {min_accuracy}")
    return found


def main(_):
    logging.set_verbosity(logging.WARNING)
    seeds, path = SEEDS.value, PLOT.value
    steps = STEPS.value - STEPS.value % BLOCK
    data = _data.load()
    methods = {"EV3": functools.partial(make_ev3, data=data, steps=steps)}
    methods |= {name: lambda _, tx=tx: tx for name, tx in INNER.items()}
    params = jax.jit(init)(jnp.arange(seeds), data.train[0][:1])
    results = {
        name: run(name, make_tx, params, data, steps)
        for name, make_tx in methods.items()
    }
    stable = test(optax_ev3.stable_params(results["EV3"].state), data.test)
    names, adopted = adoptions(results["EV3"].state, seeds)
    print_table(results, stable, names, adopted, data, steps)
    failures = problems(results, MIN_ACCURACY.value)
    try:
        draw(results, names, adopted, steps, path)
    except OSError as error:
        failures.append(f"the picture could not be written: {error}")
    if failures:
        sys.exit("The demo failed: " + "; ".join(failures) + ".")
    print(f"Picture: {path}")


if __name__ == "__main__":
    app.run(main)
