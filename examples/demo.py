"""EV3, in each of its three lines, against each of its optimizers alone.

Scikit-learn's digits; 30% of the training labels are replaced by random ones, the
held-out and the test labels are right. Every method gets the same data, the same
initial parameters, the same batches and the same number of gradients: the portfolio has
to share them out among its explorers, the relay gives each of them to one. The demo
prints a table and a sentence, and draws the test loss over gradients. `make demo` runs
it; it takes about two minutes.

By hand: `python examples/demo.py --seeds=3 --gradients=3000 --plot=demo.png`. It exits
with 0 only if EV3 reached `--min_accuracy` on the test set and the picture was written.
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
from optax_ev3 import explore

SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each method.", lower_bound=2)
GRADIENTS = flags.DEFINE_integer(
    "gradients", 3000, "Gradients that a run may take.", lower_bound=200
)
PLOT = flags.DEFINE_string("plot", "demo.png", "Where the picture goes.")
MIN_ACCURACY = flags.DEFINE_float("min_accuracy", 0.85, "EV3 must reach this mean.")

WRONG = 0.3  # Share of the training labels that are drawn at random.
BATCH_SIZE = 128
BLOCK = 25  # Steps in one compiled call, between two looks at the test set.
INNER = {
    "Adam 0.001": optax.adam(0.001),
    "Adam 0.01": optax.adam(0.01),
    "SGD 0.01": optax.sgd(0.01, momentum=0.9),
    "SGD 0.1": optax.sgd(0.1, momentum=0.9),
    "RMSProp 0.001": optax.rmsprop(0.001),
}
EV3, RELAY, ONE_STEP = "EV3, portfolio", "EV3, relay", "EV3, one step"

# Okabe and Ito's colours, told apart by the colour-blind, too.
COLOURS = dict(
    zip(INNER, ["#0072B2", "#56B4E9", "#E69F00", "#CC79A7", "#009E73"], strict=True)
)
COLOURS |= {EV3: "#000000", RELAY: "#D55E00", ONE_STEP: "#777777"}


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(128, kernel_init=nn.initializers.he_normal())(x))
        return nn.Dense(10)(x)


def log_likelihood(params, held_out):
    """Scores, one for each example, higher is better: what EV3 assesses."""
    x, y = held_out
    logits = MLP().apply({"params": params}, x)
    return -optax.softmax_cross_entropy_with_integer_labels(logits, y)


def loss(params, batch):
    return -log_likelihood(params, batch).mean()


METHODS = {
    # Each explorer trains apart, with gradients of its own; those that lose are paused.
    EV3: optax_ev3.portfolio(log_likelihood, loss, inner=INNER),
    # They take turns with the loop's gradient: the price of one optimizer.
    RELAY: optax_ev3.ev3(INNER, log_likelihood, explore=explore.relay()),
    # The shortest line: all of them use the loop's gradient, at every step.
    ONE_STEP: optax_ev3.ev3(INNER, log_likelihood),
    **INNER,
}


class Course(NamedTuple):
    """One run of a method: the last row is where it ended.

    Attributes:
      gradients: ``[blocks + 1]``, taken so far.
      nll: ``[blocks + 1]``, on the test set.
      error: ``[blocks + 1]``, on the test set.
      held_out: ``[blocks + 1]``, mean score on the held-out set.
      took: ``[blocks + 1, explorers]``, who took gradients in the block; EV3 only.
      seconds: Of training, without compilation and without these figures.
    """

    gradients: np.ndarray
    nll: np.ndarray
    error: np.ndarray
    held_out: np.ndarray
    took: np.ndarray
    seconds: float


def noisy_data(seed):
    """A split of the digits, with wrong labels in the training part."""
    data = _data.load(seed)
    x, y = data.train
    rng = np.random.default_rng(seed)
    drawn = np.where(rng.random(len(y)) < WRONG, rng.integers(0, 10, len(y)), y)
    return data._replace(train=(x, jnp.asarray(drawn, y.dtype)))


@functools.partial(jax.jit, static_argnums=0)
def train_block(method, params, state, key, first_step, data):
    """Some steps of any method: the loop is the same for all."""
    tx = optax.with_extra_args_support(METHODS[method])

    def step(i, carry):
        params, state = carry
        batch = _data.sample(jax.random.fold_in(key, i), data.train, BATCH_SIZE)
        # Where explorers take their own gradients, the compiler leaves this one out.
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(
            grads, state, params, batch=batch, held_out=data.held_out
        )
        return optax.apply_updates(params, updates), state

    last_step = first_step + BLOCK
    return jax.lax.fori_loop(first_step, last_step, step, (params, state))


def shown(method, params, state):
    """What is evaluated: where averages are kept, the best ones seen."""
    return optax_ev3.best_params(state) if method in (EV3, RELAY) else params


@jax.jit
def init(key, data):
    return MLP().init(key, data.train[0][:1])["params"]


@jax.jit
def evaluate(params, data):
    x, y = data.test
    wrong = MLP().apply({"params": params}, x).argmax(-1) != y
    return loss(params, data.test), wrong.mean(), -loss(params, data.held_out)


def run(method, seed, budget, bar):
    """Trains until the next block would take more gradients than the budget allows."""
    data, key = noisy_data(seed), jax.random.key(seed)
    params = init(key, data)
    state = METHODS[method].init(params)
    total, step, seconds = 0, 0, 0.0
    rows = [(0, *evaluate(params, data), [False] * len(INNER))]
    while True:
        begun = time.perf_counter()
        reached = train_block(method, params, state, key, step, data)
        new_params, new_state = jax.block_until_ready(reached)
        seconds += time.perf_counter() - begun
        took = explorers_at_work(method, new_state)
        spent = BLOCK * (sum(took) if method == EV3 else 1)
        if total + spent > budget:
            break
        params, state = new_params, new_state
        total, step = total + spent, step + BLOCK
        found = evaluate(shown(method, params, state), data)
        rows.append((total, *found, took))
        bar.update(int(spent))
    return Course(*map(np.asarray, zip(*rows, strict=True)), seconds)


def explorers_at_work(method, state):
    """Which explorers of EV3 took gradients in the round that has just ended."""
    if method != EV3:
        return [False] * len(INNER)
    # Who has no score was paused.
    return np.isfinite(optax_ev3.history(state)["mean"][-1, : len(INNER)])


def train(method, seeds, budget):
    """Courses of all seeds, and how long it took to compile."""
    bar = tqdm(total=seeds * budget, desc=f"{method:16} compiling", unit="gradient")
    begun = time.perf_counter()
    data, key = noisy_data(0), jax.random.key(0)
    params = init(key, data)
    jax.block_until_ready(
        train_block(method, params, METHODS[method].init(params), key, 0, data)
    )
    compiled = time.perf_counter() - begun
    bar.set_description(f"{method:16} training ")
    bar.reset()
    courses = [run(method, seed, budget, bar) for seed in range(seeds)]
    bar.update(bar.total - bar.n)  # The rest would not do for a block.
    bar.close()
    return courses, compiled


def ends(courses, figure):
    """A figure ``[seeds]`` where the runs ended."""
    return np.array([getattr(one, figure)[-1] for one in courses])


def stopped(courses, figure):
    """The same where each run had its best held-out score."""
    return np.array([getattr(one, figure)[one.held_out.argmax()] for one in courses])


def mean_and_error(values):
    """Mean over seeds and its standard error."""
    return np.mean(values, 0), np.std(values, 0, ddof=1) / np.sqrt(len(values))


def print_table(results, compiled, data):
    sizes = [len(part[1]) for part in data]
    print(
        f"\nScikit-learn's digits: {sizes[0]} training examples, {WRONG:.0%} of their "
        f"labels drawn at random,\n{sizes[1]} held-out and {sizes[2]} test examples "
        f"with true labels. MLP 64-128-128-10, batches of {BATCH_SIZE}."
    )
    rule = "-" * 85
    print(
        f"{rule}\n{'':20}{'at the end':>20}{'stopped early':>25}\n"
        f"{'method':19}{'test NLL':>12}{'test error':>15}{'test NLL':>13}"
        f"{'gradients':>16}{'seconds':>9}\n{rule}"
    )
    for name, courses in results.items():
        nll, early = (
            "{:.3f} ± {:.3f}".format(*mean_and_error(f(courses, "nll")))
            for f in (ends, stopped)
        )
        error = "{:.1%} ± {:.1%}".format(*mean_and_error(ends(courses, "error")))
        gradients = np.mean(ends(courses, "gradients"))
        seconds = np.mean([one.seconds for one in courses])
        title = f"{name} alone" if name in INNER else name
        print(
            f"{title:20}{nll:>14}{error:>14}{early:>15}{gradients:13.0f}{seconds:9.2f}"
        )
    print(
        f"{rule}\nMean ± standard error over {len(courses)} seeds. NLL: negative "
        f"log-likelihood. Stopped early:\nwhere the held-out score of a run was best. "
        f"Seconds: of a run; before it, compiling took\n{compiled[EV3]:.1f} s "
        f"(portfolio), {compiled[RELAY]:.1f} s (relay), {compiled[ONE_STEP]:.1f} s "
        f"(one step) and {np.mean([compiled[k] for k in INNER]):.1f} s (an optimizer "
        f"alone)."
    )


def print_verdict(results, budget):
    """What is seen, in words that hold whatever the figures are."""

    def against(figures, name=EV3):
        ours = figures(results[name], "nll").mean()
        alone = {k: figures(results[k], "nll").mean() for k in INNER}
        best = min(alone, key=lambda name: alone[name])
        beaten = sum(ours < one for one in alone.values())
        return ours, beaten, best, alone[best]

    ours, beaten, best, its = against(ends)
    print(
        f"\nAfter {budget} gradients the portfolio has a test NLL of {ours:.3f}, lower "
        f"than that of {beaten} of its\n{len(INNER)} "
        f"optimizers alone (the best in hindsight, {best}: {its:.3f});",
        end=" ",
    )
    ours, beaten, best, its = against(stopped)
    print(
        f"if every run is\nstopped early, it has {ours:.3f}, lower than that of "
        f"{beaten} of {len(INNER)} (the best, {best}: {its:.3f}).\nThe relay, with "
        f"the gradients of the loop alone, has {against(ends, RELAY)[0]:.3f}."
    )


def draw(results, budget, path):
    figure = Figure(figsize=(9, 7), dpi=150, layout="constrained")
    figure.get_layout_engine().set(hspace=0.06, h_pad=0.1, w_pad=0.1)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
    _draw_courses(top, results, budget)
    _draw_work(bottom, results[EV3], budget)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=11)
    figure.savefig(path)


def _at(course, x):
    """The last row of a course that lies within so many gradients."""
    return np.searchsorted(course.gradients, x, side="right") - 1


def _draw_courses(axes, results, budget):
    x = np.arange(0, budget + 1, BLOCK)
    highest, lowest = [], []
    # The largest is on top in the legend, too; EV3 is drawn last.
    order = sorted(results, key=lambda name: -ends(results[name], "nll").mean())
    for name in order:
        courses = results[name]
        nll = np.stack([one.nll[_at(one, x)] for one in courses])
        mean, error = mean_and_error(nll)
        label = f"{name} alone" if name in INNER else name
        style = {"lw": 1.8} if name in INNER else {"lw": 3, "zorder": 3}
        if name == ONE_STEP:
            style |= {"ls": (0, (4, 1))}
        axes.fill_between(
            x, mean - error, mean + error, color=COLOURS[name], alpha=0.2, lw=0
        )
        axes.plot(x, mean, color=COLOURS[name], label=label, **style)
        late = mean[len(x) // 10 :]
        highest.append(late.max())
        lowest.append(late.min())
    axes.set_yscale("log")
    axes.set_ylim(0.85 * min(lowest), 1.15 * max(highest))
    axes.yaxis.set_major_locator(
        FixedLocator([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 3])
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda nll, _: f"{nll:g}"))
    axes.grid(axis="y", color="#DDDDDD", lw=0.8)
    axes.set_ylabel("Test NLL (lower is better)", fontsize=12)
    axes.set_title(
        f"Digits, {WRONG:.0%} of the training labels random "
        f"(mean of {len(courses)} seeds ± standard error)",
        fontsize=13,
        loc="left",
    )
    axes.legend(
        fontsize=11, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )


def _draw_work(axes, courses, budget):
    x = np.arange(0, budget + 1, BLOCK)
    rows = []
    for one in courses:
        # The block that was under way after so many gradients.
        at = np.minimum(_at(one, x) + 1, len(one.gradients) - 1)
        rows.append(one.took[at] / one.took[at].sum(1, keepdims=True))
    shares = np.mean(rows, 0).T
    axes.stackplot(x, shares, step="post", colors=[COLOURS[name] for name in INNER])
    axes.set(xlim=(0, budget), ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("Gradients taken", fontsize=12)
    axes.set_ylabel("Share", fontsize=12)
    axes.set_title(
        "On which explorers the portfolio spends its gradients",
        fontsize=13,
        loc="left",
    )


def problems(results, min_accuracy):
    """What went wrong, in words; empty if nothing did."""
    found = []
    for name, courses in results.items():
        figures = [x for one in courses for x in (one.nll, one.error, one.held_out)]
        if not all(np.isfinite(values).all() for values in figures):
            found.append(f"{name} has figures that are not finite")
    reached = 1 - ends(results[EV3], "error").mean()
    if not reached >= min_accuracy:
        found.append(f"EV3 reached a test accuracy of {reached:.4f} < {min_accuracy}")
    return found


def main(_):
    logging.set_verbosity(logging.WARNING)
    seeds, budget, path = SEEDS.value, GRADIENTS.value, PLOT.value
    results, compiled = {}, {}
    for name in METHODS:
        results[name], compiled[name] = train(name, seeds, budget)
    print_table(results, compiled, noisy_data(0))
    print_verdict(results, budget)
    failures = problems(results, MIN_ACCURACY.value)
    try:
        draw(results, budget, path)
    except OSError as error:
        failures.append(f"the picture could not be written: {error}")
    if failures:
        sys.exit("The demo failed: " + "; ".join(failures) + ".")
    print(f"Picture: {path}")


if __name__ == "__main__":
    app.run(main)
